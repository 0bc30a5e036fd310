"""What each operator of the family returns, unfilled: the fakes, and what Triton writes into."""

import torch
from torch import Tensor

from gmkernels.ops.gaussian.outputs import wanted


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
    x_next = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x.shape[0] if ratio > 0 else 0
    threshold = torch.empty(rows, dtype=torch.float32, device=x.device)
    return x_next, wanted(int(denoised), x)[0], threshold


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
) -> tuple[Tensor, ...]:
    """Gradients of the six tensors from x to eps, empty where not wanted."""
    return wanted(needs, x, predicted, unconditional, previous, variance, eps)
