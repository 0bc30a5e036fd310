"""Autoencoders: plain, linear, denoising, sparse. models.masked_autoencoder has the masked one.

f an encoder, g a decoder; |.|^2 is summed over the features of x, its mean taken over the batch.
    plain       |x - g(f(x))|^2                                Hinton and Salakhutdinov 2006
    linear      the same with f, g linear: its subspace is PCA's         Baldi and Hornik 1989
    denoising   |x - g(f(x~))|^2, x~ with Gaussian noise and inputs set to 0
                                                                         Vincent et al. 2008, 2010
    sparse      |x - g(f(x))|^2 + lambda sum_i |f_i(x)|        Ng 2011; Cunningham et al. 2023
Dropout inside is a layer of the networks. None of them is a model of p(x): there is no density, and
nothing says which latents a decoder expects. What they are for is f(x): encode() gives features.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from gmkernels import noise

NOISE, DROPPED = range(2)  # what the seed is folded with


class Reconstructor(nn.Module):
    """What all autoencoders share: the error of what they make of what they see.

    Everywhere: x float [B, *]; seed an int, a key (noise.key) or None, which draws one from torch's
    default generator. Call eval() before encode() where the networks hold dropout.
    """

    log_prob_kind = "none"
    takes = "unit"

    def encode(self, x: Tensor) -> Tensor:
        """Features of x."""
        raise NotImplementedError

    def seen(self, x: Tensor, *, seed: noise.Seed = None) -> Tensor:
        """What is seen of x in training, of x's shape: x itself."""
        return x

    def restore(self, x: Tensor, *, seed: noise.Seed = None) -> Tensor:
        """x made again from seen(x)."""
        raise NotImplementedError

    def error(self, x: Tensor, *, seed: noise.Seed = None) -> Tensor:
        """Squared error of restore(x), summed over features, [B]."""
        return squared_error(self.restore(x, seed=seed), x)

    def loss(self, x: Tensor, *, seed: noise.Seed = None) -> Tensor:
        """What training minimises, a scalar: the mean error."""
        return self.error(x, seed=seed).mean()

    def log_prob(self, x: Tensor) -> Tensor:
        """Raises NotImplementedError: there is no density."""
        raise NotImplementedError(
            f"log_prob: {type(self).__name__} is no model of p(x); error() says how well it "
            "reconstructs, a VAE bounds log p(x)"
        )

    def sample(self, n: int, *, seed: noise.Seed = None) -> Tensor:
        """Raises NotImplementedError: nothing says which latents the decoder expects."""
        raise NotImplementedError(
            f"sample: {type(self).__name__} is no model of p(x) and has no prior over latents; "
            "train a VAE, or fit a density to encode(x) and decode() what it draws"
        )


class Autoencoder(Reconstructor):
    """A plain autoencoder around any two networks.

    Args:
        encoder: f, x [B, *] -> latents [B, Z, *]. decoder: g, latents -> x's shape.
    """

    def __init__(
        self, encoder: Callable[[Tensor], Tensor], decoder: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def encode(self, x: Tensor) -> Tensor:
        """Latents f(x), [B, Z, *]: features of x."""
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """g(z), of x's shape."""
        return self.decoder(z)

    def reconstruct(self, x: Tensor) -> Tensor:
        """g(f(x))."""
        return self.decode(self.encode(x))

    def restore(self, x: Tensor, *, seed: noise.Seed = None) -> Tensor:
        """g(f(seen(x)))."""
        return self.reconstruct(self.seen(x, seed=seed))


def squared_error(y: Tensor, x: Tensor) -> Tensor:
    """|x - y|^2 of each row, [B], summed over features."""
    return (x - y).square().flatten(1).sum(1)


class DenoisingAutoencoder(Autoencoder):
    """Reconstructs x from a corrupted one.

    Args:
        std: of the Gaussian noise added to each feature, >= 0.
        dropout: probability that a feature is set to 0 after that, in [0, 1]; what is left is not
            scaled up (masking noise). Both are functions of the seed and the row.
    """

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor],
        decoder: Callable[[Tensor], Tensor],
        *,
        std: float = 0.3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(encoder, decoder)
        if not std >= 0 or not 0 <= dropout <= 1:
            raise ValueError(
                "DenoisingAutoencoder: std must be >= 0 and dropout lie in [0, 1], "
                f"got {std} and {dropout}"
            )
        self.std, self.dropout = std, dropout

    def seen(self, x: Tensor, *, seed: noise.Seed = None) -> Tensor:
        """x corrupted, of the same shape and dtype."""
        key = noise.resolve_key("seen", seed, 0, None, x.device)
        dtype, device = x.dtype, x.device
        if self.std > 0:
            eps = noise.normal(x.shape, seed=noise.fold_in(key, NOISE), dtype=dtype, device=device)
            x = x + self.std * eps
        if self.dropout > 0:
            u = noise.uniform(x.shape, seed=noise.fold_in(key, DROPPED), device=device)
            x = x.masked_fill(u <= self.dropout, 0.0)
        return x


