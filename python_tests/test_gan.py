"""GANs: published losses, the optimum by quadrature, penalties, Algorithm 1 by hand."""

import copy
import math

import pytest
import torch
from torch import nn

import gmkernels
from gmkernels import noise, toys
from gmkernels.models import gan, gan_nets, image_gan
from gmkernels.models.gan_losses import LOSSES, R1, GradientPenalty, spectral_norm

Z, B = 3, 6


def draw(*shape, seed=0, dtype=torch.float64):
    return gmkernels.normal(shape, seed=seed, dtype=dtype)


def make(classes=0, **options):
    torch.manual_seed(0)
    nets = (
        gan_nets.PointGenerator(Z, 2, 8, 2, classes=classes),
        gan_nets.PointCritic(2, 8, 2, classes=classes),
    )
    return gan.GAN(*nets, latent=Z, shape=(2,), classes=classes, **options).double()


@pytest.mark.parametrize(
    ("loss", "discriminator", "generator"),
    [
        ("minimax", 3.1251488, None),
        ("non_saturating", 3.1251488, 0.9509911),
        ("wasserstein", -2.625, -2.1),
        ("least_squares", 19.76125, 7.3425007),
    ],
)
def test_published_values(loss, discriminator, generator):
    """Those of torchgan's tests."""
    dx, dgz = torch.tensor([1.3, 2.9, 8.4, 6.3]), torch.tensor([4.8, 1.2, -3.5, 5.9])
    rule = LOSSES[loss]
    assert abs(float(rule.real(dx).mean() + rule.fake(dgz).mean()) - discriminator) < 1e-6
    if generator is not None:
        assert abs(float(rule.generator(dgz).mean()) - generator) < 1e-6


def test_formulas():
    s = torch.linspace(-5, 5, 41, dtype=torch.float64)
    d = 1 / (1 + (-s).exp())
    for name in ("minimax", "non_saturating"):
        torch.testing.assert_close(LOSSES[name].real(s), -d.log())
        torch.testing.assert_close(LOSSES[name].fake(s), -(1 - d).log())
    torch.testing.assert_close(LOSSES["minimax"].generator(s), (1 - d).log())
    torch.testing.assert_close(LOSSES["non_saturating"].generator(s), -d.log())
    torch.testing.assert_close(LOSSES["hinge"].real(s), -(s - 1).clamp(max=0))
    torch.testing.assert_close(LOSSES["hinge"].fake(s), -(-s - 1).clamp(max=0))
    torch.testing.assert_close(LOSSES["hinge"].generator(s), -s)


@pytest.mark.parametrize("name", LOSSES)
def test_far_scores_have_finite_terms_and_gradients(name):
    s = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4], requires_grad=True)
    for term in (LOSSES[name].real, LOSSES[name].fake, LOSSES[name].generator):
        value = term(s)
        (gradient,) = torch.autograd.grad(value.sum(), s)
        assert value.isfinite().all()
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


