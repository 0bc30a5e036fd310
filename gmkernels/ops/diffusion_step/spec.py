"""Rows of the diffusion_step family: seven ops on one kernel."""

import functools
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gmkernels.ops import diffusion_step
from gmkernels.ops.diffusion_step import eager
from gmkernels.ops.gaussian.spec import in_layout
from gmkernels.sampler import Sampler
from gmkernels.schedule import Schedule
from gmkernels.spec import Benchmark, Case, Inputs, Op, filled, itemsize, other_dtype, row_cases

STEPS = 10
_SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "linear": Schedule.linear,
    "karras": Schedule.karras,
    "flow_matching": Schedule.flow_matching,
    "zero_terminal_snr": lambda: Schedule.linear().zero_terminal_snr(),
}


@functools.cache
def sampler_of(name: str, device: str, schedule: str, options: tuple[Any, ...]) -> Sampler:
    """The sampler of a case."""
    made = getattr(Sampler, name)(_SCHEDULES[schedule](), STEPS, **dict(options))
    return made.to(device)


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int, *, name: str) -> Inputs:
    o = dict(case.options)
    if name == "flow_euler":
        o["schedule"] = "flow_matching"
    second = other_dtype(dtype) if o.get("mixed") else dtype

    def draw(i: int, kind: torch.dtype) -> Tensor:
        x = filled(case.shape, torch.float64, device, seed + i, scale=o.get("scale", 1.0))
        return in_layout(x.to(kind), o.get("layout"))

    x, prediction = draw(0, dtype), draw(1, second)
    if o.get("layout") == "chunk":
        prediction, variance = torch.cat([prediction, draw(2, second).sin()], 1).chunk(2, 1)
    named = ("prediction_type", "eta", "rederive_epsilon", "variance")
    made = {k: o[k] for k in named if k in o}
    sampler = sampler_of(name, device, o.get("schedule", "linear"), tuple(made.items()))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(sampler), case.shape[:1], generator=generator)
    step: Any = drawn.to(device)
    if o.get("step") == "ends":
        step = torch.tensor([0, len(sampler) - 1], device=device).repeat(len(step))[: len(step)]
    elif "step" in o:
        step = o["step"]
    kwargs: dict[str, Any] = {k: o[k] for k in ("guidance", "clip", "dynamic_threshold") if k in o}
    if sampler.learned:
        kwargs["variance"] = variance if o.get("layout") == "chunk" else draw(2, second).sin()
    if "unconditional" in o:
        kwargs["unconditional"] = draw(3, dtype)
    if name in ("heun", "dpmpp_2m"):
        kwargs["previous"] = draw(4, second)
    if "eps" in o:
        kwargs["eps"] = draw(5, second)
    return Inputs((x, prediction, step, sampler), kwargs, fixed=(2, 3))


def _noise(given: Inputs, seed: int) -> Tensor:
    """The noise of a call's steps under a seed."""
    x, _, step, _ = given.args
    index = torch.as_tensor(step, device=x.device).expand(x.shape[0])
    key = torch.tensor([seed, 0], device=x.device)
    columns = x[0].numel() if len(x) else 0
    return torch.ops.gmkernels_reference.folded_normal(key, index, columns).view(x.shape)


def _elements(case: Case) -> int:
    n = 1
    for size in case.shape:
        n *= size
    return n


def _bytes(case: Case, dtype: torch.dtype, backward: bool, *, previous: bool, both: bool) -> int:
    o = case.options
    read = 2 + previous + ("unconditional" in o) + ("eps" in o) + (o.get("variance") == "learned")
    moved = read + 1 + both + (read + 1 + both if backward else 0)
    return moved * _elements(case) * itemsize(dtype)


