"""p(x|z) as objects: what a decoder's output means. Used by every model that reconstructs."""

import math

import torch
from torch import Tensor, nn

from gmkernels import noise
from gmkernels.ops.likelihood import bernoulli_nll, categorical_nll, gaussian_nll


class Likelihood(nn.Module):
    """p(x|z), all elements of x independent given z. A subclass says what x and the output are.

    Attributes:
        takes: "unit", floats (images in [0, 1]), or "levels", integers.
    """

    takes = "unit"

    def features(self, x: Tensor) -> Tensor:
        """What the encoder sees of x, floating."""
        return x

    def nll(self, x: Tensor, output: Tensor) -> Tensor:
        """-log p(x|z), [B] nats."""
        raise NotImplementedError

    def mean(self, output: Tensor) -> Tensor:
        """E[x|z]."""
        raise NotImplementedError

    def sample(self, output: Tensor, key: Tensor) -> Tensor:
        """x ~ p(x|z) with the noise of the key."""
        raise NotImplementedError


class Bernoulli(Likelihood):
    """x in [0, 1], [B, *]; the decoder gives logits of x's shape."""

    def nll(self, x: Tensor, output: Tensor) -> Tensor:
        return bernoulli_nll(x, output)

    def mean(self, output: Tensor) -> Tensor:
        return output.sigmoid()

    def sample(self, output: Tensor, key: Tensor) -> Tensor:
        u = noise.uniform(output.shape, seed=key, device=output.device)
        return (u <= output.sigmoid()).to(output.dtype)


class _Normal(Likelihood):
    def split(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance from the decoder's output."""
        raise NotImplementedError

    def nll(self, x: Tensor, output: Tensor) -> Tensor:
        mean, logvar = self.split(output)
        return gaussian_nll(x, mean, logvar)

    def mean(self, output: Tensor) -> Tensor:
        return self.split(output)[0]

    def sample(self, output: Tensor, key: Tensor) -> Tensor:
        mean, logvar = self.split(output)
        return mean + (logvar / 2).exp() * noise.normal(mean.shape, seed=key, device=mean.device)


class Gaussian(_Normal):
    """x real, [B, *]; the decoder gives the mean. One variance for all of x, fixed or learned."""

    def __init__(self, std: float = 1.0, *, learned: bool = False) -> None:
        super().__init__()
        if not std > 0:
            raise ValueError(f"Gaussian: std must be > 0, got {std}")
        logvar = torch.tensor(2 * math.log(std))
        self.logvar: Tensor
        if learned:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar)

    def split(self, output: Tensor) -> tuple[Tensor, Tensor]:
        return output, self.logvar


class HeteroscedasticGaussian(_Normal):
    """x real, [B, C, *]; the decoder gives [B, 2 C, *]: mean, then log-variance, of each x."""

    def split(self, output: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = output.chunk(2, 1)
        return mean, logvar


class Categorical(Likelihood):
    """x integers in [0, levels), [B, *]; the decoder gives logits [B, *, levels]."""

    takes = "levels"

    def __init__(self, levels: int) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"Categorical: levels must be >= 2, got {levels}")
        self.levels = levels

    def features(self, x: Tensor) -> Tensor:
        return x.to(torch.float32) * (2 / (self.levels - 1)) - 1

    def nll(self, x: Tensor, output: Tensor) -> Tensor:
        return categorical_nll(x, output)

    def mean(self, output: Tensor) -> Tensor:
        level = torch.arange(self.levels, dtype=output.dtype, device=output.device)
        return output.softmax(-1) @ level

    def sample(self, output: Tensor, key: Tensor) -> Tensor:
        u = noise.uniform(output.shape[:-1], seed=key, device=output.device)
        below = output.softmax(-1).cumsum(-1) < u[..., None]
        return below.sum(-1).clamp(max=self.levels - 1)
