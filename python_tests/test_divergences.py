"""Divergences: their laws, outside oracles, gradients, and what disjoint supports do to them."""

import csv
import itertools
import math

import pytest
import torch
from torch.distributions import Categorical, MultivariateNormal, Normal, kl_divergence

from gmkernels import disjoint, noise
from gmkernels import divergences as D
from gmkernels.__main__ import main


@pytest.fixture(autouse=True)
def _one_thread():
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def close(a, b, tol):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=tol, atol=tol)


def normals(n, d=2, seed=0):
    return noise.normal((n, d), seed=seed, dtype=torch.float64)


def covariance(d, seed):
    root = normals(d, d, seed)
    return root @ root.T + 0.1 * torch.eye(d).double()


def line(mean, std=1.0):
    """log N(x; mean, std^2) of rows [N, 1]."""
    return lambda x: Normal(mean, std).log_prob(x)[:, 0]


# Probabilities


def test_categorical_laws():
    p, q = (normals(50, 6, seed).mul(3).softmax(1) for seed in (1, 2))
    close(D.kl_categorical(p, q), kl_divergence(Categorical(p), Categorical(q)), 1e-12)
    assert (D.kl_categorical(p, q) > 0).all()
    js = D.js_categorical(p, q)
    assert (js > 0).all()
    assert (js < math.log(2)).all()
    assert js.max() > 0.4
    close(D.js_categorical(q, p), js, 1e-14)
    m = (p + q) / 2
    close(js, (D.kl_categorical(p, m) + D.kl_categorical(q, m)) / 2, 1e-12)
    for f in (D.kl_categorical, D.js_categorical):
        assert torch.equal(f(p, p), torch.zeros(50).double())
        small = [normals(3, 4, seed).softmax(1).requires_grad_() for seed in (1, 2)]
        torch.autograd.gradcheck(f, small)


def test_categorical_zeros():
    p, q = torch.tensor([0.0, 0.5, 0.5, 0.0]), torch.tensor([0.5, 0.5, 0.0, 0.0])
    assert D.kl_categorical(p, q) == math.inf
    close(D.kl_categorical(p, torch.full((4,), 0.25)), math.log(2), 1e-6)
    close(D.js_categorical(p, q), math.log(2) / 2, 1e-6)
    p.requires_grad_()
    D.js_categorical(p, q).backward()
    assert p.grad.isfinite().all()
    for f in (D.kl_categorical, D.js_categorical):
        assert f(torch.tensor([math.nan, 0.5]), q[:2]).isnan()
        assert f(q[:2], torch.tensor([math.nan, 0.5])).isnan()
    least = torch.tensor([1.0, 5e-324], dtype=torch.float64)  # whose half is 0
    assert D.js_categorical(least, torch.tensor([1.0, 0.0]).double()) == 0


# Gaussians


@pytest.mark.parametrize("d", [1, 3])
def test_kl_of_normals(d):
    means, covariances = (
        (normals(1, d, 1)[0], normals(1, d, 2)[0]),
        (covariance(d, 3), covariance(d, 4)),
    )
    p, q = (MultivariateNormal(m, c) for m, c in zip(means, covariances, strict=True))
    arguments = (means[0], covariances[0], means[1], covariances[1])
    close(D.kl_normal(*arguments), kl_divergence(p, q), 1e-10)
    assert D.kl_normal(*arguments) > 0
    assert abs(D.kl_normal(*arguments[:2], *arguments[:2])) < 1e-12
    variances = [c.diagonal() for c in covariances]
    full = D.kl_normal(means[0], variances[0].diag(), means[1], variances[1].diag())
    rows = [t[None] for pair in zip(means, variances, strict=True) for t in pair]
    diagonal = D.gaussian_kl(rows[0], rows[1].log(), prior_mean=rows[2], prior_logvar=rows[3].log())
    close(diagonal[0], full, 1e-10)
    # A perturbed factor keeps a covariance symmetric.
    roots = [torch.linalg.cholesky(c).requires_grad_() for c in covariances]
    torch.autograd.gradcheck(
        lambda m, n, a, b: D.kl_normal(m, a @ a.T, n, b @ b.T),
        (means[0].requires_grad_(), means[1].requires_grad_(), *roots),
    )