def log_normal(x, mean, std):
    return -((x - mean) / std).square() / 2 - math.log(std * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("other", [(0.5, 1.0), (-1.0, 0.4), (0.0, 1.0), (300.0, 1.0)])
def test_optimal_discriminator(other):
    """V(D*, G) = -log 4 + 2 JS(p, q) with D* = p / (p + q), and no other D has more."""
    centres = (0.0, other[0])
    x = torch.cat([torch.arange(-12, 12, 1e-3, dtype=torch.float64) + c for c in set(centres)])
    x = x.unique()
    dx = torch.diff(x, append=x[-1:])
    dx[dx > 0.01] = 0
    log_p, log_q = log_normal(x, 0.0, 1.0), log_normal(x, *other)
    p, q, log_m = log_p.exp(), log_q.exp(), torch.logaddexp(log_p, log_q) - math.log(2)
    js = ((p * (log_p - log_m) + q * (log_q - log_m)) * dx).sum() / 2
    rule = LOSSES["minimax"]

    def value(score):
        return -((p * rule.real(score) + q * rule.fake(score)) * dx).sum()

    best = log_p - log_q  # the logit of p / (p + q)
    torch.testing.assert_close(best.sigmoid(), p / (p + q), equal_nan=True)
    assert abs(float(value(best)) - (-math.log(4) + 2 * float(js))) < 1e-9
    for wrong in (best + 0.3, 0.9 * best - 0.1, best + 0.3 * x.sin()):
        assert value(wrong) < value(best) - 1e-4 or abs(other[0]) > 100
    if other == (0.0, 1.0):
        assert abs(float(value(best)) + math.log(4)) < 1e-9
    if other[0] > 100:
        assert abs(float(js) - math.log(2)) < 1e-9


class Threshold(nn.Module):
    """A critic that is sure."""

    def forward(self, x):
        return 1e3 * (x[:, 0] - 50)


def test_balance_at_equilibrium_and_of_a_perfect_discriminator():
    model = make()
    nn.init.zeros_(model.discriminator.score.weight)
    nn.init.zeros_(model.discriminator.score.bias)
    found = model.balance(draw(B, 2), seed=0)
    for got, want in zip(found, (0.5, 0.5, -math.log(4)), strict=True):
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))
    found = gan.GAN(model.generator, Threshold(), latent=Z, shape=(2,)).double()
    found = found.balance(draw(B, 2) + 100, seed=0)
    torch.testing.assert_close(torch.stack(found), torch.tensor([1.0, 0, 0]).double())
    critic = make(loss="wasserstein")
    found = critic.balance(draw(B, 2), seed=0)
    torch.testing.assert_close(found.value, found.real - found.fake)


def test_penalties_by_hand():
    """On |x|^2 / 2, whose gradient at x is x."""
    x, fake = draw(B, 4, seed=1), draw(B, 4, seed=2)

    def critic(x):
        return x.square().flatten(1).sum(1) / 2

    u = noise.uniform((B, 1), seed=5, dtype=torch.float64)
    norm = (u * x + (1 - u) * fake).square().sum(1).sqrt()
    got = GradientPenalty(7.0)(critic, x, fake, seed=5)
    torch.testing.assert_close(got, 7 * (norm - 1).square())
    torch.testing.assert_close(R1(3.0)(critic, x, fake), 1.5 * x.square().sum(1))
    pictures = [t.view(B, 1, 2, 2) for t in (x, fake)]
    torch.testing.assert_close(GradientPenalty(7.0)(critic, *pictures, seed=5), got)
    for penalty in (GradientPenalty(7.0), R1(3.0)):
        whole = penalty(critic, x, fake, seed=5)
        one = [
            penalty(critic, x[i : i + 1], fake[i : i + 1], seed=noise.key(5, offset=i))
            for i in range(B)
        ]
        torch.testing.assert_close(whole, torch.cat(one), rtol=0, atol=0)


class Attention(nn.Module):
    """h [B, 8] as four tokens of two: attention among them."""

    def __init__(self, attention):
        super().__init__()
        self.attention, self.qkv = attention, nn.Linear(2, 6)

    def forward(self, h):
        q, k, v = self.qkv(h.view(-1, 4, 2))[:, None].chunk(3, -1)
        return self.attention(q, k, v).flatten(1)


class Parameters(nn.Module):
    """An op of h [B, 8] and of tensors that are learned."""

    def __init__(self, op, *shapes):
        super().__init__()
        self.op = op
        self.tensors = nn.ParameterList(0.5 * torch.randn(shape) for shape in shapes)

    def forward(self, h):
        return self.op(h, *self.tensors)


