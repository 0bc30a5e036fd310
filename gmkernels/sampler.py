"""Samplers as tables: what one step multiplies each tensor by, for each step of a path of levels.

A path runs over levels (alpha_i, sigma_i), i = 0, ..., S, from noise to data, the last of them
(1, 0) unless said otherwise. Step i evaluates the network at level i and goes to level i + 1,
written (alpha', sigma'). From what the network predicts follow linear estimates
    x0 = A x + B p,    eps = C x + D p
and the step is x' = e x + f x0 + k p + m previous + s n (gmkernels/ops/diffusion_step). With r =
sigma / alpha:
    ddpm              mean and variance of q(x' | x, x0), fixed or learned       Ho et al. 2020
    ddim              alpha' x0 + sqrt(sigma'^2 - s^2) eps + s n                 Song et al. 2021
    euler             (sigma' / sigma) x + (alpha' - alpha sigma' / sigma) x0, which is ddim with
                      eta = 0, and x + (sigma' - sigma) v in flow matching       Karras et al. 2022
    euler_ancestral   euler to r_down, then noise r_up, r_up^2 + r_down^2 = r'^2
    heun              euler, then the mean of both slopes (S - 1 corrections)    Karras et al. 2022
    dpmpp_2m          second order in log r, with the step before's x0           Lu et al. 2022
Everything is computed in float64 and rounded once to float32.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from gmkernels.ops.diffusion_step.reference import COLUMNS
from gmkernels.schedule import Schedule
from gmkernels.spacing import Level, Path, Row, one_of

VARIANCES = ("fixed_small", "fixed_large", "learned_range")


class Sampler(nn.Module):
    """The steps of a sampler as tables on a device. Immutable; moves with the module that holds it.

    Make one with Sampler.ddpm(), ddim(), euler(), euler_ancestral(), heun(), dpmpp_2m() or
    flow_euler(); each takes the schedule, the number of steps, prediction_type ("epsilon",
    "sample", "v_prediction", "flow_prediction", or "edm" for the preconditioned output of Karras et
    al. 2022 with sigma_data) and spacing: "leading", "trailing" and "linspace" as in diffusers,
    "karras" (sigma^(1/7) in equal steps between the schedule's ends).

    Attributes:
        name, prediction_type: of the sampler, as its step's; of the network.
        noisy, learned: whether its steps add noise, and scale it by a learned variance.
        times: [S] float32, the schedule's time of each step, what the network is told; fractional
            where a spacing falls between times.
        alpha, sigma: [S + 1] float32, the levels of the path.
    Raises:
        ValueError: no steps, more steps than times, an unknown name, an eta outside [0, 1], or a
            prediction type that says nothing of x0 at a level of the path (epsilon where alpha =
            0).

    >>> import gmkernels
    >>> sampler = gmkernels.Sampler.ddim(gmkernels.Schedule.linear(), 4)
    >>> sampler.times.tolist()
    [750.0, 500.0, 250.0, 0.0]
    """

    table: Tensor
    table64: Tensor
    indices: Tensor
    times: Tensor
    levels: Tensor

    def __init__(
        self, path: Path, rows: Iterable[Row], times: Iterable[float] | None = None
    ) -> None:
        super().__init__()
        self.name = name = path.name
        self.prediction_type = path.prediction_type
        self.rederive_epsilon = False
        rows = list(rows)
        values = [[row.get(column, 0.0) for column in COLUMNS] for row in rows]
        table = torch.tensor(values, dtype=torch.float64)
        if not bool(table.isfinite().all()):
            raise ValueError(
                f"Sampler.{name}: a step of this path is not finite: epsilon says nothing of x0 "
                "where alpha = 0, nor can heun start there (take v_prediction, or flow_euler); "
                "sample says nothing of eps where sigma = 0"
            )
        self.noisy = any(row.get("s", 0.0) > 0 for row in rows)
        self.learned = any("low" in row for row in rows)
        self.register_buffer("table64", table, persistent=False)
        self.register_buffer("table", table.float(), persistent=False)
        self.register_buffer("indices", torch.arange(len(values)), persistent=False)
        self.register_buffer("times", torch.tensor(list(times or path.times)), persistent=False)
        self.register_buffer("levels", torch.tensor(path.levels), persistent=False)

    def __len__(self) -> int:
        """Evaluations of the network."""
        return len(self.indices)

    def extra_repr(self) -> str:
        """The name and the number of steps."""
        return f"{self.name}, steps={len(self)}"

    @property
    def alpha(self) -> Tensor:
        """Signal level of each point of the path."""
        return self.levels[:, 0]

    @property
    def sigma(self) -> Tensor:
        """Noise level of each point of the path."""
        return self.levels[:, 1]

    def column(self, name: str) -> Tensor:
        """One column of the table, [S] float32; names as in ops/diffusion_step/reference.py."""
        return self.table[:, COLUMNS.index(name)]

    def level_of(self, i: int) -> Tensor:
        """(alpha, sigma) where evaluation i takes place, [2]."""
        return self.levels[(i + 1) // 2 if self.name == "heun" else i]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Sampler":
        # A module's .to(dtype), .half() and the like reach here: only the device may change.
        device = fn(torch.empty(0, device=self.table.device)).device
        for name in ("table", "table64", "indices", "times", "levels"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    @classmethod
    def _of(cls, path: Path, row: Callable[[int, Level, Level], Row]) -> "Sampler":
        """The sampler whose step i has the coefficients row(i, here, there)."""
        rows = (
            _folded({**path.x0_columns(*here), **row(i, here, there)})
            for i, (here, there) in enumerate(path.pairs())
        )
        return cls(path, rows)

    @classmethod
    def ddpm(
        cls,
        schedule: Schedule,
        steps: int | None = None,
        *,
        variance: str = "fixed_small",
        prediction_type: str = "epsilon",
        spacing: str = "leading",
        sigma_data: float = 0.5,
    ) -> "Sampler":
        """Ancestral sampling; steps=None takes every time. variance: "fixed_small" (that of q(x' |
        x, x0)), "fixed_large" (that of q(x | x')), or "learned_range" between both.
        """
        one_of("ddpm", "variance", variance, VARIANCES)
        steps = len(schedule) if steps is None else steps
        path = Path("ddpm", schedule, steps, spacing, prediction_type, sigma_data)

        def row(i: int, here: Level, there: Level) -> Row:
            (a, s), (a1, s1) = here, there
            jump = a / a1
            added = max(s * s - (jump * s1) ** 2, 0.0)  # variance of q(x | x')
            small = added * s1 * s1 / (s * s)
            last = i == path.steps - 1
            noise = {"fixed_small": math.sqrt(small), "fixed_large": math.sqrt(added)}
            row = {"e": jump * s1 * s1 / (s * s), "f": a1 * added / (s * s)}
            row["s"] = 0.0 if last else noise.get(variance, 1.0)
            if variance == "learned_range":
                row["low"] = 0.5 * math.log(max(small, 1e-20))
                row["high"] = 0.5 * math.log(added)
            return row

        return cls._of(path, row)

    @classmethod
    def ddim(
        cls,
        schedule: Schedule,
        steps: int,
        *,
        eta: float = 0.0,
        rederive_epsilon: bool = False,
        last: Level | None = None,
        prediction_type: str = "epsilon",
        spacing: str = "leading",
        sigma_data: float = 0.5,
    ) -> "Sampler":
        """DDIM; eta in [0, 1] scales its noise. rederive_epsilon: eps follows from the clamped x0
        (diffusers' use_clipped_model_output), else from the prediction. last: the level that the
        path ends at, (1, 0) unless given. Each step ends where the next begins; with linspace
        diffusers' goes T // S times back instead.
        """
        _check_eta("ddim", eta)
        path = Path("ddim", schedule, steps, spacing, prediction_type, sigma_data, last)

        def row(i: int, here: Level, there: Level) -> Row:
            (a, s), (a1, s1) = here, there
            added = max(s * s - (a / a1 * s1) ** 2, 0.0)
            noise = eta * s1 / s * math.sqrt(added)
            c = math.sqrt(max(s1 * s1 - noise * noise, 0.0))
            if rederive_epsilon:
                return {"e": c / s, "f": a1 - c * a / s, "s": noise}
            C, D = path.eps_of(a, s)
            return {"e": c * C, "f": a1, "k": c * D, "s": noise}

        sampler = cls._of(path, row)
        sampler.rederive_epsilon = rederive_epsilon
        return sampler

    @classmethod
    def euler(
        cls,
        schedule: Schedule,
        steps: int,
        *,
        prediction_type: str = "epsilon",
        spacing: str = "linspace",
        sigma_data: float = 0.5,
    ) -> "Sampler":
        """Euler's method on the probability flow, in sigma / alpha."""
        path = Path("euler", schedule, steps, spacing, prediction_type, sigma_data)
        return cls._of(path, _euler_row)

    @classmethod
    def flow_euler(
        cls,
        schedule: Schedule,
        steps: int,
        *,
        prediction_type: str = "flow_prediction",
        spacing: str = "trailing",
        sigma_data: float = 0.5,
    ) -> "Sampler":
        """Euler's method on a flow-matching schedule: x' = x + (sigma' - sigma) v."""
        if schedule.kind != "flow":
            raise ValueError(
                f"Sampler.flow_euler: needs a flow schedule, got {schedule.kind}; euler() is for it"
            )
        path = Path("flow_euler", schedule, steps, spacing, prediction_type, sigma_data)
        return cls._of(path, _euler_row)

    @classmethod
    def euler_ancestral(
        cls,
        schedule: Schedule,
        steps: int,
        *,
        eta: float = 1.0,
        prediction_type: str = "epsilon",
        spacing: str = "linspace",
        sigma_data: float = 0.5,
    ) -> "Sampler":
        """Euler's method to a lower level, and noise up to the next; eta in [0, 1] scales it."""
        _check_eta("euler_ancestral", eta)
        path = Path("euler_ancestral", schedule, steps, spacing, prediction_type, sigma_data)

        def row(i: int, here: Level, there: Level) -> Row:
            (a, s), (a1, s1) = here, there
            r1 = s1 / a1
            up = min(r1, eta * r1 * math.sqrt(max(1 - (r1 * a / s) ** 2, 0.0)))
            down = math.sqrt(r1 * r1 - up * up)
            return {"e": a1 * down / s, "f": a1 * (1 - down * a / s), "s": a1 * up}

        return cls._of(path, row)

    @classmethod
    def heun(
        cls,
        schedule: Schedule,
        steps: int,
        *,
        prediction_type: str = "epsilon",
        spacing: str = "linspace",
        sigma_data: float = 0.5,
    ) -> "Sampler":
        """Heun's method: rows 2 i go from level i to i + 1, rows 2 i + 1 correct it there, with the
        x of level i as `previous`; the last step, to sigma = 0, has no correction.
        """
        path = Path("heun", schedule, steps, spacing, prediction_type, sigma_data)
        rows, times = [], []
        for i, (here, there) in enumerate(path.pairs()):
            rows.append({**path.x0_columns(*here), **_euler_row(i, here, there)})
            times.append(path.times[i])
            if i == path.steps - 1:
                break
            # In r = sigma / alpha, x / alpha; a flow is straight in sigma and x themselves.
            flow = schedule.kind == "flow"
            (a, s), (a1, s1) = ((1.0, z[1]) if flow else z for z in (here, there))
            half = 0.5 * (1 - (s / a if a else math.inf) * a1 / s1)
            correction = {"e": 0.5 + half, "f": -a1 * half, "m": a1 / (2 * a) if a else math.inf}
            rows.append({**path.x0_columns(*there), **correction})
            times.append(path.times[i + 1])
        return cls(path, map(_folded, rows), times)

    @classmethod
    def dpmpp_2m(
        cls,
        schedule: Schedule,
        steps: int,
        *,
        prediction_type: str = "epsilon",
        spacing: str = "linspace",
        sigma_data: float = 0.5,
    ) -> "Sampler":
        """DPM-Solver++(2M), midpoint: `previous` is the x0 of the step before; the first step and
        the last, to sigma = 0, are of first order.
        """
        path = Path("dpmpp_2m", schedule, steps, spacing, prediction_type, sigma_data)

        def row(i: int, here: Level, there: Level) -> Row:
            row = _euler_row(i, here, there)
            if i > 0 and there[1] > 0:
                before = path.levels[i - 1]
                log_r = [math.log(z[1] / z[0]) if z[0] else math.inf for z in (before, here, there)]
                half = 0.5 * row["f"] * (log_r[1] - log_r[2]) / (log_r[0] - log_r[1])
                row["f"] += half
                row["m"] = -half
            return row

        return cls._of(path, row)


def _check_eta(name: str, eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"Sampler.{name}: eta must lie in [0, 1], got {eta}")


def _euler_row(i: int, here: Level, there: Level) -> Row:
    (a, s), (a1, s1) = here, there
    return {"e": s1 / s, "f": a1 - a * s1 / s}


def _folded(row: Row) -> Row:
    """The coefficients of x and p where x0 is not clamped."""
    A, B, f = row["A"], row["B"], row["f"]
    return {
        **row,
        "x_direct": row["e"] + (f * A if f else 0.0),
        "p_direct": row.get("k", 0.0) + (f * B if f else 0.0),
    }
