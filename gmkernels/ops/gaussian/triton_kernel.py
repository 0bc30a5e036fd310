"""Triton launchers and operators of the gaussian family; the kernels are in triton_device.py."""

import math

import torch
import triton
from torch import Tensor

from gmkernels import dispatch
from gmkernels.ops.gaussian import outputs
from gmkernels.ops.gaussian.triton_device import backward_kernel, forward_kernel, per_dim_kernel
from gmkernels.triton_common import (
    CHUNK,
    launch,
    on_device,
    row_stride,
    tile,
)
from gmkernels.triton_common import DEVICES as _DEVICES

DEVICES = dict.fromkeys(("reparameterize_kl", "gaussian_kl", "gaussian_kl_per_dim"), _DEVICES)
_SLAB = 1024  # rows a program of the per-dimension sums reads


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x


def _launch_forward(
    z: Tensor | None,
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    eps: Tensor | None,
    key: Tensor | None,
    low: float,
    high: float,
) -> Tensor:
    rows, columns = mean.shape[0], math.prod(mean.shape[1:])
    r, c = tile(rows, columns)
    chunks = max(1, triton.cdiv(columns, CHUNK))
    sums = torch.empty((rows, chunks), dtype=torch.float32, device=mean.device)
    operands = (mean, logvar, prior_mean, prior_logvar, eps)
    launch(
        forward_kernel,
        (triton.cdiv(rows, r), chunks),
        *(_or(x, mean) for x in operands),
        mean if key is None else on_device(key, mean.device),
        _or(z, mean),
        sums,
        rows,
        columns,
        *map(row_stride, operands),
        low,
        high,
        PRIOR_MEAN=prior_mean is not None,
        PRIOR_LOGVAR=prior_logvar is not None,
        EPS=eps is not None,
        SAMPLE=z is not None,
        CHUNK=CHUNK,
        R=r,
        C=c,
    )
    return sums.view(rows) if chunks == 1 else sums.sum(1)


def reparameterize_kl_forward(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    eps: Tensor | None,
    key: Tensor | None,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    """z like mean, kl [B]."""
    z = torch.empty(mean.shape, dtype=mean.dtype, device=mean.device)
    return z, _launch_forward(z, mean, logvar, prior_mean, prior_logvar, eps, key, low, high)


def gaussian_kl_forward(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    low: float,
    high: float,
) -> Tensor:
    """kl [B]."""
    return _launch_forward(None, mean, logvar, prior_mean, prior_logvar, None, None, low, high)


def gaussian_kl_per_dim_forward(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    low: float,
    high: float,
) -> Tensor:
    """kl [*], means over the batch."""
    rows, columns = mean.shape[0], math.prod(mean.shape[1:])
    slabs = max(1, triton.cdiv(rows, _SLAB))
    sums = torch.empty((slabs, columns), dtype=torch.float32, device=mean.device)
    operands = (mean, logvar, prior_mean, prior_logvar)
    launch(
        per_dim_kernel,
        (triton.cdiv(columns, 128), slabs),
        *(_or(x, mean) for x in operands),
        sums,
        rows,
        columns,
        *map(row_stride, operands),
        low,
        high,
        PRIOR_MEAN=prior_mean is not None,
        PRIOR_LOGVAR=prior_logvar is not None,
        SLAB=_SLAB,
        R=8,
        C=128,
    )
    return (sums.sum(0) / rows).view(mean.shape[1:])


def _launch_backward(
    dz: Tensor | None,
    dkl: Tensor | None,
    per_row: bool,
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    eps: Tensor | None,
    key: Tensor | None,
    low: float,
    high: float,
    needs: int,
) -> tuple[Tensor, ...]:
    made = outputs.wanted(needs, mean, logvar, prior_mean, prior_logvar, eps)
    needs = sum(1 << i for i, gradient in enumerate(made) if gradient.numel())
    rows, columns = mean.shape[0], math.prod(mean.shape[1:])
    r, c = tile(rows, columns)
    operands = (mean, logvar, prior_mean, prior_logvar, eps)
    launch(
        backward_kernel,
        (triton.cdiv(rows, r), triton.cdiv(columns, c)),
        _or(dz, mean),
        _or(dkl, mean),
        *(_or(x, mean) for x in operands),
        mean if key is None else on_device(key, mean.device),
        *made,
        rows,
        columns,
        row_stride(dz),
        row_stride(dkl) if per_row else 0,
        0 if per_row else 1,
        *map(row_stride, operands),
        low,
        high,
        1.0 if per_row else 1.0 / max(rows, 1),
        DZ=dz is not None,
        DKL=dkl is not None,
        PRIOR_MEAN=prior_mean is not None,
        PRIOR_LOGVAR=prior_logvar is not None,
        EPS=eps is not None,
        NEEDS=needs,
        R=r,
        C=c,
    )
    return made


def reparameterize_kl_backward(
    dz: Tensor | None,
    dkl: Tensor | None,
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    eps: Tensor | None,
    key: Tensor | None,
    low: float,
    high: float,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of mean, logvar, prior_mean, prior_logvar and eps, empty where not wanted."""
    a = (mean, logvar, prior_mean, prior_logvar)
    dm, dl, dpm, dpl, deps = _launch_backward(dz, dkl, True, *a, eps, key, low, high, needs)
    return dm, dl, dpm, dpl, deps


def gaussian_kl_backward(
    dkl: Tensor,
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    low: float,
    high: float,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of mean, logvar, prior_mean and prior_logvar, empty where not wanted."""
    a = (mean, logvar, prior_mean, prior_logvar)
    dm, dl, dpm, dpl, _ = _launch_backward(None, dkl, True, *a, None, None, low, high, needs)
    return dm, dl, dpm, dpl


def gaussian_kl_per_dim_backward(
    dkl: Tensor,
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    low: float,
    high: float,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of mean, logvar, prior_mean and prior_logvar, empty where not wanted."""
    a = (mean, logvar, prior_mean, prior_logvar)
    dm, dl, dpm, dpl, _ = _launch_backward(
        None, dkl.contiguous(), False, *a, None, None, low, high, needs
    )
    return dm, dl, dpm, dpl


for _op, _fake in (
    (reparameterize_kl_forward, outputs.reparameterize_kl_forward),
    (reparameterize_kl_backward, outputs.reparameterize_kl_backward),
    (gaussian_kl_forward, outputs.gaussian_kl_forward),
    (gaussian_kl_backward, outputs.kl_backward),
    (gaussian_kl_per_dim_forward, outputs.gaussian_kl_per_dim_forward),
    (gaussian_kl_per_dim_backward, outputs.kl_backward),
):
    dispatch.define("gmkernels_triton", _op, _fake)
