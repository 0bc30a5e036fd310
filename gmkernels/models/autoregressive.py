"""Autoregressive models of few variables, exact in their density: MADE and NADE.

    p_o(x) = prod_r p(x_o(r) | x_o(0), ..., x_o(r-1))      an order o of the variables
    p(x) = 1/M sum_o p_o(x)                                M orders, one set of weights
MADE: one masked network gives all conditionals in a pass       Germain et al. 2015, 1502.03509
NADE: h_r = silu(c + sum_s<r W_o(s) x_o(s)), the conditional of x_o(r) from V_o(r) h_r; the sums go
      on from one variable to the next, O(D H)     Larochelle and Murray 2011; Uria et al. 2014
Each order's p_o is a density, so their average is one. An average of logits is not: its product of
conditionals belongs to no order. In nats, one per row.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmkernels import noise
from gmkernels.models.masked import MaskedNet, check_orders
from gmkernels.ops.likelihood import categorical_nll

Orders = Sequence[int] | Sequence[Sequence[int]] | None


class _Levels(nn.Module):
    """What R numbers say of a variable's L levels: logits y E + b_i; of 2 levels 0 and y.

    All variables share E, so that a variable adds R (H + 1) + L numbers in place of (H + 1) L.
    """

    def __init__(self, features: int, levels: int, rank: int) -> None:
        super().__init__()
        self.binary = levels == 2
        self.numbers = 1 if self.binary else rank
        if not self.binary:
            self.embedding = nn.Parameter(torch.randn(rank, levels) * 0.3)
            self.bias = nn.Parameter(torch.zeros(features, levels))

    def forward(self, y: Tensor, variable: int | slice = slice(None)) -> Tensor:
        """Logits [*, L] of numbers y [*, R] of a variable, or [B, D, L] of all, [B, D, R]."""
        if self.binary:
            return F.pad(y, (1, 0))
        return y @ self.embedding + self.bias[variable]


class _Ordered(nn.Module):
    """Levels x int64 [B, D] in [0, L), one after the other in each of M orders.

    A subclass has numbers() and sequential(), and sets `levels_of`. Networks see levels in [-1, 1].
    """

    log_prob_kind = "exact"
    takes = "levels"
    numbers: Callable[[Tensor, int], Tensor]  # (x [B, D] in [-1, 1], which) -> [B, D, R]
    sequential: Callable[..., Tensor]  # (value, rows, which) -> [B, D], as MaskedNet.sequential()

    def __init__(self, features: int, levels: int, rank: int, order: Orders) -> None:
        super().__init__()
        name = type(self).__name__
        if features < 1 or levels < 2 or rank < 1:
            raise ValueError(
                f"{name}: features and rank must be >= 1, levels >= 2, got {features}, {rank} and "
                f"{levels}"
            )
        self.features, self.levels = features, levels
        self.orders = check_orders(name, features, order)
        self.levels_of = _Levels(features, levels, rank)

    def order_nll(self, x: Tensor, which: int) -> Tensor:
        """-log p_o(x) in one of the orders, [B] nats."""
        if x.dim() != 2 or x.shape[1] != self.features:
            name = type(self).__name__
            raise ValueError(f"{name}: x must be [B, {self.features}], got {tuple(x.shape)}")
        return categorical_nll(x, self.levels_of(self.numbers(self._scaled(x), which)))

    def loss(self, x: Tensor, *, seed: noise.Seed = None) -> Tensor:
        """What training minimises, a scalar: the mean of -log p_o(x), in an order drawn for all x.

        Its mean over orders is an upper bound of the mean of -log p(x).
        """
        which = 0
        if len(self.orders) > 1:
            key = noise.resolve_key("loss", seed, 0, None, torch.device("cpu"))
            which = int(_choice(noise.uniform((1, 1), seed=key, device="cpu"), len(self.orders)))
        return self.order_nll(x, which).mean()

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), [B] nats, exact: the log of the mean of p_o(x); M passes."""
        nll = torch.stack([self.order_nll(x, which) for which in range(len(self.orders))])
        return (-nll).logsumexp(0) - math.log(len(self.orders))

    @torch.no_grad()
    def sample(self, n: int, *, seed: noise.Seed = None) -> Tensor:
        """n draws, int64 [n, D], each in an order of its own; D steps, which cost one pass in all.

        A row is a function of the seed, an int, a key or None, and its place.
        """
        device = next(self.parameters()).device
        key = noise.resolve_key("sample", seed, 0, None, device)
        u = noise.uniform((n, 1 + self.features), seed=key, device=device)
        orders, x = _choice(u[:, 0], len(self.orders)), u.new_zeros(u[:, 1:].shape).long()
        for which in orders.unique().tolist():
            rows = (orders == which).nonzero()[:, 0]
            x[rows] = self._drawn(u[rows, 1:], which)
        return x

    def _drawn(self, u: Tensor, which: int) -> Tensor:
        def value(y: Tensor, i: int) -> Tensor:
            below = self.levels_of(y, i).softmax(-1).cumsum(-1) < u[:, i, None]
            return self._scaled(below.sum(-1).clamp(max=self.levels - 1))

        x = self.sequential(value, len(u), which=which)
        return ((x + 1) * ((self.levels - 1) / 2)).round().long()

    def _scaled(self, x: Tensor) -> Tensor:
        return x.to(next(self.parameters()).dtype) * (2 / (self.levels - 1)) - 1


