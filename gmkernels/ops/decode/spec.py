"""Row of the decode family."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gmkernels.ops import decode
from gmkernels.ops.decode.reference import visible
from gmkernels.ops.gaussian.spec import in_layout
from gmkernels.spec import Benchmark, Case, Inputs, Op, filled, itemsize, other_dtype

_PASSED = ("scale", "window", "softcap")  # options that are keywords of the call


def _lengths(case: Case, device: str) -> Tensor:
    """Ragged unless the case says "full" or gives a list, of which rows take one in turn."""
    batches, keys = case.shape[0], case.shape[2]
    how = case.options.get("lengths", "ragged")
    if how == "full":
        found = [keys] * batches
    elif how == "ragged":
        found = [keys - b * keys // batches for b in range(batches)]
    else:
        found = [how[b % len(how)] for b in range(batches)]
    dtype = case.options.get("lengths_dtype", torch.int64)
    return torch.tensor(found, dtype=dtype, device=device)


def inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """q, k_cache, v_cache [B, H, S, D] and lengths, by the case's options."""
    o = case.options
    b, h, s, d = case.shape
    cache = (b, o.get("kv_heads", h), s, d)
    second = other_dtype(dtype) if o.get("mixed") else dtype
    q = filled((b, h, o.get("new", 1), d), torch.float64, device, seed)
    k, v = (filled(cache, torch.float64, device, seed + 1 + i).to(second) for i in range(2))
    q = q * {"saturated": 5.0, "equal": 0.0}.get(o.get("values", ""), 1.0)
    if o.get("layout") == "joined":  # keys and values of a token beside each other
        joined = torch.cat([x.transpose(1, 2).flatten(2) for x in (k, v)], 2)
        k, v = (x.unflatten(2, (-1, d)).transpose(1, 2) for x in joined.chunk(2, 2))
    q, k, v = (in_layout(x, o.get("layout")) for x in (q.to(dtype), k, v))
    kwargs: dict[str, Any] = {name: o[name] for name in _PASSED if name in o}
    return Inputs((q, k, v, _lengths(case, device)), kwargs)


def eager_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The textbook's, over the whole capacity."""
    dtype = torch.promote_types(q.dtype, k_cache.dtype)
    group = q.shape[1] // k_cache.shape[1]
    k, v = (x.to(dtype).repeat_interleave(group, 1) for x in (k_cache, v_cache))
    scores = q.to(dtype) @ k.mT * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = visible(lengths, q.shape[2], k.shape[2], window or 0)[:, None]
    p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (p.masked_fill(~seen.any(-1, keepdim=True), 0.0) @ v).to(q.dtype)


def sdpa_decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """PyTorch's own; without a mask where one new token of each row sees the whole cache."""
    keys = k_cache.shape[2]
    mask = None
    if q.shape[2] > 1 or bool((lengths < keys).any()):
        mask = visible(lengths, q.shape[2], keys, 0)[:, None]
    k, v = (x.to(q.dtype) for x in (k_cache, v_cache))
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)


def _seen(case: Case) -> Tensor:
    o = case.options
    return visible(_lengths(case, "cpu"), o.get("new", 1), case.shape[2], o.get("window", 0))


def _bytes(case: Case, dtype: torch.dtype, backward: bool) -> int:
    """q and o once, and of the caches what is seen; the backward reads that and do, writes three
    gradients."""
    b, h, s, d = case.shape
    o = case.options
    kv_heads, cached = o.get("kv_heads", h), other_dtype(dtype) if o.get("mixed") else dtype
    queries = b * h * o.get("new", 1) * d * itemsize(dtype)
    read = 2 * int(_seen(case).any(1).sum()) * kv_heads * d * itemsize(cached)
    written = 2 * b * kv_heads * s * d * itemsize(cached)
    return 2 * queries + read + (3 * queries + read + written if backward else 0)


def _flops(case: Case) -> int:
    return 4 * case.shape[1] * case.shape[3] * int(_seen(case).sum())


