"""Steps of diffusion samplers, all one kernel. Start with reference.py, then gmkernels/sampler.py.

Saved for backward: the inputs, the key and the threshold of dynamic thresholding. Noise is made
again.
"""

from torch import Tensor

from gmkernels.noise import Seed
from gmkernels.ops.diffusion_step.call import run_step
from gmkernels.sampler import Sampler

__all__ = [
    "ddim_step",
    "ddpm_step",
    "dpmpp_2m_step",
    "euler_ancestral_step",
    "euler_step",
    "flow_euler_step",
    "heun_step",
]


def ddim_step(
    x: Tensor,
    prediction: Tensor,
    step: int | Tensor,
    sampler: Sampler,
    *,
    unconditional: Tensor | None = None,
    guidance: float = 1.0,
    clip: float | None = None,
    dynamic_threshold: tuple[float, float] | None = None,
    seed: Seed = None,
    offset: int = 0,
    eps: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of DDIM: alpha' x0 + sqrt(sigma'^2 - s^2) eps + s n, all in one pass over memory.

    Args:
        x: [B, *] at the step's level; float32, bfloat16, float16, or float64 (reference).
        prediction: of the network for x, x's shape; its dtype may differ. Half of a larger output
            (torch.chunk) is read in place.
        step: which step of the sampler: an int, or an integer tensor on x's device (one step, or
            one a row [B]), which is read inside the kernel: nothing waits for the GPU.
        sampler: Sampler.ddim(...), on x's device.
        unconditional: prediction without the condition; p = u + guidance (c - u) in the same pass.
        guidance: its scale; 1 unless unconditional is given.
        clip: x0 is clamped to [-clip, clip].
        dynamic_threshold: (ratio, maximum): x0 is clamped to h, the ratio quantile of |x0| in its
            row within [1, maximum], and divided by h. A constant for gradients.
        seed: an int, an integer tensor or a key, the same for all steps: step i of row b draws
            normal(x.shape, seed=fold_in(key, i), offset=offset). None draws one from torch's
            default generator. Not used where the sampler adds no noise.
        offset: rows of noise to skip: samples do not depend on how a batch is split.
        eps: the noise itself, x's shape; then no seed is used.
        backend: None chooses; a named backend runs or raises.
    Returns:
        x at the next level: x's shape, dtype and layout.
    Raises:
        TypeError, ValueError: shapes, dtypes, devices or a sampler other than said here.
        RuntimeError: a named backend that cannot run; a step tensor outside the sampler in native
            CPU kernels (elsewhere its row is NaN); vmap over x with one unbatched seed.

    Differentiable twice and more in all tensors. Accuracy: within twice the error of float32
    PyTorch plus 2 ulp of the output's scale. Source: Song et al. 2021, eq. 12.

    >>> import torch, gmkernels
    >>> sampler = gmkernels.Sampler.ddim(gmkernels.Schedule.linear(), 10)
    >>> gmkernels.ddim_step(torch.zeros(1, 2), torch.zeros(1, 2), 9, sampler)
    tensor([[0., 0.]])
    """
    return run_step(
        "ddim_step",
        x,
        prediction,
        step,
        sampler,
        unconditional=unconditional,
        guidance=guidance,
        clip=clip,
        dynamic_threshold=dynamic_threshold,
        seed=seed,
        offset=offset,
        eps=eps,
        backend=backend,
    )[0]


def ddpm_step(
    x: Tensor,
    prediction: Tensor,
    step: int | Tensor,
    sampler: Sampler,
    *,
    unconditional: Tensor | None = None,
    guidance: float = 1.0,
    clip: float | None = None,
    dynamic_threshold: tuple[float, float] | None = None,
    variance: Tensor | None = None,
    seed: Seed = None,
    offset: int = 0,
    eps: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One ancestral step: the mean of q(x' | x, x0), and noise of fixed or learned variance.

    Args: as in ddim_step(), and
        sampler: Sampler.ddpm(...).
        variance: for variance="learned_range": the network's v, x's shape, -1 for the smaller
            variance and 1 for the larger; the halves of one output are read in place.
    Returns:
        x at the next level: x's shape, dtype and layout.
    Raises:
        TypeError, ValueError, RuntimeError: as in ddim_step().

    Differentiable twice and more in all tensors. Sources: Ho et al. 2020, eq. 11; Nichol
    and Dhariwal 2021, eq. 15.

    >>> import torch, gmkernels
    >>> sampler = gmkernels.Sampler.ddpm(gmkernels.Schedule.linear(), 10)
    >>> gmkernels.ddpm_step(torch.zeros(1, 2), torch.zeros(1, 2), 9, sampler, seed=0)
    tensor([[0., 0.]])
    """
    return run_step(
        "ddpm_step",
        x,
        prediction,
        step,
        sampler,
        unconditional=unconditional,
        guidance=guidance,
        clip=clip,
        dynamic_threshold=dynamic_threshold,
        variance=variance,
        seed=seed,
        offset=offset,
        eps=eps,
        backend=backend,
    )[0]


