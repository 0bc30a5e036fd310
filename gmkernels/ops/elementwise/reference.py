"""Elementwise maps of a flow with their log-determinants, and the noise that makes levels real.

Formula. Rows b of C channels c (dimension 1) and P pixels each, or of D elements d.
    actnorm     y = (x + shift_c) exp(l_c)            log_det_b =  P sum_c l_c
                x = y exp(-l_c) - shift_c             log_det_b = -P sum_c l_c
    leaky       y = x for x >= 0, slope x below       log_det_b = n_b log slope, n_b: elements < 0
                x = y for y >= 0, y / slope below     log_det_b = -n_b log slope
    logit       p = alpha + (1 - 2 alpha) x,  q = 1 - p,  y = log p - log q
                                                      log_det_b = sum log(1 - 2 alpha) - log p q
                p = sigmoid(y),  x = (p - alpha) / (1 - 2 alpha)
                                                      log_det_b = sum log p q - log(1 - 2 alpha)
    dequantize  x = (k + u) / n for a level k of n, u uniform in [0, 1); kept inside the level
Source: Kingma and Dhariwal 2018 (Glow), section 3.1 (arXiv:1807.03039); Dinh et al. 2017, section
4.1 (arXiv:1605.08803); Uria et al. 2013 for uniform dequantisation (arXiv:1306.0186).

Gradients, with g = d output and l_b = dlog_det, m = 1 - 2 alpha:
    actnorm     dx = g exp(l_c)    dshift = exp(l_c) sum g    dl = exp(l_c) sum g (x + shift) + P L
    its inverse dy = g exp(-l_c)   dshift = -sum g            dl = -exp(-l_c) sum g y - P L
                sums over the batch and the pixels of a channel, L = sum_b l_b
    leaky       dx = g, slope g below 0;          its inverse: dy = g, g / slope below 0
    logit       dx = m / (p q) (g + l_b (p - q)); its inverse: dy = g p q / m + l_b (q - p)
Backward saves the call's input and the parameters. dequantize has no gradient.

Bytes, float32, N = B D: forward reads 4 N and writes 4 N; backward reads 8 N and writes 4 N.
dequantize reads N to 8 N and writes 4 N. Eager PyTorch moves 24 N for actnorm's forward and some
60 N for logit's, whose logarithms, sums and differences each go to memory and back.
Flops: actnorm 2 N, leaky 2 N, logit and its inverse 50 N, dequantize 15 N.

Numerics. q = alpha + m (1 - x), since 1 - x is exact above 1/2 where 1 - p would cancel. log p q of
the inverse is -|y| - 2 log1p(exp(-|y|)). n_b is counted, not summed. Gradients of shift and l are
sums of float32 over a few rows (C++ 32), of double from there on, in an order that the shape alone
gives; g (x + shift) is summed, since sum g x + shift sum g cancels where the mean is far from 0.
dequantize keeps floor(x n) = k. Rounding alone breaks it: k + u rounds up to k + 1 for u near 1,
and fl(fl(k / 83) 83) < k for 12 of the k. So x is held between k (1 + 2^-22) / n and (k + 1)
(1 - 2^-22) / n, each one product with a rounded factor, at most 2^-23 off: what is cut is a few
units of x's last place, and the two stay apart for n up to 2^20.

Edge cases: no rows and no columns give empty results and log_det 0. NaN stays NaN in y; a NaN is no
element below 0, so leaky's log_det stays finite. alpha = 0 gives -inf at x = 0, +inf at 1, and
log_det +inf there. An infinite y gives x outside (0, 1) by alpha / m and log_det -inf.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gmkernels.ops.gaussian.reference import compute_dtype

KINDS = ("leaky", "logit")
MAX_BINS = 1 << 20
MARGIN = 2.0**-22  # how far from the edges of its level x stays, relative to it


def actnorm(x: Tensor, shift: Tensor, log_scale: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """The mapped row like x, and log_det [B]; shift and log_scale [C] along dimension 1."""
    dtype = compute_dtype(x, shift, log_scale)
    channels = (-1, *(1,) * (x.dim() - 2))
    t, l = shift.to(dtype).view(channels), log_scale.to(dtype).view(channels)
    wide = x.to(dtype)
    y = wide * torch.exp(-l) - t if inverse else (wide + t) * torch.exp(l)
    log_det = l.sum() * (math.prod(x.shape[2:]) * (-1 if inverse else 1))
    return y.to(x.dtype), log_det.repeat(x.shape[0])


def _leaky(x: Tensor, slope: float, inverse: bool) -> tuple[Tensor, Tensor]:
    y = torch.where(x < 0, x / slope if inverse else x * slope, x)
    log_slope = -math.log(slope) if inverse else math.log(slope)
    return y, (x < 0).flatten(1).sum(1).to(x.dtype) * log_slope


def _logit(x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    m = 1 - 2 * alpha
    log_p, log_q = torch.log(alpha + m * x), torch.log(alpha + m * (1 - x))
    return log_p - log_q, (math.log(m) - log_p - log_q).flatten(1).sum(1)


def _logit_inverse(y: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    m = 1 - 2 * alpha
    log_p, log_q = F.logsigmoid(y), F.logsigmoid(-y)
    # exp(log p) and not torch.sigmoid, whose bits depend on where in the tensor an element stands.
    x = (torch.exp(log_p) - alpha) / m
    return x, (log_p + log_q - math.log(m)).flatten(1).sum(1)


def pointwise(x: Tensor, kind: int, parameter: float, inverse: bool) -> tuple[Tensor, Tensor]:
    """The mapped row like x, and log_det [B]; parameter: slope or alpha."""
    wide = x.to(compute_dtype(x))
    if KINDS[kind] == "leaky":
        y, log_det = _leaky(wide, parameter, inverse)
    else:
        y, log_det = (_logit_inverse if inverse else _logit)(wide, parameter)
    return y.to(x.dtype), log_det


def dequantize(levels: Tensor, u: Tensor | None, key: Tensor | None, bins: int) -> Tensor:
    """(levels + u) / bins inside its level, float32; u float32, or 1 - the key's uniforms."""
    if u is None:
        assert key is not None
        rows, columns = levels.shape[0], math.prod(levels.shape[1:])
        draw = torch.ops.gmkernels_reference.uniform
        u = 1 - draw(key, rows, columns, 0, torch.float32, levels.device).view(levels.shape)
    k = levels.to(torch.float32)
    x = (k + u) * (1 / bins)
    low, high = k * ((1 + MARGIN) / bins), (k + 1) * ((1 - MARGIN) / bins)
    x = torch.where(x < low, low, x)
    return torch.where(x > high, high, x)
