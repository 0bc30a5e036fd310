"""Compiles every CUDA kernel where there is nvcc and no GPU: `python -m benchmarks.cuda_check`.

Every csrc/<family>/<family>_cuda.cu is compiled for each architecture with the flags of
CMakeLists.txt; ptxas says how many registers each kernel takes and whether it spills any. A compile
error, or a spill that SPILLS_ALLOWED does not name, fails the check. What was compiled stays in
build/cuda_check, for the static report and for the next check of the same sources.
"""

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("80", "90a", "100a")
HEADERS = (".h", ".cuh")
KEPT = ROOT / "build" / "cuda_check"
FLAGS = ("-O3", "-fmad=false", "-std=c++17", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", "-cubin")

# Kernel, as the table names it: why it may spill, on every architecture.
SPILLS_ALLOWED: dict[str, str] = {}

Usage = tuple[int, int]  # registers, spilled bytes


def compile_one(nvcc: str, source: Path, arch: str) -> tuple[Path, int, str]:
    """Compiles one source for one architecture, unless the same was compiled before.

    Returns: the cubin, the exit status, and what nvcc and ptxas said.
    """
    digest = hashlib.sha256(repr((nvcc, FLAGS, arch)).encode())
    for path in (source, *sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in HEADERS)):
        digest.update(path.read_bytes())
    name = f"{source.stem}_{arch}_{digest.hexdigest()[:16]}"
    target, said = KEPT / f"{name}.cubin", KEPT / f"{name}.txt"
    if said.exists():
        return target, 0, said.read_text()
    KEPT.mkdir(parents=True, exist_ok=True)
    for old in KEPT.glob(f"{source.stem}_{arch}_*"):
        old.unlink()
    gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [nvcc, *FLAGS, gencode, "-o", str(target), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    text = result.stderr + result.stdout
    if result.returncode == 0:
        said.write_text(text)
    return target, result.returncode, text


def read_ptxas(text: str) -> dict[str, Usage]:
    """Usage of each kernel, by its mangled name."""
    found = {}
    for part in text.split("Compiling entry function '")[1:]:
        registers = re.search(r"Used (\d+) registers", part)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        if registers and spills:
            found[part.split("'", 1)[0]] = int(registers[1]), int(spills[1]) + int(spills[2])
    return found


def readable(names: list[str]) -> list[str]:
    """Mangled names without namespaces and arguments; as they are where there is no c++filt."""
    if not names or not shutil.which("c++filt"):
        return names
    out = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout
    lines = [re.sub(r"\bgm::(device::)?|^void ", "", line) for line in out.splitlines()]
    lines = [re.sub(r"(?<=[>\w])\(.*$", "", line) for line in lines]
    return [re.sub(r"\((\w+)\)(?=\d)", r"\1 ", line) for line in lines]


def check(nvcc: str) -> tuple[dict[str, dict[str, Usage]], list[str]]:
    """{kernel: {architecture: usage}}, and the complaints."""
    sources = sorted((ROOT / "csrc").glob("*/*_cuda.cu"))
    complaints = [] if sources else ["no csrc/*/*_cuda.cu found"]
    mangled: dict[str, dict[str, Usage]] = {}
    tasks = [(source, arch) for source in sources for arch in ARCHS]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(compile_one, nvcc, *task) for task in tasks]
        for (source, arch), job in zip(tasks, jobs, strict=True):
            _, status, text = job.result()
            label = f"{source.relative_to(ROOT)} for sm_{arch}"
            print(f"{label}: {'failed' if status else 'compiled'}", flush=True)
            if status:
                complaints.append(f"{label} does not compile:\n{text}")
            for name, usage in read_ptxas(text).items():
                mangled.setdefault(name, {})[arch] = usage
    kernels = dict(sorted(zip(readable(list(mangled)), mangled.values(), strict=True)))
    for name, usages in kernels.items():
        if any(spilled for _, spilled in usages.values()) and name not in SPILLS_ALLOWED:
            complaints.append(f"{name} spills, and SPILLS_ALLOWED does not say why")
    return kernels, complaints


def show(kernels: dict[str, dict[str, Usage]]) -> None:
    """Prints a row a kernel."""
    table = Table("kernel", *(f"sm_{arch}" for arch in ARCHS), title="registers (spilled bytes)")
    for name, usages in kernels.items():
        cells = []
        for arch in ARCHS:
            registers, spilled = usages.get(arch, ("-", 0))
            cells.append(f"{registers} [red]({spilled})[/red]" if spilled else str(registers))
        table.add_row(name, *cells)
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def main() -> int:
    """Exit status: 0 all well, 1 a complaint, 2 no compiler."""
    parser = argparse.ArgumentParser(description="Compile every CUDA kernel, without a GPU.")
    parser.add_argument("--nvcc", default="nvcc", help="the compiler, a name or a path")
    name = parser.parse_args().nvcc
    nvcc = shutil.which(name)
    if nvcc is None:
        print(f"cuda_check: no {name} found; install the CUDA toolkit or give --nvcc PATH")
        return 2
    kernels, complaints = check(nvcc)
    show(kernels)
    for complaint in complaints:
        print(f"cuda_check: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
