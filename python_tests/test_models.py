"""The VAE: its bound against exact likelihoods, its loss against plain PyTorch, its laws."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gmkernels
from gmkernels import noise
from gmkernels.models import dropout, likelihood, vae
from gmkernels.ops.gaussian import gaussian_kl

X, Z, K, B, LEVELS = 6, 3, 2, 5, 4


def make(kind, c=0, **options):
    torch.manual_seed(0)
    made, outputs = {
        "bernoulli": (likelihood.Bernoulli(), (X,)),
        "gaussian": (likelihood.Gaussian(0.5), (X,)),
        "learned": (likelihood.Gaussian(0.5, learned=True), (X,)),
        "heteroscedastic": (likelihood.HeteroscedasticGaussian(), (2 * X,)),
        "categorical": (likelihood.Categorical(LEVELS), (X, LEVELS)),
    }[kind]
    encoder = nn.Sequential(nn.Linear(X + c, 8), nn.Tanh(), nn.Linear(8, 2 * Z))
    decoder = nn.Sequential(nn.Linear(Z + c, math.prod(outputs)), nn.Unflatten(1, outputs))
    return vae.VAE(encoder, decoder, made, Z, **options)


def batch(kind, n=B):
    if kind == "categorical":
        return torch.randint(0, LEVELS, (n, X), generator=torch.Generator().manual_seed(1))
    return gmkernels.uniform((n, X), seed=1)


def plain_nll(kind, model, x, output):
    """-log p(x|z) by torch.distributions."""
    D = torch.distributions
    if kind == "categorical":
        found = D.Categorical(logits=output).log_prob(x)
    elif kind == "bernoulli":
        found = -F.binary_cross_entropy_with_logits(output, x, reduction="none")
    elif kind == "heteroscedastic":
        mean, logvar = output.chunk(2, 1)
        found = D.Normal(mean, (logvar / 2).exp()).log_prob(x)
    else:
        found = D.Normal(output, (model.likelihood.logvar / 2).exp()).log_prob(x)
    return -found.sum(1)


KINDS = ["bernoulli", "gaussian", "learned", "heteroscedastic", "categorical"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learned_prior", [False, True])
def test_loss_and_gradients_are_the_formula(kind, learned_prior):
    model = make(kind, beta=0.7, learned_prior=learned_prior).double()
    x = batch(kind)
    x = x if kind == "categorical" else x.double()
    mean, logvar = model.encoder(model.likelihood.features(x).double()).chunk(2, 1)
    prior = torch.distributions.Normal(torch.zeros(Z).double(), torch.ones(Z).double())
    if learned_prior:
        with torch.no_grad():
            model.prior["prior_mean"] += 0.3
            model.prior["prior_logvar"] -= 0.2
        p = model.prior
        prior = torch.distributions.Normal(p["prior_mean"], (p["prior_logvar"] / 2).exp())
    eps = gmkernels.normal((B, Z), seed=3, dtype=torch.float64)
    z = mean + (logvar / 2).exp() * eps
    q = torch.distributions.Normal(mean, (logvar / 2).exp())
    kl = torch.distributions.kl_divergence(q, prior).sum(1)
    recon = plain_nll(kind, model, x, model.decoder(z))
    expected = (recon + 0.7 * kl).mean()
    loss = model.loss(x, seed=3)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.elbo(x, seed=3), -recon - kl)
    torch.testing.assert_close(model.kl_per_dim(x).sum(), kl.mean())
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters)
    for got, want in zip(grads, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_backends_agree(kind):
    model, x = make(kind), batch(kind)
    ours = model.loss(x, seed=0)
    with gmkernels.use_backend("reference"):
        torch.testing.assert_close(ours, model.loss(x, seed=0))


@pytest.mark.parametrize("kind", ["bernoulli", "gaussian", "categorical"])
def test_likelihood_samples_have_its_mean(kind):
    made = make(kind).likelihood
    shape = (1, X, LEVELS) if kind == "categorical" else (1, X)
    output = gmkernels.normal(shape, seed=2)
    x = made.sample(output.expand(4000, *shape[1:]), noise.key(0)).double()
    error = (x.mean(0) - made.mean(output)[0]).abs()
    assert (error < 5 * x.std(0) / math.sqrt(4000) + 1e-6).all()
    assert x.std(0).min() > 0


def test_likelihoods_normalise():
    logits = gmkernels.normal((1, 1, LEVELS), seed=0)
    every = torch.arange(LEVELS)[:, None]
    p = (-likelihood.Categorical(LEVELS).nll(every, logits.expand(LEVELS, 1, LEVELS))).exp()
    torch.testing.assert_close(p.sum(), torch.tensor(1.0))
    grid = torch.linspace(-8, 8, 4001)[:, None]
    p = (-likelihood.Gaussian(0.7).nll(grid, torch.full_like(grid, 0.3))).exp()
    torch.testing.assert_close(torch.trapezoid(p, grid[:, 0]), torch.tensor(1.0))


class Affine(nn.Module):
    """The exact posterior of x = W z + b + s eps, W with orthogonal columns; `off` spoils it."""

    def __init__(self, w, b, s, off=0.0):
        super().__init__()
        precision = 1 + w.square().sum(0) / s**2
        self.a, self.b, self.logvar, self.off = w / s**2 / precision, b, -precision.log(), off

    def forward(self, x):
        mean = (x - self.b) @ self.a + self.off
        return torch.cat([mean, self.logvar.expand_as(mean) + self.off], 1)


def exact_model(off, prior_mean=0.0, prior_logvar=0.0):
    learned = prior_mean != 0 or prior_logvar != 0
    s, scale, b = 0.5, torch.tensor([1.5, 1.0, 0.5]), torch.linspace(-1, 1, X)
    w = torch.linalg.qr(gmkernels.normal((X, Z), seed=0))[0] * scale
    model = vae.VAE(
        Affine(w, b, s, off),
        lambda z: z @ w.T + b,
        likelihood.Gaussian(s),
        Z,
        learned_prior=learned,
    )
    if learned:
        nn.init.constant_(model.prior["prior_mean"], prior_mean)
        nn.init.constant_(model.prior["prior_logvar"], prior_logvar)
    covariance = math.exp(prior_logvar) * w @ w.T + s**2 * torch.eye(X)
    return model, torch.distributions.MultivariateNormal(b + prior_mean * w.sum(1), covariance)


@pytest.mark.parametrize("k", [1, 7])
def test_bound_is_tight_at_the_exact_posterior(k):
    """Every weight p(x, z) / q(z|x) is then p(x), whatever z is drawn."""
    model, p = exact_model(0.0)
    x = p.sample((20,))
    torch.testing.assert_close(model.log_prob(x, k=k, seed=1), p.log_prob(x), atol=2e-5, rtol=0)


def test_bound_rises_with_k_to_the_exact_value():
    model, p = exact_model(0.4)
    torch.manual_seed(0)
    x = p.sample((4000,))
    bounds = [model.elbo(x, seed=5)] + [model.log_prob(x, k=k, seed=2) for k in (1, 2, 4, 16, 64)]
    means = [b.mean() for b in bounds]
    noise_of_mean = bounds[0].std() / math.sqrt(len(x))
    assert abs(means[0] - means[1]) < 5 * noise_of_mean, "L_1 is the ELBO"
    for low, high in itertools.pairwise(means[1:]):
        assert low < high
    exact = p.log_prob(x).mean()
    assert means[0] < means[-1] < exact + 0.01
    assert exact - means[-1] < 0.05


@pytest.mark.parametrize("prior", [(0.0, 0.0), (0.7, -1.0)])
def test_samples_have_the_moments_of_p(prior):
    model, p = exact_model(0.0, *prior)
    n = 20000
    x = model.sample(n, seed=0).detach()
    variance = p.covariance_matrix.diagonal()
    assert ((x.mean(0) - p.mean).abs() < 5 * (variance / n).sqrt()).all()
    spread = torch.outer(variance, variance).sqrt()
    assert ((x.T.cov() - p.covariance_matrix).abs() < 5 * spread * math.sqrt(2 / n)).all()


def test_kl_is_not_negative_and_zero_at_the_prior():
    model = make("bernoulli", learned_prior=True)
    _, kl = model.terms(batch("bernoulli", 50), seed=0)
    assert (kl >= 0).all()
    assert (model.kl_per_dim(batch("bernoulli")) >= 0).all()
    prior = [model.prior[name].expand(3, Z) for name in ("prior_mean", "prior_logvar")]
    torch.testing.assert_close(gaussian_kl(*prior, **model.prior), torch.zeros(3))


def test_free_bits_are_a_floor():
    floor = 0.25
    x = batch("bernoulli")
    model = make("bernoulli", beta=2.0, free_bits=floor)
    nn.init.zeros_(model.encoder[2].weight)
    nn.init.zeros_(model.encoder[2].bias)
    recon, kl = model.terms(x, seed=0)
    assert kl.max() == 0
    torch.testing.assert_close(model.loss(x, seed=0), recon.mean() + 2.0 * floor * Z)

    with torch.no_grad():
        model.encoder[2].bias[:Z] = torch.tensor([0.1, 1.0, 3.0])  # KL 0.005, 0.5, 4.5
    recon, _ = model.terms(x, seed=0)
    expected = recon.mean() + 2.0 * (floor + 0.5 + 4.5)
    torch.testing.assert_close(model.loss(x, seed=0), expected)
    (model.loss(x, seed=0) - model.terms(x, seed=0)[0].mean()).backward()
    grad = model.encoder[2].bias.grad[:Z]
    torch.testing.assert_close(grad, torch.tensor([0.0, 2.0, 6.0]))


def test_condition_is_concatenated():
    model, x = make("categorical", c=K), batch("categorical")
    c = F.one_hot(torch.arange(B) % K, K).float()
    assert model.loss(x, c, seed=0).shape == ()
    assert model.log_prob(x, c, k=2, seed=0).shape == (B,)
    assert model.reconstruct(x, c).shape == (B, X)
    assert model.sample(7, c[:1], seed=0).shape == (7, X)
    assert not torch.equal(model.elbo(x, c, seed=0), model.elbo(x, 1 - c, seed=0))
    features = torch.cat([model.likelihood.features(x), c], 1)
    torch.testing.assert_close(torch.cat(model.encode(x, c), 1), model.encoder(features))


def test_condition_becomes_planes_for_pictures():
    encoder, decoder = nn.Conv2d(1 + K, 2 * Z, 3, 2, 1), nn.ConvTranspose2d(Z + K, 1, 4, 2, 1)
    model = vae.VAE(encoder, decoder, likelihood.Bernoulli(), (Z, 4, 4))
    x, c = gmkernels.uniform((B, 1, 8, 8), seed=0), torch.eye(K)[torch.arange(B) % K]
    assert model.encode(x, c)[0].shape == (B, Z, 4, 4)
    assert model.elbo(x, c, seed=0).shape == (B,)
    assert model.log_prob(x, c, k=2, seed=0).shape == (B,)
    assert model.kl_per_dim(x, c).shape == (Z, 4, 4)
    assert model.sample(3, c[:1], seed=0).shape == (3, 1, 8, 8)
    seen = encoder(torch.cat([x, c[:, :, None, None].expand(B, K, 8, 8)], 1))
    torch.testing.assert_close(torch.cat(model.encode(x, c), 1), seen)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_functions_of_seed_and_row(kind):
    model = make(kind, learned_prior=True)
    x = model.sample(8, seed=1)
    assert torch.equal(x, model.sample(8, seed=1))
    assert not torch.equal(x, model.sample(8, seed=2))
    torch.testing.assert_close(x[3:], model.sample(5, seed=noise.key(1, 3)))
    torch.manual_seed(0)
    first = model.sample(8)
    assert not torch.equal(first, model.sample(8))
    torch.manual_seed(0)
    assert torch.equal(first, model.sample(8))


def test_batches_may_be_split():
    model, x = make("categorical"), batch("categorical")
    for verb in (model.elbo, model.log_prob):
        rest = verb(x[2:], seed=noise.key(4, 2))
        torch.testing.assert_close(verb(x, seed=4)[2:], rest)


def test_active_units():
    model, x = make("gaussian"), batch("gaussian", 50)
    with torch.no_grad():
        model.encoder[2].weight[1] = 0  # the second latent's mean ignores x
        model.encoder[2].weight[[0, 2]] *= 10
    assert model.active_units(x).tolist() == [True, False, True]


def test_compiles_whole():
    model, x = make("categorical", free_bits=0.1), batch("categorical")
    for verb in (model.loss, model.elbo):
        compiled = torch.compile(verb, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, seed=noise.key(3)), verb(x, seed=3))


def test_refusals():
    with pytest.raises(ValueError, match="beta and free_bits must be >= 0, got -1 and 0"):
        make("bernoulli", beta=-1)
    with pytest.raises(ValueError, match="k must be >= 1, got 0"):
        make("bernoulli").log_prob(batch("bernoulli"), k=0)
    with pytest.raises(ValueError, match="std must be > 0, got 0"):
        likelihood.Gaussian(0.0)
    with pytest.raises(ValueError, match="levels must be >= 2, got 1"):
        likelihood.Categorical(1)
    with pytest.raises(
        ValueError, match=r"likelihood must be one of categorical, .* got 'poisson'"
    ):
        vae.image_vae(64, 17, likelihood="poisson")
    with pytest.raises(ValueError, match="hidden must be >= 1, got 0"):
        vae.image_vae(64, 17, hidden=0)


def test_low_rank_logits():
    head = vae.LowRankLogits(5, X, LEVELS, 2)
    nn.init.normal_(head.bias)
    h = gmkernels.normal((B, 5), seed=0)
    w = head.weight(h).view(B, X, 2)
    expected = torch.einsum("bdr,rl->bdl", w, head.embedding) + head.bias
    torch.testing.assert_close(head(h), expected)


def test_dropout():
    layer, x = dropout.Dropout(0.3), torch.full((200, 64), 2.0, requires_grad=True)
    torch.manual_seed(4)
    y = layer(x)
    torch.manual_seed(4)
    u = gmkernels.uniform(x.shape)
    torch.testing.assert_close(y, torch.where(u > 0.3, x / 0.7, 0.0))
    assert 0.28 < float((y == 0).float().mean()) < 0.32
    assert not torch.equal(layer(x), y)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, y.detach() / 2)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert not dropout.Dropout(1.0)(x).any()
    assert layer.eval()(x) is x
    assert dropout.Dropout(0.0)(x) is x


def test_dropout_has_the_same_bits_compiled():
    layer, x = dropout.Dropout(0.3), torch.ones(20, 64)
    torch.manual_seed(4)
    y = layer(x)
    compiled = torch.compile(layer, fullgraph=True)
    for same in (True, False):
        if same:
            torch.manual_seed(4)
        assert torch.equal(compiled(x), y) == same
