"""Autoencoders: PCA, the corruption's statistics, sparsity, masking; their runs by command."""

import pytest
import torch
from torch import nn

import gmkernels as gm
from gmkernels import data
from gmkernels.__main__ import main
from gmkernels.models import autoencoder
from gmkernels.models.autoencoder import Autoencoder, DenoisingAutoencoder, SparseAutoencoder
from gmkernels.models.masked_autoencoder import Block, MaskedAutoencoder, image_masked_autoencoder
from gmkernels.recipes import RECIPES
from gmkernels.spec import filled

NAMES = ("autoencoder", "denoising_autoencoder", "masked_autoencoder", "sparse_autoencoder")


def networks(features=6, latents=3):
    torch.manual_seed(0)
    return nn.Linear(features, latents), nn.Linear(latents, features)


def test_the_linear_one_finds_pca():
    scales = torch.tensor([5.0, 3.0, 1.0, 0.5]).double()
    rotation, _ = torch.linalg.qr(filled((4, 4), torch.float64, "cpu", 1))
    x = (filled((100, 4), torch.float64, "cpu", 2) * scales) @ rotation + 2
    torch.manual_seed(1)
    model = autoencoder.linear_autoencoder(4, 2).double()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=150, tolerance_grad=1e-8, tolerance_change=1e-13,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        loss = model.loss(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    principal = vectors[:, -2:] @ vectors[:, -2:].T
    torch.testing.assert_close(model.loss(x), values[:-2].sum(), rtol=1e-6, atol=0)
    matrix = model.decoder.weight @ model.encoder.weight  # the projection itself, not a basis
    torch.testing.assert_close(matrix, principal, rtol=0, atol=2e-3)
    expected = (x - x.mean(0)) @ principal + x.mean(0)
    torch.testing.assert_close(model.reconstruct(x), expected, rtol=0, atol=1e-2)


def test_error_is_a_sum_over_features_and_the_loss_a_mean_over_rows():
    model = Autoencoder(*networks())
    x = filled((5, 6), torch.float32, "cpu", 1)
    y = model.decoder(model.encoder(x))
    torch.testing.assert_close(model.error(x), ((x - y) ** 2).sum(1))
    torch.testing.assert_close(model.loss(x), ((x - y) ** 2).sum() / 5)
    torch.testing.assert_close(model.loss(x.repeat(4, 1)), model.loss(x))
    assert torch.equal(model.encode(x), model.encoder(x))


def test_there_is_no_density():
    for model in (Autoencoder(*networks()), MaskedAutoencoder(4, 2)):
        assert model.log_prob_kind == "none"
        with pytest.raises(NotImplementedError, match=r"no model of p\(x\); error\(\) says"):
            model.log_prob(torch.zeros(1, 6))
        with pytest.raises(NotImplementedError, match="no prior over latents; train a VAE"):
            model.sample(3, seed=1)


def test_corruption():
    x = gm.uniform((400, 50), seed=1) + 1
    model = DenoisingAutoencoder(*networks(50), std=0.5, dropout=0.25)
    seen = model.seen(x, seed=2)
    kept = seen != 0
    assert kept.float().mean() == pytest.approx(0.75, abs=0.015)
    change = (seen - x)[kept]
    assert change.mean() == pytest.approx(0, abs=0.02)
    assert change.std() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(model.seen(x, seed=2), seen)
    assert torch.equal(model.seen(x[7:9], seed=gm.noise.key(2, 7)), seen[7:9])
    assert not torch.equal(model.seen(x, seed=3), seen)
    y = model.decoder(model.encoder(seen))
    torch.testing.assert_close(model.error(x, seed=2), (y - x).square().sum(1))  # to the clean x
    model.std = model.dropout = 0.0
    assert torch.equal(model.seen(x, seed=2), x)
    model.dropout = 1.0
    assert not model.seen(x, seed=2).any()


def test_the_best_linear_denoiser_shrinks():
    # x ~ N(0, s^2): the best g f of x + N(0, n^2) is s^2 / (s^2 + n^2) of it.
    x = 2 * filled((20_000, 3), torch.float32, "cpu", 1)
    model = DenoisingAutoencoder(nn.Linear(3, 3), nn.Identity(), std=1.0)
    with torch.no_grad():
        seen = model.seen(x, seed=1)
        solved = torch.linalg.lstsq(seen, x).solution
        model.encoder.weight.copy_(solved.T)
        model.encoder.bias.zero_()
    torch.testing.assert_close(solved, torch.eye(3) * 4 / 5, rtol=0, atol=0.02)
    assert float(model.loss(x, seed=1).detach()) == pytest.approx(3 * 4 / 5, abs=0.05)


def test_sparse_loss_and_steering():
    encoder, decoder = networks(6, 8)
    model = SparseAutoencoder(nn.Sequential(encoder, nn.ReLU()), decoder)
    x = filled((9, 6), torch.float32, "cpu", 1)
    f = model.encode(x)
    expected = (model.error(x) + f.abs().sum(1)).mean()
    torch.testing.assert_close(model.loss(x), expected)
    model.sparsity = 0.25
    torch.testing.assert_close(model.loss(x), (model.error(x) + 0.25 * f.sum(1)).mean())
    torch.testing.assert_close(model.active(x), (f > 0).float().mean(0))
    steered = model.steer(x, {2: 5.0, 4: 0.0})
    effect = (5 - f[:, 2:3]) * decoder.weight[:, 2] - f[:, 4:5] * decoder.weight[:, 4]
    torch.testing.assert_close(steered, model.reconstruct(x) + effect)
    assert torch.equal(model.encode(x), f)
    with pytest.raises(ValueError, match="latents are 0 to 7, got 8"):
        model.steer(x, {8: 1.0})


def test_a_higher_price_leaves_fewer_latents_on():
    torch.manual_seed(0)
    codes = gm.uniform((300, 10), seed=1).where(
        gm.uniform((300, 10), seed=2) < 0.2, torch.tensor(0)
    )
    x = codes @ filled((10, 12), torch.float32, "cpu", 3)
    on = []
    for sparsity in (0.0, 0.3, 100.0):
        torch.manual_seed(0)
        model = autoencoder.image_sparse_autoencoder(12, 2, latent_dim=20, sparsity=sparsity)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            model.loss(x).backward()
            optimizer.step()
        on.append(float(model.encode(x).gt(1e-3).float().sum(1).mean().detach()))
    assert on[0] > 1.3 * on[1]
    assert on[2] < 0.1


def masked(**options):
    torch.manual_seed(0)
    return MaskedAutoencoder(8, 2, width=8, depth=1, heads=2, decoder_width=8, **options)


def test_patches_go_round():
    model = masked()
    x = torch.arange(128.0).view(2, 64)
    patches = model.cut(x)
    assert patches.shape == (2, 16, 4)
    assert patches[0, 1].tolist() == [2, 3, 10, 11]  # the second patch of the first two rows
    assert torch.equal(model.join(patches), x)


@pytest.mark.parametrize(("hidden", "count"), [(0.5, 8), (0.75, 12), (0.01, 1), (0.99, 15)])
def test_masks(hidden, count):
    model = masked(hidden=hidden)
    x = gm.uniform((200, 64), seed=1)
    mask = model.hidden_mask(model.order(x, seed=3))
    assert (mask.sum(1) == count).all()
    assert mask.float().mean(0).sub(count / 16).abs().max() < 0.15  # each patch alike
    part = model.hidden_mask(model.order(x[5:9], seed=gm.noise.key(3, 5)))
    assert torch.equal(part, mask[5:9])


def test_the_hidden_is_not_seen_and_the_loss_is_on_it_alone():
    model = masked()
    x = gm.uniform((6, 64), seed=1).requires_grad_()
    order = model.order(x, seed=4)
    hidden = model.hidden_mask(order)[..., None].expand(6, 16, 4)
    prediction = model.predict(x, order)
    (dx,) = torch.autograd.grad(prediction.square().sum(), x)
    dx = model.cut(dx)
    assert not dx[hidden].any()
    assert (dx[~hidden] != 0).all()
    expected = ((prediction - model.cut(x)) ** 2 * hidden).sum((1, 2))
    torch.testing.assert_close(model.error(x, seed=4), expected)
    restored, seen = model.cut(model.restore(x, seed=4)), model.cut(model.seen(x, seed=4))
    assert torch.equal(restored[~hidden], model.cut(x)[~hidden])
    assert torch.equal(restored[hidden], prediction[hidden])
    assert torch.equal(seen[~hidden], model.cut(x)[~hidden])
    assert (seen[hidden] == 0.5).all()


def test_places_of_patches_matter_and_their_order_does_not():
    model = masked()
    x, y = gm.uniform((6, 64), seed=1), gm.uniform((6, 64), seed=2)
    order = model.order(x, seed=4)
    other = order.clone()
    other[:, : model.visible] = other[:, : model.visible].flip(1)
    torch.testing.assert_close(model.predict(x, other), model.predict(x, order))
    # Row b of a batch is seen under its own mask.
    alone = model.predict(x[2:3], order[2:3])
    torch.testing.assert_close(model.predict(torch.cat([y[:2], x[2:]]), order)[2:3], alone)
    assert model.encode(x).shape == (6, 8)
    prediction = model.predict(x, order)
    places = torch.autograd.grad(prediction.sum(), (model.position, model.decoder_position))
    assert all(place.abs().sum(1).gt(0).all() for place in places)
    last = prediction.gather(1, order[:, -2:, None].expand(6, 2, 4))  # two hidden patches
    assert (last[:, 0] - last[:, 1]).abs().max() > 1e-3
    moved = model.join(model.cut(x).flip(1))
    assert (model.encode(moved) - model.encode(x)).abs().max() > 1e-3


def test_masked_training_beats_the_mean():
    images = data.digits()
    x = images.unit(images.train)[:, :64]
    # Two halves that are equal: a hidden patch is known where its twin is in sight.
    x = torch.cat([x.view(-1, 8, 8)[:, 2:6], x.view(-1, 8, 8)[:, 2:6]], 1).flatten(1)
    torch.manual_seed(0)
    model = image_masked_autoencoder(64, 17, patch=4, hidden=0.5, width=32, depth=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(60):
        optimizer.zero_grad()
        loss = model.loss(x[step % 5 * 200 :][:200], seed=step)
        loss.backward()
        optimizer.step()
    mean = (x - x.mean(0)).square().sum(1).mean() / 2
    assert loss < 0.9 * mean


@pytest.mark.parametrize("name", NAMES)
def test_runs(name, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["train", name, "--steps", "3", "--out", str(run), "--batch-size", "20"]
    assert main(command) == 0
    assert "squared error per image" in capsys.readouterr().out
    assert (run / "metrics.csv").read_text().startswith("step,loss,test_squared_error\n")
    assert (run / "samples.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        main(["sample", str(run), "--out", str(tmp_path / "x.png")])
    assert "which is no model of p(x) and draws nothing" in capsys.readouterr().err


def test_reconstructions_alternate_with_what_was_seen():
    images = data.digits()
    x = images.unit(images.test)
    model = autoencoder.image_denoising_autoencoder(64, 17, hidden=8).eval()
    key = gm.noise.key(1)
    picture = autoencoder.reconstructions(model, x, key)
    assert picture.shape == (64, 64)
    seen, restored = model.seen(x[:32], seed=key), model.restore(x[:32], seed=key)
    assert torch.equal(picture[16:24], seen[8:16])
    assert torch.equal(picture[24:32], restored[8:16])
    assert len(autoencoder.reconstructions(model, x[:11], key)) == 22
    assert set(NAMES) <= RECIPES.keys()


REFUSED = [
    (lambda: DenoisingAutoencoder(*networks(), std=-1), "std must be >= 0 .* got -1 and 0.0"),
    (lambda: DenoisingAutoencoder(*networks(), dropout=1.5), r"dropout lie in \[0, 1\], got 0.3 a"),
    (lambda: SparseAutoencoder(*networks(), sparsity=-1.0), "sparsity must be >= 0, got -1.0"),
    (lambda: MaskedAutoencoder(8, 3), "patch must divide side .* got patch 3 and side 8"),
    (lambda: MaskedAutoencoder(8, 8), "into 4 patches or more"),
    (lambda: MaskedAutoencoder(8, 2, hidden=1.0), r"hidden must lie in \(0, 1\), got 1.0"),
    (lambda: Block(10, 4), "heads must divide the width 10, got 4"),
    (lambda: image_masked_autoencoder(63, 17), "must be square, got 63 pixels"),
    (lambda: autoencoder.image_autoencoder(64, 17, latent_dim=0), "latent_dim must be >= 1, got 0"),
    (lambda: autoencoder.image_autoencoder(64, 17, hidden=-1), "hidden must be >= 0, got -1"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
