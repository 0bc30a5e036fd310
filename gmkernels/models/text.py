"""Text as a condition: bytes as tokens, a small transformer over them, captions of labels.

A text is BEGIN and then the bytes of its UTF-8, padded to the longest of the batch; the encoder is
e = bytes + positions and a few pre-norm blocks (Vaswani et al. 2017, 1706.03762), and gives the
sequence that cross-attention looks at (Rombach et al. 2022, 2112.10752). BEGIN makes the empty text
a text like any other: it is the unconditional one of classifier-free guidance.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gmkernels import noise

BEGIN, PADDING = 256, 257  # tokens beside the 256 bytes


def tokenize(texts: Sequence[str], length: int) -> Tensor:
    """Tokens of texts, int64 [B, T] on the CPU, T those of the longest: BEGIN, bytes, PADDING.

    Raises TypeError for one string in place of a list, and ValueError for a text of more than
    `length` tokens: nothing is cut off.

    >>> tokenize(["3", ""], 8).tolist()
    [[256, 51], [256, 257]]
    """
    if isinstance(texts, str):
        raise TypeError(f"tokenize: texts must be a list of strings, got the string {texts!r}")
    rows = [[BEGIN, *text.encode()] for text in texts]
    longest = max(map(len, rows), default=1)
    if longest > length:
        text = next(text for text, row in zip(texts, rows, strict=True) if len(row) == longest)
        raise ValueError(
            f"tokenize: a text must have at most {length - 1} bytes of UTF-8, got {longest - 1} in "
            f"{text[:20] + '...' if len(text) > 20 else text!r}; shorten it, or make the encoder "
            "with a greater length"
        )
    return torch.tensor([row + [PADDING] * (longest - len(row)) for row in rows]).view(-1, longest)


class TextEncoder(nn.Module):
    """Texts -> a sequence of vectors and which of them are text.

    Args:
        width: E of the vectors. layers, heads: of the transformer; heads must divide width.
        length: most tokens of a text, bytes and one.
    """

    def __init__(
        self, width: int = 64, *, layers: int = 2, heads: int = 4, length: int = 64
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"TextEncoder: heads must divide the width {width}, got {heads}")
        self.width, self.length = width, length
        self.token = nn.Embedding(PADDING + 1, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        nn.init.normal_(self.token.weight, std=0.02)
        block = nn.TransformerEncoderLayer(
            width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(width)
        self.blocks = nn.TransformerEncoder(block, layers, norm, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The context [B, T, E] of tokens, int64 [B, T], and its mask, bool [B, T]: not padding.

        Vectors under the mask do not depend on how much padding follows; others mean nothing.
        """
        if tokens.dim() != 2 or tokens.shape[1] > self.length:
            raise ValueError(
                f"TextEncoder: tokens must be [B, T] with T at most {self.length}, got "
                f"{tuple(tokens.shape)}"
            )
        padding = tokens == PADDING
        e = self.token(tokens) + self.position[: tokens.shape[1]]
        return self.blocks(e, src_key_padding_mask=padding), ~padding

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Context and mask of texts; errors as in tokenize(). Equal texts are encoded once."""
        tokens = tokenize(texts, self.length).to(self.position.device)
        distinct, index = tokens.unique(dim=0, return_inverse=True)
        context, mask = self(distinct)
        return context[index], mask[index]


@dataclass(frozen=True)
class Captions:
    """Texts that say a label.

    Attributes:
        names: of the classes. templates: texts with {name} or {index} in them; the first is the
            one that sampling uses for a label.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...]

    def say(self, label: int, template: int = 0) -> str:
        """The text of a label; of -1, no class, the empty one."""
        if not -1 <= label < len(self.names):
            raise ValueError(f"label must lie in [-1, {len(self.names)}), got {label}")
        if label == -1:
            return ""
        return self.templates[template].format(name=self.names[label], index=label)

    def draw(self, labels: Tensor, key: Tensor) -> list[str]:
        """A text for each of labels, int64 [B]: of a template that key and row choose."""
        u = noise.uniform((len(labels), 1), seed=key.cpu(), device="cpu")
        chosen = (u[:, 0] * len(self.templates)).ceil().long() - 1
        return [
            self.say(label, i) for label, i in zip(labels.tolist(), chosen.tolist(), strict=True)
        ]


DIGITS = Captions(
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    (
        "a handwritten {name}",
        "a {name}",
        "{name}",
        "the digit {name}",
        "a handwritten {index}",
        "a {index}",
        "{index}",
        "the digit {index}",
    ),
)
FASHION = Captions(
    (
        *("T-shirt", "pair of trousers", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
    ("a picture of a {name}", "a {name}", "{name}", "one {name}"),
)
