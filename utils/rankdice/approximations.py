"""The approximations from the literature, kept to reproduce papers and to be compared with the exact solver.

``ba``, ``trna`` and ``paper`` are those of Dai & Li, JMLR 24(224), 2023: the number of positive pixels ``Gamma`` (for
``trna`` without pixel j) follows the *refined normal* distribution

    G(l) = Phi(x) + skew (1 - x^2) phi(x) / 6,   x = (l + 1/2 - mu) / sqrt(v),   P(l) = G(l) - G(l - 1),

truncated to the volumes between its 1e-4 and 1 - 1e-4 quantiles and renormalized. ``rma`` is that of Wang & Dai,
NeurIPS 2025. They sort whole rows: time and memory are those of a sort, and more.

``paper`` is what the authors' program does, which made the published tables: trna up to a mean of 50, else ba. It
differs from the paper. As the mean it takes the number of pixels with ``p >= 0.5``, while variance and skewness are
those of all pixels; a row without such a pixel gets the empty mask. The truncation keeps up to two volumes more on
each side. trna has a denominator that is larger by one and tries volumes up to 5 times the mean plus one only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .exact import draw
from .integral import Goal
from .table import Best, Table, cutoffs

SOLVERS = ("ba", "trna", "paper", "rma")
EPSILON = 1e-4
PAPER_MEAN = 50.0  # the authors' program takes trna up to this mean volume and ba above
PIXEL_BYTES = 96
TRNA_TERMS = 1 << 16  # (pixel, volume) pairs of a row at a time


def solve(rows: Tensor, skipped: Tensor, masks: Tensor, solver: str, goal: Goal, budget: int) -> Best:
    """Find each row's volume by an approximation, and draw its mask; the score is the approximation's own.

    Args:
        rows: ``(R, N)`` probabilities.
        skipped: bool ``(R,)``: these rows get the empty mask.
        masks: bool ``(R, N)``, is filled.
        solver: one of ``SOLVERS``.
        goal: what is maximized: "iou" with rma only.
        budget: bytes of working memory, about; a row needs about 100 bytes per pixel.
    """
    found = []
    for part in torch.arange(rows.shape[0]).split(max(1, budget // (PIXEL_BYTES * rows.shape[1]))):
        some = slice(int(part[0]), int(part[-1]) + 1)
        values, columns = rows[some].sort(dim=1, descending=True, stable=True)
        table = Table.whole(values.double())
        if solver == "rma":
            best = reciprocal_moment(table, skipped[some], goal)
        else:
            scores, empty = _scores(table.values, solver, goal.smooth, budget)
            best = _choose(table, skipped[some], scores, empty.unsqueeze(1))
        draw(masks[some], columns, best.volumes.unsqueeze(1))
        found.append(best)
    volumes, cuts, scores, unproven = (torch.cat(parts) for parts in list(zip(*found, strict=True))[:4])
    return Best(volumes, cuts, scores, unproven, 0)


def _choose(table: Table, skipped: Tensor, scores: Tensor, empty: Tensor) -> Best:
    """Return the best of the volumes at the ends of the table's runs, by their scores ``(R, W)``."""
    volumes, _, values = table.sums()
    score, best = scores.masked_fill(table.values <= 0, -torch.inf).max(1, keepdim=True)
    none = skipped.unsqueeze(1) | (empty >= score)
    volume = volumes.gather(1, best + 1).masked_fill_(none, 0)
    score = torch.where(none, empty, score).squeeze(1)
    return Best(volume.squeeze(1), cutoffs(table, volumes, values, volume), score, skipped, 0)


def reciprocal_moment(table: Table, skipped: Tensor, goal: Goal) -> Best:
    """RMA: the mean of the denominator in place of the mean of its reciprocal.

    Inside a run of equal values the score rises or falls throughout, so that the ends of the runs are enough.
    """
    volumes, mass, _ = table.sums()
    g, mean, volume, mass = goal.smooth, table.mean, volumes[:, 1:], mass[:, 1:]
    empty = g / (mean + g) if g else torch.zeros_like(mean)
    if goal.metric == "iou":
        scores = (mass + g) / (volume + mean - mass + g)
    else:
        scores = 2 * mass / (volume + mean + 1 + g) + (g / (volume + mean + g) if g else 0)
    return _choose(table, skipped, scores, empty)


