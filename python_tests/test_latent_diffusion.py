"""Latent diffusion: its bound against an exact likelihood, its scale, a VAE at rest, conditions."""

import math

import pytest
import torch
from test_diffusion import gaussian_net
from torch import nn

import gmkernels
from gmkernels import Schedule, checkpoint
from gmkernels.models.diffusion import Diffusion
from gmkernels.models.image_latent_diffusion import conv_vae, image_latent_diffusion
from gmkernels.models.latent_diffusion import LatentDiffusion
from gmkernels.models.likelihood import Bernoulli, Categorical, Gaussian
from gmkernels.models.nets import MLP
from gmkernels.models.text import DIGITS
from gmkernels.models.vae import VAE
from gmkernels.models.vq_latents import VQLatents
from gmkernels.models.vqvae import image_vqvae

X, Z, B, C = 6, 3, 5, 2.5  # C: how much wider the latents are than the schedule's unit


def linear_model(off=0.0, s2=1.0):
    """x = W z / C + b + e with z ~ N(0, C^2 I) and its exact posterior and denoiser; p(x).

    off spoils the posterior; s2 != 1, the variance that the denoiser takes C^-1 z for, the prior.
    """
    s, b = 0.5, torch.linspace(-1, 1, X)
    w = torch.linalg.qr(gmkernels.normal((X, Z), seed=0))[0] * torch.tensor([1.5, 1.0, 0.5])
    precision = 1 + w.square().sum(0) / s**2

    def encoder(x):
        mean = C * ((x - b) @ w / s**2 / precision + off)
        return torch.cat([mean, (2 * math.log(C) - precision.log() + off).expand_as(mean)], 1)

    schedule = Schedule.linear(50, 2e-3, 0.4)
    vae = VAE(encoder, lambda z: z / C @ w.T + b, Gaussian(s), Z)
    model = LatentDiffusion(vae, Diffusion(gaussian_net(schedule, s2, "epsilon"), schedule, (Z,)))
    p = torch.distributions.MultivariateNormal(b, w @ w.T + s**2 * torch.eye(X))
    return model, p


def gap(n=4000, **spoilt):
    """log p(x) minus the bound: mean over x ~ p, and the error of that mean."""
    model, p = linear_model(**spoilt)
    model.scale.fill_(1 / C)
    torch.manual_seed(1)
    x = p.sample((n,))
    found = p.log_prob(x) - model.log_prob(x, seed=2, variance="fixed_large")
    return found.mean().item(), found.std().item() / math.sqrt(n)


def test_bound_is_the_likelihood_where_all_is_exact():
    """The reverse process of N(0, 1) is exact with variance beta_t, "fixed_large", at every T."""
    mean, error = gap()
    assert error < 0.06
    assert abs(mean) < 4 * error


@pytest.mark.parametrize("spoilt", [{"off": 0.3}, {"s2": 0.5}, {"off": -0.2, "s2": 1.5}])
def test_bound_is_below_the_likelihood(spoilt):
    mean, error = gap(**spoilt)
    assert mean > 8 * error


def test_scale_is_that_of_the_latents():
    model, p = linear_model()
    torch.manual_seed(1)
    x = p.sample((20_000,))
    found = model.measure_scale(x, seed=3)
    assert found.item() == pytest.approx(1 / C, rel=0.01)
    u = model.encode(x, seed=3)
    assert u.std(correction=0).item() == pytest.approx(1, abs=1e-5), "the draws it was measured on"
    assert model.encode(x, seed=4).std().item() == pytest.approx(1, abs=0.02)
    mean, logvar = model.vae.encode(x)
    torch.testing.assert_close(model.encode(x), found * mean)
    deviation = (u / found - mean) / (logvar / 2).exp()
    assert deviation.std().item() == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(model.decode(model.encode(x)), model.vae.reconstruct(x))
    residual = model.decode(u, seed=5) - model.decode(u)
    assert residual.std().item() == pytest.approx(0.5, abs=0.01)


