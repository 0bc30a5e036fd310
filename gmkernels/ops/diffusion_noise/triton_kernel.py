"""Triton launchers and operators of the diffusion_noise family; kernels are in triton_device.py."""

import math

import torch
import triton
from torch import Tensor

from gmkernels import dispatch
from gmkernels.ops.diffusion_noise import outputs
from gmkernels.ops.diffusion_noise.triton_device import (
    NO_TARGET,
    loss_backward_kernel,
    loss_kernel,
    noise_backward_kernel,
    noise_kernel,
)
from gmkernels.triton_common import CHUNK, launch, on_device, row_stride, tile
from gmkernels.triton_common import DEVICES as _DEVICES

DEVICES = dict.fromkeys(("add_noise", "add_noise_with_target", "denoising_loss"), _DEVICES)


def _shape(x: Tensor) -> tuple[int, int]:
    return x.shape[0], math.prod(x.shape[1:])


def _key_of(key: Tensor | None, like: Tensor) -> Tensor:
    return like if key is None else on_device(key, like.device)


def _mask(made: tuple[Tensor, ...]) -> int:
    # A wanted gradient without a tensor is empty, too, and not written.
    return sum(1 << i for i, gradient in enumerate(made) if gradient.numel())


def _launch_noise(
    x_t: Tensor,
    target: Tensor | None,
    x0: Tensor,
    eps: Tensor | None,
    key: Tensor | None,
    table: Tensor,
    t: Tensor | None,
    prediction: int,
) -> None:
    rows, columns = _shape(x0)
    r, c = tile(rows, columns)
    launch(
        noise_kernel,
        (triton.cdiv(rows, r), triton.cdiv(columns, c)),
        x0,
        x0 if eps is None else eps,
        _key_of(key, x0),
        table,
        table if t is None else t,
        x_t,
        x_t if target is None else target,
        rows,
        columns,
        table.shape[0],
        *map(row_stride, (x0, eps, table, t)),
        EPS=eps is not None,
        TIMES=t is not None,
        PREDICTION=prediction,
        R=r,
        C=c,
    )


def add_noise_forward(
    x0: Tensor, eps: Tensor | None, key: Tensor | None, table: Tensor, t: Tensor | None
) -> Tensor:
    """x_t like x0."""
    x_t = outputs.add_noise_forward(x0, eps, key, table, t)
    _launch_noise(x_t, None, x0, eps, key, table, t, NO_TARGET)
    return x_t


def add_noise_with_target_forward(
    x0: Tensor,
    eps: Tensor | None,
    key: Tensor | None,
    table: Tensor,
    t: Tensor | None,
    prediction: int,
) -> tuple[Tensor, Tensor]:
    """x_t and target like x0."""
    x_t, target = outputs.add_noise_with_target_forward(x0, eps, key, table, t, prediction)
    _launch_noise(x_t, target, x0, eps, key, table, t, prediction)
    return x_t, target


def _launch_noise_backward(
    dx_t: Tensor | None,
    dtarget: Tensor | None,
    x0: Tensor,
    eps: Tensor | None,
    table: Tensor,
    t: Tensor | None,
    prediction: int,
    needs: int,
) -> tuple[Tensor, Tensor]:
    dx0, deps = outputs.wanted(needs, x0, eps)
    rows, columns = _shape(x0)
    r, c = tile(rows, columns)
    launch(
        noise_backward_kernel,
        (triton.cdiv(rows, r), triton.cdiv(columns, c)),
        x0 if dx_t is None else dx_t,
        x0 if dtarget is None else dtarget,
        table,
        table if t is None else t,
        dx0,
        deps,
        rows,
        columns,
        table.shape[0],
        *map(row_stride, (dx_t, dtarget, table, t)),
        DX_T=dx_t is not None,
        TIMES=t is not None,
        PREDICTION=NO_TARGET if dtarget is None else prediction,
        NEEDS=_mask((dx0, deps)),
        R=r,
        C=c,
    )
    return dx0, deps


def add_noise_backward(
    dx_t: Tensor,
    x0: Tensor,
    eps: Tensor | None,
    key: Tensor | None,
    table: Tensor,
    t: Tensor | None,
    needs: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of x0 and eps, empty where not wanted."""
    return _launch_noise_backward(dx_t, None, x0, eps, table, t, NO_TARGET, needs)


def add_noise_with_target_backward(
    dx_t: Tensor | None,
    dtarget: Tensor | None,
    x0: Tensor,
    eps: Tensor | None,
    key: Tensor | None,
    table: Tensor,
    t: Tensor | None,
    prediction: int,
    needs: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of x0 and eps, empty where not wanted."""
    return _launch_noise_backward(dx_t, dtarget, x0, eps, table, t, prediction, needs)


def denoising_loss_forward(
    predicted: Tensor,
    x0: Tensor,
    eps: Tensor | None,
    key: Tensor | None,
    table: Tensor,
    t: Tensor | None,
    prediction: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """loss [B] float32; the residual like predicted, empty unless it is to be kept."""
    rows, columns = _shape(predicted)
    r, c = tile(rows, columns)
    chunks = max(1, triton.cdiv(columns, CHUNK))
    sums = torch.empty((rows, chunks), dtype=torch.float32, device=predicted.device)
    (residual,) = outputs.wanted(int(keep), predicted)
    launch(
        loss_kernel,
        (triton.cdiv(rows, r), chunks),
        predicted,
        x0,
        predicted if eps is None else eps,
        _key_of(key, predicted),
        table,
        table if t is None else t,
        residual,
        sums,
        rows,
        columns,
        table.shape[0],
        *map(row_stride, (predicted, x0, eps, table, t)),
        1.0 / columns if columns else math.nan,
        EPS=eps is not None,
        TIMES=t is not None,
        PREDICTION=prediction,
        KEEP=keep,
        CHUNK=CHUNK,
        R=r,
        C=c,
    )
    return sums.view(rows) if chunks == 1 else sums.sum(1), residual


def denoising_loss_backward(
    dloss: Tensor,
    residual: Tensor,
    predicted: Tensor,
    x0: Tensor,
    eps: Tensor | None,
    key: Tensor | None,
    table: Tensor,
    t: Tensor | None,
    prediction: int,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of predicted, x0 and eps, empty where not wanted."""
    assert residual.numel() == predicted.numel(), "denoising_loss: forward kept no residual"
    dpredicted, dx0, deps = outputs.wanted(needs, predicted, x0, eps)
    rows, columns = _shape(predicted)
    r, c = tile(rows, columns)
    launch(
        loss_backward_kernel,
        (triton.cdiv(rows, r), triton.cdiv(columns, c)),
        dloss,
        residual,
        table,
        table if t is None else t,
        dpredicted,
        dx0,
        deps,
        rows,
        columns,
        table.shape[0],
        *map(row_stride, (dloss, residual, table, t)),
        2.0 / max(columns, 1),
        TIMES=t is not None,
        PREDICTION=prediction,
        NEEDS=_mask((dpredicted, dx0, deps)),
        R=r,
        C=c,
    )
    return dpredicted, dx0, deps


for _op, _fake in (
    (add_noise_forward, outputs.add_noise_forward),
    (add_noise_backward, outputs.add_noise_backward),
    (add_noise_with_target_forward, outputs.add_noise_with_target_forward),
    (add_noise_with_target_backward, outputs.add_noise_with_target_backward),
    (denoising_loss_forward, outputs.denoising_loss_forward),
    (denoising_loss_backward, outputs.denoising_loss_backward),
):
    dispatch.define("gmkernels_triton", _op, _fake)
