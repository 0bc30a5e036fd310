"""Memory of a deep flow, autograd's against reconstruction: `python -m benchmarks.flow_memory`.

One loss and its gradients of affine couplings on rows [1024, 64], whose networks have two hidden
layers of 256: the peak of live tensors beyond the parameters and the batch, as PyTorch's profiler
counts them; of resident memory, which holds the allocator's holes too, in a process of its own; and
the time, both sides in turn. Writes flow-memory.csv to --out (build/bench unless given).
"""

import argparse
import csv
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import profile

from benchmarks import probes, timing
from gmkernels import Split, checkpoint, noise
from gmkernels.models.couplings import AffineCoupling
from gmkernels.models.flow import Flow, Normal

ROWS, FEATURES, WIDTH = 1024, 64, 256
LAYERS = (4, 8, 16, 32)
MEASURES = ("layers", "backward", "peak_tensors_mb", "peak_memory_mb", "p50_ms")
COLUMNS = (*MEASURES, "threads", "commit", "versions")


def step(layers: int, reconstruct: bool, device: str) -> Callable[[], Any]:
    """A call that computes one loss and its gradients."""
    torch.manual_seed(0)

    def coupling(i: int) -> AffineCoupling:
        half = FEATURES // 2
        first = [nn.Linear(half, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU()]
        net = nn.Sequential(*first, nn.Linear(WIDTH, FEATURES))
        return AffineCoupling(net, Split.halves(FEATURES, flip=i % 2 == 1))

    flow = Flow(map(coupling, range(layers)), Normal(FEATURES), reconstruct=reconstruct).to(device)
    x = noise.normal((ROWS, FEATURES), seed=0, device=device)
    parameters = list(flow.parameters())

    def call(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(flow.loss(x), parameters)

    call(x[:8])  # libraries and buffers of a first call are no part of the peak
    return functools.partial(call, x)


def peak_of_tensors(call: Callable[[], Any]) -> float:
    """MiB that a call's tensors take at their peak, results included."""
    with profile(profile_memory=True) as profiled:
        call()
    now = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak / 2**20


def main() -> None:
    """Prints and writes every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[tuple[Any, ...]] = []
    sides = {"autograd": False, "reconstruct": True}
    print(*MEASURES, sep=", ")
    for layers in args.layers:
        calls = {name: step(layers, how, args.device) for name, how in sides.items()}
        times = timing.in_turn(calls, args.device, rounds=5, seconds=0.05)
        for name, how in sides.items():
            make = functools.partial(step, layers, how, args.device)
            peak = probes.peak_memory(make, args.device, False)
            mebibytes = "" if peak is None else f"{peak / 2**20:.1f}"
            tensors = f"{peak_of_tensors(calls[name]):.1f}"
            rows.append((layers, name, tensors, mebibytes, f"{times[name].p50 * 1e3:.1f}"))
            print(*rows[-1], sep=", ", flush=True)
    stamp = args.threads, probes.commit(), f"torch {torch.__version__}"
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *((*row, *stamp) for row in rows)])
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_atomically(args.out / "flow-memory.csv", text.getvalue().encode())


if __name__ == "__main__":
    main()
