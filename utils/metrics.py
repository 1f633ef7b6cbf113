"""Dice, IoU and accuracy per image and class, and their means (RankSEG paper, Appendix A).

For image i and class c with prediction ``P_ic`` and target ``Y_ic`` over the pixels that count::

    Dice_ic = 2 |P & Y| / (|P| + |Y|)        IoU_ic = |P & Y| / |P or Y|

both undefined if P and Y are both empty. ``Mean_Dice`` is the mean over the classes of interest where it is defined,
first in each image, then over images. ``Dataset_mDice`` and ``Dataset_mIoU`` are the other convention (Wang et al.,
NeurIPS 2023): counts of all images added up first, then one score per class, then the mean over classes.

Everything derives from three integer counts per image and class, ``|P & Y|``, ``|P|`` and ``|Y|``, taken on the
device in one pass, without a loop over classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils.predict import Prediction
from utils.rankdice import METRICS

AT_ONCE = 256  # images are added to the running sums together


class Counts(NamedTuple):
    """Pixel counts per image and class, int64 ``(B, C)``, and the pixels that count per image, int64 ``(B,)``.

    ``predicted``: -1 for classes on which the procedure did not decide. ``correct``: pixels of the image given the
    label of their target (-1 for masks, which may overlap).
    """

    intersection: Tensor
    predicted: Tensor
    target: Tensor
    pixels: Tensor
    correct: Tensor


def count(
    prediction: Prediction, target: Tensor, num_classes: int, ignore_index: int, count_ignored: bool = False
) -> Counts:
    """Count one batch.

    Args:
        prediction: masks ``(B, C, H, W)`` or labels ``(B, H, W)``.
        target: integer labels ``(B, H, W)``: class ids, with one class 0 or 1, or ``ignore_index``.
        count_ignored: count predictions on ignored pixels as wrong, as in the published script; by default ignored
            pixels are not counted.
    """
    masks, labels = prediction.masks, prediction.labels
    valid = target != ignore_index
    if num_classes == 1:
        # One channel: the class is label 1; the background has no mask.
        if labels is not None:
            masks, labels = (labels == 1)[:, None], None
        target = torch.where(target == 1, 0, 1)
    if labels is not None:
        return _count_labels(labels, target.long(), valid, num_classes, count_ignored)
    assert masks is not None
    counts = _count_masks(masks, prediction.volumes, target.long(), valid, num_classes, count_ignored)
    if prediction.presence is None:
        return counts
    # RankDice decides only on the classes of interest: the others have no score.
    undecided = prediction.presence.isnan().expand(counts.predicted.shape)
    return counts._replace(predicted=counts.predicted.masked_fill(undecided, -1))


def _count_labels(labels: Tensor, target: Tensor, valid: Tensor, num_classes: int, count_ignored: bool) -> Counts:
    batch = target.shape[0]
    image = torch.arange(batch, device=target.device).view(-1, 1, 1).expand_as(target)
    # Joint histogram of (image, target, label); target id C stands for "ignored", label id C for "none".
    rows = torch.where(valid, target, num_classes)
    columns = torch.where((labels >= 0) & (labels < num_classes), labels, num_classes)
    size = num_classes + 1
    joint = _histogram((image * size + rows) * size + columns, batch * size * size).view(batch, size, size)
    scored = joint if count_ignored else joint[:, :num_classes]
    intersection = joint.diagonal(dim1=1, dim2=2)[:, :num_classes]
    return Counts(
        intersection=intersection,
        predicted=scored.sum(dim=1)[:, :num_classes],
        target=joint[:, :num_classes].sum(dim=2),
        pixels=scored.sum(dim=(1, 2)),
        correct=intersection.sum(dim=1),
    )


def _count_masks(
    masks: Tensor, volumes: Tensor | None, target: Tensor, valid: Tensor, num_classes: int, count_ignored: bool
) -> Counts:
    batch = target.shape[0]
    image = torch.arange(batch, device=target.device).view(-1, 1, 1).expand_as(target)
    known = valid & (target >= 0) & (target < num_classes)
    size = batch * num_classes
    inside = torch.where(known, target, 0)
    # Pixels that do not count go to the last bin.
    rows = torch.where(known, image * num_classes + inside, size)
    targets = _histogram(rows, size + 1)[:size].view(batch, num_classes)
    own = masks.gather(1, inside[:, None])[:, 0]
    intersection = _histogram(torch.where(own, rows, size), size + 1)[:size].view(batch, num_classes)
    predicted = _volumes(masks) if volumes is None else volumes
    pixels = torch.full((batch,), target[0].numel() if batch else 0, device=target.device)
    if not count_ignored:
        on_ignored, ignored = _ignored(masks, valid)
        predicted = (predicted - on_ignored).clamp(min=0)  # below 0 means undecided, and only that
        pixels = pixels - ignored
    return Counts(intersection, predicted, targets, pixels, torch.full_like(pixels, -1))


def _volumes(masks: Tensor) -> Tensor:
    """Count the pixels of each mask ``(B, C, H, W)``; int64 ``(B, C)``."""
    # Whole rows are added first, in 32 bits: several times as fast on a CPU as count_nonzero along two dimensions.
    return masks.view(torch.uint8).sum(dim=2, dtype=torch.int32).sum(dim=2)


def _histogram(index: Tensor, bins: int) -> Tensor:
    """Count each of the integers 0 ... ``bins - 1`` in ``index``; int64 ``(bins,)``.

    bincount is fastest on a CPU; on a GPU it would wait for the device to learn the largest value.
    """
    index = index.flatten()
    if index.device.type == "cpu":
        return torch.bincount(index, minlength=bins)
    return torch.zeros(bins, dtype=torch.int64, device=index.device).scatter_add_(0, index, torch.ones_like(index))


def _ignored(masks: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many ignored pixels each mask ``(B, C)`` contains, and how many each image ``(B,)`` has."""
    if masks.device.type != "cpu":
        # One more pass over the masks, which waits for nothing.
        return torch.count_nonzero(masks & ~valid[:, None], dim=(2, 3)), torch.count_nonzero(~valid, dim=(1, 2))
    # Only the few ignored pixels are looked at again.
    where, y, x = torch.nonzero(~valid, as_tuple=True)
    counts = torch.zeros(masks.shape[:2], dtype=torch.int64)
    counts.index_add_(0, where, masks[where, :, y, x].to(counts.dtype))
    return counts, torch.bincount(where, minlength=len(masks))


