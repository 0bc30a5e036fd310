"""Device code of the coupling family: the kernels that triton_kernel.py launches."""

import triton
import triton.language as tl

from gmkernels.ops.coupling import reference
from gmkernels.triton_common import load_tile, log1p_unit, tanh

_ADDITIVE = tl.constexpr(reference.SCALES.index("additive"))
_EXP = tl.constexpr(reference.SCALES.index("exp"))
_TANH = tl.constexpr(reference.SCALES.index("tanh"))


@triton.jit
def scaling(u, clamp, inverse_clamp, SCALE: tl.constexpr, INVERSE: tl.constexpr):
    """log s, s (1 / s of the inverse) and d log s / du."""
    if SCALE == _ADDITIVE:
        zero = tl.zeros(u.shape, tl.float32)
        return zero, zero + 1.0, zero
    elif SCALE == _EXP:
        return u, tl.exp(-u if INVERSE else u), tl.full(u.shape, 1.0, tl.float32)
    elif SCALE == _TANH:
        t = tanh(u * inverse_clamp)
        log_s = t * clamp
        return log_s, tl.exp(-log_s if INVERSE else log_s), tl.fma(-t, t, 1.0)
    else:
        v = u + 2.0
        below = v < 0.0
        e = tl.exp(tl.where(below, v, -v))  # exp(-|v|)
        log_s = tl.where(below, v, 0.0) - log1p_unit(e)
        r = 1.0 / (e + 1.0)
        slope = tl.where(below, r, e * r)
        if INVERSE:
            return log_s, tl.where(below, 1.0 / e, e) + 1.0, slope
        else:
            return log_s, tl.where(below, e * r, r), slope


@triton.jit
def look_up(table_ptr, slot, mask, units, inner):
    """The positions in a row of slots; inside it whatever the table holds."""
    unit = slot // inner
    at = tl.load(table_ptr + unit, mask=mask, other=0)
    at = tl.minimum(tl.maximum(at, 0), units - 1)
    return slot + (at - unit) * inner


@triton.jit
def mapped_positions(table_ptr, k, mask, begin, units, inner, TABLE: tl.constexpr):
    """Where elements k of the transformed part stand in a row."""
    if TABLE:
        return look_up(table_ptr, k, mask, units, inner)
    else:
        return begin + k


@triton.jit
def passed_positions(table_ptr, k, mask, part, begin, units, inner, TABLE: tl.constexpr):
    """Where elements k of the part that passes stand in a row."""
    if TABLE:
        return look_up(table_ptr, part + k, mask, units, inner)
    else:
        return k + tl.where(k < begin, 0, part)


