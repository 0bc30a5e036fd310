"""Compiles every CUDA kernel where there is nvcc and no GPU: `python -m benchmarks.cuda_check`.

Every csrc/<family>/<family>_cuda.cu is compiled for each architecture with the flags of CMakeLists.txt;
ptxas says how many registers each kernel takes and whether it spills any. A compile error, or a spill
that SPILLS_ALLOWED does not name, fails the check.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("80", "90a", "100a")
FLAGS = ("-O3", "-fmad=false", "-std=c++17", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", "-cubin")

# kernel: why it may spill, on every architecture.
SPILLS_ALLOWED: dict[str, str] = {}


@dataclass
class Kernel:
    """One kernel as ptxas saw it: registers and spilled bytes an architecture."""

    name: str
    registers: dict[str, int] = field(default_factory=dict)
    spills: dict[str, int] = field(default_factory=dict)


def demangle(names: list[str]) -> dict[str, str]:
    """Mangled names to short readable ones; names as they are where c++filt is missing."""
    if not names or not shutil.which("c++filt"):
        return {name: name for name in names}
    out = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout
    short = [re.sub(r"\bgm::(device::)?|^void |\(.*\)$", "", line) for line in out.splitlines()]
    return dict(zip(names, short, strict=True))


def compile_one(nvcc: str, source: Path, arch: str, folder: Path) -> tuple[Path, str, int, str]:
    """Runs nvcc for one architecture: source, architecture, exit status, what it said."""
    target = folder / f"{source.stem}_{arch}.cubin"
    gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [nvcc, *FLAGS, gencode, "-o", str(target), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    return source, arch, result.returncode, result.stderr + result.stdout


def read_ptxas(text: str) -> dict[str, tuple[int, int]]:
    """{mangled kernel: (registers, spilled bytes)} of `ptxas -v`."""
    found = {}
    for part in text.split("Compiling entry function '")[1:]:
        name = part.split("'", 1)[0]
        registers = re.search(r"Used (\d+) registers", part)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        if registers and spills:
            found[name] = (int(registers[1]), int(spills[1]) + int(spills[2]))
    return found


def check(nvcc: str) -> tuple[list[Kernel], list[str]]:
    """All kernels, and the complaints."""
    sources = sorted((ROOT / "csrc").glob("*/*_cuda.cu"))
    found: dict[str, Kernel] = {}
    complaints = [] if sources else ["no csrc/*/*_cuda.cu found"]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(compile_one, nvcc, source, arch, Path(folder))
            for source in sources
            for arch in ARCHS
        ]
        for job in jobs:
            source, arch, status, text = job.result()
            print(f"{source.relative_to(ROOT)} sm_{arch}", "failed" if status else "ok", flush=True)
            if status:
                complaints.append(f"{source.relative_to(ROOT)} for sm_{arch}:\n{text}")
            for name, (registers, spills) in read_ptxas(text).items():
                kernel = found.setdefault(name, Kernel(name))
                kernel.registers[arch], kernel.spills[arch] = registers, spills
    names = demangle(list(found))
    for mangled, kernel in found.items():
        kernel.name = names[mangled]
        if any(kernel.spills.values()) and kernel.name not in SPILLS_ALLOWED:
            complaints.append(f"{kernel.name} spills and SPILLS_ALLOWED does not say why")
    return sorted(found.values(), key=lambda kernel: kernel.name), complaints


def show(kernels: list[Kernel]) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("kernel", *(f"sm_{arch}" for arch in ARCHS), title="registers (spilled bytes)")
    for kernel in kernels:
        cells = [
            f"{kernel.registers.get(arch, '-')}"
            + (f" ([red]{kernel.spills[arch]}[/])" if kernel.spills.get(arch) else "")
            for arch in ARCHS
        ]
        table.add_row(kernel.name, *cells)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compile every CUDA kernel; fail on errors and spills."
    )
    parser.add_argument("--nvcc", default="nvcc", help="the compiler, a name or a path")
    nvcc = shutil.which(parser.parse_args().nvcc)
    if nvcc is None:
        print(
            "cuda_check: no nvcc found; install the CUDA toolkit or give --nvcc PATH",
            file=sys.stderr,
        )
        return 2
    kernels, complaints = check(nvcc)
    show(kernels)
    for complaint in complaints:
        print(f"cuda_check: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
