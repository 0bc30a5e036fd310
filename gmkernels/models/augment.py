"""Random views of grey pictures for self-supervised training, made with counter-based noise."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gmkernels import noise


class Augment:
    """A random view of each picture: moved, turned, scaled, lighter or darker, erased, noisy.

    Args:
        height, width: of the pictures.
        shift: pixels up to which a picture moves along each side.
        turn: radians up to which it turns; scale: share of its size by which it grows or shrinks.
        contrast: share by which values are multiplied up or down.
        erase: side of the square that is set to 0, as a share of the picture's; 0: none.
        std: of the Gaussian noise on every pixel.

    Called with pictures [B, height * width] of floats (background 0) and seed= (an int, a key or
    None), gives views of the same shape and dtype. A view is a function of the seed and its row.
    Values may leave [0, 1]. Not differentiable in the noise; pictures carry their gradient.
    """

    def __init__(
        self,
        height: int,
        width: int,
        *,
        shift: float = 1.0,
        turn: float = 0.2,
        scale: float = 0.15,
        contrast: float = 0.3,
        erase: float = 0.375,
        std: float = 0.1,
    ) -> None:
        ranges = {"shift": shift, "turn": turn, "contrast": contrast, "erase": erase, "std": std}
        if min(ranges.values()) < 0 or not 0 <= scale < 1:
            raise ValueError(f"Augment: all must be >= 0 and scale < 1, got {ranges}, {scale=}")
        self.height, self.width = height, width
        self.shift, self.turn, self.scale = shift, turn, scale
        self.contrast, self.erase, self.std = contrast, erase, std

    def __call__(self, x: Tensor, *, seed: noise.Seed = None) -> Tensor:
        """[B, height * width] -> one view each."""
        if x.dim() != 2 or x.shape[1] != self.height * self.width or not x.is_floating_point():
            raise ValueError(
                f"Augment: pictures must be floats [B, {self.height * self.width}], got "
                f"{x.dtype} {tuple(x.shape)}"
            )
        key = noise.resolve_key("Augment", seed, 0, None, x.device)
        u = noise.uniform((len(x), 7), seed=noise.fold_in(key, 0), dtype=x.dtype, device=x.device)
        angle, size, right, down, light, column, row = (2 * u - 1).unbind(1)
        view = self._moved(x, self.turn * angle, 1 + self.scale * size, right, down)
        view = view * (1 + self.contrast * light)[:, None, None]
        view = view.masked_fill(self._erased(column, row), 0.0).flatten(1)
        eps = noise.normal(x.shape, seed=noise.fold_in(key, 1), dtype=x.dtype, device=x.device)
        return view + self.std * eps

    def _moved(self, x: Tensor, angle: Tensor, size: Tensor, right: Tensor, down: Tensor) -> Tensor:
        """Bilinear, zeros from outside.  # [B, H, W]"""
        c, s = angle.cos() / size, angle.sin() / size
        across = torch.stack([c, -s, 2 * self.shift / self.width * right], 1)
        along = torch.stack([s, c, 2 * self.shift / self.height * down], 1)
        shape = (len(x), 1, self.height, self.width)
        grid = F.affine_grid(torch.stack([across, along], 1), list(shape), align_corners=False)
        return F.grid_sample(x.view(shape), grid, align_corners=False).squeeze(1)

    def _erased(self, column: Tensor, row: Tensor) -> Tensor:
        """Whether a pixel lies in the square around a place in [-1, 1]^2.  # [B, H, W]"""

        def near(place: Tensor, n: int) -> Tensor:
            centre = (2 * torch.arange(n, device=place.device) + 1) / n - 1
            return (centre - place[:, None]).abs() < self.erase

        return near(row, self.height)[:, :, None] & near(column, self.width)[:, None, :]
