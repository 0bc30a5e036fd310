"""Classifiers: scikit-learn's numbers, the laws of P(X, Y), and Ng and Jordan's comparison."""

import csv
import dataclasses
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from gmkernels import learning_curves, noise
from gmkernels.__main__ import main
from gmkernels.models.classifier import (
    BernoulliNaiveBayes,
    GaussianNaiveBayes,
    GaussianPrior,
    LaplacePrior,
    LogisticRegression,
)

datasets = pytest.importorskip("sklearn.datasets")
linear_model = pytest.importorskip("sklearn.linear_model")
naive_bayes = pytest.importorskip("sklearn.naive_bayes")


@pytest.fixture(autouse=True)
def _one_thread():
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def table(name, scaled=True):
    bunch = getattr(datasets, f"load_{name}")()
    x, y = torch.from_numpy(bunch.data).double(), torch.from_numpy(bunch.target).long()
    return ((x - x.mean(0)) / x.std(0) if scaled else x), y


def close(a, b, tol):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=tol, atol=tol)


def noisy(n=300, classes=3, features=4, dtype=torch.float64):
    """Classes that overlap, so that the maximum likelihood exists."""
    y = torch.arange(n) % classes
    x = noise.normal((n, features), seed=4, dtype=torch.float64)
    x[:, 0] += 0.8 * y
    return x.to(dtype), y


# Logistic regression


@pytest.mark.parametrize("name", ["iris", "wine", "breast_cancer"])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_gaussian_prior_is_scikit_learns_l2(name, scale):
    x, y = table(name)
    classes = int(y.max()) + 1
    model = LogisticRegression(x.shape[1], classes, prior=GaussianPrior(scale)).double().fit(x, y)
    theirs = linear_model.LogisticRegression(C=scale**2, tol=1e-10, max_iter=10_000).fit(x, y)
    close(model.weight, theirs.coef_, 1e-4)
    close(model.intercept, theirs.intercept_, 1e-4)
    close(model.predict_proba(x), theirs.predict_proba(x), 1e-5)
    assert model.score(x, y) == theirs.score(x, y)


def test_laplace_prior_is_scikit_learns_l1():
    x, y = table("wine")
    model = LogisticRegression(13, 3, prior=LaplacePrior(0.5)).double().fit(x, y)
    theirs = linear_model.LogisticRegression(
        penalty="elasticnet", l1_ratio=1.0, C=0.5, solver="saga", tol=1e-10, max_iter=20_000
    ).fit(x, y)
    close(model.weight, theirs.coef_, 1e-4)
    close(model.intercept, theirs.intercept_, 1e-4)
    assert ((model.weight == 0).numpy() == (theirs.coef_ == 0)).all()
    assert 10 < int((model.weight == 0).sum()) < 35


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    "prior", [None, GaussianPrior(0.3), LaplacePrior(0.05)], ids=["ML", "Gaussian", "Laplace"]
)
def test_fit_is_stationary(classes, prior):
    """The (sub)gradient of -log posterior, written anew here, is 0 at the fit."""
    x, y = noisy(classes=classes)
    model = LogisticRegression(4, classes, prior=prior).double().fit(x, y)
    w, b = model.weight.clone().requires_grad_(), model.intercept.clone().requires_grad_()
    logits = x @ w.T + b
    if classes == 2:
        nll = F.binary_cross_entropy_with_logits(logits[:, 0], y.double(), reduction="sum")
    else:
        nll = F.cross_entropy(logits, y, reduction="sum")
    if isinstance(prior, GaussianPrior):
        nll = nll + w.square().sum() / (2 * 0.3**2)
    dw, db = torch.autograd.grad(nll, (w, b))
    close(db, torch.zeros_like(db), 1e-5)
    if not isinstance(prior, LaplacePrior):
        close(dw, torch.zeros_like(dw), 1e-5)
        return
    used = w != 0
    assert 0 < int(used.sum()) < w.numel()
    close(dw[used], -w[used].sign() / 0.05, 1e-5)
    assert dw[~used].abs().max() <= 1 / 0.05 + 1e-5


def test_maximum_likelihood_ignores_scale_and_origin():
    x, y = noisy()
    moved = x * torch.tensor([1e-3, 1.0, 1e3, 5.0]) + 1e4
    models = [LogisticRegression(4, 3).double().fit(data, y) for data in (x, moved)]
    close(models[0].predict_proba(x), models[1].predict_proba(moved), 1e-6)
    close(models[0].weight, models[1].weight * torch.tensor([1e-3, 1.0, 1e3, 5.0]), 1e-6)
    far = (x + 1e4).float()
    model = LogisticRegression(4, 3).fit(far, y)
    wide = LogisticRegression(4, 3).double().fit(far.double(), y)
    close(model.predict_proba(far).double(), wide.predict_proba(far.double()), 1e-5)


