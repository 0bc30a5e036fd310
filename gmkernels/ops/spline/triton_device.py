"""Device code of the spline family: the kernels that triton_kernel.py launches.

An element is a lane, its parameters are registers. Their K columns are read as one tile [E, K], so
that a warp's loads are adjacent, and split into K vectors [E]: one pass through shared memory.
"""

import triton
import triton.language as tl

from gmkernels.ops.coupling.triton_device import mapped_positions, passed_positions
from gmkernels.ops.spline.triton_math import (
    bin_gradients,
    derivative_gradient,
    log_slope,
    point_of,
    softmax_gradient,
    spline_at,
)
from gmkernels.triton_common import load_tile, sigmoid


@triton.jit
def columns_of(x, E: tl.constexpr, N: tl.constexpr):
    """The N columns [E] of x [E, N], a power of two."""
    if N == 1:
        return (tl.reshape(x, (E,)),)
    else:
        even, odd = tl.split(tl.reshape(x, (E, N // 2, 2)))
        evens = columns_of(even, E, N // 2)
        odds = columns_of(odd, E, N // 2)
        columns = evens[:0]
        for i in tl.static_range(N // 2):
            columns = columns + (evens[i], odds[i])
        return columns


@triton.jit
def from_columns(columns, E: tl.constexpr, N: tl.constexpr):
    """x [E, N] whose columns these are."""
    if N == 1:
        return tl.reshape(columns[0], (E, 1))
    else:
        even = from_columns(columns[0:N:2], E, N // 2)
        odd = from_columns(columns[1:N:2], E, N // 2)
        return tl.reshape(tl.join(even, odd), (E, N))


@triton.jit
def column_offsets(at, mask, COUNT: tl.constexpr, E: tl.constexpr, N: tl.constexpr):
    """Offsets [E, N] of COUNT values from each of at [E] on, and which of them there are."""
    k = tl.arange(0, N)[None, :]
    return tl.reshape(at, (E, 1)) + k, tl.reshape(mask, (E, 1)) & (k < COUNT)


@triton.jit
def load_columns(ptr, at, mask, COUNT: tl.constexpr, E: tl.constexpr, N: tl.constexpr):
    """COUNT adjacent values from each of at [E] on, as N >= COUNT vectors [E] of float32."""
    at, mask = column_offsets(at, mask, COUNT, E, N)
    x = tl.load(ptr + at, mask=mask, other=0.0)
    return columns_of(x.to(tl.float32), E, N)


@triton.jit
def store_columns(ptr, at, columns, mask, COUNT: tl.constexpr, E: tl.constexpr, N: tl.constexpr):
    """The inverse of load_columns()."""
    at, mask = column_offsets(at, mask, COUNT, E, N)
    x = from_columns(columns, E, N).to(ptr.dtype.element_ty)
    tl.store(ptr + at, x, mask=mask)


@triton.jit
def parameter_offsets(row_a, row_b, row_v, slot, JOINT: tl.constexpr, K: tl.constexpr):
    """Where the raw widths, heights and derivatives of slots [E] start, from where rows do."""
    slot = slot.to(tl.int64)
    if JOINT:
        at = row_a + slot * (3 * K - 1)
        return at, at + K, at + 2 * K
    else:
        return row_a + slot * K, row_b + slot * K, row_v + slot * (K - 1)


@triton.jit
def load_parameters(a_ptr, b_ptr, v_ptr, at, mask, K: tl.constexpr, N: tl.constexpr):
    """Raw widths, heights and derivatives of elements [E], from each of at, parameter_offsets()."""
    E: tl.constexpr = mask.shape[0]
    a = load_columns(a_ptr, at[0], mask, K, E, N)
    b = load_columns(b_ptr, at[1], mask, K, E, N)
    return a, b, load_columns(v_ptr, at[2], mask, K - 1, E, N)


@triton.jit
def copy_passed(
    from_ptr,  # rows at from_stride; read if PRESENT, else zeros
    from_stride,
    from_table,
    to_ptr,  # contiguous rows
    to_table,
    start,
    sizes,
    R: tl.constexpr,
    P: tl.constexpr,
    TABLE: tl.constexpr,
    PRESENT: tl.constexpr,
):
    """P of the elements that pass, of R rows."""
    rows, columns, part, begin, units, inner = sizes
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    rest = columns - part
    k = start + tl.arange(0, P)[None, :]
    mask = (row < rows) & (k < rest)
    read = passed_positions(from_table, k, k < rest, part, begin, units, inner, TABLE)
    written = passed_positions(to_table, k, k < rest, part, begin, units, inner, TABLE)
    if PRESENT:
        x = tl.load(from_ptr + row * from_stride + read, mask=mask, other=0.0)
    else:
        x = tl.zeros((R, P), tl.float32)
    tl.store(to_ptr + row * columns + written, x.to(to_ptr.dtype.element_ty), mask=mask)


@triton.jit
def forward_kernel(
    x_ptr,  # [B, D], rows at x_stride
    a_ptr,  # raw widths [B, part, K], rows at a_stride; if JOINT all three, [B, part, 3 K - 1]
    b_ptr,  # raw heights [B, part, K], rows at b_stride; a_ptr if JOINT
    v_ptr,  # raw derivatives [B, part, K - 1], rows at v_stride; a_ptr if JOINT
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
    a_stride,
    b_stride,
    v_stride,
    bound,
    min_width,
    rest_width,  # 1 - K min_width
    min_height,
    rest_height,
    min_derivative,
    raw_end,  # the raw derivative whose value is 1
    K: tl.constexpr,
    N: tl.constexpr,  # K, or the next power of two
    JOINT: tl.constexpr,  # a row of a holds widths, heights and derivatives
    INVERSE: tl.constexpr,
    TABLE: tl.constexpr,
    CHUNK: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
):
    # One program a chunk of R rows, C transformed columns at a time, and its share of what passes.
    numbers = (bound, min_width, rest_width, min_height, rest_height, min_derivative, raw_end)
    sizes = (rows, columns, part, begin, units, inner)
    from_table = order_ptr + (units if INVERSE else 0)
    to_table = order_ptr + (0 if INVERSE else units)
    element = tl.arange(0, R * C)
    row = tl.program_id(0).to(tl.int64) * R + element // C
    limit = tl.where(row < rows, part, 0)  # one word a row: a mask kept over the loop costs more
    chunk = tl.program_id(1)
    total = tl.zeros((R * C,), tl.float32)
    for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, part), C):
        slot = start + element % C
        mask = slot < limit
        read = mapped_positions(from_table, slot, mask, begin, units, inner, TABLE)
        written = mapped_positions(to_table, slot, mask, begin, units, inner, TABLE)
        at = load_tile(x_ptr, row, read, x_stride, mask, True)
        starts = parameter_offsets(row * a_stride, row * b_stride, row * v_stride, slot, JOINT, K)
        raw = load_parameters(a_ptr, b_ptr, v_ptr, starts, mask, K, N)
        inside = (at >= -bound) & (at <= bound)
        held = tl.where(inside, at, 0.0)
        _, _, _, bin = spline_at(held, raw, numbers, INVERSE, K)
        point, y = point_of(held, bin, INVERSE)
        y = tl.where(inside, y, at)
        log_det = tl.where(inside, log_slope(point), tl.where(at != at, at, 0.0))
        total += tl.where(mask, log_det, 0.0)
        tl.store(y_ptr + row * columns + written, y.to(y_ptr.dtype.element_ty), mask=mask)
    # In double: the terms of either sign cancel to a sum smaller than its partial sums.
    log_det = tl.sum(tl.reshape(total, (R, C)).to(tl.float64), axis=1).to(tl.float32)
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    out = log_det_ptr + row * tl.num_programs(1) + chunk
    tl.store(out, -log_det if INVERSE else log_det, mask=row < rows)
    for start in range(chunk * P, columns - part, tl.num_programs(1) * P):
        copy_passed(x_ptr, x_stride, from_table, y_ptr, to_table, start, sizes, R, P, TABLE, True)


@triton.jit
def backward_kernel(
    dy_ptr,  # [B, D], rows at dy_stride, read if DY
    dlog_det_ptr,  # [B] at dlog_det_stride, read if DLOG_DET
    x_ptr,  # [B, D], rows at x_stride
    a_ptr,  # raw parameters, as in the forward
    b_ptr,
    v_ptr,
    order_ptr,  # int32 [2, units]: units of x, of y, by slot; read if TABLE
    dx_ptr,  # gradients, contiguous, each written if its bit of NEEDS is set: [B, D]
    da_ptr,  # as a, b and v
    db_ptr,
    dv_ptr,
    rows,
    columns,
    part,  # elements of a row that are transformed
    begin,  # where they start, unless TABLE
    units,
    inner,  # adjacent elements a unit
    dy_stride,
    dlog_det_stride,
    x_stride,
    a_stride,
    b_stride,
    v_stride,
    bound,
    min_width,
    rest_width,  # 1 - K min_width
    min_height,
    rest_height,
    min_derivative,
    raw_end,  # the raw derivative whose value is 1
    K: tl.constexpr,
    N: tl.constexpr,  # K, or the next power of two
    JOINT: tl.constexpr,  # a row of a holds widths, heights and derivatives
    INVERSE: tl.constexpr,
    TABLE: tl.constexpr,
    DY: tl.constexpr,
    DLOG_DET: tl.constexpr,
    NEEDS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
):
    # One program a tile [R, C] of what is transformed, and one [R, P] of what passes.
    numbers = (bound, min_width, rest_width, min_height, rest_height, min_derivative, raw_end)
    sizes = (rows, columns, part, begin, units, inner)
    from_table = order_ptr + (units if INVERSE else 0)
    to_table = order_ptr + (0 if INVERSE else units)
    element = tl.arange(0, R * C)
    row = tl.program_id(0).to(tl.int64) * R + element // C
    l = load_tile(dlog_det_ptr, row * dlog_det_stride, 0, 1, row < rows, DLOG_DET)
    if tl.program_id(1) * C < part:
        slot = tl.program_id(1) * C + element % C
        mask = (row < rows) & (slot < part)
        read = mapped_positions(from_table, slot, mask, begin, units, inner, TABLE)
        written = mapped_positions(to_table, slot, mask, begin, units, inner, TABLE)
        at = load_tile(x_ptr, row, read, x_stride, mask, True)
        g = load_tile(dy_ptr, row, written, dy_stride, mask, DY)
        starts = parameter_offsets(row * a_stride, row * b_stride, row * v_stride, slot, JOINT, K)
        raw = load_parameters(a_ptr, b_ptr, v_ptr, starts, mask, K, N)
        inside = (at >= -bound) & (at <= bound)
        held = tl.where(inside, at, 0.0)
        found, a, b, bin = spline_at(held, raw, numbers, INVERSE, K)
        point, _ = point_of(held, bin, INVERSE)
        dx, dw, dh, dd0, dd1, dleft, dlow = bin_gradients(point, bin, g, l, INVERSE)
        if NEEDS & 1:
            dx = tl.where(inside, dx, g).to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + row * columns + read, dx, mask=mask)
        starts = parameter_offsets(0, 0, 0, row * part + slot, JOINT, K)
        # NaN stays, what is outside has no gradient.
        nothing = tl.where(at != at, at, 0.0)
        if NEEDS & 2:
            dleft = tl.where(inside, dleft, nothing) * (2.0 * bound * rest_width)
            dw = tl.where(inside, dw, nothing) * (2.0 * bound * rest_width)
            da = softmax_gradient(a, found[0], dleft, dw, K, N)
            store_columns(da_ptr, starts[0], da, mask, K, R * C, N)
        if NEEDS & 4:
            dlow = tl.where(inside, dlow, nothing) * (2.0 * bound * rest_height)
            dh = tl.where(inside, dh, nothing) * (2.0 * bound * rest_height)
            db = softmax_gradient(b, found[0], dlow, dh, K, N)
            store_columns(db_ptr, starts[1], db, mask, K, R * C, N)
        if NEEDS & 8:
            dd0 = tl.where(inside, dd0, nothing) * sigmoid(found[1])
            dd1 = tl.where(inside, dd1, nothing) * sigmoid(found[2])
            dv = derivative_gradient(found[0], dd0, dd1, nothing, K, N)
            store_columns(dv_ptr, starts[2], dv, mask, K - 1, R * C, N)
    if NEEDS & 1:
        start = tl.program_id(1) * P
        copy_passed(dy_ptr, dy_stride, to_table, dx_ptr, from_table, start, sizes, R, P, TABLE, DY)
