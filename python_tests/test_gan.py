"""GANs: Algorithm 1 by hand, sampling, classes, networks, that each loss learns."""

import copy
import math

import pytest
import torch
from torch import nn

import gmkernels
from gmkernels import noise, toys
from gmkernels.models import gan, gan_nets, image_gan
from gmkernels.models.gan_losses import LOSSES, R1, GradientPenalty

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
    model = make(loss="hinge", critic_steps=2)
    x, frozen = draw(B, 2), torch.optim.SGD(model.parameters(), lr=0.0)
    key = noise.key(4)
    losses = [
        model.d_loss(rows, seed=noise.fold_in(key, i)).detach() for i, rows in enumerate(x.chunk(2))
    ]
    assert losses[0] != losses[1]
    torch.testing.assert_close(gan.update(model, frozen, x, seed=4), sum(losses) / 2)
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


def test_what_the_commands_build():
    def norms(model):
        return sum(isinstance(m, nn.BatchNorm2d) for m in model.discriminator.modules())

    assert [norms(image_gan.gan(64, 17, weight=w)) for w in (0.0, 0.5)] == [1, 0]
    assert norms(image_gan.gan(64, 17, weight=0.0, spectral=True)) == 0
    assert image_gan.gan(64, 17, weight=0.0).penalty is None
    assert image_gan.gan(64, 17, weight=0.3).penalty == R1(0.3)
    assert image_gan.wgan_gp(64, 17, weight=2.0).penalty == GradientPenalty(2.0)
    assert image_gan.wgan(64, 17, clip=0.3).clip == 0.3
    for build in (image_gan.gan, image_gan.wgan, image_gan.wgan_gp):
        points, pictures = build(2, 0, classes=3).eval(), build(64, 17, classes=3).eval()
        assert points.sample(B, 1, seed=0).shape == (B, 2)
        assert pictures.sample(B, 1, seed=0).shape == (B, 1, 8, 8)


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (7, 3), (1, 1), (2, 5)])
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
