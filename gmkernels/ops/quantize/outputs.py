"""What each operator of the family returns, unfilled: the fakes, and what Triton writes into."""

import torch
from torch import Tensor


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """indices [N]."""
    return torch.empty(x.shape[0], dtype=torch.int64, device=x.device)


def code_statistics(x: Tensor, indices: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """counts [K] and sums [K, D]."""
    counts = torch.empty(codes, dtype=torch.int64, device=x.device)
    return counts, torch.empty(codes, x.shape[1], dtype=torch.float32, device=x.device)


FAKES = (nearest_code, code_statistics)
