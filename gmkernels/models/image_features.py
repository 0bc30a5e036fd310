"""Encoders of small square grey pictures in the models of self_supervised.py, for the commands."""

import itertools
import math

from torch import nn

from gmkernels.models.augment import Augment
from gmkernels.models.self_supervised import BYOL, BarlowTwins, SimCLR


def _layers(*widths: int) -> nn.Sequential:
    """Linear layers with batch norm and ReLU between them."""
    made: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        made += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*made[:-2])


def _encoder(pixels: int, width: int, features: int) -> nn.Sequential:
    """[B, pixels] -> [B, features]: three convolutions, the last two at half and quarter size."""
    side = math.isqrt(pixels)
    if side * side != pixels or side < 4:
        raise ValueError(f"pictures must be square, 4 x 4 or larger, got {pixels} pixels")
    if width < 1 or features < 1:
        raise ValueError(f"width and features must be >= 1, got {width} and {features}")
    made: list[nn.Module] = [nn.Unflatten(1, (1, side, side))]
    for inputs, outputs, stride in (
        (1, width, 1),
        (width, 2 * width, 2),
        (2 * width, 2 * width, 2),
    ):
        made += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)]
        made += [nn.BatchNorm2d(outputs), nn.ReLU()]
    quarter = -(-side // 4)
    flat = 2 * width * quarter * quarter
    head = [nn.Linear(flat, features, bias=False), nn.BatchNorm1d(features), nn.ReLU()]
    return nn.Sequential(*made, nn.Flatten(), *head)


def _views(pixels: int, shift: float, erase: float) -> Augment:
    side = math.isqrt(pixels)
    return Augment(side, side, shift=shift, erase=erase)


def image_simclr(
    pixels: int,
    levels: int,
    *,
    width: int = 32,
    features: int = 128,
    embedding: int = 64,
    shift: float = 1.0,
    erase: float = 0.375,
    temperature: float = 0.2,
) -> SimCLR:
    """SimCLR on flat square pictures [B, pixels] in [0, 1].

    Args:
        levels: not used: pictures are floats.
        width: channels of the first convolution. features, embedding: sizes of f(x) and g(f(x)).
        shift, erase: of the views, as in Augment. temperature: tau.
    """
    return SimCLR(
        _encoder(pixels, width, features),
        _layers(features, features, embedding),
        _views(pixels, shift, erase),
        temperature=temperature,
    )


def image_barlow_twins(
    pixels: int,
    levels: int,
    *,
    width: int = 32,
    features: int = 128,
    embedding: int = 128,
    shift: float = 1.0,
    erase: float = 0.375,
    lam: float = 5e-3,
) -> BarlowTwins:
    """Barlow Twins on flat square pictures; lam: lambda. Others as in image_simclr()."""
    return BarlowTwins(
        _encoder(pixels, width, features),
        _layers(features, features, embedding),
        _views(pixels, shift, erase),
        lam=lam,
    )


def image_byol(
    pixels: int,
    levels: int,
    *,
    width: int = 32,
    features: int = 128,
    embedding: int = 64,
    shift: float = 1.0,
    erase: float = 0.375,
    decay: float = 0.99,
) -> BYOL:
    """BYOL on flat square pictures; decay: of the target's average. Others as in image_simclr()."""
    return BYOL(
        _encoder(pixels, width, features),
        _layers(features, features, embedding),
        _layers(embedding, features, embedding),
        _views(pixels, shift, erase),
        decay=decay,
    )
