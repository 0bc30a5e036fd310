"""Language models of characters."""

from typing import Any

from torch import Tensor

from gmkernels.models.gpt import GPT, Sizes
from gmkernels.recipes.recipe import WRITES, Recipe


def text_gpt(
    pixels: int,
    levels: int,
    *,
    layers: int = 4,
    heads: int = 4,
    width: int = 128,
    context: int = 64,
    kv_heads: int = 0,
    positions: str = "learned",
    norm: str = "layer",
    qk_norm: bool = False,
    bias: bool = False,
    dropout: float = 0.0,
) -> GPT:
    """A GPT of `levels` characters; kv_heads 0 is as many as heads. Others as in Sizes."""
    sizes = Sizes(
        levels,
        context,
        layers,
        heads,
        width,
        kv_heads=kv_heads or None,
        positions=positions,
        norm=norm,
        qk_norm=qk_norm,
        bias=bias,
        dropout=dropout,
    )
    return GPT(sizes)


def _nats(model: Any, x: Tensor, key: Tensor) -> Tensor:
    return -model.log_prob(x)


RECIPES = {
    "gpt": Recipe(
        text_gpt,
        _nats,
        kinds=("text",),
        asks=WRITES,
        betas=(0.9, 0.99),
        defaults={"steps": 2000, "batch_size": 12, "lr": 2e-3, "weight_decay": 0.1, "every": 500},
    )
}
