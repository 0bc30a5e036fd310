"""One step of a sampler: from x at one time to x at the next, whatever the sampler.

Formula. Rows b of D elements; the coefficients of each row are gathered from a table by index.
    p    = u + g (c - u)                 guidance: prediction c with, u without the condition
    x0   = A x + B p                     what the prediction says of the data
    x0c  = clamp(x0, -h, h)              or, with dynamic thresholding, clamp(x0, -h, h) / h
    x'   = e x + f x0c + k p + m previous + s n
n is N(0, I) made from the key folded by the row's index: the noise of step i is normal(shape,
seed=fold_in(key, i)). Where nothing is clamped x0 drops out and the sum is taken with coefficients
folded in float64, x' = (e + f A) x + (k + f B) p + ..., which has one product less and does not
cancel where A and B are large. A learned variance v in [-1, 1] makes s = s exp(low + (v + 1) / 2
(high - low)), low and high half logarithms of variances. h of dynamic thresholding is the ratio
quantile of |x0| in the row, at least 1 and at most `clip`.
Sources: Ho et al., 2020, eq. 7 and 11 (arXiv:2006.11239); Song et al., 2021, eq. 12
(arXiv:2010.02502); Nichol and Dhariwal, 2021, eq. 15 (arXiv:2102.09672); Karras et al., 2022,
algorithm 1 (arXiv:2206.00364); Lu et al., 2022, algorithm 2 (arXiv:2211.01095); Ho and Salimans,
2022, eq. 6 (arXiv:2207.12598); Saharia et al., 2022, section 2.3 (arXiv:2205.11487). How each
sampler becomes a table: gmkernels/sampler.py.

Gradients, with dx' and dx0c [B, *] given:
    dx0  = (f dx' + dx0c) where |x0| <= h, over h with dynamic thresholding; 0 elsewhere
    dx   = e dx' + A dx0        dp = k dx' + B dx0       dc = g dp       du = (1 - g) dp
    dprevious = m dx'           dn = s dx'               dv = dx' n s (high - low) / 2
h is a constant for them. Backward saves the inputs, the key and h; it makes n and x0 again, and
reads x, c and u only where something is clamped.

Bytes, float32, N = B D: reads 4 N for each of x and c, and for u, previous and v where given;
writes 4 N, and 4 N more where x0c is wanted. Eager PyTorch moves 44 N for DDIM with eta = 0, 84 N
for DDPM. Flops: 4 N to 20 N, and 45 N for the noise.

Dynamic thresholding on a GPU is the same one launch, in which a row has one block of threads: it
selects the two order statistics around the quantile by the bits of |x0|, which it makes again in
each pass over the row, and takes the step in one pass more. CUDA C++ selects in 3 passes (radix
select, 2048 bins), Triton in 17 (16 of two bits each, by counting). Memory sees what a plain step
moves, plus 4 B bytes, as long as the rows at work fit the L2 cache; the caches see 8 D bytes a pass
and row, 12 D with guidance. A batch of images costs little so. A batch of one runs on one
multiprocessor: a row of 3 x 1024 x 1024 in float32 is 25 MB a pass, 0.2 ms at the 64 bytes a cycle
that one reads at best, hence 0.9 ms for the 4 passes of C++ and 4 ms for the 18 of Triton.

Numerics. Coefficients are float32, rounded once from float64 (float64 for float64 inputs).

Edge cases: a NaN element gives NaN in its place, in its whole row with dynamic thresholding, whose
quantile counts an infinite |x0| as the largest finite number; a row without elements has h = 1; an
index outside the table gives a row of NaN, and an error from the native CPU kernels, where looking
is free.
"""

import math

import torch
from torch import Tensor

from gmkernels.ops.gaussian.reference import clamp, compute_dtype

# Columns of a table, in the formula's order; x_direct = e + f A, p_direct = k + f B.
COLUMNS = ("A", "B", "e", "f", "k", "m", "s", "x_direct", "p_direct", "low", "high")


def threshold_of(x0: Tensor, clip: float, ratio: float) -> Tensor:
    """h [B] of dynamic thresholding: the quantile of |x0| in each row, within [1, clip]."""
    ordered = x0.detach().abs().flatten(1).sort(1).values
    place = ratio * (ordered.shape[1] - 1)
    below = math.floor(place)
    above = min(below + 1, ordered.shape[1] - 1)
    # sort() puts NaN last: a row that has one has no quantile.
    bad = ordered[:, -1].isnan()
    largest = torch.finfo(x0.dtype).max
    low, high = (ordered[:, i].clamp(max=largest) for i in (below, above))
    quantile = torch.lerp(low, high, place - below)
    return torch.where(bad, float("nan"), clamp(quantile, 1.0, clip))


def _coefficients(table: Tensor, index: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """Each column gathered by index, [B, 1, ...] as like has dimensions; NaN outside."""
    inside = (index >= 0) & (index < table.shape[0])
    found = table[torch.where(inside, index, 0)]
    found = torch.where(inside[:, None], found, float("nan"))
    return found.view(-1, *(1,) * (like.dim() - 1), len(COLUMNS)).unbind(-1)


def sampler_step(
    x: Tensor,
    predicted: Tensor,
    unconditional: Tensor | None,
    previous: Tensor | None,
    variance: Tensor | None,
    eps: Tensor | None,
    key: Tensor | None,
    table: Tensor,
    index: Tensor,
    guidance: float,
    clip: float,
    ratio: float,
    denoised: bool,
) -> tuple[Tensor, Tensor]:
    """x' in x's dtype, and x0c likewise, empty unless it is wanted."""
    given = (x, predicted, unconditional, previous, variance, eps)
    dtype = compute_dtype(*given)
    coefficients = _coefficients(table.to(dtype), index, x)
    A, B, e, f, k, m, s, x_direct, p_direct, low, high = coefficients
    wide, p = x.to(dtype), predicted.to(dtype)
    if unconditional is not None:
        u = unconditional.to(dtype)
        p = u + guidance * (p - u)
    x0 = A * wide + B * p
    if clip < math.inf:
        if ratio > 0:
            h = threshold_of(x0, clip, ratio).view(e.shape) if x0.numel() else torch.ones_like(e)
            x0 = torch.where(x0 < -h, -h, torch.where(x0 > h, h, x0)) / h
        else:
            x0 = clamp(x0, -clip, clip)
        y = e * wide + f * x0 + k * p
    else:
        y = x_direct * wide + p_direct * p
    if previous is not None:
        y = y + m * previous.to(dtype)
    if eps is None and key is not None:
        columns = math.prod(x.shape[1:])
        eps = torch.ops.gmkernels_reference.folded_normal(key, index, columns).view(x.shape)
    if eps is not None:
        if variance is not None:
            s = s * torch.exp(low + 0.5 * (variance.to(dtype) + 1) * (high - low))
        y = y + s * eps.to(dtype)
    return y.to(x.dtype), x0.to(x.dtype) if denoised else x.new_empty(0)
