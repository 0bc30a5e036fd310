"""A prior over a VQ-VAE's codes: exact by enumeration, better than a bigram model; classifiers."""

import itertools
import math

import pytest
import torch
from torch import nn

from gmkernels import data, runs
from gmkernels.__main__ import main
from gmkernels.models import text
from gmkernels.models.classifier import GaussianNaiveBayes
from gmkernels.models.codebook import RunningCodebook
from gmkernels.models.gpt import GPT, Sizes
from gmkernels.models.hybrid import GenerativeClassifier, TokenPrior
from gmkernels.models.likelihood import Categorical
from gmkernels.models.vqvae import VQVAE
from gmkernels.recipes import RECIPES
from gmkernels.spec import filled

K, D, LEVELS, GRID = 3, 2, 2, (2, 2)
CAPTIONS = text.Captions(("a", "bc"), ("{name}", "x{name}"))


def refused(capsys, *args):
    with pytest.raises(SystemExit):
        main([str(a) for a in args])
    return capsys.readouterr().err


def make(classes=0, captions=None, length=1, dropout=0.0, **changes):
    """Of x [B, 4] in two levels, with 2 x 2 codes of width 2, and a GPT with large weights."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 4 * D), nn.Unflatten(1, (D, *GRID)))
    decoder = nn.Sequential(
        nn.Flatten(), nn.Dropout(dropout), nn.Linear(4 * D, 4 * LEVELS), nn.Unflatten(1, (4, 2))
    )
    codebook = RunningCodebook(K, D)
    codebook.assign(filled((K, D), torch.float32, "cpu", 3), 1.0)
    vqvae = VQVAE(encoder, decoder, codebook, Categorical(LEVELS), GRID)
    marks = TokenPrior.marks_needed(classes, captions)
    sizes = {"vocab": K, "context": 3 + length, "marks": marks} | changes
    gpt = GPT(Sizes(layers=1, heads=1, width=8, tied=False, dropout=dropout, **sizes))
    for p in gpt.parameters():
        nn.init.normal_(p, std=0.5)
    return TokenPrior(vqvae, gpt, classes=classes, captions=captions, length=length)


KINDS = {
    "nothing": (make, {}),
    "a class": (lambda: make(classes=2), {"label": 1}),
    "a caption": (lambda: make(2, CAPTIONS, 4), {"label": 1}),
    "a text": (lambda: make(2, CAPTIONS, 4), {"text": "xbc"}),
    "a mean over classes": (lambda: make(2, CAPTIONS, 4), {}),
}


def every_x():
    return torch.tensor(list(itertools.product(range(LEVELS), repeat=4)))


def every_code():
    return torch.tensor(list(itertools.product(range(K), repeat=4))).view(-1, *GRID)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_bound_is_below_the_sum_over_all_codes(kind):
    build, condition = KINDS[kind]
    model, codes, x = build().eval(), every_code(), every_x()
    prior = model.log_prob_codes(codes, **condition)
    torch.testing.assert_close(prior.exp().sum(), torch.tensor(1.0))
    assert prior.std() > 0.3  # a uniform prior would prove nothing
    log_p = torch.stack(
        [
            prior[i] - model.vqvae.likelihood.nll(x, model.vqvae.decode(c.expand(16, 2, 2)))
            for i, c in enumerate(codes)
        ]
    ).logsumexp(0)
    torch.testing.assert_close(log_p.exp().sum(), torch.tensor(1.0))
    bound = model.log_prob(x, **condition)
    assert (bound <= log_p + 1e-5).all()
    index = (model.vqvae.encode(x).flatten(1) * 3 ** torch.arange(3, -1, -1)).sum(1)
    ours = prior[index] - model.vqvae.likelihood.nll(x, model.vqvae.decode(codes[index]))
    torch.testing.assert_close(bound, ours)


@torch.no_grad()
def test_conditions():
    classes, told = make(classes=2).eval(), make(2, CAPTIONS, 4).eval()
    codes = every_code()
    for model in (classes, told):
        each = torch.stack([model.log_prob_codes(codes, k) for k in range(2)])
        assert (each[0] - each[1]).abs().max() > 0.05
        mean = each.logsumexp(0) - math.log(2)
        torch.testing.assert_close(model.log_prob_codes(codes), mean)
        labels = torch.arange(81) % 2
        mixed = each.gather(0, labels[None])[0]
        torch.testing.assert_close(model.log_prob_codes(codes, labels), mixed)
    said = told.log_prob_codes(codes, text=["bc"] * 81)
    torch.testing.assert_close(said, told.log_prob_codes(codes, 1))
    assert (said - told.log_prob_codes(codes, text="xbc")).abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_probabilities_of_codes(kind):
    build, condition = KINDS[kind]
    model, n = build().eval(), 3_000
    codes = model.sample_codes(n, seed=1, **condition)
    assert codes.shape == (n, *GRID)
    assert codes.min() >= 0
    assert codes.max() < K
    index = (codes.flatten(1) * 3 ** torch.arange(3, -1, -1)).sum(1)
    with torch.no_grad():
        p = model.log_prob_codes(every_code(), **condition).exp()
    share = torch.bincount(index, minlength=81) / n
    assert ((share - p).abs() <= 4.5 * (p * (1 - p) / n).sqrt() + 2e-4).all()
    x = model.sample(n, seed=1, **condition)
    assert torch.equal(x, model.sample(n, seed=1, **condition))
    assert not torch.equal(x, model.sample(n, seed=2, **condition))
    with torch.no_grad():
        each = model.vqvae.decode(every_code()).softmax(-1)[..., 1]  # [81, 4]
    assert ((x.float().mean(0) - p @ each).abs() < 4.5 * 0.5 / n**0.5).all()


@torch.no_grad()
def test_classes_are_drawn_evenly():
    model, n = make(classes=2).eval(), 3_000
    model.gpt.token.weight[K:] *= 5  # far apart
    each = torch.stack([model.log_prob_codes(every_code(), k) for k in range(2)])
    ratio, p = each[0] - each[1], each.exp()
    tolerance = 4.5 * float(ratio.std()) / n**0.5
    expected = p @ ratio
    assert (expected - expected.mean()).abs().min() > 2 * tolerance
    index = (model.sample_codes(n, seed=1).flatten(1) * 3 ** torch.arange(3, -1, -1)).sum(1)
    assert abs(float(ratio[index].mean() - expected.mean())) < tolerance


def test_loss_trains_the_prior_alone():
    model, x = make(2, CAPTIONS, 4, dropout=0.3).train(), every_x()
    assert model.gpt.training
    assert not model.vqvae.training
    codes = model.vqvae.codebook.codes.clone()
    labels = torch.arange(16) % 2
    model.loss(x, labels, seed=1).backward()
    assert torch.equal(model.vqvae.codebook.codes, codes)
    assert all(p.grad is None for p in model.vqvae.parameters())
    assert model.gpt.token.weight.grad.abs().sum() > 0
    model.eval()
    drawn = CAPTIONS.draw(labels, torch.tensor([1, 0]))
    assert len(set(drawn)) == 4  # templates vary
    expected = -model.log_prob_codes(model.vqvae.encode(x), text=drawn).mean()
    torch.testing.assert_close(model.loss(x, labels, seed=1), expected)


def bigram(train, test, codes, alpha):
    """Mean over rows of -log p(codes), each code given the one before it, alpha counts added."""
    count = torch.full((codes + 1, codes), alpha, dtype=torch.float64)
    begin = torch.full((1,), codes)
    for row in train.flatten(1):
        count.index_put_((torch.cat([begin, row[:-1]]), row), count.new_ones(1), accumulate=True)
    log_p = (count / count.sum(1, keepdim=True)).log()
    test = test.flatten(1)
    before = torch.cat([begin.expand(len(test), 1), test[:, :-1]], 1)
    return float(-log_p[before, test].sum(1).mean())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small class-conditional prior on digits, by command."""
    threads, run = torch.get_num_threads(), tmp_path_factory.mktemp("prior") / "run"
    small = {"codes": 24, "vae_width": 16, "layers": 1, "width": 32, "dropout": 0.1, "classes": 10}
    options = [part for name, value in small.items() for part in ("-o", f"{name}={value}")]
    sizes = ["--steps", "250", "--every", "250", "--lr", "1e-2", "--threads", "1"]
    sizes += ["--batch-size", "50"]
    assert main(["train", "token_prior", "--out", str(run), *options, *sizes]) == 0
    torch.set_num_threads(threads)
    return run


