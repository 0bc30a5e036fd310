"""Triton launchers and operators of the diffusion_step family; kernels are in triton_device.py."""

import math

import triton
from torch import Tensor

from gmkernels import dispatch
from gmkernels.ops.diffusion_step import outputs, reference
from gmkernels.ops.diffusion_step.triton_device import (
    DRAWN,
    DYNAMIC,
    FIXED,
    GIVEN,
    NO_NOISE,
    NOT_CLAMPED,
    step_backward_kernel,
    step_kernel,
)
from gmkernels.triton_common import DEVICES as _DEVICES
from gmkernels.triton_common import launch, on_device, row_stride, tile

DEVICES = {"sampler_step": _DEVICES}
_MAX_TRIPS = 8  # tiles a program makes: a row's key is folded once for all
_BUSY = 1024  # programs that fill a large GPU


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x


def _key_of(key: Tensor | None, like: Tensor) -> Tensor:
    return like if key is None else on_device(key, like.device)


def _noise(eps: Tensor | None, key: Tensor | None) -> int:
    if eps is not None:
        return GIVEN
    return NO_NOISE if key is None else DRAWN


def _clamp(clip: float, ratio: float) -> int:
    if clip == math.inf:
        return NOT_CLAMPED
    return DYNAMIC if ratio > 0 else FIXED


def _grid(x: Tensor, draws: bool) -> tuple[tuple[int, int], tuple[int, int, int], dict[str, int]]:
    """The grid; rows, columns and trips, of which there is one where nothing is drawn; the tile."""
    rows, columns = x.shape[0], math.prod(x.shape[1:])
    r, c = tile(rows, columns)
    down, across = triton.cdiv(rows, r), triton.cdiv(columns, c)
    trips = max(1, min(_MAX_TRIPS, down * across // _BUSY)) if draws else 1
    programs = triton.cdiv(across, trips)
    trips = triton.cdiv(across, max(1, programs))
    return (down, programs), (rows, columns, trips), {"R": r, "C": c}


def _fill_threshold(
    threshold: Tensor,
    x: Tensor,
    predicted: Tensor,
    unconditional: Tensor | None,
    table: Tensor,
    index: Tensor,
    guidance: float,
    clip: float,
    ratio: float,
) -> None:
    """Fills threshold [B] in plain PyTorch: x0 goes to memory in float32 and is sorted there."""
    wide, p = x.float(), predicted.float()
    if unconditional is not None:
        u = unconditional.float()
        p = u + guidance * (p - u)
    A, B, *_ = reference._coefficients(table, index, x)
    x0 = A * wide + B * p
    if x0.numel():
        threshold.copy_(reference.threshold_of(x0, clip, ratio))
    else:
        threshold.fill_(1.0)


def sampler_step_forward(
    x: Tensor,
    predicted: Tensor,
    unconditional: Tensor | None,
    previous: Tensor | None,
    variance: Tensor | None,
    eps: Tensor | None,
    key: Tensor | None,
    table: Tensor,
    index: Tensor,
    guidance: float,
    clip: float,
    ratio: float,
    denoised: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x' like x; x0c like x if denoised, else empty; threshold [B] if ratio > 0, else empty."""
    given = (x, predicted, unconditional, previous, variance, eps)
    x_next, x0, threshold = outputs.sampler_step_forward(
        *given, key, table, index, guidance, clip, ratio, denoised, keep
    )
    noise = _noise(eps, key)
    if ratio > 0:
        _fill_threshold(threshold, *given[:3], table, index, guidance, clip, ratio)
    grid, (rows, columns, trips), tiles = _grid(x, noise == DRAWN)
    launch(
        step_kernel,
        grid,
        *(_or(t, x) for t in given),
        _key_of(key, x),
        table,
        index,
        threshold,
        x_next,
        x0,
        rows,
        columns,
        table.shape[0],
        trips,
        *map(row_stride, (*given, table, index)),
        guidance,
        clip,
        GUIDED=unconditional is not None,
        PREVIOUS=previous is not None,
        VARIANCE=variance is not None,
        NOISE=noise,
        CLAMP=_clamp(clip, ratio),
        DENOISED=denoised,
        **tiles,
    )
    return x_next, x0, threshold


def sampler_step_backward(
    dx_next: Tensor | None,
    ddenoised: Tensor | None,
    threshold: Tensor,
    x: Tensor,
    predicted: Tensor,
    unconditional: Tensor | None,
    previous: Tensor | None,
    variance: Tensor | None,
    eps: Tensor | None,
    key: Tensor | None,
    table: Tensor,
    index: Tensor,
    guidance: float,
    clip: float,
    ratio: float,
    denoised: bool,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the six tensors from x to eps, empty where not wanted."""
    if not denoised:
        ddenoised = None  # of an output that was not asked for, and is empty
    read = (dx_next, ddenoised, x, predicted, unconditional, variance, eps)
    made = outputs.wanted(needs, x, predicted, unconditional, previous, variance, eps)
    # A wanted gradient without a tensor is empty, too, and not written.
    mask = sum(1 << i for i, gradient in enumerate(made) if gradient.numel())
    noise = _noise(eps, key) if mask & 16 and dx_next is not None else NO_NOISE
    grid, (rows, columns, trips), tiles = _grid(x, noise == DRAWN)
    launch(
        step_backward_kernel,
        grid,
        *(_or(t, x) for t in read),
        _key_of(key, x),
        table,
        index,
        threshold,
        *made,
        rows,
        columns,
        table.shape[0],
        trips,
        *map(row_stride, (*read, table, index)),
        guidance,
        clip,
        DX_NEXT=dx_next is not None,
        DDENOISED=ddenoised is not None,
        GUIDED=unconditional is not None,
        VARIANCE=variance is not None,
        NOISE=noise,
        CLAMP=_clamp(clip, ratio),
        NEEDS=mask,
        **tiles,
    )
    dx, dpredicted, dunconditional, dprevious, dvariance, deps = made
    return dx, dpredicted, dunconditional, dprevious, dvariance, deps


for _op, _fake in (
    (sampler_step_forward, outputs.sampler_step_forward),
    (sampler_step_backward, outputs.sampler_step_backward),
):
    dispatch.define("gmkernels_triton", _op, _fake)
