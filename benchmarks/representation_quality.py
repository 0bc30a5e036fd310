"""What self-supervised features are worth: `python -m benchmarks.representation_quality --run ...`.

A logistic regression learns the digits' classes from features of the train digits, of all 1000 and
of few labels a class (the mean of ten draws), and is judged on the 447 test digits. Features are
the pixels, an untrained encoder's, and those of each run of `train simclr`, `byol` or `barlow_twins
--data digits`; each kind is centred and scaled to mean square 1 by its train rows.

Writes representation-quality.csv to --out (build/bench unless given).
"""

import argparse
import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.probes import commit
from gmkernels import checkpoint, data, noise, runs

LABELS = (5, 10, 20)  # a class
DRAWS = 10
COLUMNS = ("features", "labels_a_class", "accuracy", "commit")


def few(labels: Tensor, count: int, draw: int) -> Tensor:
    """Indices of `count` random rows of each class."""
    order = noise.uniform((len(labels),), seed=noise.fold_in(noise.key(0), draw)).argsort()
    chosen = [order[labels[order] == label][:count] for label in labels.unique()]
    return torch.cat(chosen)


def accuracies(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor
) -> Iterator[tuple[Any, float]]:
    """(labels a class or "all", share of the test rows that a linear probe gets right)."""
    from sklearn.linear_model import LogisticRegression

    mean = train.mean(0)
    scale = (train - mean).square().mean().sqrt()
    train, test = (train - mean) / scale, (test - mean) / scale

    def probe(index: Tensor) -> float:
        model = LogisticRegression(max_iter=5000).fit(train[index], train_labels[index])
        return model.score(test, test_labels)

    for count in LABELS:
        found = [probe(few(train_labels, count, draw)) for draw in range(DRAWS)]
        yield count, sum(found) / DRAWS
    yield "all", probe(torch.arange(len(train)))


@torch.no_grad()
def rows(folders: list[Path]) -> Iterator[tuple[Any, ...]]:
    """A row for each kind of features and number of labels."""
    images = data.digits()
    parts = images.unit(images.train), images.unit(images.test)
    kinds: list[tuple[str, Any]] = [("pixels", lambda x: x)]
    for config, model in map(runs.load, folders):
        if len(kinds) == 1:
            kinds.append(("untrained encoder", runs.build(config).eval().features))
        kinds.append((config.model, model.features))
    for name, features in kinds:
        train, test = map(features, parts)
        for count, share in accuracies(train, images.train_labels, test, images.test_labels):
            yield name, count, share


def main() -> None:
    """Prints and writes every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--run", type=Path, action="append", default=[], help="a run on digits; may be repeated"
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    args = parser.parse_args()
    found: list[tuple[Any, ...]] = []
    for row in rows(args.run):
        found.append((*row[:-1], f"{row[-1]:.4f}", commit()))
        print(*found[-1], sep=", ", flush=True)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *found])
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_atomically(args.out / "representation-quality.csv", text.getvalue().encode())


if __name__ == "__main__":
    main()
