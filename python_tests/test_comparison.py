"""`compare --data digits`: its table is true, its time is dealt out, finished work stays."""

import csv
import dataclasses
import itertools
import json

import pytest
import torch

from gmkernels import comparison, data, dispatch, runs, train
from gmkernels.__main__ import main
from gmkernels.paradigms import PARADIGMS, PixelHistogram
from gmkernels.recipes import RECIPES, option_defaults

SHORT = "histogram,naive_bayes,autoencoder,vae,gan"


def refused(capsys, *args):
    with pytest.raises(SystemExit):
        main([str(a) for a in args])
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def _threads():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def compare(out, only=SHORT):
    return main(
        ["compare", "--data", "digits", "--minutes", "0.001", "--only", only, "--out", str(out)]
    )


def of(name):
    return next(p for p in PARADIGMS if p.name == name)


def test_pixel_histogram_counts():
    levels = torch.tensor([[0, 2], [0, 1], [2, 1], [0, 1]])
    u = torch.tensor([[0.1, 0.9], [0.0, 0.5], [0.99, 0.2], [0.5, 0.5]]).double()
    model = PixelHistogram(levels + u, 3)
    every = torch.tensor(list(itertools.product(range(3), repeat=2))).double()
    p = torch.tensor([4, 1, 2]).double()[:, None] * torch.tensor([1, 4, 2]).double() / 49
    torch.testing.assert_close(model.log_prob(every + 0.3).exp(), p.flatten())
    x = model.sample(20_000, seed=1).floor()
    share = torch.bincount((x[:, 0] * 3 + x[:, 1]).long(), minlength=9) / 20_000
    assert (share - p.flatten()).abs().max() < 4.5 * 0.5 / 20_000**0.5


@pytest.mark.parametrize("p", PARADIGMS, ids=lambda p: p.name)
def test_table_says_what_the_models_say(p):
    images = data.digits()
    assert (p.classic is None) == (p.name in RECIPES)
    assert (p.classic is None) == (p.share > 0)
    if p.classic is not None:
        return
    recipe = RECIPES[p.name]
    model = recipe.build(64, images.levels, **option_defaults(recipe.build))
    kind = getattr(model, "log_prob_kind", "none")
    assert p.likelihood == {"exact": "exact", "lower bound": "bound", "none": "none"}[kind]
    assert (recipe.measure == "nats") == (p.likelihood != "none")


