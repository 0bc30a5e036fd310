"""Variational autoencoders."""

from gmkernels.models import vae
from gmkernels.recipes.recipe import Recipe

RECIPES = {"vae": Recipe(vae.image_vae, lambda model, x, key: -model.elbo(x, seed=key))}
