"""What the GPU kernels cost, found without a GPU: `python -m benchmarks.static_gpu`.

Each Triton kernel of each row is compiled ahead of time for NVIDIA sm_90 and AMD gfx942 as often
as the row's calls specialise it, for sm_80 and sm_100 once per set of dtypes; each csrc/*/*_cuda.cu
for sm_80, sm_90a and sm_100a where nvcc is on PATH. The report gives registers, shared memory and
spills; on sm_90 and gfx942, and wherever a stack is used, also the width of loads and stores, and
instructions an element: the innermost loop body (the whole kernel if there is none) over the
elements that a thread makes in it. With the bytes an element these bound the speed on an H100: it
copies 3.0 TB/s and issues the instructions of 132 x 4 warps a cycle at 1.755 GHz, whichever is
slower.

Exits with 1 if a kernel spills registers or a row's forward needs more instructions an element on
sm_90 than the row allows. Writes build/static_gpu.csv.
"""

import argparse
import csv
import dataclasses
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import cuda_check, static_asm, static_triton
from benchmarks.static_triton import Target
from gmkernels import registry
from gmkernels.spec import Benchmark, Op

OUT = Path("build/static_gpu.csv")
TARGETS: tuple[Target, ...] = (
    ("cuda", 80, 32),
    ("cuda", 90, 32),
    ("cuda", 100, 32),
    ("hip", "gfx942", 64),
)
EVERY_LAUNCH = (TARGETS[1], TARGETS[3])  # on the others, each kernel once per set of dtypes
COPY_RATE = 3.0e12  # bytes a second of an H100
ISSUE_RATE = 132 * 4 * 32 * 1.755e9  # instructions a second of its lanes


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the report: one kernel on one target. Empty fields do not apply."""

    op: str
    direction: str
    dtype: str
    target: str
    kernel: str
    registers: int
    shared_bytes: int
    spills: int
    load_bits: str
    store_bits: str
    instructions: int | None
    per_element: float | None = None
    ceiling: int | None = None
    bytes_per_element: float | None = None
    giga_elements_on_h100: float | None = None
    bound_by: str = ""

    @property
    def fault(self) -> str:
        """Why the line fails the report, or ""."""
        if self.spills and self.kernel not in cuda_check.SPILLS_ALLOWED:
            return "spills registers, and cuda_check.SPILLS_ALLOWED does not say why"
        if self.ceiling is not None and (self.per_element or 0) > self.ceiling:
            return f"more than {self.ceiling} instructions an element"
        return ""


def report_triton(op: Op, benchmark: Benchmark, seen: set[str]) -> Iterator[Line]:
    """A line for each launch of the call that was not seen before, on each target it is due on."""
    forward, backward = static_triton.record(op, benchmark)
    dtype = str(benchmark.dtype).removeprefix("torch.")
    ceiling = op.instructions.get(dtype) if benchmark.case == op.benchmarks[0].case else None
    for direction, launches in (("forward", forward), ("backward", backward)):
        for launch in launches:
            identity = static_triton.identity(launch)
            if identity in seen:
                continue
            due = EVERY_LAUNCH if static_triton.dtypes(launch) in seen else TARGETS
            seen |= {identity, static_triton.dtypes(launch)}
            for target in due:
                kernel = static_triton.compile_launch(launch, target, code=target[1] == 90)
                line = Line(
                    op.name,
                    f"{direction}, {benchmark.case.name}",
                    dtype,
                    f"sm_{target[1]}" if target[0] == "cuda" else str(target[1]),
                    **usage(kernel),
                    per_element=per_element(launch, kernel, target),
                    bytes_per_element=round(static_triton.bytes_an_element(launch), 1),
                )
                if target[1] == 90:
                    line = bounded(line, ceiling if direction == "forward" else None)
                yield line


def per_element(launch: Any, kernel: static_asm.Kernel, target: Target) -> float | None:
    """Instructions an element, where they were read."""
    if not kernel.code:
        return None
    elements = static_triton.elements_a_trip(launch, kernel, target[2])
    return round(len(kernel.hot) / elements, 1)


def report_family(names: list[str]) -> list[Line]:
    """The lines of the rows of these names, which share kernels."""
    seen: set[str] = set()
    rows = [registry.row(name) for name in names]
    calls = [(op, benchmark) for op in rows for benchmark in static_triton.calls(op)]
    return [line for op, benchmark in calls for line in report_triton(op, benchmark, seen)]


def report_families(rows: list[Op], console: Console) -> list[Line]:
    """The lines of all rows in their order, a family at a time in each of two processes."""
    families: dict[str, list[str]] = {}
    for op in rows:
        families.setdefault(op.family, []).append(op.name)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        # The largest first: the last to end ends early.
        longest = sorted(families, key=lambda family: -len(families[family]))
        jobs = {pool.submit(report_family, families[family]): family for family in longest}
        found = {
            jobs[job]: job.result()
            for job in track(as_completed(jobs), "Triton", len(jobs), console=console)
        }
    return [line for family in families for line in found[family]]


def usage(kernel: static_asm.Kernel) -> dict[str, Any]:
    """The columns that are read from the machine code."""
    return {
        "kernel": kernel.name,
        "registers": kernel.registers,
        "shared_bytes": kernel.shared,
        "spills": kernel.spills,
        "load_bits": widths(kernel, "load"),
        "store_bits": widths(kernel, "store"),
        "instructions": len(kernel.hot) if kernel.code else None,
    }


def bounded(line: Line, ceiling: int | None) -> Line:
    """The line of an H100, with the speed that it could reach there."""
    assert line.per_element is not None
    assert line.bytes_per_element is not None
    rates = {"memory": COPY_RATE / line.bytes_per_element, "issue": ISSUE_RATE / line.per_element}
    bound = min(rates, key=rates.__getitem__)
    rate = round(rates[bound] / 1e9, 1)
    return dataclasses.replace(line, ceiling=ceiling, giga_elements_on_h100=rate, bound_by=bound)


def widths(kernel: static_asm.Kernel, kind: str) -> str:
    """Bits of the accesses of the hot body, widest first: "128, 64"."""
    return ", ".join(str(w) for w in sorted(set(kernel.widths(kind)), reverse=True))


def report_cuda(source: Path, arch: str) -> list[Line]:
    """A line for each kernel of a CUDA source. Raises RuntimeError if it does not compile."""
    nvcc = shutil.which("nvcc")
    assert nvcc is not None
    cubin, status, _ = cuda_check.compile_one(nvcc, source, arch)
    if status:
        raise RuntimeError(f"{source.name} does not compile for sm_{arch}: see make cuda_check")
    kernels = list(static_asm.read_cubin(cubin, code=arch == "90a"))
    names = cuda_check.readable([kernel.name for kernel in kernels])
    family = source.stem.removesuffix("_cuda")
    return [
        Line(family, "CUDA C++", "", f"sm_{arch}", **{**usage(kernel), "kernel": name})
        for kernel, name in zip(kernels, names, strict=True)
    ]


def show(lines: list[Line], console: Console) -> None:
    """The table, a line a kernel; sm_90 stands for all targets unless one differs in spills."""
    table = Table(title="GPU kernels, compiled without a GPU (sm_90; the CSV has every target)")
    for name in ("op", "call", "dtype", "kernel", "registers", "spills", "load", "store"):
        table.add_column(name)
    for name in ("instr/element", "allowed", "bytes/element", "bound on H100", ""):
        table.add_column(name, justify="right")
    for line in lines:
        if not (line.target.startswith("sm_90") or line.fault):
            continue
        bound = f"{line.giga_elements_on_h100:g} G/s, {line.bound_by}" if line.bound_by else ""
        table.add_row(
            line.op,
            line.direction,
            line.dtype,
            line.kernel if line.target.startswith("sm_90") else f"{line.kernel} {line.target}",
            str(line.registers),
            str(line.spills),
            line.load_bits,
            line.store_bits,
            str(line.instructions if line.per_element is None else line.per_element),
            "" if line.ceiling is None else str(line.ceiling),
            "" if line.bytes_per_element is None else str(line.bytes_per_element),
            bound,
            f"[red]{line.fault}[/red]" if line.fault else "ok",
        )
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", action="append", help="only this op (may be repeated)")
    names = parser.parse_args().op
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: the interpreter's kernels cannot be compiled")
    console = Console(width=None if sys.stdout.isatty() else 200)
    rows = registry.rows() if names is None else [registry.row(name) for name in names]
    rows = [op for op in rows if static_triton.has_kernel(op)]
    faults: list[str] = []
    lines = report_families(rows, console)
    sources = sorted((cuda_check.ROOT / "csrc").glob("*/*_cuda.cu"))
    builds = [(source, arch) for source in sources for arch in cuda_check.ARCHS]
    if names is None and shutil.which("nvcc"):
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(report_cuda, *build) for build in builds]
            for job in track(jobs, "CUDA C++", console=console):
                try:
                    lines += job.result()
                except RuntimeError as error:
                    faults.append(str(error))
    show(lines, console)
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([f.name for f in dataclasses.fields(Line)])
        writer.writerows(dataclasses.astuple(line) for line in lines)
    for line in lines:
        if line.fault:
            where = f"{line.op}, {line.direction}, {line.dtype}, {line.kernel}, {line.target}"
            faults.append(f"{where}: {line.fault}")
    for text in faults:
        console.print(text, style="red")
    console.print(f"{len(lines)} kernels compiled, {len(faults)} at fault; all of them: {OUT}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