def small(**options):
    torch.manual_seed(0)
    defaults = {"vae_width": 8, "channels": 2, "width": 16, "depth": 1, "text_width": 16}
    model = image_latent_diffusion(64, 17, **{**defaults, "text_layers": 1, "times": 8, **options})
    for p in model.parameters():  # the zero-initialised ones too
        p.data += 0.05 * torch.randn_like(p)
    return model.eval()


DATA = torch.randint(0, 17, (40, 64), generator=torch.Generator().manual_seed(0))


def test_scale_is_stored(tmp_path):
    model, other, path = small(), small(), tmp_path / "a.safetensors"
    calls = {
        "encode": lambda m: m.encode(DATA),
        "decode": lambda m: m.decode(torch.zeros(1, 2, 4, 4)),
        "encode: the latents": lambda m: m.loss(DATA, seed=0),
        "log_prob": lambda m: m.log_prob(DATA, seed=0),
        "sample": lambda m: m.sample(1, seed=0),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=f"^{name}.*; call measure_scale"):
            call(model)
    checkpoint.save(path, model, torch.optim.SGD(model.parameters()), {})
    checkpoint.restore(path, other)
    assert not other.measured
    model.measure_scale(DATA, seed=1)
    checkpoint.save(path, model, torch.optim.SGD(model.parameters()), {})
    checkpoint.restore(path, other)
    assert other.measured
    assert torch.equal(other.scale, model.scale)
    for call in calls.values():
        assert torch.equal(call(other), call(model))
    nn.init.zeros_(model.vae.encoder[-1].weight)
    nn.init.constant_(model.vae.encoder[-1].bias, -1000.0)
    with pytest.raises(
        ValueError, match=r"must vary and be finite, .* over 40 rows is 0\.0; train"
    ):
        model.measure_scale(DATA, seed=1)


def test_vae_rests():
    model = small(dropout=0.5, condition_dropout=0.5).train()
    model.measure_scale(DATA, seed=1)
    assert model.diffusion.net.training
    assert not any(module.training for module in model.vae.modules())
    assert torch.equal(model.encode(DATA), model.encode(DATA)), "dropout is on"
    model.loss(DATA, torch.arange(40) % 10, seed=0).backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("vae."), name
    assert model.text.token.weight.grad.abs().max() > 0


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
@pytest.mark.parametrize("kind", [Bernoulli, Gaussian, lambda: Categorical(3)])
def test_samples_do_not_depend_on_the_split(shape, kind):
    made = kind()
    levels = made.takes == "levels"
    vae = VAE(
        nn.Identity(), lambda z: torch.stack([z, -z, z * z], -1) if levels else z, made, shape
    )
    diffusion = Diffusion(
        lambda x, t: x * (t / 10).view(-1, *[1] * len(shape)), Schedule.linear(20), shape
    )
    model = LatentDiffusion(vae, diffusion)
    model.scale.fill_(0.5)

    def draw(first, count):
        return model.sample(count, steps=4, sampler="ddpm", seed=3, offset=first)

    whole = draw(0, 64)
    assert whole.shape == (64, *shape)
    assert torch.equal(whole, torch.cat([draw(0, 1), draw(1, 3), draw(4, 60)]))
    assert not torch.equal(whole[:4], whole[4:8])


def test_works_on_vectors_and_labels():
    """An MLP on latents [B, Z], conditional on a class."""
    model, p = linear_model()
    net = MLP(Z, 16, 2, classes=4)
    model = LatentDiffusion(model.vae, Diffusion(net, Schedule.cosine(10), (Z,)))
    for q in net.parameters():
        q.data += 0.1 * torch.randn(q.shape, generator=torch.Generator().manual_seed(0))
    x, label = p.sample((B,)), torch.arange(B) % 4
    model.measure_scale(x, seed=0)
    model.loss(x, label, seed=0).backward()
    assert net.label.weight.grad.abs().max() > 0
    kwargs = {"steps": 3, "seed": 1}
    free, two = model.sample(B, **kwargs), model.sample(B, label=2, **kwargs)
    assert two.shape == (B, X)
    assert torch.equal(model.sample(B, label=2, guidance=0.0, **kwargs), free)
    assert torch.equal(model.sample(B, label=torch.full((B,), -1), **kwargs), free)
    assert (two - free).abs().max() > 1e-4
    assert model.log_prob(x, label=label, seed=0).shape == (B,)


