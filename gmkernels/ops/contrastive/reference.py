"""Losses over pairs: each row against its partner, all other rows of the batch as negatives.

Formula. InfoNCE: queries q [N, D] and keys k [N, D], pair i is (q_i, k_i), tau the temperature:
    s_ij = q_i k_j / tau
    l_i  = -log exp(s_ii) / sum_j exp(s_ij)                  symmetric: (l_i of s + l_i of s^T) / 2
NT-Xent: z = [z1; z2] [2N, D], the partner p of row i is i + N or i - N, q = k = z:
    l_i  = -log exp(s_ip) / sum_{j != i} exp(s_ij)           a pair: (l_i + l_{i + N}) / 2
Both by the log-sum-exp of a row's negatives, those rows whose number differs from its own by no
multiple of N (neither itself nor its partner):
    r_i = log sum_{j != i mod N} exp(s_ij)                                                      nats
    l_i = softplus(r_i - s_ip)
The operators make r, the rows' and, of InfoNCE both ways, the columns' c_j = log sum_i exp(s_ij).
The operators see q, k and a number: s = scale q k^T. Unit length, a learned temperature (rows times
its root) and s_ip are plain PyTorch before and after them, N D numbers beside N^2 D of the sums, so
their gradients are PyTorch's own.
Sources: Chen et al., "A simple framework for contrastive learning of visual representations", 2020,
eq. 1 (arXiv:2002.05709); van den Oord et al., 2018, eq. 4 (arXiv:1807.03748); both ways with a
learned temperature: Radford et al., 2021, figure 3 (arXiv:2103.00020).

Gradients, with dr [N] and dc [N] given, over the pairs that are no partners:
    W_ij = dr_i exp(s_ij - r_i) + dc_j exp(s_ij - c_j)
    dq_i = scale sum_j W_ij k_j      dk_j = scale sum_i W_ij q_i
Of NT-Xent k = q and s is symmetric, so c = r, and one pass with dc = dr has both parts of dz.
Backward saves q, k, r and c. It makes s again, in blocks; no matrix N x N is ever stored.

Bytes: q and k once, r once, in each direction; eager PyTorch moves four to eight matrices N x N
more. Flops: 2 D a pair of rows for r and c together, the same again in backward, and 2 D for each
gradient. On the CPU each block of s serves both of its sides, and of NT-Xent's symmetric s one half
is made; on the GPU each side makes its own.

Numerics. Scores, running maxima and sums are float32. The partner stays out of the sum: the loss of
a pair told apart well is near exp(r_i - s_ip), far below the rounding of a sum with 1 in it, and
keeps its digits. bfloat16 and float16 rows are multiplied exactly and summed in float32; where
the CPU or the GPU multiplies bfloat16, W is rounded to it once. A stored r carries its rounding,
|r| 2^-24 in the loss and as a relative error of W; rows of length 1 have |r| <= 1 / tau + log 2N.
Blocks come in an order that follows from the shape alone, so bits are the same on every run and for
any number of threads. Every loss depends on the whole batch: a NaN anywhere is a NaN everywhere.
"""

import torch
from torch import Tensor

from gmkernels.ops.gaussian.reference import compute_dtype


def contrastive(q: Tensor, k: Tensor | None, scale: float, both: bool) -> tuple[Tensor, Tensor]:
    """r, one a row of q; c, one a row of k, empty without k or unless both."""
    dtype = compute_dtype(q, k)
    keys = q if k is None else k
    s = scale * q.to(dtype) @ keys.to(dtype).mT
    i = torch.arange(s.shape[0], device=q.device)
    pairs = s.shape[0] // 2 if k is None else s.shape[0]
    s = s.masked_fill((i[:, None] - i) % max(pairs, 1) == 0, float("-inf"))
    return s.logsumexp(1), s.logsumexp(0) if both and k is not None else s.new_empty(0)
