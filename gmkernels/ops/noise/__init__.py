"""The noise family: one kernel a distribution. The public functions are in gmkernels/noise.py."""

from typing import Any

import torch

from gmkernels import dispatch
from gmkernels.ops.noise import reference


def _vmap(name: str) -> Any:
    """A batched key draws one tensor a key."""

    def rule(info: Any, in_dims: tuple[Any, ...], key: torch.Tensor, *rest: Any) -> Any:
        draw = getattr(torch.ops.gmkernels_reference, name)
        return torch.stack([draw(k, *rest) for k in key.movedim(in_dims[0], 0)]), 0

    return rule


for _draw in (reference.normal, reference.uniform):
    dispatch.define("gmkernels_reference", _draw, reference.draw_empty)
    torch.library.register_vmap(f"gmkernels_reference::{_draw.__name__}", _vmap(_draw.__name__))
dispatch.define(
    "gmkernels_reference",
    reference.folded_normal,
    lambda key, index, columns: index.new_empty((index.shape[0], columns), dtype=torch.float32),
)
dispatch.load_family(__name__, ("normal", "uniform"))
