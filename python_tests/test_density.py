"""Densities: scikit-learn's and NumPy's numbers, integrals of 1, draws that fit, bad input."""

import math

import numpy as np
import pytest
import torch

from gmkernels import noise
from gmkernels.models import mixture
from gmkernels.models.density import FactorAnalysis, GaussianMixture, Histogram, ProbabilisticPCA
from gmkernels.models.tabular import choose

datasets = pytest.importorskip("sklearn.datasets")
peers = pytest.importorskip("sklearn.mixture")

THEIRS = {"full": "full", "tied": "tied", "diagonal": "diag", "spherical": "spherical"}


@pytest.fixture(autouse=True)
def _one_thread():
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # of the mixtures' starts
    yield
    torch.set_num_threads(count)


def close(a, b, tol):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=tol, atol=tol)


def iris():
    return torch.from_numpy(datasets.load_iris().data)


def cloud(n=500, d=4, dtype=torch.float64):
    """Correlated points, a different spread in each feature."""
    x = noise.normal((n, d), seed=7, dtype=torch.float64)
    x = x @ noise.normal((d, d), seed=8, dtype=torch.float64) * torch.arange(1.0, d + 1)
    return x.to(dtype)


# Histogram


@pytest.mark.parametrize("bins", [(12,), (6, 9), (3, 4, 5)])
def test_histogram_is_numpys(bins):
    x = cloud(400, len(bins))
    model = Histogram(len(bins), bins).double().fit(x)
    density, edges = np.histogramdd(x.numpy(), bins=bins, density=True)
    centres = [torch.from_numpy((e[:-1] + e[1:]) / 2) for e in edges]
    middle = torch.cartesian_prod(*centres).view(-1, len(bins))
    close(model.log_prob(middle).exp(), density.flatten(), 1e-12)
    assert len(bins) == 1 or (model.log_prob(middle) == -math.inf).any(), "some bins are empty"
    volume = math.prod(float(e[1] - e[0]) for e in edges)
    assert abs(float(model.log_prob(middle).exp().sum()) * volume - 1) < 1e-12
    index = [np.searchsorted(e, x[:, i].numpy(), "right") - 1 for i, e in enumerate(edges)]
    index = tuple(np.minimum(i, b - 1) for i, b in zip(index, bins, strict=True))
    close(model.score_samples(x).exp(), density[index], 1e-12)


def test_histogram_outside_and_pseudo_counts():
    x = torch.tensor([[0.0], [0.5], [3.9]])
    model = Histogram(1, 4, alpha=1.0).fit(x, limits=[(0.0, 4.0)])
    points = torch.tensor([[0.2], [1.5], [4.0], [4.1], [-0.1], [math.inf], [math.nan]])
    p = model.log_prob(points).exp()
    close(p[:6], [3 / 7, 1 / 7, 2 / 7, 0, 0, 0], 1e-6)
    assert p[6].isnan()
    assert Histogram(1, 4).fit(x, limits=[(0.0, 4.0)]).bic(x) == pytest.approx(
        3 * math.log(3) - 2 * (2 * math.log(2 / 3) + math.log(1 / 3)), rel=1e-6
    )


@pytest.mark.parametrize(("shift", "dtype"), [(0.0, torch.float64), (1e4, torch.float32)])
def test_histogram_samples(shift, dtype):
    x = (cloud(300, 2) + shift).to(dtype)
    model = Histogram(2, (5, 300)).to(dtype).fit(x)
    drawn = model.sample(20_000, seed=3)
    assert drawn.dtype == dtype
    assert model.log_prob(drawn).isfinite().all(), "no draw lies in an empty bin"
    again = Histogram(2, (5, 1)).to(dtype)
    again.fit(drawn, limits=list(zip(model.low.tolist(), model.high.tolist(), strict=True)))
    close(again.log_p.exp(), model.log_p.exp().view(5, 300).sum(1), 0.02)
    inside = ((drawn - model.low) / (model.high - model.low))[:, 0] * 5 % 1
    assert abs(float(inside.mean()) - 0.5) < 0.02, "uniform inside a bin"
    assert abs(float(inside.var()) * 12 - 1) < 0.05
    assert torch.equal(model.sample(4, seed=noise.key(3, offset=5)), drawn[5:9])


