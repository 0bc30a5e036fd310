"""The noise, in plain PyTorch: the truth that every other backend meets bit for bit.

Formula. Philox4x32-10 with key (seed low, seed high) and counter (d // 4, row low, row high,
stream) gives words w0..w3 of positions 4 (d // 4) + 0..3.
    uniform: u(w) = float32(w) 2^-32 + 2^-33, in (0, 1].
    normal:  words pair up, (w0, w1) and (w2, w3): r = sqrt(-2 ln u(w0)),
             n0 = r cos(2 pi w1 2^-32), n1 = r sin(2 pi w1 2^-32).
    ln, sin and cos are the fixed polynomials below: +, -, *, bit operations and IEEE sqrt in this
        order.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Box and
Muller, Ann. Math. Stat. 29, 1958. Coefficients: csrc/common/fit_polynomials.py.

Bytes: nothing is read, 4 an element written (float32). Eager torch.randn moves the same but draws
from one serial generator. Operations: 10 rounds of two 32x32 -> 64 products a counter, that is 4
normals.

Numerics. No contraction anywhere: a fused multiply-add would change the last bit, so every backend
compiles without it. torch.sqrt on CPU is not correctly rounded in float32, so the root is taken in
float64 and rounded, which is (a test covers every float32 in [1, 4)). Largest deviation from
Box-Muller in float64 on the same words: see normal()'s docstring; the tail reaches 6.76 sigma, at w
= 0.

Edge cases: u = 1 gives r = 0. Rows are 64-bit; a row holds at most 2^34 elements.
"""

from typing import Any

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_LN = (
    -0.10470021516084671,
    0.16173018515110016,
    -0.17108885943889618,
    0.19904570281505585,
    -0.24983768165111542,
    0.3333487808704376,
)
_SIN = (-0.004630818497389555, 0.07969274371862411, -0.645965039730072, 1.5707963705062866)
_COS = (-0.020424289628863335, 0.2536056339740753, -1.2336978912353516)
_LN2_HIGH = 0.693145751953125  # 15 bits, and the low part 18: k times either is exact
_LN2_LOW = 1.428605173714459e-06


def philox(counter: tuple[Any, ...], seed: Any) -> tuple[Any, ...]:
    """Philox4x32-10: four 32-bit words and a 64-bit seed, as int64 tensors or as Python ints."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64-bit products, wrapped: the bits are right
        c0, c1 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return c0, c1, c2, c3


def folded_seeds(key: Tensor, index: Tensor) -> Tensor:
    """The seeds of noise.fold_in(key, i) for each i of index, int64 [B]."""
    zero = torch.zeros_like(index)
    counter = (index & _MASK, index >> 32 & _MASK, zero, zero + _MASK)
    low, high, _, _ = philox(counter, key[0])
    return low | high << 32


def words_of(
    key: Tensor, rows: int, columns: int, stream: int, seeds: Tensor | None = None
) -> Tensor:
    """Philox words of a [rows, columns] draw, as int64 [rows, ceil(columns / 4), 4].

    seeds: int64 [rows], one a row in place of the key's.
    """
    device = key.device
    row = (key[1] + torch.arange(rows, device=device))[:, None]
    d4 = torch.arange((columns + 3) // 4, device=device)[None, :]
    counter = torch.broadcast_tensors(
        d4, row & _MASK, row >> 32 & _MASK, torch.tensor(stream, device=device)
    )
    seed = key[0] if seeds is None else seeds[:, None]
    return torch.stack(philox(counter, seed), dim=-1)


def uniform_from(words: Tensor) -> Tensor:
    """Words to float32 in (0, 1]."""
    return words.to(torch.float32) * 2.0**-32 + 2.0**-33


def minus_two_ln(u: Tensor) -> Tensor:
    """-2 ln u for positive normal float32 u."""
    return minus_two_ln_of(*binary_parts(u))


def binary_parts(u: Tensor) -> tuple[Tensor, Tensor]:
    """k and f with u = 2^k (1 + f), f in [sqrt(1/2) - 1, sqrt(2) - 1], for positive normal u."""
    i = u.view(torch.int32)
    e = (i - 0x3F3504F3) >> 23
    return e.to(torch.float32), (i - e * 0x800000).view(torch.float32) - 1.0


def minus_two_ln_of(k: Tensor, f: Tensor) -> Tensor:
    """-2 ln of 2^k (1 + f)."""
    p = f * (-2 * _LN[0]) + -2 * _LN[1]
    for coefficient in _LN[2:]:
        p = p * f + -2 * coefficient
    tail = k * (-2 * _LN2_LOW) + f * f * (p * f + 1.0)
    return (f * -2.0 + tail) + k * (-2 * _LN2_HIGH)


def sincos_turns(words: Tensor) -> tuple[Tensor, Tensor]:
    """sin and cos of 2 pi w 2^-32 for words w; 4 w 2^-32 = k + f, |f| <= 1/2."""
    f = (((words << 2) + 2**31 & _MASK) - 2**31).to(torch.float32) * 2.0**-32
    k = words + 2**29 >> 30
    f2 = f * f
    s = f2 * _SIN[0] + _SIN[1]
    for coefficient in _SIN[2:]:
        s = s * f2 + coefficient
    s = s * f
    c = f2 * _COS[0] + _COS[1]
    for coefficient in (*_COS[2:], 1.0):
        c = c * f2 + coefficient
    odd = (k & 1) == 1
    first, second = torch.where(odd, s, c), torch.where(odd, c, s)
    cosine = torch.where(((k + 1) & 2) == 0, first, -first)
    sine = torch.where((k & 2) == 0, second, -second)
    return sine, cosine


def normal_from(words: Tensor) -> Tensor:
    """Words [..., 4] to float32 normals [..., 4]."""
    u = uniform_from(words[..., 0::2].contiguous())
    r = minus_two_ln(u).to(torch.float64).sqrt().to(torch.float32)
    sine, cosine = sincos_turns(words[..., 1::2])
    return torch.stack([r * cosine, r * sine], dim=-1).flatten(-2)


def draw_empty(
    key: Tensor, rows: int, columns: int, stream: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What a draw returns, unfilled: [rows, columns]."""
    return torch.empty((rows, columns), dtype=dtype, device=device)


def normal(
    key: Tensor, rows: int, columns: int, stream: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Standard normals [rows, columns]."""
    noise = normal_from(words_of(key.to(device), rows, columns, stream))
    return noise.flatten(1)[:, :columns].to(dtype).contiguous()


def folded_normal(key: Tensor, index: Tensor, columns: int) -> Tensor:
    """float32 normals [B, columns], row b under the key folded by index[b]; on index's device."""
    key, rows = key.to(index.device), index.shape[0]
    words = words_of(key, rows, columns, 0, folded_seeds(key, index))
    return normal_from(words).flatten(1)[:, :columns].contiguous()


def uniform(
    key: Tensor, rows: int, columns: int, stream: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Uniforms in (0, 1], [rows, columns]."""
    noise = uniform_from(words_of(key.to(device), rows, columns, stream))
    return noise.flatten(1)[:, :columns].to(dtype).contiguous()
