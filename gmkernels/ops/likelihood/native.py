"""Fakes of the operators that csrc/likelihood registers."""

import torch

from gmkernels import dispatch
from gmkernels.ops.likelihood import outputs

DEVICES = dict.fromkeys(
    ("gaussian_nll", "bernoulli_nll", "categorical_nll"), dispatch.native_devices(cuda=False)
)

for _fake in outputs.FAKES:
    torch.library.register_fake(f"gmkernels::{_fake.__name__}", _fake)