def test_histogram_refuses():
    with pytest.raises(ValueError, match=r"8,000,000,000 cells, 59.6 GiB .* at most 67,108,864"):
        Histogram(3, 2000)
    for arguments, message in (
        ((4, 10), "features must be 1, 2 or 3, got 4"),
        ((2, (3, 4, 5)), "bins must be one number or 2"),
        ((1, 0), "bins must be a whole number >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Histogram(*arguments)
    with pytest.raises(ValueError, match="alpha must be a finite number >= 0, got -1"):
        Histogram(1, 2, alpha=-1)
    x = torch.tensor([[1.0, 5.0], [2.0, 5.0]])
    with pytest.raises(ValueError, match="feature 1 must have low < high, got 5 and 5; give lim"):
        Histogram(2, 4).fit(x)
    with pytest.raises(ValueError, match="limits must hold every x"):
        Histogram(2, 4).fit(x, limits=[(0, 1.5), (0, 9)])
    with pytest.raises(ValueError, match="limits must be 2 pairs, got 1"):
        Histogram(2, 4).fit(x, limits=[(0, 3)])


# Gaussian mixture


@pytest.mark.parametrize(
    ("covariance", "published"),
    [
        ("full", -1.201237),
        ("tied", -1.709027),
        ("diagonal", -2.047851),
        ("spherical", -2.562094),
    ],
)
def test_mixture_is_as_likely_as_scikit_learns_best_of_iris(covariance, published):
    x = iris()
    model = GaussianMixture(4, 3, covariance=covariance).double().fit(x, tolerance=1e-8)
    assert model.score(x) > published - 1e-6
    if covariance != "diagonal":  # where a start of ours finds a better maximum, -2.045741
        assert model.score(x) < published + 1e-6


@pytest.mark.parametrize("covariance", mixture.COVARIANCES)
def test_mixture_is_scikit_learns(covariance):
    """On its parameters: density, responsibilities, BIC; and one M step of ours stays there."""
    x = iris()
    theirs = peers.GaussianMixture(
        3, covariance_type=THEIRS[covariance], tol=1e-9, max_iter=1000, random_state=0
    ).fit(x)
    model = GaussianMixture(4, 3, covariance=covariance).double()
    r = torch.from_numpy(theirs.predict_proba(x))
    found = mixture.maximise(x, r, covariance, 1e-6)
    close(found.mean, theirs.means_, 1e-3)
    for buffer, value in zip((model.log_weight, model.mean), found[:2], strict=True):
        buffer.copy_(value)
    model.factor.copy_(found.factor)
    model.fitted.fill_(1)
    full = {"full": 2, "tied": 2, "diagonal": 1, "spherical": 1}[covariance]
    square = model.factor @ model.factor.mT if full == 2 else model.factor.square()
    close(square.squeeze(), theirs.covariances_, 1e-3)
    theirs.weights_, theirs.means_ = model.log_weight.exp().numpy(), model.mean.numpy()
    inverse = torch.linalg.inv(model.factor).mT if full == 2 else 1 / model.factor
    inverse = inverse[0] if covariance == "tied" else inverse
    theirs.precisions_cholesky_ = (inverse[:, 0] if covariance == "spherical" else inverse).numpy()
    close(model.score_samples(x), theirs.score_samples(x), 1e-9)
    close(model.predict_proba(x), theirs.predict_proba(x), 1e-9)
    assert (model.predict(x).numpy() == theirs.predict(x)).all()
    assert model.bic(x) == pytest.approx(theirs.bic(x), rel=1e-9)


def test_the_best_start_wins():
    """The first start of several is the only one of starts=1."""
    x, gains = iris(), []
    for seed in range(4):
        models = [GaussianMixture(4, 5, covariance="diagonal").double() for _ in range(2)]
        one, many = (
            m.fit(x, starts=n, seed=seed, tolerance=1e-3).score(x)
            for m, n in zip(models, (1, 4), strict=True)
        )
        gains.append(many - one)
    assert min(gains) >= 0
    assert max(gains) > 0.01


@pytest.mark.parametrize("covariance", mixture.COVARIANCES)
def test_a_step_of_em_never_lowers_the_likelihood(covariance):
    x = iris()
    centres = mixture.plus_plus(x, 4, noise.key(3))
    r = torch.nn.functional.one_hot(torch.cdist(x, centres).argmin(1), 4).double()
    scores = []
    for _ in range(30):
        joint = mixture.log_joint(x, mixture.maximise(x, r, covariance, 1e-12))
        scores.append(joint.logsumexp(1).mean())
        r = joint.softmax(1)
    gains = torch.stack(scores).diff()
    assert (gains > -1e-9).all()
    assert gains[0] > 1e-3


@pytest.mark.parametrize("covariance", mixture.COVARIANCES)
def test_mixture_density_and_samples(covariance):
    x = torch.cat([cloud(200, 2) * 0.2 - 3, cloud(100, 2).flip(1) * 0.1 + 2])
    model = GaussianMixture(2, 2, covariance=covariance).double().fit(x)
    line = torch.linspace(-12, 12, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    p = model.log_prob(grid).exp() * 0.04**2
    assert abs(float(p.sum()) - 1) < 1e-3
    close(model.predict_proba(x).sum(1), torch.ones(300), 1e-12)
    drawn = model.sample(20_000, seed=5)
    mean = p @ grid
    close(drawn.mean(0), mean, 0.1)
    inside = [drawn[model.predict(drawn) == k] for k in range(2)]  # far apart
    for points, factor in zip(inside, model.factor.expand(2, *model.factor.shape[1:]), strict=True):
        root = factor if factor.dim() == 2 else factor.expand(2).diag()
        spread = root @ root.T
        close(points.T.cov() / spread.diagonal().mean(), spread / spread.diagonal().mean(), 0.06)
    close(drawn.T.cov() / ((grid - mean).T * p @ (grid - mean)), torch.ones(2, 2), 0.06)
    assert torch.equal(model.sample(3, seed=noise.key(5, offset=9)), drawn[9:12])


@pytest.mark.parametrize("covariance", mixture.COVARIANCES)
def test_far_from_zero_float32_variances_stay(covariance):
    """E[x^2] - mu^2 in float32 would be noise of size 8 around a variance of 1."""
    far = (noise.normal((400, 3), seed=2) + 1e4).float()
    model = GaussianMixture(3, 1, covariance=covariance).fit(far, starts=1)
    factor = model.factor[0]
    variance = (factor @ factor.T).diagonal() if factor.dim() == 2 else factor.square()
    wide = far.double()
    truth = wide.var(0, correction=0)
    close(variance.double(), truth.mean()[None] if covariance == "spherical" else truth, 1e-5)
    exact = GaussianMixture(3, 1, covariance=covariance).double().fit(wide, starts=1)
    close(model.log_prob(far).double(), exact.log_prob(wide), 2e-3)


def test_mixture_bad_and_degenerate_input():
    x = torch.tensor([[0.0], [0.0], [1.0], [5.0]])
    with pytest.raises(ValueError, match="at least 4 distinct rows, one a component, has 3"):
        GaussianMixture(1, 4).fit(x)
    model = GaussianMixture(1, 3).fit(x)  # a point a component: the floor is the variance
    assert model.log_prob(x).isfinite().all()
    close(model.factor.min().square(), 1e-6, 1e-6)
    constant = torch.cat([cloud(50, 2, torch.float32), torch.ones(50, 1)], 1)
    for covariance in mixture.COVARIANCES:
        fitted = GaussianMixture(3, 2, covariance=covariance).fit(constant)
        assert fitted.log_prob(constant).isfinite().all()
    big = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]).double() * 2**30  # on a line
    with pytest.raises(ValueError, match=r"floor 1e-12 is too small .* rescale x"):
        GaussianMixture(2, 1, floor=1e-12).double().fit(big)
    with pytest.warns(RuntimeWarning, match="after 1 iterations"):
        GaussianMixture(4, 3).double().fit(iris(), iterations=1)
    for name, value in (("starts", 0), ("iterations", 0)):
        with pytest.raises(ValueError, match=f"{name} must be a whole number >= 1"):
            GaussianMixture(1, 1).fit(x, **{name: value})
    with pytest.raises(ValueError, match="one of full, tied, diagonal, spherical, got diag"):
        GaussianMixture(1, 1, covariance="diag")
    with pytest.raises(ValueError, match="floor must be a finite number > 0"):
        GaussianMixture(1, 1, floor=0.0)


def test_a_component_without_points_has_weight_zero():
    x, r = iris(), torch.zeros(150, 2, dtype=torch.float64)
    r[:, 0] = 1
    for covariance in mixture.COVARIANCES:
        found = mixture.maximise(x, r, covariance, 1e-6)
        alone = mixture.maximise(x, r[:, :1], covariance, 1e-6)
        assert found.log_weight.tolist() == [0.0, -math.inf]
        close(
            mixture.log_joint(x, found).logsumexp(1),
            mixture.log_joint(x, alone).logsumexp(1),
            1e-12,
        )


# All of them


def test_an_index_without_probability_is_never_drawn():
    p = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0])
    drawn = choose(p, 10_000, noise.key(1))
    counts = drawn.bincount(minlength=5)
    assert counts[[0, 2, 4]].tolist() == [0, 0, 0]
    assert abs(counts[3] - 7500) < 200
    assert torch.equal(choose(p, 3, noise.key(1, offset=7)), drawn[7:10])


