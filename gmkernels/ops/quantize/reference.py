"""Vector quantization: the nearest code of each row, and what a codebook's update needs.

Formula. x [N, D], codebook c [K, D]:
    nearest_code     i_n = argmin_k |x_n - c_k|^2, the first k on ties                      [N]
    code_statistics  counts_k = |{n: i_n = k}|,  sums_k = sum_{n: i_n = k} x_n      [K], [K, D]
    vector_quantize  q_n = c_{i_n};  loss = w mean (sg[x] - q)^2 + beta mean (x - sg[q])^2
sg stops the gradient; means are over all N D elements. The value handed on is q, its gradient goes
to x as it is (straight through).
Sources: van den Oord et al., "Neural Discrete Representation Learning", 2017, eq. 1 to 3
(arXiv:1711.00937); the codebook's running averages, which counts and sums feed: its appendix A.1.

Gradients, with dq and dloss given (indices have none):
    dx_n = dq_n + dloss 2 beta (x_n - q_n) / (N D)
    dc_k = dloss 2 w sum_{n: i_n = k} (c_k - x_n) / (N D)
Of a row without elements or rows the loss is 0.

Bytes: x and c once, 8 N of indices; eager PyTorch also writes and reads the matrix N x K of
distances, 4 N K each way. Flops: 2 N K D. The kernels compare s_nk = |c_k|^2 / 2 - x_n c_k, a
blocked matrix product, and keep the best and the second best of each row: no matrix is stored, and
no one-hot.

Numerics. s is float32, products in the order of d. Its error is below
(D + 4) 2^-24 (|x| |c| + |c|^2) with the longest c; where second best and best are closer than two
such errors, or not finite, the row is searched again by float64 distances, from differences. So
the index is float64's argmin for any input, offset or scale: the code returned is never farther
than the nearest by more than float64 rounding. Rows searched twice cost up to ten times more; with
data as normal noise that is one in 2000 at D = 64. sums are float64 in native, float32 in Triton,
in the rows' order: the same bits for any number of threads.

Edge cases: a distance that is NaN is never the least, and infinite ones are as far as any: a row
with NaN or infinity has code 0, a code with NaN or infinity is never chosen (unless it is code 0
and nothing is finite). D not a multiple of anything, K = 1 and N = 0 are fine.
"""

import torch
from torch import Tensor

CHUNK = 1 << 22  # distances at a time


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """int64 [N]: the nearest code of each row by float64 differences."""
    rows = max(1, CHUNK // codebook.shape[0])
    wide = codebook.double()
    found = []
    for part in x.split(rows):
        # Of differences, not of products: those cancel where rows are far from 0.
        distance = torch.cdist(
            part.double(), wide, compute_mode="donot_use_mm_for_euclid_dist"
        )  # [n, K]
        found.append(distance.nan_to_num(nan=float("inf"), posinf=float("inf")).argmin(1))
    return torch.cat(found)


def code_statistics(x: Tensor, indices: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """counts int64 [K] and sums [K, D], float32 or float64."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    counts = torch.zeros(codes, dtype=torch.int64, device=x.device)
    counts = counts.index_add(0, indices, torch.ones_like(indices))
    sums = torch.zeros(codes, x.shape[1], dtype=torch.float64, device=x.device)
    return counts, sums.index_add(0, indices, x.double()).to(dtype)
