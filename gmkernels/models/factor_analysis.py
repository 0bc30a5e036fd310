"""Factor analysis and probabilistic PCA: a Gaussian whose covariance is low rank plus a diagonal.

    x = W z + mu + eps,  z ~ N(0, I_k),  eps ~ N(0, Psi);    p(x) = N(mu, W W^T + Psi)
    M = I + W^T Psi^-1 W;    p(z|x) = N(m, M^-1),  m = M^-1 W^T Psi^-1 (x - mu)
    log p(x) = log N(x; W m + mu, Psi) - |m|^2 / 2 - log det M / 2
The last line is Woodbury's identity with the square completed: no term of it cancels another.

Factor analysis, Psi diagonal (Joreskog 1967): for given Psi the best W is closed, from the leading
eigenpairs (l_j, u_j) of Psi^-1/2 S Psi^-1/2, S the covariance of the data; what is left,
    W = Psi^1/2 U (L - I)^1/2;   2 f(Psi) = sum_i log psi_i + s_ii / psi_i - sum_j l_j - log l_j - 1
    2 df / dpsi_i = (psi_i + (W W^T)_ii - s_ii) / psi_i^2
is minimised over log Psi by L-BFGS, where EM would crawl along the floor of a Heywood case.
Probabilistic PCA, Psi = sigma^2 I, is closed throughout (Tipping and Bishop 1999).
"""

import warnings

import torch
from torch import Tensor

from gmkernels import noise
from gmkernels.models.minimise import minimise_smooth
from gmkernels.models.tabular import Density, count, positive
from gmkernels.ops.likelihood import gaussian_nll


class LinearGaussian(Density):
    """x = W z + mu + eps with k factors z: density, posterior and draws. A subclass fits it.

    Attributes: weight W [D, k]; mean mu [D]; logvar, the logarithm of Psi's diagonal, [D].
    """

    mean: Tensor
    weight: Tensor
    logvar: Tensor

    def __init__(self, features: int, factors: int) -> None:
        super().__init__(features)
        self.factors = count(self.name, "factors", factors)
        if factors > features:
            raise ValueError(
                f"{self.name}: factors must be at most the {features} features, got {factors}"
            )
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("weight", torch.zeros(features, factors))
        self.register_buffer("logvar", torch.zeros(features))

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Checks x of fit(); mean [D] and covariance [D, D] in float64."""
        self.check_data(x, least=2)
        wide = x.double()
        mean = wide.mean(0)
        return mean, (wide - mean).T @ (wide - mean) / len(x)

    def _set(self, mean: Tensor, weight: Tensor, variance: Tensor) -> None:
        self.mean.copy_(mean)
        self.weight.copy_(weight)
        self.logvar.copy_(variance.log())
        self.fitted.fill_(1)

    def covariance(self) -> Tensor:
        """W W^T + Psi, [D, D]."""
        return self.weight @ self.weight.T + self.logvar.exp().diag()

    def _precision(self) -> tuple[Tensor, Tensor]:
        """Cholesky factor of M, [k, k], and Psi^-1 W, [D, k]."""
        scaled = self.weight * (-self.logvar).exp()[:, None]
        identity = torch.eye(self.factors, dtype=scaled.dtype, device=scaled.device)
        return torch.linalg.cholesky(identity + self.weight.T @ scaled), scaled

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """p(z|x): means [N, k], and the covariance that all rows share, [k, k]."""
        self.check("posterior", x)
        self.check_fitted("posterior")
        factor, scaled = self._precision()
        mean = torch.cholesky_solve(scaled.T @ (x - self.mean).T, factor).T
        return mean, torch.cholesky_inverse(factor)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), [N] nats."""
        self.check("log_prob", x)
        self.check_fitted("log_prob")
        m, _ = self.posterior(x)
        half_log_det = self._precision()[0].diagonal().log().sum()
        output = m @ self.weight.T + self.mean
        nll = gaussian_nll(x, output, self.logvar.expand_as(x))
        return -nll - m.square().sum(1) / 2 - half_log_det

    def sample(self, n: int, *, seed: noise.Seed = None) -> Tensor:
        """n draws, [n, D]; row i is a function of (seed, i)."""
        self.check_fitted("sample")
        z, eps = self.normal(n, self.factors + self.features, self.key(seed)).split(
            [self.factors, self.features], 1
        )
        return z @ self.weight.T + self.mean + (self.logvar / 2).exp() * eps


