"""Where seeds come from, and what a wrong argument is told. A wrong direct call never crashes."""

from typing import Any

import pytest
import torch
from torch import Tensor

import gmkernels
from gmkernels import dispatch, noise

DRAWS = {"normal": gmkernels.normal, "uniform": gmkernels.uniform}
NAMESPACES = {"reference": "gmkernels_reference", **dispatch.NAMESPACES}


def test_manual_seed_rules(device: str) -> None:
    torch.manual_seed(3)
    first, second = (gmkernels.normal((2, 50), device=device) for _ in range(2))
    torch.manual_seed(3)
    again = gmkernels.normal((2, 50), device=device)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_compiled_calls_draw_anew(device: str) -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def draw() -> Tensor:
        return gmkernels.normal((2, 50), device=device)

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(first, draw())
    assert not torch.equal(first, second)


def test_generator(device: str) -> None:
    """It draws the seed, is advanced by that, and leaves the default generator alone."""
    torch.manual_seed(3)
    state = torch.get_rng_state()
    generator = torch.Generator(device).manual_seed(5)
    first, second = (gmkernels.normal(50, generator=generator, device=device) for _ in range(2))
    generator.manual_seed(5)
    assert torch.equal(first, gmkernels.normal(50, generator=generator, device=device))
    assert not torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())


def test_keys(device: str) -> None:
    assert noise.key(-7, 4).tolist() == [-7, 4]
    for seed in (torch.tensor(3), torch.tensor([3], dtype=torch.int32), noise.key(3)):
        made = noise.key(noise.key(seed.to(device), 2), 4)
        assert (made.tolist(), made.dtype, made.device.type) == ([3, 6], torch.int64, device)
    folds = {tuple(noise.fold_in(5, i).tolist()) for i in range(100)}
    assert len(folds) == 100
    assert noise.fold_in(noise.key(5, 9), 1).tolist()[1] == 9


def test_fold_in_compiles(device: str) -> None:
    torch._dynamo.reset()
    fold = torch.compile(noise.fold_in, fullgraph=True, backend="aot_eager")
    made = noise.key(6, 2).to(device)
    for index in (1, 2, 3, torch.tensor(2**40, device=device)):
        assert torch.equal(fold(made, index), noise.fold_in(made, index))


@pytest.mark.parametrize("name", DRAWS)
def test_opcheck(name: str, device: str, backends: list[str]) -> None:
    for backend in backends:
        operator = getattr(getattr(torch.ops, NAMESPACES[backend]), name).default
        for dtype in (torch.float32, torch.bfloat16):
            arguments = (noise.key(1, 2).to(device), 3, 5, 0, dtype, torch.device(device))
            torch.library.opcheck(operator, arguments)


