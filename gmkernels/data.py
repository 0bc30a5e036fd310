"""Real input: digits, moons, a ring, IDX files, text; batches that depend on (seed, step) alone.

What load() gives has kind and one ("images", "image"), batch() of the train part, test_batches()
and test_size of the test part, and height, width, levels and vocab, which a run's config keeps.

Nothing is downloaded. Files that are missing, truncated or of another kind raise ValueError or
FileNotFoundError, which say what must hold, what came and what to do.
"""

import functools
import gzip
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gmkernels import noise, text_data, toys
from gmkernels.text_data import Text


class _Rows:
    """Examples that are rows of `train` and `test`, with labels or without."""

    vocab = ""
    train: Tensor
    test: Tensor
    train_labels: Tensor | None

    def batch(self, size: int, *, seed: int | Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """Batch `step` of the train part by batch_indices(), and its labels where there are."""
        index = batch_indices(len(self.train), size, seed=seed, step=step)
        labels = None if self.train_labels is None else self.train_labels[index]
        return self.train[index], labels

    @property
    def test_size(self) -> int:
        """Rows to test on."""
        return len(self.test)

    def test_batches(self) -> Iterator[tuple[int, Tensor]]:
        """Where each batch of the test part begins, and its rows."""
        for start in range(0, len(self.test), 500):
            yield start, self.test[start : start + 500]


@dataclass(frozen=True)
class Images(_Rows):
    """Grey images, split into train and test, one flat row an image.

    Attributes:
        name: where they came from.
        train, test: [N, height * width] integers in [0, levels); int64 for digits, uint8 for IDX.
        train_labels, test_labels: int64 [N]; None where the folder has no label files.
        height, width: pixels; row-major in a flat row.
        levels: number of grey levels.
    """

    kind, one = "images", "image"
    name: str
    train: Tensor
    test: Tensor
    train_labels: Tensor | None
    test_labels: Tensor | None
    height: int
    width: int
    levels: int

    def unit(self, x: Tensor) -> Tensor:
        """Levels as float32 in [0, 1]: x / (levels - 1)."""
        return x.to(torch.float32) / (self.levels - 1)


@dataclass(frozen=True)
class Points(_Rows):
    """Points of the plane, split into train and test; in a config one row of pixels, no levels.

    Attributes:
        name: what they are.
        train, test: float32 [N, 2].
        train_labels, test_labels: int64 [N].
    """

    kind, one = "points", "point"
    name: str
    train: Tensor
    test: Tensor
    train_labels: Tensor
    test_labels: Tensor
    height: int = 1
    width: int = 2
    levels: int = 0

    def unit(self, x: Tensor) -> Tensor:
        """x: points are taken as they are."""
        return x


def moons() -> Points:
    """Scikit-learn's two moons with noise 0.1: 20,000 points to train on, 10,000 to test.

    Their entropy is 1.0076 nats. Raises ImportError without scikit-learn.
    """
    try:
        from sklearn.datasets import make_moons
    except ImportError as error:
        raise ImportError("moons: needs scikit-learn; pip install scikit-learn") from error
    x, y = make_moons(30_000, noise=0.1, random_state=0)
    points, labels = torch.from_numpy(x).float(), torch.from_numpy(y)
    return Points("moons", points[:20_000], points[20_000:], labels[:20_000], labels[20_000:])


def ring() -> Points:
    """Eight Gaussians, sd 0.02, on a circle of radius 2: 20,000 points to train on, 10,000 to test.

    A label is the number of its Gaussian. Their entropy is -2.9067 nats.
    """
    x = toys.ring(30_000, seed=0, std=0.02)
    y = torch.cdist(x, toys.ring_modes()).argmin(1)
    return Points("ring", x[:20_000], x[20_000:], y[:20_000], y[20_000:])


def digits() -> Images:
    """Scikit-learn's bundled digits: 8 x 8 pixels, levels 0 to 16, first 1000 train, last 447 test.

    The 350 between them are left for choices that must not see the test images. Source: Alpaydin
    and Kaynak 1998 (UCI). Raises ImportError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits: needs scikit-learn; pip install scikit-learn") from error
    bunch = load_digits()
    x = torch.from_numpy(bunch.data).to(torch.int64)  # [1797, 64]
    y = torch.from_numpy(bunch.target).to(torch.int64)
    return Images("digits", x[:1000], x[-447:], y[:1000], y[-447:], 8, 8, 17)


def read_idx(path: str | Path) -> Tensor:
    """Reads one IDX file of bytes, plain or gzipped (told by its content, not by its name).

    Layout: 0, 0, 8 (unsigned byte), number of dimensions, each size as a big-endian uint32, bytes.
    Returns: uint8, of the shape in the header. Raises: ValueError, OSError.
    """
    raw = Path(path).read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(
                f"read_idx: {path} is a damaged gzip file ({error}); fetch it again"
            ) from error
    if len(raw) < 4 or raw[:2] != b"\0\0":
        raise ValueError(
            f"read_idx: {path} must start with the bytes 0 0, got {raw[:4].hex(' ') or 'none'}; it "
            "is not an IDX file"
        )
    if raw[2] != 8 or raw[3] == 0:
        raise ValueError(
            f"read_idx: {path} must hold unsigned bytes (type 8) in one dimension or more, got "
            f"type {raw[2]} in {raw[3]}; convert it"
        )
    start = 4 + 4 * raw[3]
    if len(raw) < start:
        raise ValueError(
            f"read_idx: {path} ends inside its header, after {len(raw)} bytes of {start}"
        )
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", raw[3], 4))
    if len(raw) - start != math.prod(shape):
        raise ValueError(
            f"read_idx: {path} must hold {math.prod(shape)} bytes after its header for {shape}, "
            f"got {len(raw) - start}; it is truncated or damaged, fetch it again"
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy())


def _find_idx(folder: Path, split: str, what: str) -> Path | None:
    dims = 3 if what == "images" else 1
    names = [f"{split}-{what}{dot}idx{dims}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_split(folder: Path, split: str) -> tuple[Tensor, Tensor | None]:
    path = _find_idx(folder, split, "images")
    if path is None:
        raise FileNotFoundError(
            f"idx: {folder} must hold {split}-images-idx3-ubyte or {split}-images-idx3-ubyte.gz; "
            "put the files of MNIST or Fashion-MNIST there"
        )
    x = read_idx(path)
    if x.dim() != 3 or x.numel() == 0:
        raise ValueError(f"idx: {path} must hold images (N, height, width), got {tuple(x.shape)}")
    label_path = _find_idx(folder, split, "labels")
    if label_path is None:
        return x, None
    y = read_idx(label_path)
    if y.shape != x.shape[:1]:
        raise ValueError(
            f"idx: {label_path} must hold one label for each of the {len(x)} images, "
            f"got shape {tuple(y.shape)}"
        )
    return x, y.to(torch.int64)


def idx(folder: str | Path) -> Images:
    """Images of a folder in MNIST's layout: train and t10k images, and labels where there are any.

    Names as published (train-images-idx3-ubyte, t10k-labels-idx1-ubyte, ...), plain or .gz, also
    with a dot before idx. Levels 0 to 255, kept as uint8. Raises: ValueError, OSError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"idx: {folder} must be a folder of IDX files; there is none")
    x, y = _read_split(folder, "train")
    x_test, y_test = _read_split(folder, "t10k")
    if x.shape[1:] != x_test.shape[1:]:
        raise ValueError(
            f"idx: train and t10k images in {folder} must have one size, got "
            f"{tuple(x.shape[1:])} and {tuple(x_test.shape[1:])}"
        )
    height, width = x.shape[1:]
    return Images(str(folder), x.flatten(1), x_test.flatten(1), y, y_test, height, width, 256)