SPLIT = gmkernels.Split.halves(8)
OPS = {
    "full_attention": lambda: Attention(gmkernels.full_attention),
    "causal_attention": lambda: Attention(gmkernels.causal_attention),
    "actnorm": lambda: Parameters(lambda h, a, b: gmkernels.actnorm(h, a, b)[0], (8,), (8,)),
    "leaky": lambda: Parameters(lambda h: gmkernels.leaky(h, slope=0.2)[0]),
    "affine_coupling": lambda: Parameters(
        lambda h, w: gmkernels.affine_coupling(h, SPLIT.parts(h)[0] @ w, split=SPLIT)[0], (4, 8)
    ),
    "spline_transform": lambda: Parameters(
        lambda h, w: gmkernels.spline_transform(h, (h @ w).unflatten(1, (8, -1)))[0], (8, 8 * 23)
    ),
    "gaussian_nll": lambda: Parameters(
        lambda h, w: gmkernels.gaussian_nll(h, h @ w)[:, None].expand(-1, 8), (8, 8)
    ),
    "bernoulli_nll": lambda: Parameters(
        lambda h, w: gmkernels.bernoulli_nll((h @ w).sigmoid(), h)[:, None].expand(-1, 8), (8, 8)
    ),
}


@pytest.mark.parametrize("penalty", [GradientPenalty(10.0), R1(1.0)], ids=["gp", "r1"])
@pytest.mark.parametrize("name", OPS)
def test_penalty_gradients_pass_our_ops(name, penalty, backends):
    """The penalty's own gradient, a second derivative, on each backend against float64."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(4, 8), OPS[name](), nn.SiLU(), nn.Linear(8, 1), nn.Flatten(0))
    with torch.no_grad():
        for p in critic.parameters():
            p *= 1.5
    x, fake = draw(B, 4, seed=1), draw(B, 4, seed=2)

    def gradients(net, dtype):
        value = penalty(net, x.to(dtype), fake.to(dtype), seed=3).mean()
        return torch.autograd.grad(value, net.parameters(), allow_unused=True)

    with gmkernels.use_backend("reference"):
        truth = gradients(copy.deepcopy(critic).double(), torch.float64)
    found = [g for g in truth if g is not None]
    assert len(found) >= len(truth) - 2, "only biases after the op may do without"
    assert max(float(g.abs().max()) for g in found) > 1e-3
    # Second derivatives of splines are large in narrow bins: plain PyTorch in float32 errs by 2e-4.
    bound = 5e-4 if name == "spline_transform" else 2e-5
    for backend in backends:
        with gmkernels.use_backend(backend):
            ours = gradients(critic, torch.float32)
        for got, want in zip(ours, truth, strict=True):
            assert (got is None) == (want is None)
            if got is not None:
                error = (got.double() - want).abs().max() / want.abs().max()
                assert error < bound


def by_hand(model, players, x, label, seed):
    """Algorithm 1 as it is written, with an optimizer for each player."""
    first, second = players
    k, key, conditions = model.critic_steps, noise.key(seed), [{}] * 9
    rows = x.chunk(k)
    if label is not None:
        conditions = [{"label": part} for part in label.chunk(k)]
    for i in range(k):
        own, c = noise.fold_in(key, i), conditions[i]
        z = gmkernels.normal((len(rows[i]), Z), seed=noise.fold_in(own, 0), dtype=x.dtype)
        fake = model.generator(z, **c).detach()
        d = model.discriminator
        loss = -(d(rows[i], **c).sigmoid().log() + (1 - d(fake, **c).sigmoid()).log()).mean()
        at = rows[i].clone().requires_grad_()
        (slope,) = torch.autograd.grad(d(at, **c).sum(), at, create_graph=True)
        loss = loss + 0.3 / 2 * slope.square().sum(1).mean()
        first.zero_grad()
        loss.backward()
        first.step()
    z = gmkernels.normal((len(rows[0]), Z), seed=noise.fold_in(key, k), dtype=x.dtype)
    loss = -model.discriminator(model.generator(z, **conditions[0]), **conditions[0])
    loss = -(-loss).sigmoid().log().mean()
    second.zero_grad()
    loss.backward()
    second.step()


@pytest.mark.parametrize("classes", [0, 4])
@pytest.mark.parametrize("k", [1, 2])
def test_update_is_algorithm_1(k, classes):
    """k steps of D alone, then one of G alone, as by two optimizers and formulas of D."""
    model = make(classes, penalty=R1(0.3), critic_steps=k)
    other = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    players = [
        torch.optim.Adam(p.parameters(), lr=0.01) for p in (other.discriminator, other.generator)
    ]
    label = torch.arange(2 * B) % classes if classes else None
    for step in range(3):
        x = draw(2 * B, 2, seed=step)
        gan.update(model, optimizer, x, label, seed=step)
        by_hand(other, players, x, label, step)
    for got, want in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got, want)
    assert not torch.equal(next(model.parameters()), next(make(classes).parameters()))


def test_what_update_returns_is_the_mean_of_d_loss():
    model = make(loss="hinge")
    x, frozen = draw(B, 2), torch.optim.SGD(model.parameters(), lr=0.0)
    expected = model.d_loss(x, seed=noise.fold_in(noise.key(4), 0))
    torch.testing.assert_close(gan.update(model, frozen, x, seed=4), expected)
    assert not expected.isnan()
    with pytest.raises(ValueError, match="a row or more for each of 9 steps, got 6"):
        gan.update(make(critic_steps=9), frozen, x)


def test_samples_do_not_depend_on_the_split():
    model = make()
    whole = model.generate(B, seed=7)
    parts = [model.generate(2, seed=noise.key(7, offset=i)) for i in range(0, B, 2)]
    torch.testing.assert_close(whole, torch.cat(parts))
    torch.testing.assert_close(model.sample(B, seed=7), whole)
    assert not torch.equal(whole[0], whole[1])


def test_sample_draws_from_the_average():
    """Of weights by its formula, of batch norm's buffers the newest."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(Z, 2), nn.BatchNorm1d(2))
    model = gan.GAN(net, nn.Linear(2, 1), latent=Z, shape=(2,), average=0.75)
    assert not any(p.requires_grad for p in model.averaged.parameters())
    weights = [net[0].weight.detach().clone()]
    for _ in range(2):
        with torch.no_grad():
            net[0].weight += 1
            net[1].running_mean += 3
        weights.append(net[0].weight.detach().clone())
        model.end_step()
    want = 0.75 * (0.75 * weights[0] + 0.25 * weights[1]) + 0.25 * weights[2]
    torch.testing.assert_close(model.averaged[0].weight, want)
    torch.testing.assert_close(model.averaged[1].running_mean, net[1].running_mean)
    model.eval()
    z = gmkernels.normal((B, Z), seed=1)
    torch.testing.assert_close(model.sample(B, seed=1), model.averaged(z))
    assert not torch.equal(model.sample(B, seed=1), net(z))


