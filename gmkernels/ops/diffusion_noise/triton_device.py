"""Device code of the diffusion_noise family: the kernels that triton_kernel.py launches."""

import triton
import triton.language as tl

from gmkernels.ops.diffusion_noise import reference
from gmkernels.triton_common import load_key, load_tile, normals

_EPSILON = tl.constexpr(reference.EPSILON)
_SAMPLE = tl.constexpr(reference.SAMPLE)
_V = tl.constexpr(reference.V_PREDICTION)
_FLOW = tl.constexpr(reference.FLOW_PREDICTION)
NO_TARGET = -1  # the value of PREDICTION where there is none


@triton.jit
def load_levels(
    table_ptr, t_ptr, row, rows, table_rows, table_stride, t_stride, TIMES: tl.constexpr
):
    """a, s and w of each row [R, 1], NaN where its index is outside [0, table_rows)."""
    if TIMES:
        index = tl.load(t_ptr + row * t_stride, mask=row < rows, other=-1)
    else:
        index = row
    inside = (row < rows) & (index >= 0) & (index < table_rows)
    at = table_ptr + index * table_stride
    a = tl.load(at, mask=inside, other=float("nan"))
    s = tl.load(at + 1, mask=inside, other=float("nan"))
    w = tl.load(at + 2, mask=inside, other=float("nan"))
    return a, s, w


@triton.jit
def mix(a, x, b, y):
    """a x + b y."""
    return tl.fma(b, y, x * a)


@triton.jit
def target_of(x, eps, a, s, PREDICTION: tl.constexpr):
    """p x + q eps; eps alone, or x alone, as it is."""
    if PREDICTION == _EPSILON:
        return eps
    elif PREDICTION == _SAMPLE:
        return x
    elif PREDICTION == _V:
        return mix(-s, x, a, eps)
    else:
        return eps - x


@triton.jit
def times_p(g, s, PREDICTION: tl.constexpr):
    """p g, zeros where p is 0."""
    if PREDICTION == _SAMPLE:
        return g
    elif PREDICTION == _V:
        return g * -s
    elif PREDICTION == _FLOW:
        return -g
    else:
        return tl.zeros(g.shape, tl.float32)


@triton.jit
def times_q(g, a, PREDICTION: tl.constexpr):
    """q g, zeros where q is 0."""
    if PREDICTION == _V:
        return g * a
    elif PREDICTION == _EPSILON or PREDICTION == _FLOW:
        return g
    else:
        return tl.zeros(g.shape, tl.float32)


