"""Device code of the attention family: the kernels that triton_kernel.py launches.

Heads are [B, H, T, D] at strides of a batch, a head and a row; D is contiguous, padded to BD.
"""

import triton
import triton.language as tl

from gmkernels.triton_common import tanh

HIDDEN = tl.constexpr(-1e30)  # stands for -inf, so that differences stay finite
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def keys_seen(
    i, low_ptr, high_ptr, queries, keys, window, CAUSAL: tl.constexpr, RANGED: tl.constexpr
):
    """The keys [low, high) that query i sees; none where i is no query."""
    inside = i < queries
    if RANGED:
        low = tl.load(low_ptr + i, mask=inside, other=0).to(tl.int32)
        high = tl.load(high_ptr + i, mask=inside, other=0).to(tl.int32)
    elif CAUSAL:
        high = tl.maximum(i + (keys - queries + 1), 0)
        low = tl.where(window > 0, tl.maximum(high - window, 0), 0)
    else:
        low = i * 0
        high = low + keys
    return low, tl.where(inside, high, 0)


@triton.jit
def queries_seeing(
    j, low_ptr, high_ptr, queries, keys, window, CAUSAL: tl.constexpr, RANGED: tl.constexpr
):
    """The queries [low, high) that see key j: the other side of keys_seen()."""
    inside = j < keys
    if RANGED:
        low = tl.load(low_ptr + j, mask=inside, other=0).to(tl.int32)
        high = tl.load(high_ptr + j, mask=inside, other=0).to(tl.int32)
    elif CAUSAL:
        place = j - (keys - queries)
        low = tl.maximum(place, 0)
        high = tl.where(window > 0, tl.minimum(tl.maximum(place + window, 0), queries), queries)
    else:
        low = j * 0
        high = low + queries
    return low, tl.where(inside, high, 0)


@triton.jit
def bounds(low, high, inside, STEP: tl.constexpr, WHOLE: tl.constexpr):
    """Multiples of STEP: where anything is seen begins, where all of it does, where that ends; and
    the end of what is seen. Without WHOLE nothing is taken to be seen by all."""
    none = 2147483647
    begin = tl.min(tl.where(inside & (low < high), low, none)) // STEP * STEP
    end = tl.max(tl.where(inside, high, 0))
    begin = tl.minimum(begin, end)
    if WHOLE:
        first = tl.cdiv(tl.max(tl.where(inside, low, 0)), STEP) * STEP
        last = tl.min(tl.where(inside, high, none)) // STEP * STEP
        first = tl.minimum(tl.maximum(first, begin), end)
        return begin, first, tl.maximum(first, last), end
    else:
        return begin, end, end, end


