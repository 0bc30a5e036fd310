"""The options of an attention call, checked and as the operators take them."""

import math

from torch import Tensor

MAX_WIDTH = 256  # of a head


def check_grouped(op: str, q: Tensor, k: Tensor, keys: str) -> None:
    """Raises ValueError unless heads q [B, H, T, D] can read the key heads k [B, H_kv, S, D].

    keys: what k is called, "k" or "the caches".
    """
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"{op}: q and {keys} must have the same batch and width D, got {tuple(q.shape)} and "
            f"{tuple(k.shape)}"
        )
    if not 1 <= q.shape[3] <= MAX_WIDTH:
        raise ValueError(f"{op}: D must lie in [1, {MAX_WIDTH}], got {q.shape[3]}")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{op}: q's heads must be a multiple of those of {keys}, each of which as many heads "
            f"of q share, got {q.shape[1]} and {k.shape[1]}"
        )


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
