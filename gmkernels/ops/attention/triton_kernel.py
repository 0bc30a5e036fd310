"""Triton launchers and operators of the attention family.

The kernels are in triton_device.py and triton_backward.py.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from gmkernels import dispatch
from gmkernels.ops.attention import outputs
from gmkernels.ops.attention.reference import visible_range
from gmkernels.ops.attention.triton_backward import dkdv_kernel, dq_kernel
from gmkernels.ops.attention.triton_device import delta_kernel, forward_kernel
from gmkernels.triton_common import DEVICES as _DEVICES
from gmkernels.triton_common import launch

DEVICES = {"attention": _DEVICES}
_LOG2E = 1.4426950408889634


def _width(q: Tensor) -> int:
    return max(16, triton.next_power_of_2(q.shape[3]))


def _blocks(q: Tensor, backward: bool) -> tuple[int, int, int]:
    """Queries and keys of a tile, and warps: what fits registers and shared memory."""
    width = _width(q)
    if q.dtype == torch.float32:  # no tensor cores at full precision: small tiles
        if width > 64:
            return 16, 16, 8
        return (16, 32, 4) if backward else (32, 32, 4)
    if backward:
        return (32, 32, 4) if width <= 128 else (16, 32, 8)
    return (64, 32, 4) if width <= 128 else (32, 32, 8)


def _splits(q: Tensor, key_mask: Tensor | None) -> bool:
    """Whether blocks that are seen whole have a loop of their own, without masks: where tensor
    cores leave the masks to be felt."""
    return key_mask is None and q.dtype != torch.float32


def _strides(*xs: Tensor) -> tuple[int, ...]:
    return tuple(s for x in xs for s in x.stride()[:3])


def _factors(scale: float, softcap: float, unit: float = _LOG2E) -> tuple[float, float]:
    """Of the scores to nats times `unit`, powers of two by default; and inside the softcap."""
    return (softcap * unit, scale / softcap) if softcap > 0 else (scale * unit, 0.0)


def _ranges(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    """Keys [low, high) of each query of a packed batch, int64; else any tensor, not read."""
    if cu_seqlens is None:
        return q, q
    return visible_range(q.shape[2], k.shape[2], causal, window, cu_seqlens, q.device)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """o like q, empty without v; lse [B, H, T] float32."""
    o, lse = outputs.attention_forward(
        q, k, v, key_mask, cu_seqlens, causal, window, scale, softcap
    )
    values = k if v is None else v
    low, high = _ranges(q, k, cu_seqlens, causal, window)
    r, c, warps = _blocks(q, False)
    launch(
        forward_kernel,
        (triton.cdiv(q.shape[2], r), q.shape[0] * q.shape[1]),
        *(q, k, values, o, lse, low, high, q if key_mask is None else key_mask.contiguous()),
        *_strides(q, k, values),
        q.shape[1],
        q.shape[1] // k.shape[1],
        q.shape[2],
        k.shape[2],
        window,
        *_factors(scale, softcap),
        CAUSAL=causal,
        RANGED=cu_seqlens is not None,
        KEY_MASK=key_mask is not None,
        WHOLE=_splits(q, key_mask),
        SOFTCAP=softcap > 0,
        VALUES=v is not None,
        D=q.shape[3],
        BD=_width(q),
        R=r,
        C=c,
        num_warps=warps,
    )
    return o, lse


def _delta(do: Tensor | None, dlse: Tensor | None, o: Tensor, q: Tensor) -> Tensor:
    """sum_d o do - dlse, float32 [B, H, T]."""
    delta = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    rows = 32
    launch(
        delta_kernel,
        (triton.cdiv(q.shape[2], rows), q.shape[0] * q.shape[1]),
        *(o, o if do is None else do, delta if dlse is None else dlse.contiguous(), delta),
        0 if do is None else do.stride(0),
        q.shape[1],
        q.shape[2],
        DO=do is not None,
        DLSE=dlse is not None,
        D=q.shape[3],
        BD=_width(q),
        R=rows,
    )
    return delta


def attention_backward(
    do: Tensor | None,
    dlse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, empty where not wanted."""
    dq, dk, dv = outputs.wanted(needs, q, k, v)
    if v is None:
        do = None  # there is no o whose gradient could matter
    delta = _delta(do, dlse, o, q)
    low, high = _ranges(q, k, cu_seqlens, causal, window)
    values, gradient = k if v is None else v, q if do is None else do
    mask = q if key_mask is None else key_mask.contiguous()
    r, c, warps = _blocks(q, True)
    pairs = q.shape[0] * q.shape[1]
    operands = (gradient, q, k, values, lse.contiguous(), delta)
    sizes = (gradient.stride(0), *_strides(q, k, values), q.shape[1], q.shape[1] // k.shape[1])
    unit = 1.0 if q.dtype == torch.float32 else _LOG2E
    rest = (q.shape[2], k.shape[2], window, scale, *_factors(scale, softcap, unit))
    constants: dict[str, Any] = {
        "CAUSAL": causal,
        "RANGED": cu_seqlens is not None,
        "KEY_MASK": key_mask is not None,
        "WHOLE": _splits(q, key_mask),
        "SOFTCAP": softcap > 0,
        "DO": do is not None,
        "D": q.shape[3],
        "BD": _width(q),
        "R": r,
        "C": c,
        "num_warps": warps,
    }
    if needs & 1:
        grid = (triton.cdiv(q.shape[2], r), pairs)
        launch(dq_kernel, grid, *operands, dq, low, high, mask, *sizes, *rest, **constants)
    if needs & 6:
        if cu_seqlens is not None:  # ascending ends: the queries of a key are an interval, too
            j = torch.arange(k.shape[2], device=k.device)
            low, high = (torch.searchsorted(ends, j, right=True) for ends in (high, low))
        if q.shape[1] != k.shape[1] and q.dtype != torch.float32:
            # A loop over heads around three over queries: gfx942 spills any larger tile.
            constants |= {"WHOLE": False, "R": 16}
        wanted = torch.empty_like(k, memory_format=torch.contiguous_format) if not needs & 2 else dk
        writes = do is not None and bool(needs & 4)
        grid = (triton.cdiv(k.shape[2], c), k.shape[0] * k.shape[1])
        outs = (wanted, dv, low, high, mask)
        launch(dkdv_kernel, grid, *operands, *outs, *sizes, *rest, DV=writes, **constants)
        if not writes:
            dv.zero_()
    return dq, dk, dv


for _op, _fake in (
    (attention_forward, outputs.attention_forward),
    (attention_backward, outputs.attention_backward),
):
    dispatch.define("gmkernels_triton", _op, _fake)