MODELS = {
    "histogram": lambda: Histogram(2, 3),
    "mixture": lambda: GaussianMixture(2, 2),
    "factor analysis": lambda: FactorAnalysis(2, 1),
    "probabilistic PCA": lambda: ProbabilisticPCA(2, 1),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_all_densities_do(name):
    x = cloud(60, 2, torch.float32)
    model = MODELS[name]()
    for verb in (lambda: model.log_prob(x), lambda: model.sample(3, seed=0)):
        with pytest.raises(RuntimeError, match="not fitted; call fit"):
            verb()
    broken = x.clone()
    broken[5, 1] = math.nan
    for error, message, data in (
        (ValueError, "finite, row 5 is not", broken),
        (ValueError, r"x must be \[N, 2\], got \(60, 1\)", x[:, :1]),
        (ValueError, "must have at least", x[:0]),
        (TypeError, "float32 like the model, got torch.float64", x.double()),
    ):
        with pytest.raises(error, match=message):
            model.fit(data)
    assert model.fit(x) is model
    assert model.log_prob_kind == "exact"
    assert model.log_prob(broken)[5].isnan()
    torch.testing.assert_close(model.log_prob(broken)[:5], model.log_prob(x)[:5])
    with pytest.raises(ValueError, match="finite, row 5 is not"):
        model.score(broken)
    other = MODELS[name]()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.log_prob(x), model.log_prob(x))
    assert torch.equal(other.sample(4, seed=1), model.sample(4, seed=1))
    assert model.score(x) == pytest.approx(float(model.log_prob(x).mean()), rel=1e-6)
    close(other.double().log_prob(x.double()), model.log_prob(x).double(), 1e-4)
    torch.autograd.gradcheck(other.log_prob, x[:5].double().requires_grad_())
    torch.manual_seed(0)
    first = model.sample(4)
    assert not torch.equal(model.sample(4), first)
    torch.manual_seed(0)
    assert torch.equal(model.sample(4), first)
