"""Attention: causal_attention, full_attention, attention_logsumexp. Start with reference.py.

Saved for backward: q, k, v, o and the log-sum-exp. Probabilities are made again.
"""

from typing import Any

import torch
from torch import Tensor

from gmkernels import checks, dispatch
from gmkernels.autograd import DifferentiableOp
from gmkernels.ops.attention import reference
from gmkernels.ops.attention.options import check_grouped, scale_of, softcap_of, window_of

__all__ = ["attention_logsumexp", "causal_attention", "full_attention"]

dispatch.load_family(__name__, ("attention",))
_attention = DifferentiableOp(
    "attention", reference.attention, inputs=3, outputs=2, keeps_outputs=True
)


def _check_heads(op: str, q: Any, k: Any, v: Tensor | None) -> None:
    checks.check_tensor(op, "q", q)
    for name, x in (("k", k), ("v", v)):
        if name == "k" or x is not None:
            checks.check_tensor(op, name, x, q.device)
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 4:
            raise ValueError(
                f"{op}: {name} must have shape [B, H, T, D], got {tuple(x.shape)}; "
                f"{name}.unflatten(-1, (heads, -1)).transpose(1, 2) makes it of [B, T, H D]"
            )
    check_grouped(op, q, k, "k")
    if v is not None and v.shape != k.shape:
        raise ValueError(f"{op}: v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")


def _check_key_mask(op: str, key_mask: Any, k: Tensor) -> None:
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        kind = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise TypeError(
            f"{op}: key_mask must be a bool tensor, True where a key is seen, got {kind}; "
            "lengths make one: torch.arange(T_k) < lengths[:, None]"
        )
    shape = (k.shape[0], k.shape[2])
    if key_mask.shape != shape or key_mask.device != k.device:
        raise ValueError(
            f"{op}: key_mask must have shape [B, T_k] = {shape} on {k.device}, "
            f"got {tuple(key_mask.shape)} on {key_mask.device}"
        )