def test_classes_that_a_plane_separates_are_separated():
    x = torch.tensor([[i, 0.1] for i in range(12)], dtype=torch.float64)
    assert x.mean(0)[1] != 0.1, "rounding makes the constant look as if it varied"
    y = (torch.arange(12) > 5).long()
    model = LogisticRegression(2, 2).double().fit(x, y)
    assert model.score(x, y) == 1
    assert model.weight.isfinite().all()
    assert model.weight[0, 1] == 0, "a constant feature tells nothing"
    assert model.weight[0, 0] > 10


def test_logistic_regression_says_what_it_lacks():
    x, y = noisy()
    model = LogisticRegression(4, 3).double()
    with pytest.warns(RuntimeWarning, match="stopped at a gradient of"):
        model.fit(x, y, iterations=2)
    with pytest.warns(RuntimeWarning, match="stopped at a gradient of"):
        LogisticRegression(4, 3, prior=LaplacePrior()).double().fit(x, y, iterations=2)
    assert model.log_prob_kind == "none"
    with pytest.raises(RuntimeError, match=r"no P\(X\)"):
        model.log_prob(x)
    for prior in (GaussianPrior, LaplacePrior):
        with pytest.raises(ValueError, match="scale must be a finite number > 0, got 0"):
            prior(0.0)


# Naive Bayes


@pytest.mark.parametrize("name", ["iris", "digits"])
def test_gaussian_naive_bayes_is_scikit_learns(name):
    x, y = table(name, scaled=False)
    model = GaussianNaiveBayes(x.shape[1], int(y.max()) + 1).double().fit(x, y)
    theirs = naive_bayes.GaussianNB().fit(x, y)
    close(model.log_joint(x), theirs.predict_joint_log_proba(x), 1e-9)
    close(model.predict_log_proba(x), theirs.predict_log_proba(x), 1e-9)
    assert (model.predict(x).numpy() == theirs.predict(x)).all()


def test_bernoulli_naive_bayes_is_scikit_learns():
    x, y = table("digits", scaled=False)
    x = (x > 7).double()
    model = BernoulliNaiveBayes(64, 10, alpha=0.5).double().fit(x, y)
    theirs = naive_bayes.BernoulliNB(alpha=0.5).fit(x, y)
    close(model.log_joint(x), theirs.predict_joint_log_proba(x), 1e-9)
    assert model.score(x, y) == theirs.score(x, y)


def test_shared_variances_are_the_pooled_ones_and_make_a_linear_classifier():
    x, y = noisy()
    model = GaussianNaiveBayes(4, 3, shared=True).double().fit(x, y)
    pooled = sum((x[y == k] - x[y == k].mean(0)).square().sum(0) for k in range(3)) / len(x)
    close(model.logvar[0].exp(), pooled, 1e-8)
    normal = torch.distributions.Normal(model.mean, pooled.sqrt())
    close(model.log_likelihood(x), normal.log_prob(x[:, None]).sum(2), 1e-8)
    line = torch.linspace(-3, 3, 9, dtype=torch.float64)[:, None] * torch.ones(4).double()
    log_odds = model.log_joint(line)[:, 1] - model.log_joint(line)[:, 0]
    close(log_odds.diff(n=2), torch.zeros(7), 1e-9)


def test_naive_bayes_is_a_distribution():
    x, y = noisy(features=1)
    model = GaussianNaiveBayes(1, 3).double().fit(x, y)
    grid = torch.linspace(-30, 30, 20_001, dtype=torch.float64)[:, None]
    assert abs(float(model.log_marginal(grid).exp().sum()) * 0.003 - 1) < 1e-9
    close(model.log_marginal(x), model.log_joint(x).logsumexp(1), 1e-12)
    assert torch.equal(model.score_samples(x), model.log_marginal(x))
    close(model.predict_proba(x).sum(1), torch.ones(len(x)), 1e-12)
    assert model.bic(x) == pytest.approx(8 * math.log(300) - 2 * float(model.log_prob(x).sum()))
    torch.autograd.gradcheck(model.log_prob, x[:5].clone().requires_grad_())
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6)))
    labels = (states[:, 0] + states[:, 1] > 1).long()
    bernoulli = BernoulliNaiveBayes(6, 2).fit(states, labels)
    assert abs(float(bernoulli.log_joint(states).exp().sum()) - 1) < 1e-6


