"""Metrics: values by hand, laws, outside oracles."""

import math

import pytest
import torch

import gmkernels
from gmkernels import metrics, toys


def draw(*shape, seed=0):
    return gmkernels.normal(shape, seed=seed, dtype=torch.float64)


def test_mode_coverage_of_the_data_itself():
    """98.9 % of a Gaussian in the plane lie within 3 sd."""
    n = 20_000
    for modes, std in ((toys.ring_modes(), 0.02), (toys.grid_modes(), 0.1)):
        found = metrics.mode_coverage(toys.mixture(n, modes, std, seed=0), modes, std)
        p = 1 - math.exp(-4.5)
        assert abs(found.high_quality - p) < 4 * math.sqrt(p * (1 - p) / n)
        assert found.covered == len(modes)
        share = found.counts.double() / n
        assert (share - p / len(modes)).abs().max() < 5 / math.sqrt(len(modes) * n)


def test_mode_coverage_by_hand():
    modes = torch.tensor([[0.0, 0], [10, 0], [20, 0]])
    x = torch.tensor([[0.0, 2.9], [0, 3.1], [10, 0], [11, 0], [math.nan, 0]])
    found = metrics.mode_coverage(x, modes, 1.0)
    assert found.counts.tolist() == [1, 2, 0]
    assert (found.covered, found.high_quality) == (2, 0.6)
    assert metrics.mode_coverage(x, modes, 1.0, within=3.2).high_quality == 0.8


def test_precision_and_recall_by_hand():
    """k = 1: balls of radius 1 around 0 and 1, of radius 9 around 10."""
    real = torch.tensor([[0.0], [1.0], [10.0]])
    assert metrics.nearest(real, 1).tolist() == [1.0, 1.0, 9.0]
    assert metrics.nearest(real, 2).tolist() == [10.0, 9.0, 10.0]
    fake = torch.tensor([[-0.5], [-2.0], [30.0]])
    assert metrics.nearest(fake, 1).tolist() == [1.5, 1.5, 30.5]
    assert metrics.covered(fake, real, 1) == pytest.approx(1 / 3)
    precision, recall = metrics.precision_recall(fake, real, 1)
    assert (precision, recall) == (pytest.approx(1 / 3), 1.0)


def test_precision_and_recall_tell_what_is_missing():
    data, other = draw(300, 2), draw(300, 2, seed=1)
    assert metrics.precision_recall(data, data) == (1.0, 1.0)
    assert metrics.precision_recall(data + 100, data) == (0.0, 0.0)
    both = torch.cat([data, other + 50])
    precision, recall = metrics.precision_recall(draw(300, 2, seed=2), both)
    assert precision > 0.8
    assert 0.4 < recall < 0.5


def test_energy_score_by_hand():
    x, samples = torch.tensor([[0.0], [5.0]]), torch.tensor([[1.0], [3.0]])
    torch.testing.assert_close(metrics.energy_score(x, samples), torch.tensor([1.0, 2.0]))


def test_energy_score_is_least_for_the_data():
    """Of N(0, 1): 2 / sqrt(pi) - 1 / sqrt(pi); samples too wide, narrow, off, of half: more."""
    data, samples = draw(1500, 1), draw(1500, 1, seed=1)
    own = float(metrics.energy_score(data, samples).mean())
    assert abs(own - 1 / math.sqrt(math.pi)) < 0.03
    for wrong in (1.5 * samples, 0.6 * samples, samples + 0.5, samples.abs()):
        assert float(metrics.energy_score(data, wrong).mean()) > own + 0.02


def test_frechet_distance_of_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    mix = draw(5, 5, seed=3)
    x, y = draw(200, 5) @ mix + 1, draw(150, 5, seed=1) * torch.arange(1, 6)
    c_x, c_y = x.T.cov(), y.T.cov()
    root = torch.from_numpy(linalg.sqrtm((c_x @ c_y).numpy()).real)
    want = (x.mean(0) - y.mean(0)).square().sum() + torch.trace(c_x + c_y - 2 * root)
    assert metrics.frechet_distance(x, y) == pytest.approx(float(want), rel=1e-10)
    assert metrics.frechet_distance(y, x) == pytest.approx(float(want), rel=1e-10)


def test_frechet_distance_by_hand():
    x, y = draw(40, 1), draw(30, 1, seed=1)
    want = (x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2
    assert metrics.frechet_distance(x, y) == pytest.approx(float(want))
    x = draw(40, 3)
    shift = torch.tensor([3.0, 0, 4])
    assert metrics.frechet_distance(x, x + shift) == pytest.approx(25)
    assert metrics.frechet_distance(x, x) < 1e-12
    few = draw(4, 50)  # covariances of rank 3
    assert metrics.frechet_distance(few, few) < 1e-11
    assert metrics.frechet_distance(few.float(), 3 * few.float()) == pytest.approx(
        4 * float(few.mean(0).square().sum() + few.var(0).sum()), rel=1e-5
    )


def test_simple_functions():
    assert float(metrics.bits_per_dim(torch.tensor(3 * math.log(2)), 3)) == pytest.approx(1.0)
    means = torch.tensor([[0.0, 0.0], [1.0, 0.01]])
    assert metrics.active_units(means).tolist() == [True, False]
    assert metrics.active_units(means, threshold=1e-6).tolist() == [True, True]
    assert metrics.codebook_perplexity(torch.arange(12).view(3, 4) % 4, 8) == pytest.approx(4)
    assert metrics.codebook_perplexity(torch.full((9,), 3), 8) == 1.0
    uneven = torch.tensor([0, 0, 0, 1])
    want = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert metrics.codebook_perplexity(uneven, 2) == pytest.approx(want)


def test_refusals():
    x = draw(5, 2)
    with pytest.raises(ValueError, match=r"energy_score: both must be \[N, D\].*flatten"):
        metrics.energy_score(x.view(5, 2, 1), x)
    with pytest.raises(ValueError, match=r"frechet_distance: .*\(5, 2\) and \(5, 1\)"):
        metrics.frechet_distance(x, x[:, :1])
    with pytest.raises(ValueError, match="frechet_distance: both must have 2 rows or more"):
        metrics.frechet_distance(x, x[:1])
    with pytest.raises(ValueError, match="nearest: both must have 4 rows or more, got 3 and 3"):
        metrics.precision_recall(x, x[:3])
    with pytest.raises(ValueError, match="energy_score: samples must have 2 rows or more, got 1"):
        metrics.energy_score(x, x[:1])
    with pytest.raises(ValueError, match="mode_coverage: both must have 1 rows or more"):
        metrics.mode_coverage(x[:0], x, 0.1)
    with pytest.raises(ValueError, match=r"must lie in \[0, 3\), got 0 to 3"):
        metrics.codebook_perplexity(torch.arange(4), 3)
    with pytest.raises(ValueError, match="must be integers, one or more"):
        metrics.codebook_perplexity(x, 3)
    with pytest.raises(ValueError, match="means must have 2 rows or more, got 1"):
        metrics.active_units(x[:1])
    with pytest.raises(ValueError, match="dimensions must be >= 1"):
        metrics.bits_per_dim(x, 0)
