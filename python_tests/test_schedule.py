"""Schedules, noising and the denoising loss against diffusers, and their laws."""

import pytest
import torch
from torch import nn

import gmkernels
from gmkernels import Schedule
from gmkernels.ops.diffusion_noise.reference import PREDICTION_TYPES
from gmkernels.spec import filled

PRESERVING = {
    "linear": (Schedule.linear, {"beta_schedule": "linear"}),
    "scaled_linear": (
        Schedule.scaled_linear,
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "cosine": (Schedule.cosine, {"beta_schedule": "squaredcos_cap_v2"}),
}
EVERY = {
    **{name: make for name, (make, _) in PRESERVING.items()},
    "sigmoid": Schedule.sigmoid,
    "karras": Schedule.karras,
    "flow_matching": Schedule.flow_matching,
    "shifted": lambda steps=1000: Schedule.flow_matching(steps, shift=3.0),
    "zero_terminal_snr": lambda steps=1000: Schedule.linear(steps).zero_terminal_snr(),
}


def peer(**options):
    """A scheduler of diffusers whose tables are float64, as ours are before they are rounded."""
    diffusers = pytest.importorskip("diffusers")
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        made = diffusers.DDPMScheduler(**options)
    finally:
        torch.set_default_dtype(default)
    return made


@pytest.mark.parametrize("zero_terminal", [False, True])
@pytest.mark.parametrize("name", PRESERVING)
def test_alpha_bar_is_that_of_diffusers(name, zero_terminal):
    make, options = PRESERVING[name]
    schedule = make()
    if zero_terminal:
        schedule = schedule.zero_terminal_snr()
    theirs = peer(**options, rescale_betas_zero_snr=zero_terminal).alphas_cumprod.double()
    # diffusers holds beta in float32: its products drift by 1000 roundings.
    torch.testing.assert_close(schedule.levels64[:, 0].square(), theirs, rtol=2e-4, atol=1e-7)


def test_known_values():
    assert Schedule.linear().alpha_bar[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)
    assert Schedule.linear().zero_terminal_snr().alpha[-1].item() == 0.0
    karras = Schedule.karras(10)
    assert karras.sigma[0].item() == pytest.approx(0.002)
    assert karras.sigma[-1].item() == pytest.approx(80.0)
    assert Schedule.flow_matching(4).sigma.tolist() == [0.25, 0.5, 0.75, 1.0]
    shifted = Schedule.flow_matching(2, shift=3.0).sigma
    torch.testing.assert_close(shifted, torch.tensor([0.75, 1.0]))


@pytest.mark.parametrize("steps", [1, 2, 1000])
@pytest.mark.parametrize("name", EVERY)
def test_levels_are_finite_and_ascend(name, steps):
    if name == "zero_terminal_snr" and steps == 1:
        pytest.skip("one time has no terminal to move")
    schedule = EVERY[name](steps)
    assert len(schedule) == steps
    assert schedule.levels.isfinite().all()
    assert schedule.levels.dtype == torch.float32
    assert (schedule.levels64[:, 1].diff() > 0).all()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("weighting", ["uniform", "snr", "min_snr", "edm"])
def test_nothing_is_nan_at_the_ends(name, kind, weighting):
    schedule = EVERY[name]()
    x0 = filled((2, 6), torch.float32, "cpu", 0)
    t = torch.tensor([0, len(schedule) - 1])
    x_t, target = gmkernels.add_noise_with_target(x0, t, schedule, prediction_type=kind, seed=1)
    assert x_t.isfinite().all()
    assert target.isfinite().all()
    options = {"seed": 1, "prediction_type": kind, "weighting": weighting}
    if schedule.alpha[-1] == 0 and (kind, weighting) == ("epsilon", "edm"):
        # An epsilon says nothing of x0 where no signal is left: edm's weight is infinite there.
        with pytest.raises(ValueError, match="is infinite where alpha is 0"):
            gmkernels.denoising_loss(target, x0, t, schedule, **options)
    else:
        assert (gmkernels.denoising_loss(target, x0, t, schedule, **options) == 0).all()


@pytest.mark.parametrize("name", PRESERVING)
def test_noising_is_that_of_diffusers(name):
    make, options = PRESERVING[name]
    schedule, theirs = make(), peer(**options)
    theirs.alphas_cumprod = schedule.levels64[:, 0].square()
    x0, eps = (filled((7, 3, 4, 4), torch.float64, "cpu", i) for i in range(2))
    t = torch.tensor([0, 1, 10, 500, 900, 998, 999])
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        x, e = x0.to(dtype), eps.to(dtype)
        x_t, v = gmkernels.add_noise_with_target(
            x, t, schedule, prediction_type="v_prediction", eps=e
        )
        torch.testing.assert_close(x_t, theirs.add_noise(x, e, t), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(v, theirs.get_velocity(x, e, t), rtol=tolerance, atol=tolerance)
        assert torch.equal(gmkernels.add_noise(x, t, schedule, eps=e), x_t)


def test_flow_noising_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = Schedule.flow_matching(shift=3.0)
    x0, eps = (filled((3, 5), torch.float32, "cpu", i) for i in range(2))
    at = torch.tensor([0, 400, 999])
    x_t = gmkernels.add_noise(x0, at, schedule, eps=eps)
    expected = theirs.scale_noise(x0, theirs.timesteps[999 - at], eps)
    torch.testing.assert_close(x_t, expected, rtol=1e-5, atol=1e-6)


def test_min_snr_is_that_of_diffusers():
    training_utils = pytest.importorskip("diffusers.training_utils")
    schedule, theirs = Schedule.linear(), peer()
    t = torch.arange(0, 1000, 37)
    snr = training_utils.compute_snr(theirs, t).double()
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    for kind, by in divisor.items():
        w = schedule.weights(schedule.levels64[t], "min_snr", kind, 5.0, 0.5)
        torch.testing.assert_close(w, snr.clamp(max=5.0) / by, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("weighting", ["snr", "min_snr", "edm"])
def test_weightings_weigh_the_error_of_x0(kind, weighting):
    """Whatever is predicted: the weighted loss is the weighted square error of the implied x0."""
    schedule = Schedule.cosine(50)
    x0, error = (filled((6, 8), torch.float64, "cpu", i) for i in range(2))
    t = torch.tensor([1, 7, 20, 33, 45, 49])
    a, s = schedule.levels64[t, :2].unbind(1)
    x_t, target = gmkernels.add_noise_with_target(x0, t, schedule, prediction_type=kind, seed=3)
    guess = target + error
    column = a[:, None], s[:, None]
    implied = {
        "epsilon": (x_t - column[1] * guess) / column[0],
        "sample": guess,
        "v_prediction": column[0] * x_t - column[1] * guess,
        "flow_prediction": (x_t - column[1] * guess) / (column[0] + column[1]),
    }[kind]
    snr, sigma = (a / s).square(), s / a
    by = {
        "snr": snr,
        "min_snr": snr.clamp(max=5.0),
        "edm": (sigma**2 + 0.25) / (sigma * 0.5) ** 2,
    }[weighting]
    expected = by * (implied - x0).square().mean(1)
    loss = gmkernels.denoising_loss(
        guess, x0, t, schedule, seed=3, prediction_type=kind, weighting=weighting
    )
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


def test_loss_makes_the_noise_of_add_noise_again(backends):
    schedule, key = Schedule.linear(), gmkernels.noise.key(5, offset=2)
    x0 = filled((4, 33), torch.float32, "cpu", 0)
    t = torch.tensor([0, 300, 600, 999])
    for backend in backends:
        _, target = gmkernels.add_noise_with_target(x0, t, schedule, seed=key, backend=backend)
        assert torch.equal(target, gmkernels.normal((4, 33), seed=key))
        loss = gmkernels.denoising_loss(target, x0, t, schedule, seed=key, backend=backend)
        assert (loss == 0).all()


@pytest.mark.parametrize("name", ["linear", "karras", "flow_matching"])
def test_float_times(name):
    schedule = EVERY[name](11)
    if name == "linear":
        times = torch.arange(11, dtype=torch.float64) / 10
    else:
        times = schedule.levels64[:, 1]
    torch.testing.assert_close(schedule.at(times, torch.float64), schedule.levels64)
    half = schedule.at(times[:1] * 0.5 + times[1:2] * 0.5, torch.float64)
    assert schedule.levels64[0, 1] < half[0, 1] < schedule.levels64[1, 1]
    # Beyond its ends a schedule stays at them.
    assert schedule.at(torch.tensor([-1.0, 1e9])).isfinite().all()
    assert schedule.at(torch.tensor([float("nan")]))[0, :2].isnan().any()


def test_moves_and_keeps_its_precision():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 2)
            self.schedule = Schedule.linear(10)

    model = Model().to(torch.bfloat16)
    assert model.net.weight.dtype == torch.bfloat16
    assert model.schedule.levels.dtype == torch.float32
    assert model.schedule.levels64.dtype == torch.float64
    assert torch.equal(model.schedule.levels, Schedule.linear(10).levels)
    assert model.half().double().schedule.levels.dtype == torch.float32
    assert list(model.state_dict()) == ["net.weight", "net.bias"]
    meta = Schedule.linear(10).to("meta")
    assert meta.levels.device.type == meta.levels64.device.type == "meta"
    with pytest.raises(ValueError, match=r"the schedule is on meta.*schedule.to\('cpu'\)"):
        gmkernels.add_noise(torch.ones(1, 2), 0, meta, seed=0)


def test_a_table_is_made_once():
    schedule, t = Schedule.linear(10), torch.tensor([3])
    with torch.inference_mode():  # a validation before the first step of training
        first = schedule.table(t, False, "min_snr", "v_prediction")
    assert not first.is_inference()
    assert schedule.table(t, False, "min_snr", "v_prediction") is first
    assert schedule.table(t, False) is schedule.levels


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Schedule.linear(0), "steps must be an int >= 1, got 0"),
        (lambda: Schedule.linear(2.5), "steps must be an int >= 1, got 2.5"),
        (lambda: Schedule(torch.ones(3), torch.tensor([2.0, 1.0, 3.0]), "flow"), "must ascend"),
        (lambda: Schedule(torch.ones(2), torch.ones(3), "flow"), r"\[T\] with T >= 1"),
        (lambda: Schedule(torch.ones(2), torch.tensor([0.5, 1.0])), r"alpha\^2 \+ sigma\^2 = 1"),
        (lambda: Schedule(torch.ones(1), torch.tensor([float("nan")])), "finite and >= 0"),
        (lambda: Schedule(torch.ones(1), torch.ones(1), "other"), "kind must be one of"),
        (lambda: Schedule.from_betas(torch.tensor([0.1, 1.5])), r"betas must be \[T\] in \(0, 1\]"),
        (lambda: Schedule.scaled_linear(9, -1.0, 0.1), "0 < start <= end, got -1.0, 0.1"),
        (lambda: Schedule.sigmoid(9, tau=0.0), "start < end and tau > 0"),
        (lambda: Schedule.karras(9, 80.0, 0.002), "0 <= sigma_min < sigma_max and rho > 0, got 80"),
        (lambda: Schedule.karras(9, -1.0), "0 <= sigma_min < sigma_max and rho > 0, got -1.0"),
        (lambda: Schedule.flow_matching(9, shift=0.0), "shift > 0, got 0.0"),
        (lambda: Schedule.karras().zero_terminal_snr(), "needs a variance_preserving schedule"),
    ],
)
def test_bad_schedules(make, error):
    with pytest.raises(ValueError, match=error):
        make()


