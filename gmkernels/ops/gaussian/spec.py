"""Rows of the gaussian family."""

from typing import Any

import torch
from torch import Tensor

from gmkernels.ops import gaussian
from gmkernels.spec import Benchmark, Case, Inputs, Op, filled, itemsize, other_dtype, row_cases

# Values where the formula changes form: 0, the edge of the polynomial for expm1(l) - l, far tails.
_BOUNDARY = (0.0, -0.0, 1e-4, -1e-4, 0.6931, -0.6931, 0.694, -0.694, 5.0, -5.0, 10.0, -10.0)


def in_layout(x: Tensor, layout: str | None) -> Tensor:
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x


def _prior(x: Tensor, how: str | None, dtype: torch.dtype) -> Tensor | None:
    if how is None:
        return None
    return (x if how == "full" else x[0]).to(dtype)


def inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """mean, logvar and what the case's options name."""
    o = case.options
    second = other_dtype(dtype) if o.get("mixed") else dtype
    x = [filled(case.shape, torch.float64, device, seed + i) for i in range(5)]
    if o.get("values") == "boundary":
        x[1] = torch.tensor(_BOUNDARY, dtype=torch.float64, device=device).expand(case.shape)
    mean, logvar = x[0].to(dtype), x[1].to(second)
    if o.get("layout") == "chunk":
        mean, logvar = torch.cat([mean, logvar], 1).chunk(2, 1)
    mean, logvar = in_layout(mean, o.get("layout")), in_layout(logvar, o.get("layout"))
    kwargs: dict[str, Any] = {
        "prior_mean": _prior(x[2], o.get("prior_mean"), second),
        "prior_logvar": _prior(x[3], o.get("prior_logvar"), dtype),
        "logvar_range": o.get("logvar_range"),
        "eps": x[4].to(dtype) if "eps" in o else None,
    }
    return Inputs((mean, logvar), {k: v for k, v in kwargs.items() if v is not None})


def _eager_terms(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
) -> Tensor:
    if prior_mean is None and prior_logvar is None:
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
    pm = torch.zeros_like(mean) if prior_mean is None else prior_mean
    pl = torch.zeros_like(logvar) if prior_logvar is None else prior_logvar
    return 0.5 * (pl - logvar + ((logvar - pl).exp() + (mean - pm).square() * (-pl).exp()) - 1)


