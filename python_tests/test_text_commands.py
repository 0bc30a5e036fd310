"""Text by command: scores over the whole validation split, equal bits after a stop, refusals."""

import csv
import json
import math

import pytest
import torch

from gmkernels import data, noise, runs, text_data, train
from gmkernels.__main__ import main

SMALL = ["-o", "layers=1", "-o", "heads=2", "-o", "width=16", "-o", "context=8", "--threads", "1"]
STEPS = ["--steps", "9", "--every", "4"]
VARIANT = ["-o", "dropout=0.1", "-o", "positions=rotary", "-o", "norm=rms"]
STRING = "a cat sat on a mat, and that was that;\n" * 12


@pytest.fixture(autouse=True)
def _threads():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def start(folder, *args, file="a.txt", text=STRING):
    path = folder.parent / file
    path.write_text(text)
    given = ["train", "gpt", "--data", f"text:{path}", "--out", folder, *SMALL, *STEPS, *args]
    return main([str(a) for a in given])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    assert start(folder, *VARIANT) == 0
    return folder


def refused(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in args])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err


def bits(folder):
    names = runs.CHECKPOINT, runs.METRICS, runs.TEXTS
    return [(folder / name).read_bytes() for name in names]


class Stop(BaseException):
    pass


@pytest.mark.parametrize("stop_at", [2, 6])
def test_a_resumed_run_ends_at_the_same_bits(finished, tmp_path, monkeypatch, stop_at):
    """With dropout, whose generator is set anew at each step."""
    folder, real, count = tmp_path / "a", train.training_step, iter(range(9))

    def stopping(*args, **kwargs):
        if next(count) == stop_at:
            raise Stop
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "training_step", stopping)
    with pytest.raises(Stop):
        start(folder, *VARIANT)
    monkeypatch.undo()
    assert main(["train", "gpt", "--out", str(folder), "--resume"]) == 0
    assert bits(folder) == bits(finished)
    assert {p.name for p in folder.iterdir()} == {
        runs.CONFIG,
        runs.METRICS,
        runs.CHECKPOINT,
        runs.TEXTS,
    }


@pytest.mark.parametrize("length", [1, 7, 8, 9, 20, 47])
def test_the_score_is_over_every_character(finished, length):
    """All but the first, each from those of its piece before it, whole pieces and the rest."""
    config, model = runs.load(finished)
    ids = text_data.encode(config.vocabulary, (STRING * 2)[: length + 1])
    text = data.Text("a", config.vocabulary, ids, ids, context=8)
    assert text.test_size == length
    pieces = [x for _, part in text.test_batches() for x in part]
    assert all(len(x) == 9 for x in pieces[:-1])
    assert torch.equal(torch.cat([x[1:] for x in pieces]), ids[1:])
    assert all(torch.equal(x[0], y[-1]) for x, y in zip(pieces[1:], pieces, strict=False))
    total = 0.0
    for i in range(length):
        begin = i - i % 8
        logits = model(ids[None, begin : i + 1])[0, -1]
        total -= float(logits.detach().log_softmax(0)[ids[i + 1]])
    assert abs(train.test_score(config, model, text) - total / length) < 1e-5


def test_test_batches_are_pieces_in_order():
    """A text of several batches."""
    ids = torch.arange(20_000)
    text = data.Text("a", "", ids, ids, context=2)
    batches = list(text.test_batches())
    assert len(batches) == 3
    sizes = [len(x) for _, x in batches]
    assert [at for at, _ in batches] == [sum(sizes[:i]) for i in range(len(sizes))]
    joined = torch.cat([x[:, 1:].flatten() for _, x in batches])
    assert torch.equal(joined, ids[1:])


def test_batches_are_pieces_of_the_train_part():
    ids = torch.arange(50)
    text = data.Text("a", "", ids[:40], ids[40:]).cut(6)
    x, labels = text.batch(5, seed=noise.key(1), step=3)
    assert labels is None
    assert torch.equal(x - x[:, :1], torch.arange(7).expand(5, 7))
    assert x.max() < 40
    assert torch.equal(x, text.batch(5, seed=noise.key(1), step=3)[0])
    assert not torch.equal(x, text.batch(5, seed=noise.key(1), step=4)[0])
    for context in (0, 40):
        with pytest.raises(ValueError, match=r"context must lie in \[1, 40\), as a has 40"):
            text.cut(context)


