"""Row of the token_sampling family."""

import math
from typing import Any

import torch
from torch import Tensor

from gmkernels.ops import token_sampling
from gmkernels.spec import GRAIN, Benchmark, Case, Inputs, Op, filled

_KEYWORDS = ("temperature", "top_k", "top_p", "position", "offset", "seed")


def inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Logits, and the keywords that the case's options name."""
    o = case.options
    logits = filled(case.shape, dtype, device, seed, scale=o.get("scale", 3.0))
    if o.get("values") == "infinite":  # a row each: some -inf, only -inf, one left, NaN, +inf
        logits[0, ::2] = -torch.inf
        logits[1:3] = -torch.inf
        logits[2, 5] = -1e30
        logits[3, 4], logits[4, 3] = torch.nan, torch.inf
    if o.get("values") == "equal":
        logits = logits * 0.0
    if o.get("layout") == "last_token":  # of [B, T, V]
        logits = torch.stack([logits] * 3, 1)[:, -1]
    if o.get("layout") == "transposed":
        logits = logits.T.contiguous().T
    kwargs: dict[str, Any] = {"seed": seed, **{k: o[k] for k in _KEYWORDS if k in o}}
    if o.get("position") == "ragged":
        kwargs["position"] = torch.arange(case.shape[0], device=device) * 1000003
    return Inputs((logits,), kwargs, data=(0,))


def eager_next_token(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    **_: Any,
) -> Tensor:
    """As in transformers' generate(): three filters, softmax, multinomial, a serial generator."""
    if temperature == 0:
        return logits.argmax(1)
    x = logits.float() / temperature
    if top_k is not None:
        kth = x.topk(min(top_k, x.shape[1]), 1).values[:, -1:]
        x = x.masked_fill(x < kth, -torch.inf)
    if top_p is not None:
        ordered, order = x.sort(1)
        removed = ordered.softmax(1).cumsum(1) <= 1 - top_p
        removed[:, -1:] = False
        x = x.masked_fill(removed.scatter(1, order, removed), -torch.inf)
    return torch.multinomial(x.softmax(1), 1)[:, 0]


def _bytes(case: Case, dtype: torch.dtype, backward: bool) -> int:
    return math.prod(case.shape) * dtype.itemsize + 8 * case.shape[0]


_BOTH = {"top_k": 20, "top_p": 0.8, "temperature": 0.7}
CASES = (
    Case("no_rows", "empty", (0, 5)),
    Case("no_tokens", "empty", (3, 0)),
    Case("one", "one", (1, 1), _BOTH),
    Case("odd", "odd", (5, 37), _BOTH),
    Case("block-1", "block-1", (2, GRAIN - 1), {"top_k": 9}),
    Case("block", "block", (2, GRAIN), {"top_p": 0.9}),
    Case("block+1", "block+1", (2, GRAIN + 1)),
    Case("large", "large", (2, 2 * GRAIN + 900), _BOTH),
    Case("infinite_and_nan", "boundary", (6, 9), {"values": "infinite", **_BOTH}),
    Case("greedy_of_infinite", "boundary", (6, 9), {"values": "infinite", "temperature": 0.0}),
    Case("all_equal", "boundary", (3, 70), {"values": "equal", "top_k": 3, "top_p": 0.1}),
    Case("nearly_equal", "boundary", (3, 300), {"scale": 1e-6, "top_p": 0.5}),
    Case("far_apart", "boundary", (3, 300), {"scale": 1e4, "top_p": 0.999}),
    Case("last_token_of_each", "non_contiguous", (3, 65), {"layout": "last_token", **_BOTH}),
    Case("transposed", "channels_last", (3, 65), {"layout": "transposed", **_BOTH}),
    Case("float32_beside_any_dtype", "mixed", (3, 65), {"temperature": 1.3}),
    Case("temperature", "keyword", (3, 65), {"temperature": 0.3}),
    Case("temperature_0", "keyword", (3, 65), {"temperature": 0.0, "top_k": 3}),
    Case("top_k_1", "keyword", (3, 65), {"top_k": 1}),
    Case("top_k_above_V", "keyword", (3, 65), {"top_k": 99}),
    Case("top_p_tiny", "keyword", (3, 65), {"top_p": 1e-12}),
    Case("top_p_1", "keyword", (3, 65), {"top_p": 1.0}),
    Case("position", "keyword", (3, 65), {"position": 2**40 + 7}),
    Case("position_of_each", "keyword", (5, 65), {"position": "ragged", "offset": 2**32 - 2}),
)
_GPT2 = {"top_k": 50, "top_p": 0.9, "temperature": 0.8}
_WHOLE = Case("16x50257, whole", "large", (16, 50257))
_NUCLEUS = Case("16x50257, top_p alone", "large", (16, 50257), {"top_p": 0.9})

OPS = (
    Op(
        name="next_token",
        family="token_sampling",
        summary="a token a row: temperature, top-k, top-p and Gumbel noise, without a sort",
        function=token_sampling.next_token,
        eager=eager_next_token,
        inputs=inputs,
        cases=CASES,
        benchmarks=(
            Benchmark("16x50257", Case("16x50257", "large", (16, 50257), _GPT2), headline=True),
            Benchmark("1x50257", Case("1x50257", "large", (1, 50257), _GPT2)),
            Benchmark("16x256", Case("16x256", "large", (16, 256), _GPT2)),
            Benchmark("16x50257, top_p alone", _NUCLEUS),
            Benchmark("16x50257, whole", _WHOLE),
            Benchmark("16x50257 bf16", _WHOLE, dtype=torch.bfloat16),
        ),
        bytes=_bytes,
        flops=lambda case: 70 * math.prod(case.shape),
        source="Gumbel 1954; Fan et al. 2018; Holtzman et al. 2020",
        floor=(0.0, "the bits are fixed: tokens equal the reference's"),
        differentiable=False,
    ),
)
