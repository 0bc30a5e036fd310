"""Rows of the contrastive family."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gmkernels.ops import contrastive
from gmkernels.ops.gaussian.spec import in_layout
from gmkernels.spec import Benchmark, Case, Inputs, Op, filled, itemsize, other_dtype

_PASSED = ("temperature", "normalize", "symmetric")  # options that are keywords of the call


def inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Two embeddings that resemble each other, and what the case's options name."""
    o = case.options
    second = other_dtype(dtype) if o.get("mixed") else dtype
    x, noise = (filled(case.shape, torch.float64, device, seed + i) for i in range(2))
    y = x + 0.5 * noise
    if o.get("values") == "equal":
        x = y = torch.full_like(x, 0.25)
    if o.get("values") == "opposite":  # partners are the furthest of all
        y = -x
    if o.get("values") == "told apart":  # losses far below the rounding of 1
        x = y = 30 * torch.eye(*case.shape, dtype=torch.float64, device=device)
    args = [x.to(dtype), y.to(second)]
    if o.get("layout") == "halves":
        args = list(torch.cat([args[0], args[1]], 1).chunk(2, 1))
    args = [in_layout(part, o.get("layout")) for part in args]
    kwargs: dict[str, Any] = {name: o[name] for name in _PASSED if name in o}
    if kwargs.get("temperature") == "learned":
        kwargs["temperature"] = torch.tensor(0.3, dtype=dtype, device=device)
    return Inputs(tuple(args), kwargs)


def _embeddings(x: Tensor, y: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    common = torch.promote_types(x.dtype, y.dtype)
    x, y = x.flatten(1).to(common), y.flatten(1).to(common)
    return (F.normalize(x), F.normalize(y)) if normalize else (x, y)


def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy in float32, as autocast has it."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels, reduction="none")


def eager_nt_xent(
    z1: Tensor, z2: Tensor, *, temperature: float | Tensor = 0.5, normalize: bool = True
) -> Tensor:
    """The textbook's: normalise, matrix of similarities, mask its diagonal, cross entropy."""
    n = z1.shape[0]
    z = torch.cat(_embeddings(z1, z2, normalize))
    logits = z @ z.T / temperature
    i = torch.arange(2 * n, device=z.device)
    logits = logits.masked_fill(i[:, None] == i, float("-inf"))
    return _nll(logits, torch.cat([i[n:], i[:n]])).view(2, n).mean(0)


def lightly_nt_xent(
    z1: Tensor, z2: Tensor, *, temperature: float = 0.5, normalize: bool = True
) -> Tensor:
    """lightly's NTXentLoss: four blocks of logits, those of a view with itself cut out."""
    n = z1.shape[0]
    x, y = _embeddings(z1, z2, normalize)
    other = ~torch.eye(n, device=x.device, dtype=torch.bool)
    xx = (x @ x.T / temperature)[other].view(n, -1)
    yy = (y @ y.T / temperature)[other].view(n, -1)
    xy, yx = x @ y.T / temperature, y @ x.T / temperature
    logits = torch.cat([torch.cat([xy, xx], 1), torch.cat([yx, yy], 1)])
    return _nll(logits, torch.arange(n, device=x.device).repeat(2)).view(2, n).mean(0)


@functools.cache
def _compiled_lightly() -> Callable[..., Tensor]:
    return torch.compile(lightly_nt_xent, dynamic=False)


def eager_info_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    symmetric: bool = True,
    normalize: bool = True,
) -> Tensor:
    """The pseudocode of CLIP: logits, then a cross entropy along each side."""
    q, k = _embeddings(queries, keys, normalize)
    logits = q @ k.T / temperature
    labels = torch.arange(q.shape[0], device=q.device)
    loss = _nll(logits, labels)
    return (loss + _nll(logits.T, labels)) / 2 if symmetric else loss