@pytest.mark.parametrize("shared", [False, True])
def test_samples_of_gaussian_naive_bayes(shared):
    x, y = noisy()
    model = GaussianNaiveBayes(4, 3, shared=shared).double().fit(x[50:], y[50:])
    drawn, labels = model.sample(20_000, seed=1)
    again = GaussianNaiveBayes(4, 3, shared=shared).double().fit(drawn, labels)
    close(again.log_prior.exp(), model.log_prior.exp(), 0.02)
    close(again.mean, model.mean, 0.06)
    close(again.logvar, model.logvar, 0.06)
    part, some = model.sample(5, seed=noise.key(1, offset=7))
    assert torch.equal(part, drawn[7:12])
    assert torch.equal(some, labels[7:12])
    assert not torch.equal(part, model.sample(5, seed=2)[0])


def test_samples_of_bernoulli_naive_bayes():
    x = (noisy(features=5)[0] > 0.3).float()
    y = (torch.arange(300) % 4).clamp(max=2)
    model = BernoulliNaiveBayes(5, 3).fit(x, y)
    drawn, labels = model.sample(20_000, seed=1)
    for k in range(3):
        assert abs(float((labels == k).float().mean()) - float((y == k).float().mean())) < 0.02
        close(drawn[labels == k].mean(0), model.logits[k].sigmoid(), 0.03)


def test_far_from_zero_float32_variances_stay():
    """E[x^2] - mu^2 in float32 is negative for about half of such features."""
    x, y = noisy(n=3000, features=6)
    far = (x + 1e4).float()
    truth = GaussianNaiveBayes(6, 3).double().fit(far.double(), y)
    for shared in (False, True):
        model = GaussianNaiveBayes(6, 3, shared=shared, floor=1e-12).fit(far, y)
        assert (model.logvar.exp() > 0.5).all()
        assert (model.logvar.exp() < 2.0).all()
    close(GaussianNaiveBayes(6, 3).fit(far, y).logvar.double(), truth.logvar, 1e-6)


# Bad input

MODELS = {
    "logistic": lambda: LogisticRegression(4, 3),
    "gaussian": lambda: GaussianNaiveBayes(4, 3),
    "bernoulli": lambda: BernoulliNaiveBayes(4, 3),
}


def bits():
    x, y = noisy(dtype=torch.float32)
    return (x > 0).float(), y


@pytest.mark.parametrize("name", MODELS)
def test_bad_input_is_refused(name):
    x, y = bits()
    model = MODELS[name]()
    with pytest.raises(RuntimeError, match="not fitted; call fit"):
        model.predict(x)
    broken = x.clone()
    broken[7, 2] = math.nan
    for error, message, data, labels in (
        (ValueError, "class 0 of 3 has 0; add some", x, torch.full_like(y, 2)),
        (ValueError, r"must lie in \[0, 3\), got 0 to 3", x, (y + (torch.arange(300) == 2))),
        (ValueError, r"must lie in \[0, 3\), got -1 to 1", x, y - 1),
        (ValueError, "finite, row 7 is not", broken, y),
        (ValueError, r"x must be \[N, 4\], got \(300, 3\)", x[:, :3], y),
        (ValueError, r"y must be \[300\]", x, y[1:]),
        (ValueError, "at least 1 rows, got 0", x[:0], y[:0]),
        (TypeError, "int64 tensor, got torch.float32", x, y.float()),
        (TypeError, "float32 like the model, got torch.float64", x.double(), y),
        (TypeError, "must be a tensor, got list", x.tolist(), y),
    ):
        with pytest.raises(error, match=message):
            model.fit(data, labels)
    model.fit(x, y)
    with pytest.raises(ValueError, match="finite, row 7 is not"):
        model.predict(broken)
    assert model.predict_log_proba(broken)[7].isnan().all()
    assert model.predict_log_proba(broken)[:7].isfinite().all()
    with pytest.raises(TypeError, match="the model must be float32 or float64"):
        model.half().predict(x.half())
    with pytest.raises(ValueError, match="classes must be a whole number >= 2, got 1"):
        type(model)(4, 1)


