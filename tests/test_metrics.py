"""Metrics: cases computed by hand, a plain numpy reference, torchmetrics; sums depend only on the data."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.segmentation import DiceScore, MeanIoU

from utils.metrics import Counts, Metrics, count, image_scores
from utils.predict import Prediction

IGNORE = 255
NAN = float("nan")


def one(rows: list[list[int]]) -> torch.Tensor:
    """Return one label map as a batch ``(1, H, W)``."""
    return torch.tensor([rows])


def score(prediction: Prediction, target: torch.Tensor, num_classes: int, **options: object) -> dict:
    metrics = Metrics(num_classes, IGNORE, keep_images=True, **options)
    metrics.update(prediction, target)
    return metrics.compute()


def masks_of(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Return the masks ``(B, C, H, W)`` of a label map."""
    return torch.stack([labels == c for c in range(classes)], dim=1)


# -- the slow, obviously right reference -----------------------------------------------------------------------


def reference(
    masks: np.ndarray, target: np.ndarray, classes: list[int], count_ignored: bool = False
) -> dict[str, object]:
    """Score masks ``(N, C, H, W)`` pixel by pixel as the formulas say, image by image and class by class."""
    images, total = masks.shape[:2]
    dice, iou = np.full((images, total), NAN), np.full((images, total), NAN)
    accuracy = np.full((images, total), NAN)
    sums = np.zeros((3, total))
    for i in range(images):
        valid = target[i] != IGNORE
        for c in range(total):
            truth = valid & (target[i] == (c if total > 1 else 1))
            predicted = masks[i, c] if count_ignored else masks[i, c] & valid
            both, either = (predicted & truth).sum(), (predicted | truth).sum()
            sums[:, c] += both, predicted.sum(), truth.sum()
            if either:
                dice[i, c] = 2 * both / (predicted.sum() + truth.sum())
                iou[i, c] = both / either
            counted = np.ones_like(valid) if count_ignored else valid
            if counted.any():
                accuracy[i, c] = (predicted == truth)[counted].mean()
    dataset = [sums[:, c] for c in classes if sums[1, c] + sums[2, c]]
    return {
        "Mean_Dice": mean(mean(row[classes]) for row in dice),
        "Mean_IoU": mean(mean(row[classes]) for row in iou),
        "Pixel_Accuracy": mean(map(mean, accuracy)),
        "Class_Dice": [mean(column) for column in dice.T],
        "Class_IoU": [mean(column) for column in iou.T],
        "Class_Images": [int(np.isfinite(column).sum()) for column in dice.T],
        "Dataset_mDice": mean(2 * b / (p + y) for b, p, y in dataset),
        "Dataset_mIoU": mean(b / (p + y - b) for b, p, y in dataset),
        "images": images,
    }


def mean(values: object) -> float:
    defined = [float(v) for v in values if not math.isnan(v)]
    return sum(defined) / len(defined) if defined else NAN


