"""Device code of the gaussian family: the kernels that triton_kernel.py launches."""

import triton
import triton.language as tl

from gmkernels.triton_common import (
    clamp,
    excess,
    exp_tail,
    load_key,
    load_tile,
    normal_tile,
    normals,
)


@triton.jit
def kl_term(m, l, pm, pl, PRIOR: tl.constexpr):
    """Twice the KL of every element, and exp(l / 2)."""
    if PRIOR:
        sigma = tl.exp(l * 0.5)
        shift = m - pm
        return shift * shift * tl.exp(-pl) + excess(l - pl), sigma
    else:
        # E = exp(h) = 1 + h + c: E^2 - 1 - l = h^2 + c (2 + 2 h + c) near 0.
        h = l * 0.5
        sigma = tl.exp(h)
        c = h * h * exp_tail(h)
        near = h * h + c * (h * 2.0 + 2.0 + c)
        far = sigma * sigma - 1.0 - l
        return m * m + tl.where(tl.abs(h) < 0.34, near, far), sigma


@triton.jit
def forward_kernel(
    mean_ptr,  # [B, D], rows at mean_stride
    logvar_ptr,  # [B, D], rows at logvar_stride
    prior_mean_ptr,  # [B, D], read if PRIOR_MEAN
    prior_logvar_ptr,  # [B, D], read if PRIOR_LOGVAR
    eps_ptr,  # [B, D], read if EPS
    key_ptr,  # int64 [2], read if SAMPLE and not EPS
    z_ptr,  # [B, D] contiguous, written if SAMPLE
    sum_ptr,  # float32 [B, chunks]: KL of each chunk of a row
    rows,
    columns,
    mean_stride,
    logvar_stride,
    prior_mean_stride,
    prior_logvar_stride,
    eps_stride,
    low,
    high,
    PRIOR_MEAN: tl.constexpr,
    PRIOR_LOGVAR: tl.constexpr,
    EPS: tl.constexpr,
    SAMPLE: tl.constexpr,
    CHUNK: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program a chunk of R rows.
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    chunk = tl.program_id(1)
    total = tl.zeros((R, C), tl.float32)
    if SAMPLE and not EPS:
        key = load_key(key_ptr)
    for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, columns), C):
        d = start + tl.arange(0, C)[None, :]
        mask = (row < rows) & (d < columns)
        m = load_tile(mean_ptr, row, d, mean_stride, mask, True)
        l = load_tile(logvar_ptr, row, d, logvar_stride, mask, True)
        l = clamp(l, low, high)
        pm = load_tile(prior_mean_ptr, row, d, prior_mean_stride, mask, PRIOR_MEAN)
        pl = load_tile(prior_logvar_ptr, row, d, prior_logvar_stride, mask, PRIOR_LOGVAR)
        term, sigma = kl_term(m, l, pm, pl, PRIOR_MEAN or PRIOR_LOGVAR)
        total += tl.where(mask, term, 0.0)
        if SAMPLE:
            if EPS:
                eps = load_tile(eps_ptr, row, d, eps_stride, mask, True)
            else:
                eps = normals(key, row, start, 0, R, C)
            z = m + sigma * eps
            tl.store(z_ptr + row * columns + d, z.to(z_ptr.dtype.element_ty), mask=mask)
    kl = 0.5 * tl.sum(total, axis=1, keep_dims=True)
    tl.store(sum_ptr + row * tl.num_programs(1) + chunk, kl, mask=row < rows)


