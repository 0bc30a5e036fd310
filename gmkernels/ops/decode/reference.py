"""Attention of a few new queries of each sequence to a cache of keys and values.

Formula. q [B, H, T, D] are the queries of the last T tokens of each sequence, k and v
[B, H_kv, S, D] caches of capacity S of which row b holds lengths[b] tokens, the new ones among
them; query head h reads key head h // (H / H_kv). Query i of row b stands at the place
lengths[b] - T + i and sees the keys V_bi up to its place, of a window the last `window` of these.
    s_ij   = scale q_i k_j, or softcap tanh(scale q_i k_j / softcap)
    p_ij   = exp(s_ij) / sum_{l in V_bi} exp(s_il) for j in V_bi, else 0
    o_i    = sum_j p_ij v_j
which is causal attention's last T rows. Sources: Vaswani et al., "Attention is all you need", 2017,
eq. 1 (arXiv:1706.03762); keys cut into parts that are joined by their maxima and sums: Dao et al.,
"Flash-Decoding", 2023 (crfm.stanford.edu/2023/10/12/flashdecoding.html).

Kernels cut the keys into parts of a fixed size. A part gives its maximum m, its sum l of
exp(s - m) and its sum a of exp(s - m) v. These join in order of the keys:
    M = max m    o = sum exp(m - M) a / sum exp(m - M) l
The cuts lie at fixed places of the cache, so the bits of a query's output depend on its own keys
alone: neither on its neighbours in the batch, nor on the capacity, nor on the number of threads.

Gradients, with do [B, H, T, D] given:
    dp_ij   = do_i v_j        ds_ij = p_ij (dp_ij - sum_l p_il dp_il),
              times 1 - (s_ij / softcap)^2 under a softcap
    dq_i    = scale sum_j ds_ij k_j      dk_j = scale sum_i ds_ij q_i      dv_j = sum_i p_ij do_i
summed over the query heads that share a key head; 0 where no query sees the key. Decoding is not a
training step: the backward is this formula in plain PyTorch on every backend. It saves the inputs
and stores scores [B, H, T, S].

Bytes: the keys and values that are seen, once; the rest is small. Flops: 4 D for each pair of a
query and a key that it sees, so with T H / H_kv below about 10 the call is as fast as memory is
read. Eager PyTorch reads the whole capacity, and moves B H T S scores several times.

Numerics. q, k and v are taken to float32 exactly; scores, maxima, sums and outputs are float32.
Only where a GPU multiplies four rows of queries or more in 16 bits, p is rounded to these once.

Edge cases: a length outside [0, S] counts as the nearer end. A query that sees no key (a length of
0, or below T for the first queries) has o = 0 and no gradient. What no query of a row sees is never
read, and may be NaN; NaN in a query stays in its row. T = 0 and S = 0 are fine.
"""

import torch
from torch import Tensor

from gmkernels.ops.attention.reference import softmax_over
from gmkernels.ops.gaussian.reference import compute_dtype


def visible(lengths: Tensor, queries: int, keys: int, window: int) -> Tensor:
    """Whether a query of a row sees a key.  # [B, T, S]"""
    length = lengths.to(torch.int64).clamp(0, keys)
    high = length[:, None] + torch.arange(1 - queries, 1, device=lengths.device)  # [B, T]
    j = torch.arange(keys, device=lengths.device)
    seen = j < high[..., None]
    return seen & (j >= (high - window)[..., None]) if window > 0 else seen


def _shared(q: Tensor, kv_heads: int) -> Tensor:
    """[B, H, T, D] as [B, H_kv, H / H_kv T, D]: the queries of all heads that share a key head."""
    return q.reshape(q.shape[0], kv_heads, q.shape[1] // kv_heads * q.shape[2], q.shape[3])


def _scores(
    q: Tensor, k: Tensor, seen: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """s, and whether a query sees a key.  # [B, H_kv, H / H_kv T, S]"""
    s = scale * (q @ k.mT)
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    return s, seen.repeat(1, q.shape[2] // max(seen.shape[1], 1), 1)[:, None]


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor]:
    """o [B, H, T, D] in q's dtype."""
    dtype = compute_dtype(q, k_cache, v_cache)
    seen = visible(lengths, q.shape[2], k_cache.shape[2], window)
    unseen = ~seen.any(1)[:, None, :, None]
    k, v = (x.to(dtype).masked_fill(unseen, 0.0) for x in (k_cache, v_cache))
    s, seen = _scores(_shared(q.to(dtype), k.shape[1]), k, seen, scale, softcap)
    p, _ = softmax_over(s, seen)
    return ((p @ v).view(q.shape).to(q.dtype),)


def decode_attention_backward(
    do: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    window: int,
    scale: float,
    softcap: float,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k_cache and v_cache in float32, empty where not wanted."""
    seen = visible(lengths, q.shape[2], k_cache.shape[2], window)
    unseen = ~seen.any(1)[:, None, :, None]
    k, v = (x.float().masked_fill(unseen, 0.0) for x in (k_cache, v_cache))
    rows, drows = (_shared(x.float(), k.shape[1]) for x in (q, do))
    s, seen = _scores(rows, k, seen, scale, softcap)
    p, _ = softmax_over(s, seen)
    dp = drows @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    if softcap > 0:
        ds = ds * (1.0 - (s / softcap) ** 2)
    none = q.new_empty(0)
    dq = scale * (ds @ k).view(q.shape) if needs & 1 else none
    dk = scale * (ds.mT @ rows) if needs & 2 else none
    dv = p.mT @ drows if needs & 4 else none
    return dq, dk, dv