class SparseAutoencoder(Autoencoder):
    """Few latents at a time: their absolute values cost lambda each.

    Args:
        sparsity: lambda, >= 0. Shrinking f while g grows lowers the cost without making anything
            sparse: hold g's weights down, by weight decay or by normalising them.
    """

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor],
        decoder: Callable[[Tensor], Tensor],
        *,
        sparsity: float = 1.0,
    ) -> None:
        super().__init__(encoder, decoder)
        if not sparsity >= 0:
            raise ValueError(f"SparseAutoencoder: sparsity must be >= 0, got {sparsity}")
        self.sparsity = sparsity

    def loss(self, x: Tensor, *, seed: noise.Seed = None) -> Tensor:
        """mean_x |x - g(f(x))|^2 + lambda sum_i |f_i(x)|."""
        f = self.encode(x)
        return (squared_error(self.decode(f), x) + self.sparsity * f.abs().flatten(1).sum(1)).mean()

    def steer(self, x: Tensor, clamped: Mapping[int, float]) -> Tensor:
        """g(f(x)) with latents held at values, {index along dimension 1: value}.

        Raises ValueError for an index that is no latent.
        """
        f = self.encode(x)
        strange = [i for i in clamped if not 0 <= i < f.shape[1]]
        if strange:
            raise ValueError(f"steer: latents are 0 to {f.shape[1] - 1}, got {strange[0]}")
        f = f.clone()
        for i, value in clamped.items():
            f[:, i] = value
        return self.decode(f)

    def active(self, x: Tensor) -> Tensor:
        """Share of x in which each latent is not 0, [Z, *]."""
        return (self.encode(x) != 0).to(x.dtype).mean(0)


def linear_autoencoder(features: int, latent_dim: int) -> Autoencoder:
    """x [B, features]; f and g affine. At its minimum g(f(x)) is the projection of PCA."""
    return Autoencoder(nn.Linear(features, latent_dim), nn.Linear(latent_dim, features))


def _networks(
    pixels: int, latent_dim: int, hidden: int, dropout: float, last: tuple[nn.Module, ...] = ()
) -> tuple[nn.Module, nn.Module]:
    """One hidden layer a side, or none at all with hidden=0; `last` of the encoder."""
    for name, size, least in (("latent_dim", latent_dim, 1), ("hidden", hidden, 0)):
        if size < least:
            raise ValueError(f"{name} must be >= {least}, got {size}")

    def layer(inputs: int) -> list[nn.Module]:
        return [nn.Linear(inputs, hidden), nn.SiLU(), nn.Dropout(dropout)] if hidden else []

    encoder = nn.Sequential(*layer(pixels), nn.Linear(hidden or pixels, latent_dim), *last)
    decoder = nn.Sequential(*layer(latent_dim), nn.Linear(hidden or latent_dim, pixels))
    return encoder, decoder


def image_autoencoder(
    pixels: int, levels: int, *, latent_dim: int = 16, hidden: int = 256, dropout: float = 0.0
) -> Autoencoder:
    """Of flat grey images in [0, 1]; hidden=0 is the linear one. dropout is inside, at `hidden`."""
    return Autoencoder(*_networks(pixels, latent_dim, hidden, dropout))


def image_denoising_autoencoder(
    pixels: int,
    levels: int,
    *,
    latent_dim: int = 64,
    hidden: int = 256,
    dropout: float = 0.0,
    std: float = 0.3,
    input_dropout: float = 0.2,
) -> DenoisingAutoencoder:
    """Of flat grey images in [0, 1]; std and input_dropout corrupt what it sees."""
    networks = _networks(pixels, latent_dim, hidden, dropout)
    return DenoisingAutoencoder(*networks, std=std, dropout=input_dropout)


def image_sparse_autoencoder(
    pixels: int, levels: int, *, latent_dim: int = 128, hidden: int = 0, sparsity: float = 0.1
) -> SparseAutoencoder:
    """Of flat grey images in [0, 1]; latents are >= 0, more than are on in any one picture."""
    return SparseAutoencoder(
        *_networks(pixels, latent_dim, hidden, 0.0, (nn.ReLU(),)), sparsity=sparsity
    )


@torch.no_grad()
def reconstructions(model: Reconstructor, x: Tensor, key: Tensor) -> Tensor:
    """Eight of x as the model sees them, and under them what it makes of these; four such pairs.

    x: [N, pixels]. Returns: [64, pixels], less where x has less than 32 rows.
    """
    x = x[:32]
    rows = zip(model.seen(x, seed=key).split(8), model.restore(x, seed=key).split(8), strict=True)
    return torch.cat([part for pair in rows for part in pair])
