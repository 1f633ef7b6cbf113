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
        solvers: those that can maximize it.
        measure: from the numbers of pixels in mask and target, in the mask, and in the target, to the score; NaN where
            both are empty.
        to_dice, from_dice: from this score of a mask to its Dice, and back.
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
    """Return scores of masks by one metric as those of the same masks by another; expected scores only roughly."""
    return scores if metric == wanted else METRICS[wanted].from_dice(METRICS[metric].to_dice(scores))
