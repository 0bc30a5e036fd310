"""A flow of pictures' levels or of points, conditional on a class.

A picture's levels are dequantised, y = (level + u) / L with u ~ U[0, 1), and the flow starts with a
logit. Its density of y bounds the probability of the picture as it is stored:
    -log P(levels) <= E_u[-log p(y)] + D log L                Theis et al. 2016, 1511.01844
Points are taken as they are, and their density is exact.
"""

import math

import torch
from torch import Tensor, nn

from gmkernels import noise
from gmkernels.models.flow import Flow, Multiscale, Normal
from gmkernels.models.transforms import Logit, Transform
from gmkernels.ops.elementwise import dequantize


class DataFlow(nn.Module):
    """A flow of pictures' levels [B, D], or of points [B, D], conditional on a class if asked.

    Args:
        transforms: of rows of this shape, after the logit of pictures.
        shape: (D,), or (1, height, width) with D = height width.
        levels: L of the pictures, 0 for points.
        classes: K; the condition c is one-hot, [B, K]. 0: none.
        reconstruct: as in Flow.

    Everywhere: x int64 levels or float points, [B, D]; label int64 [B] or None. seed as in Flow.
    """

    def __init__(
        self,
        transforms: list[Transform],
        shape: tuple[int, ...],
        levels: int,
        *,
        classes: int = 0,
        reconstruct: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.levels, self.classes = shape, levels, classes
        size = math.prod(shape)
        # Multiscale gives flat rows, the others rows of the data's shape.
        self.base = Normal(size if isinstance(transforms[-1], Multiscale) else shape)
        first: list[Transform] = [Logit()] if levels else []
        self.flow = Flow([*first, *transforms], self.base, reconstruct=reconstruct)
        self.constant = size * math.log(levels) if levels else 0.0

    @property
    def takes(self) -> str:
        """The x that it takes: "levels", or "unit" for points."""
        return "levels" if self.levels else "unit"

    @property
    def log_prob_kind(self) -> str:
        """Of levels a bound, in expectation over the dequantisation; of points exact."""
        return "lower bound" if self.levels else "exact"

    def log_prob(
        self, x: Tensor, label: Tensor | None = None, *, seed: noise.Seed = None
    ) -> Tensor:
        """log p(x|label), [B] nats: of a conditional flow without label, its mean over classes."""
        if self.levels:
            x = dequantize(x, bins=self.levels, seed=seed)
        x = x.view(len(x), *self.shape)
        if label is not None or not self.classes:
            return self.flow.log_prob(x, self._condition(label)) - self.constant
        every = (x.new_tensor([k]).long().expand(len(x)) for k in range(self.classes))
        log_p = torch.stack([self.flow.log_prob(x, self._condition(k)) for k in every])
        return log_p.logsumexp(0) - math.log(self.classes) - self.constant

    def loss(self, x: Tensor, label: Tensor | None = None, *, seed: noise.Seed = None) -> Tensor:
        """What training minimises, a scalar: the mean of -log p(x|label)."""
        return -self.log_prob(x, label, seed=seed).mean()

    def sample(self, n: int, label: int | None = None, *, seed: noise.Seed = None) -> Tensor:
        """n pictures as levels, or points, [n, D]; of one class, or of classes drawn evenly."""
        device = self.base.origin.device
        key = noise.resolve_key("sample", seed, 0, None, device)
        labels = None if label is None else torch.full((n,), label, device=device)
        if self.classes and labels is None:
            u = noise.uniform((n, 1), seed=noise.fold_in(key, 1), device=device)[:, 0]
            labels = (u * self.classes).ceil().long() - 1
        x = self.flow.sample(n, self._condition(labels), seed=key).flatten(1)
        if not self.levels:
            return x
        return (x * self.levels).floor().clamp(0, self.levels - 1).long()

    def _condition(self, label: Tensor | None) -> Tensor | None:
        if label is None:
            return None
        return nn.functional.one_hot(label, self.classes).to(self.base.origin.dtype)