def quadrature(mean_p, std_p, mean_q, std_q):
    """Densities of two normals on a grid, and its step."""
    x = torch.linspace(-40, 40, 80_001, dtype=torch.float64)
    mean_p, std_p, mean_q, std_q = torch.tensor([mean_p, std_p, mean_q, std_q]).double()
    return Normal(mean_p, std_p).log_prob(x).exp(), Normal(mean_q, std_q).log_prob(x).exp(), 1e-3


@pytest.mark.parametrize(
    "pair", [(0.0, 1.0, 1.5, 0.5), (0.0, 1.0, 8.0, 1.0), (0.0, 2.0, 0.0, 0.25)]
)
def test_js_of_normals_and_the_optimal_discriminator(pair):
    """D* = p / (p + q) is best, and its value is V = -log 4 + 2 JS. Goodfellow et al. 2014."""
    p, q, step = quadrature(*pair)
    js = D.js_categorical(p * step, q * step)

    def value(real, fake):
        """V of a discriminator that says `real`, and `fake` = 1 - real, of each x."""
        return float((torch.xlogy(p, real) + torch.xlogy(q, fake)).sum()) * step

    best, rest = ((a + 1e-300) / (p + q + 2e-300) for a in (p, q))
    assert value(best, rest) == pytest.approx(-math.log(4) + 2 * float(js), abs=1e-9)
    for other in (best * 0.99 + 0.001, best * 0.99 + 0.009, torch.full_like(best, 0.4)):
        assert value(other, 1 - other) < value(best, rest)
    means = [torch.tensor([m], dtype=torch.float64) for m in pair[::2]]
    variances = [torch.tensor([[s * s]], dtype=torch.float64) for s in pair[1::2]]
    estimate = D.js_normal(means[0], variances[0], means[1], variances[1], n=20_000, seed=1)
    assert abs(estimate - js) < 0.01
    assert estimate <= math.log(2)


def test_js_of_normals_has_gradients():
    mean = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    arguments = (torch.zeros(2).double(), covariance(2, 1), mean, covariance(2, 2))
    torch.autograd.gradcheck(lambda *a: D.js_normal(*a, n=200, seed=3), arguments, atol=1e-6)
    first = D.js_normal(*arguments, n=50, seed=1)
    assert torch.equal(first, D.js_normal(*arguments, n=50, seed=1))
    assert not torch.equal(first, D.js_normal(*arguments, n=50, seed=2))


def test_monte_carlo_of_two_log_densities():
    x, y = normals(20_000, 1, 1), normals(20_000, 1, 2) * 2 + 1
    kl = float(kl_divergence(Normal(0.0, 1.0), Normal(1.0, 2.0)))
    assert abs(D.kl_monte_carlo(line(0.0), line(1.0, 2.0), x) - kl) < 0.02
    p, q, step = quadrature(0.0, 1.0, 1.0, 2.0)
    js = D.js_categorical(p * step, q * step)
    assert abs(D.js_monte_carlo(line(0.0), line(1.0, 2.0), x, y) - js) < 0.01

    def square(low):
        return lambda x: torch.where((x >= low) & (x < low + 1), 0.0, -math.inf)[:, 0]

    u = noise.uniform((100, 1), seed=3) * 0.99
    close(D.js_monte_carlo(square(0), square(2), u, u + 2), math.log(2), 1e-6)
    close(D.js_monte_carlo(square(0), square(0), u, u), 0.0, 1e-6)
    assert D.kl_monte_carlo(square(0), square(2), u) == math.inf


@pytest.mark.parametrize("k", [1, 5])
def test_kl_by_nearest_neighbours(k):
    """Against the closed form; and against the formula point by point."""
    x, y = normals(1500, 2, 1), normals(1200, 2, 2) * 1.5 + 0.7
    exact = D.kl_normal(torch.zeros(2), torch.eye(2), torch.full((2,), 0.7), torch.eye(2) * 1.5**2)
    assert abs(D.kl_nearest_neighbours(x, y, k=k) - exact) < 0.15
    x, y, total = x[:12], y[:9], 0.0
    for i, row in enumerate(x):
        rho = sorted(math.dist(row, other) for j, other in enumerate(x) if j != i)[k - 1]
        nu = sorted(math.dist(row, other) for other in y)[k - 1]
        total += 2 / 12 * math.log(nu / rho)
    close(D.kl_nearest_neighbours(x, y, k=k), total + math.log(9 / 11), 1e-10)
    both = (x.requires_grad_(), y.requires_grad_())
    torch.autograd.gradcheck(lambda x, y: D.kl_nearest_neighbours(x, y, k=k), both)


