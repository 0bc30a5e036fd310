"""Attention of queries to keys and values: causal, full, cross; and its log-sum-exp.

Formula. q [B, H, T, D], k and v [B, H_kv, T_k, D]; query head h reads key head h // (H / H_kv);
query i sees the keys of a set V_i.
    s_ij   = scale q_i k_j, or softcap tanh(scale q_i k_j / softcap)
    lse_i  = log sum_{j in V_i} exp(s_ij)                                           nats
    p_ij   = exp(s_ij - lse_i) for j in V_i, else 0
    o_i    = sum_j p_ij v_j
V_i is an interval of keys, less the keys that key_mask hides. Query i stands at the place
i + T_k - T (bottom-right: the last query beside the last key); causal attention sees no key after
that place, a window the last `window` of these. In a packed batch the interval ends at the borders
of the token's own sequence. Both ends of the interval never decrease with i.
Sources: Vaswani et al., "Attention is all you need", 2017, eq. 1 (arXiv:1706.03762); the pass over
blocks of keys: Dao et al., "FlashAttention", 2022, algorithm 1 (arXiv:2205.14135); grouped heads:
Ainslie et al., 2023 (arXiv:2305.13245); window: Beltagy et al., 2020 (arXiv:2004.05150).

Gradients, with do [B, H, T, D] and dlse [B, H, T] given:
    delta_i = sum_d o_id do_id - dlse_i
    dp_ij   = do_i v_j
    ds_ij   = p_ij (dp_ij - delta_i), times 1 - (s_ij / softcap)^2 under a softcap
    dq_i    = scale sum_j ds_ij k_j      dk_j = scale sum_i ds_ij q_i      dv_j = sum_i p_ij do_i
dk and dv are summed over the query heads that share them. Backward saves q, k, v, o and lse; it
makes s and p again, block by block. No matrix T x T is ever stored.

Bytes: q, k, v and o once, 4 N in each of the three directions that N = B H T D elements go (eager
PyTorch moves three to five matrices B H T T as well). Flops: 4 D for each pair of a query and a key
that it sees, 10 D more for the backward.

Numerics. Scores, the running maximum, sums and outputs are float32. bfloat16 and float16 heads are
multiplied exactly and summed in float32; where the CPU or the GPU multiplies 16-bit numbers, p and
ds are rounded to them once, as in FlashAttention. Backward's p carries the rounding of a stored
lse, a relative error of |lse| 2^-24. Sums over keys run in blocks in order, sums over
queries likewise, so results have the same bits on every run and for any number of threads.

Edge cases: a query that sees no key has o = 0, lse = -inf and no gradient. T = 0 and T_k = 0 are
fine. NaN in a query stays in its row. Hidden keys and values must be finite: 0 times NaN is NaN.
"""

import torch
from torch import Tensor

from gmkernels.ops.gaussian.reference import compute_dtype


def visible_range(
    queries: int,
    keys: int,
    causal: bool,
    window: int,
    cu_seqlens: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The keys [low, high) that each query may see, key_mask aside; int64 [T] each."""
    i = torch.arange(queries, device=device)
    low, high = torch.zeros_like(i), torch.full_like(i, keys)
    if cu_seqlens is not None:
        offsets = cu_seqlens.to(torch.int64)
        sequence = torch.searchsorted(offsets, i, right=True)  # offsets[sequence - 1] <= i
        last = offsets.shape[0] - 1
        covered = (sequence >= 1) & (sequence <= last)
        low = torch.where(covered, offsets[(sequence - 1).clamp(min=0)], i)
        high = torch.where(covered, offsets[sequence.clamp(max=last)], i)
    if causal:
        end = (i + keys - queries + 1).clamp(min=0)
        high = torch.minimum(high, end)
        if window > 0:
            low = torch.maximum(low, (end - window).clamp(min=0))
    return low, high


def visible(
    queries: int,
    keys: int,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int,
    device: torch.device,
) -> Tensor:
    """Whether a query sees a key.  # [1 or B, 1, T, T_k]"""
    low, high = visible_range(queries, keys, causal, window, cu_seqlens, device)
    j = torch.arange(keys, device=device)
    seen = ((j >= low[:, None]) & (j < high[:, None]))[None, None]
    return seen if key_mask is None else seen & key_mask[:, None, None]


def softmax_over(s: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """p like s and lse without its last dimension: of the scores of the keys that are seen."""
    s = s.masked_fill(~seen, float("-inf"))
    top = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_zeros((*s.shape[:-1], 1))
    top = torch.where(top == float("-inf"), 0.0, top)
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    none = total == 0
    total = torch.where(none, 1.0, total)
    lse = torch.where(none, float("-inf"), top + torch.log(total)).squeeze(-1)
    return e / total, lse


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """o [B, H, T, D] in q's dtype (empty without v) and lse [B, H, T]."""
    dtype = compute_dtype(q, k, v)
    group = q.shape[1] // k.shape[1]
    s = scale * (q.to(dtype) @ k.to(dtype).repeat_interleave(group, 1).mT)
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    seen = visible(q.shape[2], k.shape[2], key_mask, cu_seqlens, causal, window, q.device)
    p, lse = softmax_over(s, seen)
    if v is None:
        return q.new_empty(0), lse
    o = p @ v.to(dtype).repeat_interleave(group, 1)
    return o.to(q.dtype), lse
