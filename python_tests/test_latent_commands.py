"""Latent diffusion by command: two stages, the same bits after a stop, pictures of a text."""

import csv
import itertools
import math

import pytest
import torch
from test_data import write_folder

from gmkernels import checkpoint, runs, train
from gmkernels.__main__ import main
from gmkernels.models.latent_diffusion import LatentDiffusion

SMALL = [f"-o{name}={value}" for name, value in (
    ("vae_width", 8), ("channels", 2), ("width", 16), ("depth", 1),
    ("text_width", 16), ("text_layers", 1), ("times", 4), ("dropout", 0.1),
)]  # fmt: skip
# Two steps for the VAE, and a rate that moves weights from zero.
STEPS = ["--steps", "8", "--every", "3", "--batch-size", "20", "--threads", "1", "--lr", "0.5"]


def start(folder, *args):
    return main(["train", "latent_diffusion", "--out", str(folder), *SMALL, *STEPS, *args])


def refused(capsys, *args):
    with pytest.raises(SystemExit):
        main([str(a) for a in args])
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def _threads():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    assert start(folder) == 0
    return folder


def bits(folder):
    names = runs.CHECKPOINT, runs.METRICS, runs.SAMPLES
    return [(folder / name).read_bytes() for name in names]


class Stop(BaseException):
    pass


@pytest.mark.parametrize(("every", "stop_at"), [(3, 1), (3, 2), (2, 2), (2, 3), (3, 7)])
def test_a_resumed_run_ends_at_the_same_bits(tmp_path, monkeypatch, every, stop_at):
    """Stopped while the VAE trains, at the turn with and without a checkpoint of it, and later."""
    whole, broken, count = tmp_path / "a", tmp_path / "b", itertools.count()
    args = ["--every", str(every)]
    assert start(whole, *args) == 0
    real = train.training_step

    def stopping(*args, **kwargs):
        if next(count) == stop_at:
            raise Stop
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "training_step", stopping)
    with pytest.raises(Stop):
        start(broken, *args)
    monkeypatch.undo()
    assert (broken / runs.CHECKPOINT).exists() == (stop_at >= every)
    assert main(["train", "latent_diffusion", "--out", str(broken), "--resume"]) == 0
    assert bits(broken) == bits(whole)


def test_stages(finished, tmp_path):
    """First the VAE alone, then all else; the scale is that of the VAE that the turn found."""
    assert start(tmp_path / "b", "--every", "2") == 0
    with open(tmp_path / "b" / runs.METRICS, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [2, 4, 6, 8]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    config, model = runs.load(finished)
    assert config.steps == 8
    assert model.measured
    moved = {name for name, p in runs.build(config).named_parameters()
             if not torch.equal(p, model.get_parameter(name))}  # fmt: skip
    assert {name.partition(".")[0] for name in moved} == {"vae", "diffusion", "text"}
    tensors, _ = checkpoint.read(finished / runs.CHECKPOINT)
    taken = {name.split(".")[1]: int(x) for name, x in tensors.items() if name.endswith(".step")}
    assert taken == {"vae": 2, "diffusion": 6, "text": 6}


def test_commands(finished, tmp_path, capsys):
    picture = tmp_path / "three.png"
    asked = ["--n", 4, "--guidance", 2, "--steps", 3, "--out", picture]
    sample = ["sample", finished, *asked]
    assert main([str(a) for a in (*sample, "--sampler", "ddim", "--class", 3)]) == 0
    three = picture.read_bytes()
    assert main([str(a) for a in (*sample, "--text", "a handwritten three")]) == 0
    assert picture.read_bytes() == three
    assert main([str(a) for a in (*sample, "--text", "a handwritten seven")]) == 0
    assert picture.read_bytes() != three
    for wrong, message in (
        (["--class", 10], "--class must lie in [0, 10), got 10"),
        (["--class", 3, "--text", "3"], "--text and --class both say what to draw"),
        (["--text", "a " * 40], "a text must have at most 63 bytes of UTF-8, got 80"),
        ([], "--guidance needs --class or --text"),
    ):
        assert message in refused(capsys, *sample, *wrong)
    once = ["train", "latent_diffusion", "--out", tmp_path / "b", "--steps", 1]
    assert "--steps must be > 1 for a latent_diffusion, got 1" in refused(capsys, *once)
    assert not (tmp_path / "b").exists()


def test_sample_waits_for_the_second_stage(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        LatentDiffusion, "measure_scale", lambda *_, **__: (_ for _ in ()).throw(Stop)
    )
    with pytest.raises(Stop):
        start(tmp_path / "b", "--every", "2")
    said = refused(capsys, "sample", tmp_path / "b", "--out", tmp_path / "a.png")
    assert "is at step 2, and what samples is trained from step 2 on; go on with train" in said


@pytest.mark.parametrize("options", [["-o", "captions=fashion"], ["-o", "classes=0"]])
def test_trains_on_a_folder_of_idx_files(tmp_path, capsys, options):
    (tmp_path / "images").mkdir()
    write_folder(tmp_path / "images", n=40, height=10, width=10)
    run, picture = tmp_path / "b", tmp_path / "a.png"
    assert start(run, "--data", str(tmp_path / "images"), *options) == 0
    assert runs.sample(*runs.load(run), 3, 0).shape == (3, 10, 10)
    ask = ["sample", str(run), "--n", "1", "--text", "an ankle boot", "--out", str(picture)]
    if "classes=0" in options:
        assert "--text is for models that read text" in refused(capsys, *ask)
    else:
        assert main(ask) == 0


def test_text_needs_a_model_that_reads(tmp_path, capsys):
    for name, message in (
        ("diffusion", "it takes --class, --sampler, --steps, --guidance"),
        ("vae", "it takes none"),
    ):
        small = ["-o", "times=4", "-o", "width=8"] if name == "diffusion" else ["-o", "hidden=8"]
        steps = ["--steps", "1", "--every", "1"]
        assert main(["train", name, "--out", str(tmp_path / name), *small, *steps]) == 0
        ask = ("sample", tmp_path / name, "--text", "a three", "--out", tmp_path / "a.png")
        assert message in refused(capsys, *ask)
