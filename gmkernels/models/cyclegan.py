"""CycleGAN: translation between two domains without pairs (Zhu et al. 2017, 1703.10593).

G: X -> Y and F: Y -> X, with critics D_X and D_Y of real against translated pictures:
    L(G, F) = LS(D_Y, G(x)) + LS(D_X, F(y))                 least squares, as in gan_losses
              + cycle    (|F(G(x)) - x|_1 + |G(F(y)) - y|_1)
              + identity (|G(y) - y|_1 + |F(x) - x|_1)
|.|_1 is the mean over pixels. The critics see translations of earlier steps too, from a pool of 50:
they are not to forget what the generators have tried (Shrivastava et al. 2017, 1612.07828).
"""

from typing import NoReturn

import torch
from torch import Tensor, nn

from gmkernels import noise
from gmkernels.models.gan import player_step
from gmkernels.models.gan_losses import LOSSES

LS = LOSSES["least_squares"]


class ImagePool(nn.Module):
    """Pictures of earlier steps, part of the state dict.

    Args: size: how many it holds; 0 gives back what comes. shape: of a picture.
    """

    def __init__(self, size: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.pictures: Tensor
        self.count: Tensor
        self.register_buffer("pictures", torch.zeros(size, *shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def swap(self, x: Tensor, *, seed: noise.Seed = None) -> Tensor:
        """x [B, *shape] with about half of its rows stored, and older ones in their place.

        Row by row: while there is room a row is stored and given back; then it is given back, or
        with probability 1/2 stored for a random one of the pool, which is given back. The choices
        are functions of the seed and the row.
        """
        size = len(self.pictures)
        u = noise.uniform((len(x), 2), seed=seed).tolist()  # in (0, 1]
        out, count = x.detach().clone(), int(self.count)
        for i in range(len(x) if size else 0):
            if count < size:
                self.pictures[count] = x[i]
                count += 1
            elif u[i][0] <= 0.5:
                place = min(int(u[i][1] * size), size - 1)
                out[i] = self.pictures[place]
                self.pictures[place] = x[i]
        self.count.fill_(count)
        return out


class CycleGAN(nn.Module):
    """Two generators and two critics.

    Args:
        forward_net, backward_net: G and F, pictures [B, *shape] -> [B, *shape].
        critic_x, critic_y: pictures -> scores [B].
        shape: of a picture. cycle, identity: weights; the paper takes identity = cycle / 2 for
            paintings to photos, 0 elsewhere: where the domains differ in light or place it works
            against the translation. pool: pictures that each pool holds.

    Everywhere: x of domain X, y of domain Y, [B, *] of `shape` or flat, in [0, 1]; not pairs.
    """

    log_prob_kind = "none"
    takes = "unit"

    def __init__(
        self,
        forward_net: nn.Module,
        backward_net: nn.Module,
        critic_x: nn.Module,
        critic_y: nn.Module,
        shape: tuple[int, ...],
        *,
        cycle: float = 10.0,
        identity: float = 0.0,
        pool: int = 50,
    ) -> None:
        super().__init__()
        if cycle < 0 or identity < 0 or pool < 0:
            raise ValueError(
                f"CycleGAN: cycle, identity and pool must be >= 0, got {cycle}, {identity}, {pool}"
            )
        self.generators = nn.ModuleDict({"there": forward_net, "back": backward_net})
        self.critics = nn.ModuleDict({"x": critic_x, "y": critic_y})
        self.pool_x, self.pool_y = ImagePool(pool, shape), ImagePool(pool, shape)
        self.shape, self.cycle, self.identity = shape, cycle, identity

    def translate(self, x: Tensor, *, back: bool = False) -> Tensor:
        """G(x), or with back=True F(x); [B, *shape]."""
        return self.generators["back" if back else "there"](x.reshape(-1, *self.shape))

    def g_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the generators minimise, a scalar; and F(y), G(x), for the critics."""
        x, y = x.reshape(-1, *self.shape), y.reshape(-1, *self.shape)
        fake_x, fake_y = self.translate(y, back=True), self.translate(x)
        loss = LS.generator(self.critics["y"](fake_y)).mean()
        loss = loss + LS.generator(self.critics["x"](fake_x)).mean()
        again_x, again_y = self.translate(fake_y, back=True), self.translate(fake_x)
        loss = loss + self.cycle * ((again_x - x).abs().mean() + (again_y - y).abs().mean())
        if self.identity:
            same_y, same_x = self.translate(y), self.translate(x, back=True)
            loss = loss + self.identity * ((same_y - y).abs().mean() + (same_x - x).abs().mean())
        return loss, fake_x.detach(), fake_y.detach()

    def d_loss(self, x: Tensor, y: Tensor, fake_x: Tensor, fake_y: Tensor) -> Tensor:
        """What the critics minimise, a scalar: the sum of both. fake_x, fake_y: F(y), G(x)."""
        pairs = (("x", x, fake_x), ("y", y, fake_y))
        terms = []
        for name, real, fake in pairs:
            critic = self.critics[name]
            terms.append(LS.real(critic(real.reshape(-1, *self.shape))).mean())
            terms.append(LS.fake(critic(fake)).mean())
        return torch.stack(terms).sum()

    @torch.no_grad()
    def sample(self, x: Tensor) -> Tensor:
        """Translations G(x) of pictures; nothing is random."""
        return self.translate(x)

    def log_prob(self, x: Tensor) -> NoReturn:
        """Raises: a CycleGAN has none."""
        raise NotImplementedError(
            "CycleGAN: there is no log_prob(x): it maps pictures to pictures and has no density"
        )


def update(
    model: CycleGAN,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    *,
    seed: noise.Seed = None,
) -> Tensor:
    """A step of both generators, then one of both critics on pooled translations.

    One optimizer over model.parameters() serves all. Returns g_loss, a scalar, detached.
    """
    key = noise.resolve_key("update", seed, 0, None, x.device)
    loss, fake_x, fake_y = model.g_loss(x, y)
    player_step(optimizer, loss, model.generators)
    fake_x = model.pool_x.swap(fake_x, seed=noise.fold_in(key, 0))
    fake_y = model.pool_y.swap(fake_y, seed=noise.fold_in(key, 1))
    player_step(optimizer, model.d_loss(x, y, fake_x, fake_y), model.critics)
    return loss.detach()
