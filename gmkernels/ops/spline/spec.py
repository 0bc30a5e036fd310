"""The rows of spline_coupling, spline_transform and their inverses."""

import functools
import math
from typing import Any

import torch

from gmkernels.ops import spline
from gmkernels.ops.coupling.spec import make_split
from gmkernels.ops.gaussian.spec import in_layout
from gmkernels.ops.spline import eager
from gmkernels.spec import GRAIN, Benchmark, Case, Inputs, Op, filled, other_dtype

# On the bound, beyond it, at 0, close to either.
_BOUNDARY = (3.0, -3.0, 3.5, -100.0, 0.0, -0.0, 0.75, -1.5, 2.999, -2.999, 1e-6, float("inf"))


def _bins(case: Case) -> int:
    return case.options.get("bins", 8)


def inputs(case: Case, dtype: torch.dtype, device: str, seed: int, *, coupling: bool) -> Inputs:
    """x, the parameters (in one tensor or three) and, for a coupling, the split."""
    o, bins = case.options, _bins(case)
    second = other_dtype(dtype) if o.get("mixed") else dtype
    x = in_layout(filled(case.shape, dtype, device, seed, 1.5), o.get("layout"))
    kwargs: dict[str, Any] = {k: o[k] for k in _NUMBERS if k in o}
    part = tuple(case.shape)
    if coupling:
        kwargs["split"] = make_split(case, device)
        part = kwargs["split"].part_shape(x)
    spread = o.get("spread", 0.3)
    if o.get("values") == "boundary":
        values = torch.tensor(_BOUNDARY, dtype=dtype, device=device)
        x = values.repeat(math.prod(case.shape) // len(values)).view(case.shape)
    sizes = (3 * bins - 1,) if not o.get("apart") else (bins, bins, bins - 1)
    raw = [filled((*part, n), second, device, seed + 1 + i, spread) for i, n in enumerate(sizes)]
    if o.get("layout") == "chunk":
        raw = [torch.cat([p, p], 1).chunk(2, 1)[1] for p in raw]
    if len(raw) == 1:
        return Inputs((x, raw[0]), kwargs)
    return Inputs((x, tuple(raw)), kwargs)


def _bytes(case: Case, dtype: torch.dtype, backward: bool, *, coupling: bool) -> int:
    elements = part = math.prod(case.shape)
    if coupling:
        x = torch.empty(case.shape, device="meta")
        part = math.prod(make_split(case, "cpu").part_shape(x))
    parameters = part * (3 * _bins(case) - 1)
    n = 2 * elements + parameters
    if backward:
        n += 3 * elements + 2 * parameters
    return n * dtype.itemsize + case.shape[0] * 4 * (2 if backward else 1)


def _flops(case: Case) -> int:
    return (40 * _bins(case) + 150) * math.prod(case.shape)


_NUMBERS = ("bins", "bound", "min_width", "min_height", "min_derivative")
_SHAPES = (
    Case("no_rows", "empty", (0, 6)),
    Case("one", "one", (1, 1)),
    Case("odd", "odd", (5, 37)),
    Case("three_dims", "odd", (2, 4, 7)),
    Case("block-1", "block-1", (1, GRAIN - 1)),
    Case("block", "block", (1, GRAIN)),
    Case("block+1", "block+1", (1, GRAIN + 1)),
    Case("many_rows", "large", (531, 2)),
    Case("boundary_values", "boundary", (4, 24), {"values": "boundary"}),
    Case("transposed", "non_contiguous", (3, 6, 8), {"layout": "transposed"}),
    Case("channels_last", "channels_last", (2, 4, 3, 5), {"layout": "channels_last"}),
    Case("mixed_dtypes", "mixed", (4, 33), {"mixed": True}),
    Case(
        "numbers",
        "keyword",
        (3, 50),
        {"bins": 5, "bound": 1.3, "min_width": 0.03, "min_height": 0.1, "min_derivative": 0.2},
    ),
)
# What the rows share is tested in full where most of it meets: in the coupling.
_NUMBER_CASES = (
    Case("large", "large", (1, 8300)),
    Case("chunk", "non_contiguous", (6, 10), {"layout": "chunk"}),
    Case("apart", "keyword", (5, 37), {"apart": True}),
    Case("4_bins", "keyword", (5, 37), {"bins": 4, "apart": True}),
    Case("32_bins", "keyword", (3, 21), {"bins": 32}),
    Case("min_derivative", "keyword", (5, 37), {"min_derivative": 0.0}),
)
_COUPLINGS = (
    Case("flip", "keyword", (5, 37), {"flip": True}),
    Case("alternating_image", "keyword", (3, 5, 6, 7), {"split": "alternating"}),
    Case("checkerboard", "keyword", (3, 3, 4, 6), {"split": "checkerboard"}),
    Case("index", "keyword", (5, 37), {"split": "index"}),
    Case("permutation", "keyword", (70, 6), {"permutation": True}),
)
_FLOOR = (4.0, "sums over bins, a root and quotients each round")
_DRAWS = (128, "narrow bins and steep slopes magnify what is rounded, by chance for either side")
_BIG = Case("16384x32", "large", (16384, 32))
_PLANE = Case("1048576x2", "large", (1 << 20, 2))


def _row(name: str, summary: str, source: str, *, coupling: bool, inverse: bool) -> Op:
    benchmarks: tuple[Benchmark, ...] = (
        Benchmark("forward", _BIG, headline=name == "spline_transform"),
        Benchmark("forward+backward", _BIG, backward=True, headline=name == "spline_transform"),
    )
    if name == "spline_transform":
        wide = Case("16384x32 K=16", "large", (16384, 32), {"bins": 16})
        benchmarks += (Benchmark("forward bf16", _BIG, torch.bfloat16), Benchmark("K=16", wide))
    if name == "spline_coupling":
        benchmarks += (Benchmark("forward+backward in the plane", _PLANE, backward=True),)
    return Op(
        name=name,
        family="spline",
        summary=summary,
        function=getattr(spline, name),
        eager=eager.make(eager.rational_quadratic, inverse),
        inputs=functools.partial(inputs, coupling=coupling),
        cases=_SHAPES
        + (_NUMBER_CASES if coupling else ())
        + (_COUPLINGS[inverse:] if coupling else ()),
        benchmarks=benchmarks,
        bytes=functools.partial(_bytes, coupling=coupling),
        flops=_flops,
        source=source,
        floor=_FLOOR,
        draws=_DRAWS,
        operator="spline_map",
        peers=eager.peers(inverse),
    )


OPS = (
    _row(
        "spline_coupling",
        "rational-quadratic spline on part of a row, the rest passes, log-determinant",
        "Durkan et al. 2019",
        coupling=True,
        inverse=False,
    ),
    _row(
        "spline_coupling_inverse",
        "its inverse in closed form, by a root that does not cancel",
        "Durkan et al. 2019, eq. 6 to 8",
        coupling=True,
        inverse=True,
    ),
    _row(
        "spline_transform",
        "rational-quadratic spline on every element, for autoregressive flows",
        "Durkan et al. 2019",
        coupling=False,
        inverse=False,
    ),
    _row(
        "spline_transform_inverse",
        "its inverse in closed form",
        "Durkan et al. 2019, eq. 6 to 8",
        coupling=False,
        inverse=True,
    ),
)
