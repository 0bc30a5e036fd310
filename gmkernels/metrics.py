"""How good samples are, and how a model uses what it has: measures that need no network.

Features or points are [N, D] rows; pictures count as flat rows. Nothing here is differentiated.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


def _check(name: str, x: Tensor, y: Tensor, least: int = 1) -> None:
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"{name}: both must be [N, D] with one D, got {tuple(x.shape)} and {tuple(y.shape)}; "
            "x.flatten(1) makes rows of pictures"
        )
    if min(len(x), len(y)) < least:
        raise ValueError(f"{name}: both must have {least} rows or more, got {len(x)} and {len(y)}")


class ModeCoverage(NamedTuple):
    """What mode_coverage() finds.

    Attributes:
        counts: high-quality samples of each mode, int64 [K].
        covered: modes that have one.
        high_quality: share of all samples, in [0, 1].
    """

    counts: Tensor
    covered: int
    high_quality: float


def mode_coverage(x: Tensor, modes: Tensor, std: float, *, within: float = 3.0) -> ModeCoverage:
    """Modes covered and high-quality share of samples of an even mixture of N(mode, std^2 I).

    A sample is of high quality if its nearest mode is at most `within` std away; a mode is covered
    if such a sample is there. Of the mixture itself 1 - exp(-within^2 / 2) are in the plane, 98.9 %
    for 3. Source: Srivastava et al. 2017, 1705.07761, section 4.

    Args:
        x: [N, D], N >= 1. modes: [K, D]. std: > 0.

    >>> import torch
    >>> from gmkernels import metrics, toys
    >>> x = toys.ring(1000, seed=0, std=0.02)
    >>> metrics.mode_coverage(x, toys.ring_modes(), 0.02).covered
    8
    """
    _check("mode_coverage", x, modes)
    # |x|^2 - 2 x m + |m|^2 would lose what is small beside |m|.
    exact = "donot_use_mm_for_euclid_dist"
    distance, mode = torch.cdist(x, modes, compute_mode=exact).min(1)
    good = distance <= within * std
    counts = torch.bincount(mode[good], minlength=len(modes))
    return ModeCoverage(counts, int((counts > 0).sum()), float(good.double().mean()))


def nearest(x: Tensor, k: int) -> Tensor:
    """Distance of each row to its k-th nearest neighbour in the same set, [N]. x: [N, D], N > k."""
    _check("nearest", x, x, k + 1)
    return torch.cdist(x, x).kthvalue(k + 1, 1).values


def covered(x: Tensor, by: Tensor, k: int = 3) -> float:
    """Share of x [N, D] within the k-nearest-neighbour ball of some row of `by` [M, D], M > k."""
    _check("covered", x, by)
    return float((torch.cdist(x, by) <= nearest(by, k)).any(1).double().mean())


def precision_recall(fake: Tensor, real: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision and recall of samples by k-nearest-neighbour balls.

    Precision is the share of samples in a ball of the data, recall that of the data in a ball of
    the samples. Source: Kynkaanniemi et al. 2019, 1904.06991, eq. 1 and 2.

    Args: fake: [N, D]. real: [M, D]. Each must have more than k rows.
    """
    return covered(fake, real, k), covered(real, fake, k)


def energy_score(x: Tensor, samples: Tensor) -> Tensor:
    """How well samples y foretell each row x: E|x - y| - E|y - y'| / 2, float32 or wider, [B].

    Its mean over data of density p is least for samples of p alone (a strictly proper score):
    missing modes and samples off the data both raise it. y and y' are different samples. Source:
    Gneiting and Raftery 2007, section 4.3.

    Args: x: [B, D]. samples: [N, D], N >= 2.
    """
    _check("energy_score", x, samples)
    n = len(samples)
    if n < 2:
        raise ValueError(f"energy_score: samples must have 2 rows or more, got {n}")
    spread = torch.cdist(samples, samples).sum() / (n * (n - 1))
    return torch.cdist(x, samples).mean(1) - spread / 2


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """|mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of Gaussians fitted to features.

    The squared Wasserstein-2 distance of the two Gaussians; on Inception features the FID (Heusel
    et al. 2017, 1706.08500). In float64. With (x - mu_x) / sqrt(N - 1) = Q R, so that C = R^T R,
    tr (C_x C_y)^(1/2) is the sum of the singular values of R_x R_y^T: no root of small numbers
    that rounding has spoilt, and singular covariances (N <= D) are as exact as others.

    Args: x: [N, D]. y: [M, D]. N, M >= 2; covariances divide by N - 1.
    """
    _check("frechet_distance", x, y, 2)
    means, roots = [], []
    for rows in (x.double(), y.double()):
        mean = rows.mean(0)
        means.append(mean)
        roots.append(torch.linalg.qr(rows - mean, mode="r").R / math.sqrt(len(rows) - 1))
    a, b = roots
    between = torch.linalg.svdvals(a @ b.T).sum()
    distance = (means[0] - means[1]).square().sum() + a.square().sum() + b.square().sum()
    return max(0.0, float(distance - 2 * between))


def bits_per_dim(nats: Tensor, dimensions: int) -> Tensor:
    """nats / (D ln 2), of -log p(x) of rows of D dimensions."""
    if dimensions < 1:
        raise ValueError(f"bits_per_dim: dimensions must be >= 1, got {dimensions}")
    return nats / (dimensions * math.log(2))


def active_units(means: Tensor, *, threshold: float = 0.01) -> Tensor:
    """Which latents tell of x: Var_x(E_q[z_j]) > threshold, bool [Z, *].

    Source: Burda et al. 2016, 1509.00519, section 5.2. Args: means: of q(z|x), [N, Z, *], N >= 2.
    """
    if len(means) < 2:
        raise ValueError(f"active_units: means must have 2 rows or more, got {len(means)}")
    return means.var(0) > threshold


def codebook_perplexity(indices: Tensor, codes: int) -> float:
    """exp of the entropy of how often each code is used: `codes` if evenly, 1 if one alone.

    Args: indices: integers in [0, codes), any shape, one or more. codes: K.
    """
    if indices.is_floating_point() or indices.numel() == 0:
        raise ValueError(
            f"codebook_perplexity: indices must be integers, one or more, got {indices.dtype} of "
            f"shape {tuple(indices.shape)}"
        )
    if int(indices.min()) < 0 or int(indices.max()) >= codes:
        raise ValueError(
            f"codebook_perplexity: indices must lie in [0, {codes}), got {int(indices.min())} to "
            f"{int(indices.max())}"
        )
    p = torch.bincount(indices.flatten(), minlength=codes).double() / indices.numel()
    return float(torch.special.entr(p).sum().exp())
