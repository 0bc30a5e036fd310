"""What each operator of the family returns, unfilled: the fakes, and what Triton writes into."""

import torch
from torch import Tensor

from gmkernels.ops.gaussian.outputs import wanted
from gmkernels.ops.likelihood.outputs import rows_of


def actnorm_forward(
    x: Tensor, shift: Tensor, log_scale: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """The mapped row like x, and log_det [B]."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), rows_of(x)


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
    dx, dshift, dlog_scale = wanted(needs, x, shift, log_scale)
    return dx, dshift, dlog_scale


def pointwise_forward(
    x: Tensor, kind: int, parameter: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """The mapped row like x, and log_det [B]."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), rows_of(x)


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
    return wanted(needs, x)[0]


def dequantize(levels: Tensor, u: Tensor | None, key: Tensor | None, bins: int) -> Tensor:
    """x like levels, float32."""
    return torch.empty(levels.shape, dtype=torch.float32, device=levels.device)


FAKES = (
    actnorm_forward,
    actnorm_backward,
    pointwise_forward,
    pointwise_backward,
    dequantize,
)
