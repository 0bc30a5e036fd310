"""Flows: densities that integrate to 1, chains that reconstruct, bounds of pictures."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gmkernels import data, noise, toys
from gmkernels.models import image_flow
from gmkernels.models.couplings import AffineCoupling, MaskedAffine, MaskedSpline, SplineCoupling
from gmkernels.models.flow import Chain, Flow, Multiscale, Normal
from gmkernels.models.masked import MaskedNet
from gmkernels.models.transforms import ActNorm, Inverse, Leaky, Logit, LUAffine, Permutation
from gmkernels.ops.likelihood import gaussian_nll
from gmkernels.split import Split

BUILDERS = ("realnvp", "glow", "nsf", "maf")


@pytest.fixture(autouse=True)
def _one_thread():
    """Sizes here are such that a second thread costs more than it does."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def mlp(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))


def plane(name, context=0):
    """A flow of the plane, moved at random and by a few updates."""
    torch.manual_seed(0)
    if name in BUILDERS:
        model = getattr(image_flow, name)(2, 0, layers=3, width=16, dropout=0.0).flow
    else:
        layers = {
            "iaf": lambda: [Inverse(MaskedAffine(MaskedNet(2, 2, (16,))))],
            "masked spline": lambda: [LUAffine(2), MaskedSpline(MaskedNet(2, 23, (16,)))],
            "lu and leaky": lambda: [LUAffine(2), Leaky(0.4), Permutation(2), LUAffine(2)],
            "conditional": lambda: [
                AffineCoupling(mlp(1 + context, 2), Split.halves(2)),
                Permutation(2),
                SplineCoupling(mlp(1 + context, 23), Split.halves(2)),
            ],
        }[name]()
        model = Flow(layers, Normal(2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    c = torch.randn(200, context) if context else None
    for step in range(5):
        if step == 1:  # after the data have set the scales
            with torch.no_grad():
                for p in model.parameters():
                    p += 0.1 * torch.randn_like(p)
        optimizer.zero_grad()
        model.loss(toys.moons(200, seed=step, std=0.1), c).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def integral(model, c=None, reach=8.0, side=320):
    """The density's integral over [-reach, reach]^2, by the midpoint rule."""
    line = (torch.arange(side) + 0.5) * (2 * reach / side) - reach
    points = torch.cartesian_prod(line, line)
    c = None if c is None else c.expand(len(points), -1)
    return float(model.log_prob(points, c).double().exp().sum()) * (2 * reach / side) ** 2


@pytest.mark.parametrize("name", [*BUILDERS, "iaf", "masked spline", "lu and leaky"])
def test_density_integrates_to_one(name):
    model = plane(name)
    _, log_det = model.transform(torch.randn(100, 2))
    assert log_det.std() > 0.01 or name == "lu and leaky"
    assert log_det.abs().max() > 0.1
    assert abs(integral(model) - 1) < 1e-3


def test_conditional_density_integrates_to_one_for_each_condition():
    model = plane("conditional", context=2)
    for c in (torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 2.0]])):
        assert abs(integral(model, c) - 1) < 1e-3
    x = torch.zeros(1, 2)
    assert model.log_prob(x, c) != model.log_prob(x, 2 * c)


@pytest.mark.parametrize("name", ["glow", "nsf", "maf", "iaf"])
def test_samples_come_from_the_density(name):
    """exp(log_prob) averages a bounded function as the samples do."""
    model = plane(name)
    x = model.sample(10_000, seed=3).detach()
    torch.testing.assert_close(model.sample(5, seed=3), x[:5], atol=1e-5, rtol=1e-5)
    assert torch.equal(
        model.base.sample(4, seed=noise.key(3, offset=2)), model.base.sample(6, seed=3)[2:]
    )
    line = (torch.arange(320) + 0.5) * 0.05 - 8
    points = torch.cartesian_prod(line, line)
    with torch.no_grad():
        weight = model.log_prob(points).double().exp() * 0.05**2
    for centre in ((0.0, 0.0), (1.0, 0.5), (0.0, 1.0)):
        value = (-(points - torch.tensor(centre)).square().sum(1)).exp().double()
        drawn = (-(x - torch.tensor(centre)).square().sum(1)).exp().double()
        assert abs(float((value * weight).sum() - drawn.mean())) < 5 * float(drawn.std()) / 100


