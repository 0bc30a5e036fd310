"""Naive Bayes: a model of P(X, Y) whose features are independent given the class.

    P(X, Y) = P(Y) prod_j P(X_j|Y);    P(Y = k) = count_k / N
    P(X) = sum_y P(X, y);              P(Y|X) = P(X, Y) / P(X)
Gaussian: X_j|Y = k ~ N(mu_kj, sigma_kj^2). With sigma_j shared by the classes, log P(Y|X) is linear
in X: the generative twin of logistic regression (Ng and Jordan 2001). Bernoulli: X_j in {0, 1}.
Everything in nats.
"""

import torch
from torch import Tensor

from gmkernels import noise
from gmkernels.models.tabular import Classifier, Density, choose, positive
from gmkernels.ops.likelihood import bernoulli_nll, gaussian_nll


class NaiveBayes(Classifier, Density):
    """What P(X|Y) of a subclass gives: joint, marginal, posterior, and draws of (X, Y)."""

    log_prior: Tensor  # [K]

    def __init__(self, features: int, classes: int) -> None:
        super().__init__(features, classes)
        self.register_buffer("log_prior", torch.zeros(classes))

    def log_likelihood(self, x: Tensor) -> Tensor:
        """log P(x|y) for each y, [N, K]."""
        raise NotImplementedError

    def draw(self, y: Tensor, key: Tensor) -> Tensor:
        """x ~ P(X|y), [N, D], of labels y [N]."""
        raise NotImplementedError

    def log_joint(self, x: Tensor) -> Tensor:
        """log P(x, y) for each y, [N, K]."""
        return self.log_likelihood(x) + self.log_prior

    def log_prob(self, x: Tensor) -> Tensor:
        """log P(x), [N]: the joint summed over y."""
        return self.log_joint(x).logsumexp(1)

    def log_marginal(self, x: Tensor) -> Tensor:
        """log_prob(x), named for what it is here: log sum_y P(x, y), [N]."""
        return self.log_prob(x)

    def predict_log_proba(self, x: Tensor) -> Tensor:
        return self.log_joint(x).log_softmax(1)

    def score(self, x: Tensor, y: Tensor) -> float:  # type: ignore[override]
        """The share of rows whose label is predicted."""
        return Classifier.score(self, x, y)

    def sample(self, n: int, *, seed: noise.Seed = None) -> tuple[Tensor, Tensor]:
        """n draws (x [n, D], y int64 [n]) of P(X, Y); row i is a function of (seed, i)."""
        self.check_fitted("sample")
        key = self.key(seed)
        y = choose(self.log_prior.exp(), n, key)
        return self.draw(y, key), y


