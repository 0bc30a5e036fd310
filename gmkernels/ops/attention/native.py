"""Fakes of the operators that csrc/attention registers."""

from typing import Any

import torch
from torch import Tensor

from gmkernels import dispatch
from gmkernels.ops.attention import outputs

DEVICES = {"attention": dispatch.native_devices(cuda=True)}


def _attention_forward(q: Tensor, k: Tensor, v: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    o, lse = outputs.attention_forward(q, k, v, *rest)
    if v is not None and q.device.type == "cpu":
        o = outputs.ordered_like(o, q)
    return o, lse


def _attention_backward(
    do: Tensor | None,
    dlse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    made = outputs.attention_backward(do, dlse, o, lse, q, k, v, *rest)
    if q.device.type != "cpu":
        return made
    return tuple(
        g if x is None or g.dim() != 4 else outputs.ordered_like(g, x)
        for g, x in zip(made, (q, k, v), strict=True)
    )


torch.library.register_fake("gmkernels::attention_forward", _attention_forward)
torch.library.register_fake("gmkernels::attention_backward", _attention_backward)
