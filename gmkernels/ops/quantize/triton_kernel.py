"""Triton kernels, launchers and operators of the quantize family."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gmkernels import dispatch
from gmkernels.ops.quantize import outputs
from gmkernels.triton_common import DEVICES as _DEVICES
from gmkernels.triton_common import launch

DEVICES = dict.fromkeys(("nearest_code", "code_statistics"), _DEVICES)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def load_matrix(ptr, stride, row, rows, d, D: tl.constexpr):
    """Rows `row` and columns d as a tile in its own dtype; zeros outside."""
    mask = (row[:, None] < rows) & (d[None, :] < D)
    return tl.load(ptr + row[:, None].to(tl.int64) * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def search_kernel(
    x_ptr,  # [N, D] with contiguous rows
    codes_ptr,  # [K, D] with contiguous rows, in x's dtype
    index_ptr,  # int64 [N]
    close_ptr,  # bool [N]: whether rounding may have chosen
    x_stride, codes_stride, rows, count,
    unit,  # what a score may be off by, relative to |x| |c| + |c|^2
    D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    # One program R rows; codes stream past C at a time, and D in pieces of BD.
    row = tl.program_id(0) * R + tl.arange(0, R)
    square = tl.zeros((R,), tl.float32)
    for start in range(0, D, BD):
        x = load_matrix(x_ptr, x_stride, row, rows, start + tl.arange(0, BD), D).to(tl.float32)
        square += tl.sum(x * x, 1)
    best = tl.full((R,), INFINITY, tl.float32)
    second = tl.full((R,), INFINITY, tl.float32)
    index = tl.zeros((R,), tl.int32)
    longest = 0.0  # its square
    for first in range(0, count, C):
        k = first + tl.arange(0, C)
        product = tl.zeros((R, C), tl.float32)
        norm = tl.zeros((C,), tl.float32)
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            x = load_matrix(x_ptr, x_stride, row, rows, d, D)
            c = load_matrix(codes_ptr, codes_stride, k, count, d, D)
            product = tl.dot(x, tl.trans(c), product, input_precision="ieee")
            norm += tl.sum(c.to(tl.float32) * c.to(tl.float32), 1)
        longest = tl.maximum(longest, tl.max(tl.where(norm == norm, norm, 0.0)))
        s = (0.5 * norm)[None, :] - product
        s = tl.where((k < count)[None, :] & (s == s), s, INFINITY)
        least = tl.min(s, 1)
        place = tl.argmin(s, 1)
        others = tl.min(tl.where(tl.arange(0, C)[None, :] == place[:, None], INFINITY, s), 1)
        less = least < best
        second = tl.minimum(tl.where(less, best, least), tl.minimum(second, others))
        index = tl.where(less, first + place, index)
        best = tl.where(less, least, best)
    error = unit * (tl.sqrt(square) * tl.sqrt(longest) + longest)
    certain = second - best > 2.0 * error + D * 9.4e-38
    tl.store(index_ptr + row, index.to(tl.int64), mask=row < rows)
    tl.store(close_ptr + row, certain == 0, mask=row < rows)


@triton.jit
def exact_kernel(
    x_ptr,  # [N, D] with contiguous rows
    codes_ptr,  # [K, D] with contiguous rows
    close_ptr,  # bool [N]: rows to search
    index_ptr,  # int64 [N], written for these
    x_stride, codes_stride, count,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    # One program a row: nothing, or its search by float64 distances.
    row = tl.program_id(0).to(tl.int64)
    if tl.load(close_ptr + row) != 0:
        best = tl.full((), INFINITY, tl.float64)
        index = tl.full((), 0, tl.int32)
        for first in range(0, count, C):
            k = first + tl.arange(0, C)
            distance = tl.zeros((C,), tl.float64)
            for start in range(0, D, BD):
                d = start + tl.arange(0, BD)
                x = tl.load(x_ptr + row * x_stride + d, mask=d < D, other=0.0).to(tl.float64)
                c = load_matrix(codes_ptr, codes_stride, k, count, d, D).to(tl.float64)
                distance += tl.sum((x[None, :] - c) * (x[None, :] - c), 1)
            distance = tl.where((k < count) & (distance == distance), distance, INFINITY)
            least = tl.min(distance, 0)
            index = tl.where(least < best, first + tl.argmin(distance, 0), index)
            best = tl.minimum(best, least)
        tl.store(index_ptr + row, index.to(tl.int64))


@triton.jit
def sum_kernel(
    x_ptr,  # [N, D] with contiguous rows
    order_ptr,  # int64 [N], rows by code, ascending within a code
    start_ptr,  # int64 [K + 1], where a code's rows begin
    sums_ptr,  # float32 [K, D]
    x_stride, D: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    # One program C columns of a code; its rows stream past R at a time, in order.
    code = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * C + tl.arange(0, C)
    total = tl.zeros((C,), tl.float32)
    end = tl.load(start_ptr + code + 1)
    for first in range(tl.load(start_ptr + code), end, R):
        j = first + tl.arange(0, R)
        row = tl.load(order_ptr + j, mask=j < end, other=0)
        mask = (j < end)[:, None] & (d < D)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + d[None, :], mask=mask, other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
    tl.store(sums_ptr + code * D + d, total, mask=d < D)


def _blocks(x: Tensor) -> tuple[int, int, int, int]:
    """Rows, codes and columns of a tile, and warps."""
    piece = min(64, max(16, triton.next_power_of_2(x.shape[1])))
    if x.dtype == torch.float32:  # no tensor cores at full precision: small tiles
        return 32, 32, 16, 4
    return 64, 64, piece, 4


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """indices [N]."""
    indices = outputs.nearest_code(x, codebook)
    if x.dtype != codebook.dtype:
        x, codebook = x.float(), codebook.float()
    rows, width = x.shape
    close = torch.empty(rows, dtype=torch.bool, device=x.device)
    r, c, piece, warps = _blocks(x)
    # Tensor cores do not round every sum to nearest: twice the bound for 16-bit products.
    unit = (width + 4) * (2.0**-24 if x.dtype == torch.float32 else 2.0**-22)
    strides = x.stride(0), codebook.stride(0)
    launch(
        search_kernel,
        (triton.cdiv(rows, r),),
        x,
        codebook,
        indices,
        close,
        *strides,
        rows,
        codebook.shape[0],
        unit,
        D=width,
        BD=piece,
        R=r,
        C=c,
        num_warps=warps,
    )
    launch(
        exact_kernel,
        (rows,),
        x,
        codebook,
        close,
        indices,
        *strides,
        codebook.shape[0],
        D=width,
        BD=piece,
        C=32,
    )
    return indices


def code_statistics(x: Tensor, indices: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """counts [K] and sums [K, D]; rows whose index is outside [0, K) are left out."""
    counts, sums = outputs.code_statistics(x, indices, codes)
    ordered, order = indices.sort(stable=True)
    borders = torch.arange(codes + 1, device=x.device)
    starts = torch.searchsorted(ordered, borders)
    torch.sub(starts[1:], starts[:-1], out=counts)
    width = x.shape[1]
    c = min(128, max(16, triton.next_power_of_2(width)))
    grid = (codes, triton.cdiv(width, c))
    launch(sum_kernel, grid, x, order, starts, sums, x.stride(0), D=width, R=2048 // c, C=c)
    return counts, sums


for _fake in outputs.FAKES:
    dispatch.define("gmkernels_triton", globals()[_fake.__name__], _fake)
