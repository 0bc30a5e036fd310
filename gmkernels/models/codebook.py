"""Codebooks of a VQ-VAE on vector_quantize and code_statistics: learned by gradient, or followed.

c [K, D]; a vector z becomes its nearest code; van den Oord et al. 2017 (1711.00937).
    by gradient    loss = mean |sg[z] - c|^2 + beta mean |z - sg[c]|^2                         eq. 3
    running        N_k <- d N_k + (1 - d) n_k,  m_k <- d m_k + (1 - d) sum z,  c_k = m_k / N_k  A.1
                   with N_k smoothed to (N_k + eps) N / (N + K eps), N = sum_k N_k; d = 0 is a step
                   of k-means. loss = beta mean |z - sg[c]|^2
A codebook starts from the first vectors that it sees in training, by k-means++ (Arthur and
Vassilvitskii 2007). A code that fewer than `restart` vectors a batch choose, in the running mean,
begins anew at a vector of the batch (Dhariwal et al. 2020, 2005.00341).
"""

import torch
from torch import Tensor, nn

from gmkernels import noise
from gmkernels.ops.quantize import code_statistics, vector_quantize

SPREAD, RESTARTED = range(2)  # what the seed is folded with


def k_means_plus_plus(x: Tensor, codes: int, *, seed: noise.Seed = None) -> Tensor:
    """`codes` rows of x [N, D], each chosen by its squared distance to those before: [K, D].

    Raises ValueError without rows. Rows are repeated where x has fewer than K different ones.
    """
    if len(x) == 0:
        raise ValueError("k_means_plus_plus: x must have at least one row to choose from, got none")
    key = noise.resolve_key("k_means_plus_plus", seed, 0, None, x.device)
    u = noise.uniform((codes,), seed=key, device=x.device).double()
    wide = x.double()
    weight = torch.ones(len(x), dtype=torch.float64, device=x.device)
    distance = torch.full_like(weight, float("inf"))
    chosen = []
    for k in range(codes):
        sums = weight.cumsum(0)
        row = torch.searchsorted(sums, u[k : k + 1] * sums[-1]).clamp(max=len(x) - 1)
        chosen.append(row)
        distance = torch.minimum(distance, (wide - wide[row]).square().sum(1))
        weight = distance
    return x[torch.cat(chosen)]


def perplexity(counts: Tensor) -> Tensor:
    """exp(-sum_k p_k log p_k) with p = counts / sum(counts): how many of [K] codes are in use.

    K where all are used alike, 1 where one is alone; NaN without any.
    """
    p = counts.double() / counts.sum()
    return torch.special.entr(p).sum().exp()


