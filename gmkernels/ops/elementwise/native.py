"""Fakes of the operators that csrc/elementwise registers."""

import torch

from gmkernels import dispatch
from gmkernels.ops.elementwise import outputs

DEVICES = dict.fromkeys(("actnorm", "pointwise", "dequantize"), dispatch.native_devices(cuda=False))

for _fake in outputs.FAKES:
    torch.library.register_fake(f"gmkernels::{_fake.__name__}", _fake)