# Wasserstein


@pytest.mark.parametrize(("n", "m"), [(7, 7), (6, 4), (1, 5), (13, 8), (40, 41)])
def test_wasserstein_1d_is_scipys(n, m):
    stats = pytest.importorskip("scipy.stats")
    x, y = normals(n, 3, 1), normals(m, 3, 2) + 0.5
    theirs = [stats.wasserstein_distance(a, b) for a, b in zip(x.T, y.T, strict=True)]
    close(D.wasserstein_1d(x, y), theirs, 1e-12)
    close(D.wasserstein_1d(y, x), theirs, 1e-12)
    assert torch.equal(D.wasserstein_1d(x, x), torch.zeros(3).double())
    torch.autograd.gradcheck(D.wasserstein_1d, (x.requires_grad_(), y.requires_grad_()))


def test_wasserstein_of_gaussians_of_one_variance_is_the_gap_of_their_means():
    x, y = normals(20_000, 1, 1), normals(15_000, 1, 2)
    for gap in (-3.0, 2.0):
        assert abs(D.wasserstein_1d(x, y + gap) - abs(gap)) < 0.03
        close(D.wasserstein_1d(x, x + gap), [abs(gap)], 1e-12)


def test_sliced_wasserstein():
    x, y = normals(300, 3, 1), normals(200, 3, 2)
    shift = torch.tensor([3.0, 4.0, 0.0]).double()
    # E|u_1| of a direction u on the sphere is 1/2 in space, 2/pi in the plane.
    assert D.sliced_wasserstein(x, x + shift, directions=4000, seed=1) == pytest.approx(
        2.5, abs=0.1
    )
    plane = D.sliced_wasserstein(x[:, :2], x[:, :2] + shift[:2], directions=4000, seed=1)
    assert plane == pytest.approx(10 / math.pi, abs=0.1)
    assert D.sliced_wasserstein(x, x, seed=1) == 0
    close(D.sliced_wasserstein(x[:, :1], y[:, :1], seed=1), D.wasserstein_1d(x, y)[0], 1e-12)
    first = D.sliced_wasserstein(x, y, seed=1)
    assert torch.equal(first, D.sliced_wasserstein(x, y, seed=1))
    assert not torch.equal(first, D.sliced_wasserstein(x, y, seed=2))
    x, y = x[:5].requires_grad_(), y[:4].requires_grad_()
    torch.autograd.gradcheck(lambda x, y: D.sliced_wasserstein(x, y, directions=9, seed=1), (x, y))


@pytest.mark.parametrize("power", [1, 2])
def test_sinkhorn_tends_to_the_cheapest_matching(power):
    x, y = normals(6, 2, 1), normals(6, 2, 2) + 1
    cost = torch.cdist(x, y) ** power
    cheapest = min(
        sum(float(cost[i, j]) for i, j in enumerate(match)) / 6
        for match in itertools.permutations(range(6))
    )
    values = [
        float(D.sinkhorn(x, y, epsilon=e, power=power, debiased=False)) for e in (1.0, 0.1, 0.01)
    ]
    assert values[0] > values[1] > values[2] > cheapest - 1e-6
    assert values[2] < cheapest + 0.02
    x, y = (torch.linspace(0, 1, n).double()[:, None] for n in (9, 6))
    small = D.sinkhorn(x, y + 2, epsilon=1e-3, power=1, debiased=False, iterations=5000)
    close(small, D.wasserstein_1d(x, y + 2)[0], 5e-3)


