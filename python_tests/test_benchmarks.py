"""The benchmark tool itself: wrong rows, the file's columns, what is timed."""

import csv
import dataclasses
import functools
import io
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import gmkernels
from benchmarks import __main__ as command
from benchmarks import loops, model_steps, probes, record, report, sides, timing, worker
from benchmarks.record import Record
from gmkernels import registry
from gmkernels.models import vae
from gmkernels.spec import Benchmark, Case, Inputs, Op, filled

ROOT = Path(__file__).resolve().parents[1]
CASE = Case("tiny", "odd", (4, 9))


def row_of(function: Callable[..., Tensor]) -> Op:
    """A row of an op that should square its input."""

    def public(x: Tensor, *, backend: str | None = None) -> Tensor:
        return x.square() if backend == "reference" else function(x)

    return Op(
        name="square",
        family="test",
        summary="x squared",
        function=public,
        eager=torch.square,
        inputs=lambda case, dtype, device, seed: Inputs((filled(case.shape, dtype, device, seed),)),
        cases=(CASE,),
        benchmarks=(Benchmark("forward", CASE, headline=True),),
        bytes=lambda case, dtype, backward: 2 * 36 * dtype.itemsize,
        flops=lambda case: 10**6,
        source="none",
        reads=True,
    )


def plan(**options: Any) -> worker.Plan:
    return worker.Plan(
        **{
            "rows": (),
            "loops": (),
            "models": (),
            "device": "cpu",
            "regime": "default",
            "isa": None,
            "beside": True,
            "quick": True,
            "deadline": float("inf"),
            **options,
        }
    )


def rendered(records: list[Record]) -> str:
    console = Console(width=250, file=io.StringIO(), record=True)
    report.show(console, records, "machine", [])
    return console.export_text()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x.square() + 1e-3,
        lambda x: x.square()[:, :-1],
        lambda x: x.square() * torch.where(x == x.max(), torch.nan, 1.0),
    ],
    ids=["value", "shape", "nan"],
)
def test_a_wrong_row_has_no_number(wrong: Callable[..., Tensor], backward: bool) -> None:
    benchmark = Benchmark("forward", CASE, backward=backward)
    found = list(worker.row(plan(beside=False), row_of(wrong), benchmark))
    assert len(found) == 1
    assert found[0].correct.startswith("WRONG: ours: ")
    numbers = [v for v in dataclasses.astuple(found[0]) if not isinstance(v, str)]
    assert set(numbers) == {None}
    text = rendered(found)
    assert "WRONG" in text
    assert "1 of them WRONG, without a number" in text


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "compiled", lambda function: function)
    benchmark = Benchmark("forward", CASE, backward=True)
    right, halved = row_of(torch.square), row_of(lambda x: x.detach() * x)
    assert sides.fault(right, benchmark, "cpu", sides.Sides(right)) == ""
    assert "result 1 is off" in sides.fault(halved, benchmark, "cpu", sides.Sides(halved))


def test_an_exception_is_a_fault() -> None:
    def broken(x: Tensor) -> Tensor:
        raise ValueError("no such kernel")

    found = list(worker.row(plan(beside=False), row_of(broken), Benchmark("forward", CASE)))
    assert [r.correct for r in found] == ["WRONG: ValueError: no such kernel"]


@pytest.mark.parametrize("name", ["normal", "uniform"])
def test_noise_is_held_against_its_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "compiled", lambda function: function)
    op = registry.row(name)
    for dtype in (torch.float32, torch.bfloat16):
        benchmark = Benchmark("small", Case("small", "odd", (5, 37)), dtype)
        assert sides.fault(op, benchmark, "cpu", sides.Sides(op)) == ""
        shifted = dataclasses.replace(op, function=functools.partial(shifted_by_a_row, op))
        assert "off by" in sides.fault(shifted, benchmark, "cpu", sides.Sides(shifted))


def shifted_by_a_row(op: Op, *args: Any, **kwargs: Any) -> Tensor:
    offset = 0 if kwargs.get("backend") == "reference" else 1
    return op.function(*args, **kwargs, offset=offset)


