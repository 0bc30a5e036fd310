"""Image GPT: a picture as a sequence of colours of a short palette, one token after the other.

    p(x) = p(k_1, ..., k_D) prod_d p(x_d | k_d),    k_d the colour of pixel d, in reading order
p(k) is a model of tokens, a GPT (Chen et al. 2020, "Generative pretraining from pixels") or an RNN,
that begins with a mark: "a picture", or its class. The palette is k-means of the grey levels of the
first batch; p(x_d | k_d) is how often each level of that colour occurs there, each counted once
more. Where there are as many colours as levels, both are trivial. So log p(x) is exact, in nats, of
the picture as it is stored.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmkernels import noise
from gmkernels.models.gpt import GPT
from gmkernels.models.recurrent import RNN
from gmkernels.ops.token_sampling import next_token


def palette(levels: Tensor, total: int, colours: int, *, rounds: int = 50) -> Tensor:
    """The colour of each level: k-means in one dimension, from centres that lie evenly.

    Args:
        levels: integers in [0, total), of any shape. colours: K. rounds: of Lloyd's algorithm.
    Returns:
        int64 [total], in [0, K), rising with the level. Every level counts once more than it is
        there, so each colour is that of a level or more.

    >>> import torch
    >>> palette(torch.tensor([0, 0, 1, 8, 9, 9]), 10, 2)
    tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    """
    level = torch.arange(total, dtype=torch.float64)
    count = torch.bincount(levels.flatten().cpu(), minlength=total).double() + 1
    centres = (torch.arange(colours, dtype=torch.float64) + 0.5) * total / colours - 0.5
    for _ in range(rounds):
        colour = (level[:, None] - centres).abs().argmin(1)
        mass = torch.zeros(colours, dtype=torch.float64).index_add(0, colour, count)
        sums = torch.zeros(colours, dtype=torch.float64).index_add(0, colour, count * level)
        centres = sums / mass
    return (level[:, None] - centres).abs().argmin(1)


class TokenImages(nn.Module):
    """Flat pictures of grey levels, int64 [B, D] in [0, L), by any model of tokens.

    Args:
        model: of tokens, with vocab = colours and marks = max(1, classes): a GPT whose context is
            D or more, or an RNN.
        pixels: D. levels: L. colours: of the palette, at most L; the first training batch sets it.
        classes: K, of labels in [0, K). 0: none.
    Raises:
        ValueError: sizes other than said here.

    Everywhere: label int64 [B] or None; seed an int, a key or None.
    """

    log_prob_kind = "exact"
    takes = "levels"
    colour: Tensor
    within: Tensor

    def __init__(
        self, model: GPT | RNN, pixels: int, levels: int, colours: int, *, classes: int = 0
    ) -> None:
        super().__init__()
        if not 1 < colours <= levels or pixels < 1 or classes < 0:
            raise ValueError(
                "TokenImages: colours must lie in [2, levels], pixels >= 1, classes >= 0, got "
                f"{colours} of {levels}, {pixels} and {classes}"
            )
        self.model, self.pixels, self.classes, self.colours = model, pixels, classes, colours
        self.initialised = False
        self.register_buffer("colour", torch.empty(levels, dtype=torch.int64))  # [L]
        self.register_buffer("within", torch.empty(levels))  # log p(level | colour), [L]
        self._set_palette(torch.arange(levels))

    def log_prob(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """log p(x|label), [B] nats: of a model of classes without label, its mean over classes.

        x: all D pixels, else a ValueError.
        """
        if x.dim() != 2 or x.shape[1] != self.pixels:
            raise ValueError(f"TokenImages: x must be [B, {self.pixels}], got {tuple(x.shape)}")
        if label is not None or not self.classes:
            return self.model.log_prob(self._tokens(x, label)) + self.within[x].sum(1)
        log_p = self._of_class(x).logsumexp(1) - math.log(self.classes)
        return log_p + self.within[x].sum(1)

    def loss(self, x: Tensor, label: Tensor | None = None, *, seed: noise.Seed = None) -> Tensor:
        """What training minimises, a scalar: the mean of -log p(x|label).

        Only dropout is random, by torch's generator; seed is taken as all models take it.
        """
        if self.training and not self.initialised:
            self._set_palette(x)
            self.initialised = True
        return -self.log_prob(x, label).mean()

    def sample(
        self, n: int, label: int | None = None, *, seed: noise.Seed = None, **options: Any
    ) -> Tensor:
        """n pictures, int64 [n, D]; of one class, or each of a class drawn evenly.

        options: temperature, top_k and top_p of next_token().
        """
        nothing = torch.empty(n, 0, dtype=torch.int64, device=self.colour.device)
        return self.complete(nothing, label, seed=seed, **options)

    @torch.no_grad()
    def complete(
        self, known: Tensor, label: int | None = None, *, seed: noise.Seed = None, **options: Any
    ) -> Tensor:
        """Pictures [B, D] that begin with known pixels [B, K], K < D: the rest is drawn given them.

        Without label, the class of each is drawn from p(class|known). options: as in sample().
        Raises ValueError where all pixels are known.
        """
        if known.dim() != 2 or known.shape[1] >= self.pixels:
            raise ValueError(
                f"complete: known must be [B, K] with K < {self.pixels}, got {tuple(known.shape)}"
            )
        n, given = known.shape
        device = self.colour.device
        key = noise.resolve_key("sample", seed, 0, None, device)
        labels = None if label is None else torch.full((n,), label, device=device)
        if self.classes and labels is None:
            labels = next_token(self._of_class(known), seed=noise.fold_in(key, 1))
        drawn = self.model.generate(
            self._tokens(known, labels), self.pixels - given, seed=noise.fold_in(key, 2), **options
        )
        u = noise.uniform(drawn.shape, seed=key, dtype=torch.float64, device=device)
        return torch.cat([known, self._levels(drawn, u)], 1)

    def _of_class(self, known: Tensor) -> Tensor:
        """log p(known | class), [B, classes]."""
        if not known.shape[1]:
            return self.within.new_zeros(len(known), self.classes)
        every = (known.new_full((len(known),), k) for k in range(self.classes))
        return torch.stack([self.model.log_prob(self._tokens(known, k)) for k in every], 1)

    def _tokens(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """The mark and the colours of the first K pixels, [B, 1 + K]."""
        if (labels is None) != (not self.classes):
            raise ValueError(
                f"TokenImages: label must be {'given' if self.classes else 'None'}: this model has "
                f"{self.classes} classes"
            )
        mark = x.new_zeros(len(x)) if labels is None else labels
        return torch.cat([mark[:, None] + self.colours, self.colour[x]], 1)

    def _levels(self, drawn: Tensor, u: Tensor) -> Tensor:
        """Levels of colours [B, K], by u uniform in (0, 1]: the inverse of a distribution function.

        F = k + P(level <= l | k) at the level l of colour k rises over all levels.
        """
        mass = self.within.double().exp().cumsum(0)
        last = torch.arange(self.colours, device=mass.device)
        end = mass[torch.searchsorted(self.colour, last, right=True) - 1]  # [colours]
        begin = F.pad(end, (1, -1))
        function = self.colour + (mass - begin[self.colour]) / (end - begin)[self.colour]
        return torch.searchsorted(function, drawn + u)

    def _set_palette(self, x: Tensor) -> None:
        total = len(self.colour)
        colour = palette(x, total, self.colours)
        count = torch.bincount(x.flatten().cpu(), minlength=total).double() + 1
        mass = torch.zeros(self.colours, dtype=torch.float64).index_add(0, colour, count)
        self.colour.copy_(colour)
        self.within.copy_((count / mass[colour]).log())

    # A flag on the device would be waited for at each step.
    def get_extra_state(self) -> Tensor:
        """Whether the palette is set, as a state dict holds it."""
        return torch.tensor(self.initialised)

    def set_extra_state(self, state: Tensor) -> None:
        """Reads the flag."""
        self.initialised = bool(state)
