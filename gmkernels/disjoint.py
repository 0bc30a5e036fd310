"""Why a divergence may teach nothing: two equal bumps on the line, one moved by theta.

p_theta(x) = 2 cos^2(pi (x - theta)) on |x - theta| < 1/2. From theta = 1 on the supports are
disjoint: JS is log 2 with gradient 0, KL infinite, while Wasserstein-1 is theta with gradient 1
(Arjovsky et al. 2017, example 1). Sinkhorn's divergence follows Wasserstein; MMD sees as far as its
kernel is wide. Every gradient is autograd's, of the functions of divergences.py.
"""

import math

import torch
from torch import Tensor

from gmkernels.divergences import js_categorical, kl_categorical, mmd, sinkhorn, wasserstein_1d

MEASURES = ("KL", "JS", "Wasserstein-1", "Sinkhorn", "MMD")
COLUMNS = ("theta", *MEASURES, *(f"d {name} / d theta" for name in MEASURES))
CELLS = 800  # of [-1, 3.5], where KL and JS are taken
POINTS = 100  # samples for the others


def bump(x: Tensor) -> Tensor:
    """The density at theta = 0: 2 cos^2(pi x) on |x| < 1/2, else 0."""
    return torch.where(x.abs() < 0.5, 2 * torch.cos(math.pi * x).square(), 0.0)


def quantiles(n: int) -> Tensor:
    """n points of the bump at levels (i + 1/2) / n, float64 [n, 1]."""
    x = torch.linspace(-0.5, 0.5, 10_001, dtype=torch.float64)
    cdf = x + 0.5 + torch.sin(2 * math.pi * x) / (2 * math.pi)
    level = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return x[torch.searchsorted(cdf, level).clamp(max=len(x) - 1)][:, None]


def measures(theta: Tensor) -> tuple[Tensor, ...]:
    """MEASURES between the bump and the one moved by theta (0-d float64), in this order."""
    grid = torch.linspace(-1, 3.5, CELLS, dtype=torch.float64)
    p, q = bump(grid), bump(grid - theta)
    p, q = p / p.sum(), q / q.sum()
    x = quantiles(POINTS)
    y = x + theta
    return (
        kl_categorical(p, q),
        js_categorical(p, q),
        wasserstein_1d(x, y)[0],
        sinkhorn(x, y, epsilon=0.05, power=1),
        mmd(x, y, bandwidth=0.5, unbiased=False),
    )


def rows(most: float = 2.5, steps: int = 51) -> list[tuple[float, ...]]:
    """COLUMNS at theta in (0, most]; the gradient of an infinite value is NaN."""
    found = []
    for i in range(1, steps):
        theta = torch.tensor(most * i / (steps - 1), dtype=torch.float64, requires_grad=True)
        values = measures(theta)
        slopes = [
            float(torch.autograd.grad(v, theta, retain_graph=True)[0]) if v.isfinite() else math.nan
            for v in values
        ]
        found.append((theta.item(), *(v.item() for v in values), *slopes))
    return found
