"""Paths of samplers: the times and levels that they visit, and what a prediction says there."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gmkernels.ops.diffusion_noise.reference import PREDICTION_TYPES
from gmkernels.schedule import Schedule

SPACINGS = ("leading", "trailing", "linspace", "karras")
ROUNDED = ("ddpm", "ddim", "dpmpp_2m")  # round the times of linspace, as in diffusers
Level = tuple[float, float]
Row = dict[str, float]


def most_steps(name: str, spacing: str, count: int) -> float:
    """How many steps have times of their own; dpmpp_2m leaves out the last of one more."""
    if spacing == "karras" or (spacing == "linspace" and name not in ROUNDED):
        return math.inf  # between the schedule's times
    return max(1, count - 1) if spacing == "linspace" and name == "dpmpp_2m" else count


def one_of(name: str, what: str, value: Any, names: tuple[str, ...]) -> None:
    if value not in names:
        raise ValueError(f"Sampler.{name}: {what} must be one of {', '.join(names)}, got {value!r}")


class Path:
    """The levels that a sampler visits, and what the network's prediction says there."""

    def __init__(
        self,
        name: str,
        schedule: Schedule,
        steps: int,
        spacing: str,
        prediction_type: str,
        sigma_data: float,
        last: Level | None = None,
    ) -> None:
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"Sampler.{name}: schedule must be a Schedule, got {type(schedule).__name__}"
            )
        one_of(name, "spacing", spacing, SPACINGS)
        one_of(name, "prediction_type", prediction_type, (*PREDICTION_TYPES, "edm"))
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"Sampler.{name}: steps must be an int >= 1, got {steps!r}")
        most = most_steps(name, spacing, len(schedule))
        if steps > most:
            raise ValueError(
                f"Sampler.{name}: steps must be at most {most}, the times of the schedule, "
                f"got {steps}"
            )
        if last is not None and not (last[0] > 0 and last[1] >= 0):
            raise ValueError(
                f"Sampler.{name}: last must be a level (alpha, sigma) with alpha > 0, got {last}"
            )
        self.name, self.steps = name, steps
        self.prediction_type, self.sigma_data = prediction_type, sigma_data
        self.times, levels = spaced(schedule, steps, spacing, name)
        self.levels = [*levels, (1.0, 0.0) if last is None else last]

    def pairs(self) -> Iterable[tuple[Level, Level]]:
        """Each step's level and the next."""
        return zip(self.levels[:-1], self.levels[1:], strict=True)

    def x0_columns(self, a: float, s: float) -> Row:
        """A and B of x0 = A x + B p at a level; infinite where p says nothing of x0."""
        if self.prediction_type == "epsilon":
            return {"A": 1 / a, "B": -s / a} if a else {"A": math.inf, "B": math.inf}
        if self.prediction_type == "sample":
            return {"A": 0.0, "B": 1.0}
        if self.prediction_type == "v_prediction":
            return {"A": a / (a * a + s * s), "B": -s / (a * a + s * s)}
        if self.prediction_type == "flow_prediction":
            return {"A": 1 / (a + s), "B": -s / (a + s)}
        d2 = self.sigma_data**2
        norm = s * s + d2 * a * a
        return {"A": d2 * a / norm, "B": s * self.sigma_data / math.sqrt(norm)}

    def eps_of(self, a: float, s: float) -> tuple[float, float]:
        """C and D of eps = C x + D p at a level."""
        if self.prediction_type == "epsilon":
            return 0.0, 1.0
        if self.prediction_type == "v_prediction":
            return s / (a * a + s * s), a / (a * a + s * s)
        x0 = self.x0_columns(a, s)
        return (1 - a * x0["A"]) / s, -a * x0["B"] / s


def spaced(
    schedule: Schedule, steps: int, spacing: str, name: str
) -> tuple[list[float], list[Level]]:
    """Times and levels of a path over a schedule, from noise to data, in float64.

    As in diffusers, ddpm, ddim and dpmpp_2m round the times of linspace, and dpmpp_2m leaves out
    the last of one more.
    """
    count = len(schedule)
    table = schedule.levels64[:, :2].cpu()
    if spacing == "leading":
        times = torch.arange(steps, dtype=torch.float64).flip(0) * (count // steps)
    elif spacing == "trailing":
        places = count - torch.arange(steps, dtype=torch.float64) * (count / steps)
        times = places.round() - 1
    elif spacing == "linspace":
        points = steps + (name == "dpmpp_2m")
        times = torch.linspace(0, count - 1, points, dtype=torch.float64).flip(0)[:steps]
        if name in ROUNDED:
            times = times.round()
    ratio = table[:, 1] / table[:, 0]
    if spacing == "karras":
        low, high = ratio[0] ** (1 / 7), ratio[-1] ** (1 / 7)
        ratios = torch.lerp(high, low, torch.linspace(0, 1, steps, dtype=torch.float64)) ** 7
        times = interpolated(ratios.log(), ratio.log(), torch.arange(count, dtype=torch.float64))
    else:
        whole = times.long()
        if bool((times == whole).all()):
            return times.tolist(), [(a, s) for a, s in table[whole].tolist()]
        ratios = interpolated(times, torch.arange(count, dtype=torch.float64), ratio)
    return times.tolist(), [level(schedule.kind, r) for r in ratios.tolist()]


def interpolated(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear through (xs, ys), xs ascending."""
    above = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1) if len(xs) > 1 else None
    if above is None:
        return ys.expand(len(x)).clone()
    left, right = xs[above - 1], xs[above]
    return torch.lerp(ys[above - 1], ys[above], ((x - left) / (right - left)).clamp(0, 1))


def level(kind: str, r: float) -> Level:
    """The level of a schedule's kind with sigma / alpha = r."""
    if kind == "variance_exploding":
        return 1.0, r
    if math.isinf(r):
        return 0.0, 1.0
    norm = 1 + r if kind == "flow" else math.sqrt(1 + r * r)
    return 1 / norm, r / norm