def latents(model, monkeypatch):
    """Makes sample() give u as it comes out of the diffusion model."""
    monkeypatch.setattr(model, "decode", lambda u, seed: u)
    model.measure_scale(DATA, seed=0)
    return {"steps": 4, "seed": 1}


def test_guidance_weighs_the_text_against_none(monkeypatch):
    model, asked = small(), ["a three", "8", "a handwritten seven"]
    kwargs = latents(model, monkeypatch)
    guided = model.sample(3, text=asked, guidance=2.5, **kwargs)
    net, empty = model.diffusion.net, model.text.encode([""] * 3)

    class TwoPasses(nn.Module):
        def forward(self, x, t, context, context_mask):
            u = net(x, t, context=empty[0], context_mask=empty[1])
            c = net(x, t, context=context, context_mask=context_mask)
            return u + 2.5 * (c - u)

    plain = model.sample(3, text=asked, **kwargs)
    model.diffusion.net = TwoPasses()
    torch.testing.assert_close(guided, model.sample(3, text=asked, **kwargs), rtol=1e-4, atol=1e-4)
    assert (guided - plain).abs().max() > 1e-3


def test_a_label_is_its_caption(monkeypatch):
    model = small()
    kwargs = latents(model, monkeypatch)
    three = model.sample(2, text="a handwritten three", guidance=2.0, **kwargs)
    assert torch.equal(model.sample(2, label=3, guidance=2.0, **kwargs), three)
    both = model.sample(2, label=torch.tensor([3, -1]), **kwargs)
    torch.testing.assert_close(both, model.sample(2, text=[DIGITS.say(3), ""], **kwargs))
    torch.testing.assert_close(both[1], model.sample(2, **kwargs)[1])
    assert (both[1] - three[1]).abs().max() > 1e-3
    x, label = DATA[:B], torch.full((B,), 4)
    same = model.log_prob(x, text=DIGITS.say(4), seed=0)
    torch.testing.assert_close(model.log_prob(x, label=label, seed=0), same)
    assert (model.log_prob(x, seed=0) - same).abs().max() > 1e-4


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_captions_are_drawn_and_dropped_at_their_share(share, monkeypatch):
    model, seen = small(condition_dropout=share), []
    model.measure_scale(DATA, seed=0)
    real = model.text.encode
    monkeypatch.setattr(model.text, "encode", lambda texts: seen.append(texts) or real(texts))
    x, label = DATA[:1].expand(2000, 64), torch.arange(2000) % 10
    for arguments in ({"label": label}, {"text": "a five"}):
        model.loss(x, seed=1, **arguments)
        empty = [string == "" for string in seen[-1]]
        assert sum(empty) / 2000 == pytest.approx(share, abs=0.04)
    said = {i: {DIGITS.say(i, j) for j in range(len(DIGITS.templates))} for i in range(10)}
    kept = [(i, string) for i, string in zip(label.tolist(), seen[0], strict=True) if string]
    assert all(string in said[i] for i, string in kept)
    assert len(set(kept)) == (0 if share == 1 else 10 * len(DIGITS.templates))


def test_conv_vae():
    for side, latent in ((8, 4), (28, 7), (5, 5), (10, 5)):
        vae = conv_vae(side, 17, channels=3, width=8).eval()
        x = torch.randint(0, 17, (2, side * side), generator=torch.Generator().manual_seed(0))
        assert vae.encode(x)[0].shape == (2, 3, latent, latent)
        assert vae.reconstruct(x).shape == vae.sample(2, seed=0).shape == x.shape
        assert vae.elbo(x, seed=0).shape == (2,)
    vae = conv_vae(8, 17, width=8)
    x = DATA[:1].clone()
    (vae.decode(vae.encode(x)[0])[0, 0] * torch.arange(17)).sum().backward()
    assert all(p.grad.abs().max() > 0 for name, p in vae.named_parameters() if "bias" not in name)


