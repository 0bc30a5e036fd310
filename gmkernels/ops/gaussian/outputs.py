"""What each operator of the family returns, unfilled: the fakes, and what Triton writes into."""

import torch
from torch import Tensor


def _rows(mean: Tensor) -> Tensor:
    return torch.empty(mean.shape[0], dtype=torch.float32, device=mean.device)


def wanted(needs: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """A gradient for each tensor whose bit of needs is set, an empty tensor for the others."""
    like = next(x for x in tensors if x is not None)
    return tuple(
        torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if x is not None and needs >> i & 1
        else torch.empty(0, dtype=like.dtype, device=like.device)
        for i, x in enumerate(tensors)
    )


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
    return torch.empty(mean.shape, dtype=mean.dtype, device=mean.device), _rows(mean)


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
) -> tuple[Tensor, ...]:
    """Gradients of mean, logvar, prior_mean, prior_logvar and eps, empty where not wanted."""
    return wanted(needs, mean, logvar, prior_mean, prior_logvar, eps)


def gaussian_kl_forward(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    low: float,
    high: float,
) -> Tensor:
    """kl [B]."""
    return _rows(mean)


def gaussian_kl_per_dim_forward(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    low: float,
    high: float,
) -> Tensor:
    """kl [*]."""
    return torch.empty(mean.shape[1:], dtype=torch.float32, device=mean.device)


def kl_backward(
    dkl: Tensor,
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    low: float,
    high: float,
    needs: int,
) -> tuple[Tensor, ...]:
    """Gradients of mean, logvar, prior_mean and prior_logvar, empty where not wanted."""
    return wanted(needs, mean, logvar, prior_mean, prior_logvar)
