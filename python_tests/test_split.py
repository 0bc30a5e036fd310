"""Splits: parts and joins, what is refused, and that a split moves and is saved with its module."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import gmkernels as gm
from gmkernels import Split


def splits(permutation: bool) -> dict[str, tuple[Split, tuple[int, ...]]]:
    def order(n: int):
        generator = torch.Generator().manual_seed(n)
        return torch.randperm(n, generator=generator) if permutation else None

    return {
        "halves": (Split.halves(7, permutation=order(7)), (3, 7)),
        "halves flipped": (Split.halves(6, flip=True, permutation=order(6)), (3, 6, 2)),
        "alternating": (Split.alternating(5, permutation=order(5)), (2, 5, 3, 4)),
        "checkerboard": (Split.checkerboard(3, 5, 4, permutation=order(3)), (2, 3, 5, 4)),
        "index": (Split.index(torch.tensor([4, 0, 2]), 6, permutation=order(6)), (3, 6)),
        "middle": (Split.index(torch.tensor([2, 3]), 6, permutation=order(6)), (3, 6, 5)),
    }


@pytest.mark.parametrize("permutation", [False, True])
@pytest.mark.parametrize("name", splits(False))
def test_join_undoes_parts(name, permutation):
    split, shape = splits(permutation)[name]
    x = torch.randn(shape)
    for of_output in (False, True):
        passed, transformed = split.parts(x, of_output=of_output)
        assert transformed.shape == split.part_shape(x)
        assert torch.equal(split.join(passed, transformed, of_output=of_output), x)


@pytest.mark.parametrize("name", splits(True))
def test_permutation_takes_position_p_j(name):
    split, shape = splits(True)[name]
    plain, _ = splits(False)[name]
    generator = torch.Generator().manual_seed(shape[1])
    p = torch.randperm(shape[1], generator=generator)
    x = torch.randn(shape)
    shift = torch.randn(split.part_shape(x))
    moved, _ = gm.affine_coupling(x, shift, split=split, scale="additive")
    still, _ = gm.affine_coupling(x, shift, split=plain, scale="additive")
    assert torch.equal(moved, still[:, p])


def test_checkerboard_is_dinhs():
    board = torch.zeros(1, 1, 4, 4)
    _, transformed = Split.checkerboard(1, 4, 4).parts(board + torch.arange(16.0).view(4, 4))
    assert transformed.tolist() == [[[[1, 3], [4, 6], [9, 11], [12, 14]]]]


def test_halves_are_views():
    x = torch.randn(3, 6)
    passed, transformed = Split.halves(6).parts(x)
    assert passed.data_ptr() == x.data_ptr()
    assert torch.equal(transformed, x[:, 3:])


def test_moves_casts_and_loads_with_its_module():
    model = torch.nn.Sequential(Split.halves(6, permutation=torch.tensor([3, 1, 2, 0, 5, 4])))
    assert model.to(torch.bfloat16)[0].order.dtype is torch.int32
    other = torch.nn.Sequential(Split.halves(6))
    assert other[0].begin == 3
    other.load_state_dict(model.state_dict())
    assert other[0].begin == -1
    assert torch.equal(other[0].order, model[0].order)
    model.half()  # torch's own cast is not the constructor's name


@hypothesis.given(st.permutations(range(9)), st.integers(1, 9))
def test_any_index(order, n):
    split = Split.index(torch.tensor(order[:n]), 9)
    x = torch.arange(9.0)[None]
    passed, transformed = split.parts(x)
    assert transformed[0].tolist() == order[:n]
    assert passed[0].tolist() == sorted(order[n:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Split.halves(0), "all >= 1"),
        (lambda: Split.halves(1, flip=True), "no position"),
        (lambda: Split.checkerboard(3, 4, 5), "even width"),
        (lambda: Split.index(torch.tensor([0, 0]), 3), "distinct"),
        (lambda: Split.index(torch.tensor([3]), 3), "0..2"),
        (lambda: Split.index(torch.tensor([-1]), 3), "0..2"),
        (lambda: Split.index(torch.tensor([0.0]), 3), "integer positions"),
        (lambda: Split.index(torch.zeros(3, dtype=torch.bool), 3), "integer positions"),
        (lambda: Split.halves(4, permutation=torch.arange(3)), "each of 0..3"),
        (lambda: Split.halves(4).parts(torch.zeros(2, 5)), r"\[B, 4, ...\]"),
        (lambda: Split.checkerboard(1, 2, 2).parts(torch.zeros(2, 1, 2, 4)), r"\[B, 1, 2, 2\]"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