def test_sinkhorn_is_its_definition():
    """At the optimum the plan's marginals are even, and <P, C> + eps KL(P || even) is the value."""
    x, y = normals(5, 2, 1).requires_grad_(), normals(7, 2, 2) + 1
    cost = (x[:, None] - y).square().sum(2)
    options = {"epsilon": 0.3, "debiased": False, "tolerance": 1e-11, "iterations": 10_000}
    value = D.sinkhorn(x, y, **options)
    (gradient,) = torch.autograd.grad(value, x)
    kernel = (-cost.detach() / 0.3).exp()
    for _ in range(3000):  # Sinkhorn's own scaling, not in the log domain
        kernel = kernel / kernel.sum(1, keepdim=True) / 5
        kernel = kernel / kernel.sum(0) / 7
    close(kernel.sum(1), [0.2] * 5, 1e-12)
    entropy = (kernel * (kernel * 35).log()).sum()
    close(value, (kernel * cost).sum() + 0.3 * entropy, 1e-9)
    close(gradient, (2 * kernel[:, :, None] * (x[:, None] - y)).sum(1), 1e-9)


def test_sinkhorn_divergence_laws():
    x, y = normals(30, 2, 1), normals(20, 2, 2) * 2 + 0.5
    assert D.sinkhorn(x, x, epsilon=0.5) == 0
    assert D.sinkhorn(x, y, epsilon=0.5) > 0
    close(D.sinkhorn(x, y, epsilon=0.5), D.sinkhorn(y, x, epsilon=0.5), 1e-2)
    shift = torch.tensor([3.0, 4.0]).double()
    close(D.sinkhorn(x, x + shift, epsilon=0.5), 25.0, 1e-2)
    close(
        D.sinkhorn(x + 1e3, x - 1e3, epsilon=0.5), 8e6, 1e-6
    )  # exp(-cost / epsilon) is 0 in any format: the log domain


def test_sinkhorn_gradients():
    x, y = normals(3, 2, 1).requires_grad_(), (normals(2, 2, 2) + 1).requires_grad_()
    options = {"epsilon": 1.0, "tolerance": 1e-9}
    for power in (1, 2):
        torch.autograd.gradcheck(lambda x, y, p=power: D.sinkhorn(x, y, power=p, **options), (x, y))
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(D.sinkhorn(x, y, **options), x, create_graph=True)


# MMD


@pytest.mark.parametrize("unbiased", [False, True])
def test_mmd_is_its_definition(unbiased):
    x, y = normals(6, 2, 1), normals(5, 2, 2) + 0.5

    def kernel_mean(a, b, same):
        pairs = [
            math.exp(-(math.dist(a[i], b[j]) ** 2) / (2 * 0.8**2))
            for i in range(len(a))
            for j in range(len(b))
            if not (same and unbiased and i == j)
        ]
        return sum(pairs) / len(pairs)

    truth = kernel_mean(x, x, True) + kernel_mean(y, y, True) - 2 * kernel_mean(x, y, False)
    value = D.mmd(x, y, bandwidth=0.8, unbiased=unbiased)
    close(value, truth, 1e-12)
    both = (x.requires_grad_(), y.requires_grad_())
    torch.autograd.gradcheck(lambda x, y: D.mmd(x, y, bandwidth=0.8, unbiased=unbiased), both)


