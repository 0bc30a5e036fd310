"""Masked autoencoder (He et al. 2021, 2111.06377) on full_attention.

A picture is cut into P patches; a random `hidden` share of them is hidden. The encoder, a
transformer, sees the patches left, each with its position, and nothing of the others; a light
decoder, a narrower transformer, sees what the encoder made of them, and a learned token at each
hidden place.
    loss = mean_x sum over the pixels of hidden patches of (x - prediction)^2
Afterwards the encoder alone, with all patches in sight, gives features.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmkernels import noise
from gmkernels.models.autoencoder import Reconstructor
from gmkernels.ops.attention import full_attention


class Block(nn.Module):
    """A pre-norm transformer block on h [B, T, D]; heads must divide D."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"Block: heads must divide the width {width}, got {heads}")
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, h: Tensor) -> Tensor:
        """h + attention, then + MLP."""
        q, k, v = (
            y.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for y in self.qkv(self.norm1(h)).chunk(3, 2)
        )  # [B, H, T, D / H]
        h = h + self.out(full_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + self.mlp(self.norm2(h))


class MaskedAutoencoder(Reconstructor):
    """A masked autoencoder of flat square grey pictures x [B, pixels].

    Args:
        side: of a picture. patch: of a patch; must divide side.
        hidden: share of the P patches that is hidden, in (0, 1); at least one is, one is not.
        width, depth, heads: of the encoder. decoder_width: of the decoder's one block.
    """

    def __init__(
        self,
        side: int,
        patch: int,
        *,
        hidden: float = 0.5,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        decoder_width: int = 32,
    ) -> None:
        patches = (side // patch) ** 2 if patch > 0 and side % patch == 0 else 0
        if patches < 2:
            raise ValueError(
                "MaskedAutoencoder: patch must divide side into 4 patches or more, got "
                f"patch {patch} and side {side}"
            )
        if not 0 < hidden < 1:
            raise ValueError(f"MaskedAutoencoder: hidden must lie in (0, 1), got {hidden}")
        super().__init__()
        blocks = (Block(width, heads) for _ in range(depth))
        self.encoder = nn.Sequential(*blocks, nn.LayerNorm(width))
        self.decoder = nn.Sequential(Block(decoder_width, heads), nn.LayerNorm(decoder_width))
        self.side, self.patch, self.patches = side, patch, patches
        self.visible = patches - min(max(round(hidden * patches), 1), patches - 1)
        self.stem, self.head = nn.Linear(patch**2, width), nn.Linear(decoder_width, patch**2)
        self.bridge = nn.Linear(width, decoder_width)
        self.position = nn.Parameter(0.02 * torch.randn(patches, width))
        self.decoder_position = nn.Parameter(0.02 * torch.randn(patches, decoder_width))
        self.token = nn.Parameter(0.02 * torch.randn(decoder_width))

    def cut(self, x: Tensor) -> Tensor:
        """Pictures [B, pixels] as patches [B, P, patch^2]."""
        return F.pixel_unshuffle(x.view(-1, 1, self.side, self.side), self.patch).flatten(2).mT

    def join(self, patches: Tensor) -> Tensor:
        """The inverse of cut()."""
        grid = self.side // self.patch
        return F.pixel_shuffle(patches.mT.unflatten(2, (grid, grid)), self.patch).flatten(1)

    def order(self, x: Tensor, *, seed: noise.Seed = None) -> Tensor:
        """A shuffling of each picture's patches, int64 [B, P]: the first `visible` are seen.

        A function of the seed and the row.
        """
        u = noise.uniform((len(x), self.patches), seed=seed, device=x.device)
        return u.argsort(dim=1, stable=True)

    def hidden_mask(self, order: Tensor) -> Tensor:
        """Which patches an order hides, bool [B, P]."""
        places = torch.arange(self.patches, device=order.device).expand_as(order)
        return torch.empty_like(order).scatter_(1, order, places) >= self.visible

    def predict(self, x: Tensor, order: Tensor) -> Tensor:
        """All patches [B, P, patch^2] from those that an order leaves in sight."""
        kept = order[:, : self.visible, None]
        tokens = self.stem(_pick(self.cut(x), kept)) + self.position[kept[..., 0]]
        h = self.bridge(self.encoder(tokens))
        spread = self.token.expand(len(x), self.patches, -1)
        h = spread.scatter(1, kept.expand(-1, -1, h.shape[2]), h.to(spread.dtype))
        return self.head(self.decoder(h + self.decoder_position))

    def encode(self, x: Tensor) -> Tensor:
        """Features [B, width]: the mean over the encoder's tokens of all patches."""
        return self.encoder(self.stem(self.cut(x)) + self.position).mean(1)

    def seen(self, x: Tensor, *, seed: noise.Seed = None) -> Tensor:
        """The picture with its hidden patches grey."""
        hidden = self.hidden_mask(self.order(x, seed=seed))
        return self.join(self.cut(x).masked_fill(hidden[..., None], 0.5))

    def restore(self, x: Tensor, *, seed: noise.Seed = None) -> Tensor:
        """The picture with predictions in the place of its hidden patches: others have no error."""
        order = self.order(x, seed=seed)
        hidden = self.hidden_mask(order)[..., None]
        return self.join(torch.where(hidden, self.predict(x, order), self.cut(x)))


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each x[b] [P, D] by index [B, T, 1]."""
    return x.gather(1, index.expand(-1, -1, x.shape[2]))


def image_masked_autoencoder(
    pixels: int,
    levels: int,
    *,
    patch: int = 2,
    hidden: float = 0.5,
    width: int = 64,
    depth: int = 2,
    decoder_width: int = 32,
) -> MaskedAutoencoder:
    """Of flat square grey images in [0, 1]. Args as in MaskedAutoencoder."""
    side = math.isqrt(pixels)
    if side * side != pixels:
        raise ValueError(f"masked_autoencoder: pictures must be square, got {pixels} pixels")
    return MaskedAutoencoder(
        side, patch, hidden=hidden, width=width, depth=depth, decoder_width=decoder_width
    )