def _check_cu_seqlens(op: str, cu_seqlens: Any, q: Tensor, k: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int64, torch.int32):
        kind = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"{op}: cu_seqlens must be an int64 or int32 tensor, got {kind}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.device != q.device:
        raise ValueError(
            f"{op}: cu_seqlens must be a vector of S + 1 offsets on {q.device}, "
            f"got shape {tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
        )
    if q.shape[0] != 1 or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"{op}: packed sequences lie one after another in q [1, H, total, D] and k, v of as "
            f"many tokens, got {tuple(q.shape)} and {tuple(k.shape)}"
        )


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _attend(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    causal: bool,
    scale: float | None,
    window: int | None = None,
    softcap: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """o in q's dtype, empty without v, and lse."""
    _check_heads(op, q, k, v)
    factor, cap = scale_of(op, scale, q.shape[3]), softcap_of(op, softcap)
    span = window_of(op, window)
    if span and not causal:
        raise ValueError(f"{op}: a window looks back, so it needs causal=True")
    if key_mask is not None:
        _check_key_mask(op, key_mask, k)
    if cu_seqlens is not None:
        _check_cu_seqlens(op, cu_seqlens, q, k)
        cu_seqlens = cu_seqlens.contiguous()
    wide = dispatch.is_wide(q, k, v)
    name = dispatch.choose("attention", q.device.type, wide, backend)
    dtype = q.dtype
    common = torch.promote_types(dtype, k.dtype)
    common = common if v is None else torch.promote_types(common, v.dtype)
    q, k = _last_contiguous(q.to(common)), _last_contiguous(k.to(common))
    v = None if v is None else _last_contiguous(v.to(common))
    if factor < 0:
        q, factor = -q, -factor
    o, lse = _attention(name, q, k, v, key_mask, cu_seqlens, causal, span, factor, cap)
    return o.to(dtype), lse


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention in which no query sees a later key: o = softmax(scale q k^T) v over what is seen.

    Query i stands at the place i + T_k - T, so that the last query sees all keys (bottom-right).
    A query without keys (T_k < T) gives 0.

    Args:
        q: queries [B, H, T, D], 1 <= D <= 256, any T; float32, bfloat16, float16, or float64
            (reference). Any strides; only a last dimension that is not contiguous costs a copy.
        k, v: keys and values [B, H_kv, T_k, D]; H a multiple of H_kv, query head h reads
            h // (H / H_kv). A dtype that differs is converted to the wider one first.
        scale: of the scores; None is 1 / sqrt(D).
        window: keys that a query sees at most, the one at its own place among them; None is all.
        softcap: scores become softcap tanh(scores / softcap); None is no cap.
        cu_seqlens: packed sequences: offsets [S + 1], int64 or int32 on q's device, from 0 to
            total. Sequence s is the tokens cu_seqlens[s] to cu_seqlens[s + 1] of q, k and v
            [1, H, total, D], and sees itself alone. Tokens of no sequence see nothing.
        backend: None chooses; a named backend runs or raises.
    Returns:
        [B, H, T, D] in q's dtype, contiguous (channels_last if q is).
    Raises:
        TypeError, ValueError: shapes, dtypes or devices other than said here; a window below 1.
        RuntimeError: a named backend that cannot run; cu_seqlens that do not ascend from 0 to total
            in native CPU kernels (elsewhere they are not looked at, since that would stop the GPU).

    Differentiable twice and more in q, k and v; second derivatives through the reference formula,
    which makes a matrix T x T. Accuracy: within twice the error of eager PyTorch in the same dtype
    plus 4 ulp of the output's scale. Limits: the CUDA C++ kernels have not run on a GPU yet;
    routing to PyTorch's own attention waits for a measurement. Sources: Vaswani et al. 2017, eq. 1;
    Dao et al. 2022.

    >>> import torch, gmkernels
    >>> q = torch.zeros(1, 1, 3, 2)
    >>> gmkernels.causal_attention(q, q, torch.arange(6.0).view(1, 1, 3, 2))[0, 0, :, 0]
    tensor([0., 1., 2.])
    """
    o, _ = _attend(
        "causal_attention",
        q,
        k,
        v,
        causal=True,
        scale=scale,
        window=window,
        softcap=softcap,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    return checks.in_layout_of(o, q)


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every query to every key, of its own sequence or of another one (cross).

    Args: as in causal_attention(), and
        key_mask: bool [B, T_k], True where a key is seen (of padded sequences: torch.arange(T_k) <
            lengths[:, None]); None is all. What is hidden must still be finite.
    Returns:
        [B, H, T, D] in q's dtype, contiguous (channels_last if q is); 0 where no key is seen.
    Raises:
        TypeError, ValueError, RuntimeError: as in causal_attention().

    Differentiable twice and more in q, k and v. Source: Vaswani et al. 2017, eq. 1.

    >>> import torch, gmkernels
    >>> q, v = torch.zeros(1, 1, 1, 2), torch.arange(6.0).view(1, 1, 3, 2)
    >>> gmkernels.full_attention(q, torch.zeros(1, 1, 3, 2), v)
    tensor([[[[2., 3.]]]])
    """
    o, _ = _attend(
        "full_attention",
        q,
        k,
        v,
        causal=False,
        scale=scale,
        softcap=softcap,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    return checks.in_layout_of(o, q)


def attention_logsumexp(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Log of the sum of exp(scores) over the keys that each query sees: attention's normaliser.

    Two attentions over disjoint keys combine by it: o = sum_n exp(lse_n - lse) o_n with
    lse = logsumexp_n lse_n.

    Args: as in causal_attention() and full_attention(), and
        causal: whether queries see no later key.
    Returns:
        [B, H, T] float32 (float64 on float64 inputs), nats; -inf where no key is seen.
    Raises:
        TypeError, ValueError, RuntimeError: as in causal_attention(); a window without causal.

    Differentiable twice and more in q and k. Source: Dao et al. 2022, algorithm 1.

    >>> import torch, gmkernels
    >>> q = torch.zeros(1, 1, 2, 4)
    >>> gmkernels.attention_logsumexp(q, q).exp()
    tensor([[[1., 2.]]])
    """
    _, lse = _attend(
        "attention_logsumexp",
        q,
        k,
        None,
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    return lse
