"""Self-supervised encoders of pictures; what a run draws is neighbours in their feature space."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gmkernels import noise
from gmkernels.models import image_features
from gmkernels.recipes.recipe import Recipe


def _losses(model: Any, x: Tensor, key: Tensor) -> Tensor:
    return model.losses(x, seed=key)


@torch.no_grad()
def _neighbours(model: Any, x: Tensor, key: Tensor) -> Tensor:
    """Eight pictures, each followed by the seven whose features are nearest by cosine."""
    features = nn.functional.normalize(model.features(x))
    queries = torch.linspace(0, len(x) - 1, 8).long()
    near = (features[queries] @ features.T).topk(8).indices
    return x[near.flatten()]


def _averaging(
    model: Any, optimizer: torch.optim.Optimizer, x: Tensor, *, seed: noise.Seed = None
) -> Tensor:
    """A training step, then the target's."""
    optimizer.zero_grad()
    loss = model.loss(x, seed=seed)
    loss.backward()
    optimizer.step()
    model.update()
    return loss.detach()


def _recipe(build: Callable[..., nn.Module], **changes: Any) -> Recipe:
    settings = {"lr": 2e-3, "steps": 400, "batch_size": 250, "weight_decay": 1e-3}
    return Recipe(build, _losses, "loss", picture=_neighbours, defaults=settings, **changes)


RECIPES = {
    "simclr": _recipe(image_features.image_simclr),
    "barlow_twins": _recipe(image_features.image_barlow_twins),
    "byol": _recipe(image_features.image_byol, update=_averaging),
}
