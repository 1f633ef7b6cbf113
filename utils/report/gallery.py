"""The images where rankdice gains and loses most against max, kept as pictures while a test runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from utils.evaluation import Part
from utils.facts import Facts
from utils.images.palette import complete_palette, displayable
from utils.metrics import image_scores
from utils.predict import Prediction, label_map

Picture = NDArray[np.uint8]

KEPT = 12
SIDE = 512  # the longer side of a picture
NO_CLASS = -1  # label of pixels in no mask
UNASSIGNED = (235, 235, 235)
# Where rankdice and max differ, which one is right? Dark colors on a pale image, also distinct for the color-blind.
RANKDICE_RIGHT, MAX_RIGHT, BOTH_WRONG = (0, 80, 200), (205, 55, 0), (0, 0, 0)
PALEST = 205  # gray of the darkest pixel of that image
CONTRAST = 3.0  # the least contrast of two classes, as for graphics in the Web Content Accessibility Guidelines


@dataclass(frozen=True)
class Case:
    """One image: its mean Dice under max and rankdice, and its pictures by title."""

    name: str
    baseline: float
    rankdice: float
    pictures: dict[str, Picture]

    @property
    def gain(self) -> float:
        """The gain of rankdice."""
        return self.rankdice - self.baseline

    @property
    def rank(self) -> tuple[float, str]:
        """What cases are sorted by: the size of the change; of equal ones, the name decides."""
        return abs(self.gain), self.name


@dataclass
class Gallery:
    """Keeps the images with the biggest ``gains`` and ``losses``, the biggest first.

    Memory is bounded by ``2 * kept`` sets of pictures.
    """

    facts: Facts  # classes and palette
    classes: Sequence[int] = ()  # of interest; none given: all
    kept: int = KEPT  # so many gains, and so many losses
    gains: list[Case] = field(default_factory=list)
    losses: list[Case] = field(default_factory=list)

    shown: ClassVar = ("T", "max", "rankdice")

    def __post_init__(self) -> None:
        number = self.facts.num_classes
        self.classes = list(self.classes or range(number))
        self.palette = contrasting(complete_palette(self.facts.palette, max(number, 256)), number)

    def add(self, part: Part) -> None:
        """Look at the images of a part."""
        means = {
            name: image_scores(part.counts[name]).dice[:, self.classes].nanmean(dim=1).tolist()
            for name in ("max", "rankdice")
        }
        for i, (base, ranked) in enumerate(zip(means["max"], means["rankdice"], strict=True)):
            change = ranked - base
            if not math.isfinite(change) or change == 0:
                continue
            cases, name = (self.gains if change > 0 else self.losses), part.batch.names[i]
            if len(cases) < self.kept or (abs(change), name) > cases[-1].rank:
                self._keep(Case(name, base, ranked, self._draw(part, i)))

    def _keep(self, case: Case) -> None:
        cases = self.gains if case.gain > 0 else self.losses
        cases.append(case)
        cases.sort(key=lambda one: one.rank, reverse=True)
        del cases[self.kept :]

    def merge(self, others: Iterable[Gallery]) -> None:
        """Add what other processes have kept."""
        for other in others:
            for case in (*other.gains, *other.losses):
                self._keep(case)

    # ------------------------------------------------------------------------------------------ pictures

    def _draw(self, part: Part, i: int) -> dict[str, Picture]:
        image = part.batch.images[i].permute(1, 2, 0).cpu().numpy()
        height, width = image.shape[:2]
        shrink = min(1.0, SIDE / max(height, width))
        size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
        target = part.target[i].cpu().numpy().astype(np.int64)
        labels = {name: self._labels(part, name, i) for name in self.shown}
        small_image = np.asarray(cv2.resize(displayable(image), size, interpolation=cv2.INTER_AREA), np.uint8)
        pictures: dict[str, Picture] = {"image": small_image}
        pictures["target"] = self._colors(_smaller(target, size))
        for name, one in labels.items():
            pictures[name] = self._colors(_smaller(one, size))
        small = [_smaller(x, size) for x in (labels["rankdice"], labels["max"], target)]
        pictures["rankdice against max"] = self._disagreement(small_image, *small)
        return pictures

    def _labels(self, part: Part, name: str, i: int) -> NDArray[np.int64]:
        """Return one label per pixel of what was scored; where masks overlap, the most probable class.

        With two classes, one of them of interest, it is the mask of that class, as in inference.py.
        """
        masks, labels = part.predictions[name][:2]
        if labels is not None:
            return labels[i].cpu().numpy()
        assert masks is not None
        if masks.shape[1] == 2 and len(self.classes) == 1:
            only = self.classes[0]
            return torch.where(masks[i, only], only, 1 - only).cpu().numpy()
        alone = Prediction(masks[i : i + 1])
        return label_map(name, part.probs[i : i + 1], found=alone, unassigned=NO_CLASS)[0].cpu().numpy()

    def _colors(self, labels: NDArray[np.int64]) -> Picture:
        known = max(self.facts.num_classes, 2)
        inside = (labels >= 0) & (labels < known)
        unassigned = np.array(UNASSIGNED, np.uint8)
        return np.where(inside[..., None], self.palette[np.where(inside, labels, 0)], unassigned).astype(np.uint8)

    def _disagreement(
        self, image: Picture, ranked: NDArray[np.int64], base: NDArray[np.int64], target: NDArray[np.int64]
    ) -> Picture:
        """Return the image in pale gray with colored pixels where the two label maps differ.

        Classes of no interest, of which rankdice makes no masks, count as no class.
        """
        gray = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)
        pale = (PALEST + gray * ((255 - PALEST) / 255)).astype(np.uint8)
        canvas = np.repeat(pale[..., None], 3, axis=2)
        labeled = target != self.facts.ignore_index
        if self.facts.num_classes > 1:
            ranked, base, target = (np.where(np.isin(x, self.classes), x, NO_CLASS) for x in (ranked, base, target))
        differ = (ranked != base) & labeled
        canvas[differ] = BOTH_WRONG
        canvas[differ & (ranked == target)] = RANKDICE_RIGHT
        canvas[differ & (base == target)] = MAX_RIGHT
        return canvas


def contrasting(palette: NDArray[np.uint8], classes: int) -> NDArray[np.uint8]:
    """Return a palette; of two labels, the second one is white or black if it can hardly be told from the first.

    Thin structures, such as vessels, are lost in two dark colors.
    """
    if classes > 2:
        return palette
    linear = (palette[:2] / 255.0) ** 2.2
    first, second = (linear @ (0.2126, 0.7152, 0.0722) + 0.05).tolist()
    if max(first, second) / min(first, second) >= CONTRAST:
        return palette
    return np.concatenate([palette[:1], np.full((1, 3), 255 if first < 0.18 else 0, np.uint8), palette[2:]])


def _smaller(labels: NDArray[np.int64], size: tuple[int, int]) -> NDArray[np.int64]:
    """Return a label map at ``size`` (width, height), nearest pixels: labels cannot be averaged."""
    return cv2.resize(labels.astype(np.int32), size, interpolation=cv2.INTER_NEAREST_EXACT).astype(np.int64)
