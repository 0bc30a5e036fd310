"""Denoising networks: shapes, what each condition may change, gradients, a loss that falls."""

import math

import pytest
import torch

from gmkernels.models import nets

B, CLASSES, T, E, C2 = 3, 4, 5, 6, 2
ALL = {"classes": CLASSES, "context_width": E, "concat_channels": C2}
KINDS = ["unet", "dit", "mlp"]
IMAGES = ["unet", "dit"]


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
    conditions = {
        "label": torch.arange(rows) % (CLASSES + 1) - 1,
        "concat": draw(rows, C2, *x.shape[2:], seed=3),
    }
    if kind != "mlp":
        conditions["context"] = draw(rows, T, E, seed=4)
        conditions["context_mask"] = draw(rows, T, seed=5) > 0
    return x, torch.linspace(0.5, 900, rows), conditions


SIZES = [(8, 8), (7, 7), (5, 9), (1, 1), (2, 3)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 1, 2)])
@pytest.mark.parametrize("blocks", [1, 2])
def test_unet_takes_any_size(size, multipliers, blocks):
    shape = (3, *size)
    net = make("unet", shape=shape, multipliers=multipliers, blocks=blocks, out_channels=6, **ALL)
    x, t, conditions = inputs("unet", shape=shape)
    assert net(x, t, **conditions).shape == (B, 6, *size)
    assert torch.count_nonzero(net(x, t, **conditions)) == 0
    y = perturb(net)(x, t, **conditions)
    assert y.isfinite().all()
    if size != (1, 1):
        assert (y - y.mean((2, 3), keepdim=True)).abs().min() > 0


@pytest.mark.parametrize(
    ("size", "patch"), [((8, 8), 2), ((4, 6), 2), ((7, 7), 1), ((9, 3), 3), ((4, 4), 4)]
)
def test_dit_takes_its_size(size, patch):
    shape = (3, *size)
    net = make("dit", shape=shape, patch=patch, out_channels=6, **ALL)
    x, t, conditions = inputs("dit", shape=shape)
    y = net(x, t, **conditions)
    assert y.shape == (B, 6, *size)
    assert torch.count_nonzero(y) == 0
    assert perturb(net)(x, t, **conditions).isfinite().all()


