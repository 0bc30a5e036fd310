"""Whole training steps of models: with our ops, and of the same model in plain PyTorch.

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
from gmkernels.models import vae

REFERENCE = "reference backend"
_KEYWORDS_OF_OURS = ("seed", "offset", "generator", "backend")


@dataclass(frozen=True)
class ModelStep:
    """One model's training step: how to build the model, and a batch for it."""

    name: str
    case: str
    model: Callable[[], torch.nn.Module]
    batch: Callable[[], Tensor]


MODEL_STEPS = (
    ModelStep("VAE", "digits, batch of 100", vae.digits_vae, lambda: data.digits().train[:100]),
)


class PlainPyTorch:
    """Puts each row's eager baseline in the place of our op in all models, inside a with block."""

    def __init__(self) -> None:
        eager = {op.function: _without_our_keywords(op.eager) for op in registry.rows()}
        modules = [m for name, m in sys.modules.items() if name.startswith("gmkernels.models.")]
        self.swaps = [
            (module, name, item, eager[item])
            for module in modules
            for name, item in vars(module).items()
            if isinstance(item, FunctionType) and item in eager
        ]

    def __enter__(self) -> None:
        for module, name, _, eager in self.swaps:
            setattr(module, name, eager)

    def __exit__(self, *exception: object) -> None:
        for module, name, ours, _ in self.swaps:
            setattr(module, name, ours)


def _without_our_keywords(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{k: v for k, v in kwargs.items() if k not in _KEYWORDS_OF_OURS})

    return call


def sides_of(step: ModelStep, device: str) -> dict[str, Callable[[], Side]]:
    """How to build each side of a step: every side has its own copy of the model."""

    def reference() -> contextlib.AbstractContextManager[Any]:
        return gmkernels.use_backend("reference")

    plain = PlainPyTorch()
    return {
        EAGER: lambda: build(step, device, EAGER, lambda: plain),
        COMPILED: lambda: build(step, device, COMPILED, lambda: plain),
        REFERENCE: lambda: build(step, device, REFERENCE, reference),
        OURS: lambda: build(step, device, OURS, contextlib.nullcontext),
        OURS_COMPILED: lambda: build(step, device, OURS_COMPILED, contextlib.nullcontext),
    }


def build(
    step: ModelStep,
    device: str,
    name: str,
    scope: Callable[[], contextlib.AbstractContextManager[Any]],
) -> Side:
    """One side, which has run once. A call is one update and returns the loss before it."""
    torch.manual_seed(SEED)
    model: Any = step.model().to(device)
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
        losses[name] = [float(side()) for _ in range(3)]
    for i, (ours, true) in enumerate(zip(losses[OURS], losses[REFERENCE], strict=True), 2):
        if not abs(ours - true) <= 1e-4 * abs(true):
            return f"the loss of step {i} is {ours:.6g}, the reference's is {true:.6g}"
    return ""
