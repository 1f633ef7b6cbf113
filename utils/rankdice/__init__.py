"""RankDice: the masks with the highest expected Dice or IoU, found exactly and in linear time.

A *row* is one (image, class) pair: ``d`` probabilities of independent pixel labels ``Y_j``. The mask with the
highest expected Dice (or IoU) consists of the ``tau`` most probable pixels for some volume ``tau``
(Dai & Li, "RankSEG: A Consistent Ranking-based Framework for Segmentation", JMLR 24(224), 2023, Theorem 1).
:func:`rank_dice` finds ``tau`` for every row of a batch at once. :func:`label_map` gives every pixel one label instead
of overlapping masks.

This folder only needs torch: you can copy it into any project. ``docs/rankdice.md`` explains the method and its cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import approximations, exact
from .integral import Goal
from .label_map import Classes, ascend, check_classes
from .scores import METRICS, SOLVERS, Metric, Score, Solver, converted
from .table import CPU, Table, best_volumes, empty_scores, padded, upload

__all__ = ["METRICS", "SOLVERS", "Metric", "Options", "RankDice", "Score", "Solver"]
__all__ += ["converted", "label_map", "rank_counts", "rank_dice"]

MOST_SMOOTH = 1e5  # with more, all scores are so close to 1 that rounding decides

_SMALLEST_BUDGET, _LARGEST_BUDGET, _CHUNK_BYTES = 16 << 20, 256 << 20, 4  # the last: per pixel of a chunk
_GPU_CHUNK_BYTES, _GPU_SHARE = 192, 8  # a GPU works on whole maps (few, large operations), in this part of its memory


@dataclass(frozen=True)
class Options:
    """The options of :func:`rank_dice`: ``rank_dice(probs, **vars(options))``.

    Attributes:
        metric: ``"dice"`` or ``"iou"`` (the latter with solvers ``exact`` and ``rma``).
        solver: ``"exact"``, or an approximation from the literature: ``"ba"``, ``"trna"`` and ``"paper"`` (the
            authors' program) from the paper above, or ``"rma"`` (Wang & Dai, "RankSEG-RMA", NeurIPS 2025).
        smooth: the constant ``g`` in ``(2 |A and Y| + g) / (|A| + |Y| + g)`` and
            ``(|A and Y| + g) / (|A or Y| + g)``, from 0 to 100,000.
        prune: rows without a probability above ``prune`` get an empty mask; None: no pruning.

    Raises:
        ValueError: a value is out of its range; the message names the argument.
    """

    metric: str = "dice"
    solver: str = "exact"
    smooth: float = 0.0
    prune: float | None = 0.5

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {self.metric!r}")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {self.solver!r}")
        able = METRICS[self.metric].solvers
        if self.solver not in able:
            use = " or ".join(map(repr, able))
            raise ValueError(f"solver: {self.solver!r} does not support the metric {self.metric!r}; use {use}")
        if not 0 <= self.smooth <= MOST_SMOOTH:
            raise ValueError(
                f"smooth: expected a number from 0 to {MOST_SMOOTH:,.0f}, got {self.smooth!r}; with more, all masks "
                "score the same up to rounding, and the best one approaches the threshold 0.5"
            )
        if self.prune is not None and not 0 <= self.prune <= 1:
            raise ValueError(f"prune: expected None or a number in [0, 1], got {self.prune!r}")

    @property
    def goal(self) -> Goal:
        """Return what is maximized."""
        return Goal(self.metric, float(self.smooth))


class RankDice(NamedTuple):
    """The result of :func:`rank_dice`, one entry per (image, class) row.

    Attributes:
        masks: bool, shape of the probabilities; exactly ``volumes`` pixels are True in each row.
        volumes: int64 ``(B, C)``, the number of pixels in the mask; 0 where the row was pruned.
        cutoffs: ``(B, C)`` in the dtype of the probabilities, the smallest probability in the mask;
            ``inf`` for an empty mask.
        scores: float64 ``(B, C)``, the expected score of the mask, as the solver computes it.
        highest: ``(B, C)`` in the dtype of the probabilities, the largest probability of the row; 0 without pixels.
    """

    masks: Tensor
    volumes: Tensor
    cutoffs: Tensor
    scores: Tensor
    highest: Tensor


@torch.no_grad()
def rank_dice(
    probs: Tensor,
    metric: str = Options.metric,
    solver: str = Options.solver,
    smooth: float = Options.smooth,
    prune: float | None = Options.prune,
    valid: Tensor | None = None,
    max_bytes: int | None = None,
) -> RankDice:
    """Find, for every image and class, the mask with the highest expected Dice or IoU.

    Rows do not depend on each other: in a batch, each row gets the volume and mask that it gets alone, and the same
    score up to 1e-12.
    Pixels with equal probabilities enter the mask in the order of their index (row-major over the spatial
    dimensions), so that a mask has exactly ``volumes`` pixels.

    Args:
        probs: ``(B, C, *spatial)`` probabilities in [0, 1], float16, bfloat16, float32 or float64, any device and
            memory layout, at least one spatial dimension. Not modified.
        metric: see :class:`Options`.
        solver: see :class:`Options`.
        smooth: see :class:`Options`.
        prune: see :class:`Options`.
        valid: bool, ``(B, *spatial)`` or broadcastable to ``probs``. Pixels where it is False (padding, outside the
            field of view) are not ranked and never in a mask. Their values are not read.
        max_bytes: approximate working memory in addition to the result. None: the size of ``probs`` in float32, at
            least 16 MiB and at most 256 MiB; on a GPU 192 bytes per value, at most an eighth of the GPU's memory. It
            only affects the speed. A row that must be sorted as a whole takes about 170 bytes per pixel.

    Returns:
        The masks, volumes, cut-off probabilities, expected scores and largest probabilities. An empty mask scores 0
        when ``smooth`` is 0, else ``E[g / (g + |Y|)]``.

    Raises:
        TypeError: ``probs`` or ``valid`` is not a tensor or has the wrong dtype.
        ValueError: an argument is out of its range; the message names it.
    """
    options = Options(metric, solver, smooth, prune)
    if max_bytes is not None and max_bytes <= 0:
        raise ValueError(f"max_bytes: expected a positive number, got {max_bytes!r}")
    rows = _as_rows(probs, valid)  # (B * C, N)
    max_bytes = _budget(probs) if max_bytes is None else max_bytes
    masks = torch.empty(rows.shape, dtype=torch.bool, device=rows.device)
    highest = rows.amax(1) if rows.shape[1] else rows.new_zeros(rows.shape[0])
    with torch.inference_mode(rows.device.type in CPU):  # less overhead per operation, which matters for small maps
        found = _solve(rows, highest, masks, options, max_bytes)
    # Tensors made in inference mode cannot be changed elsewhere: these are copies.
    volumes, cutoffs, scores = found.view(*probs.shape[:2], 3).unbind(2)
    cutoffs = cutoffs.to(probs.dtype, copy=True).masked_fill_(cutoffs == 0, torch.inf)
    return RankDice(masks.view(probs.shape), volumes.long(), cutoffs, scores.clone(), highest.view(probs.shape[:2]))


def _solve(rows: Tensor, highest: Tensor, masks: Tensor, options: Options, max_bytes: int) -> Tensor:
    """Fill the masks of rows ``(R, N)``; return volumes, cut-offs (0 for an empty mask) and scores ``(R, 3)``."""
    count, on_cpu = rows.shape[0], rows.device.type in CPU
    if not rows.numel():
        return rows.new_zeros(count, 3, dtype=torch.float64)
    lowest, most = torch.stack([rows.amin(1), highest]).tolist()
    exact.check_range(lowest, most)
    active = [row for row, value in enumerate(most) if value > (options.prune or 0.0)]
    step = max(1, max_bytes // ((_CHUNK_BYTES if on_cpu else _GPU_CHUNK_BYTES) * rows.shape[1]))
    solver = exact.solve if options.solver == "exact" else partial(approximations.solve, solver=options.solver)
    if len(active) == count <= step:
        return solver(rows, masks, goal=options.goal, budget=max_bytes)
    found = rows.new_zeros(count, 3, dtype=torch.float64)
    if len(active) < count:
        masks.zero_()
    if options.smooth and len(active) < count:
        pruned = upload(sorted({*range(count)} - {*active}), rows.device, torch.int64)
        for part in pruned.split(step):
            found[part, 2] = exact.empty_scores(rows[part], options.goal, max_bytes)
    for first in range(0, len(active), step):
        if len(active) == count:  # without a copy of the rows, which would take half as long as solving them
            some = slice(first, first + step)
            found[some] = solver(rows[some], masks[some], goal=options.goal, budget=max_bytes)
            continue
        which = upload(active[first : first + step], rows.device, torch.int64)
        own = torch.empty(len(which), rows.shape[1], dtype=torch.bool, device=rows.device)
        found[which] = solver(rows.index_select(0, which), own, goal=options.goal, budget=max_bytes)
        masks[which] = own
    return found


@torch.no_grad()
def label_map(
    probs: Tensor,
    classes: Sequence[int] | Tensor | None = None,
    smooth: float = 0.0,
    max_bytes: int | None = None,
    found: RankDice | None = None,
) -> Tensor:
    """Give every pixel one class so that the sum over the classes of their approximate expected Dice is high.

    RankDice masks of different classes may overlap or leave a pixel without a class. This maximizes instead, over
    label maps, ``sum_c (2 C_c + g) / (tau_c + mu_c + 1 + g)``: ``tau_c`` pixels have class ``c``, ``C_c`` is the
    sum of their probabilities, ``mu_c`` the expected volume of the class. It starts from the RankDice masks of the
    classes, with each pixel in the mask where it gains most, or from the most probable classes if their sum is
    higher. Then it moves the pixels that raise the sum. This criterion is a choice of this project, not of the
    RankDice paper. The result is a local optimum.

    Args:
        probs: ``(B, C, *spatial)`` probabilities, as in :func:`rank_dice`.
        classes: the classes to use: indices for all images, or bool ``(B, C)``, one row per image. None means all.
            An image for which no class is chosen uses all of them.
        smooth: the constant ``g``.
        max_bytes: working memory, as in :func:`rank_dice`.
        found: the result of ``rank_dice(probs, smooth=smooth, prune=None)`` for the same probabilities, if available.

    Returns:
        int64 ``(B, *spatial)``, the index of a class for each pixel.

    Raises:
        TypeError, ValueError: as :func:`rank_dice`; ``classes`` is empty, repeated, out of range, or has the wrong
            shape.
    """
    Options(smooth=smooth)
    check_tensor(probs)
    chosen = check_classes(classes, probs.shape[0], probs.shape[1], probs.device)
    if found is None:
        found = rank_dice(probs, smooth=smooth, prune=None, max_bytes=max_bytes)
    if probs.numel() == 0:
        return probs.new_zeros(probs.shape[:1] + probs.shape[2:], dtype=torch.int64)
    maps = probs.flatten(2)
    step = max(1, (max_bytes or _budget(probs)) // (64 * max(1, maps.shape[0] * maps.shape[1])))

    def bands() -> Iterator[tuple[int, Tensor]]:
        for first in range(0, maps.shape[2], step):
            yield first, maps[:, :, first : first + step].double()

    mean = torch.stack([part.sum(2) for _, part in bands()]).sum(0)
    facts = Classes(mean, found.volumes.double(), found.scores, chosen)
    labels = ascend(bands, maps.shape[2], facts, float(smooth))
    return labels.long().view(probs.shape[0], *probs.shape[2:])


def rank_counts(values: Tensor, counts: Tensor, options: Options = Options()) -> tuple[Tensor, Tensor, Tensor]:  # noqa: B008
    """Solve rows given as tables of how often each probability occurs, with ``exact`` or ``rma``.

    Used for images that do not fit in memory: float16 has only 15,361 values in [0, 1].

    Args:
        values: float64 ``(K,)`` probabilities, ascending.
        counts: ``(R, K)`` int64, how many pixels of each row have each value.
        options: metric, solver, smoothing and pruning.

    Returns:
        Volumes int64, cut-off probabilities float64 (``inf`` for an empty mask) and expected scores float64, ``(R,)``,
        the same as :func:`rank_dice` finds from the single pixels.

    Raises:
        ValueError: a solver other than ``exact`` and ``rma``.
    """
    if options.solver not in ("exact", "rma"):
        raise ValueError(f"solver: {options.solver!r} does not support tables; use 'exact' or 'rma'")
    table = Table.whole(padded(values.flip(0).expand(counts.shape)), padded(counts.flip(1)))
    highest = torch.where(counts > 0, values, 0).amax(1)
    found = values.new_zeros(counts.shape[0], 3)
    if options.smooth:
        found[:, 2] = empty_scores(table, options.goal, _LARGEST_BUDGET)
    active = (highest > (options.prune or 0.0)).nonzero().view(-1)
    if active.numel():
        some = table.of(active)
        if options.solver == "exact":
            found[active] = best_volumes(some, options.goal, _LARGEST_BUDGET)
        else:
            found[active] = approximations.reciprocal_moment(some, options.goal)
    volumes, cutoffs, scores = found.unbind(1)
    return volumes.long(), cutoffs.masked_fill(cutoffs == 0, torch.inf), scores


def _budget(probs: Tensor) -> int:
    """Return how many bytes of working memory to use."""
    if probs.device.type in CPU:
        return max(_SMALLEST_BUDGET, min(probs.numel() * max(4, probs.element_size()), _LARGEST_BUDGET))
    cuda = probs.device.type == "cuda"
    memory = torch.cuda.get_device_properties(probs.device).total_memory if cuda else 32 << 30
    return max(_LARGEST_BUDGET, min(probs.numel() * _GPU_CHUNK_BYTES, memory // _GPU_SHARE))


# --- checks -----------------------------------------------------------------------------------------------------------


def check_tensor(probs: Tensor) -> None:
    """Raise unless ``probs`` can be ``(batch, classes, *spatial)`` probabilities."""
    if not isinstance(probs, Tensor) or not probs.is_floating_point():
        kind = probs.dtype if isinstance(probs, Tensor) else type(probs).__name__
        raise TypeError(f"probs: expected a tensor of floating point probabilities, got {kind}")
    if probs.dim() < 3:
        raise ValueError(f"probs: expected (batch, classes, *spatial), got shape {tuple(probs.shape)}")
    if probs.dim() == 3 and _is_an_image(probs):
        raise ValueError(
            f"probs: expected (batch, classes, *spatial), got shape {tuple(probs.shape)}, which looks like (classes, "
            "height, width) without a batch; pass probs[None], or probs[..., None] if it is (batch, classes, pixels)"
        )


def _is_an_image(probs: Tensor) -> bool:
    """Do three dimensions look like ``(classes, height, width)``, by their sizes or because the classes add up to 1?"""
    short, long = sorted(probs.shape[1:])
    if short >= 16 and long <= 4 * short:
        return True
    if min(probs.shape) < 2:
        return False
    over = [probs.sum(dim, dtype=torch.float64).sub_(1).abs_().amax() for dim in (0, 1)]
    first, second, spread = torch.stack([*over, (probs.amax() - probs.amin()).double()]).tolist()
    return first < 1e-3 < second and spread > 0


def _as_rows(probs: Tensor, valid: Tensor | None) -> Tensor:
    """Return ``(B * C, N)`` contiguous probabilities, with zeros (never in a mask) outside ``valid``."""
    check_tensor(probs)
    shape = (probs.shape[0] * probs.shape[1], probs.shape[2:].numel())
    if valid is None:
        return probs.contiguous().view(shape)
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
    return rows.masked_fill_(~mask, 0).view(shape)
