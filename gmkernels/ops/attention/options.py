"""The options of an attention call, checked and as the operators take them."""

import math

from torch import Tensor

MAX_WIDTH = 256  # of a head


def scale_of(op: str, scale: float | None, width: int) -> float:
    """The factor of the scores."""
    if scale is None:
        return 1.0 / math.sqrt(width)
    if isinstance(scale, Tensor) or not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be a finite number, got {scale!r}")
    return float(scale)


def softcap_of(op: str, softcap: float | None) -> float:
    """The cap; 0 for none."""
    if softcap is None:
        return 0.0
    if isinstance(softcap, Tensor) or not 0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap must be positive, or None for no cap, got {softcap!r}")
    return float(softcap)


def window_of(op: str, window: int | None) -> int:
    """The window; 0 for all keys."""
    if window is None:
        return 0
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(
            f"{op}: window must be a whole number >= 1, the keys that a query sees with its own, "
            f"or None for all, got {window!r}"
        )
    return window
