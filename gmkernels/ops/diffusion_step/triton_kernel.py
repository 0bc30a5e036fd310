"""Triton launchers and operators of the diffusion_step family; kernels are in triton_device.py."""

import math

import triton
from torch import Tensor

from gmkernels import dispatch
from gmkernels.ops.diffusion_step import outputs
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
from gmkernels.triton_common import MAX_TILE, launch, on_device, row_stride, tile

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


def _grid_of_rows(x: Tensor) -> tuple[tuple[int, int], tuple[int, int, int], dict[str, int]]:
    """As _grid(), a program a row; up to 4096 elements in a tile, 8 in each thread."""
    rows, columns = x.shape[0], math.prod(x.shape[1:])
    c = min(4 * MAX_TILE, max(4, triton.next_power_of_2(columns)))
    trips = triton.cdiv(columns, c)
    tiles = {"R": 1, "C": c, "num_warps": max(1, c // 256)}
    return (rows, min(trips, 1)), (rows, columns, trips), tiles


def _rank(columns: int, ratio: float) -> tuple[int, float]:
    """The quantile's place: among how many largest of a row, and how far to the next larger."""
    place = ratio * (columns - 1)
    return columns - math.floor(place), place - math.floor(place)


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
    noise, clamped = _noise(eps, key), _clamp(clip, ratio)
    if clamped == DYNAMIC:
        grid, (rows, columns, trips), tiles = _grid_of_rows(x)
        if columns == 0:
            threshold.fill_(1.0)
    else:
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
        *_rank(columns, ratio),
        GUIDED=unconditional is not None,
        PREVIOUS=previous is not None,
        VARIANCE=variance is not None,
        NOISE=noise,
        CLAMP=clamped,
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
