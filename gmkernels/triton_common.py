"""@triton.jit helpers and launch plumbing that two families or more use."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from gmkernels.ops.noise import reference as noise_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICES = ("cpu", "cuda") if INTERPRETED else ("cuda",)
MAX_TILE = 1024  # elements a program holds in registers at a time
CHUNK = 8192  # columns of a row that one program sums

_LN = tl.constexpr(noise_reference._LN)
_SIN = tl.constexpr(noise_reference._SIN)
_LOG1P = tl.constexpr(
    (
        -0.07666336745023727,
        0.12789621949195862,
        -0.1316087394952774,
        0.1419726312160492,
        -0.16622772812843323,
        0.20001448690891266,
        -0.2500084638595581,
        0.333333283662796,
    )
)
_COS = tl.constexpr(noise_reference._COS)
# NVIDIA's own sequence for sqrt.rn in range. The interpreter has no fma, AMD another rsqrt.
BRANCHLESS_ROOT = tl.constexpr(not INTERPRETED and torch.version.hip is None)


@dataclass(frozen=True)
class Launch:
    """A launch that recorded() caught instead of running: what the static GPU report compiles."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int


_recording: list[Launch] | None = None


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collects the launches inside the block, which then compute nothing."""
    global _recording
    _recording = []
    try:
        yield _recording
    finally:
        _recording = None


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, **constants: Any
) -> None:
    """Runs kernel[grid] without floating-point contraction, on the device of its first tensor."""
    if _recording is not None:
        _recording.append(Launch(kernel, args, constants, num_warps))
        return
    if 0 in grid:
        return
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    scope = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with scope:
        kernel[grid](*args, **constants, num_warps=num_warps, enable_fp_fusion=False)


def tile(rows: int, columns: int) -> tuple[int, int]:
    """Tile [R, C] for a [rows, columns] problem: whole rows if they fit, powers of two, C >= 4."""
    c = min(MAX_TILE, max(4, triton.next_power_of_2(columns)))
    return max(1, min(MAX_TILE // c, triton.next_power_of_2(max(rows, 1)))), c


def on_device(key: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The key where a kernel can read it, its two elements side by side."""
    if key.dtype != torch.int64 or key.shape != (2,) or not key.is_contiguous():
        raise ValueError(
            "key must be a contiguous int64 tensor of two elements (seed, offset), "
            f"got {key.dtype} of shape {tuple(key.shape)}"
        )
    if key.device == device:
        return key
    seed, offset = key.tolist()
    return filled_key(seed, offset, device)


def filled_key(seed: int, offset: int, device: torch.device) -> torch.Tensor:
    """A key from numbers of the host, by fills: a copy might wait, and fits no CUDA graph."""
    key = torch.full((2,), seed, dtype=torch.int64, device=device)
    key[1].fill_(offset)
    return key


def row_stride(x: torch.Tensor | None) -> int:
    """Elements from one row to the next; 0 for an absent operand."""
    return 0 if x is None else x.stride(0)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on uint32 counters; the 64-bit product is one wide multiply."""
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = (k0 + 0x9E3779B9).to(tl.uint32)
        k1 = (k1 + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def uniform_from(word):
    """float32(word) 2^-32 + 2^-33: the product is exact, so the fused form has the same bits."""
    return tl.fma(word.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)


@triton.jit
def sqrt_ieee(x):
    """The correctly rounded root of -0 or a normal x > 1e-30, with no branch for other x."""
    if BRANCHLESS_ROOT:
        y = tl.rsqrt(tl.maximum(x, 1e-30))
        root = x * y
        residual = tl.fma(root * -1.0, root, x)
        return tl.fma(residual, y * 0.5, root)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def binary_parts(x):
    """e and f with x = 2^(e 2^-23) (1 + f), for positive normal x; e: int32."""
    i = x.to(tl.int32, bitcast=True)
    e = (i - 0x3F3504F3) & -0x800000  # exponent times 2^23
    return e, (i - e).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def minus_two_ln(e, f):
    """-2 ln of binary_parts(): the reference's steps scaled by powers of two, fused where exact."""
    k = e.to(tl.float32)
    p = f * (-2 * _LN[0]) + -2 * _LN[1]
    for j in tl.static_range(2, 6):
        p = p * f + -2 * _LN[j]
    tail = tl.fma(k, -2 * 1.428605173714459e-06 / 8388608, f * f * (p * f + 1.0))
    return tl.fma(k, -2 * 0.693145751953125 / 8388608, tl.fma(f, -2.0, tail))


@triton.jit
def radius(word):
    """sqrt(-2 ln u(word))."""
    e, f = binary_parts(uniform_from(word))
    return sqrt_ieee(minus_two_ln(e, f))


@triton.jit
def sincos_turns(word):
    """sin and cos of 2 pi word 2^-32; 4 word 2^-32 = k + f, |f| <= 1/2, k from the word itself."""
    f = (word << 2).to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10
    f2 = f * f
    s = f2 * _SIN[0] + _SIN[1]
    s = s * f2 + _SIN[2]
    s = s * f2 + _SIN[3]
    s = s * f
    c = f2 * _COS[0] + _COS[1]
    c = c * f2 + _COS[2]
    c = c * f2 + 1.0
    sine_bits = word + 0x20000000  # bit 30: odd k, which swaps; bit 31: the sign
    odd = (sine_bits & 0x40000000) != 0
    cosine_bits = word + 0x60000000
    first = tl.where(odd, s, c).to(tl.uint32, bitcast=True) ^ (cosine_bits & 0x80000000)
    second = tl.where(odd, c, s).to(tl.uint32, bitcast=True) ^ (sine_bits & 0x80000000)
    return second.to(tl.float32, bitcast=True), first.to(tl.float32, bitcast=True)


