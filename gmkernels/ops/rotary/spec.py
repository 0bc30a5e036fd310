"""Rows of the rotary family."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gmkernels.ops import rotary
from gmkernels.ops.gaussian.spec import in_layout
from gmkernels.spec import Benchmark, Case, Inputs, Op, filled, itemsize, other_dtype


def _laid_out(x: Tensor, layout: str | None) -> Tensor:
    """Heads in a layout: "projection" is a third of one [B, T, 3 H D]."""
    if layout != "projection":
        return in_layout(x, layout)
    joined = torch.cat([x.transpose(1, 2).flatten(2)] * 3, 2)
    return joined.chunk(3, 2)[1].unflatten(2, x.shape[1::2]).transpose(1, 2)


def rotary_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """x, a table longer than T, and what the case's options name."""
    o, (batch, _, tokens, width) = case.options, case.shape
    x = filled(case.shape, dtype, device, seed)
    half = min(o.get("half", width // 2), width // 2)
    cos, sin = rotary.rotary_table(tokens + 9, 2 * half, base=o.get("base", 100.0), device=device)
    kwargs: dict[str, Any] = {k: o[k] for k in ("interleaved",) if k in o}
    if "positions" in o:
        generator = torch.Generator().manual_seed(seed)
        shape = (tokens,) if o["positions"] == "shared" else (batch, tokens)
        kwargs["positions"] = torch.randint(0, tokens + 9, shape, generator=generator).to(device)
    if o.get("mixed"):
        cos, sin = cos.to(other_dtype(dtype)), sin.to(other_dtype(dtype))
    return Inputs((_laid_out(x, o.get("layout")), cos, sin), kwargs, fixed=(1, 2))


def eager_rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    """As in transformers' Llama and GPT-J: in x's dtype, x cos + x' sin."""
    if positions is None:
        positions = torch.arange(x.shape[2], device=x.device)[None]
    places = positions if positions.dim() == 2 else positions[None]
    width = 2 * cos.shape[1]
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        c, s = (t[places].repeat_interleave(2, -1)[:, None].to(x.dtype) for t in (cos, sin))
        swapped = torch.stack([-turned[..., 1::2], turned[..., 0::2]], -1).flatten(-2)
    else:
        c, s = (torch.cat([t[places]] * 2, -1)[:, None].to(x.dtype) for t in (cos, sin))
        first, second = turned.chunk(2, -1)
        swapped = torch.cat([-second, first], -1)
    return torch.cat([turned * c + swapped * s, rest], -1)


def rms_norm_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """x, and a weight unless the case says otherwise; a case on rows alone has it constant."""
    o = case.options
    x = filled(case.shape, dtype, device, seed)
    if o.get("values") == "boundary":  # zeros, tiny, huge, of either sign
        scales = torch.tensor([0.0, 1e-7, 1e-3, 100.0], dtype=dtype, device=device)
        x = x * scales[:, None]
    x = _laid_out(x, o.get("layout"))
    kwargs = {"eps": o["eps"]} if "eps" in o else {}
    if o.get("weight") == "none":
        return Inputs((x,), kwargs)
    second = other_dtype(dtype) if o.get("mixed") else dtype
    weight = filled(case.shape[-1:], second, device, seed + 1)
    return Inputs((x, weight), kwargs, fixed=(1,) if o.get("rows_alone") else ())


def eager_rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """As in transformers' Llama, the weight times the rounded quotient."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return y if weight is None else (weight * y).to(x.dtype)


def fused_rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """PyTorch's own."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _bytes(backward: int) -> Any:
    def bytes_(case: Case, dtype: torch.dtype, is_backward: bool) -> int:
        return math.prod(case.shape) * itemsize(dtype) * (2 + (backward if is_backward else 0))

    return bytes_


_SHARED = (
    Case("no_rows", "empty", (0, 2, 5, 8)),
    Case("no_tokens", "empty", (2, 3, 0, 8)),
    Case("many_rows", "large", (3, 5, 67, 6)),
    Case("projection", "non_contiguous", (2, 3, 5, 16), {"layout": "projection"}),
    Case("transposed", "non_contiguous", (2, 3, 9, 8), {"layout": "transposed"}),
    Case("channels_last", "channels_last", (2, 4, 5, 6), {"layout": "channels_last"}),
    Case("mixed_dtypes", "mixed", (2, 3, 5, 12), {"mixed": True}),
)
_ROTARY_CASES = (
    *_SHARED,
    Case("one", "one", (1, 1, 1, 1)),
    Case("odd", "odd", (5, 3, 7, 38)),
    Case("odd_width", "odd", (2, 3, 4, 37)),
    Case("block-1", "block-1", (1, 1, 3, 1022)),
    Case("block", "block", (1, 1, 2, 1024)),
    Case("block+1", "block+1", (1, 2, 2, 1026)),
    Case("no_pairs", "boundary", (2, 3, 4, 8), {"half": 0}),
    Case("first_place_alone", "boundary", (2, 3, 1, 8)),
    Case("part_of_the_width", "odd", (2, 3, 5, 21), {"half": 5}),
    Case("positions_shared", "keyword", (2, 3, 5, 8), {"positions": "shared"}),
    Case("positions_of_each", "keyword", (3, 2, 5, 8), {"positions": "each"}),
    Case("interleaved", "keyword", (2, 3, 5, 26), {"interleaved": True}),
    Case("interleaved_part", "keyword", (2, 2, 3, 21), {"interleaved": True, "half": 9}),
    Case("interleaved_wide", "large", (1, 1, 2, 1030), {"interleaved": True}),
)
_RMS_NORM_CASES = (
    *_SHARED,
    # A row of one has the gradient eps: with a small one nothing but rounding.
    Case("one", "one", (1, 1), {"eps": 0.5}),
    Case("odd", "odd", (5, 3, 37), {"rows_alone": True}),
    Case("odd_gradients", "odd", (5, 3, 37)),
    Case("one_dimension", "odd", (37,)),
    Case("block-1", "block-1", (3, 1023)),
    Case("block", "block", (2, 1024)),
    Case("block+1", "block+1", (3, 1025)),
    Case("zeros_and_large_values", "boundary", (4, 12), {"values": "boundary"}),
    Case("eps", "keyword", (5, 37), {"eps": 0.1}),
    Case("no_weight", "keyword", (5, 3, 4, 8), {"weight": "none"}),
)
_GPT = Case("4x8x1024x64", "large", (4, 8, 1024, 64), {"layout": "projection", "base": 10000.0})
_GPT_J = Case("4x8x1024x64 interleaved", "large", _GPT.shape, {**_GPT.options, "interleaved": True})
_TOKEN = Case("4x8x1x64", "large", (4, 8, 1, 64), {**_GPT.options, "positions": "each"})
_HIDDEN = Case("4096x768", "large", (4096, 768))
_BF16 = torch.bfloat16

OPS = (
    Op(
        name="rotary_embedding",
        family="rotary",
        summary="pairs of features rotated by their token's place, so that products see distances",
        function=rotary.rotary_embedding,
        eager=eager_rotary_embedding,
        inputs=rotary_inputs,
        cases=_ROTARY_CASES,
        benchmarks=(
            Benchmark("forward", _GPT, headline=True),
            Benchmark("forward bf16", _GPT, dtype=_BF16),
            Benchmark("forward+backward", _GPT, backward=True),
            Benchmark("forward, neighbours", _GPT_J),
            Benchmark("forward, one token", _TOKEN),
        ),
        bytes=_bytes(2),
        flops=lambda case: 3 * math.prod(case.shape),
        source="Su et al. 2021, eq. 34",
    ),
    Op(
        name="rms_norm",
        family="rotary",
        summary="features over their root mean square, times a weight; any strides of heads",
        function=rotary.rms_norm,
        eager=eager_rms_norm,
        inputs=rms_norm_inputs,
        cases=_RMS_NORM_CASES,
        benchmarks=(
            Benchmark("forward", _GPT),
            Benchmark("forward bf16", _GPT, dtype=_BF16),
            Benchmark("forward+backward", _GPT, backward=True),
            Benchmark("forward+backward 4096x768", _HIDDEN, backward=True),
        ),
        bytes=_bytes(3),
        flops=lambda case: 4 * math.prod(case.shape),
        source="Zhang and Sennrich 2019, eq. 4",
        peers={"F.rms_norm": fused_rms_norm},
    ),
)
