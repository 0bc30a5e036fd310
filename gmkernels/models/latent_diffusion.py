"""Latent diffusion: a VAE, and a diffusion model of its latents (Rombach et al. 2022, 2112.10752).

The VAE gives q(z|x) = N(mu, diag sigma^2) and p(x|z); u = scale z, with scale = 1 / std(z) measured
on data and stored, so that u has the unit variance that noise schedules are made for; the diffusion
model is p(u). Its loss is the diffusion's own on u, with z ~ q(z|x) and the VAE left as it is.
    sample    u ~ p(u), x ~ p(x|z = u / scale)
    log p(x) = log E_q(z|x) p(x|z) p(z) / q(z|x) >= E_q [log p(x|z) + log p(z)] + H(q(z|x)), Jensen;
    log p(z) = log p(u) + D log scale, D elements of z: the change of variables;
    log p(u) >= -bound(u), the variational bound of the diffusion model; so
    log p(x) >= E_q [log p(x|z) - bound(scale z)] + H(q(z|x)) + D log scale,
    H(q(z|x)) = sum_j (1 + log 2 pi + log sigma_j^2) / 2.
It is tight where q(z|x) and the reverse process are the true posteriors. The prior that trained the
VAE does not enter: what it misses of the latents' distribution, the diffusion model learns. With a
VQ-VAE (models/vq_latents.py) z is a function of x, and there is no bound.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gmkernels import noise
from gmkernels.models.diffusion import Diffusion
from gmkernels.models.text import Captions, TextEncoder
from gmkernels.models.vae import VAE
from gmkernels.models.vq_latents import VQLatents
from gmkernels.ops.gaussian import reparameterize_kl

Text = str | Sequence[str]


class LatentDiffusion(nn.Module):
    """A diffusion model of a trained VAE's latents, conditional on a text, a label, or nothing.

    Args:
        vae: trained before, or VQLatents of a VQ-VAE that was; always in eval mode here and never
            given a gradient.
        diffusion: of floats of the shape vae.latent, [D] or [C, H, W].
        text: makes the network's context of texts; trained with the diffusion model.
        captions: with text: what a label is called. Without text a label goes to the network.

    Everywhere: x as the VAE takes it; seed an int, a key (noise.key) or, but for encode() and
    decode(), None, which draws one from torch's default generator; each row's draws are a function
    of the seed and the row. A condition is text=, one string or one a row, or label=, int64 [B], -1
    for no class; without one, the empty text. Until measure_scale() or a checkpoint has set
    `scale`, what needs it raises RuntimeError; a condition that the model cannot take, ValueError.
    """

    def __init__(
        self,
        vae: VAE | VQLatents,
        diffusion: Diffusion,
        *,
        text: TextEncoder | None = None,
        captions: Captions | None = None,
    ) -> None:
        super().__init__()
        if diffusion.shape != vae.latent or diffusion.levels is not None:
            raise ValueError(
                f"LatentDiffusion: the diffusion model must be of floats of the latents' shape "
                f"{vae.latent}, got shape {diffusion.shape} and levels {diffusion.levels}"
            )
        if captions is not None and text is None:
            raise ValueError("LatentDiffusion: captions need a text encoder; give text=")
        self.vae, self.diffusion, self.text, self.captions = vae.eval(), diffusion, text, captions
        self.scale: Tensor
        self.register_buffer("scale", torch.full((), math.nan))

    @property
    def log_prob_kind(self) -> str:
        """ "lower bound", or "none" of a VQ-VAE's latents."""
        return self.vae.log_prob_kind

    @property
    def takes(self) -> str:
        """The x of the verbs: "levels" (integers) or "unit" (floats)."""
        return self.vae.takes

    @property
    def measured(self) -> bool:
        """Whether the scale is set."""
        return not bool(self.scale.isnan())

    def train(self, mode: bool = True) -> "LatentDiffusion":
        """As of any module, but the VAE stays in eval mode."""
        super().train(mode)
        self.vae.eval()
        return self

    @torch.no_grad()
    def measure_scale(self, x: Tensor, *, seed: noise.Seed = None) -> Tensor:
        """Sets the scale to 1 / std of z ~ q(z|x) over all elements of a batch; returns it, []."""
        deviation = self._draw(x, seed)[0].double().std(correction=0)
        if not 0 < float(deviation) < math.inf:
            raise ValueError(
                f"measure_scale: the latents must vary and be finite, their deviation over "
                f"{len(x)} rows is {float(deviation)}; train the VAE first"
            )
        return self.scale.copy_(1 / deviation)

    def encode(self, x: Tensor, *, seed: noise.Seed = None) -> Tensor:
        """u = scale z [B, *latent] of x: z ~ q(z|x) with a seed, the mean of q(z|x) without."""
        scale = self._known_scale("encode")
        return scale * (self.vae.encode(x)[0] if seed is None else self._draw(x, seed)[0])

    def decode(self, u: Tensor, *, seed: noise.Seed = None) -> Tensor:
        """x of u = scale z: x ~ p(x|z) with a seed, the mean of p(x|z), floats, without."""
        output = self.vae.decode(u / self._known_scale("decode"))
        if seed is None:
            return self.vae.likelihood.mean(output)
        return self.vae.likelihood.sample(output, noise.key(seed))

    def loss(
        self,
        x: Tensor,
        label: Tensor | None = None,
        *,
        text: Text | None = None,
        seed: noise.Seed = None,
        **conditions: Any,
    ) -> Tensor:
        """What training minimises, a scalar: the diffusion's loss on u. No gradient to the VAE.

        A label becomes one of its captions, drawn anew; a share diffusion.condition_dropout of the
        texts becomes empty. Other conditions go to the network.
        """
        key = noise.resolve_key("loss", seed, 0, None, x.device)
        with torch.no_grad():
            u = self.encode(x, seed=noise.fold_in(key, 0))
        if self.captions is not None and label is not None and text is None:
            text, label = self.captions.draw(label, noise.fold_in(key, 1)), None
        if text is not None:
            u01 = noise.uniform((len(x), 1), seed=noise.fold_in(key, 2).cpu(), device="cpu")
            dropped = (u01[:, 0] <= self.diffusion.condition_dropout).tolist()
            texts = self._texts(text, len(x))
            text = ["" if drop else t for t, drop in zip(texts, dropped, strict=True)]
        conditions |= self._conditions(len(x), label, text)
        return self.diffusion.loss(u, seed=noise.fold_in(key, 3), **conditions)

    def log_prob(
        self,
        x: Tensor,
        *,
        label: Tensor | int | None = None,
        text: Text | None = None,
        seed: noise.Seed = None,
        **options: Any,
    ) -> Tensor:
        """A lower bound of log p(x), [B] nats, with one draw of z: the one of the module's header.

        options: variance, as in Diffusion.vlb(), and conditions of the network.
        Raises NotImplementedError: latents of a VQ-VAE.
        """
        scale = self._known_scale("log_prob")
        key = noise.resolve_key("log_prob", seed, 0, None, x.device)
        z, logvar = self._draw(x, noise.fold_in(key, 0))
        if logvar is None:
            raise NotImplementedError(
                "log_prob: a VQ-VAE's latents are a function of x, without a q(z|x) that a bound "
                "needs; take a VAE, or TokenPrior over the codes"
            )
        nll = self.vae.likelihood.nll(x, self.vae.decode(z))
        entropy = 0.5 * (1 + math.log(2 * math.pi) + logvar).flatten(1).sum(1)
        options |= self._conditions(len(x), label, text)
        log_p_u = self.diffusion.log_prob(scale * z, seed=noise.fold_in(key, 1), **options)
        return -nll + log_p_u + entropy + self.diffusion.dimensions * scale.log()

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        label: Tensor | int | None = None,
        text: Text | None = None,
        seed: noise.Seed = None,
        offset: int = 0,
        **options: Any,
    ) -> Tensor:
        """n samples x ~ p(x|z) in the form of the data.

        Args:
            label: [n] or one class for all, by the first of its captions. text: one, or one a row.
            offset: rows to skip: any split of a batch gives the same samples.
            options: sampler, steps, guidance (of the condition against the empty text) and others,
                as in Diffusion.sample().
        """
        self._known_scale("sample")
        device = self.diffusion.device
        key = noise.key(noise.resolve_key("sample", seed, 0, None, device), offset)
        if self.text is not None and options.get("guidance", 1.0) != 1.0:
            options["unconditional"] = self._conditions(n, None, "")
        options |= self._conditions(n, label, text)
        u = self.diffusion.sample(n, seed=noise.fold_in(key, 0), **options)
        return self.decode(u, seed=noise.fold_in(key, 1))

    def _draw(self, x: Tensor, seed: noise.Seed) -> tuple[Tensor, Tensor | None]:
        """z ~ q(z|x) and the log-variance of q(z|x), None where z is a function of x."""
        mean, logvar = self.vae.encode(x)
        if logvar is None:
            return mean, None
        return reparameterize_kl(mean, logvar, seed=seed)[0], logvar

    def _known_scale(self, verb: str) -> Tensor:
        if not self.measured:  # one scalar read; NaN would spoil everything silently
            raise RuntimeError(
                f"{verb}: the latents' scale must be known; call measure_scale(x) once the VAE is "
                "trained, or load a checkpoint"
            )
        return self.scale

    def _texts(self, text: Text, n: int) -> list[str]:
        texts = [text] * n if isinstance(text, str) else list(text)
        if len(texts) != n:
            raise ValueError(f"text must be one string or {n}, one a row, got {len(texts)}")
        return texts

    def _conditions(
        self, n: int, label: Tensor | int | None, text: Text | None
    ) -> dict[str, Tensor]:
        """What the network is told."""
        if label is not None and text is not None:
            raise ValueError("a condition must be a label or a text, got both; leave one out")
        if text is not None and self.text is None:
            raise ValueError("text= needs a model with a text encoder; this one has none")
        conditions: dict[str, Tensor] = {}
        if label is not None:
            labels = torch.as_tensor(label, device=self.diffusion.device).expand(n)
            if self.captions is None:
                conditions["label"] = labels
            else:
                text = [self.captions.say(i) for i in labels.tolist()]
        if self.text is not None:
            texts = self._texts("" if text is None else text, n)
            conditions["context"], conditions["context_mask"] = self.text.encode(texts)
        return conditions
