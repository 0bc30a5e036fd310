"""Times calls in turn, so that a machine that slows down slows all sides alike."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.benchmark import Timer

Call = Callable[[], Any]
L2_BYTES = 256 << 20  # larger than any GPU's second-level cache


@dataclass(frozen=True)
class Times:
    """Seconds a call: percentiles of the samples."""

    p20: float
    p50: float
    p80: float


def percentiles(samples: list[float]) -> Times:
    """Times of all samples."""
    p20, p50, p80 = np.percentile(samples, (20, 50, 80))
    return Times(float(p20), float(p50), float(p80))


def in_turn(
    calls: dict[str, Call], device: str, *, rounds: int, seconds: float
) -> dict[str, Times]:
    """Times every call in each round, for about `seconds` a round, and pools the rounds."""
    sample = cpu_samples if device == "cpu" else cuda_samples
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name] += sample(call, seconds)
    return {name: percentiles(samples) for name, samples in found.items()}


def cpu_samples(call: Call, seconds: float) -> list[float]:
    """Seconds a call, in blocks long enough for the clock; garbage collection is off."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).times


def cuda_samples(call: Call, seconds: float) -> list[float]:
    """Seconds a call by CUDA events, each after a write that empties the second-level cache."""
    call()
    torch.cuda.synchronize()
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")
    pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(pairs) < 5:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        call()
        stop.record()
        pairs.append((start, stop))
        if len(pairs) % 16 == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) * 1e-3 for start, stop in pairs]


def host_seconds(call: Call, device: str, seconds: float = 0.1) -> float:
    """Median seconds until a call returns; on a GPU its work may still be under way."""
    if device == "cpu":
        return percentiles(cpu_samples(call, seconds)).p50
    call()
    samples = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            call()
        samples.append((time.perf_counter() - start) / 20)
    torch.cuda.synchronize()
    return percentiles(samples).p50
