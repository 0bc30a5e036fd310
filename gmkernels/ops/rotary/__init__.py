"""Rotary positions and rms_norm of queries and keys. Start with reference.py.

Saved for backward: the call's inputs.
"""

from typing import Any

import torch
from torch import Tensor

from gmkernels import checks, dispatch
from gmkernels.autograd import DifferentiableOp
from gmkernels.ops.rotary import reference

__all__ = ["rms_norm", "rotary_embedding", "rotary_table"]

dispatch.load_family(__name__, ("rotary_embedding", "rms_norm"))
_rotary_embedding = DifferentiableOp(
    "rotary_embedding", reference.rotary_embedding, inputs=1, outputs=1
)
_rms_norm = DifferentiableOp("rms_norm", reference.rms_norm, inputs=2, outputs=1)


def rotary_table(
    length: int,
    width: int,
    *,
    base: float = 10000.0,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of n base^(-2 i / width) for the places n < length and the pairs i < width / 2.

    Made once and kept by the model; rotary_embedding() reads them.

    Args:
        length: places, >= 0: the longest sequence.
        width: features that rotate, even, at most the width of a head.
        base: > 0; larger ones turn slower. 10000 is the paper's.
        device: of the tables; torch's default device if None.
    Returns:
        cos, sin: float32 [length, width / 2], the float64 values rounded once.
    Raises:
        ValueError: a length, width or base other than said here.

    Source: Su et al. 2021, eq. 34.

    >>> import gmkernels
    >>> gmkernels.rotary_table(2, 2)[1]
    tensor([[0.0000],
            [0.8415]])
    """
    op = "rotary_table"
    if not isinstance(length, int) or isinstance(length, bool) or length < 0:
        raise ValueError(f"{op}: length must be a whole number >= 0, got {length!r}")
    if not isinstance(width, int) or isinstance(width, bool) or width < 0 or width % 2:
        raise ValueError(f"{op}: width must be an even number >= 0, got {width!r}")
    if not 0 < base < float("inf"):
        raise ValueError(f"{op}: base must be positive and finite, got {base!r}")
    place = torch.arange(length, dtype=torch.float64, device=device)
    pair = torch.arange(width // 2, dtype=torch.float64, device=device)
    angle = place[:, None] * torch.pow(base, -2 * pair / max(width, 1))
    return angle.cos().to(torch.float32), angle.sin().to(torch.float32)


def _check_tables(op: str, x: Tensor, cos: Any, sin: Any) -> None:
    for name, table in (("cos", cos), ("sin", sin)):
        checks.check_tensor(op, name, table, x.device)
        if table.dim() != 2 or 2 * table.shape[1] > x.shape[3]:
            raise ValueError(
                f"{op}: {name} must have shape [N, M] with 2 M at most D = {x.shape[3]}, got "
                f"{tuple(table.shape)}; rotary_table(N, 2 * M) makes it"
            )
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {name} is a constant and takes no gradient; .detach() it")
    if cos.shape != sin.shape:
        raise ValueError(
            f"{op}: cos and sin must have the same shape, got {tuple(cos.shape)} and "
            f"{tuple(sin.shape)}"
        )


def _positions(op: str, positions: Any, x: Tensor, cos: Tensor) -> Tensor | None:
    """Positions as [1 or B, T]; None for 0, 1, ..."""
    batch, tokens = x.shape[0], x.shape[2]
    if positions is None:
        if tokens > cos.shape[0]:
            raise ValueError(
                f"{op}: the table has {cos.shape[0]} places, x has {tokens} tokens; make a longer "
                "one by rotary_table()"
            )
        return None
    if not isinstance(positions, Tensor) or positions.dtype != torch.int64:
        kind = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        raise TypeError(f"{op}: positions must be an int64 tensor, got {kind}")
    if positions.shape not in ((tokens,), (batch, tokens)) or positions.device != x.device:
        raise ValueError(
            f"{op}: positions must have shape [T] = ({tokens},) or [B, T] = ({batch}, {tokens}) on "
            f"{x.device}, got {tuple(positions.shape)} on {positions.device}"
        )
    return (positions if positions.dim() == 2 else positions[None]).contiguous()


def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Rotates pairs of features by their token's place, so that products see distances alone.

    (a, b) becomes (a cos - b sin, b cos + a sin). With -sin in place of sin it turns back.

    Args:
        x: queries or keys [B, H, T, D] in any strides (only a last dimension that is not contiguous
            costs a copy); float32, bfloat16, float16, or float64 (reference).
        cos, sin: [N, M] by place and pair, from rotary_table(N, 2 M); 2 M features rotate, the
            D - 2 M others pass. Constants; read as float32 (float64 if x is).
        positions: places in [0, N), int64 [T] or [B, T]; None is 0 to T - 1.
        interleaved: pairs are neighbours (2 i, 2 i + 1), as in GPT-J, and not the halves (i, i + M)
            of GPT-NeoX and Llama.
        backend: None chooses; a named backend runs or raises.
    Returns:
        [B, H, T, D] in x's dtype, contiguous (channels_last if x is).
    Raises:
        TypeError, ValueError: shapes, dtypes or devices other than said here; cos or sin that asks
            for a gradient; without positions, a table shorter than T.
        IndexError, RuntimeError: places outside the table, on the CPU; on a GPU they give NaN.
        RuntimeError: a named backend that cannot run.

    Differentiable twice and more in x. Accuracy: within twice the error of float32 PyTorch plus 2
    ulp of the output's scale. Source: Su et al. 2021, eq. 34.

    >>> import torch, gmkernels
    >>> cos, sin = gmkernels.rotary_table(2, 2)
    >>> gmkernels.rotary_embedding(torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]]), cos, sin)
    tensor([[[[1.0000, 0.0000],
              [0.5403, 0.8415]]]])
    """
    op = "rotary_embedding"
    checks.check_tensor(op, "x", x)
    if x.dim() != 4:
        raise ValueError(
            f"{op}: x must have shape [B, H, T, D], got {tuple(x.shape)}; "
            "x.unflatten(-1, (heads, -1)).transpose(1, 2) makes it of [B, T, H D]"
        )
    _check_tables(op, x, cos, sin)
    places = _positions(op, positions, x, cos)
    name = dispatch.choose(op, x.device.type, dispatch.is_wide(x), backend)
    if name != "reference":
        cos, sin = cos.to(torch.float32).contiguous(), sin.to(torch.float32).contiguous()
    (y,) = _rotary_embedding(name, last_contiguous(x), cos, sin, places, bool(interleaved))
    return checks.in_layout_of(y, x)


def last_contiguous(x: Tensor) -> Tensor:
    """x as it is if its last dimension is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        x: [*, D] with at least one dimension, D >= 1; heads [B, H, T, D] may have any strides, of
            other tensors only contiguous ones are read in place. float32, bfloat16, float16, or
            float64 (reference).
        weight: [D], its dtype may differ; None is 1.
        eps: >= 0.
        backend: None chooses; a named backend runs or raises.
    Returns:
        x's shape and dtype, contiguous (channels_last if x is); rounded once, after the weight.
    Raises:
        TypeError, ValueError: shapes, dtypes or devices other than said here.
        RuntimeError: a named backend that cannot run.

    Differentiable twice and more in x and weight; the gradient of weight has the same bits for any
    number of threads. Accuracy: as in rotary_embedding(). Source: Zhang and Sennrich 2019, eq. 4.

    >>> import torch, gmkernels
    >>> gmkernels.rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]))
    tensor([0.8485, 2.2627])
    """
    op = "rms_norm"
    checks.check_tensor(op, "x", x)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"{op}: x must have shape [*, D] with D >= 1, got {tuple(x.shape)}")
    if weight is not None:
        checks.check_tensor(op, "weight", weight, x.device)
        if weight.shape != x.shape[-1:]:
            raise ValueError(
                f"{op}: weight must have shape [D] = ({x.shape[-1]},), got {tuple(weight.shape)}"
            )
        weight = weight.contiguous()
    if isinstance(eps, Tensor) or not 0 <= eps < float("inf"):
        raise ValueError(f"{op}: eps must be a number >= 0, got {eps!r}")
    name = dispatch.choose(op, x.device.type, dispatch.is_wide(x, weight), backend)
    heads = last_contiguous(x) if x.dim() == 4 else x.reshape(1, 1, -1, x.shape[-1])
    (y,) = _rms_norm(name, heads, weight, float(eps))
    return checks.in_layout_of(y.view(x.shape), x)
