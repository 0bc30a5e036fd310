"""Monotonic rational-quadratic splines with linear tails, forward and inverse, with log-det.

Formula, for one element x and its K bins on [-B, B]; from the unnormalised widths a, heights b (K
each) and inner derivatives v (K - 1):
    w_k = 2 B (mw + (1 - K mw) softmax(a)_k),  X_k = -B + sum_{j<k} w_j;  h_k, Y_k from b and mh
    d_0 = d_K = 1,  d_k = md + softplus(v_k)      k is the bin of x: X_k <= x < X_{k+1}
    s = h_k / w_k,  z = (x - X_k) / w_k,  t = z (1 - z)
    N = s z^2 + d_k t,  D = s + (d_k + d_{k+1} - 2 s) t,  E = d_{k+1} z^2 + 2 s t + d_k (1 - z)^2
    y = Y_k + h_k N / D,   log dy/dx = log(s^2 E / D^2),   y = x and 0 outside [-B, B]
    inverse, r = (y - Y_k) / h_k in [0, 1], m = d_k + d_{k+1} - 2 s:
    q = d_k - r m,  p = s - q,  p z^2 + q z = s r,  R = sqrt(q^2 + 4 s r p)
    z = 2 s r / (q + R) where q >= 0, (R - q) / (2 p) where q < 0
    from the other corner, z' = 1 - z and r' = 1 - r obey the same with d_k and d_{k+1} swapped
Source: Durkan et al., "Neural Spline Flows", 2019, eq. 4 to 8 and 29 (arXiv:1906.04032); a
parameter row (a, b, v), and the constants mw, mh, md, as in nflows.

Gradients, with g = d y and l = d log_det; every quantity above is a function of (z, s, d_k,
d_{k+1}), R = N / D, c = 1 - 2 z:
    y:        d/dz  h s E / D^2       d/ds  h (z^2 - R (1 - 2 t)) / D
              d/dd_k  h t (1 - R) / D        d/dd_{k+1}  -h R t / D       d/dh R      d/dY 1
    log det:  d/dz  2 (d_{k+1} z + s c - d_k (1 - z)) / E - 2 m c / D
              d/ds  2 / s + 2 t / E - 2 (1 - 2 t) / D
              d/dd_k  (1 - z)^2 / E - 2 t / D         d/dd_{k+1}  z^2 / E - 2 t / D
    with G_z, G_s, ... the sums of g and l times these:
    dx = G_z / w,  dX_k = -dx,  dw_k = -z dx - s G_s / w,  dY_k = g,  dh_k = g R + G_s / w
    da_j = pi_j (c_j - sum_i pi_i c_i), pi = softmax(a), c_j = 2 B (1 - K mw) (dX_k [j < k] + dw_k
    [j = k]); db likewise; dv_k = dd_k sigmoid(v_k).
    The inverse x(y): with f = exp(log dy/dx), dy = (g - l L_x) / f where L_x = d log det / dz / w;
    the parameters get the gradients above under g' = -dy and l' = -l.
Outside [-B, B]: dx = g, parameters 0. Backward saves the inputs; bins, roots and sums are made
again, about the forward's work: what a forward could keep (z, k, log det: 12 bytes) would save a
third of the arithmetic and cost as much traffic as x and y together.

Bytes, float32, n elements: forward reads 4 n (3 K) and writes 4 n; backward reads 4 n (3 K + 1) and
writes 4 n (3 K). Eager PyTorch (nflows) moves about 30 times K n floats: each of softmax, cumsum,
pad, gather and mask goes to memory and back.
Flops: about 40 K + 150 an element forward: 2 K exponentials, two softplus, a logarithm.

Numerics. w_k comes from softmax itself, not from differences of cumulative sums: narrow bins keep
their digits. Knots are measured from the nearer end of the interval. Points are measured from the
nearer corner of their bin where the curve is flat at its ends (m < 0), else from the flatter
corner: what is flat keeps its digits, the discriminant does not cancel, and where the curve is flat
in the middle the map and its inverse share the corner. Of the two forms of the root the one is
taken that does not cancel (nflows and zuko take the first always), the argument of its square root
is guarded at 0, z is clamped to [0, 1]. A round trip then loses little more than the rounding of y
to float32, which dx/dy magnifies for any method. log det is one logarithm of s^2 E / D^2. float32
sums over bins in order; rows in double blocks.

Edge cases: x on a knot belongs to the bin above; x = +-B maps to itself; NaN gives NaN in that row;
infinities map to themselves. A derivative at -inf is md; +inf in a or b gives NaN (softmax).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gmkernels.ops.coupling.reference import from_slots, to_slots
from gmkernels.ops.gaussian.reference import compute_dtype


def knots(raw: Tensor, minimum: float, bound: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sizes [*, K] of the bins, inner knots [*, K - 1] for the search, and all [*, K + 1]."""
    bins = raw.shape[-1]
    rest, share = 1 - bins * minimum, torch.softmax(raw, -1)
    size = 2 * bound * (minimum + rest * share)
    before = F.pad(share.cumsum(-1), (1, 0))
    after = F.pad(share.flip(-1).cumsum(-1).flip(-1), (0, 1))
    count = torch.arange(bins + 1, dtype=raw.dtype, device=raw.device)
    from_left = 2 * bound * (minimum * count + rest * before) - bound
    from_right = bound - 2 * bound * (minimum * (bins - count) + rest * after)
    return size, from_left[..., 1:-1], torch.where(before > after, from_right, from_left)


