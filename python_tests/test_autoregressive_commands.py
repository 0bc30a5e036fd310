"""Autoregressive models by command: the same bits after a stop, completions, text, refusals."""

import csv
import math
from pathlib import Path

import pytest
import torch
from test_data import write_folder
from test_flow_commands import Stop, refused

from gmkernels import data, runs, train
from gmkernels.__main__ import main

SMALL = {
    "made": ["orders=2", "width=16"],
    "nade": ["width=8", "orders=2"],
    "image_gpt": ["layers=1", "heads=2", "width=8", "classes=10"],
    "pixel_rnn": ["width=8", "cell=lstm"],
    "rnn": ["width=8", "context=5", "layers=2"],
}


def start(folder, name, *args):
    options = [word for pair in SMALL[name] for word in ("-o", pair)]
    few = ["--steps", "5", "--every", "2", "--batch-size", "20", "--threads", "1"]
    return main(["train", name, "--out", str(folder), *options, *few, *map(str, args)])


@pytest.fixture(autouse=True)
def _threads():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.fixture
def text(tmp_path):
    """A file of 600 characters, of which 8 are different."""
    path = tmp_path / "words.txt"
    path.write_text("abc de\nfe" * 60 + "cab\n" * 15)
    return path


@pytest.mark.parametrize("name", SMALL)
def test_trains_and_resumes_at_the_same_bits(tmp_path, monkeypatch, text, name):
    whole, broken, count = tmp_path / "a", tmp_path / "b", iter(range(9))
    source = ("--data", f"text:{text}") if name == "rnn" else ()
    assert start(whole, name, *source) == 0
    real = train.training_step

    def stopping(*args, **kwargs):
        if next(count) == 3:
            raise Stop
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "training_step", stopping)
    with pytest.raises(Stop):
        start(broken, name, *source)
    monkeypatch.undo()
    assert main(["train", name, "--out", str(broken), "--resume"]) == 0
    files = [runs.CHECKPOINT, runs.METRICS, runs.TEXTS if name == "rnn" else runs.SAMPLES]
    for file in files:
        assert (broken / file).read_bytes() == (whole / file).read_bytes(), file
    with open(whole / runs.METRICS, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [2, 4, 5]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    _, model = runs.load(whole)
    assert model.log_prob_kind == "exact"


def test_completes_test_pictures(tmp_path, capsys):
    """The upper half is that of the test pictures, the lower is drawn, by the class if asked."""
    run, picture = tmp_path / "a", tmp_path / "a.png"
    assert start(run, "image_gpt") == 0
    config, model = runs.load(run)
    torch.manual_seed(0)
    with torch.no_grad():  # classes differ, as they do after more updates
        for p in model.parameters():
            p += 0.5 * torch.randn_like(p)
    true, made = data.digits().test[:6].view(6, 8, 8) / 16, []
    for options in ({"label": 3}, {"label": 4}, {"label": 3, "temperature": 0.01}):
        made.append(runs.sample(config, model, 6, 1, complete=True, **options))
        assert torch.equal(made[-1][:, :4], true[:, :4])
        assert not torch.equal(made[-1], true)
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    ask = ("sample", str(run), "--out", str(picture))
    assert main([*ask, "--complete", "--n", "9", "--seed", "1"]) == 0
    first = picture.read_bytes()
    assert main([*ask, "--n", "9", "--seed", "1"]) == 0
    assert picture.read_bytes() != first
    assert "at most the 447 test pictures" in refused(capsys, *ask, "--complete", "--n", 448)
    plain = tmp_path / "b"
    assert start(plain, "made") == 0
    said = refused(capsys, "sample", plain, "--out", picture, "--complete")
    assert "--complete cannot be asked of a made" in said


def test_other_levels_share_a_palette(tmp_path):
    """256 levels: the colours are of the first batch, and the score is of all levels."""
    folder: Path = tmp_path / "images"
    folder.mkdir()
    write_folder(folder, n=40)
    run = tmp_path / "a"
    assert start(run, "image_gpt", "--data", folder, "-o", "colours=4") == 0
    config, model = runs.load(run)
    assert model.initialised
    assert model.colour.unique().tolist() == [0, 1, 2, 3]
    x = runs.sample(config, model, 3, 0)
    assert x.shape == (3, config.height, config.width)
    assert len((x * 255).unique()) > 4


def test_a_recurrent_network_writes(tmp_path, capsys, text):
    run = tmp_path / "a"
    assert start(run, "rnn", "--data", f"text:{text}") == 0
    capsys.readouterr()
    ask = ["sample", str(run), "--prompt", "abc", "--tokens", "9", "--temperature", "0.5"]
    assert main([*ask, "--n", "2"]) == 0
    written = capsys.readouterr().out
    assert written.count("abc") >= 2
    assert main([*ask, "--n", "2"]) == 0
    assert capsys.readouterr().out == written
    assert "a rnn takes text" in refused(capsys, "train", "rnn", "--out", tmp_path / "b")
