"""The commands: the same bits after a kill, whole files always, one clear line for bad input."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import DEVICES
from test_data import write_folder
from torch import nn

from gmkernels import checkpoint, data, noise, pictures, runs, train
from gmkernels.__main__ import main
from gmkernels.models import vae
from gmkernels.recipes import parse_options

SMALL = ["-o", "hidden=8", "-o", "latent_dim=2", "--batch-size", "20", "--threads", "1"]
STEPS = ["--steps", "12", "--every", "5"]


def run(*args):
    return main([str(a) for a in args])


def start(folder, *args):
    return run("train", "vae", "--out", folder, *SMALL, *STEPS, *args)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert start(folder) == 0
    assert torch.equal(before, torch.get_rng_state()), "training moved torch's generator"
    return folder


@pytest.fixture(autouse=True)
def _threads():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def bits(folder):
    return [(folder / name).read_bytes() for name in (runs.CHECKPOINT, runs.METRICS, runs.SAMPLES)]


def test_a_run_leaves_its_files(finished):
    names = {runs.CONFIG, runs.METRICS, runs.CHECKPOINT, runs.SAMPLES}
    assert {p.name for p in finished.iterdir()} == names
    config = json.loads((finished / runs.CONFIG).read_text())
    assert config["steps"] == 12
    assert config["options"]["hidden"] == 8
    with open(finished / runs.METRICS, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [5, 10, 12]
    assert float(rows[-1]["test_nats"]) < float(rows[0]["test_nats"])
    assert checkpoint.read(finished / runs.CHECKPOINT)[1]["step"] == 12


def test_same_seed_same_bits_and_other_seed_others(finished, tmp_path):
    torch.manual_seed(99)
    start(tmp_path / "b")
    assert bits(tmp_path / "b") == bits(finished)
    start(tmp_path / "c", "--seed", "1")
    assert bits(tmp_path / "c") != bits(finished)


class Stop(BaseException):
    pass


@pytest.mark.parametrize("stop_at", [0, 3, 5, 7, 11])
def test_a_resumed_run_ends_at_the_same_bits(finished, tmp_path, monkeypatch, stop_at):
    folder = tmp_path / "b"
    whole_step, count = train.training_step, iter(range(100))

    def stopping(*args, **kwargs):
        if next(count) == stop_at:
            raise Stop
        return whole_step(*args, **kwargs)

    monkeypatch.setattr(train, "training_step", stopping)
    with pytest.raises(Stop):
        start(folder)
    monkeypatch.undo()
    assert (folder / runs.CHECKPOINT).exists() == (stop_at >= 5)
    assert run("train", "vae", "--out", folder, "--resume") == 0
    assert bits(folder) == bits(finished)


# Imports once, then forks one child a kill point. Files are synced and then their folder, two calls
# each: the config first, then checkpoint and metrics in turn.
KILLER = """
import os, signal, sys
import matplotlib.image, sklearn.datasets, torch._dynamo  # what a run imports late
from gmkernels.__main__ import main

def killed_run(at, left, args):
    real = getattr(os, at)
    def die(*given):
        nonlocal left
        left -= 1
        if left == 0:
            if at == "fsync":  # half of the file has reached the disk
                os.ftruncate(given[0], os.fstat(given[0]).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given)
    setattr(os, at, die)
    main(args)