_FEW = ("no_columns", "three_dims", "many_rows")  # one op of the seven has them: ddim
_SHAPES = (
    *(case for case in row_cases() if case.name not in _FEW),
    Case("ends", "boundary", (4, 33), {"step": "ends"}),
    Case("clip_at_both_sides", "boundary", (4, 2, 9), {"clip": 0.5, "step": "ends"}),
    Case("transposed", "non_contiguous", (3, 5, 8), {"layout": "transposed", "clip": 1.0}),
    Case("image_channels_last", "channels_last", (2, 3, 5, 7), {"layout": "channels_last"}),
    Case("mixed_dtypes", "mixed", (4, 33), {"mixed": True, "unconditional": 1, "guidance": 2.0}),
    Case("guidance", "keyword", (5, 37), {"unconditional": 1, "guidance": 3.0, "step": 2}),
    Case("guidance_clip", "keyword", (5, 37), {"unconditional": 1, "guidance": 0.5, "clip": 0.3}),
    Case(
        "dynamic_threshold",
        "keyword",
        (2, 130),
        {"dynamic_threshold": (0.5, 2.0), "scale": 1e-3, "unconditional": 1, "guidance": 2.0},
    ),
    Case("v_prediction", "keyword", (5, 37), {"prediction_type": "v_prediction"}),
    Case("sample", "keyword", (5, 37), {"prediction_type": "sample", "clip": 1.0}),
    Case("edm", "keyword", (5, 37), {"prediction_type": "edm", "schedule": "karras"}),
)
# Triton's interpreter takes a second for a few rows: one op of the seven has these, too.
_THRESHOLDS = (
    Case(
        "threshold",
        "boundary",
        (3, 101),
        {"dynamic_threshold": (0.8, 3.0), "scale": 2.0, "step": 6},
    ),
    Case("threshold_maximum", "boundary", (2, 9), {"dynamic_threshold": (1.0, 1.5), "scale": 3.0}),
    Case("threshold_no_columns", "empty", (3, 0), {"dynamic_threshold": (0.8, 3.0)}),
)
_EPS = (
    Case("eps", "keyword", (5, 37), {"eps": True}),
    Case("eps_mixed", "mixed", (5, 37), {"eps": True, "mixed": True, "clip": 0.7}),
)
_IMAGES = (256, 3, 64, 64)
_PEERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}


def _diffusers_step(name: str) -> dict[str, Callable[..., Any]]:
    """diffusers' step on the same path, where it is installed and knows the sampler."""
    if name not in _PEERS or find_spec("diffusers") is None:
        return {}

    @functools.cache
    def scheduler() -> Any:
        import diffusers

        made = getattr(diffusers, _PEERS[name])()
        made.set_timesteps(STEPS)
        made.register_to_config(clip_sample=name == "ddpm")
        return made

    def step(
        x: Tensor,
        prediction: Tensor,
        i: int,
        sampler: Sampler,
        *,
        unconditional: Tensor | None = None,
        guidance: float = 1.0,
        eps: Tensor | None = None,
        **ours: Any,
    ) -> Tensor:
        theirs = scheduler()
        theirs._step_index = None  # it counts its own calls; here step i comes again and again
        theirs.is_scale_input_called = True  # else Euler's warns in every call, which takes time
        if unconditional is not None:
            prediction = unconditional + guidance * (prediction - unconditional)
        extra = {"eta": float(sampler.noisy)} if name == "ddim" else {}
        module = sys.modules[type(theirs).__module__]
        drawn = vars(module).get("randn_tensor")
        if eps is not None:
            vars(module)["randn_tensor"] = lambda *args, **kwargs: eps
        try:
            return theirs.step(prediction, theirs.timesteps[i], x, **extra).prev_sample
        finally:
            vars(module)["randn_tensor"] = drawn

    return {"diffusers": step}


def _row(
    name: str,
    summary: str,
    source: str,
    cases: tuple[Case, ...] = (),
    *,
    noisy: bool = False,
    options: dict[str, Any] | None = None,
    benchmarks: tuple[Benchmark, ...] = (),
) -> Op:
    previous = name in ("heun", "dpmpp_2m")
    timed = {"step": 4, **(options or {})}
    images = Case("256x3x64x64", "large", _IMAGES, timed)
    given = Case("256x3x64x64, eps given", "large", _IMAGES, {**timed, "eps": True})
    twins = (Benchmark("step, eps given", given, eager_eps=True),)
    return Op(
        name=f"{name}_step",
        family="diffusion_step",
        summary=summary,
        function=getattr(diffusion_step, f"{name}_step"),
        eager=getattr(eager, f"{name}_step"),
        inputs=functools.partial(_inputs, name=name),
        cases=(*_SHAPES, *(_EPS if noisy else ()), *cases),
        benchmarks=(
            Benchmark("step", images, headline=name == "ddim"),
            *(twins if noisy else ()),
            *benchmarks,
        ),
        bytes=functools.partial(_bytes, previous=previous, both=name == "dpmpp_2m"),
        flops=lambda case: (53 if noisy else 5) * _elements(case),
        source=source,
        noisy=noisy,
        noise=_noise,
        operator="sampler_step",
        peers=_diffusers_step(name),
    )


