"""Transforms of flows: inverses, log-determinants by slogdet, causality, nflows."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gmkernels.models.couplings import AffineCoupling, MaskedAffine, MaskedSpline, SplineCoupling
from gmkernels.models.flow import Chain, Multiscale
from gmkernels.models.masked import MaskedNet
from gmkernels.models.transforms import (
    ActNorm,
    Inverse,
    Invertible1x1,
    Leaky,
    Logit,
    LUAffine,
    Permutation,
    Squeeze,
)
from gmkernels.ops import elementwise
from gmkernels.split import Split

K, BINS = 2, 5


@pytest.fixture(autouse=True)
def _one_thread():
    """Sizes here are such that a second thread costs more than it does."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def mlp(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))


def masked(outputs, context=0, order=(2, 0, 3, 1)):
    return MaskedNet(4, outputs, (24, 24), context=context, order=order)


def conv(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, 8, 3, 1, 1), nn.Tanh(), nn.Conv2d(8, outputs, 1))


def scales():
    board = Split.checkerboard(1, 4, 4)
    first = Chain([AffineCoupling(conv(1, 2), board), Squeeze(), Invertible1x1(4)])
    halves = Split.halves(8, permutation=torch.arange(8).roll(3))
    second = Chain([Squeeze(), SplineCoupling(conv(4, 4 * (3 * BINS - 1)), halves, bins=BINS)])
    return Multiscale([(first, (4, 2, 2)), (second, (8, 1, 1))])


ROW, IMAGE = (4,), (1, 4, 4)
# (what makes it, shape of a row, classes of c, whether volumes change)
CASES = {
    "affine": (lambda: AffineCoupling(mlp(2, 4), Split.halves(4)), ROW, 0, True),
    "affine, c": (
        lambda: AffineCoupling(mlp(2 + K, 4), Split.alternating(4), scale="sigmoid"),
        ROW,
        K,
        True,
    ),
    "affine, permuted": (
        lambda: AffineCoupling(
            mlp(2, 4), Split.halves(4, permutation=torch.tensor([3, 0, 2, 1])), scale="exp"
        ),
        ROW,
        0,
        True,
    ),
    "additive": (
        lambda: AffineCoupling(mlp(3, 1), Split.index([1], 4), scale="additive"),
        ROW,
        0,
        False,
    ),
    "checkerboard, c": (
        lambda: AffineCoupling(conv(1 + K, 2), Split.checkerboard(1, 4, 4)),
        IMAGE,
        K,
        True,
    ),
    "spline, c": (
        lambda: SplineCoupling(mlp(2 + K, 2 * (3 * BINS - 1)), Split.halves(4), bins=BINS),
        ROW,
        K,
        True,
    ),
    "spline, checkerboard": (
        lambda: SplineCoupling(conv(1, 3 * BINS - 1), Split.checkerboard(1, 4, 4), bins=BINS),
        IMAGE,
        0,
        True,
    ),
    "maf": (lambda: MaskedAffine(masked(2)), ROW, 0, True),
    "maf, c": (lambda: MaskedAffine(masked(2, K), scale="exp"), ROW, K, True),
    "maf, spline": (lambda: MaskedSpline(masked(3 * BINS - 1), bins=BINS), ROW, 0, True),
    "iaf, c": (lambda: Inverse(MaskedAffine(masked(2, K))), ROW, K, True),
    "actnorm": (lambda: ActNorm(4), ROW, 0, True),
    "actnorm, image": (lambda: ActNorm(1), IMAGE, 0, True),
    "leaky": (lambda: Leaky(0.2), ROW, 0, True),
    "logit": (lambda: Logit(0.1), ROW, 0, True),
    "permutation": (lambda: Permutation(4), ROW, 0, False),
    "lu": (lambda: LUAffine(4), ROW, 0, True),
    "1 x 1": (lambda: Chain([Squeeze(), Invertible1x1(4)]), IMAGE, 0, True),
    "1 x 1, row": (lambda: Invertible1x1(4), ROW, 0, True),
    "multiscale": (scales, IMAGE, 0, True),
}


def stirred(module, size=0.3):
    """The module with every parameter moved at random."""
    with torch.no_grad():
        for p in module.parameters():
            p += size * torch.randn_like(p)
    return module


