"""VQ-VAE: an autoencoder whose latents are codes of a codebook (van den Oord et al. 2017).

z = encoder(x) [B, D, *]; each of its n vectors becomes its nearest code of K; p(x|codes) a
likelihood whose parameters are decoder(codes).
    loss = mean_x -log p(x|codes) + sum over latents of the codebook's loss                    eq. 3
The encoder is deterministic, so with a uniform prior over codes
    log p(x) = log sum_codes K^-n p(x|codes) >= log p(x|codes(x)) - n log K,
a bound in nats that says what the codes themselves cost. A prior over codes learned afterwards
lowers n log K to what they need, and is what good samples come from.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmkernels import noise
from gmkernels.models.codebook import Codebook, LearnedCodebook, RunningCodebook, perplexity
from gmkernels.models.likelihood import Categorical, Likelihood


class VQVAE(nn.Module):
    """A VQ-VAE around any encoder and decoder.

    Args:
        encoder: features [B, *] -> z [B, D, *grid].
        decoder: codes [B, D, *grid] -> what the likelihood takes.
        codebook: K codes of width D; gmkernels.models.codebook.
        likelihood: p(x|codes), of gmkernels.models.likelihood.
        grid: shape of the n codes of one x, such as (4, 4).

    Everywhere: x as the likelihood says; indices int64 [B, *grid]. In training mode loss() also
    moves a running codebook and restarts unused codes; eval() leaves it.
    """

    log_prob_kind = "lower bound"

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor],
        decoder: Callable[[Tensor], Tensor],
        codebook: Codebook,
        likelihood: Likelihood,
        grid: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.likelihood = encoder, decoder, likelihood
        self.codebook, self.grid = codebook, tuple(grid)

    @property
    def takes(self) -> str:
        """The x that the likelihood takes: "levels" (integers) or "unit" (floats in [0, 1])."""
        return self.likelihood.takes

    def vectors(self, x: Tensor) -> Tensor:
        """What the encoder gives, z [B, D, *grid]: each vector takes its nearest code's place."""
        z = self.encoder(self.likelihood.features(x).to(self.codebook.codes.dtype))
        if z.shape[2:] != self.grid:
            raise ValueError(
                f"VQVAE: the encoder must give [B, D, *grid] with grid {self.grid}, "
                f"got {tuple(z.shape)}"
            )
        return z

    def quantize(self, x: Tensor, *, seed: noise.Seed = None) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [B, D, *grid], indices [B, *grid], and the codebook's loss."""
        q, indices, loss = self.codebook(self.vectors(x).movedim(1, -1), seed=seed)
        return q.movedim(-1, 1), indices, loss

    def loss(self, x: Tensor, *, seed: noise.Seed = None) -> Tensor:
        """What training minimises, a scalar: nats, and squares summed over the latents of an x."""
        q, _, codebook_loss = self.quantize(x, seed=seed)
        recon = self.likelihood.nll(x, self.decoder(q)).mean()
        return recon + codebook_loss * math.prod(q.shape[1:])

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x|codes) - n log K <= log p(x), [B] nats, with codes of uniform probability."""
        q, _, _ = self.quantize(x)
        return -self.likelihood.nll(x, self.decoder(q)) - self.nats_of_codes

    @property
    def nats_of_codes(self) -> float:
        """n log K: what the codes of one x cost under the uniform prior."""
        return math.prod(self.grid) * math.log(len(self.codebook.codes))

    def encode(self, x: Tensor) -> Tensor:
        """The codes of x: int64 indices [B, *grid]."""
        return self.quantize(x)[1]

    def decode(self, indices: Tensor) -> Tensor:
        """Parameters of p(x|codes). Raises ValueError for indices of another shape."""
        if indices.shape[1:] != self.grid:
            raise ValueError(
                f"VQVAE: indices must be [B, *grid] with grid {self.grid}, "
                f"got {tuple(indices.shape)}"
            )
        return self.decoder(F.embedding(indices, self.codebook.codes).movedim(-1, 1))

    def reconstruct(self, x: Tensor) -> Tensor:
        """E[x|codes(x)]."""
        return self.likelihood.mean(self.decode(self.encode(x)))

    def sample(self, n: int, *, seed: noise.Seed = None) -> Tensor:
        """n draws x ~ p(x|codes) with codes drawn uniformly: not what x's own codes look like."""
        device = self.codebook.codes.device
        key = noise.resolve_key("sample", seed, 0, None, device)
        u = noise.uniform((n, *self.grid), seed=noise.fold_in(key, 0), device=device)
        indices = (u.double() * len(self.codebook.codes)).ceil().long() - 1  # u is in (0, 1]
        return self.likelihood.sample(self.decode(indices), noise.fold_in(key, 1))

    def perplexity(self, x: Tensor) -> Tensor:
        """How many of the K codes x uses, all of it counted together: 1 to K."""
        indices = self.encode(x).flatten()
        return perplexity(torch.bincount(indices, minlength=len(self.codebook.codes)))


def _residual(width: int, dropout: float) -> nn.Module:
    class Block(nn.Sequential):
        def forward(self, h: Tensor) -> Tensor:
            return h + super().forward(h)

    convolution = nn.Conv2d(width, width, 3, 1, 1)
    return Block(nn.SiLU(), nn.Dropout(dropout), convolution, nn.SiLU(), nn.Conv2d(width, width, 1))


def image_vqvae(
    pixels: int,
    levels: int,
    *,
    codes: int = 32,
    code_width: int = 8,
    width: int = 32,
    dropout: float = 0.1,
    commitment: float = 0.25,
    decay: float = 0.99,
    restart: float = 1.0,
    learned: bool = False,
) -> VQVAE:
    """A convolutional VQ-VAE of square grey images [B, pixels], one code for 2 x 2 pixels.

    x: levels, int64 in [0, levels). learned: a LearnedCodebook in place of a RunningCodebook.
    """
    side = math.isqrt(pixels)
    if side * side != pixels or side % 2:
        raise ValueError(
            f"vqvae: pictures must be square with an even side, got {pixels} pixels; crop them"
        )
    kind = LearnedCodebook if learned else RunningCodebook
    codebook = kind(codes, code_width, commitment=commitment, decay=decay, restart=restart)
    encoder = nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        nn.Conv2d(1, width, 4, 2, 1),
        _residual(width, dropout),
        nn.SiLU(),
        nn.Conv2d(width, code_width, 1),
    )
    decoder = nn.Sequential(
        nn.Conv2d(code_width, width, 3, 1, 1),
        _residual(width, dropout),
        nn.SiLU(),
        nn.ConvTranspose2d(width, width, 4, 2, 1),
        nn.SiLU(),
        nn.Conv2d(width, levels, 1),
        nn.Flatten(2),
        Transpose(),
    )
    return VQVAE(encoder, decoder, codebook, Categorical(levels), (side // 2, side // 2))


class Transpose(nn.Module):
    """[B, L, pixels] -> [B, pixels, L], as a Categorical takes logits."""

    def forward(self, x: Tensor) -> Tensor:
        """Of the last two dimensions."""
        return x.mT
