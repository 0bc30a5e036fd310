"""MADE and NADE, recurrent models, Image GPT: densities that sum to 1, order, frequencies."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from gmkernels import data, noise
from gmkernels.models.autoregressive import MADE, NADE
from gmkernels.models.gpt import GPT, Sizes
from gmkernels.models.image_gpt import TokenImages, palette
from gmkernels.models.recurrent import RNN

D = 12
SEVERAL = [list(range(D)), list(range(D))[::-1], [3, 7, 1, 10, 0, 11, 5, 2, 9, 4, 8, 6]]
FEW = [(2, 0, 3, 1), (0, 1, 2, 3)]


@pytest.fixture(autouse=True)
def _one_thread():
    """Sizes here are such that a second thread costs more than it does."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def stirred(model, size=0.4):
    """float64, weights moved at random, in eval mode, without gradients."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += size * torch.randn_like(p)
    return model.double().eval().requires_grad_(False)


def ordered(name, features, levels, order):
    options = {"order": order, "rank": 2, "dropout": 0.3}
    if name == "made":
        return stirred(MADE(features, levels, (30, 20), **options))
    return stirred(NADE(features, levels, 15, **options))


def images(name, pixels, levels, colours, classes=0):
    """A model of tokens as one of pictures; its palette comes from a batch of dark ones."""
    marks = max(1, classes)
    if name == "gpt":
        sizes = Sizes(colours, pixels, 2, 2, 8, marks=marks, tied=False, dropout=0.1)
        model = TokenImages(GPT(sizes), pixels, levels, colours, classes=classes)
    else:
        cells = RNN(colours, width=6, layers=2, cell=name, marks=marks, dropout=0.1)
        model = TokenImages(cells, pixels, levels, colours, classes=classes)
    dark = torch.arange(50 * pixels).view(50, pixels) % 7 // 6  # levels 0 and 1
    model.train().loss(dark, torch.zeros(50).long() if classes else None)
    return stirred(model)


def states(levels, count):
    return torch.cartesian_prod(*[torch.arange(levels)] * count)


@torch.no_grad()
def check_frequencies(model, every, n=8000, **options):
    """Chi-square of drawn states against exp(log_prob): within 5 deviations of what chance gives.

    Also against the density of states in reverse, which must be far off.
    """
    p = model.log_prob(every).exp()
    assert abs(float(p.sum()) - 1) < 1e-6
    levels, size = int(every.max()) + 1, every.shape[1]
    place = levels ** torch.arange(size - 1, -1, -1)
    drawn = torch.bincount(model.sample(n, seed=5) @ place, minlength=len(every))

    def statistic(p):
        expected = (n * p).clamp(min=1)
        rare = n * p < 5  # are one cell together
        kept, rest = ~rare, drawn[rare].sum() - n * p[rare].sum()
        chi = ((drawn - expected).square() / expected)[kept].sum()
        return float(chi + rest.square() / (n * p[rare].sum()).clamp(min=1)), int(kept.sum())

    chi, cells = statistic(p)
    assert abs(chi - cells) < 5 * math.sqrt(2 * cells)
    assert statistic(p.flip(0))[0] > 20 * cells


@pytest.mark.parametrize("order", [None, SEVERAL], ids=["one", "several"])
@pytest.mark.parametrize("name", ["made", "nade"])
def test_probabilities_of_all_states_sum_to_one(name, order):
    model = ordered(name, D, 2, order)
    log_p = model.log_prob(states(2, D))
    assert log_p.std() > 0.5
    assert abs(float(log_p.exp().sum()) - 1) < 1e-10
    assert model.log_prob_kind == "exact"


@pytest.mark.parametrize("name", ["made", "nade"])
def test_probabilities_of_all_levels_sum_to_one(name):
    log_p = ordered(name, 4, 5, FEW).log_prob(states(5, 4))
    assert log_p.std() > 0.5
    assert abs(float(log_p.exp().sum()) - 1) < 1e-10


@pytest.mark.parametrize("name", ["made", "nade"])
def test_averaged_logits_are_no_density(name):
    """What sums to 1 is the mean of the orders' probabilities, which log_prob() gives."""
    model, every = ordered(name, D, 2, SEVERAL), states(2, D)
    each = torch.stack([-model.order_nll(every, which) for which in range(3)])
    for log_p in each:
        assert abs(float(log_p.exp().sum()) - 1) < 1e-10
    torch.testing.assert_close(model.log_prob(every), each.exp().mean(0).log())
    scaled = 2 * every.double() - 1
    logits = torch.stack([model.numbers(scaled, which)[..., 0] for which in range(3)]).mean(0)
    total = (-F.binary_cross_entropy_with_logits(logits, every.double(), reduction="none")).sum(1)
    assert abs(float(total.exp().sum()) - 1) > 1e-4


