"""`python -m gmkernels compare --data digits`: every paradigm, see comparison.py.

`compare WHAT --out FOLDER` writes WHAT.csv and WHAT.png, WHAT one of
classifiers: Ng and Jordan's learning curves, see learning_curves.py.
divergences: what each says of disjoint supports, see disjoint.py.
"""

import argparse
import csv
import importlib.util
import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from gmkernels import (
    checkpoint,
    comparison,
    data,
    disjoint,
    learning_curves,
    noise,
    pictures,
)


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    shown = ([f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows)
    csv.writer(text, lineterminator="\n").writerows([columns, *shown])
    checkpoint.write_atomically(path, text.getvalue().encode())


def _draw_classifiers(path: Path, rows: Sequence[learning_curves.Row]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    for panel, name in zip(axes, learning_curves.NAMES, strict=True):
        for model in learning_curves.MODELS:
            mine = [row for row in rows if (row.data, row.model) == (name, model)]
            sizes, errors, spread = zip(*(row[2:5] for row in mine), strict=True)
            panel.errorbar(sizes, errors, spread, label=model, marker=".", capsize=2)
        bayes = next(row.bayes_error for row in rows if row.data == name)
        if not math.isnan(bayes):
            panel.axhline(bayes, color="black", linestyle="--", label="Bayes")
        panel.set(xscale="log", title=name, xlabel="training samples", ylabel="test error")
        panel.set_ylim(bottom=0)
        panel.legend()
    pictures.save_figure(path, figure)


def classifiers(out: Path, repeats: int, seed: int) -> None:
    """Prints each data set's curves, then writes them."""
    found: list[learning_curves.Row] = []
    for name in learning_curves.NAMES:
        curves = learning_curves.curves(learning_curves.problem(name), repeats=repeats, seed=seed)
        found += curves
        half = len(curves) // 2
        print(f"{name}, samples: {', '.join(learning_curves.MODELS)}")
        for naive, logistic in zip(curves[:half], curves[half:], strict=True):
            print(f"{naive.size:6}: {naive.error:7.2%}, {logistic.error:7.2%}", flush=True)
    _write_csv(out / "classifiers.csv", learning_curves.Row._fields, found)
    _draw_classifiers(out / "classifiers.png", found)


def divergences(out: Path) -> None:
    """Writes the measures over theta; prints them where the supports are disjoint."""
    from matplotlib.figure import Figure

    found = disjoint.rows()
    _write_csv(out / "divergences.csv", disjoint.COLUMNS, found)
    theta, *columns = zip(*found, strict=True)
    k = len(disjoint.MEASURES)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, name in enumerate(disjoint.MEASURES[1:], 1):  # KL is infinite everywhere here
        left.plot(theta, columns[i], label=name)
        right.plot(theta, columns[k + i], label=name)
    for axes, title in ((left, "value"), (right, "derivative in theta")):
        axes.axvline(1, color="black", linestyle=":", label="disjoint from here on")
        axes.set(title=title, xlabel="theta, the shift of a bump of width 1")
        axes.legend()
    figure.suptitle("Two bumps moved apart; KL is infinite for every shift")
    pictures.save_figure(out / "divergences.png", figure)
    at = next(row for row in found if row[0] >= 2)
    for i, name in enumerate(disjoint.MEASURES, 1):
        slope = round(at[k + i], 4) + 0.0  # no minus before a 0
        print(f"{name:14} at theta = {at[0]:g}: {at[i]:.4f}, derivative {slope:.4f}")


def _prepare_paradigms(args: argparse.Namespace) -> Callable[[], None]:
    if args.data is None:
        raise ValueError("compare needs --data digits, or one of classifiers and divergences")
    only = tuple(args.only.split(",")) if args.only else comparison.NAMES
    strange = sorted(set(only) - set(comparison.NAMES))
    if strange:
        raise ValueError(
            f"--only must name some of {', '.join(comparison.NAMES)}, got {', '.join(strange)}"
        )
    if not 0 < args.minutes < math.inf:
        raise ValueError(f"--minutes must be a finite number > 0, got {args.minutes:g}")
    noise.key(args.seed)
    images = data.load(args.data)
    if not isinstance(images, data.Images) or images.train_labels is None:
        raise ValueError(f"--data must be pictures with labels, {args.data} are not; take digits")
    settings = {"data": args.data, "minutes": args.minutes, "seed": args.seed}
    comparison.check(args.out, settings)
    for name in only:
        comparison.read_row(args.out / name)

    def work() -> None:
        torch.set_num_threads(1)  # small nets: a second thread costs more than it does
        print(f"finished rows are kept in {args.out}: the same command goes on after them")
        comparison.compare(images, args.out, minutes=args.minutes, only=only, seed=args.seed)

    return work


def prepare(args: argparse.Namespace) -> Callable[[], None]:
    """Checks what can be wrong and makes the folder; returns what is left to do."""
    for module, name in (("matplotlib", "matplotlib"), ("sklearn", "scikit-learn")):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"compare needs {name}; pip install {name}")
    if args.what is None:
        return _prepare_paradigms(args)
    if args.what == "classifiers":
        if args.repeats < 1:
            raise ValueError(f"--repeats must be >= 1, got {args.repeats}")
        noise.key(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "classifiers":
        return lambda: classifiers(args.out, args.repeats, args.seed)
    return lambda: divergences(args.out)


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of `python -m gmkernels`."""
    parser = commands.add_parser("compare", help="compare paradigms, classifiers or divergences")
    parser.set_defaults(prepare=prepare)
    parser.add_argument("--data", help="digits or a folder of IDX files: compares the paradigms")
    parser.add_argument("--minutes", type=float, default=15.0, help="in all (default 15)")
    parser.add_argument(
        "--only", help=f"names with commas between, of {', '.join(comparison.NAMES)}"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    folder = Path("runs/compare")
    parser.add_argument("--out", type=Path, default=folder, help=f"folder (default {folder})")
    kinds = parser.add_subparsers(dest="what", metavar="classifiers|divergences")
    curves = kinds.add_parser("classifiers", help="error against sample size, Ng and Jordan")
    curves.add_argument("--repeats", type=int, default=20, help="draws of the data (default 20)")
    curves.add_argument("--seed", type=int, default=0, help="of the draws")
    apart = kinds.add_parser("divergences", help="what each says of disjoint supports")
    for kind in (curves, apart):
        kind.add_argument("--out", type=Path, required=True, help="folder of the plot and the CSV")