_STEP = {"step": 4}
_PLAIN = Case("256x3x64x64 eta 0", "large", _IMAGES, _STEP)
_LATENT = Case("1x4x64x64", "large", (1, 4, 64, 64), _STEP)
_GUIDED = {"step": 4, "unconditional": 1, "guidance": 3.0}
_THRESHOLD = {"step": 4, "dynamic_threshold": (0.995, 1.5)}
OPS = (
    _row(
        "ddpm",
        "ancestral step: fixed or learned variance, guidance and clamping in the same pass",
        "Ho et al. 2020, eq. 11; Nichol and Dhariwal 2021, eq. 15",
        (
            Case("fixed_large", "keyword", (5, 37), {"variance": "fixed_large"}),
            Case("learned_range", "keyword", (5, 37), {"variance": "learned_range"}),
            Case("learned_eps", "keyword", (5, 37), {"variance": "learned_range", "eps": True}),
            Case(
                "learned_halves",
                "non_contiguous",
                (4, 6, 9),
                {"variance": "learned_range", "layout": "chunk", "clip": 1.0},
            ),
        ),
        noisy=True,
        options={"clip": 1.0},
    ),
    _row(
        "ddim",
        "DDIM step, deterministic or with noise, the same options",
        "Song et al. 2021, eq. 12",
        (
            *(case for case in row_cases(features=4) if case.name in _FEW),
            *_THRESHOLDS,
            Case("eta_0", "keyword", (5, 37), {"eta": 0.0, "clip": 0.5}),
            Case("rederived", "keyword", (5, 37), {"rederive_epsilon": True, "clip": 0.5}),
            Case(
                "v_zero_terminal_snr",
                "boundary",
                (4, 33),
                {
                    "schedule": "zero_terminal_snr",
                    "prediction_type": "v_prediction",
                    "step": "ends",
                },
            ),
        ),
        noisy=True,
        options={"eta": 1.0},
        benchmarks=(
            Benchmark(
                "step eta 0",
                Case("256x3x64x64 eta 0", "large", _IMAGES, {"step": 4}),
                headline=True,
            ),
            Benchmark("step guided", Case("256x3x64x64 guided", "large", _IMAGES, _GUIDED)),
            Benchmark(
                "step, dynamic threshold",
                Case("256x3x64x64 threshold", "large", _IMAGES, _THRESHOLD),
            ),
            Benchmark("step, one latent", _LATENT),
            Benchmark("step, 16 latents", Case("16x4x64x64", "large", (16, 4, 64, 64), _STEP)),
        ),
    ),
    _row("euler", "Euler step along the probability flow", "Karras et al. 2022, algorithm 1"),
    _row(
        "euler_ancestral",
        "Euler step to a lower level, and noise up to the next",
        "Crowson 2022, k-diffusion",
        noisy=True,
    ),
    _row(
        "heun",
        "Heun step: prediction and correction, from the x before",
        "Karras et al. 2022, algorithm 1",
        (Case("previous", "keyword", (5, 37), {"previous": True, "step": 3}),),
    ),
    _row(
        "dpmpp_2m",
        "DPM-Solver++(2M) step, and the x0 that the next one needs",
        "Lu et al. 2022, algorithm 2",
        (Case("previous", "keyword", (5, 37), {"previous": True, "clip": 0.5}),),
    ),
    _row(
        "flow_euler",
        "Euler step along a rectified flow, x' = x + (sigma' - sigma) v",
        "Liu et al. 2022; Esser et al. 2024",
    ),
)
