"""Times every kernel against PyTorch and torch.compile on this machine: python -m benchmarks.

Each row is checked against its float64 reference first; a wrong row prints WRONG and no number.
Sides are timed in turn, in one process, so that a slow hour slows all alike. On a CPU it is done
twice, each in a process of its own: with gmkernels.reuse_memory() called at the start, for both
sides, and without, for the headline rows.

Results (a CSV and a picture, named after the machine) go to build/bench, which git ignores, unless
--out names another folder. `make bench` is --quick; the committed results are written by
    python -m benchmarks --out benchmarks/results
and those of all sampling loops, in a file of their own, with --loops besides.
"""

import argparse
import collections
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import loops, model_steps, probes, record, report, sides, worker
from gmkernels import dispatch, registry
from gmkernels.spec import Benchmark, Op

QUICK_SECONDS = 250  # no row is begun after these in --quick: it ends within five minutes


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument(
        "--op", action="append", metavar="NAME", help="only this op and its loops; repeatable"
    )
    found.add_argument(
        "--loops", action="store_true", help="only the sampling loops of 50 steps, of every size"
    )
    found.add_argument(
        "--model",
        action="append",
        choices=sorted({step.name for step in model_steps.MODEL_STEPS}),
        help="only this model's steps and samples, beside what --op names; repeatable",
    )
    found.add_argument(
        "--side",
        action="append",
        metavar="NAME",
        help='only this side beside ours ("eager", "torch.compile", a library); repeatable',
    )
    found.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    found.add_argument(
        "--quick", action="store_true", help="headline rows only, in less than five minutes"
    )
    found.add_argument(
        "--brief", action="store_true", help="fewer samples a row, ours in torch.compile left out"
    )
    found.add_argument("--dtype", choices=("float32", "bfloat16"), help="only rows of this dtype")
    found.add_argument(
        "--isa",
        choices=("portable", "v3", "v4", "v4_bf16"),
        help="run our CPU kernels of this instruction set (v3: AVX2, v4: AVX-512); PyTorch keeps "
        "its own, which ATEN_CPU_CAPABILITY=avx2 and MKL_ENABLE_INSTRUCTIONS=AVX2 set",
    )
    found.add_argument(
        "--regime",
        choices=("reuse", "default", "both"),
        default="both",
        help="CPU memory: reused, as after gmkernels.reuse_memory(), or as glibc does by default",
    )
    found.add_argument(
        "--out",
        type=Path,
        help="folder for the CSV and the picture, which bear the names of what is chosen",
    )
    return found


def by_weight(rows: list[tuple[Op, Benchmark]]) -> list[tuple[Op, Benchmark]]:
    """The first row of every family before the second of any, and the light ones first: where the
    time ends early, most of what there is has been seen.
    """
    count: collections.Counter[str] = collections.Counter()
    weights = []
    for op, b in rows:
        forward_flops, moved = op.flops(b.case), op.bytes(b.case, b.dtype, b.backward)
        weights.append((count[op.family], forward_flops * (3 if b.backward else 1) + moved))
        count[op.family] += 1
    return [row for _, row in sorted(zip(weights, rows, strict=True), key=lambda pair: pair[0])]


def plans(options: argparse.Namespace) -> list[worker.Plan]:
    """One plan a regime: the first measures everything, the second stands beside headline rows."""
    everything = not options.op and not options.model
    ops = registry.rows() if everything else [registry.row(name) for name in options.op or ()]
    timed = [] if options.loops else ops
    chosen = [
        (op, b)
        for op in timed
        for b in op.benchmarks
        if (b.headline or not options.quick) and options.dtype in (None, str(b.dtype)[6:])
    ]
    if options.quick:
        chosen = by_weight(chosen)
    every = [(op.name, b.name) for op, b in chosen]
    headline = [(op.name, b.name) for op, b in chosen if b.headline]
    if options.quick:
        headline = headline[: len({op.family for op, _ in chosen})]  # the first of each family
    walked = [one for one in loops.LOOPS if one.op in ops and (one.headline or not options.quick)]
    beside = [] if options.quick else [one for one in walked if one.headline]
    models = [
        step
        for step in model_steps.MODEL_STEPS
        if ((everything and not options.loops) or step.name in (options.model or ()))
        and (step.headline or not options.quick)
    ]
    regimes = ["reuse", "default"] if options.regime == "both" else [options.regime]
    if options.device == "cuda":
        regimes = ["default"]
    deadline = time.time() + QUICK_SECONDS if options.quick else float("inf")
    return [
        worker.Plan(
            rows=tuple(headline if n else every),
            loops=tuple(beside if n else walked),
            models=() if n and options.quick else tuple(models),
            device=options.device,
            regime=regime,
            isa=options.isa,
            beside=n > 0,
            quick=options.quick or options.brief,
            deadline=deadline,
            sides=tuple(options.side) if options.side else None,
        )
        for n, regime in enumerate(regimes)
    ]