@pytest.mark.parametrize(
    ("t", "kind", "error"),
    [
        (10, ValueError, r"t must lie in \[0, 10\), the times of the schedule, got 10"),
        (-1, ValueError, r"t must lie in \[0, 10\)"),
        (torch.tensor([0, 10]), RuntimeError, r"t must lie in \[0, 10\).*got 10 in row 1"),
        (torch.tensor([-1, 0]), RuntimeError, "got -1 in row 0"),
        (torch.tensor([0, 1, 2]), ValueError, r"shape \(2,\), got \(3,\)"),
        (torch.zeros(2, 1, dtype=torch.long), ValueError, "one time, or one a row"),
        (torch.tensor([True, False]), TypeError, "integers .* or floats, got torch.bool"),
        ("3", TypeError, "int or a tensor, got str"),
        (torch.zeros(2, requires_grad=True), ValueError, r"pass t.detach\(\)"),
        (torch.zeros(2, dtype=torch.long, device="meta"), ValueError, "t must be on cpu"),
    ],
)
def test_bad_times(t, kind, error):
    with pytest.raises(kind, match=error):
        gmkernels.add_noise(torch.ones(2, 3), t, Schedule.linear(10), seed=0)


def test_times_outside_give_nan_where_looking_would_stop_the_gpu(backends):
    t = torch.tensor([0, 10, -1])
    for backend in set(backends) - {"native"}:
        x_t = gmkernels.add_noise(torch.ones(3, 5), t, Schedule.linear(10), seed=0, backend=backend)
        assert x_t[0].isfinite().all()
        assert x_t[1:].isnan().all()


