"""Vector quantization: nearest_code, code_statistics, vector_quantize. Start with reference.py."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gmkernels import checks, dispatch
from gmkernels.autograd import is_transformed
from gmkernels.ops.quantize import reference

__all__ = ["code_statistics", "nearest_code", "vector_quantize"]

dispatch.load_family(__name__, ("nearest_code", "code_statistics"))


def _check_codebook(op: str, x: Any, codebook: Any) -> None:
    checks.check_tensor(op, "x", x)
    checks.check_tensor(op, "codebook", codebook, x.device)
    if codebook.dim() != 2 or 0 in codebook.shape:
        raise ValueError(
            f"{op}: codebook must have shape [K, D] with K and D >= 1, got {tuple(codebook.shape)}"
        )
    if x.dim() < 1 or x.shape[-1] != codebook.shape[1]:
        raise ValueError(
            f"{op}: x must have shape [*, D] with the codebook's D = {codebook.shape[1]} last, got "
            f"{tuple(x.shape)}; x.movedim(1, -1) brings channels there"
        )


def _nearest(op: str, x: Tensor, codebook: Tensor, backend: str | None) -> Tensor:
    wide = dispatch.is_wide(x, codebook)
    name = dispatch.choose("nearest_code", x.device.type, wide, backend)
    rows, codes = x.detach().flatten(0, -2) if x.dim() > 1 else x.detach()[None], codebook.detach()
    if name == "reference" or is_transformed():
        indices = reference.nearest_code(rows, codes)
    else:
        rows, codes = checks.in_rows(rows), checks.in_rows(codes)
        indices = dispatch.kernel("nearest_code", name).forward(rows, codes)
    return indices.view(x.shape[:-1])


def nearest_code(x: Tensor, codebook: Tensor, *, backend: str | None = None) -> Tensor:
    """The index of the code that each vector is nearest to: argmin_k |x - codebook_k|^2.

    The matrix of all distances is never made.

    Args:
        x: vectors [*, D]; float32, bfloat16, float16, or float64 (reference).
        codebook: codes [K, D], K and D >= 1; its dtype may differ.
        backend: None chooses; a named backend runs or raises.
    Returns:
        int64 [*], contiguous, in [0, K): the argmin of distances in float64 whatever the dtypes,
        the first one on ties. A vector with NaN or infinity has code 0; a code with NaN or infinity
        is not chosen.
    Raises:
        TypeError, ValueError: shapes, dtypes or devices other than said here.
        RuntimeError: a named backend that cannot run.

    No gradient. Source: van den Oord et al. 2017, eq. 1.

    >>> import torch, gmkernels
    >>> codebook = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    >>> gmkernels.nearest_code(torch.tensor([[0.9, 0.8], [0.1, -3.0]]), codebook)
    tensor([1, 0])
    """
    _check_codebook("nearest_code", x, codebook)
    return _nearest("nearest_code", x, codebook, backend)


def code_statistics(
    x: Tensor, indices: Tensor, codes: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """How many vectors each code has, and their sum: what a step of k-means needs.

    Args:
        x: vectors [*, D]; float32, bfloat16, float16, or float64 (reference).
        indices: int64 [*] in [0, codes), as nearest_code() gives.
        codes: K >= 1.
        backend: None chooses; a named backend runs or raises.
    Returns:
        counts: int64 [K].
        sums: [K, D] float32 (float64 on float64 inputs); the same bits for any number of threads,
            in an order that depends on indices alone, without atomics. 0 for a code without
            vectors.
    Raises:
        TypeError, ValueError: shapes, dtypes or devices other than said here.
        RuntimeError: a named backend that cannot run; on the CPU, an index outside [0, codes) (on
            a GPU such vectors are left out, since looking would stop it).

    No gradient. Source: van den Oord et al. 2017, appendix A.1.

    >>> import torch, gmkernels
    >>> gmkernels.code_statistics(torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([1, 1, 0]), 3)
    (tensor([1, 2, 0]), tensor([[5.],
            [3.],
            [0.]]))
    """
    op = "code_statistics"
    checks.check_tensor(op, "x", x)
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        kind = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"{op}: indices must be an int64 tensor, got {kind}")
    if x.dim() < 1 or indices.shape != x.shape[:-1] or indices.device != x.device:
        raise ValueError(
            f"{op}: indices must have one element a vector of x [*, D], shape "
            f"{tuple(x.shape[:-1])} on {x.device}, got {tuple(indices.shape)} on {indices.device}"
        )
    if isinstance(codes, bool) or not isinstance(codes, (int, torch.SymInt)) or codes < 1:
        raise ValueError(f"{op}: codes must be a whole number >= 1, got {codes!r}")
    name = dispatch.choose(op, x.device.type, dispatch.is_wide(x), backend)
    rows = x.detach().flatten(0, -2) if x.dim() > 1 else x.detach()[None]
    flat = indices.reshape(-1).contiguous()
    if name == "reference" or is_transformed():
        return reference.code_statistics(rows, flat, codes)
    return dispatch.kernel(op, name).forward(checks.in_rows(rows), flat, codes)


def vector_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    commitment: float = 0.25,
    codebook_weight: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Replaces each vector by its nearest code; the gradient passes straight through.

    loss = codebook_weight mean (sg[x] - q)^2 + commitment mean (x - sg[q])^2, where sg stops the
    gradient: the first term moves the codes to the vectors, the second the vectors to the codes.

    Args:
        x: vectors [*, D]; float32, bfloat16, float16, or float64 (reference).
        codebook: codes [K, D], K and D >= 1; its dtype may differ.
        commitment: weight of the second term, >= 0.
        codebook_weight: of the first, >= 0; 0 for a codebook that follows running averages.
        backend: of nearest_code(); None chooses; a named backend runs or raises.
    Returns:
        quantized: [*, D] in x's dtype, contiguous: the codes; d quantized / d x = 1.
        indices: int64 [*].
        loss: a scalar, float32 (float64 on float64 inputs): a mean over all elements, so that
            repeating every vector does not change it; 0 where there are none.
    Raises:
        TypeError, ValueError: shapes, dtypes, devices or weights other than said here.
        RuntimeError: a named backend that cannot run.

    Differentiable twice and more in x and codebook. Source: van den Oord et al. 2017, eq. 2 and 3.

    >>> import torch, gmkernels
    >>> x, codebook = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [9.0, 9.0]])
    >>> gmkernels.vector_quantize(x, codebook)
    (tensor([[1., 0.]]), tensor([0]), tensor(0.6250))
    """
    op = "vector_quantize"
    _check_codebook(op, x, codebook)
    for name, weight in (("commitment", commitment), ("codebook_weight", codebook_weight)):
        if isinstance(weight, Tensor) or not 0 <= weight < math.inf:
            raise ValueError(f"{op}: {name} must be a finite number >= 0, got {weight!r}")
    indices = _nearest(op, x, codebook, backend)
    wide = torch.float64 if dispatch.is_wide(x, codebook) else torch.float32
    codes = F.embedding(indices, codebook)  # [*, D]
    loss = torch.zeros((), dtype=wide, device=x.device)
    for weight, a, b in (
        (codebook_weight, x.detach(), codes),
        (commitment, x, codes.detach()),
    ):
        if weight > 0 and x.numel() > 0:
            loss = loss + weight * F.mse_loss(a.to(wide), b.to(wide))
    quantized = codes.detach().to(x.dtype) + (x - x.detach())  # the codes' own bits: x - x is 0
    return quantized.contiguous(), indices, loss
