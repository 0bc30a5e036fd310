"""Triton launchers and operators of the elementwise family; the kernels are in triton_device.py."""

import math

import torch
import triton
from torch import Tensor

from gmkernels import dispatch
from gmkernels.ops.elementwise import outputs, reference
from gmkernels.ops.elementwise.triton_device import (
    actnorm_backward_kernel,
    actnorm_kernel,
    dequantize_kernel,
    pointwise_backward_kernel,
    pointwise_kernel,
)
from gmkernels.triton_common import CHUNK, launch, on_device, row_stride, tile
from gmkernels.triton_common import DEVICES as _DEVICES

DEVICES = dict.fromkeys(("actnorm", "pointwise", "dequantize"), _DEVICES)
_LEAKY = reference.KINDS.index("leaky")
_TRIPS = 4  # tiles of rows that a program sums before it writes
_WIDTH = 256  # columns of a tile of the sums: narrow, so that there are enough programs


def _sizes(x: Tensor) -> tuple[int, int]:
    return x.shape[0], math.prod(x.shape[1:])


def actnorm_forward(
    x: Tensor, shift: Tensor, log_scale: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """The mapped row like x, and log_det [B]."""
    (rows, columns), pixels = _sizes(x), math.prod(x.shape[2:])
    r, c = tile(rows, columns)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        actnorm_kernel,
        (triton.cdiv(rows, r), triton.cdiv(columns, c)),
        x,
        shift,
        log_scale,
        y,
        rows,
        columns,
        pixels,
        row_stride(x),
        INVERSE=inverse,
        R=r,
        C=c,
    )
    sum_l = log_scale.sum(dtype=torch.float64) * (-pixels if inverse else pixels)
    return y, sum_l.to(torch.float32).repeat(rows)


def actnorm_backward(
    dy: Tensor | None,
    dlog_det: Tensor | None,
    x: Tensor,
    shift: Tensor,
    log_scale: Tensor,
    inverse: bool,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift and log_scale, empty where not wanted."""
    (rows, columns), pixels = _sizes(x), math.prod(x.shape[2:])
    dx, dshift, dlog_scale = outputs.wanted(needs, x, shift, log_scale)
    r, c = tile(rows, min(columns, _WIDTH))
    groups = triton.cdiv(rows, r * _TRIPS)
    kept = groups if needs & 6 else 0
    sums = torch.empty((2, kept, columns), dtype=torch.float32, device=x.device)
    launch(
        actnorm_backward_kernel,
        (groups, triton.cdiv(columns, c)),
        x if dy is None else dy,
        x,
        shift,
        log_scale,
        dx,
        sums,
        rows,
        columns,
        pixels,
        *map(row_stride, (dy, x)),
        INVERSE=inverse,
        DY=dy is not None,
        DX=dx.numel() > 0,
        SUMS=kept > 0,
        TRIPS=_TRIPS,
        R=r,
        C=c,
    )
    if needs & 6:
        channels = sums.view(2, kept, x.shape[1], pixels).sum((1, 3), dtype=torch.float64)
        scale = torch.exp(-log_scale.double() if inverse else log_scale.double())
        if needs & 2:
            dshift = (-channels[0] if inverse else channels[0] * scale).to(shift.dtype)
        if needs & 4:
            dl = channels[1] * scale
            if dlog_det is not None:
                dl = dl + dlog_det.sum(dtype=torch.float64) * pixels
            dlog_scale = (-dl if inverse else dl).to(log_scale.dtype)
    return dx, dshift, dlog_scale


def _constants(kind: int, parameter: float, inverse: bool) -> tuple[float, float]:
    # The parameter and m as the kernels take them.
    if kind == _LEAKY:
        return (1 / parameter if inverse else parameter), 0.0
    m = 1 - 2 * parameter
    return parameter, (1 / m if inverse else m)


def pointwise_forward(
    x: Tensor, kind: int, parameter: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """The mapped row like x, and log_det [B]."""
    rows, columns = _sizes(x)
    r, c = tile(rows, columns)
    chunks = max(1, triton.cdiv(columns, CHUNK))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = torch.empty((rows, chunks), dtype=torch.float32, device=x.device)
    sign = -1 if inverse else 1
    weight, bias = 1.0, 0.0
    if kind == _LEAKY:
        weight = sign * math.log(parameter)
    else:
        bias = sign * math.log(1 - 2 * parameter)
    launch(
        pointwise_kernel,
        (triton.cdiv(rows, r), chunks),
        x,
        y,
        sums,
        rows,
        columns,
        row_stride(x),
        *_constants(kind, parameter, inverse),
        weight,
        bias,
        KIND=kind,
        INVERSE=inverse,
        CHUNK=CHUNK,
        R=r,
        C=c,
    )
    return y, sums.view(rows) if chunks == 1 else sums.sum(1)


def pointwise_backward(
    dy: Tensor | None,
    dlog_det: Tensor | None,
    x: Tensor,
    kind: int,
    parameter: float,
    inverse: bool,
    needs: int,
) -> Tensor:
    """Gradient of x, empty if not wanted."""
    (dx,) = outputs.wanted(needs, x)
    if not dx.numel():
        return dx
    rows, columns = _sizes(x)
    r, c = tile(rows, columns)
    launch(
        pointwise_backward_kernel,
        (triton.cdiv(rows, r), triton.cdiv(columns, c)),
        x if dy is None else dy,
        x if dlog_det is None else dlog_det,
        x,
        dx,
        rows,
        columns,
        *map(row_stride, (dy, dlog_det, x)),
        *_constants(kind, parameter, inverse),
        KIND=kind,
        INVERSE=inverse,
        DY=dy is not None,
        DLOG_DET=dlog_det is not None,
        R=r,
        C=c,
    )
    return dx


def dequantize(levels: Tensor, u: Tensor | None, key: Tensor | None, bins: int) -> Tensor:
    """x like levels, float32."""
    if (u is None) == (key is None):
        raise ValueError("dequantize: give exactly one of u and key")
    rows, columns = _sizes(levels)
    r, c = tile(rows, columns)
    x = outputs.dequantize(levels, u, key, bins)
    launch(
        dequantize_kernel,
        (triton.cdiv(rows, r), triton.cdiv(columns, c)),
        levels,
        x if u is None else u,
        levels if key is None else on_device(key, levels.device),
        x,
        rows,
        columns,
        1 / bins,
        (1 + reference.MARGIN) / bins,
        (1 - reference.MARGIN) / bins,
        GIVEN=u is not None,
        R=r,
        C=c,
    )
    return x


for _fake in outputs.FAKES:
    dispatch.define("gmkernels_triton", globals()[_fake.__name__], _fake)
