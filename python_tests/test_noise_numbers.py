"""The noise's numbers: accuracy of the fixed formulas, and the statistics of what they make.

Seeds are fixed, so nothing here is left to chance: thresholds are such that a correct generator
fails a test for at most one seed in a thousand.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import gmkernels
from gmkernels import dispatch, noise
from gmkernels.ops.noise import reference

extension = dispatch.extension


def ulp_error(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """|got - exact| in units of the float32 spacing at `exact`, subnormals included."""
    exponent = np.maximum(np.frexp(exact)[1] - 1, -126)
    return np.abs(got.astype(np.float64) - exact) * np.exp2(23.0 - exponent)


def floats(low: float, high: float, count: int) -> np.ndarray:
    """About `count` float32 from low to high > low >= 0, evenly spread over the bit patterns."""
    first, last = (int(x) for x in np.array([low, high], np.float32).view(np.int32))
    step = max(1, (last - first) // count)
    return np.append(np.arange(first, last, step, dtype=np.int32), np.int32(last)).view(np.float32)


MAX = float(np.finfo(np.float32).max)
TINY = 1e-45  # the smallest subnormal
# name: (truth, inputs, bound in ulp). Largest seen: exp 0.894 with fma and 1.16 without it,
# log 0.923 over every float32 of [1/8, 8), log1p_unit 1.530 over every one of [2^-12, 1].
FUNCTIONS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], np.ndarray, float]] = {
    "exp": (np.exp, np.r_[floats(0, 88.72283, 10**6), -floats(0, 103.97, 10**6)], 1.2),
    "log": (np.log, np.r_[floats(TINY, MAX, 10**6), floats(0.5, 2, 10**6)], 1.0),
    "log1p_unit": (np.log1p, np.r_[floats(0, 1, 10**6), floats(0.25, 1, 10**6)], 1.6),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_in_ulp(name: str, isas: list[str]) -> None:
    truth, x, bound = FUNCTIONS[name]
    exact = truth(x.astype(np.float64))
    for isa in isas:
        with gmkernels.use_isa(isa):
            error = ulp_error(getattr(extension, name)(x), exact)
        worst = error.argmax()  # of a NaN, if there is one
        assert error[worst] <= bound, (isa, x[worst], error[worst])


def test_sincospi(isas: list[str]) -> None:
    """Within 1e-7 of exact; largest seen: 9.64e-8 over 2e7 values of [2^-9, 2]."""
    x = np.r_[floats(TINY, 2, 10**6), floats(0.125, 2, 10**6)]
    quarter = np.round(2 * x.astype(np.float64))
    angle = np.pi * (x - quarter / 2)  # the difference is exact
    sine, cosine = np.sin(angle), np.cos(angle)
    quadrant = quarter.astype(int) % 4
    exact = (
        np.choose(quadrant, [sine, cosine, -sine, -cosine]),
        np.choose(quadrant, [cosine, -sine, -cosine, sine]),
    )
    for isa in isas:
        with gmkernels.use_isa(isa):
            for got, truth in zip(extension.sincospi(x), exact, strict=True):
                assert np.abs(got - truth).max() <= 1e-7, isa


INF, NAN = np.inf, np.nan
EDGES = {
    "exp": (
        [0.0, -0.0, TINY, -TINY, INF, -INF, NAN, 88.72284, MAX, -103.97, -103.98, -200, -MAX],
        [1, 1, 1, 1, INF, 0, NAN, INF, INF, TINY, 0, 0, 0],
    ),
    "log": (
        [0.0, -0.0, 1, -1, -INF, NAN, INF, MAX, TINY, 2.0**-126],
        [-INF, -INF, 0, NAN, NAN, NAN, INF, 88.72284, -103.27893, -87.33655],
    ),
    "log1p_unit": ([0.0, TINY, 2.0**-126, 1, NAN], [0, TINY, 2.0**-126, 0.6931472, NAN]),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(name: str, isas: list[str]) -> None:
    """Exact at the edges, in the body of the loop (16 copies) as in its tail."""
    x, expected = (np.repeat(np.array(column, np.float32), 17) for column in EDGES[name])
    for isa in isas:
        with gmkernels.use_isa(isa):
            np.testing.assert_array_equal(getattr(extension, name)(x), expected, err_msg=isa)


def test_sqrt_detour_is_correctly_rounded() -> None:
    """Every float32 in [1, 4): x lies between the squares of y's two rounding boundaries.

    Those have 25 bits, so that their squares are exact in float64.
    """
    for start in range(0x3F800000, 0x40800000, 2**21):
        x = torch.arange(start, start + 2**21, dtype=torch.int32).view(torch.float32).double()
        y = x.sqrt().float().double()
        half = 2.0**-24
        assert bool(((y - half).square() < x).all() and (x < (y + half).square()).all())


def box_muller(words: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of words [n, 2] through Box-Muller in float64: float32 uniform, exact angle."""
    u = reference.uniform_from(words).double()
    radius = (-2 * u[:, 0].log()).sqrt()
    turn = 2 * torch.pi * words[:, 1].double() * 2.0**-32
    return radius * turn.cos(), radius * turn.sin()


