"""How a coupling layer divides a row: which part it transforms, and where the results are stored.

A row's positions are numbered along dimension 1, or over a whole image for a checkerboard. Slots
list the transformed positions first, then the others:
    order[0, k]   position in x of slot k
    order[1, k]   position in y of slot k; differs where a permutation is folded into the store
"""

import math
from typing import Any

import torch
from torch import Tensor, nn


class Split(nn.Module):
    """A division of rows into a transformed part and one that passes. Moves with its module.

    Use halves(), alternating(), checkerboard() or index(). `order` is part of a state dict: it may
    hold a random permutation.

    Args:
        transformed: [n] distinct positions, n >= 1, in the order of the part's own layout.
        shape: what the positions number: (features,) along dimension 1, or a whole (C, H, W).
        permutation: [C] applied after the layer along dimension 1: y[:, j] = u[:, permutation[j]]
            with u the unpermuted result. None leaves the order.
    Raises:
        ValueError: positions out of range or twice, an empty part, or no permutation.

    >>> import gmkernels
    >>> split = gmkernels.Split.halves(4)
    >>> [tuple(part.shape) for part in split.parts(torch.zeros(2, 4))]
    [(2, 2), (2, 2)]
    """

    order: Tensor

    def __init__(
        self, transformed: Tensor, shape: tuple[int, ...], permutation: Tensor | None = None
    ) -> None:
        super().__init__()
        count = math.prod(shape)
        if len(shape) not in (1, 3) or count < 1 or count >= 2**31:
            raise ValueError(
                "Split: shape must be (features,) or (channels, height, width), all >= 1 and fewer "
                f"than 2^31 together, got {tuple(shape)}"
            )
        chosen = _positions("transformed", transformed, count)
        if len(chosen) == 0:
            raise ValueError(f"Split: no position of {tuple(shape)} is transformed; use flip=True")
        passes = torch.ones(count, dtype=torch.bool)
        passes[chosen] = False
        source = torch.cat([chosen, passes.nonzero().flatten()])
        target = source
        if permutation is not None:
            p = _positions("permutation", permutation, shape[0])
            if len(p) != shape[0]:
                raise ValueError(
                    f"Split: permutation must hold each of 0..{shape[0] - 1}, got {len(p)} values"
                )
            inner = count // shape[0]
            target = p.argsort()[source // inner] * inner + source % inner
        self.shape = tuple(shape)
        self.transformed = len(chosen)
        self.register_buffer("order", torch.stack([source, target]).to(torch.int32))
        self._find_run()

    @classmethod
    def halves(
        cls, features: int, *, flip: bool = False, permutation: Tensor | None = None
    ) -> "Split":
        """The first features // 2 along dimension 1 pass, the others are transformed.

        flip transforms the first features // 2 instead. One feature alone is transformed.
        """
        k = features // 2
        chosen = torch.arange(k) if flip else torch.arange(k, features)
        return cls(chosen, (features,), permutation)

    @classmethod
    def alternating(
        cls, features: int, *, flip: bool = False, permutation: Tensor | None = None
    ) -> "Split":
        """Positions 1, 3, 5, ... along dimension 1 are transformed; with flip 0, 2, 4, ..."""
        return cls(torch.arange(0 if flip else 1, features, 2), (features,), permutation)

    @classmethod
    def checkerboard(
        cls,
        channels: int,
        height: int,
        width: int,
        *,
        flip: bool = False,
        permutation: Tensor | None = None,
    ) -> "Split":
        """Pixels of [B, C, H, W] with an odd h + w are transformed; with flip those with an even.

        Both parts have shape [B, C, H, W / 2]: row h keeps its pixels in order. The width must be
        even. Source: Dinh et al. 2017, section 3.4.
        """
        if width % 2:
            raise ValueError(
                f"Split: a checkerboard needs an even width, got {width}; pad the image, or use "
                "alternating() over channels"
            )
        h, w = torch.arange(height)[:, None], torch.arange(width)[None]
        board = ((h + w) % 2 == (0 if flip else 1)).expand(channels, height, width)
        return cls(board.flatten().nonzero().flatten(), (channels, height, width), permutation)

    @classmethod
    def index(
        cls, transformed: Tensor, features: int, *, permutation: Tensor | None = None
    ) -> "Split":
        """The positions [n] along dimension 1 are transformed, in this order."""
        return cls(transformed, (features,), permutation)

    def check(self, op: str, x: Tensor) -> None:
        """Raises ValueError unless x [B, *shape, ...] is what this split divides, on its device."""
        rank = len(self.shape)
        if x.dim() <= rank or tuple(x.shape[1 : 1 + rank]) != self.shape:
            wanted = ", ".join(map(str, self.shape))
            rest = ", ..." if rank == 1 else ""
            raise ValueError(
                f"{op}: x must have shape [B, {wanted}{rest}] for this split, got {tuple(x.shape)}"
            )
        if self.order.device != x.device:
            raise ValueError(
                f"{op}: the split is on {self.order.device}, x on {x.device}; move it with "
                "split.to(x.device), or make it a submodule of the model"
            )

    def part_shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of the transformed part of x [B, *]."""
        return self._shape_of(x, self.transformed)

    def parts(self, x: Tensor, *, of_output: bool = False) -> tuple[Tensor, Tensor]:
        """(what passes, what is transformed) of x [B, *]; views where the parts are halves.

        of_output: x is the layer's result, so a permutation has moved its positions.
        """
        self.check("Split.parts", x)
        n, rest = self.transformed, self.order.shape[1] - self.transformed
        if self.begin in (0, rest):
            at = n if self.begin == 0 else 0
            return x.narrow(1, at, rest), x.narrow(1, self.begin, n)
        flat = x.flatten(1) if len(self.shape) == 3 else x
        positions = self.order[1 if of_output else 0]
        passed = flat.index_select(1, positions[n:]).view(self._shape_of(x, rest))
        return passed, flat.index_select(1, positions[:n]).view(self._shape_of(x, n))

    def join(self, passed: Tensor, transformed: Tensor, *, of_output: bool = False) -> Tensor:
        """The row [B, *] whose parts() these are; of_output as there."""
        if self.begin == 0:
            return torch.cat([transformed, passed], 1)
        if self.begin == self.order.shape[1] - self.transformed:
            return torch.cat([passed, transformed], 1)
        slots, whole = [transformed, passed], len(self.shape) == 3
        if whole:
            slots = [part.flatten(1) for part in slots]
        positions = self.order[1 if of_output else 0]
        row = torch.cat(slots, 1).index_select(1, positions.argsort())
        return row.view(row.shape[0], *self.shape) if whole else row

    def _shape_of(self, x: Tensor, count: int) -> tuple[int, ...]:
        if len(self.shape) == 1:
            return (x.shape[0], count, *x.shape[2:])
        channels, height, width = self.shape
        if 2 * count == channels * height * width:
            return (x.shape[0], channels, height, width // 2)
        return (x.shape[0], count)

    def _find_run(self) -> None:
        # Where the transformed part is one run that stays in place, no table is needed: its start.
        source, target = self.order.cpu().long()
        n = self.transformed
        is_run = torch.equal(source[:n], source[0] + torch.arange(n))
        self.begin = int(source[0]) if is_run and torch.equal(source, target) else -1

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._find_run()

    def extra_repr(self) -> str:
        """What print() shows."""
        return f"shape={self.shape}, transformed={self.transformed}"


def resolve(op: str, split: Any, x: Tensor) -> tuple[Tensor | None, int]:
    """What operators take of a split: its order; or None, and the first column of the run.

    Raises TypeError if it is none, ValueError if it does not divide x.
    """
    if not isinstance(split, Split):
        raise TypeError(
            f"{op}: split must be a gmkernels.Split, such as gmkernels.Split.halves(x.shape[1]), "
            f"got {type(split).__name__}"
        )
    split.check(op, x)
    if split.begin < 0:
        return split.order, 0
    inner = x[:1].numel() // split.order.shape[1] if len(x) else 1
    return None, split.begin * inner


def _positions(name: str, values: Any, count: int) -> Tensor:
    values = torch.as_tensor(values).detach().cpu()
    if values.dim() != 1 or values.is_floating_point() or values.dtype is torch.bool:
        raise ValueError(
            f"Split: {name} must be a 1-D tensor of integer positions, got {values.dtype} of shape "
            f"{tuple(values.shape)}"
        )
    values = values.long()
    if len(values) and not (int(values.min()) >= 0 and int(values.max()) < count):
        raise ValueError(
            f"Split: {name} must lie in 0..{count - 1}, got {int(values.min())} to "
            f"{int(values.max())}"
        )
    if len(values.unique()) != len(values):
        raise ValueError(f"Split: {name} must be distinct positions, some are given twice")
    return values