def made(name, dtype=torch.float64, n=3):
    make, shape, context, _ = CASES[name]
    torch.manual_seed(len(name))
    transform = stirred(make()).to(dtype).eval()
    x = torch.rand(n, *shape, dtype=dtype) if name == "logit" else torch.randn(n, *shape).to(dtype)
    c = torch.randn(n, context).to(dtype) if context else None
    return transform, x, c


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_inverse_undoes_forward(name, dtype, near):
    transform, x, c = made(name, dtype, n=5)
    z, log_det = transform(x, c)
    back, undone = transform.inverse(z, c)
    assert z.dtype == log_det.dtype == dtype
    assert log_det.shape == (5,)
    torch.testing.assert_close(back, x, atol=near, rtol=near)
    torch.testing.assert_close(undone, -log_det, atol=10 * near, rtol=near)
    if name != "logit":  # a z beyond the image of [0, 1] is none of it
        other = torch.randn_like(z)
        again, _ = transform(transform.inverse(other, c)[0], c)
        torch.testing.assert_close(again, other, atol=near, rtol=near)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("verb", ["forward", "inverse"])
def test_log_det_is_slogdet_of_the_jacobian(name, verb):
    transform, x, c = made(name)
    if verb == "inverse":
        x = transform(x, c)[0].detach()
    call, size = getattr(transform, verb), x[0].numel()
    _, log_det = call(x, c)
    for i in range(len(x)):
        told = () if c is None else (c[i : i + 1],)
        image = functools.partial(lambda told, row: call(row, *told)[0], told)
        jacobian = torch.autograd.functional.jacobian(image, x[i : i + 1])
        expected = torch.linalg.slogdet(jacobian.view(size, size))[1]
        torch.testing.assert_close(log_det[i], expected, atol=1e-9, rtol=1e-9)
    assert (log_det.abs().max() > 0.05) == CASES[name][3], "a test with log_det 0 proves nothing"


def test_actnorm_starts_on_the_first_training_batch():
    norm, x = ActNorm(3), 5 + 2 * torch.randn(40, 3, 2, 2)
    assert torch.equal(norm.eval()(x)[0], x)
    z, _ = norm.train()(x)
    channels = z.transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.mean(1), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(channels.std(1, correction=0), torch.ones(3), atol=1e-6, rtol=0)
    kept = norm.log_scale.clone()
    norm(100 * x)
    assert torch.equal(norm.log_scale, kept), "a later batch moved it"
    other = ActNorm(3)
    other.load_state_dict(norm.state_dict())
    other.train()(100 * x)
    assert torch.equal(other.log_scale, kept), "the flag is not part of the state dict"
    constant = ActNorm(3).train()(torch.ones(4, 3))[0]
    assert constant.isfinite().all()


