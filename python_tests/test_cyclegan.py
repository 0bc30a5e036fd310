"""CycleGAN: its losses by hand, the pool, what a step moves, that it learns."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gmkernels import data, noise
from gmkernels.models import cyclegan, image_cyclegan

SHAPE, B = (1, 8, 8), 5


def make(domain="inverted", **options):
    torch.manual_seed(0)
    return image_cyclegan.cyclegan(64, 17, domain=domain, width=8, **options)


def pictures(seed=0, n=B):
    return torch.rand(n, 64, generator=torch.Generator().manual_seed(seed))


def test_losses_by_hand():
    model = make(cycle=3.0, identity=2.0)
    x, y = (pictures(seed).view(-1, *SHAPE) for seed in (0, 1))
    g, f = model.generators["there"], model.generators["back"]
    d_x, d_y = model.critics["x"], model.critics["y"]
    want = F.mse_loss(d_y(g(x)), torch.ones(B)) / 2 + F.mse_loss(d_x(f(y)), torch.ones(B)) / 2
    want = want + 3 * (F.l1_loss(f(g(x)), x) + F.l1_loss(g(f(y)), y))
    want = want + 2 * (F.l1_loss(g(y), y) + F.l1_loss(f(x), x))
    loss, fake_x, fake_y = model.g_loss(x.flatten(1), y)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close((fake_x, fake_y), (f(y).detach(), g(x).detach()))
    assert not fake_x.requires_grad
    want = (d_x(x) - 1).square().mean() + d_x(fake_x).square().mean()
    want = (want + (d_y(y) - 1).square().mean() + d_y(fake_y).square().mean()) / 2
    torch.testing.assert_close(model.d_loss(x.flatten(1), y, fake_x, fake_y), want)


def test_exact_translators_have_no_cycle_loss():
    class Negative(nn.Module):
        def forward(self, x):
            return 1 - x

    nets = [*(Negative() for _ in range(2)), *make().critics.values()]
    x, y = pictures(0), 1 - pictures(1)
    losses = [
        cyclegan.CycleGAN(*nets, SHAPE, cycle=c, identity=0.0).g_loss(x, y)[0] for c in (0.0, 9.0)
    ]
    torch.testing.assert_close(losses[0], losses[1])


def test_update_moves_each_player_down_its_own_loss():
    """By hand: the generators' step first, then the critics' on what the pool gives."""
    model = make(pool=0)
    other, x, y = copy.deepcopy(model), pictures(0), pictures(1)
    loss = cyclegan.update(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y, seed=0)
    for part, value in (("generators", None), ("critics", None)):
        if part == "generators":
            value, *fakes = other.g_loss(x, y)
            torch.testing.assert_close(loss, value.detach())
        else:
            value = other.d_loss(x, y, *fakes)
        players = list(getattr(other, part).parameters())
        slopes = torch.autograd.grad(value, players)
        with torch.no_grad():
            for p, slope in zip(players, slopes, strict=True):
                p -= 0.1 * slope
    for got, want in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got, want)


def test_pool_keeps_what_it_gives_back_later():
    """Nothing is lost or made: what went in is given back or still there; about half are older."""
    pool = cyclegan.ImagePool(8, (1,))
    went_in, came_out, old = [], [], 0
    for step in range(60):
        x = torch.arange(5.0)[:, None] + 10 * step
        y = pool.swap(x, seed=noise.fold_in(noise.key(0), step))
        assert y.shape == x.shape
        went_in += x[:, 0].tolist()
        came_out += y[:, 0].tolist()
        old += int((y < 10 * step).sum())
        if step == 0:
            assert torch.equal(y, x)
            assert int(pool.count) == 5
    stored = pool.pictures[:, 0].tolist()
    # The first eight are stored and given back, so they leave twice.
    assert sorted(came_out + stored) == sorted([*went_in, *range(5), 10, 11, 12])
    assert 0.3 < old / len(came_out) < 0.6
    assert len(set(stored)) == 8


def test_pool_is_a_function_of_seed_and_state():
    first, second = (cyclegan.ImagePool(6, SHAPE) for _ in range(2))
    x = [pictures(seed, n=4).view(-1, *SHAPE) for seed in range(6)]
    for part in x[:3]:
        first.swap(part, seed=1)
    second.load_state_dict(first.state_dict())
    for part in x[3:]:
        assert torch.equal(first.swap(part, seed=2), second.swap(part, seed=2))
    kept = x[0].clone()
    first.swap(x[0], seed=3)
    assert torch.equal(x[0], kept), "the input was changed"
    empty = cyclegan.ImagePool(0, SHAPE)
    assert torch.equal(empty.swap(x[0], seed=0), x[0])


def test_domains():
    x = torch.zeros(1, 1, 3, 3)
    x[0, 0, 0, 2], x[0, 0, 1, 1] = 0.5, 1.0
    made = {name: move(x)[0, 0].tolist() for name, move in image_cyclegan.DOMAINS.items()}
    assert made == {
        "inverted": [[1, 1, 0.5], [1, 0, 1], [1, 1, 1]],
        "rotated": [[0.5, 0, 0], [0, 1, 0], [0, 0, 0]],
        "thickened": [[1, 1, 0.5], [1, 1, 0], [0, 0, 0]],
    }


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 1)])
def test_translator_sizes(size):
    x = torch.rand(B, 1, *size)
    assert image_cyclegan.Translator(8)(x).shape == x.shape


def test_rearrangement():
    """Blurred pictures at first; each pixel's place learned, a quarter turn is exact."""
    torch.manual_seed(0)
    net, x = image_cyclegan.Rearrangement(SHAPE), pictures().view(-1, *SHAPE)
    mean = x.mean((1, 2, 3), keepdim=True).expand_as(x)
    assert (net(x) - mean).abs().max() < 0.2 * (x - mean).abs().max()
    torch.testing.assert_close(net(torch.ones_like(x)), torch.ones_like(x))
    turn = image_cyclegan.DOMAINS["rotated"]
    places = turn(torch.arange(64.0).view(1, *SHAPE)).flatten().long()
    with torch.no_grad():
        net.weight += 10 * torch.eye(64)[places]
    torch.testing.assert_close(net(x), turn(x))
    model = make("rotated", moves=True)
    assert all(isinstance(g, image_cyclegan.Rearrangement) for g in model.generators.values())