@pytest.fixture(scope="module")
def measured() -> list[Record]:
    op = row_of(torch.square)
    return list(worker.row(plan(), op, op.benchmarks[0]))


def test_a_right_row_is_timed(measured: list[Record]) -> None:
    assert [r.side for r in measured] == [sides.EAGER, sides.OURS]
    for r in measured:
        assert r.correct == "yes"
        assert 0 < r.p20_ms <= r.p50_ms <= r.p80_ms
        assert r.gb_per_s > 0
        assert min(r.share_of_copy, r.share_of_read) > 0
        assert r.share_of_matmul > 0
    assert measured[1].ratio_vs_ours == 1
    names = sides.Sides(row_of(torch.square)).names
    assert sides.OURS_COMPILED in names
    quick = sides.Sides(row_of(torch.square), quick=True).names
    assert quick == tuple(n for n in names if n != sides.OURS_COMPILED)
    only = sides.Sides(row_of(torch.square), only=(sides.EAGER,)).names
    assert only == (sides.EAGER, sides.OURS)


def test_gradients_of_products_have_a_share() -> None:
    op = dataclasses.replace(row_of(torch.square), gradient_flops=lambda case: 3 * 10**6)
    forward, both = (
        list(worker.row(plan(), op, dataclasses.replace(op.benchmarks[0], backward=b)))[1]
        for b in (False, True)
    )
    assert both.gflop_per_s * both.p50_ms == pytest.approx(4 * forward.gflop_per_s * forward.p50_ms)
    assert both.share_of_matmul > 0
    without = row_of(torch.square)
    alone = dataclasses.replace(without.benchmarks[0], backward=True)
    assert list(worker.row(plan(), without, alone))[1].share_of_matmul is None


def test_csv(measured: list[Record], tmp_path: Path) -> None:
    stamp = probes.stamp("cpu")
    path = tmp_path / "folder" / "machine.csv"
    wrong = Record("v4", "reuse", "op", "case", "float32", "forward", "ours", correct="WRONG: 1")
    for _ in range(2):
        record.write(path, stamp, [*measured, wrong])
    assert [p.name for p in path.parent.iterdir()] == ["machine.csv"]
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == list(record.COLUMNS)
    assert record.COLUMNS[:12] == (
        *("commit", "date", "versions", "machine", "threads", "isa", "regime"),
        *("op", "case", "dtype", "direction", "side"),
    )
    assert len(lines) == 3
    assert float(lines[0]["p50_ms"]) == pytest.approx(measured[0].p50_ms, rel=1e-4)
    assert lines[2]["p50_ms"] == ""
    assert "torch" in lines[0]["versions"]
    assert f"ATen {torch.backends.cpu.get_cpu_capability()}" in lines[0]["versions"]


def test_losses_are_told(measured: list[Record], tmp_path: Path) -> None:
    slower = [dataclasses.replace(measured[0], ratio_vs_ours=0.5), measured[1]]
    beside = [dataclasses.replace(r, regime="reuse", ratio_vs_ours=3.25) for r in slower]
    text = rendered([*slower, *beside])
    assert "0.50x" in text
    assert "3.25x" in text
    assert "slower in 1 of 1 rows" in text
    report.plot(tmp_path / "plot.png", slower, "machine")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_sides_are_timed_in_turn() -> None:
    order: list[str] = []
    calls = {name: functools.partial(order.append, name) for name in ("a", "b")}
    timing.in_turn(calls, "cpu", rounds=3, seconds=1e-4)
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert turns == ["a", "b"] * 3


def make_large_call() -> Callable[[], Tensor]:
    source = torch.ones(2 << 20)

    def call() -> Tensor:
        return (source + 1) * 2

    call()  # as every side has: threads and libraries are there
    return call


