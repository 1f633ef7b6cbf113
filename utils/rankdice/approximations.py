"""Approximations from the literature, to reproduce papers and for comparison with the exact solver.

``ba``, ``trna`` and ``paper`` are those of Dai & Li, JMLR 24(224), 2023: the number of positive pixels ``Gamma`` (for
``trna`` without pixel j) follows the *refined normal* distribution

    G(l) = Phi(x) + skew (1 - x^2) phi(x) / 6,   x = (l + 1/2 - mu) / sqrt(v),   P(l) = G(l) - G(l - 1),

truncated to the volumes between its 1e-4 and 1 - 1e-4 quantiles and renormalized. ``rma`` is that of Wang & Dai,
NeurIPS 2025. All of them sort whole rows, so they take at least the time and memory of a sort.

``paper`` does what the authors' program does, which produced the published tables; docs/rankdice.md lists the
differences from the paper.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .integral import Goal
from .table import Table, descending, draw, padded

EPSILON = 1e-4
PAPER_MEAN = 50.0  # the authors' program uses trna up to this mean volume, and ba above it
PIXEL_BYTES = 200
TRNA_TERMS = 1 << 16  # (pixel, volume) pairs of a row at a time


def solve(rows: Tensor, masks: Tensor, solver: str, goal: Goal, budget: int) -> Tensor:
    """Find each row's volume with an approximation, and draw its mask; the score is the approximate one.

    The arguments are those of :func:`utils.rankdice.exact.solve`, plus the name of a solver.
    """
    best = rows.new_empty(rows.shape[0], 3, dtype=torch.float64)
    for part in torch.arange(rows.shape[0]).split(max(1, budget // (PIXEL_BYTES * rows.shape[1]))):
        some = slice(int(part[0]), int(part[-1]) + 1)
        values, columns = descending(rows[some])
        values = values.double()
        table = Table.whole(padded(values), orders=[1])
        if solver == "rma":
            best[some] = reciprocal_moment(table, goal)
        else:
            best[some] = _choose(table, _scores(values, solver, goal.smooth, budget))
        draw(masks[some], columns, best[some, :1])
    return best


def _choose(table: Table, scores: Tensor) -> Tensor:
    """Return the best volume, given the scores ``(R, K + 1)`` of the empty mask and at the ends of the runs."""
    scores[:, 1:].masked_fill_(table.values[:, 1:-1] <= 0, -torch.inf)
    score, best = scores.max(1, keepdim=True)
    return torch.cat([table.volumes.gather(1, best), table.values.gather(1, best), score], 1)


def reciprocal_moment(table: Table, goal: Goal) -> Tensor:
    """RMA: use the reciprocal of the mean denominator instead of the mean of its reciprocal.

    Within a run of equal values the score is monotonic, so only the ends of the runs are scored.
    """
    volume, mass, mean, g = table.volumes[:, :-1], table.mass[:, :-1], table.total[:, 0], goal.smooth
    if goal.metric == "iou":
        return _choose(table, (mass + g) / (volume + mean - mass + g))
    return _choose(table, 2 * mass / (volume + mean + 1 + g) + g / (volume + mean + g))


def _moments(values: Tensor) -> Tensor:
    """Return mean, variance and third central moment of each pixel's label, ``(3, R, J)``."""
    spread = values * (1 - values)
    return torch.stack([values, spread, spread * (1 - 2 * values)])


