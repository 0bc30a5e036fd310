"""Sampling of tokens: next_token. Start with reference.py."""

from typing import Any

import torch
from torch import Tensor

from gmkernels import checks, dispatch
from gmkernels.autograd import is_batched, is_transformed
from gmkernels.noise import Seed, resolve_key
from gmkernels.ops.token_sampling import outputs, reference

__all__ = ["next_token"]

_COLDEST, _HOTTEST = 1e-6, 1e6

dispatch.define("gmkernels_reference", reference.next_token, outputs.next_token)
dispatch.load_family(__name__, ("next_token",))


def _temperature(op: str, temperature: float) -> float:
    if isinstance(temperature, Tensor) or not (
        temperature == 0 or _COLDEST <= temperature <= _HOTTEST
    ):
        raise ValueError(
            f"{op}: temperature must be 0 (the likeliest token) or a number in [1e-6, 1e6], got "
            f"{temperature!r}"
        )
    return float(temperature)


def _top_k(op: str, top_k: int | None) -> int:
    if top_k is None:
        return 0
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ValueError(
            f"{op}: top_k must be a whole number >= 1, or None to keep all, got {top_k!r}"
        )
    return min(top_k, reference.MAX_VOCABULARY)


def _share(op: str, top_p: float | None) -> int:
    if top_p is None:
        return 0
    if isinstance(top_p, Tensor) or not 0 < top_p <= 1:
        raise ValueError(f"{op}: top_p must lie in (0, 1], or None to keep all, got {top_p!r}")
    if top_p == 1:
        return 0
    return max(1, round(top_p * 2**reference.SHARE_BITS))


def _check_position(op: str, position: Any, logits: Tensor) -> None:
    if isinstance(position, Tensor):
        if position.dtype != torch.int64:
            raise TypeError(f"{op}: a position tensor must be int64, got {position.dtype}")
        if position.shape != logits.shape[:1] or position.device != logits.device:
            raise ValueError(
                f"{op}: a position tensor must have shape [B] = {tuple(logits.shape[:1])} on "
                f"{logits.device}, got {tuple(position.shape)} on {position.device}"
            )
    elif isinstance(position, bool) or not isinstance(position, (int, torch.SymInt)):
        raise TypeError(
            f"{op}: position must be an int or an int64 tensor [B], got {type(position).__name__}"
        )
    elif not 0 <= position < 1 << 63:
        raise ValueError(f"{op}: position must lie in [0, 2^63), got {position}")


def next_token(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: Seed = None,
    position: int | Tensor = 0,
    offset: int = 0,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """Draws one token a row from softmax(logits / temperature), cut to the likeliest ones.

    First top_k keeps the k largest logits and all that tie with the k-th; then top_p keeps, of
    those, each token above which there is less than the mass top_p: the smallest set that holds
    it, and all that tie with its last. Then argmax of log-probability plus Gumbel noise.

    The noise is a pure function of (seed, position, row, token): row b takes the words of row
    offset + b under noise.fold_in(key, position). So a sequence's tokens depend neither on the
    other rows, nor on how a batch is split, nor on the backend: equal logits give equal tokens.

    Args:
        logits: [B, V], V at most 2^20; float32, bfloat16, float16, or float64 (reference, rounded
            to float32). Rows at any stride; -inf is a token that is never drawn.
        temperature: 0 is the likeliest token, the first of equals; else in [1e-6, 1e6].
        top_k: >= 1; None keeps all, and so does k >= V.
        top_p: in (0, 1], taken to the nearest 2^-30; None and 1 keep all.
        seed: an int, an integer tensor, or a key; None draws one from torch's default generator.
        position: in the sequence, an int >= 0, or int64 [B] on logits' device, one a row: sequences
            of different length in one call draw what each would draw alone.
        offset: rows to skip: a part of a batch that starts at row r passes r.
        generator: draws the seed instead (eager mode only).
        backend: None chooses; a named backend runs or raises.
    Returns:
        int64 [B], in [0, V); -1 where a row holds NaN or +inf, or nothing but -inf: no backend
        looks at the values on the host to tell.
    Raises:
        TypeError, ValueError: shapes, dtypes or options other than said here.
        RuntimeError: a named backend that cannot run; a call under vmap.

    Not differentiable. Accuracy: frequencies are tested against the exact probabilities; the mass
    of top_p is right to V 2^-34. Sources: Gumbel 1954; Fan et al. 2018; Holtzman et al. 2020.

    >>> import torch, gmkernels
    >>> logits = torch.tensor([[0.0, 9.0, 8.0], [5.0, 0.0, 0.0]])
    >>> gmkernels.next_token(logits, top_k=1, seed=0)
    tensor([1, 0])
    """
    op = "next_token"
    checks.check_tensor(op, "logits", logits)
    if logits.dim() != 2:
        raise ValueError(
            f"{op}: logits must have shape [B, V], got {tuple(logits.shape)}; logits[:, -1] is the "
            "last token's of [B, T, V]"
        )
    if logits.shape[1] > reference.MAX_VOCABULARY:
        raise ValueError(f"{op}: V must be at most 2^20, got {logits.shape[1]}")
    degrees, k, share = _temperature(op, temperature), _top_k(op, top_k), _share(op, top_p)
    _check_position(op, position, logits)
    if is_transformed() and is_batched(logits):
        raise RuntimeError(f"{op}: has no rule for vmap; give it all rows in one call")
    key = resolve_key(op, seed, offset, generator, logits.device)
    name = dispatch.choose(op, logits.device.type, dispatch.is_wide(logits), backend)
    if not isinstance(position, Tensor):
        position = torch.full(logits.shape[:1], position, dtype=torch.int64, device=logits.device)
    logits = checks.in_rows(logits.detach())
    draw: Any = torch.ops.gmkernels_reference.next_token.default
    if name != "reference":
        draw = dispatch.kernel(op, name).forward
    return draw(logits, key, position.contiguous(), degrees, k, share)
