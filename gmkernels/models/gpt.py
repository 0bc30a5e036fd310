"""GPT: a decoder-only transformer over tokens, exact in what it attends to.

    p(x) = prod_t p(x_t | x_<t), the logits of x_t = W norm(h_t-1)
    h = tokens + places; in each layer h += W_o attention(norm(h)); h += W_2 gelu(W_1 norm(h))
Radford et al. 2019 (GPT-2: places learned, LayerNorm, tanh GELU), weights begun as in its code;
rotary places, Su et al. 2021; RMSNorm, Zhang and Sennrich 2019; fewer key heads, Ainslie et al.
2023; norms of queries and keys, Henry et al. 2020.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmkernels import noise
from gmkernels.models import generation
from gmkernels.ops.activation import gelu
from gmkernels.ops.attention import causal_attention
from gmkernels.ops.rotary import rms_norm, rotary_embedding, rotary_table


@dataclass(frozen=True)
class Sizes:
    """What a GPT is made of; the defaults are GPT-2's.

    Attributes:
        vocab: tokens that can be drawn. context: S, the most that a token may depend on.
        layers, heads, width: of the transformer; width is a multiple of heads.
        kv_heads: heads of keys and values, which divide heads; None is as many.
        hidden: width of the layers between; None is 4 width.
        marks: tokens vocab, ..., vocab + marks - 1 beside, that are read and never drawn: a begin,
            a class.
        positions: "learned" or "rotary". norm: "layer" or "rms". qk_norm: RMSNorm on heads.
        bias: in linear layers and LayerNorm. tied: the last layer is the tokens' embedding.
        dropout: of embeddings and of what layers add, not of attention's probabilities.
    Raises:
        ValueError: sizes other than said here.
    """

    vocab: int
    context: int = 1024
    layers: int = 12
    heads: int = 12
    width: int = 768
    kv_heads: int | None = None
    hidden: int | None = None
    marks: int = 0
    positions: str = "learned"
    norm: str = "layer"
    qk_norm: bool = False
    bias: bool = True
    tied: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        sizes = (self.vocab, self.context, self.layers, self.heads, self.width)
        odd = self.width // max(1, self.heads) % 2
        for rule, holds in {
            "vocab, context, layers, heads and width must be >= 1": min(sizes) >= 1,
            "heads must divide width": not self.width % max(1, self.heads),
            "kv_heads must divide heads": not self.heads % (self.kv_heads or 1),
            "hidden must be >= 1, or None": self.hidden is None or self.hidden >= 1,
            "marks must be >= 0": self.marks >= 0,
            "dropout must lie in [0, 1)": 0 <= self.dropout < 1,
            "positions must be learned or rotary": self.positions in ("learned", "rotary"),
            "norm must be layer or rms": self.norm in ("layer", "rms"),
            "rotary needs an even width / heads": self.positions != "rotary" or not odd,
        }.items():
            if not holds:
                raise ValueError(f"{rule}, got {self}")


class _RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=1e-6)


def _norm(s: Sizes) -> nn.Module:
    return _RMSNorm(s.width) if s.norm == "rms" else nn.LayerNorm(s.width, bias=s.bias)


class _Layer(nn.Module):
    """attend: (q [B, H, T, D], k, v [B, H_kv, T, D]) -> o as q. turn: rotates q or k."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        d, hidden = s.width // s.heads, s.hidden or 4 * s.width
        self.heads = [s.heads, s.kv_heads or s.heads, s.kv_heads or s.heads]
        self.norm1, self.norm2, self.dropout = _norm(s), _norm(s), nn.Dropout(s.dropout)
        self.qkv = nn.Linear(s.width, sum(self.heads) * d, bias=s.bias)
        self.out = nn.Linear(s.width, s.width, bias=s.bias)
        self.up = nn.Linear(s.width, hidden, bias=s.bias)
        self.down = nn.Linear(hidden, s.width, bias=s.bias)
        self.q_norm = _RMSNorm(d) if s.qk_norm else nn.Identity()
        self.k_norm = _RMSNorm(d) if s.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, attend: Callable[..., Tensor], turn: Callable[[Tensor], Tensor]
    ) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(2, (sum(self.heads), -1))
        q, k, v = qkv.transpose(1, 2).split(self.heads, 1)
        o = attend(turn(self.q_norm(q)), turn(self.k_norm(k)), v)
        x = x + self.dropout(self.out(o.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    """A language model of tokens, int64 in [0, vocab + marks); call eval() where it holds dropout.

    Tokens are drawn by noise of (seed, row, place), so a sequence does not depend on the others of
    its batch, but for the rounding of matrix products, which depends on their number of rows.
    """

    log_prob_kind = "exact"
    takes = "levels"
    cos: Tensor
    sin: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        s = self.sizes = sizes
        self.token = nn.Embedding(s.vocab + s.marks, s.width)
        self.layers = nn.ModuleList(_Layer(s) for _ in range(s.layers))
        self.norm, self.dropout = _norm(s), nn.Dropout(s.dropout)
        if s.positions == "learned":
            self.position = nn.Embedding(s.context, s.width)
        else:
            cos, sin = rotary_table(s.context, s.width // s.heads)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        if not s.tied:
            self.head = nn.Linear(s.width, s.vocab, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                adds = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * s.layers) if adds else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of each next token [B, T, vocab], of tokens [B, T], T at most the context."""
        return self.logits(self.states(tokens, None, lambda _, *qkv: causal_attention(*qkv)))

    def loss(self, x: Tensor, *, seed: noise.Seed = None) -> Tensor:
        """Mean over tokens of -log p of each from those before it, nats; x [B, T + 1].

        Only dropout is random, by torch's generator; seed is taken as all models take it. Plain
        cross-entropy: torch's chunked linear_cross_entropy was 2 to 5 times slower on a CPU.
        """
        return F.cross_entropy(self(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    def log_prob(self, x: Tensor, *, given: int = 1) -> Tensor:
        """log p(x_given, ... | x_0, ..., x_given-1) of tokens x [B, T], [B] nats, exact.

        given: >= 1; what precedes the first token is for marks to say. A text longer than the
        context is read in the windows of models.generation: the density of what generate() draws.
        """
        if given < 1:
            raise ValueError(f"log_prob: given must be >= 1, got {given}; a mark can begin x")
        total, done = torch.zeros(len(x), device=x.device), given
        while done < x.shape[1]:
            start = generation.window(done, self.sizes.context)
            end = min(x.shape[1], start + self.sizes.context + 1)
            logits = self(x[:, start : end - 1])[:, done - 1 - start :]
            nll = F.cross_entropy(logits.flatten(0, 1), x[:, done:end].flatten(), reduction="none")
            total, done = total - nll.view(len(x), -1).sum(1), end
        return total

    def generate(
        self,
        prompts: Tensor | Sequence[Tensor],
        n: int,
        *,
        seed: noise.Seed = None,
        offset: int = 0,
        **options: Any,
    ) -> Tensor:
        """n new tokens after each prompt, int64 [B, n], with a cache.

        Args:
            prompts: tokens [B, T], or a list of B tensors [T_i], each of one token or more, of any
                length.
            seed, offset: row b draws as row offset + b; the token at place i as position i.
            options: temperature, top_k and top_p of next_token().
        Raises:
            ValueError: no token to draw or to begin with.
        """
        return generation.generate(self, prompts, n, seed=seed, offset=offset, **options)

    def sample(
        self, n: int, *, prompt: Tensor, tokens: int, seed: noise.Seed = None, **options: Any
    ) -> Tensor:
        """n texts that begin with a prompt [T] and go on for `tokens`, int64 [n, T + tokens].

        options: of generate().
        """
        prompts = prompt.to(self.token.weight.device).expand(n, -1)
        return torch.cat([prompts, self.generate(prompts, tokens, seed=seed, **options)], 1)

    def states(
        self, tokens: Tensor, places: Tensor | None, attend: Callable[..., Tensor]
    ) -> Tensor:
        """What the head reads, [B, T, width]; attend has the layer's number before q, k and v."""
        if tokens.dim() != 2 or tokens.shape[1] > self.sizes.context:
            raise ValueError(
                f"GPT: tokens must be [B, T] with T at most the context {self.sizes.context}, got "
                f"{tuple(tokens.shape)}"
            )
        h, turn = self.token(tokens), _same
        if self.sizes.positions == "learned":
            learned = self.position.weight[: tokens.shape[1]]
            h = h + (learned if places is None else self.position(places))
        else:
            turn = functools.partial(rotary_embedding, cos=self.cos, sin=self.sin, positions=places)
        h = self.dropout(h)
        for i, layer in enumerate(self.layers):
            h = layer(h, functools.partial(attend, i), turn)
        return self.norm(h)

    def logits(self, h: Tensor) -> Tensor:
        """The head: [B, T, vocab] of states [B, T, width]."""
        weight = self.token.weight[: self.sizes.vocab] if self.sizes.tied else self.head.weight
        return F.linear(h, weight)


def _same(x: Tensor) -> Tensor:
    return x
