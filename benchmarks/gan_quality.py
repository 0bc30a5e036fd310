"""What GANs draw, measured: `python -m benchmarks.gan_quality [--seeds 0 1 2] [--only NAME]`.

Each is a run of `python -m gmkernels train` on one thread. Ring of 8 Gaussians (radius 2, sd 0.02),
10,000 samples: modes covered, the share of high quality (within 3 sd of a mode), the samples of the
rarest mode over an eighth of all; where the players stand: 1/2, 1/2 and V = -log 4 at equilibrium.
Digits, 1000 samples: precision and recall by k-nearest neighbours (k = 3) against the test
pictures, beside them those of the train pictures. CycleGAN: mean absolute difference from the
change itself, and that of pictures left as they are.

Writes gan-quality.csv to --out (build/bench unless given), anew after each run. Seconds are of the
process: other work on the machine does not count. The ring's GAN is run with every seed, the others
with the first.
"""

import argparse
import csv
import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.probes import commit
from gmkernels import checkpoint, data, metrics, runs, toys
from gmkernels.__main__ import main as command

STD, SAMPLES = 0.02, 10_000
COLUMNS = ("data", "model", "seed", "steps", "seconds", "measure", "value", "commit")
# name: model, data, flags of train
RUNS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "ring-gan": ("gan", "ring", ("--steps", "6000", "--every", "6000")),
    "ring-wgan_gp": (
        "wgan_gp",
        "ring",
        ("--steps", "3000", "--every", "3000", "-o", "weight=0.1"),
    ),
    "digits-gan": ("gan", "digits", ("--steps", "2000", "--every", "2000", "--batch-size", "100")),
    "digits-inverted": (
        "cyclegan",
        "digits",
        ("-o", "domain=inverted", "-o", "identity=0", "--every", "1000"),
    ),
    "digits-rotated": (
        "cyclegan",
        "digits",
        ("-o", "domain=rotated", "-o", "identity=0", "-o", "moves=true", "--every", "1000"),
    ),
    "digits-thickened": ("cyclegan", "digits", ("-o", "domain=thickened", "--every", "1000")),
}
EVERY_SEED = ("ring-gan",)


def ring_rows(model: Any) -> Iterator[tuple[str, float]]:
    """What a model of the ring draws, and how its players stand."""
    modes = toys.ring_modes()
    found = metrics.mode_coverage(model.sample(SAMPLES, seed=5), modes, STD)
    yield "modes covered of 8", found.covered
    yield "high-quality share", found.high_quality
    yield "rarest mode / even share", float(found.counts.min()) * len(modes) / SAMPLES
    stand = model.balance(toys.ring(SAMPLES, seed=6, std=STD), seed=7)
    if model.rule.logistic:
        yield "mean D(x)", float(stand.real)
        yield "mean D(G(z))", float(stand.fake)
    yield "V", float(stand.value)


def digit_rows(model: Any) -> Iterator[tuple[str, float]]:
    """What a model of the digits draws, or how it translates them."""
    images = data.digits()
    real = images.unit(images.test)
    if hasattr(model, "move"):
        yield "absolute error", float(model.error(real).mean())
        yield "of pictures as they are", float((model.move(real).flatten(1) - real).abs().mean())
        return
    train = images.unit(images.train)
    for of, x in (("", model.sample(1000, seed=5).flatten(1)), (" of train pictures", train)):
        precision, recall = metrics.precision_recall(x, real, k=3)
        yield f"precision (k = 3){of}", precision
        yield f"recall (k = 3){of}", recall


def main() -> None:
    """Prints and writes every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--only", choices=RUNS, action="append", help="may be repeated")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[Any, ...]] = []
    jobs = [
        (name, seed)
        for name in args.only or RUNS
        for seed in (args.seeds if name in EVERY_SEED else args.seeds[:1])
    ]
    for name, seed in jobs:
        kind, source, flags = RUNS[name]
        with tempfile.TemporaryDirectory() as folder:
            flags = (*flags, "--threads", "1", "--seed", str(seed), "--out", folder)
            start = time.process_time()
            if command(["train", kind, "--data", source, *flags]) != 0:
                raise SystemExit(f"{name}: training failed")
            seconds = time.process_time() - start
            config, model = runs.load(Path(folder))
        measured = ring_rows(model) if source == "ring" else digit_rows(model)
        with torch.no_grad():
            for measure, value in measured:
                found = (kind if source == "ring" else name.removeprefix("digits-"), seed)
                row = (source, *found, config.steps, f"{seconds:.0f}", measure, f"{value:.4f}")
                rows.append((*row, commit()))
                print(*rows[-1], sep=", ", flush=True)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
        checkpoint.write_atomically(args.out / "gan-quality.csv", text.getvalue().encode())


if __name__ == "__main__":
    main()
