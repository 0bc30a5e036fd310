"""Fast, exact, reproducible kernels for generative models."""

import torch as _torch  # noqa: F401 - first: the extension needs torch's libraries loaded

from gmkernels import noise
from gmkernels.dispatch import explain, reuse_memory, use_backend, use_isa
from gmkernels.noise import normal, uniform
from gmkernels.ops.activation import gelu
from gmkernels.ops.attention import attention_logsumexp, causal_attention, full_attention
from gmkernels.ops.contrastive import info_nce, nt_xent
from gmkernels.ops.coupling import affine_coupling, affine_coupling_inverse
from gmkernels.ops.decode import decode_attention
from gmkernels.ops.diffusion_noise import add_noise, add_noise_with_target, denoising_loss
from gmkernels.ops.diffusion_step import (
    ddim_step,
    ddpm_step,
    dpmpp_2m_step,
    euler_ancestral_step,
    euler_step,
    flow_euler_step,
    heun_step,
)
from gmkernels.ops.elementwise import (
    actnorm,
    actnorm_inverse,
    actnorm_statistics,
    dequantize,
    leaky,
    leaky_inverse,
    logit,
    logit_inverse,
)
from gmkernels.ops.gaussian import gaussian_kl, gaussian_kl_per_dim, reparameterize_kl
from gmkernels.ops.likelihood import bernoulli_nll, categorical_nll, gaussian_nll
from gmkernels.ops.quantize import code_statistics, nearest_code, vector_quantize
from gmkernels.ops.rotary import rms_norm, rotary_embedding, rotary_table
from gmkernels.ops.spline import (
    spline_coupling,
    spline_coupling_inverse,
    spline_transform,
    spline_transform_inverse,
)
from gmkernels.ops.token_sampling import next_token
from gmkernels.sampler import Sampler
from gmkernels.schedule import Schedule
from gmkernels.split import Split

__version__ = "0.1.0"

__all__ = [
    "Sampler",
    "Schedule",
    "Split",
    "actnorm",
    "actnorm_inverse",
    "actnorm_statistics",
    "add_noise",
    "add_noise_with_target",
    "affine_coupling",
    "affine_coupling_inverse",
    "attention_logsumexp",
    "bernoulli_nll",
    "categorical_nll",
    "causal_attention",
    "code_statistics",
    "ddim_step",
    "ddpm_step",
    "decode_attention",
    "denoising_loss",
    "dequantize",
    "dpmpp_2m_step",
    "euler_ancestral_step",
    "euler_step",
    "explain",
    "flow_euler_step",
    "full_attention",
    "gaussian_kl",
    "gaussian_kl_per_dim",
    "gaussian_nll",
    "gelu",
    "heun_step",
    "info_nce",
    "leaky",
    "leaky_inverse",
    "logit",
    "logit_inverse",
    "nearest_code",
    "next_token",
    "noise",
    "normal",
    "nt_xent",
    "reparameterize_kl",
    "reuse_memory",
    "rms_norm",
    "rotary_embedding",
    "rotary_table",
    "spline_coupling",
    "spline_coupling_inverse",
    "spline_transform",
    "spline_transform_inverse",
    "uniform",
    "use_backend",
    "use_isa",
    "vector_quantize",
]
