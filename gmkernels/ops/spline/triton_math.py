"""Device mathematics of the spline family, on vectors [E]; the names are those of reference.py."""

import triton
import triton.language as tl

from gmkernels.triton_common import log1p_unit, sqrt_ieee


@triton.jit
def exponentials(raw, K: tl.constexpr):
    """exp(raw - max) of K vectors, and their sum."""
    top = raw[0]
    for k in tl.static_range(1, K):
        top = tl.maximum(top, raw[k])
    sum = tl.zeros(top.shape, tl.float32)
    found = raw[:0]
    for k in tl.static_range(K):
        e = tl.exp(raw[k] - top)
        sum += e
        found = found + (e,)
    return found, sum


@triton.jit
def softplus(v):
    """log(1 + exp(v))"""
    return tl.where(v < 0.0, 0.0, v) + log1p_unit(tl.exp(-tl.abs(v)))


@triton.jit
def find_bin(at, e, over, minimum, rest, bound, K: tl.constexpr):
    """The bin that holds `at`, on an axis of K exponentials: its number (float32), and at_bin()."""
    number = tl.zeros(at.shape, tl.float32)
    edge = number - bound
    sum, before, own = number, number, e[0]
    # Edges for the search alone: the bin's own are computed more carefully by knot_of().
    for k in tl.static_range(1, K):
        sum += e[k - 1]
        edge += 2.0 * bound * minimum
        above = at >= tl.fma(2.0 * bound * rest * over, sum, edge)
        number = tl.where(above, 1.0 * k, number)
        before = tl.where(above, sum, before)
        own = tl.where(above, e[k], own)
    return number, before, own


@triton.jit
def at_bin(e, number, K: tl.constexpr):
    """The sum of the exponentials before a bin, and its own."""
    sum = tl.zeros(number.shape, tl.float32)
    before, own = sum, e[0]
    for k in tl.static_range(1, K):
        sum += e[k - 1]
        above = number > k - 1
        before = tl.where(above, sum, before)
        own = tl.where(above, e[k], own)
    return before, own


@triton.jit
def slopes_at(v, number, raw_end, K: tl.constexpr):
    """The raw slopes at the ends of a bin, of the K - 1 inner ones."""
    raw_end += tl.zeros(number.shape, tl.float32)
    d0, d1 = raw_end, v[0]
    for k in tl.static_range(1, K):
        above = number > k - 1
        d0 = tl.where(above, v[k - 1], d0)
        d1 = tl.where(above, v[k] if k < K - 1 else raw_end, d1)
    return d0, d1


@triton.jit
def share_of(x, sum, over):
    """x / sum, rounded as a quotient, with over = 1 / sum at hand."""
    share = x * over
    return tl.fma(tl.fma(-share, sum, x), over, share)


@triton.jit
def knot_of(number, before, sum, over, minimum, rest, bound, K: tl.constexpr):
    """Where bin `number` starts, measured from the nearer end, where less is rounded.

    before, sum, over: the sum of the exponentials of the bins before it, of all, 1 / that of all.
    """
    after = sum - before
    right = before > after
    count = tl.where(right, K - number, number)
    share = share_of(tl.where(right, after, before), sum, over)
    part = tl.fma(share, rest, count * minimum)
    end = tl.where(right, bound, -bound)
    return tl.fma(part, end * -2.0, end)


@triton.jit
def size_and_ends(number, before, own, sum, over, minimum, rest, bound, K: tl.constexpr):
    """A bin's size and where it starts and ends, on one axis; own: its exponential."""
    size = tl.fma(share_of(own, sum, over), rest, minimum) * (2.0 * bound)
    start = knot_of(number, before, sum, over, minimum, rest, bound, K)
    return size, start, knot_of(number + 1.0, before + own, sum, over, minimum, rest, bound, K)


@triton.jit
def spline_at(at, raw, numbers, INVERSE: tl.constexpr, K: tl.constexpr):
    """All that a point in [-bound, bound] fixes, of K raw widths, heights and K - 1 derivatives.

    Returns number and raw slopes d0, d1 of its bin; of each axis the exponentials, 1 / their sum,
    the sum of those before the bin, and its own; and the bin: w, h, its slopes d0, d1, left, right,
    low, high.
    """
    raw_a, raw_b, raw_v = raw
    bound, min_width, rest_width, min_height, rest_height, min_derivative, raw_end = numbers
    if INVERSE:
        b, sum_b = exponentials(raw_b, K)
        over_b = 1.0 / sum_b
        number, before_b, own_b = find_bin(at, b, over_b, min_height, rest_height, bound, K)
        a, sum_a = exponentials(raw_a, K)
        over_a = 1.0 / sum_a
        before_a, own_a = at_bin(a, number, K)
    else:
        a, sum_a = exponentials(raw_a, K)
        over_a = 1.0 / sum_a
        number, before_a, own_a = find_bin(at, a, over_a, min_width, rest_width, bound, K)
        b, sum_b = exponentials(raw_b, K)
        over_b = 1.0 / sum_b
        before_b, own_b = at_bin(b, number, K)
    raw0, raw1 = slopes_at(raw_v, number, raw_end, K)
    d0, d1 = softplus(raw0) + min_derivative, softplus(raw1) + min_derivative
    w, left, right = size_and_ends(
        number, before_a, own_a, sum_a, over_a, min_width, rest_width, bound, K
    )
    h, low, high = size_and_ends(
        number, before_b, own_b, sum_b, over_b, min_height, rest_height, bound, K
    )
    axis_a, axis_b = (a, over_a, before_a, own_a), (b, over_b, before_b, own_b)
    return (number, raw0, raw1), axis_a, axis_b, (w, h, d0, d1, left, right, low, high)


