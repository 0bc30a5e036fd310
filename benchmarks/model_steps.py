"""Whole training steps and samples of models: with our ops, and of the same in plain PyTorch.

A later model adds a line to MODEL_STEPS.
"""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

import gmkernels
from benchmarks.sides import COMPILED, EAGER, OURS, OURS_COMPILED, SEED, Side, compiled
from gmkernels import data, registry, train
from gmkernels.models import image_diffusion, vae

REFERENCE = "reference backend"
_KEYWORDS_OF_OURS = ("seed", "offset", "generator", "backend")


@dataclass(frozen=True)
class ModelStep:
    """One model's training step, or a sample: how to build the model, and a batch for it.

    samples: what sample() is given, where that is timed; it is not compiled, its loop being 50
    networks long. headline: whether `make bench` has it, one a paradigm.
    """

    name: str
    case: str
    model: Callable[[], torch.nn.Module]
    batch: Callable[[], Tensor]
    samples: dict[str, Any] | None = None
    headline: bool = False

    @property
    def kind(self) -> str:
        """What is timed."""
        return "training step" if self.samples is None else "sample"


def _digits() -> Tensor:
    return data.digits().train[:100]


def _digits_diffusion() -> torch.nn.Module:
    return image_diffusion.image_diffusion(64, 17, classes=0)


MODEL_STEPS = (
    ModelStep("VAE", "digits, batch of 100", vae.digits_vae, _digits, headline=True),
    ModelStep("diffusion U-Net", "digits, batch of 100", _digits_diffusion, _digits, headline=True),
    ModelStep(
        "diffusion U-Net",
        "digits, 64 by 50 DDIM steps",
        _digits_diffusion,
        _digits,
        {"n": 64, "steps": 50},
    ),
)


class PlainPyTorch:
    """Puts each row's eager baseline in the place of our op in all models, inside a with block."""

    def __init__(self) -> None:
        eager = {op.function: _without_our_keywords(op.eager) for op in registry.rows()}
        kept = _KeptNoise()
        eager |= {gmkernels.add_noise: kept.add_noise, gmkernels.denoising_loss: kept.loss}
        modules = [vars(m) for n, m in sys.modules.items() if n.startswith("gmkernels.models.")]
        # Functions that a module imports, and those of a table of its own.
        places = [*modules, *(v for m in modules for v in m.values() if isinstance(v, dict))]
        self.swaps = [
            (place, name, item, eager[item])
            for place in places
            for name, item in list(place.items())
            if isinstance(item, FunctionType) and item in eager
        ]

    def __enter__(self) -> None:
        for place, name, _, eager in self.swaps:
            place[name] = eager

    def __exit__(self, *exception: object) -> None:
        for place, name, ours, _ in self.swaps:
            place[name] = ours


class _KeptNoise:
    """Noising and loss in plain PyTorch: the noise of the one is kept for the other."""

    def __init__(self) -> None:
        self.eps = torch.empty(0)
        self.noise = _without_our_keywords(registry.row("add_noise").eager)
        self.square = _without_our_keywords(registry.row("denoising_loss").eager)

    def add_noise(self, x0: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x_t, its noise kept."""
        self.eps = torch.randn_like(x0)
        return self.noise(x0, *args, eps=self.eps, **kwargs)

    def loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss under the noise that was kept."""
        return self.square(*args, eps=self.eps, **kwargs)


def _without_our_keywords(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{k: v for k, v in kwargs.items() if k not in _KEYWORDS_OF_OURS})

    return call


def sides_of(step: ModelStep, device: str) -> dict[str, Callable[[], Side]]:
    """How to build each side of a step: every side has its own copy of the model."""

    def reference() -> contextlib.AbstractContextManager[Any]:
        return gmkernels.use_backend("reference")

    plain = PlainPyTorch()
    made = {
        EAGER: lambda: build(step, device, EAGER, lambda: plain),
        COMPILED: lambda: build(step, device, COMPILED, lambda: plain),
        REFERENCE: lambda: build(step, device, REFERENCE, reference),
        OURS: lambda: build(step, device, OURS, contextlib.nullcontext),
        OURS_COMPILED: lambda: build(step, device, OURS_COMPILED, contextlib.nullcontext),
    }
    if step.samples is not None:
        del made[COMPILED], made[OURS_COMPILED]
    return made


def build(
    step: ModelStep,
    device: str,
    name: str,
    scope: Callable[[], contextlib.AbstractContextManager[Any]],
) -> Side:
    """One side, which has run once. A call is one update and returns the loss before it."""
    torch.manual_seed(SEED)
    model: Any = step.model().to(device)
    if step.samples is not None:
        options = {**step.samples, "seed": SEED}
        side = Side(name, lambda: model.eval().sample(**options), scope)
        side()
        return side
    x = step.batch().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    if name in (COMPILED, OURS_COMPILED):
        model.loss = compiled(model.loss)
    side = Side(name, lambda: train.training_step(model, optimizer, x, seed=SEED), scope)
    side()
    return side


def fault(step: ModelStep, device: str) -> str:
    """What is wrong with the first losses of our step, against the reference backend's, or ""."""
    losses = {}
    for name in (REFERENCE, OURS):
        side = sides_of(step, device)[name]()
        # A network spreads the rounding of levels: pictures agree in their mean level.
        losses[name] = [float(side().float().mean()) for _ in range(3)]
    for i, (ours, true) in enumerate(zip(losses[OURS], losses[REFERENCE], strict=True), 2):
        if not abs(ours - true) <= 1e-4 * abs(true):
            return f"the loss of step {i} is {ours:.6g}, the reference's is {true:.6g}"
    return ""