@triton.jit
def backward_kernel(
    dz_ptr,  # [B, D], read if DZ
    dkl_ptr,  # at row * dkl_row_stride + d * dkl_stride, read if DKL
    mean_ptr,  # [B, D]
    logvar_ptr,  # [B, D]
    prior_mean_ptr,  # [B, D], read if PRIOR_MEAN
    prior_logvar_ptr,  # [B, D], read if PRIOR_LOGVAR
    eps_ptr,  # [B, D], read if EPS
    key_ptr,  # int64 [2], read if DZ and not EPS
    dmean_ptr,  # gradients [B, D] contiguous, each written if its bit of NEEDS is set
    dlogvar_ptr,
    dprior_mean_ptr,
    dprior_logvar_ptr,
    deps_ptr,
    rows,
    columns,
    dz_stride,
    dkl_row_stride,
    dkl_stride,
    mean_stride,
    logvar_stride,
    prior_mean_stride,
    prior_logvar_stride,
    eps_stride,
    low,
    high,
    dkl_scale,
    DZ: tl.constexpr,
    DKL: tl.constexpr,
    PRIOR_MEAN: tl.constexpr,
    PRIOR_LOGVAR: tl.constexpr,
    EPS: tl.constexpr,
    NEEDS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program a tile [R, C].
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    start = tl.program_id(1) * C
    d = start + tl.arange(0, C)[None, :]
    mask = (row < rows) & (d < columns)
    m = load_tile(mean_ptr, row, d, mean_stride, mask, True)
    raw = load_tile(logvar_ptr, row, d, logvar_stride, mask, True)
    l = clamp(raw, low, high)
    pm = load_tile(prior_mean_ptr, row, d, prior_mean_stride, mask, PRIOR_MEAN)
    pl = load_tile(prior_logvar_ptr, row, d, prior_logvar_stride, mask, PRIOR_LOGVAR)
    dz = load_tile(dz_ptr, row, d, dz_stride, mask, DZ)
    dkl = load_tile(dkl_ptr, row * dkl_row_stride, d * dkl_stride, 1, mask, DKL) * dkl_scale
    slope = (m - pm) * tl.exp(-pl)
    gap = excess(l - pl) + (l - pl)
    out = row * columns + d
    if NEEDS & 1:
        tl.store(dmean_ptr + out, (dz + dkl * slope).to(dmean_ptr.dtype.element_ty), mask=mask)
    if NEEDS & 2:
        dl = dkl * gap
        if DZ:
            if EPS:
                eps = load_tile(eps_ptr, row, d, eps_stride, mask, True)
            else:
                eps = normal_tile(key_ptr, row, start, 0, R, C)
            dl += dz * eps * tl.exp(l * 0.5)
        dl = tl.where((raw < low) | (raw > high), 0.0, 0.5 * dl)
        tl.store(dlogvar_ptr + out, dl.to(dlogvar_ptr.dtype.element_ty), mask=mask)
    if NEEDS & 4:
        dpm = -(dkl * slope)
        tl.store(dprior_mean_ptr + out, dpm.to(dprior_mean_ptr.dtype.element_ty), mask=mask)
    if NEEDS & 8:
        dpl = -0.5 * dkl * (gap + (m - pm) * slope)
        tl.store(dprior_logvar_ptr + out, dpl.to(dprior_logvar_ptr.dtype.element_ty), mask=mask)
    if NEEDS & 16:
        deps = dz * tl.exp(l * 0.5)
        tl.store(deps_ptr + out, deps.to(deps_ptr.dtype.element_ty), mask=mask)


@triton.jit
def per_dim_kernel(
    mean_ptr,  # [B, D]
    logvar_ptr,  # [B, D]
    prior_mean_ptr,  # [B, D], read if PRIOR_MEAN
    prior_logvar_ptr,  # [B, D], read if PRIOR_LOGVAR
    sum_ptr,  # float32 [slabs, D]
    rows,
    columns,
    mean_stride,
    logvar_stride,
    prior_mean_stride,
    prior_logvar_stride,
    low,
    high,
    PRIOR_MEAN: tl.constexpr,
    PRIOR_LOGVAR: tl.constexpr,
    SLAB: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program a slab of C columns.
    slab = tl.program_id(1)
    d = tl.program_id(0) * C + tl.arange(0, C)[None, :]
    total = tl.zeros((R, C), tl.float32)
    for start in range(slab * SLAB, tl.minimum((slab + 1) * SLAB, rows), R):
        row = start + tl.arange(0, R).to(tl.int64)[:, None]
        mask = (row < rows) & (d < columns)
        m = load_tile(mean_ptr, row, d, mean_stride, mask, True)
        l = load_tile(logvar_ptr, row, d, logvar_stride, mask, True)
        l = clamp(l, low, high)
        pm = load_tile(prior_mean_ptr, row, d, prior_mean_stride, mask, PRIOR_MEAN)
        pl = load_tile(prior_logvar_ptr, row, d, prior_logvar_stride, mask, PRIOR_LOGVAR)
        term, _ = kl_term(m, l, pm, pl, PRIOR_MEAN or PRIOR_LOGVAR)
        total += tl.where(mask, term, 0.0)
    kl = 0.5 * tl.sum(total, axis=0, keep_dims=True)
    tl.store(sum_ptr + slab.to(tl.int64) * columns + d, kl, mask=d < columns)
