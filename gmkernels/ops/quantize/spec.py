"""Rows of the quantize family."""

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gmkernels.ops import quantize
from gmkernels.spec import Benchmark, Case, Inputs, Op, filled, other_dtype


def _vectors(case: Case, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """x of the case's shape [*, D], laid out as the case says."""
    o = case.options
    x = filled(case.shape, dtype, device, seed, scale=o.get("scale", 1.0))
    x = x + torch.tensor(o.get("offset", 0.0), dtype=dtype, device=device)
    if o.get("layout") == "columns":  # [*, D] of a matrix of twice the width
        return torch.cat([x, x], -1).chunk(2, -1)[1]
    if o.get("layout") == "transposed":
        return x.mT.contiguous().mT
    if o.get("layout") == "channels_last":  # [B, C, H, W] seen as [B, H, W, C]
        return x.movedim(-1, 1).contiguous(memory_format=torch.channels_last).movedim(1, -1)
    return x


def search_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """x [*, D] and a codebook [K, D]: normal, or with ties where the case says so."""
    o, width = case.options, case.shape[-1]
    x = _vectors(case, dtype, device, seed)
    second = other_dtype(dtype) if o.get("mixed") else dtype
    codebook = filled((o.get("codes", 7), width), second, device, seed + 1, o.get("scale", 1.0))
    codebook = codebook + torch.tensor(o.get("offset", 0.0), dtype=second, device=device)
    if o.get("values") == "equal":
        codebook = codebook[:1].expand(o["codes"], width)
    if o.get("values") == "grid":  # whole numbers: many rows lie midway between codes
        codebook = (codebook * 2).round()
        x = (x * 2).round()
    kwargs: dict[str, Any] = {k: o[k] for k in ("commitment", "codebook_weight") if k in o}
    return Inputs((x, codebook), kwargs)


def eager_nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """By the product, which is faster than torch.cdist: |x|^2 is left out."""
    c = codebook.to(x.dtype)
    scores = torch.addmm(c.square().sum(1) / 2, x.flatten(0, -2), c.T, alpha=-1)
    return scores.argmin(1).view(x.shape[:-1])


def cdist_nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """As in most VQ-VAE code."""
    return torch.cdist(x.flatten(0, -2), codebook.to(x.dtype)).argmin(1).view(x.shape[:-1])


@functools.cache
def _peer(codes: int, width: int, dtype: torch.dtype, device: str) -> Any:
    from vector_quantize_pytorch import VectorQuantize

    return VectorQuantize(width, codes, kmeans_init=False).eval().to(device, dtype)


def peer_nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """vector-quantize-pytorch; it quantizes, too."""
    peer = _peer(*codebook.shape, x.dtype, x.device.type)
    peer.codebook = codebook
    with torch.no_grad():
        return peer(x.flatten(0, -2))[1].view(x.shape[:-1])


def statistics_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """x [*, D], indices [*] and the number of codes; some codes have no vector."""
    o, codes = case.options, case.options.get("codes", 7)
    x = _vectors(case, dtype, device, seed)
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, codes, case.shape[:-1], generator=generator).to(device)
    if o.get("values") == "equal":
        indices = torch.full_like(indices, codes - 1)
    if o.get("layout") == "columns":
        indices = torch.stack([indices, indices], -1)[..., 0]
    return Inputs((x, indices, codes))


