"""torch.ops.gmkernels called directly, each argument wrong in turn: an error or a result, no crash.

A read or write out of bounds would end the process, and with it the tests.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_ops import leaves, outputs_and_gradients, with_noise
from torch import Tensor

from gmkernels import dispatch, registry

ROWS = list({op.operator: op for op in registry.rows()}.values())


def wrong_values(x: Any) -> Iterator[Any]:
    """What may come instead of an argument."""
    if isinstance(x, bool):
        yield not x
    elif isinstance(x, int):
        yield from (-1, 0, 2**40, -(2**63))
    elif isinstance(x, float):
        yield from (float("nan"), float("inf"), -1.0, 0.0, 1e-40)
    elif x is None:
        yield torch.zeros(2, 3)
    elif isinstance(x, Tensor):
        yield from (x.to(torch.complex64), x.to("meta"), x.flatten(), x.new_zeros(()))
        others = (torch.int64, torch.float64) if x.is_floating_point() else (torch.float32,)
        yield from (x.to(dtype) for dtype in others)
        extremes = (float("nan"), float("inf")) if x.is_floating_point() else (0, 255, -7, 2**30)
        fitting = [value for value in extremes if x.dtype != torch.uint8 or 0 <= value < 256]
        yield from (torch.full_like(x, value) for value in fitting)
        if x.dim():
            yield from (x.to_sparse(), x[:0], torch.cat([x, x]), x[..., :-1])
            yield x.repeat_interleave(2, -1)[..., ::2]  # strided


def recorded_calls(op: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, tuple[Any, ...]]]:
    """(operator, arguments) of a right call and its backward on the native backend."""
    kernel, calls = dispatch.kernel(op.operator, "native"), []

    def recording(operator: Any) -> Any:
        def call(*args: Any) -> Any:
            calls.append(
                (operator, tuple(a.detach() if isinstance(a, Tensor) else a for a in args))
            )
            return operator(*args)

        return call

    parts = {"forward": recording(kernel.forward), "backward": recording(kernel.backward)}
    monkeypatch.setitem(
        dispatch._TABLE[op.operator], "native", dataclasses.replace(kernel, **parts)
    )
    case = next(case for case in op.cases if case.kind == "odd")
    given = with_noise(op, leaves(op.inputs(case, torch.float32, "cpu", 3)), False)
    if op.differentiable:
        outputs_and_gradients(op.function, given, False, backend="native")
    else:
        op.function(*given.args, **given.kwargs, backend="native")
    monkeypatch.undo()
    return calls


@pytest.mark.filterwarnings("ignore:Casting complex:UserWarning")
@pytest.mark.parametrize("op", ROWS, ids=lambda op: op.operator)
def test_wrong_arguments_do_not_crash(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded_calls(op, monkeypatch)
    assert calls
    refused = 0
    for operator, args in calls:
        for i, right in enumerate(args):
            for wrong in wrong_values(right):
                try:
                    operator(*args[:i], wrong, *args[i + 1 :])
                except Exception:
                    refused += 1
    assert refused > 5


@pytest.mark.parametrize("temperature", [float("inf"), 1e-40, 1e7, float("nan"), -1.0])
def test_next_token_refuses_the_temperature(temperature: float) -> None:
    logits = torch.tensor([[0.0, -float("inf"), 1.0]])
    key, position = torch.tensor([1, 0]), torch.zeros(1, dtype=torch.long)
    with pytest.raises(RuntimeError, match=r"temperature must be 0 or lie in \[1e-6, 1e6\]"):
        torch.ops.gmkernels.next_token(logits, key, position, temperature, 0, 1 << 29)
