"""Triton kernels of the likelihood family."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gmkernels import dispatch
from gmkernels.ops.likelihood import outputs
from gmkernels.triton_common import CHUNK, launch, load_tile, log1p_unit, row_stride, sigmoid, tile
from gmkernels.triton_common import DEVICES as _DEVICES

DEVICES = dict.fromkeys(("gaussian_nll", "bernoulli_nll", "categorical_nll"), _DEVICES)


@triton.jit
def elementwise_kernel(
    x_ptr,  # [B, D]
    other_ptr,  # [B, D]: mean, or logits if BERNOULLI
    logvar_ptr,  # [B, D], or [B] if PER_ROW; read if LOGVAR
    sum_ptr,  # float32 [B, chunks]
    rows,
    columns,
    x_stride,
    other_stride,
    logvar_stride,
    BERNOULLI: tl.constexpr,
    LOGVAR: tl.constexpr,
    PER_ROW: tl.constexpr,
    CHUNK: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program a chunk of R rows.
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    chunk = tl.program_id(1)
    total = tl.zeros((R, C), tl.float32)
    for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, columns), C):
        d = start + tl.arange(0, C)[None, :]
        mask = (row < rows) & (d < columns)
        x = load_tile(x_ptr, row, d, x_stride, mask, True)
        s = load_tile(other_ptr, row, d, other_stride, mask, True)
        if BERNOULLI:
            f = tl.where(s > 0.0, 1.0 - x, x)
            far = tl.where(f == 0.0, 0.0, tl.abs(s) * f)
            term = tl.where(s != s, s, far + log1p_unit(tl.exp(-tl.abs(s))))
        else:
            term = (x - s) * (x - s)
            if LOGVAR:
                l = load_tile(logvar_ptr, row, d * (0 if PER_ROW else 1), logvar_stride, mask, True)
                term = term * tl.exp(-l) + l
            term = 0.5 * (term + 1.8378770664093453)
        total += tl.where(mask, term, 0.0)
    out = sum_ptr + row * tl.num_programs(1) + chunk
    tl.store(out, tl.sum(total, axis=1, keep_dims=True), mask=row < rows)


@triton.jit
def elementwise_backward_kernel(
    dnll_ptr,  # [B]
    x_ptr,  # [B, D]
    other_ptr,  # [B, D]: mean, or logits if BERNOULLI
    logvar_ptr,  # [B, D], or [B] if PER_ROW; read if LOGVAR
    dx_ptr,  # gradients [B, D] contiguous, each written if its bit of NEEDS is set
    dother_ptr,
    dlogvar_ptr,
    rows,
    columns,
    dnll_stride,
    x_stride,
    other_stride,
    logvar_stride,
    BERNOULLI: tl.constexpr,
    LOGVAR: tl.constexpr,
    PER_ROW: tl.constexpr,
    NEEDS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program a tile [R, C].
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    d = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    mask = (row < rows) & (d < columns)
    x = load_tile(x_ptr, row, d, x_stride, mask, True)
    s = load_tile(other_ptr, row, d, other_stride, mask, True)
    g = load_tile(dnll_ptr, row * dnll_stride, d * 0, 1, mask, True)
    if BERNOULLI:
        dx = -(g * s)
        dother = g * (sigmoid(s) - x)
        dlogvar = dx
    else:
        l = load_tile(logvar_ptr, row, d * (0 if PER_ROW else 1), logvar_stride, mask, LOGVAR)
        scaled = (x - s) * tl.exp(-l)
        dx = g * scaled
        dother = -dx
        dlogvar = g * 0.5 * (1.0 - (x - s) * scaled)
    out = row * columns + d
    if NEEDS & 1:
        tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if NEEDS & 2:
        tl.store(dother_ptr + out, dother.to(dother_ptr.dtype.element_ty), mask=mask)
    if NEEDS & 4:
        tl.store(dlogvar_ptr + out, dlogvar.to(dlogvar_ptr.dtype.element_ty), mask=mask)


@triton.jit
def categorical_kernel(
    logits_ptr,  # [N, L], contiguous
    levels_ptr,  # [N], any integer dtype
    out_ptr,  # float32 [N] nll if NLL; else [2, N]: top logit, log sum exp(s - top)
    positions,
    size,
    NLL: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program R positions: an online logsumexp over L.
    n = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    level = tl.load(levels_ptr + n, mask=n < positions, other=0)
    top = tl.full((R, 1), -float("inf"), tl.float32)
    total = tl.zeros((R, 1), tl.float32)
    for start in range(0, size, C):
        k = start + tl.arange(0, C)[None, :]
        mask = (n < positions) & (k < size)
        s = tl.load(logits_ptr + n * size + k, mask=mask, other=-float("inf")).to(tl.float32)
        above = tl.maximum(top, tl.max(s, axis=1, keep_dims=True))
        base = tl.where(above == -float("inf"), 0.0, above)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(s - base), axis=1, keep_dims=True)
        top = above
    log_total = tl.log(tl.where(n < positions, total, 1.0))
    if NLL:
        inside = (level >= 0) & (level < size)
        at = logits_ptr + n * size + tl.where(inside, level, 0)
        chosen = tl.load(at, mask=n < positions, other=0.0).to(tl.float32)
        nll = tl.where(inside, (top - chosen) + log_total, float("nan"))
        tl.store(out_ptr + n, nll, mask=n < positions)
    else:
        tl.store(out_ptr + n, top, mask=n < positions)
        tl.store(out_ptr + positions + n, log_total, mask=n < positions)


@triton.jit
def categorical_backward_kernel(
    dnll_ptr,  # [B] at dnll_stride
    logits_ptr,  # [N, L], contiguous
    levels_ptr,  # [N], any integer dtype
    softmax_ptr,  # float32 [2, N]: top logit, log sum exp(s - top)
    dlogits_ptr,  # [N, L], contiguous
    positions,
    columns,  # positions a row
    size,
    dnll_stride,
    R: tl.constexpr,
    C: tl.constexpr,
):
    # One program a tile [R, C] of positions and levels.
    n = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    k = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    mask = (n < positions) & (k < size)
    level = tl.load(levels_ptr + n, mask=n < positions, other=0)
    top = tl.load(softmax_ptr + n, mask=n < positions, other=0.0)
    log_total = tl.load(softmax_ptr + positions + n, mask=n < positions, other=0.0)
    g = tl.load(dnll_ptr + n // columns * dnll_stride, mask=n < positions, other=0.0)
    g = tl.where((level >= 0) & (level < size), g, float("nan"))
    s = tl.load(logits_ptr + n * size + k, mask=mask, other=0.0).to(tl.float32)
    p = tl.exp((s - top) - log_total) - tl.where(k == level, 1.0, 0.0)
    out = (g.to(tl.float32) * p).to(dlogits_ptr.dtype.element_ty)
    tl.store(dlogits_ptr + n * size + k, out, mask=mask)


def _launch_forward(x: Tensor, other: Tensor, logvar: Tensor | None, is_bernoulli: bool) -> Tensor:
    rows, columns = x.shape[0], math.prod(x.shape[1:])
    r, c = tile(rows, columns)
    chunks = max(1, triton.cdiv(columns, CHUNK))
    sums = torch.empty((rows, chunks), dtype=torch.float32, device=x.device)
    launch(
        elementwise_kernel,
        (triton.cdiv(rows, r), chunks),
        x,
        other,
        x if logvar is None else logvar,
        sums,
        rows,
        columns,
        *map(row_stride, (x, other, logvar)),
        BERNOULLI=is_bernoulli,
        LOGVAR=logvar is not None,
        PER_ROW=logvar is not None and logvar.dim() == 1,
        CHUNK=CHUNK,
        R=r,
        C=c,
    )
    return sums.view(rows) if chunks == 1 else sums.sum(1)


def _launch_backward(
    dnll: Tensor, x: Tensor, other: Tensor, logvar: Tensor | None, made: Any, is_bernoulli: bool
) -> None:
    rows, columns = x.shape[0], math.prod(x.shape[1:])
    r, c = tile(rows, columns)
    launch(
        elementwise_backward_kernel,
        (triton.cdiv(rows, r), triton.cdiv(columns, c)),
        dnll,
        x,
        other,
        x if logvar is None else logvar,
        *made,
        rows,
        columns,
        *map(row_stride, (dnll, x, other, logvar)),
        BERNOULLI=is_bernoulli,
        LOGVAR=logvar is not None,
        PER_ROW=logvar is not None and logvar.dim() == 1,
        NEEDS=sum(1 << i for i, gradient in enumerate(made) if gradient.numel()),
        R=r,
        C=c,
    )


def gaussian_nll_forward(x: Tensor, mean: Tensor, logvar: Tensor | None) -> Tensor:
    """nll [B]."""
    return _launch_forward(x, mean, logvar, False)


def gaussian_nll_backward(
    dnll: Tensor, x: Tensor, mean: Tensor, logvar: Tensor | None, needs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, mean and logvar, empty where not wanted."""
    per_row = logvar is not None and logvar.dim() == 1
    dx, dmean, dlogvar = outputs.gaussian_nll_backward(
        dnll, x, mean, None if per_row else logvar, needs
    )
    if per_row and needs & 4:
        dlogvar = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    _launch_backward(dnll, x, mean, logvar, (dx, dmean, dlogvar), False)
    if per_row and needs & 4 and logvar is not None:
        dlogvar = dlogvar.flatten(1).sum(1).to(logvar.dtype)
    return dx, dmean, dlogvar


