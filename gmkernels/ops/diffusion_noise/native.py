"""Fakes of the operators that csrc/diffusion_noise registers."""

import torch

from gmkernels import dispatch
from gmkernels.ops.diffusion_noise import outputs

_OPS = ("add_noise", "add_noise_with_target", "denoising_loss")
DEVICES = dict.fromkeys(_OPS, dispatch.native_devices(cuda=True))

for _op in _OPS:
    for _part in ("forward", "backward"):
        _name = f"{_op}_{_part}"
        torch.library.register_fake(f"gmkernels::{_name}", getattr(outputs, _name))
