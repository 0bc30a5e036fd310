"""RealNVP, Glow, neural spline flows and MAF on small grey pictures or on points: what `train`
builds."""

import math
from collections.abc import Callable

from torch import nn

from gmkernels.models.couplings import AffineCoupling, MaskedAffine, SplineCoupling
from gmkernels.models.data_flow import DataFlow
from gmkernels.models.flow import Chain, Multiscale
from gmkernels.models.masked import MaskedNet
from gmkernels.models.transforms import (
    ActNorm,
    Invertible1x1,
    Squeeze,
    Transform,
)
from gmkernels.split import Split

MakeNet = Callable[[int, int], nn.Module]


def _zero(layer: nn.Module) -> nn.Module:
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def _mlp(width: int, dropout: float, extra: int) -> MakeNet:
    def make(inputs: int, outputs: int) -> nn.Module:
        hidden = [nn.Linear(inputs + extra, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        return nn.Sequential(*hidden, nn.Dropout(dropout), _zero(nn.Linear(width, outputs)))

    return make


def _convolution(width: int, dropout: float, extra: int) -> MakeNet:
    """Glow's three layers, 3 x 3, 1 x 1, 3 x 3."""

    def make(inputs: int, outputs: int) -> nn.Module:
        hidden = [nn.Conv2d(inputs + extra, width, 3, 1, 1), nn.SiLU()]
        hidden += [nn.Conv2d(width, width, 1), nn.SiLU()]
        last = _zero(nn.Conv2d(width, outputs, 3, 1, 1))
        return nn.Sequential(*hidden, nn.Dropout(dropout), last)

    return make


def _check(name: str, **sizes: int) -> None:
    for size, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: {size} must be >= 1, got {value}")


def _side(name: str, pixels: int) -> int:
    side = math.isqrt(pixels)
    if side * side != pixels or side % 4:
        raise ValueError(
            f"{name}: pictures must be square with a side that 4 divides, got {pixels} pixels; "
            "maf takes any"
        )
    return side


def _prior(channels: int) -> Transform:
    """N(mean, sd) of the half that leaves, both by one layer from the half that stays.

    (z - mean) / sd ~ N(0, I): an affine coupling, so the base stays a standard normal.
    """
    net = _zero(nn.Conv2d(channels // 2, channels, 3, 1, 1))
    return AffineCoupling(net, Split.halves(channels, flip=True), scale="exp")


def _multiscale(
    side: int,
    stage: Callable[[int, int], list[Transform]],
    squeezed: Callable[[int], list[Transform]],
    reconstruct: bool,
    learned_prior: bool = False,
) -> list[Transform]:
    """Two levels; stage(C, side) before each squeeze, squeezed(C) after it."""
    levels: list[tuple[Transform, tuple[int, int, int]]] = []
    channels = 1
    for level in range(2):
        steps = [*stage(channels, side), Squeeze(), *squeezed(4 * channels)]
        if learned_prior:
            steps.append(ActNorm(4 * channels) if level else _prior(4 * channels))
        side //= 2
        levels.append((Chain(steps, reconstruct=reconstruct), (4 * channels, side, side)))
        channels *= 2
    return [Multiscale(levels)]


def realnvp(
    pixels: int,
    levels: int,
    *,
    layers: int = 4,
    width: int = 64,
    dropout: float = 0.3,
    classes: int = 0,
    reconstruct: bool = False,
) -> DataFlow:
    """Affine couplings, each after an ActNorm: checkerboards, then channels, at two scales.

    Points: the two coordinates in turn.

    Args:
        layers: couplings of each kind and scale, or of points. width, dropout: of the networks.
        classes, reconstruct: as in DataFlow; reconstruct needs dropout=0.
    """
    _check("realnvp", layers=layers, width=width)
    if not levels:
        make = _mlp(width, dropout, classes)
        steps: list[Transform] = []
        for i in range(layers):
            split = Split.alternating(pixels, flip=i % 2 == 1)
            n = split.transformed
            steps += [ActNorm(pixels), AffineCoupling(make(pixels - n, 2 * n), split)]
        return DataFlow(steps, (pixels,), 0, classes=classes, reconstruct=reconstruct)
    side, make = _side("realnvp", pixels), _convolution(width, dropout, classes)

    def boards(channels: int, size: int) -> list[Transform]:
        made: list[Transform] = []
        for i in range(layers):
            split = Split.checkerboard(channels, size, size, flip=i % 2 == 1)
            made += [ActNorm(channels), AffineCoupling(make(channels, 2 * channels), split)]
        return made

    def channelwise(channels: int) -> list[Transform]:
        made: list[Transform] = []
        for i in range(layers):
            split = Split.halves(channels, flip=i % 2 == 1)
            made += [ActNorm(channels), AffineCoupling(make(channels // 2, channels), split)]
        return made

    steps = _multiscale(side, boards, channelwise, reconstruct)
    return DataFlow(steps, (1, side, side), levels, classes=classes)


def _glow_like(
    name: str,
    pixels: int,
    levels: int,
    coupling: Callable[[MakeNet, Split], Transform],
    layers: int,
    width: int,
    dropout: float,
    classes: int,
    reconstruct: bool,
    learned_prior: bool = False,
) -> DataFlow:
    """Steps of ActNorm, invertible 1 x 1 and a coupling of the second half of the channels."""
    _check(name, layers=layers, width=width)

    def steps(make: MakeNet, channels: int) -> list[Transform]:
        made: list[Transform] = []
        for _ in range(layers):
            made += [ActNorm(channels), Invertible1x1(channels)]
            made.append(coupling(make, Split.halves(channels)))
        return made

    if not levels:
        flat = steps(_mlp(width, dropout, classes), pixels)
        flat += [ActNorm(pixels)] if learned_prior else []
        return DataFlow(flat, (pixels,), 0, classes=classes, reconstruct=reconstruct)
    side, make = _side(name, pixels), _convolution(width, dropout, classes)
    scales = _multiscale(side, lambda *_: [], lambda c: steps(make, c), reconstruct, learned_prior)
    return DataFlow(scales, (1, side, side), levels, classes=classes)


def glow(
    pixels: int,
    levels: int,
    *,
    layers: int = 8,
    width: int = 64,
    dropout: float = 0.3,
    classes: int = 0,
    reconstruct: bool = False,
    learned_prior: bool = False,
) -> DataFlow:
    """Glow (Kingma and Dhariwal 2018, 1807.03039): steps at two scales.

    Args as in realnvp(), and
        learned_prior: means and deviations of the latents are learned: of the channels that leave
            at a scale from those that stay, of the last ones by channel. Else all are N(0, 1).
    """

    def coupling(make: MakeNet, split: Split) -> Transform:
        n = split.transformed
        return AffineCoupling(make(split.shape[0] - n, 2 * n), split, scale="sigmoid")

    options = layers, width, dropout, classes, reconstruct, learned_prior
    return _glow_like("glow", pixels, levels, coupling, *options)


def nsf(
    pixels: int,
    levels: int,
    *,
    layers: int = 6,
    bins: int = 8,
    bound: float = 3.0,
    width: int = 64,
    dropout: float = 0.3,
    classes: int = 0,
    reconstruct: bool = False,
) -> DataFlow:
    """Glow's steps with splines (Durkan et al. 2019). bins, bound: theirs; others as realnvp()."""

    def coupling(make: MakeNet, split: Split) -> Transform:
        n = split.transformed
        net = make(split.shape[0] - n, n * (3 * bins - 1))
        return SplineCoupling(net, split, bins=bins, bound=bound)

    options = layers, width, dropout, classes, reconstruct
    return _glow_like("nsf", pixels, levels, coupling, *options)


def maf(
    pixels: int,
    levels: int,
    *,
    layers: int = 3,
    width: int = 512,
    dropout: float = 0.5,
    classes: int = 0,
    reconstruct: bool = False,
) -> DataFlow:
    """Masked affine layers, each after an ActNorm, in the natural order and its reverse in turn.

    Papamakarios et al. 2017. Pictures of any size, flat. Args as in realnvp().
    """
    _check("maf", layers=layers, width=width)
    steps: list[Transform] = []
    for i in range(layers):
        order = range(pixels) if i % 2 == 0 else range(pixels)[::-1]
        net = MaskedNet(pixels, 2, (width, width), context=classes, order=order, dropout=dropout)
        steps += [ActNorm(pixels), MaskedAffine(net)]
    return DataFlow(steps, (pixels,), levels, classes=classes, reconstruct=reconstruct)
