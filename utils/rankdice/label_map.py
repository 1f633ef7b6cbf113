"""One label per pixel with a high total of expected Dice, instead of masks that overlap.

The total to be maximized over label maps is ``sum_c s_c``, ``s_c = (2 C_c + g) / (tau_c + mu_c + 1 + g)``: ``tau_c``
pixels carry class ``c``, ``C_c`` is the sum of their probabilities, ``mu_c`` the expected volume of the class. It is a
choice of this project and not part of the RankDice papers; a local optimum is found.

Moving one pixel from class ``o`` to class ``c`` changes the total by exactly

    (2 p_c - s_c) / (tau_c + mu_c + 2 + g)  +  (s_o - 2 p_o) / (tau_o + mu_o + g)

Moving all pixels at once that gain by this may lower the total. So the gains are sorted into levels, the totals of
moving the first 1, 2, ... levels are computed exactly, and the best of them is taken. The first level is the one pixel
that gains most: the total rises as long as any single move raises it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = 24  # of gains, each half as large as the one before, after the level of the single best pixel
ROUNDS = 2

Bands = Callable[[], Iterable[tuple[int, Tensor]]]


class Classes(NamedTuple):
    """What the ascent needs to know of each class, float64 ``(B, C)`` unless said otherwise.

    Attributes:
        mean: expected volume, the sum of the probabilities.
        volumes: pixels of the best mask alone.
        scores: expected score of that mask.
        chosen: bool, which classes take part.
    """

    mean: Tensor
    volumes: Tensor
    scores: Tensor
    chosen: Tensor


def check_classes(classes: Sequence[int] | Tensor | None, images: int, count: int, device: torch.device) -> Tensor:
    """Return which classes take part, bool ``(B, C)``; all where none is chosen."""
    if isinstance(classes, Tensor) and classes.dtype == torch.bool:
        if classes.shape != (images, count):
            raise ValueError(f"classes: expected a bool tensor ({images}, {count}), got shape {tuple(classes.shape)}")
        chosen = classes.to(device)
        return chosen | ~chosen.any(1, keepdim=True)
    names = list(range(count)) if classes is None else [int(c) for c in classes]
    if not names or len(set(names)) < len(names) or not all(0 <= c < count for c in names):
        raise ValueError(f"classes: expected different class indices in [0, {count}), got {classes!r}")
    return torch.tensor([c in names for c in range(count)], device=device).expand(images, count)


def ascend(bands: Bands, pixels: int, classes: Classes, smooth: float, rounds: int = ROUNDS) -> Tensor:
    """Return label maps, int16 ``(B, pixels)``, for probabilities that are read band by band.

    Args:
        bands: yields ``(first, probs)`` again at every call: ``(B, C, n)`` float64 probabilities of the
            pixels from ``first``.
        pixels: how many there are.
        classes: the classes.
        smooth: the constant g.
        rounds: at most so many times pixels are moved.
    """
    fixed = classes.mean + (1 + smooth)
    size = classes.volumes + fixed
    closed = classes.chosen.logical_not()
    labels, total, volume, mass = _start(bands, pixels, 2 / size, classes.scores / size, closed, fixed, smooth)
    other = _start(bands, pixels, torch.ones_like(size), torch.zeros_like(size), closed, fixed, smooth)
    better = (other[1] > total).unsqueeze(1)  # argmax among the same classes
    labels, volume, mass = (
        torch.where(better, b, a) for a, b in zip((labels, volume, mass), (other[0], *other[2:]), strict=True)
    )
    for _ in range(rounds):
        size = volume + fixed
        score = (2 * mass + smooth) / size
        moves = _Moves(bands, labels, size, score, closed)
        step = moves.changes.cumsum(3)  # (2, B, C, LEVELS + 1) pixels and probability
        after = (2 * (mass.unsqueeze(2) + step[1]) + smooth) / (size.unsqueeze(2) + step[0])
        totals = after.masked_fill_(closed.unsqueeze(2), 0).sum(1)
        best, level = totals.max(1, keepdim=True)
        level = level.masked_fill_(best <= score.masked_fill(closed, 0).sum(1, keepdim=True), -1)
        labels = torch.where(moves.levels <= level, moves.labels, labels)
        step = step.gather(3, level.clamp(min=0).view(1, -1, 1, 1).expand(2, -1, size.shape[1], -1)).squeeze(3)
        step = step * (level >= 0)
        volume, mass = volume + step[0], mass + step[1]
    return labels


def _start(
    bands: Bands, pixels: int, slope: Tensor, offset: Tensor, closed: Tensor, fixed: Tensor, smooth: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give every pixel the class with the largest ``slope * p - offset``; return labels, total, volumes and masses."""
    slope, offset = slope.unsqueeze(2), offset.masked_fill(closed, torch.inf).unsqueeze(2)
    labels = torch.empty(fixed.shape[0], pixels, dtype=torch.int16, device=fixed.device)
    sums = fixed.new_zeros(2, *fixed.shape)
    for first, probs in bands():
        best = (probs * slope).sub_(offset).max(1).indices  # on a CPU faster than argmax
        labels[:, first : first + probs.shape[2]] = best
        own = probs.gather(1, best.unsqueeze(1)).squeeze(1)
        sums[0].scatter_add_(1, best, torch.ones_like(own))
        sums[1].scatter_add_(1, best, own)
    scores = (2 * sums[1] + smooth) / (sums[0] + fixed)
    return labels, scores.masked_fill_(closed, 0).sum(1), sums[0], sums[1]