@pytest.mark.parametrize("levels", [2, 5])
@pytest.mark.parametrize("name", ["made", "nade"])
def test_sees_what_comes_before(name, levels):
    """The Jacobian of the numbers: exact zeros in and after a variable's place, none before."""
    model = ordered(name, D, levels, SEVERAL)
    x = torch.rand(1, D, dtype=torch.float64)
    for which, order in enumerate(SEVERAL):
        rank = torch.tensor(order).argsort()
        jacobian = torch.autograd.functional.jacobian(lambda x, w=which: model.numbers(x, w), x)
        seen = jacobian[0, :, :, 0]  # [D, R, D]
        assert torch.equal(seen != 0, (rank[:, None] > rank)[:, None].expand_as(seen))


def test_made_by_a_network_for_each_variable():
    """Each conditional from what precedes it alone, the rest being whatever: none of it matters."""
    model, x = ordered("made", 6, 4, [(4, 2, 0, 5, 1, 3)]), torch.randint(4, (7, 6))
    total = torch.zeros(7, dtype=torch.float64)
    known = torch.full((7, 6), 99.0, dtype=torch.float64)
    for i in model.orders[0].tolist():
        logits = model.levels_of(model.net(known)[:, i], i)
        total += logits.log_softmax(-1).gather(1, x[:, i, None])[:, 0]
        known[:, i] = x[:, i] * 2 / 3 - 1
    torch.testing.assert_close(model.log_prob(x), total)


@pytest.mark.parametrize("levels", [2, 4])
def test_nade_by_its_definition(levels):
    """A sum over all that precede, for each variable: O(D^2 H)."""
    order = [4, 2, 0, 5, 1, 3]
    model, x = ordered("nade", 6, levels, order), torch.randint(levels, (7, 6))
    scaled = x.double() * 2 / (levels - 1) - 1
    total = torch.zeros(7, dtype=torch.float64)
    for rank, i in enumerate(order):
        sums = model.start.expand(7, -1)
        for j in order[:rank]:
            sums = sums + scaled[:, j, None] * model.read[j]
        y = F.silu(sums) @ model.write[i].T + model.write_bias[i]
        if levels == 2:
            y = y * (2 * x[:, i, None] - 1)
            total += y.sigmoid().log()[:, 0]
        else:
            p = (y @ model.levels_of.embedding + model.levels_of.bias[i]).softmax(1)
            total += p.gather(1, x[:, i, None]).log()[:, 0]
    torch.testing.assert_close(model.log_prob(x), total)


@pytest.mark.parametrize(("features", "levels"), [(5, 2), (3, 4)])
@pytest.mark.parametrize("name", ["made", "nade"])
def test_samples_of_orders_have_the_density(name, features, levels):
    order = [list(range(features)), list(range(features))[::-1]]
    model = ordered(name, features, levels, order)
    check_frequencies(model, states(levels, features))
    whole = model.sample(9, seed=3)
    assert torch.equal(model.sample(4, seed=noise.key(3, offset=5)), whole[5:])