def _scores(values: Tensor, solver: str, smooth: float, budget: int) -> Tensor:
    """Return the scores ``(R, 1 + N)`` of the volumes 0 to N."""
    program = solver == "paper"
    moments = _moments(values).sum(2)
    if program:
        moments[0] = (values >= 0.5).sum(1)
    # Does the row take trna?
    each = moments[0] <= PAPER_MEAN if program else torch.full_like(moments[0], solver == "trna", dtype=torch.bool)
    # Only rows of similar variance share a support width, so a row's sums do not depend on the batch.
    width = torch.exp2(torch.ceil(torch.log2(16 * moments[1].sqrt() + 16))).long()
    scores = values.new_zeros(values.shape[0], values.shape[1] + 1)
    for size, trna in {*zip(width.tolist(), each.tolist(), strict=True)}:
        rows = ((width == size) & (each == trna)).nonzero().view(-1)
        for part in rows.split(max(1, budget // (TRNA_TERMS * 64))):
            count = _Count(moments[:, part], size, values.shape[1], program)
            scores[part, 1:] = count.trna(values[part], smooth) if trna else count.blind(values[part], smooth)
            if smooth:
                scores[part, 0] = (count.chances * (smooth / (smooth + count.volumes))).sum(1)
    if program:
        most = torch.where(each, 5 * moments[0] + 1, torch.inf).masked_fill_(moments[0] == 0, 0)
        scores.masked_fill_(torch.arange(scores.shape[1], device=values.device) > most.unsqueeze(1), -torch.inf)
    return scores


class _Count:
    """The refined normal distribution of the number of positive pixels.

    Attributes:
        volumes: consecutive volumes around the mean, ``(R, L)``.
        possible: bool, which of them can occur.
        chances: their probabilities.
    """

    def __init__(self, moments: Tensor, width: int, pixels: int, program: bool) -> None:
        """Args: moments of the rows ``(3, R)``; number of volumes; pixels per row; follow the authors' program?"""
        self.moments, self.program = moments, program
        first = (moments[0] - width / 2).floor().clamp_(min=0)
        self.volumes = first.unsqueeze(1) + torch.arange(width, device=first.device)
        self.possible = self.volumes <= pixels
        if program:  # from floor(low quantile) - 1 to ceil(high quantile) - 1, also when a pixel is left out
            self.possible &= _refined_normal(self.volumes + 2, moments) > EPSILON
            self.possible &= _refined_normal(self.volumes, moments) < 1 - EPSILON
        self.chances = self.truncated(moments)

    def truncated(self, moments: Tensor) -> Tensor:
        """Return the probabilities of the volumes ``(R, ..., L)`` for moments ``(3, R, ...)``."""
        shape = (len(self.volumes), *[1] * (moments.dim() - 2), -1)
        volumes, kept = self.volumes.view(shape), self.possible.view(shape)
        upper, lower = (_refined_normal(volumes + half, moments) for half in (0.5, -0.5))
        if not self.program:
            kept = kept & (upper >= EPSILON) & (lower <= 1 - EPSILON)
        mass = (upper - lower).clamp_(min=0) * kept
        return mass / mass.sum(-1, keepdim=True).clamp(min=1e-300)

    def blind(self, values: Tensor, smooth: float) -> Tensor:
        """Return the scores of the blind approximation: leaving out pixel j does not change the distribution."""
        pixels = values.shape[1]
        # E[1 / (tau + 1 + g + Gamma)] for tau = 0, 1, ... is a correlation.
        length = 1 << (pixels + 1 + self.volumes.shape[1]).bit_length()
        steps = torch.arange(length, device=values.device, dtype=torch.float64)
        spectrum = torch.fft.rfft(1 / (steps + self.volumes[:, :1] + 1 + smooth))
        means = torch.fft.irfft(spectrum * torch.fft.rfft(self.chances, n=length).conj(), n=length)
        return 2 * values.cumsum(1) * means[:, 1 : pixels + 1] + smooth * means[:, :pixels]

    def trna(self, values: Tensor, smooth: float) -> Tensor:
        """Return the scores of trna: each count without pixel j has its own refined normal distribution."""
        scores, mass = torch.full_like(values, -torch.inf), values.cumsum(1)
        carried, best = torch.zeros_like(self.volumes), torch.zeros_like(values[:, 0])
        step = max(1, TRNA_TERMS // self.volumes.shape[1])
        for first in range(0, values.shape[1], step):
            # E[1 / (a + X)] <= 1 / (a + least X): can no larger volume win?
            if first and bool(((2 * mass[:, -1] + smooth) / (first + 1 + smooth + self.volumes[:, 0]) < best).all()):
                break
            part = values[:, first : first + step]
            without = self.moments.unsqueeze(2) - _moments(part)
            without[:2].clamp_(min=0)
            weighted = part.unsqueeze(2) * self.truncated(without)  # (R, J, L)
            weighted = weighted.cumsum_(1).add_(carried.unsqueeze(1))
            carried = weighted[:, -1].clone()
            volume = torch.arange(first + 1, first + part.shape[1] + 1, device=values.device).view(-1, 1)
            below = volume + (smooth + self.program) + self.volumes.unsqueeze(1)
            score = 2 * (weighted / (below + 1)).sum(2)
            if smooth:
                score += smooth * (self.chances.unsqueeze(1) / below).sum(2)
            scores[:, first : first + step] = score
            best = torch.maximum(best, score.amax(1))
        return scores


def _refined_normal(count: Tensor, moments: Tensor) -> Tensor:
    """Return the cumulative distribution ``(R, ..., L)`` at counts, for moments ``(3, R, ...)``."""
    mean, variance, third = moments.unsqueeze(-1)
    deviation = variance.clamp(min=1e-12).sqrt()
    x = (count - mean) / deviation
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(x) + third / deviation**3 * (1 - x * x) * density / 6