@torch.no_grad()
def test_codes_cost_less_than_by_bigrams(trained):
    _, model = runs.load(trained)
    images = data.digits()
    train, test = map(model.vqvae.encode, (images.train, images.test))
    found = -float(model.log_prob_codes(test).mean())
    best = min(bigram(train, test, 24, alpha) for alpha in (0.01, 0.1, 0.3, 1.0, 3.0))
    assert found < best - 1
    assert best < model.vqvae.nats_of_codes
    assert (model.log_prob(images.test) > model.vqvae.log_prob(images.test)).double().mean() > 0.9


@torch.no_grad()
def test_a_prior_of_classes_tells_digits_apart(trained):
    _, model = runs.load(trained)
    images = data.digits()
    prior = torch.bincount(images.train_labels).double().div(1000).log().float()
    codes = model.vqvae.encode(images.test[:200])
    classifier = GenerativeClassifier(model.log_prob_codes, prior)
    assert classifier.score(codes, images.test_labels[:200]) > 0.35


def test_commands(trained, tmp_path, capsys):
    assert RECIPES["token_prior"].first == "vqvae"
    out = tmp_path / "three.png"
    sample = ["sample", str(trained), "--n", "4", "--out", str(out)]
    assert main([*sample, "--class", "3"]) == 0
    three = out.read_bytes()
    assert three.startswith(b"\x89PNG")
    assert main([*sample, "--class", "4"]) == 0
    assert out.read_bytes() != three
    assert "text= needs a model with captions" in refused(capsys, *sample, "--text", "a three")
    wrong = ["train", "token_prior", "--out", tmp_path / "b", "-o", "captions=birds"]
    assert "captions must be none or digits, fashion, got 'birds'" in refused(capsys, *wrong)


