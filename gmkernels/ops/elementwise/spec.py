"""Rows of the elementwise family."""

import math
from typing import Any

import torch
from torch import Tensor

from gmkernels.ops import elementwise
from gmkernels.ops.gaussian.spec import in_layout
from gmkernels.spec import Benchmark, Case, Inputs, Op, filled, other_dtype, row_cases

# Of log_scale: where exp over- and underflows in float16, and near 0.
_LOG_SCALES = (0.0, -0.0, 1e-4, -1e-4, 1.0, -1.0, 5.0, -5.0, 8.0, -8.0)
# Of y: where sigmoid saturates in float16 and in float32.
_LOGITS = (0.0, -0.0, 1e-4, -1e-4, 0.88, -0.89, 5.0, -5.0, 17.0, -17.0, 80.0, -80.0)
# Of x in [0, 1].
_UNIT = (0.0, 1.0, 0.5, 0.25, 1e-4, 0.999)
# Of leaky: either side of its corner, which itself has no second derivative.
_CORNER = (0.0, -0.0, 1e-7, -1e-7, 1.0, -1.0, 100.0, -100.0)


def _laid_out(x: Tensor, layout: str | None) -> Tensor:
    return torch.cat([x, x], 1).chunk(2, 1)[1] if layout == "chunk" else in_layout(x, layout)


def actnorm_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """x, shift and log_scale; a case on rows alone holds the two as constants."""
    o, channels = case.options, case.shape[1]
    second = other_dtype(dtype) if o.get("mixed") else dtype
    x = _laid_out(filled(case.shape, dtype, device, seed), o.get("layout"))
    shift = filled((channels,), second, device, seed + 1)
    log_scale = filled((channels,), second, device, seed + 2, scale=0.5)
    if o.get("values") == "boundary":
        log_scale = torch.tensor(_LOG_SCALES, dtype=second, device=device)
    fixed = (1, 2) if o.get("rows_alone") else ()
    return Inputs((x, shift, log_scale), fixed=fixed)


