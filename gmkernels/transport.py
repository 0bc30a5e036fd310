"""Wasserstein distances between samples: on the line, sliced, and with entropy (Sinkhorn).

    W1(p, q) = inf over couplings of E |x - y|; on the line, int |F^-1(u) - G^-1(u)| du
    sliced: the mean of W1 of the projections on random directions             Bonneel et al. 2015
    OT_eps(p, q) = min over couplings P of <P, C> + eps KL(P || p x q)         Cuturi 2013
    debiased: S = OT_eps(p, q) - (OT_eps(p, p) + OT_eps(q, q)) / 2 >= 0        Feydy et al. 2019
Every point of a sample weighs the same. divergences.py exports all of it.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from gmkernels import noise
from gmkernels.checks import check_rows


def _check(op: str, x: Tensor, y: Tensor) -> None:
    for name, z in (("x", x), ("y", y)):
        check_rows(op, name, z)
        if z.dim() != 2 or len(z) == 0:
            raise ValueError(f"{op}: {name} must be [N, D] with N > 0, got {tuple(z.shape)}")
    if x.shape[1] != y.shape[1] or x.device != y.device:
        raise ValueError(
            f"{op}: x and y must have one D and device, got {tuple(x.shape)} on {x.device} and "
            f"{tuple(y.shape)} on {y.device}"
        )


def _quantile_gap(x: Tensor, y: Tensor) -> Tensor:
    """int |F^-1 - G^-1| of each column of x [N, P] and y [M, P], [P]."""
    x, y = x.sort(0).values, y.sort(0).values
    n, m = len(x), len(y)
    if n == m:
        return (x - y).abs().mean(0)
    # Both quantile functions are constant between levels i / n and j / m: integers over n m.
    steps = [torch.arange(1, k + 1, device=x.device) for k in (n, m)]
    level = torch.cat([steps[0] * m, steps[1] * n]).unique()
    before = torch.cat([level.new_zeros(1), level[:-1]])
    weight = (level - before).to(x.dtype) / (n * m)
    return weight @ (x[before // m] - y[before // n]).abs()


def wasserstein_1d(x: Tensor, y: Tensor) -> Tensor:
    """Wasserstein-1 of samples on the line, of each column: exact, by sorting.

    Args: x [N, D], y [M, D]; N and M may differ. Columns are taken one by one.
    Returns: [D].
    Raises: TypeError, ValueError: other shapes.

    Differentiable in both (the sign of each matched difference).

    >>> import torch
    >>> wasserstein_1d(torch.tensor([[0.0], [1.0]]), torch.tensor([[5.0], [6.0], [7.0]]))
    tensor([5.5000])
    """
    _check("wasserstein_1d", x, y)
    return _quantile_gap(x, y)


def sliced_wasserstein(
    x: Tensor, y: Tensor, *, directions: int = 128, seed: noise.Seed = None
) -> Tensor:
    """The mean of Wasserstein-1 over random directions: Monte Carlo over the unit sphere.

    Args:
        x [N, D], y [M, D]; N and M may differ.
        directions: how many, uniform on the sphere; a function of the seed.
    Returns: 0-d. A shift by v gives |v| E|u_1|: 2 |v| / pi in the plane, |v| on the line.
    Raises: TypeError, ValueError: other shapes; directions < 1.

    Differentiable in both. Memory: (N + M) x directions.

    >>> import torch
    >>> x = torch.zeros(4, 1)
    >>> sliced_wasserstein(x, x + 2, seed=0)
    tensor(2.)
    """
    _check("sliced_wasserstein", x, y)
    if directions < 1:
        raise ValueError(f"sliced_wasserstein: directions must be >= 1, got {directions}")
    key = noise.resolve_key("sliced_wasserstein", seed, 0, None, x.device)
    size = (directions, x.shape[1])
    axes = noise.normal(size, seed=key, dtype=x.dtype, device=x.device)
    axes = (axes / axes.norm(dim=1, keepdim=True)).T
    return _quantile_gap(x @ axes, y @ axes).mean()


class _Transport(torch.autograd.Function):
    """OT_eps of a cost [N, M], in the log domain; dOT/dC = P by the envelope theorem."""

    @staticmethod
    def forward(ctx: Any, cost: Tensor, epsilon: float, iterations: int, tol: float) -> Tensor:
        n, m = cost.shape
        f, g = cost.new_zeros(n), cost.new_zeros(m)
        level = max(float(cost.amax()), epsilon)  # lowered to epsilon: far fewer iterations
        for _ in range(iterations):
            g = -level * (((f[:, None] - cost) / level).logsumexp(0) - math.log(n))
            new = -level * (((g - cost) / level).logsumexp(1) - math.log(m))
            # Each row's mass was off by a factor exp((f - new) / level).
            change, f = float((new - f).abs().mean()), new
            if level == epsilon and change <= tol * epsilon:
                break
            level = max(level / 2, epsilon)
        else:
            warnings.warn(
                f"sinkhorn: the marginals are still off by {change / epsilon:.1g} of themselves "
                f"after {iterations} iterations; raise iterations= or epsilon=",
                RuntimeWarning,
                stacklevel=5,
            )
        ctx.save_for_backward(cost, f, g)
        ctx.epsilon = epsilon
        return f.mean() + g.mean()  # the dual; P's rows are exact, so its mass is 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():  # the potentials' own derivatives are not taken
            raise RuntimeError(
                "sinkhorn: there are first derivatives only, and create_graph=True asks for more"
            )
        cost, f, g = ctx.saved_tensors
        plan = ((f[:, None] + g - cost) / ctx.epsilon).exp() / cost.numel()
        return grad * plan, None, None, None


def sinkhorn(
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    power: int = 2,
    debiased: bool = True,
    iterations: int = 1000,
    tolerance: float = 1e-3,
) -> Tensor:
    """Entropic transport with cost |x - y|^power, by Sinkhorn's iterations in the log domain.

    The entropy's weight starts at the largest cost and is halved until it is epsilon.

    Args:
        x [N, D], y [M, D]; N and M may differ.
        epsilon: weight of the entropy, in units of the cost; to 0 it tends to the transport cost,
            W1 for power 1, W2^2 for power 2, and takes more iterations.
        power: 1 or 2.
        debiased: the Sinkhorn divergence, >= 0 and 0 for equal samples; else OT_eps.
        iterations: at most so many; then RuntimeWarning.
        tolerance: mean relative error of a marginal at which to stop.
    Returns: 0-d.
    Raises: TypeError, ValueError: other shapes; an epsilon that is not > 0; another power.
        RuntimeError: a second derivative, which is not there.

    Differentiable once in both, at the optimum's exact gradient as far as it has converged.
    Memory: N x M (debiased: N x N and M x M, too). Source: Cuturi 2013; Feydy et al. 2019.

    >>> import torch
    >>> x = torch.tensor([[0.0], [1.0]])
    >>> sinkhorn(x, x + 3, epsilon=0.1)
    tensor(9.)
    """
    _check("sinkhorn", x, y)
    if not 0 < epsilon < math.inf:
        raise ValueError(f"sinkhorn: epsilon must be a finite number > 0, got {epsilon}")
    if power not in (1, 2):
        raise ValueError(f"sinkhorn: power must be 1 or 2, got {power}")
    if iterations < 1:
        raise ValueError(f"sinkhorn: iterations must be >= 1, got {iterations}")

    def cost(a: Tensor, b: Tensor) -> Tensor:
        if power == 1:
            return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        return (a[:, None] - b).square().sum(2)

    def transport(a: Tensor, b: Tensor) -> Tensor:
        return _Transport.apply(cost(a, b), epsilon, iterations, tolerance)

    if not debiased:
        return transport(x, y)
    return transport(x, y) - (transport(x, x) + transport(y, y)) / 2
