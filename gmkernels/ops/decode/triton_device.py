"""Device code of the decode family: a part of the keys at a time, then the parts joined.

Row r of a key head's queries is query r % T of its head r // T. A part is PART keys, cut at
multiples of PART; partial results lie [B, H_kv, rows, parts] (times D for the sums of p v).
"""

import triton
import triton.language as tl

from gmkernels.ops.attention.triton_device import HIDDEN, load_rows, scaled


@triton.jit
def keys_seen(lengths_ptr, b, i, queries, keys, window):
    """The keys [low, high) that query i of batch b sees."""
    length = tl.minimum(tl.maximum(tl.load(lengths_ptr + b).to(tl.int64), 0), keys).to(tl.int32)
    high = tl.maximum(length - queries + 1 + i, 0)
    return tl.where(window > 0, tl.maximum(high - window, 0), 0), high


@triton.jit
def one_row_kernel(
    q_ptr,  # [B, H, T, D]
    k_ptr,  # [B, H_kv, S, D]
    v_ptr,
    lengths_ptr,  # int64 or int32 [B]
    sums_ptr,  # float32 [B, H_kv, rows, parts, D]
    tops_ptr,  # float32 [B, H_kv, rows, parts], in powers of two
    totals_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    kv_heads, group, queries, keys, parts, window,
    factor,  # takes products q k, or tanh under a softcap, to powers of two
    inner,  # scale / softcap, read if SOFTCAP
    SOFTCAP: tl.constexpr, PART: tl.constexpr, D: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    # One program a part of the keys for one row of queries; tiles of R keys by C >= D stream past,
    # and each of the R lanes keeps a maximum and sums of its own until the end.
    part, row, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, kv_head = pair // kv_heads, pair % kv_heads
    low, high = keys_seen(lengths_ptr, b, row % queries, queries, keys, window)
    begin, end = tl.maximum(part * PART, low), tl.minimum(part * PART + PART, high)
    if begin >= end:
        return
    d = tl.arange(0, C)
    q_ptr += b * q_batch + (kv_head * group + row // queries) * q_head + row % queries * q_row
    q = tl.load(q_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    k_ptr += b * k_batch + kv_head * k_head
    v_ptr += b * v_batch + kv_head * v_head
    top = tl.full((R,), HIDDEN, tl.float32)
    total = tl.zeros((R,), tl.float32)
    acc = tl.zeros((R, C), tl.float32)
    for start in range(begin, end, R):
        j = start + tl.arange(0, R)
        k = load_rows(k_ptr, k_row, j, end, D, C).to(tl.float32)
        v = load_rows(v_ptr, v_row, j, end, D, C).to(tl.float32)
        s, _ = scaled(tl.sum(k * q[None, :], 1), factor, inner, SOFTCAP)
        s = tl.where(j < end, s, HIDDEN)
        new_top = tl.maximum(top, s)
        p = tl.where(j < end, tl.exp2(s - new_top), 0.0)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + p
        acc = acc * shrink[:, None] + p[:, None] * v
        top = new_top
    most = tl.max(top, 0)
    weight = tl.exp2(top - most)
    at = (pair * group * queries + row) * parts + part
    tl.store(tops_ptr + at, most)
    tl.store(totals_ptr + at, tl.sum(total * weight, 0))
    tl.store(sums_ptr + at * D + d, tl.sum(acc * weight[:, None], 0), mask=d < D)


@triton.jit
def many_rows_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, sums_ptr, tops_ptr, totals_ptr,  # as in one_row_kernel
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    kv_heads, group, queries, keys, parts, window, factor, inner,
    SOFTCAP: tl.constexpr, PART: tl.constexpr, D: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    Q: tl.constexpr,
):  # fmt: skip
    # One program a part of the keys for Q rows of queries at once, by matrix products.
    part, block, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, kv_head = pair // kv_heads, pair % kv_heads
    row = block * Q + tl.arange(0, Q)
    inside = row < group * queries
    low, high = keys_seen(lengths_ptr, b, row % queries, queries, keys, window)
    high = tl.where(inside, high, 0)
    begin = tl.maximum(part * PART, tl.min(tl.where(inside, low, keys)))
    end = tl.minimum(part * PART + PART, tl.max(high))
    if begin >= end:
        return
    d = tl.arange(0, C)[None, :]
    q_at = (kv_head * group + row // queries) * q_head + row % queries * q_row
    mask = inside[:, None] & (d < D)
    q = tl.load(q_ptr + b * q_batch + q_at[:, None] + d, mask=mask, other=0.0)
    if q_ptr.dtype.element_ty != k_ptr.dtype.element_ty:
        q = q.to(tl.float32)
    k_ptr += b * k_batch + kv_head * k_head
    v_ptr += b * v_batch + kv_head * v_head
    top = tl.full((Q,), HIDDEN, tl.float32)
    total = tl.zeros((Q,), tl.float32)
    acc = tl.zeros((Q, C), tl.float32)
    for start in range(begin, end, R):
        j = start + tl.arange(0, R)
        k = load_rows(k_ptr, k_row, j, end, D, C).to(q.dtype)
        v = load_rows(v_ptr, v_row, j, end, D, C).to(q.dtype)
        dots = tl.dot(q, tl.trans(k), input_precision="ieee")
        s, _ = scaled(dots, factor, inner, SOFTCAP)
        seen = (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
        s = tl.where(seen, s, HIDDEN)
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.where(seen, tl.exp2(s - new_top[:, None]), 0.0)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    at = (pair * group * queries + row) * parts + part
    tl.store(tops_ptr + at, top, mask=inside)
    tl.store(totals_ptr + at, total, mask=inside)
    tl.store(sums_ptr + at[:, None] * D + d, acc, mask=mask)


@triton.jit
def join_kernel(
    sums_ptr, tops_ptr, totals_ptr, lengths_ptr,  # as in one_row_kernel
    o_ptr,  # [B, H, T, D] contiguous
    heads, queries, keys, parts, window,
    PART: tl.constexpr, D: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    # One program a query of a head; R parts at a time. Rows of queries lie as [H, T] do.
    row = tl.program_id(0).to(tl.int64)
    low, high = keys_seen(
        lengths_ptr, row // (heads * queries), row % queries, queries, keys, window
    )
    first, last = low // PART, tl.cdiv(high, PART)
    d = tl.arange(0, C)[None, :]
    most = tl.full((R,), HIDDEN, tl.float32)
    for start in range(first, last, R):
        n = start + tl.arange(0, R)
        most = tl.maximum(most, tl.load(tops_ptr + row * parts + n, mask=n < last, other=HIDDEN))
    top = tl.max(most, 0)
    total = tl.zeros((R,), tl.float32)
    acc = tl.zeros((R, C), tl.float32)
    for start in range(first, last, R):
        n = start + tl.arange(0, R)
        at = row * parts + n
        inside = n < last
        weight = tl.exp2(tl.load(tops_ptr + at, mask=inside, other=HIDDEN) - top)
        total += weight * tl.load(totals_ptr + at, mask=inside, other=0.0)
        mask = inside[:, None] & (d < D)
        sums = tl.load(sums_ptr + at[:, None] * D + d, mask=mask, other=0.0)
        acc += weight[:, None] * sums
    whole = tl.sum(total, 0)
    o = tl.sum(acc, 0) / tl.where(whole == 0.0, 1.0, whole)
    column = tl.arange(0, C)
    tl.store(o_ptr + row * D + column, o.to(o_ptr.dtype.element_ty), mask=column < D)