@triton.jit
def forward_kernel(
    x_ptr,  # [B, D], rows at x_stride
    shift_ptr,  # [B, part], rows at shift_stride
    raw_ptr,  # [B, part] from raw_begin of each row, rows at raw_stride; not read if additive
    order_ptr,  # int32 [2, units]: units of x, of y, by slot; read if TABLE
    y_ptr,  # [B, D] contiguous
    log_det_ptr,  # float32 [B, chunks]: what each chunk of a row adds
    rows,
    columns,
    part,  # elements of a row that are transformed
    begin,  # where they start, unless TABLE
    units,
    inner,  # adjacent elements a unit
    x_stride,
    shift_stride,
    raw_stride,
    raw_begin,
    clamp,
    inverse_clamp,
    SCALE: tl.constexpr,
    INVERSE: tl.constexpr,
    TABLE: tl.constexpr,
    CHUNK: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program a chunk of R rows: C columns at a time, half of them transformed.
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    chunk = tl.program_id(1)
    rest = columns - part
    from_ptr = order_ptr + (units if INVERSE else 0)
    to_ptr = order_ptr + (0 if INVERSE else units)
    end = tl.minimum((chunk + 1) * (CHUNK // 2), tl.maximum(part, rest))
    total = tl.zeros((R, C // 2), tl.float32)
    for start in range(chunk * (CHUNK // 2), end, C // 2):
        k = start + tl.arange(0, C // 2)[None, :]
        mapped_from = mapped_positions(from_ptr, k, k < part, begin, units, inner, TABLE)
        mapped_to = mapped_positions(to_ptr, k, k < part, begin, units, inner, TABLE)
        passed_from = passed_positions(from_ptr, k, k < rest, part, begin, units, inner, TABLE)
        passed_to = passed_positions(to_ptr, k, k < rest, part, begin, units, inner, TABLE)
        passes = (row < rows) & (k < rest)
        passed = tl.load(x_ptr + row * x_stride + passed_from, mask=passes, other=0.0)
        mask = (row < rows) & (k < part)
        x = load_tile(x_ptr, row, mapped_from, x_stride, mask, True)
        shift = load_tile(shift_ptr, row, k, shift_stride, mask, True)
        u = load_tile(raw_ptr, row, raw_begin + k, raw_stride, mask, SCALE != _ADDITIVE)
        log_s, s, _ = scaling(u, clamp, inverse_clamp, SCALE, INVERSE)
        total += tl.where(mask, log_s, 0.0)
        y = (x - shift) * s if INVERSE else tl.fma(x, s, shift)
        out = y_ptr + row * columns
        tl.store(out + passed_to, passed, mask=passes)
        tl.store(out + mapped_to, y.to(y_ptr.dtype.element_ty), mask=mask)
    # In double: the terms of either sign cancel to a sum smaller than its partial sums.
    log_det = tl.sum(total.to(tl.float64), axis=1, keep_dims=True).to(tl.float32)
    out = log_det_ptr + row * tl.num_programs(1) + chunk
    tl.store(out, -log_det if INVERSE else log_det, mask=row < rows)


@triton.jit
def backward_kernel(
    dy_ptr,  # [B, D], rows at dy_stride, read if DY
    dlog_det_ptr,  # [B] at dlog_det_stride, read if DLOG_DET
    x_ptr,  # [B, D]
    shift_ptr,  # [B, part], read if INVERSE
    raw_ptr,  # [B, part] from raw_begin of each row; not read if additive
    order_ptr,  # int32 [2, units]: units of x, of y, by slot; read if TABLE
    dx_ptr,  # gradients, each written if its bit of NEEDS is set: [B, D] contiguous
    dshift_ptr,  # [B, part], rows at gradient_stride
    draw_ptr,  # [B, part] from raw_begin of each row, rows at gradient_stride
    rows,
    columns,
    part,
    begin,
    units,
    inner,
    dy_stride,
    dlog_det_stride,
    x_stride,
    shift_stride,
    raw_stride,
    raw_begin,
    gradient_stride,
    clamp,
    inverse_clamp,
    SCALE: tl.constexpr,
    INVERSE: tl.constexpr,
    TABLE: tl.constexpr,
    DY: tl.constexpr,
    DLOG_DET: tl.constexpr,
    NEEDS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program a tile [R, C], half of its columns transformed.
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    rest = columns - part
    k = tl.program_id(1) * (C // 2) + tl.arange(0, C // 2)[None, :]
    from_ptr = order_ptr + (units if INVERSE else 0)
    to_ptr = order_ptr + (0 if INVERSE else units)
    mapped_from = mapped_positions(from_ptr, k, k < part, begin, units, inner, TABLE)
    mapped_to = mapped_positions(to_ptr, k, k < part, begin, units, inner, TABLE)
    passed_from = passed_positions(from_ptr, k, k < rest, part, begin, units, inner, TABLE)
    passed_to = passed_positions(to_ptr, k, k < rest, part, begin, units, inner, TABLE)
    mask = (row < rows) & (k < part)
    g = load_tile(dy_ptr, row, mapped_to, dy_stride, mask, DY)
    u = load_tile(raw_ptr, row, raw_begin + k, raw_stride, mask, SCALE != _ADDITIVE)
    _, s, slope = scaling(u, clamp, inverse_clamp, SCALE, INVERSE)
    dx = g * s
    if NEEDS & 1:
        passes = (row < rows) & (k < rest)
        out = dx_ptr + row * columns
        if DY:
            passed = tl.load(dy_ptr + row * dy_stride + passed_to, mask=passes, other=0.0)
        else:
            passed = tl.zeros(passes.shape, tl.float32)
        tl.store(out + passed_from, passed.to(dx_ptr.dtype.element_ty), mask=passes)
        tl.store(out + mapped_from, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if NEEDS & 2:
        dshift = -dx if INVERSE else g
        out = dshift_ptr + row * gradient_stride + k
        tl.store(out, dshift.to(dshift_ptr.dtype.element_ty), mask=mask)
    if NEEDS & 4:
        x = load_tile(x_ptr, row, mapped_from, x_stride, mask, True)
        l = load_tile(dlog_det_ptr, row * dlog_det_stride, k * 0, 1, mask, DLOG_DET)
        if INVERSE:
            shift = load_tile(shift_ptr, row, k, shift_stride, mask, True)
            draw = -(slope * tl.fma(g, (x - shift) * s, l))
        else:
            draw = slope * tl.fma(dx, x, l)
        out = draw_ptr + row * gradient_stride + raw_begin + k
        tl.store(out, draw.to(draw_ptr.dtype.element_ty), mask=mask)