def euler_step(
    x: Tensor,
    prediction: Tensor,
    step: int | Tensor,
    sampler: Sampler,
    *,
    unconditional: Tensor | None = None,
    guidance: float = 1.0,
    clip: float | None = None,
    dynamic_threshold: tuple[float, float] | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of Euler's method along the probability flow.

    Args: as in ddim_step(), without noise; sampler: Sampler.euler(...).
    Returns:
        x at the next level: x's shape, dtype and layout.
    Raises:
        TypeError, ValueError, RuntimeError: as in ddim_step().

    Differentiable twice and more in all tensors. Source: Karras et al. 2022, algorithm 1.

    >>> import torch, gmkernels
    >>> sampler = gmkernels.Sampler.euler(gmkernels.Schedule.linear(), 10)
    >>> gmkernels.euler_step(torch.zeros(1, 2), torch.zeros(1, 2), 9, sampler)
    tensor([[0., 0.]])
    """
    return run_step(
        "euler_step",
        x,
        prediction,
        step,
        sampler,
        unconditional=unconditional,
        guidance=guidance,
        clip=clip,
        dynamic_threshold=dynamic_threshold,
        backend=backend,
    )[0]


def flow_euler_step(
    x: Tensor,
    prediction: Tensor,
    step: int | Tensor,
    sampler: Sampler,
    *,
    unconditional: Tensor | None = None,
    guidance: float = 1.0,
    clip: float | None = None,
    dynamic_threshold: tuple[float, float] | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of Euler's method along a rectified flow: x' = x + (sigma' - sigma) v.

    Args: as in ddim_step(), without noise; sampler: Sampler.flow_euler(...).
    Returns:
        x at the next level: x's shape, dtype and layout.
    Raises:
        TypeError, ValueError, RuntimeError: as in ddim_step().

    Differentiable twice and more in all tensors. Source: Liu et al. 2022; Esser et al. 2024.

    >>> import torch, gmkernels
    >>> sampler = gmkernels.Sampler.flow_euler(gmkernels.Schedule.flow_matching(), 10)
    >>> gmkernels.flow_euler_step(torch.zeros(1, 2), torch.zeros(1, 2), 9, sampler)
    tensor([[0., 0.]])
    """
    return run_step(
        "flow_euler_step",
        x,
        prediction,
        step,
        sampler,
        unconditional=unconditional,
        guidance=guidance,
        clip=clip,
        dynamic_threshold=dynamic_threshold,
        backend=backend,
    )[0]


def euler_ancestral_step(
    x: Tensor,
    prediction: Tensor,
    step: int | Tensor,
    sampler: Sampler,
    *,
    unconditional: Tensor | None = None,
    guidance: float = 1.0,
    clip: float | None = None,
    dynamic_threshold: tuple[float, float] | None = None,
    seed: Seed = None,
    offset: int = 0,
    eps: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of Euler's method to a lower level, and noise up to the next.

    Args: as in ddim_step(); sampler: Sampler.euler_ancestral(...).
    Returns:
        x at the next level: x's shape, dtype and layout.
    Raises:
        TypeError, ValueError, RuntimeError: as in ddim_step().

    Differentiable twice and more in all tensors. Source: sample_euler_ancestral of
    k-diffusion (Crowson 2022).

    >>> import torch, gmkernels
    >>> sampler = gmkernels.Sampler.euler_ancestral(gmkernels.Schedule.linear(), 10)
    >>> gmkernels.euler_ancestral_step(torch.zeros(1, 2), torch.zeros(1, 2), 9, sampler, seed=0)
    tensor([[0., 0.]])
    """
    return run_step(
        "euler_ancestral_step",
        x,
        prediction,
        step,
        sampler,
        unconditional=unconditional,
        guidance=guidance,
        clip=clip,
        dynamic_threshold=dynamic_threshold,
        seed=seed,
        offset=offset,
        eps=eps,
        backend=backend,
    )[0]


def heun_step(
    x: Tensor,
    prediction: Tensor,
    step: int | Tensor,
    sampler: Sampler,
    *,
    unconditional: Tensor | None = None,
    guidance: float = 1.0,
    clip: float | None = None,
    dynamic_threshold: tuple[float, float] | None = None,
    previous: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One evaluation of Heun's method: step 2 i predicts level i + 1, step 2 i + 1 corrects it.

    Args: as in ddim_step(), without noise, and
        sampler: Sampler.heun(...), of 2 S - 1 evaluations.
        previous: for the odd steps the x of level i, before the prediction; not read in an even
            step that is an int, and multiplied by 0 in one that is a tensor.
    Returns:
        x at the next level: x's shape, dtype and layout.
    Raises:
        TypeError, ValueError, RuntimeError: as in ddim_step().

    Differentiable twice and more in all tensors. Source: Karras et al. 2022, algorithm 1.

    >>> import torch, gmkernels
    >>> sampler = gmkernels.Sampler.heun(gmkernels.Schedule.linear(), 10)
    >>> zero = torch.zeros(1, 2)
    >>> gmkernels.heun_step(zero, zero, 9, sampler, previous=zero)
    tensor([[0., 0.]])
    """
    if isinstance(step, int) and step % 2 == 0:
        previous = None
    elif previous is None:
        raise ValueError("heun_step: a correction needs `previous`, the x before the prediction")
    return run_step(
        "heun_step",
        x,
        prediction,
        step,
        sampler,
        unconditional=unconditional,
        guidance=guidance,
        clip=clip,
        dynamic_threshold=dynamic_threshold,
        previous=previous,
        backend=backend,
    )[0]


def dpmpp_2m_step(
    x: Tensor,
    prediction: Tensor,
    step: int | Tensor,
    sampler: Sampler,
    *,
    unconditional: Tensor | None = None,
    guidance: float = 1.0,
    clip: float | None = None,
    dynamic_threshold: tuple[float, float] | None = None,
    previous: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of DPM-Solver++(2M), and the x0 that the next step takes as `previous`.

    Args: as in ddim_step(), without noise, and
        sampler: Sampler.dpmpp_2m(...).
        previous: the x0 that the step before returned; not read in step 0 if that is an int, and
            multiplied by 0 there if it is a tensor.
    Returns:
        (x at the next level, x0): x's shape, dtype and layout, each.
    Raises:
        TypeError, ValueError, RuntimeError: as in ddim_step().

    Differentiable twice and more in all tensors. Source: Lu et al. 2022, algorithm 2.

    >>> import torch, gmkernels
    >>> sampler = gmkernels.Sampler.dpmpp_2m(gmkernels.Schedule.linear(), 10)
    >>> zero = torch.zeros(1, 2)
    >>> gmkernels.dpmpp_2m_step(zero, zero, 9, sampler, previous=zero)
    (tensor([[0., 0.]]), tensor([[0., 0.]]))
    """
    if isinstance(step, int) and step == 0:
        previous = None
    elif previous is None:
        raise ValueError("dpmpp_2m_step: this step needs `previous`, the x0 of the step before")
    return run_step(
        "dpmpp_2m_step",
        x,
        prediction,
        step,
        sampler,
        unconditional=unconditional,
        guidance=guidance,
        clip=clip,
        dynamic_threshold=dynamic_threshold,
        previous=previous,
        denoised=True,
        backend=backend,
    )
