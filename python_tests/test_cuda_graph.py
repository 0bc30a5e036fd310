"""Diffusion on a GPU: nothing there waits for the host, so that steps fit a CUDA graph.

Without a GPU tensors of the meta device, which have no data that could be read, walk the same
Python, down to the launches of the Triton kernels; every operator on the way is looked at. With
one, captured calls are replayed on other inputs.
"""

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICES
from test_sampler import STEPS
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gmkernels
from gmkernels import Sampler, Schedule, dispatch, noise, triton_common
from gmkernels.models import sampling
from gmkernels.models.diffusion import Diffusion
from gmkernels.models.edm import EDM
from gmkernels.models.nets import MLP, DiT, UNet

CSRC = Path(__file__).parents[1] / "csrc"
FAMILIES = ("diffusion_step", "diffusion_noise", "noise", "attention")
OPS = (
    *("sampler_step", "add_noise", "add_noise_with_target", "denoising_loss"),
    *("normal", "uniform", "attention"),
)
PATHS: dict[str, dict[str, Any]] = {
    "ddpm": {"variance": "learned_range"},
    "ddim": {"eta": 1.0},
    "euler": {},
    "euler_ancestral": {},
    "heun": {},
    "dpmpp_2m": {},
    "flow_euler": {},
}
LIMITS: list[dict[str, Any]] = [
    {},
    {"clip": 1.0},
    {"guidance": 3.0, "clip": 0.8},
    {"guidance": 3.0, "dynamic_threshold": (0.9, 2.0)},
]
SHAPE = (3, 2, 4, 4)


class NoUploads(TorchFunctionMode):
    """Refuses to make a tensor on the device from what lies in the host's memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.from_numpy, torch.frombuffer):
            given = isinstance(args[0], Tensor) and args[0].device == out.device
            assert given or out.device.type == "cpu", f"{func.__name__}() copies to the device"
        return out


class Watched(TorchDispatchMode):
    """Refuses operators that touch the host's memory; one that reads a value raises of itself.

    Attributes:
        ours: names of our operators, in order; their launchers are run, and watched, too.
        launches: how many kernels each of these launches.
        theirs: names of PyTorch's operators that compute something.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ours: list[str] = []
        self.launches: list[int] = []
        self.theirs: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            if isinstance(x, Tensor):
                assert x.device.type == "meta", f"{func} touches the host's memory"
        namespace, name = func._schema.name.split("::")
        if namespace == dispatch.NAMESPACES["triton"]:
            self.ours.append(name)
            self.launches.append(self._launched(name, args))
        elif func is torch.ops.gmkernels_reference._fold_in.default:
            with self:
                noise._fold_in(*args)
        elif not func.is_view and not re.match("(new_)?empty|detach|set_", name):
            self.theirs.append(name)
        return out

    def _launched(self, name: str, args: Any) -> int:
        modules = (importlib.import_module(f"gmkernels.ops.{f}.triton_kernel") for f in FAMILIES)
        launcher = next(vars(module)[name] for module in modules if name in vars(module))
        with triton_common.recorded() as launches, self:
            launcher(*args)
        return len(launches)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Watched]:
    """Runs a call on the meta device, where Triton's kernels stand for those of a GPU."""
    pytest.importorskip("triton")
    monkeypatch.setitem(dispatch.ORDER, "meta", ("triton", "reference"))
    for op in OPS:
        kernel = dispatch.kernel(op, "triton")
        found = dataclasses.replace(kernel, devices=(*kernel.devices, "meta"))
        monkeypatch.setitem(dispatch._TABLE[op], "triton", found)

    def run(call: Callable[[], Any]) -> Watched:
        with NoUploads(), Watched() as watched:
            call()
        return watched

    return run


