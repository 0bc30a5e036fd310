"""What each operator of the family returns, unfilled: the fakes, and what Triton writes into.

And the backward operator, which is the same plain PyTorch on every backend.
"""

from torch import Tensor

from gmkernels.ops.decode import reference
from gmkernels.ops.gaussian.outputs import wanted


def decode_attention_forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """o like q, contiguous."""
    return q.new_empty(q.shape)


def fake_backward(
    do: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    window: int,
    scale: float,
    softcap: float,
    needs: int,
) -> tuple[Tensor, ...]:
    """Gradients of q, k_cache and v_cache, empty where not wanted."""
    return wanted(needs, q, k_cache, v_cache)


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
    """Gradients of q, k_cache and v_cache in their dtypes, empty where not wanted."""
    made = reference.decode_attention_backward(
        do, q, k_cache, v_cache, lengths, window, scale, softcap, needs
    )
    dq, dk, dv = (g.to(x.dtype) for g, x in zip(made, (q, k_cache, v_cache), strict=True))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()
