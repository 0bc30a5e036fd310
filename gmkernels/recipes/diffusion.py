"""Diffusion, rectified flow, latent diffusion."""

from typing import Any

from torch import Tensor

from gmkernels.models import image_diffusion, image_latent_diffusion
from gmkernels.recipes.recipe import GUIDED, Recipe


def _bound(model: Any, x: Tensor, key: Tensor) -> Tensor:
    return model.vlb(x, seed=key).nats


def _latent_bound(model: Any, x: Tensor, key: Tensor) -> Tensor:
    """The VAE's own bound until there is a diffusion model of its latents."""
    return -(model.log_prob if model.measured else model.vae.elbo)(x, seed=key)


_DEFAULTS = {"lr": 2e-3, "every": 1000, "weight_decay": 1e-3}
RECIPES = {
    "diffusion": Recipe(image_diffusion.image_diffusion, _bound, asks=GUIDED, defaults=_DEFAULTS),
    "flow_matching": Recipe(
        image_diffusion.image_flow_matching, _bound, asks=GUIDED, defaults=_DEFAULTS
    ),
    "latent_diffusion": Recipe(
        image_latent_diffusion.image_latent_diffusion,
        _latent_bound,
        asks=GUIDED | {"text"},
        first="vae",
        share=0.25,
        turned=lambda model, x, key: model.measure_scale(x, seed=key),
        defaults=_DEFAULTS | {"steps": 2400, "every": 600},
    ),
}
