"""The loop of every diffusion sampler: one network evaluation and one kernel a step.

With guidance two evaluations, p = u + g (c - u), combined in the step's own pass    Ho and Salimans
2022. Classifier guidance shifts the mean of an ancestral step by s^2 scale grad log p(y|x_t), and
eps by -sigma scale grad log p(y|x_t) elsewhere      Dhariwal and Nichol 2021, algorithms 1 and 2.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gmkernels import noise
from gmkernels.ops.diffusion_step import (
    ddim_step,
    ddpm_step,
    dpmpp_2m_step,
    euler_ancestral_step,
    euler_step,
    flow_euler_step,
    heun_step,
)
from gmkernels.sampler import Sampler

STEPS: dict[str, Callable[..., Any]] = {
    "ddpm": ddpm_step,
    "ddim": ddim_step,
    "euler": euler_step,
    "euler_ancestral": euler_ancestral_step,
    "heun": heun_step,
    "dpmpp_2m": dpmpp_2m_step,
    "flow_euler": flow_euler_step,
}


def run(
    predict: Callable[..., Tensor],
    path: Sampler,
    x: Tensor,
    *,
    guidance: float = 1.0,
    classifier: Callable[[Tensor, Tensor], Tensor] | None = None,
    scale: float = 1.0,
    clip: float | None = None,
    dynamic_threshold: tuple[float, float] | None = None,
    seed: noise.Seed = None,
    times: Tensor | None = None,
    label: Tensor | None = None,
    unconditional: dict[str, Any] | None = None,
    **conditions: Any,
) -> Tensor:
    """x at the end of the path, from x at its beginning.

    Args:
        predict: (x_t, t float [n], label=..., **conditions) -> prediction; label only if given.
        x: [n, *].
        guidance: g; 1 evaluates the network once a step, with all its conditions.
        unconditional: conditions of u, the second evaluation; by default all but the label.
        classifier: (x_t, t float [n]) -> grad log p(y|x_t), like x; scale: its weight.
        clip, dynamic_threshold: of x0, as in ddim_step().
        seed: of the noise, folded by the step inside.
        times: [S], what predict is told at each evaluation; the schedule's times if None.
    Returns:
        [n, *]. Nothing waits for a GPU: each step is one launch beside the network's.
    """
    step, previous = STEPS[path.name], None
    options: dict[str, Any] = {"clip": clip, "dynamic_threshold": dynamic_threshold}
    if path.noisy:
        options["seed"] = seed
    times = path.times if times is None else times
    without = conditions if unconditional is None else unconditional
    if label is not None:
        conditions = {**conditions, "label": label}
    for i in range(len(path)):
        t = times[i].expand(len(x))
        p = predict(x, t, **conditions)
        if guidance != 1.0:
            options["unconditional"] = predict(x, t, **without)
            options["guidance"] = guidance
        lift = None
        if classifier is not None:
            gradient = scale * classifier(x, t)
            if path.name == "ddpm":
                lift = path.column("s")[i].square() * gradient
            else:
                p = p + _shift(path, i) * gradient
        if path.name == "dpmpp_2m":
            x, previous = step(x, p, i, path, previous=previous, **options)
        elif path.name == "heun":
            before = x
            x, previous = step(x, p, i, path, previous=previous, **options), before
        else:
            x = step(x, p, i, path, **options)
        if lift is not None:
            x = x + lift
    return x


def _shift(path: Sampler, i: int) -> Tensor:
    """What moves the prediction so that eps moves by -sigma: eps = (x - alpha x0) / sigma."""
    alpha, sigma = path.level_of(i)
    return torch.where(alpha > 0, sigma.square() / (alpha * path.column("B")[i]), 0.0)
