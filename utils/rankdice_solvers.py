"""The approximations from the literature, kept to reproduce papers and to compare with the exact solver."""

from __future__ import annotations

from torch import Tensor

from utils.rankdice_exact import Volumes


def solve(rows: Tensor, active: Tensor, metric: str, solver: str, smooth: float, budget: int) -> Volumes:
    """Find each row's volume by an approximation."""
    raise NotImplementedError(solver)
