"""What the machine can do, measured beside the kernels; peak memory; names and versions."""

import ctypes
import datetime
import gc
import multiprocessing
import platform
import re
import resource
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gmkernels import dispatch

ROOT = Path(__file__).resolve().parents[1]


def copy_probe(device: str) -> tuple[Callable[[], Any], int]:
    """A copy between two tensors that are already mapped, and the bytes that it moves."""
    size = (64 if device == "cpu" else 512) << 20
    source = torch.ones(size // 4, device=device)
    target = torch.ones_like(source)
    return lambda: target.copy_(source), 2 * size


def read_probe(device: str, size: int) -> tuple[Callable[[], Any], int]:
    """A maximum over as many bytes as a call reads, which the caches hold as they do the call's."""
    source = torch.ones(max(size // 4, 1), device=device)
    return source.amax, 4 * source.numel()


def matmul_probe(dtype: torch.dtype, device: str) -> tuple[Callable[[], Any], int]:
    """A square matrix product, and its floating-point operations."""
    n = 1024 if device == "cpu" else 8192
    a, b, out = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(3))
    return lambda: torch.mm(a, b, out=out), 2 * n**3


def page_faults(call: Callable[[], Any]) -> int:
    """Minor page faults of a call, the median of five: pages that it is the first to touch."""
    counts = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        call()
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return sorted(counts)[2]


def seconds_a_fault() -> float:
    """What a fault adds to the time of torch's threads: 64 MiB filled at first, and once more.

    0 where the memory was there, as after reuse_memory().
    """
    costs = []
    for _ in range(5):
        fresh = torch.empty(1 << 24)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        fresh.fill_(0)
        first = time.perf_counter()
        count = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        fresh.fill_(0)
        costs.append((2 * first - start - time.perf_counter()) / max(count, 1))
        del fresh
    return max(sorted(costs)[2], 0.0)


def peak_memory(make: Callable[[], Callable[[], Any]], device: str, reuse: bool) -> int | None:
    """Bytes that a call needs at its peak, results included, beyond its inputs; None if unknown.

    `make` builds the call and must be picklable. On the CPU it runs in a fresh process, forked from
    one that has imported torch and nothing else.
    """
    if device == "cpu":
        return _peak_in_child(make, reuse)
    call = make()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def _peak_in_child(make: Callable[[], Callable[[], Any]], reuse: bool) -> int | None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.sides"])
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(make, reuse, there))
    child.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return None
    finally:
        child.join()


def _child(make: Callable[[], Callable[[], Any]], reuse: bool, reply: Any) -> None:
    if reuse:
        dispatch.reuse_memory()
    call = make()
    gc.collect()
    reply.send(_resident_peak(call))


def _resident_peak(call: Callable[[], Any]) -> int | None:
    # The kernel's high-water mark of resident memory, set back to what is resident now: what came
    # before (a compiler's memory, a first call) would hide the call otherwise.
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        kept = call()
        peak = _status("VmHWM")
    except (OSError, AttributeError):
        return None
    del kept
    return peak - before


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found.group(1)) * 1024


def machine(device: str) -> str:
    """A file name for this machine: the GPU, or the CPU, its widest vectors and its cores."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{_cpu_model()} {_vectors()} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cpu_model() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def _vectors() -> str:
    features = dispatch.extension.cpu_features() if dispatch.extension else {}
    return next((name for name in ("avx512f", "avx2") if features.get(name)), "").removesuffix("f")


def stamp(device: str) -> dict[str, str]:
    """Where and when: the columns that all rows of a results file share."""
    versions = [f"python {platform.python_version()}"]
    for package in ("gmkernels", "torch", "triton"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    if device == "cpu":
        versions.append(f"ATen {torch.backends.cpu.get_cpu_capability()}")
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": "; ".join(versions),
        "machine": machine(device),
        "threads": str(torch.get_num_threads()),
    }


def commit() -> str:
    """The commit of the checkout, with a mark if tracked files differ from it."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