def test_bad_input_of_one_model():
    x, y = bits()
    lonely = torch.cat([torch.tensor([0]), y[1:].clamp(min=1)])
    with pytest.raises(ValueError, match=r"at least 2 samples .*shared=True.* class 0 of 3 has 1"):
        GaussianNaiveBayes(4, 3).fit(x, lonely)
    shared = GaussianNaiveBayes(4, 3, shared=True).fit(x, lonely)
    assert shared.log_joint(x).isfinite().all()
    assert shared.mean[0].equal(x[0])
    with pytest.raises(ValueError, match="must vary, all are constant"):
        GaussianNaiveBayes(4, 3).fit(torch.ones_like(x), y)
    constant = x.clone()
    constant[:, 1] = 0.5
    assert GaussianNaiveBayes(4, 3).fit(constant, y).log_joint(constant).isfinite().all()
    with pytest.raises(ValueError, match="must hold 0 and 1"):
        BernoulliNaiveBayes(4, 3).fit(constant, y)
    with pytest.raises(ValueError, match="alpha must be a finite number > 0"):
        BernoulliNaiveBayes(4, 3, alpha=0.0)
    with pytest.raises(ValueError, match="floor must be a finite number > 0"):
        GaussianNaiveBayes(4, 3, floor=-1.0)


@pytest.mark.parametrize("name", MODELS)
def test_a_state_is_the_model(name):
    x, y = bits()
    model = MODELS[name]().fit(x, y)
    other = MODELS[name]()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.predict_proba(x), model.predict_proba(x))
    wide = other.double().predict_proba(x.double())
    close(wide, model.predict_proba(x).double(), 1e-5)


# Ng and Jordan


def test_naive_bayes_wins_early_and_loses_late_where_features_are_correlated():
    problem = dataclasses.replace(learning_curves.problem("correlated"), sizes=(20, 30, 600))
    rows = learning_curves.curves(problem, repeats=10, seed=0)
    naive, logistic = (
        [row.error for row in rows if row.model == m] for m in learning_curves.MODELS
    )
    assert naive[0] < logistic[0]
    assert naive[1] < logistic[1]
    assert logistic[2] < 0.12 < 0.15 < naive[2]
    assert all(row.bayes_error == 0.1 < row.error for row in rows)


def test_both_meet_where_features_are_independent():
    problem = dataclasses.replace(learning_curves.problem("independent"), sizes=(30, 2000))
    rows = learning_curves.curves(problem, repeats=5, seed=0)
    naive, logistic = (
        [row.error for row in rows if row.model == m] for m in learning_curves.MODELS
    )
    assert naive[0] < logistic[0] - 0.02
    assert 0.1 <= naive[1] < 0.102
    assert 0.1 <= logistic[1] < 0.104


def test_the_closed_error_is_the_rate_on_many_draws():
    x, y, error = learning_curves.gaussians("correlated", most=40_000).draw(noise.key(3))
    part = learning_curves.each_class_first(y, 2)[:12]
    for model in (GaussianNaiveBayes(20, 2, shared=True), LogisticRegression(20, 2)):
        model = model.double().fit(x[part], y[part])
        assert abs(error(model) - (1 - model.score(x, y))) < 0.006


def test_an_order_that_begins_with_each_class():
    order = learning_curves.each_class_first(torch.tensor([1, 1, 1, 0, 2, 0, 0, 2]), 3)
    assert order.tolist() == [0, 1, 3, 4, 5, 7, 2, 6]


def test_command(tmp_path, monkeypatch, capsys):
    def short(name, whole=learning_curves.problem):
        return dataclasses.replace(found := whole(name), sizes=found.sizes[1:3])

    monkeypatch.setattr(learning_curves, "problem", short)
    assert main(["compare", "classifiers", "--out", str(tmp_path / "new"), "--repeats", "2"]) == 0
    assert (tmp_path / "new/classifiers.png").read_bytes()[:4] == b"\x89PNG"
    with open(tmp_path / "new/classifiers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == learning_curves.Row._fields
    assert len(rows) == len(learning_curves.NAMES) * 2 * 2
    assert {row["data"] for row in rows} == set(learning_curves.NAMES)
    assert all(0 <= float(row["error"]) < 1 for row in rows)
    assert "wine, samples: naive Bayes, logistic regression" in capsys.readouterr().out
    for argument, value in (("--repeats", "0"), ("--seed", str(1 << 63))):
        with pytest.raises(SystemExit) as stop:
            main(["compare", "classifiers", "--out", str(tmp_path / "no"), argument, value])
        assert stop.value.code == 2
    assert not (tmp_path / "no").exists()
