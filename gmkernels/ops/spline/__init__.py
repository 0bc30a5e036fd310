"""Rational-quadratic splines: on part of a row (coupling) or all of it. Start with reference.py.

Saved for backward: the call's inputs. Bins, roots and slopes are made again.
"""

import math

from torch import Tensor

from gmkernels import checks, dispatch
from gmkernels.autograd import DifferentiableOp
from gmkernels.ops.spline import reference
from gmkernels.split import Split, resolve

__all__ = [
    "spline_coupling",
    "spline_coupling_inverse",
    "spline_transform",
    "spline_transform_inverse",
]

MIN_BINS, MAX_BINS = 4, 32
Parameters = Tensor | tuple[Tensor, Tensor, Tensor]

dispatch.load_family(__name__, ("spline_map",))
_spline_map = DifferentiableOp("spline_map", reference.spline_map, inputs=4, outputs=2)


def _check_numbers(
    op: str, bins: int, bound: float, min_width: float, min_height: float, min_derivative: float
) -> None:
    if not MIN_BINS <= bins <= MAX_BINS:
        raise ValueError(f"{op}: bins must be from {MIN_BINS} to {MAX_BINS}, got {bins}")
    if not 0 < bound < math.inf:
        raise ValueError(f"{op}: bound must be positive and finite, got {bound}")
    for name, value in (("min_width", min_width), ("min_height", min_height)):
        if not 0 <= value * bins < 1:
            raise ValueError(
                f"{op}: {name} must be from 0 to below 1 / bins = {1 / bins:.4g}, got {value}"
            )
    if not 0 <= min_derivative < 1:
        raise ValueError(
            f"{op}: min_derivative must be from 0 to below 1, the slope at the bound, "
            f"got {min_derivative}"
        )


