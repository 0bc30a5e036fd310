"""Triton kernels of the noise family."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gmkernels import dispatch
from gmkernels.ops.noise import reference
from gmkernels.triton_common import DEVICES as _DEVICES
from gmkernels.triton_common import launch, load_key, normals, on_device, tile, uniforms

DEVICES = {"normal": _DEVICES, "uniform": _DEVICES}
_MAX_TRIPS = 8  # tiles a program makes: the key's schedule is worked out once for all
_BUSY = 1024  # programs that fill a large GPU


@triton.jit
def noise_kernel(
    out_ptr,  # [rows, columns], contiguous
    key_ptr,  # int64 [2]
    rows,
    columns,
    trips,
    STREAM: tl.constexpr,
    NORMAL: tl.constexpr,
    DOWN: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program `trips` tiles [R, C]: down the rows if DOWN, else along the columns.
    key = load_key(key_ptr)
    first = tl.program_id(0).to(tl.int64) * R * (trips if DOWN else 1)
    column = tl.program_id(1) * C * (1 if DOWN else trips)
    lane = tl.arange(0, C)[None, :]
    for _ in range(trips):
        row = (first + tl.arange(0, R))[:, None]
        if NORMAL:
            noise = normals(key, row, column, STREAM, R, C)
        else:
            noise = uniforms(key, row, column, STREAM, R, C)
        mask = (row < rows) & (lane < columns - column)
        out = out_ptr + row * columns + (column + lane)
        tl.store(out, noise.to(out_ptr.dtype.element_ty), mask=mask)
        if DOWN:
            first += R
        else:
            column += C


def _draw(key: Tensor, stream: int, out: Tensor, is_normal: bool) -> Tensor:
    rows, columns = out.shape
    r, c = tile(rows, columns if rows < 4 else min(columns, 256))  # 256: 3 % fewer instructions
    tiles = (triton.cdiv(rows, r), triton.cdiv(columns, c))
    down = tiles[1] == 1
    trips = max(1, min(_MAX_TRIPS, tiles[0] * tiles[1] // _BUSY))
    grid = (triton.cdiv(tiles[0], trips), 1) if down else (tiles[0], triton.cdiv(tiles[1], trips))
    launch(
        noise_kernel,
        grid,
        out,
        on_device(key, out.device),
        rows,
        columns,
        trips,
        STREAM=stream,
        NORMAL=is_normal,
        DOWN=down,
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
    return _draw(
        key, stream, reference.draw_empty(key, rows, columns, stream, dtype, device), False
    )


for _op in (normal, uniform):
    dispatch.define("gmkernels_triton", _op, reference.draw_empty)
