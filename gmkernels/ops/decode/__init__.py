"""Decoding with a cache of keys and values: decode_attention. Start with reference.py.

Saved for backward: the inputs.
"""

from typing import Any

import torch
from torch import Tensor

from gmkernels import checks, dispatch
from gmkernels.autograd import DifferentiableOp
from gmkernels.ops.attention.options import check_grouped, scale_of, softcap_of, window_of
from gmkernels.ops.decode import reference

__all__ = ["decode_attention"]

_OP = "decode_attention"
dispatch.load_family(__name__, (_OP,))
_decode = DifferentiableOp(_OP, reference.decode_attention, inputs=3, outputs=1)


def _check_heads(q: Any, k_cache: Any, v_cache: Any) -> None:
    checks.check_tensor(_OP, "q", q)
    checks.check_tensor(_OP, "k_cache", k_cache, q.device)
    for name, x, sizes in (("q", q, "[B, H, T, D]"), ("k_cache", k_cache, "[B, H_kv, S, D]")):
        if x.dim() != 4:
            raise ValueError(
                f"{_OP}: {name} must have shape {sizes}, got {tuple(x.shape)}; "
                f"{name}.unflatten(-1, (heads, -1)).transpose(1, 2) makes it of tokens in rows"
            )
    checks.check_like(_OP, "v_cache", v_cache, "k_cache", k_cache)
    if v_cache.dtype != k_cache.dtype:
        raise TypeError(
            f"{_OP}: the caches must have one dtype, since converting one would copy it at every "
            f"step, got {k_cache.dtype} and {v_cache.dtype}"
        )
    check_grouped(_OP, q, k_cache, "the caches")


def _check_lengths(lengths: Any, q: Tensor) -> None:
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int64, torch.int32):
        kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(
            f"{_OP}: lengths must be an int64 or int32 tensor, got {kind}; one length for all rows "
            "is torch.full((B,), length)"
        )
    if lengths.shape != q.shape[:1] or lengths.device != q.device:
        raise ValueError(
            f"{_OP}: lengths must have shape [B] = {tuple(q.shape[:1])} on {q.device}, "
            f"got {tuple(lengths.shape)} on {lengths.device}"
        )


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of each sequence's newest tokens to its cached keys and values.

    Row b of the caches holds lengths[b] tokens, of which the last T are q's own: query i stands at
    the place lengths[b] - T + i and sees the keys up to it. Write the new keys and values into the
    caches first. The result is causal_attention()'s of those tokens.

    Args:
        q: queries [B, H, T, D] of the last T tokens, T one or a few, 1 <= D <= 256; float32,
            bfloat16, float16, or float64 (reference).
        k_cache, v_cache: [B, H_kv, S, D] of one dtype, which may differ from q's; H a multiple of
            H_kv, query head h reads h // (H / H_kv). Read in place at any strides; only a last
            dimension that is not contiguous costs a copy.
        lengths: keys of each row, the new ones included: [B], int64 or int32, on q's device. They
            are not looked at on the host: one outside [0, S] counts as the nearer end.
        scale: of the scores; None is 1 / sqrt(D).
        window: keys that a query sees at most, the one at its own place among them; None is all.
        softcap: scores become softcap tanh(scores / softcap); None is no cap.
        backend: None chooses; a named backend runs or raises.
    Returns:
        [B, H, T, D] in q's dtype, contiguous (channels_last if q is); 0 for a query that sees no
        key. The bits of a row depend on its own queries and keys alone: not on its neighbours, the
        capacity S or the number of threads (native and Triton). What no query sees is not read.
    Raises:
        TypeError, ValueError: shapes, dtypes or devices other than said here; a window below 1.
        RuntimeError: a named backend that cannot run.

    Differentiable twice and more in q, k_cache and v_cache, by the formula in plain PyTorch on
    every backend: for training use causal_attention(). A cache that is written in place between the
    forward and the backward makes PyTorch raise. Accuracy: within twice the error of eager PyTorch
    in the same dtype plus 4 ulp of the output's scale. Sources: Vaswani et al. 2017, eq. 1; Dao et
    al. 2023 (Flash-Decoding).

    >>> import torch, gmkernels
    >>> q, v = torch.zeros(2, 1, 1, 2), torch.arange(8.0).view(1, 1, 4, 2).expand(2, 1, 4, 2)
    >>> gmkernels.decode_attention(q, torch.zeros(2, 1, 4, 2), v, torch.tensor([1, 3]))[:, 0, 0]
    tensor([[0., 1.],
            [2., 3.]])
    """
    _check_heads(q, k_cache, v_cache)
    _check_lengths(lengths, q)
    factor, cap = scale_of(_OP, scale, q.shape[3]), softcap_of(_OP, softcap)
    span = window_of(_OP, window)
    wide = dispatch.is_wide(q, k_cache)
    name = dispatch.choose(_OP, q.device.type, wide, backend)
    if factor < 0:
        x, factor = -q, -factor
    else:
        x = q
    caches = _last_contiguous(k_cache), _last_contiguous(v_cache)
    (o,) = _decode(name, _last_contiguous(x), *caches, lengths.contiguous(), span, factor, cap)
    return checks.in_layout_of(o, q)
