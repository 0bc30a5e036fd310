"""What the seven step functions share: their checks, and the call of the one operator."""

import math
from typing import Any

import torch
from torch import Tensor

from gmkernels import checks, dispatch
from gmkernels.autograd import DifferentiableOp, is_batched, is_transformed
from gmkernels.noise import Seed, resolve_key
from gmkernels.ops.diffusion_step import reference
from gmkernels.sampler import Sampler

dispatch.load_family("gmkernels.ops.diffusion_step", ("sampler_step",))
_sampler_step = DifferentiableOp(
    "sampler_step", reference.sampler_step, inputs=6, outputs=2, kept=1
)


def _index(op: str, step: Any, sampler: Sampler, x: Tensor) -> Tensor:
    """The row of the table for each row of x, int64 [B]."""
    if not isinstance(sampler, Sampler) or f"{sampler.name}_step" != op:
        got = f"Sampler.{sampler.name}" if isinstance(sampler, Sampler) else type(sampler).__name__
        raise TypeError(f"{op}: sampler must come from Sampler.{op[:-5]}(), got {got}")
    if sampler.table.device != x.device:
        raise ValueError(
            f"{op}: the sampler is on {sampler.table.device}, the inputs are on {x.device}; "
            f"move it once: sampler.to({str(x.device)!r})"
        )
    if isinstance(step, int) and not isinstance(step, bool):
        if not 0 <= step < len(sampler):
            raise ValueError(f"{op}: step must lie in [0, {len(sampler)}), got {step}")
        return sampler.indices[step : step + 1].expand(x.shape[0])
    if not isinstance(step, Tensor) or step.dtype.is_floating_point or step.dtype == torch.bool:
        got = str(step.dtype) if isinstance(step, Tensor) else type(step).__name__
        raise TypeError(f"{op}: step must be an int or an integer tensor, got {got}")
    if step.dim() > 1 or (step.dim() == 1 and step.shape[0] not in (1, x.shape[0])):
        raise ValueError(
            f"{op}: step must be one step, or one a row, shape ({x.shape[0]},), "
            f"got {tuple(step.shape)}"
        )
    if step.device != x.device:
        raise ValueError(f"{op}: step must be on {x.device} like the others, got {step.device}")
    return step.to(torch.int64).expand(x.shape[0])


def _range(op: str, clip: float | None, dynamic_threshold: Any) -> tuple[float, float]:
    """(clip, ratio) of the operator: infinite where nothing is clamped, ratio 0 unless dynamic."""
    if dynamic_threshold is not None:
        if clip is not None:
            raise ValueError(f"{op}: give clip or dynamic_threshold, not both")
        pair = isinstance(dynamic_threshold, (tuple, list)) and len(dynamic_threshold) == 2
        ratio, most = dynamic_threshold if pair else (math.nan, math.nan)
        if not (0 < ratio <= 1 and 1 <= most < math.inf):
            raise ValueError(
                f"{op}: dynamic_threshold must be (ratio, maximum) with 0 < ratio <= 1 and "
                f"1 <= maximum < inf, got {dynamic_threshold}"
            )
        return float(most), float(ratio)
    if clip is None:
        return math.inf, 0.0
    if not clip > 0:
        raise ValueError(f"{op}: clip must be > 0, got {clip}")
    return float(clip), 0.0


def _key(
    op: str, x: Tensor, sampler: Sampler, seed: Seed, offset: int, eps: Tensor | None
) -> Tensor | None:
    """The key, or None where the noise is given or there is none."""
    if eps is not None:
        checks.check_like(op, "eps", eps, "x", x)
        if seed is not None:
            raise ValueError(f"{op}: give eps or a seed, not both")
    if eps is not None or not sampler.noisy:
        return None
    key = resolve_key(op, seed, offset, None, x.device)
    if is_transformed() and is_batched(x) and not is_batched(key):
        raise RuntimeError(
            f"{op}: under vmap one seed would give every example the same noise; pass eps=, "
            "or a batched seed tensor"
        )
    return key


def run_step(
    op: str,
    x: Tensor,
    prediction: Tensor,
    step: int | Tensor,
    sampler: Sampler,
    *,
    unconditional: Tensor | None,
    guidance: float,
    clip: float | None,
    dynamic_threshold: tuple[float, float] | None,
    backend: str | None,
    previous: Tensor | None = None,
    variance: Tensor | None = None,
    seed: Seed = None,
    offset: int = 0,
    eps: Tensor | None = None,
    denoised: bool = False,
) -> tuple[Tensor, Tensor]:
    """x' and x0 (empty unless denoised) of the step function `op`."""
    checks.check_rows(op, "x", x)
    checks.check_like(op, "prediction", prediction, "x", x)
    index = _index(op, step, sampler, x)
    others = {"unconditional": unconditional, "previous": previous, "variance": variance}
    for name, other in others.items():
        if other is not None:
            checks.check_like(op, name, other, "x", x)
    if isinstance(guidance, Tensor):  # reading it would stop the GPU
        raise TypeError(f"{op}: guidance must be a number, got a tensor")
    if guidance != 1.0 and unconditional is None:
        raise ValueError(f"{op}: guidance {guidance} needs the prediction `unconditional`")
    if sampler.learned != (variance is not None):
        raise ValueError(
            f"{op}: variance is for a sampler with variance='learned_range', and needed there"
        )
    most, ratio = _range(op, clip, dynamic_threshold)
    key = _key(op, x, sampler, seed, offset, eps)
    if not sampler.noisy:
        eps = None
    tensors = x, prediction, unconditional, previous, variance, eps
    wide = dispatch.is_wide(*tensors)
    backend = dispatch.choose("sampler_step", x.device.type, wide, backend)
    rows = [None if one is None else checks.in_rows(one) for one in tensors]
    table = sampler.table64 if wide else sampler.table
    x_next, x0 = _sampler_step(
        backend, *rows, key, table, index, float(guidance), most, ratio, denoised
    )
    return checks.in_layout_of(x_next, x), checks.in_layout_of(x0, x) if denoised else x0
