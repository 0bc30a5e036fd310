"""Device code of the diffusion_step family: the kernels that triton_kernel.py launches."""

import triton
import triton.language as tl

from gmkernels.triton_common import clamp, load_folded_key, load_tile, normals

NO_NOISE, GIVEN, DRAWN = 0, 1, 2  # values of NOISE: none, read from eps, made from the key
NOT_CLAMPED, FIXED, DYNAMIC = 0, 1, 2  # values of CLAMP: h is infinite, clip, or one a row
_GIVEN, _DRAWN, _DYNAMIC = tl.constexpr(GIVEN), tl.constexpr(DRAWN), tl.constexpr(DYNAMIC)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def load_step(table_ptr, index, table_rows, table_stride):
    """The columns of the table for each row [R, 1], NaN where index is outside [0, table_rows)."""
    inside = (index >= 0) & (index < table_rows)
    at = table_ptr + index * table_stride
    A = tl.load(at, mask=inside, other=float("nan"))
    B = tl.load(at + 1, mask=inside, other=float("nan"))
    e = tl.load(at + 2, mask=inside, other=float("nan"))
    f = tl.load(at + 3, mask=inside, other=float("nan"))
    k = tl.load(at + 4, mask=inside, other=float("nan"))
    m = tl.load(at + 5, mask=inside, other=float("nan"))
    s = tl.load(at + 6, mask=inside, other=float("nan"))
    x_direct = tl.load(at + 7, mask=inside, other=float("nan"))
    p_direct = tl.load(at + 8, mask=inside, other=float("nan"))
    low = tl.load(at + 9, mask=inside, other=float("nan"))
    high = tl.load(at + 10, mask=inside, other=float("nan"))
    return A, B, e, f, k, m, s, x_direct, p_direct, low, high


@triton.jit
def load_bound(threshold_ptr, row, rows, clip, CLAMP: tl.constexpr):
    """h of each row, and what the clamped x0 is multiplied by."""
    if CLAMP == _DYNAMIC:
        h = tl.load(threshold_ptr + row, mask=row < rows, other=1.0)
        return h, 1.0 / h
    else:
        return clip, 1.0


@triton.jit
def load_prediction(
    predicted_ptr,
    unconditional_ptr,
    row,
    d,
    predicted_stride,
    unconditional_stride,
    mask,
    guidance,
    GUIDED: tl.constexpr,
):
    """p [R, C]; with guidance rounded after each operation, as x0_of()."""
    p = load_tile(predicted_ptr, row, d, predicted_stride, mask, True)
    if GUIDED:
        u = load_tile(unconditional_ptr, row, d, unconditional_stride, mask, True)
        p = u + guidance * (p - u)
    return p


@triton.jit
def x0_of(x, p, A, B):
    """A x + B p, not fused: bit for bit what the quantile was taken of."""
    return A * x + B * p


