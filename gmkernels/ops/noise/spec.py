"""Rows of the noise family. A case's shape is the call's argument; its options are the keywords.

The ops read no tensor: kinds of case that are about inputs hold the nearest thing, the name says
what.
"""

import math
from typing import Any

import torch
from torch import Tensor

from gmkernels import noise
from gmkernels.spec import GRAIN, Benchmark, Case, Inputs, Op


def inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """The shape, and the keywords of the case's options, which win over the other arguments."""
    options = dict(case.options)
    start = options.pop("key_offset", None)
    if start is not None:
        options["seed"] = noise.key(seed, start)
    return Inputs((case.shape,), {"seed": seed, "dtype": dtype, "device": device, **options})


def eager_normal(shape: tuple[int, ...], *, dtype: torch.dtype, device: str, **_: Any) -> Tensor:
    """torch.randn, whose numbers are others: from one serial generator, not from a seed."""
    return torch.randn(shape, dtype=dtype, device=device)


def eager_uniform(shape: tuple[int, ...], *, dtype: torch.dtype, device: str, **_: Any) -> Tensor:
    """torch.rand, whose numbers are others: from one serial generator, not from a seed."""
    return torch.rand(shape, dtype=dtype, device=device)


def _bytes(case: Case, dtype: torch.dtype, backward: bool) -> int:
    return math.prod(case.shape) * dtype.itemsize


CASES = (
    Case("no_rows", "empty", (0, 5)),
    Case("no_columns", "empty", (3, 0)),
    Case("one", "one", (1, 1)),
    Case("scalar_is_one_row", "one", ()),
    Case("odd", "odd", (5, 37)),
    Case("three_dims", "odd", (2, 3, 7)),
    Case("block-1", "block-1", (3, GRAIN - 1)),
    Case("block", "block", (2, GRAIN)),
    Case("block+1", "block+1", (3, GRAIN + 1)),
    Case("large", "large", (2, 20011)),
    Case("many_rows", "large", (1031, 6)),
    Case("row_number_passes_2^32", "boundary", (4, 9), {"offset": 2**32 - 2}),
    Case("seed_-2^63", "boundary", (3, 9), {"seed": -(2**63)}),
    Case("one_dimension_is_one_row", "non_contiguous", (111,)),
    Case("image_shape_is_rows_of_its_logical_order", "channels_last", (2, 3, 5, 7)),
    Case("float64_holds_the_float32_bits", "mixed", (4, 33), {"dtype": torch.float64}),
    Case("stream", "keyword", (5, 37), {"stream": 3}),
    Case("last_stream", "keyword", (5, 37), {"stream": 2**32 - 2}),
    Case("offset", "keyword", (5, 37), {"offset": 7}),
    Case("seed_is_a_key", "keyword", (5, 37), {"key_offset": 7}),
    Case("dtype_float32", "keyword", (5, 37), {"dtype": torch.float32}),
    Case("dtype_bfloat16", "keyword", (5, 37), {"dtype": torch.bfloat16}),
    Case("dtype_float16", "keyword", (5, 37), {"dtype": torch.float16}),
    Case("device_cpu", "keyword", (5, 37), {"device": "cpu"}),
)
_BIG = Case("4096x1024", "large", (4096, 1024))
_FLOOR = (0.0, "the bits are fixed: they equal the reference's")

OPS = (
    Op(
        name="normal",
        family="noise",
        summary="standard normal noise, a pure function of (seed, row, position)",
        function=noise.normal,
        eager=eager_normal,
        inputs=inputs,
        cases=CASES,
        benchmarks=(
            Benchmark("4096x1024", _BIG, headline=True),
            Benchmark("4096x1024 bf16", _BIG, dtype=torch.bfloat16),
        ),
        bytes=_bytes,
        flops=lambda case: 38 * math.prod(case.shape),
        source="Salmon et al. 2011; Box and Muller 1958",
        floor=_FLOOR,
        differentiable=False,
        instructions={"float32": 40},
    ),
    Op(
        name="uniform",
        family="noise",
        summary="uniform noise in (0, 1], a pure function of (seed, row, position)",
        function=noise.uniform,
        eager=eager_uniform,
        inputs=inputs,
        cases=CASES,
        benchmarks=(Benchmark("4096x1024", _BIG),),
        bytes=_bytes,
        flops=lambda case: 2 * math.prod(case.shape),
        source="Salmon et al. 2011",
        floor=_FLOOR,
        differentiable=False,
        instructions={"float32": 20, "bfloat16": 20},
    ),
)
