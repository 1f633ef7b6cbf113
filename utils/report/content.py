"""Test results: the content of ``results.json``, which the screen output and the HTML page are made from."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from utils.checkpoint import LoadedModel
from utils.config.schema import Component, Config
from utils.errors import are
from utils.evaluation import OTHER_METRICS, Evaluation, deployed
from utils.evaluation.comparison import FEW_IMAGES, compare, image_means, worst_mean
from utils.evaluation.confusion import worst
from utils.predict import PredictOptions
from utils.predict.network import SCALES
from utils.rankdice import METRICS

# The table of the comparison: field of the results, heading.
COLUMNS = (
    ("Mean_Dice", "mDice"),
    ("Mean_IoU", "mIoU"),
    ("Worst_Tenth_Dice", "worst 10 %"),
    ("Dataset_mDice", "dataset mDice"),
    ("Dataset_mIoU", "dataset mIoU"),
    ("Mean_Boundary_IoU", "boundary IoU"),
    ("Pixel_Accuracy", "PixelAcc"),
    *(
        (f"{kind}_{score.title}", f"{kind.lower()} {score.title}")
        for score in METRICS.values()
        for kind in ("Expected", "Measured")
    ),
    ("milliseconds_per_image", "ms/image"),
    ("peak_mebibytes", "peak MiB"),
)
FAR_OFF = 0.05  # advise a temperature if expected and measured Dice differ by more
EXPLAINED = {  # procedures of -p all whose names a config does not know
    "max_present": "the most probable class of each pixel, among the classes predicted to be in the image",
    "rankdice_paper": "rankdice with predict.presence prune and predict.rankdice.prune 0.5",
    "rankdice_map": "the label map that inference.py writes for rankdice",
} | {
    name: f"rankdice with predict.rankdice.metric {metric}: masks with the highest expected {METRICS[metric].title}"
    for metric, name in OTHER_METRICS.items()
}
ONE_VIEW = "one view per image"
FIT_COMMANDS = "test.py -r CHECKPOINT --fit", "test the new checkpoint"  # how to fit, and what to do then
# The loss takes the network's own logits. Those of several views come from tempered probabilities.
UNTEMPERED = "computed from the network's logits, as in training, without the temperature; NLL of -p all includes it"
ABSENT_CLASSES = "skipped in images where a class is in neither the prediction nor the target"


@dataclass(frozen=True)
class Setting:
    """How a test was done, in words.

    Attributes:
        views: of each image.
        fitted: where temperature, threshold and presence come from; None: nothing was fitted.
        note: why the scores may be optimistic, if not by :func:`optimism`.
        fit_commands: for the advice.
        protocol: lines of the protocol that replace its own; None: the line does not apply.
    """

    views: str = ONE_VIEW
    fitted: str | None = None
    note: str | None = None
    fit_commands: tuple[str, str] = FIT_COMMANDS
    protocol: Mapping[str, Any] = field(default_factory=dict)


def results(
    outcome: Evaluation,
    loaded: LoadedModel,
    dataset: Any,
    *,
    setting: Setting = Setting(),  # noqa: B008
    gathered: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the content of ``results.json``; NaN becomes None.

    ``protocol``: what was measured and how. ``procedures``: the scores of each. ``comparison``: differences to
    ``max``, if it is among several procedures (:func:`utils.evaluation.comparison.compare`). ``reliability`` and
    ``confusion`` (the largest confusions of each procedure), if they were gathered. ``advice``, if a temperature
    should be fitted (:func:`advice`).

    Args:
        outcome: of the evaluation.
        loaded, dataset: what was evaluated.
        setting: how, in words.
        gathered: :meth:`utils.report.recorder.Recorder.compute`.
    """
    fitted, views = setting.fitted, setting.views
    names, config = loaded.facts.class_names, loaded.config
    procedures = {name: _scores(name, outcome, names) for name in outcome.metrics}
    protocol = _protocol(outcome, config, loaded, dataset) | {
        "views": views,
        "fitted": fitted or "no fit: temperature, threshold and presence are those of the config",
        "images_per_class_mean": _images_per_class(procedures),
        "test_loss": UNTEMPERED if config.predict.temperature != 1 and views.startswith(ONE_VIEW) else None,
    }
    protocol = protocol | {"note": protocol["note"] or setting.note, **setting.protocol}
    same = on_validation_data(config)
    if fitted and same:
        protocol["note"] += "; the fit used them too"
    content: dict[str, Any] = {"protocol": protocol, "procedures": procedures}
    found = compare(outcome.metrics, names, protocol["deployed"], protocol["note"])
    if found is not None:
        content["comparison"] = found
    gathered = dict(gathered or {})
    for name, scores in gathered.pop("boundary", {}).items():
        by_class = scores["Class_Boundary_IoU"]
        scores = scores | {"Class_Boundary_IoU": _by_class(by_class, names, outcome.metrics[name].classes)}
        procedures[name] |= scores
    matrices = gathered.pop("confusion", {})
    content |= gathered
    if matrices:
        content["confusion"] = {name: worst(matrix, loaded.facts.label_names) for name, matrix in matrices.items()}
    if fitted is not None or config.predict.temperature == 1:
        what = advice(procedures.get("rankdice", {}), outcome.images, fitted is not None, same, setting.fit_commands)
        if what:
            content["advice"] = what
    return json.loads(json.dumps(content), parse_constant=lambda _: None)