class ImageScores(NamedTuple):
    """Scores per image and class, float64 ``(B, C)``, nan where undefined; accuracies per image ``(B,)``."""

    of: dict[str, Tensor]  # by the name of the metric, see utils.rankdice.METRICS
    pixel_accuracy: Tensor
    accuracy: Tensor

    @property
    def dice(self) -> Tensor:
        """The Dice scores."""
        return self.of["dice"]

    @property
    def iou(self) -> Tensor:
        """The IoU scores."""
        return self.of["iou"]


def image_scores(counts: Counts) -> ImageScores:
    """Return the scores of each image and class from counts; see the module's formulas.

    ``pixel_accuracy`` ``(B, C)`` is the binary accuracy of each class; ``accuracy`` ``(B,)`` the share of pixels with
    the right label (nan for masks).
    """
    intersection, predicted, target = (c.double() for c in counts[:3])
    predicted = predicted.masked_fill(predicted < 0, torch.nan)
    pixels = counts.pixels.double()
    wrong = predicted + target - 2 * intersection
    accuracy = torch.where(counts.correct < 0, torch.nan, counts.correct / pixels)
    # 0 / 0 is nan, as it should be
    of = {name: score.measure(intersection, predicted, target) for name, score in METRICS.items()}
    return ImageScores(of, 1 - wrong / pixels[:, None], accuracy)


