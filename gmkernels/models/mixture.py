"""Gaussian mixtures by expectation-maximisation (Dempster, Laird and Rubin 1977).

    p(x) = sum_k pi_k N(x; mu_k, Sigma_k)
    E: r_ik = pi_k N(x_i; mu_k, Sigma_k) / p(x_i)
    M: n_k = sum_i r_ik,  pi_k = n_k / N,  mu_k = sum_i r_ik x_i / n_k,
       S_k = sum_i r_ik (x_i - mu_k)(x_i - mu_k)^T / n_k, around the new mean: the two-pass form
    full: Sigma_k = S_k;    tied: Sigma = sum_k pi_k S_k;    diagonal: the diagonal of S_k;
    spherical: sigma_k^2 I, sigma_k^2 the mean of that diagonal
plus a floor on the diagonal. A step never lowers the log-likelihood, but for the floor. A fit runs
in float64; log p(x) is a logsumexp over components.
"""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from gmkernels import noise
from gmkernels.models.tabular import Density, choose, count, positive
from gmkernels.ops.likelihood import gaussian_nll

COVARIANCES = ("full", "tied", "diagonal", "spherical")


class Components(NamedTuple):
    """log pi [K]; mu [K, D]; factor, a root of Sigma.

    factor: Cholesky factors [K, D, D] (full) or [1, D, D] (tied); standard deviations [K, D]
    (diagonal) or [K, 1] (spherical).
    """

    log_weight: Tensor
    mean: Tensor
    factor: Tensor


def log_joint(x: Tensor, c: Components) -> Tensor:
    """log pi_k N(x; mu_k, Sigma_k), [N, K]."""
    if c.factor.dim() == 2:
        logvar = 2 * c.factor.log().expand_as(c.mean)
        pairs = zip(c.mean, logvar, strict=True)
        log_p = [-gaussian_nll(x, m.expand_as(x), l.expand_as(x)) for m, l in pairs]
    else:
        half_log_det = c.factor.diagonal(dim1=1, dim2=2).log().sum(1).expand(len(c.mean))
        factors = c.factor.expand(len(c.mean), -1, -1)
        whitened = [
            torch.linalg.solve_triangular(f, (x - m).T, upper=False).T
            for m, f in zip(c.mean, factors, strict=True)
        ]
        zero = x.new_zeros(()).expand_as(x)
        log_p = [-gaussian_nll(w, zero) - h for w, h in zip(whitened, half_log_det, strict=True)]
    return torch.stack(log_p, 1) + c.log_weight


def maximise(x: Tensor, r: Tensor, kind: str, floor: float) -> Components:
    """The M step: x float64 [N, D], r [N, K]. A component without points gets weight 0."""
    n = r.sum(0)
    share = r / n.clamp(min=torch.finfo(r.dtype).tiny)  # [N, K], columns sum to 1
    mean = share.T @ x
    if kind in ("diagonal", "spherical"):
        variance = torch.stack([s @ (x - m).square() for s, m in zip(share.T, mean, strict=True)])
        if kind == "spherical":
            variance = variance.mean(1, keepdim=True)
        return Components((n / len(x)).log(), mean, (variance + floor).sqrt())
    scatter = torch.stack(
        [(s[:, None] * (x - m)).T @ (x - m) for s, m in zip(share.T, mean, strict=True)]
    )
    if kind == "tied":
        scatter = ((n / len(x))[:, None, None] * scatter).sum(0, keepdim=True)
    ridge = floor * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    factor, failed = torch.linalg.cholesky_ex(scatter + ridge)
    if bool(failed.any()):
        raise ValueError(
            f"GaussianMixture.fit: floor {floor:g} is too small beside variances up to "
            f"{float(scatter.abs().max()):g} to keep a covariance positive definite; raise it, or "
            "rescale x"
        )
    return Components((n / len(x)).log(), mean, factor)


def plus_plus(x: Tensor, k: int, key: Tensor) -> Tensor:
    """k rows of x, each drawn by its squared distance to those before. Arthur 2007. [k, D].

    Raises ValueError: fewer than k distinct rows.
    """
    centres = [x[choose(x.new_ones(len(x)), 1, noise.fold_in(key, 0))]]
    distance = (x - centres[0]).square().sum(1)
    for i in range(1, k):
        if not float(distance.sum()) > 0:
            raise ValueError(
                f"GaussianMixture.fit: x must have at least {k} distinct rows, one a component, "
                f"has {i}; take fewer components"
            )
        centres.append(x[choose(distance, 1, noise.fold_in(key, i))])
        distance = torch.minimum(distance, (x - centres[i]).square().sum(1))
    return torch.cat(centres)


