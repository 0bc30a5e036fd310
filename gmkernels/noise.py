"""Counter-based noise: the same bits on every backend, device, thread count and batch split.

A number is a pure function of (seed, row, position in the row). Philox4x32-10 is keyed by the seed;
its counter is (d // 4, row low, row high, stream), its word d % 4. A tensor is rows along dimension
0 (a 0-d or 1-D tensor is one row), d the flat logical index within the row, row = offset + b. See
ops/noise/reference.py for the formulas.

A key is an int64 tensor (seed, offset); it is accepted wherever a seed is.
"""

import array
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level

from gmkernels import dispatch
from gmkernels.ops.noise import reference

_FOLD_STREAM = 0xFFFFFFFF
_MASK = 0xFFFFFFFF
_HALF = 1 << 63
Seed = int | Tensor | None


def _pair(seed: int, offset: int) -> Tensor:
    # Of a call's 13 us torch.tensor takes 2.8, reading a buffer 0.9; tracing needs the first.
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return torch.tensor((seed, offset), dtype=torch.int64, device="cpu")
    return torch.frombuffer(array.array("q", (seed, offset)), dtype=torch.int64)


def _is_readable(seed: Tensor) -> bool:
    # Outside of tracing, modes and transforms the host makes the pair: 1.5 us in place of 6.5.
    return (
        type(seed) is Tensor
        and seed.dtype is torch.int64
        and seed.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and maybe_current_level() is None
    )


def key(seed: int | Tensor, offset: int = 0) -> Tensor:
    """Makes a key: the int64 tensor (seed, offset).

    Args:
        seed: an int in [-2^63, 2^63), an integer tensor with one element, or a key, whose offset is
            then advanced by `offset`.
        offset: rows to skip, an int >= 0. Rank r of a data-parallel run passes r * local batch.
    Returns:
        int64 [2], on the CPU for an int, else on the seed's device.
    Raises:
        TypeError, ValueError: a seed or an offset of another kind or range.

    >>> import gmkernels
    >>> gmkernels.noise.key(7, offset=2)
    tensor([7, 2])
    """
    if type(seed) is int and type(offset) is int and -_HALF <= seed < _HALF and 0 <= offset < _HALF:
        return _pair(seed, offset)
    if isinstance(offset, bool) or not isinstance(offset, (int, torch.SymInt)):
        raise TypeError(f"key: offset must be an int, got {type(offset).__name__}")
    if offset < 0 or offset >= _HALF:
        bound = ">= 0" if offset < 0 else "below 2^63"
        raise ValueError(f"key: offset must be {bound}, got {offset}")
    if isinstance(seed, Tensor):
        if seed.is_floating_point() or seed.is_complex() or seed.dtype == torch.bool:
            raise TypeError(f"key: a seed tensor must hold integers, got {seed.dtype}")
        if seed.dim() == 1 and seed.shape[0] == 2:
            if offset == 0:
                return seed.to(torch.int64).contiguous()
            return torch.stack([seed[0].to(torch.int64), seed[1].to(torch.int64) + offset])
        if seed.numel() != 1:
            raise ValueError(
                "key: a seed tensor must hold one element, or be a key (seed, offset) of two, "
                f"got shape {tuple(seed.shape)}"
            )
        if _is_readable(seed):
            return _pair(int(seed), offset)
        low = seed.reshape(()).to(torch.int64)
        return torch.stack([low, torch.full_like(low, offset)])
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"key: seed must be an int or an integer tensor, got {type(seed).__name__}")
    if not -_HALF <= seed < _HALF:
        raise ValueError(f"key: seed must lie in [-2^63, 2^63), got {seed}")
    return _pair(seed, offset)


def _draw_seed(*, device: torch.device) -> Tensor:
    return torch.randint(-(1 << 63), (1 << 63) - 1, (1,), dtype=torch.int64, device=device)


torch.library.define(
    "gmkernels::draw_seed",
    "(*, Device device) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded,),
)
torch.library.impl("gmkernels::draw_seed", ("BackendSelect", "CompositeExplicitAutograd"))(
    _draw_seed
)
torch.library.register_fake("gmkernels::draw_seed")(
    lambda *, device: torch.empty(1, dtype=torch.int64, device=device)
)


def resolve_key(
    op: str,
    seed: Seed,
    offset: int,
    generator: torch.Generator | None,
    device: torch.device,
) -> Tensor:
    """The key that a call of `op` uses: from its seed, its generator, or the default generator."""
    if seed is not None:
        if generator is not None:
            raise ValueError(f"{op}: give seed or generator, not both")
        made = key(seed, offset)
        if made.device != device and made.device.type != "cpu":
            raise ValueError(f"{op}: the seed is on {made.device}, the inputs are on {device}")
        return made
    if generator is not None:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{op}: generator= works in eager mode only; under compile pass seed="
            )
        if generator.device.type != device.type:
            raise ValueError(
                f"{op}: the generator is on {generator.device}, the inputs are on {device}"
            )
        drawn = torch.randint(
            -(1 << 63), (1 << 63) - 1, (1,), dtype=torch.int64, device=device, generator=generator
        )
        return key(drawn, offset)
    return key(torch.ops.gmkernels.draw_seed(device=device), offset)