folder, points, *args = sys.argv[1:]
for point in points.split():
    at, left = point.split(":")
    child = os.fork()
    if child == 0:
        killed_run(at, int(left), ["train", "vae", "--out", f"{folder}/{point}", *args])
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
# What is on disk after each: the step of the checkpoint, 0 for none yet, None for no run at all.
KILL_POINTS = {"replace:1": None, "fsync:3": 0, "fsync:7": 5, "replace:6": 10, "replace:7": 12}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-c", KILLER, str(folder), " ".join(KILL_POINTS), *SMALL, *STEPS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(KILL_POINTS), done.stderr
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("point", KILL_POINTS)
def test_a_killed_run_leaves_the_last_whole_checkpoint(finished, killed, point):
    folder, step = killed / point, KILL_POINTS[point]
    assert len(list(folder.glob("*.tmp"))) == 1
    assert (folder / runs.CONFIG).exists() == (step is not None)
    if step is None:
        return
    assert (folder / runs.CHECKPOINT).exists() == (step > 0)
    if step:
        assert checkpoint.read(folder / runs.CHECKPOINT)[1]["step"] == step
    assert run("train", "vae", "--out", folder, "--resume") == 0
    assert bits(folder) == bits(finished)
    assert not list(folder.glob("*.tmp"))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    checkpoint.write_atomically(path, b"old")
    monkeypatch.setattr(checkpoint.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        checkpoint.write_atomically(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert path.read_bytes() == b"old"


def test_checkpoint_restores_every_bit(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)  # no state of the optimizer for it
    tied = nn.ModuleDict({"net": model, "again": model[0]})
    optimizer = torch.optim.AdamW(tied.parameters(), lr=0.1)
    for _ in range(3):
        tied["net"](torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, tied, optimizer, {"step": 3})
    saved = path.read_bytes()

    for p in tied.parameters():
        p.data.zero_()
    fresh = torch.optim.AdamW(tied.parameters(), lr=0.1)
    assert checkpoint.restore(path, tied, fresh) == {"step": 3}
    checkpoint.save(path, tied, fresh, {"step": 3})
    assert path.read_bytes() == saved


def test_sample_is_a_function_of_the_seed(finished, tmp_path):
    from matplotlib import image

    pictures = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert (
            run("sample", finished, "--n", 5, "--seed", seed, "--out", tmp_path / f"{name}.png")
            == 0
        )
        pictures.append(image.imread(tmp_path / f"{name}.png"))
    assert pictures[0].shape[:2] == (4 * (2 * 9 - 1), 4 * (3 * 9 - 1))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_grid_holds_the_images(tmp_path):
    from matplotlib import image

    x = torch.rand(3, 40, 33, generator=torch.Generator().manual_seed(0))
    pictures.save_grid(tmp_path / "a.png", x)
    grid = torch.from_numpy(image.imread(tmp_path / "a.png")[..., 0].copy())
    assert grid.shape == (2 * 41 - 1, 2 * 34 - 1)
    found = torch.stack([grid[:40, :33], grid[:40, 34:], grid[41:, :33]])
    torch.testing.assert_close(found, x, atol=1 / 255, rtol=0)
    assert (grid[41:, 34:] == 1).all()


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_trains_on_a_folder_of_idx_files(tmp_path, likelihood):
    (tmp_path / "images").mkdir()
    write_folder(tmp_path / "images", n=40)
    data = f"idx:{tmp_path / 'images'}"
    option = f"likelihood={likelihood}"
    assert start(tmp_path / "b", "--data", data, "-o", option, "-o", "free_bits=0.1") == 0
    config, model = runs.load(tmp_path / "b")
    x = runs.sample(config, model, 3, 0)
    assert x.shape == (3, 3, 4)
    assert x.min() >= 0
    assert x.max() <= 1


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")
def test_trains_and_resumes_on_a_gpu(tmp_path):
    folder = tmp_path / "b"
    assert start(folder, "--device", "cuda") == 0
    assert runs.load(folder)[0].device == "cuda"
    assert run("train", "vae", "--out", folder, "--resume", "--device", "cuda") == 0


def test_digits_beat_the_histogram(tmp_path, capsys):
    """A per-pixel histogram has 106.4 nats an image; 2000 steps reach 89."""
    assert run("train", "vae", "--out", tmp_path / "b", "--steps", 300, "--every", 300) == 0
    assert "mean of the 447 test images: " in capsys.readouterr().out
    with open(tmp_path / "b" / runs.METRICS, newline="") as file:
        assert float(next(csv.DictReader(file))["test_nats"]) < 100


def test_test_nats_do_not_depend_on_how_the_images_are_cut(finished):
    config, model = runs.load(finished)
    images = data.digits()
    key = noise.fold_in(noise.key(config.seed), runs.TEST)
    with torch.no_grad():
        whole = -model.elbo(images.test, seed=key).double().mean()
    many = dataclasses.replace(images, test=images.test.repeat(3, 1))
    rows = -model.elbo(many.test, seed=key).detach().double().mean()
    assert abs(train.test_score(config, model, images) - float(whole)) < 1e-3
    model.eval()
    assert abs(train.test_score(config, model, many) - float(rows)) < 1e-3


def test_digits_vae_is_what_the_command_builds():
    found = parse_options(vae.image_vae, [])
    shapes = [p.shape for p in vae.digits_vae().parameters()]
    assert shapes == [p.shape for p in vae.image_vae(64, 17, **found).parameters()]


def refused(capsys, *args):
    """The one line that a refused command prints; the exit code is 2."""
    with pytest.raises(SystemExit) as caught:
        run(*args)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", "0"], "--steps: must be a whole number >= 1, got '0'"),
        (["--steps", "-3"], "--steps: must be a whole number >= 1, got '-3'"),
        (["--steps", "many"], "must be a whole number >= 1, got 'many'"),
        (["--lr", "nan"], "--lr: must be a finite number >= 0, got 'nan'"),
        (["--seed", "1.5"], "--seed: must be an integer in [-2^63, 2^63), got '1.5'"),
        (["--seed", str(2**63)], "must be an integer in [-2^63, 2^63)"),
        (
            ["--data", "cifar"],
            "data must be digits, moons, ring, text:FILE, idx:FOLDER or a folder of IDX files, got",
        ),
        (["--data", "idx:/nowhere"], "idx: /nowhere must be a folder of IDX files; there is none"),
        (["--batch-size", "1001"], "--batch-size must be at most the 1000 train images, got 1001"),
        (["-o", "hiden=3"], "--option must be NAME=VALUE with NAME of latent_dim, hidden,"),
        (["-o", "hidden"], "--option must be NAME=VALUE"),
        (["-o", "hidden=x"], "--option hidden must be a whole number, got 'x'"),
        (["-o", "learned_prior=1"], "--option learned_prior must be true or false, got '1'"),
        (["-o", "hidden=0"], "hidden must be >= 1, got 0"),
        (["-o", "dropout=2"], "dropout"),
        (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
        (["--wings", "2"], "unrecognized arguments: --wings 2"),
    ],
)
def test_train_refuses(tmp_path, capsys, args, message):
    assert message in refused(capsys, "train", "vae", "--out", tmp_path / "b", *args)
    assert not list(tmp_path.iterdir()), "a refused command left something behind"


def test_train_refuses_folders_in_use(finished, tmp_path, capsys):
    before = bits(finished)
    message = refused(capsys, "train", "vae", "--out", finished)
    assert "must be new or empty; choose another, or --resume its run" in message
    assert bits(finished) == before
    (tmp_path / "file").write_text("mine")
    assert "must be new or empty" in refused(capsys, "train", "vae", "--out", tmp_path / "file")
    assert refused(capsys, "train", "vae", "--out", tmp_path / "file" / "b")
    assert (tmp_path / "file").read_text() == "mine"
    assert "invalid choice: 'dragon'" in refused(capsys, "train", "dragon", "--out", tmp_path / "b")
    assert "required" in refused(capsys, "train", "vae")
    assert refused(capsys)


def test_resume_refuses(finished, tmp_path, capsys):
    def resume(folder, *args):
        return refused(capsys, "train", "vae", "--out", folder, "--resume", *args)

    assert "there is no run in" in resume(tmp_path / "none")
    assert "steps is 12 in" in resume(finished, "--steps", 13)
    assert "seed is 0 in" in resume(finished, "--seed", 3)
    assert "options is" in resume(finished, "-o", "hidden=9")
    assert run("train", "vae", "--out", finished, "--resume", "--steps", 12, "-o", "hidden=8") == 0
    capsys.readouterr()

    folder = tmp_path / "b"
    shutil.copytree(finished, folder)
    raw = (folder / runs.CHECKPOINT).read_bytes()
    for broken in (raw[:-1], raw[:100], b"", b"\0" * 50):
        (folder / runs.CHECKPOINT).write_bytes(broken)
        assert "is damaged" in resume(folder)
        assert "is damaged" in refused(capsys, "sample", folder, "--out", tmp_path / "a.png")
    other = vae.image_vae(64, 17, hidden=9, latent_dim=2)
    optimizer = torch.optim.AdamW(other.parameters())
    checkpoint.save(folder / runs.CHECKPOINT, other, optimizer, {"step": 1})
    assert "must hold this model's tensors; model" not in (message := resume(folder))
    assert "must hold this model's tensors; " in message
    whole = (folder / runs.CONFIG).read_text()
    for broken in ("{", '{"model": "vae"}', "[]", whole.replace('"vae"', '"dragon"')):
        (folder / runs.CONFIG).write_text(broken)
        assert "config.json is damaged or of another version" in resume(folder)
    (folder / runs.CONFIG).write_text(whole.replace("hidden", "width"))
    assert "options must be latent_dim, hidden" in resume(folder)


def test_sample_refuses(finished, tmp_path, capsys):
    out = ("--out", tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    assert "must be the folder of a run" in refused(capsys, "sample", tmp_path / "empty", *out)
    assert "must be the folder of a run" in refused(capsys, "sample", tmp_path / "none", *out)
    assert "--n: must be a whole number" in refused(capsys, "sample", finished, "--n", 0, *out)
    assert "must be a .png" in refused(capsys, "sample", finished, "--out", tmp_path / "a.jpg")
    nowhere = tmp_path / "none" / "a.png"
    assert "must exist; make it first" in refused(capsys, "sample", finished, "--out", nowhere)
    for wrong in (("--class", 3), ("--sampler", "ddim"), ("--steps", 5), ("--guidance", 2)):
        said = refused(capsys, "sample", finished, *wrong, *out)
        assert f"{wrong[0]} cannot be asked of a vae" in said
    shutil.copytree(finished, tmp_path / "b")
    (tmp_path / "b" / runs.CHECKPOINT).unlink()
    assert "there is none yet, train first" in refused(capsys, "sample", tmp_path / "b", *out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "empty"]


def test_a_diverged_run_keeps_its_last_checkpoint(tmp_path, capsys):
    folder = tmp_path / "b"
    assert start(folder, "--lr", "1e30") == 1
    assert "the loss is" in (err := capsys.readouterr().err)
    assert "try a lower --lr" in err
    assert not (folder / runs.CHECKPOINT).exists()
