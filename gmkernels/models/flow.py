"""Normalizing flows: an exact density by an invertible map (Dinh et al. 2017, 1605.08803).

    x = f(z), z ~ p_z;    log p(x) = log p_z(f^-1(x)) + log|det d f^-1 / dx|
f^-1, data to noise, is a chain of transforms (models/transforms.py, models/couplings.py): their
log-determinants add. In nats, one per row.

Memory. Autograd keeps the activations of every layer. A chain with reconstruct=True keeps its final
output alone: backward inverts layer by layer and makes each layer's activations again (Gomez et al.
2017, 1707.04585), for about an inverse and a forward more a layer.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gmkernels import noise
from gmkernels.models.transforms import Transform
from gmkernels.ops.likelihood import gaussian_nll


class _Reconstruct(torch.autograd.Function):
    """A chain that keeps its output in place of its layers' inputs."""

    @staticmethod
    def forward(
        ctx: Any, chain: "Chain", x: Tensor, c: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        z, log_det = chain.run(x, c)
        ctx.chain = chain
        # Parameters are saved so that autograd notices one that has changed.
        ctx.save_for_backward(z, c, *parameters)
        return z, log_det

    @staticmethod
    def backward(ctx: Any, dz: Tensor, dlog_det: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Chain: reconstruct=True has first derivatives only, and create_graph=True asks for"
                " more; set reconstruct=False"
            )
        z, c, *_ = ctx.saved_tensors
        z, c = z.detach(), None if c is None else c.detach().requires_grad_(ctx.needs_input_grad[2])
        grads: dict[int, Tensor] = {}
        for i, layer in reversed(list(enumerate(ctx.chain.transforms))):
            x = layer.inverse(z, c)[0].detach()
            own = [p for p in layer.parameters() if p.requires_grad]
            with torch.enable_grad():
                x.requires_grad_(i > 0 or ctx.needs_input_grad[1])
                again, log_det = layer(x, c)
            sources = [t for t in (x, c, *own) if t is not None and t.requires_grad]
            results = [(y, dy) for y, dy in ((again, dz), (log_det, dlog_det)) if y.requires_grad]
            if not results:  # the first layer of a chain on data, without parameters
                continue
            outputs, given = zip(*results, strict=True)
            found = torch.autograd.grad(outputs, sources, given, materialize_grads=True)
            gradient = {id(s): g for s, g in zip(sources, found, strict=True)}
            dz, z = gradient.pop(id(x), dz), x.detach()
            for source, value in gradient.items():
                grads[source] = grads[source] + value if source in grads else value
        dx = dz if ctx.needs_input_grad[1] else None
        return None, dx, grads.get(id(c)), *(grads.get(id(p)) for p in ctx.chain.trained())


class Chain(Transform):
    """Transforms one after the other, the first next to the data.

    Args:
        transforms: one or more.
        reconstruct: keep the output alone for backward; see the module. Gradients then differ by
            the rounding of the inverse, and have no derivatives of their own. The layers must give
            the same result twice: no dropout, no batch norm.
    Raises:
        ValueError: no transforms, or reconstruct=True with layers that it cannot make again.
    """

    transforms: Any  # an nn.ModuleList of Transform

    def __init__(self, transforms: Iterable[Transform], *, reconstruct: bool = False) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(transforms)
        self.reconstruct = reconstruct
        if not self.transforms:
            raise ValueError("Chain: there must be at least one transform")
        changing = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
        for name, module in self.named_modules():
            unsteady = isinstance(module, changing) and getattr(module, "p", 1) > 0
            if reconstruct and unsteady:
                raise ValueError(
                    "Chain: reconstruct=True needs layers that give the same result twice, got "
                    f"{type(module).__name__} at {name}; leave it out, or set reconstruct=False"
                )

    def trained(self) -> list[nn.Parameter]:
        """The parameters that want a gradient."""
        return [p for p in self.parameters() if p.requires_grad]

    def run(self, x: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """The chain as autograd sees it."""
        total = x.new_zeros(len(x))
        for transform in self.transforms:
            x, log_det = transform(x, c)
            total = total + log_det
        return x, total

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.reconstruct and torch.is_grad_enabled():
            return _Reconstruct.apply(self, x, c, *self.trained())
        return self.run(x, c)

    def inverse(self, z: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(len(z))
        for transform in reversed(self.transforms):
            z, log_det = transform.inverse(z, c)
            total = total + log_det
        return z, total


class Multiscale(Transform):
    """Levels that each leave half of their channels as they are for what follows (Dinh et al.).

    x [B, C, H, W] -> z flat, [B, C H W]: what the first level factored out comes first.

    Args:
        levels: (transform, the shape (C, H, W) that it gives), the first next to the data. All but
            the last give an even C, and the next takes the second half of its channels.
    """

    levels: Any  # an nn.ModuleList of Transform

    def __init__(self, levels: Sequence[tuple[Transform, tuple[int, int, int]]]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(transform for transform, _ in levels)
        self.shapes = [shape for _, shape in levels]
        odd = [shape for shape in self.shapes[:-1] if shape[0] % 2]
        if not levels or odd:
            raise ValueError(f"Multiscale: all levels but the last must give an even C, got {odd}")
        self.sizes = [math.prod(shape) // 2 for shape in self.shapes[:-1]]
        self.sizes.append(math.prod(self.shapes[-1]))

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total, done = x.new_zeros(len(x)), []
        for i, level in enumerate(self.levels):
            x, log_det = level(x, c)
            total = total + log_det
            if i + 1 < len(self.levels):
                out, x = x.chunk(2, 1)
                done.append(out.flatten(1))
        return torch.cat([*done, x.flatten(1)], 1), total

    def inverse(self, z: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total, (*done, last) = z.new_zeros(len(z)), z.split(self.sizes, 1)
        x = last.view(-1, *self.shapes[-1])
        for i, level in reversed(list(enumerate(self.levels))):
            if i + 1 < len(self.levels):
                channels, height, width = self.shapes[i]
                x = torch.cat([done[i].view(-1, channels // 2, height, width), x], 1)
            x, log_det = level.inverse(x, c)
            total = total + log_det
        return x, total


class Normal(nn.Module):
    """N(0, I) of rows of a shape: the base of a flow."""

    origin: Tensor

    def __init__(self, shape: int | tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("origin", torch.zeros(shape), persistent=False)

    def log_prob(self, z: Tensor) -> Tensor:
        """log density of z [B, *shape], [B] nats."""
        return -gaussian_nll(z, self.origin.expand_as(z))

    def sample(self, n: int, *, seed: noise.Seed = None) -> Tensor:
        """n draws, [n, *shape]; each a function of the seed and its row."""
        zero = self.origin
        return noise.normal((n, *zero.shape), seed=seed, dtype=zero.dtype, device=zero.device)


class Flow(nn.Module):
    """A density by transforms of a base density.

    Args:
        transforms: the first next to the data, the last next to the noise.
        base: with log_prob(z) -> [B] and sample(n, seed=); a Normal, as a rule.
        reconstruct: as in Chain.

    Everywhere: x [B, *] as the first transform takes it; c float [B, K] or None.

    >>> import torch
    >>> from gmkernels.models import couplings, flow, masked
    >>> f = flow.Flow([couplings.MaskedAffine(masked.MaskedNet(2, 2))], flow.Normal(2))
    >>> f.log_prob(torch.zeros(3, 2)).shape, f.sample(5, seed=0).shape
    (torch.Size([3]), torch.Size([5, 2]))
    """

    log_prob_kind = "exact"
    base: Any

    def __init__(
        self, transforms: Iterable[Transform], base: nn.Module, *, reconstruct: bool = False
    ) -> None:
        super().__init__()
        self.transform, self.base = Chain(transforms, reconstruct=reconstruct), base

    def log_prob(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """log p(x|c), [B] nats."""
        z, log_det = self.transform(x, c)
        return self.base.log_prob(z) + log_det

    def loss(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """What training minimises, a scalar: the mean of -log p(x|c)."""
        return -self.log_prob(x, c).mean()

    def sample(self, n: int, c: Tensor | None = None, *, seed: noise.Seed = None) -> Tensor:
        """n draws of p(x|c), with c [n, K] or one row [1, K] for all.

        seed: an int, a key or None, which draws one from torch's default generator.
        """
        c = None if c is None else c.expand(n, -1)
        return self.transform.inverse(self.base.sample(n, seed=seed), c)[0]
