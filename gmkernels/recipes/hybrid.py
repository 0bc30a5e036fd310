"""A VQ-VAE and a transformer over its codes."""

import math
from typing import Any

from torch import Tensor

from gmkernels.models.gpt import GPT, Sizes
from gmkernels.models.hybrid import TokenPrior
from gmkernels.models.image_latent_diffusion import CAPTIONS
from gmkernels.models.vqvae import image_vqvae
from gmkernels.recipes.recipe import CHOICE, LABEL, Recipe


def token_prior(
    pixels: int,
    levels: int,
    *,
    codes: int = 32,
    code_width: int = 8,
    vae_width: int = 32,
    vae_dropout: float = 0.1,
    layers: int = 2,
    heads: int = 4,
    width: int = 64,
    dropout: float = 0.3,
    classes: int = 0,
    captions: str = "none",
    length: int = 24,
) -> TokenPrior:
    """A convolutional VQ-VAE, then a GPT over its codes.

    Args:
        codes, code_width, vae_width, vae_dropout: of image_vqvae().
        layers, heads, width, dropout: of the GPT.
        classes: of the labels; 0 trains without them.
        captions: "none", or "digits" or "fashion": the classes are told in words.
        length: bytes of the longest text, and one; captions alone use it.
    """
    if captions not in (*CAPTIONS, "none"):
        raise ValueError(f"captions must be none or {', '.join(CAPTIONS)}, got {captions!r}")
    vqvae = image_vqvae(
        pixels, levels, codes=codes, code_width=code_width, width=vae_width, dropout=vae_dropout
    )
    told = CAPTIONS.get(captions)
    length = 1 if told is None else length
    sizes = Sizes(
        codes,
        math.prod(vqvae.grid) + length - 1,
        layers,
        heads,
        width,
        marks=TokenPrior.marks_needed(classes, told),
        dropout=dropout,
        tied=False,
    )
    return TokenPrior(vqvae, GPT(sizes), classes=classes, captions=told, length=length)


def _bound(model: Any, x: Tensor, key: Tensor) -> Tensor:
    return -model.log_prob(x)


RECIPES = {
    "token_prior": Recipe(
        token_prior,
        _bound,
        asks=LABEL | CHOICE | {"text"},
        first="vqvae",
        share=0.6,
        defaults={"steps": 2500, "lr": 3e-3, "every": 500},
    )
}