def zukos_spline(numbers):
    """Zuko's spline of our numbers: the same bins and slopes, from what it squashes to them."""
    from zuko.transforms import MonotonicRQSTransform

    widths, heights, v = numbers.split([8, 8, 7], -1)
    sizes = ((1e-3 + 0.992 * raw.softmax(-1)).log() for raw in (widths, heights))
    slopes = (1e-3 + F.softplus(v)).log()
    reach = -math.log(1e-9)  # theirs squashes a number u to u / (1 + |u| / reach)
    raw = [*(u / (1 - 2 * u.abs() / reach) for u in sizes), slopes / (1 - slopes.abs() / reach)]
    return MonotonicRQSTransform(*raw, bound=3.0, slope=1e-9)


def zukos_affine(numbers):
    """Zuko's scale and shift, likewise."""
    from zuko.transforms import MonotonicAffineTransform

    shift, u = numbers.unbind(-1)
    return MonotonicAffineTransform(shift, u / (1 - u.abs() / -math.log(1e-9)), slope=1e-9)


@pytest.mark.parametrize(
    ("make", "outputs", "element"),
    [
        (functools.partial(MaskedAffine, scale="exp"), 2, zukos_affine),
        (MaskedSpline, 23, zukos_spline),
    ],
    ids=["MAF", "NSF"],
)
def test_masked_flows_are_zukos(make, outputs, element):
    """On the same masked network, density and samples; zuko says derivatives another way."""
    pytest.importorskip("zuko")
    from zuko.distributions import DiagNormal, NormalizingFlow
    from zuko.transforms import AutoregressiveTransform, DependentTransform

    torch.manual_seed(0)
    net = MaskedNet(4, outputs, (16,)).double()
    with torch.no_grad():
        for p in net.parameters():  # a new one says zeros
            p += 0.3 * torch.randn_like(p)
    ours = Flow([make(net)], Normal(4)).double()
    theirs = AutoregressiveTransform(lambda x: DependentTransform(element(net(x)), 1), passes=4)
    peer = NormalizingFlow(theirs, DiagNormal(torch.zeros(4).double(), torch.ones(4).double()))
    x = 2 * torch.randn(20, 4).double()
    torch.testing.assert_close(ours.log_prob(x), peer.log_prob(x), atol=1e-9, rtol=1e-9)
    z = torch.randn(20, 4).double()
    torch.testing.assert_close(ours.transform.inverse(z)[0], theirs.inv(z), atol=1e-9, rtol=1e-9)


def test_learned_prior_is_a_gaussian_of_what_leaves():
    """Glow's: what leaves a scale is N(mean, sd) by a layer of what stays."""
    torch.manual_seed(0)
    model = image_flow.glow(16, 17, layers=1, width=8, dropout=0.0, learned_prior=True).double()
    model.eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    logit, scales = model.flow.transform.transforms
    first, last = (level.transforms for level in scales.levels)
    prior, top = first[-1], last[-1]
    y = torch.rand(5, 1, 4, 4).double()
    whole = model.flow.log_prob(y)
    del first[-1], last[-1]
    z, log_det = model.flow.transform(y)
    out, rest = z.split([8, 8], 1)
    leaves, stays = scales.levels[0](logit(y)[0])[0].chunk(2, 1)
    torch.testing.assert_close(leaves.flatten(1), out)
    shift, log_s = prior.net(stays).chunk(2, 1)
    of_out = torch.distributions.Normal(-shift * torch.exp(-log_s), torch.exp(-log_s))
    log_p = log_det + of_out.log_prob(leaves).flatten(1).sum(1)
    latent, of_top = top(rest.view(5, 8, 1, 1))
    log_p += of_top - gaussian_nll(latent.flatten(1), torch.zeros(5, 8).double())
    torch.testing.assert_close(whole, log_p, atol=1e-9, rtol=1e-9)


