"""Elementwise maps of flows: actnorm, leaky, logit, their inverses; dequantize. See reference.py.

Saved for backward: the call's input and the parameters.
"""

from typing import Any

import torch
from torch import Tensor

from gmkernels import checks, dispatch
from gmkernels.autograd import DifferentiableOp, is_batched, is_transformed
from gmkernels.noise import Seed, resolve_key
from gmkernels.ops.elementwise import reference

__all__ = [
    "actnorm",
    "actnorm_inverse",
    "actnorm_statistics",
    "dequantize",
    "leaky",
    "leaky_inverse",
    "logit",
    "logit_inverse",
]

_LEVELS = (torch.uint8, torch.int32, torch.int64)

dispatch.load_family(__name__, ("actnorm", "pointwise", "dequantize"))
_actnorm = DifferentiableOp("actnorm", reference.actnorm, inputs=3, outputs=2)
_pointwise = DifferentiableOp("pointwise", reference.pointwise, inputs=1, outputs=2)


def _call_actnorm(
    op: str, x: Tensor, shift: Tensor, log_scale: Tensor, inverse: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    checks.check_rows(op, "x", x)
    for name, parameter in (("shift", shift), ("log_scale", log_scale)):
        checks.check_tensor(op, name, parameter, x.device)
        if tuple(parameter.shape) != (x.shape[1],):
            raise ValueError(
                f"{op}: {name} must have one element a channel of x (dimension 1), shape "
                f"({x.shape[1]},), got {tuple(parameter.shape)}"
            )
    wide = dispatch.is_wide(x, shift, log_scale)
    backend = dispatch.choose("actnorm", x.device.type, wide, backend)
    y, log_det = _actnorm(
        backend, checks.in_rows(x), shift.contiguous(), log_scale.contiguous(), inverse
    )
    return checks.in_layout_of(y, x), log_det


def actnorm(
    x: Tensor, shift: Tensor, log_scale: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """y = (x + shift) exp(log_scale) in each channel, and log|det dy/dx|.

    Args:
        x: [B, C, *]; float32, bfloat16, float16, or float64 (reference). Rows that are not
            contiguous cost a copy.
        shift: [C], along dimension 1 of x; its dtype may differ.
        log_scale: [C], likewise. actnorm_statistics() gives both their first values.
        backend: None chooses; a named backend runs or raises.
    Returns:
        y: x's shape, dtype and layout.
        log_det: [B] float32 (float64 on float64 inputs), the same for each row: log_scale summed
            over channels, times the elements of a channel.
    Raises:
        TypeError, ValueError: shapes, dtypes or devices other than said here.
        RuntimeError: a named backend that cannot run.

    Differentiable twice and more in all three; the gradients of shift and log_scale have the same
    bits for any number of threads. Accuracy: within twice the error of float32 PyTorch plus 2 ulp
    of the output's scale. Source: Kingma and Dhariwal 2018, section 3.1.

    >>> import torch, gmkernels
    >>> gmkernels.actnorm(torch.ones(1, 2), torch.tensor([1.0, 2.0]), torch.zeros(2))
    (tensor([[2., 3.]]), tensor([0.]))
    """
    return _call_actnorm("actnorm", x, shift, log_scale, False, backend)


def actnorm_inverse(
    y: Tensor, shift: Tensor, log_scale: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The x = y exp(-log_scale) - shift that actnorm() maps to y, and log|det dx/dy|.

    Args: as in actnorm(), with y in x's place.
    Returns:
        x: y's shape, dtype and layout.
        log_det: [B] float32 (float64 on float64 inputs), of the inverse map.
    Raises:
        TypeError, ValueError, RuntimeError: as in actnorm().

    Differentiable twice and more in all three. Source: Kingma and Dhariwal 2018, section 3.1.

    >>> import torch, gmkernels
    >>> gmkernels.actnorm_inverse(torch.ones(1, 2), torch.ones(2), torch.zeros(2))
    (tensor([[0., 0.]]), tensor([-0.]))
    """
    return _call_actnorm("actnorm_inverse", y, shift, log_scale, True, backend)


def actnorm_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """The shift and log_scale with which actnorm() gives x zero mean and unit deviation.

    Args:
        x: [B, C, *], the first batch, at least one element a channel; any floating dtype.
    Returns:
        shift: [C] float32 (float64 on float64 inputs), minus the mean of each channel.
        log_scale: [C] likewise, minus the log of its deviation (over n, not n - 1); 0 for a channel
            that is constant.
    Raises:
        TypeError, ValueError: no dense floating tensor [B, C, *], or one without elements.

    No gradient. Two passes in float64: no digits are lost to a mean far from 0. Source: Kingma and
    Dhariwal 2018, section 3.1 (data-dependent initialisation).

    >>> import torch, gmkernels
    >>> gmkernels.actnorm_statistics(torch.tensor([[1.0], [3.0]]))
    (tensor([-2.]), tensor([-0.]))
    """
    checks.check_rows("actnorm_statistics", "x", x)
    if x.numel() == 0:
        raise ValueError(
            f"actnorm_statistics: x must hold at least one element a channel, got {tuple(x.shape)}"
        )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    channels = x.detach().transpose(0, 1).flatten(1).to(torch.float64)  # [C, B P]
    mean = channels.mean(1, keepdim=True)
    variance = (channels - mean).square().mean(1)
    log_scale = -0.5 * torch.log(torch.where(variance == 0, 1.0, variance))
    return -mean[:, 0].to(dtype), log_scale.to(dtype)


def _call_pointwise(
    op: str, kind: str, x: Tensor, parameter: float, inverse: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    checks.check_rows(op, "y" if inverse else "x", x)
    name = dispatch.choose("pointwise", x.device.type, dispatch.is_wide(x), backend)
    index = reference.KINDS.index(kind)
    y, log_det = _pointwise(name, checks.in_rows(x), index, float(parameter), inverse)
    return checks.in_layout_of(y, x), log_det


def _call_leaky(
    op: str, x: Tensor, slope: float, inverse: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    if not 0 < slope < float("inf"):
        raise ValueError(
            f"{op}: slope must be positive and finite, or the map has no inverse, got {slope}"
        )
    return _call_pointwise(op, "leaky", x, slope, inverse, backend)


def leaky(x: Tensor, *, slope: float = 0.01, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """y = x for x >= 0 and slope x below, and log|det dy/dx|.

    Args:
        x: [B, *], at least two dimensions; float32, bfloat16, float16, or float64 (reference).
        slope: > 0, finite.
        backend: None chooses; a named backend runs or raises.
    Returns:
        y: x's shape, dtype and layout.
        log_det: [B] float32 (float64 on float64 inputs): log slope times the elements below 0.
    Raises:
        TypeError, ValueError: shapes, dtypes or options other than said here.
        RuntimeError: a named backend that cannot run.

    Differentiable twice and more in x; at 0 the derivative is 1, and log_det's is 0 everywhere.
    Accuracy: as in actnorm().

    >>> import torch, gmkernels
    >>> gmkernels.leaky(torch.tensor([[-2.0, 3.0]]), slope=0.5)
    (tensor([[-1.,  3.]]), tensor([-0.6931]))
    """
    return _call_leaky("leaky", x, slope, False, backend)


def leaky_inverse(
    y: Tensor, *, slope: float = 0.01, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The x that leaky() maps to y, and log|det dx/dy|.

    Args: as in leaky(), with y in x's place.
    Returns:
        x: y's shape, dtype and layout.
        log_det: [B] float32 (float64 on float64 inputs), of the inverse map.
    Raises:
        TypeError, ValueError, RuntimeError: as in leaky().

    Differentiable twice and more in y.

    >>> import torch, gmkernels
    >>> gmkernels.leaky_inverse(torch.tensor([[-1.0, 3.0]]), slope=0.5)
    (tensor([[-2.,  3.]]), tensor([0.6931]))
    """
    return _call_leaky("leaky_inverse", y, slope, True, backend)


def _call_logit(
    op: str, x: Tensor, alpha: float, inverse: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    if not 0 <= alpha < 0.5:
        raise ValueError(f"{op}: alpha must lie in [0, 0.5), got {alpha}; Dinh et al. use 0.05")
    return _call_pointwise(op, "logit", x, alpha, inverse, backend)


def logit(x: Tensor, *, alpha: float = 0.05, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """y = log(p / (1 - p)) with p = alpha + (1 - 2 alpha) x, and log|det dy/dx|.

    Args:
        x: [B, *] in [0, 1] (not checked: outside, y may be NaN), at least two dimensions; float32,
            bfloat16, float16, or float64 (reference).
        alpha: in [0, 0.5); it keeps y finite at x = 0 and 1. With 0 these give -inf, +inf, and a
            log_det of +inf.
        backend: None chooses; a named backend runs or raises.
    Returns:
        y: x's shape, dtype and layout.
        log_det: [B] float32 (float64 on float64 inputs), summed over the row.
    Raises:
        TypeError, ValueError: shapes, dtypes or options other than said here.
        RuntimeError: a named backend that cannot run.

    Differentiable twice and more in x. Accuracy: as in actnorm(). Source: Dinh et al. 2017, section
    4.1.

    >>> import torch, gmkernels
    >>> gmkernels.logit(torch.tensor([[0.5]]), alpha=0.0)
    (tensor([[0.]]), tensor([1.3863]))
    """
    return _call_logit("logit", x, alpha, False, backend)


def logit_inverse(
    y: Tensor, *, alpha: float = 0.05, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The x = (sigmoid(y) - alpha) / (1 - 2 alpha) that logit() maps to y, and log|det dx/dy|.

    Args: as in logit(), with any y in x's place.
    Returns:
        x: y's shape, dtype and layout, in [0, 1] where y is one of logit()'s values, else beyond
            by at most alpha / (1 - 2 alpha); it is not clamped.
        log_det: [B] float32 (float64 on float64 inputs), of the inverse map.
    Raises:
        TypeError, ValueError, RuntimeError: as in logit().

    Differentiable twice and more in y. Source: Dinh et al. 2017, section 4.1.

    >>> import torch, gmkernels
    >>> gmkernels.logit_inverse(torch.zeros(1, 1), alpha=0.0)
    (tensor([[0.5000]]), tensor([-1.3863]))
    """
    return _call_logit("logit_inverse", y, alpha, True, backend)


def dequantize(
    levels: Tensor,
    *,
    bins: int,
    seed: Seed = None,
    offset: int = 0,
    generator: torch.Generator | None = None,
    u: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x = (levels + u) / bins with uniform noise u: a density on x bounds one on the levels.

    floor(x bins) = levels always, in float32 and in float64: rounding never carries x into another
    level. The map of each element to x scales by 1 / bins, so log p(levels) >= E log p(x) - D log
    bins; no log_det is returned.

    Args:
        levels: [B, *] uint8, int32 or int64 in [0, bins), at least two dimensions. Values are not
            checked.
        bins: 1 to 2^20.
        seed: an int, an integer tensor or a key (gmkernels.noise.key); None draws one from torch's
            default generator.
        offset: rows to skip, so that any split of a batch has the same noise.
        generator: draws the seed instead (eager mode only).
        u: the noise itself in [0, 1), levels' shape, any floating dtype; then no seed is used.
            A seed equals u = 1 - gmkernels.uniform(levels.shape, seed=seed, offset=offset), which
            lies in [0, 1]: at 1 x stays below the next level.
        backend: None chooses; a named backend runs or raises.
    Returns:
        x: levels' shape, float32, contiguous, in [0, 1): the same bits on every backend.
    Raises:
        TypeError, ValueError: shapes, dtypes, devices or options other than said here.
        RuntimeError: a named backend that cannot run; vmap without u= or a batched seed.

    No gradient. Source: Uria et al. 2013; Theis et al. 2016, section 3.1.

    >>> import torch, gmkernels
    >>> gmkernels.dequantize(torch.tensor([[0, 3]]), bins=4, u=torch.full((1, 2), 0.5))
    tensor([[0.1250, 0.8750]])
    """
    op = "dequantize"
    _check_levels(op, levels)
    if isinstance(bins, bool) or not isinstance(bins, int):
        raise TypeError(f"{op}: bins must be an int, got {type(bins).__name__}")
    if not 1 <= bins <= reference.MAX_BINS:
        raise ValueError(
            f"{op}: bins must lie in [1, 2^20], above which float32 holds no noise, got {bins}"
        )
    key = None
    if u is None:
        key = resolve_key(op, seed, offset, generator, levels.device)
        if is_transformed() and is_batched(levels) and not is_batched(key):
            raise RuntimeError(
                f"{op}: under vmap one seed would give every example the same noise; pass u=, or a "
                "batched seed tensor"
            )
    else:
        if seed is not None or generator is not None:
            raise ValueError(f"{op}: give u or a seed, not both")
        checks.check_tensor(op, "u", u, levels.device)
        if u.shape != levels.shape:
            raise ValueError(
                f"{op}: u must have levels' shape {tuple(levels.shape)}, got {tuple(u.shape)}"
            )
        u = u.detach().to(torch.float32).contiguous()
    name = dispatch.choose(op, levels.device.type, False, backend)
    levels = levels.contiguous()
    if name == "reference":
        return reference.dequantize(levels, u, key, bins)
    return dispatch.kernel(op, name).forward(levels, u, key, bins)


def _check_levels(op: str, levels: Any) -> None:
    if not isinstance(levels, Tensor):
        raise TypeError(f"{op}: levels must be a tensor, got {type(levels).__name__}")
    if levels.dtype not in _LEVELS:
        raise TypeError(
            f"{op}: levels must be uint8, int32 or int64, got {levels.dtype}; cast it first"
        )
    if levels.dim() < 2:
        raise ValueError(
            f"{op}: levels must have shape [B, *] with at least two dimensions, got "
            f"{tuple(levels.shape)}"
        )
