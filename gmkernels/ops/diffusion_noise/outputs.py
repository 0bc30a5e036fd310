"""What each operator of the family returns, unfilled: the fakes, and what Triton writes into."""

import torch
from torch import Tensor

from gmkernels.ops.gaussian.outputs import wanted


def add_noise_forward(
    x0: Tensor, eps: Tensor | None, key: Tensor | None, table: Tensor, t: Tensor | None
) -> Tensor:
    """x_t like x0."""
    return torch.empty(x0.shape, dtype=x0.dtype, device=x0.device)


def add_noise_backward(
    dx_t: Tensor,
    x0: Tensor,
    eps: Tensor | None,
    key: Tensor | None,
    table: Tensor,
    t: Tensor | None,
    needs: int,
) -> tuple[Tensor, ...]:
    """Gradients of x0 and eps, empty where not wanted."""
    return wanted(needs, x0, eps)


def add_noise_with_target_forward(
    x0: Tensor,
    eps: Tensor | None,
    key: Tensor | None,
    table: Tensor,
    t: Tensor | None,
    prediction: int,
) -> tuple[Tensor, Tensor]:
    """x_t and target like x0."""
    empty = torch.empty(x0.shape, dtype=x0.dtype, device=x0.device)
    return empty, torch.empty_like(empty)


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
) -> tuple[Tensor, ...]:
    """Gradients of x0 and eps, empty where not wanted."""
    return wanted(needs, x0, eps)


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
    loss = torch.empty(predicted.shape[0], dtype=torch.float32, device=predicted.device)
    return loss, wanted(int(keep), predicted)[0]


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
) -> tuple[Tensor, ...]:
    """Gradients of predicted, x0 and eps, empty where not wanted."""
    return wanted(needs, predicted, x0, eps)