def _fold_in(key: Tensor, index: Tensor) -> Tensor:
    # On the CPU Python's integers are faster than forty small tensor ops.
    on_cpu = key.device.type == "cpu"
    seed, offset = key.tolist() if on_cpu else key.unbind()
    i = int(index) if on_cpu else index
    low, high, _, _ = reference.philox(
        (i & _MASK, i >> 32 & _MASK, i * 0, i * 0 + _FOLD_STREAM), seed
    )
    if on_cpu:
        folded = low | (high ^ 0x80000000) << 32
        return torch.tensor((folded - (1 << 63), offset), dtype=torch.int64)
    return torch.stack([low | high << 32, offset])


dispatch.define("gmkernels_reference", _fold_in, lambda key, index: torch.empty_like(key))


def fold_in(key: Tensor, index: int | Tensor) -> Tensor:
    """Derives an independent key, for the second latent of a step, layer i, or step t.

    The new seed is the first two Philox words of counter (index, 0, 2^32 - 1) under the old seed, a
    stream that no draw uses; the offset stays, so that batch splits agree after folding too.

    Args:
        key: a key, or an int seed.
        index: an int in [0, 2^63), or an integer tensor with one element on the key's device.
    Returns:
        int64 [2] on the key's device.
    """
    made = _make_key(key)
    if isinstance(index, Tensor):
        if index.numel() != 1 or index.is_floating_point():
            raise ValueError("fold_in: index must be an int or an integer tensor with one element")
        folded = index.reshape(()).to(torch.int64)
    else:
        if isinstance(index, bool) or not isinstance(index, (int, torch.SymInt)):
            raise TypeError(
                f"fold_in: index must be an int or an integer tensor, got {type(index).__name__}"
            )
        if not 0 <= index < _HALF:
            raise ValueError(f"fold_in: index must lie in [0, 2^63), got {index}")
        # A fill: no number is copied to a GPU, which a CUDA graph would refuse.
        folded = torch.full((), index, dtype=torch.int64, device=made.device)
    return torch.ops.gmkernels_reference._fold_in(made, folded)


_make_key = key  # fold_in's own parameter is called key


def rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    """How a shape is cut into rows of noise: dimension 0 by the rest; 0-d and 1-D are one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def _draw(
    op: str,
    shape: int | Sequence[int],
    seed: Seed,
    offset: int,
    generator: torch.Generator | None,
    stream: int,
    dtype: torch.dtype,
    device: torch.device | str | None,
    backend: str | None,
) -> Tensor:
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if any(n < 0 for n in shape):
        raise ValueError(f"{op}: shape must be >= 0 in each dimension, got {shape}")
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(f"{op}: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    if not 0 <= stream < _FOLD_STREAM:
        raise ValueError(f"{op}: stream must lie in [0, 2^32 - 1), got {stream}")
    where = torch.empty(0, device=device).device  # the default device, or cuda with its index
    rows, columns = rows_and_columns(shape)
    if columns > 1 << 34:
        raise ValueError(f"{op}: a row may hold at most 2^34 elements, got {columns}")
    drawn = resolve_key(op, seed, offset, generator, where)
    name = dispatch.choose(op, where.type, dtype == torch.float64, backend)
    if name == "reference":
        draw = getattr(torch.ops.gmkernels_reference, op)
    else:
        draw = dispatch.kernel(op, name).forward
    return draw(drawn, rows, columns, stream, dtype, where).view(shape)


def normal(
    shape: int | Sequence[int],
    *,
    seed: Seed = None,
    offset: int = 0,
    generator: torch.Generator | None = None,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Standard normal noise, a pure function of (seed, row, position in the row).

    Args:
        shape: of the result; rows along dimension 0, a 0-d or 1-D tensor is one row.
        seed: an int, an integer tensor, or a key; None draws one from torch's default generator.
        offset: rows to skip: normal((2, d), offset=3) is rows 3 and 4 of normal((5, d)).
        generator: draws the seed instead (eager mode only).
        stream: tells apart several draws under one seed.
        dtype: float32, or the float32 bits rounded to bfloat16 or float16, or widened to float64.
        device: torch's default device if None.
        backend: None chooses; a named backend runs or raises.
    Returns:
        [shape] of dtype; float32 n within 2.1e-7 (1 + |n|) of Box-Muller in float64, of
        the float32 uniform of one word and the exact angle of the other (largest seen: 1.93e-7).
    Raises:
        TypeError, ValueError: a shape, seed, offset or dtype outside what is said here.
        RuntimeError: a named backend that cannot run the call.

    Not differentiable. Source: Salmon et al. 2011 (Philox); Box and Muller 1958.

    >>> import gmkernels
    >>> whole = gmkernels.normal((4, 3), seed=1)
    >>> bool((whole[2:] == gmkernels.normal((2, 3), seed=1, offset=2)).all())
    True
    """
    return _draw("normal", shape, seed, offset, generator, stream, dtype, device, backend)


def uniform(
    shape: int | Sequence[int],
    *,
    seed: Seed = None,
    offset: int = 0,
    generator: torch.Generator | None = None,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Uniform noise in (0, 1]: float32(word) 2^-32 + 2^-33. Arguments and errors as in normal().

    Returns:
        [shape] of dtype, in (0, 1]; rounded to float16 it may be 0 (below 2^-25).

    >>> import gmkernels
    >>> u = gmkernels.uniform((1000,), seed=1)
    >>> bool((u > 0).all() and (u <= 1).all())
    True
    """
    return _draw("uniform", shape, seed, offset, generator, stream, dtype, device, backend)