def assert_same(found: dict, expected: dict) -> None:
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-12, nan_ok=True), key


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Draw masks ``(N, C, H, W)`` and labels ``(N, H, W)``, often with absent classes and ignored pixels."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    images, classes = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    height, width = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    masks = rng.random((images, classes, height, width)) < rng.choice([0.0, 0.1, 0.5, 1.0], (images, classes, 1, 1))
    target = rng.integers(0, draw(st.integers(1, max(classes, 2))), (images, height, width))
    target[rng.random(target.shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = IGNORE
    return masks, target


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases(), st.booleans(), st.booleans(), st.data())
def test_masks_score_as_the_formulas_say(case, count_ignored, keep_images, data) -> None:
    masks, target = case
    total = masks.shape[1]
    classes = sorted(data.draw(st.sets(st.integers(0, total - 1), min_size=1)))
    metrics = Metrics(total, IGNORE, classes, count_ignored, keep_images)
    for start in range(0, len(masks), 2):
        batch = slice(start, start + 2)
        metrics.update(Prediction(masks=torch.from_numpy(masks[batch])), torch.from_numpy(target[batch]))
    assert_same(metrics.compute(), reference(masks, target, classes, count_ignored))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(cases(), st.booleans(), st.data())
def test_a_label_map_scores_as_its_masks(case, count_ignored, data) -> None:
    _, target = case
    classes = data.draw(st.integers(2, 5))
    target = torch.from_numpy(np.where(target == IGNORE, IGNORE, target % classes))
    # Labels may contain values that are not a class (unassigned pixels).
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    labels = torch.randint(0, classes + 1, target.shape, generator=generator)
    labels[labels == classes] = 255
    by_labels = count(Prediction(labels=labels), target, classes, IGNORE, count_ignored)
    by_masks = count(Prediction(masks=masks_of(labels, classes)), target, classes, IGNORE, count_ignored)
    for name in ("intersection", "predicted", "target", "pixels"):
        assert torch.equal(getattr(by_labels, name), getattr(by_masks, name)), name
    right = (labels == target) & (target != IGNORE)
    assert torch.equal(by_labels.correct, right.sum(dim=(1, 2)))
    assert by_masks.correct.eq(-1).all()


def test_known_volumes_are_taken_for_the_count_of_the_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(3, 4, 5, 6, generator=generator) > 0.5
    target = torch.randint(0, 4, (3, 5, 6), generator=generator)
    target[:, :2] = IGNORE
    given = Prediction(masks=masks, volumes=masks.sum(dim=(2, 3)))
    for count_ignored in (False, True):
        with_volumes = count(given, target, 4, IGNORE, count_ignored)
        without = count(Prediction(masks=masks), target, 4, IGNORE, count_ignored)
        assert all(torch.equal(a, b) for a, b in zip(with_volumes, without, strict=True))


# -- by hand ---------------------------------------------------------------------------------------------------


def test_hand_worked_case() -> None:
    target = one([[0, 0, 1, 1], [0, 0, 1, IGNORE]])
    labels = one([[0, 1, 1, 1], [0, 0, 0, 2]])
    found = score(Prediction(labels=labels), target, 3)
    # Class 0: P 4, Y 4, both 3. Class 1: P 3, Y 3, both 2. Class 2: only on the ignored pixel, so in neither.
    assert found["Class_Dice"] == pytest.approx([6 / 8, 4 / 6, NAN], nan_ok=True)
    assert found["Class_IoU"] == pytest.approx([3 / 5, 2 / 4, NAN], nan_ok=True)
    assert found["Mean_Dice"] == pytest.approx((6 / 8 + 4 / 6) / 2)
    assert found["Mean_IoU"] == pytest.approx((3 / 5 + 2 / 4) / 2)
    assert found["Class_Images"] == [1, 1, 0]
    # Of 7 pixels, 2 are wrong for class 0, 2 for class 1, none for class 2; 5 have the right label.
    assert found["Pixel_Accuracy"] == pytest.approx((5 / 7 + 5 / 7 + 1) / 3)
    assert found["Multiclass_Accuracy"] == pytest.approx(5 / 7)


def test_ignored_pixels_counted_as_wrong_reproduce_the_published_script() -> None:
    target = one([[0, 0, IGNORE, IGNORE]])
    labels = one([[0, 0, 0, 1]])
    found = score(Prediction(labels=labels), target, 2, count_ignored=True)
    # Class 0: P 3, Y 2, both 2. Class 1: P 1, Y 0.
    assert found["Class_Dice"] == pytest.approx([4 / 5, 0.0])
    assert found["Class_IoU"] == pytest.approx([2 / 3, 0.0])
    assert found["Pixel_Accuracy"] == pytest.approx((3 / 4 + 3 / 4) / 2)
    by_default = score(Prediction(labels=labels), target, 2)
    assert by_default["Class_Dice"] == pytest.approx([1.0, NAN], nan_ok=True)


def test_overlapping_masks_are_scored_each_on_its_own() -> None:
    target = one([[0, 0, 1, 1]])
    masks = torch.tensor([[[[1, 1, 1, 0]], [[0, 1, 1, 1]]]], dtype=torch.bool)
    found = score(Prediction(masks=masks), target, 2)
    assert found["Class_Dice"] == pytest.approx([4 / 5, 4 / 5])
    assert found["Class_IoU"] == pytest.approx([2 / 3, 2 / 3])
    assert math.isnan(found["Multiclass_Accuracy"])  # a pixel may be in two masks: there is no one label


def test_one_pixel_objects() -> None:
    target = torch.zeros(1, 32, 32, dtype=torch.long)
    target[0, 3, 4] = 1
    hit, missed = target.clone(), target.clone()
    missed[0, 3, 4], missed[0, 3, 5] = 0, 1
    assert score(Prediction(labels=hit), target, 2)["Class_Dice"] == [1.0, 1.0]
    found = score(Prediction(labels=missed), target, 2)
    assert found["Class_Dice"] == pytest.approx([2 * 1022 / 2046, 0.0])
    assert found["Mean_Dice"] == pytest.approx((2 * 1022 / 2046) / 2)


def test_means_are_per_image_first_and_data_set_scores_are_not() -> None:
    # Image 1 contains classes 0 and 1, image 2 only class 0: class 1 must not affect image 2.
    target = torch.tensor([[[0, 1, 1, 1]], [[0, 0, 0, 0]]])
    labels = torch.tensor([[[0, 0, 1, 1]], [[0, 0, 0, 0]]])
    found = score(Prediction(labels=labels), target, 2)
    assert found["Mean_Dice"] == pytest.approx(((2 / 3 + 4 / 5) / 2 + 1) / 2)
    assert found["Class_Dice"] == pytest.approx([(2 / 3 + 1) / 2, 4 / 5])
    assert found["Dataset_mDice"] == pytest.approx((10 / 11 + 4 / 5) / 2)
    assert found["Dataset_mIoU"] == pytest.approx((5 / 6 + 2 / 3) / 2)


def test_an_image_without_any_defined_class_is_left_out() -> None:
    target = torch.tensor([[[0, 0]], [[IGNORE, IGNORE]]])
    labels = torch.tensor([[[0, 1]], [[0, 1]]])
    found = score(Prediction(labels=labels), target, 2)
    assert found["Mean_Dice"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["Multiclass_Accuracy"] == pytest.approx(1 / 2)
    assert found["images"] == 2


def test_classes_of_interest_restrict_means_but_not_the_class_table() -> None:
    target, labels = one([[0, 1, 2, 2]]), one([[0, 1, 1, 2]])
    found = score(Prediction(labels=labels), target, 3, classes=[2])
    assert found["Mean_Dice"] == found["Dataset_mDice"] == pytest.approx(2 / 3)
    assert found["Mean_IoU"] == found["Dataset_mIoU"] == pytest.approx(1 / 2)
    assert found["Pixel_Accuracy"] == pytest.approx((1 + 3 / 4 + 3 / 4) / 3)  # over all classes
    assert found["Class_Dice"] == pytest.approx([1.0, 2 / 3, 2 / 3])


def test_classes_that_were_not_decided_have_no_score() -> None:
    target = one([[0, 1, 2, 2]])
    masks = torch.zeros(1, 3, 1, 4, dtype=torch.bool)
    masks[0, 2, 0, 1:] = True
    presence = torch.tensor([[math.nan, math.nan, 0.9]], dtype=torch.float64)
    found = score(Prediction(masks=masks, presence=presence), target, 3, classes=[2])
    assert found["Pixel_Accuracy"] == pytest.approx(3 / 4)
    assert found["Mean_Dice"] == found["Dataset_mDice"] == pytest.approx(4 / 5)
    assert [math.isnan(v) for v in found["Class_Dice"]] == [True, True, False]


def test_one_channel_is_the_class_itself() -> None:
    target = one([[0, 1, 1, IGNORE]])
    as_labels = Prediction(labels=one([[1, 1, 0, 1]]))
    as_masks = Prediction(masks=torch.tensor([[[[1, 1, 0, 1]]]], dtype=torch.bool))
    for prediction in (as_labels, as_masks):
        found = score(prediction, target, 1)
        assert found["Class_Dice"] == pytest.approx([2 / 4])
        assert found["Class_IoU"] == pytest.approx([1 / 3])
        assert found["Pixel_Accuracy"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("keep_images", [False, True])
def test_nothing_counted_gives_nan_without_a_warning(keep_images) -> None:
    metrics = Metrics(2, IGNORE, keep_images=keep_images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        empty = metrics.compute()
        metrics.update(Prediction(labels=torch.zeros(1, 2, 2, dtype=torch.long)), torch.full((1, 2, 2), IGNORE))
        ignored = metrics.compute()
    for found, images in ((empty, 0), (ignored, 1)):
        assert found["images"] == images
        assert found["Class_Images"] == [0, 0]
        names = ("Mean_Dice", "Mean_IoU", "Pixel_Accuracy", "Multiclass_Accuracy", "Dataset_mDice", "Dataset_mIoU")
        assert all(math.isnan(found[name]) for name in names)
        assert all(math.isnan(v) for v in found["Class_Dice"] + found["Class_IoU"])


def test_a_batch_without_images_changes_nothing() -> None:
    nothing = torch.zeros(0, 4, 4, dtype=torch.long)
    metrics = Metrics(2, IGNORE)
    metrics.update(Prediction(labels=nothing), nothing)
    metrics.update(Prediction(masks=torch.zeros(0, 2, 4, 4, dtype=torch.bool)), nothing)
    assert metrics.compute()["images"] == 0


def test_expected_scores_are_compared_over_the_rows_that_have_a_mask() -> None:
    target = one([[0, 0, 1, 2]])
    masks = torch.tensor([[[[1, 1, 0, 0]], [[0, 1, 1, 0]], [[0, 0, 0, 0]]]], dtype=torch.bool)
    scores = torch.tensor([[0.9, 0.5, 0.0]])
    found = score(Prediction(masks=masks, scores=scores, volumes=masks.sum(dim=(2, 3))), target, 3)
    assert found["Expected_Dice"] == pytest.approx((0.9 + 0.5) / 2, abs=1e-6)
    assert found["Measured_Dice"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["Class_Expected_Dice"] == pytest.approx([0.9, 0.5, NAN], abs=1e-6, nan_ok=True)
    assert found["Mean_Dice"] == pytest.approx((1 + 2 / 3 + 0) / 3)  # the missing mask still counts as wrong here
    prediction = Prediction(masks=masks, scores=scores, volumes=masks.sum(dim=(2, 3)))
    metrics = Metrics(3, keep_images=True, expects="iou")
    metrics.update(prediction, target)
    found = metrics.compute()
    assert "Expected_Dice" not in found
    assert found["Expected_IoU"] == pytest.approx((0.9 + 0.5) / 2, abs=1e-6)
    assert found["Measured_IoU"] == pytest.approx((1 + 1 / 2) / 2)


# -- other libraries -------------------------------------------------------------------------------------------


def test_mean_dice_equals_torchmetrics_samplewise() -> None:
    generator = torch.Generator().manual_seed(1)
    masks = torch.rand(6, 4, 16, 16, generator=generator) > 0.6
    target = torch.randint(0, 4, (6, 16, 16), generator=generator)
    other = DiceScore(num_classes=4, average="macro", aggregation_level="samplewise", input_format="one-hot")
    other.update(masks.int(), masks_of(target, 4).int())
    assert score(Prediction(masks=masks), target, 4)["Mean_Dice"] == pytest.approx(float(other.compute()), abs=1e-6)


def test_class_dice_equals_torchmetrics_samplewise() -> None:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 3, (5, 12, 9), generator=generator)
    target = torch.randint(0, 3, (5, 12, 9), generator=generator)
    other = DiceScore(num_classes=3, average="none", aggregation_level="samplewise", input_format="index")
    other.update(labels, target)
    found = score(Prediction(labels=labels), target, 3)["Class_Dice"]
    assert found == pytest.approx(other.compute().tolist(), abs=1e-6)


def test_iou_equals_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 5, (8, 10, 10), generator=generator)
    target = torch.randint(0, 5, (8, 10, 10), generator=generator)
    found = score(Prediction(labels=labels), target, 5)
    per_class = MeanIoU(num_classes=5, per_class=True, input_format="index")
    per_class.update(labels, target)
    assert found["Class_IoU"] == pytest.approx(per_class.compute().tolist(), abs=1e-6)
    # torchmetrics averages per image and class in one go: the same where every class is in every image.
    overall = MeanIoU(num_classes=5, input_format="index")
    overall.update(labels, target)
    assert found["Mean_IoU"] == pytest.approx(float(overall.compute()), abs=1e-6)


# -- sums ------------------------------------------------------------------------------------------------------


def random_images(count: int, classes: int = 5) -> list[tuple[str, Prediction, torch.Tensor]]:
    """Return images of different sizes with masks, expected scores and labels."""
    generator = torch.Generator().manual_seed(4)
    images = []
    for i in range(count):
        height, width = (9, 7) if i % 3 else (5, 11)
        masks = torch.rand(1, classes, height, width, generator=generator) > torch.rand(1, classes, 1, 1)
        target = torch.randint(0, classes, (1, height, width), generator=generator)
        target[0, 0, : i % 4] = IGNORE
        volumes = masks.sum(dim=(2, 3))
        scores = torch.rand(1, classes, generator=generator, dtype=torch.float64)
        images.append((f"image{i * 7 % count}", Prediction(masks=masks, scores=scores, volumes=volumes), target))
    return images


def batches(images: list, size: int) -> list[tuple[list[str], Prediction, torch.Tensor]]:
    """Put neighbors of equal size together, at most ``size`` of them."""
    made: list = []
    for name, prediction, target in images:
        if made and made[-1][2].shape[1:] == target.shape[1:] and len(made[-1][0]) < size:
            names, before, targets = made[-1]
            joined = Prediction(
                *(None if a is None else torch.cat([a, b]) for a, b in zip(before, prediction, strict=True))
            )
            made[-1] = ([*names, name], joined, torch.cat([targets, target]))
        else:
            made.append(([name], prediction, target))
    return made


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("order", ["given", "reversed", "shuffled"])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_any_batch_size_order_and_number_of_processes_gives_the_same_bits(size, order, processes) -> None:
    images = random_images(13)
    expected = Metrics(5, IGNORE, classes=[0, 2, 4], keep_images=True)
    for name, prediction, target in images:
        expected.update(prediction, target, [name])
    if order == "reversed":
        images.reverse()
    elif order == "shuffled":
        images = [images[i] for i in np.random.default_rng(0).permutation(len(images))]
    shares = []
    for rank in range(processes):
        share = Metrics(5, IGNORE, classes=[0, 2, 4], keep_images=True)
        for names, prediction, target in batches(images[rank::processes], size):
            share.update(prediction, target, names)
        shares.append(share)
    shares[0].merge([*shares[1:], Metrics(5, IGNORE)])  # a process without images changes nothing
    assert repr(shares[0].compute()) == repr(expected.compute())  # repr: nan equals nan, and every bit shows
    names, scores, _ = shares[0].rows()
    assert names == sorted(names)
    assert torch.equal(scores.dice.nan_to_num(-1), expected.rows()[1].dice.nan_to_num(-1))


def test_running_sums_agree_with_kept_images_also_when_merged_and_continued() -> None:
    images = random_images(12)
    kept = Metrics(5, IGNORE, keep_images=True)
    shares = [Metrics(5, IGNORE), Metrics(5, IGNORE)]
    for index, (name, prediction, target) in enumerate(images):
        kept.update(prediction, target, [name])
        shares[index % 2].update(prediction, target)
        if index == 5:  # as with a checkpoint in the middle of an epoch
            continued = Metrics(5, IGNORE)
            continued.load_state_dict(shares[1].state_dict())
            shares[1] = continued
    shares[0].merge([*shares[1:], Metrics(5, IGNORE)])  # a process without images changes nothing
    expected = {key: value for key, value in kept.compute().items() if "Expected" not in key and "Measured" not in key}
    assert_same(shares[0].compute(), expected)


def test_interrupted_running_sums_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are added in parts of a fixed number, wherever the run was interrupted and its scores were shown."""
    monkeypatch.setattr("utils.metrics.AT_ONCE", 5)
    images = random_images(23)
    whole = Metrics(5, IGNORE)
    for _, prediction, target in images:
        whole.update(prediction, target)
    for stop in (2, 4, 5, 13):
        first, second = Metrics(5, IGNORE), Metrics(5, IGNORE)
        for index, (_, prediction, target) in enumerate(images):
            if index == stop:
                first.compute()
                second.load_state_dict(first.state_dict())
            (first if index < stop else second).update(prediction, target)
        assert repr(second.compute()) == repr(whole.compute())
        assert all(torch.equal(a, b) for a, b in zip(second.totals().values(), whole.totals().values(), strict=True))


def test_running_sums_copy_nothing_to_the_device_per_batch() -> None:
    """A list or number that becomes a tensor is copied to the device, and the host waits."""

    class Recorder(TorchDispatchMode):
        calls: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
            self.calls.append(func._overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    metrics, target = Metrics(19, IGNORE), torch.zeros(2, 4, 4, dtype=torch.long)
    with Recorder() as recorder:
        metrics.update(Prediction(labels=target), target)
    assert not {"lift_fresh", "_local_scalar_dense", "nonzero"} & set(recorder.calls)
    assert len(recorder.calls) < 40


def test_running_sums_keep_no_image() -> None:
    metrics = Metrics(3, IGNORE)
    for _ in range(3):
        metrics.update(Prediction(labels=torch.zeros(2, 4, 4, dtype=torch.long)), torch.zeros(2, 4, 4).long())
    assert metrics.images == []
    assert sum(value.numel() for value in metrics.totals().values()) < 50


def test_pixels_beyond_the_reach_of_float32_are_not_lost() -> None:
    # float32 cannot represent 2**24 + 1, which all three counts reach.
    size = 2**24 + 1
    target = torch.zeros(1, 1, size, dtype=torch.uint8)
    labels = torch.zeros(1, 1, size, dtype=torch.long)
    found = count(Prediction(labels=labels), target, 2, IGNORE)
    assert found.intersection.tolist() == [[size, 0]]
    assert found.predicted.tolist() == [[size, 0]]
    assert found.target.tolist() == [[size, 0]]
    assert found.pixels.tolist() == [size]
    target[0, 0, -1] = 1
    masks = torch.stack([torch.ones(1, size, dtype=torch.bool), torch.zeros(1, size, dtype=torch.bool)])[None]
    found = count(Prediction(masks=masks), target, 2, IGNORE)
    assert found.predicted.tolist() == [[size, 0]]
    assert found.target.tolist() == [[size - 1, 1]]
    assert found.intersection.tolist() == [[size - 1, 0]]


def test_one_wrong_pixel_of_many_shows_in_the_score() -> None:
    size = 2**24
    counts = Counts(*(torch.tensor(v) for v in ([[size]], [[size + 1]], [[size]], [size + 1], [-1])))
    dice = image_scores(counts).dice.item()
    assert dice == 2 * size / (2 * size + 1)
    assert dice < 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_targets_of_any_integer_type_count_alike(dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    target = torch.randint(0, 4, (2, 6, 6), generator=generator)
    target[:, 0] = IGNORE
    labels = torch.randint(0, 4, (2, 6, 6), generator=generator)
    for prediction in (Prediction(labels=labels), Prediction(masks=masks_of(labels, 4))):
        found = count(prediction, target.to(dtype), 4, IGNORE)
        assert all(torch.equal(a, b) for a, b in zip(found, count(prediction, target, 4, IGNORE), strict=True))


def test_another_ignore_index_such_as_minus_one() -> None:
    target, labels = one([[0, 1, -1]]), one([[0, 1, 1]])
    for prediction in (Prediction(labels=labels), Prediction(masks=masks_of(labels, 2))):
        assert count(prediction, target, 2, -1).predicted.tolist() == [[1, 1]]


def test_the_number_of_operations_does_not_grow_with_the_classes() -> None:
    """No loop over classes and no transfer per class: the same operations for any number of classes."""

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
            self.calls.append(str(func))
            return func(*args, **(kwargs or {}))

    calls = {}
    for classes in (3, 300):
        metrics = Metrics(classes, IGNORE)
        target = torch.zeros(2, 4, 4, dtype=torch.long)
        with Recorder() as recorder:
            metrics.update(Prediction(labels=target), target)
            metrics.update(Prediction(masks=torch.ones(2, classes, 4, 4, dtype=torch.bool)), target)
        calls[classes] = recorder.calls
    assert calls[3] == calls[300]


@pytest.mark.gpu
def test_a_gpu_counts_the_same() -> None:
    for _, prediction, target in random_images(6):
        here = count(prediction, target, 5, IGNORE)
        there = count(Prediction(*(None if v is None else v.cuda() for v in prediction)), target.cuda(), 5, IGNORE)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))


@pytest.mark.gpu
def test_waiting_for_the_gpu_does_not_grow_with_the_classes() -> None:
    waits = {}
    for classes in (3, 60):
        target = torch.zeros(2, 8, 8, dtype=torch.long, device="cuda")
        masks = torch.ones(2, classes, 8, 8, dtype=torch.bool, device="cuda")
        metrics = Metrics(classes, IGNORE)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                metrics.update(Prediction(labels=target), target)
                metrics.update(Prediction(masks=masks), target)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits[classes] = len(seen)
    assert waits[3] == waits[60]


def test_volumes_that_do_not_fit_their_masks_never_hide_a_class() -> None:
    target = torch.full((1, 4, 4), 255)
    target[0, 2:] = 1
    masks = torch.ones(1, 2, 4, 4, dtype=torch.bool)
    counts = count(Prediction(masks=masks, volumes=torch.zeros(1, 2, dtype=torch.int64)), target, 2, 255)
    assert counts.predicted.tolist() == [[0, 0]]
    assert not image_scores(counts).dice[0, 1].isnan()
