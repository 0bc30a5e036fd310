"""What each operator of the family returns, unfilled: the fakes, and what Triton writes into."""

import torch
from torch import Tensor

from gmkernels.ops.gaussian.outputs import wanted


def contrastive_forward(
    q: Tensor, k: Tensor | None, scale: float, both: bool
) -> tuple[Tensor, Tensor]:
    """r, one a row of q, and c, one a row of k; c is empty without k or unless both. float32."""
    columns = q.shape[0] if both and k is not None else 0
    rows = torch.empty(q.shape[0], dtype=torch.float32, device=q.device)
    return rows, torch.empty(columns, dtype=torch.float32, device=q.device)


def contrastive_backward(
    drows: Tensor | None,
    dcolumns: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    q: Tensor,
    k: Tensor | None,
    scale: float,
    both: bool,
    needs: int,
) -> tuple[Tensor, ...]:
    """Gradients of q and k, empty where not wanted."""
    return wanted(needs, q, k)
