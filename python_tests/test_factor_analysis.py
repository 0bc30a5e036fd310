"""Factor analysis and probabilistic PCA: scikit-learn's numbers, Gaussian identities, maxima."""

import math

import pytest
import torch
from test_density import close, cloud, iris

from gmkernels import noise
from gmkernels.models.density import FactorAnalysis, ProbabilisticPCA

datasets = pytest.importorskip("sklearn.datasets")
decomposition = pytest.importorskip("sklearn.decomposition")


@pytest.fixture(autouse=True)
def _one_thread():
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


LINEAR = {"factor analysis": FactorAnalysis, "probabilistic PCA": ProbabilisticPCA}


def loaded(model, mean, weight, variance):
    """A model with parameters from elsewhere."""
    model = model.double()
    for buffer, value in ((model.mean, mean), (model.weight, weight), (model.logvar, variance)):
        buffer.copy_(torch.as_tensor(value))
    model.logvar.log_()
    model.fitted.fill_(1)
    return model


def test_factor_analysis_is_scikit_learns():
    x = iris()
    for k, published in ((1, -2.815950), (2, -2.599353)):
        theirs = decomposition.FactorAnalysis(k, svd_method="lapack").fit(x)
        model = loaded(
            FactorAnalysis(4, k), theirs.mean_, theirs.components_.T, theirs.noise_variance_
        )
        close(model.log_prob(x), theirs.score_samples(x), 1e-9)
        close(model.posterior(x)[0], theirs.transform(x), 1e-9)
        # A Heywood case: scikit-learn stops on the way to the floor, 1e-4 and 2e-4 below.
        assert published - 1e-6 < FactorAnalysis(4, k).double().fit(x).score(x) < published + 3e-4


def test_factor_analysis_is_a_maximum():
    """Without a Heywood case: diag(Sigma^-1 (Sigma - S) Sigma^-1) = 0 and S Sigma^-1 W = W."""
    w = noise.normal((6, 2), seed=1, dtype=torch.float64)
    x = noise.normal((2000, 2), seed=2, dtype=torch.float64) @ w.T + 5
    x += noise.normal((2000, 6), seed=3, dtype=torch.float64) * torch.arange(1, 7) / 3
    model = FactorAnalysis(6, 2).double().fit(x, tolerance=1e-8)
    s = (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)
    inverse = torch.linalg.inv(model.covariance())
    slope = inverse @ (model.covariance() - s) @ inverse
    close(slope.diagonal(), torch.zeros(6), 1e-6)
    close(s @ inverse @ model.weight, model.weight, 1e-6)
    close(model.covariance(), w @ w.T + (torch.arange(1, 7) / 3).square().diag(), 0.3)
    assert model.bic(x) == pytest.approx(-4000 * model.score(x) + (24 - 1) * math.log(2000))


def test_probabilistic_pca_is_scikit_learns_pca():
    """PCA.score takes the covariance over N - 1: our closed form, scaled, is the same density."""
    x = torch.from_numpy(datasets.load_digits().data)
    theirs = decomposition.PCA(10, svd_solver="full").fit(x)
    model = ProbabilisticPCA(64, 10).double().fit(x)
    ratio = len(x) / (len(x) - 1)
    scaled = loaded(
        ProbabilisticPCA(64, 10), model.mean, model.weight * ratio**0.5, model.logvar.exp() * ratio
    )
    close(scaled.log_prob(x), theirs.score_samples(x), 1e-8)
    assert scaled.score(x) == pytest.approx(theirs.score(x), rel=1e-10)
    assert model.score(x) > theirs.score(x)
    axes = torch.linalg.qr(model.weight).Q
    close(axes @ axes.T, theirs.components_.T @ theirs.components_, 1e-8)


def test_probabilistic_pca_is_a_maximum():
    x = cloud()
    model = ProbabilisticPCA(4, 2).double().fit(x)
    best = model.score(x)
    for i in range(10):
        moved = model.weight + 1e-3 * noise.normal((4, 2), seed=i, dtype=torch.float64)
        assert loaded(ProbabilisticPCA(4, 2), model.mean, moved, model.logvar.exp()).score(x) < best
    for factor in (0.99, 1.01):
        variance = model.logvar.exp() * factor
        other = loaded(ProbabilisticPCA(4, 2), model.mean, model.weight, variance)
        assert other.score(x) < best
    assert model.bic(x) == pytest.approx(-1000 * best + (4 + 8 - 1 + 1) * math.log(500))


@pytest.mark.parametrize("name", LINEAR)
def test_linear_gaussian_laws(name):
    """log p(x) is the Gaussian's with covariance W W^T + Psi; p(z|x) its conditional."""
    x = cloud()
    model = LINEAR[name](4, 2).double().fit(x)
    normal = torch.distributions.MultivariateNormal(model.mean, model.covariance())
    close(model.log_prob(x), normal.log_prob(x), 1e-9)
    gain = model.weight.T @ torch.linalg.inv(model.covariance())
    mean, covariance = model.posterior(x)
    close(mean, (x - model.mean) @ gain.T, 1e-9)
    close(covariance, torch.eye(2) - gain @ model.weight, 1e-9)
    drawn = model.sample(40_000, seed=1)
    spread = model.covariance().diagonal().sqrt()
    close(
        drawn.T.cov() / spread / spread[:, None],
        model.covariance() / spread / spread[:, None],
        0.03,
    )
    close((drawn.mean(0) - model.mean) / spread, torch.zeros(4), 0.03)
    assert torch.equal(model.sample(3, seed=noise.key(1, offset=9)), drawn[9:12])


@pytest.mark.parametrize("name", LINEAR)
def test_far_from_zero_float32(name):
    wide = noise.normal((500, 3), seed=2, dtype=torch.float64) + 1e4
    far = wide.float()
    model, exact = LINEAR[name](3, 1).fit(far), LINEAR[name](3, 1).double().fit(far.double())
    assert (model.logvar.exp() > 0.1).all()
    close(model.covariance().double(), exact.covariance(), 1e-5)
    close(model.log_prob(far).double(), exact.log_prob(far.double()), 3e-3)


def test_linear_gaussian_bad_and_degenerate_input():
    x = torch.from_numpy(datasets.load_digits().data)[:300]  # with constant pixels
    model = FactorAnalysis(64, 5).double().fit(x, tolerance=1e-4)
    assert model.log_prob(x).isfinite().all()
    assert model.score(x) > ProbabilisticPCA(64, 5).double().fit(x).score(x)
    with pytest.raises(ValueError, match="must vary, all are constant"):
        FactorAnalysis(3, 1).fit(torch.ones(5, 3))
    with pytest.raises(ValueError, match="more than 2 dimensions, it does in 1; take fewer"):
        ProbabilisticPCA(3, 2).fit(torch.tensor([[0.0, 0, 0], [1, 1, 1], [3, 3, 3]]))
    with pytest.raises(ValueError, match="factors must be at most the 3 features, got 4"):
        FactorAnalysis(3, 4)
    with pytest.raises(ValueError, match="factors must be below the 3 features"):
        ProbabilisticPCA(3, 3)
    with pytest.warns(RuntimeWarning, match="stopped at a gradient of"):
        FactorAnalysis(4, 1).double().fit(iris(), iterations=2)
    for kind in LINEAR.values():
        with pytest.raises(ValueError, match="at least 2 rows, got 1"):
            kind(3, 1).fit(torch.ones(1, 3))
