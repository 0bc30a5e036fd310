"""Ng and Jordan's comparison: error against sample size of a generative and a discriminative twin.

Gaussian naive Bayes with shared variances and logistic regression (maximum likelihood) hold the
same linear classifiers. Naive Bayes reaches its asymptote with O(log D) samples, the logistic twin
its own, which is never higher, with O(D) (Ng and Jordan 2001, "On discriminative vs. generative
classifiers").

Data: tables of scikit-learn, with the error on a held-out third; and two Gaussians N(+-mu, S) in 20
dimensions, where the error of a linear classifier is a closed form, and so is Bayes':
    P(w x + b > 0 | Y = 0) = Phi((b - w mu) / (w S w)^1/2);    Bayes: Phi(-(mu S^-1 mu)^1/2)
S = I (independent) meets the assumption of naive Bayes; S with correlations of 0.15 does not.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gmkernels import noise
from gmkernels.models.classifier import GaussianNaiveBayes, LogisticRegression

MODELS = ("naive Bayes", "logistic regression")
TABLES = ("breast_cancer", "digits", "iris", "wine")
GAUSSIANS = ("correlated", "independent")
NAMES = (*GAUSSIANS, *TABLES)
Model = GaussianNaiveBayes | LogisticRegression


class Row(NamedTuple):
    """The mean test error of a model after `size` samples, over `repeats` draws of the data."""

    data: str
    model: str
    size: int
    error: float
    standard_error: float
    repeats: int
    bayes_error: float  # NaN where it is not known


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is classified.

    Attributes:
        name, classes: what, and K.
        sizes: numbers of training samples, ascending.
        draw: key -> training pool x float64 [M, D], y int64 [M], M >= the last size, and the error
            of a model; both anew for each repetition.
        bayes: the least error possible; NaN where it is not known.
    """

    name: str
    classes: int
    sizes: tuple[int, ...]
    draw: Callable[[Tensor], tuple[Tensor, Tensor, Callable[[Model], float]]]
    bayes: float = math.nan


def _geometric(low: int, high: int, n: int) -> tuple[int, ...]:
    return tuple(sorted({round(low * (high / low) ** (i / (n - 1))) for i in range(n)}))


def _phi(z: float) -> float:
    return math.erfc(-z / math.sqrt(2)) / 2


def table(name: str) -> Problem:
    """A table of scikit-learn: breast_cancer, digits, iris or wine. ImportError without it."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(f"{name}: needs scikit-learn; pip install scikit-learn") from error
    bunch = getattr(datasets, f"load_{name}")()
    x, y = torch.from_numpy(bunch.data).double(), torch.from_numpy(bunch.target).long()
    held, classes = len(x) // 3, int(y.max()) + 1

    def draw(key: Tensor) -> tuple[Tensor, Tensor, Callable[[Model], float]]:
        order = noise.uniform((len(x),), seed=key, dtype=torch.float64).argsort()
        test, pool = order[:held], order[held:]
        return x[pool], y[pool], lambda model: 1 - model.score(x[test], y[test])

    return Problem(name, classes, _geometric(2 * classes, len(x) - held, 10), draw)


def gaussians(name: str, *, features: int = 20, most: int = 2000, bayes: float = 0.1) -> Problem:
    """Two Gaussians, "correlated" (0.15 between each two features) or "independent".

    mu is the same in the first half of the features and 0 in the second: the second tells what the
    first have in common, which naive Bayes cannot hear.

    Args: features: D. most: the largest size. bayes: the error of the best classifier.
    """
    correlation = {"correlated": 0.15, "independent": 0.0}[name]
    covariance = torch.full((features, features), correlation, dtype=torch.float64)
    covariance.fill_diagonal_(1.0)
    root = torch.linalg.cholesky(covariance)
    mu = (torch.arange(features) < features // 2).double()
    distance = float(mu @ torch.cholesky_solve(mu[:, None], root)) ** 0.5
    mu = mu * float(-torch.special.ndtri(torch.tensor(bayes, dtype=torch.float64))) / distance

    def error(model: Model) -> float:
        if isinstance(model, LogisticRegression):
            w, b = model.weight[0], model.intercept[0]
        else:  # shared variances: log P(1|x) - log P(0|x) is linear
            precision = (-model.logvar[0]).exp()
            w = precision * (model.mean[1] - model.mean[0])
            b = model.log_prior[1] - model.log_prior[0] - w @ model.mean.mean(0)
        scale = float(w @ covariance @ w) ** 0.5
        shift, bias = float(w @ mu), float(b)
        return (_phi((bias - shift) / scale) + _phi(-(bias + shift) / scale)) / 2

    def draw(key: Tensor) -> tuple[Tensor, Tensor, Callable[[Model], float]]:
        y = (noise.uniform((most, 1), seed=key)[:, 0] > 0.5).long()
        eps = noise.normal((most, features), seed=key, stream=1, dtype=torch.float64)
        return (2 * y - 1)[:, None] * mu + eps @ root.T, y, error

    return Problem(name, 2, _geometric(10, most, 12), draw, bayes)


def problem(name: str) -> Problem:
    """The problem of a name in NAMES."""
    return gaussians(name) if name in GAUSSIANS else table(name)


def each_class_first(y: Tensor, classes: int, times: int = 2) -> Tensor:
    """An order of y, int64 [M], that begins with `times` of each class and keeps the rest's."""
    seen = torch.nn.functional.one_hot(y, classes).cumsum(0).gather(1, y[:, None])[:, 0]
    return (seen > times).long().argsort(stable=True)


def curves(found: Problem, *, repeats: int, seed: int) -> list[Row]:
    """The rows of each model in turn, by size.

    A repetition draws a pool; its first m rows are the samples of size m, for both models.
    """
    errors = torch.zeros(len(MODELS), len(found.sizes), repeats, dtype=torch.float64)
    for r in range(repeats):
        x, y, error = found.draw(noise.fold_in(noise.key(seed), r))
        order = each_class_first(y, found.classes)
        for i, size in enumerate(found.sizes):
            part = order[:size]
            naive = GaussianNaiveBayes(x.shape[1], found.classes, shared=True).double()
            logistic = LogisticRegression(x.shape[1], found.classes).double()
            errors[0, i, r] = error(naive.fit(x[part], y[part]))
            errors[1, i, r] = error(logistic.fit(x[part], y[part], tolerance=1e-6))
    mean, spread = errors.mean(2), errors.std(2, correction=0) / repeats**0.5
    return [
        Row(found.name, model, size, float(mean[k, i]), float(spread[k, i]), repeats, found.bayes)
        for k, model in enumerate(MODELS)
        for i, size in enumerate(found.sizes)
    ]