class GaussianNaiveBayes(NaiveBayes):
    """Naive Bayes with Gaussian features, by maximum likelihood.

    Args:
        features, classes: D and K.
        shared: one variance a feature for all classes, in place of one a feature and class.
        floor: this times the largest variance of a feature is added to each variance, so that a
            feature that is constant (in a class) keeps a density; scikit-learn's var_smoothing.

    >>> import torch
    >>> x = torch.tensor([[0.0], [1.0], [4.0], [5.0]])
    >>> model = GaussianNaiveBayes(1, 2).fit(x, torch.tensor([0, 0, 1, 1]))
    >>> model.predict(torch.tensor([[2.0], [3.0]]))
    tensor([0, 1])
    """

    mean: Tensor  # [K, D]
    logvar: Tensor  # [K, D], or [1, D] shared

    def __init__(
        self, features: int, classes: int, *, shared: bool = False, floor: float = 1e-9
    ) -> None:
        super().__init__(features, classes)
        self.shared, self.floor = shared, positive(self.name, "floor", floor)
        self.register_buffer("mean", torch.zeros(classes, features))
        self.register_buffer("logvar", torch.zeros(1 if shared else classes, features))
        self.free_parameters = classes - 1 + self.mean.numel() + self.logvar.numel()

    @torch.no_grad()
    def fit(self, x: Tensor, y: Tensor) -> "GaussianNaiveBayes":
        """Means, variances and class frequencies of x [N, D], y int64 [N]; returns the model.

        Raises ValueError: a class with no sample, or with one where it needs a variance of its own;
        x the same in all rows.
        """
        least, why = (1, "") if self.shared else (2, " for variances of its own (or shared=True)")
        counts = self.check_labelled(x, y, each=least, why=why)
        wide, n = x.double(), counts.double()[:, None]
        mean = wide.new_zeros(self.mean.shape).index_add_(0, y, wide) / n
        square = (wide - mean[y]).square()  # around the mean: E[x^2] - mu^2 cancels
        if self.shared:
            variance = square.mean(0, keepdim=True)
        else:
            variance = torch.zeros_like(mean).index_add_(0, y, square) / n
        largest = float(wide.var(0, correction=0).max())
        if largest == 0:
            raise ValueError(f"{self.name}.fit: some feature of x must vary, all are constant")
        self.mean.copy_(mean)
        self.logvar.copy_((variance + self.floor * largest).log())
        self.log_prior.copy_((counts.double() / len(x)).log())
        self.fitted.fill_(1)
        return self

    def log_likelihood(self, x: Tensor) -> Tensor:
        self.check("log_likelihood", x)
        self.check_fitted("log_likelihood")
        rows = zip(self.mean, self.logvar.expand_as(self.mean), strict=True)
        log_p = [-gaussian_nll(x, m.expand_as(x), l.expand_as(x)) for m, l in rows]
        return torch.stack(log_p, 1)

    def draw(self, y: Tensor, key: Tensor) -> Tensor:
        std = (self.logvar.expand_as(self.mean) / 2).exp()
        return self.mean[y] + std[y] * self.normal(len(y), self.features, key)


class BernoulliNaiveBayes(NaiveBayes):
    """Naive Bayes with features in {0, 1}.

    Args:
        features, classes: D and K.
        alpha: observations of 0 and of 1 that are added to each feature and class (the mode under
            a Beta(1 + alpha, 1 + alpha) prior); 1 is Laplace's rule.

    >>> import torch
    >>> x = torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    >>> model = BernoulliNaiveBayes(2, 2).fit(x, torch.tensor([0, 0, 1, 1]))
    >>> model.predict_proba(x[:1])
    tensor([[0.7500, 0.2500]])
    """

    logits: Tensor  # [K, D]

    def __init__(self, features: int, classes: int, *, alpha: float = 1.0) -> None:
        super().__init__(features, classes)
        self.alpha = positive(self.name, "alpha", alpha)
        self.register_buffer("logits", torch.zeros(classes, features))
        self.free_parameters = classes - 1 + self.logits.numel()

    def check(self, verb: str, x: Tensor, *, finite: bool = False) -> None:
        """As in Fitted, and each value 0 or 1, or NaN where that passes."""
        super().check(verb, x, finite=finite)
        if not bool(((x == 0) | (x == 1) | x.isnan()).all()):
            raise ValueError(f"{self.name}.{verb}: x must hold 0 and 1; cut it at a threshold")

    @torch.no_grad()
    def fit(self, x: Tensor, y: Tensor) -> "BernoulliNaiveBayes":
        """Frequencies of x [N, D] of 0 and 1, y int64 [N]; returns the model."""
        counts = self.check_labelled(x, y).double()
        ones = counts.new_zeros(self.logits.shape).index_add_(0, y, x.double())
        zeros = counts[:, None] - ones
        self.logits.copy_(((ones + self.alpha) / (zeros + self.alpha)).log())
        self.log_prior.copy_((counts / len(x)).log())
        self.fitted.fill_(1)
        return self

    def log_likelihood(self, x: Tensor) -> Tensor:
        self.check("log_likelihood", x)
        self.check_fitted("log_likelihood")
        return torch.stack([-bernoulli_nll(x, logits.expand_as(x)) for logits in self.logits], 1)

    def draw(self, y: Tensor, key: Tensor) -> Tensor:
        p = self.logits.sigmoid()[y]
        u = noise.uniform(p.shape, seed=key, stream=1, dtype=p.dtype, device=p.device)
        return (u <= p).to(p.dtype)