def bytes_(case: Case, dtype: torch.dtype, backward: bool) -> int:
    """Embeddings and losses once; the backward reads them again and writes two gradients."""
    n, d = case.shape[0], case.shape[1]
    return (6 if backward else 2) * n * d * itemsize(dtype) + (2 if backward else 1) * 4 * n


CASES = (
    Case("no_pairs", "empty", (0, 5)),
    Case("one", "one", (2, 1), {"normalize": False}),  # at length 1 it would have no gradient
    Case("odd", "odd", (5, 37)),
    Case("pictures", "odd", (3, 2, 5)),
    Case("block-1", "block-1", (47, 15)),
    Case("block", "block", (48, 16)),
    Case("block+1", "block+1", (49, 17)),
    Case("large", "large", (70, 70)),
    Case("equal", "boundary", (7, 8), {"values": "equal", "normalize": False}),
    Case("opposite", "boundary", (7, 8), {"values": "opposite"}),
    Case("told_apart", "boundary", (7, 9), {"values": "told apart", "temperature": 0.2}),
    Case("halves", "non_contiguous", (6, 8), {"layout": "halves"}),
    Case("transposed", "non_contiguous", (6, 3, 4), {"layout": "transposed"}),
    Case("channels_last", "channels_last", (4, 2, 3, 5), {"layout": "channels_last"}),
    Case("mixed_dtypes", "mixed", (6, 12), {"mixed": True}),
    Case("temperature", "keyword", (6, 12), {"temperature": 0.07}),
    Case("learned_temperature", "keyword", (6, 12), {"temperature": "learned"}),
    Case("as_they_are", "keyword", (6, 12), {"normalize": False}),
)
_FLOOR = (4.0, "scores, the maximum, the logarithm and their sum round once each")
_DRAWS = (8, "rounded scores are what exp() magnifies")
_MIXES = "each row's negatives are the other rows"
_SIMCLR = Case("2048x128", "large", (2048, 128))
_SIZES = tuple(
    Case(f"{n}x{d}", "large", (n, d))
    for n, d in ((256, 128), (1024, 128), (4096, 128), (1024, 512))
)


def _benchmarks(case: Case) -> tuple[Benchmark, ...]:
    bf16 = torch.bfloat16
    return (
        Benchmark("forward", case),
        Benchmark("forward+backward", case, backward=True, headline=True),
        Benchmark("forward+backward bf16", case, dtype=bf16, backward=True),
        *(Benchmark(f"forward+backward {c.name}", c, backward=True) for c in _SIZES),
    )


OPS = (
    Op(
        name="nt_xent",
        family="contrastive",
        summary="SimCLR's loss over 2N views by a streaming log-sum-exp, no matrix in memory",
        function=contrastive.nt_xent,
        eager=eager_nt_xent,
        inputs=inputs,
        cases=CASES,
        benchmarks=_benchmarks(_SIMCLR),
        bytes=bytes_,
        flops=lambda case: (2 * case.shape[0]) ** 2 * case.shape[1],  # s is symmetric
        source="Chen et al. 2020, eq. 1",
        floor=_FLOOR,
        draws=_DRAWS,
        mixes_rows=_MIXES,
        operator="contrastive",
        peers={  # not slower than eager, and `make bench` has no time for both
            "lightly compiled": lambda *args, **kwargs: _compiled_lightly()(*args, **kwargs),
        },
    ),
    Op(
        name="info_nce",
        family="contrastive",
        summary="InfoNCE of queries and keys, one way or both (CLIP), temperature learned or given",
        function=contrastive.info_nce,
        eager=eager_info_nce,
        inputs=inputs,
        cases=(*CASES, Case("one_way", "keyword", (6, 12), {"symmetric": False})),
        benchmarks=_benchmarks(_SIMCLR),
        bytes=bytes_,
        flops=lambda case: 2 * case.shape[0] ** 2 * case.shape[1],
        source="van den Oord et al. 2018, eq. 4; Radford et al. 2021, figure 3",
        floor=_FLOOR,
        draws=_DRAWS,
        mixes_rows=_MIXES,
        operator="contrastive",
    ),
)
