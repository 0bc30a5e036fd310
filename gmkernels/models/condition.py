"""How a network is told a condition c."""

import torch
from torch import Tensor


def join_condition(x: Tensor, c: Tensor | None) -> Tensor:
    """Concatenates c [B, K] to x [B, C, *] along dimension 1, as K constant planes if x has more.

    None leaves x as it is.
    """
    if c is None:
        return x
    planes = c.to(x.dtype).view(*c.shape, *(1,) * (x.dim() - 2))
    return torch.cat([x, planes.expand(*c.shape, *x.shape[2:])], 1)
