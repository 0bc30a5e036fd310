"""Triton launchers and operators of the coupling family; the kernels are in triton_device.py."""

import math

import torch
import triton
from torch import Tensor

from gmkernels import dispatch
from gmkernels.ops.coupling import outputs, reference
from gmkernels.ops.coupling.triton_device import backward_kernel, forward_kernel
from gmkernels.triton_common import CHUNK, launch, row_stride, tile
from gmkernels.triton_common import DEVICES as _DEVICES

DEVICES = {"affine_coupling": _DEVICES}
_ADDITIVE = reference.SCALES.index("additive")


def _is_joint(raw_scale: Tensor | None, scale: int) -> bool:
    return raw_scale is None and scale != _ADDITIVE


def _sizes(
    x: Tensor, shift: Tensor, order: Tensor | None, begin: int, joint: bool
) -> tuple[int, ...]:
    # rows, columns, part, begin, units, inner, as the kernels name them
    columns, width = math.prod(x.shape[1:]), math.prod(shift.shape[1:])
    units = columns if order is None else order.shape[1]
    inner = columns // max(units, 1)
    return x.shape[0], columns, width // 2 if joint else width, begin, units, inner


def _tile(rows: int, columns: int, part: int) -> tuple[int, int]:
    # Both parts have a tile of the usual size.
    r, c = tile(rows, max(part, columns - part))
    return r, 2 * c


def affine_coupling_forward(
    x: Tensor,
    shift: Tensor,
    raw_scale: Tensor | None,
    order: Tensor | None,
    begin: int,
    scale: int,
    clamp: float,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """The mapped row like x, and log_det [B]."""
    joint = _is_joint(raw_scale, scale)
    raw = shift if raw_scale is None else raw_scale
    sizes = _sizes(x, shift, order, begin, joint)
    rows, columns, part = sizes[:3]
    r, c = _tile(rows, columns, part)
    chunks = max(1, triton.cdiv(max(part, columns - part), CHUNK // 2))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = torch.empty((rows, chunks), dtype=torch.float32, device=x.device)
    launch(
        forward_kernel,
        (triton.cdiv(rows, r), chunks),
        x,
        shift,
        raw,
        x if order is None else order,
        y,
        sums,
        *sizes,
        *map(row_stride, (x, shift, raw)),
        part if joint else 0,
        clamp,
        1.0 / clamp,
        SCALE=scale,
        INVERSE=inverse,
        TABLE=order is not None,
        CHUNK=CHUNK,
        R=r,
        C=c,
    )
    return y, sums.view(rows) if chunks == 1 else sums.sum(1)


def affine_coupling_backward(
    dy: Tensor | None,
    dlog_det: Tensor | None,
    x: Tensor,
    shift: Tensor,
    raw_scale: Tensor | None,
    order: Tensor | None,
    begin: int,
    scale: int,
    clamp: float,
    inverse: bool,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift (of both halves where it holds both) and raw_scale."""
    dx, dshift, draw_scale = outputs.wanted(needs, x, shift, raw_scale)
    joint = _is_joint(raw_scale, scale)
    raw, draw = (shift, dshift) if raw_scale is None else (raw_scale, draw_scale)
    sizes = _sizes(x, shift, order, begin, joint)
    rows, columns, part = sizes[:3]
    r, c = _tile(rows, columns, part)
    written = (dx, dshift, dshift if joint else draw_scale)
    launch(
        backward_kernel,
        (triton.cdiv(rows, r), triton.cdiv(max(part, columns - part), c // 2)),
        x if dy is None else dy,
        x if dlog_det is None else dlog_det,
        x,
        shift,
        raw,
        x if order is None else order,
        dx,
        dshift,
        draw,
        *sizes,
        *map(row_stride, (dy, dlog_det, x, shift, raw)),
        part if joint else 0,
        2 * part if joint else part,
        clamp,
        1.0 / clamp,
        SCALE=scale,
        INVERSE=inverse,
        TABLE=order is not None,
        DY=dy is not None,
        DLOG_DET=dlog_det is not None,
        NEEDS=sum(1 << i for i, gradient in enumerate(written) if gradient.numel()),
        R=r,
        C=c,
    )
    return dx, dshift, draw_scale


for _op, _fake in (
    (affine_coupling_forward, outputs.affine_coupling_forward),
    (affine_coupling_backward, outputs.affine_coupling_backward),
):
    dispatch.define("gmkernels_triton", _op, _fake)
