"""Held-out scores: every image of the validation data is scored with a fit on the other folds."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils import evidence
from utils.errors import UserError
from utils.evaluation import Evaluator, Part
from utils.evaluation.reliability import THRESHOLDS, Reliability, threshold_scores
from utils.evaluation.temperature import TEMPERATURES, Calibration, LogitSample, fit_bias, fit_temperature
from utils.metrics import count, image_scores
from utils.predict import PROCEDURES, PredictOptions
from utils.presence import learning

KEPT_BYTES = 2**30  # of logits, for the second look at an image
TRIED_IMAGES = 24  # in single against multiscale
LEAST_FRAMES = 4  # images of a group that names show, on average
TRIED_PIXELS = 2**21  # larger images are not tried at twice their size

OWN, SCALED, SHIFTED = "as trained", "temperature", "temperature and bias"


@dataclass
class Seen:
    """Data kept from the pass over the images: a sample of pixels, the logits if they fit, images to test views on."""

    sample: LogitSample
    every: int
    maps: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    tried: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    bytes: int = 0
    images: int = 0

    @property
    def complete(self) -> bool:
        """Whether the logits of all images are kept."""
        return self.bytes <= KEPT_BYTES

    def add(self, part: Part) -> None:
        """Add the images of a part."""
        self.sample.add(part)
        for i, name in enumerate(part.batch.names):
            logits, target = part.logits[i].float(), part.target[i]
            self.bytes += logits.numel() * 4
            if self.complete:
                self.maps[name] = (logits.cpu(), target.cpu())
            else:
                self.maps.clear()
            if self.images % self.every == 0 and target.numel() <= TRIED_PIXELS:
                self.tried.append((name, part.batch.images[i].cpu(), target.cpu()))
            self.images += 1


class Calibrations:
    """The calibrations that are tried: fitted on all images, and for each fold on the images of the other folds.

    Args:
        sample: the pixels of all images.
        activation: see :class:`utils.evaluation.temperature.Calibration`.
        own: the calibration that the network has now.
        group_of: returns the group of an image by its name (a patient, a drive). Groups are not divided among folds.
            None: the groups that the names show, if consecutive images are alike (:func:`_named_groups`). Without
            groups, or with a single one: folds of consecutive images.

    Attributes:
        groups: how many groups ``group_of`` finds.
        example: a group that the names show, or None.
    """

    def __init__(
        self, sample: LogitSample, activation: Any, own: Calibration, group_of: Callable[[str], str] | None = None
    ) -> None:
        self.activation = activation
        self.images = sorted(sample.rows)
        groups = [group_of(name) for name in self.images] if group_of else []
        self.groups = len(set(groups))
        shown = [] if group_of else _named_groups(sample)
        self.example = min(shown, default=None)
        groups = groups if self.groups > 1 else shown
        self.folds = _grouped(groups) if groups else learning.consecutive(len(self.images))
        self.fold = dict(zip(self.images, self.folds.tolist(), strict=True))
        self.sample = sample
        self.final = self._fitted(self.images, own, {})
        self.names = list(self.final)
        self.of_fold = {}
        for fold in self.folds.unique().tolist():
            others = [name for name in self.images if self.fold[name] != fold]
            found = self._fitted(others or self.images, own, self.final)
            self.of_fold[fold] = [found.get(name, own) for name in self.names]

    def _fitted(self, images: Sequence[str], own: Calibration, start: dict[str, Calibration]) -> dict[str, Calibration]:
        logits, target = self.sample.stacked(images)
        try:
            near = start.get(SCALED, own).temperature
            temperature = fit_temperature(logits, target, self.activation, start=near)
        except ValueError as error:
            raise UserError(f"the temperature cannot be fitted on the validation data: {error}") from None
        found = {OWN: own}
        if temperature not in TEMPERATURES:
            found[SCALED] = Calibration(temperature)
            common = _common([self.sample.rows[name][1] for name in images], logits.shape[1])
            shifted = fit_bias(logits, target, self.activation, common, start.get(SHIFTED, found[SCALED]))
            if shifted is not None:
                found[SHIFTED] = shifted
        return found

    def held_out(self, name: str) -> list[Calibration]:
        """Return the calibrations for an image, which were fitted without it."""
        return self.of_fold[self.fold[name]]

    def quality(self, name: str) -> tuple[dict[str, float], Tensor]:
        """Return how good the probabilities of the held-out images are under one kind of calibration.

        Returns:
            NLL, Brier score and calibration errors of all; the NLL of each image ``(N,)``.
        """
        facts, place = self.sample.facts, self.names.index(name)
        gathered = Reliability(facts.num_classes, facts.ignore_index, self.activation)
        totals = [gathered.totals.clone()]
        for image in self.images:
            logits, target = self.sample.rows[image]
            calibration = self.held_out(image)[place]
            gathered.add_pixels(calibration(logits[:, :, None, None], self.activation)[:, :, 0, 0], target)
            totals.append(gathered.totals.clone())
        found, each = gathered.compute(), torch.stack(totals).diff(dim=0)
        return {key: found[key] for key in ("NLL", "Brier", "ECE", "Class_ECE")}, each[:, 0] / each[:, 2]


def _common(labels: Sequence[Tensor], classes: int) -> Tensor:
    """Return the classes that are in enough images to have a bias, bool ``(C,)``."""
    found = torch.zeros(max(classes, 2))
    for target in labels:
        found[target.unique()] += 1
    common = found >= learning.FEWEST_PER_CLASS
    return common[1:] if classes == 1 else common


def _named_groups(sample: LogitSample) -> list[str]:
    """Return the group of each image, sorted by name: what is before the last number of its name; or nothing.

    Frames of a few videos usually have such names. A fit on some frames works on the rest of the same videos, but
    perhaps not on other videos, so whole videos must be held out. Images that do not resemble their neighbors need no
    groups.
    """
    names, classes = sorted(sample.rows), max(sample.facts.num_classes, 2)
    groups = [re.sub(r"\d+\D*$", "", name) for name in names]
    if not 1 < len(set(groups)) <= len(names) / LEAST_FRAMES:
        return []
    labels = [sample.rows[name][1] for name in names]
    areas = [torch.bincount(label, minlength=classes) / max(len(label), 1) for label in labels]
    return groups if evidence.independent(torch.stack(areas)) < len(names) / 2 else []


def _grouped(groups: Sequence[str]) -> Tensor:
    """Return the fold of each image, int64 ``(N,)``: at most five folds, filled group by group."""
    names = sorted(set(groups))
    sizes = torch.zeros(min(learning.FOLDS, len(names)))
    fold_of = {}
    for name in sorted(names, key=lambda name: (-groups.count(name), name)):
        fold_of[name] = int(sizes.argmin())
        sizes[fold_of[name]] += groups.count(name)
    return torch.tensor([fold_of[group] for group in groups])


class Row(NamedTuple):
    """Results of one image under one calibration: ``(C,)`` over the classes of interest, and mDice of T per threshold.

    Stacked for all images: ``(N, C)`` and ``(N, thresholds)``.
    """

    highest: Tensor
    scores: Tensor
    measured: Tensor
    present: Tensor
    sweep: Tensor


class Scorer:
    """Predicts images under each calibration, and keeps the rows for the fits of presence and threshold."""

    def __init__(
        self, evaluator: Evaluator, options: PredictOptions, calibrations_of: Callable[[str], Sequence[Calibration]]
    ) -> None:
        self.evaluator, self.calibrations_of = evaluator, calibrations_of
        self.options = replace(options, presence="all")
        self.thresholds = thresholds(options.threshold)
        self.rows: dict[str, list[Row]] = {}

    def add(self, part: Part) -> None:
        """Add the images of a part."""
        for i, name in enumerate(part.batch.names):
            self.at(name, part.logits[i], part.target[i])

    def at(self, name: str, logits: Tensor, target: Tensor) -> None:
        """Add an image: logits ``(C, H, W)``, target ``(H, W)``."""
        known: dict[Calibration, Row] = {}
        for calibration in self.calibrations_of(name):
            if calibration not in known:
                known[calibration] = self._row(calibration(logits[None], self.evaluator.network.activation), target)
        self.rows[name] = [known[calibration] for calibration in self.calibrations_of(name)]

    def _row(self, probs: Tensor, target: Tensor) -> Row:
        facts = self.evaluator.facts
        found = PROCEDURES["rankdice"](probs, self.options)
        assert found.scores is not None
        counts = count(found, target[None], facts.num_classes, facts.ignore_index, self.evaluator.count_ignored)
        scores = image_scores(counts)
        measured = scores.of[self.options.metric]
        own = list(self.options.classes or range(facts.num_classes))
        columns = (probs.flatten(2).amax(2), found.scores, measured.nan_to_num(0.0), counts.target > 0)
        highest, expected, reached, present = (value[0, own].cpu() for value in columns)
        sweep = threshold_scores(
            probs[0], target, facts, self.thresholds, self.options.classes, self.evaluator.count_ignored
        )
        return Row(highest, expected, reached, present, sweep)


def stacked(rows: dict[str, list[Row]], calibrations: int) -> list[Row]:
    """Return the rows of all images, sorted by name, one below the other: a :class:`Row` per calibration."""
    ordered = [rows[name] for name in sorted(rows)]
    return [Row(*(torch.stack(x) for x in zip(*(one[k] for one in ordered), strict=True))) for k in range(calibrations)]


def thresholds(before: float) -> list[float]:
    """Return the thresholds of T that are tried; the one used so far is among them."""
    return sorted({*THRESHOLDS, before})
