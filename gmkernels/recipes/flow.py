"""Normalizing flows, of pictures and of points."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gmkernels.models import image_flow
from gmkernels.recipes.recipe import LABEL, Recipe


def _nats(model: Any, x: Tensor, key: Tensor) -> Tensor:
    return -model.log_prob(x, seed=key)


def _flow(build: Callable[..., nn.Module], **defaults: Any) -> Recipe:
    settings = {"lr": 2e-3, "steps": 800} | defaults
    return Recipe(build, _nats, kinds=("images", "points"), asks=LABEL, defaults=settings)


RECIPES = {
    "realnvp": _flow(image_flow.realnvp),
    "glow": _flow(image_flow.glow),
    "nsf": _flow(image_flow.nsf),
    "maf": _flow(image_flow.maf, steps=600, weight_decay=0.3),
}