def eager_reparameterize_kl(
    mean: Tensor,
    logvar: Tensor,
    *,
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    logvar_range: tuple[float, float] | None = None,
    eps: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As in most VAE training code."""
    if logvar_range is not None:
        logvar = logvar.clamp(*logvar_range)
    if eps is None:
        eps = torch.randn_like(mean)
    z = mean + torch.exp(0.5 * logvar) * eps
    return z, _eager_terms(mean, logvar, prior_mean, prior_logvar).flatten(1).sum(1)


def eager_gaussian_kl(
    mean: Tensor,
    logvar: Tensor,
    *,
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    logvar_range: tuple[float, float] | None = None,
) -> Tensor:
    """As in most VAE training code."""
    if logvar_range is not None:
        logvar = logvar.clamp(*logvar_range)
    return _eager_terms(mean, logvar, prior_mean, prior_logvar).flatten(1).sum(1)


def eager_gaussian_kl_per_dim(
    mean: Tensor,
    logvar: Tensor,
    *,
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    logvar_range: tuple[float, float] | None = None,
) -> Tensor:
    """As in most VAE training code."""
    if logvar_range is not None:
        logvar = logvar.clamp(*logvar_range)
    return _eager_terms(mean, logvar, prior_mean, prior_logvar).mean(0)


def _elements(case: Case) -> int:
    n = 1
    for size in case.shape:
        n *= size
    return n


def _sample_bytes(case: Case, dtype: torch.dtype, backward: bool) -> int:
    given = 1 if "eps" in case.options else 0
    n = (3 + given) + ((5 + given) if backward else 0)
    return n * _elements(case) * itemsize(dtype) + case.shape[0] * 4 * (2 if backward else 1)


def _kl_bytes(case: Case, dtype: torch.dtype, backward: bool) -> int:
    return (2 + (4 if backward else 0)) * _elements(case) * itemsize(dtype) + case.shape[0] * 4


KL_CASES = (
    *row_cases(),
    Case("boundary_values", "boundary", (5, 12), {"values": "boundary"}),
    Case("chunk", "non_contiguous", (6, 50), {"layout": "chunk"}),
    Case("transposed", "non_contiguous", (3, 5, 8), {"layout": "transposed"}),
    Case("image_channels_last", "channels_last", (2, 3, 5, 7), {"layout": "channels_last"}),
    Case("mixed_dtypes", "mixed", (4, 33), {"mixed": True}),
    Case(
        "mixed_prior",
        "mixed",
        (4, 33),
        {"mixed": True, "prior_mean": "full", "prior_logvar": "row"},
    ),
    Case("prior", "keyword", (5, 37), {"prior_mean": "full", "prior_logvar": "full"}),
    Case("learned_prior", "keyword", (5, 3, 7), {"prior_mean": "row", "prior_logvar": "row"}),
    Case("prior_mean_alone", "keyword", (5, 37), {"prior_mean": "full"}),
    Case("prior_logvar_alone", "keyword", (5, 37), {"prior_logvar": "row"}),
    Case("logvar_range", "keyword", (5, 37), {"logvar_range": (-0.5, 0.7)}),
    Case(
        "range_and_prior",
        "keyword",
        (5, 37),
        {"logvar_range": (-0.5, 0.7), "prior_mean": "full", "prior_logvar": "full"},
    ),
)
_BIG = Case("4096x1024", "large", (4096, 1024))
_BIG_EPS = Case("4096x1024, eps given", "large", (4096, 1024), {"eps": True})
_LATENTS = Case("64x8x64x64", "large", (64, 8, 64, 64))
_CHANNELS_LAST = Case(
    "64x8x64x64 channels_last", "large", (64, 8, 64, 64), {"layout": "channels_last"}
)

OPS = (
    Op(
        name="reparameterize_kl",
        family="gaussian",
        summary="z = mean + exp(logvar / 2) eps and its KL to the prior, noise made in the kernel",
        function=gaussian.reparameterize_kl,
        eager=eager_reparameterize_kl,
        inputs=inputs,
        cases=(
            *KL_CASES,
            Case("eps", "keyword", (5, 37), {"eps": True}),
            Case("eps_prior", "keyword", (3, 130), {"eps": True, "prior_mean": "row"}),
        ),
        benchmarks=(
            Benchmark("forward", _BIG, headline=True),
            Benchmark("forward+backward", _BIG, backward=True),
            Benchmark("forward, eps given", _BIG_EPS, headline=True, eager_eps=True),
            Benchmark("forward+backward, eps given", _BIG_EPS, backward=True, eager_eps=True),
            Benchmark("forward bf16", _BIG, dtype=torch.bfloat16),
            Benchmark("forward+backward latents", _LATENTS, backward=True),
            Benchmark("forward+backward channels_last", _CHANNELS_LAST, backward=True),
            Benchmark(
                "forward+backward halves of one tensor",
                Case("4096x1024 chunk", "large", (4096, 1024), {"layout": "chunk"}),
                backward=True,
            ),
        ),
        bytes=_sample_bytes,
        flops=lambda case: 75 * _elements(case),
        source="Kingma and Welling 2014, eq. 10",
        noisy=True,
        instructions={"float32": 119, "bfloat16": 119},
    ),
    Op(
        name="gaussian_kl",
        family="gaussian",
        summary="KL of a diagonal Gaussian to N(0, I) or to a diagonal Gaussian prior, one per row",
        function=gaussian.gaussian_kl,
        eager=eager_gaussian_kl,
        inputs=inputs,
        cases=KL_CASES,
        benchmarks=(
            Benchmark("forward", _BIG),
            Benchmark("forward+backward", _BIG, backward=True),
        ),
        bytes=_kl_bytes,
        flops=lambda case: 30 * _elements(case),
        source="Kingma and Welling 2014, appendix B",
    ),
    Op(
        name="gaussian_kl_per_dim",
        family="gaussian",
        summary="the same KL per latent dimension, averaged over the batch: free bits, collapse",
        function=gaussian.gaussian_kl_per_dim,
        eager=eager_gaussian_kl_per_dim,
        inputs=inputs,
        cases=(*KL_CASES, Case("tall", "large", (2100, 5))),
        benchmarks=(
            Benchmark("forward", _BIG),
            Benchmark("forward+backward", _BIG, backward=True),
        ),
        bytes=_kl_bytes,
        flops=lambda case: 30 * _elements(case),
        source="Kingma et al. 2016, free bits",
    ),
)