def test_normals_against_float64(isas: list[str]) -> None:
    """Within 2.1e-7 (1 + |n|) of Box and Muller in float64: float32 uniform, exact angle.

    Largest seen: 1.93e-7 over 8.4e7 normals, a quarter of them with w0 spread over its logarithm.
    """
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(2**32, (2**19, 2), generator=generator)
    words[::4, 0] >>= torch.randint(32, (2**17,), generator=generator)  # the tail
    words[1::4, 0] |= 0xFFFF0000  # u near 1, where ln u is near 0
    exact = torch.stack(box_muller(words), dim=1)
    bound = 2.1e-7 * (1 + exact.abs())
    assert ((reference.normal_from(words) - exact).abs() <= bound).all()
    for isa in isas:
        with gmkernels.use_isa(isa):
            host = extension.normal_from_words(words.numpy().astype(np.uint32))
        assert ((torch.from_numpy(host).view(-1, 2) - exact).abs() <= bound).all(), isa


def test_tail_and_ends(isas: list[str]) -> None:
    """w0 = 0 gives sqrt(66 ln 2) = 6.7637 sigma in any direction; the largest word gives 0."""
    tail, top = np.sqrt(66 * np.log(2)), 2**32 - 1
    words = torch.tensor([[0, top], [0, 2**30], [0, 2**31], [0, 3 * 2**30], [top, 12345]])
    expected = tail * np.array([[1, 0], [0, 1], [-1, 0], [0, -1], [0, 0]])
    normals = {"reference": reference.normal_from(words).numpy()}
    for isa in isas:
        with gmkernels.use_isa(isa):
            host = extension.normal_from_words(words.numpy().astype(np.uint32))
        normals[isa] = host.reshape(-1, 2)
    for name, found in normals.items():
        np.testing.assert_allclose(found, expected, atol=2e-7 * (1 + tail), err_msg=name)
    assert reference.uniform_from(torch.tensor([0, top])).tolist() == [2.0**-33, 1.0]


N = 2**20
SAMPLES = {
    "one row": lambda draw: draw(N, seed=20),
    "rows of 1": lambda draw: draw((N, 1), seed=-21).flatten(),
    "rows of 6": lambda draw: draw((N // 6 + 1, 6), seed=22, stream=3).flatten()[:N],
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_moments_and_law(sample: str) -> None:
    """E n^k for k to 8 within 4.5 standard errors, Kolmogorov-Smirnov p > 1e-4."""
    n = SAMPLES[sample](gmkernels.normal).double().numpy()
    for k in range(1, 9):
        mean, square = stats.norm.moment(k), stats.norm.moment(2 * k)
        error = np.sqrt((square - mean**2) / N)
        assert abs((n**k).mean() - mean) < 4.5 * error, k
    assert stats.kstest(n, "norm").pvalue > 1e-4
    for sigma in (3, 4):
        expected = 2 * N * stats.norm.sf(sigma)
        assert abs((np.abs(n) > sigma).sum() - expected) < 4.5 * np.sqrt(expected), sigma
    assert 4.4 < np.abs(n).max() < 6.77
    u = SAMPLES[sample](gmkernels.uniform).double().numpy()
    assert 0 < u.min() < 1e-4
    assert 1 - 1e-4 < u.max() <= 1
    assert stats.kstest(u, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("sample", SAMPLES)
def test_lags(sample: str) -> None:
    """No linear dependence of n or n^2 on the 64 before: 128 correlations within 5 / sqrt(N)."""
    n = SAMPLES[sample](gmkernels.normal).double().numpy()
    for x in (n, (n**2 - 1) / np.sqrt(2)):
        for lag in range(1, 65):
            assert abs((x[lag:] * x[:-lag]).mean()) < 5 / np.sqrt(N), lag


# What the i-th of 64 draws is given: counters or keys that differ in one small step.
NEIGHBOURS: dict[str, Callable[[int], dict[str, Any]]] = {
    "rows": lambda i: {"seed": 1, "offset": i},
    "high rows": lambda i: {"seed": 1, "offset": i << 32},
    "seeds": lambda i: {"seed": i - 32},
    "high seeds": lambda i: {"seed": i << 32},
    "single bits": lambda i: {"seed": (1 << i) - (i == 63) * 2**64},
    "streams": lambda i: {"seed": 1, "stream": i},
    "folds": lambda i: {"seed": noise.fold_in(noise.key(1), i)},
    "folds of neighbours": lambda i: {"seed": noise.fold_in(noise.key(i), 1)},
    "fold grid": lambda i: {"seed": noise.fold_in(noise.key(i % 8), i // 8)},
    "mixed": lambda i: {"seed": i % 4, "offset": i // 4 % 4, "stream": i // 16},
}


@pytest.mark.parametrize("kind", NEIGHBOURS)
def test_neighbours_are_independent(kind: str) -> None:
    """Correlations of n and of n^2 over 2016 pairs: each within 5.5 / sqrt(d), together chi^2."""
    d = 2**13
    n = torch.stack([gmkernels.normal(d, **NEIGHBOURS[kind](i)) for i in range(64)]).double()
    pair = torch.triu_indices(64, 64, offset=1)
    for x in (n, (n.square() - 1) / 2**0.5):
        z = (x @ x.T)[pair[0], pair[1]] / d**0.5
        assert z.abs().max() < 5.5
        assert 1e-5 < stats.chi2.cdf(z.square().sum().item(), len(z)) < 1 - 1e-5


def test_words_of_a_counter_are_independent() -> None:
    """Counts of two words of a counter on a 16 x 16 grid, for each two words, by chi^2."""
    u = gmkernels.uniform((2**18, 4), seed=77)
    cell = (u * 16).ceil().long() - 1
    for i in range(4):
        for j in range(i + 1, 4):
            counts = torch.bincount(cell[:, i] * 16 + cell[:, j], minlength=256)
            assert stats.chisquare(counts.numpy()).pvalue > 1e-5, (i, j)
