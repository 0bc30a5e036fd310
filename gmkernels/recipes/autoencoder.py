"""Autoencoders: scored by what they reconstruct, which is drawn, too, since none has samples."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gmkernels.models import autoencoder, masked_autoencoder
from gmkernels.recipes.recipe import Recipe


def _error(model: Any, x: Tensor, key: Tensor) -> Tensor:
    return model.error(x, seed=key)


def _autoencoder(build: Callable[..., nn.Module], **defaults: Any) -> Recipe:
    return Recipe(
        build,
        _error,
        measure="squared error",
        picture=autoencoder.reconstructions,
        defaults={"lr": 2e-3} | defaults,
    )


RECIPES = {
    "autoencoder": _autoencoder(autoencoder.image_autoencoder),
    "denoising_autoencoder": _autoencoder(autoencoder.image_denoising_autoencoder),
    "sparse_autoencoder": _autoencoder(autoencoder.image_sparse_autoencoder),
    "masked_autoencoder": _autoencoder(
        masked_autoencoder.image_masked_autoencoder, lr=3e-3, steps=3000, every=500
    ),
}
