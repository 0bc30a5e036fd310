"""Diffusion models: exact oracles, laws of their samplers and conditions, training."""

import copy
import functools
import math

import pytest
import torch
from torch import Tensor

import gmkernels
from gmkernels import Schedule, data, noise
from gmkernels.__main__ import main
from gmkernels.models import bound
from gmkernels.models.diffusion import Diffusion
from gmkernels.models.edm import EDM
from gmkernels.models.image_diffusion import image_diffusion, image_flow_matching
from gmkernels.models.nets import MLP
from gmkernels.spec import filled
from gmkernels.train import training_step


def gaussian_net(schedule: Schedule, s2: float, kind: str):
    """The optimal network for data N(0, s2 I)."""

    def net(x: Tensor, t: Tensor) -> Tensor:
        a, s = schedule.levels64.to(x.dtype)[t.long(), :2].unbind(1)
        a, s = a.view(-1, 1), s.view(-1, 1)
        x0, eps = a * s2 * x / (a * a * s2 + s * s), s * x / (a * a * s2 + s * s)
        return {
            "epsilon": eps,
            "sample": x0,
            "v_prediction": a * eps - s * x0,
            "flow_prediction": eps - x0,
        }[kind]

    return net


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize(
    ("s2", "entropy"), [(0.25, 0.72579135), (1.0, 1.41893853), (4.0, 2.11208571)]
)
@pytest.mark.parametrize("steps", [10, 100, 1000])
def test_bound_of_gaussian_data_is_its_entropy(steps, s2, entropy, kind, monkeypatch):
    """With the optimal network and reverse variance, plus KL(q(x_T) || p(x_T)), for every T.

    The bound is quadratic in x_0 and in each eps: both at +-1 deviation have its exact mean.
    """
    if steps == 1000 and kind != "epsilon":
        pytest.skip("the types differ in each term alike: shorter sums show it")
    schedule = Schedule.linear(steps, 0.1 / steps, min(20 / steps, 0.999))
    a, s = schedule.levels64[:, :2].unbind(1)
    x0 = math.sqrt(s2) * torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)[:, None]
    eps = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)[:, None]
    for name in ("add_noise", "denoising_loss"):
        real = getattr(gmkernels, name)
        monkeypatch.setattr(
            bound, name, lambda *args, real=real, seed, **kw: real(*args, eps=eps, **kw)
        )
    a1, s1 = torch.cat([a.new_ones(1), a[:-1]]), torch.cat([s.new_zeros(1), s[:-1]])
    added = s * s - (a / a1 * s1).square()
    optimal = 1 / (1 / (a1 * a1 * s2 + s1 * s1) + (a / a1).square() / added)
    model = Diffusion(gaussian_net(schedule, s2, kind), schedule, (1,), prediction_type=kind)
    total = model.vlb(x0, seed=0, variance=optimal).nats.mean()
    last = a[-1] ** 2 * s2 + s[-1] ** 2  # variance of q(x_T): what the prior does not match
    total = total - 0.5 * (last - 1 - last.log())
    assert total.item() == pytest.approx(entropy, abs=1e-6)
    # A fixed variance is worse.
    for worse in ("fixed_small", "fixed_large") if steps < 1000 else ():
        if s2 == 1.0 and worse == "fixed_large":
            continue  # it is the optimum there
        assert model.vlb(x0, seed=0, variance=worse).nats.mean() > total + 1e-6


PATHS = {
    "ddpm, small": ("ddpm", {"variance": "fixed_small"}),
    "ddpm, large": ("ddpm", {"variance": "fixed_large"}),
    "ddim": ("ddim", {"eta": 0.0}),
    "ddim, noised": ("ddim", {"eta": 1.0}),
    "flow": ("flow_euler", {}),
}


