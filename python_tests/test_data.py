"""Data: what is read is what was written, what is wrong is told, batches are pure functions."""

import gzip
import math
import struct

import pytest
import torch

from gmkernels import data, noise, text_data, toys


def idx_bytes(x, kind=8):
    header = bytes((0, 0, kind, x.dim())) + struct.pack(f">{x.dim()}I", *x.shape)
    return header + x.to(torch.uint8).numpy().tobytes()


def write_folder(folder, n=12, n_test=5, height=3, width=4, dot="-", pack=lambda raw: raw, gz=""):
    made = {}
    for split, count in (("train", n), ("t10k", n_test)):
        x = torch.arange(count * height * width).view(count, height, width) % 256
        y = torch.arange(count) % 10
        (folder / f"{split}-images{dot}idx3-ubyte{gz}").write_bytes(pack(idx_bytes(x)))
        (folder / f"{split}-labels{dot}idx1-ubyte{gz}").write_bytes(pack(idx_bytes(y)))
        made[split] = (x, y)
    return made


def test_digits():
    found = data.digits()
    assert found.train.shape == (1000, 64)
    assert found.test.shape == (447, 64)
    assert found.train.dtype == found.train_labels.dtype == torch.int64
    assert (found.train.min(), found.train.max(), found.levels) == (0, 16, 17)
    assert found.unit(found.train).max() == 1.0
    assert not (found.test[:, None] == found.train[None]).all(-1).any(), "a test image is in train"


@pytest.mark.parametrize(
    ("dot", "pack", "gz"), [("-", bytes, ""), (".", bytes, ""), ("-", gzip.compress, ".gz")]
)
def test_idx_reads_what_was_written(tmp_path, dot, pack, gz):
    made = write_folder(tmp_path, dot=dot, pack=pack, gz=gz)
    for source in (f"idx:{tmp_path}", str(tmp_path)):
        found = data.load(source)
        assert (found.height, found.width, found.levels) == (3, 4, 256)
        assert torch.equal(found.train, made["train"][0].flatten(1).to(torch.uint8))
        assert torch.equal(found.test, made["t10k"][0].flatten(1).to(torch.uint8))
        assert torch.equal(found.train_labels, made["train"][1])


def test_idx_without_labels(tmp_path):
    write_folder(tmp_path)
    for path in tmp_path.glob("*labels*"):
        path.unlink()
    found = data.idx(tmp_path)
    assert found.train_labels is None
    assert found.test_labels is None