def test_an_order_is_drawn_for_each_update():
    """loss() is one of the orders' by the seed; its mean over seeds bounds -log p."""
    model, x = ordered("made", D, 2, SEVERAL), torch.randint(2, (20, D))
    each = [float(model.order_nll(x, which).mean()) for which in range(3)]
    losses = [float(model.loss(x, seed=seed)) for seed in range(60)]
    counts = [sum(math.isclose(loss, nll) for loss in losses) for nll in each]
    assert sum(counts) == 60
    assert min(counts) > 8
    assert sum(each) / 3 > -float(model.log_prob(x).mean())
    assert model.loss(x, seed=4) == model.loss(x, seed=4)


@pytest.mark.parametrize("name", ["made", "nade"])
def test_learns_the_digits(name):
    """A few updates bring more than any histogram of pixels does."""
    torch.manual_seed(0)
    x = data.digits().train[:200]
    make = {"made": lambda: MADE(64, 17, (64,)), "nade": lambda: NADE(64, 17, 32)}
    model = make[name]()
    assert abs(float(model.log_prob(x[:9]).detach().mean()) + 64 * math.log(17)) < 1e-3, (
        "even at first"
    )
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    for step in range(40):
        optimizer.zero_grad()
        model.loss(x, seed=step).backward()
        optimizer.step()
    count = F.one_hot(x, 17).float().mean(0).clamp(min=1e-9)
    assert -float(model.log_prob(x).detach().mean()) < -float((count * count.log()).sum())


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_recurrent_models(cell):
    model, x = stirred(RNN(4, width=7, layers=2, cell=cell, dropout=0.2)), torch.randint(4, (3, 9))
    embedded = model.token(x).detach()
    seen = torch.autograd.functional.jacobian(lambda e: model.head(model.cells(e)[0])[0], embedded)
    reach = seen[:, :, 0].abs().sum((1, 3))  # [T, T]
    assert torch.equal(reach != 0, torch.ones(9, 9).tril().bool())
    every = F.pad(states(4, 4), (1, 0), value=2)  # all that may follow one token
    log_p = model.log_prob(every)
    assert abs(float(log_p.exp().sum()) - 1) < 1e-10
    torch.testing.assert_close(-log_p.mean() / 4, model.loss(every))
    whole, begun = model.log_prob(x), model.log_prob(x, given=4)
    torch.testing.assert_close(whole, begun + model.log_prob(x[:, :4]))
    prompts = [x[0, :5], x[1, :1], x[2, :3]]
    together = model.generate(prompts, 6, seed=1)
    for b, prompt in enumerate(prompts):
        assert torch.equal(model.generate([prompt], 6, seed=1, offset=b)[0], together[b])
    longer = torch.cat([prompts[0], together[0, :2]])
    assert torch.equal(model.generate([longer], 4, seed=1)[0], together[0, 2:])
    likeliest = model.generate(prompts[:1], 3, temperature=0)[0]
    for token in likeliest:
        assert token == model(prompts[0][None])[0, -1].argmax()
        prompts[0] = torch.cat([prompts[0], token[None]])
    assert torch.equal(model.sample(2, prompt=x[0], tokens=3, seed=1)[:, :9], x[:1].expand(2, 9))


def test_recurrent_samples_have_the_density():
    model = stirred(RNN(3, width=5, marks=1), 0.8)

    class Three:
        def log_prob(self, x):
            return model.log_prob(F.pad(x, (1, 0), value=3))

        def sample(self, n, seed):
            return model.sample(n, prompt=torch.tensor([3]), tokens=3, seed=seed)[:, 1:]

    check_frequencies(Three(), states(3, 3))


@pytest.mark.parametrize("colours", [4, 3])
@pytest.mark.parametrize("classes", [0, 2])
@pytest.mark.parametrize("name", ["gpt", "gru"])
def test_pictures_have_a_density(name, classes, colours):
    """Of levels, also where several share a colour; of each class, and of their mean."""
    model, every = images(name, 3, 4, colours, classes), states(4, 3)
    for k in range(classes):
        total = model.log_prob(every, torch.full((64,), k)).exp().sum()
        assert abs(float(total) - 1) < 1e-6
    if name == "gpt":
        check_frequencies(model, every)
    assert abs(float(model.log_prob(every).exp().sum()) - 1) < 1e-6


