"""Triton launchers and operators of the contrastive family; the kernels are in triton_device.py."""

import torch
import triton
from torch import Tensor

from gmkernels import dispatch
from gmkernels.ops.contrastive import outputs
from gmkernels.ops.contrastive.triton_device import forward_kernel, gradient_kernel
from gmkernels.triton_common import DEVICES as _DEVICES
from gmkernels.triton_common import launch

DEVICES = {"contrastive": _DEVICES}
Side = tuple[Tensor, Tensor] | None  # log-sum-exps of rows and their gradients


def _blocks(q: Tensor, backward: bool) -> tuple[int, int, int]:
    """Rows, others and columns of a tile: what fits registers and shared memory."""
    width = max(16, triton.next_power_of_2(q.shape[1]))
    if q.dtype == torch.float32:  # no tensor cores at full precision: small tiles
        return 16, 32, min(64, width)
    return 32 if backward or width > 128 else 64, 32, min(128, width)


def _pairs(q: Tensor, k: Tensor | None) -> int:
    return q.shape[0] // 2 if k is None else q.shape[0]


def _forward(own: Tensor, other: Tensor, lse: Tensor, pairs: int, scale: float) -> None:
    r, c, bd = _blocks(own, False)
    rows, d = own.shape
    launch(
        forward_kernel,
        (triton.cdiv(rows, r),),
        *(own, other, lse, own.stride(0), other.stride(0), rows, pairs, scale),
        D=d,
        BD=bd,
        R=r,
        C=c,
    )


def contrastive_forward(
    q: Tensor, k: Tensor | None, scale: float, both: bool
) -> tuple[Tensor, Tensor]:
    """r, one a row of q, and c, one a row of k; c is empty without k or unless both. float32."""
    rows, columns = outputs.contrastive_forward(q, k, scale, both)
    _forward(q, q if k is None else k, rows, _pairs(q, k), scale)
    if k is not None and both:
        _forward(k, q, columns, _pairs(q, k), scale)
    return rows, columns


def _gradient(
    own: Tensor,
    other: Tensor,
    mine: Side,
    theirs: Side,
    gradient: Tensor,
    pairs: int,
    scale: float,
) -> None:
    r, c, bd = _blocks(own, True)
    rows, d = own.shape
    launch(
        gradient_kernel,
        (triton.cdiv(rows, r), triton.cdiv(d, bd)),
        *(own, other, *(mine or (own, own)), *(theirs or (own, own)), gradient),
        *(own.stride(0), other.stride(0), rows, pairs, scale),
        OWN=mine is not None,
        OTHER=theirs is not None,
        WIDE=own.dtype == torch.float16,
        D=d,
        BD=bd,
        R=r,
        C=c,
    )


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
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k, empty where not wanted."""
    dq, dk = outputs.wanted(needs, q, k)
    pairs = _pairs(q, k)
    of_rows = None if drows is None else (rows, drows.contiguous())
    of_columns = None if dcolumns is None or not both else (columns, dcolumns.contiguous())
    if k is None:
        if needs & 1:
            _gradient(q, q, of_rows, of_rows, dq, pairs, scale)
        return dq, dk
    if needs & 1:
        _gradient(q, k, of_rows, of_columns, dq, pairs, scale)
    if needs & 2:
        _gradient(k, q, of_columns, of_rows, dk, pairs, scale)
    return dq, dk


for _op, _fake in (
    (contrastive_forward, outputs.contrastive_forward),
    (contrastive_backward, outputs.contrastive_backward),
):
    dispatch.define("gmkernels_triton", _op, _fake)
