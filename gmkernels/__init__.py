"""Fast, exact, reproducible kernels for generative models."""

import torch as _torch  # noqa: F401 - first: the extension needs torch's libraries loaded

from gmkernels import noise
from gmkernels.dispatch import explain, reuse_memory, use_backend, use_isa
from gmkernels.noise import normal, uniform

__version__ = "0.1.0"

__all__ = ["explain", "noise", "normal", "reuse_memory", "uniform", "use_backend", "use_isa"]
