"""What several tests share. Without a GPU, Triton's kernels run in its interpreter.

On a GPU pytest runs twice: as it is, and under TRITON_INTERPRET=1, which then tests the CPU.
"""

import os
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton and gmkernels are imported

from gmkernels import dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED or not torch.cuda.is_available() else ["cpu", "cuda"]


def _round_to_bfloat16() -> None:
    # Triton's compiler rounds float32 to bfloat16 to nearest even; its interpreter (3.7) truncates.
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(x: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source.is_fp32() and target.is_bf16():
            rounded = torch.from_numpy(np.array(x, np.float32)).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view(np.uint16)
        return convert(x, source, target, rounding)

    interpreter._convert_float = converted


def _multiply_bfloat16() -> None:
    # Triton's interpreter (3.7) multiplies the bit patterns of bfloat16 as if they were integers.
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def widened(x: Any) -> Any:
        if not x.dtype.scalar.is_bf16():
            return x
        wide = (x.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, interpreter.tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    builder.create_dot = create_dot


if INTERPRETED and dispatch.triton is not None:
    _round_to_bfloat16()
    _multiply_bfloat16()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device type under test in turn."""
    return request.param


@pytest.fixture
def backends(device: str) -> list[str]:
    """The backends that run float32 on this device."""
    usable = [b for b in dispatch.BACKENDS if dispatch.why_not("normal", b, device, False) is None]
    assert "reference" in usable
    return usable


@pytest.fixture
def isas() -> list[str]:
    """The instruction sets that this CPU and build run, portable first."""
    return dispatch.extension.available_isas()


@pytest.fixture(params=dispatch.BACKENDS)
def backend(request: pytest.FixtureRequest, device: str) -> str:
    """Each backend in turn; one that this device lacks is skipped with dispatch's own reason."""
    reason = dispatch.why_not("normal", request.param, device, False)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param
