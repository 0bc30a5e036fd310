"""Fake of the operator that csrc/token_sampling registers."""

import torch

from gmkernels import dispatch
from gmkernels.ops.token_sampling import outputs

DEVICES = {"next_token": dispatch.native_devices(cuda=False)}

torch.library.register_fake("gmkernels::next_token", outputs.next_token)