class FactorAnalysis(LinearGaussian):
    """Factor analysis by maximum likelihood.

    Args:
        features, factors: D and k <= D.
        floor: the least noise variance, as a share of the features' mean variance: for a constant
            feature, and for one that the factors explain in full (a Heywood case).

    >>> import torch, gmkernels
    >>> x = gmkernels.normal((500, 3), seed=0) * torch.tensor([1.0, 1.0, 9.0])
    >>> model = FactorAnalysis(3, 1).fit(x)
    >>> model.log_prob(x).shape, model.posterior(x)[0].shape
    (torch.Size([500]), torch.Size([500, 1]))
    """

    def __init__(self, features: int, factors: int, *, floor: float = 1e-6) -> None:
        super().__init__(features, factors)
        self.floor = positive(self.name, "floor", floor)
        rotations = factors * (factors - 1) // 2
        self.free_parameters = 2 * features + features * factors - rotations

    @torch.no_grad()
    def fit(
        self, x: Tensor, *, iterations: int = 1000, tolerance: float = 1e-5
    ) -> "FactorAnalysis":
        """W, Psi and mu of x [N, D], N >= 2; returns the model.

        Args:
            iterations: at most so many; then RuntimeWarning.
            tolerance: of the mean log-likelihood's gradient in log Psi, nats.
        Raises ValueError: x the same in all rows.
        """
        count(f"{self.name}.fit", "iterations", iterations)
        mean, s = self._moments(x)
        variance = s.diagonal().clone()
        least = self.floor * float(variance.mean())
        if least == 0:
            raise ValueError(f"{self.name}.fit: some feature of x must vary, all are constant")
        weight = self.weight.double()

        def objective(free: Tensor) -> tuple[Tensor, Tensor]:
            psi = least + free.exp()
            root = psi.sqrt()
            values, vectors = torch.linalg.eigh(s / (root[:, None] * root))  # ascending
            top = values[-self.factors :].clamp(min=1)
            weight.copy_(root[:, None] * vectors[:, -self.factors :] * (top - 1).sqrt())
            nll = (psi.log() + variance / psi).sum() - (top - top.log() - 1).sum()
            slope = (psi + weight.square().sum(1) - variance) / psi.square()
            return nll / 2, slope * free.exp() / 2

        free = variance.clamp(min=least).log()
        # Ends with objective(free), so that the weight is that of free.
        left = minimise_smooth(objective, free, iterations, tolerance)
        if left > tolerance:
            warnings.warn(
                f"{self.name}.fit: stopped at a gradient of {left:.1g}, above {tolerance:g}; raise "
                "iterations= or tolerance=",
                RuntimeWarning,
                stacklevel=3,
            )
        psi = least + free.exp()
        self._set(mean, weight.flip(1), psi)
        return self


class ProbabilisticPCA(LinearGaussian):
    """Probabilistic PCA by maximum likelihood, closed form: W spans the first k eigenvectors.

    Args: features, factors: D and k < D.

    >>> import torch, gmkernels
    >>> x = gmkernels.normal((500, 3), seed=0) * torch.tensor([1.0, 1.0, 9.0])
    >>> model = ProbabilisticPCA(3, 1).fit(x)
    >>> model.sample(2, seed=1).shape
    torch.Size([2, 3])
    """

    def __init__(self, features: int, factors: int) -> None:
        super().__init__(features, factors)
        if factors == features:
            raise ValueError(f"{self.name}: factors must be below the {features} features")
        rotations = factors * (factors - 1) // 2
        self.free_parameters = features + features * factors - rotations + 1

    @torch.no_grad()
    def fit(self, x: Tensor) -> "ProbabilisticPCA":
        """W, sigma^2 and mu of x [N, D]; returns the model.

        Raises ValueError: x lies in a subspace of k dimensions, so that sigma^2 would be 0.
        """
        mean, s = self._moments(x)
        values, vectors = torch.linalg.eigh(s)  # ascending
        values, vectors = values.flip(0), vectors.flip(1)
        variance = values[self.factors :].mean()
        if not float(variance) > 1e-14 * float(values[0]):
            raise ValueError(
                f"{self.name}.fit: x must vary in more than {self.factors} dimensions, it does in "
                f"{int((values > 1e-14 * values[0]).sum())}; take fewer factors"
            )
        weight = (
            vectors[:, : self.factors] * (values[: self.factors] - variance).clamp(min=0).sqrt()
        )
        self._set(mean, weight, variance.expand(self.features))
        return self