class Codebook(nn.Module):
    """What both codebooks share. In training mode a call also restarts codes, and starts them.

    Args:
        codes, width: K and D.
        commitment: beta. decay: d, in [0, 1), of the running counts. restart: see the module; 0
            lets unused codes be.
    """

    weight_of_codes = 1.0  # of the first term of the loss
    codes: Tensor  # [K, D]
    counts: Tensor  # running mean of how many vectors of a batch choose a code, [K]
    started: Tensor

    def __init__(
        self,
        codes: int,
        width: int,
        *,
        commitment: float = 0.25,
        decay: float = 0.99,
        restart: float = 1.0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if codes < 1 or width < 1:
            raise ValueError(f"{name}: codes and width must be >= 1, got {codes} and {width}")
        if not 0 <= decay < 1 or restart < 0:
            raise ValueError(
                f"{name}: decay must lie in [0, 1) and restart be >= 0, got {decay} and {restart}"
            )
        self.commitment, self.decay, self.restart = commitment, decay, restart
        self.hold(torch.zeros(codes, width))
        self.register_buffer("counts", torch.zeros(codes))
        self.register_buffer("started", torch.tensor(False))

    def hold(self, codes: Tensor) -> None:
        """Makes `codes` a parameter or a buffer."""
        self.codes = nn.Parameter(codes)

    @torch.no_grad()
    def assign(self, codes: Tensor, count: float) -> None:
        """Starts from these codes [K, D], each as if `count` vectors had chosen it."""
        self.codes.copy_(codes)
        self.counts.fill_(count)
        self.started.fill_(True)

    def forward(self, z: Tensor, *, seed: noise.Seed = None) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [*, D] in the place of vectors z [*, D], their indices [*], and the loss.

        The loss is a mean over elements, as vector_quantize() gives it. seed: of what restarts.
        """
        if self.training and z.numel():
            key = noise.resolve_key("Codebook", seed, 0, None, z.device)
            rows = z.detach().flatten(0, -2)
            if not self.started:
                spread = noise.fold_in(key, SPREAD)
                first = k_means_plus_plus(rows, len(self.codes), seed=spread)
                self.assign(first, len(rows) / len(self.codes))
        quantized, indices, loss = vector_quantize(
            z, self.codes, commitment=self.commitment, codebook_weight=self.weight_of_codes
        )
        if self.training and z.numel():
            self.follow(rows, indices.flatten())
            self.revive(rows, noise.fold_in(key, RESTARTED))
        return quantized, indices, loss

    @torch.no_grad()
    def follow(self, z: Tensor, indices: Tensor) -> Tensor:
        """Takes a batch [N, D] into the running counts; returns the sums of its codes [K, D]."""
        counts, sums = code_statistics(z, indices, len(self.codes))
        self.counts.lerp_(counts.to(self.counts.dtype), 1 - self.decay)
        return sums

    @torch.no_grad()
    def revive(self, z: Tensor, key: Tensor) -> Tensor:
        """Moves unused codes to vectors of the batch z [N, D]; says which, bool [K]."""
        dead = self.counts < self.restart
        u = noise.uniform((len(self.codes),), seed=key, device=z.device)
        row = (u.double() * len(z)).ceil().long() - 1  # u is in (0, 1]
        self.codes.copy_(torch.where(dead[:, None], z[row].to(self.codes.dtype), self.codes))
        self.counts.clamp_(min=self.restart)
        return dead


class LearnedCodebook(Codebook):
    """Codes are a parameter, which the loss moves to the vectors that choose them."""


class RunningCodebook(Codebook):
    """Codes are running means of the vectors that choose them; no gradient.

    Args: as in Codebook, and
        smoothing: eps. A code that has no share in the running counts stays where it is.
    """

    weight_of_codes = 0.0
    sums: Tensor  # m, [K, D]

    def __init__(
        self, codes: int, width: int, *, smoothing: float = 1e-5, **options: float
    ) -> None:
        super().__init__(codes, width, **options)
        if smoothing < 0:
            raise ValueError(f"RunningCodebook: smoothing must be >= 0, got {smoothing}")
        self.smoothing = smoothing
        self.register_buffer("sums", torch.zeros(codes, width))

    def hold(self, codes: Tensor) -> None:
        """A buffer."""
        self.register_buffer("codes", codes)

    def assign(self, codes: Tensor, count: float) -> None:
        """As in Codebook; m = N c."""
        super().assign(codes, count)
        self.sums.copy_(self.codes * count)

    @torch.no_grad()
    def follow(self, z: Tensor, indices: Tensor) -> Tensor:
        """One step of the running means, from a batch z [N, D]."""
        sums = super().follow(z, indices)
        self.sums.lerp_(sums.to(self.sums.dtype), 1 - self.decay)
        total, eps = self.counts.sum(), self.smoothing
        smoothed = (self.counts + eps) * (total / (total + len(self.codes) * eps))
        used = (self.counts > 0)[:, None]
        self.codes.copy_(torch.where(used, self.sums / smoothed[:, None], self.codes))
        return sums

    @torch.no_grad()
    def revive(self, z: Tensor, key: Tensor) -> Tensor:
        """As in Codebook; m = N c for codes that begin anew."""
        dead = super().revive(z, key)
        self.sums.copy_(torch.where(dead[:, None], self.codes * self.restart, self.sums))
        return dead
