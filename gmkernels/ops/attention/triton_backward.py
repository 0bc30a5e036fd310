"""Device code of attention's backward: a kernel for dq, one for dk and dv, no atomics."""

import triton
import triton.language as tl

from gmkernels.ops.attention.triton_device import (
    LOG2E,
    bounds,
    keys_seen,
    load_rows,
    queries_seeing,
    scaled,
    store_rows,
)


@triton.jit
def load_statistics(lse_ptr, delta_ptr, i, queries, NATS: tl.constexpr):
    """lse in the scores' unit (0 where no key is seen) and delta of queries i."""
    lse = tl.load(lse_ptr + i, mask=i < queries, other=0.0)
    delta = tl.load(delta_ptr + i, mask=i < queries, other=0.0)
    if not NATS:
        lse *= LOG2E
    return tl.where(lse == float("-inf"), 0.0, lse), delta


@triton.jit
def probability(s, lse, NATS: tl.constexpr):
    """exp(s - lse). float32 scores are in nats as lse is, so that lse, which may be tens, rounds
    once; 16-bit ones in powers of two, an instruction less.
    """
    if NATS:
        return tl.exp(s - lse)
    else:
        return tl.exp2(s - lse)


@triton.jit
def dq_block(
    j, q, do, lse, delta, k_ptr, v_ptr, mask_ptr, k_stride, v_stride, keys, low, high, factor,
    inner, dq, HIDING: tl.constexpr, KEY_MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    DO: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dq after keys j."""
    k = load_rows(k_ptr, k_stride, j, keys, D, BD)
    s, slope = scaled(tl.dot(q, tl.trans(k), input_precision="ieee"), factor, inner, SOFTCAP)
    p = probability(s, lse[:, None], q.dtype == tl.float32)
    if DO:
        v = load_rows(v_ptr, v_stride, j, keys, D, BD)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None]) * slope
    else:
        ds = p * -delta[:, None] * slope
    if HIDING:
        seen = (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
        if KEY_MASK:
            seen = seen & (tl.load(mask_ptr + j, mask=j < keys, other=0) != 0)[None, :]
        ds = tl.where(seen, ds, 0.0)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def dq_kernel(
    do_ptr,  # [B, H, T, D] with contiguous batches, read if DO
    q_ptr,  # [B, H, T, D]
    k_ptr,  # [B, H / group, Tk, D]
    v_ptr,  # like k, read if DO
    lse_ptr,  # float32 [B, H, T]
    delta_ptr,  # float32 [B, H, T]
    dq_ptr,  # [B, H, T, D] contiguous
    low_ptr,  # int64 [T], keys seen, read if RANGED
    high_ptr,  # int64 [T]
    mask_ptr,  # bool [B, Tk] contiguous, read if KEY_MASK
    do_batch, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    heads, group, queries, keys, window, scale, factor, inner,
    CAUSAL: tl.constexpr, RANGED: tl.constexpr, KEY_MASK: tl.constexpr, WHOLE: tl.constexpr,
    SOFTCAP: tl.constexpr, DO: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    # One program R queries of a head; keys stream past C at a time.
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    i = tl.program_id(0) * R + tl.arange(0, R)
    low, high = keys_seen(i, low_ptr, high_ptr, queries, keys, window, CAUSAL, RANGED)
    q = load_rows(q_ptr + b * q_batch + h * q_head, q_row, i, queries, D, BD)
    do = q
    if DO:
        do = load_rows(do_ptr + b * do_batch + h * queries * D, D, i, queries, D, BD)
    at = pair * queries
    NATS: tl.constexpr = q.dtype == tl.float32
    lse, delta = load_statistics(lse_ptr + at, delta_ptr + at, i, queries, NATS)
    k_ptr += b * k_batch + h // group * k_head
    v_ptr += b * v_batch + h // group * v_head
    mask_ptr += b * keys
    begin, first, last, end = bounds(low, high, i < queries, C, WHOLE)
    dq = tl.zeros((R, BD), tl.float32)
    for start in range(begin, first, C):
        dq = dq_block(
            start + tl.arange(0, C), q, do, lse, delta, k_ptr, v_ptr, mask_ptr, k_row, v_row, keys,
            low, high, factor, inner, dq, True, KEY_MASK, SOFTCAP, DO, D, BD,
        )  # fmt: skip
    if WHOLE:
        for start in range(first, last, C):
            dq = dq_block(
                start + tl.arange(0, C), q, do, lse, delta, k_ptr, v_ptr, mask_ptr, k_row, v_row,
                keys, low, high, factor, inner, dq, False, KEY_MASK, SOFTCAP, DO, D, BD,
            )  # fmt: skip
        for start in range(last, end, C):
            dq = dq_block(
                start + tl.arange(0, C), q, do, lse, delta, k_ptr, v_ptr, mask_ptr, k_row, v_row,
                keys, low, high, factor, inner, dq, True, KEY_MASK, SOFTCAP, DO, D, BD,
            )  # fmt: skip
    store_rows(dq_ptr + at * D, i, queries, dq * scale, D, BD)


@triton.jit
def dkdv_block(
    i, k, v, lse_ptr, delta_ptr, q_ptr, do_ptr, q_stride, queries, low, high, hidden, factor, inner,
    dk, dv, HIDING: tl.constexpr, KEY_MASK: tl.constexpr, SOFTCAP: tl.constexpr, DO: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dk and dv after queries i."""
    q = load_rows(q_ptr, q_stride, i, queries, D, BD)
    NATS: tl.constexpr = q.dtype == tl.float32
    lse, delta = load_statistics(lse_ptr, delta_ptr, i, queries, NATS)
    s, slope = scaled(tl.dot(k, tl.trans(q), input_precision="ieee"), factor, inner, SOFTCAP)
    p = probability(s, lse[None, :], q.dtype == tl.float32)  # [C, R]: transposed
    if HIDING:
        seen = (i[None, :] >= low[:, None]) & (i[None, :] < high[:, None])
        if KEY_MASK:
            seen = seen & (hidden == 0)[:, None]
        p = tl.where(seen, p, 0.0)
    if DO:
        do = load_rows(do_ptr, D, i, queries, D, BD)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :]) * slope
    else:
        ds = p * -delta[None, :] * slope
    if HIDING:
        ds = tl.where(seen, ds, 0.0)
    return tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee"), dv


