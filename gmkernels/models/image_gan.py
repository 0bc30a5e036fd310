"""GANs of small grey pictures or points, conditional on a class if asked: what `train` builds."""

import math
from collections.abc import Callable

from torch import nn

from gmkernels.models.gan import GAN
from gmkernels.models.gan_losses import R1, GradientPenalty, spectral_norm
from gmkernels.models.gan_nets import DCGANCritic, DCGANGenerator, PointCritic, PointGenerator


def square_shape(name: str, pixels: int) -> tuple[int, int, int]:
    """(1, height, width) of flat square pictures. Raises ValueError for others."""
    side = math.isqrt(pixels)
    if side * side != pixels:
        raise ValueError(f"{name}: pictures must be square, got {pixels} pixels")
    return 1, side, side


def _players(
    name: str,
    pixels: int,
    levels: int,
    latent_dim: int,
    width: int,
    classes: int,
    norm: Callable[[int], nn.Module] | None = None,
) -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    """Generator, critic and the shape of a row: DCGAN's for pictures, MLPs for points."""
    if latent_dim < 1 or width < 4:
        raise ValueError(
            f"{name}: latent_dim must be >= 1 and width >= 4, got {latent_dim} and {width}"
        )
    if not levels:
        generator: nn.Module = PointGenerator(latent_dim, pixels, width, classes=classes)
        return generator, PointCritic(pixels, width, classes=classes), (pixels,)
    shape = square_shape(name, pixels)
    generator = DCGANGenerator(latent_dim, shape, width // 4, classes=classes)
    return generator, DCGANCritic(shape, width // 4, classes=classes, norm=norm), shape


def gan(
    pixels: int,
    levels: int,
    *,
    loss: str = "non_saturating",
    weight: float = 0.5,
    spectral: bool = False,
    latent_dim: int = 32,
    width: int = 128,
    average: float = 0.99,
    classes: int = 0,
) -> GAN:
    """A GAN with an R1 penalty, of pictures [B, pixels] in [0, 1], or of points where levels is 0.

    With neither penalty nor spectral norm D of pictures has DCGAN's batch norm.

    Args:
        loss: as in GAN. weight: of R1, 0 leaves it out. spectral: the spectral norm in D.
        latent_dim: Z. width: of the hidden layers; pictures' nets have width / 2 channels.
        average, classes: as in GAN.
    """
    norm = None if weight or spectral else nn.BatchNorm2d
    generator, critic, shape = _players("gan", pixels, levels, latent_dim, width, classes, norm)
    return GAN(
        generator,
        spectral_norm(critic) if spectral else critic,
        latent=latent_dim,
        shape=shape,
        loss=loss,
        penalty=R1(weight) if weight != 0 else None,
        average=average,
        classes=classes,
    )


def wgan(
    pixels: int,
    levels: int,
    *,
    clip: float = 0.01,
    critic_steps: int = 5,
    latent_dim: int = 32,
    width: int = 128,
    average: float = 0.99,
    classes: int = 0,
) -> GAN:
    """A Wasserstein GAN by clipped weights; the other arguments as in gan()."""
    if clip <= 0:
        raise ValueError(f"wgan: clip must be > 0, got {clip}")
    generator, critic, shape = _players("wgan", pixels, levels, latent_dim, width, classes)
    return GAN(
        generator,
        critic,
        latent=latent_dim,
        shape=shape,
        loss="wasserstein",
        clip=clip,
        critic_steps=critic_steps,
        average=average,
        classes=classes,
    )


def wgan_gp(
    pixels: int,
    levels: int,
    *,
    weight: float = 10.0,
    critic_steps: int = 5,
    latent_dim: int = 32,
    width: int = 128,
    average: float = 0.99,
    classes: int = 0,
) -> GAN:
    """A Wasserstein GAN with a gradient penalty of this weight; the others as in gan().

    On points of a narrow density a weight of 0.1 is better: the slope must bend at their scale.
    """
    generator, critic, shape = _players("wgan_gp", pixels, levels, latent_dim, width, classes)
    return GAN(
        generator,
        critic,
        latent=latent_dim,
        shape=shape,
        loss="wasserstein",
        penalty=GradientPenalty(weight),
        critic_steps=critic_steps,
        average=average,
        classes=classes,
    )
