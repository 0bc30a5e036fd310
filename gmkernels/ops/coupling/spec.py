"""The rows affine_coupling and affine_coupling_inverse."""

import math
from typing import Any

import torch
from torch import Tensor

from gmkernels.ops import coupling
from gmkernels.ops.gaussian.spec import in_layout
from gmkernels.spec import GRAIN, Benchmark, Case, Inputs, Op, filled, other_dtype
from gmkernels.split import Split

# Around 0, where tanh and sigmoid saturate, and what float16 and float32 still hold.
_BOUNDARY = (0.0, -0.0, 1e-4, -1e-4, 2.0, -2.0, 10.0, -10.0, 80.0, -80.0, -2.0, 1.0)


def make_split(case: Case, device: str) -> Split:
    """The split that a case names, on the device."""
    o, shape = case.options, case.shape
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(5))
    kwargs: dict[str, Any] = {"permutation": order if o.get("permutation") else None}
    kind = o.get("split", "halves")
    if kind == "index":
        return Split.index(order[: (shape[1] + 2) // 3], shape[1], **kwargs).to(device)
    kwargs["flip"] = o.get("flip", False)
    if kind == "checkerboard":
        return Split.checkerboard(*shape[1:], **kwargs).to(device)
    make = Split.halves if kind == "halves" else Split.alternating
    return make(shape[1], **kwargs).to(device)


def inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """x, shift and raw_scale (or both in one tensor) and the split."""
    o = case.options
    split = make_split(case, device)
    second = other_dtype(dtype) if o.get("mixed") else dtype
    x = in_layout(filled(case.shape, dtype, device, seed), o.get("layout"))
    part = split.part_shape(x)
    shift = filled(part, second, device, seed + 1)
    raw = filled(part, second, device, seed + 2, o.get("spread", 1.0))
    if o.get("values") == "boundary":
        raw = torch.tensor(_BOUNDARY, dtype=second, device=device).expand(part)
    kwargs: dict[str, Any] = {"split": split, "scale": o.get("scale", "tanh")}
    if "clamp" in o:
        kwargs["clamp"] = o["clamp"]
    if kwargs["scale"] == "additive":
        return Inputs((x, shift), kwargs)
    if o.get("joint"):
        return Inputs((x, torch.cat([shift, raw], 1)), kwargs)
    if o.get("layout") == "chunk":
        shift, raw = torch.cat([shift, raw], 1).chunk(2, 1)
    return Inputs((x, shift, raw), kwargs)


def _eager_log_scale(raw: Tensor | None, scale: str, clamp: float) -> Tensor | None:
    if raw is None:
        return None
    if scale == "tanh":
        return clamp * torch.tanh(raw / clamp)
    return torch.nn.functional.logsigmoid(raw + 2) if scale == "sigmoid" else raw


def eager_affine_coupling(
    x: Tensor,
    shift: Tensor,
    raw_scale: Tensor | None = None,
    *,
    split: Split,
    scale: str = "tanh",
    clamp: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """As in most RealNVP code: take the row apart, map one part, concatenate."""
    passed, mapped = split.parts(x)
    if raw_scale is None and scale != "additive":
        shift, raw_scale = shift.chunk(2, 1)
    log_s = _eager_log_scale(raw_scale, scale, clamp)
    if log_s is None:
        mapped, log_det = mapped + shift, x.new_zeros(x.shape[0])
    else:
        mapped, log_det = mapped * torch.exp(log_s) + shift, log_s.flatten(1).sum(1)
    return split.join(passed, mapped.to(x.dtype), of_output=True), log_det.float()


def eager_affine_coupling_inverse(
    y: Tensor,
    shift: Tensor,
    raw_scale: Tensor | None = None,
    *,
    split: Split,
    scale: str = "tanh",
    clamp: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """As in most RealNVP code."""
    passed, mapped = split.parts(y, of_output=True)
    if raw_scale is None and scale != "additive":
        shift, raw_scale = shift.chunk(2, 1)
    log_s = _eager_log_scale(raw_scale, scale, clamp)
    if log_s is None:
        mapped, log_det = mapped - shift, y.new_zeros(y.shape[0])
    else:
        mapped, log_det = (mapped - shift) * torch.exp(-log_s), -log_s.flatten(1).sum(1)
    return split.join(passed, mapped.to(y.dtype)), log_det.float()


def _bytes(case: Case, dtype: torch.dtype, backward: bool) -> int:
    elements = math.prod(case.shape)
    part = math.prod(make_split(case, "cpu").part_shape(torch.empty(case.shape, device="meta")))
    parameters = 1 if case.options.get("scale") == "additive" else 2
    n = 2 * elements + parameters * part
    if backward:  # reads dy, x_2 and the raw scale; writes dx and the parameters' gradients
        n += 2 * elements + (2 * parameters) * part
    return n * dtype.itemsize + case.shape[0] * 4 * (2 if backward else 1)


def _flops(case: Case) -> int:
    per_element = {"additive": 1, "exp": 20, "sigmoid": 45, "tanh": 40}
    return per_element[case.options.get("scale", "tanh")] * math.prod(case.shape) // 2


CASES = (
    Case("no_rows", "empty", (0, 6)),
    Case("one", "one", (1, 1)),
    Case("odd", "odd", (5, 37)),
    Case("three_dims", "odd", (2, 4, 7)),
    Case("block-1", "block-1", (3, GRAIN - 1)),
    Case("block", "block", (2, GRAIN)),
    Case("block+1", "block+1", (3, GRAIN + 1)),
    Case("large", "large", (2, 17001)),
    Case("many_rows", "large", (531, 6)),
    Case("boundary_values", "boundary", (5, 24), {"values": "boundary"}),
    Case("chunk", "non_contiguous", (6, 50), {"layout": "chunk"}),
    Case("transposed", "non_contiguous", (3, 6, 8), {"layout": "transposed"}),
    Case("channels_last", "channels_last", (2, 4, 5, 7), {"layout": "channels_last"}),
    Case("mixed_dtypes", "mixed", (4, 33), {"mixed": True}),
    Case("joint", "keyword", (5, 38), {"joint": True}),
    Case("joint_image", "keyword", (3, 6, 5, 4), {"joint": True}),
    Case("exp", "keyword", (5, 37), {"scale": "exp"}),
    Case("sigmoid", "keyword", (5, 37), {"scale": "sigmoid", "spread": 4.0}),
    Case("additive", "keyword", (5, 37), {"scale": "additive"}),
    Case("clamp", "keyword", (5, 37), {"clamp": 0.4}),
    Case("flip", "keyword", (5, 37), {"flip": True}),
    Case("alternating", "keyword", (5, 37), {"split": "alternating"}),
    Case("alternating_image", "keyword", (3, 5, 6, 7), {"split": "alternating"}),
    Case("alternating_wide", "keyword", (3, 5, 1100), {"split": "alternating", "flip": True}),
    Case("checkerboard", "keyword", (3, 3, 5, 6), {"split": "checkerboard"}),
    Case("index", "keyword", (5, 37), {"split": "index"}),
    Case("index_joint", "keyword", (3, 7, 40), {"split": "index", "joint": True}),
    Case("permutation", "keyword", (5, 37), {"permutation": True}),
    Case("permutation_wide", "large", (1, 17000), {"permutation": True, "joint": True}),
    Case("board_permuted", "keyword", (3, 3, 4, 6), {"split": "checkerboard", "permutation": True}),
)
_DRAWS = (16, "a log_det may be a fiftieth of its terms, and the error of either side chance")
_BIG = Case("4096x4096", "large", (4096, 4096), {"joint": True})
_IMAGES = Case("64x48x32x32", "large", (64, 48, 32, 32), {"joint": True})


def _named(case: Case, name: str, **options: Any) -> Case:
    return Case(f"{case.name}, {name}", "large", case.shape, {**case.options, **options})


_BENCHMARKS = (
    Benchmark("forward", _BIG, headline=True),
    Benchmark("forward+backward", _BIG, backward=True, headline=True),
    Benchmark("forward, shift and scale apart", _named(_BIG, "apart", joint=False)),
    Benchmark("forward, exp", _named(_BIG, "exp", scale="exp")),
    Benchmark("forward, sigmoid", _named(_BIG, "sigmoid", scale="sigmoid")),
    Benchmark("forward, alternating", _named(_BIG, "alternating", split="alternating")),
    Benchmark("forward, permutation", _named(_BIG, "permutation", permutation=True)),
    Benchmark("forward bf16", _BIG, dtype=torch.bfloat16),
    Benchmark("forward+backward images", _IMAGES, backward=True),
    Benchmark("forward images, checkerboard", _named(_IMAGES, "board", split="checkerboard")),
)

OPS = (
    Op(
        name="affine_coupling",
        family="coupling",
        summary="scale and shift part of a row, pass the rest, log-determinant in the same pass",
        function=coupling.affine_coupling,
        eager=eager_affine_coupling,
        inputs=inputs,
        cases=CASES,
        benchmarks=_BENCHMARKS,
        bytes=_bytes,
        flops=_flops,
        source="Dinh et al. 2017, eq. 7",
        draws=_DRAWS,
    ),
    Op(
        name="affine_coupling_inverse",
        family="coupling",
        summary="the inverse of affine_coupling, and the log-determinant of the inverse",
        function=coupling.affine_coupling_inverse,
        eager=eager_affine_coupling_inverse,
        inputs=inputs,
        cases=CASES,
        benchmarks=(
            Benchmark("forward", _BIG),
            Benchmark("forward+backward", _BIG, backward=True),
        ),
        bytes=_bytes,
        flops=_flops,
        source="Dinh et al. 2017, eq. 8",
        draws=_DRAWS,
        operator="affine_coupling",
    ),
)
