"""Samplers against diffusers: full loops with the same noise, and the known sums of its tests."""

import math

import numpy as np
import pytest
import torch
from test_sampler import sample
from torch import Tensor

import gmkernels
from gmkernels import Sampler, Schedule
from gmkernels.spec import filled


def dummy_net(x: Tensor, t: float) -> Tensor:
    """The model of diffusers' scheduler tests."""
    return x * t / (t + 1)


def dummy_sample() -> Tensor:
    """Their sample."""
    return (torch.arange(768) / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2).contiguous()


@pytest.mark.parametrize(("kind", "total"), [("epsilon", 258.9606), ("v_prediction", 202.0296)])
def test_known_sum_of_ddpm(kind, total):
    sampler = Sampler.ddpm(Schedule.linear(), prediction_type=kind)
    generator = torch.manual_seed(0)
    x = sample(
        dummy_sample(),
        sampler,
        dummy_net,
        lambda i: torch.randn((4, 3, 8, 8), generator=generator),
        clip=1.0,
    )
    assert x.abs().sum().item() == pytest.approx(total, abs=1e-2)


@pytest.mark.parametrize(("kind", "total"), [("epsilon", 172.0067), ("v_prediction", 52.5302)])
def test_known_sum_of_ddim(kind, total):
    sampler = Sampler.ddim(Schedule.linear(), 10, prediction_type=kind)
    x = sample(dummy_sample(), sampler, dummy_net, clip=1.0)
    assert x.abs().sum().item() == pytest.approx(total, abs=1e-2)


def test_known_sum_of_edm_euler():
    schedule = Schedule.karras(10)
    sampler = Sampler.euler(schedule, 10, prediction_type="edm", spacing="leading")

    def net(x: Tensor, t: float) -> Tensor:
        sigma = schedule.sigma[int(t)].item()
        return dummy_net(x / math.sqrt(sigma**2 + 0.25), 0.25 * math.log(sigma))

    x = sample(dummy_sample() * math.sqrt(80.0**2 + 1), sampler, net)
    assert x.abs().sum().item() == pytest.approx(34.1855, abs=1e-3)


# Of the largest element, over a full loop.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


def net_of(dtype: torch.dtype):
    weight = torch.linspace(0.2, 0.9, 5 * 6 * 7, dtype=dtype).view(1, 5, 6, 7)
    return lambda x, t: torch.tanh(x * weight) * (0.5 + t / 2000)


def given(dtype: torch.dtype, steps: int):
    x = filled((3, 5, 6, 7), dtype, "cpu", 0)
    return x, [filled(x.shape, dtype, "cpu", 1 + i) for i in range(steps)]


