"""Fakes of the operators that csrc/activation registers."""

import torch

from gmkernels import dispatch
from gmkernels.ops.activation import outputs

DEVICES = {"gelu": dispatch.native_devices(cuda=False)}

for _fake in outputs.FAKES:
    torch.library.register_fake(f"gmkernels::{_fake.__name__}", _fake)
