"""Networks of GANs: DCGAN's for pictures (Radford et al. 2016, 1511.06434), MLPs for points.

A generator maps (z [B, Z], label=) to [B, *shape], a critic (x [B, *shape], label=) to scores [B].
A class enters a generator as an embedding beside z (Mirza and Osindero 2014, 1411.1784), a critic
as a projection, score = w^T h(x) + e(label)^T h(x) (Miyato and Koyama 2018, 1802.05637).
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn


class _Generator(nn.Module):
    """z beside the embedding of its class, into `net`."""

    net: nn.Module

    def __init__(self, latent: int, classes: int) -> None:
        super().__init__()
        self.label = nn.Embedding(classes, latent) if classes else None
        self.inputs = 2 * latent if classes else latent

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """z [B, Z], label int64 [B] -> [B, *shape]."""
        if self.label is None or label is None:
            return self.net(z)
        return self.net(torch.cat([z, self.label(label)], 1))


class _Critic(nn.Module):
    """Features h(x) by `net`, a linear score of them, the projection on the class."""

    net: nn.Module

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.score = nn.Linear(features, 1)
        self.label = nn.Embedding(classes, features) if classes else None

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """x [B, *shape], label int64 [B] -> scores [B]."""
        h = self.net(x)
        score = self.score(h)[:, 0]
        if self.label is None or label is None:
            return score
        return score + (self.label(label) * h).sum(1)


def _layers(inputs: int, width: int, depth: int, activation: nn.Module) -> list[nn.Module]:
    sizes = [inputs, *(width,) * depth]
    return [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), activation)]


class PointGenerator(_Generator):
    """An MLP of `depth` hidden layers with ReLU, to points [B, size]."""

    def __init__(
        self, latent: int, size: int, width: int = 128, depth: int = 3, *, classes: int = 0
    ) -> None:
        super().__init__(latent, classes)
        hidden = _layers(self.inputs, width, depth, nn.ReLU())
        self.net = nn.Sequential(*hidden, nn.Linear(width, size))


class PointCritic(_Critic):
    """An MLP of `depth` hidden layers with leaky ReLU, of points [B, size]."""

    def __init__(self, size: int, width: int = 128, depth: int = 3, *, classes: int = 0) -> None:
        super().__init__(width, classes)
        self.net = nn.Sequential(*_layers(size, width, depth, nn.LeakyReLU(0.2)))


class DCGANGenerator(_Generator):
    """z, to [2 W, H/4, W/4], and two transposed convolutions to pictures [B, C, H, W] in (0, 1).

    Sizes that 4 does not divide are made larger and cut. Batch norm and ReLU after each layer but
    the last.

    Args:
        shape: (C, H, W) of a picture. width: W, channels of the last layer but one.
    """

    def __init__(
        self, latent: int, shape: tuple[int, int, int], width: int = 32, *, classes: int = 0
    ) -> None:
        super().__init__(latent, classes)
        channels, self.height, self.width = shape
        first = (2 * width, -(-self.height // 4), -(-self.width // 4))
        self.net = nn.Sequential(
            nn.Linear(self.inputs, first[0] * first[1] * first[2], bias=False),
            nn.Unflatten(1, first),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, channels, 4, 2, 1),
            nn.Sigmoid(),
        )

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        return super().forward(z, label)[..., : self.height, : self.width]


class DCGANCritic(_Critic):
    """Two convolutions of stride 2 with leaky ReLU, of pictures [B, C, H, W] in [0, 1].

    Args:
        shape, width: as in DCGANGenerator.
        norm: makes a layer for so many channels, after the second convolution, such as
            nn.BatchNorm2d; None beside a penalty or the spectral norm.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        width: int = 32,
        *,
        classes: int = 0,
        norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        channels, height, across = shape
        super().__init__(2 * width * -(-height // 4) * -(-across // 4), classes)
        middle = [] if norm is None else [norm(2 * width)]
        # A kernel of 3 at stride 2 halves a size and rounds it up, so that none is too small.
        self.net = nn.Sequential(
            nn.Conv2d(channels, width, 3, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 3, 2, 1),
            *middle,
            nn.LeakyReLU(0.2),
            nn.Flatten(),
        )

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        return super().forward(2 * x - 1, label)
