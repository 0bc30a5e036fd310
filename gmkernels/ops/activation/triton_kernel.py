"""Triton kernels of the activation family and their launchers."""

import math

import triton
import triton.language as tl
from torch import Tensor

from gmkernels import dispatch
from gmkernels.ops.activation import outputs, reference
from gmkernels.triton_common import DEVICES as _DEVICES
from gmkernels.triton_common import clamp, launch, load_tile, row_stride, tile

DEVICES = {"gelu": _DEVICES}
_LINEAR = tl.constexpr(reference.LINEAR)
_CUBIC = tl.constexpr(reference.CUBIC)
_FAR = tl.constexpr(1e3)  # beyond it the gradient is 0 or 1


@triton.jit
def gate(x):
    """exp(-|u|), and the numerator of sigmoid(u) over 1 + exp(-|u|)."""
    u = x * tl.fma(x * x, _CUBIC, _LINEAR)
    e = tl.exp(-tl.abs(u))
    return e, tl.where(u < 0.0, e, 1.0)


@triton.jit
def gelu_kernel(
    x_ptr,  # [B, columns], rows at x_stride
    y_ptr,  # [B, columns] contiguous
    rows,
    columns,
    x_stride,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program a tile [R, C].
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    d = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    mask = (row < rows) & (d < columns)
    x = load_tile(x_ptr, row, d, x_stride, mask, True)
    e, s = gate(x)
    y = x * s / (e + 1.0)
    tl.store(y_ptr + row * columns + d, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gelu_backward_kernel(
    dy_ptr,  # [B, columns], rows at dy_stride
    x_ptr,  # [B, columns], rows at x_stride
    dx_ptr,  # [B, columns] contiguous
    rows,
    columns,
    dy_stride,
    x_stride,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program a tile [R, C].
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    d = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    mask = (row < rows) & (d < columns)
    x = clamp(load_tile(x_ptr, row, d, x_stride, mask, True), -_FAR, _FAR)
    e, s = gate(x)
    r = 1.0 / (e + 1.0)
    slope = x * tl.fma(x * x, 3.0 * _CUBIC, _LINEAR)
    dx = load_tile(dy_ptr, row, d, dy_stride, mask, True) * tl.fma(slope * e, r * r, s * r)
    tl.store(dx_ptr + row * columns + d, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def gelu_forward(x: Tensor) -> Tensor:
    """y like x."""
    rows, columns = x.shape[0], math.prod(x.shape[1:])
    r, c = tile(rows, columns)
    y = outputs.gelu_forward(x)
    grid = (triton.cdiv(rows, r), triton.cdiv(columns, c))
    launch(gelu_kernel, grid, x, y, rows, columns, row_stride(x), R=r, C=c)
    return y


def gelu_backward(dy: Tensor | None, x: Tensor, needs: int) -> Tensor:
    """Gradient of x, empty if not wanted."""
    rows, columns = x.shape[0], math.prod(x.shape[1:])
    r, c = tile(rows, columns)
    dx = outputs.gelu_backward(dy, x, needs)
    if dy is None or not needs & 1:
        return dx.zero_()
    grid = (triton.cdiv(rows, r), triton.cdiv(columns, c))
    strides = (row_stride(dy), row_stride(x))
    launch(gelu_backward_kernel, grid, dy, x, dx, rows, columns, *strides, R=r, C=c)
    return dx


for _op, _fake in ((gelu_forward, outputs.gelu_forward), (gelu_backward, outputs.gelu_backward)):
    dispatch.define("gmkernels_triton", _op, _fake)
