"""Measures all rows in one allocation regime: runs in a process of its own, since mallopt stays."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

import gmkernels
from benchmarks import loops, model_steps, probes, timing
from benchmarks.loops import Loop
from benchmarks.model_steps import BESIDE_COMPILED, ModelStep
from benchmarks.record import Record
from benchmarks.sides import COMPILED, EAGER, OURS, OURS_COMPILED, Side, Sides, build, fault, small
from gmkernels import dispatch, registry
from gmkernels.spec import Benchmark, Op

_MUCH_ARITHMETIC = 16  # operations a byte from which the share of the matmul rate is told


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one process measures.

    Attributes:
        models: what is measured first; rows: (op, benchmark) names; loops: what follows them.
        beside: True for the second regime, which times eager and ours, and torch.compile unless
            quick.
        quick: fewer samples, memory of eager and ours alone, ours in torch.compile left out.
        deadline: time.time() after which no further row is begun.
        sides: the only ones that are measured beside ours, without memory and small calls; None is
            all of them.
    """

    rows: tuple[tuple[str, str], ...]
    loops: tuple[Loop, ...]
    models: tuple[ModelStep, ...]
    device: str
    regime: str
    isa: str | None
    beside: bool
    quick: bool
    deadline: float
    sides: tuple[str, ...] | None = None

    def has(self, side: str) -> bool:
        """Whether a side is measured."""
        return self.sides is None or side == OURS or side in self.sides

    @property
    def rounds(self) -> int:
        return 3 if self.quick else 9

    @property
    def seconds(self) -> float:
        return 0.1 if self.quick else 0.25


# ("start" | "left out", title), ("record", Record), ("note" | "failed", text), ("end", None)
Send = Callable[[str, Any], None]


def run(plan: Plan, connection: Any) -> None:
    """Sends messages as it goes: a str that names the kind, and what it is about."""

    def send(kind: str, what: Any) -> None:
        connection.send((kind, what))

    if plan.regime == "reuse" and not gmkernels.reuse_memory():
        send("note", "reuse_memory() has no effect here: this is the default regime")
    forced = dispatch.use_isa(plan.isa) if plan.isa else contextlib.nullcontext()
    with forced:
        for step in plan.models:
            measure(plan, f"{step.name} {step.kind}", model(plan, step), send)
        for op_name, benchmark_name in plan.rows:
            op = registry.row(op_name)
            benchmark = next(b for b in op.benchmarks if b.name == benchmark_name)
            measure(plan, f"{op_name}, {benchmark_name}", row(plan, op, benchmark), send)
        for one in plan.loops:
            measure(plan, f"{one.name}, {one.case.name}", loop(plan, one), send)
    send("end", None)


def measure(plan: Plan, title: str, records: Iterator[Record], send: Send) -> None:
    """Runs one row (a generator, so nothing has begun) and sends its records."""
    if time.time() > plan.deadline:
        send("left out", title)
        return
    send("start", title)
    torch.compiler.reset()
    try:
        for record in records:
            send("record", record)
    except Exception as error:
        send("failed", f"{title}: {explained(error)}")


def row(plan: Plan, op: Op, benchmark: Benchmark) -> Iterator[Record]:
    """The records of one row."""
    sides = Sides(op, plan.quick, plan.sides)
    blank = functools.partial(
        Record,
        isa=_isa(plan),
        regime=plan.regime,
        op=op.name,
        case=benchmark.case.name,
        dtype=str(benchmark.dtype).removeprefix("torch."),
        direction="forward+backward" if benchmark.backward else "forward",
    )
    if not plan.beside and (wrong := guarded(lambda: fault(op, benchmark, plan.device, sides))):
        yield blank(side=OURS, correct=f"WRONG: {wrong}")
        return
    beside = (EAGER, OURS) if plan.quick else (EAGER, COMPILED, OURS)
    names = tuple(n for n in beside if plan.has(n)) if plan.beside else sides.names
    make = {n: functools.partial(build, op, benchmark, plan.device, n, sides) for n in names}
    backward = benchmark.backward
    traffic = op.bytes(benchmark.case, benchmark.dtype, backward)
    flops = op.flops(benchmark.case)
    if op.gradient_flops is not None:
        flops += op.gradient_flops(benchmark.case) if backward else 0
    elif backward or flops < _MUCH_ARITHMETIC * traffic:
        flops = 0
    for record in compare(plan, make, blank, traffic, flops, benchmark.dtype, op.reads):
        if record.p50_ms is None or plan.beside or plan.sides is not None:
            yield record
            continue
        extra: dict[str, Any] = {}
        if "compile" not in record.side:  # compiled anew for other shapes
            side = build(op, small(op, benchmark), plan.device, record.side, sides)
            extra["host_us"] = timing.host_seconds(side.timed(), plan.device) * 1e6
        if record.side in (EAGER, OURS) or not plan.quick:
            fresh = functools.partial(_side, op.name, benchmark.name, plan.device, record.side)
            peak = probes.peak_memory(fresh, plan.device, plan.regime == "reuse")
            extra["peak_memory_mb"] = None if peak is None else peak / 2**20
        yield dataclasses.replace(record, **extra)


