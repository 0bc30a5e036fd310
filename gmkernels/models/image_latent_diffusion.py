"""Latent diffusion on small grey pictures, told what to draw in words: what `train` builds."""

import math

from torch import Tensor, nn

from gmkernels.models.diffusion import Diffusion
from gmkernels.models.image_diffusion import SCHEDULES
from gmkernels.models.latent_diffusion import LatentDiffusion
from gmkernels.models.likelihood import Categorical
from gmkernels.models.nets import DiT
from gmkernels.models.text import DIGITS, FASHION, TextEncoder
from gmkernels.models.vae import VAE

CAPTIONS = {"digits": DIGITS, "fashion": FASHION}


def _normed(width: int) -> tuple[nn.Module, nn.Module]:
    return nn.GroupNorm(math.gcd(8, width), width), nn.SiLU()


class _Block(nn.Sequential):
    """h + conv(dropout(silu(norm(conv(silu(norm(h)))))))."""

    def __init__(self, width: int, dropout: float) -> None:
        conv1, conv2 = (nn.Conv2d(width, width, 3, 1, 1) for _ in range(2))
        super().__init__(*_normed(width), conv1, *_normed(width), nn.Dropout(dropout), conv2)

    def forward(self, h: Tensor) -> Tensor:
        return h + super().forward(h)


class _Logits(nn.Linear):
    """[B, R, H, W] -> logits [B, H * W, L]: the levels of all pixels share R directions."""

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h.flatten(2).mT)


def conv_vae(
    side: int,
    levels: int,
    *,
    channels: int = 4,
    width: int = 32,
    rank: int = 8,
    beta: float = 1.0,
    dropout: float = 0.0,
) -> VAE:
    """A convolutional VAE of square grey pictures [B, side * side], integers in [0, levels).

    Its latents are [channels, s, s], where s is the side halved until it is at most 7.

    Args: width: channels of its layers. rank: of the logits. beta: as in VAE.
    """
    halvings = max(0, math.ceil(math.log2(side / 7)))
    small, rest = divmod(side, 2**halvings)
    if rest:
        raise ValueError(f"conv_vae: the side must be a multiple of {2**halvings}, got {side}")
    down: list[nn.Module] = [nn.Unflatten(1, (1, side, side)), nn.Conv2d(1, width, 3, 1, 1)]
    up: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1), _Block(width, dropout)]
    for _ in range(halvings):
        down += [_Block(width, dropout), nn.Conv2d(width, width, 3, 2, 1)]
        up += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, 1, 1)]
        up += [_Block(width, dropout)]
    down += [_Block(width, dropout), *_normed(width), nn.Conv2d(width, 2 * channels, 3, 1, 1)]
    up += [*_normed(width), nn.Conv2d(width, rank, 3, 1, 1), _Logits(rank, levels)]
    encoder, decoder = nn.Sequential(*down), nn.Sequential(*up)
    return VAE(encoder, decoder, Categorical(levels), (channels, small, small), beta=beta)


def image_latent_diffusion(
    pixels: int,
    levels: int,
    *,
    channels: int = 4,
    vae_width: int = 32,
    beta: float = 0.3,
    dropout: float = 0.1,
    times: int = 100,
    schedule: str = "cosine",
    prediction_type: str = "v_prediction",
    width: int = 64,
    depth: int = 4,
    classes: int = 10,
    captions: str = "digits",
    text_width: int = 64,
    text_layers: int = 2,
    condition_dropout: float = 0.1,
) -> LatentDiffusion:
    """A convolutional VAE, a transformer that denoises its latents, and a text encoder it looks at.

    Args:
        channels, vae_width, beta, dropout: of the VAE's latents, of its layers, as in VAE.
        times, schedule, prediction_type, condition_dropout: as in image_diffusion().
        width, depth: of the denoising transformer.
        classes: that captions speak of; 0 trains without labels, and without text.
        captions: "digits" or "fashion", what the classes are called.
        text_width, text_layers: of the text encoder.
    """
    side = math.isqrt(pixels)
    if side * side != pixels:
        raise ValueError(f"latent_diffusion: pictures must be square, got {pixels} pixels")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if captions not in CAPTIONS:
        raise ValueError(f"captions must be one of {', '.join(CAPTIONS)}, got {captions!r}")
    if not 0 <= classes <= len(CAPTIONS[captions].names):
        raise ValueError(
            f"classes must lie in [0, {len(CAPTIONS[captions].names)}], as many as the captions "
            f"{captions!r} name, got {classes}"
        )
    vae = conv_vae(side, levels, channels=channels, width=vae_width, beta=beta, dropout=dropout)
    net = DiT(
        channels,
        vae.latent[1],
        patch=1,
        width=width,
        depth=depth,
        context_width=text_width if classes else 0,
        time_scale=1000.0 / times,
    )
    diffusion = Diffusion(
        net,
        SCHEDULES[schedule](times),
        vae.latent,
        prediction_type=prediction_type,
        condition_dropout=condition_dropout,
    )
    if not classes:
        return LatentDiffusion(vae, diffusion)
    text = TextEncoder(text_width, layers=text_layers)
    return LatentDiffusion(vae, diffusion, text=text, captions=CAPTIONS[captions])
