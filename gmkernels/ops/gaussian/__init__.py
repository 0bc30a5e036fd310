"""Diagonal Gaussians: reparameterize_kl, gaussian_kl, gaussian_kl_per_dim. Start with reference.py.

Saved for backward: the inputs and the key. eps and exp(logvar / 2) are made again.
"""

import math

import torch
from torch import Tensor

from gmkernels import checks, dispatch
from gmkernels.autograd import DifferentiableOp, is_batched, is_transformed
from gmkernels.noise import Seed, resolve_key
from gmkernels.ops.gaussian import reference

__all__ = ["gaussian_kl", "gaussian_kl_per_dim", "reparameterize_kl"]

Range = tuple[float, float] | None
Arguments = tuple[Tensor, Tensor, Tensor | None, Tensor | None, float, float]

dispatch.load_family(__name__, tuple(__all__))
_reparameterize_kl = DifferentiableOp(
    "reparameterize_kl", reference.reparameterize_kl, inputs=5, outputs=2
)
_gaussian_kl = DifferentiableOp("gaussian_kl", reference.gaussian_kl, inputs=4, outputs=1)
_gaussian_kl_per_dim = DifferentiableOp(
    "gaussian_kl_per_dim", reference.gaussian_kl_per_dim, inputs=4, outputs=1
)


def _check(
    op: str,
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    logvar_range: Range,
) -> Arguments:
    checks.check_rows(op, "mean", mean)
    checks.check_like(op, "logvar", logvar, "mean", mean)
    if prior_mean is not None:
        prior_mean = checks.in_rows(checks.expand_rows(op, "prior_mean", prior_mean, "mean", mean))
    if prior_logvar is not None:
        prior_logvar = checks.in_rows(
            checks.expand_rows(op, "prior_logvar", prior_logvar, "mean", mean)
        )
    low, high = -math.inf, math.inf
    if logvar_range is not None:
        low, high = logvar_range
        if not low <= high:
            raise ValueError(
                f"{op}: logvar_range must be (low, high) with low <= high, got {logvar_range}"
            )
    return checks.in_rows(mean), checks.in_rows(logvar), prior_mean, prior_logvar, low, high


def _choose(op: str, args: Arguments, eps: Tensor | None, backend: str | None) -> str:
    wide = dispatch.is_wide(*args[:4], eps)
    return dispatch.choose(op, args[0].device.type, wide, backend)


def reparameterize_kl(
    mean: Tensor,
    logvar: Tensor,
    *,
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    logvar_range: Range = None,
    seed: Seed = None,
    offset: int = 0,
    generator: torch.Generator | None = None,
    eps: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Samples z = mean + exp(logvar / 2) eps and its KL to the prior, in one pass over memory.

    kl = 1/2 sum_d [expm1(l - lp) - (l - lp) + (m - mp)^2 exp(-lp)], nats, summed over all but the
    batch.

    Args:
        mean: [B, *], at least two dimensions; float32, bfloat16, float16, or float64 (reference).
        logvar: log-variance, mean's shape; its dtype may differ. The halves of one [B, 2 D] tensor
            (torch.chunk) are read in place; other layouts cost a copy.
        prior_mean, prior_logvar: of a diagonal Gaussian prior, [B, *] or one row [*]; None is 0.
        logvar_range: (low, high) clamps logvar; its gradient is 0 outside.
        seed: an int, an integer tensor or a key (gmkernels.noise.key); None draws one from torch's
            default generator. eps equals gmkernels.normal(mean.shape, seed=seed, offset=offset).
        offset: rows of noise to skip, >= 0.
        generator: draws the seed instead (eager mode only).
        eps: the noise itself, mean's shape; then no seed is used, and eps may have a gradient.
        backend: None chooses; a named backend runs or raises.
    Returns:
        z: mean's shape, dtype and layout (a layout that is neither contiguous nor channels_last
            comes back contiguous).
        kl: [B] float32 (float64 on float64 inputs), nats. Rows do not depend on each other.
    Raises:
        TypeError, ValueError: shapes, dtypes or devices other than said here.
        RuntimeError: a named backend that cannot run; vmap over mean with one unbatched seed.

    Differentiable twice and more in mean, logvar, prior_mean, prior_logvar and eps. Accuracy:
    within twice the error of float32 PyTorch plus 2 ulp of the output's scale. Source: Kingma and
    Welling 2014.

    >>> import torch, gmkernels
    >>> z, kl = gmkernels.reparameterize_kl(torch.zeros(2, 3), torch.zeros(2, 3), seed=0)
    >>> z.shape, kl
    (torch.Size([2, 3]), tensor([0., 0.]))
    """
    op = "reparameterize_kl"
    args = _check(op, mean, logvar, prior_mean, prior_logvar, logvar_range)
    key = None
    if eps is not None:
        checks.check_like(op, "eps", eps, "mean", mean)
        if seed is not None or generator is not None:
            raise ValueError(f"{op}: give eps or a seed, not both")
        eps = checks.in_rows(eps)
    else:
        key = resolve_key(op, seed, offset, generator, mean.device)
        if is_transformed() and any(map(is_batched, (mean, logvar))) and not is_batched(key):
            raise RuntimeError(
                f"{op}: under vmap one seed would give every example the same noise; pass eps=, "
                "or a batched seed tensor"
            )
    name = _choose(op, args, eps, backend)
    z, kl = _reparameterize_kl(name, *args[:4], eps, key, *args[4:])
    return checks.in_layout_of(z, mean), kl


def gaussian_kl(
    mean: Tensor,
    logvar: Tensor,
    *,
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    logvar_range: Range = None,
    backend: str | None = None,
) -> Tensor:
    """KL of a diagonal Gaussian to N(0, I) or to a diagonal Gaussian prior, one per row.

    Args: as in reparameterize_kl().
    Returns:
        [B] float32 (float64 on float64 inputs), nats, summed over all but the batch.
    Raises:
        TypeError, ValueError, RuntimeError: as in reparameterize_kl().

    Differentiable twice and more in all tensors. Source: Kingma and Welling 2014, appendix B.

    >>> import torch, gmkernels
    >>> gmkernels.gaussian_kl(torch.ones(1, 4), torch.zeros(1, 4))
    tensor([2.])
    """
    op = "gaussian_kl"
    args = _check(op, mean, logvar, prior_mean, prior_logvar, logvar_range)
    return _gaussian_kl(_choose(op, args, None, backend), *args)[0]


def gaussian_kl_per_dim(
    mean: Tensor,
    logvar: Tensor,
    *,
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    logvar_range: Range = None,
    backend: str | None = None,
) -> Tensor:
    """KL of every latent dimension, averaged over the batch: for free bits, and to see a collapse.

    Args: as in reparameterize_kl().
    Returns:
        [*] (mean's shape without the batch), float32 (float64 on float64 inputs), nats. NaN for B =
        0.
    Raises:
        TypeError, ValueError, RuntimeError: as in reparameterize_kl().

    Differentiable twice and more in all tensors. Source: Kingma et al. 2016 (arXiv:1606.04934),
    free bits.

    >>> import torch, gmkernels
    >>> gmkernels.gaussian_kl_per_dim(torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2))
    tensor([0., 2.])
    """
    op = "gaussian_kl_per_dim"
    args = _check(op, mean, logvar, prior_mean, prior_logvar, logvar_range)
    return _gaussian_kl_per_dim(_choose(op, args, None, backend), *args)[0]
