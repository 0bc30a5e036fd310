"""One row an op: what the tests check, what the benchmarks time, what the README's table says."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gmkernels.noise import normal

# Every row has a case of each kind; test_layout.py rejects one that has not.
KINDS = (
    "empty",  # no rows
    "one",  # one element
    "odd",  # sizes that divide nothing
    "block-1",  # one short of a whole block of every backend
    "block",
    "block+1",
    "large",  # several blocks and chunks
    "boundary",  # the formula's boundary values
    "non_contiguous",  # halves of one tensor, transposes
    "channels_last",
    "mixed",  # dtypes that differ within the call
    "keyword",  # one case for each value of each keyword
)
GRAIN = 1024  # elements a row that are a whole number of blocks on every backend


@dataclass(frozen=True)
class Case:
    """One input of a row: `options` are read by the row's `inputs` and by nothing else."""

    name: str
    kind: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"case {self.name}: kind must be one of {KINDS}, got {self.kind!r}")


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call. Floating tensors among them are what gradients are taken to.

    Positional arguments in `fixed` are constants even where they are floating tensors; to those in
    `data` training takes no gradient, so the benchmarks take none either.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    fixed: tuple[int, ...] = ()
    data: tuple[int, ...] = ()

    def tensors(self) -> list[Tensor]:
        """Every floating tensor that is no constant, positional first; those of tuples, too."""
        args = [x for i, x in enumerate(self.args) if i not in self.fixed]
        found: list[Any] = []
        for x in (*args, *self.kwargs.values()):
            found.extend(x if isinstance(x, tuple) else (x,))
        return [x for x in found if isinstance(x, Tensor) and x.is_floating_point()]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """The same call with every floating tensor changed that is no constant."""

        def one(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(one(part) for part in x)
            return change(x) if isinstance(x, Tensor) and x.is_floating_point() else x

        args = tuple(x if i in self.fixed else one(x) for i, x in enumerate(self.args))
        kwargs = {k: one(v) for k, v in self.kwargs.items()}
        return dataclasses.replace(self, args=args, kwargs=kwargs)

    def with_keywords(self, **kwargs: Any) -> "Inputs":
        """The same call with these keywords added."""
        return dataclasses.replace(self, kwargs={**self.kwargs, **kwargs})


@dataclass(frozen=True)
class Benchmark:
    """One timed call. `headline` rows are in `make bench`; the others in `make bench-all`."""

    name: str
    case: Case
    dtype: torch.dtype = torch.float32
    backward: bool = False
    headline: bool = False
    eager_eps: bool = False  # a twin of a noisy row: both sides are given the noise


@dataclass(frozen=True)
class Op:
    """One op: its public function and everything that is known of it.

    Attributes:
        function: the public function; `backend="reference"` in float64 is the truth.
        eager: what a user writes without this library: same arguments, plus `eps=` where `noisy`.
        inputs: (case, dtype, device, seed) -> Inputs; the same seed gives the same values.
        bytes: minimal traffic of one call, (case, dtype, backward) -> bytes; every input and output
            once.
        flops: arithmetic of one forward, (case) -> operations, for the share of the matmul rate.
        gradient_flops: of one backward, given where both are matrix products: then the share is
            told in every row, else in forwards with much arithmetic a byte.
        floor: what the error may exceed twice eager's by, in ulp of the output's scale, and why.
        draws: how many inputs eager's error is the worst of, and why more than one: where single
            errors are magnified by chance, the largest of a small case says little.
        differentiable: whether gradients and second derivatives are tested.
        mixes_rows: why a row of the outputs depends on other rows of the inputs, where it does.
        noisy: whether the call takes `seed=` and `eps=`.
        noise: what eps= equals a seed, (inputs, seed) -> eps; normal noise of the first argument's
            shape unless given.
        reads: whether a call hardly writes: the benchmarks hold it against reading alone, too.
        operator: name of the registered operators, where several ops share one; else the op's.
        instructions: ceiling of instructions an element on sm_90 by dtype name, forward kernel.
        peers: implementations of other libraries for the benchmark, by name: same call as eager.
    """

    name: str
    family: str
    summary: str
    function: Callable[..., Any]
    eager: Callable[..., Any]
    inputs: Callable[[Case, torch.dtype, str, int], Inputs]
    cases: tuple[Case, ...]
    benchmarks: tuple[Benchmark, ...]
    bytes: Callable[[Case, torch.dtype, bool], int]
    flops: Callable[[Case], int]
    source: str
    floor: tuple[float, str] = (2.0, "one rounding of the result and one of an intermediate")
    draws: tuple[int, str] = (1, "errors are alike for all inputs of a case")
    gradient_flops: Callable[[Case], int] | None = None
    differentiable: bool = True
    mixes_rows: str = ""
    noisy: bool = False
    noise: Callable[[Inputs, int], Tensor] | None = None
    reads: bool = False
    operator: str = ""
    instructions: dict[str, int] = field(default_factory=dict)
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "operator", self.operator or self.name)

    def with_noise(self, given: Inputs, seed: int, eager: bool) -> Inputs:
        """The call with its noise: a seed for us, the same numbers as eps= for eager."""
        if not self.noisy or "eps" in given.kwargs:
            return given
        if not eager:
            return given.with_keywords(seed=seed)
        first = given.args[0]
        if self.noise is not None:
            eps = self.noise(given, seed)
        else:
            eps = normal(tuple(first.shape), seed=seed, device=first.device, backend="reference")
        return given.with_keywords(eps=eps.to(first.dtype))

    def case(self, name: str) -> Case:
        """The case of that name."""
        return next(c for c in self.cases if c.name == name)


def row_cases(features: int = 3) -> tuple[Case, ...]:
    """The shape cases that every op on rows [B, *] shares."""
    return (
        Case("no_rows", "empty", (0, 5)),
        Case("no_columns", "empty", (3, 0)),
        Case("one", "one", (1, 1)),
        Case("odd", "odd", (5, 37)),
        Case("three_dims", "odd", (2, features, 7)),
        Case("block-1", "block-1", (3, GRAIN - 1)),
        Case("block", "block", (2, GRAIN)),
        Case("block+1", "block+1", (3, GRAIN + 1)),
        Case("large", "large", (2, 20011)),
        Case("many_rows", "large", (1031, 6)),
    )


def filled(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int, scale: float = 1.0
) -> Tensor:
    """Seeded normal values, the same on every device, rounded to dtype."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)


def other_dtype(dtype: torch.dtype) -> torch.dtype:
    """A dtype to mix with this one, as autocast does."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16


def itemsize(dtype: torch.dtype) -> int:
    """Bytes an element."""
    return dtype.itemsize
