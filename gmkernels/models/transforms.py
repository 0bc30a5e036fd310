"""Transforms of normalizing flows that need no network, and what every transform is.

ActNorm          z = (x + shift) exp(log_scale) by channel           Kingma and Dhariwal 2018
Leaky, Logit     elementwise                                         see ops/elementwise
Permutation      z[:, j] = x[:, order[j]]
LUAffine         x = A z + b, A = P L U, so z = A^-1 (x - b)
Invertible1x1    z = W x at each pixel, W = P L U                    Kingma and Dhariwal 2018
Squeeze          [B, C, H, W] -> [B, 4 C, H / 2, W / 2]              Dinh et al. 2017
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmkernels.ops.elementwise import (
    actnorm,
    actnorm_inverse,
    actnorm_statistics,
    leaky,
    leaky_inverse,
    logit,
    logit_inverse,
)


class Transform(nn.Module):
    """An invertible map of rows [B, *], conditional on c [B, K] where it holds a network.

    Both verbs return the image and log|det| of the Jacobian of the map asked for, [B] nats.
    """

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to noise, the direction of training."""
        raise NotImplementedError

    def inverse(self, z: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise to data."""
        raise NotImplementedError


class Inverse(Transform):
    """A transform with its directions exchanged: of a masked one, IAF (Kingma et al. 2016)."""

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse(x, c)

    def inverse(self, z: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform(z, c)


class ActNorm(Transform):
    """A scale and a shift by channel of [B, C, *], set on the first training batch.

    That batch leaves with mean 0 and deviation 1 in each channel; from then on both are learned.
    Whether it has come is part of the state dict. Before, the map is the identity.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.initialised = False

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training and not self.initialised:
            with torch.no_grad():
                shift, log_scale = actnorm_statistics(x)
                self.shift.copy_(shift)
                self.log_scale.copy_(log_scale)
            self.initialised = True
        return actnorm(x, self.shift, self.log_scale)

    def inverse(self, z: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return actnorm_inverse(z, self.shift, self.log_scale)

    # A flag on the device would be waited for at each step.
    def get_extra_state(self) -> Tensor:
        """The flag, as a state dict holds it."""
        return torch.tensor(self.initialised)

    def set_extra_state(self, state: Tensor) -> None:
        """Reads the flag."""
        self.initialised = bool(state)


class Leaky(Transform):
    """x, and slope x below 0; slope > 0."""

    def __init__(self, slope: float = 0.01) -> None:
        super().__init__()
        if not 0 < slope < math.inf:
            raise ValueError(f"Leaky: slope must be positive and finite, got {slope}")
        self.slope = slope

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return leaky(x, slope=self.slope)

    def inverse(self, z: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return leaky_inverse(z, slope=self.slope)


class Logit(Transform):
    """logit(alpha + (1 - 2 alpha) x) of x in [0, 1]; alpha in [0, 1/2)."""

    def __init__(self, alpha: float = 0.05) -> None:
        super().__init__()
        if not 0 <= alpha < 0.5:
            raise ValueError(f"Logit: alpha must lie in [0, 0.5), got {alpha}")
        self.alpha = alpha

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return logit(x, alpha=self.alpha)

    def inverse(self, z: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return logit_inverse(z, alpha=self.alpha)


class Permutation(Transform):
    """z[:, j] = x[:, order[j]]; order holds each of 0, ..., C - 1 once, reversed unless given."""

    order: Tensor

    def __init__(self, channels: int, order: Sequence[int] | Tensor | None = None) -> None:
        super().__init__()
        made = torch.arange(channels).flip(0) if order is None else torch.as_tensor(order)
        if not torch.equal(made.sort().values, torch.arange(channels)):
            raise ValueError(f"Permutation: order must hold each of 0..{channels - 1} once")
        self.register_buffer("order", made)

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.index_select(1, self.order), x.new_zeros(len(x))

    def inverse(self, z: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z.index_select(1, self.order.argsort()), z.new_zeros(len(z))


class Squeeze(Transform):
    """2 x 2 pixels become channels; height and width even."""

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return F.pixel_unshuffle(x, 2), x.new_zeros(len(x))

    def inverse(self, z: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return F.pixel_shuffle(z, 2), z.new_zeros(len(z))


class _PLU(Transform):
    """The matrix P L (U + diag(s)), a random rotation at first; P and the signs of s stay."""

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels)).Q
        p, lower, upper = torch.linalg.lu(rotation)
        self.lower, self.upper = nn.Parameter(lower.tril(-1)), nn.Parameter(upper.triu(1))
        self.log_scale = nn.Parameter(upper.diagonal().abs().log())
        self.register_buffer("sign", upper.diagonal().sign())
        self.register_buffer("permutation", p)

    def matrix(self) -> Tensor:
        """P L (U + diag(s)), [C, C]."""
        return self.permutation @ self._lower() @ self._upper()

    def inverse_matrix(self) -> Tensor:
        """Its inverse, by two triangular systems."""
        solve = torch.linalg.solve_triangular
        rows = solve(self._lower(), self.permutation.mT, upper=False, unitriangular=True)
        return solve(self._upper(), rows, upper=True)

    def log_det(self, x: Tensor) -> Tensor:
        """log|det| of the matrix at each pixel of x [B, C, *], [B]."""
        return (self.log_scale.sum() * math.prod(x.shape[2:])).expand(len(x))

    def _lower(self) -> Tensor:
        return self.lower.tril(-1) + torch.eye(len(self.lower)).to(self.lower)

    def _upper(self) -> Tensor:
        return self.upper.triu(1) + torch.diag(self.sign * self.log_scale.exp())


def _apply(matrix: Tensor, x: Tensor) -> Tensor:
    """The matrix on dimension 1 of x [B, C, *]."""
    return x @ matrix.mT if x.dim() == 2 else (matrix @ x.flatten(2)).view(x.shape)


class LUAffine(_PLU):
    """x = A z + b along dimension 1 of [B, C, *], so that z = A^-1 (x - b)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        bias = self.bias.view(-1, *(1,) * (x.dim() - 2))
        return _apply(self.inverse_matrix(), x - bias), -self.log_det(x)

    def inverse(self, z: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        bias = self.bias.view(-1, *(1,) * (z.dim() - 2))
        return _apply(self.matrix(), z) + bias, self.log_det(z)


class Invertible1x1(_PLU):
    """z = W x along dimension 1 of [B, C, *]: Glow's 1 x 1 convolution."""

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _apply(self.matrix(), x), self.log_det(x)

    def inverse(self, z: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _apply(self.inverse_matrix(), z), -self.log_det(z)
