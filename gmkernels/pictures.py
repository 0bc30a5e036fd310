"""Samples as PNG files: a grid of images, or points over a density."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmkernels import checkpoint


def save_grid(path: Path, x: Tensor) -> None:
    """Writes grey images [N, H, W] in [0, 1] as one PNG, ceil(sqrt(N)) a row, enlarged if small."""
    try:
        from matplotlib import image
    except ImportError as error:
        raise ImportError(f"{path.name}: needs matplotlib; pip install matplotlib") from error
    n, height, width = x.shape
    columns = math.isqrt(n - 1) + 1
    rows = -(-n // columns)
    cells = torch.ones(rows * columns, height + 1, width + 1)
    cells[:n, :height, :width] = x
    grid = cells.view(rows, columns, height + 1, width + 1).transpose(1, 2).flatten(2).flatten(0, 1)
    factor = max(1, 32 // max(height, width))
    grid = grid[:-1, :-1].repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    rgb = (grid * 255).round().to(torch.uint8)[..., None].expand(-1, -1, 3)
    png = io.BytesIO()
    image.imsave(png, rgb.numpy(), format="png")
    checkpoint.write_atomically(path, png.getvalue())


def save_points(
    path: Path,
    x: Tensor,
    log_prob: Callable[[Tensor], Tensor] | None = None,
    *,
    side: int = 200,
) -> None:
    """Writes points [N, 2], over the density exp(log_prob) of the plane around them, as one PNG.

    Args:
        log_prob: points [M, 2] -> [M]; None shows the points alone.
        side: squares of the density along each axis.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{path.name}: needs matplotlib; pip install matplotlib") from error
    x = x[x.isfinite().all(1)]
    low, high = (torch.quantile(x, q, 0) for q in (0.01, 0.99))
    low, high = low - 0.25 * (high - low), high + 0.25 * (high - low)
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.add_subplot()
    limits = (float(low[0]), float(high[0]), float(low[1]), float(high[1]))
    if log_prob is not None:
        centre = (torch.arange(side) + 0.5) / side
        across, up = (low + (high - low) * centre[:, None]).unbind(1)
        density = log_prob(torch.cartesian_prod(across, up)).exp().view(side, side)
        shown = axes.imshow(density.T, origin="lower", extent=limits, cmap="Blues")
        figure.colorbar(shown, label="density")
    axes.scatter(x[:, 0], x[:, 1], s=3, color="black", linewidths=0)
    axes.set(xlim=limits[:2], ylim=limits[2:], aspect="equal")
    save_figure(path, figure)


def save_figure(path: Path, figure: Any) -> None:
    """Writes a matplotlib figure as one PNG."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    checkpoint.write_atomically(path, png.getvalue())
