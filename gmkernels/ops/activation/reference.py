"""GELU in its tanh form, the nonlinearity of GPT-2.

Formula. Elementwise,
    y = x/2 (1 + tanh(u/2)) = x s,  s = 1 / (1 + exp(-u)),  u = 2 sqrt(2/pi) (x + 0.044715 x^3)
Source: Hendrycks and Gimpel 2016, section 2 (arXiv:1606.08415); GPT-2's code has this form.

Gradient. s' = s (1 - s), so
    dx = dy (s + x s (1 - s) u'),  u' = 2 sqrt(2/pi) (1 + 3 0.044715 x^2)
Backward saves the call's input and makes s again.

Bytes, float32, N elements: forward reads 4 N and writes 4 N; backward reads 8 N and writes 4 N: as
eager PyTorch, whose time goes into tanh. Flops: 25 N.

Numerics. With e = exp(-|u|), s is 1 / (1 + e) or e / (1 + e), and s (1 - s) = e / (1 + e)^2:
nothing cancels, where 1 + tanh keeps no digit of y below x = -5.

Edge cases: no elements give no elements. NaN stays NaN; y is NaN at -inf, as in PyTorch. The
kernels hold x of the gradient inside [-1000, 1000], where it is 0 or 1: no 0 inf far out.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LINEAR = 2 * math.sqrt(2 / math.pi)  # u = x (LINEAR + CUBIC x^2)
CUBIC = LINEAR * 0.044715


def gelu(x: Tensor) -> tuple[Tensor]:
    """y like x: PyTorch's own, in float64, as the bits of its float32 depend on the place in x."""
    return (F.gelu(x.to(torch.float64), approximate="tanh").to(x.dtype),)
