"""Diffusion and rectified flow on small grey pictures, conditional on their class: what `train`
builds."""

import math
from collections.abc import Callable

from gmkernels.models.diffusion import Diffusion
from gmkernels.models.nets import UNet
from gmkernels.schedule import Schedule

SCHEDULES: dict[str, Callable[[int], Schedule]] = {
    "linear": lambda times: Schedule.linear(times, 0.1 / times, min(20 / times, 0.999)),
    "cosine": Schedule.cosine,
    "sigmoid": Schedule.sigmoid,
    "flow": Schedule.flow_matching,
}


def image_diffusion(
    pixels: int,
    levels: int,
    *,
    schedule: str = "cosine",
    times: int = 200,
    prediction_type: str = "v_prediction",
    weighting: str = "uniform",
    width: int = 32,
    classes: int = 10,
    condition_dropout: float = 0.1,
) -> Diffusion:
    """A small U-Net in a diffusion model of square grey pictures with `levels` levels.

    Args:
        schedule: "linear", "cosine", "sigmoid" or "flow", of `times` times.
        prediction_type, weighting, condition_dropout: as in Diffusion.
        width: channels of the U-Net. classes: of the labels; 0 trains without them.
    """
    side = math.isqrt(pixels)
    if side * side != pixels:
        raise ValueError(f"diffusion: pictures must be square, got {pixels} pixels")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if times < 2:
        raise ValueError(f"times must be >= 2, got {times}")
    net = UNet(1, width=width, classes=classes, time_scale=1000.0 / times)
    return Diffusion(
        net,
        SCHEDULES[schedule](times),
        (1, side, side),
        prediction_type=prediction_type,
        weighting=weighting,
        levels=levels,
        condition_dropout=condition_dropout,
    )


def image_flow_matching(
    pixels: int,
    levels: int,
    *,
    times: int = 200,
    width: int = 32,
    classes: int = 10,
    condition_dropout: float = 0.1,
) -> Diffusion:
    """Rectified flow: image_diffusion() on the flow schedule with flow predictions."""
    return image_diffusion(
        pixels,
        levels,
        schedule="flow",
        times=times,
        prediction_type="flow_prediction",
        width=width,
        classes=classes,
        condition_dropout=condition_dropout,
    )