@triton.jit
def load_rows(ptr, stride, t, rows, D: tl.constexpr, BD: tl.constexpr):
    """Rows t of a head as [len(t), BD] in their own dtype; zeros outside."""
    d = tl.arange(0, BD)[None, :]
    mask = t[:, None] < rows
    if BD != D:
        mask = mask & (d < D)
    return tl.load(ptr + t[:, None].to(tl.int64) * stride + d, mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, t, rows, x, D: tl.constexpr, BD: tl.constexpr):
    """Rows t of a contiguous head."""
    d = tl.arange(0, BD)[None, :]
    mask = t[:, None] < rows
    if BD != D:
        mask = mask & (d < D)
    tl.store(ptr + t[:, None].to(tl.int64) * D + d, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def scaled(s, factor, inner, SOFTCAP: tl.constexpr):
    """Scores in the unit of `factor`, and what the softcap multiplies their gradient by."""
    if SOFTCAP:
        t = tanh(s * inner)
        return t * factor, 1.0 - t * t
    else:
        return s * factor, 1.0


@triton.jit
def forward_block(
    j, q, k_ptr, v_ptr, mask_ptr, k_stride, v_stride, keys, low, high, factor, inner,
    top, total, acc, HIDING: tl.constexpr, KEY_MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    VALUES: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The running maximum, sum and output after keys j."""
    k = load_rows(k_ptr, k_stride, j, keys, D, BD)
    s, _ = scaled(tl.dot(q, tl.trans(k), input_precision="ieee"), factor, inner, SOFTCAP)
    if HIDING:
        seen = (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
        if KEY_MASK:
            seen = seen & (tl.load(mask_ptr + j, mask=j < keys, other=0) != 0)[None, :]
        s = tl.where(seen, s, HIDDEN)
    new_top = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - new_top[:, None])
    if HIDING:
        p = tl.where(seen, p, 0.0)
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    if VALUES:
        v = load_rows(v_ptr, v_stride, j, keys, D, BD)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return new_top, total, acc


@triton.jit
def forward_kernel(
    q_ptr,  # [B, H, T, D]
    k_ptr,  # [B, H / group, Tk, D]
    v_ptr,  # like k, read if VALUES
    o_ptr,  # [B, H, T, D] contiguous, written if VALUES
    lse_ptr,  # float32 [B, H, T], nats
    low_ptr,  # int64 [T], keys seen, read if RANGED
    high_ptr,  # int64 [T]
    mask_ptr,  # bool [B, Tk] contiguous, read if KEY_MASK
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    heads, group, queries, keys, window,
    factor,  # takes products q k, or tanh under a softcap, to powers of two
    inner,  # scale / softcap, read if SOFTCAP
    CAUSAL: tl.constexpr, RANGED: tl.constexpr, KEY_MASK: tl.constexpr, WHOLE: tl.constexpr,
    SOFTCAP: tl.constexpr, VALUES: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    # One program R queries of a head; keys stream past C at a time.
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    i = tl.program_id(0) * R + tl.arange(0, R)
    low, high = keys_seen(i, low_ptr, high_ptr, queries, keys, window, CAUSAL, RANGED)
    q = load_rows(q_ptr + b * q_batch + h * q_head, q_row, i, queries, D, BD)
    k_ptr += b * k_batch + h // group * k_head
    v_ptr += b * v_batch + h // group * v_head
    mask_ptr += b * keys
    begin, first, last, end = bounds(low, high, i < queries, C, WHOLE)
    top = tl.full((R,), HIDDEN, tl.float32)
    total = tl.zeros((R,), tl.float32)
    acc = tl.zeros((R, BD), tl.float32)
    for start in range(begin, first, C):
        top, total, acc = forward_block(
            start + tl.arange(0, C), q, k_ptr, v_ptr, mask_ptr, k_row, v_row, keys, low, high,
            factor, inner, top, total, acc, True, KEY_MASK, SOFTCAP, VALUES, D, BD,
        )  # fmt: skip
    if WHOLE:
        for start in range(first, last, C):
            top, total, acc = forward_block(
                start + tl.arange(0, C), q, k_ptr, v_ptr, mask_ptr, k_row, v_row, keys, low, high,
                factor, inner, top, total, acc, False, KEY_MASK, SOFTCAP, VALUES, D, BD,
            )  # fmt: skip
        for start in range(last, end, C):
            top, total, acc = forward_block(
                start + tl.arange(0, C), q, k_ptr, v_ptr, mask_ptr, k_row, v_row, keys, low, high,
                factor, inner, top, total, acc, True, KEY_MASK, SOFTCAP, VALUES, D, BD,
            )  # fmt: skip
    none = total == 0.0
    total = tl.where(none, 1.0, total)
    lse = tl.where(none, float("-inf"), top * LN2 + tl.log(total))
    tl.store(lse_ptr + pair * queries + i, lse, mask=i < queries)
    if VALUES:
        o = acc / total[:, None]
        store_rows(o_ptr + pair * queries * D, i, queries, o, D, BD)


@triton.jit
def delta_kernel(
    o_ptr,  # [B, H, T, D] contiguous
    do_ptr,  # [B, H, T, D] with contiguous batches
    dlse_ptr,  # float32 [B, H, T], read if DLSE
    delta_ptr,  # float32 [B, H, T]: sum_d o do - dlse
    do_batch, heads, queries,
    DO: tl.constexpr, DLSE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    # One program R queries of a head.
    pair = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * R + tl.arange(0, R)
    delta = tl.zeros((R,), tl.float32)
    if DO:
        do_head = do_ptr + pair // heads * do_batch + pair % heads * queries * D
        o = load_rows(o_ptr + pair * queries * D, D, i, queries, D, BD)
        do = load_rows(do_head, D, i, queries, D, BD)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if DLSE:
        delta -= tl.load(dlse_ptr + pair * queries + i, mask=i < queries, other=0.0)
    tl.store(delta_ptr + pair * queries + i, delta, mask=i < queries)
