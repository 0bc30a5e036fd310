"""The sides of a comparison: one row's call as eager PyTorch, compiled, and ours; and the check.

A side is a call without arguments that does all of the work that is timed: the forward, or the
forward and torch.autograd.grad of its outputs under fixed random cotangents.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gmkernels.spec import Benchmark, Case, Inputs, Op

SEED = 7
EAGER, COMPILED, OURS, OURS_COMPILED = "eager", "torch.compile", "ours", "ours, compiled"


@dataclass(frozen=True)
class Side:
    """One side: `call` runs it; `scope` is entered around every call (to choose a backend)."""

    name: str
    call: Callable[[], Any]
    scope: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def __call__(self) -> Any:
        with self.scope():
            return self.call()

    def timed(self) -> Callable[[], Any]:
        """What is timed: without the scope's microsecond where there is none."""
        return self.call if self.scope is contextlib.nullcontext else self


def as_tuple(x: Any) -> tuple[Tensor, ...]:
    """Outputs of a call, one or several."""
    return (x,) if isinstance(x, Tensor) else tuple(x)


def differentiated(given: Inputs) -> list[Tensor]:
    """The tensors whose gradients training needs: all floating ones but noise and data."""
    without = [given.kwargs.get("eps"), *(given.args[i] for i in given.data)]
    return [x for x in given.tensors() if all(x is not y for y in without)]


def prepare(given: Inputs, backward: bool) -> Inputs:
    """The same call on leaves that require gradients, if the backward is timed."""
    if not backward:
        return given
    leaves = given.map(Tensor.detach)
    for x in differentiated(leaves):
        x.requires_grad_()
    return leaves


def cotangents(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Fixed random weights of the outputs: the same numbers whatever the dtype."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(o.shape, generator=generator).to(torch.bfloat16) for o in outputs]
    return [x.to(o.device, o.dtype) for x, o in zip(drawn, outputs, strict=True)]


def bind(function: Callable[..., Any], given: Inputs, backward: bool) -> Callable[[], Any]:
    """The call of a side. It has run once: compiled functions are compiled."""
    given = prepare(given, backward)
    outputs = as_tuple(function(*given.args, **given.kwargs))
    if not backward:
        return lambda: function(*given.args, **given.kwargs)
    leaves, weights = differentiated(given), cotangents(outputs)

    def call() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        made = as_tuple(function(*given.args, **given.kwargs))
        return made, torch.autograd.grad(made, leaves, weights)

    call()
    return call


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for exactly these shapes."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def with_seed(op: Op, given: Inputs) -> Inputs:
    """Our call of a noisy row: with an explicit seed, unless the noise is given."""
    return op.with_noise(given, SEED, eager=False)


class Sides(dict[str, Callable[..., Any]]):
    """What each side of a row calls, by name; torch.compile starts when its side is asked for.

    quick: without ours inside torch.compile. only: the sides beside ours; None is all.
    """

    def __init__(self, op: Op, quick: bool = False, only: tuple[str, ...] | None = None) -> None:
        super().__init__({EAGER: op.eager, OURS: op.function, **op.peers})
        self.sources = {COMPILED: op.eager, OURS_COMPILED: op.function}
        names = (EAGER, COMPILED, OURS, OURS_COMPILED, *op.peers)
        wanted = names if only is None else (OURS, *only)
        self.names = tuple(n for n in names if n in wanted and not (quick and n == OURS_COMPILED))

    def __missing__(self, name: str) -> Callable[..., Any]:
        self[name] = compiled(self.sources[name])
        return self[name]


def build(op: Op, benchmark: Benchmark, device: str, name: str, sides: Sides | None = None) -> Side:
    """One side of a row, ready to be timed."""
    given = op.inputs(benchmark.case, benchmark.dtype, device, SEED)
    if name in (OURS, OURS_COMPILED):
        given = with_seed(op, given)
    return Side(name, bind((sides or Sides(op))[name], given, benchmark.backward))


def small(op: Op, benchmark: Benchmark) -> Benchmark:
    """The same call on 8 x 32 elements, where what is timed is the host's work."""
    shape = benchmark.case.shape
    shape = (8, 32) if len(shape) == 2 else tuple(min(n, 8) for n in shape)
    case = Case("small", benchmark.case.kind, shape, benchmark.case.options)
    return Benchmark("small", case, benchmark.dtype, benchmark.backward)


def worst(x: Tensor, truth: Tensor) -> float:
    """Largest absolute error; infinities and NaN must stand where the truth has them."""
    x = x.detach().double()
    same = (x == truth) | (x.isnan() & truth.isnan())
    gap = torch.where(same, 0.0, (x - truth).abs())
    return gap.nan_to_num(nan=float("inf")).max().item() if gap.numel() else 0.0


def results(
    function: Callable[..., Any], given: Inputs, backward: bool, **options: Any
) -> tuple[Tensor, ...]:
    """Outputs, and gradients if they are timed."""
    given = prepare(given, backward)
    outputs = as_tuple(function(*given.args, **given.kwargs, **options))
    if not backward:
        return outputs
    gradients = torch.autograd.grad(outputs, differentiated(given), cotangents(outputs))
    return outputs + tuple(gradients)


def truth(op: Op, benchmark: Benchmark, device: str, given: Inputs) -> tuple[Tensor, ...]:
    """The reference in float64 with the same seed; of a row that reads no tensor, its rounding."""
    if given.tensors():
        wide = with_seed(op, given).map(Tensor.double)
        return results(op.function, wide, benchmark.backward, backend="reference")
    wide = op.inputs(benchmark.case, torch.float64, device, SEED)
    drawn = results(op.function, wide, False, backend="reference")
    return tuple(x.to(benchmark.dtype).double() for x in drawn)


def errors_of_eager(
    op: Op, benchmark: Benchmark, given: Inputs, truths: tuple[Tensor, ...]
) -> list[float]:
    """Largest error of each result of eager PyTorch, given our noise; 0 where it draws its own."""
    if not given.tensors() or not all(t.is_floating_point() for t in truths):
        return [0.0] * len(truths)
    given = op.with_noise(given, SEED, eager=True)
    eager = results(op.eager, given, benchmark.backward)
    return [worst(e, t) for e, t in zip(eager, truths, strict=True)]


def fault(op: Op, benchmark: Benchmark, device: str, sides: Sides) -> str:
    """What is wrong with our values on the timed input, eager or compiled, or "".

    An error may be twice that of eager PyTorch in the same dtype with the same noise, plus the
    row's floor in ulp of the output's scale. Integers must be equal. The truth is the reference in
    float64.
    """
    given = op.inputs(benchmark.case, benchmark.dtype, device, SEED)
    truths = tuple(t.detach() for t in truth(op, benchmark, device, given))
    eager = errors_of_eager(op, benchmark, given, truths)
    for name in (n for n in sides.names if n in (OURS, OURS_COMPILED)):
        ours = results(sides[name], with_seed(op, given), benchmark.backward)
        for i, (got, true, error) in enumerate(zip(ours, truths, eager, strict=True)):
            if got.shape != true.shape:
                return f"{name}: result {i} has shape {tuple(got.shape)}, not {tuple(true.shape)}"
            scale = true.abs().nan_to_num(0, 0, 0).max().item() if true.numel() else 0.0
            eps = torch.finfo(got.dtype).eps if got.is_floating_point() else 0.0
            bound = 2 * error + op.floor[0] * eps * scale
            off = worst(got, true)
            if not off <= bound:
                return f"{name}: result {i} is off by {off:.2e}, {bound:.2e} is allowed"
    return ""
