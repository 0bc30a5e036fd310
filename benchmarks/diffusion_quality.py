"""What diffusion models draw, measured: `python -m benchmarks.diffusion_quality [--run FOLDER]`.

2-D: networks trained on a ring of 8 Gaussians and on a grid of 25, 10,000 samples by each
sampler, their sliced Wasserstein-1 distance to 10,000 fresh points, and that of two fresh sets.
Digits (with --run, a run of `train diffusion` or `latent_diffusion --data digits`, one or several):
100 samples of each class, of its caption where the model reads text, over the guidance scale: the
share that a logistic regression trained on the real train digits assigns to the class that was
asked for, beside its rate on the real test digits; and precision and recall by k-nearest neighbours
(Kynkaanniemi et al. 2019, k = 3) against the real test digits, on pixels.

Writes diffusion-quality.csv to --out (build/bench unless given).
"""

import argparse
import csv
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.probes import commit
from gmkernels import Schedule, checkpoint, data, metrics, noise, runs, toys, train
from gmkernels.models.diffusion import Diffusion
from gmkernels.models.edm import EDM
from gmkernels.models.nets import MLP

POINTS = 10_000
MIXTURES = {"ring": toys.ring_modes(8, 2.0), "grid": toys.grid_modes(5, 1.0)}
STD = 0.1  # of each component
GUIDANCE = (0.0, 1.0, 1.5, 2.0, 3.0, 5.0)  # unless --guidance says otherwise
COLUMNS = ("data", "model", "sampler", "evaluations", "guidance", "measure", "value", "commit")


def sliced_wasserstein(x: Tensor, y: Tensor, directions: int = 200) -> float:
    """Mean Wasserstein-1 distance of projections of two sets of equal size."""
    angle = torch.arange(directions) * (torch.pi / directions)
    axes = torch.stack([angle.cos(), angle.sin()])
    return float(((x @ axes).sort(0).values - (y @ axes).sort(0).values).abs().mean())


def mixture_model(kind: str, modes: Tensor, steps: int = 4000) -> Diffusion:
    """A model of the mixture around modes [K, 2]: "diffusion", "flow_matching" or "edm"."""
    torch.manual_seed(0)
    made: dict[str, Any] = {
        "diffusion": lambda: Diffusion(
            MLP(2, time_scale=1.0), Schedule.linear(), (2,), prediction_type="v_prediction"
        ),
        "flow_matching": lambda: Diffusion(
            MLP(2, time_scale=1.0),
            Schedule.flow_matching(),
            (2,),
            prediction_type="flow_prediction",
        ),
        "edm": lambda: EDM(
            MLP(2, time_scale=100.0), Schedule.karras(18), (2,), sigma_data=1.4, mean=-1.0
        ),
    }
    model = made[kind]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x = toys.mixture(512, modes, STD, seed=noise.fold_in(noise.key(1), step))
        train.training_step(model, optimizer, x, seed=noise.fold_in(noise.key(2), step))
        rate.step()
    return model.eval()


def mixture_rows(mixture: str) -> Iterator[tuple[Any, ...]]:
    """Distances of each model and sampler on a mixture of MIXTURES."""
    modes = MIXTURES[mixture]
    real, other = (toys.mixture(POINTS, modes, STD, seed=seed) for seed in (11, 12))
    measure = "sliced Wasserstein-1"
    yield mixture, "fresh data", "", "", "", measure, sliced_wasserstein(other, real)
    model = mixture_model("diffusion", modes)
    for name, steps in (
        ("ddpm", 1000),
        ("ddpm", 50),
        ("ddim", 50),
        ("euler", 50),
        ("euler_ancestral", 50),
        ("heun", 25),
        ("dpmpp_2m", 25),
    ):
        path = model.sampler(name, steps, spacing="trailing")
        x = model.sample(POINTS, sampler=path, seed=13)
        yield mixture, "diffusion", name, len(path), "", measure, sliced_wasserstein(x, real)
    model = mixture_model("flow_matching", modes)
    path = model.sampler("flow_euler", 50)
    x = model.sample(POINTS, sampler=path, seed=13)
    yield mixture, "flow_matching", "flow_euler", 50, "", measure, sliced_wasserstein(x, real)
    model = mixture_model("edm", modes)
    path = model.sampler("heun", 18, spacing="leading")
    x = model.sample(POINTS, sampler=path, seed=13)
    yield mixture, "edm", "heun", len(path), "", measure, sliced_wasserstein(x, real)


def digit_rows(folders: list[Path], scales: Sequence[float]) -> Iterator[tuple[Any, ...]]:
    """Agreement with the class and coverage of each run over the guidance scale."""
    from sklearn.linear_model import LogisticRegression

    images = data.digits()
    judge = LogisticRegression(max_iter=5000).fit(images.train / 16, images.train_labels)
    real = images.test / 16
    asked = torch.arange(10).repeat_interleave(100)
    rate = judge.score(real, images.test_labels)
    yield "digits", "real test digits", "", "", "", "assigned to their class", rate
    for config, model in map(runs.load, folders):
        for guidance in scales:
            x = model.sample(1000, label=asked, guidance=guidance, steps=50, seed=5)
            flat = x.flatten(1) / 16
            found = ("digits", config.model, "ddim", 50 if guidance == 1.0 else 100, guidance)
            yield *found, "assigned to their class", judge.score(flat, asked)
            precision, recall = metrics.precision_recall(flat, real, k=3)
            yield *found, "precision (k = 3)", precision
            yield *found, "recall (k = 3)", recall


def main() -> None:
    """Prints and writes every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--run",
        type=Path,
        action="append",
        default=[],
        help="a run of train diffusion or latent_diffusion --data digits; may be repeated",
    )
    parser.add_argument("--guidance", type=float, nargs="+", default=GUIDANCE)
    parser.add_argument("--digits-only", action="store_true", help="leave the mixtures out")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    args = parser.parse_args()
    rows: list[tuple[Any, ...]] = []
    digits = digit_rows(args.run, args.guidance) if args.run else ()
    points = () if args.digits_only else MIXTURES
    for row in itertools.chain(digits, *map(mixture_rows, points)):
        rows.append((*row[:-1], f"{row[-1]:.4f}", commit()))
        print(*rows[-1], sep=", ", flush=True)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_atomically(args.out / "diffusion-quality.csv", text.getvalue().encode())


if __name__ == "__main__":
    main()