def _side(op_name: str, benchmark_name: str, device: str, name: str) -> Side:
    op = registry.row(op_name)
    return build(op, next(b for b in op.benchmarks if b.name == benchmark_name), device, name)


def loop(plan: Plan, one: Loop) -> Iterator[Record]:
    """The records of one sampling loop. A wrong side has no number; where ours is, none has."""
    blank = functools.partial(
        Record,
        isa=_isa(plan),
        regime=plan.regime,
        op=one.name,
        case=one.case.name,
        dtype="float32",
        direction="loop",
    )
    make: dict[str, Callable[[], Side]] = {}
    true = torch.empty(0) if plan.beside else loops.truth(one, plan.device)
    for name in filter(plan.has, (EAGER, OURS) if plan.beside else loops.names(one, plan.quick)):
        side = functools.cache(functools.partial(loops.build, one, plan.device, name))
        check = functools.partial(loops.fault, one, true, side)
        if not plan.beside and (wrong := guarded(check)):
            yield blank(side=name, correct=f"WRONG: {wrong}")
            if name in (OURS, OURS_COMPILED):
                return
            continue
        make[name] = side
    small = dataclasses.replace(one, shape=loops.SMALL)
    for record in compare(plan, make, blank, one.bytes, 0, torch.float32):
        if record.p50_ms is None or plan.beside or record.side in (COMPILED, OURS_COMPILED):
            yield record
            continue
        seconds = timing.host_seconds(
            loops.build(small, plan.device, record.side).timed(), plan.device
        )
        fresh = functools.partial(loops.build, one, plan.device, record.side)
        peak = probes.peak_memory(fresh, plan.device, plan.regime == "reuse")
        yield dataclasses.replace(
            record,
            host_us=seconds / loops.STEPS * 1e6,
            peak_memory_mb=None if peak is None else peak / 2**20,
        )


def model(plan: Plan, step: ModelStep) -> Iterator[Record]:
    """The records of one model's training step or sample."""
    blank = functools.partial(
        Record,
        isa=_isa(plan),
        regime=plan.regime,
        op=f"{step.name} {step.kind}",
        case=step.case,
        dtype="float32",
        direction="step",
    )
    if wrong := guarded(lambda: model_steps.fault(step, plan.device)):
        yield blank(side=OURS, correct=f"WRONG: {wrong}")
        return
    make = model_steps.sides_of(step, plan.device)
    if plan.beside:
        make = {name: make[name] for name in (EAGER, OURS)}
    elif plan.quick:
        make = {name: side for name, side in make.items() if not name.endswith(BESIDE_COMPILED)}
    make = {name: side for name, side in make.items() if plan.has(name)}
    yield from compare(plan, make, blank, 0, 0, torch.float32)


def guarded(check: Callable[[], str]) -> str:
    """What a check finds wrong; an exception of it is a fault too."""
    try:
        return check()
    except Exception as error:
        return explained(error)


def explained(error: Exception) -> str:
    """An exception in one short line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def compare(
    plan: Plan,
    make: Mapping[str, Callable[[], Side]],
    blank: Callable[..., Record],
    traffic: int,
    flops: int,
    dtype: torch.dtype,
    reads: bool = False,
) -> Iterator[Record]:
    """Times the sides in turn with each other and with the probes, of reading if the row reads."""
    calls: dict[str, Callable[[], Any]] = {}
    failed: dict[str, str] = {}
    for name, build_side in make.items():
        try:
            calls[name] = build_side().timed()
        except Exception as error:
            failed[name] = f"failed: {explained(error)}"
    copy, copied = probes.copy_probe(plan.device)
    everything = {**calls, "copy": copy}
    if reads:
        everything["read"], read = probes.read_probe(plan.device, traffic)
    if flops:
        everything["matmul"], multiplied = probes.matmul_probe(dtype, plan.device)
    times = timing.in_turn(everything, plan.device, rounds=plan.rounds, seconds=plan.seconds)
    fault_cost = 0.0
    if plan.device == "cpu" and plan.regime == "default":
        fault_cost = probes.seconds_a_fault()
    for name in make:
        if name in failed:
            yield blank(side=name, correct=failed[name])
            continue
        t = times[name]
        numbers: dict[str, float] = {}
        if OURS in times:
            numbers["ratio_vs_ours"] = t.p50 / times[OURS].p50
        if traffic:
            numbers["gb_per_s"] = traffic / t.p50 / 1e9
            numbers["share_of_copy"] = traffic / t.p50 / (copied / times["copy"].p50)
        if reads:
            numbers["share_of_read"] = traffic / t.p50 / (read / times["read"].p50)
        if flops:
            numbers["gflop_per_s"] = flops / t.p50 / 1e9
            numbers["share_of_matmul"] = flops / t.p50 / (multiplied / times["matmul"].p50)
        if fault_cost:
            numbers["share_of_faults"] = probes.page_faults(calls[name]) * fault_cost / t.p50
        milliseconds = {f"{k}_ms": v * 1e3 for k, v in vars(t).items()}
        yield blank(side=name, **milliseconds, **numbers)


def _isa(plan: Plan) -> str:
    return dispatch.extension.isa() if plan.device == "cpu" and dispatch.extension else ""