def test_clipped_weights_stay_in_the_box():
    model = make(loss="wasserstein", clip=0.05)
    before = [p.detach().clone() for p in model.generator.parameters()]
    gan.update(model, torch.optim.SGD(model.parameters(), lr=0.0), draw(B, 2), seed=0)
    assert all(p.abs().max() <= 0.05 for p in model.discriminator.parameters())
    assert any(p.abs().max() == 0.05 for p in model.discriminator.parameters())
    assert all(map(torch.equal, before, model.generator.parameters()))


def test_spectral_norm_bounds_every_layer():
    torch.manual_seed(0)
    critic = gan_nets.DCGANCritic((1, 8, 8), 4, classes=3)
    x, label = torch.rand(B, 1, 8, 8), torch.arange(B) % 3
    with torch.no_grad():
        for p in critic.parameters():
            p *= 5
    plain = copy.deepcopy(critic)
    spectral_norm(critic)
    for _ in range(100):
        critic(x, label)
    layers = [m for m in critic.modules() if hasattr(m, "parametrizations")]
    assert len(layers) == 4
    for layer in layers:
        largest = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
        torch.testing.assert_close(largest, torch.tensor(1.0), rtol=1e-3, atol=0)
    assert critic(x, label).abs().max() < plain(x, label).abs().max() / 10


