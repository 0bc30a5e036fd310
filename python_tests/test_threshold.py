"""The threshold of dynamic thresholding: an exact quantile of each row, on every backend."""

import functools
import math

import pytest
import torch
from torch import Tensor

import gmkernels
from gmkernels import Sampler, Schedule, dispatch, noise
from gmkernels.ops.diffusion_step import reference
from gmkernels.spec import filled

INFINITY, NAN = math.inf, math.nan
ROWS = {
    "ties": torch.tensor([[3.0, -2.0, 2.0, 2.0, 0.0, -3.0, 2.0, 1.0]]),
    "all equal": torch.tensor([[2.5, -2.5, 2.5]]),
    "one element": torch.tensor([[3.0], [-0.25]]),
    "two elements": torch.tensor([[3.0, -1.5]]),
    "zeros": torch.tensor([[0.0, -0.0, 5.0, 0.0]]),
    "subnormals": torch.tensor([[1e-45, -2e-45, 2.0, 1e-40]]),
    "all at the floor": filled((1, 37), torch.float32, "cpu", 0, scale=1e-2),
    "all at the maximum": filled((1, 37), torch.float32, "cpu", 0, scale=1e3),
    # A tile of Triton's programs ends at 4096 columns, a chunk of C++ at 8192.
    "more than a tile": filled((1, 4099), torch.float32, "cpu", 1, scale=2.0),
    "more than a chunk": filled((1, 8209), torch.float32, "cpu", 2, scale=2.0),
    "close together": 1 + filled((1, 300), torch.float32, "cpu", 3, scale=1e-6).abs(),
}


@functools.cache
def sampler_on(device: torch.device) -> Sampler:
    """Its network predicts x0, and its last step goes there: x' is the x0 that was clamped."""
    return Sampler.ddim(Schedule.linear(), 4, prediction_type="sample").to(device)


def last_step(x0: Tensor, ratio: float, most: float, backend: str) -> tuple[Tensor, Tensor]:
    """x' of the last step, and h [B] as the operator saves it for its backward."""
    sampler = sampler_on(x0.device)
    index = torch.full((len(x0),), len(sampler) - 1, device=x0.device)
    absent = (None,) * 5  # unconditional, previous, variance, eps, key
    given = (torch.zeros_like(x0), x0, *absent, sampler.table, index, 1.0, most, ratio, False)
    if backend == "reference":
        return reference.sampler_step(*given)[0], reference.threshold_of(x0, most, ratio)
    operators = getattr(torch.ops, dispatch.NAMESPACES[backend])
    x, _, h = operators.sampler_step_forward(*given, True)
    return x, h


@pytest.mark.parametrize("ratio", [0.37, 0.995, 1.0])
@pytest.mark.parametrize("name", ROWS)
def test_it_is_the_quantile(name, ratio, backends, device):
    x0, most = ROWS[name].to(device), 9.0
    exact = torch.quantile(x0.double().abs(), ratio, dim=1).clamp(1.0, most)
    column = exact[:, None]
    clamped = torch.minimum(torch.maximum(x0.double(), -column), column) / column
    for backend in backends:
        x, h = last_step(x0, ratio, most, backend)
        torch.testing.assert_close(h.double(), exact, rtol=3e-7, atol=0, msg=backend)
        torch.testing.assert_close(x.double(), clamped, rtol=1e-6, atol=1e-45, msg=backend)


@pytest.mark.parametrize("eighths", [1, 4, 7])
@pytest.mark.parametrize("columns", [9, 257])
def test_an_order_statistic_has_its_bits(columns, eighths, backends, device):
    """Where the quantile falls on an element, h is that element."""
    x0 = 1 + filled((1, columns), torch.float32, device, 5, scale=4.0).abs()
    place = eighths * (columns - 1) // 8
    for backend in backends:
        _, h = last_step(x0, eighths / 8, 100.0, backend)
        assert torch.equal(h, x0.sort(1).values[:, place]), backend


@pytest.mark.parametrize(
    ("row", "ratio", "h"),
    [
        ([1.0, 2.0, INFINITY, 4.0], 1.0, 9.0),
        ([1.0, 2.0, -INFINITY, 4.0], 2 / 3, 4.0),
        ([1.0, 2.0, INFINITY, 4.0], 0.7, 9.0),
        ([1.0, 2.0, INFINITY, 4.0], 0.95, 9.0),
        ([1.0, INFINITY, INFINITY, -INFINITY], 0.5, 9.0),
        ([INFINITY], 0.5, 9.0),
        ([1.0, NAN, 3.0, 4.0], 0.5, NAN),
        ([NAN, INFINITY, 3.0, -INFINITY], 1.0, NAN),
        ([-NAN], 0.5, NAN),
    ],
)
def test_infinity_and_nan(row, ratio, h, backends, device):
    """Infinity counts as the largest number, NaN takes its row and no other."""
    x0 = torch.tensor([row, [2.0] * len(row)], device=device)
    expected = torch.tensor([h, 2.0], device=device)
    for backend in backends:
        _, found = last_step(x0, ratio, 9.0, backend)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=backend)


def test_rows_do_not_see_their_neighbours(backends, device):
    """Guided and noised, in one batch or as 1 and 2 rows of it: the same bits."""
    sampler = Sampler.ddpm(Schedule.linear(), 4).to(device)
    x, c, u = (filled((3, 70), torch.float32, device, i) for i in range(3))
    options = {"guidance": 3.0, "dynamic_threshold": (0.8, 2.0), "seed": noise.key(7)}

    def run(rows: slice, backend: str) -> Tensor:
        return gmkernels.ddpm_step(
            x[rows],
            c[rows],
            1,
            sampler,
            unconditional=u[rows],
            offset=rows.start,
            backend=backend,
            **options,
        )

    for backend in backends:
        parts = [run(slice(0, 1), backend), run(slice(1, 3), backend)]
        assert torch.equal(run(slice(0, 3), backend), torch.cat(parts)), backend