def test_bad_arguments():
    schedule, x, t = Schedule.linear(10), torch.ones(2, 3), torch.tensor([1, 2])
    loss = gmkernels.denoising_loss
    with pytest.raises(ValueError, match="prediction_type must be one of epsilon, sample"):
        gmkernels.add_noise_with_target(x, t, schedule, prediction_type="noise", seed=0)
    with pytest.raises(ValueError, match="give the seed"):
        loss(x, x, t, schedule)
    with pytest.raises(ValueError, match="weighting must be one of uniform, snr"):
        loss(x, x, t, schedule, seed=0, weighting="other")
    for wrong in ({"gamma": -1.0}, {"sigma_data": 0.0}):
        with pytest.raises(ValueError, match="gamma and sigma_data must be > 0"):
            loss(x, x, t, schedule, seed=0, weighting="edm", **wrong)
    clean = Schedule(torch.tensor([1.0, 0.6]), torch.tensor([0.0, 0.8]))
    for weighting in ("snr", "edm"):
        with pytest.raises(ValueError, match="is infinite where sigma is 0"):
            loss(x, x, 1, clean, seed=0, weighting=weighting, prediction_type="sample")
    with pytest.raises(ValueError, match=r"weighting must have shape \(2,\)"):
        loss(x, x, t, schedule, seed=0, weighting=torch.ones(3))
    with pytest.raises(ValueError, match="x0 must have prediction's shape"):
        loss(x, x[:, :2], t, schedule, seed=0)
    with pytest.raises(ValueError, match="give eps or a seed, not both"):
        gmkernels.add_noise(x, t, schedule, seed=0, eps=x)
    with pytest.raises(TypeError, match=r"schedule must be a gmkernels.Schedule, got list"):
        gmkernels.add_noise(x, t, [0.1], seed=0)
    with pytest.raises(ValueError, match="at least two dimensions"):
        gmkernels.add_noise(torch.ones(3), 1, schedule, seed=0)
