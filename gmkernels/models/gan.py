"""Generative adversarial networks (Goodfellow et al. 2014, 1406.2661).

    min_G max_D V(D, G) = E_x log D(x) + E_z log(1 - D(G(z))),    x = G(z), z ~ N(0, I)
For a fixed G with density q the best D is D* = p / (p + q), and V(D*, G) = -log 4 + 2 JS(p, q): at
equilibrium q = p, D* = 1/2 and V = -log 4. Algorithm 1, here `update`, alternates

    k times:  one step of D down d_loss, on m data x and m samples G(z)
    once:     one step of G down g_loss, on m samples G(z)
with any of the losses of models/gan_losses.py, and with what holds D to be smooth: a penalty on the
gradient of its scores, clipped weights, or the spectral norm. G's density has no formula.
"""

import copy
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from gmkernels import noise
from gmkernels.models.gan_losses import LOSSES, Penalty, mixes_rows


class Balance(NamedTuple):
    """Where the two players stand, scalars.

    Attributes:
        real, fake: mean of D on data and on samples, 1/2 and 1/2 at equilibrium; of a loss that is
            not logistic the mean score.
        value: what D maximises, without its penalty: of minimax and non_saturating V(D, G), -log 4
            at equilibrium; of wasserstein E critic(x) - E critic(G(z)).
    """

    real: Tensor
    fake: Tensor
    value: Tensor


