"""Noising of data, the targets that denoisers learn, and their loss.

Formula. Data x0 [B, *] of D elements a row, eps ~ N(0, I) made from a key; each row b has its own
time, hence its own signal level a, noise level s and weight w, gathered from a table by t.
    x_t    = a x0 + s eps
    target = p x0 + q eps     epsilon: (p, q) = (0, 1)         sample: (1, 0)
                              v_prediction: (-s, a)            flow_prediction: (-1, 1)
    r      = prediction - target
    loss_b = w / D sum_d r^2
Sources: Ho, Jain and Abbeel, "Denoising diffusion probabilistic models", 2020, eq. 4 and 14
(arXiv:2006.11239); v: Salimans and Ho, 2022, appendix D (arXiv:2202.00512); flow: Lipman et al.,
2022 (arXiv:2210.02747) and Liu et al., 2022 (arXiv:2209.03003).

Gradients, with dx_t, dtarget [B, *] and dloss [B] given, and c_b = 2 w dloss_b / D:
    dx0  = a dx_t + p dtarget          of the loss: dprediction = c r
    deps = s dx_t + q dtarget                       dx0 = -p c r,  deps = -q c r
The noising is linear: its backward reads neither x0 nor eps. The loss keeps r, in prediction's
dtype, which its forward writes in the same pass over memory; so noise is made once a step for the
input and once for the loss, and never stored. t, the table and the weights are constants here; a
tensor of weights is applied outside and has its gradient there.

Bytes, float32, N = B D: add_noise reads 4 N and writes 4 N, with the target 8 N (eager PyTorch: 36
N and 56 N, with eps kept). The loss of an epsilon prediction reads 4 N and writes 4 N, backward
reads 4 N and writes 4 N (eager: 24 N and 20 N, and eps in memory since the noising); the other
types read x0 too. Flops: 4 N, and 45 N for the noise.

Numerics. Levels are float32, rounded once from float64 (float64 for float64 inputs); sums are
float32 over four vectors, double between them. An operand that (p, q) multiply by 0 is not read.

Edge cases: no columns give a NaN loss, a mean over nothing; a NaN element gives NaN in its row
alone; a time outside the table gives a row of NaN, and an error from the native CPU kernels, where
looking is free.
"""

import torch
from torch import Tensor

from gmkernels.ops.gaussian.reference import compute_dtype, eps_from

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")
EPSILON, SAMPLE, V_PREDICTION, FLOW_PREDICTION = range(4)


def target_levels(prediction: int, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q) of target = p x0 + q eps."""
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    levels = ((zero, one), (one, zero), (-s, a), (-one, one))
    return levels[prediction]


def rows_of(table: Tensor, t: Tensor | None) -> Tensor:
    """Row t[b] of the table for each b, NaN outside; the table itself without t.  # [B, 3]"""
    if t is None:
        return table
    inside = (t >= 0) & (t < table.shape[0])
    found = table[torch.where(inside, t, 0)]
    return torch.where(inside[:, None], found, float("nan"))


def _levels(
    table: Tensor, t: Tensor | None, like: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """a, s and w, each [B, 1, ...] as like has dimensions."""
    a, s, w = rows_of(table, t).to(dtype).unbind(1)
    shape = (-1, *(1,) * (like.dim() - 1))
    return a.view(shape), s.view(shape), w.view(shape)


def _eps(eps: Tensor | None, key: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    if eps is None:
        assert key is not None
        eps = eps_from(key, like)
    return eps.to(dtype)


def _target(prediction: int, x0: Tensor, eps: Tensor, p: Tensor, q: Tensor) -> Tensor:
    if prediction == EPSILON:
        return eps
    return x0 if prediction == SAMPLE else p * x0 + q * eps


def add_noise(
    x0: Tensor, eps: Tensor | None, key: Tensor | None, table: Tensor, t: Tensor | None
) -> tuple[Tensor]:
    """x_t [B, *] in x0's dtype."""
    dtype = compute_dtype(x0, eps)
    a, s, _ = _levels(table, t, x0, dtype)
    return ((a * x0.to(dtype) + s * _eps(eps, key, x0, dtype)).to(x0.dtype),)


def add_noise_with_target(
    x0: Tensor,
    eps: Tensor | None,
    key: Tensor | None,
    table: Tensor,
    t: Tensor | None,
    prediction: int,
) -> tuple[Tensor, Tensor]:
    """x_t and target [B, *] in x0's dtype."""
    dtype = compute_dtype(x0, eps)
    a, s, _ = _levels(table, t, x0, dtype)
    wide, noise = x0.to(dtype), _eps(eps, key, x0, dtype)
    x_t = a * wide + s * noise
    target = _target(prediction, wide, noise, *target_levels(prediction, a, s))
    return x_t.to(x0.dtype), target.to(x0.dtype)


def denoising_loss(
    predicted: Tensor,
    x0: Tensor,
    eps: Tensor | None,
    key: Tensor | None,
    table: Tensor,
    t: Tensor | None,
    prediction: int,
) -> tuple[Tensor]:
    """loss [B]."""
    dtype = compute_dtype(predicted, x0, eps)
    a, s, w = _levels(table, t, x0, dtype)
    wide = x0.to(dtype)
    noise = wide if prediction == SAMPLE else _eps(eps, key, x0, dtype)
    target = _target(prediction, wide, noise, *target_levels(prediction, a, s))
    r = predicted.to(dtype) - target
    return (w.flatten() * r.square().flatten(1).mean(1),)
