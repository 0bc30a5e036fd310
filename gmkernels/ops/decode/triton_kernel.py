"""Triton launchers and operators of the decode family. The kernels are in triton_device.py."""

import torch
import triton
from torch import Tensor

from gmkernels import dispatch
from gmkernels.ops.attention.triton_kernel import _factors, _strides
from gmkernels.ops.decode import outputs
from gmkernels.ops.decode.triton_device import join_kernel, many_rows_kernel, one_row_kernel
from gmkernels.triton_common import DEVICES as _DEVICES
from gmkernels.triton_common import launch

DEVICES = {"decode_attention": _DEVICES}
_PART = 256  # keys of a part
_FEW = 4  # rows of queries below which each reads the keys anew rather than fill a product of 16


def decode_attention_forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """o like q, contiguous."""
    o = outputs.decode_attention_forward(q, k_cache, v_cache, lengths, window, scale, softcap)
    batches, heads, queries, width = q.shape
    kv_heads, keys = k_cache.shape[1], k_cache.shape[2]
    if o.numel() == 0 or keys == 0:
        return o.zero_()
    group, parts = heads // kv_heads, triton.cdiv(keys, _PART)
    rows, pairs = group * queries, batches * kv_heads
    sizes = (batches, kv_heads, rows, parts)
    sums = torch.empty((*sizes, width), dtype=torch.float32, device=q.device)
    tops, totals = (torch.empty(sizes, dtype=torch.float32, device=q.device) for _ in range(2))
    few = rows < _FEW
    columns = triton.next_power_of_2(width) if few else max(16, triton.next_power_of_2(width))
    tile = {"R": max(16, min(64 if few else 32, 4096 // columns)), "C": columns}
    if not few:
        tile["Q"] = max(16, min(64, triton.next_power_of_2(rows)))
    launch(
        one_row_kernel if few else many_rows_kernel,
        (parts, rows if few else triton.cdiv(rows, tile["Q"]), pairs),
        *(q, k_cache, v_cache, lengths, sums, tops, totals),
        *_strides(q, k_cache, v_cache),
        *(kv_heads, group, queries, keys, parts, window),
        *_factors(scale, softcap),
        SOFTCAP=softcap > 0,
        PART=_PART,
        D=width,
        **tile,
    )
    launch(
        join_kernel,
        (batches * heads * queries,),
        *(sums, tops, totals, lengths, o),
        *(heads, queries, keys, parts, window),
        PART=_PART,
        D=width,
        C=triton.next_power_of_2(width),
        R=8,
        num_warps=1,
    )
    return o


dispatch.define("gmkernels_triton", decode_attention_forward, outputs.decode_attention_forward)
dispatch.define("gmkernels_triton", outputs.decode_attention_backward, outputs.fake_backward)
