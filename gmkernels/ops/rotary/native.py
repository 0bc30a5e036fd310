"""Fakes of the operators that csrc/rotary registers."""

import torch

from gmkernels import dispatch
from gmkernels.ops.rotary import outputs

DEVICES = dict.fromkeys(("rotary_embedding", "rms_norm"), dispatch.native_devices(cuda=False))

for _fake in outputs.FAKES:
    torch.library.register_fake(f"gmkernels::{_fake.__name__}", _fake)
