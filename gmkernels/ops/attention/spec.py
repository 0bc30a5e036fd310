"""Rows of the attention family."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gmkernels.ops import attention
from gmkernels.ops.attention.reference import visible, visible_range
from gmkernels.ops.gaussian.spec import in_layout
from gmkernels.spec import Benchmark, Case, Inputs, Op, filled, itemsize, other_dtype

_PASSED = ("scale", "window", "softcap", "causal")  # options that are keywords of the call


def _offsets(case: Case, device: str) -> Tensor:
    """Sequences of one token, of most tokens, of none, and of the rest."""
    tokens = case.shape[2]
    cuts = [0, min(1, tokens), tokens // 2, tokens // 2, tokens]
    return torch.tensor(cuts, dtype=case.options["cu_seqlens"], device=device)


def _key_mask(case: Case, keys: int, seed: int, device: str) -> Tensor:
    """Lengths, a hole in each, and a row that sees nothing."""
    lengths = torch.arange(1, case.shape[0] + 1) * keys // case.shape[0]
    generator = torch.Generator().manual_seed(seed)
    seen = torch.rand(case.shape[0], keys, generator=generator) < 0.8
    seen &= torch.arange(keys) < lengths[:, None]
    if case.options["key_mask"] == "none":
        seen[0] = False
    return seen.to(device)


def inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """q, k, v and what the case's options name."""
    o = case.options
    b, h, t, d = case.shape
    keys, kv_heads = o.get("keys", t), o.get("kv_heads", h)
    second = other_dtype(dtype) if o.get("mixed") else dtype
    shapes = ((b, h, t, d), (b, kv_heads, keys, d), (b, kv_heads, keys, d))
    xs = [filled(s, torch.float64, device, seed + i) for i, s in enumerate(shapes)]
    if o.get("values") == "saturated":  # scores of tens: one probability is nearly 1
        xs[0] = xs[0] * 5.0
    if o.get("values") == "equal":
        xs[0] = xs[0] * 0.0
    args = [xs[0].to(dtype), xs[1].to(second), xs[2].to(second)]
    if o.get("layout") == "projection":  # heads of one [B, T, 3 H D]
        joined = torch.cat([x.transpose(1, 2).flatten(2) for x in args], 2)
        args = [x.unflatten(2, (h, d)).transpose(1, 2) for x in joined.chunk(3, 2)]
    args = [in_layout(x, o.get("layout")) for x in args]
    kwargs: dict[str, Any] = {name: o[name] for name in _PASSED if name in o}
    if "cu_seqlens" in o:
        kwargs["cu_seqlens"] = _offsets(case, device)
    if "key_mask" in o:
        kwargs["key_mask"] = _key_mask(case, keys, seed, device)
    return Inputs(tuple(args), kwargs)


def logsumexp_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """q, k and what the case's options name."""
    given = inputs(case, dtype, device, seed)
    return Inputs(given.args[:2], given.kwargs)


