"""Every paradigm on one data set: a table, comparison.csv and comparison.png.

The time is dealt out by shares: a recipe has its part of what is left, takes as many steps as fit
into it beside its test and samples (at most its own default). A finished row is written at once,
and the same command goes on after it. Run folders are those of `train`: `sample` draws from them.
"""

import contextlib
import csv
import dataclasses
import io
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmkernels import checkpoint, data, dispatch, metrics, noise, pictures, runs, train
from gmkernels.models.classifier import GaussianPrior, LogisticRegression
from gmkernels.ops.elementwise import dequantize
from gmkernels.paradigms import PARADIGMS, Paradigm
from gmkernels.recipes import RECIPES, option_defaults

ROW, SETTINGS = "row.json", "settings.json"
SHOWN = 16  # pictures of a row of comparison.png
ROUNDS = 5  # steps timed on each side, after one that is not
LEAST = 10  # steps
PART = 8  # one in so many test images is tested to know how long the test takes
SAMPLES = 0.5  # seconds to draw in for one of the test: at least the 50 steps of T = 200's bound
TRAIN, TEST, DRAWN = range(3)  # what the seed is folded with
NAMES = tuple(paradigm.name for paradigm in PARADIGMS)


@dataclasses.dataclass(frozen=True)
class Row:
    """What was found of a paradigm; NaN where there is nothing to say.

    Attributes:
        score, measure: mean over the test part, and what it is: of "nats" -log p(x) or its bound.
        precision, recall: of as many samples as there are test images, k = 3, on pixels.
        classes: that a logistic regression finds in 1 % of the samples or more.
        fused, unfused: milliseconds a training step, as dispatched and on the reference.
        steps, seconds: of training; of all that the row took.
        pictures: the first samples, flat, in [0, 1].
    """

    paradigm: str
    score: float
    measure: str
    precision: float
    recall: float
    classes: float
    fused: float
    unfused: float
    steps: int
    seconds: float
    pictures: list[list[float]]


class Judge:
    """Measures of samples, flat rows in [0, 1], against the test part."""

    def __init__(self, images: data.Images) -> None:
        assert images.train_labels is not None
        self.real = images.unit(images.test)
        self.classes = int(images.train_labels.max()) + 1
        model = LogisticRegression(self.real.shape[1], self.classes, prior=GaussianPrior(1.0))
        self.model = model.fit(images.unit(images.train), images.train_labels, tolerance=1e-4)

    def __call__(self, x: Tensor) -> dict[str, float]:
        """precision, recall and classes of a Row."""
        precision, recall = metrics.precision_recall(x, self.real, k=3)
        counts = torch.bincount(self.model.predict(x), minlength=self.classes)
        return {
            "precision": precision,
            "recall": recall,
            "classes": float((counts >= 0.01 * len(x)).sum()),
        }


UNJUDGED = {"precision": math.nan, "recall": math.nan, "classes": math.nan}


def _begun(config: runs.Config, images: data.Images) -> Any:
    """A new model as it is when its last stage begins."""
    model, turned = runs.build(config), config.recipe.turned
    if turned is not None:
        x = runs.model_input(config, model, images, images.train[: train.TURN_ROWS])
        turned(model.eval(), x, runs.fold(config, runs.STEPS))
    return model


@torch.no_grad()
def test_seconds(config: runs.Config, images: data.Images) -> float:
    """About how long the test takes: a part of it, of a new model."""
    model = _begun(config, images).eval()
    rows = images.test[::PART]
    x, start = runs.model_input(config, model, images, rows), time.perf_counter()
    config.recipe.score(model, x, runs.fold(config, runs.TEST))
    return (time.perf_counter() - start) * len(images.test) / len(rows)


def step_seconds(config: runs.Config, images: data.Images, *, first: bool) -> tuple[float, float]:
    """Seconds of a training step of a new model: as dispatched, and on the reference.

    Medians of steps that take turns. first: of the recipe's first part alone.
    """
    recipe = config.recipe
    with runs.own_generator(config):
        model, key = _begun(config, images), runs.fold(config, runs.STEPS)
        part = getattr(model, recipe.first) if first and recipe.first else model
        part.train()
        optimizer = train.optimizer_of(config, model)
        x, labels = images.batch(config.batch_size, seed=runs.fold(config, runs.BATCHES), step=0)
        x = runs.model_input(config, model, images, x)
        conditions = {} if part is not model else train.conditions_of(config, labels)
        update = recipe.update or train.training_step
        sides: dict[str, list[float]] = {"": [], "reference": []}
        for _ in range(ROUNDS + 1):
            for backend, found in sides.items():
                start = time.perf_counter()
                with dispatch.use_backend(backend) if backend else contextlib.nullcontext():
                    update(part, optimizer, x, seed=key, **conditions)
                found.append(time.perf_counter() - start)
    fused, unfused = (statistics.median(found[1:]) for found in sides.values())
    return fused, unfused