@pytest.mark.parametrize("captions", ["none", "digits"])
def test_a_killed_run_resumes_at_the_same_bits(tmp_path, monkeypatch, captions):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    small = ["codes=5", "vae_width=4", "layers=1", "heads=1", "width=4", "classes=10"]
    options = [part for o in (*small, f"captions={captions}") for part in ("-o", o)]
    start = ["train", "token_prior", *options, "--steps", "10", "--every", "2", "--threads", "1"]
    start += ["--batch-size", "20"]
    assert main([*start, "--out", str(whole)]) == 0
    batch = data.Images.batch

    def killed(self, size, *, seed, step):
        if step == 7:
            raise KeyboardInterrupt
        return batch(self, size, seed=seed, step=step)

    monkeypatch.setattr(data.Images, "batch", killed)
    assert main([*start, "--out", str(parts)]) == 130
    monkeypatch.undo()
    assert main(["train", "token_prior", "--resume", "--out", str(parts)]) == 0
    a, b = (folder / runs.CHECKPOINT for folder in (whole, parts))
    assert a.read_bytes() == b.read_bytes()
    model, start = runs.load(whole)[1], runs.build(runs.read_config(whole))
    first = dict(start.named_parameters())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, first[name])}
    assert {name.partition(".")[0] for name in moved} == {"vqvae", "gpt"}


def test_generative_classifier_of_gaussians_is_naive_bayes():
    sklearn = pytest.importorskip("sklearn.naive_bayes")
    x = torch.cat([filled((50, 4), torch.float64, "cpu", k) + k for k in range(3)])
    x, y = x[:130], torch.arange(3).repeat_interleave(50)[:130]  # classes that are not even
    peer = sklearn.GaussianNB().fit(x, y)
    mean, std = torch.from_numpy(peer.theta_), torch.from_numpy(peer.var_).sqrt()

    def log_prob(x, label):
        return torch.distributions.Normal(mean[label], std[label]).log_prob(x).sum(1)

    prior = torch.from_numpy(peer.class_prior_).log()
    model = GenerativeClassifier(log_prob, prior)
    torch.testing.assert_close(model.predict_proba(x), torch.from_numpy(peer.predict_proba(x)))
    torch.testing.assert_close(
        model.predict_log_proba(x), torch.from_numpy(peer.predict_log_proba(x))
    )
    assert model.predict(x).tolist() == peer.predict(x).tolist()
    assert model.score(x, y) == pytest.approx(peer.score(x, y))
    ours = GaussianNaiveBayes(4, 3).double().fit(x, y)
    torch.testing.assert_close(model.log_joint(x), ours.log_joint(x))


REFUSED = [
    (lambda: make(classes=2, marks=1), "its marks must be 2"),
    (lambda: make(vocab=4), "the GPT's vocab must be the 3 codes"),
    (lambda: make(context=3), "its context at least 4"),
    (lambda: make(length=2), "length must be 1 without captions"),
    (lambda: make(3, CAPTIONS, 4), "captions must name the classes"),
    (lambda: make().sample(2, 1), "label= needs a model of classes"),
    (lambda: make(classes=2).sample(2, 2), r"label must lie in \[0, 2\), got 2 to 2"),
    (lambda: make(classes=2).sample(2, text="a"), "text= needs a model with captions"),
    (lambda: make(2, CAPTIONS, 4).sample(2, 1, text="a"), "no label beside it"),
    (lambda: make(2, CAPTIONS, 4).sample(2, text=["a"]), "one string or 2, got 1"),
    (lambda: make(2, CAPTIONS, 4).sample(2, text="long"), "at most 3 bytes of UTF-8, got 4"),
    (lambda: make().log_prob_codes(torch.zeros(2, 4).long()), r"grid \(2, 2\), got \(2, 4\)"),
    (lambda: GenerativeClassifier(None, torch.zeros(1)), r"\[K\] with K >= 2, got \(1,\)"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