SHAPE = (2, 3)
META = torch.tensor(1, device="meta")
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"seed": 1.0}, TypeError, "seed must be an int or an integer tensor, got float"),
    ({"seed": "1"}, TypeError, "seed must be an int or an integer tensor, got str"),
    ({"seed": True}, TypeError, "seed must be an int or an integer tensor, got bool"),
    ({"seed": 2**63}, ValueError, r"seed must lie in \[-2\^63, 2\^63\), got 9223372036854775808"),
    ({"seed": -(2**63) - 1}, ValueError, r"seed must lie in \[-2\^63, 2\^63\)"),
    ({"seed": torch.zeros(2)}, TypeError, "a seed tensor must hold integers, got torch.float32"),
    ({"seed": torch.tensor(True)}, TypeError, "a seed tensor must hold integers, got torch.bool"),
    ({"seed": torch.tensor([1, 2, 3])}, ValueError, r"one element, or be a key .*shape \(3,\)"),
    ({"seed": torch.ones(2, 1).long()}, ValueError, r"one element, or be a key .*shape \(2, 1\)"),
    ({"seed": META}, ValueError, "the seed is on meta, the inputs are on cpu"),
    ({"seed": 1, "offset": -1}, ValueError, "offset must .*got -1"),
    ({"seed": 1, "offset": 1.5}, TypeError, "offset must be an int, got float"),
    ({"seed": 1, "offset": True}, TypeError, "offset must be an int, got bool"),
    ({"seed": 1, "offset": torch.tensor(1)}, TypeError, "offset must be an int, got Tensor"),
    ({"seed": 1, "offset": 2**63}, ValueError, r"offset must .*2\^63"),
    ({"seed": 1, "stream": -1}, ValueError, r"stream must lie in \[0, 2\^32 - 1\), got -1"),
    ({"seed": 1, "stream": 2**32 - 1}, ValueError, "stream must lie in"),
    ({"seed": 1, "generator": torch.Generator()}, ValueError, "give seed or generator, not both"),
    (
        {"generator": torch.Generator(), "device": "meta"},
        ValueError,
        "the generator is on cpu, the inputs are on meta",
    ),
    ({"seed": 1, "dtype": torch.int32}, TypeError, "dtype must be float32, .* got torch.int32"),
    ({"seed": 1, "dtype": torch.complex64}, TypeError, "dtype must .* got torch.complex64"),
    ({"seed": 1, "dtype": torch.float8_e4m3fn}, TypeError, "dtype must .* got torch.float8_e4m3fn"),
    ({"seed": 1, "backend": "cuda"}, ValueError, "backend must be one of native, triton, ref"),
    ({"seed": 1, "shape": (-2, 3)}, ValueError, r"shape must be >= 0 .* got \(-2, 3\)"),
    ({"seed": 1, "shape": -1}, ValueError, r"shape must be >= 0 .* got \(-1,\)"),
    ({"seed": 1, "shape": (1, 2**34 + 1)}, ValueError, r"at most 2\^34 elements, got 17179869185"),
    (
        {"seed": 1, "dtype": torch.float64, "backend": "native"},
        RuntimeError,
        "'native' cannot run this call: float64 runs on the reference backend only",
    ),
]


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize(("wrong", "error", "message"), REFUSED)
def test_refusals(name: str, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"shape": SHAPE, "device": "cpu", **wrong}
    with pytest.raises(error, match=message):
        DRAWS[name](**call)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (-1, ValueError, "index must .*got -1"),
        (2**63, ValueError, r"index must .*2\^63"),
        (1.5, TypeError, "index must be an int .* got float"),
        (True, TypeError, "index must be an int .* got bool"),
        (torch.tensor(1.0), ValueError, "index must be an int or an integer tensor"),
        (torch.tensor([1, 2]), ValueError, "integer tensor with one element"),
    ],
)
def test_fold_in_refusals(index: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        noise.fold_in(noise.key(1), index)


def test_generator_under_compile() -> None:
    torch._dynamo.reset()
    generator = torch.Generator()
    with pytest.raises(Exception, match="generator"):
        torch.compile(lambda: gmkernels.normal(3, generator=generator), fullgraph=True)()


def test_unknown_backend_of_a_block() -> None:
    with pytest.raises(ValueError, match="name must be one of native, triton, reference"):
        gmkernels.use_backend("fast")


CPU = torch.device("cpu")
KEY = noise.key(1)
KEY_MESSAGE = "key must be a contiguous int64 tensor of two elements"
DIRECT: list[tuple[tuple[Any, ...], str]] = [
    ((KEY.float(), *SHAPE, 0, torch.float32, CPU), KEY_MESSAGE),
    ((KEY.int(), *SHAPE, 0, torch.float32, CPU), KEY_MESSAGE),
    ((torch.tensor(1), *SHAPE, 0, torch.float32, CPU), KEY_MESSAGE),
    ((torch.zeros(3).long(), *SHAPE, 0, torch.float32, CPU), KEY_MESSAGE),
    ((torch.arange(4)[::2], *SHAPE, 0, torch.float32, CPU), KEY_MESSAGE),
    ((torch.tensor([1, -1]), *SHAPE, 0, torch.float32, CPU), "offset must be >= 0, got -1"),
    ((KEY, -2, 3, 0, torch.float32, CPU), "rows and columns must be >= 0, got -2 and 3"),
    ((KEY, 2, -3, 0, torch.float32, CPU), "rows and columns must be >= 0, got 2 and -3"),
    ((KEY, *SHAPE, 0, torch.int64, CPU), "dtype must be float32, bfloat16 or float16"),
    ((KEY, *SHAPE, 0, torch.float64, CPU), "dtype must be float32, bfloat16 or float16"),
    ((KEY, *SHAPE, 0, torch.float32, torch.device("meta")), "runs on cpu and cuda"),
    (
        (KEY, 2**40, 2**10, 0, torch.float32, CPU),
        r"could not allocate an output of shape \(1099511627776, 1024\)",
    ),
]


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize(("arguments", "message"), DIRECT)
def test_direct_refusals(name: str, arguments: tuple[Any, ...], message: str) -> None:
    """torch.ops.gmkernels called by hand checks what memory safety needs."""
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.gmkernels, name).default(*arguments)


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("key", [KEY.float(), torch.tensor(1), torch.zeros(3).long()])
def test_direct_refusals_triton(name: str, key: Tensor, device: str, backends: list[str]) -> None:
    """A key of another shape or dtype would be read out of bounds."""
    if "triton" not in backends:
        pytest.skip(f"Triton does not run on {device}")
    where = torch.device(device)
    with pytest.raises(ValueError, match=KEY_MESSAGE):
        getattr(torch.ops.gmkernels_triton, name).default(
            key.to(where), *SHAPE, 0, torch.float32, where
        )
