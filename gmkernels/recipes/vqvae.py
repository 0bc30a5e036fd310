"""VQ-VAE."""

from gmkernels.models import vqvae
from gmkernels.recipes.recipe import Recipe

RECIPES = {"vqvae": Recipe(vqvae.image_vqvae, lambda model, x, key: -model.log_prob(x))}
