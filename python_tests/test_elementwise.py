"""Laws of actnorm, leaky, logit and their inverses; dequantize's bits and its levels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gmkernels as gm
from gmkernels import dispatch, noise, registry
from gmkernels.spec import Case

DEQUANTIZE = registry.row("dequantize")
BINS = (1, 2, 3, 17, 49, 83, 255, 256, 1000, 65536, 1 << 20)


def maps(channels: int, dtype: torch.dtype, device: str) -> dict[str, tuple[Callable, Callable]]:
    """Each map and its inverse, as functions of x [B, channels, *] in (0, 1) and options."""
    generator = torch.Generator().manual_seed(2)
    shift, log_scale = (
        torch.randn(channels, generator=generator, dtype=torch.float64).to(device, dtype)
        for _ in range(2)
    )
    return {
        "actnorm": (
            lambda x, **o: gm.actnorm(x, shift, log_scale, **o),
            lambda y, **o: gm.actnorm_inverse(y, shift, log_scale, **o),
        ),
        "leaky": (
            lambda x, **o: gm.leaky(x - 0.5, slope=0.2, **o),
            lambda y, **o: tuple(
                a + b for a, b in zip(gm.leaky_inverse(y, slope=0.2, **o), (0.5, 0.0), strict=True)
            ),
        ),
        "logit": (gm.logit, gm.logit_inverse),
        "logit_of_0": (
            lambda x, **o: gm.logit(x, alpha=0.0, **o),
            lambda y, **o: gm.logit_inverse(y, alpha=0.0, **o),
        ),
    }


NAMES = tuple(maps(1, torch.float32, "cpu"))


@pytest.mark.parametrize("name", NAMES)
def test_inverse_undoes(name, backend, device):
    x = torch.rand(33, 5, 7, generator=torch.Generator().manual_seed(1)).to(device)
    forward, inverse = maps(5, torch.float32, device)[name]
    y, log_det = forward(x, backend=backend)
    back, minus = inverse(y, backend=backend)
    assert not torch.equal(y, x)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(minus, -log_det, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_log_det_is_slogdet(name):
    x = torch.rand(1, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    forward, inverse = maps(3, torch.float64, "cpu")[name]
    for function, at in ((forward, x), (inverse, forward(x)[0])):
        jacobian = torch.func.jacrev(lambda v, f=function: f(v.view(1, 3, 2))[0].flatten())
        _, log_det = function(at)
        expected = jacobian(at.flatten()).slogdet().logabsdet
        assert expected.abs() > 0.1
        torch.testing.assert_close(log_det[0], expected)


@pytest.mark.parametrize("shape", [(64, 3), (16, 3, 5), (8, 3, 6, 7)])
@pytest.mark.parametrize("center", [0.0, 1e4])
def test_statistics_normalise(shape, center, backend, device):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3 + center
    x = x.to(device)
    y, _ = gm.actnorm(x, *gm.actnorm_statistics(x), backend=backend)
    channels = y.double().transpose(0, 1).flatten(1)
    # A mean near 1e4 has a spacing of 1e-3 in float32, a third of it in units of the deviation.
    tolerance = 1e-6 if center == 0 else 4e-4
    zero, one = torch.zeros_like(channels[:, 0]), torch.ones_like(channels[:, 0])
    torch.testing.assert_close(channels.mean(1), zero, rtol=0, atol=tolerance)
    torch.testing.assert_close(channels.std(1, correction=0), one, rtol=0, atol=tolerance)


def test_statistics_lose_no_digits_to_the_mean():
    x = 1e4 + torch.randn(5000, 3, generator=torch.Generator().manual_seed(1))
    for got, wide in zip(gm.actnorm_statistics(x), gm.actnorm_statistics(x.double()), strict=True):
        assert torch.equal(got, wide.float())


def test_statistics_of_a_constant_channel_keep_its_scale():
    x = torch.stack([torch.full((9,), 3.0), torch.arange(9.0)], 1).requires_grad_()
    shift, log_scale = gm.actnorm_statistics(x)
    assert shift[0] == -3
    assert log_scale[0] == 0
    assert not shift.requires_grad
    wide = gm.actnorm_statistics(x.double())
    assert wide[0].dtype == wide[1].dtype == torch.float64


def parameter_gradients(x: Tensor, backend: str, inverse: bool) -> tuple[Tensor, ...]:
    shift = torch.linspace(-1, 1, x.shape[1], device=x.device, requires_grad=True)
    log_scale = torch.linspace(0, 1, x.shape[1], device=x.device, requires_grad=True)
    function = gm.actnorm_inverse if inverse else gm.actnorm
    y, log_det = function(x, shift, log_scale, backend=backend)
    return torch.autograd.grad(y.sin().sum() + log_det.sum(), (shift, log_scale))


@pytest.mark.parametrize("shape", [(1500, 40), (70, 3, 31, 31)])
def test_parameter_gradients_have_the_same_bits_for_any_thread_count(shape, isas, device):
    if device != "cpu":
        pytest.skip("threads are the CPU's")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    for isa in isas:
        found = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                with gm.use_isa(isa):
                    found.append(parameter_gradients(x, "native", False))
        finally:
            torch.set_num_threads(threads)
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True)), isa


def test_scale_gradient_survives_a_mean_far_from_zero(backend, device):
    """sum g (x + shift), not sum g x + shift sum g, whose two terms cancel."""
    x = 1000 + torch.randn(256, 2, generator=torch.Generator().manual_seed(1)).to(device)
    shift = torch.full((2,), -1000.0, device=device)
    log_scale = torch.zeros(2, device=device, requires_grad=True)

    def gradient(x: Tensor, shift: Tensor, backend: str) -> Tensor:
        y, _ = gm.actnorm(x, shift, log_scale.to(x.dtype), backend=backend)
        return torch.autograd.grad(y.sum(), log_scale)[0]

    truth = gradient(x.double(), shift.double(), "reference")
    torch.testing.assert_close(gradient(x, shift, backend), truth, rtol=1e-5, atol=1e-5)


def test_logit_without_regularisation_is_infinite_at_the_ends(backend, device):
    x = torch.tensor([[0.0, 1.0, 0.5]], device=device)
    y, log_det = gm.logit(x, alpha=0.0, backend=backend)
    assert y.tolist() == [[-float("inf"), float("inf"), 0.0]]
    assert log_det.tolist() == [float("inf")]


def test_leaky_log_det_alone_has_no_gradient(backend, device):
    x = torch.tensor([[-1.0, 2.0]], device=device, requires_grad=True)
    if backend == "reference":
        assert not gm.leaky(x, backend=backend)[1].requires_grad
        return
    (dx,) = torch.autograd.grad(gm.leaky(x, backend=backend)[1].sum(), x, create_graph=True)
    assert dx.tolist() == [[0.0, 0.0]]
    (second,) = torch.autograd.grad(dx.sum(), x, allow_unused=True)
    assert second is None or second.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("case", DEQUANTIZE.cases, ids=lambda case: case.name)
def test_dequantize_has_equal_bits(case: Case, device, backends, isas):
    given = DEQUANTIZE.inputs(case, torch.float32, device, 3)
    expected = gm.dequantize(*given.args, **given.kwargs, backend="reference")
    assert expected.shape == case.shape
    assert expected.dtype == torch.float32
    for backend in backends:
        made = gm.dequantize(*given.args, **given.kwargs, backend=backend)
        assert torch.equal(made, expected), backend
        assert made.is_contiguous()
    for isa in isas if device == "cpu" else []:
        with gm.use_isa(isa):
            made = gm.dequantize(*given.args, **given.kwargs, backend="native")
        assert torch.equal(made, expected), isa


@pytest.mark.parametrize("columns", [1, 37, 5000])
def test_dequantize_batch_splits_agree(columns, backend, device):
    levels = torch.randint(0, 256, (5, columns), generator=torch.Generator().manual_seed(1))
    levels = levels.to(device, torch.uint8)
    whole = gm.dequantize(levels, bins=256, seed=3, backend=backend)
    part = gm.dequantize(levels[2:4], bins=256, seed=3, offset=2, backend=backend)
    assert torch.equal(part, whole[2:4])
    u = 1 - gm.uniform((5, columns), seed=3, device=device)
    assert torch.equal(gm.dequantize(levels, bins=256, u=u, backend=backend), whole)


@pytest.mark.parametrize("bins", BINS)
def test_dequantize_stays_in_its_level(bins, backend, device):
    """floor(x bins) = levels for the smallest and the largest noise, and for what rounds to 1."""
    generator = torch.Generator().manual_seed(1)
    levels = torch.cat(
        [
            torch.randint(0, bins, (2000,), generator=generator),
            torch.arange(min(bins, 500)),
            bins - 1 - torch.arange(min(bins, 500)),
        ]
    )
    levels = levels[:, None].to(device)
    rounded_up = 0
    for noise_value in (0.0, 2.0**-33, 0.3, 0.999, 1 - 2.0**-24, 1.0):
        u = torch.full(levels.shape, noise_value, device=device)
        x = gm.dequantize(levels, bins=bins, u=u, backend=backend)
        assert ((x >= 0) & (x < 1)).all()
        assert torch.equal((x * bins).floor().long(), levels)
        assert torch.equal((x.double() * bins).floor().long(), levels)
        true = (levels + u.double()) / bins
        torch.testing.assert_close(x.double(), true, rtol=2.0**-20, atol=0)
        rounded_up += ((levels + u) / bins * bins).floor().long().ne(levels).sum().item()
    assert rounded_up > 0, "plain rounding stays in the level, too: the test sees nothing"


def test_dequantize_compiles(device):
    torch._dynamo.reset()
    levels = torch.arange(12, device=device).view(3, 4)

    def call(levels: Tensor, seed: Tensor) -> Tensor:
        return gm.dequantize(levels, bins=16, seed=seed) * 2

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        key = noise.key(seed)
        assert torch.equal(compiled(levels, key), call(levels, key))


def test_dequantize_draws_anew_under_manual_seed(device):
    levels = torch.zeros(3, 4, dtype=torch.int32, device=device)
    torch.manual_seed(1)
    first, second = (gm.dequantize(levels, bins=2) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(gm.dequantize(levels, bins=2), first)
    assert not torch.equal(first, second)


def test_dequantize_has_no_gradient(backend, device):
    u = torch.rand(2, 3, device=device, requires_grad=True)
    levels = torch.ones(2, 3, dtype=torch.uint8, device=device)
    assert not gm.dequantize(levels, bins=4, u=u, backend=backend).requires_grad


def test_dequantize_opcheck(device, backends):
    levels = torch.arange(15, device=device).view(3, 5)
    u = torch.rand(3, 5, device=device)
    for backend in set(backends) - {"reference"}:
        operator = dispatch.kernel("dequantize", backend).forward
        for arguments in ((levels, u, None, 16), (levels, None, noise.key(1).to(device), 16)):
            torch.library.opcheck(operator, arguments)


def test_dequantize_under_vmap_wants_noise():
    levels = torch.zeros(2, 3, 4, dtype=torch.long)
    with pytest.raises(RuntimeError, match="under vmap one seed would give every example the same"):
        torch.vmap(lambda v: gm.dequantize(v, bins=4, seed=1))(levels)


X = torch.rand(2, 3)
C = torch.zeros(3)
LEVELS = torch.zeros(2, 3, dtype=torch.long)
REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: gm.actnorm([1.0], C, C), TypeError, "x must be a tensor, got list"),
    (lambda: gm.actnorm(X[0], C, C), ValueError, r"x must have shape \[B, \*\]"),
    (lambda: gm.actnorm(X, C[:2], C), ValueError, r"shift must have .* \(3,\), got \(2,\)"),
    (lambda: gm.actnorm(X, C, C[None]), ValueError, r"log_scale must .* got \(1, 3\)"),
    (lambda: gm.actnorm(X, C.int(), C), TypeError, "shift must be float32, .* got torch.int32"),
    (lambda: gm.actnorm(X, C, C.to("meta")), ValueError, "log_scale must be on cpu"),
    (lambda: gm.actnorm_inverse(X, C, None), TypeError, "actnorm_inverse: log_scale must be a t"),
    (lambda: gm.actnorm_statistics(X[:0]), ValueError, r"at least one element .* got \(0, 3\)"),
    (lambda: gm.leaky(X, slope=0.0), ValueError, "slope must be positive .* got 0.0"),
    (lambda: gm.leaky(X, slope=float("nan")), ValueError, "slope must be positive .* got nan"),
    (lambda: gm.leaky_inverse(X, slope=-1), ValueError, "leaky_inverse: slope must .* got -1"),
    (lambda: gm.leaky_inverse(X[0]), ValueError, "leaky_inverse: y must have shape"),
    (lambda: gm.logit(X, alpha=0.5), ValueError, r"alpha must lie in \[0, 0.5\), got 0.5"),
    (lambda: gm.logit(X, alpha=-1e-3), ValueError, "alpha must lie in"),
    (lambda: gm.logit_inverse(X.long()), TypeError, "y must be float32, .* got torch.int64"),
    (
        lambda: gm.logit(X.double(), backend="native"),
        RuntimeError,
        "float64 runs on the reference backend only",
    ),
    (lambda: gm.dequantize([1], bins=2), TypeError, "levels must be a tensor, got list"),
    (lambda: gm.dequantize(X, bins=2), TypeError, "levels must be uint8, int32 or int64"),
    (lambda: gm.dequantize(LEVELS[0], bins=2), ValueError, r"levels must have shape \[B, \*\]"),
    (lambda: gm.dequantize(LEVELS, bins=2.0), TypeError, "bins must be an int, got float"),
    (lambda: gm.dequantize(LEVELS, bins=True), TypeError, "bins must be an int, got bool"),
    (lambda: gm.dequantize(LEVELS, bins=0), ValueError, r"bins must lie in \[1, 2\^20\].* got 0"),
    (lambda: gm.dequantize(LEVELS, bins=2**20 + 1), ValueError, "bins must lie in .* got 1048577"),
    (lambda: gm.dequantize(LEVELS, bins=2, seed=1, u=X), ValueError, "u or a seed, not both"),
    (lambda: gm.dequantize(LEVELS, bins=2, u=X[:1]), ValueError, r"u must have levels' shape"),
    (lambda: gm.dequantize(LEVELS, bins=2, u=LEVELS), TypeError, "u must be float32"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


OPERATORS = torch.ops.gmkernels
KEY = noise.key(1)
DIRECT: list[tuple[Callable[[], Any], str]] = [
    (lambda: OPERATORS.actnorm_forward(X, C[:2], C, False), r"shift must have shape \(3\)"),
    (lambda: OPERATORS.actnorm_forward(X[0], C, C, False), r"x must have shape \[B, C, \*\]"),
    (lambda: OPERATORS.actnorm_forward(X.t(), C[:2], C[:2], False), "contiguous within a row"),
    (
        lambda: OPERATORS.actnorm_backward(X[:1], None, X, C, C, False, 7),
        r"dy must have 2 rows of 3 elements, got shape \(1, 3\)",
    ),
    (
        lambda: OPERATORS.actnorm_backward(X, C, X, C, C, False, 7),
        r"dlog_det must have shape \(2\), got \(3\)",
    ),
    (lambda: OPERATORS.pointwise_forward(X, 2, 0.1, False), "kind must be 0 or 1, got 2"),
    (lambda: OPERATORS.dequantize(LEVELS, X, KEY, 4), "exactly one of u and key"),
    (lambda: OPERATORS.dequantize(LEVELS, X[:1], None, 4), "u must be contiguous float32 of"),
    (lambda: OPERATORS.dequantize(LEVELS.short(), X, None, 4), "levels must be int64, int32 or"),
    (lambda: OPERATORS.dequantize(LEVELS.t(), X, None, 4), "levels must be contiguous"),
]


@pytest.mark.parametrize(("call", "message"), DIRECT)
def test_direct_refusals(call, message):
    """torch.ops.gmkernels called by hand checks what memory safety needs."""
    with pytest.raises(RuntimeError, match=message):
        call()
