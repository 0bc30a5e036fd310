"""2-D toy densities. A sampler gives float32 [n, 2]; point i is a pure function of (seed, i)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gmkernels import noise


def ring_modes(modes: int = 8, radius: float = 2.0) -> Tensor:
    """Centres of a ring, [modes, 2]: angles 2 pi i / modes."""
    angle = torch.arange(modes) * (2 * math.pi / modes)
    return radius * torch.stack([angle.cos(), angle.sin()], 1)


def grid_modes(side: int = 5, spacing: float = 2.0) -> Tensor:
    """Centres of a square grid around 0, [side^2, 2]."""
    line = (torch.arange(side) - (side - 1) / 2) * spacing
    return torch.cartesian_prod(line, line)


def mixture(n: int, modes: Tensor, std: float, *, seed: int | Tensor) -> Tensor:
    """n points of an even mixture of N(mode, std^2 I), float32 [n, 2]. modes: [K, 2]."""
    u = noise.uniform((n, 1), seed=seed)[:, 0]
    which = (u.double() * len(modes)).ceil().long() - 1
    return modes[which] + std * noise.normal((n, 2), seed=seed, stream=1)


def ring(n: int, *, seed: int | Tensor, modes: int = 8, std: float = 0.05) -> Tensor:
    """n points around ring_modes(modes), [n, 2]."""
    return mixture(n, ring_modes(modes), std, seed=seed)


def grid(n: int, *, seed: int | Tensor, side: int = 5, std: float = 0.1) -> Tensor:
    """n points around grid_modes(side), [n, 2]."""
    return mixture(n, grid_modes(side), std, seed=seed)


def moons(n: int, *, seed: int | Tensor, std: float = 0.05) -> Tensor:
    """n points of two half circles that hold each other, blurred by std, [n, 2]."""
    which, u = noise.uniform((n, 2), seed=seed).unbind(1)
    angle, lower = math.pi * u, which > 0.5
    x = torch.where(lower, 1 - angle.cos(), angle.cos())
    y = torch.where(lower, 0.5 - angle.sin(), angle.sin())
    return torch.stack([x, y], 1) + std * noise.normal((n, 2), seed=seed, stream=1)


def spirals(n: int, *, seed: int | Tensor, std: float = 0.1) -> Tensor:
    """n points of two arms of one and a half turns, blurred by std, [n, 2], within about 3."""
    which, u = noise.uniform((n, 2), seed=seed).unbind(1)
    radius, sign = 3 * u.sqrt(), torch.where(which > 0.5, 1.0, -1.0)
    angle = math.pi * radius
    arm = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    return sign[:, None] * arm + std * noise.normal((n, 2), seed=seed, stream=1)


def checkerboard(n: int, *, seed: int | Tensor) -> Tensor:
    """n points, uniform on the 8 squares of a 4 x 4 board on [-2, 2]^2 where i + j is even."""
    u = noise.uniform((n, 3), seed=seed)
    cell = (u[:, 0].double() * 8).ceil().long() - 1
    i, half = cell // 2, cell % 2
    j = 2 * half + i % 2
    return torch.stack([i, j], 1) - 2 + u[:, 1:]


TOYS: dict[str, Callable[..., Tensor]] = {
    "checkerboard": checkerboard,
    "grid": grid,
    "moons": moons,
    "ring": ring,
    "spirals": spirals,
}
