"""Triton launchers and operators of the rotary family; the kernels are in triton_device.py."""

import torch
import triton
from torch import Tensor

from gmkernels import dispatch
from gmkernels.ops.rotary import outputs
from gmkernels.ops.rotary.triton_device import (
    rms_norm_backward_kernel,
    rms_norm_kernel,
    rms_norm_weight_kernel,
    rotary_kernel,
)
from gmkernels.triton_common import DEVICES as _DEVICES
from gmkernels.triton_common import launch, tile

DEVICES = dict.fromkeys(("rotary_embedding", "rms_norm"), _DEVICES)
_TRIPS = 8  # tiles of rows whose weight gradients a program sums


def _turn(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, sign: float
) -> Tensor:
    heads, tokens, width = x.shape[1:]
    places, half = cos.shape
    rows, rest = x.numel() // max(width, 1), width - 2 * half
    r, c = tile(rows, half)
    y = outputs.rotary_embedding_forward(x, cos, sin, positions, interleaved)
    launch(
        rotary_kernel,
        (triton.cdiv(rows, r),),
        x,
        cos,
        sin,
        x if positions is None else positions,
        y,
        rows,
        heads,
        tokens,
        places,
        half,
        width,
        *x.stride()[:3],
        0 if positions is None or positions.shape[0] == 1 else tokens,
        sign,
        GIVEN=positions is not None,
        INTERLEAVED=interleaved,
        C=max(c, triton.next_power_of_2(max(half, 1))),
        REST=triton.next_power_of_2(rest) if rest else 0,
        R=r,
    )
    return y


def rotary_embedding_forward(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> Tensor:
    """x rotated, contiguous."""
    return _turn(x, cos, sin, positions, interleaved, 1.0)


def rotary_embedding_backward(
    dy: Tensor | None,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    needs: int,
) -> Tensor:
    """Gradient of x, empty if not wanted."""
    if not needs & 1:
        return outputs.rotary_embedding_backward(dy, x, cos, sin, positions, interleaved, needs)
    assert dy is not None
    return _turn(dy, cos, sin, positions, interleaved, -1.0)


def rms_norm_forward(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x normalised, contiguous."""
    heads, tokens, width = x.shape[1:]
    rows = x.numel() // width
    r, c = tile(rows, width)
    y = outputs.rms_norm_forward(x, weight, eps)
    launch(
        rms_norm_kernel,
        (triton.cdiv(rows, r),),
        x,
        x if weight is None else weight,
        y,
        rows,
        heads,
        tokens,
        width,
        *x.stride()[:3],
        eps,
        WEIGHT=weight is not None,
        R=r,
        C=c,
    )
    return y


def rms_norm_backward(
    dy: Tensor | None, x: Tensor, weight: Tensor | None, eps: float, needs: int
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, empty where not wanted."""
    assert dy is not None
    heads, tokens, width = x.shape[1:]
    rows = x.numel() // width
    r, c = tile(rows, width)
    dx, dweight = outputs.rms_norm_backward(dy, x, weight, eps, needs)
    inverse_root = torch.empty(rows, dtype=torch.float32, device=x.device)
    sizes = (rows, heads, tokens, width, *dy.stride()[:3], *x.stride()[:3])
    launch(
        rms_norm_backward_kernel,
        (triton.cdiv(rows, r),),
        dy,
        x,
        x if weight is None else weight,
        dx,
        inverse_root,
        *sizes,
        eps,
        WEIGHT=weight is not None,
        DX=bool(needs & 1),
        R=r,
        C=c,
    )
    if weight is not None and needs & 2:
        groups = triton.cdiv(rows, r * _TRIPS)
        sums = torch.empty((groups, width), dtype=torch.float32, device=x.device)
        launch(
            rms_norm_weight_kernel,
            (groups, triton.cdiv(width, c)),
            dy,
            x,
            inverse_root,
            sums,
            *sizes,
            TRIPS=_TRIPS,
            R=r,
            C=c,
        )
        dweight = sums.sum(0, dtype=torch.float64).to(weight.dtype)
    return dx, dweight


for _fake in outputs.FAKES:
    dispatch.define("gmkernels_triton", globals()[_fake.__name__], _fake)
