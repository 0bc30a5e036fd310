"""A VQ-VAE's latents for a latent diffusion model (Rombach et al. 2022, section 3.1, "VQ-reg.").

They are the encoder's vectors before the codebook; decoding begins with their nearest codes. So the
diffusion model is of floats, and what it misses by less than half the way between two codes costs
nothing. The encoder is deterministic: there is no q(z|x) with a density, and no bound of log p(x).
"""

from torch import Tensor, nn

from gmkernels.models.likelihood import Likelihood
from gmkernels.models.vqvae import VQVAE
from gmkernels.ops.quantize import nearest_code


class VQLatents(nn.Module):
    """A trained VQ-VAE in the place of LatentDiffusion's VAE: its latent, encode and decode.

    latent: (D, *grid), the shape of a latent z. log_prob_kind is "none".
    """

    log_prob_kind = "none"

    def __init__(self, vqvae: VQVAE) -> None:
        super().__init__()
        self.vqvae = vqvae
        self.latent = (vqvae.codebook.codes.shape[1], *vqvae.grid)

    @property
    def takes(self) -> str:
        """The x that the VQ-VAE takes: "levels" or "unit"."""
        return self.vqvae.takes

    @property
    def likelihood(self) -> Likelihood:
        """p(x|codes)."""
        return self.vqvae.likelihood

    def encode(self, x: Tensor) -> tuple[Tensor, None]:
        """z [B, *latent] of x before the codebook, and no log-variance: z is a function of x."""
        return self.vqvae.vectors(x), None

    def decode(self, z: Tensor) -> Tensor:
        """Parameters of p(x|the nearest codes of z [B, *latent])."""
        return self.vqvae.decode(nearest_code(z.movedim(1, -1), self.vqvae.codebook.codes))
