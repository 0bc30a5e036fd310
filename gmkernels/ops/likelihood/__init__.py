"""Likelihoods: gaussian_nll, bernoulli_nll, categorical_nll. Start with reference.py.

Saved for backward: the inputs.
"""

from typing import Any

import torch
from torch import Tensor

from gmkernels import checks, dispatch
from gmkernels.autograd import DifferentiableOp
from gmkernels.ops.likelihood import reference

__all__ = ["bernoulli_nll", "categorical_nll", "gaussian_nll"]

_LEVELS = (torch.int64, torch.int32, torch.uint8)

dispatch.load_family(__name__, tuple(__all__))
_gaussian_nll = DifferentiableOp("gaussian_nll", reference.gaussian_nll, inputs=3, outputs=1)
_bernoulli_nll = DifferentiableOp("bernoulli_nll", reference.bernoulli_nll, inputs=2, outputs=1)
_categorical_nll = DifferentiableOp(
    "categorical_nll", reference.categorical_nll, inputs=1, outputs=1
)


def gaussian_nll(
    x: Tensor, mean: Tensor, logvar: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Negative log-density of x under N(mean, diag exp(logvar)), one per row.

    nll = 1/2 sum_d [log(2 pi) + l + (x - m)^2 exp(-l)], nats, summed over all but the batch.

    Args:
        x: [B, *], at least two dimensions; float32, bfloat16, float16, or float64 (reference).
        mean: x's shape; its dtype may differ.
        logvar: log-variance, x's shape; or a 0-d tensor, one value for all; or None, unit variance.
        backend: None chooses; a named backend runs or raises.
    Returns:
        [B] float32 (float64 on float64 inputs), nats.
    Raises:
        TypeError, ValueError: shapes, dtypes or devices other than said here.
        RuntimeError: a named backend that cannot run.

    Differentiable twice and more in all tensors. Source: Kingma and Welling 2014, appendix C.2.

    >>> import torch, gmkernels
    >>> gmkernels.gaussian_nll(torch.zeros(1, 2), torch.zeros(1, 2))
    tensor([1.8379])
    """
    op = "gaussian_nll"
    checks.check_rows(op, "x", x)
    checks.check_like(op, "mean", mean, "x", x)
    if logvar is not None:
        checks.check_tensor(op, "logvar", logvar, x.device)
        if logvar.dim() == 0:
            logvar = logvar.expand(x.shape[0])
        elif logvar.shape == x.shape:
            logvar = checks.in_rows(logvar)
        else:
            raise ValueError(
                f"{op}: logvar must have x's shape {tuple(x.shape)}, be a 0-d tensor, or None, got "
                f"{tuple(logvar.shape)}"
            )
    name = dispatch.choose(op, x.device.type, dispatch.is_wide(x, mean, logvar), backend)
    return _gaussian_nll(name, checks.in_rows(x), checks.in_rows(mean), logvar)[0]


def bernoulli_nll(x: Tensor, logits: Tensor, *, backend: str | None = None) -> Tensor:
    """Negative log-probability of x under Bernoulli(sigmoid(logits)), one per row.

    nll = sum_d [log(1 + exp(s)) - s x], nats, summed over all but the batch; for x strictly between
    0 and 1 this is the cross-entropy.

    Args:
        x: [B, *] in [0, 1] (not checked), at least two dimensions; float32, bfloat16, float16, or
            float64 (reference).
        logits: x's shape, any value: large and infinite ones stay exact; its dtype may differ.
        backend: None chooses; a named backend runs or raises.
    Returns:
        [B] float32 (float64 on float64 inputs), nats.
    Raises:
        TypeError, ValueError, RuntimeError: as in gaussian_nll().

    Differentiable twice and more in both. Source: Kingma and Welling 2014, appendix C.1.

    >>> import torch, gmkernels
    >>> gmkernels.bernoulli_nll(torch.ones(1, 2), torch.zeros(1, 2))
    tensor([1.3863])
    """
    op = "bernoulli_nll"
    checks.check_rows(op, "x", x)
    checks.check_like(op, "logits", logits, "x", x)
    name = dispatch.choose(op, x.device.type, dispatch.is_wide(x, logits), backend)
    return _bernoulli_nll(name, checks.in_rows(x), checks.in_rows(logits))[0]


def categorical_nll(levels: Tensor, logits: Tensor, *, backend: str | None = None) -> Tensor:
    """Negative log-probability of integer levels under softmax(logits), one per row.

    nll = sum_d [log sum_k exp(s_dk) - s_d,level], nats, summed over all but the batch.

    Args:
        levels: [B, *] int64, int32 or uint8 in [0, L), at least two dimensions. Values are not
            checked: a level outside gives NaN in its row.
        logits: [B, *, L], float32, bfloat16, float16, or float64 (reference); L >= 1.
        backend: None chooses; a named backend runs or raises.
    Returns:
        [B] float32 (float64 on float64 logits), nats.
    Raises:
        TypeError, ValueError, RuntimeError: as in gaussian_nll().

    Differentiable twice and more in logits.

    >>> import torch, gmkernels
    >>> gmkernels.categorical_nll(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, 4))
    tensor([2.7726])
    """
    op = "categorical_nll"
    _check_levels(op, levels)
    checks.check_tensor(op, "logits", logits, levels.device)
    if logits.dim() != levels.dim() + 1 or logits.shape[:-1] != levels.shape:
        raise ValueError(
            f"{op}: logits must have levels' shape and one more dimension, "
            f"{(*levels.shape, 'L')}, got {tuple(logits.shape)}"
        )
    if logits.shape[-1] < 1:
        raise ValueError(
            f"{op}: logits must have at least one level, got shape {tuple(logits.shape)}"
        )
    name = dispatch.choose(op, logits.device.type, dispatch.is_wide(logits), backend)
    return _categorical_nll(name, checks.in_rows(logits), levels.contiguous())[0]


def _check_levels(op: str, levels: Any) -> None:
    if not isinstance(levels, Tensor):
        raise TypeError(f"{op}: levels must be a tensor, got {type(levels).__name__}")
    if levels.dtype not in _LEVELS:
        raise TypeError(
            f"{op}: levels must be int64, int32 or uint8, got {levels.dtype}; use .long()"
        )
    if levels.dim() < 2:
        raise ValueError(
            f"{op}: levels must have shape [B, *] with at least two dimensions, got "
            f"{tuple(levels.shape)}"
        )