Data = Images | Points | Text


def load(source: str) -> Data:
    """Data by name, as on the command line: "digits", "moons", "ring", "text:FILE", "idx:FOLDER",
    or a folder of IDX files."""
    named: dict[str, Callable[[], Images | Points]] = {
        "digits": digits,
        "moons": moons,
        "ring": ring,
    }
    if source in named:
        return named[source]()
    if source.startswith("text:"):
        return text_data.read(source.removeprefix("text:"))
    if source.startswith("idx:"):
        return idx(source.removeprefix("idx:"))
    if Path(source).is_dir():
        return idx(source)
    raise ValueError(
        f"data must be digits, moons, ring, text:FILE, idx:FOLDER or a folder of IDX files, got "
        f"{source!r}; there is no such folder"
    )


@functools.lru_cache(maxsize=4)
def _epoch_order(n: int, seed: int, offset: int, epoch: int) -> Tensor:
    u = noise.uniform((n,), seed=noise.fold_in(noise.key(seed, offset), epoch), device="cpu")
    return u.argsort(stable=True)


def batch_indices(n: int, batch_size: int, *, seed: int | Tensor, step: int) -> Tensor:
    """Which of n examples make up batch `step`: shuffled epochs, a pure function of its arguments.

    Epoch e sorts the examples by the noise of fold_in(seed, e) and cuts that order into
    n // batch_size batches; the rest sits the epoch out. There is no state: a resumed run calls it
    with the next step and goes on with the same batches, on any machine.

    Args:
        n: examples. batch_size: in [1, n]. seed: an int or a key. step: >= 0.
    Returns:
        int64 [batch_size], distinct, on the CPU.

    >>> from gmkernels import data
    >>> sorted(torch.cat([data.batch_indices(6, 3, seed=0, step=s) for s in (0, 1)]).tolist())
    [0, 1, 2, 3, 4, 5]
    """
    if not 1 <= batch_size <= n:
        raise ValueError(f"batch_indices: batch_size must lie in [1, {n}], got {batch_size}")
    epoch, place = divmod(step, n // batch_size)
    key_seed, key_offset = noise.key(seed).tolist()
    return _epoch_order(n, key_seed, key_offset, epoch)[place * batch_size :][:batch_size]
