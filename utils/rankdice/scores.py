"""The scores of masks that RankDice can maximize, and its solvers: their names, and what the scores measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

from torch import Tensor

Metric = Literal["dice", "iou"]
Solver = Literal["exact", "ba", "trna", "paper", "rma"]
SOLVERS: tuple[str, ...] = get_args(Solver)


class Score(NamedTuple):
    """A score of a mask; :class:`utils.rankdice.integral.Goal` has its expected value.

    Attributes:
        title: its name in results and texts.
        solvers: the solvers that can maximize it.
        measure: returns the score, given the number of pixels in both mask and target, in the mask, and in the
            target; NaN if mask and target are empty.
        to_dice, from_dice: convert this score of a mask to its Dice, and back.
    """

    title: str
    solvers: tuple[str, ...]
    measure: Callable[[Tensor, Tensor, Tensor], Tensor]
    to_dice: Callable[[Tensor], Tensor] = lambda score: score
    from_dice: Callable[[Tensor], Tensor] = lambda dice: dice


METRICS: dict[str, Score] = {
    "dice": Score("Dice", SOLVERS, lambda both, mask, target: 2 * both / (mask + target)),
    "iou": Score(
        "IoU",
        ("exact", "rma"),
        lambda both, mask, target: both / (mask + target - both),
        to_dice=lambda iou: 2 * iou / (1 + iou),
        from_dice=lambda dice: dice / (2 - dice),
    ),
}


def converted(scores: Tensor, metric: str, wanted: str) -> Tensor:
    """Convert the scores of masks from one metric to another; for expected scores, this is an approximation."""
    return scores if metric == wanted else METRICS[wanted].from_dice(METRICS[metric].to_dice(scores))
