"""The noise's parts inside Triton: known answers, words by hand, sqrt, and tiles of any size.

Bit equality of whole draws is in test_noise.py, which runs every backend.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import gmkernels
from gmkernels.ops.noise import reference

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from gmkernels import triton_common  # noqa: E402
from gmkernels.ops.noise import triton_kernel  # noqa: E402

GOLDEN = json.loads((Path(__file__).parent / "golden_noise.json").read_text())
DEVICE = "cpu" if triton_common.INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="neither interpreter nor GPU"
)


@triton.jit
def philox_kernel(out_ptr, counter_ptr, key_ptr, N: tl.constexpr):
    # One program: N counters of four words, each with the key (key_ptr[0], key_ptr[1]).
    i = tl.arange(0, N)
    c0 = tl.load(counter_ptr + 4 * i).to(tl.uint32)
    c1 = tl.load(counter_ptr + 4 * i + 1).to(tl.uint32)
    c2 = tl.load(counter_ptr + 4 * i + 2).to(tl.uint32)
    c3 = tl.load(counter_ptr + 4 * i + 3).to(tl.uint32)
    k0 = tl.load(key_ptr).to(tl.uint32)
    k1 = tl.load(key_ptr + 1).to(tl.uint32)
    w0, w1, w2, w3 = triton_common.philox(c0, c1, c2, c3, k0, k1)
    tl.store(out_ptr + 4 * i, w0.to(tl.int64))
    tl.store(out_ptr + 4 * i + 1, w1.to(tl.int64))
    tl.store(out_ptr + 4 * i + 2, w2.to(tl.int64))
    tl.store(out_ptr + 4 * i + 3, w3.to(tl.int64))


@triton.jit
def normal_kernel(out_ptr, words_ptr, N: tl.constexpr):
    # One program a block of N pairs of words.
    i = tl.program_id(0) * N + tl.arange(0, N)
    w0 = tl.load(words_ptr + 2 * i).to(tl.uint32)
    w1 = tl.load(words_ptr + 2 * i + 1).to(tl.uint32)
    n0, n1 = triton_common.normal_pair(w0, w1)
    tl.store(out_ptr + 2 * i, n0)
    tl.store(out_ptr + 2 * i + 1, n1)


@triton.jit
def sqrt_kernel(out_ptr, x_ptr, N: tl.constexpr):
    # One program a block of N elements.
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out_ptr + i, triton_common.sqrt_ieee(tl.load(x_ptr + i)))


@pytest.mark.parametrize("vector", GOLDEN["philox"])
def test_philox_known_answers(vector: dict[str, list[str]]) -> None:
    counter, key, words = (
        torch.tensor([int(x, 16) for x in vector[k]], device=DEVICE)
        for k in ("counter", "key", "words")
    )
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    triton_common.launch(philox_kernel, (1,), out, counter, key, N=1)
    assert out.tolist() == words.tolist()


def crafted_words() -> Tensor:
    """Every pair of boundary words, then random ones: int64 [2^17, 2]."""
    edges = [0, 1, 2, 255, 256, 2**24 - 1, 2**24 + 1]
    edges += [k * 2**29 + d for k in range(1, 8) for d in (-129, -1, 0, 1, 129)]
    edges += [2**32 - 2**k for k in range(9)]
    grid = torch.cartesian_prod(torch.tensor(edges), torch.tensor(edges))
    generator = torch.Generator().manual_seed(0)
    rest = torch.randint(2**32, (2**17 - len(grid), 2), generator=generator)
    return torch.cat([grid, rest])


def test_normals_of_crafted_words() -> None:
    """Triton and every host object give the reference's bits at u = 1, the octants and the tail."""
    words = crafted_words()
    expected = reference.normal_from(words).view(torch.int32)
    out = torch.empty(words.shape, device=DEVICE)
    triton_common.launch(normal_kernel, (2**7,), out, words.to(DEVICE), N=2**10)
    assert torch.equal(out.cpu().view(torch.int32), expected)
    extension = gmkernels.dispatch.extension
    for isa in extension.available_isas():
        with gmkernels.use_isa(isa):
            host = extension.normal_from_words(words.numpy().astype(np.uint32))
        assert torch.equal(torch.from_numpy(host.view(np.int32)).view(-1, 2), expected), isa


def test_sqrt_is_correctly_rounded() -> None:
    """Every float32 in [1, 4), against the float64 detour that test_noise_numbers.py proves."""
    x = torch.arange(0x3F800000, 0x40800000, dtype=torch.int32, device=DEVICE).view(torch.float32)
    out = torch.empty_like(x)
    block = 2**18 if DEVICE == "cpu" else 2**10
    triton_common.launch(sqrt_kernel, (len(x) // block,), out, x, N=block)
    for part, root in zip(x.split(2**22), out.split(2**22), strict=True):
        assert torch.equal(root, part.double().sqrt().float())


@pytest.mark.parametrize(("tile", "busy"), [(8, 2048), (16, 1), (16, 3), (64, 2048)])
@pytest.mark.parametrize("draw", [gmkernels.normal, gmkernels.uniform])
def test_tiles_agree(draw, tile: int, busy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any tile, and any number of tiles a program, down the rows or along the columns."""
    monkeypatch.setattr(triton_common, "MAX_TILE", tile)
    monkeypatch.setattr(triton_kernel, "_BUSY", busy)
    for shape in ((3, 5), (1, 259), (2, 70), (37, 1), (21, 4)):
        call = {"seed": -3, "offset": 2**32 - 1, "stream": 9}
        drawn = draw(shape, **call, device=DEVICE, backend="triton")
        assert torch.equal(drawn.cpu(), draw(shape, **call, backend="reference")), shape