def _scores(values: Tensor, solver: str, smooth: float, budget: int) -> tuple[Tensor, Tensor]:
    """Return the scores ``(R, N)`` of the volumes 1 to N, and of the empty mask ``(R,)``."""
    program = solver == "paper"
    moments = _Moments.of(values)
    if program:
        moments.mean = (values >= 0.5).sum(1).double()
    scores, empty = torch.empty_like(values), torch.empty_like(moments.mean)
    use_trna = torch.full_like(moments.mean, solver == "trna", dtype=torch.bool)
    if program:
        use_trna = moments.mean <= PAPER_MEAN
    # Rows share one support width only with rows of similar variance: a row's sums do not depend on the batch.
    width = torch.exp2(torch.ceil(torch.log2(16 * moments.variance.sqrt() + 16))).long()
    for size in width.unique().tolist():
        for which, approximate in ((use_trna, _trna), (~use_trna, _blind)):
            rows = ((width == size) & which).nonzero().view(-1)
            for part in rows.split(max(1, budget // (TRNA_TERMS * 64))) if rows.numel() else ():
                support = Support(moments[part], int(size), values.shape[1], program)
                scores[part] = approximate(values[part], moments[part], support, smooth)
                empty[part] = support.empty_score(smooth)
    if program:
        most = torch.where(use_trna, 5 * moments.mean + 1, torch.inf).masked_fill_(moments.mean == 0, 0)
        volume = torch.arange(1, values.shape[1] + 1, device=values.device)
        scores.masked_fill_(volume > most.unsqueeze(1), -torch.inf)
    return scores, empty


class _Moments:
    """Mean, variance and third central moment ``(R, ...)`` of the number of positive pixels."""

    def __init__(self, mean: Tensor, variance: Tensor, third: Tensor) -> None:
        self.mean, self.variance, self.third = mean, variance, third

    @classmethod
    def of(cls, values: Tensor) -> _Moments:
        spread = values * (1 - values)
        return cls(values.sum(1), spread.sum(1), (spread * (1 - 2 * values)).sum(1))

    def __getitem__(self, index: Tensor) -> _Moments:
        return _Moments(self.mean[index], self.variance[index], self.third[index])

    def without(self, values: Tensor) -> _Moments:
        """Return the moments ``(R, J)`` without each of the pixels ``values``."""
        spread = values * (1 - values)
        return _Moments(
            (self.mean.unsqueeze(1) - values).clamp_(min=0),
            (self.variance.unsqueeze(1) - spread).clamp_(min=0),
            self.third.unsqueeze(1) - spread * (1 - 2 * values),
        )


class Support:
    """Volumes ``first .. first + width - 1`` of each row, on which the refined normal is taken."""

    def __init__(self, moments: _Moments, width: int, pixels: int, program: bool) -> None:
        """Args: moments of the rows; how many volumes; how many pixels a row has; as the authors' program does."""
        self.moments, self.program = moments, program
        first = (moments.mean - width / 2).floor().clamp_(min=0)
        self.volumes = first.unsqueeze(1) + torch.arange(width, device=first.device)  # (R, L)
        self.possible = self.volumes <= pixels
        if program:  # from floor(low quantile) - 1 to ceil(high quantile) - 1, for pixels taken out as well
            deviation = moments.variance.clamp(min=1e-12).sqrt().unsqueeze(-1)
            skew = moments.third.unsqueeze(-1) / deviation**3
            x = (self.volumes - moments.mean.unsqueeze(-1)) / deviation
            self.possible &= _refined_normal(x + 2 / deviation, skew) > EPSILON
            self.possible &= _refined_normal(x, skew) < 1 - EPSILON
        self.pmf = self.probabilities(moments)  # (R, L)

    def probabilities(self, moments: _Moments) -> Tensor:
        """Return the truncated, renormalized refined normal ``(..., L)`` for moments ``(R, ...)``."""
        dims = moments.mean.dim() - 1
        volumes = self.volumes.view(self.volumes.shape[0], *[1] * dims, -1)
        mean = moments.mean.unsqueeze(-1)
        deviation = moments.variance.clamp(min=1e-12).sqrt().unsqueeze(-1)
        skew = moments.third.unsqueeze(-1) / deviation**3
        upper = _refined_normal((volumes + 0.5 - mean) / deviation, skew)
        lower = _refined_normal((volumes - 0.5 - mean) / deviation, skew)
        kept = self.possible.view(volumes.shape)
        if not self.program:
            kept = kept & (upper >= EPSILON) & (lower <= 1 - EPSILON)
        mass = (upper - lower).clamp_(min=0) * kept
        return mass / mass.sum(-1, keepdim=True).clamp(min=1e-300)

    def empty_score(self, smooth: float) -> Tensor:
        """Return ``E[g / (g + Gamma)]`` ``(R,)``."""
        if smooth == 0:
            return torch.zeros_like(self.moments.mean)
        return (self.pmf * (smooth / (smooth + self.volumes))).sum(1)

    def reciprocal(self, pixels: int, smooth: float) -> Tensor:
        """Return ``E[1 / (tau + 1 + g + Gamma)]`` for tau = 0..pixels, ``(R, pixels + 1)``: a correlation, by FFT."""
        length = 1 << (pixels + 1 + self.volumes.shape[1]).bit_length()
        steps = torch.arange(length, device=self.volumes.device, dtype=torch.float64)
        reciprocals = 1 / (steps + self.volumes[:, :1] + 1 + smooth)
        spectrum = torch.fft.rfft(reciprocals) * torch.fft.rfft(self.pmf, n=length).conj()
        return torch.fft.irfft(spectrum, n=length)[:, : pixels + 1]


def _refined_normal(x: Tensor, skew: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(x) + skew * (1 - x * x) * density / 6


def _blind(values: Tensor, moments: _Moments, support: Support, smooth: float) -> Tensor:
    """Blind approximation: the count without pixel j is distributed like the count with it."""
    del moments
    reciprocal = support.reciprocal(values.shape[1], smooth)
    return 2 * values.cumsum(1) * reciprocal[:, 1:] + smooth * reciprocal[:, :-1]


def _trna(values: Tensor, moments: _Moments, support: Support, smooth: float) -> Tensor:
    """Truncated refined normal approximation: each count without pixel j has its own refined normal."""
    rows, pixels = values.shape
    scores = torch.full_like(values, -torch.inf)
    carried = torch.zeros_like(support.volumes)
    best = torch.zeros_like(moments.mean)
    step = max(1, TRNA_TERMS // support.volumes.shape[1])
    mass = values.cumsum(1)
    for first in range(0, pixels, step):
        part = values[:, first : first + step]
        if first:
            # E[1 / (a + X)] <= 1 / (a + least X): nothing from here on can win.
            least = first + 1 + smooth + support.volumes[:, 0]
            if bool(((2 * mass[:, -1] + smooth) / least < best).all()):
                break
        volume = torch.arange(first + 1, first + part.shape[1] + 1, device=values.device).view(-1, 1)
        weighted = part.unsqueeze(2) * support.probabilities(moments.without(part))  # (R, J, L)
        weighted = weighted.cumsum_(1).add_(carried.unsqueeze(1))
        carried = weighted[:, -1].clone()
        below = volume + (smooth + support.program) + support.volumes.unsqueeze(1)
        score = 2 * (weighted / (below + 1)).sum(2)
        if smooth:
            score += smooth * (support.pmf.unsqueeze(1) / below).sum(2)
        scores[:, first : first + step] = score
        best = torch.maximum(best, score.amax(1))
    return scores
