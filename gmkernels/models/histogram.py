"""A histogram as a density: p_i = n_i / N in bin i, constant inside it.

    p(x) = (n_i + alpha) / (N + alpha B) / volume of a bin,  x in bin i of B;   0 outside
Bins are half open but for the last of each axis, which holds its upper edge. An empty bin has
density 0 where alpha = 0: log p = -inf there.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gmkernels import noise
from gmkernels.models.tabular import Density, choose, count

MOST = 1 << 26  # cells: 512 MiB of float64 while a fit counts


class Histogram(Density):
    """Equal bins of 1 to 3 features.

    Args:
        features: D, 1 to 3.
        bins: along each axis, or one number for all.
        alpha: points added to every bin.

    Raises ValueError: more than 2^26 bins in all, which would not fit in memory.

    >>> import torch
    >>> model = Histogram(1, 2).fit(torch.tensor([[0.0], [1.0], [3.0], [4.0], [4.0]]))
    >>> model.log_prob(torch.tensor([[0.5], [3.5], [9.0]])).exp()
    tensor([0.2000, 0.3000, 0.0000])
    """

    low: Tensor  # [D]
    high: Tensor  # [D]
    log_p: Tensor  # [bins of axis 0 * axis 1 * ...], log p_i

    def __init__(self, features: int, bins: int | Sequence[int], *, alpha: float = 0.0) -> None:
        super().__init__(features)
        if self.features > 3:
            raise ValueError(
                f"Histogram: features must be 1, 2 or 3, got {features}; bins grow as a power of "
                "it. Take a GaussianMixture"
            )
        given = (bins,) * features if isinstance(bins, int) else tuple(bins)
        if len(given) != features:
            raise ValueError(f"Histogram: bins must be one number or {features}, got {given}")
        self.bins = tuple(count("Histogram", "bins", b) for b in given)
        cells = math.prod(self.bins)
        if cells > MOST:
            raise ValueError(
                f"Histogram: {' x '.join(map(str, self.bins))} bins are {cells:,} cells, "
                f"{cells * 8 / 2**30:.1f} GiB to count in; at most {MOST:,} fit. Take fewer bins"
            )
        if not 0 <= alpha < math.inf:
            raise ValueError(f"Histogram: alpha must be a finite number >= 0, got {alpha}")
        self.alpha = alpha
        self.free_parameters = cells - 1
        self.register_buffer("low", torch.zeros(features))
        self.register_buffer("high", torch.ones(features))
        self.register_buffer("log_p", torch.zeros(cells))

    @torch.no_grad()
    def fit(self, x: Tensor, *, limits: Sequence[tuple[float, float]] | None = None) -> "Histogram":
        """Counts x [N, D]; returns the model.

        Args: limits: (low, high) of each axis; by default the least and the largest of x.
        Raises ValueError: a constant feature without limits; limits that do not hold all of x.
        """
        self.check_data(x)
        if limits is None:
            low, high = x.aminmax(dim=0)
        elif len(limits) != self.features:
            raise ValueError(
                f"Histogram.fit: limits must be {self.features} pairs, got {len(limits)}"
            )
        else:
            low, high = x.new_tensor(limits).T
        if not bool((low < high).all()):
            axis = int((low >= high).nonzero()[0])
            raise ValueError(
                f"Histogram.fit: feature {axis} must have low < high, got {float(low[axis]):g} "
                f"and {float(high[axis]):g}; give limits="
            )
        if not bool(((x >= low) & (x <= high)).all()):
            raise ValueError("Histogram.fit: limits must hold every x; widen them, or drop rows")
        self.low.copy_(low)
        self.high.copy_(high)
        counts = torch.bincount(self._cell(x)[0], minlength=len(self.log_p)).double() + self.alpha
        self.log_p.copy_((counts / counts.sum()).log())
        self.fitted.fill_(1)
        return self

    def _sizes(self) -> tuple[Tensor, Tensor]:
        """Bins of each axis and their widths, float64 [D]."""
        bins = torch.tensor(self.bins, dtype=torch.float64, device=self.low.device)
        return bins, (self.high.double() - self.low.double()) / bins

    def _cell(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The bin of each row, int64 [N], the nearest for those outside; and who is inside."""
        _, width = self._sizes()
        inside = ((x >= self.low) & (x <= self.high)).all(1)
        place = ((x.double() - self.low.double()) / width).nan_to_num().floor()
        cell = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for axis, size in enumerate(self.bins):
            cell = cell * size + place[:, axis].clamp(0, size - 1).long()
        return cell, inside

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), [N]: -inf outside and in empty bins."""
        self.check("log_prob", x)
        self.check_fitted("log_prob")
        cell, inside = self._cell(x)
        log_volume = self._sizes()[1].log().sum().to(x.dtype)
        log_p = (self.log_p[cell] - log_volume).masked_fill(~inside, -math.inf)
        return log_p.masked_fill(x.isnan().any(1), math.nan)

    def sample(self, n: int, *, seed: noise.Seed = None) -> Tensor:
        """n draws, [n, D]: a bin, then uniform inside; row i is a function of (seed, i)."""
        self.check_fitted("sample")
        key, device = self.key(seed), self.low.device
        cell = choose(self.log_p.double().exp(), n, key)
        index = torch.stack(torch.unravel_index(cell, self.bins), 1)
        u = noise.uniform(index.shape, seed=key, stream=1, dtype=torch.float64, device=device)
        _, width = self._sizes()
        low, dtype = self.low.double(), self.low.dtype
        x = (low + (index + (1 - u)) * width).to(dtype)
        # Rounding may reach the next bin, which may be empty.
        middle = (low + (index + 0.5) * width).to(dtype)
        return torch.where((self._cell(x)[0] == cell)[:, None], x, middle)
