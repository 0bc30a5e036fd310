"""Rotary positions and root-mean-square normalisation: what queries and keys pass before attention.

Formula. x [B, H, T, D]; token t of row b stands at the place n = positions[b, t]; the first 2 M of
the D features rotate in M pairs (a_i, b_i), the rest pass. cos and sin [N, M] hold, by place,
    cos(n theta_i) and sin(n theta_i),  theta_i = base^(-i / M)                  rotary_table()
    a'_i = a_i cos_ni - b_i sin_ni      b'_i = b_i cos_ni + a_i sin_ni
Pairs are halves (a_i, b_i) = (x_i, x_(i + M)), as in GPT-NeoX and Llama, or neighbours (x_2i,
x_(2i+1)), as in the paper and GPT-J. Products of a query and a key depend on n - n' alone.
    rms_norm   y = x r weight,  r = 1 / sqrt(mean over D of x^2 + eps)
Sources: Su et al., "RoFormer", 2021, eq. 34 (arXiv:2104.09864); Black et al., "GPT-NeoX-20B", 2022
(halves, arXiv:2204.06745); Zhang and Sennrich 2019, eq. 4 (arXiv:1910.07467).

Gradients. A rotation's transpose is its inverse: dx is dy rotated by -n theta. Of rms_norm, with
h = dy weight and c = r^2 mean over D of h x:
    dx = r (h - c x)      dweight = sum over rows of dy x r
cos and sin are constants. Backward of the rotation reads the tables and positions (the call's x is
kept by the graph, but not read); rms_norm's reads x and makes r again.

Bytes, N = B H T D elements: 2 N forward and 2 N backward of a rotation (the tables, T M, are read
once for all heads), 2 N and 3 N of rms_norm. Eager PyTorch moves about 10 N for a rotation (halves,
negation, concatenation, two products, a sum) and 6 N for rms_norm in parts. Flops: 3 and 4 an
element.
Not fused into attention: at B 4, H 8, T 1024, D 64 on a CPU, turning q and k takes 2 to 5 % of the
causal forward, rms_norm of both 4 to 7 %. A prologue inside would save one pass over q and k, but
turn each key again for each tile of queries, and once more in the backward.

Numerics. Angles are float64, so the table is right to half an ulp of float32 at every place;
n theta in float32 would be wrong by 6e-8 n radians, 0.004 at n = 65536. All sums are float32,
those of dweight over few rows, then float64, in an order that the shape alone gives; so the same
bits on every run.

Edge cases: M = 0 copies. No rows, no tokens and no heads are fine. A place outside the table
raises on the CPU and gives NaN on a GPU, which cannot say so without stopping. A row of zeros has
y = 0 and the gradient dy weight / sqrt(eps).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gmkernels.ops.gaussian.reference import compute_dtype


def at_places(table: Tensor, positions: Tensor | None, tokens: int) -> Tensor:
    """Rows of a table [N, M] by place: [1 or B, 1, T, M]."""
    if positions is None:
        return table[None, None, :tokens]
    return F.embedding(positions, table).unsqueeze(-3).expand(-1, 1, -1, -1)


def rotary_embedding(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> tuple[Tensor]:
    """x rotated, [B, H, T, D]; cos, sin [N, M]; positions int64 [1 or B, T], or None for 0, 1..."""
    dtype = compute_dtype(x)
    c = at_places(cos, positions, x.shape[2]).to(dtype)
    s = at_places(sin, positions, x.shape[2]).to(dtype)
    half = cos.shape[1]
    turned, rest = x[..., : 2 * half].to(dtype), x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        y = torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        y = torch.cat([a * c - b * s, b * c + a * s], -1)
    return (torch.cat([y.to(x.dtype), rest], -1).contiguous(),)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor]:
    """x [*, D] over the root of its mean square, times weight [D]."""
    dtype = compute_dtype(x, weight)
    wide = x.to(dtype)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(dtype)
    return (y.to(x.dtype).contiguous(),)