def theirs_loop(theirs, net, x: Tensor, noise: list[Tensor], monkeypatch, module: str, **options):
    drawn = iter(noise)
    monkeypatch.setattr(
        f"diffusers.schedulers.{module}.randn_tensor",
        lambda *a, **k: next(drawn).clone(),
        raising=False,
    )
    for t in theirs.timesteps:
        scaled = theirs.scale_model_input(x, t)
        x = theirs.step(net(scaled, t.item()), t, x, **options).prev_sample
    return x


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("limit", [{}, {"clip": 0.8}, {"dynamic_threshold": (0.9, 1.5)}])
def test_ddpm_is_that_of_diffusers(limit, kind, variance, spacing, dtype, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    schedule, steps = Schedule.linear(), 7
    theirs = diffusers.DDPMScheduler(
        prediction_type=kind,
        variance_type=variance,
        timestep_spacing=spacing,
        clip_sample="clip" in limit,
        clip_sample_range=limit.get("clip", 1.0),
        thresholding="dynamic_threshold" in limit,
        dynamic_thresholding_ratio=limit.get("dynamic_threshold", (0.9,))[0],
        sample_max_value=1.5,
    )
    theirs.set_timesteps(steps)
    theirs.alphas_cumprod = schedule.levels64[:, 0].square().to(dtype)
    sampler = Sampler.ddpm(
        schedule, steps, variance=variance, prediction_type=kind, spacing=spacing
    )
    assert sampler.times.tolist() == theirs.timesteps.tolist()
    x, noise = given(dtype, steps)
    noise[-1].zero_()  # theirs noises the last x where its time is not 0
    want = theirs_loop(theirs, net_of(dtype), x, noise, monkeypatch, "scheduling_ddpm")
    got = sample(x, sampler, net_of(dtype), noise.__getitem__, **limit)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item())


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("limit", [{}, {"clip": 0.8}])
def test_learned_range_is_that_of_diffusers(limit, kind, dtype, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    schedule, steps = Schedule.linear(), 6
    theirs = diffusers.DDPMScheduler(
        prediction_type=kind,
        variance_type="learned_range",
        clip_sample="clip" in limit,
        clip_sample_range=0.8,
    )
    theirs.set_timesteps(steps)
    theirs.alphas_cumprod = schedule.levels64[:, 0].square().to(dtype)
    sampler = Sampler.ddpm(schedule, steps, variance="learned_range", prediction_type=kind)
    x, noise = given(dtype, steps)
    net = net_of(dtype)

    def both(x: Tensor, t: float) -> Tensor:
        return torch.cat([net(x, t), torch.sin(3 * x)], 1)

    want = theirs_loop(theirs, both, x, noise, monkeypatch, "scheduling_ddpm")
    for i, t in enumerate(sampler.times.tolist()):
        p, v = both(x, t).chunk(2, 1)
        x = gmkernels.ddpm_step(x, p, i, sampler, variance=v, eps=noise[i], **limit)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(x, want, rtol=tolerance, atol=tolerance * want.abs().max().item())


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])  # see Sampler.ddim() of linspace
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("rederive", [False, True])
@pytest.mark.parametrize("limit", [{}, {"clip": 0.8}, {"dynamic_threshold": (0.9, 1.5)}])
def test_ddim_is_that_of_diffusers(limit, rederive, kind, eta, spacing, dtype, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    schedule, steps = Schedule.linear(), 8
    theirs = diffusers.DDIMScheduler(
        prediction_type=kind,
        timestep_spacing=spacing,
        clip_sample="clip" in limit,
        clip_sample_range=limit.get("clip", 1.0),
        thresholding="dynamic_threshold" in limit,
        dynamic_thresholding_ratio=limit.get("dynamic_threshold", (0.9,))[0],
        sample_max_value=1.5,
    )
    theirs.set_timesteps(steps)
    theirs.alphas_cumprod = schedule.levels64[:, 0].square().to(dtype)
    theirs.final_alpha_cumprod = theirs.final_alpha_cumprod.to(dtype)
    sampler = Sampler.ddim(
        schedule,
        steps,
        eta=eta,
        prediction_type=kind,
        spacing=spacing,
        rederive_epsilon=rederive,
    )
    assert sampler.times.tolist() == theirs.timesteps.tolist()
    x, noise = given(dtype, steps)
    options = {"eta": eta, "use_clipped_model_output": rederive}
    want = theirs_loop(theirs, net_of(dtype), x, noise, monkeypatch, "scheduling_ddim", **options)
    got = sample(x, sampler, net_of(dtype), noise.__getitem__, **limit)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item())


PEERS = {
    "euler": ("EulerDiscreteScheduler", "scheduling_euler_discrete"),
    "euler_ancestral": (
        "EulerAncestralDiscreteScheduler",
        "scheduling_euler_ancestral_discrete",
    ),
    "heun": ("HeunDiscreteScheduler", "scheduling_heun_discrete"),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", "scheduling_dpmsolver_multistep"),
}


class Wide:
    """A module whose float32 is its float64."""

    def __init__(self, module) -> None:
        self.module = module

    def __getattr__(self, name: str):
        return getattr(self.module, "float64" if name == "float32" else name)


