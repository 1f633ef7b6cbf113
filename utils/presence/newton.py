"""Minimize a smooth convex function of a few numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_MOST_STEPS = 100
_SMALLEST_STEP = 1e-12  # a step is not halved further


def minimum(terms: Callable[[Tensor], tuple[float, Tensor, Tensor]], start: Tensor, tolerance: float) -> Tensor:
    """Return the arguments ``(K,)`` of the lowest value, by Newton steps; steps that overshoot are halved.

    Args:
        terms: returns the value, its gradient ``(K,)`` and its curvature ``(K, K)`` at arguments.
        start: arguments to start from.
        tolerance: stop when no argument changes by more.
    """
    best, (lowest, gradient, curvature) = start, terms(start)
    for _ in range(_MOST_STEPS):
        # Also where the curvature is singular. (With torch 2.6, lstsq gives other last digits in each call.)
        step = torch.linalg.pinv(curvature, hermitian=True) @ gradient
        while (found := terms(best - step))[0] > lowest and float(step.abs().max()) > _SMALLEST_STEP:
            step = step / 2
        if found[0] > lowest:
            break
        best, (lowest, gradient, curvature) = best - step, found
        if float(step.abs().max()) < tolerance:
            break
    return best
