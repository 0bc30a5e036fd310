"""EDM on the noising and step ops: preconditioning, log-normal levels, Heun's method.

D(x) = c_skip x + c_out F(c_in x, 1/4 log sigma)        Karras et al. 2022, eq. 7 and table 1
c_skip = d^2 / (sigma^2 + d^2), c_out = sigma d / sqrt(sigma^2 + d^2),
c_in = 1 / sqrt(sigma^2 + d^2), d = sigma_data
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gmkernels.models.diffusion import Diffusion
from gmkernels.sampler import Sampler
from gmkernels.schedule import Schedule


class EDM(Diffusion):
    """EDM (Karras et al. 2022): any network F, preconditioned, over a variance-exploding schedule.

    x_t = x_0 + sigma n with log sigma ~ N(mean, std^2) in training; D(x) = c_skip x + c_out F(c_in
    x, 1/4 log sigma) estimates x_0, its error weighted by (sigma^2 + sigma_data^2) / (sigma
    sigma_data)^2. Samples by Heun's method over Schedule.karras() unless asked otherwise.

    Args: as in Diffusion, and
        sigma_data: standard deviation of the data. mean, std: of log sigma.
    """

    default_sampler = "heun"

    def __init__(
        self,
        net: Callable[..., Tensor],
        schedule: Schedule,
        shape: tuple[int, ...],
        *,
        mean: float = -1.2,
        std: float = 1.2,
        **options: Any,
    ) -> None:
        options = {"prediction_type": "sample", "weighting": "edm", **options}
        super().__init__(net, schedule, shape, **options)
        if schedule.kind != "variance_exploding":
            raise ValueError(f"EDM: needs a variance_exploding schedule, got {schedule.kind}")
        self.mean, self.std = mean, std

    def draw_times(self, u: Tensor) -> Tensor:
        """sigma for uniform u in (0, 1], float [B]."""
        return torch.exp(self.mean + self.std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))

    def predict(self, x_t: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """F(c_in x, 1/4 log sigma), t = sigma."""
        sigma = t.view(-1, *(1,) * len(self.shape))
        c_in = (sigma.square() + self.sigma_data**2).rsqrt()
        return self.net(c_in * x_t, t.log() / 4, **conditions)

    def estimate(self, x_t: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """D(x), t = sigma or a time of the schedule."""
        sigma = t if t.is_floating_point() else self.schedule.sigma[t]
        s = sigma.view(-1, *(1,) * len(self.shape))
        norm = s.square() + self.sigma_data**2
        out = self.predict(x_t, sigma, **conditions)
        return self.sigma_data**2 / norm * x_t + s * self.sigma_data * norm.rsqrt() * out

    def sampler(self, name: str = "heun", steps: int | None = None, **options: Any) -> Sampler:
        """As Diffusion.sampler(), the preconditioning folded into the step."""
        options = {"prediction_type": "edm", "sigma_data": self.sigma_data, **options}
        return super().sampler(name, steps, **options)

    def told(self, path: Sampler) -> Tensor:
        """sigma of each evaluation."""
        return torch.stack([path.level_of(i)[1] for i in range(len(path))])
