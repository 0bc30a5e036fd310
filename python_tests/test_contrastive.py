"""Losses over pairs beyond the rows' tests: laws, hand values, digits, memory, refusals."""

import math

import pytest
import torch
from torch import Tensor
from torch.profiler import profile

from gmkernels import info_nce, nt_xent
from gmkernels.ops.contrastive.spec import lightly_nt_xent
from gmkernels.spec import filled

LOSSES = [nt_xent, info_nce]


def pair(n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> list[Tensor]:
    x, noise = (filled((n, d), torch.float64, "cpu", seed + i) for i in range(2))
    return [x.to(dtype), (x + 0.5 * noise).to(dtype)]


def gradients(loss: Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
    weights = filled(loss.shape, loss.dtype, str(loss.device), 9)
    return torch.autograd.grad(loss, xs, weights)


def test_hand_value(backend, device):
    """Two pairs of orthogonal unit rows at tau = 1: the partner at 1, every negative at 0."""
    z = torch.eye(2, device=device)
    views = nt_xent(z, 3 * z, temperature=1.0, backend=backend)
    torch.testing.assert_close(views, torch.full_like(views, math.log(math.e + 2) - 1))
    both = info_nce(z, 3 * z, temperature=1.0, backend=backend)
    torch.testing.assert_close(both, torch.full_like(both, math.log(math.e + 1) - 1))
    wide = info_nce(z, 3 * z, temperature=1.0, normalize=False, backend=backend)
    torch.testing.assert_close(wide, torch.full_like(wide, math.log(math.e**3 + 1) - 3))


@pytest.mark.parametrize("n", [2, 5, 40])
def test_equal_embeddings(n, backend, device):
    """log(2N - 1), and log N of InfoNCE, at any temperature."""
    z = torch.full((n, 3), -0.7, device=device)
    for loss, count in ((nt_xent, 2 * n - 1), (info_nce, n)):
        for temperature in (0.05, 0.5):
            found = loss(z, z, temperature=temperature, backend=backend)
            expected = torch.full((n,), math.log(count), device=device)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_equals_lightly():
    x, y = pair(9, 12, torch.float64)
    for temperature in (0.07, 0.5):
        expected = lightly_nt_xent(x, y, temperature=temperature)
        torch.testing.assert_close(nt_xent(x, y, temperature=temperature), expected)


def test_order_of_pairs_and_views(backend, device):
    """Pairs in another order give their losses in that order; views may change places."""
    x, y = (z.to(device) for z in pair(20, 6))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    for loss in LOSSES:
        whole = loss(x, y, backend=backend)
        torch.testing.assert_close(loss(x[order], y[order], backend=backend), whole[order])
        torch.testing.assert_close(loss(y, x, backend=backend), whole)
    ways = [info_nce(*pair_, symmetric=False, backend=backend) for pair_ in ((x, y), (y, x))]
    assert not torch.allclose(*ways)
    torch.testing.assert_close(info_nce(x, y, backend=backend), (ways[0] + ways[1]) / 2)


@pytest.mark.parametrize("loss", LOSSES)
def test_confident_pairs_keep_their_digits(loss, backend, device):
    """exp(-50) beside a partner is nothing to a sum that holds 1, but it is the loss."""
    z = torch.eye(6, device=device)
    found = loss(z, z, temperature=0.02, backend=backend)
    negatives = 10 if loss is nt_xent else 5
    expected = torch.full_like(found, negatives * math.exp(-50))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_learned_temperature(loss, backend, device):
    """The same loss as with a number, and the derivative that differences give."""
    x, y = (z.to(device) for z in pair(11, 7))
    tau = torch.tensor([0.3], device=device, requires_grad=True)
    found = loss(x, y, temperature=tau, backend=backend)
    torch.testing.assert_close(found, loss(x, y, temperature=0.3, backend=backend))
    (slope,) = torch.autograd.grad(found.sum(), tau)
    step = 1e-4
    up, down = (loss(x.double(), y.double(), temperature=0.3 + s).sum() for s in (step, -step))
    expected = ((up - down) / (2 * step)).float()
    torch.testing.assert_close(slope[0], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_rows_of_zeros(loss, backend, device):
    """They are at similarity 0 to all and get no gradient; nothing is infinite."""
    x, y = (z.to(device) for z in pair(5, 4))
    x[1] = 0
    x.requires_grad_()
    found = loss(x, y, temperature=0.1, backend=backend)
    (dx,) = gradients(found, x)
    assert found.isfinite().all()
    assert dx.isfinite().all()
    assert (dx[1] == 0).all()
    assert (dx[0] != 0).all()
    if loss is info_nce:
        one_way = loss(x, y, temperature=0.1, symmetric=False, backend=backend)
        torch.testing.assert_close(one_way[1].item(), math.log(5))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_value_that_is_not_finite_reaches_every_loss(loss, value, backend, device):
    """Every row is a negative of every other: none hides it."""
    x, y = (z.to(device) for z in pair(70, 4))
    x[68, 1] = value
    assert loss(x, y, backend=backend).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LOSSES)
def test_bits_do_not_depend_on_threads(loss, dtype):
    """Several tiles, blocks that end inside them, and what is no negative in many places."""
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            x, y = (z.requires_grad_() for z in pair(131, 37, dtype))
            made = loss(x, y, backend="native")
            found.append((made, *gradients(made, x, y)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
def test_memory_holds_no_matrix(loss):
    n, d = 1024, 8
    x, y = (z.requires_grad_() for z in pair(n, d))
    with profile(profile_memory=True) as profiled:
        gradients(loss(x, y, backend="native"), x, y)
    now = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert 2 * n * d * 4 <= peak < 40 * n * d * 4 < n * n * 4 / 3


@pytest.mark.parametrize("loss", LOSSES)
def test_refusals(loss):
    z = torch.ones(3, 4)
    for args, kwargs, error, words in (
        ((z[:1], z[:1]), {}, ValueError, "at least 2 pairs"),
        ((z, z[:2]), {}, ValueError, "shape"),
        ((z[:, :0], z[:, :0]), {}, ValueError, "at least one element"),
        ((z[0], z[0]), {}, ValueError, "two dimensions"),
        ((z.long(), z.long()), {}, TypeError, "float32"),
        ((z, [1.0]), {}, TypeError, "tensor"),
        ((z, z), {"temperature": 0.0}, ValueError, "positive"),
        ((z, z), {"temperature": math.inf}, ValueError, "positive"),
        ((z, z), {"temperature": torch.ones(2)}, ValueError, "one element"),
        ((z.double(), z.double()), {"backend": "native"}, RuntimeError, "float64"),
    ):
        with pytest.raises(error, match=words) as caught:
            loss(*args, **kwargs)
        assert str(caught.value).startswith((f"{loss.__name__}: ", "contrastive: "))


def test_operator_refuses_what_memory_safety_needs():
    forward = torch.ops.gmkernels.contrastive_forward
    z = torch.ones(4, 3)
    for args, words in (
        ((z[:3], None, 1.0, False), "two views"),
        ((z, z[:3], 1.0, True), "q's shape"),
        ((z, z.bfloat16(), 1.0, True), "dtype"),
        ((z.T, z.T, 1.0, True), "contiguous rows"),
    ):
        with pytest.raises(RuntimeError, match=words):
            forward(*args)
