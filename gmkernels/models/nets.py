"""Small denoising networks net(x, t, label=, context=, concat=): a U-Net, a transformer, an MLP.

Each is a function of a noisy x and its time t, 0 at first, conditioned in up to three ways:
    label     an embedding added to the time's; -1 is "no class"   Ho and Salimans 2022, 2207.12598
    context   a sequence, by cross-attention                       Rombach et al. 2022, 2112.10752
    concat    further channels beside x's; 0 is "no condition"     Brooks et al. 2022, 2211.09800
The time's embedding is an MLP on cos and sin of time_scale t at 64 frequencies from 1 to 1e-4 (Ho
et al. 2020, 2006.11239). Keywords `options` of all: out_channels=None (C_out if not C), classes=0,
context_width=0 (E), concat_channels=0 (C2), time_scale=1.0 (1000.0 where t is in [0, 1]).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmkernels.ops.attention import full_attention


class _Net(nn.Module):
    """The call, its checks and the embeddings; shape is that of x's rows, None for any size."""

    predict: Any  # (x [B, C + C2, *], e [B, D], c [B, 1 + T, E], mask) -> [B, C_out, *]

    def __init__(
        self,
        shape: tuple[int | None, ...],
        width: int,
        *,
        out_channels: int | None = None,
        classes: int = 0,
        context_width: int = 0,
        concat_channels: int = 0,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.name, self.shape, self.time_scale = type(self).__name__, shape, time_scale
        self.classes, self.context_width = classes, context_width
        self.concat_channels, channels = concat_channels, shape[0] or 0
        self.inputs, self.outputs = channels + concat_channels, out_channels or channels
        self.time = nn.Sequential(nn.Linear(128, width), nn.SiLU(), nn.Linear(width, width))
        if classes:
            self.label = nn.Embedding(classes + 1, width)  # row 0 is "no class"
            nn.init.normal_(self.label.weight, std=0.02)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        label: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        concat: Tensor | None = None,
    ) -> Tensor:
        """The network's prediction, [B, C_out, H, W] or [B, C_out], 0 in a new network.

        Args:
            x, t: [B, C, H, W], or [B, F] for an MLP; real [B].
            label: int64 [B] in [-1, classes); None is -1. Values are not checked, to spare a sync.
            context, context_mask: [B, T, E]; bool [B, T], True where a token is seen, None for all.
                A token of zeros for "no context" stands beside them, alone if there are none.
            concat: [B, C2, H, W], or [B, C2] for an MLP; None is 0.
        Raises:
            ValueError: a shape or a condition that the network was not made for.
        """
        self._expect("x", x, None, *self.shape)
        rows, beside = len(x), (len(x), self.concat_channels, *x.shape[2:])
        self._expect("t", t, rows)
        self._expect("label", label, rows, option="classes")
        self._expect("context", context, rows, None, self.context_width, option="context_width")
        c = x.new_zeros(rows, 0, self.context_width) if context is None else context
        self._expect("context_mask", context_mask, *c.shape[:2], option="context_width")
        self._expect("concat", concat, *beside, option="concat_channels")
        angle = self.time_scale * t.float()[:, None] * torch.logspace(0, -4, 64, device=t.device)
        e = self.time(torch.cat([angle.cos(), angle.sin()], 1).to(x.dtype))
        if self.classes:
            e = e + (self.label.weight[0] if label is None else self.label(label + 1))
        c, mask = F.pad(c, (0, 0, 1, 0)), context_mask
        if mask is not None:
            mask = F.pad(mask, (1, 0), value=True)  # [B, 1 + T]
        x = torch.cat([x, x.new_zeros(beside) if concat is None else concat], 1)
        return self.predict(x, F.silu(e), c, mask)

    def _expect(self, name: str, x: Tensor | None, *shape: int | None, option: str = "") -> None:
        if x is None:
            return
        if getattr(self, option, True) == 0:
            raise ValueError(f"{self.name}: {name} needs a network made with {option} > 0")
        sizes = [n if size is None else size for n, size in zip(x.shape, shape, strict=False)]
        if x.dim() != len(shape) or list(x.shape) != sizes:
            wanted = ", ".join("*" if size is None else str(size) for size in shape)
            raise ValueError(f"{self.name}: {name} must be [{wanted}], got {tuple(x.shape)}")


