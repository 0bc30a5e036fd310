"""Vector quantization: indices are float64's on every backend, sums keep their order, laws."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gmkernels as gm
from gmkernels import dispatch, registry
from gmkernels.spec import Case, Op, filled

ROWS = [op for op in registry.rows() if op.family == "quantize"]
EVERY_CASE = [
    pytest.param(op, case, id=f"{op.name}-{case.name}") for op in ROWS for case in op.cases
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODEBOOK = filled((9, 6), torch.float32, "cpu", 1)


def as_tuple(x: Any) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)


def brute_force(x: Tensor, codebook: Tensor) -> Tensor:
    """By Python's own comparison of exact differences, one row after the other."""
    found = []
    for row in x.double().flatten(0, -2):
        distances = (row - codebook.double()).square().sum(1).tolist()
        finite = [float("inf") if d != d else d for d in distances]
        found.append(finite.index(min(finite)))
    return torch.tensor(found).view(x.shape[:-1])


def allowed(op: Op, got: Tensor, truth: Tensor) -> Tensor:
    if not got.is_floating_point():
        return torch.zeros_like(truth, dtype=torch.float64)
    scale = truth.abs().max() if truth.numel() else 0.0
    return torch.full_like(truth, op.floor[0] or 1.0).double() * scale * torch.finfo(got.dtype).eps


@pytest.mark.parametrize(("op", "case"), EVERY_CASE)
def test_values(op: Op, case: Case, backend, device):
    few = backend == "triton" and device == "cpu" and op.name == "vector_quantize"
    for dtype in DTYPES[:1] if few else DTYPES:
        given = op.inputs(case, dtype, device, 3)
        wide = given.map(Tensor.double)
        truths = as_tuple(op.function(*wide.args, **wide.kwargs, backend="reference"))
        found = as_tuple(op.function(*given.args, **given.kwargs, backend=backend))
        for got, truth in zip(found, truths, strict=True):
            assert got.shape == truth.shape
            assert got.is_contiguous()
            assert got.device == given.args[0].device
            assert ((got.double() - truth.double()).abs() <= allowed(op, got, truth)).all(), dtype


@pytest.mark.parametrize("case", ["odd", "grid", "equal", "far_from_0", "one_code"])
def test_reference_is_brute_force(case):
    op = registry.row("nearest_code")
    given = op.inputs(op.case(case), torch.float32, "cpu", 5)
    assert torch.equal(op.function(*given.args, backend="reference"), brute_force(*given.args))


def test_first_code_on_ties(backend, device):
    codes = torch.tensor([[5.0, 5.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], device=device)
    x = torch.tensor([[0.0, 0.0], [0.5, 0.5], [3.0, 0.0]], device=device)
    assert gm.nearest_code(x, codes, backend=backend).tolist() == [1, 1, 1]


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e18, 1e25])
def test_any_scale_and_offset(scale, backend, device):
    # Products under- and overflow float32 at the ends; the near codes differ in their last bits.
    x = filled((40, 5), torch.float32, device, 2) * scale
    near = x[:20] + scale * 1e-6 * filled((20, 5), torch.float32, device, 3)
    codes = torch.cat([near, near + scale * 2e-7])
    assert torch.equal(gm.nearest_code(x, codes, backend=backend).cpu(), brute_force(x, codes))


def test_nan_and_infinity(backend, device):
    nan, inf = float("nan"), float("inf")
    x = CODEBOOK.to(device).clone()
    codes = x.clone()
    for row, value in ((1, nan), (2, inf), (3, -inf)):
        x[row, 2] = value
    found = gm.nearest_code(x, codes, backend=backend)
    assert found.tolist() == [0, 0, 0, 0, 4, 5, 6, 7, 8]
    quantized, _, loss = gm.vector_quantize(x, codes, backend=backend)
    assert quantized.isfinite().all(1).tolist() == [True, False, False, False] + [True] * 5
    assert not loss.isfinite()
    # A code that is not finite is not chosen, and the others are found as before.
    x, bad = codes, codes.clone()
    bad[4, 1], bad[6, 0] = nan, inf
    found = gm.nearest_code(x, bad, backend=backend)
    keep = [0, 1, 2, 3, 5, 7, 8]
    assert found[keep].tolist() == keep
    assert {int(found[4]), int(found[6])} <= set(keep)
    assert gm.nearest_code(x, bad[4:5], backend=backend).tolist() == [0] * 9


