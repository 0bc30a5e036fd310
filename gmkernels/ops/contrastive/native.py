"""Fakes of the operators that csrc/contrastive registers."""

import torch

from gmkernels import dispatch
from gmkernels.ops.contrastive import outputs

DEVICES = {"contrastive": dispatch.native_devices(cuda=False)}

for _name in ("contrastive_forward", "contrastive_backward"):
    torch.library.register_fake(f"gmkernels::{_name}", getattr(outputs, _name))
