"""Samplers: their laws, what noise they draw, what they refuse."""

import functools

import pytest
import torch
from torch import Tensor

import gmkernels
from gmkernels import Sampler, Schedule
from gmkernels.spacing import spaced
from gmkernels.spec import filled

STEPS = {
    name: getattr(gmkernels, f"{name}_step")
    for name in (
        "ddpm",
        "ddim",
        "euler",
        "euler_ancestral",
        "heun",
        "dpmpp_2m",
        "flow_euler",
    )
}


def sample(x: Tensor, sampler: Sampler, net, noise=None, **options) -> Tensor:
    """The loop of a user: net(x, t), one call a step."""
    step, previous = STEPS[sampler.name], None
    for i, t in enumerate(sampler.times.tolist()):
        extra = {} if noise is None or not sampler.noisy else {"eps": noise(i)}
        p = net(x, t)
        if sampler.name == "dpmpp_2m":
            x, previous = step(x, p, i, sampler, previous=previous, **extra, **options)
        elif sampler.name == "heun":
            before = x
            x = step(x, p, i, sampler, previous=previous, **extra, **options)
            previous = before
        else:
            x = step(x, p, i, sampler, **extra, **options)
    return x


@pytest.mark.parametrize("guidance", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("name", STEPS)
def test_guidance_is_the_step_of_the_combined_prediction(name, guidance):
    schedule = Schedule.flow_matching() if name == "flow_euler" else Schedule.linear()
    sampler = getattr(Sampler, name)(schedule, 5)
    x, c, u, previous = (filled((4, 9), torch.float64, "cpu", i) for i in range(4))
    extra = {"seed": 1} if sampler.noisy else {}
    if name in ("heun", "dpmpp_2m"):
        extra["previous"] = previous
    got = STEPS[name](x, c, 1, sampler, unconditional=u, guidance=guidance, **extra)
    want = STEPS[name](x, u + guidance * (c - u), 1, sampler, **extra)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler_ancestral"])
def test_samples_do_not_depend_on_the_split(name, backends):
    """64 samples in one batch, or as 1, 3 and 60 of them: the same bits."""
    options = {"eta": 1.0} if name == "ddim" else {}
    sampler = getattr(Sampler, name)(Schedule.linear(), 4, **options)
    net, key = (lambda x, t: torch.tanh(x) * 0.5), gmkernels.noise.key(3)

    def run(first: int, count: int, backend: str) -> Tensor:
        x = gmkernels.normal((count, 33), seed=7, offset=first, backend=backend)
        return sample(x, sampler, net, seed=key, offset=first, backend=backend)

    for backend in backends:
        whole = run(0, 64, backend)
        parts = [run(first, count, backend) for first, count in ((0, 1), (1, 3), (4, 60))]
        assert torch.equal(whole, torch.cat(parts)), backend


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler_ancestral"])
def test_each_row_may_be_at_its_own_step(name, backends):
    options = {"eta": 1.0} if name == "ddim" else {}
    sampler = getattr(Sampler, name)(Schedule.linear(), 6, **options)
    x, p = (filled((6, 40), torch.float32, "cpu", i) for i in range(2))
    steps = torch.tensor([5, 0, 3, 3, 1, 2])
    key = gmkernels.noise.key(2**40 + 5, offset=9)
    for backend in backends:
        mixed = STEPS[name](x, p, steps, sampler, seed=key, backend=backend)
        for b, i in enumerate(steps.tolist()):
            alone = STEPS[name](
                x[b : b + 1], p[b : b + 1], i, sampler, seed=key, offset=b, backend=backend
            )
            assert torch.equal(mixed[b : b + 1], alone)
        folded = gmkernels.normal((6, 40), seed=gmkernels.noise.fold_in(key, 3))
        given = STEPS[name](x, p, 3, sampler, eps=folded, backend=backend)
        assert torch.equal(STEPS[name](x, p, 3, sampler, seed=key, backend=backend), given)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction", "edm"])
@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("base", ["linear", "karras", "flow_matching", "zero_terminal_snr"])
def test_every_step_is_finite_or_refused(base, name, steps, kind):
    schedule = {
        "linear": Schedule.linear,
        "karras": Schedule.karras,
        "flow_matching": Schedule.flow_matching,
        "zero_terminal_snr": lambda: Schedule.cosine().zero_terminal_snr(),
    }[base]()
    if name == "flow_euler" and schedule.kind != "flow":
        pytest.skip("refused, see test_refusals")
    silent = schedule.alpha[-1] == 0
    make = functools.partial(
        getattr(Sampler, name), schedule, steps, prediction_type=kind, spacing="trailing"
    )
    corrected = name == "heun" and steps > 1 and schedule.kind != "flow"
    if silent and (kind == "epsilon" or corrected):
        with pytest.raises(ValueError, match="a step of this path is not finite"):
            make()
        return
    sampler = make()
    x = filled((2, 8), torch.float32, "cpu", 0)
    extra = {"seed": 0} if sampler.noisy else {}
    assert sample(x, sampler, lambda x, t: torch.tanh(x), **extra).isfinite().all()


def said_otherwise(kind: str, x: Tensor, x0: Tensor, level: Tensor, sigma_data: float = 0.5):
    """A prediction of that type by a network whose estimate of the data is x0."""
    a, s = level.double()
    eps, norm = (x - a * x0) / s, (s * s + (sigma_data * a) ** 2).sqrt()
    return {
        "epsilon": eps,
        "v_prediction": a * eps - s * x0,
        "flow_prediction": eps - x0,
        "edm": (x0 - sigma_data**2 * a / norm**2 * x) * norm / (s * sigma_data),
    }[kind]


@pytest.mark.parametrize("limit", [{}, {"clip": 0.8}, {"dynamic_threshold": (0.9, 1.5)}])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow_prediction", "edm"])
@pytest.mark.parametrize("name", STEPS)
def test_prediction_types_say_the_same(name, kind, limit):
    """One network in the words of each type: the same samples as by its estimate of the data."""
    schedule = Schedule.flow_matching() if name == "flow_euler" else Schedule.cosine()
    make = functools.partial(getattr(Sampler, name), schedule, 6, spacing="leading")
    path, other = make(prediction_type="sample"), make(prediction_type=kind)
    x = filled((3, 40), torch.float64, "cpu", 0)

    def net(x: Tensor) -> Tensor:
        return 2 * torch.tanh(3 * x) + 0.1 * x

    levels = iter([other.level_of(i) for i in range(len(other))])
    noise = [filled(x.shape, torch.float64, "cpu", 1 + i) for i in range(len(path))]
    want = sample(x, path, lambda x, t: net(x), noise.__getitem__, **limit)
    got = sample(
        x,
        other,
        lambda x, t: said_otherwise(kind, x, net(x), next(levels)),
        noise.__getitem__,
        **limit,
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpmpp_2m", "ddpm", "euler_ancestral"])
@pytest.mark.parametrize("s2", [0.25, 1.0, 4.0])
def test_variance_of_gaussian_data_in_closed_form(name, s2):
    """Data N(0, s2): the optimal eps is linear, each step too, and many steps give the variance."""
    schedule, count = Schedule.linear(), 1000
    sampler = getattr(Sampler, name)(schedule, count, spacing="leading")
    a, s = sampler.levels[:-1].double().unbind(1)
    optimal = s / (a * a * s2 + s * s)
    x = torch.ones(1, 1, dtype=torch.float64)
    variance, previous = torch.ones(1, dtype=torch.float64), None
    if name in ("heun", "dpmpp_2m"):  # deterministic: the map is linear, so follow one point
        at = torch.arange(len(sampler)).add(1).div(2, rounding_mode="floor")
        at = at if name == "heun" else torch.arange(len(sampler))
        rows = iter(optimal[at].tolist())
        final = sample(x, sampler, lambda x, t: x * next(rows)).square()
        assert final.item() == pytest.approx(s2, rel=0.02)
        return
    zero = torch.zeros(1, 1, dtype=torch.float64)
    for i in range(count):
        extra = {"eps": zero} if sampler.noisy else {}
        slope = STEPS[name](x, x * optimal[i], i, sampler, **extra)
        noise = STEPS[name](zero, zero, i, sampler, eps=x) if sampler.noisy else zero
        variance = slope.square() * variance + noise.square()
    assert previous is None
    assert variance.item() == pytest.approx(s2, rel=0.02)


def test_compiled_for_any_shape():
    """One graph for all batches and sizes, the step a tensor, guidance and noise in it."""
    sampler, key = Sampler.ddim(Schedule.linear(), 6, eta=1.0), gmkernels.noise.key(3)

    def step(x: Tensor, p: Tensor, u: Tensor, i: Tensor) -> Tensor:
        options = {"unconditional": u, "guidance": 2.0, "clip": 1.0, "seed": key}
        return gmkernels.ddim_step(x, p, i, sampler, **options)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, shape in enumerate([(4, 3, 8, 9), (7, 2, 5, 10), (2, 6, 16, 5)]):
        given = [filled(shape, torch.float32, "cpu", n) for n in range(3)]
        at = torch.tensor(i)
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            assert torch.equal(compiled(*given, at), step(*given, at))


def test_levels_of_spacings():
    schedule = Schedule.linear(10)
    assert spaced(schedule, 5, "leading", "ddim")[0] == [8, 6, 4, 2, 0]
    assert spaced(schedule, 5, "trailing", "ddim")[0] == [9, 7, 5, 3, 1]
    assert spaced(schedule, 4, "linspace", "euler")[0] == [9, 6, 3, 0]
    assert spaced(schedule, 3, "linspace", "euler")[0] == [9, 4.5, 0]
    times, levels = spaced(schedule, 4, "karras", "euler")
    assert times[0] == pytest.approx(9)
    assert times[-1] == pytest.approx(0)
    assert all(a * a + s * s == pytest.approx(1) for a, s in levels)
    assert spaced(Schedule.linear(1), 1, "trailing", "ddim")[0] == [0]


def test_moves_and_keeps_its_precision():
    sampler = Sampler.ddim(Schedule.linear(), 5)
    table = sampler.table.clone()
    assert torch.equal(sampler.half().table, table)
    assert sampler.table64.dtype == torch.float64
    assert not sampler.state_dict()
    with pytest.raises(ValueError, match=r"the sampler is on meta.*sampler.to\('cpu'\)"):
        gmkernels.ddim_step(torch.ones(1, 2), torch.ones(1, 2), 0, sampler.to("meta"))


def test_refusals():
    schedule, x = Schedule.linear(), torch.ones(2, 3)
    sampler, ddim = Sampler.ddim(schedule, 5), gmkernels.ddim_step
    for steps in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="steps must be an int >= 1"):
            Sampler.ddim(schedule, steps)
        with pytest.raises(ValueError, match="steps must be an int >= 1"):
            Sampler.ddpm(schedule, steps)
    with pytest.raises(ValueError, match="steps must be at most 1000"):
        Sampler.ddim(schedule, 1001)
    for name, most in (("ddim", 10), ("ddpm", 10), ("dpmpp_2m", 9)):
        make = functools.partial(getattr(Sampler, name), Schedule.linear(10), spacing="linspace")
        with pytest.raises(ValueError, match=f"steps must be at most {most}, .* got {most + 1}"):
            make(most + 1)
        assert make(most).table.isfinite().all()
    for eta in (-0.1, 1.1, float("nan")):
        for make in (Sampler.ddim, Sampler.euler_ancestral):
            with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\]"):
                make(schedule, 5, eta=eta)
    with pytest.raises(ValueError, match=r"alpha > 0, got \(0.0, 1.0\)"):
        Sampler.ddim(schedule, 5, last=(0.0, 1.0))
    with pytest.raises(ValueError, match="needs a flow schedule, got variance_preserving"):
        Sampler.flow_euler(schedule, 5)
    with pytest.raises(ValueError, match="prediction_type must be one of epsilon"):
        Sampler.ddim(schedule, 5, prediction_type="x0")
    with pytest.raises(ValueError, match="variance must be one of fixed_small"):
        Sampler.ddpm(schedule, 5, variance="small")
    with pytest.raises(TypeError, match=r"must come from Sampler.ddpm\(\), got Sampler.ddim"):
        gmkernels.ddpm_step(x, x, 0, sampler, seed=0)
    with pytest.raises(ValueError, match=r"step must lie in \[0, 5\), got 5"):
        ddim(x, x, 5, sampler)
    with pytest.raises(RuntimeError, match=r"must lie in \[0, 5\).*got 7 in row 1"):
        ddim(x, x, torch.tensor([0, 7]), sampler, backend="native")
    with pytest.raises(TypeError, match="step must be an int or an integer tensor"):
        ddim(x, x, 1.0, sampler)
    with pytest.raises(ValueError, match="guidance 2.0 needs the prediction `unconditional`"):
        ddim(x, x, 0, sampler, guidance=2.0)
    with pytest.raises(TypeError, match="guidance must be a number, got a tensor"):
        ddim(x, x, 0, sampler, unconditional=x, guidance=torch.tensor(2.0))
    for wrong in (0.9, (0.9,), (0.9, 1.0, 2.0)):
        with pytest.raises(ValueError, match=r"must be \(ratio, maximum\)"):
            ddim(x, x, 0, sampler, dynamic_threshold=wrong)
    with pytest.raises(ValueError, match="give clip or dynamic_threshold, not both"):
        ddim(x, x, 0, sampler, clip=1.0, dynamic_threshold=(0.9, 1.0))
    with pytest.raises(ValueError, match="0 < ratio <= 1 and 1 <= maximum"):
        ddim(x, x, 0, sampler, dynamic_threshold=(0.9, 0.5))
    with pytest.raises(ValueError, match="clip must be > 0"):
        ddim(x, x, 0, sampler, clip=0.0)
    with pytest.raises(ValueError, match="prediction must have x's shape"):
        ddim(x, x[:, :2], 0, sampler)
    with pytest.raises(ValueError, match="needs `previous`"):
        gmkernels.heun_step(x, x, 1, Sampler.heun(schedule, 5))
    with pytest.raises(ValueError, match="needs `previous`"):
        gmkernels.dpmpp_2m_step(x, x, 1, Sampler.dpmpp_2m(schedule, 5))
    with pytest.raises(ValueError, match="variance is for a sampler with"):
        gmkernels.ddpm_step(x, x, 1, Sampler.ddpm(schedule, 5), variance=x, seed=0)