class Metrics:
    """Gathers counts over batches and computes the scores once.

    Args:
        num_classes: classes counted.
        ignore_index: label of pixels that do not count.
        classes: the classes of interest, over which means are taken; None: all.
        count_ignored: see :func:`count`.
        keep_images: keep the counts of each image (a few numbers per class), so that :meth:`compute` gives the same
            bits for any batch size, order and number of processes, and :meth:`rows` can list the images. Without it
            only running sums are kept: constant memory, for training.
        expects: the metric of the expected scores of predictions, a name in :data:`utils.rankdice.METRICS`.
    """

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        classes: Sequence[int] | None = None,
        count_ignored: bool = False,
        keep_images: bool = False,
        expects: str = "dice",
    ) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.classes = list(range(num_classes)) if classes is None else list(classes)
        self.count_ignored = count_ignored
        self.keep_images = keep_images
        self.expects = expects
        self.reset()

    def reset(self) -> None:
        """Forget everything counted so far."""
        self._images: list[dict[str, Any]] = []
        self._sums: dict[str, Tensor] = {}
        self._waiting: list[Tensor] = []  # counts (B, 3 C + 2) that are not yet part of the sums

    def update(self, prediction: Prediction, target: Tensor, names: Sequence[str] | None = None) -> Counts:
        """Add one batch; ``names`` identify the images when they are kept. Returns the batch's counts."""
        counts = count(prediction, target, self.num_classes, self.ignore_index, self.count_ignored)
        if self.keep_images:
            names = names if names is not None else [str(len(self._images) + i) for i in range(len(target))]
            self._keep(counts, prediction, names)
        else:
            self.add(counts)
        return counts

    def add(self, counts: Counts) -> None:
        """Add a batch that was counted already to the running sums.

        The scores of many images are computed at once, because they take 70 operations, for few or many images. A fixed
        number of images is added, so that an interrupted run gives the same bits.
        """
        self._waiting.append(torch.cat([*counts[:3], counts.pixels[:, None], counts.correct[:, None]], 1))
        if sum(map(len, self._waiting)) >= AT_ONCE:
            self._sums, self._waiting = self.totals(), []

    def _keep(self, counts: Counts, prediction: Prediction, names: Sequence[str]) -> None:
        # The expected score of 0 of a missing mask does not count: see Expected_Dice.
        expected, unfitted = (
            [None] * len(names)
            if scores is None or prediction.volumes is None
            else torch.where(prediction.volumes > 0, scores.double(), torch.nan).cpu()
            for scores in (prediction.scores, prediction.unfitted)
        )
        on_cpu = [c.cpu() for c in counts]
        for i, name in enumerate(names):
            own = Counts(*(c[i] for c in on_cpu))
            self._images.append({"name": name, "counts": own, "expected": expected[i], "unfitted": unfitted[i]})

    def totals(self) -> dict[str, Tensor]:
        """Return the running sums of all images so far."""
        if not self._waiting:
            return self._sums
        sizes = [self.num_classes] * 3 + [1, 1]
        intersection, predicted, target, pixels, correct = torch.cat(self._waiting).split(sizes, 1)
        counts = Counts(intersection, predicted, target, pixels[:, 0], correct[:, 0])
        return _added(self._sums, _reduce(counts, self.classes))

    @property
    def images(self) -> list[dict[str, Any]]:
        """The kept images, sorted by name: ``{"name", "counts", "expected"}``."""
        return sorted(self._images, key=lambda row: row["name"])

    def merge(self, others: Sequence[Metrics]) -> None:
        """Add what other processes have counted."""
        for other in others:
            self._images += other._images
            self._sums = _added(self.totals(), other.totals())
            self._waiting = []

    def state_dict(self) -> dict[str, Any]:
        """Return the running sums, for a checkpoint in the middle of an epoch."""
        return {"sums": dict(self._sums), "waiting": list(self._waiting)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """Continue from :meth:`state_dict`, on a device.

        Raises:
            KeyError, ValueError: a sum is missing, or those of another number of classes.
        """
        sums, waiting = state.get("sums", state), state.get("waiting", [])  # once there were only sums
        expected = _reduce(self._stacked([]), self.classes) if sums else {}
        found = [(name, sums[name], tuple(empty.shape)) for name, empty in expected.items()]
        found += [("waiting", counts, (len(counts), 3 * self.num_classes + 2)) for counts in waiting]
        for name, part, shape in found:
            if part.shape != shape:
                raise ValueError(f"{name}: expected a tensor {shape}, found {tuple(part.shape)}")
        self._sums = {name: value.to(device) for name, value in sums.items()}
        self._waiting = [counts.to(device) for counts in waiting]

    def rows(self) -> tuple[list[str], ImageScores, Tensor | None]:
        """Return names, scores ``(N, C)`` and expected scores ``(N, C)`` or None, of the kept images."""
        images = self.images
        counts = self._stacked(images)
        expected = None
        if images and images[0]["expected"] is not None:
            expected = torch.stack([row["expected"] for row in images])
        return [row["name"] for row in images], image_scores(counts), expected

    def _stacked(self, images: list[dict[str, Any]]) -> Counts:
        if not images:
            empty = torch.zeros(0, self.num_classes, dtype=torch.int64)
            return Counts(empty, empty, empty, empty[:, 0], empty[:, 0])
        return Counts(*(torch.stack(c) for c in zip(*(row["counts"] for row in images), strict=True)))

    def compute(self) -> dict[str, Any]:
        """Return all scores: floats, and per-class lists of floats; nan if a value is undefined.

        Keys: ``Mean_Dice, Mean_IoU, Pixel_Accuracy, Multiclass_Accuracy, Dataset_mDice, Dataset_mIoU, Class_Dice,
        Class_IoU, Class_Images`` (the number of images in each class mean) and ``images``.

        If images are kept and the procedure expects scores, also ``Expected_Dice`` and ``Measured_Dice`` (means over
        the same rows: those with a mask and a defined score), and per class ``Class_Expected_Dice,
        Class_Measured_Dice``. If it expects IoU, these names end in ``_IoU``. ``Unfitted_Dice`` is ``Expected_Dice``
        without the presence fit, if there is one.
        """
        sums = self.totals() or _reduce(self._stacked(self.images), self.classes)
        sums = {key: value.double().cpu() for key, value in sums.items()}
        intersection, total = sums["intersection"], sums["predicted"] + sums["target"]
        means = sums["means"] / sums["mean_images"]
        dataset_dice = (2 * intersection / total)[self.classes]
        dataset_iou = (intersection / (total - intersection))[self.classes]
        defined = (total > 0)[self.classes]
        return {
            "Mean_Dice": means[0].item(),
            "Mean_IoU": means[1].item(),
            "Pixel_Accuracy": means[2].item(),
            "Multiclass_Accuracy": means[3].item(),
            "Dataset_mDice": dataset_dice[defined].mean().item(),
            "Dataset_mIoU": dataset_iou[defined].mean().item(),
            "Class_Dice": (sums["class_dice"] / sums["class_images"]).tolist(),
            "Class_IoU": (sums["class_iou"] / sums["class_images"]).tolist(),
            "Class_Images": sums["class_images"].long().tolist(),
            "images": int(sums["images"]),
        } | self._expected()

    def _expected(self) -> dict[str, Any]:
        _, scores, expected = self.rows()
        if expected is None:
            return {}
        kind, measured = METRICS[self.expects].title, scores.of[self.expects]
        both = expected.isfinite() & measured.isfinite()
        result: dict[str, Any] = {}
        for name, values in (("Expected", expected), ("Measured", measured)):
            values = torch.where(both, values, torch.nan)
            result[f"{name}_{kind}"] = values[:, self.classes].nanmean(dim=1).nanmean().item()
            result[f"Class_{name}_{kind}"] = values.nanmean(dim=0).tolist()
        if all(row["unfitted"] is not None for row in self.images):
            unfitted = torch.where(both, torch.stack([row["unfitted"] for row in self.images]), torch.nan)
            result[f"Unfitted_{kind}"] = unfitted[:, self.classes].nanmean(dim=1).nanmean().item()
        return result


def _added(sums: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value + sums.get(key, 0) for key, value in more.items()} or dict(sums)


def _reduce(counts: Counts, classes: Sequence[int]) -> dict[str, Tensor]:
    """Sum the scores of images; sums of images can be added, and every mean follows from them."""
    scores = image_scores(counts)
    dice, iou = scores.dice[:, classes], scores.iou[:, classes]
    per_image = torch.stack(
        [
            dice.nanmean(dim=1),
            iou.nanmean(dim=1),
            scores.pixel_accuracy.nanmean(dim=1),  # over all classes, as in the published script
            scores.accuracy,
        ]
    )
    defined = scores.dice.isfinite()
    return {
        "images": torch.tensor(len(counts.pixels), device=dice.device),
        "means": per_image.nansum(dim=1),
        "mean_images": per_image.isfinite().sum(dim=1),
        "class_dice": scores.dice.nansum(dim=0),
        "class_iou": scores.iou.nansum(dim=0),
        "class_images": defined.sum(dim=0),
        "intersection": counts.intersection.sum(dim=0),
        "predicted": counts.predicted.sum(dim=0),
        "target": counts.target.sum(dim=0),
    }