def test_mmd_laws():
    x, y = normals(80, 3, 1), normals(60, 3, 2)
    assert D.mmd(x, x, bandwidth=1.0, unbiased=False) == 0
    assert D.mmd(x, y, bandwidth=1.0, unbiased=False) > 0
    close(D.mmd(x, y), D.mmd(y, x), 1e-14)
    many = torch.stack(
        [D.mmd(normals(20, 2, 2 * i), normals(30, 2, 2 * i + 1), bandwidth=1.0) for i in range(200)]
    )
    assert abs(many.mean()) < 4 * many.std() / 200**0.5
    assert many.min() < 0
    joined = torch.pdist(torch.cat([x, y])).sort().values
    median = float(joined[(len(joined) - 1) // 2])
    close(D.mmd(x, y), D.mmd(x, y, bandwidth=median), 1e-12)
    far = ((x + 1e4).float(), (y + 1e4).float())
    close(D.mmd(*far), D.mmd(*(t.double() for t in far)).float(), 1e-5)


# Disjoint supports


def test_disjoint_supports_leave_js_without_a_gradient_and_wasserstein_with_one():
    columns = disjoint.COLUMNS
    rows = [dict(zip(columns, row, strict=True)) for row in disjoint.rows(2.0, 9)]
    assert [row["theta"] for row in rows] == [i / 4 for i in range(1, 9)]
    for row in rows:
        assert row["KL"] == math.inf
        assert row["Wasserstein-1"] == pytest.approx(row["theta"], abs=1e-12)
        assert row["d Wasserstein-1 / d theta"] == pytest.approx(1, abs=1e-12)
        if row["theta"] >= 1:
            assert row["JS"] == pytest.approx(math.log(2), abs=1e-12)
            assert abs(row["d JS / d theta"]) < 1e-12
            assert row["d Sinkhorn / d theta"] == pytest.approx(1, abs=1e-3)
        else:
            assert row["JS"] < math.log(2) - 1e-3
            assert row["d JS / d theta"] > 0.1
    x = disjoint.quantiles(1000)
    close(x.square().mean(), 1 / 12 - 1 / (2 * math.pi**2), 1e-4)


def test_command(tmp_path, capsys):
    assert main(["compare", "divergences", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "divergences.png").read_bytes()[:4] == b"\x89PNG"
    with open(tmp_path / "divergences.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == disjoint.COLUMNS
    assert len(rows) == 50
    assert "JS             at theta = 2: 0.6931, derivative 0.0000" in capsys.readouterr().out


# Bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a, b: D.kl_categorical(a, b), ValueError, r"q must have p's shape \(4, 2\)"),
        (lambda a, b: D.js_categorical(a.long(), a), TypeError, "p must be float32"),
        (lambda a, b: D.kl_normal(a[0], a, a[0], a), ValueError, r"covariance_p \[D, D\], got"),
        (
            lambda a, b: D.kl_normal(a[0], -b[:, :2], a[0], b[:, :2]),
            ValueError,
            "covariance_p must",
        ),
        (lambda a, b: D.kl_monte_carlo(None, None, a[:0]), ValueError, "x must have at least 1"),
        (lambda a, b: D.kl_nearest_neighbours(a, b), ValueError, "must have one D and device"),
        (lambda a, b: D.kl_nearest_neighbours(a, a, k=0), ValueError, "k must be >= 1, got 0"),
        (lambda a, b: D.kl_nearest_neighbours(a[:2], a, k=2), ValueError, "x must have at least 3"),
        (lambda a, b: D.wasserstein_1d(a, b), ValueError, "x and y must have one D"),
        (lambda a, b: D.wasserstein_1d(a[:0], a), ValueError, r"x must be \[N, D\] with N > 0"),
        (lambda a, b: D.wasserstein_1d(a[0], a), ValueError, r"x must have shape \[B, \*\]"),
        (lambda a, b: D.sliced_wasserstein(a, a, directions=0), ValueError, "directions must be"),
        (lambda a, b: D.sinkhorn(a, a, epsilon=0.0), ValueError, "epsilon must be a finite number"),
        (lambda a, b: D.sinkhorn(a, a, epsilon=1.0, power=3), ValueError, "power must be 1 or 2"),
        (lambda a, b: D.sinkhorn(a, a, epsilon=1.0, iterations=0), ValueError, "iterations must"),
        (lambda a, b: D.mmd(a[:1], a), ValueError, "x must have at least 2 rows, got 1"),
        (lambda a, b: D.mmd(a, a, bandwidth=-1.0), ValueError, "bandwidth must be a finite number"),
        (lambda a, b: D.mmd(a * 0, a * 0), ValueError, "bandwidth must be .* got 0.0; set it"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    a = torch.arange(8.0).view(4, 2)
    b = torch.tensor([[1.0, 0.0, 3.0], [0.0, 1.0, 3.0]])
    with pytest.raises(error, match=message):
        call(a, b)


def test_sinkhorn_says_when_it_stops_early():
    x = torch.arange(4.0)[:, None]
    with pytest.warns(RuntimeWarning, match="the marginals are still off by .* after 1 iterations"):
        D.sinkhorn(x, x.square(), epsilon=0.1, iterations=1)
