"""Text as characters: files, the ids of characters, pieces of a long sequence."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gmkernels import noise


@dataclass(frozen=True)
class Text:
    """Characters as ids; in a config one pixel of as many levels as there are characters.

    Attributes:
        name: where it came from.
        vocab: the characters, sorted; id i is vocab[i].
        train, test: int64 ids, in order.
        context: characters that a model sees before one, set by cut().
    """

    kind, one = "text", "character"
    height = width = 1
    train_labels = test_labels = None
    name: str
    vocab: str
    train: Tensor
    test: Tensor
    context: int = 1

    @property
    def levels(self) -> int:
        """How many characters there are."""
        return len(self.vocab)

    def cut(self, context: int) -> "Text":
        """The same, in pieces of context + 1. Raises ValueError for a text without one such."""
        if not 1 <= context < len(self.train):
            raise ValueError(
                f"text: the context must lie in [1, {len(self.train)}), as {self.name} has "
                f"{len(self.train)} characters to train on, got {context}"
            )
        return dataclasses.replace(self, context=context)

    def batch(self, size: int, *, seed: int | Tensor, step: int) -> tuple[Tensor, None]:
        """Batch `step` of pieces of the train part, [size, context + 1], by windows()."""
        return windows(self.train, self.context + 1, size, seed=seed, step=step), None

    @property
    def test_size(self) -> int:
        """Characters to test on: all but the first, which nothing precedes."""
        return len(self.test) - 1

    def test_batches(self) -> Iterator[tuple[int, Tensor]]:
        """The test part in pieces of context + 1, the last of each the first of the next, then what
        is left: number of the first piece, pieces."""
        whole, size = self.test_size // self.context, max(1, (1 << 14) // self.context)
        for start in range(0, whole, size):
            end = min(start + size, whole)
            ids = self.test[start * self.context : end * self.context + 1]
            yield start, ids.unfold(0, self.context + 1, self.context)
        if self.test_size % self.context:
            yield whole, self.test[None, whole * self.context :]


def encode(vocab: str, string: str) -> Tensor:
    """Ids of a string, int64 [len]. Raises ValueError for a character that vocab has not."""
    index = {c: i for i, c in enumerate(vocab)}
    strange = sorted(set(string) - index.keys())
    if strange:
        raise ValueError(f"encode: characters must be in the vocabulary, got {strange}")
    return torch.tensor([index[c] for c in string], dtype=torch.int64)


def decode(vocab: str, ids: Tensor) -> str:
    """The string of ids [len]."""
    return "".join(vocab[i] for i in ids.tolist())


def read(path: str | Path, *, test_share: float = 0.1) -> Text:
    """A UTF-8 file as character ids; the last `test_share` of it is the test part.

    Raises ValueError for a file that is not UTF-8 or too short to split, OSError for a missing one.
    """
    try:
        string = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text: {path} must be UTF-8, byte {error.start} is not; convert it"
        ) from error
    split = len(string) - round(len(string) * test_share)
    if not 0 < split < len(string):
        raise ValueError(
            f"text: {path} must leave characters for train and test, got {len(string)} at "
            f"test_share={test_share}"
        )
    vocab = "".join(sorted(set(string)))
    codes = np.frombuffer(string.encode("utf-32-le"), np.uint32)
    known = np.frombuffer(vocab.encode("utf-32-le"), np.uint32)
    ids = torch.from_numpy(np.searchsorted(known, codes)).to(torch.int64)
    return Text(str(path), vocab, ids[:split], ids[split:])


def windows(ids: Tensor, length: int, batch_size: int, *, seed: int | Tensor, step: int) -> Tensor:
    """Batch `step` of pieces of a long sequence, at uniform places; pure, as batch_indices().

    Args: ids: [N]. length: of a piece, in [1, N]. Others as in batch_indices().
    Returns: [batch_size, length], of ids' dtype.
    """
    places = ids.numel() - length + 1
    if length < 1 or places < 1:
        raise ValueError(f"windows: length must lie in [1, {ids.numel()}], got {length}")
    u = noise.uniform((batch_size, 1), seed=noise.fold_in(noise.key(seed), step), device="cpu")
    start = (u.double() * places).ceil().long() - 1  # u is in (0, 1]
    return ids[start + torch.arange(length)]
