"""Triton kernel of the token_sampling family: the steps of reference.py, without a sort."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gmkernels import dispatch
from gmkernels.ops.token_sampling import outputs, reference
from gmkernels.triton_common import DEVICES as _DEVICES
from gmkernels.triton_common import (
    binary_parts,
    interleave4,
    launch,
    load_folded_key,
    minus_two_ln,
    noise_words,
    on_device,
    row_stride,
    uniform_from,
)

DEVICES = {"next_token": _DEVICES}
_LOWEST = tl.constexpr(reference.LOWEST)
_EXP = tl.constexpr(reference._EXP)
_NONE = tl.constexpr(reference.NONE)
_INFINITY = tl.constexpr(float("inf"))
_TILE = 2048  # tokens that a program reads at a time


@triton.jit
def load_logits(ptr, start, columns, C: tl.constexpr):
    """Logits [1, C] as float32, -inf past the row's end; -0 becomes 0."""
    v = (start + tl.arange(0, C))[None, :]
    return tl.load(ptr + v, mask=v < columns, other=-float("inf")).to(tl.float32) + 0.0


@triton.jit
def ordered_bits(x):
    """uint32 in the order of the floats."""
    i = x.to(tl.int32, bitcast=True)
    return tl.where(i < 0, ~i, i ^ -0x80000000).to(tl.uint32, bitcast=True)


@triton.jit
def weight(d):
    """rint(2^33 exp(d)) for d <= 0, int64."""
    d = tl.where(d > _LOWEST, d, _LOWEST)
    n = (d * 1.4426950408889634 + 12582912.0) - 12582912.0
    r = (d - n * 0.693145751953125) - n * 1.42860676533018518e-06
    q = r * _EXP[0] + _EXP[1]
    q = q * r + _EXP[2]
    q = q * r + _EXP[3]
    q = q * r + 0.5
    q = q * r + 1.0
    q = q * r + 1.0
    e = (q.to(tl.int32, bitcast=True) + n.to(tl.int32) * 0x800000).to(tl.float32, bitcast=True)
    fixed = (e.to(tl.float64) * 8589934592.0 + 6755399441055744.0) - 6755399441055744.0
    return fixed.to(tl.int64)


@triton.jit
def gumbel(word):
    """2 g - 2 ln 2 of a Gumbel variable g."""
    e, f = binary_parts(uniform_from(word ^ 0xFFFFFFFF))
    f = tl.where(e == 0, uniform_from(word) * -1.0, f)
    e, f = binary_parts(minus_two_ln(e, f))
    return minus_two_ln(e, f)


@triton.jit
def measure(x, bits, top, sharpness, least, WEIGHED: tl.constexpr):
    """What a token adds: its weight if it is kept so far; or 1."""
    if WEIGHED:
        return tl.where(bits >= least, weight((x - top) * sharpness), 0)
    else:
        return tl.full(x.shape, 1, tl.int64)


@triton.jit
def threshold(ptr, columns, top, sharpness, least, target, WEIGHED: tl.constexpr, C: tl.constexpr):
    """The largest t such that the tokens of ordered bits >= t measure at least target (float64).

    Two bits of t a pass over the row, from the highest.
    """
    t = tl.full((), 0, tl.uint32)
    unit = tl.full((), 1 << 30, tl.uint32)
    for _ in range(16):
        t1, t2, t3 = t + unit, t + unit * 2, t + unit * 3
        m1 = tl.zeros((1, C), tl.int64)
        m2 = tl.zeros((1, C), tl.int64)
        m3 = tl.zeros((1, C), tl.int64)
        for start in range(0, columns, C):
            x = load_logits(ptr, start, columns, C)
            bits = ordered_bits(x)
            m = measure(x, bits, top, sharpness, least, WEIGHED)
            m1 += tl.where(bits >= t1, m, 0)
            m2 += tl.where(bits >= t2, m, 0)
            m3 += tl.where(bits >= t3, m, 0)
        t = tl.where(tl.sum(m1).to(tl.float64) >= target, t1, t)
        t = tl.where(tl.sum(m2).to(tl.float64) >= target, t2, t)
        t = tl.where(tl.sum(m3).to(tl.float64) >= target, t3, t)
        unit = unit >> 2
    return t