@pytest.mark.parametrize("classes", [0, 2])
def test_completions_have_the_conditional_density(classes):
    """p(rest | known), also where the class must be told from what is known."""
    model = images("gpt", 3, 4, 4, classes)
    known = torch.tensor([[2]])
    every = F.pad(states(4, 2), (1, 0), value=2)

    class Rest:
        def log_prob(self, x):
            return model.log_prob(every).log_softmax(0)

        def sample(self, n, seed):
            made = model.complete(known.expand(n, 1), seed=seed)
            assert (made[:, 0] == 2).all()
            return made[:, 1:]

    check_frequencies(Rest(), states(4, 2))
    if classes:
        first, second = (model.complete(known.expand(500, 1), k, seed=1) for k in range(2))
        assert not torch.equal(first, second)


def test_palette():
    """Each level has the colour of the nearest mean, counts being one more than what is there."""
    x = (torch.linspace(0, 1, 60) ** 4 * 15.99).long()  # dark levels are often seen
    level, count = torch.arange(16).double(), torch.bincount(x, minlength=16).double() + 1
    for colours in range(1, 17):
        colour = palette(x, 16, colours)
        assert colour.unique().tolist() == list(range(colours))
        of = F.one_hot(colour, colours).double()
        means = (of.T @ (count * level)) / (of.T @ count)
        assert torch.equal((level[:, None] - means).abs().argmin(1), colour)
    assert palette(torch.tensor([0] * 100 + [9]), 10, 2).tolist() == [0] * 4 + [1] * 6
    assert int((palette(x, 16, 4) == 0).sum()) < 4, "dark levels are told apart"


def test_palette_is_kept():
    """The first batch in training sets it, no later one does; a state dict holds it."""
    model = images("gpt", 6, 16, 4)
    fresh = TokenImages(GPT(model.model.sizes), 6, 16, 4).double().eval()
    even, bright = fresh.colour.clone(), torch.full((3, 6), 15)
    assert not torch.equal(even, model.colour)
    fresh.loss(bright)
    assert torch.equal(fresh.colour, even), "eval mode must leave it"
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    fresh.train().loss(bright)
    assert torch.equal(fresh.colour, model.colour)
    torch.testing.assert_close(fresh.eval().log_prob(bright), model.log_prob(bright))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MADE(3, order=[(0, 1, 2), (0, 1, 1)]), "MADE: order must hold each of 0..2 once"),
        (lambda: NADE(3, order=(0, 1)), "NADE: order must hold each of 0..2 once, got (0, 1)"),
        (lambda: MADE(3, 1), "MADE: features and rank must be >= 1, levels >= 2, got 3, 3 and 1"),
        (lambda: NADE(3, hidden=0), "NADE: hidden must be >= 1, got 0"),
        (lambda: NADE(3).log_prob(torch.zeros(2, 4).long()), "NADE: x must be [B, 3], got (2, 4)"),
        (lambda: RNN(3, cell="cell"), "cell gru or lstm, got 3, 128, 1, 0 and 'cell'"),
        (lambda: RNN(3).generate([torch.zeros(0).long()], 2), "1 or more, got 2 and lengths [0]"),
        (lambda: RNN(3)(torch.zeros(3).long()), "RNN: tokens must be [B, T], got (3,)"),
        (lambda: RNN(3).log_prob(torch.zeros(1, 3).long(), given=0), "given must be >= 1, got 0"),
        (lambda: images("gru", 3, 4, 5), "colours must lie in [2, levels]"),
        (lambda: images("gru", 3, 4, 4).log_prob(states(4, 2)), "x must be [B, 3], got (16, 2)"),
        (lambda: images("gru", 3, 4, 4).complete(states(4, 3)), "[B, K] with K < 3, got (64, 3)"),
        (lambda: images("gru", 3, 4, 4).sample(2, 1), "label must be None: this model has 0"),
    ],
)  # fmt: skip
def test_refusals(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)
