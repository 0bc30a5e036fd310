"""Denoising networks: shapes, what each condition may change, gradients, a loss that falls."""

import pytest
import torch

from gmkernels.models import nets

B, CLASSES, T, E, C2 = 3, 4, 5, 6, 2
ALL = {"classes": CLASSES, "context_width": E, "concat_channels": C2}
KINDS, IMAGES = ["unet", "dit", "mlp"], ["unet", "dit"]
MASK, LABEL = torch.ones(B, T, dtype=torch.bool), torch.zeros(B, dtype=torch.int64)


def perturb(net):
    """Moves every parameter, those that start at zero too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return net


def make(kind, *, shape=(1, 8, 8), **options):
    torch.manual_seed(0)
    if kind == "unet":
        return nets.UNet(shape[0], width=16, **options)
    if kind == "dit":
        return nets.DiT(*shape[:1], shape[1:], width=32, depth=2, **options)
    return nets.MLP(2, 32, 2, **{k: v for k, v in options.items() if k != "context_width"})


def draw(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(kind, *, shape=(1, 8, 8), rows=B):
    """x, t and all conditions that the network made with ALL takes."""
    x = draw(rows, 2) if kind == "mlp" else draw(rows, *shape)
    conditions = {"label": torch.arange(rows) % (CLASSES + 1) - 1}
    conditions["concat"] = draw(rows, C2, *x.shape[2:], seed=3)
    if kind != "mlp":
        conditions["context"] = draw(rows, T, E, seed=4)
        conditions["context_mask"] = draw(rows, T, seed=5) > 0
    return x, torch.linspace(0.5, 900, rows), conditions


SIZES = [
    *(("unet", size, {}) for size in [(8, 8), (7, 7), (1, 1)]),
    *(("unet", size, {"multipliers": (1, 2, 2), "blocks": 2}) for size in [(5, 9), (2, 3)]),
    *(("dit", size, {"patch": p}) for size, p in [((4, 6), 2), ((7, 5), 1), ((9, 3), 3)]),
]


@pytest.mark.parametrize(("kind", "size", "options"), SIZES)
def test_sizes(kind, size, options):
    net = perturb(make(kind, shape=(3, *size), out_channels=6, **options, **ALL))
    x, t, conditions = inputs(kind, shape=(3, *size))
    y = net(x, t, **conditions)
    assert y.shape == (B, 6, *size)
    assert y.isfinite().all()


def test_patches_come_back_where_they_were():
    """With an identity for stem and head and no blocks, a DiT is the norm of each patch."""
    net = nets.DiT(3, (4, 6), width=12, depth=0)
    for p in net.parameters():
        p.data.zero_()
    net.stem.weight.data = net.out.weight.data = torch.eye(12)
    x = draw(B, 3, 4, 6)
    tiles = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5)  # [B, h, w, C, p, p]
    y = torch.nn.functional.layer_norm(tiles, tiles.shape[3:])
    expected = y.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
    torch.testing.assert_close(net(x, torch.zeros(B)), expected)


def test_transposed_kernels_transpose():
    net = perturb(make("unet", multipliers=(1, 2, 2))).double()
    x, t = draw(B, 1, 5, 9).double(), torch.zeros(B)
    y = net(x, t)
    for p in net.parameters():
        p.data = p.data.mT if p.dim() == 4 else p.data
    torch.testing.assert_close(net(x.mT, t), y.mT)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_everything(kind):
    net = perturb(make(kind, **ALL))
    x, t, conditions = inputs(kind, rows=CLASSES + 1)
    given = {"x": x, "t": t, **conditions}
    floats = {k: v.requires_grad_() for k, v in given.items() if v.is_floating_point()}
    net(**given).square().sum().backward()
    for name, p in [*net.named_parameters(), *floats.items()]:
        assert 0 < p.grad.abs().max() < float("inf"), name
    assert net.label.weight.grad.abs().amax(1).min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_mix(kind):
    net = perturb(make(kind, **ALL)).double()
    x, t, conditions = inputs(kind)
    given = {"x": x, "t": t, **conditions}
    given = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    y = net(**given)
    for i in range(B):
        alone = net(**{k: v[i : i + 1] for k, v in given.items()})
        torch.testing.assert_close(alone, y[i : i + 1])


@pytest.mark.parametrize("kind", KINDS)
def test_none_is_no_condition(kind):
    net, (x, t, conditions) = make(kind, **ALL), inputs(kind)
    assert torch.count_nonzero(net(x, t, **conditions)) == 0
    perturb(net)
    none = {"label": LABEL - 1, "concat": torch.zeros_like(conditions["concat"])}
    if kind != "mlp":
        none.update(context=conditions["context"], context_mask=~MASK)
    torch.testing.assert_close(net(x, t, **none), net(x, t))


@pytest.mark.parametrize("kind", IMAGES)
def test_mask_hides_tokens(kind):
    net = perturb(make(kind, context_width=E))
    x, t, conditions = inputs(kind)
    context, mask = conditions["context"], conditions["context_mask"]
    y = net(x, t, context=context, context_mask=mask)
    hidden = torch.where(mask[..., None], context, 100 * draw(B, T, E, seed=6))
    torch.testing.assert_close(net(x, t, context=hidden, context_mask=mask), y, rtol=0, atol=0)
    for i in range(B):
        kept = net(x[i : i + 1], t[i : i + 1], context=context[i : i + 1, mask[i]])
        torch.testing.assert_close(kept, y[i : i + 1])
    every = net(x, t, context=context, context_mask=MASK)
    torch.testing.assert_close(every, net(x, t, context=context))
    assert (every - y).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_time_scale(kind):
    x, t, _ = inputs(kind)
    net, scaled = perturb(make(kind)), perturb(make(kind, time_scale=1000.0))
    torch.testing.assert_close(scaled(x, t / 1000), net(x, t), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(net(x, t.long()), net(x, t.floor()))


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_bits(kind):
    def run():
        net, (x, t, conditions) = perturb(make(kind, **ALL)), inputs(kind)
        y = net(x, t, **conditions)
        return [y, *torch.autograd.grad(y.sum(), [*net.parameters()])]

    torch.testing.assert_close(run(), run(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_adam_lowers_the_loss(kind):
    net = make(kind, classes=2)
    x0 = draw(2, 2, seed=7) if kind == "mlp" else draw(2, 1, 8, 8, seed=7)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    label, t = torch.arange(16) % 2, torch.linspace(0.1, 1, 16)
    x = x0[label] + t.view(-1, *(1,) * (x0.dim() - 1)) * draw(16, *x0.shape[1:])
    for _ in range(30):
        optimizer.zero_grad()
        loss = (net(x, t, label=label) - x0[label]).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.3 * x0.square().mean()  # that of the new network, which gives 0


WRONG = [
    ({"label": LABEL}, {}, "label needs a network made with classes > 0"),
    ({"context": draw(B, T, E)}, {}, "context needs a network made with context_width > 0"),
    ({"concat": draw(B, C2, 8, 8)}, {}, "concat needs a network made with concat_channels > 0"),
    ({"context": draw(B, T, E + 1)}, ALL, r"context must be \[3, \*, 6\], got \(3, 5, 7\)"),
    ({"context_mask": MASK}, ALL, r"context_mask must be \[3, 0\], got \(3, 5\)"),
    ({"context": draw(B, T, E), "context_mask": MASK[:, 1:]}, ALL, r"must be \[3, 5\], got"),
    ({"concat": draw(B, C2, 8, 7)}, ALL, r"concat must be \[3, 2, 8, 8\], got"),
    ({"x": draw(B, 2, 8, 8)}, {}, r"x must be \[\*, 1, .*\], got \(3, 2, 8, 8\)"),
    ({"t": draw(B, 1)}, {}, r"t must be \[3\], got \(3, 1\)"),
]


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize(("call", "options", "message"), WRONG)
def test_wrong_calls(kind, call, options, message):
    net = make(kind, **options)
    x, t, _ = inputs(kind)
    with pytest.raises(ValueError, match=f"{type(net).__name__}: .*{message}"):
        net(**{"x": x, "t": t, **call})


def test_wrong_networks():
    with pytest.raises(ValueError, match="heads must divide"):
        nets.UNet(1, width=10, heads=3)
    with pytest.raises(ValueError, match=r"patch must divide the size \(7, 8\), got 2"):
        nets.DiT(1, (7, 8))
    with pytest.raises(ValueError, match="context_width must be 0"):
        nets.MLP(2, context_width=3)
    for label in (-2, CLASSES):
        with pytest.raises(IndexError):
            make("mlp", classes=CLASSES)(draw(B, 2), torch.zeros(B), label=LABEL + label)