def pick(values: Tensor, index: Tensor) -> Tensor:
    """values[..., index]."""
    return values.gather(-1, index[..., None])[..., 0]


def element_map(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    bound: float,
    minima: tuple[float, float, float],
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """The mapped x [*] and the log-derivative of that map [*]; parameters [*, K] and [*, K - 1]."""
    inside = (x >= -bound) & (x <= bound)
    at = torch.where(inside, x, 0)
    w, x_inner, x_knots = knots(widths, minima[0], bound)
    h, y_inner, y_knots = knots(heights, minima[1], bound)
    d = F.pad(minima[2] + F.softplus(derivatives), (1, 1), value=1.0)
    k = (at[..., None] >= (y_inner if inverse else x_inner)).sum(-1)
    w, h, d0, d1 = pick(w, k), pick(h, k), pick(d, k), pick(d, k + 1)
    left, low, right, high = (pick(e, i) for i in (k, k + 1) for e in (x_knots, y_knots))
    above, below = (at - low, high - at) if inverse else (at - left, right - at)
    s = h / w
    m = d0 + d1 - 2 * s
    upper = torch.where(m < 0, below < above, d1 < d0)
    near = torch.where(upper, below, above)
    if inverse:
        r, d_near = near / h, torch.where(upper, d1, d0)
        q = d_near - r * m
        square = (q * q + 4 * s * r * (s - q)).clamp(min=0)
        root = torch.sqrt(torch.where(square > 0, square, 1)) * (square > 0)
        falls = q < 0  # then q + root would cancel
        near = torch.where(falls, root - q, 2 * s * r) / torch.where(falls, 2 * (s - q), q + root)
    else:
        near = near / w
    near = near + (near.clamp(0, 1) - near).detach()  # rounding alone leaves [0, 1]
    z, c = torch.where(upper, 1 - near, near), torch.where(upper, near, 1 - near)
    t = z * c
    denominator = s + m * t
    e = d1 * z * z + 2 * s * t + d0 * c * c
    log_det = torch.log(s * s * e / (denominator * denominator))
    if inverse:
        y = torch.where(upper, right - near * w, left + near * w)
    else:
        from_low = low + h * (s * z * z + d0 * t) / denominator
        y = torch.where(upper, high - h * (s * c * c + d1 * t) / denominator, from_low)
    nothing = torch.where(x.isnan(), x, 0)
    log_det = torch.where(inside, -log_det if inverse else log_det, nothing)
    return torch.where(inside, y, x), log_det


def spline_map(
    x: Tensor,
    widths: Tensor,
    heights: Tensor | None,
    derivatives: Tensor | None,
    order: Tensor | None,
    begin: int,
    bins: int,
    bound: float,
    min_width: float,
    min_height: float,
    min_derivative: float,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """The mapped row like x, and log_det [B].

    Without heights and derivatives, widths holds all three, 3 K - 1 an element. order and begin as
    in ops/coupling/reference.py.
    """
    dtype = compute_dtype(x, widths, heights, derivatives)
    row = x.flatten(1)
    if heights is None or derivatives is None:
        widths, heights, derivatives = widths.split([bins, bins, bins - 1], -1)
    n = math.prod(widths.shape[1:-1])
    slots = to_slots(row, order, begin, n, inverse)
    a, b, v = (p.flatten(1, -2).to(dtype) for p in (widths, heights, derivatives))
    minima = (min_width, min_height, min_derivative)
    mapped, log_det = element_map(slots[:, :n].to(dtype), a, b, v, bound, minima, inverse)
    slots = torch.cat([mapped.to(x.dtype), slots[:, n:]], 1)
    return from_slots(slots, order, begin, n, inverse).view(x.shape), log_det.sum(1)
