"""Triton kernels of the noise family."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gmkernels import dispatch
from gmkernels.ops.noise import reference
from gmkernels.triton_common import DEVICES as _DEVICES
from gmkernels.triton_common import launch, normal_tile, on_device, tile, uniform_tile

DEVICES = {"normal": _DEVICES, "uniform": _DEVICES}


@triton.jit
def noise_kernel(
    out_ptr,  # [rows, columns], contiguous
    key_ptr,  # int64 [2]
    rows,
    columns,
    STREAM: tl.constexpr,
    NORMAL: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program a tile [R, C].
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    column = tl.program_id(1) * C
    if NORMAL:
        noise = normal_tile(key_ptr, row, column, STREAM, R, C)
    else:
        noise = uniform_tile(key_ptr, row, column, STREAM, R, C)
    d = column + tl.arange(0, C)[None, :]
    mask = (row < rows) & (d < columns)
    tl.store(out_ptr + row * columns + d, noise.to(out_ptr.dtype.element_ty), mask=mask)


def _draw(key: Tensor, stream: int, out: Tensor, is_normal: bool) -> Tensor:
    rows, columns = out.shape
    r, c = tile(rows, columns)
    grid = (triton.cdiv(rows, r), triton.cdiv(columns, c))
    launch(
        noise_kernel,
        grid,
        out,
        on_device(key, out.device),
        rows,
        columns,
        STREAM=stream,
        NORMAL=is_normal,
        R=r,
        C=c,
    )
    return out


def normal(
    key: Tensor, rows: int, columns: int, stream: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Standard normals [rows, columns]."""
    return _draw(key, stream, reference.draw_empty(key, rows, columns, stream, dtype, device), True)


def uniform(
    key: Tensor, rows: int, columns: int, stream: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Uniforms in (0, 1], [rows, columns]."""
    return _draw(key, stream, reference.draw_empty(key, rows, columns, stream, dtype, device), False)


for _op in (normal, uniform):
    dispatch.define("gmkernels_triton", _op, reference.draw_empty)
