"""What users write without this library: each step as in diffusers and k-diffusion, a pass a line.

The baselines of the benchmark and of the error bound; levels are in x's dtype.
"""

from typing import Any

import torch
from torch import Tensor

from gmkernels.ops.diffusion_step.reference import COLUMNS
from gmkernels.sampler import Sampler


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(-1, *(1,) * (like.dim() - 1))


def _levels(sampler: Sampler, at: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    return _column(sampler.alpha[at], like), _column(sampler.sigma[at], like)


def _of_table(sampler: Sampler, name: str, step: Any, like: Tensor) -> Tensor:
    return _column(sampler.table[step, COLUMNS.index(name)], like)


def _x0(
    x: Tensor,
    prediction: Tensor,
    a: Tensor,
    s: Tensor,
    sampler: Sampler,
    unconditional: Tensor | None,
    guidance: float,
) -> tuple[Tensor, Tensor]:
    """x0 and the guided prediction."""
    p = prediction
    if unconditional is not None:
        p = unconditional + guidance * (prediction - unconditional)
    kind = sampler.prediction_type
    if kind == "epsilon":
        return (x - s * p) / a, p
    if kind == "sample":
        return p, p
    if kind == "v_prediction":
        return a * x - s * p, p
    if kind == "flow_prediction":
        return x - s * p, p
    norm = (s * s + 0.25).sqrt()
    return 0.25 / (s * s + 0.25) * x + 0.5 * s / norm * p, p


def _clamped(x0: Tensor, clip: float | None, dynamic_threshold: Any) -> Tensor:
    if clip is not None:
        return x0.clamp(-clip, clip)
    if dynamic_threshold is None or not x0.numel():
        return x0
    ratio, most = dynamic_threshold
    wide = x0.detach().to(torch.promote_types(torch.float32, x0.dtype))
    h = torch.quantile(wide.abs().flatten(1), ratio, dim=1).clamp(1.0, most)
    h = _column(h, x0)
    return torch.maximum(torch.minimum(x0, h), -h) / h


def _derivative(x: Tensor, x0: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The slope of x / alpha in sigma / alpha, and sigma / alpha."""
    r = s / a
    return (x / a - x0) / r, r


def _euler(x: Tensor, x0: Tensor, here: tuple[Tensor, Tensor], there: tuple[Tensor, Tensor]):
    (a, s), (a1, s1) = here, there
    d, r = _derivative(x, x0, a, s)
    return a1 * (x / a + (s1 / a1 - r) * d)


def ddpm_step(
    x: Tensor,
    prediction: Tensor,
    step: Any,
    sampler: Sampler,
    *,
    unconditional: Tensor | None = None,
    guidance: float = 1.0,
    clip: float | None = None,
    dynamic_threshold: Any = None,
    variance: Tensor | None = None,
    eps: Tensor | None = None,
) -> Tensor:
    """As diffusers' DDPMScheduler.step."""
    a, s = _levels(sampler, step, x)
    x0, _ = _x0(x, prediction, a, s, sampler, unconditional, guidance)
    x0 = _clamped(x0, clip, dynamic_threshold)
    e, f = _of_table(sampler, "e", step, x), _of_table(sampler, "f", step, x)
    scale = _of_table(sampler, "s", step, x)
    noise = torch.randn_like(x) if eps is None else eps
    if variance is not None:
        low, high = _of_table(sampler, "low", step, x), _of_table(sampler, "high", step, x)
        scale = scale * torch.exp(low + (variance + 1) / 2 * (high - low))
    return (e * x + f * x0 + scale * noise).to(x.dtype)


def ddim_step(
    x: Tensor,
    prediction: Tensor,
    step: Any,
    sampler: Sampler,
    *,
    unconditional: Tensor | None = None,
    guidance: float = 1.0,
    clip: float | None = None,
    dynamic_threshold: Any = None,
    eps: Tensor | None = None,
) -> Tensor:
    """As diffusers' DDIMScheduler.step."""
    a, s = _levels(sampler, step, x)
    a1, s1 = _levels(sampler, step + 1, x)
    std = _of_table(sampler, "s", step, x)
    x0, p = _x0(x, prediction, a, s, sampler, unconditional, guidance)
    kind = sampler.prediction_type
    if kind == "epsilon":
        direction = p
    elif kind == "v_prediction":
        direction = a * p + s * x
    else:
        direction = (x - a * x0) / s
    x0 = _clamped(x0, clip, dynamic_threshold)
    if sampler.rederive_epsilon:
        direction = (x - a * x0) / s
    x_next = a1 * x0 + (s1 * s1 - std * std).clamp(min=0).sqrt() * direction
    if sampler.noisy:
        x_next = x_next + std * (torch.randn_like(x) if eps is None else eps)
    return x_next.to(x.dtype)


def euler_step(
    x: Tensor,
    prediction: Tensor,
    step: Any,
    sampler: Sampler,
    *,
    unconditional: Tensor | None = None,
    guidance: float = 1.0,
    clip: float | None = None,
    dynamic_threshold: Any = None,
) -> Tensor:
    """As diffusers' EulerDiscreteScheduler.step and the scaling around it."""
    here, there = _levels(sampler, step, x), _levels(sampler, step + 1, x)
    x0, _ = _x0(x, prediction, *here, sampler, unconditional, guidance)
    return _euler(x, _clamped(x0, clip, dynamic_threshold), here, there).to(x.dtype)


def flow_euler_step(
    x: Tensor,
    prediction: Tensor,
    step: Any,
    sampler: Sampler,
    *,
    unconditional: Tensor | None = None,
    guidance: float = 1.0,
    clip: float | None = None,
    dynamic_threshold: Any = None,
) -> Tensor:
    """As diffusers' FlowMatchEulerDiscreteScheduler.step."""
    a, s = _levels(sampler, step, x)
    _, s1 = _levels(sampler, step + 1, x)
    x0, v = _x0(x, prediction, a, s, sampler, unconditional, guidance)
    if clip is not None or dynamic_threshold is not None or sampler.prediction_type[0] != "f":
        v = (x - _clamped(x0, clip, dynamic_threshold)) / s
    return (x + (s1 - s) * v).to(x.dtype)


def euler_ancestral_step(
    x: Tensor,
    prediction: Tensor,
    step: Any,
    sampler: Sampler,
    *,
    unconditional: Tensor | None = None,
    guidance: float = 1.0,
    clip: float | None = None,
    dynamic_threshold: Any = None,
    eps: Tensor | None = None,
) -> Tensor:
    """As diffusers' EulerAncestralDiscreteScheduler.step and the scaling around it."""
    a, s = _levels(sampler, step, x)
    a1, s1 = _levels(sampler, step + 1, x)
    x0, _ = _x0(x, prediction, a, s, sampler, unconditional, guidance)
    d, r = _derivative(x, _clamped(x0, clip, dynamic_threshold), a, s)
    r1 = s1 / a1
    up = (r1 * r1 * (r * r - r1 * r1) / (r * r)).sqrt()
    down = (r1 * r1 - up * up).clamp(min=0).sqrt()
    noise = torch.randn_like(x) if eps is None else eps
    return (a1 * (x / a + (down - r) * d + up * noise)).to(x.dtype)


def heun_step(
    x: Tensor,
    prediction: Tensor,
    step: Any,
    sampler: Sampler,
    *,
    previous: Tensor,
    unconditional: Tensor | None = None,
    guidance: float = 1.0,
    clip: float | None = None,
    dynamic_threshold: Any = None,
) -> Tensor:
    """As diffusers' HeunDiscreteScheduler.step and the scaling around it, the slope kept."""
    step = torch.as_tensor(step, device=x.device)
    at = (step + 1) // 2
    here, there = _levels(sampler, at, x), _levels(sampler, (at + 1).clamp(max=len(sampler)), x)
    x0, _ = _x0(x, prediction, *here, sampler, unconditional, guidance)
    x0 = _clamped(x0, clip, dynamic_threshold)
    predicted = _euler(x, x0, here, there)
    # A correction: the mean of the slope that led here and of the slope here.
    before = _levels(sampler, (at - 1).clamp(min=0), x)
    r0 = before[1] / before[0]
    second, r = _derivative(x, x0, *here)
    first = (x / here[0] - previous / before[0]) / (r - r0)
    corrected = here[0] * (previous / before[0] + (r - r0) * (first + second) / 2)
    odd = (step % 2 == 1).view(-1, *(1,) * (x.dim() - 1))
    return torch.where(odd, corrected, predicted).to(x.dtype)


def dpmpp_2m_step(
    x: Tensor,
    prediction: Tensor,
    step: Any,
    sampler: Sampler,
    *,
    previous: Tensor,
    unconditional: Tensor | None = None,
    guidance: float = 1.0,
    clip: float | None = None,
    dynamic_threshold: Any = None,
) -> tuple[Tensor, Tensor]:
    """As diffusers' DPMSolverMultistepScheduler.step."""
    step = torch.as_tensor(step, device=x.device)
    (a, s), (a1, s1) = _levels(sampler, step, x), _levels(sampler, step + 1, x)
    a0, s0 = _levels(sampler, (step - 1).clamp(min=0), x)
    x0, _ = _x0(x, prediction, a, s, sampler, unconditional, guidance)
    x0 = _clamped(x0, clip, dynamic_threshold).to(x.dtype)
    h = torch.log(a1 / s1) - torch.log(a / s)
    h0 = torch.log(a / s) - torch.log(a0 / s0)
    second = _column((step > 0) & (step < len(sampler) - 1), x).bool()
    slope = torch.where(second, (x0 - previous) * (h / torch.where(second, h0, 1.0)), 0.0)
    shrink = -a1 * torch.expm1(-h)
    return (s1 / s * x + shrink * x0 + 0.5 * shrink * slope).to(x.dtype), x0
