"""What each operator of the family returns, unfilled: the fakes, and what Triton writes into."""

import torch
from torch import Tensor

from gmkernels.ops.gaussian.outputs import wanted


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
    log_det = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), log_det


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
    dx, dshift, draw_scale = wanted(needs, x, shift, raw_scale)
    return dx, dshift, draw_scale