def eager_actnorm(x: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """As in most Glow code."""
    channels = (1, -1, *(1,) * (x.dim() - 2))
    y = (x + shift.view(channels)) * torch.exp(log_scale.view(channels))
    log_det = log_scale.float().sum() * math.prod(x.shape[2:])
    return y.to(x.dtype), log_det.expand(x.shape[0])


def eager_actnorm_inverse(y: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """As in most Glow code."""
    channels = (1, -1, *(1,) * (y.dim() - 2))
    x = y * torch.exp(-log_scale.view(channels)) - shift.view(channels)
    log_det = -log_scale.float().sum() * math.prod(y.shape[2:])
    return x.to(y.dtype), log_det.expand(y.shape[0])


def _inputs(
    case: Case, dtype: torch.dtype, device: str, seed: int, unit: bool, values: tuple[float, ...]
) -> Inputs:
    o = case.options
    x = filled(case.shape, torch.float64, device, seed)
    if unit:
        x = torch.special.ndtr(x)
    if o.get("values") == "boundary":
        x = torch.tensor(values, dtype=torch.float64, device=device).expand(case.shape)
    kwargs: dict[str, Any] = {name: o[name] for name in ("slope", "alpha") if name in o}
    return Inputs((_laid_out(x.to(dtype), o.get("layout")),), kwargs)


def leaky_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """x of either sign."""
    return _inputs(case, dtype, device, seed, False, _CORNER)


def logit_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """x in [0, 1]."""
    return _inputs(case, dtype, device, seed, True, _UNIT)


def logit_inverse_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Any y."""
    return _inputs(case, dtype, device, seed, False, _LOGITS)


def eager_leaky(x: Tensor, *, slope: float = 0.01) -> tuple[Tensor, Tensor]:
    """As in most flow code."""
    y = torch.nn.functional.leaky_relu(x, slope)
    log_slopes = torch.where(x < 0, math.log(slope), 0.0)
    return y, log_slopes.flatten(1).sum(1)


def eager_leaky_inverse(y: Tensor, *, slope: float = 0.01) -> tuple[Tensor, Tensor]:
    """As in most flow code."""
    x = torch.nn.functional.leaky_relu(y, 1 / slope)
    log_slopes = torch.where(y < 0, math.log(slope), 0.0)
    return x, -log_slopes.flatten(1).sum(1)


def eager_logit(x: Tensor, *, alpha: float = 0.05) -> tuple[Tensor, Tensor]:
    """As in most RealNVP code."""
    p = alpha + (1 - 2 * alpha) * x
    log_p, log_q = torch.log(p), torch.log(1 - p)
    log_det = math.log(1 - 2 * alpha) - log_p - log_q
    return log_p - log_q, log_det.float().flatten(1).sum(1)


def eager_logit_inverse(y: Tensor, *, alpha: float = 0.05) -> tuple[Tensor, Tensor]:
    """As in most RealNVP code."""
    log_p, log_q = torch.nn.functional.logsigmoid(y), torch.nn.functional.logsigmoid(-y)
    x = (torch.sigmoid(y) - alpha) / (1 - 2 * alpha)
    return x, (log_p + log_q - math.log(1 - 2 * alpha)).float().flatten(1).sum(1)


def dequantize_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Levels, bins and the noise: a seed, or u where the case says so."""
    o = case.options
    bins = o.get("bins", 256)
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, bins, case.shape, generator=generator).to(device)
    levels = _laid_out(levels.to(o.get("levels", torch.int64)), o.get("layout"))
    kwargs: dict[str, Any] = {"bins": bins, "seed": o.get("seed", seed)}
    if o.get("values") == "boundary":
        kwargs["u"] = torch.tensor([0.0, 1.0, 1 - 2**-24, 2**-33, 0.5, 1.0], device=device)
        kwargs["u"] = kwargs["u"].expand(case.shape)
    elif "u" in o:
        kwargs["u"] = torch.rand(case.shape, generator=generator, dtype=o["u"]).to(device)
    if "u" in kwargs:
        del kwargs["seed"]
    return Inputs((levels,), kwargs)


def eager_dequantize(
    levels: Tensor, *, bins: int, seed: int | None = None, u: Tensor | None = None
) -> Tensor:
    """As in most flow code: torch.rand's serial generator; rounding may enter the next level."""
    if u is None:
        u = torch.rand(levels.shape, device=levels.device)
    return (levels.to(torch.float32) + u) / bins


def _map_bytes(case: Case, dtype: torch.dtype, backward: bool) -> int:
    return math.prod(case.shape) * dtype.itemsize * (5 if backward else 2) + 4 * case.shape[0]


def _flops(per_element: int) -> Any:
    return lambda case: per_element * math.prod(case.shape)


_LAYOUTS = (
    Case("chunk", "non_contiguous", (6, 25), {"layout": "chunk"}),
    Case("transposed", "non_contiguous", (3, 6, 8), {"layout": "transposed"}),
    Case("channels_last", "channels_last", (2, 4, 5, 7), {"layout": "channels_last"}),
)
_ALONE = {"rows_alone": True}
_ACTNORM_CASES = (
    Case("odd_gradients", "odd", (5, 37)),
    *(c if c.name != "odd" else Case("odd", "odd", c.shape, _ALONE) for c in row_cases()),
    *_LAYOUTS,
    Case("boundary_values", "boundary", (5, 10), {"values": "boundary"}),
    Case("mixed_dtypes", "mixed", (4, 3, 11), {"mixed": True}),
    Case("default", "keyword", (5, 3, 7)),
    Case("image", "large", (35, 3, 16, 16)),
    Case("many_pixels", "large", (2, 3, 4099)),
    Case("no_pixels", "empty", (3, 4, 0)),
)
_IMAGES = Case("256x12x32x32", "large", (256, 12, 32, 32))
_MATRIX = Case("65536x64", "large", (65536, 64))


def _map_cases(name: str, values: tuple[float, ...], **keyword: float) -> tuple[Case, ...]:
    return (
        *row_cases(),
        *_LAYOUTS,
        Case("boundary_values", "boundary", (5, len(values)), {"values": "boundary"}),
        Case("log_det_is_float32_beside_any_dtype", "mixed", (4, 33)),
        *(Case(f"{k}_{v}", "keyword", (5, 37), {k: v}) for k, v in keyword.items()),
        Case(f"{name}_0.3", "keyword", (5, 37), {name: 0.3}),
    )


_BOUNDARY_LEVELS = Case("edges_of_a_level", "boundary", (5, 6), {"values": "boundary"})
_LEVELS_MIXED = Case("uint8", "mixed", (4, 33), {"levels": torch.uint8})
_DEQUANTIZE_CASES = (
    *row_cases(),
    *_LAYOUTS,
    _BOUNDARY_LEVELS,
    _LEVELS_MIXED,
    Case("int32", "mixed", (4, 33), {"levels": torch.int32}),
    Case("bins_1", "keyword", (5, 37), {"bins": 1}),
    Case("bins_49", "keyword", (5, 37), {"bins": 49}),
    Case("bins_2^20", "keyword", (5, 37), {"bins": 1 << 20}),
    Case("u", "keyword", (5, 37), {"u": torch.float32}),
    Case("u_float64", "keyword", (5, 37), {"u": torch.float64}),
)
_PIXELS = Case("256x3072", "large", (256, 3072), {"levels": torch.uint8})

OPS = (
    Op(
        name="actnorm",
        family="elementwise",
        summary="shift and scale each channel, log-determinant; ordered sums for the gradients",
        function=elementwise.actnorm,
        eager=eager_actnorm,
        inputs=actnorm_inputs,
        cases=_ACTNORM_CASES,
        benchmarks=(
            Benchmark("forward", _IMAGES),
            Benchmark("forward+backward", _IMAGES, backward=True),
            Benchmark("forward+backward, 64 features", _MATRIX, backward=True),
        ),
        bytes=_map_bytes,
        flops=_flops(2),
        source="Kingma and Dhariwal 2018, section 3.1",
    ),
    Op(
        name="actnorm_inverse",
        family="elementwise",
        summary="the inverse of actnorm, and the log-determinant of the inverse",
        function=elementwise.actnorm_inverse,
        eager=eager_actnorm_inverse,
        inputs=actnorm_inputs,
        cases=_ACTNORM_CASES,
        benchmarks=(Benchmark("forward", _IMAGES),),
        bytes=_map_bytes,
        flops=_flops(2),
        source="Kingma and Dhariwal 2018, section 3.1",
        operator="actnorm",
    ),
    Op(
        name="leaky",
        family="elementwise",
        summary="x, times a slope below 0, and its log-determinant",
        function=elementwise.leaky,
        eager=eager_leaky,
        inputs=leaky_inputs,
        cases=_map_cases("slope", _CORNER),
        benchmarks=(Benchmark("forward", _IMAGES),),
        bytes=_map_bytes,
        flops=_flops(2),
        source="Maas et al. 2013",
        operator="pointwise",
    ),
    Op(
        name="leaky_inverse",
        family="elementwise",
        summary="the inverse of leaky, and the log-determinant of the inverse",
        function=elementwise.leaky_inverse,
        eager=eager_leaky_inverse,
        inputs=leaky_inputs,
        cases=_map_cases("slope", _CORNER),
        benchmarks=(Benchmark("forward", _IMAGES),),
        bytes=_map_bytes,
        flops=_flops(2),
        source="Maas et al. 2013",
        operator="pointwise",
    ),
    Op(
        name="logit",
        family="elementwise",
        summary="pixels in [0, 1] to the line, kept off the ends by alpha, and the log-determinant",
        function=elementwise.logit,
        eager=eager_logit,
        inputs=logit_inputs,
        cases=_map_cases("alpha", _UNIT, alpha=0.0),
        benchmarks=(
            Benchmark("forward+backward", _IMAGES, backward=True, headline=True),
            Benchmark("forward", _IMAGES),
        ),
        bytes=_map_bytes,
        flops=_flops(50),
        source="Dinh et al. 2017, section 4.1",
        operator="pointwise",
    ),
    Op(
        name="logit_inverse",
        family="elementwise",
        summary="the inverse of logit, and the log-determinant of the inverse",
        function=elementwise.logit_inverse,
        eager=eager_logit_inverse,
        inputs=logit_inverse_inputs,
        cases=_map_cases("alpha", _LOGITS, alpha=0.0),
        benchmarks=(Benchmark("forward", _IMAGES),),
        bytes=_map_bytes,
        flops=_flops(50),
        source="Dinh et al. 2017, section 4.1",
        operator="pointwise",
    ),
    Op(
        name="dequantize",
        family="elementwise",
        summary="integer levels plus uniform noise made in the kernel, never over the level's edge",
        function=elementwise.dequantize,
        eager=eager_dequantize,
        inputs=dequantize_inputs,
        cases=_DEQUANTIZE_CASES,
        benchmarks=(Benchmark("256x3072 uint8", _PIXELS),),
        bytes=lambda case, dtype, backward: 5 * math.prod(case.shape),
        flops=_flops(15),
        source="Uria et al. 2013; Theis et al. 2016",
        floor=(0.0, "the bits are fixed: they equal the reference's"),
        differentiable=False,
    ),
)
