"""The variational bound of a diffusion model, term by term (Ho et al. 2020, eq. 5, 12 and 13).

    -log p(x_0) <= KL(q(x_T|x_0) || p(x_T)) + sum_t KL(q(x_t-1|x_t, x_0) || p(x_t-1|x_t))
                   - E log p(x_0|x_1)
q(x_t-1|x_t, x_0) has variance small_t and mean e x_t + f x_0, p the same with the network's x_0 and
a variance v_t, so that each KL is D/2 (small/v - 1 - log small/v) + f^2 |x_0 - x_0_hat|^2 / (2 v).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gmkernels import metrics, noise
from gmkernels.ops.diffusion_noise import add_noise, denoising_loss
from gmkernels.schedule import Schedule


@dataclass(frozen=True)
class Bound:
    """The variational bound of -log p(x), term by term, nats.

    Attributes:
        prior: KL(q(x_T|x_0) || p(x_T)), [B].
        steps: KL(q(x_t-1|x_t, x_0) || p(x_t-1|x_t)) for t = 1, ..., T - 1 in rows, [T - 1, B].
        decoder: -log p(x_0|x_1), [B].
        dimensions: D, elements of a row.
    """

    prior: Tensor
    steps: Tensor
    decoder: Tensor
    dimensions: int

    @property
    def nats(self) -> Tensor:
        """The sum of all terms, [B]."""
        return self.prior + self.steps.sum(0) + self.decoder

    @property
    def bits_per_dim(self) -> Tensor:
        """nats / (D ln 2), [B]."""
        return metrics.bits_per_dim(self.nats, self.dimensions)


def variational_bound(
    estimate: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    schedule: Schedule,
    kind: str,
    variance: str | Tensor,
    levels: int | None,
    key: Tensor,
) -> Bound:
    """The bound of x0 [B, *] under estimate(x_t, t int64 [B]), a prediction of that type."""
    dimensions = x0[0].numel() if len(x0) else 0
    a, s = schedule.levels64[:, :2].unbind(1)
    a1, s1 = torch.cat([a.new_ones(1), a[:-1]]), torch.cat([s.new_zeros(1), s[:-1]])
    added = (s * s - (a / a1 * s1).square()).clamp(min=0)
    small, by_x0 = added * s1 * s1 / (s * s), a1 * added / (s * s)
    if isinstance(variance, str):
        named = {"fixed_small": torch.cat([small[1:2], small[1:]]), "fixed_large": added}
        if variance not in named:
            raise ValueError(f"vlb: variance must be one of {', '.join(named)}, got {variance!r}")
        variance = named[variance]
    ratio = (small / variance).clamp(min=1e-300)
    constant = 0.5 * dimensions * (ratio - 1 - ratio.log())
    weight = (
        0.5 * dimensions * by_x0.square() / variance * schedule.slopes(schedule.levels64, kind)[1]
    )
    terms, decoder = [], x0.new_zeros(len(x0))
    for t in range(len(schedule)):
        at = torch.full((len(x0),), t, device=x0.device)
        step_key = noise.fold_in(key, t)
        x_t = add_noise(x0, at, schedule, seed=step_key)
        p = estimate(x_t, at)
        if t == 0:
            decoder = _decoder_nats(x0, _mean(x_t, p, schedule, kind), variance[0], levels)
            continue
        error = denoising_loss(p, x0, at, schedule, seed=step_key, prediction_type=kind)
        terms.append(error * weight[t].to(error.dtype) + constant[t].to(error.dtype))
    # The prior is N(0, I), or as wide as the noise where that grows without bound.
    spread = s[-1] if schedule.kind == "variance_exploding" else s.new_ones(())
    q = (s[-1] / spread).square().to(x0.dtype)
    squares = (x0 * (a[-1] / spread).to(x0.dtype)).square().flatten(1).sum(1)
    prior = 0.5 * (dimensions * (q - 1 - q.log()) + squares)
    steps = torch.stack(terms) if terms else x0.new_zeros(0, len(x0))
    return Bound(prior, steps, decoder, dimensions)


def _mean(x: Tensor, p: Tensor, schedule: Schedule, kind: str) -> Tensor:
    """x_0 as the prediction at t = 0 says."""
    a, s = schedule.levels64[0, :2].to(x.dtype)
    if kind == "epsilon":
        return (x - s * p) / a
    if kind == "sample":
        return p
    if kind == "v_prediction":
        return (a * x - s * p) / (a * a + s * s)
    return (x - s * p) / (a + s)


def _decoder_nats(x0: Tensor, mean: Tensor, variance: Tensor, levels: int | None) -> Tensor:
    """-log p(x_0|x_1), [B]; x0 in [-1, 1] where there are levels."""
    variance = variance.to(x0.dtype)
    if levels is None:
        nats = (x0 - mean).square() / variance + torch.log(2 * math.pi * variance)
        return 0.5 * nats.flatten(1).sum(1)
    half, root = 1 / (levels - 1), variance.sqrt()
    upper = torch.where(x0 > 1 - half, math.inf, (x0 + half - mean) / root)
    lower = torch.where(x0 < half - 1, -math.inf, (x0 - half - mean) / root)
    # Both on the side where the normal's tail keeps its digits.
    flip = lower > 0
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    mass = torch.special.ndtr(upper) - torch.special.ndtr(lower)
    return -mass.clamp(min=1e-30).log().flatten(1).sum(1)
