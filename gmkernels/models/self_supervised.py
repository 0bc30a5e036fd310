"""Self-supervised learning: what two views of one sample have in common. On nt_xent and info_nce.

f an encoder, g a projector, t and t' random views, z = g(f(t(x))), z' = g(f(t'(x))):
    SimCLR: NT-Xent of z and z' among all views of the batch         Chen et al. 2020, eq. 1
    CLIP: symmetric InfoNCE of two kinds of data, exp(log tau)       Radford et al. 2021, figure 3
    Barlow Twins: sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2    Zbontar et al. 2021, eq. 1
        C the cross-correlation of z and z' over the batch
    BYOL: 2 - 2 cos(q(z), z'_xi) both ways, q a predictor, xi an     Grill et al. 2020, eq. 2
        exponential moving average of the weights, no gradient to it
What is used afterwards is f(x): features(), for a linear probe or for neighbours. None of them is a
model of p(x).
"""

import copy
import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmkernels import noise
from gmkernels.ops.contrastive import info_nce, nt_xent

Views = Callable[..., Tensor]


class _NoDensity(nn.Module):
    """Says why there is neither log_prob nor sample."""

    log_prob_kind = "none"
    takes = "unit"

    def log_prob(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises NotImplementedError: there is no density."""
        raise NotImplementedError(
            f"{type(self).__name__} has no log_prob: it learns features of x, not p(x); a flow or "
            "a mixture fitted to features(x) has one, of the features"
        )

    def sample(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises NotImplementedError: there is nothing to draw from."""
        raise NotImplementedError(
            f"{type(self).__name__} has no sample(): an encoder has no way back from features to x"
        )


class _TwoViews(_NoDensity):
    """f, g and the views, which SimCLR, Barlow Twins and BYOL share.

    Args:
        encoder: f, x [B, *] -> features [B, F].
        projector: g, features -> embeddings [B, D].
        augment: (x, seed=key) -> a random view of each row, as gmkernels.models.augment.Augment.

    Everywhere: x as augment and the encoder take it; seed an int, a key or None, which draws one
    from torch's default generator.
    """

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor],
        projector: Callable[[Tensor], Tensor],
        augment: Views,
    ) -> None:
        super().__init__()
        self.encoder, self.projector, self.augment = encoder, projector, augment

    def features(self, x: Tensor) -> Tensor:
        """f(x) without augmentation, [B, F]. Call eval() first where there is batch norm."""
        return self.encoder(x)

    def views(self, x: Tensor, *, seed: noise.Seed = None) -> tuple[Tensor, Tensor]:
        """Two independent views of each row."""
        key = noise.resolve_key("views", seed, 0, None, x.device)
        first, second = (self.augment(x, seed=noise.fold_in(key, i)) for i in range(2))
        return first, second

    def embed(self, x: Tensor) -> Tensor:
        """g(f(x)), [B, D]."""
        return self.projector(self.encoder(x))

    def losses(self, x: Tensor, *, seed: noise.Seed = None) -> Tensor:
        """The loss of each row, [B], whose mean is loss()."""
        raise NotImplementedError

    def loss(self, x: Tensor, *, seed: noise.Seed = None) -> Tensor:
        """What training minimises, a scalar."""
        return self.losses(x, seed=seed).mean()


class SimCLR(_TwoViews):
    """NT-Xent of two views. Args: as in _TwoViews; temperature: tau, a number."""

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor],
        projector: Callable[[Tensor], Tensor],
        augment: Views,
        *,
        temperature: float = 0.5,
    ) -> None:
        super().__init__(encoder, projector, augment)
        self.temperature = temperature

    def losses(self, x: Tensor, *, seed: noise.Seed = None) -> Tensor:
        """NT-Xent of each row's two views among the batch's, [B] nats."""
        z1, z2 = (self.embed(view) for view in self.views(x, seed=seed))
        return nt_xent(z1, z2, temperature=self.temperature)