def _choice(u: Tensor, n: int) -> Tensor:
    """Integers in [0, n) of u uniform in (0, 1]."""
    return (u * n).ceil().long() - 1


class MADE(_Ordered):
    """A masked autoencoder for distribution estimation.

    Args:
        features: D. levels: L; 2 is Bernoulli. hidden: widths of the layers. dropout: of them.
        order: one order of the variables [D], or M of them; None: as they stand.
        rank: R, numbers that the network says of a variable of more than two levels.
    Raises:
        ValueError: sizes too small, an order that is no permutation.

    >>> import torch
    >>> from gmkernels.models.autoregressive import MADE
    >>> model = MADE(2, 3, (8,), order=[(0, 1), (1, 0)])
    >>> every = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    >>> round(model.log_prob(every).exp().sum().item(), 4)
    1.0
    """

    def __init__(
        self,
        features: int,
        levels: int = 2,
        hidden: Sequence[int] = (512,),
        *,
        order: Orders = None,
        rank: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(features, levels, rank, order)
        outputs = self.levels_of.numbers
        self.net = MaskedNet(features, outputs, hidden, order=order, dropout=dropout)

    def numbers(self, x: Tensor, which: int) -> Tensor:
        """All variables' numbers in one pass, [B, D, R]."""
        return self.net(x, which=which)

    def sequential(self, value: Callable[[Tensor, int], Tensor], rows: int, which: int) -> Tensor:
        """As MaskedNet.sequential()."""
        return self.net.sequential(value, rows, which=which)


class NADE(_Ordered):
    """A neural autoregressive distribution estimator: one layer of hidden units that all share.

    Args:
        hidden: H. dropout: of the hidden units, the same for all variables of a row.
        features, levels, order, rank: as in MADE.
    Raises:
        ValueError: as in MADE.
    """

    def __init__(
        self,
        features: int,
        levels: int = 2,
        hidden: int = 128,
        *,
        order: Orders = None,
        rank: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(features, levels, rank, order)
        if hidden < 1:
            raise ValueError(f"NADE: hidden must be >= 1, got {hidden}")
        self.read = nn.Parameter(torch.randn(features, hidden) * 0.05)  # W
        self.start = nn.Parameter(torch.zeros(hidden))  # c
        self.write = nn.Parameter(torch.zeros(features, self.levels_of.numbers, hidden))  # V
        self.write_bias = nn.Parameter(torch.zeros(features, self.levels_of.numbers))
        self.dropout = nn.Dropout(dropout)

    def numbers(self, x: Tensor, which: int) -> Tensor:
        """All variables' numbers, [B, D, R]: the sums of all ranks by one cumulative sum."""
        order = self.orders[which].to(x.device)
        told = (x[:, :, None] * self.read)[:, order]  # [B, D, H] by rank
        before = F.pad(told[:, :-1].cumsum(1), (0, 0, 1, 0))
        kept = self.dropout(x.new_ones(len(x), 1, self.start.shape[0]))
        h = (F.silu(self.start + before) * kept)[:, order.argsort()]
        return torch.einsum("bdh,drh->bdr", h, self.write) + self.write_bias

    def sequential(self, value: Callable[[Tensor, int], Tensor], rows: int, which: int) -> Tensor:
        """As MaskedNet.sequential(); a variable adds to the sums of those before it."""
        sums = self.start.expand(rows, -1)
        x = sums.new_zeros(rows, self.features)
        for i in self.orders[which].tolist():
            x[:, i] = value(F.silu(sums) @ self.write[i].mT + self.write_bias[i], i)
            sums = sums + x[:, i, None] * self.read[i]
        return x