def bernoulli_nll_forward(x: Tensor, logits: Tensor) -> Tensor:
    """nll [B]."""
    return _launch_forward(x, logits, None, True)


def bernoulli_nll_backward(
    dnll: Tensor, x: Tensor, logits: Tensor, needs: int
) -> tuple[Tensor, Tensor]:
    """Gradients of x and logits, empty where not wanted."""
    dx, dlogits = outputs.bernoulli_nll_backward(dnll, x, logits, needs)
    _launch_backward(dnll, x, logits, None, (dx, dlogits, dx.new_empty(0)), True)
    return dx, dlogits


def _categorical_positions(logits: Tensor, levels: Tensor, nll: bool) -> Tensor:
    # nll of every position [B, *], or the two numbers of its softmax [2, B, *].
    size = logits.shape[-1]
    shape = levels.shape if nll else (2, *levels.shape)
    out = torch.empty(shape, dtype=torch.float32, device=logits.device)
    r, c = tile(levels.numel(), size)
    grid = (triton.cdiv(levels.numel(), r),)
    args = (logits.contiguous(), levels, out, levels.numel(), size)
    launch(categorical_kernel, grid, *args, NLL=nll, R=r, C=c)
    return out


def categorical_nll_forward(logits: Tensor, levels: Tensor) -> Tensor:
    """nll [B]."""
    return _categorical_positions(logits, levels, True).flatten(1).sum(1)


def categorical_nll_backward(dnll: Tensor, logits: Tensor, levels: Tensor, needs: int) -> Tensor:
    """Gradient of logits, empty if not wanted."""
    dlogits = outputs.categorical_nll_backward(dnll, logits, levels, needs)
    if not dlogits.numel():
        return dlogits
    softmax = _categorical_positions(logits, levels, False)
    positions, size = levels.numel(), logits.shape[-1]
    r, c = tile(positions, size)
    launch(
        categorical_backward_kernel,
        (triton.cdiv(positions, r), triton.cdiv(size, c)),
        dnll,
        logits.contiguous(),
        levels,
        softmax,
        dlogits,
        positions,
        math.prod(levels.shape[1:]),
        size,
        row_stride(dnll),
        R=r,
        C=c,
    )
    return dlogits


for _fake in outputs.FAKES:
    dispatch.define("gmkernels_triton", globals()[_fake.__name__], _fake)
