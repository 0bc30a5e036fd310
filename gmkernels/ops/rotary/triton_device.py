"""Device code of the rotary family: the kernels that triton_kernel.py launches."""

import triton
import triton.language as tl


@triton.jit
def head_row(row, heads, tokens, batch_stride, head_stride, token_stride):
    """Where row b H T + h T + t begins in [B, H, T, D] of any strides; int64."""
    pair = row // tokens
    return pair // heads * batch_stride + pair % heads * head_stride + row % tokens * token_stride


@triton.jit
def rotary_kernel(
    x_ptr,  # [B, H, T, D], contiguous along D
    cos_ptr,  # float32 [places, half]
    sin_ptr,  # float32 [places, half]
    position_ptr,  # int64 [1 or B, T]; not read without GIVEN
    y_ptr,  # [B, H, T, D], contiguous
    rows,
    heads,
    tokens,
    places,
    half,
    width,
    batch_stride,
    head_stride,
    token_stride,
    position_stride,  # T, or 0 where all sequences share one row
    sign,  # -1 turns back
    GIVEN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    C: tl.constexpr,  # all pairs
    REST: tl.constexpr,  # all features that pass, or 0
    R: tl.constexpr,
):
    # One program R rows (tokens of a head).
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    inside = row < rows
    x = x_ptr + head_row(row, heads, tokens, batch_stride, head_stride, token_stride)
    y = y_ptr + row * width
    place = row % tokens
    if GIVEN:
        at = row // tokens // heads * position_stride + place
        place = tl.load(position_ptr + at, mask=inside, other=0)
    i = tl.arange(0, C)[None, :]
    mask = inside & (i < half)
    known = mask & (place >= 0) & (place < places)
    c = tl.load(cos_ptr + place * half + i, mask=known, other=float("nan"))
    s = tl.load(sin_ptr + place * half + i, mask=known, other=float("nan")) * sign
    if INTERLEAVED:
        first, second = 2 * i, 2 * i + 1
    else:
        first, second = i, half + i
    a = tl.load(x + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + second, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + first, (a * c - b * s).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y + second, (b * c + a * s).to(y_ptr.dtype.element_ty), mask=mask)
    if REST > 0:
        j = 2 * half + tl.arange(0, REST)[None, :]
        mask = inside & (j < width)
        tl.store(y + j, tl.load(x + j, mask=mask, other=0.0), mask=mask)


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [B, H, T, D], contiguous along D
    weight_ptr,  # [D]; not read without WEIGHT
    y_ptr,  # [B, H, T, D], contiguous
    rows,
    heads,
    tokens,
    width,
    batch_stride,
    head_stride,
    token_stride,
    eps,
    WEIGHT: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program R rows; the second pass over a row reads it from the cache.
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    x = x_ptr + head_row(row, heads, tokens, batch_stride, head_stride, token_stride)
    squares = tl.zeros((R, C), tl.float32)
    for start in range(0, width, C):
        d = (start + tl.arange(0, C))[None, :]
        v = tl.load(x + d, mask=(row < rows) & (d < width), other=0.0).to(tl.float32)
        squares += v * v
    r = 1.0 / tl.sqrt_rn(tl.sum(squares, 1, keep_dims=True) / width + eps)
    for start in range(0, width, C):
        d = (start + tl.arange(0, C))[None, :]
        mask = (row < rows) & (d < width)
        v = tl.load(x + d, mask=mask, other=0.0).to(tl.float32) * r
        if WEIGHT:
            v = v * tl.load(weight_ptr + d, mask=d < width, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * width + d, v.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_backward_kernel(
    dy_ptr,  # [B, H, T, D], contiguous along D
    x_ptr,  # likewise
    weight_ptr,  # [D]; not read without WEIGHT
    dx_ptr,  # [B, H, T, D], contiguous; not written without DX
    r_ptr,  # float32 [rows], 1 / sqrt(mean square + eps)
    rows,
    heads,
    tokens,
    width,
    dy_batch_stride,
    dy_head_stride,
    dy_token_stride,
    batch_stride,
    head_stride,
    token_stride,
    eps,
    WEIGHT: tl.constexpr,
    DX: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program R rows.
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    x = x_ptr + head_row(row, heads, tokens, batch_stride, head_stride, token_stride)
    dy = dy_ptr + head_row(row, heads, tokens, dy_batch_stride, dy_head_stride, dy_token_stride)
    squares = tl.zeros((R, C), tl.float32)
    products = tl.zeros((R, C), tl.float32)
    for start in range(0, width, C):
        d = (start + tl.arange(0, C))[None, :]
        mask = (row < rows) & (d < width)
        v = tl.load(x + d, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(dy + d, mask=mask, other=0.0).to(tl.float32)
        if WEIGHT:
            h = h * tl.load(weight_ptr + d, mask=d < width, other=0.0).to(tl.float32)
        squares += v * v
        products += v * h
    r = 1.0 / tl.sqrt_rn(tl.sum(squares, 1, keep_dims=True) / width + eps)
    c = r * r * (tl.sum(products, 1, keep_dims=True) / width)
    tl.store(r_ptr + row, r, mask=row < rows)
    if DX:
        for start in range(0, width, C):
            d = (start + tl.arange(0, C))[None, :]
            mask = (row < rows) & (d < width)
            v = tl.load(x + d, mask=mask, other=0.0).to(tl.float32)
            h = tl.load(dy + d, mask=mask, other=0.0).to(tl.float32)
            if WEIGHT:
                h = h * tl.load(weight_ptr + d, mask=d < width, other=0.0).to(tl.float32)
            dx = (h - v * c) * r
            tl.store(dx_ptr + row * width + d, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_weight_kernel(
    dy_ptr,  # [B, H, T, D], contiguous along D
    x_ptr,  # likewise
    r_ptr,  # float32 [rows]
    sum_ptr,  # float32 [groups, D]: of dy x r over each group of rows
    rows,
    heads,
    tokens,
    width,
    dy_batch_stride,
    dy_head_stride,
    dy_token_stride,
    batch_stride,
    head_stride,
    token_stride,
    TRIPS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program R TRIPS rows by C columns.
    group = tl.program_id(0).to(tl.int64)
    d = (tl.program_id(1) * C + tl.arange(0, C))[None, :]
    total = tl.zeros((R, C), tl.float32)
    for trip in range(TRIPS):
        row = ((group * TRIPS + trip) * R + tl.arange(0, R))[:, None]
        x = x_ptr + head_row(row, heads, tokens, batch_stride, head_stride, token_stride)
        dy = dy_ptr + head_row(row, heads, tokens, dy_batch_stride, dy_head_stride, dy_token_stride)
        mask = (row < rows) & (d < width)
        v = tl.load(x + d, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dy + d, mask=mask, other=0.0).to(tl.float32)
        total += g * (v * tl.load(r_ptr + row, mask=row < rows, other=0.0))
    sums = tl.sum(total, 0, keep_dims=True)
    tl.store(sum_ptr + group * width + d, sums, mask=d < width)