WHOLE = idx_bytes(torch.zeros(12, 3, 4))
BROKEN = {
    "empty": (b"", "must start with the bytes 0 0, got none"),
    "html": (b"<html>", "must start with the bytes 0 0, got 3c 68 74 6d"),
    "type": (idx_bytes(torch.zeros(12, 3, 4), kind=13), "unsigned bytes .* got type 13 in 3"),
    "header": (WHOLE[:9], "ends inside its header, after 9 bytes of 16"),
    "truncated": (WHOLE[:-1], r"must hold 144 bytes after its header for \(12, 3, 4\), got 143"),
    "too long": (WHOLE + b"\0", "got 145; it is truncated or damaged, fetch it again"),
    "huge header": (
        b"\0\0\x08\3" + b"\xff" * 12,
        r"must hold 79228162458924105385300197375 bytes .* got 0",
    ),
    "gzip": (gzip.compress(WHOLE)[:-9], "is a damaged gzip file"),
    "gzip bits": (gzip.compress(WHOLE)[:20] + b"\xff" * 30, "is a damaged gzip file"),
    "labels as images": (idx_bytes(torch.zeros(12)), r"must hold images \(N, height, width\)"),
    "no images": (idx_bytes(torch.zeros(0, 3, 4)), r"must hold images .* got \(0, 3, 4\)"),
    "size": (idx_bytes(torch.zeros(12, 4, 4)), r"must have one size, got \(4, 4\) and \(3, 4\)"),
    "count": (idx_bytes(torch.zeros(11, 3, 4)), "one label for each of the 11 images"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_idx_refuses(tmp_path, name):
    raw, message = BROKEN[name]
    write_folder(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(raw)
    with pytest.raises(ValueError, match=message) as caught:
        data.idx(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a folder of IDX files"):
        data.load(f"idx:{tmp_path / 'none'}")
    with pytest.raises(FileNotFoundError, match="must hold train-images-idx3-ubyte"):
        data.load(str(tmp_path))
    with pytest.raises(
        ValueError, match="must be digits, moons, ring, text:FILE, idx:FOLDER or a folder"
    ):
        data.load("cifar")


def test_text_round_trip(tmp_path):
    path = tmp_path / "a.txt"
    string = "the cat sät 𝄞\n" * 20
    path.write_text(string, encoding="utf-8")
    found = data.load(f"text:{path}")
    assert found.vocab == "".join(sorted(set(string)))
    assert text_data.decode(found.vocab, torch.cat([found.train, found.test])) == string
    assert len(found.test) == round(len(string) * 0.1)
    assert torch.equal(text_data.encode(found.vocab, "cat"), found.train[4:7])
    with pytest.raises(ValueError, match=r"must be in the vocabulary, got \['!', '\?'\]"):
        text_data.encode(found.vocab, "cat?!")


@pytest.mark.parametrize(
    ("raw", "message"),
    [(b"", "must leave characters"), (b"a", "got 1 at"), (b"ab\xff", "must be UTF-8, byte 2")],
)
def test_text_refuses(tmp_path, raw, message):
    path = tmp_path / "a.txt"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        data.load(f"text:{path}")


@pytest.mark.parametrize(("n", "size"), [(10, 3), (12, 4), (7, 7), (1, 1)])
def test_batches_are_epochs(n, size):
    """Each epoch holds distinct examples; the order is that of the seed, of no call before."""
    steps = n // size
    epochs = []
    for epoch in range(6):
        took = [data.batch_indices(n, size, seed=3, step=epoch * steps + s) for s in range(steps)]
        whole = torch.cat(took)
        assert len(set(whole.tolist())) == steps * size
        assert whole.min() >= 0
        assert whole.max() < n
        epochs.append(tuple(whole.tolist()))
    assert n == 1 or len(set(epochs)) > 1
    data._epoch_order.cache_clear()
    again = data.batch_indices(n, size, seed=noise.key(3), step=5 * steps)
    assert tuple(again.tolist()) == epochs[5][:size]


def test_batches_cover_evenly():
    n, size = 50, 7
    counts = torch.zeros(n)
    for step in range(7 * 200):
        counts[data.batch_indices(n, size, seed=0, step=step)] += 1
    expected = 7 * 200 * size / n
    assert (counts - expected).abs().max() < 5 * math.sqrt(200 * 0.98 * 0.02)


@pytest.mark.parametrize("size", [0, 11])
def test_batches_refuse(size):
    with pytest.raises(ValueError, match=r"batch_size must lie in \[1, 10\]"):
        data.batch_indices(10, size, seed=0, step=0)


def test_windows():
    ids = torch.arange(9)
    starts = torch.cat([text_data.windows(ids, 4, 50, seed=0, step=s)[:, 0] for s in range(4)])
    assert set(starts.tolist()) == set(range(6))
    x = text_data.windows(ids, 4, 5, seed=1, step=2)
    assert torch.equal(x - x[:, :1], torch.arange(4).expand(5, 4))
    assert torch.equal(x, text_data.windows(ids, 4, 5, seed=1, step=2))
    assert torch.equal(text_data.windows(ids, 9, 2, seed=0, step=0), ids.expand(2, 9))
    for length in (0, 10):
        with pytest.raises(ValueError, match=r"length must lie in \[1, 9\]"):
            text_data.windows(ids, length, 1, seed=0, step=0)


@pytest.mark.parametrize("name", toys.TOYS)
def test_toys_are_functions_of_seed_and_row(name):
    x = toys.TOYS[name](1000, seed=5)
    assert x.shape == (1000, 2)
    assert x.dtype == torch.float32
    assert x.isfinite().all()
    assert torch.equal(x[:10], toys.TOYS[name](10, seed=5))
    assert torch.equal(x[10:20], toys.TOYS[name](10, seed=noise.key(5, 10)))
    assert not torch.equal(x, toys.TOYS[name](1000, seed=6))


def test_ring_and_grid_modes():
    modes = toys.ring_modes(8, 2.0)
    torch.testing.assert_close(modes.norm(dim=1), torch.full((8,), 2.0))
    gaps = (modes - modes.roll(1, 0)).norm(dim=1)
    torch.testing.assert_close(gaps, torch.full((8,), 4 * math.sin(math.pi / 8)))
    assert len(set(map(tuple, toys.grid_modes(5).tolist()))) == 25
    torch.testing.assert_close(toys.grid_modes(4).mean(0), torch.zeros(2))
    for centres, x in (
        (modes, toys.ring(4000, seed=0)),
        (toys.grid_modes(), toys.grid(4000, seed=0)),
    ):
        gap, nearest = torch.cdist(x, centres).min(1)
        assert gap.max() < 0.6
        share = nearest.bincount(minlength=len(centres)) / 4000 * len(centres)
        assert (share - 1).abs().max() < 0.5


def test_checkerboard_fills_half_the_squares():
    x = toys.checkerboard(8000, seed=0)
    assert x.abs().max() <= 2
    cell = (x + 2).clamp(max=3.999).floor().long()
    counts = torch.zeros(4, 4).index_put_(
        (cell[:, 0], cell[:, 1]), torch.ones(8000), accumulate=True
    )
    even = (torch.arange(4)[:, None] + torch.arange(4)) % 2 == 0
    assert counts[~even].sum() <= 8  # a point on an edge may round into the next square
    assert (counts[even] - 1000).abs().max() < 150