def meta(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def path_of(name: str, steps: int = 3) -> Sampler:
    schedule = Schedule.flow_matching() if name == "flow_euler" else Schedule.linear()
    return getattr(Sampler, name)(schedule, steps, **PATHS[name])


def step_call(path: Sampler, draw: Callable[[], Tensor], key: Tensor, limit: dict[str, Any]):
    """A call of the path's step at a step that is a tensor, on tensors that draw() makes."""
    options = {**limit, **({"seed": key} if path.noisy else {})}
    if "guidance" in limit:
        options["unconditional"] = draw()
    if path.name in ("heun", "dpmpp_2m"):
        options["previous"] = draw()
    if path.learned:
        options["variance"] = draw()
    return functools.partial(STEPS[path.name], draw(), draw(), sampler=path, **options)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", PATHS)
def test_a_step_is_one_launch_and_waits_for_nothing(name, limit, watch):
    path, key = path_of(name).to("meta"), meta((2,), torch.int64)
    step = step_call(path, meta, key, limit)
    for index in (1, meta((), torch.int64), meta(SHAPE[:1], torch.int64)):
        watched = watch(lambda index=index: step(step=index))
        assert watched.ours == ["sampler_step_forward"]
        assert watched.launches == [1]
        assert watched.theirs == []


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", PATHS)
def test_gradients_of_a_step_are_one_launch(name, limit, watch):
    path, key = path_of(name).to("meta"), meta((2,), torch.int64)
    given: list[Tensor] = []

    def leaf() -> Tensor:
        given.append(meta().requires_grad_())
        return given[-1]

    step = step_call(path, leaf, key, limit)

    def call() -> None:
        out = step(step=1)
        first = out[0] if isinstance(out, tuple) else out
        torch.autograd.grad(first, given, meta())

    watched = watch(call)
    assert watched.ours == ["sampler_step_forward", "sampler_step_backward"]
    assert watched.launches == [1, 1]
    assert watched.theirs == []


@pytest.mark.parametrize("t", ["int", "integers", "floats"])
@pytest.mark.parametrize("weighting", ["uniform", "min_snr", "edm"])
def test_noising_and_loss_wait_for_nothing(weighting, t, watch):
    schedule, key = Schedule.linear().to("meta"), meta((2,), torch.int64)
    dtype = torch.int64 if t == "integers" else torch.float32
    x0, at = meta(), 5 if t == "int" else meta(SHAPE[:1], dtype)

    def call() -> None:
        gmkernels.add_noise(x0, at, schedule, seed=key)
        _, p = gmkernels.add_noise_with_target(x0, at, schedule, seed=key)
        p = p.requires_grad_()
        loss = gmkernels.denoising_loss(p, x0, at, schedule, seed=key, weighting=weighting)
        torch.autograd.grad(loss, p, meta(SHAPE[:1]))

    watched = watch(call)
    names = "add_noise", "add_noise_with_target", "denoising_loss"
    assert watched.ours == [*(f"{name}_forward" for name in names), "denoising_loss_backward"]
    assert watched.launches[:2] == [1, 1]
    if t == "integers" and weighting == "uniform":
        assert watched.theirs == []
    elif t == "int":
        assert watched.theirs.count("full") == 3


def models() -> dict[str, tuple[Diffusion, dict[str, Any]]]:
    """A model, and what its verbs are told on the meta device."""
    label, text = meta(SHAPE[:1], torch.int64), meta((3, 5, 6))
    seen = meta((3, 5), torch.bool)
    unet = UNet(2, width=8, classes=4, context_width=6)
    dit = DiT(2, 4, width=8, depth=1, heads=2, context_width=6, concat_channels=1)
    told = {"context": text, "context_mask": seen}
    flow = {"prediction_type": "flow_prediction"}
    return {
        "unet": (Diffusion(unet, Schedule.cosine(20), SHAPE[1:]), {"label": label, **told}),
        "dit": (
            Diffusion(dit, Schedule.flow_matching(20), SHAPE[1:], **flow),
            {**told, "concat": meta((3, 1, 4, 4))},
        ),
        "edm": (EDM(MLP(6, 16, 1, classes=4), Schedule.karras(20), (6,)), {"label": label}),
    }


@pytest.mark.parametrize("name", ["unet", "dit", "edm"])
def test_training_waits_for_nothing(name, watch):
    model, told = models()[name]
    model.to("meta")
    key, x = meta((2,), torch.int64), meta((3, *model.shape))
    watched = watch(lambda: model.loss(x, seed=key, **told).backward())
    named = [op for op in watched.ours if not op.startswith("attention")]
    forward = ["uniform", "add_noise_forward", "denoising_loss_forward"]
    assert named == [*forward, "denoising_loss_backward"]


@pytest.mark.parametrize("name", ["unet", "dit", "edm"])
@pytest.mark.parametrize("sampler", PATHS)
def test_sampling_waits_for_nothing(sampler, name, watch):
    """Whole loops with guidance: each step is one operator and one launch beside the networks."""
    model, told = models()[name]
    if sampler == "flow_euler" and name != "dit":
        pytest.skip("needs a flow schedule")
    spacing = "leading" if sampler in ("heun", "dpmpp_2m") else "trailing"
    path = model.sampler(sampler, 3, spacing=spacing).to("meta")
    model, key = model.to("meta"), meta((2,), torch.int64)
    options = {"guidance": 2.0, "unconditional": {}, "clip": 1.0, **told}
    watched = watch(lambda: model.sample(3, sampler=path, seed=key, **options))
    named = [op for op in watched.ours if op != "attention_forward"]
    assert named == ["normal", *["sampler_step_forward"] * len(path)]
    assert set(watched.launches) == {1}


def test_sampling_by_name_copies_nothing_but_the_first_time(watch, monkeypatch):
    model, told = models()["unet"]
    path, key = model.sampler("ddim", 3).to("meta"), meta((2,), torch.int64)
    model, told = model.to("meta"), {**told, "label": 1}
    made = iter([path])
    monkeypatch.setattr(model, "sampler", lambda *args: next(made))  # a host has to make it
    for _ in range(2):
        watched = watch(lambda: model.sample(3, steps=3, sampler="ddim", seed=key, **told))
        assert watched.ours.count("sampler_step_forward") == 3


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_classifier_guidance_waits_for_nothing(name, watch):
    path = getattr(Sampler, name)(Schedule.linear(), 3).to("meta")
    key = meta((2,), torch.int64)
    watched = watch(
        lambda: sampling.run(
            lambda x, t: x * t[0], path, meta(), classifier=lambda x, t: x, scale=2.0, seed=key
        )
    )
    assert watched.ours == ["sampler_step_forward"] * 3


def test_what_is_refused(watch):
    """The watch itself: reads, uploads and outputs whose size depends on values are seen."""
    x = meta((3,))
    for wrong in (
        lambda: x.sum().item(),
        lambda: x.nonzero(),
        lambda: x[x > 0],
        lambda: x.cpu(),
        lambda: torch.ones(3).to("meta"),
        lambda: torch.tensor(1.0, device="meta"),
        lambda: torch.as_tensor(3, device="meta"),
        lambda: x + torch.ones(3),
    ):
        with pytest.raises((AssertionError, RuntimeError)):
            watch(wrong)
    assert watch(lambda: x[:2] + 1).theirs == ["add"]


def test_a_host_key_travels_without_a_copy(watch):
    """Of an int seed the launcher fills the key on the device: no pageable memory is copied."""
    where = torch.device("meta")
    made, key = [], noise.key(2**40, 7)
    watched = watch(lambda: made.append(triton_common.on_device(key, where)))
    assert made[0].device == where
    assert watched.theirs
    filled = triton_common.filled_key(2**62 + 1, 2**41 + 3, torch.device("cpu"))
    assert filled.tolist() == [2**62 + 1, 2**41 + 3]


def test_sources_wait_for_nothing():
    """The kernels' own C++: no copy, no allocation and no wait outside PyTorch's allocator."""
    text = "".join(path.read_text() for path in CSRC.glob("*/*.[ch]*"))
    assert not re.search(r"cuda(Memcpy|Malloc|Free|\w*Synchronize|StreamCreate|EventQuery)", text)


needs_gpu = pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU to capture a graph")


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """A call that replays `call`, warmed up on a side stream as PyTorch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> Any:
        graph.replay()
        return out

    return replay


def backends_of(op: str) -> list[str]:
    usable = [b for b in ("native", "triton") if dispatch.why_not(op, b, "cuda", False) is None]
    assert usable
    return usable


@needs_gpu
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", PATHS)
def test_captured_steps_replay_on_other_inputs(name, limit):
    path, key = path_of(name).to("cuda"), noise.key(5).to("cuda")
    index, given = torch.zeros((), dtype=torch.int64, device="cuda"), []

    def draw() -> Tensor:
        given.append(gmkernels.normal(SHAPE, seed=len(given), device="cuda"))
        return given[-1]

    step = step_call(path, draw, key, limit)
    for backend in backends_of("sampler_step"):
        call = functools.partial(step, step=index, backend=backend)
        replay = captured(call)
        for i in range(len(path)):  # the same graph at each step, under another key
            index.fill_(i)
            key[0] = 100 + i
            for n, x in enumerate(given):
                x.copy_(gmkernels.normal(SHAPE, seed=50 + n, offset=i, device="cuda"))
            torch.testing.assert_close(replay(), call(), rtol=0, atol=0)


@needs_gpu
@pytest.mark.parametrize("sampler", ["ddpm", "heun", "dpmpp_2m"])
def test_captured_sampling_loop(sampler):
    torch.manual_seed(0)
    model = Diffusion(MLP(6, 16, 1), Schedule.cosine(20), (6,), prediction_type="v_prediction")
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model, key = model.to("cuda"), noise.key(5).to("cuda")
    path = model.sampler(sampler, 5, spacing="trailing")
    call = functools.partial(model.sample, 7, sampler=path, seed=key, clip=1.0)
    replay = captured(call)
    for seed in (5, 6):
        key[0] = seed
        assert torch.equal(replay(), call())


@needs_gpu
def test_captured_training_step():
    torch.manual_seed(0)
    schedule, key = Schedule.cosine(20).to("cuda"), noise.key(5).to("cuda")
    net = MLP(6, 16, 1).to("cuda")
    x0 = gmkernels.normal((9, 6), seed=1, device="cuda")
    t = torch.zeros(9, dtype=torch.int64, device="cuda")

    def call() -> tuple[Tensor, ...]:
        x_t = gmkernels.add_noise(x0, t, schedule, seed=key)
        loss = gmkernels.denoising_loss(
            net(x_t, t.float()), x0, t, schedule, seed=key, weighting="min_snr"
        ).mean()
        return loss, *torch.autograd.grad(loss, [*net.parameters()])

    replay = captured(call)
    for i in range(3):
        key[0] = i
        t.copy_(torch.arange(i, i + 9))
        torch.testing.assert_close(replay(), call(), rtol=0, atol=0)