def _config(paradigm: Paradigm, images: data.Images, seed: int) -> runs.Config:
    recipe = RECIPES[paradigm.name]
    settings = runs.DEFAULTS | recipe.defaults | {"data": images.name, "seed": seed}
    settings["batch_size"] = min(settings["batch_size"], len(images.train))
    return runs.new_config(paradigm.name, images, option_defaults(recipe.build), 1, settings)


def _trained(
    paradigm: Paradigm,
    images: data.Images,
    judge: Judge,
    out: Path,
    *,
    seconds: float,
    seed: int,
) -> Row:
    """A recipe's row: trained in the folder `out`, in about `seconds`."""
    start = time.perf_counter()
    config = _config(paradigm, images, seed)
    recipe = config.recipe
    fused, unfused = step_seconds(config, images, first=False)
    if (out / runs.CONFIG).is_file():
        config = runs.read_config(out)
    else:
        share = recipe.share if recipe.first else 0.0
        each = (1 - share) * fused
        if share:
            each += share * step_seconds(config, images, first=True)[0]
        left = seconds - (1 + SAMPLES) * test_seconds(config, images)
        left -= time.perf_counter() - start
        steps = max(LEAST, min(config.steps, int(left / each)))
        config = dataclasses.replace(config, steps=steps, every=steps)
        text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
        checkpoint.write_atomically(out / runs.CONFIG, text.encode())
    print(f"{paradigm.name}: {config.steps} steps of {fused * 1000:.1f} ms", flush=True)
    model = runs.build(config)
    score = train.fit(out, config, model, images)
    if recipe.picture is None:
        key = noise.fold_in(noise.key(seed), DRAWN)
        x = runs.sample(config, model, len(images.test), key).flatten(1)
        judged = judge(x)
    else:
        x, judged = train.drawn(config, model, images).flatten(1), UNJUDGED
    return Row(
        paradigm=paradigm.name,
        score=score,
        measure=recipe.measure,
        **judged,
        fused=fused * 1000,
        unfused=unfused * 1000,
        steps=config.steps,
        seconds=time.perf_counter() - start,
        pictures=_shown(x),
    )


def _fitted(paradigm: Paradigm, images: data.Images, judge: Judge, seed: int) -> Row:
    """A classic paradigm's row; see gmkernels.paradigms for what it is fitted to."""
    assert paradigm.classic is not None
    assert images.train_labels is not None
    start, levels, key = time.perf_counter(), images.levels, noise.key(seed)
    v, v_test = (
        levels * dequantize(x, bins=levels, seed=noise.fold_in(key, use)).double()
        for x, use in ((images.train, TRAIN), (images.test, TEST))
    )
    model = paradigm.classic(v, images.train_labels, levels)
    score = -float(model.log_prob(v_test).mean())
    drawn = model.sample(len(images.test), seed=noise.fold_in(key, DRAWN))
    drawn = drawn[0] if isinstance(drawn, tuple) else drawn
    x = images.unit(drawn.floor().clamp(0, levels - 1))
    seconds = time.perf_counter() - start
    print(f"{paradigm.name}: {seconds:.1f} s", flush=True)
    return Row(
        paradigm=paradigm.name,
        score=score,
        measure="nats",
        **judge(x),
        fused=math.nan,
        unfused=math.nan,
        steps=0,
        seconds=seconds,
        pictures=_shown(x),
    )


def _shown(x: Tensor) -> list[list[float]]:
    return [[round(value, 3) for value in row] for row in x[:SHOWN].tolist()]


def read_row(folder: Path) -> Row | None:
    """The finished row of a paradigm's folder, or None. Raises ValueError for a damaged one."""
    if not (folder / ROW).is_file():
        return None
    try:
        return Row(**json.loads((folder / ROW).read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / ROW} is damaged or of another version ({error}); remove it"
        ) from error


