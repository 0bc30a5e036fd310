"""Negative log-likelihoods of data under a decoder's output, summed over a row.

Formula. Rows b, elements d, nats.
    gaussian:     1/2 sum_d [ log(2 pi) + l + (x - m)^2 exp(-l) ],   l = 0 where no logvar is given
    bernoulli:    sum_d [ log(1 + exp(s)) - s x ] = sum_d [ x sp(-s) + (1 - x) sp(s) ],  sp =
        softplus
    categorical:  sum_d [ log sum_k exp(s_dk) - s_d,level ]
Source: Kingma and Welling 2014, appendix C (arXiv:1312.6114); Salimans et al. 2017 for levels
(arXiv:1701.05517, section 2.1, whose discretized mixture the categorical replaces).

Gradients, with g = dnll [B] given:
    gaussian:     dx = g (x - m) exp(-l);  dm = -dx;  dl = g/2 [ 1 - (x - m)^2 exp(-l) ]
    bernoulli:    ds = g (sigmoid(s) - x);  dx = -g s
    categorical:  ds_k = g (softmax(s)_k - [k = level])
Backward saves the inputs and recomputes the rest.

Bytes, float32, N elements: gaussian reads 12 N (8 N without logvar), bernoulli 8 N; categorical
reads 4 N L + 8 N. Backward reads the same and writes each gradient once. Eager PyTorch moves 44 N
for the gaussian and three passes over 4 N L for log_softmax and gather.
Flops: gaussian 20 N, bernoulli 45 N, categorical 22 N L.

Numerics. Sums are float32 over four vectors, double between them. bernoulli adds two non-negative
terms, so nothing cancels; a label of exactly 0 or 1 beats an infinite logit. log p is taken as
(s - max) - log(sum), never as s - logsumexp, which would lose the digits that max and s share.

Edge cases: a level outside [0, L) gives NaN in its row (values are never checked: that would sync);
no columns give 0; a NaN element gives NaN in its row alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gmkernels.ops.gaussian.reference import compute_dtype


def gaussian_nll(x: Tensor, mean: Tensor, logvar: Tensor | None) -> tuple[Tensor]:
    """[B]; logvar [B, *], or [B] for one value a row."""
    dtype = compute_dtype(x, mean, logvar)
    gap2 = (x.to(dtype) - mean.to(dtype)).square()
    if logvar is None:
        terms = gap2 + math.log(2 * math.pi)
    else:
        l = logvar.to(dtype)
        if l.dim() == 1:
            l = l.view(-1, *(1,) * (x.dim() - 1))
        terms = gap2 * torch.exp(-l) + l + math.log(2 * math.pi)
    return (0.5 * terms.flatten(1).sum(1),)


def _weighted(weight: Tensor, y: Tensor) -> Tensor:
    # weight * y, where a weight of 0 beats an infinite y.
    return weight * torch.where((weight == 0) & (y == math.inf), 0.0, y)


def bernoulli_nll(x: Tensor, logits: Tensor) -> tuple[Tensor]:
    """[B]."""
    dtype = compute_dtype(x, logits)
    x, s = x.to(dtype), logits.to(dtype)
    # Beyond 50 softplus is the identity to the last bit of float64.
    against, for_ = F.softplus(-s, threshold=50), F.softplus(s, threshold=50)
    return ((_weighted(x, against) + _weighted(1 - x, for_)).flatten(1).sum(1),)


def categorical_nll(logits: Tensor, levels: Tensor) -> tuple[Tensor]:
    """[B]; logits [B, *, L], levels [B, *]."""
    s = logits.to(compute_dtype(logits))
    k = levels.to(torch.int64)
    inside = (k >= 0) & (k < s.shape[-1])
    log_p = torch.log_softmax(s, -1)
    chosen = log_p.gather(-1, k.clamp(0, s.shape[-1] - 1)[..., None])[..., 0]
    terms = torch.where(inside, -chosen, math.nan)
    return (terms.flatten(1).sum(1),)
