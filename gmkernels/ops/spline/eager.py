"""What users run without this library: rational-quadratic splines as in nflows, and nflows, zuko.

The baselines of the benchmarks; values of zuko differ, since it parametrises its bins differently.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gmkernels.split import Split

Minima = tuple[float, float, float]


def _knots(raw: Tensor, minimum: float, bound: float) -> tuple[Tensor, Tensor]:
    size = minimum + (1 - minimum * raw.shape[-1]) * F.softmax(raw, -1)
    edges = F.pad(size.cumsum(-1), (1, 0)) * (2 * bound) - bound
    return edges, edges[..., 1:] - edges[..., :-1]


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index[..., None])[..., 0]


def rational_quadratic(
    x: Tensor, parameters: Any, bins: int, bound: float, minima: Minima, inverse: bool
) -> tuple[Tensor, Tensor]:
    """As nflows' unconstrained_rational_quadratic_spline, without its mask and its assertion."""
    if isinstance(parameters, Tensor):
        parameters = parameters.split([bins, bins, bins - 1], -1)
    inside = (x >= -bound) & (x <= bound)
    at = torch.where(inside, x, torch.zeros_like(x))
    (left, w), (low, h) = (
        _knots(raw, minimum, bound) for raw, minimum in zip(parameters[:2], minima[:2], strict=True)
    )
    end = math.log(math.expm1(1 - minima[2]))
    d = minima[2] + F.softplus(F.pad(parameters[2], (1, 1), value=end))
    edges = low if inverse else left
    k = (at[..., None] >= edges[..., 1:-1]).sum(-1)
    left, w, low, h, d0 = (_at(v, k) for v in (left, w, low, h, d))
    d1 = _at(d, k + 1)
    s = h / w
    if inverse:
        y = at - low
        m = d0 + d1 - 2 * s
        a, b, c = y * m + h * (s - d0), h * d0 - y * m, -s * y
        z = 2 * c / (-b - (b.square() - 4 * a * c).clamp(min=0).sqrt())
    else:
        z = (at - left) / w
    t = z * (1 - z)
    denominator = s + (d0 + d1 - 2 * s) * t
    e = d1 * z.square() + 2 * s * t + d0 * (1 - z).square()
    log_det = 2 * torch.log(s) + torch.log(e) - 2 * torch.log(denominator)
    y = left + z * w if inverse else low + h * (s * z.square() + d0 * t) / denominator
    log_det = torch.where(inside, -log_det if inverse else log_det, 0 * x)
    return torch.where(inside, y, x), log_det


Element = Callable[[Tensor, Any, int, float, Minima, bool], tuple[Tensor, Tensor]]


def make(element: Element, inverse: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """A side of the benchmarks with our signature from a map of elements."""

    def call(
        x: Tensor,
        parameters: Any,
        *,
        split: Split | None = None,
        bins: int = 8,
        bound: float = 3.0,
        min_width: float = 1e-3,
        min_height: float = 1e-3,
        min_derivative: float = 1e-3,
    ) -> tuple[Tensor, Tensor]:
        minima = (min_width, min_height, min_derivative)
        if split is None:
            y, log_det = element(x, parameters, bins, bound, minima, inverse)
            return y.to(x.dtype), log_det.float().flatten(1).sum(1)
        passed, at = split.parts(x, of_output=inverse)
        y, log_det = element(at, parameters, bins, bound, minima, inverse)
        joined = split.join(passed, y.to(x.dtype), of_output=not inverse)
        return joined, log_det.float().flatten(1).sum(1)

    return call


def _nflows(
    x: Tensor, parameters: Any, bins: int, bound: float, minima: Minima, inverse: bool
) -> tuple[Tensor, Tensor]:
    from nflows.transforms.splines import unconstrained_rational_quadratic_spline

    widths, heights, derivatives = parameters.split([bins, bins, bins - 1], -1)
    return unconstrained_rational_quadratic_spline(
        x, widths, heights, derivatives, inverse, "linear", bound, *minima
    )


def _zuko(
    x: Tensor, parameters: Any, bins: int, bound: float, minima: Minima, inverse: bool
) -> tuple[Tensor, Tensor]:
    from zuko.transforms import MonotonicRQSTransform

    made = MonotonicRQSTransform(
        *parameters.split([bins, bins, bins - 1], -1), bound=bound, slope=minima[2]
    )
    return (made.inv if inverse else made).call_and_ladj(x)


@functools.cache
def _compiled_zuko(inverse: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(make(_zuko, inverse), dynamic=False)


def peers(inverse: bool) -> dict[str, Callable[..., Any]]:
    """nflows and zuko, and zuko under torch.compile."""
    return {
        "nflows": make(_nflows, inverse),
        "zuko": make(_zuko, inverse),
        "zuko compiled": lambda *args, **kwargs: _compiled_zuko(inverse)(*args, **kwargs),
    }
