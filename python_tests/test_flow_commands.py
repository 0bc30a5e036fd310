"""Flows by command: points and pictures, the same bits after a stop, densities, refusals."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from test_data import write_folder

from gmkernels import data, pictures, runs, train
from gmkernels.__main__ import main

SMALL = ["-o", "layers=1", "-o", "width=8", "--threads", "1", "--batch-size", "20"]
STEPS = ["--steps", "5", "--every", "2"]


def start(folder, name, *args):
    return main(["train", name, "--out", str(folder), *SMALL, *STEPS, *map(str, args)])


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


@pytest.mark.parametrize("source", ["moons", "digits"])
@pytest.mark.parametrize("name", ["realnvp", "glow", "nsf", "maf"])
def test_trains_and_resumes_at_the_same_bits(tmp_path, monkeypatch, name, source):
    """Stopped after a checkpoint: what ActNorm began with is not begun again."""
    whole, broken, count = tmp_path / "a", tmp_path / "b", iter(range(9))
    options = ("--data", source, *(("-o", "classes=2") if source == "moons" else ()))
    assert start(whole, name, *options) == 0
    real = train.training_step

    def stopping(*args, **kwargs):
        if next(count) == 3:
            raise Stop
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "training_step", stopping)
    with pytest.raises(Stop):
        start(broken, name, *options)
    monkeypatch.undo()
    assert main(["train", name, "--out", str(broken), "--resume"]) == 0
    assert bits(broken) == bits(whole)
    with open(whole / runs.METRICS, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [2, 4, 5]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    config, model = runs.load(whole)
    assert config.options["layers"] == 1
    x = runs.sample(config, model, 7, 1)
    assert x.shape == ((7, 2) if source == "moons" else (7, 8, 8))


def test_moons(tmp_path, capsys):
    """Nats a point; the test part is fresh, and its entropy is the known one."""
    assert start(tmp_path / "a", "maf", "--data", "moons") == 0
    assert "mean of the 10000 test points: " in capsys.readouterr().out
    config = json.loads((tmp_path / "a" / runs.CONFIG).read_text())
    assert (config["height"], config["width"], config["levels"]) == (1, 2, 0)
    points = data.moons()
    assert points.train.shape == (20_000, 2)
    assert points.test.shape == (10_000, 2)
    assert not (points.test[:100, None] == points.train[None]).all(-1).any()
    log_p = moons_log_density(points.test.double())
    assert abs(-float(log_p.mean()) - moons_entropy()) < 5 * float(log_p.std()) / 100
    assert abs(moons_entropy() - 1.0076) < 1e-4
    named = moons_log_density(points.test[:50].double() + 10)
    assert (named < log_p[:50]).all()


def moons_log_density(x):
    """log p of two moons with noise 0.1: two half circles, each a sum over 400 angles."""
    angle = (torch.arange(400, dtype=torch.float64) + 0.5) * (math.pi / 400)
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
    square = torch.cdist(x, torch.cat([upper, lower])).square()
    return (-square / 0.02).logsumexp(1) - math.log(800 * 2 * math.pi * 0.01)


def moons_entropy():
    """The integral of -p log p, midpoints 0.02 apart."""
    across, up = (
        torch.arange(a, b, 0.02, dtype=torch.float64) for a, b in ((-1.7, 2.7), (-1.2, 1.7))
    )
    log_p = moons_log_density(torch.cartesian_prod(across, up))
    assert abs(float(log_p.exp().sum()) * 0.02**2 - 1) < 1e-6
    return float((-log_p * log_p.exp()).sum()) * 0.02**2


def test_nsf_nears_the_entropy_of_moons():
    """150 steps come within 0.25 nats of what no model can beat."""
    options = {"layers": 2, "dropout": 0.0}
    numbers = 1, 2, 0, 150, 200, 1e-2, 1e-2, 0, 150, 1  # height to threads
    config = runs.Config("nsf", "moons", options, *numbers, "cpu")
    torch.set_num_threads(1)
    model, points = runs.build(config), data.moons()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    for step in range(config.steps):
        index = data.batch_indices(20_000, 200, seed=1, step=step)
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(config, step)
        train.training_step(model, optimizer, points.train[index])
    nats = train.test_score(config, model, points)
    assert 1.0076 - 0.05 < nats < 1.0076 + 0.25


def test_samples_of_a_class(tmp_path, capsys):
    run, picture = tmp_path / "a", tmp_path / "a.png"
    assert start(run, "nsf", "--data", "moons", "-o", "classes=2") == 0
    made = {}
    for label in ((), ("--class", 0), ("--class", 1)):
        args = ["sample", run, "--n", 50, *label, "--out", picture]
        assert main([str(a) for a in args]) == 0
        made[label] = picture.read_bytes()
    assert len(set(made.values())) == 3
    config, model = runs.load(run)
    x, plots = runs.sample(config, model, 50, 0, label=0), []
    assert not torch.equal(x, runs.sample(config, model, 50, 0, label=1))
    for label in (0, 1):
        runs.save_samples(picture, config, model, x, label=label)
        plots.append(picture.read_bytes())
    assert plots[0] != plots[1], "the density is not that of the class"
    ask = ("sample", run, "--out", picture)
    assert "--class must lie in [0, 2), got 2" in refused(capsys, *ask, "--class", 2)
    for wrong in (("--sampler", "ddim"), ("--steps", 5), ("--guidance", 2), ("--text", "a")):
        said = refused(capsys, *ask, *wrong)
        assert f"{wrong[0]} cannot be asked of a nsf" in said
        assert said.endswith("it takes --class\n")
    plain = tmp_path / "b"
    assert start(plain, "nsf", "--data", "digits") == 0
    said = refused(capsys, "sample", plain, "--out", picture, "--class", 1)
    assert "--class needs a model of classes, as -o classes=10 trains" in said


def test_train_refuses(tmp_path, capsys):
    def said(name, *args):
        few = ("--batch-size", 20, "--out", tmp_path / "a")
        return refused(capsys, "train", name, *few, *args)

    few = said("nsf", "--data", "digits", "-o", "classes=3")
    assert "--option classes must be 0 or at least 10, the classes of digits, got 3" in few
    points = said("vae", "--data", "moons")
    assert (
        "--data moons holds points, a vae takes images; points can train realnvp, glow, nsf, maf"
        in points
    )
    assert "same result twice, got Dropout" in said("maf", "-o", "reconstruct=true")
    (tmp_path / "images").mkdir()
    write_folder(tmp_path / "images", n=40)
    assert "maf takes any" in said("glow", "--data", tmp_path / "images")
    assert start(tmp_path / "b", "maf", "--data", tmp_path / "images") == 0
    assert not (tmp_path / "a").exists()


def test_density_picture(tmp_path):
    """Dark where the density is high, the axes as the points lie."""
    from matplotlib import image

    def log_prob(x):
        return -50 * (x - torch.tensor([1.0, 0.0])).square().sum(1)

    x = torch.rand(400, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = torch.cat([x, torch.tensor([[math.nan, 0.0]])])
    for name in ("a", "b"):
        pictures.save_points(tmp_path / f"{name}.png", x, log_prob, side=50)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    shown = image.imread(tmp_path / "a.png")[..., :3]
    assert shown.shape == (600, 720, 3)
    blue = (shown[..., 2] - shown[..., 0]) * (shown.sum(-1) > 0.5)
    down, across = np.unravel_index(blue[:, :560].argmax(), (600, 560))
    assert abs(down - 300) < 60, "the bump is half way up"
    assert across > 330, "and to the right"