@triton.jit
def magnitudes(
    x_ptr,
    predicted_ptr,
    unconditional_ptr,
    row,
    start,
    columns,
    strides,
    A,
    B,
    guidance,
    GUIDED: tl.constexpr,
    C: tl.constexpr,
):
    """Bits of |x0| of a tile of the row [1, C]: ordered as the numbers are, NaN last, 0 past it."""
    d = start + tl.arange(0, C)[None, :]
    mask = d < columns
    x = load_tile(x_ptr, row, d, strides[0], mask, True)
    p = load_prediction(
        predicted_ptr, unconditional_ptr, row, d, strides[1], strides[2], mask, guidance, GUIDED
    )
    return x0_of(x, p, A, B).to(tl.uint32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def find_threshold(
    x_ptr,
    predicted_ptr,
    unconditional_ptr,
    row,
    columns,
    strides,
    A,
    B,
    guidance,
    clip,
    most,
    weight,
    GUIDED: tl.constexpr,
    C: tl.constexpr,
):
    """h of a row: weight of the way from the most-th largest |x0| to the next larger, in [1, clip].

    The former is the largest number that `most` elements reach: two bits of it a pass over the row,
    from the highest, by counting. x0 is made again in each pass, from the caches.
    """
    ptrs = (x_ptr, predicted_ptr, unconditional_ptr)
    below = tl.full((), 0, tl.uint32)
    unit = tl.full((), 1 << 30, tl.uint32)
    for _ in range(16):
        t1, t2, t3 = below + unit, below + unit * 2, below + unit * 3
        n1 = tl.zeros((1, C), tl.int32)
        n2 = tl.zeros((1, C), tl.int32)
        n3 = tl.zeros((1, C), tl.int32)
        for start in range(0, columns, C):
            size = magnitudes(*ptrs, row, start, columns, strides, A, B, guidance, GUIDED, C)
            n1 += (size >= t1).to(tl.int32)
            n2 += (size >= t2).to(tl.int32)
            n3 += (size >= t3).to(tl.int32)
        below = tl.where(tl.sum(n1) >= most, t1, below)
        below = tl.where(tl.sum(n2) >= most, t2, below)
        below = tl.where(tl.sum(n3) >= most, t3, below)
        unit = unit >> 2
    larger = tl.zeros((1, C), tl.int32)
    above = tl.full((1, C), 0xFFFFFFFF, tl.uint32)  # the least that is larger
    largest = tl.zeros((1, C), tl.uint32)
    for start in range(0, columns, C):
        size = magnitudes(*ptrs, row, start, columns, strides, A, B, guidance, GUIDED, C)
        larger += (size > below).to(tl.int32)
        above = tl.where((size > below) & (size < above), size, above)
        largest = tl.where(size > largest, size, largest)
    # Equal to the next larger where there are several of it, or where it is the largest of all.
    next_bits = tl.where((tl.sum(larger) == most - 1) & (most > 1), tl.min(above), below)
    low = tl.minimum(below.to(tl.float32, bitcast=True), _LARGEST)
    high = tl.minimum(next_bits.to(tl.float32, bitcast=True), _LARGEST)
    gap = high - low
    quantile = tl.where(weight < 0.5, low + weight * gap, high - gap * (1.0 - weight))
    h = clamp(quantile, 1.0, clip)
    return tl.where(tl.max(largest) > _INFINITY_BITS, float("nan"), h)


@triton.jit
def mix(a, x, b, y, X: tl.constexpr, Y: tl.constexpr):
    """a x + b y of the terms that are there: a may be infinite where x is absent."""
    if X and Y:
        return tl.fma(b, y, a * x)
    elif X:
        return a * x
    else:
        return b * y


@triton.jit
def scale_of(s, variance, low, high, VARIANCE: tl.constexpr):
    """What the noise is multiplied by."""
    if VARIANCE:
        return s * tl.exp(low + (variance + 1.0) * (0.5 * (high - low)))
    else:
        return s


@triton.jit
def step_kernel(
    x_ptr,  # [B, D]
    predicted_ptr,  # [B, D]
    unconditional_ptr,  # [B, D], read if GUIDED
    previous_ptr,  # [B, D], read if PREVIOUS
    variance_ptr,  # [B, D], read if VARIANCE
    eps_ptr,  # [B, D], read if NOISE is given
    key_ptr,  # int64 [2], read if NOISE is drawn
    table_ptr,  # float32 [table_rows, 11]: A B e f k m s x_direct p_direct low high
    index_ptr,  # int64 [B]
    threshold_ptr,  # float32 [B] contiguous, written if CLAMP is dynamic
    x_next_ptr,  # [B, D] contiguous
    denoised_ptr,  # [B, D] contiguous, written if DENOISED
    rows,
    columns,
    table_rows,
    trips,
    x_stride,
    predicted_stride,
    unconditional_stride,
    previous_stride,
    variance_stride,
    eps_stride,
    table_stride,
    index_stride,
    guidance,
    clip,
    most,  # which of the largest |x0| of a row the threshold is, and its share of the next
    weight,
    GUIDED: tl.constexpr,
    PREVIOUS: tl.constexpr,
    VARIANCE: tl.constexpr,
    NOISE: tl.constexpr,
    CLAMP: tl.constexpr,
    DENOISED: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program `trips` tiles [R, C] along the columns; a whole row, R = 1, if CLAMP is dynamic.
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    index = tl.load(index_ptr + row * index_stride, mask=row < rows, other=-1)
    step = load_step(table_ptr, index, table_rows, table_stride)
    A, B, e, f, k, m, s, x_direct, p_direct, low, high = step
    strides = (x_stride, predicted_stride, unconditional_stride)
    h, by_h = clip, 1.0
    if CLAMP == _DYNAMIC:
        ptrs = (x_ptr, predicted_ptr, unconditional_ptr)
        limits = (clip, most, weight)
        h = find_threshold(*ptrs, row, columns, strides, A, B, guidance, *limits, GUIDED, C)
        tl.store(threshold_ptr + row, h)
        by_h = 1.0 / h
    if NOISE == _DRAWN:
        key = load_folded_key(key_ptr, index)
    start = tl.program_id(1) * C * trips
    for _ in range(trips):
        d = start + tl.arange(0, C)[None, :]
        mask = (row < rows) & (d < columns)
        out = row * columns + d
        x = load_tile(x_ptr, row, d, x_stride, mask, True)
        p = load_prediction(
            predicted_ptr, unconditional_ptr, row, d, strides[1], strides[2], mask, guidance, GUIDED
        )
        if CLAMP:
            x0 = clamp(x0_of(x, p, A, B), -h, h) * by_h
            y = tl.fma(k, p, tl.fma(f, x0, e * x))
        else:
            x0 = x0_of(x, p, A, B)
            y = tl.fma(p_direct, p, x_direct * x)
        if PREVIOUS:
            y = tl.fma(m, load_tile(previous_ptr, row, d, previous_stride, mask, True), y)
        if NOISE:
            variance = load_tile(variance_ptr, row, d, variance_stride, mask, VARIANCE)
            if NOISE == _DRAWN:
                eps = normals(key, row, start, 0, R, C)
            else:
                eps = load_tile(eps_ptr, row, d, eps_stride, mask, True)
            y = tl.fma(scale_of(s, variance, low, high, VARIANCE), eps, y)
        tl.store(x_next_ptr + out, y.to(x_next_ptr.dtype.element_ty), mask=mask)
        if DENOISED:
            tl.store(denoised_ptr + out, x0.to(denoised_ptr.dtype.element_ty), mask=mask)
        start += C


@triton.jit
def step_backward_kernel(
    dx_next_ptr,  # [B, D], read if DX_NEXT
    ddenoised_ptr,  # [B, D], read if DDENOISED
    x_ptr,  # [B, D], read if CLAMP, as the next two
    predicted_ptr,  # [B, D]
    unconditional_ptr,  # [B, D], read if GUIDED
    variance_ptr,  # [B, D], read if VARIANCE
    eps_ptr,  # [B, D], read if NOISE is given
    key_ptr,  # int64 [2], read if NOISE is drawn
    table_ptr,  # float32 [table_rows, 11]: A B e f k m s x_direct p_direct low high
    index_ptr,  # int64 [B]
    threshold_ptr,  # float32 [B] contiguous, read if CLAMP is dynamic
    dx_ptr,  # gradients [B, D] contiguous, each written if its bit of NEEDS is set
    dpredicted_ptr,
    dunconditional_ptr,
    dprevious_ptr,
    dvariance_ptr,
    deps_ptr,
    rows,
    columns,
    table_rows,
    trips,
    dx_next_stride,
    ddenoised_stride,
    x_stride,
    predicted_stride,
    unconditional_stride,
    variance_stride,
    eps_stride,
    table_stride,
    index_stride,
    guidance,
    clip,
    DX_NEXT: tl.constexpr,
    DDENOISED: tl.constexpr,
    GUIDED: tl.constexpr,
    VARIANCE: tl.constexpr,
    NOISE: tl.constexpr,
    CLAMP: tl.constexpr,
    NEEDS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program `trips` tiles [R, C] along the columns.
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    index = tl.load(index_ptr + row * index_stride, mask=row < rows, other=-1)
    step = load_step(table_ptr, index, table_rows, table_stride)
    A, B, e, f, k, m, s, x_direct, p_direct, low, high = step
    h, by_h = load_bound(threshold_ptr, row, rows, clip, CLAMP)
    if NOISE == _DRAWN:
        key = load_folded_key(key_ptr, index)
    start = tl.program_id(1) * C * trips
    for _ in range(trips):
        d = start + tl.arange(0, C)[None, :]
        mask = (row < rows) & (d < columns)
        out = row * columns + d
        dx_next = load_tile(dx_next_ptr, row, d, dx_next_stride, mask, DX_NEXT)
        dx0 = load_tile(ddenoised_ptr, row, d, ddenoised_stride, mask, DDENOISED)
        v = load_tile(variance_ptr, row, d, variance_stride, mask, VARIANCE)
        if NOISE == _DRAWN:
            n = normals(key, row, start, 0, R, C)
        else:
            n = load_tile(eps_ptr, row, d, eps_stride, mask, NOISE == _GIVEN)
        if CLAMP:
            x = load_tile(x_ptr, row, d, x_stride, mask, True)
            strides = (predicted_stride, unconditional_stride)
            p = load_prediction(
                predicted_ptr, unconditional_ptr, row, d, *strides, mask, guidance, GUIDED
            )
            x0 = x0_of(x, p, A, B)
            dx0 = mix(f, dx_next, 1.0, dx0, DX_NEXT, DDENOISED)
            dx0 = tl.where((x0 < -h) | (x0 > h), 0.0, dx0) * by_h
            dx = mix(e, dx_next, A, dx0, DX_NEXT, True)
            dp = mix(k, dx_next, B, dx0, DX_NEXT, True)
        else:
            dx = mix(x_direct, dx_next, A, dx0, DX_NEXT, DDENOISED)
            dp = mix(p_direct, dx_next, B, dx0, DX_NEXT, DDENOISED)
        dn = scale_of(s, v, low, high, VARIANCE) * dx_next
        if NEEDS & 1:
            tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEEDS & 2:
            dc = guidance * dp if GUIDED else dp
            tl.store(dpredicted_ptr + out, dc.to(dpredicted_ptr.dtype.element_ty), mask=mask)
        if NEEDS & 4:
            du = ((1.0 - guidance) * dp).to(dunconditional_ptr.dtype.element_ty)
            tl.store(dunconditional_ptr + out, du, mask=mask)
        if NEEDS & 8:
            dprevious = (m * dx_next).to(dprevious_ptr.dtype.element_ty)
            tl.store(dprevious_ptr + out, dprevious, mask=mask)
        if NEEDS & 16:
            dv = (dn * n * (0.5 * (high - low))).to(dvariance_ptr.dtype.element_ty)
            tl.store(dvariance_ptr + out, dv, mask=mask)
        if NEEDS & 32:
            tl.store(deps_ptr + out, dn.to(deps_ptr.dtype.element_ty), mask=mask)
        start += C