@pytest.mark.parametrize("bins", [2, 17, 256])
def test_dequantized_levels_stay_in_their_bin(bins):
    levels = torch.arange(bins).repeat(20_000 // bins, 1)
    x = elementwise.dequantize(levels, bins=bins, seed=1)
    assert torch.equal((x.double() * bins + 1e-9).floor().long(), levels)
    assert x.max() <= 1
    place = x.double() * bins - levels
    assert abs(float(place.mean()) - 0.5) < 0.01
    later = elementwise.dequantize(levels[2:5], bins=bins, seed=torch.tensor([1, 2]))
    assert torch.equal(later, x[2:5]), "noise is not by (seed, row)"


@pytest.mark.parametrize("context", [0, K])
def test_masked_network_sees_what_it_may(context):
    """Exact zeros where order forbids, and nothing but those."""
    torch.manual_seed(0)
    order = (2, 0, 3, 1, 4)
    net = stirred(MaskedNet(5, 3, (40, 30, 40), context=context, order=order)).double()
    rank = torch.tensor(order).argsort()
    x, c = torch.randn(1, 5).double(), torch.randn(1, context).double() if context else None
    seen = torch.autograd.functional.jacobian(lambda x: net(x, c), x)[0, :, :, 0]  # [D, P, D]
    allowed = (rank[:, None] > rank)[:, None].expand_as(seen)
    assert torch.equal(seen != 0, allowed)
    if context:
        told = torch.autograd.functional.jacobian(lambda c: net(x, c), c)[0, :, :, 0]
        assert (told != 0).all()
        assert net(x, c)[0, 2].sub(net(x, 2 * c)[0, 2]).abs().min() > 1e-3


def test_masked_network_of_one_variable():
    net = stirred(MaskedNet(1, 2, (8,), context=1))
    c = torch.tensor([[0.0], [1.0]])
    a, b = net(torch.tensor([[0.3], [0.3]]), c)
    assert (a != b).all()
    assert torch.equal(net(torch.tensor([[9.0], [9.0]]), c)[0], a)


@pytest.mark.parametrize("name", ["maf", "maf, c", "maf, spline"])
def test_inverse_of_a_masked_transform_costs_one_pass(name):
    transform, x, c = made(name)
    with FlopCounterMode(display=False) as forward:
        transform(x, c)
    with FlopCounterMode(display=False) as inverse:
        transform.inverse(x, c)
    assert inverse.get_total_flops() <= forward.get_total_flops()


def test_masked_transform_in_nflows():
    """One pass forward; nflows' inverse runs the whole network once a variable."""
    pytest.importorskip("nflows")
    from nflows.transforms.autoregressive import (
        MaskedPiecewiseRationalQuadraticAutoregressiveTransform as Theirs,
    )

    transform, x, _ = made("maf, spline", n=6)

    class Flat(nn.Module):
        def forward(self, inputs, context=None):
            return transform.net(inputs).flatten(1)

    theirs = Theirs(4, 8, num_bins=BINS, tails="linear", tail_bound=3.0)
    theirs.autoregressive_net = Flat()
    for ours, expected in ((transform(x), theirs(x)), (transform.inverse(x), theirs.inverse(x))):
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)


def test_coupling_actnorm_and_squeeze_in_nflows():
    pytest.importorskip("nflows")
    from nflows.transforms import AffineCouplingTransform, SqueezeTransform
    from nflows.transforms.normalization import ActNorm as TheirActNorm

    transform, x, c = made("affine, c", n=6)

    class WithContext(nn.Module):
        def forward(self, inputs, context):
            return transform.net(torch.cat([inputs, context], 1))

    class WithoutMinimum(AffineCouplingTransform):
        def _scale_and_shift(self, transform_params):
            scale, shift = super()._scale_and_shift(transform_params)
            return scale - 1e-3, shift

    theirs = WithoutMinimum([0, 1, 0, 1], lambda *_: WithContext())
    for verb in ("forward", "inverse"):
        ours = getattr(transform, verb)(x, c)
        torch.testing.assert_close(ours, getattr(theirs, verb)(x, c), atol=1e-10, rtol=1e-10)

    image = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(Squeeze()(image), SqueezeTransform()(image))
    norm, their_norm = ActNorm(3).train(), TheirActNorm(3).train()
    assert norm(image)[0].std() > 0.9
    their_norm.initialized.fill_(True)
    with torch.no_grad():
        their_norm.log_scale.copy_(norm.log_scale)
        their_norm.shift.copy_(norm.shift * norm.log_scale.exp())
    torch.testing.assert_close(norm(image), their_norm(image))
    torch.testing.assert_close(norm.inverse(image), their_norm.inverse(image))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskedNet(4, 2, ()), "with a hidden layer or more"),
        (lambda: MaskedNet(0, 2), "must be >= 1"),
        (lambda: MaskedNet(3, 2, order=(0, 1, 1)), "each of 0..2 once"),
        (lambda: masked(2)(torch.zeros(2, 3)), "x must be [B, 4], got (2, 3)"),
        (lambda: masked(2)(torch.zeros(2, 4), torch.zeros(2, 1)), "c must be None"),
        (lambda: masked(2, K)(torch.zeros(2, 4)), "c must be [2, 2] for this network, got None"),
        (lambda: MaskedAffine(masked(3)), "MaskedAffine: net must say 2 numbers of a variable"),
        (lambda: MaskedSpline(masked(2)), "MaskedSpline: net must say 23 numbers"),
        (lambda: Leaky(0.0), "slope must be positive"),
        (lambda: Logit(0.5), "alpha must lie in [0, 0.5)"),
        (lambda: Permutation(3, [0, 0, 1]), "each of 0..2 once"),
        (lambda: Multiscale([(Squeeze(), (3, 2, 2)), (Squeeze(), (4, 1, 1))]), "even C"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value)
