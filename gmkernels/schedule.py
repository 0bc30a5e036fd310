"""Noise schedules: x_t = alpha_t x0 + sigma_t eps for t = 0, 1, ..., T - 1, as tables on a device.

Three kinds, which differ in what stands between the tabled times:
    variance_preserving  alpha^2 + sigma^2 = 1; alpha_bar = alpha^2 (linear, scaled_linear, cosine,
                         sigmoid); a float t in [0, 1] stands at t (T - 1), the angle
                         atan(sigma / alpha) linear between neighbours
    variance_exploding   alpha = 1 (karras); a float t is sigma itself
    flow                 alpha = 1 - sigma (flow_matching); a float t is sigma itself
Everything is computed in float64 and rounded once to float32.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("variance_preserving", "variance_exploding", "flow")
WEIGHTINGS = ("uniform", "snr", "min_snr", "edm")
# The level, alpha or sigma, at whose zero a weight is infinite.
_INFINITE = {
    ("edm", "epsilon"): "alpha",
    ("snr", "sample"): "sigma",
    ("edm", "sample"): "sigma",
}


def _betas(alpha_bar: Callable[[float], float], steps: int, most: float) -> Tensor:
    """beta_t = 1 - alpha_bar(t + 1) / alpha_bar(t) on steps equal parts of [0, 1]."""
    values = [alpha_bar(i / steps) for i in range(steps + 1)]
    return torch.tensor(
        [min(1 - b / a, most) for a, b in itertools.pairwise(values)],
        dtype=torch.float64,
    )


class Schedule(nn.Module):
    """Signal and noise levels of T times. Immutable; moves with the module that holds it.

    Its tables stay float32 whatever the module is cast to, and float64 inputs use their float64
    originals. They are no part of a state dict: a schedule is made again from its arguments.

    Args:
        alpha, sigma: [T] float64, the levels of signal and noise, T >= 1.
        kind: "variance_preserving", "variance_exploding" or "flow".
    Raises:
        ValueError: levels of another shape, negative or not finite; sigma not ascending; an unknown
            kind, or levels that it does not allow.

    >>> import gmkernels
    >>> schedule = gmkernels.Schedule.linear()
    >>> len(schedule), round(float(schedule.alpha_bar[-1]), 7)
    (1000, 4.04e-05)
    """

    levels: Tensor
    levels64: Tensor

    def __init__(self, alpha: Tensor, sigma: Tensor, kind: str = "variance_preserving") -> None:
        super().__init__()
        alpha = torch.as_tensor(alpha).detach().to("cpu", torch.float64)
        sigma = torch.as_tensor(sigma).detach().to("cpu", torch.float64)
        if kind not in KINDS:
            raise ValueError(f"Schedule: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if alpha.dim() != 1 or alpha.shape != sigma.shape or len(alpha) == 0:
            raise ValueError(
                "Schedule: alpha and sigma must be [T] with T >= 1, got "
                f"{tuple(alpha.shape)} and {tuple(sigma.shape)}"
            )
        both = torch.stack([alpha, sigma], 1)
        if not bool((both.isfinite() & (both >= 0)).all()):
            raise ValueError("Schedule: levels must be finite and >= 0")
        if not bool((sigma.diff() > 0).all()):
            raise ValueError(
                "Schedule: sigma must ascend, each time noisier than the one before; sort it first"
            )
        off = {
            "variance_preserving": both.square().sum(1) - 1,
            "variance_exploding": alpha - 1,
            "flow": both.sum(1) - 1,
        }[kind]
        if bool((off.abs() > 1e-6).any()):
            raise ValueError(
                f"Schedule: a {kind} schedule needs alpha^2 + sigma^2 = 1 (variance_preserving), "
                "alpha = 1 (variance_exploding) or alpha + sigma = 1 (flow)"
            )
        self.kind = kind
        self.steps = len(alpha)
        self._lowest = {"alpha": float(alpha.min()), "sigma": float(sigma.min())}
        table = torch.cat([both, torch.ones_like(both[:, :1])], 1)  # a, s, w = 1
        self.register_buffer("levels64", table, persistent=False)
        self.register_buffer("levels", table.float(), persistent=False)
        self._weighted: dict[Any, Tensor] = {}

    @classmethod
    def from_betas(cls, betas: Tensor) -> "Schedule":
        """alpha_bar_t = prod_{i <= t} (1 - beta_i), betas [T] in (0, 1]."""
        betas = torch.as_tensor(betas).detach().to("cpu", torch.float64)
        if betas.dim() != 1 or not bool(((betas > 0) & (betas <= 1)).all()):
            raise ValueError("Schedule: betas must be [T] in (0, 1]")
        alpha_bar = torch.cumprod(1 - betas, 0)
        return cls(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

    @classmethod
    def linear(cls, steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> "Schedule":
        """beta from start to end in equal steps (Ho et al. 2020, section 4)."""
        return cls.from_betas(torch.linspace(start, end, _count(steps), dtype=torch.float64))

    @classmethod
    def scaled_linear(
        cls, steps: int = 1000, start: float = 0.00085, end: float = 0.012
    ) -> "Schedule":
        """sqrt(beta) in equal steps (Rombach et al. 2022, latent diffusion)."""
        _expect(0 < start <= end, "0 < start <= end", start, end)
        roots = torch.linspace(math.sqrt(start), math.sqrt(end), _count(steps), dtype=torch.float64)
        return cls.from_betas(roots.square())

    @classmethod
    def cosine(cls, steps: int = 1000, s: float = 0.008, most: float = 0.999) -> "Schedule":
        """alpha_bar(t) ~ cos^2((t + s) / (1 + s) pi / 2) (Nichol and Dhariwal 2021, eq. 17)."""

        def alpha_bar(t: float) -> float:
            return math.cos((t + s) / (1 + s) * math.pi / 2) ** 2

        return cls.from_betas(_betas(alpha_bar, _count(steps), most))

    @classmethod
    def sigmoid(
        cls, steps: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0
    ) -> "Schedule":
        """alpha_bar(t) a falling sigmoid from 1 to 0 (Jabri et al. 2022, arXiv:2212.11972)."""
        _expect(start < end and tau > 0, "start < end and tau > 0", start, end, tau)

        def curve(t: float) -> float:
            return 1 / (1 + math.exp(-(t * (end - start) + start) / tau))

        def alpha_bar(t: float) -> float:
            return (curve(1.0) - curve(t)) / (curve(1.0) - curve(0.0))

        return cls.from_betas(_betas(alpha_bar, _count(steps), 0.999))

    @classmethod
    def karras(
        cls,
        steps: int = 1000,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
    ) -> "Schedule":
        """sigma^(1/rho) in equal steps, alpha = 1 (Karras et al. 2022, eq. 5)."""
        ascending = 0 <= sigma_min < sigma_max and rho > 0
        _expect(ascending, "0 <= sigma_min < sigma_max and rho > 0", sigma_min, sigma_max, rho)
        low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
        sigma = torch.linspace(low, high, _count(steps), dtype=torch.float64) ** rho
        return cls(torch.ones_like(sigma), sigma, "variance_exploding")

    @classmethod
    def flow_matching(cls, steps: int = 1000, shift: float = 1.0) -> "Schedule":
        """sigma = u shift / (1 + (shift - 1) u), u = 1/T, ..., 1 (Esser et al. 2024, eq. 23)."""
        _expect(shift > 0, "shift > 0", shift)
        u = torch.arange(1, _count(steps) + 1, dtype=torch.float64) / steps
        sigma = shift * u / (1 + (shift - 1) * u)
        return cls(1 - sigma, sigma, "flow")

    def zero_terminal_snr(self) -> "Schedule":
        """A copy whose last time is pure noise (Lin et al. 2023, algorithm 1).

        alpha is shifted and stretched so that its last value is 0 and its first stays. Raises
        ValueError unless the schedule is variance preserving with two times or more.
        """
        if self.kind != "variance_preserving" or self.steps < 2:
            raise ValueError(
                "zero_terminal_snr: needs a variance_preserving schedule with two times or more, "
                f"got {self.kind} with {self.steps}"
            )
        alpha = self.levels64[:, 0].cpu()
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        return Schedule(alpha, (1 - alpha.square()).clamp(min=0).sqrt())

    def __len__(self) -> int:
        return self.steps

    def extra_repr(self) -> str:
        """The kind and the number of times."""
        return f"{self.kind}, steps={self.steps}"

    @property
    def alpha(self) -> Tensor:
        """[T] float32, level of the signal."""
        return self.levels[:, 0]

    @property
    def sigma(self) -> Tensor:
        """[T] float32, level of the noise."""
        return self.levels[:, 1]

    @property
    def alpha_bar(self) -> Tensor:
        """[T] float32, alpha^2: what most papers call the schedule."""
        return self.levels64[:, 0].square().float()

    @property
    def snr(self) -> Tensor:
        """[T] float32, alpha^2 / sigma^2."""
        return (self.levels64[:, 0] / self.levels64[:, 1]).square().float()

    def at(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Levels (alpha, sigma, 1) of float times, [B] -> [B, 3]; see the head of the module.

        Times outside the schedule take the level of its nearer end (variance preserving), those of
        a negative sigma that of 0.
        """
        t = t.to(dtype)
        if self.kind == "variance_exploding":
            sigma = torch.where(t < 0, 0.0, t)
            return torch.stack([torch.ones_like(sigma), sigma, torch.ones_like(sigma)], 1)
        if self.kind == "flow":
            sigma = torch.where(t < 0, 0.0, torch.where(t > 1, 1.0, t))
            return torch.stack([1 - sigma, sigma, torch.ones_like(sigma)], 1)
        table = self.levels64 if dtype == torch.float64 else self.levels
        angles = torch.atan2(table[:, 1], table[:, 0])
        place = torch.where(t < 0, 0.0, torch.where(t > 1, 1.0, t)) * (self.steps - 1)
        below = place.nan_to_num().long().clamp(max=max(self.steps - 2, 0))
        above = (below + 1).clamp(max=self.steps - 1)
        angle = torch.lerp(angles[below], angles[above], place - below)
        return torch.stack([angle.cos(), angle.sin(), torch.ones_like(angle)], 1)

    def weights(
        self, levels: Tensor, weighting: str, prediction_type: str, gamma: float, sigma_data: float
    ) -> Tensor:
        """Weight of each row's loss, levels [N, 3] -> [N], for an error of that prediction type.

        Named weightings but uniform weigh the error of x0: by the signal-to-noise ratio (snr), by
        the smaller of it and gamma (min_snr: Hang et al. 2023), or by (sigma^2 + sigma_data^2) /
        (sigma sigma_data)^2 with sigma / alpha for sigma (edm: Karras et al. 2022). An error of
        another type is the error of x0 times a number that depends on t alone.
        """
        if weighting == "uniform":
            return torch.ones_like(levels[:, 0])
        by_a, by_s = self.slopes(levels, prediction_type)
        if weighting == "snr":
            return by_a
        if weighting == "min_snr":
            return torch.minimum(by_a, gamma * by_s)
        return by_a + by_s / sigma_data**2

    @staticmethod
    def slopes(levels: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
        """The square error of x0 for a unit one of the prediction, times (a / s)^2, and itself."""
        a, s = levels[:, 0], levels[:, 1]
        one = torch.ones_like(a)
        return {
            "epsilon": (one, (s / a).square()),
            "sample": ((a / s).square(), one),
            "v_prediction": ((a / (a * a + s * s)).square(), (s / (a * a + s * s)).square()),
            "flow_prediction": ((a / (a + s)).square(), (s / (a + s)).square()),
        }[prediction_type]

    def table(
        self,
        t: Tensor,
        wide: bool,
        weighting: str = "uniform",
        prediction_type: str = "epsilon",
        gamma: float = 5.0,
        sigma_data: float = 0.5,
    ) -> Tensor:
        """What the kernels gather from: levels (a, s, w), [T, 3], or [B, 3] for float times.

        Raises: ValueError where a level of the table has an infinite weight.
        """
        table = self.levels64 if wide else self.levels
        if t.is_floating_point():
            table = self.at(t, table.dtype)
        if weighting == "uniform":
            return table
        named = (weighting, prediction_type, gamma, sigma_data)
        if t.is_floating_point():
            w = self.weights(table, *named)
            return torch.stack([table[:, 0], table[:, 1], w], 1)
        level = _INFINITE.get((weighting, prediction_type))
        if level and self._lowest[level] == 0:
            raise ValueError(
                f"Schedule: weight {weighting} of a prediction of {prediction_type} is infinite "
                f"where {level} is 0, as it is at a time of this schedule; take another prediction "
                "type, weight min_snr, or a schedule that ends before"
            )
        if torch.compiler.is_compiling():
            return self._weigh(table.dtype, *named)
        key = (wide, *named)
        if key not in self._weighted:
            with torch.inference_mode(False):  # it may be used outside of it later
                self._weighted[key] = self._weigh(table.dtype, *named)
        return self._weighted[key]

    def _weigh(
        self,
        dtype: torch.dtype,
        weighting: str,
        prediction_type: str,
        gamma: float,
        sigma_data: float,
    ) -> Tensor:
        levels = self.levels64
        w = self.weights(levels, weighting, prediction_type, gamma, sigma_data)
        return torch.stack([levels[:, 0], levels[:, 1], w], 1).to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Schedule":
        # A module's .to(dtype), .half() and the like reach here: only the device may change.
        device = fn(torch.empty(0, device=self.levels.device)).device
        self.levels = self.levels.to(device)
        self.levels64 = self.levels64.to(device)
        self._weighted = {}
        return self


def _expect(holds: bool, what: str, *got: float) -> None:
    if not holds:
        raise ValueError(f"Schedule: must have {what}, got {', '.join(map(str, got))}")


def _count(steps: int) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"Schedule: steps must be an int >= 1, got {steps!r}")
    return steps
