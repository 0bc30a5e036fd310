"""Which backend runs a call: the table, the choice, and the words that explain it.

A backend is `native` (C++ on CPU, CUDA C++ on GPU), `triton` (GPU, or CPU under TRITON_INTERPRET=1)
or `reference` (plain PyTorch, any device and dtype). The table is filled once, at import; a backend
that cannot be loaded keeps its reason there. `backend=None` takes the first usable of ORDER; a
named backend runs or raises.
"""

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ORDER = {"cpu": ("native", "reference"), "cuda": ("native", "triton", "reference")}
OTHER_DEVICES = ("reference",)
BACKENDS = ("native", "triton", "reference")
NAMESPACES = {"native": "gmkernels", "triton": "gmkernels_triton"}


@dataclass(frozen=True)
class Kernel:
    """One op on one backend: its devices, and its registered forward and backward operators."""

    devices: tuple[str, ...]
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None


_TABLE: dict[str, dict[str, Kernel | str]] = {}
_forced: str | None = None
_observer: Callable[[str, str, bool, str | None], None] | None = None


def _load_extension() -> tuple[Any, str]:
    try:
        return importlib.import_module("gmkernels._C"), ""
    except ImportError as error:
        return None, f"the extension gmkernels._C is not built or does not load ({error})"


def _load_triton() -> tuple[Any, str]:
    try:
        return importlib.import_module("triton"), ""
    except ImportError as error:
        return None, f"Triton is not installed ({error})"


extension, _extension_reason = _load_extension()
triton, _triton_reason = _load_triton()
if extension is None:
    warnings.warn(
        f"gmkernels: {_extension_reason}; Triton or plain PyTorch run instead. "
        "To build it, install a C++ compiler and run `make` or "
        "`pip install --no-build-isolation .`",
        RuntimeWarning,
        stacklevel=3,
    )
if triton is None:
    warnings.warn(
        f"gmkernels: {_triton_reason}; C++ or plain PyTorch run instead. "
        "GPU kernels need it where this build has no CUDA: pip install triton",
        RuntimeWarning,
        stacklevel=3,
    )


def load_family(package: str, ops: tuple[str, ...]) -> None:
    """Fills the table for the ops of `package` from its modules native.py and triton_kernel.py.

    A module offers DEVICES, the device types of each of its ops. A missing module, extension or
    package becomes the reason that explain() gives.
    """
    sources = (
        ("native", "native", extension, _extension_reason),
        ("triton", "triton_kernel", triton, _triton_reason),
    )
    for backend, module_name, requirement, reason in sources:
        devices: dict[str, tuple[str, ...]] = {}
        if requirement is not None:
            devices = importlib.import_module(f"{package}.{module_name}").DEVICES
        namespace = getattr(torch.ops, NAMESPACES[backend])
        for op in ops:
            row = _TABLE.setdefault(op, {})
            if requirement is None:
                row[backend] = reason
            elif op not in devices:
                row[backend] = f"{op} has no {backend} kernel"
            else:
                forward = getattr(namespace, f"{op}_forward", None) or getattr(namespace, op)
                backward = getattr(namespace, f"{op}_backward", None)
                row[backend] = Kernel(
                    devices[op], forward.default, backward.default if backward else None
                )


def native_devices(*, cuda: bool) -> tuple[str, ...]:
    """Device types of a native op: the GPU only if this build has CUDA and the op a CUDA kernel."""
    return ("cpu", "cuda") if cuda and extension.build_info()["cuda_archs"] else ("cpu",)


def why_not(op: str, backend: str, device: str, wide: bool) -> str | None:
    """Why `backend` cannot run `op` on that device type (wide: a float64 input), or None."""
    if backend == "reference":
        return None
    kernel = _TABLE[op][backend]
    if isinstance(kernel, str):
        return kernel
    if device not in kernel.devices:
        hint = ""
        if backend == "triton" and device == "cpu":
            hint = "; set TRITON_INTERPRET=1 before Python starts to run it in Triton's interpreter"
        return f"it runs on {' and '.join(kernel.devices)}, the inputs are on {device}{hint}"
    if wide:
        return "float64 runs on the reference backend only"
    return None


def choose(op: str, device: str, wide: bool, backend: str | None) -> str:
    """The backend that runs a call of `op`; raises RuntimeError if a named one cannot."""
    if _observer is not None:
        _observer(op, device, wide, backend)
    name = backend or _forced
    if name is not None:
        if name not in BACKENDS:
            raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {name!r}")
        reason = why_not(op, name, device, wide)
        if reason is not None:
            raise RuntimeError(f"{op}: backend {name!r} cannot run this call: {reason}")
        return name
    for name in ORDER.get(device, OTHER_DEVICES):
        if why_not(op, name, device, wide) is None:
            return name
    raise AssertionError("the reference backend is always usable")


