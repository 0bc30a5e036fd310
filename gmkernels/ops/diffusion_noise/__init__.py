"""Noising and the denoising loss. Start with reference.py.

Saved for backward: of the noising the inputs; of the loss these and the residual. eps is made
again.
"""

import torch
from torch import Tensor

from gmkernels import checks, dispatch
from gmkernels.autograd import DifferentiableOp, is_batched, is_transformed
from gmkernels.noise import Seed, resolve_key
from gmkernels.ops.diffusion_noise import reference
from gmkernels.schedule import WEIGHTINGS, Schedule

__all__ = ["add_noise", "add_noise_with_target", "denoising_loss"]

dispatch.load_family(__name__, tuple(__all__))
_add_noise = DifferentiableOp("add_noise", reference.add_noise, inputs=2, outputs=1)
_add_noise_with_target = DifferentiableOp(
    "add_noise_with_target", reference.add_noise_with_target, inputs=2, outputs=2
)
_denoising_loss = DifferentiableOp(
    "denoising_loss", reference.denoising_loss, inputs=3, outputs=1, kept=1
)


def _check_schedule(op: str, schedule: Schedule, like: Tensor) -> None:
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"{op}: schedule must be a gmkernels.Schedule, got {type(schedule).__name__}"
        )
    if schedule.levels.device != like.device:
        raise ValueError(
            f"{op}: the schedule is on {schedule.levels.device}, the inputs are on {like.device}; "
            f"move it once: schedule.to({str(like.device)!r})"
        )


def _times(op: str, t: int | Tensor, schedule: Schedule, like: Tensor) -> Tensor:
    """t as [B], int64 or floating."""
    if isinstance(t, int) and not isinstance(t, bool):
        if not 0 <= t < len(schedule):
            raise ValueError(
                f"{op}: t must lie in [0, {len(schedule)}), the times of the schedule, got {t}"
            )
        return torch.full((1,), t, dtype=torch.int64, device=like.device).expand(like.shape[0])
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: t must be an int or a tensor, got {type(t).__name__}")
    if t.dtype == torch.bool or t.is_complex():
        raise TypeError(f"{op}: t must hold integers (times) or floats, got {t.dtype}")
    if t.requires_grad:
        raise ValueError(f"{op}: t is a constant here and has no gradient; pass t.detach()")
    if t.device != like.device:
        raise ValueError(f"{op}: t must be on {like.device} like the others, got {t.device}")
    if t.dim() > 1 or (t.dim() == 1 and t.shape[0] not in (1, like.shape[0])):
        raise ValueError(
            f"{op}: t must be one time, or one a row, shape ({like.shape[0]},), "
            f"got {tuple(t.shape)}"
        )
    return (t if t.is_floating_point() else t.to(torch.int64)).expand(like.shape[0])