class GAN(nn.Module):
    """A (conditional) generator and its discriminator.

    Args:
        generator: (z [B, *latent], label= if there are classes) -> [B, *shape].
        discriminator: (x [B, *shape], label= if there are classes) -> scores [B], logits of D.
        latent: Z, or the shape of z. shape: of a row of data.
        loss: "non_saturating", "minimax", "hinge", "least_squares" or "wasserstein".
        penalty: GradientPenalty(), R1() or None; D may hold no batch norm then.
        clip: weights of D stay in [-clip, clip] (Arjovsky et al. 2017, algorithm 1); 0: free.
        critic_steps: k of Algorithm 1.
        average: decay of a running average of G's weights, which sample() then draws from; 0: none.
        classes: of the labels; 0: none.
    Raises:
        ValueError: a loss that is not known, a number out of its range, a batch norm beside a
            penalty.

    Everywhere: x [B, *], of `shape` or flat; label int64 [B]; seed an int, a key (noise.key) or
    None, which draws one from torch's default generator. z of row b is a function of (seed, b).
    Call eval() before sample() where G holds batch norm or dropout.

    >>> import torch
    >>> from gmkernels.models import gan, gan_nets
    >>> nets = gan_nets.PointGenerator(4, 2), gan_nets.PointCritic(2)
    >>> model = gan.GAN(*nets, latent=4, shape=(2,))
    >>> model.d_loss(torch.zeros(3, 2), seed=0).shape, model.sample(5, seed=0).shape
    (torch.Size([]), torch.Size([5, 2]))
    """

    log_prob_kind = "none"
    takes = "unit"

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        *,
        latent: int | tuple[int, ...],
        shape: tuple[int, ...],
        loss: str = "non_saturating",
        penalty: Penalty | None = None,
        clip: float = 0.0,
        critic_steps: int = 1,
        average: float = 0.0,
        classes: int = 0,
    ) -> None:
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"GAN: loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        if clip < 0 or critic_steps < 1 or not 0 <= average < 1:
            raise ValueError(
                "GAN: clip must be >= 0, critic_steps >= 1 and average in [0, 1), got "
                f"{clip}, {critic_steps} and {average}"
            )
        if penalty is not None and (name := mixes_rows(discriminator)) is not None:
            raise ValueError(
                f"GAN: a penalty needs each score's own gradient, and the batch norm {name!r} of "
                "the discriminator mixes the rows; leave it out, or use a LayerNorm"
            )
        self.generator, self.discriminator = generator, discriminator
        self.latent = (latent,) if isinstance(latent, int) else tuple(latent)
        self.shape, self.rule, self.penalty, self.clip = shape, LOSSES[loss], penalty, clip
        self.critic_steps, self.average, self.classes = critic_steps, average, classes
        self.averaged = copy.deepcopy(generator).requires_grad_(False) if average else None
        self.origin: Tensor
        self.register_buffer("origin", torch.zeros(self.latent), persistent=False)

    @property
    def least_batch(self) -> int:
        """Rows that update() needs: one for each step of D."""
        return self.critic_steps

    def generate(self, n: int, label: Tensor | None = None, *, seed: noise.Seed = None) -> Tensor:
        """G(z) of n draws of z, [n, *shape], differentiable in G; of the weights being trained."""
        return self._generate(self.generator, n, label, seed)

    def score(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """The discriminator's scores, [B]; sigmoid of them is D if the loss is logistic."""
        return self.discriminator(x.reshape(len(x), *self.shape), **self._condition(label))

    def d_loss(self, x: Tensor, label: Tensor | None = None, *, seed: noise.Seed = None) -> Tensor:
        """What the discriminator minimises, a scalar: the mean over x, and over as many samples."""
        key = noise.resolve_key("d_loss", seed, 0, None, x.device)
        with torch.no_grad():
            fake = self.generate(len(x), label, seed=noise.fold_in(key, 0))
        loss = self.rule.real(self.score(x, label)) + self.rule.fake(self.score(fake, label))
        if self.penalty is not None:
            x = x.reshape(fake.shape)
            conditions = self._condition(label)
            own = noise.fold_in(key, 1)
            loss = loss + self.penalty(self.discriminator, x, fake, seed=own, **conditions)
        return loss.mean()

    def g_loss(self, n: int, label: Tensor | None = None, *, seed: noise.Seed = None) -> Tensor:
        """What the generator minimises, a scalar: the mean over n samples."""
        return self.rule.generator(self.score(self.generate(n, label, seed=seed), label)).mean()

    @torch.no_grad()
    def balance(
        self, x: Tensor, label: Tensor | None = None, *, seed: noise.Seed = None
    ) -> Balance:
        """Mean outputs of D and its value on x and as many samples."""
        real = self.score(x, label)
        fake = self.score(self.generate(len(x), label, seed=seed), label)
        value = -(self.rule.real(real) + self.rule.fake(fake)).mean()
        if self.rule.logistic:
            real, fake = real.sigmoid(), fake.sigmoid()
        return Balance(real.mean(), fake.mean(), value)

    @torch.no_grad()
    def end_critic_step(self) -> None:
        """Clips the discriminator's weights, if they are to be clipped."""
        if self.clip:
            for p in self.discriminator.parameters():
                p.clamp_(-self.clip, self.clip)

    @torch.no_grad()
    def end_step(self) -> None:
        """Moves the average of the generator's weights; other state (batch norm's) is copied."""
        if self.averaged is None:
            return
        pairs = zip(self.averaged.parameters(), self.generator.parameters(), strict=True)
        for mean, p in pairs:
            mean.lerp_(p, 1 - self.average)
        for copied, b in zip(self.averaged.buffers(), self.generator.buffers(), strict=True):
            copied.copy_(b)

    @torch.no_grad()
    def sample(
        self, n: int, label: int | Tensor | None = None, *, seed: noise.Seed = None
    ) -> Tensor:
        """n samples [n, *shape] of one class, of n given ones, or of classes drawn evenly."""
        device = self.origin.device
        key = noise.resolve_key("sample", seed, 0, None, device)
        if label is None and self.classes:
            u = noise.uniform((n, 1), seed=noise.fold_in(key, 1), device=device)[:, 0]
            label = (u * self.classes).ceil().long() - 1
        elif isinstance(label, int):
            label = torch.full((n,), label, device=device)
        net = self.generator if self.averaged is None else self.averaged
        return self._generate(net, n, label, key)

    def log_prob(self, x: Tensor) -> NoReturn:
        """Raises: a GAN has none."""
        raise NotImplementedError(
            "GAN: there is no log_prob(x): G is not invertible, so the density of G(z) has no "
            "formula; sample() and balance() are what can be asked, and gmkernels.metrics"
        )

    def _generate(self, net: nn.Module, n: int, label: Tensor | None, seed: noise.Seed) -> Tensor:
        zero = self.origin
        z = noise.normal((n, *self.latent), seed=seed, dtype=zero.dtype, device=zero.device)
        return net(z, **self._condition(label))

    def _condition(self, label: Tensor | None) -> dict[str, Tensor]:
        if (label is None) != (not self.classes):
            had = "classes=0" if label is not None else f"classes={self.classes} and no label"
            raise ValueError(f"GAN: label goes with a model made with classes > 0, got {had}")
        return {} if label is None else {"label": label}


def update(
    model: GAN,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    label: Tensor | None = None,
    *,
    seed: noise.Seed = None,
) -> Tensor:
    """Algorithm 1: x is cut into k minibatches for D's steps, then one of G; returns mean d_loss.

    One optimizer over model.parameters() serves both: it steps those that have a gradient, and each
    player's backward reaches its own alone.

    Args:
        x: [k m, *] data, k = model.critic_steps. label: int64 [k m] or None. seed: as in GAN.
    Returns:
        A scalar, detached.
    Raises:
        ValueError: fewer rows than critic steps.
    """
    k = model.critic_steps
    if len(x) < k:
        raise ValueError(f"update: x must hold a row or more for each of {k} steps, got {len(x)}")
    key = noise.resolve_key("update", seed, 0, None, x.device)
    size = len(x) // k
    total = x.new_zeros(())
    for i in range(k):
        rows = slice(i * size, (i + 1) * size)
        loss = model.d_loss(
            x[rows], None if label is None else label[rows], seed=noise.fold_in(key, i)
        )
        player_step(optimizer, loss, model.discriminator)
        model.end_critic_step()
        total += loss.detach()
    loss = model.g_loss(size, None if label is None else label[:size], seed=noise.fold_in(key, k))
    player_step(optimizer, loss, model.generator)
    model.end_step()
    return total / k


def player_step(optimizer: torch.optim.Optimizer, loss: Tensor, player: nn.Module) -> None:
    """One step of one player down its loss; the others' weights get no gradient and stay."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=list(player.parameters()))
    optimizer.step()