def test_log_prob_is_nflows():
    """A composition of an affine map and splines, on the same numbers."""
    pytest.importorskip("nflows")
    from nflows.distributions.normal import StandardNormal
    from nflows.flows import Flow as TheirFlow
    from nflows.transforms import (
        CompositeTransform,
        PiecewiseRationalQuadraticCouplingTransform,
        ReversePermutation,
    )

    torch.manual_seed(0)
    nets = [mlp(2, 2 * 23).double() for _ in range(2)]
    layers, theirs = [], []
    for net in nets:
        layers += [SplineCoupling(net, Split.halves(4)), Permutation(4)]
        theirs += [
            PiecewiseRationalQuadraticCouplingTransform(
                [-1, -1, 1, 1], lambda *_, net=net: _Ignoring(net), tails="linear", tail_bound=3.0,
                num_bins=8,
            ),
            ReversePermutation(4),
        ]  # fmt: skip
    ours = Flow(layers, Normal(4)).double()
    peer = TheirFlow(CompositeTransform(theirs), StandardNormal([4])).double()
    x = 2 * torch.randn(20, 4).double()
    torch.testing.assert_close(ours.log_prob(x), peer.log_prob(x), atol=1e-9, rtol=1e-9)
    z = torch.randn(20, 4).double()
    expected = peer._transform.inverse(z)[0]
    torch.testing.assert_close(ours.transform.inverse(z)[0], expected, atol=1e-9, rtol=1e-9)


