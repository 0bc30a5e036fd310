"""Device code of the elementwise family: the kernels that triton_kernel.py launches."""

import triton
import triton.language as tl

from gmkernels.ops.elementwise import reference
from gmkernels.triton_common import load_key, load_tile, log1p_unit, uniforms

_LEAKY = tl.constexpr(reference.KINDS.index("leaky"))


@triton.jit
def scale_of(log_scale_ptr, channel, mask, INVERSE: tl.constexpr):
    """exp(l) of channels, of the inverse exp(-l)."""
    l = tl.load(log_scale_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    return tl.exp(-l if INVERSE else l)


@triton.jit
def actnorm_kernel(
    x_ptr,  # [B, columns], rows at x_stride
    shift_ptr,  # [C]
    log_scale_ptr,  # [C]
    y_ptr,  # [B, columns] contiguous
    rows,
    columns,
    pixels,  # columns a channel
    x_stride,
    INVERSE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program a tile [R, C].
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    d = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    scale = scale_of(log_scale_ptr, d // pixels, d < columns, INVERSE)
    shift = tl.load(shift_ptr + d // pixels, mask=d < columns, other=0.0).to(tl.float32)
    mask = (row < rows) & (d < columns)
    x = load_tile(x_ptr, row, d, x_stride, mask, True)
    y = x * scale - shift if INVERSE else (x + shift) * scale
    tl.store(y_ptr + row * columns + d, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def actnorm_backward_kernel(
    dy_ptr,  # [B, columns], rows at dy_stride, read if DY
    x_ptr,  # [B, columns], rows at x_stride
    shift_ptr,  # [C]
    log_scale_ptr,  # [C]
    dx_ptr,  # [B, columns] contiguous, written if DX
    sums_ptr,  # float32 [2, groups, columns], written if SUMS: of g, and of g times what is scaled
    rows,
    columns,
    pixels,
    dy_stride,
    x_stride,
    INVERSE: tl.constexpr,
    DY: tl.constexpr,
    DX: tl.constexpr,
    SUMS: tl.constexpr,
    TRIPS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program TRIPS tiles [R, C], one below the other: a group of rows.
    group = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    scale = scale_of(log_scale_ptr, d // pixels, d < columns, INVERSE)
    shift = tl.load(shift_ptr + d // pixels, mask=d < columns, other=0.0).to(tl.float32)
    sum_g = tl.zeros((R, C), tl.float32)
    sum_gx = tl.zeros((R, C), tl.float32)
    for trip in range(TRIPS):
        row = ((group * TRIPS + trip) * R + tl.arange(0, R))[:, None]
        mask = (row < rows) & (d < columns)
        g = load_tile(dy_ptr, row, d, dy_stride, mask, DY)
        if DX:
            out = dx_ptr + row * columns + d
            tl.store(out, (g * scale).to(dx_ptr.dtype.element_ty), mask=mask)
        if SUMS:
            x = load_tile(x_ptr, row, d, x_stride, mask, True)
            sum_g += g
            sum_gx += g * (x if INVERSE else x + shift)
    if SUMS:
        out = sums_ptr + group * columns + d
        tl.store(out, tl.sum(sum_g, axis=0, keep_dims=True), mask=d < columns)
        out += tl.num_programs(0).to(tl.int64) * columns
        tl.store(out, tl.sum(sum_gx, axis=0, keep_dims=True), mask=d < columns)


@triton.jit
def halves(y):
    """exp(-|y|) and 1 / (1 + exp(-|y|)), which p and q = 1 - p are made of."""
    e = tl.exp(-tl.abs(y))
    return e, 1.0 / (e + 1.0)


@triton.jit
def pointwise_kernel(
    x_ptr,  # [B, columns], rows at x_stride
    y_ptr,  # [B, columns] contiguous
    log_det_ptr,  # float32 [B, chunks]: what each chunk of a row adds
    rows,
    columns,
    x_stride,
    parameter,  # slope, of the inverse 1 / slope; or alpha
    m,  # 1 - 2 alpha, of the inverse 1 / (1 - 2 alpha)
    weight,  # log_det is weight times a sum,
    bias,  # plus bias for each element
    KIND: tl.constexpr,
    INVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program a chunk of R rows.
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    chunk = tl.program_id(1)
    end = tl.minimum((chunk + 1) * CHUNK, columns)
    total = tl.zeros((R, C), tl.float32)
    for start in range(chunk * CHUNK, end, C):
        d = start + tl.arange(0, C)[None, :]
        mask = (row < rows) & (d < columns)
        x = load_tile(x_ptr, row, d, x_stride, mask, True)
        if KIND == _LEAKY:
            y = tl.where(x < 0.0, x * parameter, x)
            term = tl.where(x < 0.0, 1.0, 0.0)
        elif INVERSE:
            e, r = halves(x)
            y = (tl.where(x < 0.0, e * r, r) - parameter) * m
            term = log1p_unit(e) * -2.0 - tl.abs(x)
        else:
            log_p = tl.log(tl.fma(x, m, parameter))
            log_q = tl.log(tl.fma(1.0 - x, m, parameter))
            y = log_p - log_q
            term = -(log_p + log_q)
        total += tl.where(mask, term, 0.0)
        tl.store(y_ptr + row * columns + d, y.to(y_ptr.dtype.element_ty), mask=mask)
    log_det = tl.sum(total, axis=1, keep_dims=True) * weight + bias * (end - chunk * CHUNK)
    tl.store(log_det_ptr + row * tl.num_programs(1) + chunk, log_det, mask=row < rows)


@triton.jit
def pointwise_backward_kernel(
    dy_ptr,  # [B, columns], rows at dy_stride, read if DY
    dlog_det_ptr,  # [B] at dlog_det_stride, read if DLOG_DET
    x_ptr,  # [B, columns], rows at x_stride
    dx_ptr,  # [B, columns] contiguous
    rows,
    columns,
    dy_stride,
    dlog_det_stride,
    x_stride,
    parameter,
    m,
    KIND: tl.constexpr,
    INVERSE: tl.constexpr,
    DY: tl.constexpr,
    DLOG_DET: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program a tile [R, C].
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    d = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    mask = (row < rows) & (d < columns)
    x = load_tile(x_ptr, row, d, x_stride, mask, True)
    g = load_tile(dy_ptr, row, d, dy_stride, mask, DY)
    l = load_tile(dlog_det_ptr, row * dlog_det_stride, d * 0, 1, mask, DLOG_DET)
    if KIND == _LEAKY:
        dx = tl.where(x < 0.0, g * parameter, g)
    elif INVERSE:
        e, r = halves(x)
        gap = (1.0 - e) * r  # |p - q|
        dx = tl.fma(g * (e * r * r), m, l * tl.where(x < 0.0, gap, -gap))
    else:
        p = tl.fma(x, m, parameter)
        q = tl.fma(1.0 - x, m, parameter)
        dx = m / (p * q) * tl.fma(l, p - q, g)
    tl.store(dx_ptr + row * columns + d, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def dequantize_kernel(
    levels_ptr,  # [B, columns] contiguous, any integer dtype
    u_ptr,  # float32 [B, columns] contiguous, read if GIVEN
    key_ptr,  # int64 [2], read unless GIVEN
    x_ptr,  # float32 [B, columns] contiguous
    rows,
    columns,
    factor,  # 1 / bins
    low,  # (1 + margin) / bins
    high,  # (1 - margin) / bins
    GIVEN: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program a tile [R, C].
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    column = tl.program_id(1) * C
    d = column + tl.arange(0, C)[None, :]
    mask = (row < rows) & (d < columns)
    at = row * columns + d
    k = tl.load(levels_ptr + at, mask=mask, other=0).to(tl.float32)
    if GIVEN:
        u = tl.load(u_ptr + at, mask=mask, other=0.0)
    else:
        u = 1.0 - uniforms(load_key(key_ptr), row, column, 0, R, C)
    x = (k + u) * factor
    low = k * low
    high = (k + 1.0) * high
    x = tl.where(x < low, low, x)
    x = tl.where(x > high, high, x)
    tl.store(x_ptr + at, x, mask=mask)