def _check_parameters(
    op: str, parameters: Parameters, part: tuple[int, ...], bins: int, x: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if isinstance(parameters, Tensor):
        parts = {"parameters": (parameters, 3 * bins - 1)}
    elif isinstance(parameters, tuple) and len(parameters) == 3:
        sizes = (bins, bins, bins - 1)
        names = ("widths", "heights", "derivatives")
        parts = dict(zip(names, zip(parameters, sizes, strict=True), strict=True))
    else:
        raise TypeError(
            f"{op}: parameters must be one tensor or a tuple (widths, heights, derivatives), "
            f"got {type(parameters).__name__}"
        )
    for name, (value, size) in parts.items():
        checks.check_tensor(op, name, value, x.device)
        if tuple(value.shape) != (*part, size):
            what = "3 bins - 1" if name == "parameters" else "its"
            raise ValueError(
                f"{op}: {name} must have shape {(*part, size)}, {what} values for each transformed "
                f"element with bins={bins}, got {tuple(value.shape)}"
            )
    rows = [checks.in_rows(value) for value, _ in parts.values()]
    return (rows[0], None, None) if len(rows) == 1 else (rows[0], rows[1], rows[2])


def _call(
    op: str,
    x: Tensor,
    parameters: Parameters,
    split: Split | None,
    bins: int,
    bound: float,
    minima: tuple[float, float, float],
    inverse: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    checks.check_rows(op, "x", x)
    part, order, begin = tuple(x.shape), None, 0
    if split is not None:
        order, begin = resolve(op, split, x)
        part = split.part_shape(x)
    _check_numbers(op, bins, bound, *minima)
    raw = _check_parameters(op, parameters, part, bins, x)
    wide = dispatch.is_wide(x, *raw)
    name = dispatch.choose("spline_map", x.device.type, wide, backend)
    numbers = (bins, float(bound), *map(float, minima), inverse)
    y, log_det = _spline_map(name, checks.in_rows(x), *raw, order, begin, *numbers)
    return checks.in_layout_of(y, x), log_det


def spline_coupling(
    x: Tensor,
    parameters: Parameters,
    *,
    split: Split,
    bins: int = 8,
    bound: float = 3.0,
    min_width: float = 1e-3,
    min_height: float = 1e-3,
    min_derivative: float = 1e-3,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A monotonic rational-quadratic spline on the transformed part, the rest passes; log|det|.

    Each element has K = bins bins on [-bound, bound] and is left as it is outside.

    Args:
        x: [B, D], [B, C, H, W] or any [B, *] that the split divides; float32, bfloat16, float16, or
            float64 (reference). Rows that are not contiguous cost a copy.
        parameters: [*part, 3 K - 1], part = split.part_shape(x): unnormalised widths (K), heights
            (K) and inner derivatives (K - 1) of each transformed element, as in nflows; or the
            three as a tuple of [*part, K], [*part, K], [*part, K - 1]. Their dtype may differ.
        split: a gmkernels.Split; it may hold a permutation to follow, folded into the store.
        bins: K, 4 to 32.
        bound: of the interval on both axes, > 0.
        min_width, min_height: of a bin, as a share of 2 bound, below 1 / K.
        min_derivative: of the slope at inner knots, below 1; the slope at the bound is 1.
        backend: None chooses; a named backend runs or raises.
    Returns:
        y: x's shape, dtype and layout. What passes keeps its bits.
        log_det: [B] float32 (float64 on float64 inputs), summed over the transformed part.
    Raises:
        TypeError, ValueError: shapes, dtypes, devices or numbers other than said here.
        RuntimeError: a named backend that cannot run.

    Differentiable twice and more in x and the parameters; at a knot the derivatives are those of
    the bin above. Accuracy: within twice the error of float32 PyTorch plus the row's floor. Source:
    Durkan et al. 2019.

    >>> import torch, gmkernels
    >>> split = gmkernels.Split.halves(4)
    >>> y, log_det = gmkernels.spline_coupling(torch.ones(1, 4), torch.zeros(1, 2, 23), split=split)
    >>> y.shape, log_det.shape
    (torch.Size([1, 4]), torch.Size([1]))
    """
    minima = (min_width, min_height, min_derivative)
    return _call("spline_coupling", x, parameters, split, bins, bound, minima, False, backend)


def spline_coupling_inverse(
    y: Tensor,
    parameters: Parameters,
    *,
    split: Split,
    bins: int = 8,
    bound: float = 3.0,
    min_width: float = 1e-3,
    min_height: float = 1e-3,
    min_derivative: float = 1e-3,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The x that spline_coupling() maps to y, and log|det dx/dy|, in closed form.

    Args: as in spline_coupling(), with y in x's place. The part that passes, from which a network
        makes the parameters, is split.parts(y, of_output=True)[0].
    Returns:
        x: y's shape, dtype and layout.
        log_det: [B] float32 (float64 on float64 inputs), of the inverse map.
    Raises:
        TypeError, ValueError, RuntimeError: as in spline_coupling(). No value of y or the
            parameters raises: the root's argument is guarded.

    Differentiable twice and more in y and the parameters. Source: Durkan et al. 2019, eq. 6 to 8.

    >>> import torch, gmkernels
    >>> split = gmkernels.Split.halves(2)
    >>> x, log_det = gmkernels.spline_coupling_inverse(
    ...     torch.full((1, 2), 4.0), torch.zeros(1, 1, 23), split=split
    ... )
    >>> x
    tensor([[4., 4.]])
    """
    op, minima = "spline_coupling_inverse", (min_width, min_height, min_derivative)
    return _call(op, y, parameters, split, bins, bound, minima, True, backend)


def spline_transform(
    x: Tensor,
    parameters: Parameters,
    *,
    bins: int = 8,
    bound: float = 3.0,
    min_width: float = 1e-3,
    min_height: float = 1e-3,
    min_derivative: float = 1e-3,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A monotonic rational-quadratic spline on every element, for autoregressive flows; log|det|.

    Args: as in spline_coupling(), with parameters [*x.shape, 3 K - 1] and no split.
    Returns:
        y: x's shape, dtype and layout.
        log_det: [B] float32 (float64 on float64 inputs).
    Raises:
        TypeError, ValueError, RuntimeError: as in spline_coupling().

    Differentiable twice and more in x and the parameters. Source: Durkan et al. 2019.

    >>> import torch, gmkernels
    >>> y, log_det = gmkernels.spline_transform(torch.full((1, 2), 3.5), torch.zeros(1, 2, 23))
    >>> y, log_det
    (tensor([[3.5000, 3.5000]]), tensor([0.]))
    """
    minima = (min_width, min_height, min_derivative)
    return _call("spline_transform", x, parameters, None, bins, bound, minima, False, backend)


def spline_transform_inverse(
    y: Tensor,
    parameters: Parameters,
    *,
    bins: int = 8,
    bound: float = 3.0,
    min_width: float = 1e-3,
    min_height: float = 1e-3,
    min_derivative: float = 1e-3,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The x that spline_transform() maps to y, and log|det dx/dy|.

    Args: as in spline_transform(), with y in x's place.
    Returns:
        x: y's shape, dtype and layout.
        log_det: [B] float32 (float64 on float64 inputs), of the inverse map.
    Raises:
        TypeError, ValueError, RuntimeError: as in spline_coupling_inverse().

    Differentiable twice and more in y and the parameters. Source: Durkan et al. 2019, eq. 6 to 8.

    >>> import torch, gmkernels
    >>> x, _ = gmkernels.spline_transform_inverse(torch.full((1, 2), 3.5), torch.zeros(1, 2, 23))
    >>> x
    tensor([[3.5000, 3.5000]])
    """
    op, minima = "spline_transform_inverse", (min_width, min_height, min_derivative)
    return _call(op, y, parameters, None, bins, bound, minima, True, backend)