def eager_code_statistics(x: Tensor, indices: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """As in most VQ-VAE code: by a one-hot matrix, which is deterministic on a GPU, too."""
    one_hot = F.one_hot(indices.flatten(), codes).to(x.dtype)
    sums = one_hot.T @ x.flatten(0, -2)
    return one_hot.sum(0).long(), sums.float()


def eager_vector_quantize(
    x: Tensor, codebook: Tensor, *, commitment: float = 0.25, codebook_weight: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """As in most VQ-VAE code."""
    indices = eager_nearest_code(x.detach(), codebook.detach())
    q = codebook[indices]
    loss = codebook_weight * F.mse_loss(q.float(), x.detach().float())
    loss = loss + commitment * F.mse_loss(q.detach().float(), x.float())
    return (x + (q - x).detach()).to(x.dtype), indices, loss


def _cases(many: int) -> tuple[Case, ...]:
    return (
        Case("no_rows", "empty", (0, 5)),
        Case("one", "one", (1, 1), {"codes": 1}),
        Case("one_vector", "one", (7,)),
        Case("one_code", "odd", (5, 9), {"codes": 1}),
        Case("odd", "odd", (5, 37)),
        Case("three_dims", "odd", (2, 3, 7), {"codes": 5}),
        Case("block-1", "block-1", (63, 31), {"codes": 63}),
        Case("block", "block", (64, 64), {"codes": 64}),
        Case("block+1", "block+1", (65, 65), {"codes": 65}),
        Case("large", "large", (many, 20), {"codes": 50}),
        Case("wide", "large", (3, 1030)),
        Case("equal", "boundary", (9, 12), {"codes": 40, "values": "equal"}),
        Case("half_a_row", "non_contiguous", (6, 25), {"layout": "columns"}),
        Case("transposed", "non_contiguous", (6, 8), {"layout": "transposed"}),
        Case("image", "channels_last", (2, 5, 7, 4), {"layout": "channels_last"}),
        Case("mixed_dtypes", "mixed", (11, 16), {"mixed": True}),
        Case("many_codes", "keyword", (4, 8), {"codes": 90}),
    )


_SEARCH = (
    *_cases(200),
    Case("grid", "boundary", (70, 3), {"codes": 30, "values": "grid"}),
    Case("far_from_0", "boundary", (40, 6), {"codes": 9, "offset": 1e4}),
    Case("tiny", "boundary", (40, 6), {"codes": 9, "scale": 1e-6}),
)
_CODES = Case("16384x64, K = 1024", "large", (16384, 64), {"codes": 1024})
_FEW = Case("16384x64, K = 64", "large", (16384, 64), {"codes": 64})
_WIDE = Case("4096x256, K = 8192", "large", (4096, 256), {"codes": 8192})
_BF16 = torch.bfloat16


def _sizes(case: Case) -> tuple[int, int, int]:
    """N, K and D."""
    return math.prod(case.shape[:-1]), case.options.get("codes", 7), case.shape[-1]


def _search_bytes(case: Case, dtype: torch.dtype, backward: bool) -> int:
    n, k, d = _sizes(case)
    return (n + k) * d * dtype.itemsize + 8 * n


def _search_flops(case: Case) -> int:
    return 2 * math.prod(_sizes(case))


def _statistics_bytes(case: Case, dtype: torch.dtype, backward: bool) -> int:
    n, k, d = _sizes(case)
    return n * d * dtype.itemsize + 8 * n + k * (4 * d + 8)


def _quantize_bytes(case: Case, dtype: torch.dtype, backward: bool) -> int:
    n, k, d = _sizes(case)
    return (2 * n + k) * d * dtype.itemsize * (2 if backward else 1) + 8 * n


OPS = (
    Op(
        name="nearest_code",
        family="quantize",
        summary="the nearest of K codes without the matrix of distances, float64's choice",
        function=quantize.nearest_code,
        eager=eager_nearest_code,
        inputs=search_inputs,
        cases=_SEARCH,
        benchmarks=(
            Benchmark("16384x64, K = 1024", _CODES, headline=True),
            Benchmark("16384x64, K = 64", _FEW),
            Benchmark("4096x256, K = 8192", _WIDE),
            Benchmark("bf16", _CODES, dtype=_BF16),
        ),
        bytes=_search_bytes,
        flops=_search_flops,
        source="van den Oord et al. 2017, eq. 1",
        floor=(0.0, "indices are whole"),
        differentiable=False,
        peers={"cdist": cdist_nearest_code, "vector-quantize-pytorch": peer_nearest_code},
    ),
    Op(
        name="code_statistics",
        family="quantize",
        summary="count and sum of the vectors of each code, in a fixed order, without a one-hot",
        function=quantize.code_statistics,
        eager=eager_code_statistics,
        inputs=statistics_inputs,
        cases=_cases(500),
        benchmarks=(Benchmark("16384x64, K = 1024", _CODES),),
        bytes=_statistics_bytes,
        flops=lambda case: _sizes(case)[0] * _sizes(case)[2],
        source="van den Oord et al. 2017, appendix A.1",
        floor=(2.0, "sums round at each addition"),
        differentiable=False,
    ),
    Op(
        name="vector_quantize",
        family="quantize",
        summary="the nearest codes, straight-through, with codebook and commitment loss",
        function=quantize.vector_quantize,
        eager=eager_vector_quantize,
        inputs=search_inputs,
        cases=(
            *_SEARCH,
            Case("commitment_1", "keyword", (9, 5), {"commitment": 1.0}),
            Case("no_commitment", "keyword", (9, 5), {"commitment": 0.0}),
            Case("running_codebook", "keyword", (9, 5), {"codebook_weight": 0.0}),
        ),
        benchmarks=(),
        bytes=_quantize_bytes,
        flops=_search_flops,
        source="van den Oord et al. 2017, eq. 2 and 3",
        differentiable=False,
        operator="nearest_code",
    ),
)
