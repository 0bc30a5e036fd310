"""CycleGAN between small grey pictures and a changed version of them: what `train` builds."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmkernels.models.cyclegan import CycleGAN
from gmkernels.models.gan_nets import DCGANCritic
from gmkernels.models.image_gan import square_shape

DOMAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "inverted": lambda x: 1 - x,
    "rotated": lambda x: x.rot90(1, (2, 3)),
    "thickened": lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 2, 1),
}  # pictures [B, 1, H, W] in [0, 1] to the other domain


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1)
        )

    def forward(self, h: Tensor) -> Tensor:
        return h + self.net(h)


class Translator(nn.Sequential):
    """Pictures [B, 1, H, W] to pictures: a small ResNet at full resolution, without a last sigmoid.

    With one the generators end at white pictures, where its slope has vanished.

    Args: width: channels. blocks: of two convolutions each, 3 x 3.
    """

    def __init__(self, width: int = 16, blocks: int = 2) -> None:
        super().__init__(
            nn.Conv2d(1, width, 3, 1, 1),
            *(_Block(width) for _ in range(blocks)),
            nn.ReLU(),
            nn.Conv2d(width, 1, 3, 1, 1),
        )


class Rearrangement(nn.Module):
    """Pictures whose pixels move: out[p] = sum_q w[p, q] x[q], with rows of w that sum to 1.

    w = softmax(10 weight), weight [H W, H W]: blurred pictures at first, a permutation of the
    pixels at the end if the other domain is one. Nothing says which pixels are neighbours.

    Args: shape: (1, H, W).
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        pixels = math.prod(shape)
        # Ten times what is learned, so that Adam's steps of a few 1e-3 make the rows sharp.
        self.weight = nn.Parameter(0.01 * torch.randn(pixels, pixels))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ (10 * self.weight).softmax(1).T).view(x.shape)


class ImageCycleGAN(CycleGAN):
    """A CycleGAN whose second domain is made from the first: `domain` of other pictures."""

    domain: str
    least_batch = 2  # a picture for each domain

    def move(self, x: Tensor) -> Tensor:
        """Pictures [B, *] as the second domain has them, [B, 1, H, W]."""
        return DOMAINS[self.domain](x.reshape(-1, *self.shape))

    @torch.no_grad()
    def error(self, x: Tensor) -> Tensor:
        """Mean absolute difference of G(x) from the change itself, [B]; training never sees it."""
        return (self.translate(x) - self.move(x)).abs().flatten(1).mean(1)


def cyclegan(
    pixels: int,
    levels: int,
    *,
    domain: str = "thickened",
    width: int = 16,
    cycle: float = 10.0,
    identity: float = 1.0,
    pool: int = 50,
    moves: bool = False,
) -> ImageCycleGAN:
    """A CycleGAN from square grey pictures to "inverted", "rotated" or "thickened" ones.

    Args:
        domain: dark and light exchanged; a quarter turn; each pixel the largest of 2 x 2.
        width: of the generators; the critics have twice as many channels.
        identity: holds the generators near what they see. "thickened" is found with it alone; give
            0 for "inverted" and "rotated", which it keeps away from.
        moves: generators that move pixels and do nothing else, for "rotated"; the others keep what
            they see near its place. Others as in CycleGAN.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain must be one of {', '.join(DOMAINS)}, got {domain!r}")
    if width < 1:
        raise ValueError(f"cyclegan: width must be >= 1, got {width}")
    shape = square_shape("cyclegan", pixels)
    forward, backward = (Rearrangement(shape) if moves else Translator(width) for _ in range(2))
    model = ImageCycleGAN(
        forward,
        backward,
        DCGANCritic(shape, width),
        DCGANCritic(shape, width),
        shape,
        cycle=cycle,
        identity=identity,
        pool=pool,
    )
    model.domain = domain
    return model