def test_patches_come_back_where_they_were():
    """With an identity for stem and head and no blocks, a DiT is the norm of each patch."""
    net = nets.DiT(3, (4, 6), width=12, depth=0)
    with torch.no_grad():
        for layer in (net.stem, net.out):
            layer.weight.copy_(torch.eye(12))
            layer.bias.zero_()
        net.position.zero_()
    x = draw(B, 3, 4, 6)
    tiles = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5)  # [B, h, w, C, p, p]
    y = torch.nn.functional.layer_norm(tiles, tiles.shape[3:])
    expected = y.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
    torch.testing.assert_close(net(x, torch.zeros(B)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_parameter(kind):
    net = perturb(make(kind, **ALL))
    x, t, conditions = inputs(kind, rows=CLASSES + 1)
    x.requires_grad_()
    net(x, t, **conditions).square().sum().backward()
    for name, p in [*net.named_parameters(), ("x", x)]:
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_mix(kind):
    net = perturb(make(kind, **ALL)).double()
    x, t, conditions = inputs(kind)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in conditions.items()}
    y = net(x.double(), t, **wide)
    alone = [
        net(x[i : i + 1].double(), t[i : i + 1], **{k: v[i : i + 1] for k, v in wide.items()})
        for i in range(B)
    ]
    torch.testing.assert_close(y, torch.cat(alone))


@pytest.mark.parametrize("kind", KINDS)
def test_every_input_counts(kind):
    net = perturb(make(kind, **ALL))
    x, t, conditions = inputs(kind)
    conditions.pop("context_mask", None)
    y = net(x, t, **conditions)
    assert (net(x + 1, t, **conditions) - y).abs().amax(-1).min() > 1e-5
    assert (net(x, t + 1, **conditions) - y).abs().amax(-1).min() > 1e-5
    for name, given in conditions.items():
        other = (given + 2) % CLASSES if name == "label" else given + 1
        changed = net(x, t, **{**conditions, name: other})
        assert (changed - y).flatten(1).abs().amax(1).min() > 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_none_is_no_condition(kind):
    net = perturb(make(kind, **ALL))
    x, t, conditions = inputs(kind)
    none = {"label": torch.full((B,), -1), "concat": torch.zeros_like(conditions["concat"])}
    if kind != "mlp":
        none["context"] = conditions["context"]
        none["context_mask"] = torch.zeros(B, T, dtype=torch.bool)
    assert net(x, t).isfinite().all()
    torch.testing.assert_close(net(x, t, **none), net(x, t))


@pytest.mark.parametrize("kind", IMAGES)
def test_mask_hides_tokens(kind):
    net = perturb(make(kind, context_width=E))
    x, t, conditions = inputs(kind)
    context, mask = conditions["context"], conditions["context_mask"]
    assert 0 < mask.sum() < mask.numel()
    y = net(x, t, context=context, context_mask=mask)
    hidden = torch.where(mask[..., None], context, 100 * draw(B, T, E, seed=6))
    torch.testing.assert_close(net(x, t, context=hidden, context_mask=mask), y, rtol=0, atol=0)
    for i in range(B):
        row = slice(i, i + 1)
        kept = net(x[row], t[row], context=context[row][:, mask[i]])
        torch.testing.assert_close(kept, y[row])
    every = net(x, t, context=context, context_mask=torch.ones(B, T, dtype=torch.bool))
    torch.testing.assert_close(every, net(x, t, context=context))
    assert (every - y).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_time_scale(kind):
    x, t, _ = inputs(kind)
    y = perturb(make(kind, time_scale=1000.0))(x, t / 1000)
    torch.testing.assert_close(y, perturb(make(kind))(x, t), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(perturb(make(kind))(x, t.long()), perturb(make(kind))(x, t.floor()))


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_bits(kind):
    x, t, conditions = inputs(kind)
    runs = []
    for _ in range(2):
        net = perturb(make(kind, **ALL))
        y = net(x, t, **conditions)
        y.sum().backward()
        runs.append([y, *(p.grad for p in net.parameters())])
    torch.testing.assert_close(*runs, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_adam_lowers_the_loss(kind):
    """E[x0 | x_t] on two patterns told apart by their label, with noise of level t."""
    net = make(kind, classes=2)
    x0 = draw(2, 2, seed=7) if kind == "mlp" else draw(2, 1, 8, 8, seed=7)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    losses = []
    for step in range(40):
        label = torch.arange(16) % 2
        t = torch.linspace(0.1, 2, 16)
        sigma = t.view(-1, *(1,) * (x0.dim() - 1))
        x = x0[label] + sigma * draw(16, *x0.shape[1:], seed=step)
        loss = (net(x, t, label=label) - x0[label]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    assert sum(losses[-5:]) / 5 < 0.25 * losses[0]


MASK = torch.ones(B, T, dtype=torch.bool)
LABEL = torch.zeros(B, dtype=torch.int64)
WRONG = [
    ({"label": LABEL}, {}, "label needs a network made with classes > 0"),
    ({"context": draw(B, T, E)}, {}, "context needs a network made with context_width > 0"),
    ({"concat": draw(B, C2, 8, 8)}, {}, "concat needs a network made with concat_channels > 0"),
    ({"label": LABEL[:1]}, ALL, r"label must be \[3\], got \(1,\)"),
    ({"context": draw(B, T, E + 1)}, ALL, r"context must be \[3, \*, 6\], got \(3, 5, 7\)"),
    ({"context": draw(T, E)}, ALL, r"context must be \[3, \*, 6\], got \(5, 6\)"),
    ({"context_mask": MASK}, ALL, r"context_mask must be \[3, 0\], got \(3, 5\)"),
    ({"context": draw(B, T, E), "context_mask": MASK[:, 1:]}, ALL, r"must be \[3, 5\], got"),
    ({"concat": draw(B, C2, 8, 7)}, ALL, r"concat must be \[3, 2, 8, 8\], got"),
    ({"x": draw(B, 2, 8, 8)}, {}, r"x must be \[\*, 1, .*\], got \(3, 2, 8, 8\)"),
    ({"x": draw(B, 64)}, {}, r"x must be \[\*, 1, .*\], got \(3, 64\)"),
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
    with pytest.raises(ValueError, match="heads must divide"):
        nets.DiT(1, 8, width=10)
    with pytest.raises(ValueError, match=r"patch must divide the size \(7, 8\), got 2"):
        nets.DiT(1, (7, 8))
    with pytest.raises(ValueError, match="context_width must be 0"):
        nets.MLP(2, context_width=3)
    with pytest.raises(ValueError, match=r"MLP: x must be \[\*, 2\], got \(3, 3\)"):
        nets.MLP(2)(draw(B, 3), torch.zeros(B))
    for label in (-2, CLASSES):
        with pytest.raises(IndexError):
            make("mlp", classes=CLASSES)(draw(B, 2), torch.zeros(B), label=LABEL + label)