def test_every_object_and_thread_count_has_the_same_bits(isas):
    x = filled((330, 21), torch.float32, "cpu", 1)
    codes = torch.cat([x[:50], x[:50] + 1e-7])
    threads = torch.get_num_threads()
    found = []
    try:
        for isa in isas:
            for count in (1, 2):
                torch.set_num_threads(count)
                with dispatch.use_isa(isa):
                    index = gm.nearest_code(x, codes, backend="native")
                    stats = gm.code_statistics(x, index % 7, 7, backend="native")
                    found.append((index, *stats))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_rows_do_not_depend_on_neighbours(backend, device):
    x = filled((70, 6), torch.float32, device, 1)
    codes = CODEBOOK.to(device)
    whole = gm.nearest_code(x, codes, backend=backend)
    assert torch.equal(gm.nearest_code(x[33:40], codes, backend=backend), whole[33:40])


def test_statistics_are_sums_of_the_codes_rows(backend, device):
    x = filled((80, 5), torch.float32, device, 1)
    indices = torch.arange(80, device=device) % 6 // 2 * 2  # codes 1, 3 and 5 have no rows
    counts, sums = gm.code_statistics(x, indices, 6, backend=backend)
    assert counts.tolist() == [28, 0, 26, 0, 26, 0]
    for k in range(6):
        expected = x[indices == k].double().sum(0)
        torch.testing.assert_close(sums[k].double(), expected, rtol=2e-6, atol=2e-6)
    again = gm.code_statistics(x, indices, 6, backend=backend)
    assert torch.equal(again[1], sums)
    order = torch.argsort(indices, stable=True)  # the order within a code is what counts
    ordered = gm.code_statistics(x[order], indices[order], 6, backend=backend)
    assert torch.equal(ordered[1], sums)


def test_gradients(device):
    x = filled((4, 3, 6), torch.float64, device, 1).requires_grad_()
    codes = CODEBOOK.double().to(device).requires_grad_()
    weights = filled((4, 3, 6), torch.float64, device, 2)
    q, index, loss = gm.vector_quantize(x, codes, commitment=0.3, codebook_weight=0.7)
    dx, dc = torch.autograd.grad((q * weights).sum() + 2 * loss, (x, codes))
    near = codes.detach()[index]
    torch.testing.assert_close(dx, weights + 2 * 0.3 * 2 * (x - near) / x.numel())
    difference = 2 * 0.7 * 2 * (near - x.detach()) / x.numel()
    expected = torch.zeros_like(codes).index_add(0, index.flatten(), difference.flatten(0, 1))
    torch.testing.assert_close(dc, expected)
    (dc,) = torch.autograd.grad(
        gm.vector_quantize(x, codes, codebook_weight=0.0)[2], codes, allow_unused=True
    )
    assert dc is None or not dc.any()


def test_second_derivatives(device):
    x = filled((5, 6), torch.float64, device, 1).requires_grad_()
    codes = CODEBOOK.double().to(device).requires_grad_()

    def loss(x, codes):
        return gm.vector_quantize(x, codes)[2]

    # By hand: each term is a square of a difference of which one side is held.
    dx, dc = torch.autograd.grad(loss(x, codes), (x, codes), create_graph=True)
    (second,) = torch.autograd.grad(dx.sum(), x, retain_graph=True)
    torch.testing.assert_close(second, torch.full_like(x, 2 * 0.25 / x.numel()))
    (second,) = torch.autograd.grad(dc.sum(), codes)
    counts, _ = gm.code_statistics(x, gm.nearest_code(x, codes), 9)
    torch.testing.assert_close(second, (2 * counts.double()[:, None] / x.numel()).expand(9, 6))
    grad = torch.func.grad(loss)(x.detach(), codes.detach())
    torch.testing.assert_close(grad, dx.detach())


def test_loss_does_not_depend_on_how_often_vectors_are_repeated(backend, device):
    x, codes = filled((10, 6), torch.float32, device, 1), CODEBOOK.to(device)
    once = gm.vector_quantize(x, codes, backend=backend)[2]
    thrice = gm.vector_quantize(x.repeat(3, 1), codes, backend=backend)[2]
    torch.testing.assert_close(once, thrice)
    distance = (x - codes[gm.nearest_code(x, codes)]).square().mean()
    torch.testing.assert_close(once, 1.25 * distance)


def test_quantized_are_the_codes_themselves(backend, device):
    x = filled((50, 6), torch.float32, device, 1) * 100
    q, index, _ = gm.vector_quantize(x, CODEBOOK.to(device), backend=backend)
    assert torch.equal(q, CODEBOOK.to(device)[index])
    again = gm.vector_quantize(q, CODEBOOK.to(device), backend=backend)
    assert torch.equal(again[1], index)
    assert again[2] == 0


