"""Checks that every public function makes once, in words. Never of values: that would sync."""

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(op: str, name: str, x: Any, device: torch.device | None = None) -> None:
    """A dense floating tensor on a device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name} must be float32, bfloat16, float16 or float64, got {x.dtype}; "
            "cast it first"
        )
    if x.layout is not torch.strided:
        raise TypeError(
            f"{op}: {name} must be a dense tensor, got layout {x.layout}; call .to_dense()"
        )
    if device is not None and x.device != device:
        raise ValueError(f"{op}: {name} must be on {device} like the others, got {x.device}")


def check_rows(op: str, name: str, x: Any) -> None:
    """A dense floating tensor [B, *] with at least one dimension after the batch."""
    check_tensor(op, name, x)
    if x.dim() < 2:
        raise ValueError(
            f"{op}: {name} must have shape [B, *] with at least two dimensions, "
            f"got {tuple(x.shape)}; "
            f"{name}[None] makes one row of a vector, {name}[:, None] one element a row"
        )


def check_like(op: str, name: str, x: Any, like_name: str, like: Tensor) -> None:
    """A dense floating tensor of another one's shape and device."""
    check_tensor(op, name, x, like.device)
    if x.shape != like.shape:
        raise ValueError(
            f"{op}: {name} must have {like_name}'s shape {tuple(like.shape)}, got {tuple(x.shape)}"
        )


def expand_rows(op: str, name: str, x: Any, like_name: str, like: Tensor) -> Tensor:
    """x of shape [*] or [1, *] seen as [B, *] without a copy; [B, *] as it is."""
    check_tensor(op, name, x, like.device)
    if x.shape == like.shape:
        return x
    if x.shape != like.shape[1:] and x.shape != (1, *like.shape[1:]):
        raise ValueError(
            f"{op}: {name} must have {like_name}'s shape {tuple(like.shape)}, or one row of it "
            f"{tuple(like.shape[1:])}, got {tuple(x.shape)}"
        )
    return x.expand(like.shape)


def is_row_contiguous(x: Tensor) -> bool:
    """Whether each row is contiguous; rows may be at any stride, as halves of one tensor are."""
    if x.is_contiguous():
        return True
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def in_rows(x: Tensor) -> Tensor:
    """x as it is if its rows are contiguous, else a contiguous copy."""
    return x if is_row_contiguous(x) else x.contiguous()


def in_layout_of(y: Tensor, like: Tensor) -> Tensor:
    """y in channels_last memory if `like` is, for results of `like`'s shape."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(like.dim())
    if wanted is None or like.is_contiguous() or not like.is_contiguous(memory_format=wanted):
        return y
    return y.contiguous(memory_format=wanted)
