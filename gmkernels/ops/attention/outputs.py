"""What each operator of the family returns, unfilled: the fakes, and what Triton writes into."""

import torch
from torch import Tensor

from gmkernels.ops.gaussian.outputs import wanted


def attention_forward(
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
    """o like q, empty without v; lse [B, H, T] float32."""
    o = q.new_empty(0 if v is None else q.shape)
    return o, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def attention_backward(
    do: Tensor | None,
    dlse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    needs: int,
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, empty where not wanted."""
    return wanted(needs, q, k, v)