def test_indices_of_vector_quantize_pytorch():
    peers = pytest.importorskip("vector_quantize_pytorch")
    peer = peers.VectorQuantize(16, 40, commitment_weight=0.25).eval()
    peer.codebook = codes = filled((40, 16), torch.float32, "cpu", 1)
    x = filled((2, 300, 16), torch.float32, "cpu", 2)
    quantized, index, _ = peer(x)
    ours = gm.vector_quantize(x, codes)
    assert torch.equal(ours[1], index)
    torch.testing.assert_close(ours[0], quantized)


def test_compiled(device):
    x = filled((30, 6), torch.float32, device, 1).requires_grad_()
    codes = CODEBOOK.to(device).requires_grad_()

    def call(x, codes):
        q, index, loss = gm.vector_quantize(x, codes)
        counts, sums = gm.code_statistics(x, index, 9)
        return loss + q.square().sum(), index, counts, sums

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(x, codes), call(x, codes), strict=True):
        torch.testing.assert_close(got, expected)
    ours, theirs = (torch.autograd.grad(f(x, codes)[0], (x, codes)) for f in (compiled, call))
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected)


def test_opcheck(backend, device):
    if backend == "reference":
        pytest.skip("plain PyTorch")
    x, index = filled((10, 6), torch.float32, device, 1), torch.arange(10, device=device) % 4
    for name, arguments in (
        ("nearest_code", (x, CODEBOOK.to(device))),
        ("code_statistics", (x, index, 4)),
    ):
        torch.library.opcheck(dispatch.kernel(name, backend).forward, arguments)


X, INDEX = torch.zeros(4, 6), torch.zeros(4, dtype=torch.long)
REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: gm.nearest_code([1.0], CODEBOOK), TypeError, "x must be a tensor, got list"),
    (lambda: gm.nearest_code(X, CODEBOOK.long()), TypeError, "codebook must be float32"),
    (lambda: gm.nearest_code(X, CODEBOOK[0]), ValueError, r"codebook must have .* got \(6,\)"),
    (lambda: gm.nearest_code(X, CODEBOOK[:0]), ValueError, r"K and D >= 1, got \(0, 6\)"),
    (lambda: gm.nearest_code(X.T, CODEBOOK), ValueError, r"D = 6 last, got \(6, 4\)"),
    (lambda: gm.nearest_code(X[0, 0], CODEBOOK), ValueError, r"D = 6 last, got \(\)"),
    (lambda: gm.nearest_code(X, CODEBOOK.to("meta")), ValueError, "codebook must be on cpu"),
    (
        lambda: gm.nearest_code(X.double(), CODEBOOK, backend="native"),
        RuntimeError,
        "float64 runs on the reference backend only",
    ),
    (
        lambda: gm.vector_quantize(X, CODEBOOK, commitment=-1),
        ValueError,
        "commitment must be .* -1",
    ),
    (
        lambda: gm.vector_quantize(X, CODEBOOK, codebook_weight=float("inf")),
        ValueError,
        "codebook_weight must be a finite number >= 0, got inf",
    ),
    (lambda: gm.code_statistics(X, INDEX.int(), 3), TypeError, "int64 tensor, got torch.int32"),
    (lambda: gm.code_statistics(X, INDEX[:3], 3), ValueError, r"shape \(4,\) on cpu, got \(3,\)"),
    (lambda: gm.code_statistics(X, INDEX, 0), ValueError, "codes must be .* >= 1, got 0"),
    (
        lambda: gm.code_statistics(X, INDEX + 3, 3, backend="native"),
        RuntimeError,
        r"indices must lie in \[0, 3\), got 3 in row 0",
    ),
]
OPERATORS = torch.ops.gmkernels
DIRECT: list[tuple[Callable[[], Any], str]] = [
    (lambda: OPERATORS.nearest_code(X, CODEBOOK[:, :5]), "rows of one width"),
    (lambda: OPERATORS.nearest_code(X, CODEBOOK[:0]), "1 to 2.31 - 1 codes, got 0"),
    (lambda: OPERATORS.nearest_code(X[0], CODEBOOK), "x must have two dimensions"),
    (lambda: OPERATORS.nearest_code(X.T.contiguous().T, CODEBOOK), "contiguous within a row"),
    (lambda: OPERATORS.code_statistics(X, INDEX[:2], 3), "contiguous int64 tensor of 4 elements"),
    (lambda: OPERATORS.code_statistics(X, INDEX - 1, 3), r"\[0, 3\), got -1 in row 0"),
    (lambda: OPERATORS.code_statistics(X, INDEX, -1), "codes must be >= 0, got -1"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(("call", "message"), DIRECT)
def test_direct_refusals(call, message):
    """torch.ops.gmkernels called by hand checks what memory safety needs."""
    with pytest.raises(RuntimeError, match=message):
        call()


def test_explain():
    text = gm.explain(functools.partial(gm.nearest_code, X), CODEBOOK)
    assert text.startswith("nearest_code on cpu: native")