@triton.jit
def dkdv_kernel(
    do_ptr,  # [B, H, T, D] with contiguous batches, read if DO
    q_ptr,  # [B, H, T, D]
    k_ptr,  # [B, H / group, Tk, D]
    v_ptr,  # like k, read if DO
    lse_ptr,  # float32 [B, H, T]
    delta_ptr,  # float32 [B, H, T]
    dk_ptr,  # [B, H / group, Tk, D] contiguous
    dv_ptr,  # like dk, written if DV
    low_ptr,  # int64 [Tk], queries that see a key, read if RANGED
    high_ptr,  # int64 [Tk]
    mask_ptr,  # bool [B, Tk] contiguous, read if KEY_MASK
    do_batch, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    heads, group, queries, keys, window, scale, factor, inner,
    CAUSAL: tl.constexpr, RANGED: tl.constexpr, KEY_MASK: tl.constexpr, WHOLE: tl.constexpr,
    SOFTCAP: tl.constexpr, DO: tl.constexpr, DV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    # One program C keys of a key head; queries of the heads that share it stream past R at a time.
    pair = tl.program_id(1).to(tl.int64)
    kv_heads = heads // group
    b, kv_head = pair // kv_heads, pair % kv_heads
    j = tl.program_id(0) * C + tl.arange(0, C)
    low, high = queries_seeing(j, low_ptr, high_ptr, queries, keys, window, CAUSAL, RANGED)
    k = load_rows(k_ptr + b * k_batch + kv_head * k_head, k_row, j, keys, D, BD)
    v = k
    if DO:
        v = load_rows(v_ptr + b * v_batch + kv_head * v_head, v_row, j, keys, D, BD)
    hidden = j * 0
    if KEY_MASK:
        hidden = 1 - tl.load(mask_ptr + b * keys + j, mask=j < keys, other=0).to(tl.int32)
    begin, first, last, end = bounds(low, high, j < keys, R, WHOLE)
    dk = tl.zeros((C, BD), tl.float32)
    dv = tl.zeros((C, BD), tl.float32)
    for h in range(kv_head * group, kv_head * group + group):
        q_at = q_ptr + b * q_batch + h * q_head
        do_at = do_ptr + b * do_batch + h * queries * D
        lse_at = lse_ptr + (b * heads + h) * queries
        delta_at = delta_ptr + (b * heads + h) * queries
        for start in range(begin, first, R):
            dk, dv = dkdv_block(
                start + tl.arange(0, R), k, v, lse_at, delta_at, q_at, do_at,
                q_row, queries, low, high, hidden, factor, inner, dk, dv, True, KEY_MASK, SOFTCAP,
                DO, D, BD,
            )  # fmt: skip
        if WHOLE:
            for start in range(first, last, R):
                dk, dv = dkdv_block(
                    start + tl.arange(0, R), k, v, lse_at, delta_at, q_at, do_at,
                    q_row, queries, low, high, hidden, factor, inner, dk, dv, False, KEY_MASK,
                    SOFTCAP, DO, D, BD,
                )  # fmt: skip
            for start in range(last, end, R):
                dk, dv = dkdv_block(
                    start + tl.arange(0, R), k, v, lse_at, delta_at, q_at, do_at,
                    q_row, queries, low, high, hidden, factor, inner, dk, dv, True, KEY_MASK,
                    SOFTCAP, DO, D, BD,
                )  # fmt: skip
    at = pair * keys * D
    store_rows(dk_ptr + at, j, keys, dk * scale, D, BD)
    if DV:
        store_rows(dv_ptr + at, j, keys, dv, D, BD)