def find(op: str, backend: str) -> Kernel | str:
    """The kernels of an op on a backend, or the reason why there are none."""
    return _TABLE[op][backend]


def kernel(op: str, backend: str) -> Kernel:
    """The kernels of an op on a backend that choose() returned."""
    found = _TABLE[op][backend]
    assert isinstance(found, Kernel)
    return found


class use_backend:
    """Runs every op inside the block on one backend: `with gmkernels.use_backend("reference"):`.

    A call's own `backend=` wins over it. Raises ValueError for an unknown name; the call inside
    raises RuntimeError if that backend cannot run it. The choice is global to the process.
    """

    def __init__(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(
                f"use_backend: name must be one of {', '.join(BACKENDS)}, got {name!r}"
            )
        self.name = name
        self.previous: str | None = None

    def __enter__(self) -> None:
        global _forced
        self.previous = _forced
        _forced = self.name

    def __exit__(self, *exception: object) -> None:
        global _forced
        _forced = self.previous


class use_isa:
    """Forces the CPU objects of one instruction set for a block: "portable", "v3", "v4", "v4_bf16".

    The last is v4 and AVX512-BF16, which only products of bfloat16 use. For tests and benchmarks.
    Raises ValueError if this CPU or build lacks it.
    """

    def __init__(self, name: str) -> None:
        if extension is None:
            raise RuntimeError(f"use_isa: {_extension_reason}")
        self.name = name

    def __enter__(self) -> None:
        self.previous = extension.isa()
        extension.set_isa(self.name)

    def __exit__(self, *exception: object) -> None:
        extension.set_isa(self.previous)


class _Explained(Exception):
    def __init__(self, text: str) -> None:
        self.text = text


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Says which backend would run `function(*args, **kwargs)`, and why each other would not.

    Arguments are checked as in the call itself; nothing is computed.

    Returns:
        One line with the op, the device and the backend chosen, then one a backend with its reason.
    Raises:
        ValueError: the function is not an op; and whatever the call itself raises.

    >>> import torch, gmkernels
    >>> print(gmkernels.explain(gmkernels.normal, (2, 3), seed=0))  # doctest: +ELLIPSIS
    normal on cpu...
    """
    global _observer

    def observe(op: str, device: str, wide: bool, backend: str | None) -> None:
        order = ORDER.get(device, OTHER_DEVICES)
        wanted = backend or _forced
        lines, chosen = [], None
        for name in (*order, *(b for b in BACKENDS if b not in order)):
            reason = why_not(op, name, device, wide)
            if reason is None and wanted is not None and name != wanted:
                reason = f"backend {wanted!r} was asked for"
            if reason is None and chosen is None and (wanted or name in order):
                chosen, reason = name, "runs this call"
            elif reason is None and name not in order:
                reason = f"usable, but only when named on {device}"
            elif reason is None:
                reason = f"usable, but {chosen} comes first"
            lines.append(f"  {name}: {reason}")
        raise _Explained("\n".join([f"{op} on {device}: {chosen or 'no backend'}", *lines]))

    _observer = observe
    try:
        function(*args, **kwargs)
    except _Explained as explained:
        return explained.text
    finally:
        _observer = None
    raise ValueError(f"explain: {function!r} is not an op of gmkernels")


def define(namespace: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers `function` as the opaque operator namespace::name: Dynamo never looks inside.

    The schema follows from the annotations; `fake` gives empty outputs of the right shape and
    dtype.
    """
    name = f"{namespace}::{function.__name__}"
    torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(name, "CompositeExplicitAutograd", function)
    torch.library.register_fake(name, fake)


def reuse_memory() -> bool:
    """Makes large CPU tensors reuse memory instead of mapping and faulting it anew. Opt-in, glibc.

    Calls mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2^31 - 1): blocks of any size come
    from the heap and stay there, so that a 64 MB output costs no page faults the second time. The
    price: memory goes back to the system later. Process-wide, not undone.

    Returns:
        True where it took effect; elsewhere it warns and gives False.

    >>> import gmkernels
    >>> gmkernels.reuse_memory()  # doctest: +SKIP
    True
    """
    if extension is not None and extension.reuse_memory():
        return True
    warnings.warn(
        "reuse_memory: needs the native extension on glibc; it does nothing here",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def is_wide(*tensors: Tensor | None) -> bool:
    """Whether any of the tensors is float64."""
    for x in tensors:  # noqa: SIM110 - a plain loop: this is on the path of every call
        if x is not None and x.dtype is torch.float64:
            return True
    return False