@pytest.mark.parametrize("reuse", [False, True])
def test_peak_memory(reuse: bool) -> None:
    peak = probes.peak_memory(make_large_call, "cpu", reuse=reuse)
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("/proc/self/clear_refs cannot be written here")
    assert peak is not None
    # A temporary and a result of 8 MiB, no input; pages of their ends may have been there.
    assert (16 << 20) - (64 << 10) <= peak < 17 << 20


def make_training_call() -> Callable[[], Any]:
    """Forward and backward of reparameterize_kl: z and two gradients of 4 MiB, kl of 4 KiB."""
    mean, logvar, dz = (torch.full((1024, 1024), 0.1) for _ in range(3))
    inputs, dkl = (mean.requires_grad_(), logvar.requires_grad_()), torch.ones(1024)

    def call() -> Any:
        outputs = gmkernels.reparameterize_kl(*inputs, seed=1)
        return outputs, torch.autograd.grad(outputs, inputs, (dz, dkl))

    call()
    return call


def test_training_takes_no_tensor_beyond_its_results() -> None:
    peak = probes.peak_memory(make_training_call, "cpu", reuse=True)
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("/proc/self/clear_refs cannot be written here")
    assert peak is not None
    assert (12 << 20) - (64 << 10) <= peak < (12 << 20) + (512 << 10)


def test_plain_pytorch_stands_in_for_our_ops() -> None:
    ours = vae.reparameterize_kl
    plain = model_steps.PlainPyTorch()
    with plain:
        assert vae.reparameterize_kl is not ours
        z, kl = vae.reparameterize_kl(torch.zeros(2, 3), torch.zeros(2, 3), seed=1)
    assert vae.reparameterize_kl is ours
    assert z.shape == (2, 3)
    assert kl.tolist() == [0, 0]


def test_model_step_is_right() -> None:
    for step in model_steps.MODEL_STEPS:
        assert model_steps.fault(step, "cpu") == ""


SMALL_LOOPS = [dataclasses.replace(one, shape=loops.SMALL) for one in loops.LOOPS[:5]]


def test_loops_stand_at_several_sizes() -> None:
    sizes: dict[tuple[str, float], list[tuple[int, ...]]] = {}
    for one in loops.LOOPS:
        sizes.setdefault((one.sampler, one.options.get("eta", 0.0)), []).append(one.shape)
    assert set(sizes) == {("ddim", 0), ("ddim", 1), ("ddpm", 0), ("euler", 0), ("dpmpp_2m", 0)}
    assert {tuple(shapes) for shapes in sizes.values()} == {loops.SHAPES}
    assert loops.SHAPES[0] == (1, 4, 64, 64)
    assert len({(one.name, one.case.name) for one in loops.LOOPS}) == len(loops.LOOPS)
    quick, every, euler = (
        command.plans(command.parser().parse_args(["--device", "cpu", *said]))[0].loops
        for said in (["--quick"], [], ["--op", "euler_step"])
    )
    assert len(quick) == 1
    assert every == loops.LOOPS
    assert [one.sampler for one in euler] == ["euler"] * len(loops.SHAPES)
    only = command.plans(command.parser().parse_args(["--device", "cpu", "--loops"]))[0]
    assert only == dataclasses.replace(only, rows=(), loops=loops.LOOPS, models=())


@pytest.mark.parametrize("one", SMALL_LOOPS, ids=lambda one: f"{one.sampler} {one.options}")
def test_loops_end_alike(one: loops.Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "compiled", lambda function: function)
    true = loops.truth(one, "cpu")
    assert loops.given(one, "cpu").sampler.noisy == one.noisy
    for name in loops.names(one):
        side = loops.build(one, "cpu", name)
        end = side()
        assert loops.fault(one, true, lambda side=side: side) == ""
        if not one.noisy or name in (sides.OURS, sides.OURS_COMPILED):
            assert torch.equal(side(), end)
            off = sides.Side(name, lambda end=end: end + 1e-4 * end.abs().max())
            assert "off by" in loops.fault(one, true, lambda off=off: off)