CASES = (
    Case("no_rows", "empty", (0, 2, 5, 16)),
    Case("no_queries", "empty", (2, 2, 3, 16), {"new": 0}),
    Case("no_keys", "empty", (2, 2, 0, 16)),
    Case("one", "one", (1, 1, 1, 1)),
    Case("odd", "odd", (5, 3, 13, 24)),
    Case("odd_width", "odd", (1, 2, 40, 37), {"new": 2}),
    Case("wide", "odd", (1, 1, 21, 256)),
    Case("block-1", "block-1", (1, 1, 1023, 16), {"lengths": "full"}),
    Case("block", "block", (1, 1, 1024, 32), {"lengths": "full"}),
    Case("block+1", "block+1", (1, 1, 1025, 16), {"lengths": "full"}),
    Case("large", "large", (2, 2, 600, 80)),
    Case("saturated", "boundary", (2, 2, 33, 16), {"values": "saturated", "new": 9}),
    Case("equal", "boundary", (2, 2, 33, 16), {"values": "equal"}),
    Case("no_length", "boundary", (3, 2, 9, 16), {"lengths": (0, 9, 1)}),
    Case("lengths_outside", "boundary", (3, 2, 9, 16), {"lengths": (-4, 9, 70)}),
    Case("fewer_keys", "boundary", (3, 2, 9, 16), {"lengths": (2, 4, 9), "new": 4}),
    Case("joined", "non_contiguous", (2, 2, 33, 64), {"layout": "joined"}),
    Case("transposed", "non_contiguous", (2, 3, 9, 8), {"layout": "transposed", "new": 2}),
    Case("heads_channels_last", "channels_last", (2, 3, 5, 7), {"layout": "channels_last"}),
    Case("mixed_dtypes", "mixed", (2, 2, 17, 64), {"mixed": True}),
    Case("mixed_many", "mixed", (2, 2, 17, 16), {"mixed": True, "new": 5}),
    Case("few", "keyword", (2, 2, 35, 16), {"new": 3}),
    Case("grouped", "keyword", (2, 4, 35, 32), {"kv_heads": 2}),
    Case("one_key_head", "keyword", (1, 6, 290, 16), {"kv_heads": 1, "new": 2}),
    Case("int32", "keyword", (3, 2, 17, 16), {"lengths_dtype": torch.int32}),
    Case("scale", "keyword", (2, 2, 17, 16), {"scale": 0.7}),
    Case("negative_scale", "keyword", (2, 2, 17, 16), {"scale": -0.2}),
    Case("softcap", "keyword", (2, 2, 17, 16), {"softcap": 0.9}),
    Case("softcap_many", "keyword", (1, 4, 17, 16), {"softcap": 0.9, "kv_heads": 1}),
    Case("window", "keyword", (2, 2, 290, 16), {"window": 20}),
    Case("window_one", "keyword", (2, 2, 17, 16), {"window": 1, "new": 2}),
    Case("window_many", "keyword", (2, 4, 290, 16), {"window": 30, "kv_heads": 1}),
)
_BF16 = torch.bfloat16


def _case(b: int, h: int, s: int, d: int, **options: Any) -> Case:
    tail = "".join(f", {k} {v}" for k, v in options.items())
    return Case(f"{b}x{h}x{s}x{d}{tail}", "large", (b, h, s, d), {"lengths": "full"} | options)


_GPT = _case(4, 8, 4096, 64)
_SIZES = (
    _case(1, 8, 4096, 64),
    _case(16, 8, 512, 64),
    _case(1, 2, 32768, 64),
    _case(4, 8, 2048, 128),
    _case(4, 8, 4096, 64, kv_heads=2),
    _case(4, 8, 4096, 64, new=4),
    _case(4, 8, 4096, 64, lengths="ragged"),
)

OPS = (
    Op(
        name="decode_attention",
        family="decode",
        summary="a few new queries of each sequence against a cache of keys: ragged lengths",
        function=decode.decode_attention,
        eager=eager_decode_attention,
        inputs=inputs,
        cases=CASES,
        benchmarks=(
            Benchmark("forward", _GPT, headline=True),
            Benchmark("forward bf16", _GPT, dtype=_BF16, headline=True),
            Benchmark("forward mixed", _case(4, 8, 4096, 64, mixed=True)),
            *(Benchmark(f"forward {case.name}", case) for case in _SIZES),
            *(Benchmark(f"forward bf16 {case.name}", case, dtype=_BF16) for case in _SIZES),
        ),
        bytes=_bytes,
        flops=_flops,
        source="Vaswani et al. 2017, eq. 1; Dao et al. 2023",
        floor=(4.0, "scores, the sum, the quotient and the output round once each"),
        reads=True,
        peers={"SDPA": sdpa_decode_attention},
    ),
)
