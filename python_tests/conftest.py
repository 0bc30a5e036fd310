"""What several tests share. Without a GPU, Triton's kernels run in its interpreter.

On a GPU pytest runs twice: as it is, and under TRITON_INTERPRET=1, which then tests the CPU.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton and gmkernels are imported

from gmkernels import dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED or not torch.cuda.is_available() else ["cpu", "cuda"]


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
