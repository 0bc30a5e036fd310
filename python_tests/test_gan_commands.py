"""GANs by command: pictures and points, the same bits after a stop, scores, refusals."""

import csv
import math

import pytest
import torch
from test_data import write_folder

from gmkernels import checkpoint, data, metrics, noise, runs, toys, train
from gmkernels.__main__ import main
from gmkernels.models import gan
from gmkernels.recipes import RECIPES

SMALL = ["-o", "width=8", "--threads", "1", "--batch-size", "20", "--steps", "5", "--every", "2"]
RUNS = [
    ("gan", "digits", "classes=10"),
    ("gan", "ring", "spectral=true"),
    ("wgan", "ring", "critic_steps=2"),
    ("wgan_gp", "digits", "critic_steps=2"),
    ("wgan_gp", "ring", "classes=8"),
    ("cyclegan", "digits", "pool=15"),
]


def start(folder, name, source, option):
    args = ["train", name, "--data", source, "-o", option, "--out", str(folder), *SMALL]
    return main(args)


def refused(capsys, *args):
    with pytest.raises(SystemExit):
        main([str(a) for a in args])
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def _threads():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def bits(folder):
    names = runs.CHECKPOINT, runs.METRICS, runs.SAMPLES
    return [(folder / name).read_bytes() for name in names]


class Stop(BaseException):
    pass


@pytest.mark.parametrize(("name", "source", "option"), RUNS)
def test_trains_and_resumes_at_the_same_bits(tmp_path, monkeypatch, name, source, option):
    """Stopped after a checkpoint: averages, spectral norms and pools go on as they were."""
    whole, broken, count = tmp_path / "a", tmp_path / "b", iter(range(9))
    assert start(whole, name, source, option) == 0
    real = train.learning_rate

    def stopping(*args, **kwargs):
        if next(count) == 3:
            raise Stop
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "learning_rate", stopping)
    with pytest.raises(Stop):
        start(broken, name, source, option)
    monkeypatch.undo()
    assert checkpoint.read(broken / runs.CHECKPOINT)[1]["step"] == 2
    assert main(["train", name, "--out", str(broken), "--resume"]) == 0
    assert bits(broken) == bits(whole)
    with open(whole / runs.METRICS, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [2, 4, 5]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    config, model = runs.load(whole)
    x = runs.sample(config, model, 7, 1)
    assert x.shape == ((7, 2) if source == "ring" else (7, 8, 8))
    assert torch.equal(x, runs.sample(config, model, 7, 1))
    assert not torch.equal(x, runs.sample(config, model, 7, 2))


def test_ring():
    """2 x 10^4 and 10^4 points, whose labels are their Gaussians."""
    points = data.load("ring")
    assert (points.train.shape, points.test.shape) == ((20_000, 2), (10_000, 2))
    for x, y in ((points.train, points.train_labels), (points.test, points.test_labels)):
        off = x - toys.ring_modes()[y]
        assert (off.std(0) - 0.02).abs().max() < 1e-3
        assert off.abs().max() < 0.15
    assert not (points.test[:100, None] == points.train[None]).all(-1).any()


def test_score_is_that_of_the_samples(tmp_path):
    """One set of samples for all test rows, so that how they are cut does not matter."""
    assert start(tmp_path / "a", "gan", "ring", "classes=8") == 0
    config, model = runs.load(tmp_path / "a")
    with torch.no_grad():  # else the samples lie so near to each other that any would do
        for p in model.averaged.parameters():
            p *= 4
    points = data.ring()
    key = runs.fold(config, runs.TEST)
    samples = model.sample(1000, seed=key)
    want = metrics.energy_score(points.test, samples).double().mean()
    assert abs(train.test_score(config, model, points) - float(want)) < 1e-5


def test_samples_of_a_class(tmp_path, capsys):
    run, picture = tmp_path / "a", tmp_path / "a.png"
    assert start(run, "wgan_gp", "ring", "classes=8") == 0
    made = {}
    for label in ((), ("--class", "0"), ("--class", "5")):
        assert main(["sample", str(run), "--n", "50", *label, "--out", str(picture)]) == 0
        made[label] = picture.read_bytes()
    assert len(set(made.values())) == 3
    ask = ("sample", run, "--out", picture)
    assert "--class must lie in [0, 8), got 8" in refused(capsys, *ask, "--class", 8)
    assert "--steps cannot be asked of a wgan_gp" in refused(capsys, *ask, "--steps", 5)


def test_cyclegan_translates_test_pictures(tmp_path, capsys):
    run, picture = tmp_path / "a", tmp_path / "a.png"
    assert start(run, "cyclegan", "digits", "domain=rotated") == 0
    config, model = runs.load(run)
    images = data.digits()
    index = data.batch_indices(447, 9, seed=4, step=0)
    want = model.translate(images.unit(images.test[index]))[:, 0]
    torch.testing.assert_close(runs.sample(config, model, 9, 4), want.clamp(0, 1))
    found = refused(capsys, "sample", run, "--n", 448, "--out", picture)
    assert "--n must be at most the 447 test pictures, got 448" in found
    assert "--class cannot be asked of a cyclegan" in refused(
        capsys, "sample", run, "--class", 1, "--out", picture
    )


def test_refusals(tmp_path, capsys):
    out = ("--out", tmp_path / "a")
    found = refused(capsys, "train", "cyclegan", "--data", "ring", *out)
    assert "ring holds points, a cyclegan takes images" in found
    found = refused(capsys, "train", "gan", "--data", "ring", "-o", "classes=3", *out)
    assert "classes must be 0 or at least 8" in found
    found = refused(capsys, "train", "gan", "-o", "loss=best", *out)
    assert "loss must be one of minimax, non_saturating" in found
    found = refused(capsys, "train", "wgan", "--batch-size", 4, *out)
    assert "--batch-size must be at least 5 for this wgan, got 4" in found
    found = refused(capsys, "train", "cyclegan", "--batch-size", 1, *out)
    assert "--batch-size must be at least 2 for this cyclegan, got 1" in found
    assert not (tmp_path / "a").exists()


def test_cyclegan_on_few_pictures(tmp_path):
    """samples.png shows the test pictures that there are."""
    write_folder(tmp_path, n=6, height=4)
    source, run = f"idx:{tmp_path}", tmp_path / "a"
    args = ["-o", "width=2", "--batch-size", "4", "--steps", "1", "--threads", "1"]
    assert main(["train", "cyclegan", "--data", source, *args, "--out", str(run)]) == 0
    assert (run / runs.SAMPLES).is_file()


@pytest.mark.parametrize("name", ["gan", "wgan_gp"])
def test_ring_gets_nearer(name):
    """80 small steps halve how far the energy score is above that of the ring itself."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = RECIPES[name].build(2, 0, width=32, weight=0.1, average=0.8)
    lr, k = 5e-3, model.critic_steps
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=RECIPES[name].betas)
    test, key = toys.ring(500, seed=1, std=0.02), noise.key(0)
    best = float(metrics.energy_score(test, toys.ring(1000, seed=2, std=0.02)).mean())
    scores = [float(RECIPES[name].score(model, test, key).mean()) - best]
    for step in range(80):
        gan.update(model, optimizer, toys.ring(64 * k, seed=step + 3, std=0.02), seed=step)
    scores.append(float(RECIPES[name].score(model.eval(), test, key).mean()) - best)
    assert 0 < scores[1] < scores[0] / 2
