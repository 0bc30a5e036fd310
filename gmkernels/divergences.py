"""How far apart two distributions are: KL, JS and MMD here, Wasserstein distances in transport.py.

    KL(p || q) = E_p log p/q >= 0
    JS(p, q) = (KL(p || m) + KL(q || m)) / 2,  m = (p + q) / 2;  symmetric, in [0, log 2]
    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)                              Gretton et al. 2012
In nats. Where the supports are disjoint KL is infinite and JS is log 2 with gradient 0, however far
they are apart; a Wasserstein distance still has a gradient (Arjovsky et al. 2017). The KL of
diagonal Gaussians is the op gaussian_kl, exported here too. Estimates name their method.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from gmkernels import noise
from gmkernels.checks import check_like, check_rows, check_tensor
from gmkernels.ops.gaussian import gaussian_kl
from gmkernels.transport import sinkhorn, sliced_wasserstein, wasserstein_1d

__all__ = [
    "gaussian_kl",
    "js_categorical",
    "js_monte_carlo",
    "js_normal",
    "kl_categorical",
    "kl_monte_carlo",
    "kl_nearest_neighbours",
    "kl_normal",
    "mmd",
    "sinkhorn",
    "sliced_wasserstein",
    "wasserstein_1d",
]

LogProb = Callable[[Tensor], Tensor]
_EXACT = "donot_use_mm_for_euclid_dist"  # the product form cancels


def _log_ratio(p: Tensor, q: Tensor) -> Tensor:
    """p log(p / q), 0 where p or q is; guarded so that no gradient there is NaN."""
    both = (p > 0) & (q > 0)
    ratio = torch.where(both, p, 1).log() - torch.where(both, q, 1).log()
    return torch.where(both, p * ratio, 0 * p * q)  # NaN stays NaN


def kl_categorical(p: Tensor, q: Tensor) -> Tensor:
    """KL of probabilities over the last dimension.

    Args: p, q: [*, K] >= 0 that sum to 1 (not checked), of one shape.
    Returns: [*], nats; inf where q is 0 and p is not.
    Raises: TypeError, ValueError: other dtypes or shapes.

    Differentiable in both where finite.

    >>> import torch
    >>> kl_categorical(torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75]))
    tensor(0.1438)
    """
    check_tensor("kl_categorical", "p", p)
    check_like("kl_categorical", "q", q, "p", p)
    return _log_ratio(p, q).masked_fill((p > 0) & (q == 0), math.inf).sum(-1)


def js_categorical(p: Tensor, q: Tensor) -> Tensor:
    """JS of probabilities over the last dimension. Arguments as in kl_categorical().

    Returns: [*], nats, in [0, log 2].

    >>> import torch
    >>> js_categorical(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    tensor(0.6931)
    """
    check_tensor("js_categorical", "p", p)
    check_like("js_categorical", "q", q, "p", p)
    m = (p + q) / 2  # 0 where p and q are, and where they are too small to matter
    return (_log_ratio(p, m) + _log_ratio(q, m)).sum(-1) / 2


def _check_normals(op: str, mean_p: Tensor, cov_p: Tensor, mean_q: Tensor, cov_q: Tensor) -> None:
    check_tensor(op, "mean_p", mean_p)
    check_like(op, "mean_q", mean_q, "mean_p", mean_p)
    for name, covariance in (("covariance_p", cov_p), ("covariance_q", cov_q)):
        check_tensor(op, name, covariance, mean_p.device)
        wanted = (len(mean_p), len(mean_p)) if mean_p.dim() == 1 else None
        if covariance.shape != wanted:
            raise ValueError(
                f"{op}: means must be [D] and {name} [D, D], got {tuple(mean_p.shape)} and "
                f"{tuple(covariance.shape)}; torch.diag makes one of variances"
            )


def _root(op: str, name: str, covariance: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed):
        raise ValueError(f"{op}: {name} must be symmetric and positive definite")
    return factor


def kl_normal(mean_p: Tensor, covariance_p: Tensor, mean_q: Tensor, covariance_q: Tensor) -> Tensor:
    """KL(p || q) of two Gaussians with full covariances.

    With L_p, L_q the Cholesky factors and A = L_q^-1 L_p, a = L_q^-1 (mean_q - mean_p):
    2 KL = |A|_F^2 - D - 2 log det A + |a|^2.

    Args: means [D], covariances [D, D] symmetric and positive definite.
    Returns: 0-d, nats.
    Raises: TypeError, ValueError: other shapes, or a covariance that is not positive definite.

    Differentiable in all four.

    >>> import torch
    >>> kl_normal(torch.zeros(1), torch.eye(1), torch.ones(1), torch.eye(1))
    tensor(0.5000)
    """
    _check_normals("kl_normal", mean_p, covariance_p, mean_q, covariance_q)
    root_p = _root("kl_normal", "covariance_p", covariance_p)
    root_q = _root("kl_normal", "covariance_q", covariance_q)
    both = torch.cat([root_p, (mean_q - mean_p)[:, None]], 1)
    a = torch.linalg.solve_triangular(root_q, both, upper=False)
    log_det = a[:, :-1].diagonal().log().sum()
    return (a.square().sum() - len(mean_p)) / 2 - log_det


def js_normal(
    mean_p: Tensor,
    covariance_p: Tensor,
    mean_q: Tensor,
    covariance_q: Tensor,
    *,
    n: int = 10_000,
    seed: noise.Seed = None,
) -> Tensor:
    """JS of two Gaussians by Monte Carlo: js_monte_carlo() on n draws of each. No closed form is
    known. Arguments as in kl_normal().

    Returns: 0-d, nats; the estimate is at most log 2.

    Differentiable in all four, through the draws (reparameterised).

    >>> import torch
    >>> js_normal(torch.zeros(1), torch.eye(1), torch.full((1,), 99.0), torch.eye(1), seed=0)
    tensor(0.6931)
    """
    _check_normals("js_normal", mean_p, covariance_p, mean_q, covariance_q)
    normals, points = [], []
    key = noise.resolve_key("js_normal", seed, 0, None, mean_p.device)
    for i, (name, mean, covariance) in enumerate(
        (("covariance_p", mean_p, covariance_p), ("covariance_q", mean_q, covariance_q))
    ):
        root = _root("js_normal", name, covariance)
        normals.append(torch.distributions.MultivariateNormal(mean, scale_tril=root))
        eps = noise.normal((n, len(mean)), seed=key, stream=i, dtype=mean.dtype, device=mean.device)
        points.append(mean + eps @ root.T)
    return js_monte_carlo(normals[0].log_prob, normals[1].log_prob, *points)


def kl_monte_carlo(log_p: LogProb, log_q: LogProb, x: Tensor) -> Tensor:
    """KL(p || q) by Monte Carlo: the mean of log p(x) - log q(x) over x ~ p.

    Args: log_p, log_q: log-densities, x [N, *] -> [N]. x: draws of p.
    Returns: 0-d, nats; unbiased, may be negative.
    Raises: TypeError, ValueError: x of another kind, or empty.

    Differentiable as the log-densities are; in p's parameters only through reparameterised draws.

    >>> import torch
    >>> p, q = (torch.distributions.Normal(m, 1.0).log_prob for m in (0.0, 1.0))
    >>> kl_monte_carlo(lambda x: p(x)[:, 0], lambda x: q(x)[:, 0], torch.tensor([[-1.0], [1.0]]))
    tensor(0.5000)
    """
    _check_draws("kl_monte_carlo", x=x)
    return (log_p(x) - log_q(x)).mean()


def js_monte_carlo(log_p: LogProb, log_q: LogProb, x: Tensor, y: Tensor) -> Tensor:
    """JS by Monte Carlo from two log-densities: x ~ p, y ~ q.

    JS = log 2 - (E_p softplus(log q/p) + E_q softplus(log p/q)) / 2: never above log 2, and exactly
    that where neither set of draws has density under the other.

    Args: log_p, log_q: as in kl_monte_carlo(). x [N, *]: draws of p; y [M, *]: draws of q.
    Returns: 0-d, nats; unbiased.
    Raises: TypeError, ValueError: as in kl_monte_carlo().

    Differentiable as the log-densities are; in the parameters through reparameterised draws.

    >>> import torch
    >>> p, q = (torch.distributions.Normal(m, 1.0).log_prob for m in (0.0, 99.0))
    >>> x, y = torch.tensor([[0.0]]), torch.tensor([[99.0]])
    >>> js_monte_carlo(lambda x: p(x)[:, 0], lambda x: q(x)[:, 0], x, y)
    tensor(0.6931)
    """
    _check_draws("js_monte_carlo", x=x, y=y)
    there = F.softplus(log_q(x) - log_p(x)).mean()
    back = F.softplus(log_p(y) - log_q(y)).mean()
    return math.log(2) - (there + back) / 2


def _check_draws(op: str, least: int = 1, **draws: Tensor) -> None:
    for name, x in draws.items():
        check_rows(op, name, x)
        if len(x) < least:
            raise ValueError(f"{op}: {name} must have at least {least} rows, got {len(x)}")


def _check_points(op: str, x: Tensor, y: Tensor, least: int = 1) -> None:
    _check_draws(op, least, x=x, y=y)
    if x.dim() != 2 or x.shape[1:] != y.shape[1:] or x.device != y.device:
        raise ValueError(
            f"{op}: x [N, D] and y [M, D] must have one D and device, got {tuple(x.shape)} and "
            f"{tuple(y.shape)}; .flatten(1) makes rows of pictures"
        )


def kl_nearest_neighbours(x: Tensor, y: Tensor, *, k: int = 1) -> Tensor:
    """KL(p || q) from samples alone, by the distances to the k-th nearest neighbours.

    KL = D / N sum_i log(nu_i / rho_i) + log(M / (N - 1)), rho_i from x_i to its k-th neighbour
    among the other x, nu_i among y.

    Args: x [N, D] of p, N > k; y [M, D] of q, M >= k; densities, without points that coincide.
    Returns: 0-d, nats; consistent, biased, may be negative. inf where x holds k + 1 equal points.
    Raises: TypeError, ValueError: other shapes, too few points.

    Differentiable once in both where finite. Memory: N x N and N x M distances.
    Source: Wang, Kulkarni and Verdu 2009, equation 5.

    >>> import torch
    >>> x = torch.tensor([[0.0], [1.0], [3.0]])
    >>> kl_nearest_neighbours(x, x + 0.5)
    tensor(-0.5187)
    """
    op = "kl_nearest_neighbours"
    if k < 1:
        raise ValueError(f"{op}: k must be >= 1, got {k}")
    _check_points(op, x, y, k)
    _check_draws(op, k + 1, x=x)
    rho = torch.cdist(x, x, compute_mode=_EXACT).kthvalue(k + 1, 1).values  # the first is itself
    nu = torch.cdist(x, y, compute_mode=_EXACT).kthvalue(k, 1).values
    return x.shape[1] * (nu.log() - rho.log()).mean() + math.log(len(y) / (len(x) - 1))


def mmd(x: Tensor, y: Tensor, *, bandwidth: float | None = None, unbiased: bool = True) -> Tensor:
    """The squared maximum mean discrepancy under k(a, b) = exp(-|a - b|^2 / (2 bandwidth^2)).

    Args:
        x, y: [N, D] and [M, D]; at least two rows each if unbiased.
        bandwidth: None takes the median distance between all points, as a constant.
        unbiased: leave the pairs of a point with itself out (may be negative); else the
            V-statistic, which is >= 0 and 0 for equal sets.
    Returns: 0-d.
    Raises: TypeError, ValueError: other shapes, too few rows, a bandwidth that is not > 0.

    Differentiable once in both. Memory: N x N, M x M and N x M distances.
    Source: Gretton et al. 2012, lemma 6.

    >>> import torch
    >>> mmd(torch.zeros(2, 1), torch.ones(2, 1), bandwidth=1.0)
    tensor(0.7869)
    """
    _check_points("mmd", x, y, 2 if unbiased else 1)
    distances = [torch.cdist(a, b, compute_mode=_EXACT) for a, b in ((x, x), (y, y), (x, y))]
    if bandwidth is None:
        above = [torch.ones_like(d, dtype=torch.bool).triu(1) for d in distances[:2]]
        pairs = [d.detach()[mask] for d, mask in zip(distances[:2], above, strict=True)]
        bandwidth = float(torch.cat([*pairs, distances[2].detach().flatten()]).median())
    if not 0 < bandwidth < math.inf:
        raise ValueError(f"mmd: bandwidth must be a finite number > 0, got {bandwidth}; set it")
    xx, yy, xy = (torch.exp(-d.square() / (2 * bandwidth**2)) for d in distances)
    total = -2 * xy.mean()
    for kernel in (xx, yy):
        n = len(kernel)
        own = (
            (kernel.sum() - kernel.diagonal().sum()) / (n * (n - 1)) if unbiased else kernel.mean()
        )
        total = total + own
    return total