def test_command(tmp_path, capsys):
    assert compare(tmp_path / "out") == 0
    said = capsys.readouterr().out
    with open(tmp_path / "out" / "comparison.csv", newline="") as file:
        rows = {row["paradigm"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["histogram", "naive_bayes", "autoencoder", "vae", "gan"]
    assert float(rows["histogram"]["score"]) == pytest.approx(106.47, abs=0.05)  # of the README
    assert 120 < float(rows["naive_bayes"]["score"]) < 140
    assert rows["gan"]["measure"] == "energy score"
    assert rows["autoencoder"]["precision"] == "nan"
    for name in ("vae", "gan", "autoencoder"):
        assert int(rows[name]["steps"]) == comparison.LEAST
        assert float(rows[name]["fused"]) > 0
        assert float(rows[name]["unfused"]) > 0
    assert rows["histogram"]["fused"] == "nan"
    assert int(rows["naive_bayes"]["classes"]) == 10
    assert 0.05 < float(rows["naive_bayes"]["precision"]) < 0.5
    lines = [line for line in said.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 5 + 1
    assert len({line.count("|") for line in lines}) == 1
    assert "-106.47, exact" in lines[2]
    assert "none; energy score" in lines[6]
    png = (tmp_path / "out" / "comparison.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert main(["sample", str(tmp_path / "out" / "vae"), "--out", str(tmp_path / "x.png")]) == 0
    # All is finished: nothing is trained again, the same is written.
    written = (tmp_path / "out" / "comparison.csv").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_trained", "_fitted"):
            patch.setattr(comparison, name, None)
        assert compare(tmp_path / "out") == 0
    assert (tmp_path / "out" / "comparison.csv").read_bytes() == written
    assert (tmp_path / "out" / "comparison.png").read_bytes() == png
    other = ["compare", "--data", "digits", "--out", tmp_path / "out", "--seed", 1]
    assert "holds a comparison of {'data': 'digits', 'minutes': 0.001" in refused(capsys, *other)


def test_interrupted_work_stays(tmp_path, monkeypatch, capsys):
    out, fit = tmp_path / "out", train.fit

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "fit", stopped)
    assert compare(out, "histogram,vae") == 130
    assert capsys.readouterr().err == "gmkernels: interrupted\n"
    with open(out / "comparison.csv", newline="") as file:
        assert [row["paradigm"] for row in csv.DictReader(file)] == ["histogram"]
    begun = (out / "vae" / runs.CONFIG).read_bytes()
    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(comparison, "_fitted", None)  # not again
    monkeypatch.setattr(comparison, "LEAST", 11)  # the run has its steps
    assert compare(out, "histogram,vae") == 0
    assert (out / "vae" / runs.CONFIG).read_bytes() == begun
    assert json.loads((out / "vae" / comparison.ROW).read_text())["steps"] == 10
    (out / "vae" / comparison.ROW).write_text("{")
    damaged = ["compare", "--data", "digits", "--minutes", "0.001", "--only", "vae", "--out", out]
    assert "row.json is damaged or of another version" in refused(capsys, *damaged)


@pytest.mark.parametrize(
    ("name", "seconds", "steps"),
    [("vae", 9.0, 600), ("vae", 1e9, 2000), ("vae", 0.0, 10), ("token_prior", 9.0, None)],
)
def test_steps_fit_the_time(tmp_path, monkeypatch, name, seconds, steps):
    """A step takes 10 ms, one of a first part 50, the test 2 seconds."""
    images = data.digits()
    times = {True: (0.05, 0.06), False: (0.01, 0.02)}
    monkeypatch.setattr(comparison, "step_seconds", lambda *_, first: times[first])
    monkeypatch.setattr(comparison, "test_seconds", lambda *_: 2.0)

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        comparison._trained(of(name), images, None, tmp_path, seconds=seconds, seed=0)
    config = runs.read_config(tmp_path)
    if steps is None:
        turn = config.recipe.turn(config.steps)
        spent = 0.05 * turn + 0.01 * (config.steps - turn)
        assert spent == pytest.approx(seconds - 3.0, rel=0.05)
    else:
        assert config.steps == pytest.approx(steps, rel=0.05)
        assert config.steps <= steps


def test_shares_of_the_time_that_is_left(tmp_path, monkeypatch):
    given = {}

    def row(name, seconds):
        nan = float("nan")
        return comparison.Row(name, 1.0, "nats", nan, nan, nan, nan, nan, 0, seconds, [[0.0] * 64])

    def trained(paradigm, *args, seconds, seed):
        given[paradigm.name] = seconds
        return row(paradigm.name, 20.0)

    monkeypatch.setattr(comparison, "_trained", trained)
    monkeypatch.setattr(comparison, "_fitted", lambda p, *_: row(p.name, 6.0))
    names = ("histogram", "made", "nade", "vae")
    comparison.compare(data.digits(), tmp_path, minutes=2.0, only=names)
    expected = {"made": 114 / 3.2, "nade": 94 * 1.5 / 2.2, "vae": 74.0}
    assert given == pytest.approx(expected)


def test_sides_of_a_step(monkeypatch):
    """Steps take turns between what is dispatched and the reference, each on the part asked for."""
    seen, step = [], train.training_step

    def spied(part, *args, **kwargs):
        seen.append((type(part).__name__, dispatch._forced, sorted(kwargs)))
        return step(part, *args, **kwargs)

    monkeypatch.setattr(train, "training_step", spied)
    images = data.digits()
    recipe = RECIPES["token_prior"]
    options = option_defaults(recipe.build) | {
        "codes": 5,
        "vae_width": 4,
        "width": 4,
        "classes": 10,
    }
    settings = runs.DEFAULTS | recipe.defaults
    config = runs.new_config("token_prior", images, options, 1, settings)
    for first, name, given in (
        (False, "TokenPrior", ["label", "seed"]),
        (True, "VQVAE", ["seed"]),
    ):
        seen.clear()
        assert min(comparison.step_seconds(config, images, first=first)) > 0
        pair = [(name, None, given), (name, "reference", given)]
        assert seen == pair * (comparison.ROUNDS + 1)


def test_judge():
    images = data.digits()
    judge = comparison.Judge(images)
    real = images.unit(images.test)
    assert judge(real) == {"precision": 1.0, "recall": 1.0, "classes": 10.0}
    threes = images.unit(images.train)[images.train_labels == 3]
    found = judge(threes)
    assert found["classes"] <= 2
    assert found["precision"] > 0.5
    assert found["recall"] < 0.2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "compare needs --data digits, or one of classifiers and divergences"),
        (["--data", "moons"], "--data must be pictures with labels, moons are not"),
        (["--data", "digits", "--only", "vae,x"], "--only must name some of histogram"),
        (["--data", "digits", "--minutes", "0"], "--minutes must be a finite number > 0, got 0"),
        (["--data", "digits", "--seed", "1" * 30], "seed"),
    ],
)
def test_refusals(tmp_path, capsys, given, message):
    assert message in refused(capsys, "compare", *given, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_test_is_timed_on_a_part(monkeypatch):
    seen, images, recipe = [], data.digits(), RECIPES["latent_diffusion"]

    def score(model, x, key):
        seen.append((len(x), model.measured, model.training))
        return recipe.score(model, x, key)

    changed = dataclasses.replace(recipe, score=score)
    monkeypatch.setitem(RECIPES, "latent_diffusion", changed)
    options = option_defaults(recipe.build) | {"times": 4, "width": 16, "depth": 1, "vae_width": 8}
    settings = runs.DEFAULTS | recipe.defaults
    config = runs.new_config("latent_diffusion", images, options, 1, settings)
    clock = iter([5.0, 6.0])
    monkeypatch.setattr(comparison.time, "perf_counter", lambda: next(clock))
    assert comparison.test_seconds(config, images) == pytest.approx(447 / 56)
    assert seen == [(56, True, False)]