def sampled_variance(kind: str, schedule: Schedule, s2: float) -> float:
    """Of samples by the optimal network for N(0, s2 I): a step takes N(0, v) to N(0, f^2 v + n)."""
    v, levels = 1.0, [(1.0, 0.0), *schedule.levels64[:, :2].tolist()]
    for i in reversed(range(1, len(levels))):
        (a, s), (a1, s1) = levels[i], levels[i - 1]
        x0, eps = a * s2 / (a * a * s2 + s * s), s / (a * a * s2 + s * s)
        beta = 1 - (a / a1) ** 2 if kind != "flow" else 0.0
        n = s1 * s1 / (s * s) * beta  # Ho et al. 2020, eq. 7; Song et al. 2021, eq. 16
        if kind.startswith("ddpm"):
            f = a1 * beta / (s * s) * x0 + a / a1 * s1 * s1 / (s * s)
            n = beta if kind == "ddpm, large" and i > 1 else n
        elif kind == "flow":
            f, n = 1 + (s1 - s) * (eps - x0), 0.0
        else:
            n = n if kind == "ddim, noised" else 0.0
            f = a1 * x0 + math.sqrt(s1 * s1 - n) * eps
        v = f * f * v + n
    return v


@pytest.mark.parametrize("steps", [10, 100, 1000])
@pytest.mark.parametrize("s2", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("kind", PATHS)
def test_sampled_variance_is_that_of_the_closed_form(kind, s2, steps):
    name, options = PATHS[kind]
    if kind == "flow":
        schedule, prediction = Schedule.flow_matching(steps), "flow_prediction"
    else:
        schedule = Schedule.linear(steps, 0.1 / steps, min(20 / steps, 0.999))
        prediction = "epsilon"
    net = gaussian_net(schedule, s2, prediction)
    model = Diffusion(net, schedule, (100,), prediction_type=prediction)
    spacing = "trailing" if kind == "flow" else "leading"
    x = model.sample(200, sampler=model.sampler(name, steps, spacing=spacing, **options), seed=7)
    # Four standard deviations of the variance of 20,000 numbers.
    expected = sampled_variance(kind, schedule, s2)
    assert x.square().mean().item() == pytest.approx(expected, rel=4 * math.sqrt(2 / x.numel()))


def test_loss_of_the_optimal_network():
    """E |eps - eps_hat|^2 = a^2 s2 / (a^2 s2 + s^2), a mean over the times."""
    schedule, s2 = Schedule.linear(50), 2.0
    model = Diffusion(gaussian_net(schedule, s2, "epsilon"), schedule, (4,))
    a, s = schedule.levels64[:, :2].unbind(1)
    expected = (a * a * s2 / (a * a * s2 + s * s)).mean().item()
    x = math.sqrt(s2) * torch.randn(200_000, 4, generator=torch.Generator().manual_seed(0))
    assert model.loss(x, seed=1).item() == pytest.approx(expected, rel=0.02)


def test_bits_per_dim_and_terms():
    schedule = Schedule.cosine(8)
    net = gaussian_net(schedule, 1.0, "v_prediction")
    model = Diffusion(net, schedule, (3,), prediction_type="v_prediction")
    found = model.vlb(filled((5, 3), torch.float32, "cpu", 0), seed=2)
    assert found.steps.shape == (7, 5)
    assert (found.steps >= 0).all()
    assert (found.prior >= 0).all()
    torch.testing.assert_close(found.bits_per_dim, found.nats / (3 * math.log(2)))
    assert model.log_prob_kind == "lower bound"
    torch.testing.assert_close(
        model.log_prob(filled((5, 3), torch.float32, "cpu", 0), seed=2), -found.nats
    )


def test_decoder_of_levels_is_a_distribution():
    """The masses of all levels sum to 1, whatever mean and variance."""
    levels, mean = 17, torch.tensor([[0.3], [-1.4], [5.0]])
    every = torch.arange(levels) * 2 / (levels - 1) - 1
    for variance in (1e-4, 0.01, 1.0):
        nats = [
            bound._decoder_nats(x.expand(3, 1), mean, torch.tensor(variance), levels) for x in every
        ]
        total = torch.stack(nats).neg().exp().sum(0)
        torch.testing.assert_close(total, torch.ones(3), rtol=0, atol=1e-5)


def digits_model(**options) -> Diffusion:
    torch.manual_seed(0)
    model = image_diffusion(64, 17, times=8, width=8, **options)
    for p in model.parameters():  # the zero-initialised ones too
        p.data += 0.05 * torch.randn_like(p)
    return model.eval()


def test_samples_do_not_depend_on_the_split():
    model = digits_model()

    @functools.cache
    def draw(first: int, count: int) -> Tensor:
        label = torch.arange(first, first + count) % 10
        return model.sample(
            count, steps=4, sampler="ddpm", label=label, guidance=2.0, seed=3, offset=first
        )

    # Networks may round otherwise at another batch size; the noise and the steps may not.
    model.net.forward = lambda x, t, label=None: torch.tanh(x) * (1 if label is None else 0.5)
    assert torch.equal(draw(0, 64), torch.cat([draw(0, 1), draw(1, 3), draw(4, 60)]))
    assert draw(0, 64).dtype == torch.int64
    assert draw(0, 64).min() >= 0
    assert draw(0, 64).max() <= 16


def test_guidance_weighs_the_label_against_none():
    model, key = digits_model(), noise.key(4)
    kwargs = {"steps": 3, "sampler": "ddim", "seed": key}
    labelled = model.sample(6, label=3, **kwargs)
    assert torch.equal(model.sample(6, label=3, guidance=1.0, **kwargs), labelled)
    free = model.sample(6, **kwargs)
    assert torch.equal(model.sample(6, label=3, guidance=0.0, **kwargs), free)
    assert torch.equal(model.sample(6, label=torch.full((6,), -1), **kwargs), free)
    assert not torch.equal(model.sample(6, label=3, guidance=4.0, **kwargs), labelled)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m"])
def test_classifier_guidance_gives_the_posterior(name):
    """Data N(0, 1), p(y|x_t) from y = x_0 + N(0, 1): guided samples have mean y/2, variance 1/2."""
    schedule, y = Schedule.linear(), 1.5
    model = Diffusion(gaussian_net(schedule, 1.0, "epsilon"), schedule, (1,))

    def classifier(x: Tensor, t: Tensor) -> Tensor:
        a = schedule.alpha[t.round().long()].view(-1, 1)
        # x_0 given x_t is N(a x_t, 1 - a^2) here, so y given x_t is N(a x_t, 2 - a^2).
        return a * (y - a * x) / (2 - a * a)

    path = model.sampler(name, 500 if name == "ddpm" else 200, spacing="trailing")
    x = model.sample(20_000, sampler=path, classifier=classifier, seed=5)
    assert x.mean().item() == pytest.approx(y / 2, abs=0.04)
    assert x.var().item() == pytest.approx(0.5, abs=0.05)


def test_labels_are_dropped_at_their_share():
    seen = []

    def net(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        seen.append(label)
        return x

    label = torch.arange(20_000) % 10
    for share in (0.0, 0.1, 1.0):
        model = Diffusion(net, Schedule.linear(10), (2,), condition_dropout=share)
        model.loss(torch.zeros(20_000, 2), label, seed=1)
        dropped = seen[-1] == -1
        assert dropped.float().mean().item() == pytest.approx(share, abs=0.01)
        assert torch.equal(seen[-1][~dropped], label[~dropped])


def test_edm_steps_fold_its_preconditioning():
    """A step on F with prediction type edm is the step on D with prediction type sample."""
    torch.manual_seed(0)
    model = EDM(MLP(2, width=16), Schedule.karras(6), (2,))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x = 80 * filled((9, 2), torch.float32, "cpu", 0)
    folded = model.sampler("euler", 6, spacing="leading")
    plain = model.sampler("euler", 6, spacing="leading", prediction_type="sample")
    for i in range(6):
        sigma = folded.level_of(i)[1].expand(9)
        a = gmkernels.euler_step(x, model.predict(x, sigma), i, folded)
        b = gmkernels.euler_step(x, model.estimate(x, sigma), i, plain)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        x = a
    assert model.sample(4, steps=6, seed=0).isfinite().all()
    with pytest.raises(ValueError, match="needs a variance_exploding schedule, got flow"):
        EDM(MLP(2), Schedule.flow_matching(), (2,))


def test_the_table_of_a_sampler_is_made_once(monkeypatch):
    made, make = [], gmkernels.Sampler.__init__

    def counted(self, *args, **kwargs) -> None:
        made.append(self)
        make(self, *args, **kwargs)

    monkeypatch.setattr(gmkernels.Sampler, "__init__", counted)
    model = Diffusion(lambda x, t: x / 2, Schedule.cosine(20), (3,))

    def draw(steps: int = 4, of: Diffusion = model, **options) -> Tensor:
        return of.sample(2, steps=steps, seed=1, **options)

    with torch.inference_mode():
        first = draw()
    assert not made[0].table.is_inference()
    for other in (model, model.to(torch.bfloat16), copy.deepcopy(model)):
        assert torch.equal(draw(of=other), first)
    assert len(made) == 1
    # Whatever the table depends on has one of its own.
    assert not torch.equal(draw(sampler="ddpm"), first)
    assert not torch.equal(draw(steps=5), first)
    model.prediction_type = "sample"
    assert not torch.equal(draw(), first)
    model.schedule, model.prediction_type = Schedule.linear(20), "epsilon"
    assert not torch.equal(draw(), first)
    assert len(made) == 5
    with pytest.raises(NotImplementedError, match="meta"):  # where no table can be made
        draw(of=copy.deepcopy(model).to("meta"))
    for steps in range(1, 21):
        draw(steps=steps)
    assert len(model._paths) == 8
    before = len(made)
    draw(steps=13)  # it becomes the last to go
    draw(steps=1)
    draw(steps=13)
    assert len(made) == before + 1
    assert not model.state_dict()


@pytest.mark.parametrize("make", [image_diffusion, image_flow_matching])
def test_learns_digits(make):
    torch.manual_seed(0)
    model, images = make(64, 17, times=20, width=16), data.digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    test = images.test[:100]

    def measure() -> tuple[float, float]:
        with torch.no_grad():
            loss = model.loss(test, images.test_labels[:100], seed=0)
            return loss.item(), model.vlb(test, seed=0).nats.mean().item()

    before = measure()
    for step in range(60):
        index = data.batch_indices(1000, 50, seed=1, step=step)
        training_step(
            model, optimizer, images.train[index], seed=step, label=images.train_labels[index]
        )
    after = measure()
    assert after[0] < 0.7 * before[0]
    assert after[1] < before[1]


@pytest.mark.parametrize("name", ["diffusion", "flow_matching"])
def test_commands(name, tmp_path, capsys):
    run, picture = tmp_path / "run", tmp_path / "three.png"
    small = ["-o", "times=4", "-o", "width=8", "--steps", "3", "--every", "3"]
    assert main(["train", name, "--data", "digits", "--out", str(run), *small]) == 0
    assert "nats (-log p(x) or its bound) per image" in capsys.readouterr().out
    assert (run / "samples.png").is_file()
    sampler = "flow_euler" if name == "flow_matching" else "ddim"
    options = ["--sampler", sampler, "--steps", "3", "--class", "3", "--guidance", "2"]
    assert main(["sample", str(run), "--n", "4", "--out", str(picture), *options]) == 0
    assert picture.is_file()
    for wrong, message in (
        (["--class", "10"], r"--class must lie in [0, 10), got 10"),
        (["--guidance", "2"], "--guidance needs --class"),
        (["--steps", "9"], "steps must be at most 4"),
    ):
        with pytest.raises(SystemExit):
            main(["sample", str(run), "--out", str(picture), *wrong, "--sampler", "ddim"])
        assert message in capsys.readouterr().err


def test_refusals():
    schedule, net = Schedule.linear(10), MLP(2)
    with pytest.raises(ValueError, match="condition_dropout must lie in"):
        Diffusion(net, schedule, (2,), condition_dropout=1.5)
    model = Diffusion(net, schedule, (2,))
    with pytest.raises(ValueError, match="sampler must be one of ddpm, ddim"):
        model.sample(1, sampler="plms")
    with pytest.raises(ValueError, match="steps must be an int >= 1"):
        model.sample(1, steps=0)
    with pytest.raises(ValueError, match="variance must be one of fixed_small"):
        model.vlb(torch.zeros(1, 2), variance="optimal")
    with pytest.raises(ValueError, match="pictures must be square, got 63"):
        image_diffusion(63, 17)
    with pytest.raises(ValueError, match="schedule must be one of linear"):
        image_diffusion(64, 17, schedule="exponential")
