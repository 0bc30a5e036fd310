"""VQ-VAE: its codebooks against k-means, its bound by enumeration, its laws; a run by command."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gmkernels as gm
from gmkernels import data
from gmkernels.__main__ import main
from gmkernels.models import vqvae
from gmkernels.models.codebook import (
    Codebook,
    LearnedCodebook,
    RunningCodebook,
    k_means_plus_plus,
    perplexity,
)
from gmkernels.models.likelihood import Bernoulli, Categorical
from gmkernels.recipes import RECIPES
from gmkernels.spec import filled

K, D, LEVELS = 3, 2, 2


def blobs(n=240, codes=6, width=4):
    """Rows around `codes` centres, and these."""
    centres = 8 * filled((codes, width), torch.float64, "cpu", 1)
    return centres.repeat(n // codes, 1) + filled((n, width), torch.float64, "cpu", 2), centres


def make(codebook: Codebook | None = None, dropout: float = 0.0) -> vqvae.VQVAE:
    """Of x [B, 4] in two levels, with two codes of width 2."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 2 * D), nn.Unflatten(1, (D, 2)))
    decoder = nn.Sequential(
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(2 * D, 4 * LEVELS),
        nn.Unflatten(1, (4, LEVELS)),
    )
    codebook = codebook or RunningCodebook(K, D)
    codebook.assign(filled((K, D), torch.float32, "cpu", 3), 1.0)
    return vqvae.VQVAE(encoder, decoder, codebook, Categorical(LEVELS), (2,))


def every_x():
    return torch.tensor(list(itertools.product(range(LEVELS), repeat=4)))


def test_running_codebook_without_memory_is_a_step_of_k_means():
    sklearn = pytest.importorskip("sklearn.cluster")
    x, centres = blobs()
    start = centres + 1.5 * filled((6, 4), torch.float64, "cpu", 4)
    lloyd = sklearn.KMeans(6, init=start.numpy(), n_init=1, max_iter=1, algorithm="lloyd").fit(x)
    codebook = RunningCodebook(6, 4, decay=0.0, smoothing=0.0, restart=0.0).double()
    codebook.assign(start, 1.0)
    _, indices, _ = codebook(x)
    assert indices.unique().numel() == 6  # scikit-learn moves empty clusters, we do not
    torch.testing.assert_close(codebook.codes, torch.from_numpy(lloyd.cluster_centers_))
    for _ in range(10):
        codebook(x)
    error = (x - codebook(x)[0]).square().sum()
    many = sklearn.KMeans(6, init=start.numpy(), n_init=1, max_iter=11, algorithm="lloyd").fit(x)
    assert float(error) == pytest.approx(many.inertia_)


def test_running_means_by_hand():
    codebook = RunningCodebook(2, 1, decay=0.75, smoothing=0.5, restart=0.0).double()
    codebook.assign(torch.tensor([[0.0], [10.0]]), 2.0)
    codebook(torch.tensor([[1.0], [2.0], [-1.0], [12.0]], dtype=torch.float64))
    counts = torch.tensor([0.75 * 2 + 0.25 * 3, 0.75 * 2 + 0.25 * 1]).double()
    sums = torch.tensor([0.75 * 0 + 0.25 * 2.0, 0.75 * 20 + 0.25 * 12.0]).double()
    smoothed = (counts + 0.5) / (counts.sum() + 2 * 0.5) * counts.sum()
    torch.testing.assert_close(codebook.counts, counts)
    torch.testing.assert_close(codebook.codes, (sums / smoothed)[:, None])


def test_codes_without_share_stay():
    codebook = RunningCodebook(3, 1, decay=0.0, smoothing=0.0, restart=0.0)
    codebook.assign(torch.tensor([[0.0], [1.0], [50.0]]), 1.0)
    codebook(torch.tensor([[0.25], [1.5]]))
    torch.testing.assert_close(codebook.codes, torch.tensor([[0.25], [1.5], [50.0]]))


