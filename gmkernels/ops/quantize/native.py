"""Fakes of the operators that csrc/quantize registers."""

import torch

from gmkernels import dispatch
from gmkernels.ops.quantize import outputs

DEVICES = dict.fromkeys(("nearest_code", "code_statistics"), dispatch.native_devices(cuda=False))

for _fake in outputs.FAKES:
    torch.library.register_fake(f"gmkernels::{_fake.__name__}", _fake)
