"""What each operator of the family returns, unfilled: the fakes, and what Triton writes into."""

import torch
from torch import Tensor

from gmkernels.ops.gaussian.outputs import wanted


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def rotary_embedding_forward(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> Tensor:
    """x rotated, contiguous."""
    return _like(x)


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
    return wanted(needs, x)[0]


def rms_norm_forward(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x normalised, contiguous."""
    return _like(x)


def rms_norm_backward(
    dy: Tensor | None, x: Tensor, weight: Tensor | None, eps: float, needs: int
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, empty where not wanted."""
    dx, dweight = wanted(needs, x, weight)
    return dx, dweight


FAKES = (
    rotary_embedding_forward,
    rotary_embedding_backward,
    rms_norm_forward,
    rms_norm_backward,
)