@pytest.mark.parametrize("kind", [LearnedCodebook, RunningCodebook])
def test_unused_codes_restart_at_vectors_of_the_batch(kind):
    codebook = kind(4, 2, decay=0.5, restart=1.0)
    codebook.assign(torch.tensor([[0.0, 0.0], [1.0, 1.0], [90.0, 0.0], [0.0, 90.0]]), 1.0)
    x = filled((40, 2), torch.float32, "cpu", 1)
    codebook(x, seed=5)
    fresh = codebook.codes[2:].detach()
    assert (x[:, None] == fresh).all(2).any(0).all()
    assert not torch.equal(fresh[0], fresh[1])
    assert codebook.counts[2:].tolist() == [1.0, 1.0]
    again = kind(4, 2, decay=0.5, restart=1.0)
    again.assign(torch.tensor([[0.0, 0.0], [1.0, 1.0], [90.0, 0.0], [0.0, 90.0]]), 1.0)
    again(x, seed=5)
    assert torch.equal(again.codes, codebook.codes)
    assert (codebook(x)[1] >= 2).any()


def test_eval_leaves_the_codebook():
    codebook = RunningCodebook(4, 2)
    codebook.assign(filled((4, 2), torch.float32, "cpu", 1), 1.0)
    before = {name: x.clone() for name, x in codebook.state_dict().items()}
    codebook.eval()(filled((9, 2), torch.float32, "cpu", 2))
    for name, x in codebook.state_dict().items():
        assert torch.equal(x, before[name])
    codebook.train()(filled((0, 2), torch.float32, "cpu", 2))  # an empty batch, too
    assert torch.equal(codebook.codes, before["codes"])


def test_first_batch_starts_the_codebook():
    x, _ = blobs()
    codebook = RunningCodebook(6, 4).double()
    codebook(x, seed=1)
    start = k_means_plus_plus(x, 6, seed=gm.noise.fold_in(gm.noise.key(1), 0))
    other = RunningCodebook(6, 4).double()
    other.assign(start, 40.0)
    other(x, seed=1)
    torch.testing.assert_close(codebook.codes, other.codes)
    moved = codebook.codes.clone()
    codebook(x + 1, seed=2)
    assert (codebook.codes - moved).abs().max() < 0.2  # it starts only once


def test_k_means_plus_plus():
    x, centres = blobs()
    x, centres = x + 9 * centres.repeat(40, 1), 10 * centres  # far apart
    for seed in range(5):
        chosen = k_means_plus_plus(x, 6, seed=seed)
        assert torch.cdist(centres, chosen).argmin(1).unique().numel() == 6  # one in each blob
    assert k_means_plus_plus(x[:1], 3, seed=0).equal(x[[0, 0, 0]])
    with pytest.raises(ValueError, match="at least one row"):
        k_means_plus_plus(x[:0], 3)


def test_perplexity():
    assert perplexity(torch.tensor([5, 5, 5, 5])) == pytest.approx(4)
    assert perplexity(torch.tensor([7, 0, 0])) == pytest.approx(1)
    p = torch.tensor([0.2, 0.3, 0.5]).double()
    entropy = torch.distributions.Categorical(p).entropy()
    torch.testing.assert_close(perplexity(torch.tensor([2, 3, 5])), entropy.exp())
    assert perplexity(torch.zeros(3)).isnan()


def test_loss_is_the_formula_and_its_gradients():
    model = make(LearnedCodebook(K, D, commitment=0.3)).eval()
    x = every_x()
    z = model.encoder(x.float() * 2 - 1)  # [B, D, 2]
    vectors = z.mT
    codes = model.codebook.codes
    index = torch.cdist(vectors.detach(), codes.detach()).argmin(2)
    q = codes[index]
    straight = (vectors + (q - vectors).detach()).mT
    recon = F.cross_entropy(model.decoder(straight).mT, x, reduction="none").sum(1).mean()
    terms = (vectors.detach() - q).square() + 0.3 * (vectors - q.detach()).square()
    expected = recon + terms.sum((1, 2)).mean()
    loss = model.loss(x)
    torch.testing.assert_close(loss, expected)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(model.loss(x.repeat(3, 1)), loss)
    running = make().eval()
    assert {name for name, _ in running.named_parameters()} == {
        name for name, _ in model.named_parameters() if name != "codebook.codes"
    }


def test_log_prob_is_a_bound():
    model = make().eval()
    x = every_x()
    bound = model.log_prob(x)
    codes = torch.tensor(list(itertools.product(range(K), repeat=2)))  # every one of K^n
    nll = torch.stack([model.likelihood.nll(x, model.decode(c.expand(16, 2))) for c in codes])
    exact = torch.logsumexp(-nll, 0) - 2 * math.log(K)
    torch.testing.assert_close(exact.exp().sum(), torch.tensor(1.0))
    assert (bound <= exact + 1e-6).all()
    assert model.nats_of_codes == pytest.approx(2 * math.log(3))


