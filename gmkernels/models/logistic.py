"""Logistic regression: P(Y|X) alone, linear in the logits, by maximum likelihood or MAP.

    K = 2: P(Y = 1|X) = sigmoid(theta^T X);    K > 2: P(Y = k|X) = softmax_k(theta_k^T X)
    theta = argmin -sum_i log P(y_i|x_i) - log p(theta)
    Gaussian prior, N(0, s^2): + |theta|^2 / (2 s^2);    Laplace prior: + |theta|_1 / s
The bias has no prior. The fit runs in float64 in coordinates z = (x - mean) / std, which changes
nothing but the conditioning: smooth objectives by L-BFGS, the Laplace prior's by FISTA (see
minimise.py). Both stop when each coordinate of the mean loss's gradient (for Laplace: of the
gradient mapping) is below a tolerance.
"""

import dataclasses
import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from gmkernels.models.minimise import minimise_l1, minimise_smooth
from gmkernels.models.tabular import Classifier, count, positive


@dataclasses.dataclass(frozen=True)
class GaussianPrior:
    """Weights ~ N(0, scale^2), the L2 penalty: scikit-learn's C is scale^2."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        positive("GaussianPrior", "scale", self.scale)


@dataclasses.dataclass(frozen=True)
class LaplacePrior:
    """Weights ~ Laplace(0, scale), the L1 penalty, which sets weights to exactly 0: C is scale."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        positive("LaplacePrior", "scale", self.scale)


class LogisticRegression(Classifier):
    """Logistic regression of K classes.

    Args:
        features, classes: D and K.
        prior: of the weights: None (maximum likelihood), GaussianPrior or LaplacePrior.

    Attributes:
        weight: [1, D] for K = 2, the logit of class 1; else [K, D], rows up to a shared shift.
        bias: [1] or [K], at x = centre; intercept has it at 0.
        centre: [D], the mean of the training data.

    >>> import torch
    >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    >>> model = LogisticRegression(1, 2, prior=GaussianPrior(1.0))
    >>> model.fit(x, torch.tensor([0, 1, 0, 1])).predict(x)
    tensor([0, 0, 1, 1])
    """

    log_prob_kind = "none"
    weight: Tensor
    bias: Tensor
    centre: Tensor

    def __init__(
        self, features: int, classes: int, *, prior: GaussianPrior | LaplacePrior | None = None
    ) -> None:
        super().__init__(features, classes)
        self.prior = prior
        rows = 1 if classes == 2 else classes
        self.register_buffer("weight", torch.zeros(rows, features))
        self.register_buffer("bias", torch.zeros(rows))
        self.register_buffer("centre", torch.zeros(features))

    @property
    def intercept(self) -> Tensor:
        """The bias at x = 0, [1] or [K]."""
        return self.bias - self.weight @ self.centre

    @torch.no_grad()
    def fit(
        self, x: Tensor, y: Tensor, *, iterations: int = 10_000, tolerance: float = 1e-8
    ) -> "LogisticRegression":
        """The weights of x [N, D], y int64 [N]; returns the model.

        A constant feature gets weight 0. Without a prior, classes that a plane separates have no
        maximum: the result then separates them, with weights as large as the tolerance made them.

        Args:
            iterations: at most so many; then RuntimeWarning.
            tolerance: see the module.
        Raises ValueError: a class without a sample, one class only.
        """
        count(f"{self.name}.fit", "iterations", iterations)
        positive(f"{self.name}.fit", "tolerance", tolerance)
        self.check_labelled(x, y)
        wide = x.double()
        constant = wide.amax(0) == wide.amin(0)
        mean, std = wide.mean(0), wide.std(0, correction=0).masked_fill(constant, 1)
        z = ((wide - mean) / std).masked_fill(constant, 0)
        z = F.pad(z, (0, 1), value=1.0)  # [N, D + 1], the bias last
        theta = z.new_zeros(len(self.weight), self.features + 1)
        left = self._minimise(z, y, std, theta, iterations, tolerance)
        if left > tolerance:
            warnings.warn(
                f"{self.name}.fit: stopped at a gradient of {left:.1g}, above {tolerance:g}; raise "
                "iterations= or tolerance=",
                RuntimeWarning,
                stacklevel=3,
            )
        self.weight.copy_(theta[:, :-1] / std)
        self.centre.copy_(mean)
        # The centre as stored is the mean rounded: the bias moves with it.
        self.bias.copy_(theta[:, -1] + (self.centre.double() - mean) @ (theta[:, :-1] / std).T)
        self.fitted.fill_(1)
        return self

    def _minimise(
        self, z: Tensor, y: Tensor, std: Tensor, theta: Tensor, iterations: int, tolerance: float
    ) -> float:
        n, first = len(z), self.classes - len(theta)
        target = F.one_hot(y, self.classes).to(z.dtype)
        # A weight of x is theta / std, and the bias has no prior.
        rate = F.pad(1 / std, (0, 1))
        ridge = torch.zeros_like(rate)
        if isinstance(self.prior, GaussianPrior):
            ridge = (rate / self.prior.scale).square() / n

        def objective(theta: Tensor) -> tuple[Tensor, Tensor]:
            logits = F.pad(z @ theta.T, (first, 0))  # class 0 of two has logit 0
            log_p = logits.log_softmax(1)
            value = -(target * log_p).sum() / n + (ridge * theta.square()).sum() / 2
            gradient = (log_p.exp() - target)[:, first:].T @ z / n + ridge * theta
            return value, gradient

        if isinstance(self.prior, LaplacePrior):
            # The softmax's Hessian is at most 1/2, the sigmoid's 1/4.
            curvature = torch.linalg.eigvalsh(z.T @ z / n)[-1] * (0.25 if first else 0.5)
            penalty = rate / (self.prior.scale * n)
            return minimise_l1(objective, penalty, float(curvature), theta, iterations, tolerance)
        return minimise_smooth(objective, theta, iterations, tolerance)

    def logits(self, x: Tensor) -> Tensor:
        """Logits of P(Y|x) up to a shift a row, [N, K]."""
        self.check("logits", x)
        self.check_fitted("logits")
        linear = F.linear(x - self.centre, self.weight, self.bias)
        return F.pad(linear, (self.classes - len(self.weight), 0))

    def predict_log_proba(self, x: Tensor) -> Tensor:
        return self.logits(x).log_softmax(1)

    def log_prob(self, x: Tensor) -> Tensor:
        """Raises: there is no P(X) in this model."""
        raise RuntimeError(
            f"{self.name}.log_prob: the model is of P(Y|X) alone and has no P(X); take "
            "predict_log_proba(x), or a generative classifier such as GaussianNaiveBayes"
        )
