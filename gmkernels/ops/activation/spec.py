"""Rows of the activation family."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gmkernels.ops import activation
from gmkernels.ops.gaussian.spec import in_layout
from gmkernels.spec import Benchmark, Case, Inputs, Op, filled, itemsize, row_cases

# Tails, the smallest numbers, and where exp(-|u|), x^3 and x^2 leave the range of float32.
_VALUES = (0.0, -0.0, 1e-30, -1e-30, 0.75, -0.75, -5.0, -10.0, 10.0, -1e4, 1e4, 3e13, -3e13, 3e38)


def inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """x."""
    if case.options.get("values") == "boundary":
        x = torch.tensor(_VALUES, dtype=torch.float64, device=device).expand(case.shape)
        largest = torch.finfo(dtype).max
        return Inputs((x.clamp(-largest, largest).to(dtype),))
    x = filled(case.shape, torch.float64, device, seed, 2.0).to(dtype)
    return Inputs((in_layout(x, case.options.get("layout")),))


def eager_gelu(x: Tensor) -> Tensor:
    """PyTorch's own."""
    return F.gelu(x, approximate="tanh")


def _bytes(case: Case, dtype: torch.dtype, backward: bool) -> int:
    return (5 if backward else 2) * math.prod(case.shape) * itemsize(dtype)


_HIDDEN = Case("12x64x512", "large", (12, 64, 512))
_WIDE = Case("4096x3072", "large", (4096, 3072))

OPS = (
    Op(
        name="gelu",
        family="activation",
        summary="x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), GPT-2's activation",
        function=activation.gelu,
        eager=eager_gelu,
        inputs=inputs,
        cases=(
            *row_cases(),
            Case("vector", "odd", (37,)),
            Case("boundary_values", "boundary", (3, len(_VALUES)), {"values": "boundary"}),
            Case("transposed", "non_contiguous", (3, 5, 7), {"layout": "transposed"}),
            Case("image_channels_last", "channels_last", (2, 3, 5, 7), {"layout": "channels_last"}),
            Case("one_tensor_alone", "mixed", (4, 33)),
            Case("default", "keyword", (5, 37)),
        ),
        benchmarks=(
            Benchmark("forward+backward", _HIDDEN, backward=True, headline=True),
            Benchmark("forward", _HIDDEN),
            Benchmark("forward bf16", _HIDDEN, dtype=torch.bfloat16),
            Benchmark("forward 4096x3072", _WIDE),
            Benchmark("forward+backward 4096x3072", _WIDE, backward=True),
        ),
        bytes=_bytes,
        flops=lambda case: 25 * math.prod(case.shape),
        source="Hendrycks and Gimpel 2016, section 2",
    ),
)
