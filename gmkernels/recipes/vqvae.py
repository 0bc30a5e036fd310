"""VQ-VAE."""

from typing import Any

from torch import Tensor

from gmkernels.models import vqvae
from gmkernels.recipes.recipe import Recipe


def _bound(model: Any, x: Tensor, key: Tensor) -> Tensor:
    return -model.log_prob(x)


RECIPES = {"vqvae": Recipe(vqvae.image_vqvae, _bound, defaults={"lr": 3e-3, "steps": 1500})}
