"""Recorded launches of Triton kernels, compiled ahead of time for GPUs that are not there."""

import contextlib
import dataclasses
import unittest.mock
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import sides, static_asm
from gmkernels import dispatch
from gmkernels.spec import Benchmark, Op

_POINTEES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}
Target = tuple[str, int | str, int]  # backend, architecture, lanes of a warp


def has_kernel(op: Op) -> bool:
    """Whether the row has a Triton kernel."""
    return isinstance(dispatch._TABLE[op.operator]["triton"], dispatch.Kernel)


@contextlib.contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Lets backend="triton" accept CPU tensors inside the block: launches are recorded, not run."""
    table = dispatch._TABLE
    saved = {op: row.get("triton") for op, row in table.items()}
    try:
        for op, kernel in saved.items():
            if isinstance(kernel, dispatch.Kernel):
                table[op]["triton"] = dataclasses.replace(kernel, devices=("cpu",))
        yield
    finally:
        for op, kernel in saved.items():
            if kernel is not None:
                table[op]["triton"] = kernel


@contextlib.contextmanager
def zeros_for_noise() -> Iterator[None]:
    """torch.randn gives zeros inside the block: drawing took a fifth of the report's time."""

    def zeros(*size: Any, generator: torch.Generator | None = None, **options: Any) -> Tensor:
        return torch.zeros(*size, **options)

    with unittest.mock.patch.object(torch, "randn", zeros):
        yield


def calls(op: Op) -> list[Benchmark]:
    """The distinct calls of a row: its benchmarks, and one in each dtype that has a ceiling."""
    found = list(op.benchmarks)
    for name in op.instructions:
        dtype = getattr(torch, name)
        if all(b.dtype != dtype for b in found):
            found.append(dataclasses.replace(found[0], dtype=dtype, backward=False))
    return list({(b.case.name, b.dtype, b.backward): b for b in found}.values())


def record(op: Op, benchmark: Benchmark) -> tuple[list[Any], list[Any]]:
    """The launches of one call: of its forward, and of its backward if it has one."""
    from gmkernels import triton_common

    with triton_on_cpu(), zeros_for_noise():
        given = op.inputs(benchmark.case, benchmark.dtype, "cpu", sides.SEED)
        given = sides.prepare(sides.with_seed(op, given), benchmark.backward)
        with triton_common.recorded() as forward:
            outputs = op.function(*given.args, **given.kwargs, backend="triton")
        outputs = sides.as_tuple(outputs)
        with triton_common.recorded() as backward:
            if benchmark.backward:
                weights = sides.cotangents(outputs)
                torch.autograd.grad(outputs, sides.differentiated(given), weights)
    return forward, backward


def signature(launch: Any) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Argument types, constants and divisibility, as Triton specialises a launch."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.constants
    for i, (parameter, name) in enumerate(
        zip(launch.kernel.params, launch.kernel.arg_names, strict=True)
    ):
        value = values[name]
        specialised = isinstance(value, int) and not parameter.do_not_specialize
        fixed = parameter.is_constexpr or value is None or isinstance(value, bool)
        if fixed or (specialised and value == 1):
            types[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            types[name], divisible = "*" + _POINTEES[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = specialised and value % 16 == 0
        else:
            types[name], divisible = "fp32", False
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def identity(launch: Any) -> str:
    """Equal for launches that Triton compiles once."""
    return repr((launch.kernel.fn, signature(launch), launch.num_warps))


def dtypes(launch: Any) -> str:
    """Equal for launches of a kernel on tensors of the same dtypes."""
    found = [a.dtype for a in launch.args if isinstance(a, torch.Tensor)]
    return repr((launch.kernel.fn, found))


def compile_launch(launch: Any, target: Target, code: bool) -> static_asm.Kernel:
    """A recorded launch, compiled; `code` as of read_cubin. Not under TRITON_INTERPRET=1."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    compiled = triton.compile(
        ASTSource(launch.kernel, *signature(launch)),
        target=GPUTarget(*target),
        options={"num_warps": launch.num_warps, "enable_fp_fusion": False},
    )
    if target[0] == "hip":
        return static_asm.parse_amdgcn(compiled.asm["amdgcn"])
    return static_asm.read_cubin_bytes(compiled.asm["cubin"], code)[0]


def elements_a_trip(launch: Any, kernel: static_asm.Kernel, lanes: int) -> float:
    """Elements that a thread makes in the hot body: its share of the tile, times the unrolling."""
    tile = launch.constants.get("R", 1) * launch.constants.get("C", 1)
    share = tile / (lanes * launch.num_warps)
    if not kernel.loops:
        return share
    tensors = big_tensors(launch)
    expected = share * sum(t.element_size() for t in tensors)
    moved = sum(kernel.widths("load") + kernel.widths("store")) / 8
    return share * max(1, int(moved / expected + 0.01))


def big_tensors(launch: Any) -> list[torch.Tensor]:
    """The distinct tensors of the launch that have an entry for every element."""
    found = {t.data_ptr(): t for t in launch.args if isinstance(t, torch.Tensor) and t.numel()}
    largest = max(t.numel() for t in found.values())
    return [t for t in found.values() if t.numel() == largest]


def bytes_an_element(launch: Any) -> float:
    """Bytes of all tensors of the launch, each once, over the elements of the largest."""
    tensors = {t.data_ptr(): t for t in launch.args if isinstance(t, torch.Tensor)}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    return size / max(t.numel() for t in tensors.values())
