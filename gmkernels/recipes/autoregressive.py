"""MADE, NADE, Image GPT and recurrent networks, of pictures and of text."""

from typing import Any

import torch
from torch import Tensor

from gmkernels import noise
from gmkernels.models.autoregressive import MADE, NADE
from gmkernels.models.gpt import GPT, Sizes
from gmkernels.models.image_gpt import TokenImages
from gmkernels.models.recurrent import RNN
from gmkernels.recipes.recipe import CHOICE, LABEL, WRITES, Recipe


def _orders(features: int, count: int) -> list[list[int]]:
    """The natural order, then random ones, always the same."""
    u = noise.uniform((count, features), seed=0, device="cpu")
    u[0] = torch.arange(features)
    return u.argsort(1).tolist()


def made(
    pixels: int,
    levels: int,
    *,
    orders: int = 8,
    width: int = 512,
    layers: int = 1,
    rank: int = 3,
    dropout: float = 0.3,
) -> MADE:
    """MADE in the natural order and orders - 1 random ones. Others as in MADE."""
    hidden, order = [width] * layers, _orders(pixels, orders)
    return MADE(pixels, levels, hidden, order=order, rank=rank, dropout=dropout)


def nade(
    pixels: int,
    levels: int,
    *,
    orders: int = 1,
    width: int = 128,
    rank: int = 3,
    dropout: float = 0.5,
) -> NADE:
    """NADE in the natural order and orders - 1 random ones. Others as in NADE."""
    order = _orders(pixels, orders)
    return NADE(pixels, levels, width, order=order, rank=rank, dropout=dropout)


def image_gpt(
    pixels: int,
    levels: int,
    *,
    layers: int = 3,
    heads: int = 4,
    width: int = 64,
    dropout: float = 0.2,
    colours: int = 32,
    classes: int = 0,
) -> TokenImages:
    """A GPT of pixels in reading order. colours: at most. Others as in Sizes and TokenImages."""
    colours = min(colours, levels)
    sizes = Sizes(
        colours, pixels, layers, heads, width, marks=max(1, classes), dropout=dropout, tied=False
    )
    return TokenImages(GPT(sizes), pixels, levels, colours, classes=classes)


def pixel_rnn(
    pixels: int,
    levels: int,
    *,
    cell: str = "gru",
    layers: int = 1,
    width: int = 128,
    dropout: float = 0.3,
    colours: int = 32,
    classes: int = 0,
) -> TokenImages:
    """A recurrent network over pixels in reading order. Options as in RNN and image_gpt()."""
    colours = min(colours, levels)
    marks = max(1, classes)
    model = RNN(colours, width=width, layers=layers, cell=cell, dropout=dropout, marks=marks)
    return TokenImages(model, pixels, levels, colours, classes=classes)


def rnn(
    pixels: int,
    levels: int,
    *,
    cell: str = "gru",
    layers: int = 1,
    width: int = 256,
    context: int = 64,
    dropout: float = 0.0,
) -> RNN:
    """A recurrent network of `levels` characters; context: of the pieces it is trained on."""
    return RNN(levels, width=width, layers=layers, cell=cell, dropout=dropout)


def _nats(model: Any, x: Tensor, key: Tensor) -> Tensor:
    return -model.log_prob(x)


_PIXELS = LABEL | CHOICE | {"complete"}
RECIPES = {
    "made": Recipe(made, _nats, defaults={"steps": 3000, "every": 500}),
    "nade": Recipe(nade, _nats, defaults={"steps": 1000, "every": 250}),
    "image_gpt": Recipe(
        image_gpt,
        _nats,
        asks=_PIXELS,
        betas=(0.9, 0.99),
        defaults={"steps": 800, "batch_size": 50, "lr": 3e-3, "weight_decay": 0.1},
    ),
    "pixel_rnn": Recipe(
        pixel_rnn, _nats, asks=_PIXELS, defaults={"steps": 1000, "lr": 5e-3, "every": 250}
    ),
    "rnn": Recipe(
        rnn,
        _nats,
        kinds=("text",),
        asks=WRITES,
        defaults={"steps": 2000, "batch_size": 12, "lr": 2e-3, "every": 500},
    ),
}