def test_refusals():
    vae, schedule = conv_vae(8, 17, width=8), Schedule.linear(10)
    for diffusion in (
        Diffusion(MLP(64), schedule, (64,)),
        Diffusion(MLP(64), schedule, (4, 4, 4), levels=17),
    ):
        with pytest.raises(
            ValueError, match=r"floats of the latents' shape \(4, 4, 4\), got shape"
        ):
            LatentDiffusion(vae, diffusion)
    diffusion = Diffusion(MLP(64), schedule, (4, 4, 4))
    with pytest.raises(ValueError, match="captions need a text encoder"):
        LatentDiffusion(vae, diffusion, captions=DIGITS)
    deaf = LatentDiffusion(vae, diffusion)
    deaf.measure_scale(DATA, seed=0)
    with pytest.raises(ValueError, match="text= needs a model with a text encoder"):
        deaf.sample(1, text="a three")
    model = small()
    model.measure_scale(DATA, seed=0)
    for call in (model.loss, model.log_prob):
        with pytest.raises(ValueError, match="a label or a text, got both"):
            call(DATA, label=torch.zeros(40, dtype=torch.int64), text="a one")
        with pytest.raises(ValueError, match="one string or 40, one a row, got 2"):
            call(DATA, text=["a one", "a two"])
    with pytest.raises(ValueError, match=r"label must lie in \[-1, 10\), got 10"):
        model.sample(1, label=10)
    for options, message in (
        ({"classes": 11}, r"classes must lie in \[0, 10\]"),
        ({"captions": "cats"}, "captions must be one of digits, fashion, got 'cats'"),
        ({"schedule": "square"}, "schedule must be one of linear"),
    ):
        with pytest.raises(ValueError, match=message):
            image_latent_diffusion(64, 17, **options)
    with pytest.raises(ValueError, match="pictures must be square, got 63"):
        image_latent_diffusion(63, 17)
    with pytest.raises(ValueError, match="the side must be a multiple of 2, got 9"):
        image_latent_diffusion(81, 17)


def vq_model():
    torch.manual_seed(0)
    vqvae = image_vqvae(16, 5, codes=7, code_width=2, width=4)
    schedule = Schedule.linear(10)
    net = nn.Sequential(nn.Flatten(1), nn.Linear(8, 8), nn.Unflatten(1, (2, 2, 2)))
    diffusion = Diffusion(lambda x, t: net(x), schedule, (2, 2, 2))
    diffusion.add_module("denoiser", net)
    return LatentDiffusion(VQLatents(vqvae), diffusion), vqvae


def test_latents_of_a_vqvae():
    model, vqvae = vq_model()
    x = torch.randint(5, (9, 16), generator=torch.Generator().manual_seed(1))
    z = vqvae.eval().vectors(x)
    vqvae.codebook.assign(z.movedim(1, -1).flatten(0, -2)[::5][:7].detach(), 1.0)
    assert len(vqvae.encode(x).unique()) == 7
    model.measure_scale(x)
    u = model.encode(x, seed=1)
    assert torch.equal(u, model.encode(x))
    assert torch.equal(u, model.scale * z)
    assert u.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(model.decode(u), vqvae.reconstruct(x)), "decoding begins with nearest codes"
    codes = vqvae.codebook.codes.clone()
    model.train().loss(x, seed=2).backward()
    assert torch.equal(vqvae.codebook.codes, codes)
    assert all(p.grad is None for p in vqvae.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.diffusion.denoiser.parameters())
    samples = model.sample(5, seed=4, steps=3)
    assert samples.shape == (5, 16)
    assert set(samples.flatten().tolist()) <= set(range(5))
    assert torch.equal(model.sample(2, seed=4, steps=3, offset=3), samples[3:])
    assert model.log_prob_kind == "none"
    with pytest.raises(NotImplementedError, match="TokenPrior"):
        model.log_prob(x, seed=5)
