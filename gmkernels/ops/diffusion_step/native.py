"""Fakes of the operators that csrc/diffusion_step registers."""

import torch

from gmkernels import dispatch
from gmkernels.ops.diffusion_step import outputs

DEVICES = {"sampler_step": dispatch.native_devices(cuda=True)}

for _name in ("sampler_step_forward", "sampler_step_backward"):
    torch.library.register_fake(f"gmkernels::{_name}", getattr(outputs, _name))
