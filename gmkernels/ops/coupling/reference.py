"""Affine coupling: part of a row is scaled and shifted, the rest passes; with its log-determinant.

Formula, rows b; x_1 the part that passes, x_2 the n elements transformed, u the raw scale:
    forward     y_1 = x_1,  y_2 = s x_2 + shift         log_det_b =  sum log s
    inverse     x_1 = y_1,  x_2 = (y_2 - shift) / s     log_det_b = -sum log s
    exp         log s = u
    tanh        log s = clamp tanh(u / clamp)           |log s| < clamp, slope 1 at 0
    sigmoid     s = sigmoid(u + 2)                      s = 0.88 at u = 0
    additive    s = 1, no u                             log_det = 0
A permutation p may follow the forward map: y[:, j] takes position p[j]; the inverse undoes it.
Source: Dinh et al., "Density estimation using Real NVP", 2017, eq. 7 and 8 (arXiv:1605.08803);
additive Dinh et al. 2015 (arXiv:1410.8516); sigmoid(u + 2) Kingma and Dhariwal 2018 (Glow's code).

Gradients, with g = d output and l [B] = dlog_det, v = d log s / du (exp 1, tanh 1 - tanh^2(u /
clamp), sigmoid sigmoid(-u - 2)):
    forward     dx_2 = g s      dshift = g        du = v (g x_2 s + l)
    inverse     dy_2 = g / s    dshift = -g / s   du = -v (g x_2 + l),  x_2 made again
    dx_1 = g_1 in both. Rows of g that are absent count as 0.
Backward saves the call's input, shift and raw scale; the outputs are not needed, and s is made
again: nothing is stored that was not there. A deep flow can save even these: the inverse makes the
input of a layer again from its output (Flow(reconstruct=True) in gmkernels.models.flow).

Bytes, float32, N = B D, half of it transformed: forward reads 8 N and writes 4 N; backward reads 8
N (10 N for the inverse, which needs shift) and writes 8 N. Eager PyTorch moves 38 N forward: each
of tanh, exp, product, sum and concatenation goes to memory and back.
Flops: about 40 a transformed element for tanh, 25 for exp and sigmoid.

Numerics. log s is summed in float32 over four vectors, in double between them. tanh is a polynomial
below 0.6 and 1 - 2 e / (1 + e), e = exp(-2 |v|), above: that form alone errs by 1e-7 absolutely,
which shows in sums that cancel (9e-7 against eager's 2e-7 on 70 terms). With AVX-512 it is m / (2 -
m), m = -expm1(-2 |v|), which is faster there and errs by 0.9 ulp on average, not 0.5. log
sigmoid(v) is min(v, 0) - log1p(exp(-|v|)). 1 / s of the inverse has a form of its own.

Edge cases: no rows give empty results. exp overflows for u > 88 in float32: s is inf, its inverse
0. NaN in a row of x, shift or u gives NaN in that row alone; what passes keeps its bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gmkernels.ops.gaussian.reference import compute_dtype

SCALES = ("additive", "exp", "tanh", "sigmoid")


def log_scale(u: Tensor, scale: str, clamp: float) -> Tensor:
    """log s of the raw scale u."""
    if scale == "tanh":
        return clamp * torch.tanh(u / clamp)
    return F.logsigmoid(u + 2) if scale == "sigmoid" else u


def to_slots(row: Tensor, order: Tensor | None, begin: int, n: int, inverse: bool) -> Tensor:
    """A row [B, columns], its n transformed elements first (see gmkernels.split)."""
    if order is None:
        return torch.cat([row[:, begin : begin + n], row[:, :begin], row[:, begin + n :]], 1)
    source = order[1 if inverse else 0]
    return row.unflatten(1, (len(source), -1)).index_select(1, source).flatten(1)


def from_slots(slots: Tensor, order: Tensor | None, begin: int, n: int, inverse: bool) -> Tensor:
    """The row [B, columns] of the result, whose transformed elements come first in slots."""
    if order is None:
        return torch.cat([slots[:, n : n + begin], slots[:, :n], slots[:, n + begin :]], 1)
    target = order[0 if inverse else 1]
    return slots.unflatten(1, (len(target), -1)).index_select(1, target.argsort()).flatten(1)


def affine_coupling(
    x: Tensor,
    shift: Tensor,
    raw_scale: Tensor | None,
    order: Tensor | None,
    begin: int,
    scale: int,
    clamp: float,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """The mapped row like x, and log_det [B].

    Without raw_scale, shift holds both, one after the other, unless the map is additive. order [2,
    units] lists the positions of slots in x and y (see gmkernels.split); None: the transformed part
    is the run of columns that starts at `begin`.
    """
    dtype = compute_dtype(x, shift, raw_scale)
    row, shift = x.flatten(1), shift.flatten(1).to(dtype)
    kind = SCALES[scale]
    if raw_scale is None and kind != "additive":
        shift, raw_scale = shift.chunk(2, 1)
    n = shift.shape[1]
    slots = to_slots(row, order, begin, n, inverse)
    x2 = slots[:, :n].to(dtype)
    log_s = torch.zeros_like(x2)
    if raw_scale is not None:
        log_s = log_scale(raw_scale.flatten(1).to(dtype), kind, clamp)
    y2 = (x2 - shift) * torch.exp(-log_s) if inverse else x2 * torch.exp(log_s) + shift
    slots = torch.cat([y2.to(x.dtype), slots[:, n:]], 1)
    y = from_slots(slots, order, begin, n, inverse)
    log_det = log_s.sum(1)
    return y.view(x.shape), -log_det if inverse else log_det