def side_names() -> set[str]:
    """Every side that a row or a model's step may have."""
    names = {sides.EAGER, sides.COMPILED, sides.OURS, sides.OURS_COMPILED, model_steps.REFERENCE}
    names.update(peer for op in registry.rows() for peer in op.peers)
    for step in model_steps.MODEL_STEPS:
        names.update(step.peers, step.libraries)
        names.update(name + model_steps.BESIDE_COMPILED for name in step.libraries)
    return names


class Session:
    """Runs plans, each in a process of its own, and collects what they send."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.records: list[record.Record] = []
        self.crashed = False
        self._left_out: list[str] = []
        self._beside = 0

    def run(self, all_plans: list[worker.Plan]) -> None:
        """Measures everything; a line a row as it is done."""
        steps = sum(len(p.rows) + len(p.loops) + len(p.models) for p in all_plans)
        columns = (BarColumn(), TextColumn("{task.completed}/{task.total} {task.description}"))
        with Progress(*columns, TimeElapsedColumn(), console=self.console) as progress:
            task = progress.add_task("starting", total=steps, completed=-1)
            for plan in all_plans:
                for title in self._titles(plan):
                    progress.advance(task)
                    progress.update(task, description=f"{title} ({plan.regime} memory)")
            progress.advance(task)

    @property
    def left_out(self) -> list[str]:
        """What was not begun: names of rows, and how many of the second regime."""
        beside = f"{self._beside} rows of the second memory regime"
        return [*self._left_out, *([beside] if self._beside else [])]

    def _titles(self, plan: worker.Plan) -> Iterator[str]:
        """Yields the title of each row when it begins; prints the one before."""
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=worker.run, args=(plan, there))
        process.start()
        there.close()
        row: list[record.Record] = []
        title = ""
        while True:
            try:
                kind, what = here.recv()
            except EOFError:
                process.join()
                self.crashed = True
                code = process.exitcode
                self.console.print(f"[red]the process died (exit code {code}) in: {title}[/red]")
                return
            if kind == "record":
                row.append(what)
                self.records.append(what)
                continue
            if kind in ("note", "failed"):
                self.crashed = self.crashed or kind == "failed"
                self.console.print(what, style="red" if kind == "failed" else None)
                continue
            self._print_row(title, plan, row)
            row, title = [], what
            if kind == "left out":
                if plan.beside:
                    self._beside += 1
                else:
                    self._left_out.append(what)
                title = ""
            if kind == "end":
                process.join()
                return
            yield what

    def _print_row(self, title: str, plan: worker.Plan, row: list[record.Record]) -> None:
        if not title:
            return
        said = []
        for r in row:
            if r.p50_ms is None:
                said.append(f"[red]{r.side} {r.correct}[/red]")
            else:
                said.append(f"{r.side} {r.p50_ms:.3g}")
        self.console.print(f"{title} ({plan.regime} memory): {', '.join(said)} ms", highlight=False)


def main() -> int:
    """Runs the benchmarks that the command line asks for; 1 if a row is wrong or a process died."""
    command = parser()
    options = command.parse_args()
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        command.error("--device cuda: PyTorch sees no GPU here")
    if options.isa and dispatch.extension is None:
        command.error("--isa chooses among our C++ kernels, and the extension is not built")
    if options.isa and options.isa not in dispatch.extension.available_isas():
        command.error(f"--isa {options.isa}: this CPU or build has no such kernels")
    if options.op and set(options.op) - {op.name for op in registry.rows()}:
        command.error(f"--op must be among {', '.join(op.name for op in registry.rows())}")
    if options.side and set(options.side) - side_names():
        command.error(f"--side must be among {', '.join(sorted(side_names()))}")
    console = Console(width=None if sys.stdout.isatty() else 170)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if options.device == "cpu" and load > 0.5:
        console.print(f"other programs use this machine (load {load:.1f}): times will scatter")
    if options.isa:
        torch_isa = torch.backends.cpu.get_cpu_capability()
        console.print(f"our CPU kernels: {options.isa}; PyTorch's: {torch_isa}", highlight=False)
    start = time.time()
    session = Session(console)
    session.run(plans(options))
    stamp = probes.stamp(options.device)
    chosen = [options.isa, *(options.op or ()), *(options.model or ()), options.dtype]
    chosen.append("loops" if options.loops else None)
    name = "-".join([stamp["machine"], *filter(None, chosen)]).replace(" ", "-")
    folder = options.out or Path("build/bench")
    csv, png = folder / f"{name}.csv", folder / f"{name}.png"
    record.write(csv, stamp, session.records)
    report.plot(png, session.records, name)
    report.show(console, session.records, name, session.left_out)
    took = f"{time.time() - start:.0f} s"
    console.print(f"{took}. Every number: {csv}; picture: {png}", highlight=False)
    wrong = any(r.correct.startswith("WRONG") for r in session.records)
    return 1 if wrong or session.crashed else 0


if __name__ == "__main__":
    sys.exit(main())