def views_in_words(views: Collection[str], mode: str) -> str:
    """Describe the views of each image.

    Args:
        views: "multiscale", "flip", both or none.
        mode: how inference.py sees an image, ``predict.mode``.
    """
    several = "multiscale" in views
    words = f"mean probabilities over scales {list(SCALES if several else (1.0,))}" if views else ONE_VIEW
    words += " and their mirror images" if "flip" in views else ""
    return words + (f" (inference.py: predict.mode {mode})" if mode != ("multiscale" if several else "single") else "")


def advice(
    scores: Mapping[str, Any],
    images: int,
    fitted: bool = False,
    same: bool = False,
    commands: tuple[str, str] = FIT_COMMANDS,
) -> str | None:
    """Return what to do if the Dice that rankdice expects differs from the measured one; None if they agree.

    Args:
        scores: of rankdice.
        images: that were scored.
        fitted: whether the checkpoint was fitted on validation data.
        same: whether the scored images are these validation images.
        commands: how to fit, and what to do then.
    """
    expected, measured = scores.get("Expected_Dice", math.nan), scores.get("Measured_Dice", math.nan)
    if not abs(expected - measured) > FAR_OFF:
        return None
    how = "overconfident" if expected > measured else "underconfident"
    how_to_fit, then = commands
    remedy = f"Calibrate it on validation data with {how_to_fit}, then {then}."
    if fitted:
        remedy = (
            "These are the validation images of the fit, which keeps only what clearly helps on held-out images."
            if same
            else "Either these images differ from those of the fit, or the fit had too few to correct this."
        )
        more = "more images" if same else "images like these"
        remedy += f" Add {more} to the validation data and repeat the fit: {how_to_fit}."
    few = f" {are(images, 'image')} few, so this may be chance." if images < FEW_IMAGES else ""
    return (
        f"rankdice expected a Dice of {expected:.3f} for its masks, and they scored {measured:.3f}: the network is "
        f"{how}. {remedy}{few}"
    )


def forecast(scores: Mapping[str, Any]) -> tuple[str, float | None, float | None]:
    """Return the metric whose value a procedure expects, what it expects, and what was measured; None if nothing."""
    kinds = [score.title for score in METRICS.values()]
    kind = next((k for k in kinds if scores.get(f"Expected_{k}") is not None), kinds[0])
    return kind, scores.get(f"Expected_{kind}"), scores.get(f"Measured_{kind}")


def _scores(name: str, outcome: Evaluation, class_names: Sequence[str]) -> dict[str, Any]:
    metrics = outcome.metrics[name]
    scores = metrics.compute()
    entry: dict[str, Any] = {"test_loss": outcome.loss}
    for key, value in scores.items():
        entry[key] = _by_class(value, class_names, metrics.classes) if isinstance(value, list) else value
    if math.isnan(entry["Multiclass_Accuracy"]):
        del entry["Multiclass_Accuracy"]  # masks may overlap: there is no one label to be right or wrong
    entry["Worst_Tenth_Dice"] = worst_mean(image_means(metrics))
    entry["milliseconds_per_image"] = outcome.milliseconds(name)
    if empty := outcome.without_mask.get(name):
        entry["images_without_mask"] = empty
        entry["without_mask_because"] = outcome.decisions[name].options.why_empty
    if outcome.peak_bytes[name]:
        entry["peak_mebibytes"] = outcome.peak_bytes[name] / 2**20
    return entry


def _by_class(values: Sequence[Any], class_names: Sequence[str], classes: Sequence[int]) -> dict[str, Any]:
    """Return class name -> value; None for the classes that are not of interest."""
    return {
        name: value if c in classes else None for c, (name, value) in enumerate(zip(class_names, values, strict=True))
    }


