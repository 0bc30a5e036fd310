"""What the GPU kernels cost, found without a GPU: `python -m benchmarks.static_gpu`.

Each Triton kernel of each row is compiled ahead of time for NVIDIA sm_80, sm_90 and sm_100 and for AMD
gfx942; each csrc/*/*_cuda.cu for sm_80, sm_90a and sm_100a where nvcc is on PATH. The report gives
registers, spills, the width of loads and stores, and instructions an element: the innermost loop body
(the whole kernel if there is none) over the elements that a thread makes in it. With the bytes an
element these bound the speed on an H100: it copies 3.0 TB/s and issues 132 x 4 warps' instructions a
cycle at 1.755 GHz, whichever ends first.

Exits with 1 if a kernel spills registers or a row's forward needs more instructions an element on
sm_90 than the row allows. Writes build/static_gpu.csv.
"""

import argparse
import contextlib
import csv
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import static_asm
from gmkernels import dispatch, registry
from gmkernels.spec import Benchmark, Op

OUT = Path("build/static_gpu.csv")
TARGETS = (("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64))
CU_ARCHS = ("sm_80", "sm_90a", "sm_100a")
COPY_RATE = 3.0e12  # bytes a second of an H100
ISSUE_RATE = 132 * 4 * 32 * 1.755e9  # instructions a second of its lanes
_POINTEES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the report: one kernel on one target. Empty fields do not apply."""

    op: str
    direction: str
    dtype: str
    kernel: str
    target: str
    registers: int
    shared_bytes: int
    spills: int
    load_bits: str
    store_bits: str
    instructions: int
    per_element: float | None = None
    ceiling: int | None = None
    bytes_per_element: float | None = None
    giga_elements_on_h100: float | None = None
    bound_by: str = ""

    @property
    def fault(self) -> str:
        """Why the line fails the report, or ""."""
        if self.spills:
            return "spills registers"
        if self.ceiling is not None and (self.per_element or 0) > self.ceiling:
            return f"more than {self.ceiling} instructions an element"
        return ""


@contextlib.contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Lets backend="triton" accept CPU tensors inside the block: launches are recorded, not run."""
    table = dispatch._TABLE
    saved = {op: row.get("triton") for op, row in table.items()}
    try:
        for op, kernel in saved.items():
            if isinstance(kernel, dispatch.Kernel):
                table[op]["triton"] = dataclasses.replace(kernel, devices=("cpu",))
        yield
    finally:
        for op, kernel in saved.items():
            if kernel is not None:
                table[op]["triton"] = kernel


def calls(op: Op) -> list[Benchmark]:
    """The distinct calls of a row: its benchmarks, and the first one in each dtype with a ceiling."""
    found = list(op.benchmarks)
    for name in op.instructions:
        dtype = getattr(torch, name)
        if all(b.dtype != dtype for b in found):
            found.append(dataclasses.replace(found[0], dtype=dtype, backward=False))
    return list({(b.case.name, b.dtype, b.backward): b for b in found}.values())


def record(op: Op, benchmark: Benchmark) -> tuple[list[Any], list[Any]]:
    """The launches of one call: of its forward, and of its backward if it has one."""
    from gmkernels import triton_common

    given = op.inputs(benchmark.case, benchmark.dtype, "cpu", 0)
    differentiate = benchmark.backward and op.differentiable
    if differentiate:
        given = given.map(lambda x: x.detach().requires_grad_())
    seed = {"seed": 0} if op.noisy and "eps" not in given.kwargs else {}
    with triton_on_cpu():
        with triton_common.recorded() as forward:
            outputs = op.function(*given.args, **given.kwargs, **seed, backend="triton")
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        with triton_common.recorded() as backward:
            if differentiate:
                ones = [torch.ones_like(o) for o in outputs]
                torch.autograd.grad(outputs, given.tensors(), ones, allow_unused=True)
    return forward, backward


def signature(launch: Any) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Argument types, constants and divisibility, as Triton specialises a launch."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.constants
    for i, (parameter, name) in enumerate(
        zip(launch.kernel.params, launch.kernel.arg_names, strict=True)
    ):
        value = values[name]
        specialised = isinstance(value, int) and not parameter.do_not_specialize
        fixed = parameter.is_constexpr or value is None or isinstance(value, bool)
        if fixed or (specialised and value == 1):
            types[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            types[name], divisible = "*" + _POINTEES[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = specialised and value % 16 == 0
        else:
            types[name], divisible = "fp32", False
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def compile_launch(launch: Any, target: tuple[str, Any, int]) -> static_asm.Kernel:
    """The machine code of a recorded launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    compiled = triton.compile(
        ASTSource(launch.kernel, *signature(launch)),
        target=GPUTarget(*target),
        options={"num_warps": launch.num_warps, "enable_fp_fusion": False},
    )
    if target[0] == "hip":
        return static_asm.parse_amdgcn(compiled.asm["amdgcn"])
    return static_asm.read_cubin_bytes(compiled.asm["cubin"])[0]


def elements_a_trip(launch: Any, kernel: static_asm.Kernel, lanes: int) -> float:
    """Elements that one thread makes in the hot body: its share of the tile, times the unrolling."""
    tile = launch.constants.get("R", 1) * launch.constants.get("C", 1)
    share = tile / (lanes * launch.num_warps)
    if not kernel.loops:
        return share
    tensors = big_tensors(launch)
    expected = share * sum(t.element_size() for t in tensors)
    moved = sum(kernel.widths("load") + kernel.widths("store")) / 8
    return share * max(1, round(moved / expected))


def big_tensors(launch: Any) -> list[torch.Tensor]:
    """The distinct tensors of the launch that have an entry for each element."""
    found = {t.data_ptr(): t for t in launch.args if isinstance(t, torch.Tensor) and t.numel()}
    largest = max(t.numel() for t in found.values())
    return [t for t in found.values() if t.numel() == largest]


def report_triton(op: Op, benchmark: Benchmark) -> Iterator[Line]:
    """A line for each kernel of the call on each target."""
    forward, backward = record(op, benchmark)
    dtype = str(benchmark.dtype).removeprefix("torch.")
    plain = benchmark.case == op.benchmarks[0].case
    for direction, launches in (("forward", forward), ("backward", backward)):
        for launch in launches:
            for target in TARGETS:
                kernel = compile_launch(launch, target)
                count = len(kernel.hot()) / elements_a_trip(launch, kernel, target[2])
                on_h100 = target[1] == 90
                checked = on_h100 and plain and direction == "forward"
                tensors = {t.data_ptr(): t for t in launch.args if isinstance(t, torch.Tensor)}
                size = sum(t.numel() * t.element_size() for t in tensors.values())
                size /= max(t.numel() for t in tensors.values())
                rates = {"memory": COPY_RATE / size, "issue": ISSUE_RATE / count}
                bound = min(rates, key=rates.__getitem__)
                yield Line(
                    op.name,
                    f"{direction}, {benchmark.case.name}",
                    dtype,
                    kernel.name,
                    f"sm_{target[1]}" if target[0] == "cuda" else str(target[1]),
                    kernel.registers,
                    kernel.shared,
                    kernel.spills,
                    widths(kernel, "load"),
                    widths(kernel, "store"),
                    len(kernel.hot()),
                    round(count, 1),
                    op.instructions.get(dtype) if checked else None,
                    round(size, 1),
                    round(rates[bound] / 1e9, 1) if on_h100 else None,
                    bound if on_h100 else "",
                )


def widths(kernel: static_asm.Kernel, kind: str) -> str:
    """Bits of the accesses of the hot body, widest first: "128, 64"."""
    return ", ".join(str(w) for w in sorted(set(kernel.widths(kind)), reverse=True))


def report_cuda(source: Path, arch: str) -> Iterator[Line]:
    """A line for each kernel of a CUDA source."""
    for kernel in static_asm.compile_cuda(source, arch):
        yield Line(
            source.stem.removesuffix("_cuda"),
            "CUDA C++",
            "",
            kernel.name,
            arch,
            kernel.registers,
            kernel.shared,
            kernel.spills,
            widths(kernel, "load"),
            widths(kernel, "store"),
            len(kernel.hot()),
        )


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
    console = Console(width=None if sys.stdout.isatty() else 200)
    rows = registry.rows() if names is None else [registry.row(name) for name in names]
    rows = [op for op in rows if isinstance(dispatch._TABLE[op.name]["triton"], dispatch.Kernel)]
    work = [(op, benchmark) for op in rows for benchmark in calls(op)]
    lines: list[Line] = []
    for op, benchmark in track(work, "Triton", console=console, disable=not work):
        lines += report_triton(op, benchmark)
    sources = sorted(Path("csrc").glob("*/*_cuda.cu")) if static_asm.nvcc() and not names else []
    builds = [(source, arch) for source in sources for arch in CU_ARCHS]
    for source, arch in track(builds, "CUDA C++", console=console, disable=not builds):
        lines += report_cuda(source, arch)
    show(lines, console)
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([f.name for f in dataclasses.fields(Line)])
        writer.writerows(dataclasses.astuple(line) for line in lines)
    faults = [line for line in lines if line.fault]
    for line in faults:
        console.print(f"[red]{line.op} {line.direction} {line.kernel} {line.target}: {line.fault}[/red]")
    console.print(f"{len(lines)} kernels compiled, {len(faults)} at fault; all of them: {OUT}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