def _zero(layer: nn.Module) -> nn.Module:
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class _Transformer(nn.Module):
    """adaLN-Zero: x + gate f(norm(x) (1 + scale) + shift) with f attention, then f an MLP."""

    def __init__(self, width: int, heads: int, d: int, context_width: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads must divide the transformer's width {width}, got {heads}")
        self.heads, self.norm = heads, nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = _zero(nn.Linear(d, 6 * width))
        if context_width:
            self.query, self.cross = nn.Linear(width, width), _zero(nn.Linear(width, width))
            self.key_value = nn.Linear(context_width, 2 * width)

    def forward(self, x: Tensor, e: Tensor, c: Tensor, mask: Tensor | None) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(e)[:, None].chunk(6, 2)
        q, k, v = self.qkv(self.norm(x) * (1 + scale) + shift).chunk(3, 2)  # [B, N, D]
        x = x + gate * self.out(self.attend(q, k, v))
        if c.shape[2] > 0:
            q, (k, v) = self.query(self.norm(x)), self.key_value(c).chunk(2, 2)
            x = x + self.cross(self.attend(q, k, v, mask))
        h = self.up(self.norm(x) * (1 + scale2) + shift2)
        return x + gate2 * self.down(F.gelu(h, approximate="tanh"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        return full_attention(q, k, v, key_mask=mask).transpose(1, 2).flatten(2)


class _Residual(nn.Module):
    """skip(h) + conv(silu(norm(conv(silu(norm(h)))) (1 + scale) + shift)), the last conv 0."""

    def __init__(self, inputs: int, width: int, d: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(math.gcd(8, n), n) for n in (inputs, width))
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1)
        self.conv2 = _zero(nn.Conv2d(width, width, 3, 1, 1))
        self.modulation, same = nn.Linear(d, 2 * width), (inputs, stride) == (width, 1)
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, width, 1, stride)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        shift, scale = self.modulation(e)[:, :, None, None].chunk(2, 1)
        y = self.norm2(self.conv1(F.silu(self.norm1(h)))) * (1 + scale) + shift  # [B, C, H, W]
        return self.skip(h) + self.conv2(F.silu(y))


class UNet(_Net):
    """A U-Net for any H and W, of residual blocks and a transformer block where H and W are least
    (Ronneberger et al. 2015, 1505.04597; Dhariwal and Nichol 2021, 2105.05233).

    Args:
        channels: C. width, multipliers: level i has width * multipliers[i] channels, and 1 / 2^i
            of H and W, rounded up. blocks: a level, on each side. options: see the module.
        heads: of the attention; must divide the last level's channels, else ValueError.
    """

    def __init__(
        self,
        channels: int,
        *,
        width: int = 32,
        multipliers: tuple[int, ...] = (1, 2),
        blocks: int = 1,
        heads: int = 4,
        **options: Any,
    ) -> None:
        super().__init__((channels, None, None), 4 * width, **options)
        w = width * multipliers[0]
        self.stem, self.norm = nn.Conv2d(self.inputs, w, 3, 1, 1), nn.GroupNorm(math.gcd(8, w), w)
        self.out = _zero(nn.Conv2d(w, self.outputs, 3, 1, 1))
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i in range(blocks * len(multipliers)):
            w, inputs = width * multipliers[i // blocks], w
            self.down.append(_Residual(inputs, w, 4 * width, 1 if i == 0 or i % blocks else 2))
            self.up.insert(0, _Residual(w + inputs, inputs, 4 * width))
        self.middle = _Transformer(w, heads, 4 * width, self.context_width)

    def predict(self, x: Tensor, e: Tensor, c: Tensor, mask: Tensor | None) -> Tensor:
        h, skips = self.stem(x), []
        for block in self.down:
            skips.append(h)
            h = block(h, e)
        h = self.middle(h.flatten(2).mT, e, c, mask).mT.reshape(h.shape)
        for block in self.up:
            h = block(torch.cat([F.interpolate(h, skips[-1].shape[2:]), skips.pop()], 1), e)
        return self.out(F.silu(self.norm(h)))


class DiT(_Net):
    """A transformer over patches, adaLN-Zero and learned positions, for one H and W (Peebles and
    Xie 2022, 2212.09748), with the cross-attention of Chen et al. 2023, 2310.00426.

    Args:
        channels, size: C; H and W, or one number. width, depth, heads: of the transformer.
        patch, heads: must divide H and W, and width, else ValueError. options: see the module.
    """

    def __init__(
        self,
        channels: int,
        size: int | tuple[int, int],
        *,
        patch: int = 2,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        **options: Any,
    ) -> None:
        shape = (channels, size, size) if isinstance(size, int) else (channels, *size)
        super().__init__(shape, width, **options)
        if patch < 1 or any(n % patch for n in shape[1:]):
            raise ValueError(f"DiT: patch must divide the size {shape[1:]}, got {patch}")
        self.patch, self.grid = patch, [n // patch for n in shape[1:]]
        self.stem = nn.Linear(self.inputs * patch**2, width)
        self.position = nn.Parameter(0.02 * torch.randn(math.prod(self.grid), width))
        blocks = (_Transformer(width, heads, width, self.context_width) for _ in range(depth))
        self.blocks, self.modulation = nn.ModuleList(blocks), _zero(nn.Linear(width, 2 * width))
        self.out = _zero(nn.Linear(width, self.outputs * patch**2))

    def predict(self, x: Tensor, e: Tensor, c: Tensor, mask: Tensor | None) -> Tensor:
        h = self.stem(F.pixel_unshuffle(x, self.patch).flatten(2).mT) + self.position  # [B, N, D]
        for block in self.blocks:
            h = block(h, e, c, mask)
        shift, scale = self.modulation(e)[:, None].chunk(2, 2)
        y = self.out(F.layer_norm(h, h.shape[2:]) * (1 + scale) + shift)
        return F.pixel_shuffle(y.mT.unflatten(2, self.grid), self.patch)


class MLP(_Net):
    """Layers h + silu((W h + b) (1 + scale) + shift) for data [B, F]; no context.

    Args:
        features: F. width, depth: of the hidden layers. options: see the module.
    """

    def __init__(self, features: int, width: int = 128, depth: int = 3, **options: Any) -> None:
        super().__init__((features,), width, **options)
        if self.context_width:
            raise ValueError("MLP: context_width must be 0; take label or concat")
        self.stem, self.out = nn.Linear(self.inputs, width), _zero(nn.Linear(width, self.outputs))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * depth * width)

    def predict(self, x: Tensor, e: Tensor, c: Tensor, mask: Tensor | None) -> Tensor:
        h, m = self.stem(x), self.modulation(e).unflatten(1, (len(self.layers), 2, -1))
        for i, layer in enumerate(self.layers):
            h = h + F.silu(layer(h) * (1 + m[:, i, 0]) + m[:, i, 1])
        return self.out(h)
