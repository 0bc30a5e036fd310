"""Diagonal Gaussians: reparameterized samples and KL divergences.

Formula. q = N(m, diag exp(l)), prior p = N(mp, diag exp(lp)), by default N(0, I); rows b, elements
d.
    l      = logvar clamped to [low, high]
    z      = m + exp(l / 2) eps,  eps ~ N(0, I)
    kl_b   = 1/2 sum_d [ expm1(l - lp) - (l - lp) + (m - mp)^2 exp(-lp) ]          nats
    kl_d   = 1/B sum_b of the same terms, unsummed over d                          nats
Source: Kingma and Welling, "Auto-Encoding Variational Bayes", 2014, eq. 10 and appendix B
(arXiv:1312.6114).

Gradients, with dz [B, D] and dkl [B] given and d = l - lp:
    dm     = dz + dkl (m - mp) exp(-lp)
    dl     = 1/2 [ dz eps exp(l / 2) + dkl expm1(d) ], 0 where logvar was clamped
    dmp    = -dkl (m - mp) exp(-lp)
    dlp    = -1/2 dkl [ expm1(d) + (m - mp)^2 exp(-lp) ]
    deps   = dz exp(l / 2)
For kl_d, dkl is dkl_d / B. Backward saves the inputs and the key, 16 bytes; it makes eps and exp(l
/ 2) again. Nothing of the size of eps is ever stored.

Bytes, float32, N = B D: forward reads 8 N and writes 4 N; backward reads 12 N and writes 8 N. Eager
PyTorch moves 48 N and 68 N: every intermediate goes to memory and back, and eps is kept for
backward.
Flops: about 30 N for z and kl, and 45 N for the noise.

Numerics. Sums are float32 over four vectors, double between them. expm1(d) - d replaces
exp(d) - 1 - d; the kernels take it from the exponential's own polynomial, so it keeps full relative
accuracy for small d, where the plain form has none left (d = 1e-4: relative error 1 against 1e-7).

Edge cases: no columns give kl = 0; no rows give an empty kl, and NaN for the means over rows; a NaN
element gives NaN in its row alone. A logvar of +inf gives NaN: its KL has no finite terms.
"""

import math

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is, else float32."""
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def clamp(logvar: Tensor, low: float, high: float) -> Tensor:
    """logvar in [low, high]; unlike torch.clamp, NaN keeps a NaN gradient."""
    logvar = torch.where(logvar < low, low, logvar)
    return torch.where(logvar > high, high, logvar)


def kl_terms(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    low: float,
    high: float,
) -> Tensor:
    """KL of every element, in nats."""
    dtype = compute_dtype(mean, logvar, prior_mean, prior_logvar)
    m, l = mean.to(dtype), clamp(logvar.to(dtype), low, high)
    mp = torch.zeros_like(m) if prior_mean is None else prior_mean.to(dtype)
    lp = torch.zeros_like(l) if prior_logvar is None else prior_logvar.to(dtype)
    d = l - lp
    return 0.5 * (torch.expm1(d) - d + (m - mp).square() * torch.exp(-lp))


def eps_from(key: Tensor, like: Tensor) -> Tensor:
    """The standard normal noise of a key in the shape of `like`, float32."""
    rows, columns = like.shape[0], math.prod(like.shape[1:])
    drawn = torch.ops.gmkernels_reference.normal(key, rows, columns, 0, torch.float32, like.device)
    return drawn.view(like.shape)


def reparameterize_kl(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    eps: Tensor | None,
    key: Tensor | None,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    """z [B, *] in mean's dtype and kl [B]."""
    dtype = compute_dtype(mean, logvar, prior_mean, prior_logvar, eps)
    if eps is None:
        assert key is not None
        eps = eps_from(key, mean)
    sigma = torch.exp(0.5 * clamp(logvar.to(dtype), low, high))
    z = (mean.to(dtype) + sigma * eps.to(dtype)).to(mean.dtype)
    return z, kl_terms(mean, logvar, prior_mean, prior_logvar, low, high).flatten(1).sum(1)


def gaussian_kl(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    low: float,
    high: float,
) -> tuple[Tensor]:
    """kl [B]."""
    return (kl_terms(mean, logvar, prior_mean, prior_logvar, low, high).flatten(1).sum(1),)


def gaussian_kl_per_dim(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    low: float,
    high: float,
) -> tuple[Tensor]:
    """kl [*], means over the batch."""
    return (kl_terms(mean, logvar, prior_mean, prior_logvar, low, high).mean(0),)
