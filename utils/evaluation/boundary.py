"""Boundary IoU: how well the outlines of masks agree (Cheng et al., "Boundary IoU", CVPR 2021).

The boundary of a mask consists of its pixels within a distance ``d`` of its contour. Boundary IoU is the IoU of the
boundaries of prediction and target. Errors in the outline of a large object hardly change the plain IoU, but they
change the boundary IoU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.evaluation import Part
from utils.facts import Facts

RATIO = 0.02  # of the image's diagonal, as in the paper


def distance_of(height: int, width: int) -> int:
    """Return the distance ``d`` in pixels for an image: a share of its diagonal, at least 1."""
    return max(1, round(RATIO * (height**2 + width**2) ** 0.5))


def boundary(masks: Tensor, distance: int) -> Tensor:
    """Return the pixels of each mask that an erosion by ``distance`` steps removes.

    One step of the erosion takes away the pixels with a pixel outside the mask among their 8 neighbors. What lies
    outside the image is outside the mask.

    Args:
        masks: bool ``(..., H, W)``.
        distance: in pixels, at least 1.
    """
    outside = F.pad(1 - masks.flatten(0, -3).float(), (distance,) * 4, value=1.0)
    side = 2 * distance + 1
    # A square window is a row and a column, one after the other.
    near = F.max_pool2d(F.max_pool2d(outside, (side, 1), stride=1), (1, side), stride=1)
    return masks & near.bool().view_as(masks)


@dataclass
class BoundaryIoU:
    """Gathers the boundary IoU per image and class of each procedure.

    Ignored pixels belong to no mask: they are taken out of prediction and target before the boundaries are drawn.
    """

    facts: Facts  # classes and ignore index of the data
    classes: Sequence[int]  # of interest
    rows: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # procedure -> image -> scores (C,)

    def add(self, part: Part) -> None:
        """Score the images of a part."""
        distance = distance_of(*part.target.shape[-2:])
        valid = (part.target != self.facts.ignore_index)[:, None]
        labels = [1] if self.facts.num_classes == 1 else list(range(self.facts.num_classes))
        target = boundary(_masks(part.target, labels) & valid, distance)
        for name, prediction in part.predictions.items():
            masks = _masks(prediction.labels, labels) if prediction.labels is not None else prediction.masks
            assert masks is not None
            found = boundary(masks & valid, distance)
            both, either = (found & target).sum((2, 3)), (found | target).sum((2, 3))
            scores = torch.where(either > 0, both / either, torch.nan).double().cpu()
            self.rows.setdefault(name, {}).update(zip(part.batch.names, scores, strict=True))

    def merge(self, others: Iterable[BoundaryIoU]) -> None:
        """Add what other processes have scored."""
        for other in others:
            for name, rows in other.rows.items():
                self.rows.setdefault(name, {}).update(rows)

    def compute(self) -> dict[str, dict[str, Any]]:
        """Return per procedure ``Mean_Boundary_IoU`` and ``Class_Boundary_IoU``, NaN where nothing is defined.

        Means are computed like those of the other scores: over the classes of interest of an image, then over images.
        """
        found = {}
        for name, rows in self.rows.items():
            scores = torch.stack([rows[image] for image in sorted(rows)])
            found[name] = {
                "Mean_Boundary_IoU": scores[:, list(self.classes)].nanmean(dim=1).nanmean().item(),
                "Class_Boundary_IoU": scores.nanmean(dim=0).tolist(),
            }
        return found


def _masks(labels: Tensor, classes: list[int]) -> Tensor:
    return labels[:, None] == torch.tensor(classes, device=labels.device).view(1, -1, 1, 1)
