"""Device code of the contrastive family: the kernels that triton_kernel.py launches."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
HIDDEN = tl.constexpr(-1e30)  # stands for -inf, so that differences stay finite


@triton.jit
def load_part(ptr, stride, i, d, rows, D: tl.constexpr):
    """Columns d of rows i as [len(i), len(d)] in their own dtype; zeros outside."""
    mask = (i[:, None] < rows) & (d[None, :] < D)
    at = i[:, None].to(tl.int64) * stride + d[None, :]
    return tl.load(ptr + at, mask=mask, other=0.0)


@triton.jit
def scores(
    own_ptr, other_ptr, own_stride, other_stride, i, j, rows, scale,
    D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Products of own rows i and other rows j in powers of two, summed BD columns at a time."""
    s = tl.zeros((R, C), tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        q = load_part(own_ptr, own_stride, i, d, rows, D)
        k = load_part(other_ptr, other_stride, j, d, rows, D)
        s = tl.dot(q, tl.trans(k), s, input_precision="ieee")
    return s * (scale * LOG2E)


@triton.jit
def are_negatives(i, j, rows, pairs):
    """Whether rows i and j belong to different pairs: row, row + pairs and row - pairs are one."""
    apart = i[:, None] - j[None, :]
    partners = (apart == 0) | (apart == pairs) | (apart == -pairs)
    return (partners == 0) & (j[None, :] < rows)


@triton.jit
def forward_kernel(
    own_ptr,  # [rows, D]
    other_ptr,  # [rows, D]
    lse_ptr,  # float32 [rows], nats
    own_stride, other_stride, rows, pairs, scale,
    D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    # One program R own rows; the others stream past C at a time.
    i = tl.program_id(0) * R + tl.arange(0, R)
    top = tl.full((R,), HIDDEN, tl.float32)
    total = tl.zeros((R,), tl.float32)
    for start in range(0, rows, C):
        j = start + tl.arange(0, C)
        s = scores(own_ptr, other_ptr, own_stride, other_stride, i, j, rows, scale, D, BD, R, C)
        seen = are_negatives(i, j, rows, pairs)
        s = tl.where(seen, s, HIDDEN)
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.where(seen, tl.exp2(s - new_top[:, None]), 0.0)
        total = total * tl.exp2(top - new_top) + tl.sum(p, 1)
        top = new_top
    tl.store(lse_ptr + i, top * LN2 + tl.log(total), mask=i < rows)


@triton.jit
def gradient_kernel(
    own_ptr,  # [rows, D]
    other_ptr,  # [rows, D]
    lse_ptr,  # float32 [rows] of own rows, read if OWN
    dlse_ptr,  # float32 [rows], read if OWN
    other_lse_ptr,  # float32 [rows] of the others, read if OTHER
    other_dlse_ptr,  # float32 [rows], read if OTHER
    gradient_ptr,  # [rows, D] contiguous
    own_stride, other_stride, rows, pairs, scale,
    OWN: tl.constexpr, OTHER: tl.constexpr, WIDE: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    # One program R own rows and BD columns of their gradient; the others stream past C at a time.
    i = tl.program_id(0) * R + tl.arange(0, R)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = i < rows
    acc = tl.zeros((R, BD), tl.float32)
    for start in range(0, rows, C):
        j = start + tl.arange(0, C)
        s = scores(own_ptr, other_ptr, own_stride, other_stride, i, j, rows, scale, D, BD, R, C)
        w = tl.zeros((R, C), tl.float32)
        if OWN:
            lse = tl.load(lse_ptr + i, mask=inside, other=0.0) * LOG2E
            dlse = tl.load(dlse_ptr + i, mask=inside, other=0.0)
            w += dlse[:, None] * tl.exp2(s - lse[:, None])
        if OTHER:
            lse = tl.load(other_lse_ptr + j, mask=j < rows, other=0.0) * LOG2E
            dlse = tl.load(other_dlse_ptr + j, mask=j < rows, other=0.0)
            w += dlse[None, :] * tl.exp2(s - lse[None, :])
        w = tl.where(are_negatives(i, j, rows, pairs), w, 0.0)
        k = load_part(other_ptr, other_stride, j, d, rows, D)
        if WIDE:  # float16 cannot hold a weight of 1e-6: tf32 has its digits and float32's range
            acc = tl.dot(w, k.to(tl.float32), acc, input_precision="tf32")
        else:
            acc = tl.dot(w.to(k.dtype), k, acc, input_precision="ieee")
    at = i[:, None].to(tl.int64) * D + d[None, :]
    mask = inside[:, None] & (d[None, :] < D)
    tl.store(gradient_ptr + at, (acc * scale).to(gradient_ptr.dtype.element_ty), mask=mask)
