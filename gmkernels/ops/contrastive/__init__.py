"""Losses over pairs: nt_xent, info_nce. Start with reference.py.

Saved for backward: the rows and the log-sum-exp of each one's negatives. Scores are made again.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gmkernels import checks, dispatch
from gmkernels.autograd import DifferentiableOp
from gmkernels.ops.contrastive import reference
from gmkernels.ops.gaussian.reference import compute_dtype

__all__ = ["info_nce", "nt_xent"]

dispatch.load_family(__name__, ("contrastive",))
_contrastive = DifferentiableOp(
    "contrastive", reference.contrastive, inputs=2, outputs=2, keeps_outputs=True
)


def _check_pairs(op: str, names: tuple[str, str], x: Any, y: Any) -> None:
    checks.check_rows(op, names[0], x)
    checks.check_like(op, names[1], y, names[0], x)
    if x.shape[0] == 1:
        raise ValueError(
            f"{op}: {names[0]} and {names[1]} must hold at least 2 pairs: the rows of other pairs "
            f"are the negatives, and one pair has none; got shape {tuple(x.shape)}"
        )
    if math.prod(x.shape[1:]) == 0:
        raise ValueError(f"{op}: rows must have at least one element, got {tuple(x.shape)}")


def _scales(
    op: str, temperature: Any, like: Tensor, dtype: torch.dtype
) -> tuple[float, Tensor | None]:
    """1 / temperature: a number for the kernels, or 1 and a tensor to multiply rows by."""
    if isinstance(temperature, Tensor):
        checks.check_tensor(op, "temperature", temperature, like.device)
        if temperature.numel() != 1:
            raise ValueError(
                f"{op}: temperature must be a number or a tensor of one element, got shape "
                f"{tuple(temperature.shape)}"
            )
        return 1.0, 1.0 / temperature.to(dtype).reshape(())
    if not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature must be positive and finite, got {temperature!r}")
    return 1.0 / temperature, None


def _unit(x: Tensor) -> Tensor:
    """Rows at length 1; a row of zeros stays, with gradient 0."""
    total = x.square().sum(1, keepdim=True)
    none = total == 0
    return x * torch.where(none, 0.0, torch.where(none, 1.0, total).rsqrt())


def _rows(x: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    """[N, D] in a dtype that sums are taken in."""
    x = x.flatten(1).to(dtype)
    return _unit(x) if normalize else x


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    normalize: bool = True,
    backend: str | None = None,
) -> Tensor:
    """NT-Xent of SimCLR: each view is to find its partner among the 2N - 1 other views.

    l(i) = -log exp(s_ip) / sum_{j != i} exp(s_ij), s = z z^T / temperature over z = [z1; z2], p the
    other view of i; a pair's loss is the mean over its two views.

    Args:
        z1, z2: embeddings of two views of N >= 2 samples (or none), [N, *] of D elements a row, any
            D; float32, bfloat16, float16, or float64 (reference). dtypes may differ.
        temperature: positive; a tensor of one element (not looked at) may be learned.
        normalize: whether rows are brought to length 1 first. A row of zeros stays zeros, at
            similarity 0 to all, and gets no gradient.
        backend: None chooses; a named backend runs or raises.
    Returns:
        [N] float32 (float64 on float64 inputs), nats, a pair each; its mean is the loss of the
        paper. log(2N - 1) where all embeddings are equal.
    Raises:
        TypeError, ValueError: shapes, dtypes or devices other than said here; one pair alone, which
            has no negatives; a temperature that is not positive.
        RuntimeError: a named backend that cannot run.

    Differentiable twice and more in z1, z2 and the temperature; second derivatives through the
    reference formula, which makes a matrix 2N x 2N. Memory: O(N D). Accuracy: within twice the
    error of eager PyTorch in the same dtype plus 4 ulp of the output's scale. Source: Chen et al.
    2020, eq. 1.

    >>> import torch, gmkernels
    >>> z = torch.ones(3, 4)
    >>> gmkernels.nt_xent(z, z).exp().round()
    tensor([5., 5., 5.])
    """
    op = "nt_xent"
    _check_pairs(op, ("z1", "z2"), z1, z2)
    dtype, kept = compute_dtype(z1, z2), torch.promote_types(z1.dtype, z2.dtype)
    scale, learned = _scales(op, temperature, z1, dtype)
    name = dispatch.choose("contrastive", z1.device.type, dispatch.is_wide(z1, z2), backend)
    z = torch.cat([_rows(z1, dtype, normalize), _rows(z2, dtype, normalize)])
    z = (z if learned is None else z * learned.sqrt()).to(kept)
    negatives, _ = _contrastive(name, z, None, scale, False)
    first, second = z.to(dtype).chunk(2)
    gaps = negatives.view(2, -1) - scale * (first * second).sum(1)
    return F.softplus(gaps, threshold=40.0).mean(0)


def info_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    symmetric: bool = True,
    normalize: bool = True,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE: query i is to find key i among all keys, and key i query i among all queries (CLIP).

    l(i) = -log exp(s_ii) / sum_j exp(s_ij), s = queries keys^T / temperature; symmetric is the mean
    of that of s and that of s^T.

    Args:
        queries, keys: [N, *] of D elements a row, N >= 2 pairs (or none), any D; dtypes as in
            nt_xent().
        temperature: positive; a tensor of one element (not looked at) may be learned, as the
            exponential of a parameter: temperature=log_temperature.exp().
        symmetric: whether keys look for queries, too.
        normalize, backend: as in nt_xent().
    Returns:
        [N] float32 (float64 on float64 inputs), nats, a pair each. log N where all rows are equal.
    Raises:
        TypeError, ValueError, RuntimeError: as in nt_xent().

    Differentiable twice and more in queries, keys and the temperature. Memory: O(N D). Sources: van
    den Oord et al. 2018, eq. 4; Radford et al. 2021, figure 3.

    >>> import torch, gmkernels
    >>> gmkernels.info_nce(torch.ones(3, 4), torch.ones(3, 4)).exp().round()
    tensor([3., 3., 3.])
    """
    op = "info_nce"
    _check_pairs(op, ("queries", "keys"), queries, keys)
    dtype, kept = compute_dtype(queries, keys), torch.promote_types(queries.dtype, keys.dtype)
    scale, learned = _scales(op, temperature, queries, dtype)
    wide = dispatch.is_wide(queries, keys)
    name = dispatch.choose("contrastive", queries.device.type, wide, backend)
    q, k = _rows(queries, dtype, normalize), _rows(keys, dtype, normalize).to(kept)
    q = (q if learned is None else q * learned).to(kept)
    rows, columns = _contrastive(name, q, k, scale, symmetric)
    positives = scale * (q.to(dtype) * k.to(dtype)).sum(1)
    loss = F.softplus(rows - positives, threshold=40.0)
    if symmetric:
        loss = (loss + F.softplus(columns - positives, threshold=40.0)) / 2
    return loss