class _Ignoring(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.hidden_features = net, 1  # nflows divides by its root

    def forward(self, x, context=None):
        return self.net(x)


def deep(layers=8, context=2, **options):
    """A chain of couplings that shares its first network with its last layer."""
    torch.manual_seed(0)
    nets = [mlp(2 + context, 4) for _ in range(layers - 1)]
    made = [Logit(), ActNorm(4)]
    for i, net in enumerate([*nets, nets[0]]):
        made += [AffineCoupling(net, Split.alternating(4, flip=i % 2 == 1)), LUAffine(4)]
    return Flow(made, Normal(4), **options)


@pytest.mark.parametrize("wanted", ["x and c", "neither"])
def test_reconstructed_gradients_are_autograds(wanted):
    found = []
    x0, c0 = torch.rand(30, 4), torch.randn(30, 2)
    for reconstruct in (False, True):
        flow = deep(reconstruct=reconstruct)
        x, c = (t.clone().requires_grad_(wanted == "x and c") for t in (x0, c0))
        loss = (flow.log_prob(x, c) * torch.arange(30)).mean()
        loss.backward()
        grads = [p.grad for p in flow.parameters()]
        found.append([loss.detach(), *grads, *((x.grad, c.grad) if x.requires_grad else ())])
    assert len(found[0]) == len(found[1])
    for plain, again in zip(*found, strict=True):
        scale = float(plain.abs().max())
        assert scale > 0
        torch.testing.assert_close(again / scale, plain / scale, atol=2e-5, rtol=0)


def test_reconstruct_skips_frozen_layers():
    found = []
    for reconstruct in (False, True):
        flow = deep(reconstruct=reconstruct)
        for layer in flow.transform.transforms[:5]:
            layer.requires_grad_(False)
        flow.loss(torch.rand(9, 4), torch.zeros(9, 2)).backward()
        found.append([p.grad is None for p in flow.parameters()])
    assert found[0] == found[1]
    assert len(set(found[0])) == 2


def kept(flow):
    """Bytes that autograd keeps for backward, parameters aside."""
    sizes, parameters = {}, {p.data_ptr() for p in flow.parameters()}

    def pack(t):
        if t.data_ptr() not in parameters:
            sizes[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = flow.loss(torch.rand(100, 4), torch.randn(100, 2))
    assert loss.requires_grad
    return sum(sizes.values())


def test_reconstruct_keeps_no_more_for_more_layers():
    assert kept(deep(4, reconstruct=True)) == kept(deep(16, reconstruct=True))
    assert kept(deep(16)) > 10 * kept(deep(16, reconstruct=True))


def test_reconstruct_refuses():
    flow = deep(reconstruct=True)
    x, c = torch.rand(5, 4, requires_grad=True), torch.zeros(5, 2)
    with pytest.raises(RuntimeError, match="first derivatives only.*set reconstruct=False"):
        torch.autograd.grad(flow.loss(x, c), x, create_graph=True)
    loss = flow.loss(x, c)
    with torch.no_grad():
        flow.transform.transforms[3].bias += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    for layer, name in ((nn.Dropout(0.1), "Dropout"), (nn.BatchNorm1d(2), "BatchNorm1d")):
        net = nn.Sequential(layer, mlp(2, 4))
        coupling = AffineCoupling(net, Split.halves(4))
        with pytest.raises(ValueError, match=f"same result twice, got {name} at "):
            Chain([coupling], reconstruct=True)
        Chain([coupling])
    with pytest.raises(ValueError, match="at least one transform"):
        Flow([], Normal(2))


@pytest.mark.parametrize("name", BUILDERS)
def test_flows_of_pictures(name):
    """Both directions agree, labels matter, and reconstruction leaves the loss as it is."""
    images = data.digits()
    x, label = images.train[:40], images.train_labels[:40]
    losses = []
    for reconstruct in (False, True):
        torch.manual_seed(0)
        model = getattr(image_flow, name)(
            64, 17, layers=1, width=8, dropout=0.0, classes=10, reconstruct=reconstruct
        )
        loss = model.loss(x, label, seed=1)
        loss.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        losses.append((loss.detach(), grads / grads.abs().max()))
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=1e-5)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
    model.eval()
    condition = F.one_hot(label, 10).float()
    y = torch.rand(40, *model.shape)
    z, log_det = model.flow.transform(y, condition)
    back, undone = model.flow.transform.inverse(z, condition)
    torch.testing.assert_close(back, y, atol=1e-4, rtol=0)
    torch.testing.assert_close(undone, -log_det, atol=1e-2, rtol=1e-5)
    if name != "maf":
        assert isinstance(model.flow.transform.transforms[-1], Multiscale)
    each = [model.log_prob(x, torch.full_like(label, k), seed=1) for k in range(10)]
    mixed = torch.stack(each).logsumexp(0) - math.log(10)
    torch.testing.assert_close(model.log_prob(x, seed=1), mixed)
    assert (each[0] - each[1]).abs().max() > 1e-3
    drawn = model.sample(6, seed=2)
    assert drawn.shape == (6, 64)
    assert drawn.dtype == torch.int64
    assert 0 <= int(drawn.min()) <= int(drawn.max()) <= 16
    assert not torch.equal(drawn, model.sample(6, 3, seed=2))


def test_dequantised_density_bounds_the_probability():
    """Three levels, two pixels: the mass of each cell by quadrature, the bound by many draws."""
    torch.manual_seed(0)
    model = image_flow.maf(2, 3, layers=2, width=16, dropout=0.0)
    for step in range(20):
        x = torch.stack([torch.arange(60) % 3, torch.arange(60) // 20 * step % 3], 1)
        model.loss(x, seed=step).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.02 * p.grad
                p.grad = None
    model.eval()
    assert model.log_prob_kind == "lower bound"
    line = (torch.arange(80) + 0.5) / 240
    total = 0.0
    for a in range(3):
        for b in range(3):
            y = torch.cartesian_prod(line + a / 3, line + b / 3)
            with torch.no_grad():
                mass = float(model.flow.log_prob(y).double().exp().sum()) / 240**2
                x = torch.tensor([[a, b]]).expand(4000, 2)
                bound = float(model.log_prob(x, seed=5).double().mean())
            total += mass
            assert bound < math.log(mass) + 0.02
            assert bound > math.log(mass) - 1
    assert 0.5 < total < 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: image_flow.glow(36, 17), "a side that 4 divides, got 36 pixels; maf takes any"),
        (lambda: image_flow.nsf(2, 0, layers=0), "nsf: layers must be >= 1, got 0"),
        (lambda: image_flow.maf(2, 0, width=0), "maf: width must be >= 1, got 0"),
        (lambda: image_flow.nsf(2, 0, reconstruct=True), "same result twice, got Dropout"),
        (lambda: image_flow.glow(64, 17, reconstruct=True), "same result twice, got Dropout"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value)
