"""Diffusion and flow-matching models on the noising and step ops.

q(x_t|x_0) = N(alpha_t x_0, sigma_t^2 I), t = 0, ..., T - 1; a network predicts eps, x_0, v or the
flow's velocity from x_t.
    loss = E_t w_t / D ||target - prediction||^2                              Ho et al. 2020, eq. 14
    -log p(x_0) <= KL(q(x_T|x_0) || p(x_T)) + sum_t KL(q(x_t-1|x_t, x_0) || p(x_t-1|x_t))
                   - E log p(x_0|x_1)                                          Ho et al. 2020, eq. 5
The bound is in nats, summed over the D elements of a row, one per row.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gmkernels import noise
from gmkernels.models import sampling
from gmkernels.models.bound import Bound, variational_bound
from gmkernels.ops.diffusion_noise import add_noise, denoising_loss
from gmkernels.sampler import Sampler
from gmkernels.schedule import Schedule

_PATHS = 8  # tables of samplers that a model keeps


class Diffusion(nn.Module):
    """A diffusion (or flow-matching) model around any network.

    Args:
        net: net(x [B, *shape], t float [B], **conditions) -> prediction like x. t is the schedule's
            time of each row; conditions are passed on as they are (label=, context=, concat=, ...).
        schedule: of T times; a flow schedule with "flow_prediction" is rectified flow.
        shape: of one sample, (C, H, W) or (F,).
        prediction_type, weighting, gamma, sigma_data: as in denoising_loss().
        levels: data are integers in [0, levels), any [B, *] of the shape's size, shown to the net
            as [-1, 1]; samples come back so, and the bound is one of their probability. None: data
            are floats [B, *shape].
        condition_dropout: share of training labels replaced by -1, "no class", so that the net
            learns u as well as c.

    Everywhere: seed an int, a key (noise.key) or None, which draws one from torch's default
    generator; a row's draws are a function of the seed and the row (offset + b).
    """

    log_prob_kind = "lower bound"
    default_sampler = "ddim"

    def __init__(
        self,
        net: Callable[..., Tensor],
        schedule: Schedule,
        shape: tuple[int, ...],
        *,
        prediction_type: str = "epsilon",
        weighting: str = "uniform",
        gamma: float = 5.0,
        sigma_data: float = 0.5,
        levels: int | None = None,
        condition_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0 <= condition_dropout <= 1:
            raise ValueError(
                f"Diffusion: condition_dropout must lie in [0, 1], got {condition_dropout}"
            )
        self.net, self.schedule, self.shape = net, schedule, tuple(shape)
        self.prediction_type, self.weighting, self.gamma = prediction_type, weighting, gamma
        self.sigma_data = sigma_data
        self.levels, self.condition_dropout = levels, condition_dropout
        self.dimensions = math.prod(shape)
        self._paths: dict[Any, Sampler] = {}

    @property
    def takes(self) -> str:
        """The x of the verbs: "levels" (integers) or "unit" (floats)."""
        return "levels" if self.levels is not None else "unit"

    def data(self, x: Tensor) -> Tensor:
        """x as the network sees it, [B, *shape]."""
        if self.levels is None:
            return x.view(-1, *self.shape)
        return (x.view(-1, *self.shape).float() * 2 / (self.levels - 1)) - 1

    def undata(self, x: Tensor) -> Tensor:
        """Back to the data's own form: levels [B, *shape] int64, or x."""
        if self.levels is None:
            return x
        return ((x + 1) * ((self.levels - 1) / 2)).round().clamp(0, self.levels - 1).long()

    def predict(self, x_t: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """The network's output at times t, float [B]."""
        return self.net(x_t, t, **conditions)

    def estimate(self, x_t: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """What the loss compares with its target, at times t as add_noise() takes them, [B]."""
        return self.predict(x_t, t.to(x_t.dtype), **conditions)

    def draw_times(self, u: Tensor) -> Tensor:
        """Times of training for uniform u in (0, 1], [B]: each of the schedule's as often."""
        return (u * len(self.schedule)).ceil().long() - 1

    def loss(
        self, x: Tensor, label: Tensor | None = None, *, seed: noise.Seed = None, **conditions: Any
    ) -> Tensor:
        """What training minimises, a scalar: the weighted mean square at one time a row."""
        x0 = self.data(x)
        key = noise.resolve_key("loss", seed, 0, None, x0.device)
        drawn = noise.uniform((len(x0), 2), seed=noise.fold_in(key, 0), device=x0.device)
        t = self.draw_times(drawn[:, 0])
        if label is not None:
            conditions["label"] = torch.where(drawn[:, 1] <= self.condition_dropout, -1, label)
        noise_key = noise.fold_in(key, 1)
        x_t = add_noise(x0, t, self.schedule, seed=noise_key)
        return denoising_loss(
            self.estimate(x_t, t, **conditions),
            x0,
            t,
            self.schedule,
            seed=noise_key,
            prediction_type=self.prediction_type,
            weighting=self.weighting,
            gamma=self.gamma,
            sigma_data=self.sigma_data,
        ).mean()

    def vlb(
        self,
        x: Tensor,
        *,
        seed: noise.Seed = None,
        offset: int = 0,
        variance: str | Tensor = "fixed_large",
        **conditions: Any,
    ) -> Bound:
        """The variational bound of -log p(x), term by term: T evaluations of the network.

        variance: of p(x_t-1|x_t), "fixed_small", "fixed_large", or a tensor [T]; that of t = 0 is
        the decoder's, and fixed_small takes t = 1's there. The decoder is a Gaussian, discretized
        to the levels where there are levels (Ho et al. 2020, eq. 13).
        """
        key = noise.key(noise.resolve_key("vlb", seed, 0, None, x.device), offset)
        estimate = functools.partial(self.estimate, **conditions)
        x0, kind = self.data(x), self.prediction_type
        return variational_bound(estimate, x0, self.schedule, kind, variance, self.levels, key)

    def log_prob(self, x: Tensor, *, seed: noise.Seed = None, **conditions: Any) -> Tensor:
        """A lower bound of log p(x), [B] nats: minus vlb()."""
        return -self.vlb(x, seed=seed, **conditions).nats

    def sampler(self, name: str = "ddim", steps: int | None = None, **options: Any) -> Sampler:
        """The sampler of that name for this model, on its device; options as in Sampler.

        DDIM derives eps from the clamped x0 unless told otherwise: with guidance, eps beside an x0
        that was clamped away from it leaves the data (digits at guidance 2: 15 % of the samples
        show the class that was asked for, 100 % so).
        """
        steps = min(50, len(self.schedule)) if steps is None else steps
        if name not in sampling.STEPS:
            raise ValueError(f"sampler must be one of {', '.join(sampling.STEPS)}, got {name!r}")
        options = {"prediction_type": self.prediction_type, **options}
        if name == "ddim":
            options.setdefault("rederive_epsilon", True)
        return getattr(Sampler, name)(self.schedule, steps, **options).to(self.device)

    def _path(self, name: str, steps: int | None) -> Sampler:
        """sampler(name, steps), made once: it is computed on the host and copied to the device."""
        key = (name, steps, self.prediction_type, self.sigma_data, self.schedule, self.device)
        path = self._paths.pop(key, None)
        if path is None:
            with torch.inference_mode(False):  # it may be used outside of it later
                path = self.sampler(name, steps)
        self._paths[key] = path  # last: the first has not been used for longest
        if len(self._paths) > _PATHS:
            del self._paths[next(iter(self._paths))]
        return path

    @property
    def device(self) -> torch.device:
        """Where the schedule is, and the network must be."""
        return self.schedule.levels.device

    def told(self, path: Sampler) -> Tensor:
        """What the network is told at each evaluation of a path, [S]."""
        return path.times

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        steps: int | None = None,
        sampler: str | Sampler | None = None,
        label: Tensor | int | None = None,
        clip: float | None = None,
        seed: noise.Seed = None,
        offset: int = 0,
        **options: Any,
    ) -> Tensor:
        """n samples [n, *shape] in the form of the data.

        Args:
            sampler: a name ("ddim", the default, "ddpm", ...) for `steps` steps, by default 50 or
                as many as there are times, whose table is kept for the next call; or a Sampler.
            label: [n] or one class for all. clip: of x0; 1 for levels unless given.
            offset: rows to skip: any split of a batch gives the same samples.
            options: guidance, unconditional, classifier, scale, dynamic_threshold and conditions of
                the network, as in sampling.run().
        """
        path = sampler
        if not isinstance(path, Sampler):
            path = self._path(path or self.default_sampler, steps)
        key = noise.key(noise.resolve_key("sample", seed, 0, None, self.device), offset)
        x = noise.normal((n, *self.shape), seed=noise.fold_in(key, 0), device=self.device)
        # Where the path begins the signal is all but gone: its noise alone is left.
        first = path.levels[0]
        x = x * (first[1] if self.schedule.kind == "variance_exploding" else first.norm())
        if isinstance(label, int):
            options["label"] = torch.full((n,), label, device=self.device)
        elif label is not None:
            options["label"] = torch.as_tensor(label, device=self.device).expand(n)
        if clip is None and self.levels is not None and "dynamic_threshold" not in options:
            clip = 1.0
        options |= {"clip": clip, "seed": noise.fold_in(key, 1), "times": self.told(path)}
        return self.undata(sampling.run(self.predict, path, x, **options))
