"""Rows of the diffusion_noise family."""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gmkernels.ops import diffusion_noise
from gmkernels.ops.diffusion_noise.reference import PREDICTION_TYPES
from gmkernels.ops.gaussian.spec import in_layout
from gmkernels.schedule import Schedule
from gmkernels.spec import Benchmark, Case, Inputs, Op, filled, itemsize, other_dtype, row_cases


@functools.cache
def schedule_of(name: str, device: str) -> Schedule:
    """The schedule of a case's name."""
    made: dict[str, Callable[[], Schedule]] = {
        "linear": Schedule.linear,
        "cosine": Schedule.cosine,
        "karras": Schedule.karras,
        "flow_matching": Schedule.flow_matching,
        "zero_terminal_snr": lambda: Schedule.scaled_linear().zero_terminal_snr(),
        "one_time": lambda: Schedule.linear(1),
    }
    return made[name]().to(device)


def _times(case: Case, device: str, seed: int, steps: int) -> Any:
    how, rows = case.options.get("t", "each"), case.shape[0]
    if how == "ends":
        return torch.tensor([0, steps - 1], device=device).repeat(rows)[:rows]
    if how == "int":
        return steps // 2
    if how == "scalar":
        return torch.tensor(steps // 2, dtype=torch.int32, device=device)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(rows, generator=generator, dtype=torch.float64)
    if how == "float":
        return drawn.to(device)
    return (drawn * steps).long().to(device)


def _given(case: Case, dtype: torch.dtype, device: str, seed: int, loss: bool) -> Inputs:
    o = case.options
    second = other_dtype(dtype) if o.get("mixed") else dtype
    x0 = in_layout(filled(case.shape, torch.float64, device, seed).to(dtype), o.get("layout"))
    if o.get("values") == "boundary":
        x0 = x0.sign() * torch.tensor([0.0, 1.0, 1e4, 1e-4], device=device).to(dtype)
    schedule = schedule_of(o.get("schedule", "linear"), device)
    t = _times(case, device, seed, len(schedule))
    kwargs: dict[str, Any] = {k: o[k] for k in ("prediction_type", "gamma", "sigma_data") if k in o}
    if "eps" in o:
        kwargs["eps"] = filled(case.shape, torch.float64, device, seed + 1).to(second)
    if not loss:
        return Inputs((x0, t, schedule), kwargs, fixed=(1,))
    predicted = filled(case.shape, torch.float64, device, seed + 2).to(second)
    if "weighting" in o:
        kwargs["weighting"] = o["weighting"]
        if o["weighting"] == "tensor":
            kwargs["weighting"] = filled(case.shape[:1], torch.float32, device, seed + 3).exp()
    return Inputs((in_layout(predicted, o.get("layout")), x0, t, schedule), kwargs, (2,), (1,))


noising_inputs = functools.partial(_given, loss=False)
loss_inputs = functools.partial(_given, loss=True)


def _levels(t: Any, schedule: Schedule, like: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
    table = schedule.levels64 if wide else schedule.levels
    if isinstance(t, Tensor) and t.is_floating_point():
        a, s = schedule.at(t, table.dtype)[:, :2].to(like.dtype).unbind(1)
    else:
        a, s = table[t, 0].to(like.dtype), table[t, 1].to(like.dtype)
    shape = (-1, *(1,) * (like.dim() - 1))
    return a.reshape(shape), s.reshape(shape)


def _target(x0: Tensor, eps: Tensor, a: Tensor, s: Tensor, prediction_type: str) -> Tensor:
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return x0
    return a * eps - s * x0 if prediction_type == "v_prediction" else eps - x0


def eager_add_noise(x0: Tensor, t: Any, schedule: Schedule, *, eps: Tensor | None = None) -> Tensor:
    """As in diffusers: levels in the data's dtype, one pass an operation."""
    if eps is None:
        eps = torch.randn_like(x0)
    a, s = _levels(t, schedule, x0, x0.dtype == torch.float64)
    return (a * x0 + s * eps).to(x0.dtype)


@functools.cache
def _diffusers_scheduler() -> Any:
    import diffusers

    return diffusers.DDPMScheduler()


def diffusers_add_noise(
    x0: Tensor, t: Any, schedule: Schedule, *, eps: Tensor | None = None
) -> Tensor:
    """diffusers' DDPMScheduler.add_noise."""
    return _diffusers_scheduler().add_noise(x0, torch.randn_like(x0) if eps is None else eps, t)


def eager_add_noise_with_target(
    x0: Tensor,
    t: Any,
    schedule: Schedule,
    *,
    prediction_type: str = "epsilon",
    eps: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As in diffusers' training scripts."""
    if eps is None:
        eps = torch.randn_like(x0)
    a, s = _levels(t, schedule, x0, x0.dtype == torch.float64)
    target = _target(x0, eps, a, s, prediction_type).clone()
    return (a * x0 + s * eps).to(x0.dtype), target.to(x0.dtype)


def eager_denoising_loss(
    prediction: Tensor,
    x0: Tensor,
    t: Any,
    schedule: Schedule,
    *,
    prediction_type: str = "epsilon",
    weighting: Any = "uniform",
    gamma: float = 5.0,
    sigma_data: float = 0.5,
    eps: Tensor | None = None,
) -> Tensor:
    """As in diffusers' training scripts, the weights computed in float32."""
    if eps is None:
        eps = torch.randn_like(x0)
    a, s = _levels(t, schedule, x0, x0.dtype == torch.float64)
    target = _target(x0, eps, a, s, prediction_type)
    wide = torch.promote_types(torch.float32, prediction.dtype)
    squares = torch.nn.functional.mse_loss(prediction.to(wide), target.to(wide), reduction="none")
    loss = squares.flatten(1).mean(1)
    if isinstance(weighting, Tensor):
        return loss * weighting
    if weighting == "uniform":
        return loss
    a, s = _levels(t, schedule, loss[:, None], wide == torch.float64)
    levels = torch.cat([a, s], 1).expand(len(loss), 2)
    return loss * schedule.weights(levels, weighting, prediction_type, gamma, sigma_data)


def _elements(case: Case) -> int:
    n = 1
    for size in case.shape:
        n *= size
    return n


def _traffic(forward: int, backward: int, drawn: bool):
    """Bytes of a row: elements moved each way; eps given is read in the forward."""

    def bytes_(case: Case, dtype: torch.dtype, with_backward: bool) -> int:
        n = forward + (backward if with_backward else 0) + (1 if "eps" in case.options else 0)
        return n * _elements(case) * itemsize(dtype)

    return bytes_


CASES = (
    *row_cases(),
    Case("boundary_values", "boundary", (5, 12, 4), {"values": "boundary", "t": "ends"}),
    Case("zero_terminal_snr", "boundary", (4, 33), {"schedule": "zero_terminal_snr", "t": "ends"}),
    Case("karras_ends", "boundary", (4, 33), {"schedule": "karras", "t": "ends"}),
    Case("flow_ends", "boundary", (4, 33), {"schedule": "flow_matching", "t": "ends"}),
    Case("one_time", "boundary", (4, 33), {"schedule": "one_time", "t": "ends"}),
    Case("transposed", "non_contiguous", (3, 5, 8), {"layout": "transposed"}),
    Case("image_channels_last", "channels_last", (2, 3, 5, 7), {"layout": "channels_last"}),
    Case("mixed_dtypes", "mixed", (4, 33), {"mixed": True, "eps": True}),
    Case("eps", "keyword", (5, 37), {"eps": True}),
    Case("int_time", "keyword", (5, 37), {"t": "int"}),
    Case("scalar_time", "keyword", (5, 37), {"t": "scalar"}),
    Case("float_time_flow", "keyword", (5, 37), {"t": "float", "schedule": "flow_matching"}),
    Case("float_time_karras", "keyword", (5, 37), {"t": "float", "schedule": "karras"}),
)
_TYPES = tuple(
    Case(f"{name}{'_eps' if eps else ''}", "keyword", (3, 130), {"prediction_type": name, **eps})
    for name in PREDICTION_TYPES
    for eps in ({}, {"eps": True})
)
_WEIGHTS = (
    *(
        Case(f"{name}_{kind}", "keyword", (6, 33), {"weighting": name, "prediction_type": kind})
        for name in ("uniform", "snr", "min_snr", "edm")
        for kind in PREDICTION_TYPES
    ),
    Case("gamma", "keyword", (6, 33), {"weighting": "min_snr", "gamma": 2.0}),
    Case("sigma_data", "keyword", (6, 33), {"weighting": "edm", "sigma_data": 1.5}),
    Case("weight_tensor", "keyword", (6, 33), {"weighting": "tensor"}),
    Case(
        "min_snr_float_time",
        "keyword",
        (6, 33),
        {"weighting": "min_snr", "t": "float", "schedule": "flow_matching"},
    ),
    Case(
        "mixed_v_prediction",
        "mixed",
        (4, 33),
        {"mixed": True, "prediction_type": "v_prediction"},
    ),
    Case("min_snr_ends", "boundary", (4, 33), {"weighting": "min_snr", "t": "ends"}),
)
_IMAGES = Case("256x3x64x64", "large", (256, 3, 64, 64))
_IMAGES_EPS = Case("256x3x64x64, eps given", "large", (256, 3, 64, 64), {"eps": True})
_IMAGES_V = Case("256x3x64x64 v", "large", (256, 3, 64, 64), {"prediction_type": "v_prediction"})
_LATENTS = Case("16x4x64x64", "large", (16, 4, 64, 64))
_CHANNELS_LAST = Case(
    "256x3x64x64 channels_last", "large", (256, 3, 64, 64), {"layout": "channels_last"}
)

OPS = (
    Op(
        name="add_noise",
        family="diffusion_noise",
        summary="x_t = alpha_t x0 + sigma_t eps, the levels gathered and the noise made inside",
        function=diffusion_noise.add_noise,
        eager=eager_add_noise,
        inputs=noising_inputs,
        cases=CASES,
        benchmarks=(
            Benchmark("forward", _IMAGES, headline=True),
            Benchmark("forward, eps given", _IMAGES_EPS, eager_eps=True),
            Benchmark("forward bf16", _IMAGES, dtype=torch.bfloat16),
            Benchmark("forward latents", _LATENTS),
            Benchmark("forward channels_last", _CHANNELS_LAST),
        ),
        bytes=_traffic(2, 2, True),
        flops=lambda case: 48 * _elements(case),
        source="Ho et al. 2020, eq. 4",
        noisy=True,
        instructions={"float32": 79, "bfloat16": 79},
        peers={"diffusers": diffusers_add_noise} if find_spec("diffusers") else {},
    ),
    Op(
        name="add_noise_with_target",
        family="diffusion_noise",
        summary="x_t and the target of an epsilon, sample, v or flow prediction, in one pass",
        function=diffusion_noise.add_noise_with_target,
        eager=eager_add_noise_with_target,
        inputs=noising_inputs,
        cases=(*CASES, *_TYPES),
        benchmarks=(
            Benchmark("forward v_prediction", _IMAGES_V),
            Benchmark(
                "forward v_prediction, eps given",
                Case(
                    "256x3x64x64 v, eps given",
                    "large",
                    (256, 3, 64, 64),
                    {
                        "prediction_type": "v_prediction",
                        "eps": True,
                    },
                ),
                eager_eps=True,
            ),
        ),
        bytes=_traffic(3, 3, True),
        flops=lambda case: 51 * _elements(case),
        source="Salimans and Ho 2022; Lipman et al. 2022",
        noisy=True,
    ),
    Op(
        name="denoising_loss",
        family="diffusion_noise",
        summary="weighted mean square to the target, the noise made again, gradient in the pass",
        function=diffusion_noise.denoising_loss,
        eager=eager_denoising_loss,
        inputs=loss_inputs,
        cases=(*CASES, *_TYPES, *_WEIGHTS),
        benchmarks=(
            Benchmark("forward+backward", _IMAGES, backward=True, headline=True),
            Benchmark("forward+backward, eps given", _IMAGES_EPS, backward=True, eager_eps=True),
            Benchmark("forward+backward v_prediction", _IMAGES_V, backward=True),
            Benchmark("forward", _IMAGES),
        ),
        bytes=_traffic(2, 2, True),
        flops=lambda case: 50 * _elements(case),
        source="Ho et al. 2020, eq. 14; Hang et al. 2023",
        noisy=True,
    ),
)
