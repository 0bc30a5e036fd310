"""What models that are fitted to a table share: checks of x [N, D] and of labels, choice of rows.

Such a model has buffers for parameters: they move, cast and save with the module. x has the model's
dtype, float32 or float64, and its device; sums over rows are taken in float64 around the mean, so
that a variance of float32 data far from 0 stays positive.
"""

import math

import torch
from torch import Tensor, nn

from gmkernels import noise


def count(owner: str, name: str, value: int, low: int = 1) -> int:
    """value, a whole number >= low; or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{owner}: {name} must be a whole number >= {low}, got {value!r}")
    return value


def positive(owner: str, name: str, value: float) -> float:
    """value, a finite number > 0; or ValueError."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{owner}: {name} must be a finite number > 0, got {value!r}")
    return value


def choose(p: Tensor, n: int, key: Tensor) -> Tensor:
    """n indices drawn by the probabilities p [K], int64 [n]; row i is a function of (key, i).

    An index of probability 0 is never drawn.
    """
    u = noise.uniform((n, 1), seed=key, dtype=torch.float64, device=p.device)  # in (0, 1]
    total = p.double().cumsum(0)
    return torch.searchsorted(total / total[-1], u[:, 0].contiguous())


class Fitted(nn.Module):
    """A model of rows of D features whose parameters come from fit().

    Raises (every verb): TypeError, ValueError for an x other than said here; fit() and predict()
    for values that are not finite, too, while log-densities pass NaN on in its row. RuntimeError
    for a verb that needs a fit before there was one. Log-densities are differentiable in x.
    """

    fitted: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.name = type(self).__name__
        self.features = count(self.name, "features", features)
        self.register_buffer("fitted", torch.zeros(()))  # 1 after a fit: saved with the rest

    def check_fitted(self, verb: str) -> None:
        """RuntimeError before the first fit, or before a fitted state was loaded."""
        if not self.fitted:
            raise RuntimeError(f"{self.name}.{verb}: the model is not fitted; call fit() first")

    def check(self, verb: str, x: Tensor, *, finite: bool = False) -> None:
        """x must be [N, D] of the model's dtype and device, and finite where asked."""
        where = f"{self.name}.{verb}: x"
        if not isinstance(x, Tensor):
            raise TypeError(f"{where} must be a tensor, got {type(x).__name__}")
        dtype = self.fitted.dtype
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{self.name}.{verb}: the model must be float32 or float64, is {dtype}")
        if x.dtype != dtype:
            raise TypeError(f"{where} must be {dtype} like the model, got {x.dtype}; cast either")
        if x.device != self.fitted.device:
            raise ValueError(f"{where} must be on {self.fitted.device}, got {x.device}")
        if x.dim() != 2 or x.shape[1] != self.features:
            raise ValueError(f"{where} must be [N, {self.features}], got {tuple(x.shape)}")
        if finite and not bool(x.isfinite().all()):
            row = int((~x.isfinite()).any(1).nonzero()[0])
            raise ValueError(f"{where} must be finite, row {row} is not; drop or fill such rows")

    def check_data(self, x: Tensor, *, least: int = 1) -> None:
        """x of fit(): finite, with at least `least` rows."""
        self.check("fit", x, finite=True)
        if len(x) < least:
            raise ValueError(f"{self.name}.fit: x must have at least {least} rows, got {len(x)}")

    def key(self, seed: noise.Seed, verb: str = "sample") -> Tensor:
        """The key of a draw; from torch's default generator if seed is None."""
        return noise.resolve_key(f"{self.name}.{verb}", seed, 0, None, self.fitted.device)

    def normal(self, n: int, columns: int, key: Tensor) -> Tensor:
        """Normals [n, columns] of the model's dtype, of a stream that choose() does not use."""
        like = self.fitted
        return noise.normal((n, columns), seed=key, stream=1, dtype=like.dtype, device=like.device)


class Density(Fitted):
    """p(x), exact: log_prob(x), and scikit-learn's names for it."""

    log_prob_kind = "exact"
    free_parameters: int  # for bic()

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), [N] nats of x's dtype."""
        raise NotImplementedError

    def score_samples(self, x: Tensor) -> Tensor:
        """log_prob(x) under scikit-learn's name."""
        return self.log_prob(x)

    def score(self, x: Tensor) -> float:
        """The mean of log p(x), nats."""
        self.check("score", x, finite=True)
        return float(self.log_prob(x).double().mean())

    def bic(self, x: Tensor) -> float:
        """-2 sum log p(x) + (free parameters) log N: lower is better. Schwarz 1978."""
        self.check("bic", x, finite=True)
        total = float(self.log_prob(x).double().sum())
        return self.free_parameters * math.log(len(x)) - 2 * total


class Classifier(Fitted):
    """P(Y|X) of labels 0, ..., K - 1."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__(features)
        self.classes = count(self.name, "classes", classes, low=2)

    def check_labelled(self, x: Tensor, y: Tensor, *, each: int = 1, why: str = "") -> Tensor:
        """The checks of fit(x, y): x finite, y int64 [N] in [0, K), each class `each` times.

        Returns: rows of each class, int64 [K].
        """
        self.check_data(x)
        self.check_labels("fit", x, y)
        counts = torch.bincount(y, minlength=self.classes)
        for k, found in enumerate(counts.tolist()):
            if found < each:
                raise ValueError(
                    f"{self.name}.fit: each class must have at least {each} samples{why}, class "
                    f"{k} of {self.classes} has {found}; add some, or drop the class"
                )
        return counts

    def check_labels(self, verb: str, x: Tensor, y: Tensor) -> None:
        """y must be int64 [N] in [0, K), beside x."""
        where = f"{self.name}.{verb}: y"
        if not isinstance(y, Tensor) or y.dtype != torch.int64:
            found = y.dtype if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(f"{where} must be an int64 tensor, got {found}; use .long()")
        if y.shape != x.shape[:1] or y.device != x.device:
            raise ValueError(
                f"{where} must be [{len(x)}] on {x.device} like x, got {tuple(y.shape)} on "
                f"{y.device}"
            )
        if len(y) and not (int(y.min()) >= 0 and int(y.max()) < self.classes):
            raise ValueError(
                f"{where} must lie in [0, {self.classes}), got {int(y.min())} to {int(y.max())}; "
                "number the labels from 0, or set classes="
            )

    def predict_log_proba(self, x: Tensor) -> Tensor:
        """log P(Y|X), [N, K] nats."""
        raise NotImplementedError

    def predict_proba(self, x: Tensor) -> Tensor:
        """P(Y|X), [N, K]."""
        return self.predict_log_proba(x).exp()

    def predict(self, x: Tensor) -> Tensor:
        """argmax_y P(y|x), int64 [N]."""
        self.check("predict", x, finite=True)
        return self.predict_log_proba(x).argmax(1)

    def score(self, x: Tensor, y: Tensor) -> float:
        """The share of rows whose label is predicted."""
        self.check("score", x)
        self.check_labels("score", x, y)
        return float((self.predict(x) == y).double().mean())