def compare(
    images: data.Images, out: Path, *, minutes: float, only: Sequence[str] = NAMES, seed: int = 0
) -> list[Row]:
    """Trains what is not finished in `out`, writes all that is, prints the table; returns its rows.

    Args:
        images: with labels. minutes: for all paradigms of `only`, names of NAMES, on one thread.
    """
    chosen = [paradigm for paradigm in PARADIGMS if paradigm.name in only]
    found = {p.name: read_row(out / p.name) for p in chosen}
    judge = Judge(images)
    for i, paradigm in enumerate(chosen):
        if found[paradigm.name] is not None:
            continue
        waiting = [p for p in chosen[i:] if found[p.name] is None]
        spent = sum(row.seconds for row in found.values() if row is not None)
        left = max(0.0, 60 * minutes - spent)
        folder = out / paradigm.name
        folder.mkdir(exist_ok=True)
        if paradigm.classic is not None:
            row = _fitted(paradigm, images, judge, seed)
        else:
            seconds = left * paradigm.share / sum(p.share for p in waiting)
            row = _trained(paradigm, images, judge, folder, seconds=seconds, seed=seed)
        text = json.dumps(dataclasses.asdict(row)) + "\n"
        checkpoint.write_atomically(folder / ROW, text.encode())
        found[paradigm.name] = row
        _write_csv(out, [row for row in found.values() if row is not None])
    rows = [row for row in found.values() if row is not None]
    _write_csv(out, rows)
    draw(out / "comparison.png", images, rows)
    print(table(rows, judge(_reference(images))))
    return rows


def _reference(images: data.Images) -> Tensor:
    """Training images, as many as there are test images at most."""
    return images.unit(images.train[: len(images.test)])


def _write_csv(out: Path, rows: Sequence[Row]) -> None:
    names = [field.name for field in dataclasses.fields(Row) if field.name != "pictures"]
    said = ("specified", "density", "objective", "drawn", "likelihood")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([names[0], *said, *names[1:]])
    for row in rows:
        paradigm = _paradigm(row)
        values = [getattr(row, name) for name in names[1:]]
        shown = [f"{v:.6g}" if isinstance(v, float) else v for v in values]
        writer.writerow([row.paradigm, *(getattr(paradigm, name) for name in said), *shown])
    checkpoint.write_atomically(out / "comparison.csv", text.getvalue().encode())


def _paradigm(row: Row) -> Paradigm:
    return PARADIGMS[NAMES.index(row.paradigm)]


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def table(rows: Sequence[Row], reference: dict[str, float]) -> str:
    """Markdown: a line a row, and one of training images, precision, recall and classes of which
    are `reference`."""
    header = [
        *("paradigm", "what is specified", "induced p(x)", "objective", "samples"),
        *("log-likelihood, nats", "precision", "recall", "classes", "ms a step: fused, unfused"),
    ]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        p = _paradigm(row)
        score = f"-{row.score:.2f}, {p.likelihood}"
        if p.likelihood == "none":
            score = f"none; {row.measure} {row.score:.2f}"
        lines.append(
            [
                *(p.name, p.specified, p.density, p.objective, p.drawn, score),
                *(_number(row.precision, 2), _number(row.recall, 2), _number(row.classes, 0)),
                "" if math.isnan(row.fused) else f"{row.fused:.1f}, {row.unfused:.1f}",
            ]
        )
    digits = {"precision": 2, "recall": 2, "classes": 0}
    measured = [_number(reference[name], d) for name, d in digits.items()]
    lines.append(["training images", "", "", "", "", "", *measured, ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(path: Path, images: data.Images, rows: Sequence[Row]) -> None:
    """Writes a row of pictures a paradigm, below one of test images, as one PNG."""
    from matplotlib.figure import Figure

    named: list[tuple[str, Any]] = [("test images", images.unit(images.test[:SHOWN]).tolist())]
    named += [(row.paradigm.replace("_", " "), row.pictures) for row in rows]
    figure = Figure(figsize=(9, 0.5 * len(named)))
    figure.subplots_adjust(left=0.16, right=0.99, bottom=0.01, top=0.99, hspace=0.1)
    for i, (name, flat) in enumerate(named):
        axes = figure.add_subplot(len(named), 1, i + 1)
        cells = torch.ones(SHOWN, images.height, images.width + 1)
        x = torch.tensor(flat).view(-1, images.height, images.width)
        cells[: len(x), :, : images.width] = x
        axes.imshow(cells.transpose(0, 1).flatten(1), cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        axes.spines[:].set_visible(False)
    pictures.save_figure(path, figure)


def check(out: Path, settings: dict[str, Any]) -> None:
    """Keeps the settings in `out`, or raises ValueError where it holds a comparison of others."""
    path = out / SETTINGS
    if not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_atomically(path, (json.dumps(settings) + "\n").encode())
        return
    stored = json.loads(path.read_text())
    if stored != settings:
        raise ValueError(
            f"--out {out} holds a comparison of {stored}, not of {settings}; choose another folder"
        )
