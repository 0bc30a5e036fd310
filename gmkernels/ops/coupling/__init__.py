"""Affine coupling layers: affine_coupling and its inverse. Start with reference.py.

Saved for backward: the call's input, shift and raw scale. The scale is made again.
"""

from torch import Tensor

from gmkernels import checks, dispatch
from gmkernels.autograd import DifferentiableOp
from gmkernels.ops.coupling import reference
from gmkernels.split import Split, resolve

__all__ = ["affine_coupling", "affine_coupling_inverse"]

dispatch.load_family(__name__, ("affine_coupling",))
_affine_coupling = DifferentiableOp(
    "affine_coupling", reference.affine_coupling, inputs=3, outputs=2
)


def _joint_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], 2 * shape[1], *shape[2:])


def _call(
    op: str,
    x: Tensor,
    shift: Tensor,
    raw_scale: Tensor | None,
    split: Split,
    scale: str,
    clamp: float,
    inverse: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    checks.check_rows(op, "x", x)
    order, begin = resolve(op, split, x)
    if scale not in reference.SCALES:
        known = ", ".join(reference.SCALES)
        raise ValueError(f"{op}: scale must be one of {known}, got {scale!r}")
    if not 0 < clamp < float("inf"):
        raise ValueError(f"{op}: clamp must be positive and finite, got {clamp}")
    part = split.part_shape(x)
    checks.check_tensor(op, "shift", shift, x.device)
    is_joint = raw_scale is None and scale != "additive"
    if tuple(shift.shape) != (_joint_shape(part) if is_joint else part):
        hint = f", or {_joint_shape(part)} with raw_scale left out" if scale != "additive" else ""
        raise ValueError(
            f"{op}: shift must have the transformed part's shape {part}{hint}, "
            f"got {tuple(shift.shape)}"
        )
    if raw_scale is not None:
        if scale == "additive":
            raise ValueError(f"{op}: scale 'additive' takes no raw_scale; leave it out")
        checks.check_like(op, "raw_scale", raw_scale, "shift", shift)
        raw_scale = checks.in_rows(raw_scale)
    wide = dispatch.is_wide(x, shift, raw_scale)
    name = dispatch.choose("affine_coupling", x.device.type, wide, backend)
    kind = reference.SCALES.index(scale)
    y, log_det = _affine_coupling(
        name,
        checks.in_rows(x),
        checks.in_rows(shift),
        raw_scale,
        order,
        begin,
        kind,
        float(clamp),
        inverse,
    )
    return checks.in_layout_of(y, x), log_det


def affine_coupling(
    x: Tensor,
    shift: Tensor,
    raw_scale: Tensor | None = None,
    *,
    split: Split,
    scale: str = "tanh",
    clamp: float = 2.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y_2 = s x_2 + shift on the transformed part, y_1 = x_1 on the rest, and log|det dy/dx|.

    Args:
        x: [B, D], [B, C, H, W] or any [B, *] that the split divides; float32, bfloat16, float16, or
            float64 (reference). Rows that are not contiguous cost a copy.
        shift: the shape of the transformed part, split.part_shape(x); its dtype may differ. Without
            raw_scale: twice as many along dimension 1, shift and raw scale one after the other, as
            a network gives them; then their gradient is one tensor, too.
        raw_scale: like shift, None for "additive". Halves of one tensor (torch.chunk) are read in
            place.
        split: a gmkernels.Split: half, alternating, checkerboard or an index; it may hold a
            permutation to follow, folded into the store.
        scale: "tanh" (log s = clamp tanh(u / clamp)), "exp" (s = exp(u)), "sigmoid" (s = sigmoid(u
            + 2), as in Glow) or "additive" (s = 1).
        clamp: the bound of |log s| for "tanh", > 0.
        backend: None chooses; a named backend runs or raises.
    Returns:
        y: x's shape, dtype and layout. What passes keeps its bits.
        log_det: [B] float32 (float64 on float64 inputs), summed over the transformed part.
    Raises:
        TypeError, ValueError: shapes, dtypes, devices or options other than said here.
        RuntimeError: a named backend that cannot run.

    Differentiable twice and more in x, shift and raw_scale. Accuracy: within twice the error of
    float32 PyTorch plus 2 ulp of the output's scale. Source: Dinh et al. 2017, eq. 7.

    >>> import torch, gmkernels
    >>> split = gmkernels.Split.halves(4)
    >>> y, log_det = gmkernels.affine_coupling(torch.ones(1, 4), torch.zeros(1, 4), split=split)
    >>> y, log_det
    (tensor([[1., 1., 1., 1.]]), tensor([0.]))
    """
    return _call("affine_coupling", x, shift, raw_scale, split, scale, clamp, False, backend)


def affine_coupling_inverse(
    y: Tensor,
    shift: Tensor,
    raw_scale: Tensor | None = None,
    *,
    split: Split,
    scale: str = "tanh",
    clamp: float = 2.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The x that affine_coupling() maps to y, and log|det dx/dy| = -log|det dy/dx|.

    Args: as in affine_coupling(), with y in x's place. The part that passes, from which a network
        makes shift and raw_scale, is split.parts(y, of_output=True)[0].
    Returns:
        x: y's shape, dtype and layout.
        log_det: [B] float32 (float64 on float64 inputs), of the inverse map.
    Raises:
        TypeError, ValueError, RuntimeError: as in affine_coupling().

    Differentiable twice and more in y, shift and raw_scale. Source: Dinh et al. 2017, eq. 8.

    >>> import torch, gmkernels
    >>> split = gmkernels.Split.halves(2)
    >>> gmkernels.affine_coupling_inverse(torch.ones(1, 2), torch.zeros(1, 2), split=split)
    (tensor([[1., 1.]]), tensor([0.]))
    """
    op = "affine_coupling_inverse"
    return _call(op, y, shift, raw_scale, split, scale, clamp, True, backend)