def cross_correlation(z1: Tensor, z2: Tensor) -> Tensor:
    """C_ij: correlation over the batch of feature i of z1 [B, D] and feature j of z2, [D, D].

    Means, variances and products are float32 (float64 of float64). A feature that is constant over
    the batch, or varies by no more than rounding, has correlation 0 to all and no gradient.
    """
    if z1.dim() != 2 or z1.shape != z2.shape or len(z1) < 2:
        raise ValueError(
            "cross_correlation: both must have one shape [B, D] with B >= 2, got "
            f"{tuple(z1.shape)} and {tuple(z2.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(z1.dtype, z2.dtype), torch.float32)

    def standardised(z: Tensor) -> Tensor:
        z = z.to(dtype)
        mean = z.mean(0)
        centred = z - mean
        variance = centred.square().mean(0)
        varies = variance > 1e-12 * mean.square()
        return centred * torch.where(varies, torch.where(varies, variance, 1.0).rsqrt(), 0.0)

    with torch.autocast(z1.device.type, enabled=False):
        return standardised(z1).T @ standardised(z2) / len(z1)


class BarlowTwins(_TwoViews):
    """Cross-correlation to identity. Args: as in _TwoViews; lam: lambda, of redundancy."""

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor],
        projector: Callable[[Tensor], Tensor],
        augment: Views,
        *,
        lam: float = 5e-3,
    ) -> None:
        super().__init__(encoder, projector, augment)
        self.lam = lam

    @staticmethod
    def distance(c: Tensor, lam: float) -> Tensor:
        """sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2 of C [D, D], a scalar."""
        diagonal = c.diagonal()
        apart = c - torch.diag(diagonal)
        return (1 - diagonal).square().sum() + lam * apart.square().sum()

    def losses(self, x: Tensor, *, seed: noise.Seed = None) -> Tensor:
        """The batch's loss, the same for each row, [B]."""
        z1, z2 = (self.embed(view) for view in self.views(x, seed=seed))
        return self.distance(cross_correlation(z1, z2), self.lam).expand(len(x))


class BYOL(_TwoViews):
    """Each view predicts what a slower copy of the network makes of the other.

    Call update() after each optimizer step. The target's parameters take no gradient; its batch
    norms keep statistics of their own.

    Args: as in _TwoViews (both are copied for the target), and
        predictor: q, embeddings -> embeddings.
        decay: of the moving average that the target is, in [0, 1].
    """

    def __init__(
        self,
        encoder: nn.Module,
        projector: nn.Module,
        predictor: Callable[[Tensor], Tensor],
        augment: Views,
        *,
        decay: float = 0.99,
    ) -> None:
        super().__init__(encoder, projector, augment)
        if not 0 <= decay <= 1:
            raise ValueError(f"BYOL: decay must lie in [0, 1], got {decay}")
        self.predictor, self.decay = predictor, decay
        self.target = nn.Sequential(copy.deepcopy(encoder), copy.deepcopy(projector))
        self.target.requires_grad_(False)

    def losses(self, x: Tensor, *, seed: noise.Seed = None) -> Tensor:
        """2 - 2 cos of prediction and target, summed over both directions, [B], in [0, 8]."""
        views = self.views(x, seed=seed)
        with torch.no_grad():
            targets = [self.target(view) for view in views]
        predictions = [self.predictor(self.embed(view)) for view in views]
        both = zip(predictions, reversed(targets), strict=True)
        cosines = [F.cosine_similarity(q.float(), z.float()) for q, z in both]
        return 4 - 2 * (cosines[0] + cosines[1])

    @torch.no_grad()
    def update(self) -> None:
        """xi <- decay xi + (1 - decay) theta."""
        theta = [p for n, p in self.named_parameters() if n.startswith(("encoder.", "projector."))]
        for slow, fast in zip(self.target.parameters(), theta, strict=True):
            slow.lerp_(fast, 1 - self.decay)


class CLIP(_NoDensity):
    """Two kinds of data, as pictures and their captions, told to find each other.

    Args:
        first, second: encoders x [B, *] -> [B, D] and y -> [B, D].
        temperature: where the learned temperature begins.

    Call update() after each optimizer step, which keeps the temperature at 0.01 or above.
    """

    def __init__(
        self,
        first: Callable[[Any], Tensor],
        second: Callable[[Any], Tensor],
        *,
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    def temperature(self) -> Tensor:
        """tau, a scalar that gradients reach."""
        return self.log_temperature.exp()

    @torch.no_grad()
    def update(self) -> None:
        """Keeps tau at 0.01 or above: below it a few pairs alone would train."""
        self.log_temperature.clamp_(min=math.log(0.01))

    def loss(self, x: Any, y: Any) -> Tensor:
        """Symmetric InfoNCE of pairs (x_i, y_i), a scalar, nats."""
        return info_nce(self.first(x), self.second(y), temperature=self.temperature()).mean()

    def logits(self, x: Any, y: Any) -> Tensor:
        """cos(x_i, y_j) / tau, [B, M]: a softmax over M captions classifies without training."""
        return F.normalize(self.first(x)) @ F.normalize(self.second(y)).T / self.temperature()