def test_learns_to_invert_digits():
    """Without a pair: after 100 steps G(x) is nearer to 1 - x than any one picture can be."""
    images = data.digits()
    torch.manual_seed(0)
    model = image_cyclegan.cyclegan(64, 17, domain="inverted", width=16, identity=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.5, 0.999))
    for step in range(100):
        rows = images.unit(images.batch(64, seed=0, step=step)[0])
        cyclegan.update(model, optimizer, rows[:32], model.move(rows[32:]), seed=step)
    test = images.unit(images.test)
    error = float(model.error(test).mean())
    best_constant = float((test - test.median(0).values).abs().mean())
    assert error < best_constant
    assert torch.equal(model.sample(test[:3]), model.translate(test[:3]))


def test_refusals():
    with pytest.raises(NotImplementedError, match="no log_prob"):
        make().log_prob(pictures())
    with pytest.raises(ValueError, match="domain must be one of inverted, rotated, thickened"):
        make("zebra")
    with pytest.raises(ValueError, match="cycle, identity and pool must be >= 0, got 10.0, -1.0"):
        make(identity=-1.0)
    with pytest.raises(ValueError, match="cyclegan: pictures must be square"):
        image_cyclegan.cyclegan(60, 17)
    with pytest.raises(ValueError, match="width must be >= 1"):
        image_cyclegan.cyclegan(64, 17, width=0)
