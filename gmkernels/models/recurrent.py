"""A recurrent model of tokens, with the verbs of models.gpt: p(x) = prod_t p(x_t | h_t-1).

h_t = cell(h_t-1, x_t), the same cell at each place, on torch's GRU (Cho et al. 2014, 1406.1078) or
LSTM (Hochreiter and Schmidhuber 1997). A token depends on all tokens before it, at any distance.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmkernels import noise
from gmkernels.ops.token_sampling import next_token

State = Any  # h [layers, B, H] of a GRU, (h, c) of an LSTM


class RNN(nn.Module):
    """A model of tokens, int64 in [0, vocab + marks); call eval() where it holds dropout.

    Args:
        vocab: tokens that can be drawn. width: H. layers: of cells, each fed by the one below.
        cell: "gru" or "lstm". dropout: of embeddings and of what each layer of cells says.
        marks: tokens vocab, ..., vocab + marks - 1 beside, that are read and never drawn.
    Raises:
        ValueError: sizes or a cell other than said here.

    >>> import torch
    >>> from gmkernels.models.recurrent import RNN
    >>> model = RNN(5, width=8)
    >>> model.sample(3, prompt=torch.tensor([1, 2]), tokens=4, seed=0).shape
    torch.Size([3, 6])
    """

    log_prob_kind = "exact"
    takes = "levels"

    def __init__(
        self,
        vocab: int,
        *,
        width: int = 128,
        layers: int = 1,
        cell: str = "gru",
        dropout: float = 0.0,
        marks: int = 0,
    ) -> None:
        super().__init__()
        kinds: dict[str, Any] = {"gru": nn.GRU, "lstm": nn.LSTM}
        if min(vocab, width, layers) < 1 or marks < 0 or cell not in kinds:
            raise ValueError(
                "RNN: vocab, width and layers must be >= 1, marks >= 0 and cell gru or lstm, got "
                f"{vocab}, {width}, {layers}, {marks} and {cell!r}"
            )
        self.token = nn.Embedding(vocab + marks, width)
        between = dropout if layers > 1 else 0.0  # torch's own is between layers alone
        self.cells = kinds[cell](width, width, layers, batch_first=True, dropout=between)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(width, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of each next token [B, T, vocab], of tokens [B, T]. Raises ValueError for shapes.

        Causal: logits at t depend on tokens 0, ..., t.
        """
        if tokens.dim() != 2:
            raise ValueError(f"RNN: tokens must be [B, T], got {tuple(tokens.shape)}")
        states, _ = self.cells(self.dropout(self.token(tokens)))
        return self.head(self.dropout(states))

    def loss(self, x: Tensor, *, seed: noise.Seed = None) -> Tensor:
        """Mean over tokens of -log p of each from those before it, nats; x [B, T + 1].

        Only dropout is random, by torch's generator; seed is taken as all models take it.
        """
        return F.cross_entropy(self(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    def log_prob(self, x: Tensor, *, given: int = 1) -> Tensor:
        """log p(x_given, ... | x_0, ..., x_given-1) of tokens x [B, T], [B] nats, exact.

        given: >= 1; what precedes the first token is for marks to say.
        """
        if given < 1:
            raise ValueError(f"log_prob: given must be >= 1, got {given}; a mark can begin x")
        logits = self(x[:, :-1])[:, given - 1 :]
        nll = F.cross_entropy(logits.flatten(0, 1), x[:, given:].flatten(), reduction="none")
        return -nll.view(len(x), -1).sum(1)

    @torch.no_grad()
    def generate(
        self,
        prompts: Tensor | Sequence[Tensor],
        n: int,
        *,
        seed: noise.Seed = None,
        offset: int = 0,
        **options: Any,
    ) -> Tensor:
        """n new tokens after each prompt, int64 [B, n]; each costs one step of the cells.

        Args:
            prompts: tokens [B, T], or a list of B tensors [T_i], each of one token or more, of any
                length.
            seed, offset: row b draws as row offset + b; the token at place i as position i.
            options: temperature, top_k and top_p of next_token().
        Raises:
            ValueError: no token to draw or to begin with.
        """
        sizes = [len(p) for p in prompts]
        if n < 1 or not sizes or min(sizes) < 1:
            raise ValueError(
                "generate: n, prompts and each prompt must hold 1 or more, got "
                f"{n} and lengths {sizes}"
            )
        device = self.token.weight.device
        key = noise.resolve_key("generate", seed, offset, None, device)
        place, made = torch.tensor(sizes, device=device), []
        y, state = self._read([p.to(device) for p in prompts])
        for i in range(n):
            made.append(next_token(self.head(y), seed=key, position=place + i, **options))
            states, state = self.cells(self.token(made[-1])[:, None], state)
            y = states[:, 0]
        return torch.stack(made, 1)

    def sample(
        self, n: int, *, prompt: Tensor, tokens: int, seed: noise.Seed = None, **options: Any
    ) -> Tensor:
        """n texts that begin with a prompt [T] and go on for `tokens`, int64 [n, T + tokens].

        options: of generate().
        """
        prompts = prompt.to(self.token.weight.device).expand(n, -1)
        return torch.cat([prompts, self.generate(prompts, tokens, seed=seed, **options)], 1)

    def _read(self, prompts: Sequence[Tensor]) -> tuple[Tensor, State]:
        """What the head sees after each prompt, [B, H], and the states of all layers there."""
        packed = nn.utils.rnn.pack_sequence(
            [self.token(prompt) for prompt in prompts], enforce_sorted=False
        )
        _, state = self.cells(packed)
        top = state[0] if isinstance(state, tuple) else state
        return top[-1], state
