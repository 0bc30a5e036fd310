"""Rows of the likelihood family."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gmkernels.ops import likelihood
from gmkernels.ops.gaussian.spec import in_layout
from gmkernels.spec import Benchmark, Case, Inputs, Op, filled, itemsize, other_dtype, row_cases

_LOGITS = (0.0, -0.0, 1e-4, -1e-4, 0.88, -0.89, 5.0, -5.0, 30.0, -30.0, 200.0, -200.0)
_LOGVARS = (0.0, -0.0, 1e-4, -1e-4, 0.34, -0.35, 1.0, -1.0, 5.0, -5.0, 8.0, -8.0)
_LEVELS = 17


def _boundary(values: tuple[float, ...], case: Case, device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device).expand(case.shape)


def gaussian_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """x, mean, and logvar unless the options leave it out."""
    o = case.options
    second = other_dtype(dtype) if o.get("mixed") else dtype
    x, mean, l = (filled(case.shape, torch.float64, device, seed + i) for i in range(3))
    if o.get("values") == "boundary":
        l = _boundary(_LOGVARS, case, device)
    kind = o.get("logvar", "full")
    args: list[Any] = [
        in_layout(x.to(dtype), o.get("layout")),
        in_layout(mean.to(second), o.get("layout")),
    ]
    if o.get("layout") == "chunk":
        args = list(torch.cat(args, 1).chunk(2, 1))
    if kind == "full":
        args.append(in_layout(l.to(second), o.get("layout")))
    elif kind == "scalar":
        args.append(torch.tensor(0.3, dtype=dtype, device=device))
    return Inputs(tuple(args))


def bernoulli_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """x in [0, 1], a third of it exactly 0 or 1, and logits."""
    o = case.options
    second = other_dtype(dtype) if o.get("mixed") else dtype
    x = filled(case.shape, torch.float64, device, seed).mul(0.7).add(0.5).clamp(0, 1)
    s = filled(case.shape, torch.float64, device, seed + 1, scale=3.0)
    if o.get("values") == "boundary":
        s = _boundary(_LOGITS, case, device)
        x = torch.tensor([0.0, 1.0, 0.5, 0.25, 1.0], device=device, dtype=torch.float64)
        x = x[:, None].expand(case.shape)
    args = [in_layout(x.to(dtype), o.get("layout")), in_layout(s.to(second), o.get("layout"))]
    if o.get("layout") == "chunk":
        args = list(torch.cat(args, 1).chunk(2, 1))
    return Inputs(tuple(args))


def categorical_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """levels and logits [*, L]."""
    o = case.options
    size = o.get("size", _LEVELS)
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, size, case.shape, generator=generator).to(device)
    s = filled((*case.shape, size), torch.float64, device, seed, scale=2.0)
    if o.get("values") == "boundary":
        s = s * torch.tensor([0.0, 1.0, 30.0, 0.0, 50.0], device=device)[:, None, None]
    s = s.to(dtype)
    if o.get("layout") == "transposed":
        s = s.transpose(1, 2).contiguous().transpose(1, 2)
    return Inputs((levels.to(o.get("levels", torch.int64)), s))


def eager_gaussian_nll(x: Tensor, mean: Tensor, logvar: Tensor | None = None) -> Tensor:
    """As in most VAE training code."""
    if logvar is None:
        return 0.5 * ((x - mean).square() + math.log(2 * math.pi)).flatten(1).sum(1)
    terms = (x - mean).square() * torch.exp(-logvar) + logvar + math.log(2 * math.pi)
    return 0.5 * terms.flatten(1).sum(1)


def eager_bernoulli_nll(x: Tensor, logits: Tensor) -> Tensor:
    """As in most VAE training code."""
    x = x.to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)


def eager_categorical_nll(levels: Tensor, logits: Tensor) -> Tensor:
    """As in most VAE training code."""
    flat = F.cross_entropy(logits.flatten(0, -2), levels.flatten().long(), reduction="none")
    return flat.view(levels.shape).flatten(1).sum(1)


def _elements(case: Case) -> int:
    return math.prod(case.shape)


def _size(case: Case) -> int:
    return case.options.get("size", _LEVELS)


def _gaussian_bytes(case: Case, dtype: torch.dtype, backward: bool) -> int:
    tensors = 3 if case.options.get("logvar", "full") == "full" else 2
    return tensors * (3 if backward else 1) * _elements(case) * itemsize(dtype) + 4 * case.shape[0]


def _bernoulli_bytes(case: Case, dtype: torch.dtype, backward: bool) -> int:
    return 2 * (3 if backward else 1) * _elements(case) * itemsize(dtype) + 4 * case.shape[0]


def _categorical_bytes(case: Case, dtype: torch.dtype, backward: bool) -> int:
    passes = 3 if backward else 1
    return _elements(case) * (passes * _size(case) * itemsize(dtype) + 8) + 4 * case.shape[0]


_SHARED = (
    *row_cases(),
    Case("boundary_values", "boundary", (5, 12), {"values": "boundary"}),
    Case("chunk", "non_contiguous", (6, 50), {"layout": "chunk"}),
    Case("transposed", "non_contiguous", (3, 5, 8), {"layout": "transposed"}),
    Case("image_channels_last", "channels_last", (2, 3, 5, 7), {"layout": "channels_last"}),
    Case("mixed_dtypes", "mixed", (4, 33), {"mixed": True}),
)
_BIG = Case("4096x1024", "large", (4096, 1024))
_UNIT = Case("4096x1024, unit variance", "large", (4096, 1024), {"logvar": "none"})
_DIGITS = Case("1024x64x17", "large", (1024, 64))
_PIXELS = Case("64x784x256", "large", (64, 784), {"size": 256})

OPS = (
    Op(
        name="gaussian_nll",
        family="likelihood",
        summary="negative log-density under a diagonal Gaussian, one per row",
        function=likelihood.gaussian_nll,
        eager=eager_gaussian_nll,
        inputs=gaussian_inputs,
        cases=(
            *_SHARED,
            Case("unit_variance", "keyword", (5, 37), {"logvar": "none"}),
            Case("one_variance", "keyword", (5, 37), {"logvar": "scalar"}),
        ),
        benchmarks=(
            Benchmark("forward", _BIG, headline=True),
            Benchmark("forward+backward", _BIG, backward=True),
            Benchmark("forward, unit variance", _UNIT),
        ),
        bytes=_gaussian_bytes,
        flops=lambda case: 20 * _elements(case),
        source="Kingma and Welling 2014, appendix C.2",
    ),
    Op(
        name="bernoulli_nll",
        family="likelihood",
        summary="negative log-probability under Bernoulli(sigmoid(logits)), one per row",
        function=likelihood.bernoulli_nll,
        eager=eager_bernoulli_nll,
        inputs=bernoulli_inputs,
        cases=(*_SHARED, Case("default", "keyword", (5, 37))),
        benchmarks=(
            Benchmark("forward", _BIG, headline=True),
            Benchmark("forward+backward", _BIG, backward=True),
        ),
        bytes=_bernoulli_bytes,
        flops=lambda case: 45 * _elements(case),
        source="Kingma and Welling 2014, appendix C.1",
    ),
    Op(
        name="categorical_nll",
        family="likelihood",
        summary="negative log-probability of integer levels under softmax(logits), one per row",
        function=likelihood.categorical_nll,
        eager=eager_categorical_nll,
        inputs=categorical_inputs,
        cases=(
            Case("no_rows", "empty", (0, 5)),
            Case("no_columns", "empty", (3, 0)),
            Case("one", "one", (1, 1), {"size": 1}),
            Case("odd", "odd", (5, 7), {"size": 13}),
            Case("block-1", "block-1", (2, 3), {"size": 511}),
            Case("block", "block", (2, 3), {"size": 512}),
            Case("block+1", "block+1", (2, 3), {"size": 513}),
            Case("large", "large", (2, 9001), {"size": 5}),
            Case("many_levels", "large", (2, 2), {"size": 2100}),
            Case("boundary_values", "boundary", (5, 12), {"values": "boundary"}),
            Case("transposed", "non_contiguous", (3, 5), {"layout": "transposed"}),
            Case("image_levels", "channels_last", (2, 3, 5, 7)),
            Case("mixed_levels", "mixed", (4, 33), {"levels": torch.uint8}),
            Case("int32_levels", "keyword", (4, 33), {"levels": torch.int32}),
        ),
        benchmarks=(
            Benchmark("forward, digits", _DIGITS),
            Benchmark("forward+backward, digits", _DIGITS, backward=True),
            Benchmark("forward+backward, 256 levels", _PIXELS, backward=True),
        ),
        bytes=_categorical_bytes,
        flops=lambda case: 22 * _elements(case) * _size(case),
        source="Salimans et al. 2017, section 2.1",
    ),
)