class _Moves:
    """For every pixel the class to which its move gains most.

    Attributes:
        labels: int16 ``(B, N)`` that class.
        levels: int16 ``(B, N)`` level of the gain: 0 for the largest of the image, ``LEVELS + 1`` for no gain.
        changes: float64 ``(2, B, C, LEVELS + 1)``, the pixels and the probability that each level brings to a class.
    """

    def __init__(self, bands: Bands, labels: Tensor, size: Tensor, score: Tensor, closed: Tensor) -> None:
        images, classes = size.shape
        self.labels, self.levels = torch.empty_like(labels), torch.empty_like(labels)
        slope, offset = (2 / (size + 1)).unsqueeze(2), (score / (size + 1)).masked_fill(closed, torch.inf).unsqueeze(2)
        leave, stay = score / (size - 1), 2 / (size - 1)
        scale = size.amin(1, keepdim=True) / 2  # gains times this are at most about 1
        changes = size.new_zeros(2, images, classes * (LEVELS + 2))
        kept = []
        for first, probs in bands():
            part = slice(first, first + probs.shape[2])
            old = labels[:, part].long()
            gains = (probs * slope).sub_(offset).scatter_(1, old.unsqueeze(1), -torch.inf)
            gain, new = gains.max(1)
            before, behind = (probs.gather(1, c.unsqueeze(1)).squeeze(1) for c in (old, new))
            gain = gain + leave.gather(1, old) - before * stay.gather(1, old)
            level = (1 - (gain * scale).clamp_(1e-30, 1).log2_()).long().clamp_(max=LEVELS)
            level = level.masked_fill_(gain <= 0, LEVELS + 1)
            self.labels[:, part], self.levels[:, part] = new, level
            for sign, label, value in ((1, new, behind), (-1, old, before)):
                key = label * (LEVELS + 2) + level
                changes[0].scatter_add_(1, key, torch.full_like(value, sign))
                changes[1].scatter_add_(1, key, value * sign)
            peak, where = gain.max(1, keepdim=True)
            kept.append((peak, where + first, *(v.gather(1, where) for v in (level, new, behind, old, before))))
        # The pixel with the largest gain becomes a level of its own.
        peaks = [torch.cat(values, 1) for values in zip(*kept, strict=True)]
        peak, which = peaks[0].max(1, keepdim=True)
        where, level, new, behind, old, before = (values.gather(1, which) for values in peaks[1:])
        sign = (peak > 0).double()
        for factor, label, value in ((1, new, behind), (-1, old, before)):
            for n, amount in enumerate((sign * factor, sign * factor * value)):
                changes[n].scatter_add_(1, label * (LEVELS + 2) + level, -amount)
                changes[n].scatter_add_(1, label * (LEVELS + 2), amount)
        level = level.masked_fill(peak > 0, 0)
        self.levels.scatter_(1, where, level.to(self.levels.dtype))
        self.changes = changes.unflatten(2, (classes, LEVELS + 2))[..., : LEVELS + 1]
