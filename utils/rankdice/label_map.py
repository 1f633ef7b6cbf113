"""One label per pixel instead of masks that overlap, with a high total of expected Dice.

The total is that of :func:`utils.rankdice.label_map`, ``sum_c s_c``, ``s_c = (2 C_c + g) / (tau_c + mu_c + 1 + g)``.
Moving one pixel from class ``o`` to class ``c`` changes it by exactly

    (2 p_c - s_c) / (tau_c + mu_c + 2 + g)  +  (s_o - 2 p_o) / (tau_o + mu_o + g)

Moving at once all pixels that gain may lower the total. So the gains are sorted into levels, and the exact totals are
computed for moving no level, the first level, the first two levels, and so on. The best of these is used. Further steps
gain almost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .table import upload

LEVELS = 24  # of gains, each half as large as the one before

Bands = Callable[[], Iterable[tuple[int, Tensor]]]


class Classes(NamedTuple):
    """What the ascent needs to know of each class, float64 ``(B, C)`` unless said otherwise.

    Attributes:
        mean: expected volume, the sum of the probabilities.
        volumes: number of pixels in the RankDice mask of the class.
        scores: expected score of that mask.
        chosen: bool, which classes are used.
    """

    mean: Tensor
    volumes: Tensor
    scores: Tensor
    chosen: Tensor


def check_classes(classes: Sequence[int] | Tensor | None, images: int, count: int, device: torch.device) -> Tensor:
    """Return which classes are used, bool ``(B, C)``; all of them where none is chosen."""
    if isinstance(classes, Tensor) and classes.dtype == torch.bool:
        if classes.shape != (images, count):
            raise ValueError(f"classes: expected a bool tensor ({images}, {count}), got shape {tuple(classes.shape)}")
        chosen = classes.to(device)
        return chosen | ~chosen.any(1, keepdim=True)
    names = list(range(count)) if classes is None else [int(c) for c in classes]
    if not names or len(set(names)) < len(names) or not all(0 <= c < count for c in names):
        raise ValueError(f"classes: expected different class indices in [0, {count}), got {classes!r}")
    return upload([c in names for c in range(count)], device, torch.bool).expand(images, count)


def ascend(bands: Bands, pixels: int, classes: Classes, smooth: float) -> Tensor:
    """Return label maps, int16 ``(B, pixels)``, for probabilities that are read band by band.

    Args:
        bands: every call yields all ``(first, probs)``: float64 probabilities ``(B, C, n)`` of the pixels from
            ``first`` on.
        pixels: the number of pixels.
        classes: the classes.
        smooth: the constant g.
    """
    fixed, closed = classes.mean + (1 + smooth), classes.chosen.logical_not()
    size = classes.volumes + fixed
    # By gain from the RankDice masks, and by probability: argmax among the same classes.
    slopes = torch.stack([2 / size, torch.ones_like(size)])
    offsets = torch.stack([classes.scores / size, torch.zeros_like(size)])
    labels, sums = _start(bands, pixels, slopes, offsets.masked_fill_(closed, torch.inf))
    totals = ((2 * sums[:, 1] + smooth) / (sums[:, 0] + fixed)).masked_fill_(closed, 0).sum(2)  # (2, B)
    better = (totals[1] > totals[0]).unsqueeze(1)
    labels = torch.where(better, labels[1], labels[0])
    volume, mass = torch.where(better, sums[1], sums[0])
    size, above = volume + fixed, 2 * mass + smooth
    wanted, levels, changes = _moves(bands, labels, size, above / size, closed)
    step = changes.cumsum(3)
    after = torch.add(above.unsqueeze(2), step[1], alpha=2) / (size.unsqueeze(2) + step[0])
    level = after[..., : LEVELS + 1].masked_fill(closed.unsqueeze(2), 0).sum(1).max(1, keepdim=True).indices
    return torch.where(levels <= level, wanted, labels)


def _start(bands: Bands, pixels: int, slopes: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Give every pixel the class with the largest ``slope * p - offset``, for two sets of slopes ``(2, B, C)``.

    Returns:
        Labels ``(2, B, N)``; volumes and masses of the classes ``(2, 2, B, C)``.
    """
    labels = torch.empty(*slopes.shape[:2], pixels, dtype=torch.int16, device=slopes.device)
    sums = slopes.new_zeros(2, *slopes.shape).transpose(0, 1)
    for first, probs in bands():
        part = slice(first, first + probs.shape[2])
        # On a CPU, max is faster than argmax.
        best = torch.stack(
            [(probs * a.unsqueeze(2)).sub_(b.unsqueeze(2)).max(1).indices for a, b in zip(slopes, offsets, strict=True)]
        )
        labels[..., part] = best
        own = torch.stack([probs.gather(1, labels_.unsqueeze(1)).squeeze(1) for labels_ in best])
        values = torch.stack([torch.ones_like(own), own], 1)
        sums.scatter_add_(3, best.unsqueeze(1).expand_as(values), values)
    return labels, sums


def _moves(bands: Bands, labels: Tensor, size: Tensor, score: Tensor, closed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the class to which each pixel should move to gain most.

    Returns:
        The class, int16 ``(B, N)``; the level of the gain, int16 ``(B, N)``, starting at 1, ``LEVELS + 1`` for no
        gain; the number of pixels and the sum of probabilities that each level adds to each class, float64
        ``(2, B, C, LEVELS + 2)``.
    """
    images, classes = size.shape
    bins = LEVELS + 2
    wanted, levels = torch.empty_like(labels), torch.empty_like(labels)
    more, less = size + 1, size - 1
    slope, offset = (2 / more).unsqueeze(2), (score / more).masked_fill_(closed, torch.inf).unsqueeze(2)
    leave, stay = score / less, 2 / less
    scale = size.amin(1, keepdim=True) / 2  # gains times this are at most about 1
    changes = size.new_zeros(2, images, classes * bins)
    for first, probs in bands():
        part = slice(first, first + probs.shape[2])
        old = labels[:, part].long()
        gain, new = (probs * slope).sub_(offset).scatter_(1, old.unsqueeze(1), -torch.inf).max(1)
        before, behind = (probs.gather(1, c.unsqueeze(1)).squeeze(1) for c in (old, new))
        gain = torch.addcmul(gain + leave.gather(1, old), before, stay.gather(1, old), value=-1)
        level = (1 - (gain * scale).frexp().exponent).clamp_(1, LEVELS).masked_fill_(gain <= 0, LEVELS + 1)
        wanted[:, part], levels[:, part] = new, level
        keys = torch.add(torch.cat([level, level], 1), torch.cat([new, old], 1), alpha=bins)
        values = torch.cat([behind, -before], 1)
        values = torch.stack([torch.ones_like(values).copysign_(values), values])
        changes.scatter_add_(2, keys.expand(2, -1, -1), values)
    return wanted, levels, changes.unflatten(2, (classes, bins))
