"""Sampling loops of 50 steps without a network: what the arithmetic of a scheduler costs.

The prediction of a step is one of two fixed tensors in turn, so that x0 changes from step to step
and nothing but the scheduler is timed. Steps are compiled one by one, as around a network: a whole
compiled loop would fuse steps that a network stands between.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.sides import COMPILED, EAGER, OURS, OURS_COMPILED, SEED, Side, compiled, worst
from gmkernels import noise, registry
from gmkernels.sampler import Sampler
from gmkernels.schedule import Schedule
from gmkernels.spec import Case, Op, filled

STEPS = 50
DIFFUSERS = "diffusers"
TOLERANCE = 1e-5  # of the largest value at the end, against float64; all sides stay below 2e-6
SHAPES = ((1, 4, 64, 64), (4, 4, 64, 64), (16, 4, 64, 64), (64, 3, 64, 64))
SMALL = (1, 4, 8, 8)  # where what is timed is the host's work
_SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}
_SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@dataclass(frozen=True)
class Loop:
    """One loop: a sampler by name with its options, the shape of x, the range of x0."""

    sampler: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    clip: float | None = None
    headline: bool = False

    @property
    def op(self) -> Op:
        """The row of its step."""
        return registry.row(f"{self.sampler}_step")

    @property
    def name(self) -> str:
        """What is timed."""
        return f"{self.sampler} loop of {STEPS} steps"

    @property
    def case(self) -> Case:
        """On what, and how."""
        extra = {**self.options, **({} if self.clip is None else {"clip": self.clip})}
        said = ["x".join(map(str, self.shape)), *(f"{k} {v:g}" for k, v in extra.items())]
        return Case(", ".join(said), "large", self.shape)

    @property
    def noisy(self) -> bool:
        """Whether its steps add noise."""
        return self.op.noisy and self.options.get("eta", 1.0) > 0

    @property
    def bytes(self) -> int:
        """Minimal traffic of all steps in float32; a loop that fits the caches moves less."""
        return STEPS * self.op.bytes(self.case, torch.float32, False)


def _at(shape: tuple[int, ...]) -> tuple[Loop, ...]:
    return (
        Loop("ddim", shape, {"eta": 0.0}, headline=shape == SHAPES[0]),
        Loop("ddim", shape, {"eta": 1.0}),
        Loop("ddpm", shape, clip=1.0),
        Loop("euler", shape),
        Loop("dpmpp_2m", shape),
    )


LOOPS = tuple(loop for shape in SHAPES for loop in _at(shape))


@dataclass(frozen=True)
class Given:
    """The start of a loop: x at its first level, the prediction of each step, the sampler."""

    x: Tensor
    predictions: list[Tensor]
    sampler: Sampler


def given(loop: Loop, device: str, dtype: torch.dtype = torch.float32) -> Given:
    """The same values for every side, rounded to float32."""
    drawn = [filled(loop.shape, torch.float32, device, SEED + i).to(dtype) for i in range(3)]
    sampler = getattr(Sampler, loop.sampler)(Schedule.scaled_linear(), STEPS, **loop.options)
    turns = itertools.islice(itertools.cycle(drawn[1:]), STEPS)
    return Given(drawn[0], list(turns), sampler.to(device))


@torch.no_grad()
def walk(
    step: Callable[..., Any], start: Given, indices: Iterable[int | Tensor], **options: Any
) -> Tensor:
    """x after all steps."""
    x = previous = start.x  # the first step multiplies `previous` by 0
    for i, prediction in zip(indices, start.predictions, strict=True):
        if start.sampler.name == "dpmpp_2m":
            x, previous = step(x, prediction, i, start.sampler, previous=previous, **options)
        else:
            x = step(x, prediction, i, start.sampler, **options)
    return x


def _seeded(loop: Loop) -> dict[str, Any]:
    limits = {} if loop.clip is None else {"clip": loop.clip}
    return {**limits, "seed": noise.key(SEED)} if loop.noisy else limits


def names(loop: Loop, quick: bool = False) -> tuple[str, ...]:
    """The sides of a loop."""
    peers = () if find_spec("diffusers") is None else (DIFFUSERS,)
    ours = (OURS,) if quick else (OURS, OURS_COMPILED)
    return EAGER, COMPILED, *ours, *peers


def build(loop: Loop, device: str, name: str) -> Side:
    """One side, which has run once. A call is a whole loop and returns the x at its end."""
    start = given(loop, device)
    if name == DIFFUSERS:
        call = _theirs(loop, start)
    else:
        options, step = _seeded(loop), loop.op.function
        if name in (EAGER, COMPILED):
            step = loop.op.eager
            options.pop("seed", None)  # each step draws noise by torch.randn
        indices: list[Any] = list(range(STEPS))
        if name in (COMPILED, OURS_COMPILED):  # an int would be compiled anew in each step
            step = compiled(step)
            indices = [torch.tensor([i], device=device) for i in indices]
        call = functools.partial(walk, step, start, indices, **options)
    call()
    return Side(name, call)


def _theirs(loop: Loop, start: Given) -> Callable[[], Tensor]:
    """diffusers' loop, as in its pipelines, on a scheduler whose times are set."""
    import diffusers

    scheduler = getattr(diffusers, _SCHEDULERS[loop.sampler])(**_SCHEDULE)
    scheduler.register_to_config(clip_sample=loop.clip is not None)
    scheduler.set_timesteps(STEPS, device=start.x.device)
    # EulerDiscreteScheduler steps x / alpha.
    first = start.x / start.sampler.alpha[0] if loop.sampler == "euler" else start.x

    @torch.no_grad()
    def call() -> Tensor:
        scheduler._step_index = None
        if loop.sampler == "dpmpp_2m":
            scheduler.model_outputs, scheduler.lower_order_nums = [None, None], 0
        x = first
        for t, prediction in zip(scheduler.timesteps, start.predictions, strict=True):
            scheduler.scale_model_input(x, t)  # what the network would be given
            x = scheduler.step(prediction, t, x, **loop.options, return_dict=False)[0]
        return x

    return call


def truth(loop: Loop, device: str) -> Tensor:
    """The x at the end of the reference in float64, under the seed of ours."""
    start = given(loop, device, torch.float64)
    options = _seeded(loop)
    return walk(loop.op.function, start, range(STEPS), backend="reference", **options)


def fault(loop: Loop, true: Tensor, make: Callable[[], Side]) -> str:
    """What is wrong with the x at the end of a side, or "".

    Of a loop with noise only ours is held against the truth: the others draw noise of their own.
    """
    side = make()
    end = side()
    if end.shape != true.shape:
        return f"the end has shape {tuple(end.shape)}, not {tuple(true.shape)}"
    if loop.noisy and side.name not in (OURS, OURS_COMPILED):
        return "" if bool(end.isfinite().all()) else "the end is not finite"
    off, bound = worst(end, true), TOLERANCE * true.abs().max().item()
    return "" if off <= bound else f"the end is off by {off:.2e}, {bound:.2e} is allowed"
