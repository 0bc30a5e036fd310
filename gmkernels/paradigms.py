"""The paradigms of `python -m gmkernels compare --data ...`: what each says of itself.

Classic ones are fitted to levels plus uniform noise, v = level + u in [0, L), float64: a density of
v bounds the probability of the levels, -log P(levels) <= E_u[-log p(v)], and a histogram with a bin
a level attains it (Theis et al. 2016, 1511.01844). Others are recipes, see gmkernels.recipes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gmkernels import noise
from gmkernels.models.classifier import GaussianNaiveBayes
from gmkernels.models.density import FactorAnalysis, GaussianMixture, Histogram

Classic = Callable[[Tensor, Tensor, int], Any]  # (v [N, D], labels [N], L) -> a fitted model


class PixelHistogram:
    """Pixels that are independent, each with a histogram of its L levels.

    Args: v: [N, D] in [0, L). levels: L. Each level counts once more than it is there.
    """

    def __init__(self, v: Tensor, levels: int) -> None:
        limits = [(0.0, float(levels))]
        self.pixels = [
            Histogram(1, levels, alpha=1.0).to(v.dtype).fit(column, limits=limits)
            for column in v.split(1, 1)
        ]

    def log_prob(self, v: Tensor) -> Tensor:
        """log P(levels), [N] nats, exact."""
        each = zip(self.pixels, v.split(1, 1), strict=True)
        return torch.stack([pixel.log_prob(column) for pixel, column in each]).sum(0)

    def sample(self, n: int, *, seed: int | Tensor) -> Tensor:
        """n draws, [n, D]."""
        key = noise.key(seed)
        each = enumerate(self.pixels)
        return torch.cat([p.sample(n, seed=noise.fold_in(key, i)) for i, p in each], 1)


def _histogram(v: Tensor, labels: Tensor, levels: int) -> Any:
    return PixelHistogram(v, levels)


def _naive_bayes(v: Tensor, labels: Tensor, levels: int) -> Any:
    return GaussianNaiveBayes(v.shape[1], int(labels.max()) + 1).double().fit(v, labels)


def _mixture(v: Tensor, labels: Tensor, levels: int) -> Any:
    model = GaussianMixture(v.shape[1], 30, covariance="tied").double()
    return model.fit(v, seed=0, starts=1, tolerance=1e-2)


def _factors(v: Tensor, labels: Tensor, levels: int) -> Any:
    return FactorAnalysis(v.shape[1], min(16, v.shape[1])).double().fit(v)


class Paradigm(NamedTuple):
    """A row of the table.

    Attributes:
        name: of the recipe, where there is no `classic`.
        specified, density, objective, drawn: what the model specifies, the p(x) that this induces,
            what training minimises, how a sample is drawn.
        likelihood: "exact", "bound" or "none".
        share: of the time, against the others' shares; 0 of what is fitted at once.
        classic: fits it, in the place of a recipe.
    """

    name: str
    specified: str
    density: str
    objective: str
    drawn: str
    likelihood: str
    share: float = 0.0
    classic: Classic | None = None


PARADIGMS = (
    Paradigm(
        "histogram",
        "P(x_d), pixel by pixel",
        "prod_d P(x_d)",
        "counts: maximum likelihood",
        "every pixel alone",
        "exact",
        classic=_histogram,
    ),
    Paradigm(
        "naive_bayes",
        "P(y), N(x_d; mu_yd, sigma_yd^2)",
        "sum_y P(y) prod_d p(x_d given y)",
        "moments: maximum likelihood",
        "y, then x",
        "bound",
        classic=_naive_bayes,
    ),
    Paradigm(
        "gaussian_mixture",
        "weights, means, one covariance",
        "sum_k w_k N(x; mu_k, Sigma)",
        "EM: maximum likelihood",
        "k, then x",
        "bound",
        classic=_mixture,
    ),
    Paradigm(
        "factor_analysis",
        "z ~ N(0, I), x = W z + mu + eps",
        "N(x; mu, W W' + Psi)",
        "maximum likelihood",
        "z, then x",
        "bound",
        classic=_factors,
    ),
    Paradigm(
        "made",
        "p(x_d given x_<d), masked network",
        "prod_d p(x_d given x_<d)",
        "-log p(x)",
        "D passes",
        "exact",
        1.0,
    ),
    Paradigm(
        "nade",
        "p(x_d given x_<d), shared weights",
        "prod_d p(x_d given x_<d)",
        "-log p(x)",
        "D steps",
        "exact",
        1.5,
    ),
    Paradigm(
        "image_gpt",
        "p(x_d given x_<d), transformer",
        "prod_d p(x_d given x_<d)",
        "-log p(x)",
        "D passes, cached",
        "exact",
        2.0,
    ),
    Paradigm(
        "autoencoder",
        "x = g(f(x))",
        "none",
        "squared error",
        "none: reconstructions",
        "none",
        0.5,
    ),
    Paradigm(
        "vae",
        "p(z), p(x given z), q(z given x)",
        "integral p(z) p(x given z) dz",
        "-ELBO",
        "z, one pass",
        "bound",
        0.7,
    ),
    Paradigm(
        "token_prior",
        "codes c, p(x given c), p(c) a GPT",
        "sum_c p(c) p(x given c)",
        "reconstruction, codebook; -log p(c)",
        "a pass a code, cached; one pass",
        "bound",
        1.7,
    ),
    Paradigm(
        "gan",
        "z ~ p(z), x = G(z)",
        "of G(z), no formula",
        "min_G max_D, non-saturating",
        "z, one pass",
        "none",
        1.5,
    ),
    Paradigm(
        "nsf",
        "z ~ N(0, I), x = f(z) invertible",
        "p(f^-1(x)) det of d f^-1/dx",
        "-log p(x)",
        "z, one pass",
        "bound",
        2.5,
    ),
    Paradigm(
        "diffusion",
        "q(x_t given x), p(x_t-1 given x_t)",
        "integral prod_t p(x_t-1 given x_t)",
        "weighted bound: denoising",
        "50 passes (DDIM)",
        "bound",
        4.0,
    ),
    Paradigm(
        "flow_matching",
        "a velocity v(x_t, t)",
        "of the ODE from noise to x",
        "squared error of v",
        "50 passes",
        "bound",
        4.0,
    ),
    Paradigm(
        "latent_diffusion",
        "a VAE, and a diffusion of its z",
        "integral p(z) p(x given z) dz",
        "-ELBO; denoising of z",
        "50 passes (DDIM), one of the decoder",
        "bound",
        2.0,
    ),
)