def _eager_scores(
    q: Tensor,
    k: Tensor,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scores with -inf where a query does not see a key, and where one does."""
    dtype = torch.promote_types(q.dtype, k.dtype)
    k = k.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], 1)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    scores = q.to(dtype) @ k.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    sizes = (q.shape[2], k.shape[2])
    seen = visible(*sizes, key_mask, cu_seqlens, causal, window or 0, q.device)
    return scores.masked_fill(~seen, float("-inf")), seen


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    scores, seen = _eager_scores(q, k, causal, scale, window, softcap, key_mask, cu_seqlens)
    p = scores.softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    v = v.to(p.dtype).repeat_interleave(q.shape[1] // v.shape[1], 1)
    return (p @ v).to(q.dtype)


def eager_causal_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """The textbook's: scores, mask, softmax, product, each a matrix T x T in memory."""
    return _eager(q, k, v, True, **options)


def eager_full_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """The textbook's."""
    return _eager(q, k, v, False, **options)


def eager_attention_logsumexp(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The textbook's, the sum in float32."""
    scores, _ = _eager_scores(q, k, causal, scale, window, softcap, key_mask, cu_seqlens)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.to(wide).logsumexp(-1)


def sdpa_causal_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None) -> Tensor:
    """PyTorch's own, flash where it has it: a window makes it take a mask."""
    gqa = q.shape[1] != k.shape[1]
    if window is None and q.shape[2] == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    seen = visible(q.shape[2], k.shape[2], None, None, True, window or 0, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=gqa)


def sdpa_full_attention(
    q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None
) -> Tensor:
    """PyTorch's own."""
    gqa = q.shape[1] != k.shape[1]
    mask = None if key_mask is None else key_mask[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)


def _pairs(case: Case, causal: bool) -> int:
    """Pairs of a query and a key that it sees, of a (batch, head)."""
    o, t = case.options, case.shape[2]
    low, high = visible_range(
        t, o.get("keys", t), causal, o.get("window", 0), None, torch.device("cpu")
    )
    return int((high - low).clamp(min=0).sum())


def _flops(causal: bool, products: int):
    return lambda case: (
        2 * products * case.shape[0] * case.shape[1] * case.shape[3] * _pairs(case, causal)
    )


def _bytes(values: bool):
    """q and o once, k and v once; the backward reads these and do, and writes three gradients."""

    def bytes_(case: Case, dtype: torch.dtype, backward: bool) -> int:
        b, h, t, d = case.shape
        keys, kv_heads = case.options.get("keys", t), case.options.get("kv_heads", h)
        queries, heads = b * h * t * d, b * kv_heads * keys * d
        forward = (2 * queries + 2 * heads) if values else queries + heads
        gradients = (4 * queries + 4 * heads) if values else 2 * queries + 2 * heads
        n = forward + (gradients if backward else 0)
        return n * itemsize(dtype) + 4 * b * h * t * (2 if backward else 1)

    return bytes_


CASES = (
    Case("no_rows", "empty", (0, 2, 5, 16)),
    Case("no_queries", "empty", (2, 2, 0, 16), {"keys": 3}),
    Case("no_keys", "empty", (2, 2, 3, 16), {"keys": 0}),
    Case("one", "one", (1, 1, 1, 1)),
    Case("odd", "odd", (5, 3, 13, 24)),
    Case("odd_width", "odd", (1, 2, 40, 37)),
    Case("wide", "odd", (1, 1, 21, 256)),
    Case("block-1", "block-1", (1, 1, 191, 16)),
    Case("block", "block", (1, 1, 192, 32)),
    Case("block+1", "block+1", (1, 1, 193, 16)),
    Case("large", "large", (1, 1, 260, 80)),
    Case("saturated", "boundary", (2, 2, 33, 16), {"values": "saturated"}),
    Case("equal", "boundary", (2, 2, 33, 16), {"values": "equal"}),
    Case("fewer_keys", "boundary", (2, 2, 19, 16), {"keys": 7}),
    Case("more_keys", "boundary", (2, 2, 7, 16), {"keys": 120}),
    Case("projection", "non_contiguous", (2, 2, 33, 16), {"layout": "projection"}),
    Case("transposed", "non_contiguous", (2, 3, 9, 8), {"layout": "transposed"}),
    Case("heads_channels_last", "channels_last", (2, 3, 5, 7), {"layout": "channels_last"}),
    Case("mixed_dtypes", "mixed", (2, 2, 17, 16), {"mixed": True}),
    Case("grouped", "keyword", (2, 4, 35, 16), {"kv_heads": 2}),
    Case("one_key_head", "keyword", (1, 3, 70, 16), {"kv_heads": 1, "keys": 80}),
    Case("scale", "keyword", (2, 2, 17, 16), {"scale": 0.7}),
    Case("negative_scale", "keyword", (2, 2, 17, 16), {"scale": -0.2}),
    Case("softcap", "keyword", (2, 2, 17, 16), {"softcap": 0.9}),
)
_PACKED = (
    Case("packed", "keyword", (1, 2, 70, 16), {"cu_seqlens": torch.int64}),
    Case("packed_int32", "keyword", (1, 2, 21, 16), {"cu_seqlens": torch.int32, "kv_heads": 1}),
)
_WINDOWS = (
    Case("window", "keyword", (1, 2, 100, 16), {"window": 20}),
    Case("window_two", "keyword", (2, 2, 17, 16), {"window": 2}),
    Case("window_keys", "keyword", (1, 2, 40, 16), {"window": 9, "keys": 67, "kv_heads": 1}),
    Case("packed_window", "keyword", (1, 2, 70, 16), {"cu_seqlens": torch.int64, "window": 11}),
)
_HOLES = {"keys": 100, "key_mask": "holes"}
_NONE = {"keys": 20, "key_mask": "none"}
_MASKS = (
    Case("key_mask", "keyword", (3, 2, 11, 16), _HOLES),
    Case("no_key_seen", "keyword", (2, 2, 11, 16), _NONE),
)
_SHAPE = (4, 8, 1024, 64)
_GPT = Case("4x8x1024x64", "large", _SHAPE)
_BF16 = torch.bfloat16
_DRAWS = (16, "a probability near 1 or a score of tens magnifies what is rounded, for either side")


def _case(b: int, h: int, t: int, d: int, **options: Any) -> Case:
    tail = "".join(f", {k} {v}" for k, v in options.items())
    return Case(f"{b}x{h}x{t}x{d}{tail}", "large", (b, h, t, d), options)


_SIZES = (
    _case(12, 4, 64, 32),  # of the character model
    _case(16, 8, 128, 32),
    _case(16, 8, 128, 64),
    _case(16, 8, 128, 128),
    _case(8, 8, 512, 64),
    _case(2, 8, 2048, 64),
    _case(1, 4, 4096, 64),
    _case(1, 2, 8192, 64),
    _case(4, 8, 1024, 32),
    _case(4, 8, 1024, 128),
    _case(1, 4, 4096, 64, window=256),
    _case(4, 8, 1024, 64, kv_heads=2),
)
_CROSS = _case(4, 8, 1024, 64, keys=77)

OPS = (
    Op(
        name="causal_attention",
        family="attention",
        summary="softmax attention to the past: grouped heads, window, softcap, packed sequences",
        function=attention.causal_attention,
        eager=eager_causal_attention,
        inputs=inputs,
        cases=(*CASES, *_PACKED, *_WINDOWS),
        benchmarks=(
            Benchmark("forward", _GPT, headline=True),
            Benchmark("forward bf16", _GPT, dtype=_BF16),
            Benchmark("forward+backward", _GPT, backward=True, headline=True),
            Benchmark("forward+backward bf16", _GPT, dtype=_BF16, backward=True),
            *(Benchmark(f"forward {case.name}", case) for case in _SIZES),
            *(Benchmark(f"forward bf16 {case.name}", case, dtype=_BF16) for case in _SIZES),
            *(Benchmark(f"forward+backward {c.name}", c, backward=True) for c in _SIZES),
            *(Benchmark(f"forward+backward bf16 {c.name}", c, _BF16, True) for c in _SIZES),
        ),
        bytes=_bytes(True),
        flops=_flops(True, 2),
        gradient_flops=_flops(True, 5),
        source="Vaswani et al. 2017, eq. 1; Dao et al. 2022",
        floor=(4.0, "scores, the sum, the quotient and the output round once each"),
        draws=_DRAWS,
        operator="attention",
        peers={"SDPA": sdpa_causal_attention},
    ),
    Op(
        name="full_attention",
        family="attention",
        summary="softmax attention to every key, of the same or of another sequence; key mask",
        function=attention.full_attention,
        eager=eager_full_attention,
        inputs=inputs,
        cases=(*CASES, *_PACKED, *_MASKS),
        benchmarks=(
            Benchmark("forward", _GPT),
            Benchmark("forward bf16", _GPT, dtype=_BF16),
            Benchmark("forward+backward", _GPT, backward=True),
            Benchmark("forward+backward cross", _CROSS, backward=True),
        ),
        bytes=_bytes(True),
        flops=_flops(False, 2),
        gradient_flops=_flops(False, 5),
        source="Vaswani et al. 2017, eq. 1; Dao et al. 2022",
        floor=(4.0, "scores, the sum, the quotient and the output round once each"),
        draws=_DRAWS,
        operator="attention",
        peers={"SDPA": sdpa_full_attention},
    ),
    Op(
        name="attention_logsumexp",
        family="attention",
        summary="log of the sum of exp(scores) over the keys seen: joins attentions over parts",
        function=attention.attention_logsumexp,
        eager=eager_attention_logsumexp,
        inputs=logsumexp_inputs,
        cases=(
            *CASES,
            *_PACKED,
            *_WINDOWS,
            Case("not_causal", "keyword", (2, 2, 17, 16), {"causal": False}),
            Case("key_mask", "keyword", (3, 2, 11, 16), {**_HOLES, "causal": False}),
            Case("no_key_seen", "boundary", (2, 2, 11, 16), {**_NONE, "causal": False}),
        ),
        benchmarks=(Benchmark("forward", _GPT), Benchmark("forward+backward", _GPT, backward=True)),
        bytes=_bytes(False),
        flops=_flops(True, 1),
        gradient_flops=_flops(True, 3),
        source="Dao et al. 2022, algorithm 1",
        floor=(4.0, "scores, the maximum, the logarithm and their sum round once each"),
        draws=_DRAWS,
        operator="attention",
    ),
)