def wide_peer(name: str, monkeypatch, **config):
    """Their scheduler in float64, float32 being left to ours, and its module."""
    diffusers = pytest.importorskip("diffusers")
    peer, module = PEERS[name]
    for library, made in (("torch", torch), ("np", np)):
        monkeypatch.setattr(f"diffusers.schedulers.{module}.{library}", Wide(made))
    return getattr(diffusers, peer)(**config), module


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "karras"])
@pytest.mark.parametrize("name", PEERS)
def test_others_are_those_of_diffusers(name, spacing, kind, dtype, monkeypatch):
    """Theirs run on x / alpha but for dpmpp_2m, in float64."""
    if name == "dpmpp_2m" and spacing == "leading":
        pytest.skip("theirs counts times otherwise there")
    if kind == "sample" and name == "euler_ancestral":
        pytest.skip("theirs does not know it")
    if name == "euler_ancestral" and spacing == "karras":
        pytest.skip("theirs does not know it")
    schedule, steps = Schedule.scaled_linear(), 8
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    if spacing == "karras":
        config["use_karras_sigmas"] = True
    config["timestep_spacing"] = "linspace" if spacing == "karras" else spacing
    config["prediction_type"] = "original_sample" if (name, kind) == ("euler", "sample") else kind
    theirs, module = wide_peer(name, monkeypatch, **config)
    theirs.set_timesteps(steps)
    sampler = getattr(Sampler, name)(schedule, steps, prediction_type=kind, spacing=spacing)
    x, noise = given(torch.float64, steps)
    scale = 1.0 if name == "dpmpp_2m" else math.sqrt(1 + theirs.sigmas[0].item() ** 2)
    times, net = iter(theirs.timesteps.tolist()), net_of(dtype)
    # Both sides see the same times: interpolated ones differ in the last digits.
    got = sample(
        x.to(dtype), sampler, lambda x, t: net(x, next(times)), lambda i: noise[i].to(dtype)
    )
    want = theirs_loop(theirs, net_of(torch.float64), x * scale, noise, monkeypatch, module)
    atol = TOLERANCES[dtype] * want.abs().max().item()
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCES[dtype], atol=atol)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("name", "limit"), [("dpmpp_2m", {"dynamic_threshold": (0.9, 1.5)}), ("heun", {"clip": 0.8})]
)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_limits_are_those_of_diffusers(dtype, name, limit, kind, monkeypatch):
    """The limits that their other samplers know: thresholding of one, clamping of the other."""
    schedule, steps = Schedule.scaled_linear(), 8
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    config |= {"timestep_spacing": "linspace", "prediction_type": kind}
    if name == "heun":
        config |= {"clip_sample": True, "clip_sample_range": 0.8}
    else:
        config |= {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
    theirs, module = wide_peer(name, monkeypatch, **config)
    theirs.set_timesteps(steps)
    sampler = getattr(Sampler, name)(schedule, steps, prediction_type=kind, spacing="linspace")
    (x, _), net = given(torch.float64, 0), net_of(dtype)
    scale = 1.0 if name == "dpmpp_2m" else math.sqrt(1 + theirs.sigmas[0].item() ** 2)
    times = iter(theirs.timesteps.tolist())
    got = sample(x.to(dtype), sampler, lambda x, t: net(x, next(times)), **limit)
    want = theirs_loop(theirs, net_of(torch.float64), x * scale, [], monkeypatch, module)
    atol = TOLERANCES[dtype] * want.abs().max().item()
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCES[dtype], atol=atol)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_flow_euler_is_that_of_diffusers(dtype, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    if dtype == torch.float64:
        module = "diffusers.schedulers.scheduling_flow_match_euler_discrete"
        monkeypatch.setattr(f"{module}.torch", Wide(torch))
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule, steps = Schedule.flow_matching(shift=3.0), 10
    sampler = Sampler.flow_euler(schedule, steps)
    sigmas = schedule.levels64[sampler.times.long(), 1]
    theirs.set_timesteps(sigmas=sigmas.tolist())
    # theirs shifts the sigmas that it is given once more
    theirs.sigmas = torch.cat([sigmas, torch.zeros(1)]).to(dtype)
    x, _ = given(dtype, 0)
    net = net_of(dtype)
    got = sample(x, sampler, lambda x, t: net(x, 1000 * schedule.levels64[int(t), 1].item()))
    for i, t in enumerate(theirs.timesteps):
        p = net(x, 1000 * sigmas[i].item())
        x = theirs.step(p, t, x).prev_sample
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(got, x, rtol=tolerance, atol=tolerance)
