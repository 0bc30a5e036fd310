"""Activations: gelu. Start with reference.py.

Saved for backward: the call's input.
"""

from torch import Tensor

from gmkernels import checks, dispatch
from gmkernels.autograd import DifferentiableOp
from gmkernels.ops.activation import reference

__all__ = ["gelu"]

dispatch.load_family(__name__, ("gelu",))
_gelu = DifferentiableOp("gelu", reference.gelu, inputs=1, outputs=1)


def gelu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): GPT-2's activation.

    It is torch.nn.functional.gelu(x, approximate="tanh"), and keeps its relative accuracy where x
    is far below 0.

    Args:
        x: any shape; float32, bfloat16, float16, or float64 (reference). Rows (dimension 0) that
            are not contiguous cost a copy.
        backend: None chooses; a named backend runs or raises.
    Returns:
        x's shape, dtype and layout.
    Raises:
        TypeError: no dense floating tensor.
        RuntimeError: a named backend that cannot run.

    Differentiable twice and more. Accuracy: within twice the error of float32 PyTorch plus 2 ulp of
    the output's scale. Source: Hendrycks and Gimpel 2016, section 2.

    >>> import torch, gmkernels
    >>> gmkernels.gelu(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.1588,  0.0000,  0.8412])
    """
    checks.check_tensor("gelu", "x", x)
    name = dispatch.choose("gelu", x.device.type, dispatch.is_wide(x), backend)
    if x.dim() < 2:
        return _gelu(name, x.reshape(1, -1))[0].view(x.shape)
    return checks.in_layout_of(_gelu(name, checks.in_rows(x))[0], x)