@triton.jit
def normal_pair(w0, w1):
    r = radius(w0)
    sine, cosine = sincos_turns(w1)
    return r * cosine, r * sine


@triton.jit
def load_key(key_ptr):
    """Two words of the seed and the offset; key_ptr: int64 [2]. Load it before a loop."""
    words_ptr = key_ptr.to(tl.pointer_type(tl.uint32))
    return tl.load(words_ptr), tl.load(words_ptr + 1), tl.load(key_ptr + 1)


@triton.jit
def load_folded_key(key_ptr, index):
    """load_key()'s three for each row [R, 1]: the seed folded by index as noise.fold_in does."""
    seed_low, seed_high, offset = load_key(key_ptr)
    c0, c1 = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    c2 = tl.full(index.shape, 0, tl.uint32)
    c3 = tl.full(index.shape, 0xFFFFFFFF, tl.uint32)
    low, high, _, _ = philox(c0, c1, c2, c3, seed_low, seed_high)
    return low, high, offset


@triton.jit
def noise_words(key, row, d4, STREAM: tl.constexpr):
    """Words of counters (d4, row, STREAM); key: load_key()'s; row: int64, d4: int32."""
    row, d4 = tl.broadcast(key[2] + row, d4)
    stream = tl.full(d4.shape, STREAM, tl.uint32)
    low, high = row.to(tl.uint32), (row >> 32).to(tl.uint32)
    return philox(d4.to(tl.uint32), low, high, stream, key[0], key[1])


@triton.jit
def interleave4(x0, x1, x2, x3, R: tl.constexpr, C: tl.constexpr):
    """Four [R, C / 4] tiles to one [R, C] with x0..x3 side by side: stores stay 16 bytes wide."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (R, C))


@triton.jit
def normals(key, row, column, STREAM: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Standard normals [R, C]: row int64 [R, 1], column the first of C, a multiple of 4."""
    d4 = (column // 4 + tl.arange(0, C // 4))[None, :]
    w0, w1, w2, w3 = noise_words(key, row, d4, STREAM)
    n0, n1 = normal_pair(w0, w1)
    n2, n3 = normal_pair(w2, w3)
    return interleave4(n0, n1, n2, n3, R, C)


@triton.jit
def uniforms(key, row, column, STREAM: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Uniforms in (0, 1] [R, C], as normals()."""
    d4 = (column // 4 + tl.arange(0, C // 4))[None, :]
    w0, w1, w2, w3 = noise_words(key, row, d4, STREAM)
    u0, u1, u2, u3 = uniform_from(w0), uniform_from(w1), uniform_from(w2), uniform_from(w3)
    return interleave4(u0, u1, u2, u3, R, C)


@triton.jit
def normal_tile(key_ptr, row, column, STREAM: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """normals() with the key loaded on the spot."""
    return normals(load_key(key_ptr), row, column, STREAM, R, C)


@triton.jit
def exp_tail(r):
    """q(r) of exp(r) = 1 + r + r^2 q(r) for |r| <= ln(2) / 2."""
    q = r * 0.001393575919792056 + 0.008369090966880322
    q = q * r + 0.04166645556688309
    q = q * r + 0.16666516661643982
    return q * r + 0.5


@triton.jit
def excess(x):
    """exp(x) - 1 - x, to full relative accuracy near 0."""
    return tl.where(tl.abs(x) < 0.34, x * x * exp_tail(x), tl.exp(x) - 1.0 - x)


@triton.jit
def clamp(x, low, high):
    """x in [low, high]; NaN stays."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def load_tile(ptr, row, d, stride, mask, PRESENT: tl.constexpr):
    """A [R, C] tile as float32; zeros where the operand is absent."""
    if PRESENT:
        return tl.load(ptr + row * stride + d, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.zeros(mask.shape, tl.float32)


@triton.jit
def log1p_unit(t):
    """log1p(t) for t in [0, 1]."""
    upper = t > 0.41421356
    f = tl.where(upper, t * 0.5 - 0.5, t)
    p = f * _LOG1P[0] + _LOG1P[1]
    for j in tl.static_range(2, 8):
        p = p * f + _LOG1P[j]
    tail = f * f * (p * f - 0.5)
    return tl.where(upper, (f + (tail + 1.42860676533018518e-06)) + 0.693145751953125, f + tail)


# (tanh(x) / x - 1) / x^2 by powers of x^2, as fit_polynomials.py prints it.
TANH_TAIL = tl.constexpr(
    (
        -0.0058998968452215195,
        0.020800143480300903,
        -0.05378509685397148,
        0.13331939280033112,
        -0.33333298563957214,
    )
)


@triton.jit
def tanh(x):
    """tanh x to an ulp and a half: x + x^3 P(x^2) below 0.6, else 1 - 2 / (exp(2 |x|) + 1)."""
    a = tl.abs(x)
    s = x * x
    p = tl.fma(s, TANH_TAIL[0], TANH_TAIL[1])
    for j in tl.static_range(2, 5):
        p = tl.fma(p, s, TANH_TAIL[j])
    far = 1.0 - 2.0 / (tl.exp(a * 2.0) + 1.0)
    return tl.where(a < 0.6, tl.fma(p * s, x, x), tl.where(x < 0.0, -far, far))


@triton.jit
def sigmoid(s):
    """1 / (1 + exp(-s)) without overflow."""
    e = tl.exp(-tl.abs(s))
    return tl.where(s < 0.0, e, 1.0) / (1.0 + e)
