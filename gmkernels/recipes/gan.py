"""Generative adversarial networks, of pictures and of points; CycleGAN."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from gmkernels import metrics, noise
from gmkernels.models import cyclegan, gan, image_cyclegan, image_gan
from gmkernels.recipes.recipe import LABEL, Recipe

SAMPLES = 1000


def _energy(model: gan.GAN, x: Tensor, key: Tensor) -> Tensor:
    """Of samples that are the same for every part of the test rows."""
    samples = model.sample(SAMPLES, seed=noise.key(key[:1]))
    return metrics.energy_score(x, samples.flatten(1))


def _update_cyclegan(
    model: image_cyclegan.ImageCycleGAN,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    *,
    seed: noise.Seed = None,
) -> Tensor:
    """The second half of the batch is moved to the other domain: other pictures than the first."""
    here, there = x[: len(x) // 2], x[len(x) // 2 :]
    return cyclegan.update(model, optimizer, here, model.move(there), seed=seed)


_GAN = Recipe(
    image_gan.gan,
    _energy,
    measure="energy score",
    kinds=("images", "points"),
    asks=LABEL,
    update=gan.update,
    betas=(0.5, 0.999),
    defaults={"lr": 1e-3, "steps": 4000, "batch_size": 256, "weight_decay": 0.0, "every": 500},
)


def _wasserstein(build: Any, betas: tuple[float, float]) -> Recipe:
    defaults = _GAN.defaults | {"steps": 2000, "batch_size": 320, "lr": 5e-4}
    return dataclasses.replace(_GAN, build=build, betas=betas, defaults=defaults)


RECIPES = {
    "gan": _GAN,
    "wgan": _wasserstein(image_gan.wgan, (0.0, 0.99)),
    "wgan_gp": _wasserstein(image_gan.wgan_gp, (0.0, 0.9)),
    "cyclegan": Recipe(
        image_cyclegan.cyclegan,
        lambda model, x, key: model.error(x),
        measure="absolute error",
        translates=True,
        update=_update_cyclegan,
        betas=(0.5, 0.999),
        defaults={"lr": 2e-3, "steps": 1000, "weight_decay": 0.0},
    ),
}
