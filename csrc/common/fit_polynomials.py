"""Fits the polynomials of math.h and of ops/noise/reference.py, and prints their coefficients.

Each is a least-squares fit at Chebyshev nodes, weighted by the power of the argument that
multiplies the polynomial in use: the error of the whole function is what is to be small.
Coefficients are rounded to float32 one at a time, lowest order first, and the rest is fitted anew
to what those leave. Printed highest order first, as Horner's rule reads them.
"""

import math
from collections.abc import Callable

import numpy as np

NODES = 4001
HALF_PI = np.longdouble("1.570796326794896619231321691639751")
Function = Callable[[np.ndarray], np.ndarray]


def fit(target: Function, low: float, high: float, degree: int, power: int) -> tuple[float, ...]:
    """Float32 coefficients of target(x) on [low, high], weighted by |x|^power, highest first."""
    angle = np.pi * (np.arange(NODES) + 0.5) / NODES
    x = 0.5 * (low + high) + 0.5 * (high - low) * np.cos(angle)
    weight = np.abs(x) ** power
    rest = target(x.astype(np.longdouble)).astype(np.float64)
    rounded: list[float] = []
    for order in range(degree + 1):
        basis = np.stack([x**i for i in range(order, degree + 1)], axis=1)
        solution = np.linalg.lstsq(basis * weight[:, None], rest * weight, rcond=None)[0]
        rounded.append(float(np.float32(solution[0])))
        rest = rest - rounded[-1] * x**order
    return tuple(reversed(rounded))


def series(x: np.ndarray, term: Callable[[int], np.longdouble], count: int) -> np.ndarray:
    """The sum of term(i) x^i for i < count."""
    return np.stack([term(i) * x**i for i in range(count)]).sum(axis=0)


def ln_tail(f: np.ndarray) -> np.ndarray:
    """(log1p(f) - f + f^2 / 2) / f^3."""
    small = np.abs(f) < 0.02
    g = np.where(small, 1, f)
    exact = (np.log1p(g) - g + g * g / 2) / g**3
    return np.where(small, series(f, lambda i: np.longdouble((-1) ** i) / (i + 3), 16), exact)


def exp_tail(r: np.ndarray) -> np.ndarray:
    """(exp(r) - 1 - r) / r^2."""
    return series(r, lambda i: 1 / np.longdouble(math.factorial(i + 2)), 20)


def exp2_tail(r: np.ndarray) -> np.ndarray:
    """(2^r - 1) / r."""
    ln2 = np.log(np.longdouble(2))
    return series(r, lambda i: ln2 ** (i + 1) / math.factorial(i + 1), 20)


def sine(s: np.ndarray) -> np.ndarray:
    """sin(pi / 2 f) / f with s = f^2."""
    return series(s, lambda i: (-1) ** i * HALF_PI ** (2 * i + 1) / math.factorial(2 * i + 1), 12)


def cosine(s: np.ndarray) -> np.ndarray:
    """(cos(pi / 2 f) - 1) / f^2 with s = f^2."""
    return -series(s, lambda i: (-1) ** i * HALF_PI ** (2 * i + 2) / math.factorial(2 * i + 2), 12)


def tanh_tail(s: np.ndarray) -> np.ndarray:
    """(tanh(x) / x - 1) / x^2 with s = x^2."""
    terms = (np.longdouble(a) / b for a, b in ((-1, 3), (2, 15), (-17, 315), (62, 2835)))
    near = sum(term * s**i for i, term in enumerate(terms))
    x = np.sqrt(np.where(s < 1e-4, 1, s))
    return np.where(s < 1e-4, near, (np.tanh(x) / x - 1) / x**2)


if __name__ == "__main__":
    unit = (math.sqrt(0.5) - 1, math.sqrt(2) - 1)
    print("_LN =", fit(ln_tail, *unit, degree=5, power=2))
    print("_LOG1P =", fit(ln_tail, *unit, degree=7, power=2))
    print("_EXP =", fit(exp_tail, -0.3466, 0.3466, degree=4, power=2))
    print("_EXP2 =", fit(exp2_tail, -0.5, 0.5, degree=4, power=1))
    print("_SIN =", fit(sine, 1e-12, 0.25, degree=3, power=0))
    print("_COS =", fit(cosine, 1e-12, 0.25, degree=2, power=1))
    print("_EXP2_RELATIVE =", fit(exp2_tail, -0.5, 0.5, degree=5, power=0))
    print("_EXP2_SOFTMAX =", fit(exp2_tail, 0, 1 / 32, degree=1, power=1))
    print("_TANH =", fit(tanh_tail, 1e-12, 0.36, degree=4, power=1))
