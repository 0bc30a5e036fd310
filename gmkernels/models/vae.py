"""Variational autoencoders on reparameterize_kl and the likelihood ops.

q(z|x) = N(mu, diag sigma^2), (mu, log sigma^2) = encoder(x); p(z) = N(0, I), or a learned diagonal
Gaussian; p(x|z) a likelihood whose parameters are decoder(z).
    ELBO(x) = E_q(z|x) log p(x|z) - KL(q(z|x) || p(z)) <= log p(x)           Kingma and Welling 2014
    L_k(x) = E log 1/k sum_i p(x, z_i) / q(z_i|x), ELBO <= L_k <= L_k+1      Burda et al. 2016
    loss = mean_x -log p(x|z) + beta KL                                      Higgins et al. 2017
    with free bits, KL = sum_j max(lambda, mean_x KL_j)                      Kingma et al. 2016
Every quantity is in nats, summed over pixels and latents, one per row.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gmkernels import metrics, noise
from gmkernels.models.condition import join_condition
from gmkernels.models.dropout import Dropout
from gmkernels.models.likelihood import Bernoulli, Categorical, Gaussian, Likelihood
from gmkernels.ops.gaussian import gaussian_kl_per_dim, reparameterize_kl
from gmkernels.ops.likelihood import gaussian_nll


class VAE(nn.Module):
    """A (conditional) VAE around any encoder and decoder.

    Args:
        encoder: features [B, *] (with c: concatenated along dimension 1) -> [B, 2 Z, *], the mean
            of q(z|x) and then its log-variance.
        decoder: z [B, Z, *] (with c: concatenated) -> what the likelihood takes.
        likelihood: p(x|z), of gmkernels.models.likelihood.
        latent: Z, or the shape (Z, *).
        beta: weight of the KL in the loss. free_bits: lambda, nats a latent dimension.
        learned_prior: p(z) = N(prior_mean, exp(prior_logvar)) with both learned.

    Everywhere: x as the likelihood says; c float [B, K] or None; seed an int, a key (noise.key) or
    None, which draws one from torch's default generator. Each row's noise is a function of the seed
    and the row. Call eval() first where the networks hold dropout.
    """

    log_prob_kind = "lower bound"

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor],
        decoder: Callable[[Tensor], Tensor],
        likelihood: Likelihood,
        latent: int | tuple[int, ...],
        *,
        beta: float = 1.0,
        free_bits: float = 0.0,
        learned_prior: bool = False,
    ) -> None:
        super().__init__()
        if beta < 0 or free_bits < 0:
            raise ValueError(f"VAE: beta and free_bits must be >= 0, got {beta} and {free_bits}")
        self.encoder, self.decoder, self.likelihood = encoder, decoder, likelihood
        self.latent = (latent,) if isinstance(latent, int) else tuple(latent)
        self.beta, self.free_bits = beta, free_bits
        self.origin: Tensor
        self.register_buffer("origin", torch.zeros(self.latent), persistent=False)
        self.prior = nn.ParameterDict()
        if learned_prior:
            for name in ("prior_mean", "prior_logvar"):
                self.prior[name] = nn.Parameter(self.origin.clone())

    @property
    def takes(self) -> str:
        """The x that the likelihood takes: "levels" (integers) or "unit" (floats in [0, 1])."""
        return self.likelihood.takes

    def encode(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x), each [B, Z, *]."""
        features = self.likelihood.features(x).to(self.origin.dtype)
        mean, logvar = self.encoder(join_condition(features, c)).chunk(2, 1)
        return mean, logvar

    def decode(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """Parameters of p(x|z)."""
        return self.decoder(join_condition(z, c))

    def terms(
        self, x: Tensor, c: Tensor | None = None, *, seed: noise.Seed = None
    ) -> tuple[Tensor, Tensor]:
        """(-log p(x|z) at one z ~ q(z|x), KL(q(z|x) || p(z))), each [B] nats."""
        mean, logvar = self.encode(x, c)
        z, kl = reparameterize_kl(mean, logvar, seed=seed, **self.prior)
        return self.likelihood.nll(x, self.decode(z, c)), kl

    def loss(self, x: Tensor, c: Tensor | None = None, *, seed: noise.Seed = None) -> Tensor:
        """What training minimises, a scalar: mean -log p(x|z) + beta KL, nats."""
        if self.free_bits == 0:
            recon, kl = self.terms(x, c, seed=seed)
            return recon.mean() + self.beta * kl.mean()
        mean, logvar = self.encode(x, c)
        z, _ = reparameterize_kl(mean, logvar, seed=seed, **self.prior)
        kl = gaussian_kl_per_dim(mean, logvar, **self.prior).clamp(min=self.free_bits).sum()
        return self.likelihood.nll(x, self.decode(z, c)).mean() + self.beta * kl

    def elbo(self, x: Tensor, c: Tensor | None = None, *, seed: noise.Seed = None) -> Tensor:
        """ELBO with one draw of z, [B] nats; neither beta nor free bits enter."""
        recon, kl = self.terms(x, c, seed=seed)
        return -recon - kl

    def log_prob(
        self, x: Tensor, c: Tensor | None = None, *, k: int = 64, seed: noise.Seed = None
    ) -> Tensor:
        """L_k, a bound of log p(x) that rises with k, [B] nats; -L_k.mean() trains an IWAE."""
        if k < 1:
            raise ValueError(f"log_prob: k must be >= 1, got {k}")
        key = noise.resolve_key("log_prob", seed, 0, None, x.device)
        mean, logvar = self.encode(x, c)
        log_w = []
        for i in range(k):
            z, _ = reparameterize_kl(mean, logvar, seed=noise.fold_in(key, i))
            log_p = -self.likelihood.nll(x, self.decode(z, c)) - self._prior_nll(z)
            log_w.append(log_p + gaussian_nll(z, mean, logvar))
        return torch.stack(log_w).logsumexp(0) - math.log(k)

    def _prior_nll(self, z: Tensor) -> Tensor:
        if not self.prior:
            return gaussian_nll(z, self.origin.expand_as(z))
        mean, logvar = self.prior["prior_mean"], self.prior["prior_logvar"]
        return gaussian_nll(z, mean.expand_as(z), logvar.expand_as(z))

    def sample(self, n: int, c: Tensor | None = None, *, seed: noise.Seed = None) -> Tensor:
        """n draws x ~ p(x|z), z ~ p(z), with c [n, K] or one row [1, K] for all."""
        device, dtype = self.origin.device, self.origin.dtype
        key = noise.resolve_key("sample", seed, 0, None, device)
        shape = (n, *self.latent)
        z = noise.normal(shape, seed=noise.fold_in(key, 0), dtype=dtype, device=device)
        if self.prior:
            z = self.prior["prior_mean"] + (self.prior["prior_logvar"] / 2).exp() * z
        c = None if c is None else c.expand(n, -1)
        return self.likelihood.sample(self.decode(z, c), noise.fold_in(key, 1))

    def reconstruct(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """E[x|z] at the mean of q(z|x)."""
        return self.likelihood.mean(self.decode(self.encode(x, c)[0], c))

    def kl_per_dim(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """KL of each latent dimension, mean over x, [Z, *] nats: near 0 where q has collapsed."""
        return gaussian_kl_per_dim(*self.encode(x, c), **self.prior)

    def active_units(
        self, x: Tensor, c: Tensor | None = None, *, threshold: float = 0.01
    ) -> Tensor:
        """metrics.active_units of the means of q(z|x), bool [Z, *]."""
        return metrics.active_units(self.encode(x, c)[0], threshold=threshold)


class LowRankLogits(nn.Module):
    """h [B, H] -> logits [B, D, L]: sum_r (W h)[b, d, r] E[r, l] + bias[d, l].

    The levels of all pixels share the embedding E: R (H + 1) D + R L + D L numbers in place of
    (H + 1) D L. On 1000 digits that overfits less: 92.6 nats an unseen image, not 112.7.
    """

    def __init__(self, hidden: int, pixels: int, levels: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Linear(hidden, pixels * rank)
        self.embedding = nn.Parameter(torch.randn(rank, levels) * 0.3)
        self.bias = nn.Parameter(torch.zeros(pixels, levels))

    def forward(self, h: Tensor) -> Tensor:
        """[B, H] -> [B, D, L]."""
        return self.weight(h).unflatten(1, (self.bias.shape[0], -1)) @ self.embedding + self.bias


def image_vae(
    pixels: int,
    levels: int,
    *,
    latent_dim: int = 16,
    hidden: int = 256,
    dropout: float = 0.3,
    rank: int = 3,
    beta: float = 1.0,
    free_bits: float = 0.0,
    learned_prior: bool = False,
    likelihood: str = "categorical",
) -> VAE:
    """A VAE with one hidden layer a side, for flat grey images [B, pixels].

    Args:
        likelihood: "categorical" takes levels in [0, levels) and is a likelihood of the picture as
            stored; "bernoulli" and "gaussian" (one learned variance) take floats in [0, 1].
        rank: of the categorical decoder's logits. Others as in VAE.
    """
    heads: dict[str, tuple[Callable[[], Likelihood], Callable[[], nn.Module]]] = {
        "categorical": (
            lambda: Categorical(levels),
            lambda: LowRankLogits(hidden, pixels, levels, rank),
        ),
        "bernoulli": (Bernoulli, lambda: nn.Linear(hidden, pixels)),
        "gaussian": (lambda: Gaussian(0.2, learned=True), lambda: nn.Linear(hidden, pixels)),
    }
    if likelihood not in heads:
        raise ValueError(f"likelihood must be one of {', '.join(heads)}, got {likelihood!r}")
    for name, size in (("latent_dim", latent_dim), ("hidden", hidden), ("rank", rank)):
        if size < 1:
            raise ValueError(f"{name} must be >= 1, got {size}")
    make_likelihood, make_head = heads[likelihood]

    def layer(inputs: int) -> list[nn.Module]:
        return [nn.Linear(inputs, hidden), nn.SiLU(), Dropout(dropout)]

    encoder = nn.Sequential(*layer(pixels), nn.Linear(hidden, 2 * latent_dim))
    decoder = nn.Sequential(*layer(latent_dim), make_head())
    return VAE(
        encoder,
        decoder,
        make_likelihood(),
        latent_dim,
        beta=beta,
        free_bits=free_bits,
        learned_prior=learned_prior,
    )


def digits_vae() -> VAE:
    """What `python -m gmkernels train vae --data digits` trains: x int64 [B, 64], 17 levels."""
    return image_vae(64, 17)
