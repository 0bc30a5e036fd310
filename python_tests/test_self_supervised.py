"""Self-supervised models: laws of their losses, views by noise, commands, features."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from gmkernels import data, noise, nt_xent, runs, train
from gmkernels.__main__ import main
from gmkernels.models.augment import Augment
from gmkernels.models.image_features import image_barlow_twins, image_byol, image_simclr
from gmkernels.models.self_supervised import BYOL, CLIP, BarlowTwins, SimCLR, cross_correlation
from gmkernels.recipes import RECIPES
from gmkernels.spec import filled

F64 = torch.float64
STILL = {"shift": 0.0, "turn": 0.0, "scale": 0.0, "contrast": 0.0, "erase": 0.0, "std": 0.0}
BUILDERS = [image_simclr, image_barlow_twins, image_byol]
# Columns of a Hadamard matrix without the first: means 0, variances 1, products 0, all exactly.
HADAMARD = torch.tensor(
    [[1 - 2 * ((i & j).bit_count() % 2) for j in range(1, 8)] for i in range(8)], dtype=F64
)


def small(build, **options):
    torch.manual_seed(0)
    return build(64, 17, width=4, features=16, embedding=8, **options)


def digits(n: int) -> Tensor:
    images = data.digits()
    return images.unit(images.train[:n])


def test_augment_without_ranges_changes_nothing():
    x = filled((4, 30), torch.float32, "cpu", 1)
    torch.testing.assert_close(Augment(5, 6, **STILL)(x, seed=3), x, rtol=0, atol=2e-6)


def test_augment_is_a_function_of_seed_and_row():
    x, augment = digits(6), Augment(8, 8)
    whole = augment(x, seed=5)
    assert torch.equal(whole, augment(x, seed=5))
    assert (whole - augment(x, seed=6)).abs().amax(1).min() > 0.1
    torch.testing.assert_close(whole[2:4], augment(x[2:4], seed=noise.key(5, offset=2)))


def test_augment_does_what_it_says():
    """Shift moves mass by no more than it may, contrast multiplies, erase leaves a square of 0."""
    spot = torch.zeros(200, 9, 9)
    spot[:, 4, 4] = 1
    ones = torch.ones(200, 81)
    moved = Augment(9, 9, **(STILL | {"shift": 1.0}))(spot.flatten(1), seed=1).view(200, 9, 9)
    place = torch.arange(9.0) - 4
    for axis in (1, 2):
        centre = (moved.sum(axis) * place).sum(1)
        assert 0.8 < centre.abs().max() <= 1.0001
        assert abs(centre.mean()) < 0.2
    torch.testing.assert_close(moved.sum((1, 2)), torch.ones(200))
    lit = Augment(9, 9, **(STILL | {"contrast": 0.3}))(ones, seed=1)
    assert 0.7 <= lit.min() < 0.75
    assert 1.25 < lit.max() <= 1.3
    torch.testing.assert_close(lit.amin(1), lit.amax(1))
    holes = Augment(9, 9, **(STILL | {"erase": 1 / 3}))(ones, seed=1).view(200, 9, 9) == 0
    assert holes.flatten(1).sum(1).max() == 9
    sides = holes.any(1).sum(1), holes.any(2).sum(1)
    assert torch.equal(sides[0] * sides[1], holes.flatten(1).sum(1))
    noisy = Augment(9, 9, **(STILL | {"std": 0.1}))(ones, seed=1)
    assert abs(float((noisy - 1).std()) - 0.1) < 0.005


def test_augment_refuses():
    for bad in ({"std": -1.0}, {"scale": 1.0}):
        with pytest.raises(ValueError, match="must be >= 0 and scale < 1"):
            Augment(8, 8, **bad)
    for x in (torch.zeros(2, 63), torch.zeros(2, 64, dtype=torch.int64)):
        with pytest.raises(ValueError, match="floats"):
            Augment(8, 8)(x, seed=1)


def test_barlow_twins_is_exactly_0_at_the_identity():
    for dtype in (torch.float32, F64):
        z = HADAMARD.to(dtype)
        assert torch.equal(cross_correlation(z, z), torch.eye(7, dtype=dtype))
        assert BarlowTwins.distance(cross_correlation(3 * z + 1, z), 0.005) < 1e-12
        assert float(BarlowTwins.distance(cross_correlation(z, z), 0.005)) == 0.0
    assert float(BarlowTwins.distance(cross_correlation(HADAMARD, -HADAMARD), 0.005)) == 28.0


def test_cross_correlation_is_numpys():
    x, y = (filled((50, 3), F64, "cpu", seed) + 5 for seed in (1, 2))
    expected = torch.corrcoef(torch.cat([x, y], 1).T)[:3, 3:]
    torch.testing.assert_close(cross_correlation(x, y), expected)
    c = torch.tensor([[0.5, 0.2], [-0.1, 1.0]], dtype=F64)
    assert float(BarlowTwins.distance(c, 0.1)) == pytest.approx(0.25 + 0.1 * (0.04 + 0.01))


def test_constant_features_have_no_correlation_and_no_gradient():
    """Not even where a mean in float32 is not quite the constant."""
    x = filled((11, 3), torch.float32, "cpu", 1)
    x[:, 1] = 1234.567
    x.requires_grad_()
    c = cross_correlation(x, x)
    assert (c[1] == 0).all()
    assert (c[:, 1] == 0).all()
    BarlowTwins.distance(c, 0.005).backward()
    assert x.grad.isfinite().all()
    assert (x.grad[:, 1] == 0).all()
    assert (x.grad[:, 0] != 0).any()
    with pytest.raises(ValueError, match="B >= 2"):
        cross_correlation(x[:1], x[:1])


def test_cross_correlation_is_float32_under_autocast():
    z = HADAMARD.float()
    with torch.autocast("cpu", torch.bfloat16):
        c = cross_correlation(z.bfloat16(), 1.01 * z)
    assert c.dtype == torch.float32
    torch.testing.assert_close(c, torch.eye(7), rtol=0, atol=1e-6)


def test_simclr_is_nt_xent_of_two_views():
    model, x = small(image_simclr, temperature=0.3).eval(), digits(9)
    first, second = model.views(x, seed=4)
    assert not torch.equal(first, second)
    expected = nt_xent(model.embed(first), model.embed(second), temperature=0.3)
    assert torch.equal(model.losses(x, seed=4), expected)
    assert torch.equal(model.loss(x, seed=4), expected.mean())
    torch.testing.assert_close(model.features(x), model.encoder(x))


def byol(decay: float) -> BYOL:
    torch.manual_seed(0)
    parts = nn.Linear(64, 8), nn.Linear(8, 4), nn.Linear(4, 4)
    return BYOL(*parts, Augment(8, 8), decay=decay)


def test_byol_follows_its_formula():
    model, x = byol(0.9), digits(5)
    model.target[0].weight.data.add_(0.1)
    first, second = model.views(x, seed=2)
    expected = torch.zeros(5)
    for here, there in ((first, second), (second, first)):
        q = nn.functional.normalize(model.predictor(model.embed(here)))
        z = nn.functional.normalize(model.target(there))
        expected = expected + (q - z).square().sum(1)  # 2 - 2 cos
    losses = model.losses(x, seed=2)
    torch.testing.assert_close(losses, expected)
    assert losses.min() >= 0
    assert losses.max() <= 8
    model.loss(x, seed=2).backward()
    assert all(p.grad is None for p in model.target.parameters())
    assert all(p.grad is not None for p in model.encoder.parameters())


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_byol_target_is_an_average_of_weights(decay):
    model = byol(decay)
    before = copy.deepcopy(model.target)
    for p in (*model.encoder.parameters(), *model.projector.parameters()):
        p.data.add_(1.0)
    model.update()
    for slow, old in zip(model.target.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(slow, old + (1 - decay))
    assert not any(p.requires_grad for p in model.target.parameters())
    with pytest.raises(ValueError, match="decay"):
        byol(1.5)


def test_clip_learns_names_and_temperature():
    """Pictures and their classes' vectors: names the classes of pictures that it has seen."""
    images = data.digits()
    keep = images.train_labels.unique(return_inverse=True)[1]
    first = [int((keep == label).nonzero()[0]) for label in range(10)]
    x, y = images.unit(images.train[first]), torch.eye(10)
    torch.manual_seed(0)
    model = CLIP(nn.Linear(64, 6), nn.Linear(10, 6), temperature=0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.loss(x, y)
        loss.backward()
        optimizer.step()
        model.update()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert torch.equal(model.logits(x, y).argmax(1), torch.arange(10))
    assert 0.01 <= model.temperature().item() < 0.4
    model.log_temperature.data.fill_(-9.0)
    model.update()
    assert model.temperature().item() == pytest.approx(0.01)


@pytest.mark.parametrize("build", BUILDERS)
def test_has_no_density_and_says_why(build):
    model = small(build)
    assert model.log_prob_kind == "none"
    with pytest.raises(NotImplementedError, match=r"features of x, not p\(x\)"):
        model.log_prob(digits(2))
    with pytest.raises(NotImplementedError, match="no way back"):
        model.sample(3)
    for bad in ({"width": 0}, {"features": 0}):
        with pytest.raises(ValueError, match="width and features"):
            build(64, 17, **bad)
    with pytest.raises(ValueError, match="square"):
        build(60, 17)


@pytest.mark.parametrize("build", BUILDERS)
def test_loss_falls(build):
    """On the views of one batch, by more than a tenth."""
    model, x = small(build), digits(100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for step in range(25):
        key = noise.fold_in(noise.key(1), step)
        update = RECIPES["byol"].update if build is image_byol else train.training_step
        losses.append(float(update(model, optimizer, x, seed=key)))
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    if build is image_byol:
        first = small(build).target.state_dict()
        assert all((p != first[name]).any() for name, p in model.target.named_parameters())
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("name", ["simclr", "byol", "barlow_twins"])
def test_trains_by_command_and_resumes_at_the_same_bits(tmp_path, capsys, monkeypatch, name):
    whole, broken = tmp_path / "a", tmp_path / "b"
    options = ["-o", "width=2", "-o", "features=8", "-o", "embedding=4", "--threads", "1"]
    settings = ["--steps", "3", "--every", "2", "--batch-size", "20", *options]
    threads = torch.get_num_threads()
    try:
        assert main(["train", name, "--out", str(whole), *settings]) == 0
        assert "loss per image" in capsys.readouterr().out
        seen = iter(range(9))
        learning_rate = train.learning_rate

        def stopping(*args):
            if next(seen) == 2:
                raise KeyboardInterrupt
            return learning_rate(*args)

        monkeypatch.setattr(train, "learning_rate", stopping)
        assert main(["train", name, "--out", str(broken), *settings]) == 130
        monkeypatch.undo()
        assert main(["train", name, "--out", str(broken), "--resume"]) == 0
    finally:
        torch.set_num_threads(threads)
    for file in (runs.CHECKPOINT, runs.METRICS, runs.SAMPLES):
        assert (whole / file).read_bytes() == (broken / file).read_bytes()
    with pytest.raises(SystemExit):
        main(["sample", str(whole), "--n", "2", "--out", str(tmp_path / "a.png")])
    assert "no model of p(x)" in capsys.readouterr().err


def test_picture_is_queries_and_their_neighbours():
    model, x = small(image_simclr).eval(), digits(40)
    shown = RECIPES["simclr"].picture(model, x, noise.key(0)).view(8, 8, 64)
    assert torch.equal(shown[:, 0], x[torch.linspace(0, 39, 8).long()])
    f = nn.functional.normalize(model.features(shown.flatten(0, 1))).view(8, 8, -1)
    cosines = (f[:, :1] * f).sum(2)
    assert (cosines[:, :-1] >= cosines[:, 1:] - 1e-6).all()
    assert isinstance(model, SimCLR)
