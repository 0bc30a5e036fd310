"""Transforms of normalizing flows around a network: coupling and masked autoregressive layers.

coupling        part of a row passes, the network reads it (and c) and maps the rest
                affine: Dinh et al. 2017, 1605.08803; spline: Durkan et al. 2019, 1906.04032
masked          every variable is mapped by numbers that depend on those before it (and c):
                MAF, Papamakarios et al. 2017, 1705.07057; exchanged by Inverse, IAF
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gmkernels.models.condition import join_condition
from gmkernels.models.masked import MaskedNet
from gmkernels.models.transforms import Transform
from gmkernels.ops.coupling import affine_coupling, affine_coupling_inverse
from gmkernels.ops.spline import (
    spline_coupling,
    spline_coupling_inverse,
    spline_transform,
    spline_transform_inverse,
)
from gmkernels.split import Split


class AffineCoupling(Transform):
    """affine_coupling() with shift and raw scale by a network.

    Args:
        net: the part that passes, [B, P, *] (with c: concatenated along dimension 1) -> shift, then
            raw scale, of the transformed part [B, T, *] along dimension 1, [B, 2 T, *]; the shift
            alone for "additive".
        split, scale, clamp: as in gmkernels.affine_coupling.
    """

    def __init__(
        self,
        net: Callable[[Tensor], Tensor],
        split: Split,
        *,
        scale: str = "tanh",
        clamp: float = 2.0,
    ) -> None:
        super().__init__()
        self.net, self.split, self.scale, self.clamp = net, split, scale, clamp

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift = self.net(join_condition(self.split.parts(x)[0], c))
        return affine_coupling(x, shift, split=self.split, scale=self.scale, clamp=self.clamp)

    def inverse(self, z: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift = self.net(join_condition(self.split.parts(z, of_output=True)[0], c))
        return affine_coupling_inverse(
            z, shift, split=self.split, scale=self.scale, clamp=self.clamp
        )


class SplineCoupling(Transform):
    """spline_coupling() with widths, heights and derivatives by a network.

    Args:
        net: as in AffineCoupling, but -> [B, T (3 bins - 1), *], the numbers of the first
            transformed channel first.
        split, bins, bound: as in gmkernels.spline_coupling.
    """

    def __init__(
        self,
        net: Callable[[Tensor], Tensor],
        split: Split,
        *,
        bins: int = 8,
        bound: float = 3.0,
    ) -> None:
        super().__init__()
        self.net, self.split, self.bins, self.bound = net, split, bins, bound

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        p = self._numbers(self.split.parts(x)[0], c)
        return spline_coupling(x, p, split=self.split, bins=self.bins, bound=self.bound)

    def inverse(self, z: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        p = self._numbers(self.split.parts(z, of_output=True)[0], c)
        return spline_coupling_inverse(z, p, split=self.split, bins=self.bins, bound=self.bound)

    def _numbers(self, passed: Tensor, c: Tensor | None) -> Tensor:
        out = self.net(join_condition(passed, c))
        return out.unflatten(1, (-1, 3 * self.bins - 1)).movedim(2, -1)


class _Masked(Transform):
    """Rows [B, D]; a subclass maps given the numbers that the network says, [B, D, P]."""

    def __init__(self, net: MaskedNet, outputs: int) -> None:
        super().__init__()
        if net.outputs != outputs:
            raise ValueError(
                f"{type(self).__name__}: net must say {outputs} numbers of a variable, got a "
                f"MaskedNet with outputs={net.outputs}"
            )
        self.net = net

    def map(self, x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, n] by numbers [B, n, P], and log_det [B]."""
        raise NotImplementedError

    def map_back(self, z: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Its inverse."""
        raise NotImplementedError

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.map(x, self.net(x, c))

    def inverse(self, z: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One variable after the other; the network's work is that of one pass."""
        log_dets = []

        def value(numbers: Tensor, i: int) -> Tensor:
            x, log_det = self.map_back(z[:, i : i + 1], numbers[:, None])
            log_dets.append(log_det)
            return x[:, 0]

        x = self.net.sequential(value, len(z), c)
        return x, torch.stack(log_dets).sum(0)


class MaskedAffine(_Masked):
    """z_i = s_i x_i + shift_i with (shift_i, raw scale_i) from x_1, ..., x_{i-1}.

    Args: net: with outputs=2. scale, clamp: as in gmkernels.affine_coupling, but not "additive".
    """

    def __init__(self, net: MaskedNet, *, scale: str = "tanh", clamp: float = 2.0) -> None:
        super().__init__(net, 2)
        self.scale, self.clamp = scale, clamp
        self.all = Split.index(torch.arange(net.features), net.features)
        self.one = Split.halves(1)

    def map(self, x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = numbers.unbind(2)
        return affine_coupling(x, shift, raw, split=self.all, scale=self.scale, clamp=self.clamp)

    def map_back(self, z: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = numbers.unbind(2)
        return affine_coupling_inverse(
            z, shift, raw, split=self.one, scale=self.scale, clamp=self.clamp
        )


class MaskedSpline(_Masked):
    """z_i = a rational-quadratic spline of x_i by 3 bins - 1 numbers from x_1, ..., x_{i-1}.

    Args: net: with outputs=3 * bins - 1. bins, bound: as in gmkernels.spline_transform.
    """

    def __init__(self, net: MaskedNet, *, bins: int = 8, bound: float = 3.0) -> None:
        super().__init__(net, 3 * bins - 1)
        self.bins, self.bound = bins, bound

    def map(self, x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return spline_transform(x, numbers, bins=self.bins, bound=self.bound)

    def map_back(self, z: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return spline_transform_inverse(z, numbers, bins=self.bins, bound=self.bound)