@pytest.mark.parametrize("wrong", [sides.EAGER, sides.OURS])
def test_a_wrong_loop_has_no_number(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of 50 goes wrong."""
    right = registry.row("ddim_step")
    part = "eager" if wrong == sides.EAGER else "function"

    def broken(x: Tensor, p: Tensor, i: int, *args: Any, backend: str = "", **kwargs: Any) -> Any:
        options = {"backend": backend} if backend else {}
        other = i == 30 and not backend
        return getattr(right, part)(x, p, i + other, *args, **options, **kwargs)

    monkeypatch.setattr(loops.Loop, "op", dataclasses.replace(right, **{part: broken}))
    monkeypatch.setattr(loops, "names", lambda one, quick: (sides.EAGER, sides.OURS))
    monkeypatch.setattr(probes, "peak_memory", lambda *args: 3 << 20)
    found = {r.side: r for r in worker.loop(plan(beside=False), SMALL_LOOPS[0])}
    assert found[wrong].correct.startswith("WRONG: the end is off by")
    assert found[wrong].p50_ms is None
    if wrong == sides.OURS:
        assert list(found) == [sides.OURS]
        return
    ours = found[sides.OURS]
    assert (ours.correct, ours.direction, ours.peak_memory_mb) == ("yes", "loop", 3)
    assert 5 < ours.p50_ms * 1e3 / ours.host_us < 500  # of one of the 50 steps, however noisy
    assert report.ratios(list(found.values()), sides.OURS) == []  # no kernel's row


def test_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = command.parser().format_help()
    for word in (
        "--op",
        "--model",
        "--side",
        "--loops",
        "--device",
        "--quick",
        "--isa",
        "--regime",
        "--out",
    ):
        assert word in text
    assert "benchmarks/results" in text
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--op", "normal", "--side", "their"])
    with pytest.raises(SystemExit):
        command.main()
    assert "SDPA, compiled" in capsys.readouterr().err
    options = command.parser().parse_args(["--quick", "--device", "cpu"])
    first, second = command.plans(options)
    assert (first.regime, second.regime) == ("reuse", "default")
    assert second.beside
    families = [registry.row(name).family for name, _ in second.rows]
    assert set(families) == {registry.row(name).family for name, _ in first.rows}
    assert len(set(families)) == len(families)
    assert set(second.rows) <= set(first.rows)
    assert first.models
    said = ["--device", "cpu", "--model", "GPT", "--side", "SDPA"]
    gpt = command.plans(command.parser().parse_args(said))[0]
    assert (gpt.rows, gpt.loops) == ((), ())
    assert {step.name for step in gpt.models} == {"GPT"}
    assert [gpt.has(name) for name in ("SDPA", sides.OURS, sides.EAGER)] == [True, True, False]
    every = command.plans(command.parser().parse_args(["--device", "cpu"]))
    assert all(len(every[0].rows) > len(p.rows) for p in (first, every[1]))
    assert every[0].models == model_steps.MODEL_STEPS == every[1].models
    for plan in (first, second, gpt, *every):  # as they go to the worker process
        assert len(pickle.loads(pickle.dumps(plan)).models) == len(plan.models)


def test_a_failing_row_does_not_stop_the_others() -> None:
    def broken() -> Iterator[Record]:
        raise RuntimeError("out of memory")
        yield

    sent: list[tuple[str, Any]] = []
    worker.measure(plan(), "row", broken(), lambda kind, what: sent.append((kind, what)))
    assert sent == [("start", "row"), ("failed", "row: RuntimeError: out of memory")]
    sent.clear()
    worker.measure(plan(deadline=0.0), "row", broken(), lambda *message: sent.append(message))
    assert sent == [("left out", "row")]


def test_quick_sees_every_family_before_the_second_row_of_any():
    options = command.parser().parse_args(["--quick", "--device", "cpu"])
    first, second = command.plans(options)
    families = [registry.row(name).family for name, _ in first.rows]
    count = len(set(families))
    assert len(set(families[:count])) == count
    assert second.rows == first.rows[:count]
    assert "Left out for time: a, b; c." in report.summary([], "machine", ["a, b", "c"])
