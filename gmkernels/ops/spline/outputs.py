"""What each operator of the family returns, unfilled: the fakes, and what Triton writes into."""

import torch
from torch import Tensor

from gmkernels.ops.gaussian.outputs import wanted


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
    log_det = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), log_det


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
    dx, dwidths, dheights, dderivatives = wanted(needs, x, widths, heights, derivatives)
    return dx, dwidths, dheights, dderivatives