def _noise(
    op: str,
    x0: Tensor,
    seed: Seed,
    offset: int,
    generator: torch.Generator | None,
    eps: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """(eps, None) where it is given, else (None, key)."""
    if eps is not None:
        checks.check_like(op, "eps", eps, "x0", x0)
        if seed is not None or generator is not None:
            raise ValueError(f"{op}: give eps or a seed, not both")
        return checks.in_rows(eps), None
    key = resolve_key(op, seed, offset, generator, x0.device)
    if is_transformed() and is_batched(x0) and not is_batched(key):
        raise RuntimeError(
            f"{op}: under vmap one seed would give every example the same noise; pass eps=, "
            "or a batched seed tensor"
        )
    return None, key


def _prediction(op: str, prediction_type: str) -> int:
    if prediction_type not in reference.PREDICTION_TYPES:
        raise ValueError(
            f"{op}: prediction_type must be one of {', '.join(reference.PREDICTION_TYPES)}, "
            f"got {prediction_type!r}"
        )
    return reference.PREDICTION_TYPES.index(prediction_type)


def _gathered(t: Tensor) -> Tensor | None:
    """Integer times gather inside the kernel; float times have a table row each."""
    return None if t.is_floating_point() else t


def add_noise(
    x0: Tensor,
    t: int | Tensor,
    schedule: Schedule,
    *,
    seed: Seed = None,
    offset: int = 0,
    generator: torch.Generator | None = None,
    eps: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x_t = alpha_t x0 + sigma_t eps: data noised to the times t, the noise made in the kernel.

    Args:
        x0: data [B, *], at least two dimensions; float32, bfloat16, float16, or float64
            (reference).
        t: times: integers in [0, T), gathered from the schedule inside the kernel, or floats, which
            stand where the schedule says (t in [0, 1], or sigma itself); [B], or one for all rows.
        schedule: of T times, on x0's device.
        seed: an int, an integer tensor or a key (gmkernels.noise.key); None draws one from torch's
            default generator. Give a key where the loss is to make the same noise again. eps equals
            gmkernels.normal(x0.shape, seed=seed, offset=offset).
        offset: rows of noise to skip, >= 0.
        generator: draws the seed instead (eager mode only).
        eps: the noise itself, x0's shape; then no seed is used, and eps may have a gradient.
        backend: None chooses; a named backend runs or raises.
    Returns:
        x0's shape, dtype and layout (a layout that is neither contiguous nor channels_last comes
        back contiguous).
    Raises:
        TypeError, ValueError: shapes, dtypes or devices other than said here.
        RuntimeError: a named backend that cannot run; a time outside the table in native CPU
            kernels (elsewhere its row is NaN, since looking would stop the GPU); vmap over x0 with
            one unbatched seed.

    Differentiable in x0 and eps, not in t. Accuracy: within twice the error of float32 PyTorch plus
    2 ulp of the output's scale. Source: Ho et al. 2020, eq. 4.

    >>> import torch, gmkernels
    >>> schedule = gmkernels.Schedule.linear()
    >>> gmkernels.add_noise(torch.ones(1, 2), 999, schedule, eps=torch.zeros(1, 2))
    tensor([[0.0064, 0.0064]])
    """
    op = "add_noise"
    checks.check_rows(op, "x0", x0)
    _check_schedule(op, schedule, x0)
    t = _times(op, t, schedule, x0)
    eps, key = _noise(op, x0, seed, offset, generator, eps)
    wide = dispatch.is_wide(x0, eps)
    name = dispatch.choose(op, x0.device.type, wide, backend)
    table = schedule.table(t, wide)
    (x_t,) = _add_noise(name, checks.in_rows(x0), eps, key, table, _gathered(t))
    return checks.in_layout_of(x_t, x0)


def add_noise_with_target(
    x0: Tensor,
    t: int | Tensor,
    schedule: Schedule,
    *,
    prediction_type: str = "epsilon",
    seed: Seed = None,
    offset: int = 0,
    generator: torch.Generator | None = None,
    eps: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """x_t and what a denoiser of that prediction type should say of it, in one pass.

    target = eps (epsilon), x0 (sample), alpha eps - sigma x0 (v_prediction), eps - x0
    (flow_prediction).

    Args: as in add_noise(), and
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction".
    Returns:
        x_t, target: x0's shape, dtype and layout, each.
    Raises:
        TypeError, ValueError, RuntimeError: as in add_noise(); an unknown prediction type.

    Differentiable in x0 and eps. Sources: Ho et al. 2020; Salimans and Ho 2022; Lipman et al. 2022.

    >>> import torch, gmkernels
    >>> schedule = gmkernels.Schedule.flow_matching()
    >>> x0, eps = torch.ones(1, 2), torch.zeros(1, 2)
    >>> gmkernels.add_noise_with_target(
    ...     x0, 499, schedule, prediction_type="flow_prediction", eps=eps
    ... )
    (tensor([[0.5000, 0.5000]]), tensor([[-1., -1.]]))
    """
    op = "add_noise_with_target"
    checks.check_rows(op, "x0", x0)
    _check_schedule(op, schedule, x0)
    prediction = _prediction(op, prediction_type)
    t = _times(op, t, schedule, x0)
    eps, key = _noise(op, x0, seed, offset, generator, eps)
    wide = dispatch.is_wide(x0, eps)
    name = dispatch.choose(op, x0.device.type, wide, backend)
    table = schedule.table(t, wide)
    rows = checks.in_rows(x0)
    x_t, target = _add_noise_with_target(name, rows, eps, key, table, _gathered(t), prediction)
    return checks.in_layout_of(x_t, x0), checks.in_layout_of(target, x0)


def denoising_loss(
    prediction: Tensor,
    x0: Tensor,
    t: int | Tensor,
    schedule: Schedule,
    *,
    seed: Seed = None,
    offset: int = 0,
    prediction_type: str = "epsilon",
    weighting: str | Tensor = "uniform",
    gamma: float = 5.0,
    sigma_data: float = 0.5,
    eps: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Weighted mean square between a denoiser's output and its target, the noise made again.

    loss = w / D sum_d (prediction - target)^2, one per row; the target is that of
    add_noise_with_target() under the same key, and is never stored.

    Args:
        prediction: output of the denoiser, x0's shape; its dtype may differ (autocast).
        x0, t, schedule, offset, eps, backend: as in add_noise().
        seed: the key (or seed) that was given to add_noise(); required unless eps is given.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction".
        weighting: "uniform" (w = 1); "snr", "min_snr" or "edm", which weigh the error of x0 by its
            SNR, by min(SNR, gamma), or by (sigma^2 + sigma_data^2) / (sigma sigma_data)^2; or the
            weights themselves, a tensor [B], which may have a gradient.
        gamma, sigma_data: of min_snr and edm.
    Returns:
        [B] float32 (float64 on float64 inputs); NaN for rows without elements.
    Raises:
        TypeError, ValueError, RuntimeError: as in add_noise(); no seed and no eps; an unknown
            prediction type or weighting; a weight that is infinite at a time of the schedule (edm
            of epsilon where alpha is 0, snr and edm of sample where sigma is 0). With float times
            the loss is infinite there, or NaN where the prediction is exact.

    Differentiable twice and more in prediction, x0, eps and a weight tensor; the gradient to the
    prediction comes from the forward's own pass over memory. Accuracy: within twice the error of
    float32 PyTorch plus 2 ulp of the output's scale. Sources: Ho et al. 2020, eq. 14; Hang et al.
    2023 (arXiv:2303.09556); Karras et al. 2022 (arXiv:2206.00364).

    >>> import torch, gmkernels
    >>> schedule, key = gmkernels.Schedule.linear(), gmkernels.noise.key(0)
    >>> eps = gmkernels.normal((2, 3), seed=key)
    >>> gmkernels.denoising_loss(eps, torch.ones(2, 3), 10, schedule, seed=key)
    tensor([0., 0.])
    """
    op = "denoising_loss"
    checks.check_rows(op, "prediction", prediction)
    checks.check_like(op, "x0", x0, "prediction", prediction)
    _check_schedule(op, schedule, x0)
    kind = _prediction(op, prediction_type)
    if eps is None and seed is None:
        raise ValueError(f"{op}: give the seed (a key) that add_noise was given, or eps")
    t = _times(op, t, schedule, x0)
    eps, key = _noise(op, x0, seed, offset, None, eps)
    wide = dispatch.is_wide(prediction, x0, eps)
    name = dispatch.choose(op, x0.device.type, wide, backend)
    named = "uniform" if isinstance(weighting, Tensor) else weighting
    if named not in WEIGHTINGS:
        raise ValueError(
            f"{op}: weighting must be one of {', '.join(WEIGHTINGS)} or a tensor [B], got {named!r}"
        )
    if not (gamma > 0 and sigma_data > 0):
        raise ValueError(
            f"{op}: gamma and sigma_data must be > 0, got gamma {gamma} and sigma_data {sigma_data}"
        )
    table = schedule.table(t, wide, named, prediction_type, gamma, sigma_data)
    rows = checks.in_rows(prediction), checks.in_rows(x0)
    (loss,) = _denoising_loss(name, *rows, eps, key, table, _gathered(t), kind)
    if isinstance(weighting, Tensor):
        if weighting.shape != loss.shape or weighting.device != loss.device:
            raise ValueError(
                f"{op}: weighting must have shape {tuple(loss.shape)} on {loss.device}, "
                f"got {tuple(weighting.shape)} on {weighting.device}"
            )
        loss = loss * weighting.to(loss.dtype)
    return loss
