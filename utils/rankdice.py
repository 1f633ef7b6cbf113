"""RankDice: the masks with the highest expected Dice or IoU, found exactly and in linear time.

A *row* is one (image, class) pair: ``d`` probabilities of independent pixel labels ``Y_j``. The mask with the
highest expected Dice (or IoU) consists of the ``tau`` most probable pixels for some volume ``tau``
(Dai & Li, "RankSEG: A Consistent Ranking-based Framework for Segmentation", JMLR 24(224), 2023, Theorem 1),
so that only ``tau`` has to be found. :func:`rank_dice` finds it for every row of a batch at once;
:func:`label_map` makes one label per pixel instead of overlapping masks.

The method, its bounds and its cost are told in ``docs/rankdice.md``; the exact solver lives in
``utils/rankdice_exact.py``, the published approximations in ``utils/rankdice_solvers.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from utils import rankdice_exact, rankdice_solvers
from utils.rankdice_exact import Volumes
from utils.rankdice_sweep import tiles

SOLVERS = ("exact", "ba", "trna", "paper", "rma")
METRICS = ("dice", "iou")
IOU_SOLVERS = ("exact", "rma")

_SMALLEST_BUDGET = 16 << 20
_LARGEST_BUDGET = {"cpu": 256 << 20, "cuda": 1 << 30}


class RankDice(NamedTuple):
    """What :func:`rank_dice` found, one entry per (image, class) row.

    Attributes:
        masks: bool, shape of the probabilities; exactly ``volumes`` pixels are True in each row.
        volumes: int64 ``(B, C)``, the number of pixels in the mask.
        cutoffs: ``(B, C)`` in the dtype of the probabilities, the smallest probability in the mask;
            ``inf`` for an empty mask.
        scores: float64 ``(B, C)``, the expected score of the mask, as the solver computes it.
    """

    masks: Tensor
    volumes: Tensor
    cutoffs: Tensor
    scores: Tensor


@torch.no_grad()
def rank_dice(
    probs: Tensor,
    metric: str = "dice",
    solver: str = "exact",
    smooth: float = 0.0,
    prune: float | None = 0.5,
    valid: Tensor | None = None,
    max_bytes: int | None = None,
) -> RankDice:
    """Find, for every image and class, the mask with the highest expected Dice or IoU.

    Every (image, class) row is independent of every other: a batch gives, bit for bit on a CPU, what single rows
    give, in any order and for any ``max_bytes``. Pixels with equal probabilities enter the mask in the order of
    their index (row-major over the spatial dimensions), so that a mask has exactly ``volumes`` pixels.

    Args:
        probs: ``(B, C, *spatial)`` probabilities in [0, 1], float16, bfloat16, float32 or float64, any device and
            memory layout, at least one spatial dimension. Not modified.
        metric: ``"dice"`` or ``"iou"`` (the latter with solvers ``exact`` and ``rma``).
        solver: ``"exact"``, or an approximation from the literature: ``"ba"``, ``"trna"``, ``"paper"`` (trna for
            rows with an expected volume of at most 50, else ba) from the paper above, or ``"rma"`` (Wang & Dai,
            "RankSEG-RMA", NeurIPS 2025).
        smooth: the constant ``g >= 0`` in ``(2 |A and Y| + g) / (|A| + |Y| + g)`` and
            ``(|A and Y| + g) / (|A or Y| + g)``.
        prune: rows whose largest probability is at most ``prune`` get the empty mask; None switches this off.
        valid: bool, ``(B, *spatial)`` or broadcastable to ``probs``: pixels outside never enter the ranking and are
            never in a mask (padding, outside the field of view). Their values are not looked at.
        max_bytes: working memory beside the result, about. None: the size of ``probs``, at least 16 MiB and at most
            256 MiB (1 GiB on a GPU). It changes the speed only.

    Returns:
        The masks, volumes, cut-off probabilities and expected scores. An empty mask scores 0 when ``smooth`` is 0,
        else ``E[g / (g + |Y|)]``.

    Raises:
        TypeError: ``probs`` or ``valid`` is no tensor or has the wrong dtype.
        ValueError: an argument is out of its range; the message names it.
    """
    _check_options(metric, solver, smooth, prune, max_bytes)
    rows = _as_rows(probs, valid)  # (B * C, N)
    highest = _check_values(rows)
    budget = _budget(probs) if max_bytes is None else max_bytes
    active = highest > (0.0 if prune is None else prune)
    masks = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)
    if solver == "exact":
        found = rankdice_exact.solve(rows, masks, highest, active, metric, float(smooth), budget)
    else:
        found = rankdice_solvers.solve(rows, active, metric, solver, float(smooth), budget)
    _draw(rows, masks, found, budget)
    shape = probs.shape[:2]
    return RankDice(
        masks.view(probs.shape), found.volumes.view(shape), found.cutoffs.view(shape), found.scores.view(shape)
    )


@torch.no_grad()
def label_map(
    probs: Tensor,
    classes: Sequence[int] | None = None,
    smooth: float = 0.0,
    rounds: int = 20,
    max_bytes: int | None = None,
) -> Tensor:
    """Give every pixel one class so that the sum over the classes of their approximate expected Dice is high.

    RankDice masks of different classes may overlap or leave a pixel without a class. This maximises instead, over
    label maps, ``sum_c (2 C_c + g) / (tau_c + mu_c + 1 + g)``: ``tau_c`` pixels carry class ``c``, ``C_c`` is the
    sum of their probabilities, ``mu_c`` the expected volume of the class. Starting from the most probable class,
    every pixel takes the class with the largest gain ``(2 p_jc - s_c) / (tau_c + mu_c + 1 + g)``, ``s_c`` being the
    class's present score, as long as the total rises. This criterion is a choice of this project, not of the
    RankDice paper; it finds a local optimum.

    Args:
        probs: ``(B, C, *spatial)`` probabilities, as in :func:`rank_dice`.
        classes: the classes that take part; None means all.
        smooth: the constant ``g``.
        rounds: at most this many reassignments.
        max_bytes: working memory, as in :func:`rank_dice`.

    Returns:
        int64 ``(B, *spatial)``, entries from ``classes``.

    Raises:
        TypeError, ValueError: as :func:`rank_dice`; ``classes`` empty, repeated or out of range.
    """
    _check_options("dice", "exact", smooth, None, max_bytes)
    _check_tensor(probs)
    chosen = _check_classes(classes, probs.shape[1])
    maps = probs.flatten(2)
    if len(chosen) < probs.shape[1]:
        maps = maps[:, chosen]
    _check_values(maps.reshape(-1, maps.shape[2]))
    budget = _budget(probs) if max_bytes is None else max_bytes
    labels = _ascend(maps, float(smooth), rounds, budget)
    return chosen.to(labels.device)[labels].view(probs.shape[0], *probs.shape[2:])


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_options(metric: str, solver: str, smooth: float, prune: float | None, max_bytes: int | None) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")
    if metric == "iou" and solver not in IOU_SOLVERS:
        raise ValueError(f"solver: {solver!r} knows no IoU; metric 'iou' goes with {' and '.join(IOU_SOLVERS)}")
    if not 0 <= smooth < float("inf"):
        raise ValueError(f"smooth: expected a number >= 0, got {smooth!r}")
    if prune is not None and not 0 <= prune <= 1:
        raise ValueError(f"prune: expected None or a number in [0, 1], got {prune!r}")
    if max_bytes is not None and max_bytes <= 0:
        raise ValueError(f"max_bytes: expected a positive number, got {max_bytes!r}")


def _check_tensor(probs: Tensor) -> None:
    if not isinstance(probs, Tensor) or not probs.is_floating_point():
        kind = probs.dtype if isinstance(probs, Tensor) else type(probs).__name__
        raise TypeError(f"probs: expected a tensor of floating point probabilities, got {kind}")
    if probs.dim() < 3:
        raise ValueError(f"probs: expected (batch, classes, *spatial), got shape {tuple(probs.shape)}")


def _check_classes(classes: Sequence[int] | None, count: int) -> Tensor:
    chosen = list(range(count)) if classes is None else [int(c) for c in classes]
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= c < count for c in chosen):
        raise ValueError(f"classes: expected different class indices in [0, {count}), got {classes!r}")
    return torch.tensor(chosen)


def _check_values(rows: Tensor) -> Tensor:
    """Return the largest value of each row (0 for rows without pixels); raise where a value is no probability."""
    if rows.numel() == 0:
        return rows.new_zeros(rows.shape[0])
    lowest, highest = rows.amin(1), rows.amax(1)  # both hand NaN on
    if not bool(((lowest >= 0) & (highest <= 1)).all()):
        if not bool((lowest.isfinite() & highest.isfinite()).all()):
            raise ValueError("probs: found values that are not finite (NaN or infinity)")
        low, high = float(lowest.min()), float(highest.max())
        raise ValueError(f"probs: expected values in [0, 1], found values from {low:.6g} to {high:.6g}")
    return highest


def _as_rows(probs: Tensor, valid: Tensor | None) -> Tensor:
    """Return ``(B * C, N)`` contiguous probabilities, with zeros (never in a mask) outside ``valid``."""
    _check_tensor(probs)
    count = probs.shape[0] * probs.shape[1]
    if valid is None:
        return probs.contiguous().view(count, -1) if count else probs.reshape(0, probs.shape[2:].numel())
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
        raise TypeError("valid: expected a bool tensor")
    mask = valid.unsqueeze(1) if valid.dim() == probs.dim() - 1 else valid
    try:
        mask = mask.to(probs.device).expand(probs.shape)
    except RuntimeError:
        raise ValueError(
            f"valid: shape {tuple(valid.shape)} is neither (batch, *spatial) nor broadcastable to the shape of "
            f"probs, {tuple(probs.shape)}"
        ) from None
    rows = torch.empty(probs.shape, dtype=probs.dtype, device=probs.device).copy_(probs)
    return rows.masked_fill_(~mask, 0).view(count, -1) if count else rows.reshape(0, probs.shape[2:].numel())


def _budget(probs: Tensor) -> int:
    size = probs.numel() * probs.element_size()
    return max(_SMALLEST_BUDGET, min(size, _LARGEST_BUDGET.get(probs.device.type, 1 << 30)))


# --- masks ------------------------------------------------------------------------------------------------------------


def _draw(rows: Tensor, masks: Tensor, found: Volumes, budget: int) -> None:
    """Finish the masks of the ``found.volumes`` most probable pixels of each row, ties by pixel index."""
    missing = ~found.drawn
    masks[(missing & (found.volumes == 0)).nonzero().view(-1)] = False
    missing = (missing & (found.volumes > 0)).nonzero().view(-1)
    for tile in tiles(rows, missing, max(1, budget // 16)):
        names = missing[tile.names]
        inside = tile.values() >= found.cutoffs[names].unsqueeze(1)
        if tile.place is None:
            masks[names, tile.columns] = inside
        else:
            masks.view(-1)[tile.place : tile.place + inside.numel()] = inside.view(-1)
    torn = (found.surplus > 0).nonzero().view(-1)  # rows whose cut runs through equal probabilities
    if torn.numel():
        _drop_last_ties(rows, masks, found, torn, budget)


def _drop_last_ties(rows: Tensor, masks: Tensor, found: Volumes, torn: Tensor, budget: int) -> None:
    """Take the ``found.surplus`` last pixels that equal the cut-off out of the masks of rows ``torn``."""
    surplus = found.surplus[torn]
    for tile in reversed(list(tiles(rows, torn, max(1, budget // 64)))):
        chosen, left = torn[tile.names], surplus[tile.names]
        tied = tile.values() == found.cutoffs[chosen].unsqueeze(1)
        row, column = tied.nonzero(as_tuple=True)
        counts = torch.zeros_like(left).scatter_add_(0, row, torch.ones_like(row))
        from_end = counts.cumsum(0)[row] - torch.arange(row.numel(), device=row.device)  # the row's last tie: 1
        drop = from_end <= left[row]
        masks[chosen[row[drop]], column[drop] + tile.columns.start] = False
        surplus[tile.names] = (left - counts).clamp_(min=0)


# --- one label per pixel ----------------------------------------------------------------------------------------------


def _ascend(maps: Tensor, smooth: float, rounds: int, budget: int) -> Tensor:
    """Return ``(B, N)`` indices of classes: argmax, improved as :func:`label_map` says; ``maps`` is ``(B, C, N)``."""
    images, classes, pixels = maps.shape
    mean = torch.zeros(images, classes, dtype=torch.float64, device=maps.device)
    step = max(1, budget // (16 * max(1, images * classes)))
    parts = [slice(a, min(a + step, pixels)) for a in range(0, pixels, step)]
    for part in parts:
        mean += maps[:, :, part].double().sum(2)
    slope, offset = torch.ones_like(mean), torch.zeros_like(mean)
    best, best_total = None, None
    for _ in range(rounds + 1):
        labels, volume, mass = _assign(maps, slope, offset, parts)
        score = (2 * mass + smooth) / (volume + mean + 1 + smooth)
        total = score.sum(1, keepdim=True)
        if best is None or best_total is None:
            best, best_total, running = labels, total, torch.ones_like(total, dtype=torch.bool)
        else:
            # An image that has stopped rising rests, so that none depends on those beside it.
            better = running & (total > best_total)
            running = better
            if not bool(better.any()):
                break
            best = torch.where(better, labels, best)
            best_total = torch.where(better, total, best_total)
        slope = 2 / (volume + mean + 1 + smooth)
        offset = score / (volume + mean + 1 + smooth)
    assert best is not None
    return best


def _assign(maps: Tensor, slope: Tensor, offset: Tensor, parts: list[slice]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the class with the largest ``slope * p - offset`` per pixel, and each class's volume and mass."""
    images, classes, pixels = maps.shape
    labels = torch.empty(images, pixels, dtype=torch.int64, device=maps.device)
    volume, mass = torch.zeros_like(slope), torch.zeros_like(slope)
    for part in parts:
        probs = maps[:, :, part].double()
        chosen = (probs * slope.unsqueeze(2) - offset.unsqueeze(2)).argmax(1)
        labels[:, part] = chosen
        own = probs.gather(1, chosen.unsqueeze(1)).squeeze(1)
        volume.scatter_add_(1, chosen, torch.ones_like(own))
        mass.scatter_add_(1, chosen, own)
    return labels, volume, mass
