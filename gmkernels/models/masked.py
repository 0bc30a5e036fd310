"""A masked network: what it says of a variable depends on the variables before it alone.

Germain et al. 2015, "MADE", 1502.03509. Variables have ranks 0, ..., D - 1. A hidden unit has a
degree m, and sees the variables of rank < m through units of degree <= m; the outputs of a variable
of rank r see units of degree <= r. Each unit's degree is fixed and rises with its index.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _MaskedLinear(nn.Linear):
    """A linear layer whose output i sees input j where sees[i] >= degree[j], in each order."""

    masks: Tensor

    def __init__(self, degree: Tensor, sees: Tensor) -> None:
        """degree [M, inputs], sees [M, outputs], of M orders; M may be 1 where all are alike."""
        super().__init__(degree.shape[1], sees.shape[1])
        self.register_buffer("masks", sees[:, :, None] >= degree[:, None], persistent=False)

    def forward(self, input: Tensor, which: int = 0) -> Tensor:
        mask = self.masks[which if len(self.masks) > 1 else 0]
        return F.linear(input, self.weight * mask, self.bias)


def check_orders(
    name: str, features: int, order: Sequence[int] | Sequence[Sequence[int]] | None
) -> Tensor:
    """Orders as int64 [M, D], of one, of several or of None, which is 0, ..., D - 1.

    Raises ValueError for what is no permutation.
    """
    places = torch.arange(features)
    orders = places[None] if order is None else torch.atleast_2d(torch.tensor(order))
    if orders.shape[1:] != (features,) or not (orders.sort(1)[0] == places).all():
        raise ValueError(f"{name}: order must hold each of 0..{features - 1} once, got {order}")
    return orders


class MaskedNet(nn.Module):
    """x [B, D] -> P numbers for each variable, [B, D, P], 0 in a new network.

    Args:
        features: D. outputs: P. hidden: widths of the hidden layers, at least one.
        context: K, of a condition c [B, K] that all variables see; 0 for none.
        order: order[r] is the variable of rank r, each of 0, ..., D - 1 once; None: as they stand.
            Or M such orders [M, D]: the weights serve all, and a call says which it takes.
        dropout: of the hidden units.
    Raises:
        ValueError: sizes below 1, or an order that is no permutation.
    """

    layers: Any  # an nn.ModuleList of _MaskedLinear

    def __init__(
        self,
        features: int,
        outputs: int,
        hidden: Sequence[int] = (256, 256),
        *,
        context: int = 0,
        order: Sequence[int] | Sequence[Sequence[int]] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = (features, outputs, *hidden)
        if not hidden or min(sizes) < 1 or context < 0:
            raise ValueError(
                "MaskedNet: features, outputs and hidden must be >= 1, context >= 0, with a hidden "
                f"layer or more, got {features}, {outputs}, {tuple(hidden)} and {context}"
            )
        self.features, self.outputs = features, outputs
        self.orders = check_orders("MaskedNet", features, order)
        rank = self.orders.argsort()  # [M, D]
        lowest = 0 if context or features == 1 else 1  # degree 0 sees the condition alone
        degrees = [lowest + torch.arange(n) * (features - lowest) // n for n in hidden]
        self.degrees = [d.tolist() for d in degrees]
        of_hidden = [d[None] for d in degrees]
        before = [rank + 1, *of_hidden]
        after = [*of_hidden, rank.repeat_interleave(outputs, 1)]
        pairs = zip(before, after, strict=True)
        self.layers = nn.ModuleList(_MaskedLinear(degree, sees) for degree, sees in pairs)
        self.context = nn.Linear(context, hidden[0], bias=False) if context else None
        self.dropout = nn.Dropout(dropout)
        for p in self.layers[-1].parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor, c: Tensor | None = None, *, which: int = 0) -> Tensor:
        """The numbers of all variables, [B, D, P], in one pass. Raises ValueError for shapes.

        which: of the orders.
        """
        if x.dim() != 2 or x.shape[1] != self.features:
            raise ValueError(f"MaskedNet: x must be [B, {self.features}], got {tuple(x.shape)}")
        told = self._told(c, len(x))
        first, *rest, last = self.layers
        h = first(x, which) if told is None else first(x, which) + told
        for layer in rest:
            h = layer(self.activate(h), which)
        return last(self.activate(h), which).view(len(x), self.features, self.outputs)

    def activate(self, h: Tensor) -> Tensor:
        """What follows a hidden layer."""
        return self.dropout(F.silu(h))

    def sequential(
        self,
        value: Callable[[Tensor, int], Tensor],
        rows: int,
        c: Tensor | None = None,
        *,
        which: int = 0,
    ) -> Tensor:
        """Variables one after the other, each from what the network says of it: [B, D].

        A unit is computed once, when the last variable that it sees is known, so the whole costs no
        more than one forward pass.

        Args:
            value: (numbers [B, P], i) -> variable i, [B]. Called in the order of ranks.
            rows: B. c, which: as in forward().
        """
        told = self._told(c, rows)
        order = self.orders[which].to(self.layers[0].weight.device)
        *hidden, last = self.layers
        weights = [layer.weight for layer in hidden]
        weights[0] = weights[0][:, order]  # its inputs by rank
        of_variable = last.weight.unflatten(0, (self.features, self.outputs))
        biases = last.bias.view(self.features, self.outputs)
        # known[0]: the variables so far, by rank; known[i]: the units of layer i that see no more.
        known = [last.weight.new_zeros(rows, 0) for _ in self.layers]
        for rank, variable in enumerate(self.orders[which].tolist()):
            for i, (layer, weight) in enumerate(zip(hidden, weights, strict=True)):
                new = slice(known[i + 1].shape[1], sum(d <= rank for d in self.degrees[i]))
                h = F.linear(known[i], weight[new, : known[i].shape[1]], layer.bias[new])
                if i == 0 and told is not None:
                    h = h + told[:, new]
                known[i + 1] = torch.cat([known[i + 1], self.activate(h)], 1)
            weight = of_variable[variable, :, : known[-1].shape[1]]
            x = value(F.linear(known[-1], weight, biases[variable]), variable)
            known[0] = torch.cat([known[0], x[:, None]], 1)
        return known[0].index_select(1, order.argsort())

    def _told(self, c: Tensor | None, rows: int) -> Tensor | None:
        """What the condition adds to the first hidden layer."""
        wanted = None if self.context is None else (rows, self.context.in_features)
        if (None if c is None else tuple(c.shape)) != wanted:
            raise ValueError(
                f"MaskedNet: c must be {'None' if wanted is None else list(wanted)} for this "
                f"network, got {None if c is None else tuple(c.shape)}"
            )
        return None if c is None or self.context is None else self.context(c)