@triton.jit
def next_token_kernel(
    logits_ptr,  # [rows, columns], rows contiguous
    key_ptr,  # int64 [2]
    position_ptr,  # int64 [rows]
    token_ptr,  # int64 [rows]
    columns,
    stride,  # elements from one row of logits to the next
    sharpness,  # 1 / temperature
    top_k,
    share,  # top_p 2^30
    GREEDY: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    C: tl.constexpr,
):
    # One program a row, in tiles of C tokens; after the first pass the row is in the L2 cache.
    row = tl.program_id(0).to(tl.int64)
    ptr = logits_ptr + row * stride
    tops = tl.full((1, C), -float("inf"), tl.float32)
    nan = tl.zeros((1, C), tl.int32)
    for start in range(0, columns, C):
        x = load_logits(ptr, start, columns, C)
        nan = tl.where(x != x, 1, nan)
        tops = tl.where(x > tops, x, tops)
    top = tl.max(tops)
    is_drawn = (tl.max(nan) == 0) & (top < _INFINITY) & (top > -_INFINITY)
    least = tl.full((), 0, tl.uint32)
    if TOP_K:
        target = (tl.zeros((), tl.int64) + top_k).to(tl.float64)
        least = threshold(ptr, columns, top, sharpness, least, target, False, C)
    if TOP_P:
        total = tl.zeros((1, C), tl.int64)
        for start in range(0, columns, C):
            x = load_logits(ptr, start, columns, C)
            total += measure(x, ordered_bits(x), top, sharpness, least, True)
        limit = (tl.zeros((), tl.int64) + share).to(tl.float64) * 9.313225746154785e-10  # top_p
        bound = tl.sum(total).to(tl.float64) * limit
        least = threshold(ptr, columns, top, sharpness, least, bound, True, C)
    best = tl.full((1, C), -float("inf"), tl.float32)
    token = tl.zeros((1, C), tl.int32)
    key = load_folded_key(key_ptr, tl.load(position_ptr + row + tl.zeros((1, 1), tl.int64)))
    for start in range(0, columns, C):
        x = load_logits(ptr, start, columns, C)
        score = x
        if not GREEDY:
            d = (x - top) * sharpness
            d4 = (start // 4 + tl.arange(0, C // 4))[None, :]
            w0, w1, w2, w3 = noise_words(key, row + tl.zeros((1, 1), tl.int64), d4, 0)
            score = (d + d) + interleave4(gumbel(w0), gumbel(w1), gumbel(w2), gumbel(w3), 1, C)
        better = (x > -float("inf")) & (ordered_bits(x) >= least) & (score > best)
        best = tl.where(better, score, best)
        token = tl.where(better, (start + tl.arange(0, C))[None, :], token)
    first = tl.min(tl.where(best == tl.max(best), token, 0x7FFFFFFF))
    tl.store(token_ptr + row, tl.where(is_drawn, first, _NONE).to(tl.int64))


def next_token(
    logits: Tensor, key: Tensor, position: Tensor, temperature: float, top_k: int, share: int
) -> Tensor:
    """Tokens int64 [B]."""
    rows, columns = logits.shape
    tokens = outputs.next_token(logits, key, position, temperature, top_k, share)
    greedy = temperature == 0
    tile = min(_TILE, max(4, triton.next_power_of_2(columns)))
    launch(
        next_token_kernel,
        (rows,),
        logits,
        on_device(key, logits.device),
        position,
        tokens,
        columns,
        row_stride(logits),
        0.0 if greedy else torch.tensor(1 / temperature, dtype=torch.float32).item(),
        top_k,
        share,
        num_warps=max(1, tile // 256),
        GREEDY=greedy,
        TOP_K=not greedy and 0 < top_k < columns,
        TOP_P=not greedy and share > 0,
        C=tile,
    )
    return tokens


dispatch.define("gmkernels_triton", next_token, outputs.next_token)
