"""The next token of each sequence, drawn from filtered logits: temperature, top-k, top-p, Gumbel.

Formula. logits x [B, V], float32; row b has its maximum m, c = float32(1 / temperature).
    d_v    = (x_v - m) c                                          <= 0, the log-weights
    top-k  keeps v with x_v >= the k-th largest of the row: all that tie with it
    top-p  keeps v, of those, with  sum_{x_j > x_v} W_j < top_p sum_j W_j
           W = rint(2^33 exp(d)), an integer: equal logits are kept or dropped together
    token  = argmax over the kept v of 2 d_v + h_v, the first index where two are equal
    h      = 2 g - 2 ln 2 of a standard Gumbel variable g = -ln(-ln(1 - u)), which is the law
             P(token = v) = exp(d_v) / sum over the kept of exp(d_j)
    u      the uniform of noise/reference.py at (seed, row offset + b, position v in the row), under
           the key folded by the sequence's position: noise.fold_in(key, position_b)
    temperature 0 is the argmax of x, the first index where two are equal.
Sources: Gumbel 1954 (the trick); Fan et al. 2018 (top-k, arXiv:1805.04833); Holtzman et al. 2020
(top-p, arXiv:1904.09751); the order temperature, top-k, top-p is that of transformers' generate().

No gradient: a draw is a step function of the logits.

Bytes: B V logits read, once by the formula; 8 B written. Kernels read a row again from the cache.
Eager PyTorch sorts V values and their indices, and moves some 60 B V bytes. Flops: 70 a kept token.

Numerics. exp, ln and the uniforms are fixed polynomials in float32 made of +, -, * and bit
operations in a fixed order; sums of W are integers below 2^53 (V <= 2^20), exact in any order; so
each backend gives the same token for the same logits, whatever its blocks. The integers put the
mass of the nucleus within V 2^-34 of the exact one (3e-6 for 50257 tokens). u has its finest steps
near 0, where the largest g come from: -2 ln(1 - u) takes f = -u itself where 1 - u > sqrt(1/2). A
sum of float32 d and g is right to 2e-6 where d > -16.

Edge cases: a token of logit -inf is never drawn. A row that holds NaN or +inf, or no finite value
(so each row if V = 0), gives -1. At least one token is kept. float64 is rounded to float32 first.
"""

import torch
from torch import Tensor

from gmkernels.ops.noise import reference as noise

NONE = -1  # the token of a row from which none can be drawn
MAX_VOCABULARY = 1 << 20  # the sum of so many W is below 2^53
SHARE_BITS = 30  # top_p is a multiple of 2^-30
LOWEST = -24.0  # the W of this is 0
_LOG2_E = 1.4426950408889634
_LN2_HIGH = 0.693145751953125  # 15 bits: times an integer it is exact
_LN2_LOW = 1.42860676533018518e-06
_EXP = (0.001393575919792056, 0.008369090966880322, 0.04166645556688309, 0.16666516661643982)
_ROUNDER = 12582912.0  # 1.5 2^23: added and taken away, it rounds to the nearest integer


def weights(d: Tensor) -> Tensor:
    """W = rint(2^33 exp(d)) for float32 d <= 0, int64."""
    d = torch.where(d > LOWEST, d, LOWEST)
    n = (d * _LOG2_E + _ROUNDER) - _ROUNDER
    r = (d - n * _LN2_HIGH) - n * _LN2_LOW
    q = r * _EXP[0] + _EXP[1]
    for coefficient in (*_EXP[2:], 0.5, 1.0, 1.0):
        q = q * r + coefficient
    return torch.ldexp(q.double(), n.to(torch.int32) + 33).round().to(torch.int64)


def gumbel(words: Tensor) -> Tensor:
    """h = 2 g - 2 ln 2 of Philox words, float32."""
    k, f = noise.binary_parts(noise.uniform_from(words ^ 0xFFFFFFFF))
    f = torch.where(k == 0, -noise.uniform_from(words), f)
    return noise.minus_two_ln(noise.minus_two_ln_of(k, f))


def kept(x: Tensor, d: Tensor, top_k: int, share: int) -> Tensor:
    """Which tokens may be drawn, bool [B, V]; share: top_p 2^30, 0 for none; top_k: 0 for none."""
    keep = x > -torch.inf
    if 0 < top_k < x.shape[1]:
        keep &= x >= x.topk(top_k, 1).values[:, -1:]
    if share:
        ordered, order = torch.where(keep, x, -torch.inf).sort(1, descending=True)
        mass = torch.where(keep, weights(d), 0).gather(1, order)
        up_to = mass.cumsum(1)
        above = up_to - mass  # of a group of equals, exact for the first, which decides
        inside = above.double() * 2.0**SHARE_BITS < up_to[:, -1:].double() * share
        last = inside.sum(1, keepdim=True).clamp(min=1) - 1
        keep &= x >= ordered.gather(1, last)
    return keep


def next_token(
    logits: Tensor, key: Tensor, position: Tensor, temperature: float, top_k: int, share: int
) -> Tensor:
    """Tokens int64 [B]; position: int64 [B]."""
    x = logits.to(torch.float32)
    rows, columns = x.shape
    if columns == 0:
        return torch.full((rows,), NONE, dtype=torch.int64, device=x.device)
    m = x.amax(1, keepdim=True)
    if temperature == 0:
        token = x.argmax(1)
    else:
        d = (x - m) * torch.tensor(1 / temperature, dtype=torch.float32, device=x.device)
        key = key.to(x.device)
        seeds = noise.folded_seeds(key, position)
        h = gumbel(noise.words_of(key, rows, columns, 0, seeds).flatten(1)[:, :columns])
        score = torch.where(kept(x, d, top_k, share), (d + d) + h, -torch.inf)
        token = score.argmax(1)
    return torch.where(m[:, 0].isfinite(), token, NONE)
