"""Tokens drawn one after the other by a GPT, with a cache of its keys and values.

Token n depends on the tokens from w(n) to n - 1: w(n) is 0 up to n = S, the context, and then goes
on by half a context at a time, the least that leaves no more than S tokens. w depends on n alone,
so what is drawn has one density at any length, GPT.log_prob(), and does not depend on where a
prompt ends. The cache is made anew once in S / 2 tokens; between, a token costs one pass over it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gmkernels import noise
from gmkernels.ops.attention import causal_attention
from gmkernels.ops.decode import decode_attention
from gmkernels.ops.token_sampling import next_token


@dataclass
class Cache:
    """Keys and values of the tokens so far; what lies beyond a row's length means nothing.

    Attributes:
        k, v: [layers, B, H_kv, S, D]. lengths: tokens of each row, int64 [B].
    """

    k: Tensor
    v: Tensor
    lengths: Tensor


def window(n: int, context: int) -> int:
    """w(n): the first token that token n may depend on.

    >>> [window(n, 4) for n in (1, 4, 5, 6, 7)]
    [0, 0, 2, 2, 4]
    """
    half = (context + 1) // 2
    return -(-max(0, n - context) // half) * half


def empty_cache(model: Any, rows: int) -> Cache:
    """A cache of `rows` sequences without tokens, in a GPT's dtype and on its device."""
    s, like = model.sizes, model.token.weight
    shape = (s.layers, rows, s.kv_heads or s.heads, s.context, s.width // s.heads)
    lengths = torch.zeros(rows, dtype=torch.int64, device=like.device)
    return Cache(like.new_zeros(shape), like.new_zeros(shape), lengths)


def prefill(model: Any, cache: Cache, pieces: Sequence[Tensor], rows: Sequence[int]) -> None:
    """Makes pieces, tokens [T_i], the content of these rows of a cache, in one pass.

    Shorter pieces are padded behind; no token sees what is behind it.
    """
    tokens = nn.utils.rnn.pad_sequence(list(pieces), batch_first=True)  # [R, T]
    where = torch.tensor(rows, device=tokens.device)
    cache.lengths[where] = torch.tensor([len(p) for p in pieces], device=tokens.device)

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for kept, new in ((cache.k, k), (cache.v, v)):
            kept[i][where, :, : new.shape[2]] = new
        return causal_attention(q, k, v)

    if tokens.shape[1]:
        model.states(tokens, None, attend)


def step(model: Any, tokens: Tensor, cache: Cache) -> Tensor:
    """Logits [B, vocab] after one more token of each row, [B], which joins the cache.

    Each row must have room for it.
    """
    rows, places = torch.arange(len(tokens), device=tokens.device), cache.lengths
    cache.lengths = places + 1

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for kept, new in ((cache.k, k), (cache.v, v)):
            kept[i][rows, :, places] = new[:, :, 0]
        return decode_attention(q, cache.k[i], cache.v[i], cache.lengths)

    return model.logits(model.states(tokens[:, None], places[:, None], attend))[:, 0]


@torch.no_grad()
def generate(
    model: Any,
    prompts: Tensor | Sequence[Tensor],
    n: int,
    *,
    seed: noise.Seed = None,
    offset: int = 0,
    **options: Any,
) -> Tensor:
    """n new tokens after each prompt, int64 [B, n]: GPT.generate()."""
    sizes = [len(p) for p in prompts]
    if n < 1 or not sizes or min(sizes) < 1:
        raise ValueError(
            f"generate: n, prompts and each prompt must hold 1 or more, got {n} and lengths {sizes}"
        )
    device, context = model.token.weight.device, model.sizes.context
    key = noise.resolve_key("generate", seed, offset, None, device)
    known = torch.zeros(len(sizes), max(sizes) + n, dtype=torch.int64, device=device)
    for row, prompt in zip(known, prompts, strict=True):
        row[: len(prompt)] = prompt
    cache, starts, made = empty_cache(model, len(sizes)), [-1] * len(sizes), []
    rows, place = torch.arange(len(sizes), device=device), torch.tensor(sizes, device=device)
    for i in range(n):
        windows = [window(size + i, context) for size in sizes]
        moved = [b for b, start in enumerate(starts) if windows[b] != start]
        if moved:
            pieces = [known[b, windows[b] : sizes[b] + i - 1] for b in moved]
            prefill(model, cache, pieces, moved)
        logits = step(model, known[rows, place - 1], cache)
        made.append(next_token(logits, seed=key, position=place, **options))
        known[rows, place] = made[-1]
        place, starts = place + 1, windows
    return torch.stack(made, 1)
