"""The noise's bits: known answers, one result on every backend, object, thread count and cut."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import gmkernels
from gmkernels import dispatch, noise, registry
from gmkernels.ops.noise import reference
from gmkernels.spec import Case, Op

GOLDEN = json.loads((Path(__file__).parent / "golden_noise.json").read_text())
DRAWS = {"normal": gmkernels.normal, "uniform": gmkernels.uniform}
ROWS = [
    pytest.param(op, case, id=f"{op.name}-{case.name}")
    for op in registry.rows()
    if op.family == "noise"
    for case in op.cases
]
MASK = 0xFFFFFFFF
# Rows below, at and above a counter, a vector of counters, a block (512) and a chunk (8192).
SHAPES = [(1, 1), (3, 3), (5, 4), (4, 5), (3, 64), (2, 513), (2, 1000), (1, 8197)]
SEEDS = [(0, 0, 0), (-1, 7, 1), (2**63 - 1, 2**32 - 2, 2**32 - 2), (-(2**63), 2**40 + 3, 5)]


def same_bits(got: Tensor, expected: Tensor) -> bool:
    """Equal shape, dtype and bits: 0 and -0 differ, and a NaN would equal itself."""
    view = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.itemsize]
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    return torch.equal(got.cpu().view(view), expected.cpu().view(view))


@pytest.mark.parametrize("vector", GOLDEN["philox"])
def test_philox_known_answers(vector: dict[str, list[str]]) -> None:
    counter, key, words = ([int(x, 16) for x in vector[k]] for k in ("counter", "key", "words"))
    seed = key[0] | key[1] << 32
    host = dispatch.extension.philox(np.array([counter], np.uint32), seed)
    assert host.tolist() == [words]
    assert list(reference.philox(tuple(counter), seed)) == words
    signed = seed - 2**64 if seed >= 2**63 else seed
    tensors = reference.philox(tuple(map(torch.tensor, counter)), torch.tensor(signed))
    assert [int(w) for w in tensors] == words


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize(("seed", "offset", "stream"), SEEDS)
def test_counter_layout(name: str, seed: int, offset: int, stream: int, device: str) -> None:
    """Each element from its own counter, in Python integers, as the design defines it."""
    drawn = DRAWS[name]((3, 6), seed=seed, offset=offset, stream=stream, device=device)
    for b in range(3):
        row = offset + b
        for d in range(6):
            counter = (d // 4, row & MASK, row >> 32, stream)
            words = torch.tensor(reference.philox(counter, seed))
            values = reference.normal_from if name == "normal" else reference.uniform_from
            assert same_bits(drawn[b, d], values(words)[d % 4]), (b, d)


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("case", GOLDEN["draws"], ids=lambda case: f"seed{case['seed']}")
def test_golden(name: str, case: dict, device: str, backends: list[str], isas: list[str]) -> None:
    """Committed bits. A change here is a breaking change of the library."""
    arguments = {k: case[k] for k in ("seed", "offset", "stream")}
    for backend in backends:
        for isa in isas if backend == "native" else isas[:1]:
            with gmkernels.use_isa(isa):
                x = DRAWS[name](case["shape"], **arguments, device=device, backend=backend).cpu()
            found = [f"{b & MASK:08x}" for b in x.view(torch.int32).flatten()[:8].tolist()]
            digest = hashlib.sha256(x.numpy().astype("<f4").tobytes()).hexdigest()
            assert (found, digest) == (case[name], case[f"{name}_sha256"]), (backend, isa)


@pytest.mark.parametrize("case", GOLDEN["fold_in"])
def test_golden_folds(case: dict, device: str) -> None:
    made = noise.key(case["seed"], case["offset"]).to(device)
    for index in (case["index"], torch.tensor(case["index"], device=device)):
        assert noise.fold_in(made, index).tolist() == case["key"]


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_backends_agree(
    name: str, shape: tuple[int, int], device: str, backends: list[str], isas: list[str]
) -> None:
    for seed, offset, stream in SEEDS:
        call = {"seed": seed, "offset": offset, "stream": stream}
        expected = DRAWS[name](shape, **call, backend="reference")
        for backend in backends:
            drawn = DRAWS[name](shape, **call, device=device, backend=backend)
            assert same_bits(drawn, expected), (call, backend)
        for isa in isas:
            with gmkernels.use_isa(isa):
                drawn = DRAWS[name](shape, **call, backend="native")
                host = getattr(dispatch.extension, name)(seed, offset, stream, *shape)
            assert same_bits(drawn, expected), (call, isa)
            assert same_bits(torch.from_numpy(host), expected), (call, isa)


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("shape", [(70_001, 3), (3, 50_001), (1, 100_000)])
def test_threads_agree(name: str, shape: tuple[int, int]) -> None:
    before = torch.get_num_threads()
    try:
        drawn = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            drawn.append(DRAWS[name](shape, seed=11, backend="native"))
    finally:
        torch.set_num_threads(before)
    expected = DRAWS[name](shape, seed=11, backend="reference")
    assert all(same_bits(x, expected) for x in drawn)


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("columns", [1, 3, 4, 5, 64, 1000])
def test_batch_splits_agree(name: str, columns: int, device: str, backends: list[str]) -> None:
    """Rank r of a data-parallel run draws its rows of the whole, across the 32-bit boundary too."""
    for start in (0, 2**32 - 3):
        whole = DRAWS[name]((7, columns), seed=5, offset=start, backend="reference")
        for backend in backends:
            parts, row = [], 0
            for rows in (1, 2, 0, 4):
                part = {"device": device, "backend": backend}
                parts.append(DRAWS[name]((rows, columns), seed=5, offset=start + row, **part))
                row += rows
            assert same_bits(torch.cat(parts), whole), backend
            from_key = noise.key(noise.key(5, start), 3)
            drawn = DRAWS[name]((4, columns), seed=from_key, device=device, backend=backend)
            assert same_bits(drawn, whole[3:]), backend


@pytest.mark.parametrize("name", DRAWS)
def test_shapes_are_rows(name: str, device: str) -> None:
    draw = DRAWS[name]
    whole = draw((4, 30), seed=2, device=device)
    assert same_bits(draw((4, 5, 3, 2), seed=2, device=device), whole.view(4, 5, 3, 2))
    assert same_bits(draw(30, seed=2, device=device), whole[0])
    assert same_bits(draw((30,), seed=2, device=device), whole[0])
    assert same_bits(draw((), seed=2, device=device), whole[0, 0])
    assert draw((0, 3), seed=2, device=device).shape == (0, 3)
    assert draw((3, 0, 2), seed=2, device=device).shape == (3, 0, 2)
    assert draw(0, seed=2, device=device).shape == (0,)


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_hold_the_float32_value(
    name: str, dtype: torch.dtype, device: str, backends: list[str], isas: list[str]
) -> None:
    for shape in ((3, 37), (1, 20_000)):
        expected = DRAWS[name](shape, seed=13, backend="reference").to(dtype)
        for backend in ["reference"] if dtype == torch.float64 else backends:
            drawn = DRAWS[name](shape, seed=13, dtype=dtype, device=device, backend=backend)
            assert same_bits(drawn, expected), backend
        for isa in [] if dtype == torch.float64 else isas:
            with gmkernels.use_isa(isa):
                assert same_bits(DRAWS[name](shape, seed=13, dtype=dtype), expected), isa


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("op", "case"), ROWS)
def test_rows(op: Op, case: Case, dtype: torch.dtype, device: str) -> None:
    """Every case of the family's rows has the reference's bits on every backend that takes it."""
    given = op.inputs(case, dtype, device, 3)
    expected = op.function(*given.args, **given.kwargs, backend="reference")
    is_wide = expected.dtype == torch.float64
    for backend in dispatch.BACKENDS:
        if dispatch.why_not(op.name, backend, expected.device.type, is_wide) is None:
            drawn = op.function(*given.args, **given.kwargs, backend=backend)
            assert same_bits(drawn, expected), backend
            assert drawn.device == expected.device


def test_a_key_may_be_a_view(device: str, backends: list[str]) -> None:
    """Keys kept as the columns of a table are strided; the draw is the same."""
    table = torch.stack([noise.key(3, 1), noise.key(4, 2)], dim=1).to(device)
    expected = gmkernels.normal((2, 5), seed=4, offset=2, backend="reference")
    for backend in backends:
        drawn = gmkernels.normal((2, 5), seed=table[:, 1], device=device, backend=backend)
        assert same_bits(drawn, expected), backend


def _two_draws(seed: noise.Seed, device: str, backend: str | None = None) -> tuple[Tensor, Tensor]:
    call = {"seed": seed, "device": device, "backend": backend}
    return gmkernels.normal((3, 37), **call), gmkernels.uniform((5, 4), offset=2, stream=1, **call)


def _seeds(device: str) -> list[noise.Seed]:
    tensors = [torch.tensor(7), torch.tensor([-8]), noise.key(9, 2**33)]
    return [3, 4, -5, 2**62 + 1, *(x.to(device) for x in tensors)]


def test_eager_and_compiled_agree(device: str, backends: list[str]) -> None:
    """An int that changes from call to call becomes symbolic; tensors are graph inputs."""
    for backend in (None, *backends):
        torch._dynamo.reset()
        compiled = torch.compile(_two_draws, fullgraph=True, backend="aot_eager")
        for seed in _seeds(device):
            expected = _two_draws(seed, device, "reference")
            for got, want in zip(compiled(seed, device, backend), expected, strict=True):
                assert same_bits(got, want), (backend, seed)


def test_eager_and_inductor_agree(device: str) -> None:
    """Inductor may fuse what is around the draw, never what is inside."""
    torch._dynamo.reset()

    def step(x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        n = gmkernels.normal((4, 33), seed=noise.fold_in(seed, 2), offset=1, device=device)
        return n, x * 2 + n

    x, seed = torch.ones(4, 33, device=device), noise.key(21, 4)
    compiled = torch.compile(step, fullgraph=True)
    for got, want in zip(compiled(x, seed), step(x, seed), strict=True):
        assert same_bits(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_past_the_caches_have_the_same_bits(dtype, isas):
    """8 MiB and more are streamed to memory; rows that start off a vector's boundary, too."""
    rows, columns = 5, 1_048_577
    for isa in isas:
        with dispatch.use_isa(isa):
            whole = gmkernels.normal((rows, columns), seed=3, dtype=dtype, backend="native")
            for b in range(rows):
                row = gmkernels.normal((1, columns), seed=3, offset=b, dtype=dtype)
                assert torch.equal(whole[b : b + 1], row), isa