def test_codes_go_round():
    model = make().eval()
    x = every_x()
    indices = model.encode(x)
    assert indices.shape == (16, 2)
    assert indices.dtype == torch.int64
    torch.testing.assert_close(
        model.reconstruct(x), model.likelihood.mean(model.decode(indices)), rtol=0, atol=0
    )
    torch.testing.assert_close(
        model.log_prob(x), -model.likelihood.nll(x, model.decode(indices)) - model.nats_of_codes
    )
    assert 1 <= model.perplexity(x) <= K
    counts = torch.bincount(indices.flatten(), minlength=K)
    assert model.perplexity(x) == perplexity(counts)


def test_samples_are_of_uniform_codes():
    model = make().eval()
    x = model.sample(20_000, seed=3)
    assert torch.equal(model.sample(20_000, seed=3), x)
    codes = torch.tensor(list(itertools.product(range(K), repeat=2)))
    p = model.decode(codes).softmax(-1)[..., 1].mean(0)  # of each pixel, over all codes
    assert ((x.float().mean(0) - p).abs() < 4 * 0.5 / 20_000**0.5).all()
    assert torch.equal(model.sample(5, seed=3), x[:5])


def test_pixels_in_the_unit_interval():
    model = make()
    model.likelihood, model.decoder = Bernoulli(), nn.Sequential(nn.Flatten(), nn.Linear(2 * D, 4))
    x = gm.uniform((6, 4), seed=1)
    assert model.takes == "unit"
    model.loss(x, seed=1).backward()
    assert model.encoder[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("learned", [False, True])
def test_training_on_digits_lowers_the_bound(learned):
    torch.manual_seed(0)
    model = vqvae.image_vqvae(64, 17, width=16, codes=16, learned=learned)
    images = data.digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(40):
        x, _ = images.batch(100, seed=0, step=step)
        optimizer.zero_grad()
        model.loss(x, seed=step).backward()
        optimizer.step()
    model.eval()
    assert -model.log_prob(images.test).mean() < 165  # 181 nats are 64 pixels of 17 levels
    assert model.perplexity(images.test) > 3
    assert model.reconstruct(images.test[:2]).shape == (2, 64)


def test_a_killed_run_resumes_at_the_same_bits(tmp_path, monkeypatch):
    assert "vqvae" in RECIPES
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    train = ["train", "vqvae", "-o", "width=4", "-o", "codes=5", "--every", "3", "--threads", "1"]
    assert main([*train, "--steps", "6", "--out", whole]) == 0
    batch = data.Images.batch

    def killed(self, size, *, seed, step):
        if step == 4:
            raise KeyboardInterrupt
        return batch(self, size, seed=seed, step=step)

    monkeypatch.setattr(data.Images, "batch", killed)
    assert main([*train, "--steps", "6", "--out", parts]) == 130
    monkeypatch.undo()
    assert main(["train", "vqvae", "--resume", "--out", parts]) == 0
    a, b = ((tmp_path / n / "checkpoint.safetensors").read_bytes() for n in ("whole", "parts"))
    assert a == b
    out = tmp_path / "x.png"
    assert main(["sample", parts, "--n", "4", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


REFUSED = [
    (lambda: RunningCodebook(0, 2), "codes and width must be >= 1, got 0 and 2"),
    (lambda: LearnedCodebook(3, 2, decay=1.0), r"LearnedCodebook: decay must lie in \[0, 1\)"),
    (lambda: RunningCodebook(3, 2, restart=-1.0), "restart be >= 0, got 0.99 and -1.0"),
    (lambda: RunningCodebook(3, 2, smoothing=-1.0), "smoothing must be >= 0, got -1.0"),
    (lambda: vqvae.image_vqvae(63, 17), "square with an even side, got 63 pixels"),
    (lambda: make().decode(torch.zeros(4, 3, dtype=torch.long)), r"grid \(2,\), got \(4, 3\)"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_encoder_of_another_grid_is_refused():
    model = make()
    model.grid = (4,)
    with pytest.raises(ValueError, match=r"with grid \(4,\), got \(16, 2, 2\)"):
        model.loss(every_x())
