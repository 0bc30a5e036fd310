"""Fakes of the operators of csrc/decode; the backward is plain PyTorch."""

import torch

from gmkernels import dispatch
from gmkernels.ops.decode import outputs

DEVICES = {"decode_attention": dispatch.native_devices(cuda=True)}

torch.library.register_fake("gmkernels::decode_attention_forward", outputs.decode_attention_forward)
dispatch.define("gmkernels", outputs.decode_attention_backward, outputs.fake_backward)