def _images_per_class(procedures: Mapping[str, Mapping[str, Any]]) -> dict[str, list[int]]:
    """Return the fewest and most images in each class's mean; procedures differ, because false alarms count."""
    images = [scores["Class_Images"] for scores in procedures.values()]
    found = {c: [of_one[c] or 0 for of_one in images] for c in (images[0] if images else {})}
    return {c: [min(counts), max(counts)] for c, counts in found.items()}


def _protocol(outcome: Evaluation, config: Config, loaded: LoadedModel, dataset: Any) -> dict[str, Any]:
    loader = config.loader("test")
    split = loader.args.get("split") if loader else f"held out of {config.train_loader.args.get('split') or 'training'}"
    loader = loader or config.train_loader
    crop = getattr(dataset, "crop_size", None) if getattr(dataset, "val", False) else None
    part = getattr(dataset, "part", None) if config.loader("test") else None  # held-out samples have no split
    names = loaded.facts.class_names
    interest = config.predict.CoI
    return {
        "checkpoint": ", ".join(map(str, loaded.paths)),
        "epoch": loaded.epoch,
        "model": config.arch.type,
        "loss": config.loss.type,
        "data": loader.type,
        "split": split,
        "part": f"{part}; for all, training images included: --set test_loader.args.split=all" if part else None,
        "note": optimism(config),
        "images": outcome.images,
        "resolution": f"shorter side rescaled to {min(crop)}, center crop {crop[0]} x {crop[1]}"
        if crop
        else "whole images",
        "image_sizes": _sizes(outcome.sizes),
        "scores": "per image and class, mean over classes, then over images (RankSEG paper, Appendix A); "
        "Dataset_*: counts of all images added up first",
        "absent_classes": ABSENT_CLASSES,
        "ignored_pixels": "count as wrong predictions" if config.predict.count_ignored else "ignored",
        "ignore_index": loaded.facts.ignore_index,
        "classes_of_interest": "all" if interest == "all" else [names[c] for c in interest],
        "temperature": config.predict.temperature,
        "threshold": config.predict.threshold,
        "rankdice": config.predict.rankdice.model_dump(),
        "deployed": deployed(config.predict.test, PredictOptions.from_config(config.predict)),
        "forward_milliseconds_per_image": outcome.milliseconds("forward"),
        "memory": _memory_note(outcome, loaded),
        "device": str(next(loaded.model.parameters(), torch.zeros(0)).device),
        "torch": torch.__version__,
    }


def optimism(config: Config) -> str | None:
    """Return a warning if the test data also chose the checkpoint and fitted the threshold, else None."""
    test, val = config.test_loader, config.val_loader
    if val is None and test is None:
        return "scored on the samples that train_loader holds out, which chose the checkpoint; scores are optimistic"
    if val is None:
        return None
    if test is None:
        return "there is no test_loader: scored on the validation data that chose the checkpoint; scores are optimistic"

    if on_validation_data(config):
        return "the test data are the validation data that chose the checkpoint: scores are optimistic"
    # Without a split, only the folders differ between test and validation data.
    if test.args.get("split") and _data(test, "data_dir") == _data(val, "data_dir"):
        return (
            "the test data are those that chose the checkpoint, in another folder (data_dir); "
            "unless that contains other images, scores are optimistic"
        )
    return None


def on_validation_data(config: Config) -> bool:
    """Return whether the scored images are the validation images, which also chose the checkpoint."""
    test, val = config.test_loader, config.val_loader
    return test is None or (val is not None and _data(test) == _data(val))


def _data(loader: Component, *but: str) -> tuple[str, dict[str, Any]]:
    """Return which images a loader reads: its type, and its arguments but those of that name."""
    aside = ("batch_size", "num_workers", "cache", *but)
    return loader.type, {k: v for k, v in loader.args.items() if k not in aside}


def _sizes(sizes: Collection[tuple[int, int]]) -> str | None:
    if not sizes:
        return None
    smallest, *_, largest = sorted([*sizes, *sizes], key=lambda size: (size[0] * size[1], size))
    text = f"{smallest[0]} x {smallest[1]}"
    return text if smallest == largest else f"{text} to {largest[0]} x {largest[1]} (height x width)"


def _memory_note(outcome: Evaluation, loaded: LoadedModel) -> str:
    if not any(outcome.peak_bytes.values()):
        return "not measured"
    if next(loaded.model.parameters(), torch.zeros(0)).device.type == "cuda":
        return "peak of torch's CUDA allocations in a procedure, without the probabilities of a batch"
    return "peak of torch's CPU allocations in a procedure (profiled), without the probabilities of the largest batch"