@triton.jit
def noise_kernel(
    x0_ptr,  # [B, D], rows at x0_stride
    eps_ptr,  # [B, D], read if EPS
    key_ptr,  # int64 [2], read if not EPS
    table_ptr,  # float32 [table_rows, 3]: a, s, w
    t_ptr,  # int64 [B], read if TIMES
    x_t_ptr,  # [B, D] contiguous
    target_ptr,  # [B, D] contiguous, written unless PREDICTION is NO_TARGET
    rows,
    columns,
    table_rows,
    x0_stride,
    eps_stride,
    table_stride,
    t_stride,
    EPS: tl.constexpr,
    TIMES: tl.constexpr,
    PREDICTION: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program a tile [R, C].
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    start = tl.program_id(1) * C
    d = start + tl.arange(0, C)[None, :]
    mask = (row < rows) & (d < columns)
    a, s, _ = load_levels(table_ptr, t_ptr, row, rows, table_rows, table_stride, t_stride, TIMES)
    x = load_tile(x0_ptr, row, d, x0_stride, mask, True)
    if EPS:
        eps = load_tile(eps_ptr, row, d, eps_stride, mask, True)
    else:
        eps = normals(load_key(key_ptr), row, start, 0, R, C)
    out = row * columns + d
    tl.store(x_t_ptr + out, mix(a, x, s, eps).to(x_t_ptr.dtype.element_ty), mask=mask)
    if PREDICTION >= 0:
        target = target_of(x, eps, a, s, PREDICTION)
        tl.store(target_ptr + out, target.to(target_ptr.dtype.element_ty), mask=mask)


@triton.jit
def noise_backward_kernel(
    dx_t_ptr,  # [B, D], read if DX_T
    dtarget_ptr,  # [B, D], read unless PREDICTION is NO_TARGET
    table_ptr,  # float32 [table_rows, 3]: a, s, w
    t_ptr,  # int64 [B], read if TIMES
    dx0_ptr,  # gradients [B, D] contiguous, each written if its bit of NEEDS is set
    deps_ptr,
    rows,
    columns,
    table_rows,
    dx_t_stride,
    dtarget_stride,
    table_stride,
    t_stride,
    DX_T: tl.constexpr,
    TIMES: tl.constexpr,
    PREDICTION: tl.constexpr,
    NEEDS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program a tile [R, C].
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    d = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    mask = (row < rows) & (d < columns)
    a, s, _ = load_levels(table_ptr, t_ptr, row, rows, table_rows, table_stride, t_stride, TIMES)
    dtarget = load_tile(dtarget_ptr, row, d, dtarget_stride, mask, PREDICTION >= 0)
    dx0 = times_p(dtarget, s, PREDICTION)
    deps = times_q(dtarget, a, PREDICTION)
    if DX_T:
        dx_t = load_tile(dx_t_ptr, row, d, dx_t_stride, mask, True)
        dx0 += a * dx_t
        deps += s * dx_t
    out = row * columns + d
    if NEEDS & 1:
        tl.store(dx0_ptr + out, dx0.to(dx0_ptr.dtype.element_ty), mask=mask)
    if NEEDS & 2:
        tl.store(deps_ptr + out, deps.to(deps_ptr.dtype.element_ty), mask=mask)


@triton.jit
def loss_kernel(
    predicted_ptr,  # [B, D]
    x0_ptr,  # [B, D], read unless PREDICTION is epsilon
    eps_ptr,  # [B, D], read if EPS, unless PREDICTION is sample
    key_ptr,  # int64 [2], read if not EPS, unless PREDICTION is sample
    table_ptr,  # float32 [table_rows, 3]: a, s, w
    t_ptr,  # int64 [B], read if TIMES
    residual_ptr,  # [B, D] contiguous, written if KEEP
    loss_ptr,  # float32 [B, chunks]: what each chunk of a row adds to its loss
    rows,
    columns,
    table_rows,
    predicted_stride,
    x0_stride,
    eps_stride,
    table_stride,
    t_stride,
    scale,  # 1 / D
    EPS: tl.constexpr,
    TIMES: tl.constexpr,
    PREDICTION: tl.constexpr,
    KEEP: tl.constexpr,
    CHUNK: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program a chunk of R rows.
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    chunk = tl.program_id(1)
    MAKE: tl.constexpr = not EPS and PREDICTION != _SAMPLE
    a, s, w = load_levels(table_ptr, t_ptr, row, rows, table_rows, table_stride, t_stride, TIMES)
    total = tl.zeros((R, C), tl.float32)
    if MAKE:
        key = load_key(key_ptr)
    for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, columns), C):
        d = start + tl.arange(0, C)[None, :]
        mask = (row < rows) & (d < columns)
        predicted = load_tile(predicted_ptr, row, d, predicted_stride, mask, True)
        x = load_tile(x0_ptr, row, d, x0_stride, mask, PREDICTION != _EPSILON)
        if MAKE:
            eps = normals(key, row, start, 0, R, C)
        else:
            eps = load_tile(eps_ptr, row, d, eps_stride, mask, PREDICTION != _SAMPLE)
        r = predicted - target_of(x, eps, a, s, PREDICTION)
        total += tl.where(mask, r * r, 0.0)
        if KEEP:
            out = residual_ptr + row * columns + d
            tl.store(out, r.to(residual_ptr.dtype.element_ty), mask=mask)
    loss = w * (tl.sum(total, axis=1, keep_dims=True) * scale)
    tl.store(loss_ptr + row * tl.num_programs(1) + chunk, loss, mask=row < rows)


@triton.jit
def loss_backward_kernel(
    dloss_ptr,  # [B] at dloss_stride
    residual_ptr,  # [B, D], rows at residual_stride
    table_ptr,  # float32 [table_rows, 3]: a, s, w
    t_ptr,  # int64 [B], read if TIMES
    dpredicted_ptr,  # gradients [B, D] contiguous, each written if its bit of NEEDS is set
    dx0_ptr,
    deps_ptr,
    rows,
    columns,
    table_rows,
    dloss_stride,
    residual_stride,
    table_stride,
    t_stride,
    scale,  # 2 / D
    TIMES: tl.constexpr,
    PREDICTION: tl.constexpr,
    NEEDS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program a tile [R, C].
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    d = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    mask = (row < rows) & (d < columns)
    a, s, w = load_levels(table_ptr, t_ptr, row, rows, table_rows, table_stride, t_stride, TIMES)
    dloss = tl.load(dloss_ptr + row * dloss_stride, mask=row < rows, other=0.0).to(tl.float32)
    r = load_tile(residual_ptr, row, d, residual_stride, mask, True)
    dpredicted = (w * dloss * scale) * r
    out = row * columns + d
    if NEEDS & 1:
        tl.store(dpredicted_ptr + out, dpredicted.to(dpredicted_ptr.dtype.element_ty), mask=mask)
    if NEEDS & 2:
        dx0 = times_p(-dpredicted, s, PREDICTION)
        tl.store(dx0_ptr + out, dx0.to(dx0_ptr.dtype.element_ty), mask=mask)
    if NEEDS & 4:
        deps = times_q(-dpredicted, a, PREDICTION)
        tl.store(deps_ptr + out, deps.to(deps_ptr.dtype.element_ty), mask=mask)