def test_it_learns(tmp_path, capsys):
    """Of 11 characters in turn each has log 11 nats by frequency, none by the one before."""
    string = "abcdefghij\n" * 40
    options = ("--steps", "80", "--every", "40", "--lr", "1e-2")
    assert start(tmp_path / "a", *options, text=string) == 0
    assert "test characters: " in (said := capsys.readouterr().out)
    assert "nats (-log p(x) or its bound) per character" in said
    with open(tmp_path / "a" / runs.METRICS, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [40, 80]
    assert float(rows[-1]["test_nats"]) < math.log(11) / 3
    config = json.loads((tmp_path / "a" / runs.CONFIG).read_text())
    assert config["vocabulary"] == "\nabcdefghij"
    texts = (tmp_path / "a" / runs.TEXTS).read_text()
    assert texts.count("-" * 40) == 3
    ask = ["sample", str(tmp_path / "a"), "--prompt", "abc", "--temperature", "0"]
    assert main([*ask, "--tokens", "30"]) == 0
    assert capsys.readouterr().out == string[:33] + "\n"


def test_samples(finished, tmp_path, capsys):
    """A function of the seed; printed or written; what is asked for."""

    def said(*args):
        assert main(["sample", str(finished), "--tokens", "20", *map(str, args)]) == 0
        return capsys.readouterr().out

    one = said("--prompt", "that")
    assert one.startswith("that")
    assert len(one) == 25
    assert said("--prompt", "that") == one
    assert said("--prompt", "that", "--seed", 1) != one
    assert said("--prompt", "that", "--temperature", 0.1) != one
    assert said().startswith("\n")
    both = said("--prompt", "that", "--n", 2)
    first, second = both.split("-" * 40 + "\n")
    assert first == one
    assert second != one
    assert second.startswith("that")
    likeliest = said("--prompt", "that", "--temperature", 0)
    for narrow in (("--top-k", 1), ("--top-p", 1e-6)):
        assert said("--prompt", "that", *narrow) == likeliest
    out = tmp_path / "a.txt"
    assert said("--prompt", "that", "--n", 2, "--out", out) == ""
    assert out.read_text() == both
    config, model = runs.load(finished)
    ids = runs.sample(config, model, 2, 0, prompt="that", tokens=20)
    assert runs.written(config, ids) == both


def test_sample_refuses(finished, tmp_path, capsys):
    def said(*args):
        return refused(capsys, "sample", finished, *args)

    assert "must be a .txt file, got" in said("--out", tmp_path / "a.png")
    assert "must exist; make it first" in said("--out", tmp_path / "none" / "a.txt")
    assert "characters must be in the vocabulary, got ['!', '7']" in said("--prompt", "a7!")
    assert "must hold 1 or more" in said("--prompt", "")
    assert "--tokens: must be a whole number >= 1, got '0'" in said("--tokens", 0)
    assert "top_p" in said("--top-p", 1.5)
    takes = "it takes --prompt, --tokens, --temperature, --top-k, --top-p"
    for wrong in (("--class", 3), ("--sampler", "ddim"), ("--text", "a")):
        assert takes in said(*wrong)
    assert not list(tmp_path.iterdir())


def test_train_refuses(finished, tmp_path, capsys):
    path = tmp_path / "a.txt"
    path.write_text(STRING)

    def said(name, *args):
        return refused(capsys, "train", name, "--out", tmp_path / "b", *args)

    assert "a vae takes images; text can train" in said("vae", "--data", f"text:{path}")
    assert "--data digits holds images, a gpt takes text" in said("gpt")
    assert "the context must lie in [1, 421), as" in said(
        "gpt", "--data", f"text:{path}", "-o", "context=421"
    )
    assert "heads must divide width" in said("gpt", "--data", f"text:{path}", "-o", "heads=3")
    assert "positions must be learned or rotary" in said(
        "gpt", "--data", f"text:{path}", "-o", "positions=sine"
    )
    assert "none.txt" in said("gpt", "--data", f"text:{tmp_path / 'none.txt'}")
    assert "at most the 421 train characters, got 500" in said(
        "gpt", "--data", f"text:{path}", "--batch-size", 500
    )
    assert not (tmp_path / "b").exists()
    resume = "train", "gpt", "--out", finished, "--resume"
    for text, message in ((STRING + "?" * 10, "have changed"), (STRING.replace(";", "!"), "!")):
        (finished.parent / "a.txt").write_text(text)
        assert message in refused(capsys, *resume)
    (finished.parent / "a.txt").write_text(STRING)


def test_losses_are_finite(finished):
    with open(finished / runs.METRICS, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [4, 8, 9]
    assert all(math.isfinite(float(row["loss"])) for row in rows)
