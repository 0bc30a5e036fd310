"""Fakes of the operators that csrc/gaussian registers."""

import torch

from gmkernels import dispatch
from gmkernels.ops.gaussian import outputs

DEVICES = {
    "reparameterize_kl": dispatch.native_devices(cuda=True),
    "gaussian_kl": dispatch.native_devices(cuda=True),
    "gaussian_kl_per_dim": dispatch.native_devices(cuda=False),
}

for _name, _fake in (
    ("reparameterize_kl_forward", outputs.reparameterize_kl_forward),
    ("reparameterize_kl_backward", outputs.reparameterize_kl_backward),
    ("gaussian_kl_forward", outputs.gaussian_kl_forward),
    ("gaussian_kl_backward", outputs.kl_backward),
    ("gaussian_kl_per_dim_forward", outputs.gaussian_kl_per_dim_forward),
    ("gaussian_kl_per_dim_backward", outputs.kl_backward),
):
    torch.library.register_fake(f"gmkernels::{_name}", _fake)
