"""Triton launchers and operators of the spline family; the kernels are in triton_device.py."""

import math

import torch
import triton
from torch import Tensor

from gmkernels import dispatch
from gmkernels.ops.spline import outputs
from gmkernels.ops.spline.triton_device import backward_kernel, forward_kernel
from gmkernels.triton_common import DEVICES as _DEVICES
from gmkernels.triton_common import INTERPRETED, MAX_TILE, launch, row_stride

DEVICES = {"spline_map": _DEVICES}
# Elements a program holds at a time, one a thread; the interpreter takes as long for any number.
_ELEMENTS = MAX_TILE if INTERPRETED else 128
_CHUNK = 1024  # columns of a part that one program takes


def _tiles(rows: int, part: int, rest: int) -> dict[str, int]:
    # Tiles [R, C] of what is transformed, [R, P] of what passes. C is the widest that leaves up to
    # an eighth of the lanes idle, or the fewest; rows have no say in it, for it orders the sums.
    least = min(8, triton.next_power_of_2(max(part, 1)))
    halved = [_ELEMENTS >> i for i in range(_ELEMENTS.bit_length())]
    padded = {c: triton.cdiv(part, c) * c for c in halved if c >= least}
    few = max(1.125 * part, min(padded.values()))
    c = next(c for c, lanes in padded.items() if lanes <= few)
    r = min(_ELEMENTS // c, triton.next_power_of_2(max(rows, 1)))
    share = triton.cdiv(rest, max(1, triton.cdiv(part, c)))
    return {"R": r, "C": c, "P": min(MAX_TILE // r, triton.next_power_of_2(max(share, 1)))}


def _sizes(
    x: Tensor, widths: Tensor, order: Tensor | None, begin: int, step: int
) -> tuple[int, ...]:
    # rows, columns, part, begin, units, inner, as the kernels name them
    columns, part = math.prod(x.shape[1:]), math.prod(widths.shape[1:]) // step
    units = columns if order is None else order.shape[1]
    return x.shape[0], columns, part, begin, units, columns // max(units, 1)


def _numbers(
    bins: int, bound: float, min_width: float, min_height: float, min_derivative: float
) -> tuple[float, ...]:
    # bound, the least and the shared size of a bin on each axis, and the slopes
    raw_end = math.log(math.expm1(1 - min_derivative))
    rest_width, rest_height = 1 - bins * min_width, 1 - bins * min_height
    return bound, min_width, rest_width, min_height, rest_height, min_derivative, raw_end


def spline_map_forward(
    x: Tensor,
    widths: Tensor,
    heights: Tensor | None,
    derivatives: Tensor | None,
    order: Tensor | None,
    begin: int,
    bins: int,
    bound: float,
    min_width: float,
    min_height: float,
    min_derivative: float,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """The mapped row like x, and log_det [B]."""
    raw = [widths if p is None else p for p in (widths, heights, derivatives)]
    joint = heights is None
    sizes = _sizes(x, widths, order, begin, 3 * bins - 1 if joint else bins)
    rows, columns, part = sizes[:3]
    tiles = _tiles(rows, part, columns - part)
    chunks = max(1, triton.cdiv(part, _CHUNK))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = torch.empty((rows, chunks), dtype=torch.float32, device=x.device)
    launch(
        forward_kernel,
        (triton.cdiv(rows, tiles["R"]), chunks),
        x,
        *raw,
        x if order is None else order,
        y,
        sums,
        *sizes,
        *map(row_stride, (x, *raw)),
        *_numbers(bins, bound, min_width, min_height, min_derivative),
        K=bins,
        N=triton.next_power_of_2(bins),
        JOINT=joint,
        INVERSE=inverse,
        TABLE=order is not None,
        CHUNK=_CHUNK,
        **tiles,
    )
    return y, sums.view(rows) if chunks == 1 else sums.sum(1)


def spline_map_backward(
    dy: Tensor | None,
    dlog_det: Tensor | None,
    x: Tensor,
    widths: Tensor,
    heights: Tensor | None,
    derivatives: Tensor | None,
    order: Tensor | None,
    begin: int,
    bins: int,
    bound: float,
    min_width: float,
    min_height: float,
    min_derivative: float,
    inverse: bool,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, widths (of all parameters where it holds all), heights and derivatives."""
    found = outputs.wanted(needs, x, widths, heights, derivatives)
    raw = [widths if p is None else p for p in (widths, heights, derivatives)]
    joint = heights is None
    written = [found[0], *(found[1:] if not joint else 3 * found[1:2])]
    sizes = _sizes(x, widths, order, begin, 3 * bins - 1 if joint else bins)
    rows, columns, part = sizes[:3]
    tiles = _tiles(rows, part, columns - part)
    across = max(triton.cdiv(part, tiles["C"]), triton.cdiv(columns - part, tiles["P"]))
    launch(
        backward_kernel,
        (triton.cdiv(rows, tiles["R"]), across),
        x if dy is None else dy,
        x if dlog_det is None else dlog_det,
        x,
        *raw,
        x if order is None else order,
        *written,
        *sizes,
        *map(row_stride, (dy, dlog_det, x, *raw)),
        *_numbers(bins, bound, min_width, min_height, min_derivative),
        K=bins,
        N=triton.next_power_of_2(bins),
        JOINT=joint,
        INVERSE=inverse,
        TABLE=order is not None,
        DY=dy is not None,
        DLOG_DET=dlog_det is not None,
        NEEDS=sum(1 << i for i, gradient in enumerate(written) if gradient.numel()),
        **tiles,
    )
    return found[0], found[1], found[2], found[3]


for _op, _fake in (
    (spline_map_forward, outputs.spline_map_forward),
    (spline_map_backward, outputs.spline_map_backward),
):
    dispatch.define("gmkernels_triton", _op, _fake)
