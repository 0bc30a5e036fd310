"""Minimisers of small convex problems, in float64: L-BFGS, and FISTA for an L1 penalty.

Beck and Teboulle 2009 (FISTA); O'Donoghue and Candes 2015 (its restarts).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Objective = Callable[[Tensor], tuple[Tensor, Tensor]]


def minimise_smooth(f: Objective, theta: Tensor, iterations: int, tolerance: float) -> float:
    """L-BFGS on f -> (value, gradient), in place; the largest of the gradient that is left.

    It ends at a gradient below tolerance, after so many iterations, or where rounding stops it.
    """
    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=iterations,
        max_eval=2 * iterations,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        value, theta.grad = f(theta)
        return float(value)

    optimizer.step(closure)
    return float(f(theta)[1].abs().max())


def minimise_l1(
    f: Objective, penalty: Tensor, lipschitz: float, theta: Tensor, iterations: int, tol: float
) -> float:
    """FISTA on f + sum penalty |theta|, in place; the largest of the gradient mapping left."""
    y, momentum, shrink, left = theta.clone(), 1.0, penalty / lipschitz, math.inf
    for _ in range(iterations):
        step = y - f(y)[1] / lipschitz
        new = step.sign() * (step.abs() - shrink).clamp(min=0)  # the proximal map of the penalty
        mapping, change = y - new, new - theta
        theta.copy_(new)
        left = float(mapping.abs().max()) * lipschitz
        if left <= tol:
            break
        if float((mapping * change).sum()) > 0:  # the momentum points uphill: drop it
            momentum = 1.0
        following = (1 + math.sqrt(1 + 4 * momentum * momentum)) / 2
        y = new + (momentum - 1) / following * change
        momentum = following
    return left
