"""What each operator of the family returns, unfilled: the fakes, and what Triton writes into."""

import torch
from torch import Tensor

from gmkernels.ops.gaussian.outputs import wanted


def rows_of(x: Tensor) -> Tensor:
    """[B] float32."""
    return torch.empty(x.shape[0], dtype=torch.float32, device=x.device)


def gaussian_nll_forward(x: Tensor, mean: Tensor, logvar: Tensor | None) -> Tensor:
    """nll [B]."""
    return rows_of(x)


def gaussian_nll_backward(
    dnll: Tensor, x: Tensor, mean: Tensor, logvar: Tensor | None, needs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, mean and logvar, empty where not wanted."""
    dx, dmean, dlogvar = wanted(needs, x, mean, logvar)
    return dx, dmean, dlogvar


def bernoulli_nll_forward(x: Tensor, logits: Tensor) -> Tensor:
    """nll [B]."""
    return rows_of(x)


def bernoulli_nll_backward(
    dnll: Tensor, x: Tensor, logits: Tensor, needs: int
) -> tuple[Tensor, Tensor]:
    """Gradients of x and logits, empty where not wanted."""
    dx, dlogits = wanted(needs, x, logits)
    return dx, dlogits


def categorical_nll_forward(logits: Tensor, levels: Tensor) -> Tensor:
    """nll [B]."""
    return rows_of(logits)


def categorical_nll_backward(dnll: Tensor, logits: Tensor, levels: Tensor, needs: int) -> Tensor:
    """Gradient of logits, empty if not wanted."""
    return wanted(needs, logits)[0]


FAKES = (
    gaussian_nll_forward,
    gaussian_nll_backward,
    bernoulli_nll_forward,
    bernoulli_nll_backward,
    categorical_nll_forward,
    categorical_nll_backward,
)
