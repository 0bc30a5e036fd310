"""What the operator of the family returns, unfilled: the fake, and what Triton writes into."""

import torch
from torch import Tensor


def next_token(
    logits: Tensor, key: Tensor, position: Tensor, temperature: float, top_k: int, share: int
) -> Tensor:
    """Tokens int64 [B]."""
    return torch.empty(logits.shape[:1], dtype=torch.int64, device=logits.device)