@triton.jit
def point_of(at, bin, INVERSE: tl.constexpr):
    """(z, 1 - z, s, m, t, E, 1 / D, N / D, 1 - N / D, 1 / w) and the image of a point of a bin.

    The curve seen from the upper corner has the same form, with d0 and d1 swapped. A point is
    measured from the nearer corner where the curve is flat at its ends, else from the flatter one.
    """
    w, h, d0, d1, left, right, low, high = bin
    over_w = 1.0 / w
    s = h * over_w
    m = tl.fma(s, -2.0, d0 + d1)
    above = at - (low if INVERSE else left)
    below = (high if INVERSE else right) - at
    flat_ends = m < 0.0
    upper = tl.where(flat_ends, below, d1) < tl.where(flat_ends, above, d0)
    near = tl.where(upper, below, above)
    near = tl.where(near < 0.0, 0.0, near)
    if INVERSE:
        d = tl.where(upper, d1, d0)
        r = near / h
        q = tl.fma(-r, m, d)
        sr = s * r
        rise = tl.fma(r, m, s - d)
        square = tl.fma(sr * 4.0, rise, q * q)
        root = sqrt_ieee(tl.where(square < 0.0, 0.0, square))
        falls = q < 0.0  # then q + root would cancel
        divisor = tl.where(falls, rise + rise, q + root)
        near = tl.where(falls, root - q, sr + sr) / tl.where(divisor < 1e-37, 1e-37, divisor)
    else:
        near = near * over_w
    near = tl.where(near > 1.0, 1.0, near)
    far = 1.0 - near
    z, c = tl.where(upper, far, near), tl.where(upper, near, far)
    t = near * far
    over_d = 1.0 / tl.fma(m, t, s)
    ratio = tl.fma(s * z, z, d0 * t) * over_d
    rest = tl.fma(s * c, c, d1 * t) * over_d
    e = tl.fma(d1 * z, z, tl.fma(s + s, t, d0 * c * c))
    if INVERSE:
        image = tl.where(upper, tl.fma(-near, w, right), tl.fma(near, w, left))
    else:
        image = tl.where(upper, tl.fma(-rest, h, high), tl.fma(ratio, h, low))
    return (z, c, s, m, t, e, over_d, ratio, rest, over_w), image


@triton.jit
def log_slope(point):
    """log dy/dx of the forward map at the point."""
    slope = point[2] * point[6]
    return tl.log(slope * slope * point[5])


@triton.jit
def bin_gradients(point, bin, g, l, INVERSE: tl.constexpr):
    """Gradients of the input, and of the bin's w, h, d0, d1 and lower corner.

    g, l: of the output and of log_det. The parameters of the inverse see g' = -dy, l' = -l.
    """
    z, c, s, m, t, e, over_d, ratio, rest, over_w = point
    _, h, d0, d1, _, _, _, _ = bin
    over_e = 1.0 / e
    hd = h * over_d
    y_z = hd * s * e * over_d
    inner = tl.fma(d1, z, tl.fma(s, c - z, -(d0 * c)))
    l_z = 2.0 * tl.fma(inner, over_e, -(m * (c - z) * over_d))
    if INVERSE:
        l = -l
        dx = tl.fma(l, l_z * over_w, g) / (y_z * over_w)
        g = -dx
    else:
        dx = tl.fma(g, y_z, l * l_z) * over_w
    te, td = t * over_e, t * over_d
    u = tl.fma(t, -2.0, 1.0)
    y_s = hd * tl.fma(z, z, -(ratio * u))
    l_s = 2.0 * (1.0 / s + te - u * over_d)
    g_s = tl.fma(g, y_s, l * l_s)
    g_z = tl.fma(g, y_z, l * l_z)
    dw = -(over_w * tl.fma(z, g_z, s * g_s))
    dh = tl.fma(g, ratio, g_s * over_w)
    dd0 = tl.fma(g, hd * t * rest, l * tl.fma(c * c, over_e, td * -2.0))
    dd1 = tl.fma(g, -(hd * t * ratio), l * tl.fma(z * z, over_e, td * -2.0))
    return dx, dw, dh, dd0, dd1, -(g_z * over_w), g


@triton.jit
def repeat(x, N: tl.constexpr):
    """x, N times."""
    if N == 0:
        return ()
    else:
        return (x,) + repeat(x, N - 1)


@triton.jit
def softmax_gradient(axis, number, dedge, dsize, K: tl.constexpr, N: tl.constexpr):
    """Gradients of K raw sizes, as N vectors, from those of the bin's lower edge and size."""
    e, over, before, own = axis
    mean = tl.fma(dedge, before, dsize * own) * over
    below, here, above = (dedge - mean) * over, (dsize - mean) * over, -mean * over
    draw = repeat(above, N - K)
    for k in tl.static_range(K - 1, -1, -1):
        c = tl.where(number > k, below, tl.where(number > k - 1, here, above))
        draw = (e[k] * c,) + draw
    return draw


@triton.jit
def derivative_gradient(number, dd0, dd1, nothing, K: tl.constexpr, N: tl.constexpr):
    """Gradients of K - 1 raw derivatives, as N vectors, from those of the raw ends of the bin."""
    draw = repeat(nothing, N - K + 1)
    for k in tl.static_range(K - 1, 0, -1):
        draw = (tl.where(number == k, dd0, tl.where(number == k - 1, dd1, nothing)),) + draw
    return draw