def test_conditional():
    model = make(classes=3)
    label = torch.arange(B) % 3
    x = model.sample(B, label, seed=0)
    torch.testing.assert_close(x, model.generate(B, label, seed=0))
    assert not torch.equal(x, model.sample(B, 1, seed=0))
    torch.testing.assert_close(x[1], model.sample(B, 1, seed=0)[1])
    critic = model.discriminator
    h = critic.net(x)
    projection = critic(x, label) - critic.score(h)[:, 0]
    torch.testing.assert_close(projection, (critic.label.weight[label] * h).sum(1))
    seen = []
    model.generator.register_forward_hook(
        lambda net, args, kwargs, out: seen.append(kwargs["label"]), with_kwargs=True
    )
    model.sample(3000, seed=0)
    assert (torch.bincount(seen[0], minlength=3) > 900).all(), "classes are drawn evenly"


def test_refusals():
    model = make()
    with pytest.raises(NotImplementedError, match="no log_prob"):
        model.log_prob(draw(B, 2))
    assert model.log_prob_kind == "none"
    with pytest.raises(ValueError, match="classes=0"):
        model.score(draw(B, 2), torch.zeros(B).long())
    with pytest.raises(ValueError, match="classes=3 and no label"):
        make(classes=3).g_loss(B)
    with pytest.raises(ValueError, match="loss must be one of minimax.*'l2'"):
        make(loss="l2")
    for wrong in ({"clip": -1.0}, {"critic_steps": 0}, {"average": 1.0}):
        with pytest.raises(ValueError, match="clip must be >= 0, critic_steps >= 1"):
            make(**wrong)
    for penalty in (R1, GradientPenalty):
        with pytest.raises(ValueError, match=f"{penalty.__name__}: weight must be >= 0, got -1"):
            penalty(-1.0)
    critic = gan_nets.DCGANCritic((1, 8, 8), 4, norm=nn.BatchNorm2d)
    with pytest.raises(ValueError, match=r"the batch norm 'net\.3' .* mixes the rows"):
        gan.GAN(nn.Identity(), critic, latent=Z, shape=(1, 8, 8), penalty=R1())
    for build in (image_gan.gan, image_gan.wgan, image_gan.wgan_gp):
        with pytest.raises(ValueError, match=f"{build.__name__}: pictures must be square"):
            build(60, 17)
        with pytest.raises(ValueError, match="latent_dim must be >= 1 and width >= 4"):
            build(64, 17, width=3)
    with pytest.raises(ValueError, match="clip must be > 0"):
        image_gan.wgan(2, 0, clip=0.0)


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (7, 5), (1, 1), (2, 3)])
def test_dcgan_sizes(size):
    torch.manual_seed(0)
    shape = (2, *size)
    x = gan_nets.DCGANGenerator(Z, shape, 4, classes=3)(torch.randn(B, Z), torch.arange(B) % 3)
    assert x.shape == (B, *shape)
    assert x.min() > 0
    assert x.max() < 1
    score = gan_nets.DCGANCritic(shape, 4, classes=3)(x, torch.arange(B) % 3)
    assert score.shape == (B,)
    score.sum().backward()


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_moves_samples_to_the_data(loss):
    """60 steps on a blob at (2, 0): the mean of what is drawn comes near."""
    torch.manual_seed(0)
    nets = gan_nets.PointGenerator(2, 2, 16, 1), gan_nets.PointCritic(2, 16, 1)
    model = gan.GAN(*nets, latent=2, shape=(2,), loss=loss, penalty=R1(10.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, betas=(0.5, 0.9))
    centre = torch.tensor([[2.0, 0.0]])
    start = (model.sample(500, seed=9).mean(0) - centre).norm()
    for step in range(60):
        x = toys.mixture(64, centre, 0.5, seed=step)
        gan.update(model, optimizer, x, seed=noise.fold_in(noise.key(1), step))
    assert (model.sample(500, seed=9).mean(0) - centre).norm() < start / 3