class GaussianMixture(Density):
    """A mixture of K Gaussians.

    Args:
        features, components: D and K.
        covariance: "full", "tied" (one for all), "diagonal" or "spherical".
        floor: added to every variance, in x's units squared; scikit-learn's reg_covar.

    Attributes: log_weight [K], mean [K, D], factor: see Components.

    >>> import torch, gmkernels
    >>> x = torch.cat([gmkernels.normal((99, 2), seed=i) + 9 * i for i in (0, 1)])
    >>> model = GaussianMixture(2, 2).fit(x, seed=0)
    >>> model.predict(x).bincount(), model.sample(3, seed=0).shape
    (tensor([99, 99]), torch.Size([3, 2]))
    """

    log_weight: Tensor
    mean: Tensor
    factor: Tensor

    def __init__(
        self, features: int, components: int, *, covariance: str = "full", floor: float = 1e-6
    ) -> None:
        super().__init__(features)
        if covariance not in COVARIANCES:
            raise ValueError(
                f"{self.name}: covariance must be one of {', '.join(COVARIANCES)}, got {covariance}"
            )
        d, k = self.features, count(self.name, "components", components)
        self.components, self.covariance = k, covariance
        self.floor = positive(self.name, "floor", floor)
        full = d * (d + 1) // 2
        each = {"full": k * full, "tied": full, "diagonal": k * d, "spherical": k}[covariance]
        self.free_parameters = k - 1 + k * d + each
        shape = {"full": (k, d, d), "tied": (1, d, d), "diagonal": (k, d), "spherical": (k, 1)}
        self.register_buffer("log_weight", torch.zeros(k))
        self.register_buffer("mean", torch.zeros(k, d))
        self.register_buffer("factor", torch.zeros(shape[covariance]))

    @torch.no_grad()
    def fit(
        self,
        x: Tensor,
        *,
        starts: int = 5,
        iterations: int = 1000,
        tolerance: float = 1e-6,
        seed: noise.Seed = None,
    ) -> "GaussianMixture":
        """The best of several runs of EM on x [N, D]; returns the model.

        Each run starts from k-means++ centres, every point with its nearest.

        Args:
            starts: runs.
            iterations: of a run, at most; RuntimeWarning if the best one did not end before.
            tolerance: the gain of the mean log-likelihood, nats, at which a run ends.
            seed: of the starts.
        Raises ValueError: more components than distinct points.
        """
        self.check_data(x)
        for name, value in (("starts", starts), ("iterations", iterations)):
            count(f"{self.name}.fit", name, value)
        wide = x.double()
        centre = wide.mean(0)
        wide, key = wide - centre, self.key(seed, "fit")
        best: tuple[float, bool, Components] | None = None
        for start in range(starts):
            run = self._run(wide, noise.fold_in(key, start), iterations, tolerance)
            if best is None or run[0] > best[0]:
                best = run
        assert best is not None
        _, ended, found = best
        if not ended:
            warnings.warn(
                f"{self.name}.fit: still gains more than {tolerance:g} nats after {iterations} "
                "iterations; raise iterations= or tolerance=",
                RuntimeWarning,
                stacklevel=3,
            )
        self.log_weight.copy_(found.log_weight)
        self.mean.copy_(found.mean + centre)
        self.factor.copy_(found.factor)
        self.fitted.fill_(1)
        return self

    def _run(
        self, x: Tensor, key: Tensor, iterations: int, tolerance: float
    ) -> tuple[float, bool, Components]:
        """EM from one start: mean log-likelihood, whether it ended by itself, and the mixture."""
        nearest = torch.cdist(x, plus_plus(x, self.components, key)).argmin(1)
        r = torch.nn.functional.one_hot(nearest, self.components).to(x.dtype)
        before = -math.inf
        for _ in range(iterations):
            found = maximise(x, r, self.covariance, self.floor)
            joint = log_joint(x, found)
            log_p = joint.logsumexp(1)
            score = float(log_p.mean())
            if score - before <= tolerance:
                return score, True, found
            before, r = score, (joint - log_p[:, None]).exp()
        return score, False, found

    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x, k), [N, K] nats."""
        self.check("log_joint", x)
        self.check_fitted("log_joint")
        return log_joint(x, Components(self.log_weight, self.mean, self.factor))

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), [N] nats."""
        return self.log_joint(x).logsumexp(1)

    def predict_proba(self, x: Tensor) -> Tensor:
        """p(k|x), the responsibilities, [N, K]."""
        return self.log_joint(x).softmax(1)

    def predict(self, x: Tensor) -> Tensor:
        """The likeliest component, int64 [N]."""
        self.check("predict", x, finite=True)
        return self.log_joint(x).argmax(1)

    def sample(self, n: int, *, seed: noise.Seed = None) -> Tensor:
        """n draws, [n, D]; row i is a function of (seed, i)."""
        self.check_fitted("sample")
        key = self.key(seed)
        which = choose(self.log_weight.double().exp(), n, key)
        eps = self.normal(n, self.features, key)
        if self.factor.dim() == 2:
            return self.mean[which] + self.factor[which] * eps
        factor = self.factor.expand(self.components, -1, -1)
        moved = torch.stack([eps @ f.T for f in factor], 1)  # [n, K, D]
        return self.mean[which] + moved[torch.arange(n, device=which.device), which]
