"""Test results for people and programs: tables on the screen, ``results.json``, scores of every image as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from utils import distributed
from utils.checkpoint import LoadedModel
from utils.config.checks import unwritable
from utils.config.schema import Component, Config
from utils.errors import UserError
from utils.evaluation import Evaluation
from utils.evaluation.comparison import FEW_IMAGES, compare, image_means, worst_mean
from utils.facts import Facts

# The table of the comparison: field of the results, heading.
COLUMNS = (
    ("Mean_Dice", "mDice"),
    ("Mean_IoU", "mIoU"),
    ("Worst_Tenth_Dice", "worst 10 %"),
    ("Dataset_mDice", "dataset mDice"),
    ("Dataset_mIoU", "dataset mIoU"),
    ("Pixel_Accuracy", "PixelAcc"),
    ("Expected_Dice", "expected Dice"),
    ("Measured_Dice", "measured Dice"),
    ("Expected_IoU", "expected IoU"),
    ("Measured_IoU", "measured IoU"),
    ("milliseconds_per_image", "ms/image"),
    ("peak_mebibytes", "peak MiB"),
)
# The page of a test of all procedures; written by :mod:`utils.report.page`, removed where it is of an earlier run.
PAGE = "report.html"
FAR_OFF = 0.05  # a forecast that misses the Dice by more calls for a temperature
EXPLAINED = {  # procedures of -p all that have no name of their own in a config
    "rankdice_unpruned": "rankdice with predict.rankdice.prune null: classes that are nowhere more probable than prune "
    "may get a mask, too",
    "rankdice_iou": "rankdice with predict.rankdice.metric iou: masks with the highest expected IoU, nearly the same",
}
ONE_VIEW = "one view per image"
# Losses take the logits as the network gives them (those of several views are made of tempered probabilities).
UNTEMPERED = "of the network's own logits, as in training, without the temperature; the NLL of -p all has it"
ABSENT_CLASSES = "left out where a class is in neither prediction nor target of an image"


def prepare_folder(folder: str | Path) -> Path:
    """Make sure that results can be written to a folder, now and not after an hour of testing; nothing is made yet.

    Raises:
        UserError: the folder cannot be made or written.
    """
    why = unwritable(str(folder))
    if why is not None:
        raise UserError(f"{folder}: results cannot be written there: {why}; choose another folder with --output")
    return Path(folder)


def progress_bar(title: str) -> Callable[[Any], Iterable[Any]]:
    """Return a wrapper that shows how far an iteration is, in the main process."""
    return lambda loader: tqdm(loader, desc=title, disable=not distributed.is_main(), mininterval=0.5)


def results(
    outcome: Evaluation,
    config: Config,
    loaded: LoadedModel,
    dataset: Any,
    *,
    views: str = ONE_VIEW,
    reliability: Mapping[str, Any] | None = None,
    fitted: str | None = None,
) -> dict[str, Any]:
    """Return the content of ``results.json``; nan becomes None.

    ``protocol``: what was measured and how; ``procedures``: the scores of each; with ``max`` among several also
    ``comparison``: differences to it (:func:`utils.evaluation.comparison.compare`); ``reliability``, where it was
    gathered; ``advice``, where a temperature should be fitted (:func:`advice`).

    Args:
        outcome: of the evaluation.
        config, loaded, dataset: what was evaluated.
        views: of each image, in words.
        reliability: :meth:`utils.evaluation.calibration.Reliability.compute`.
        fitted: where temperature and threshold come from, in words.
    """
    names = loaded.facts.class_names
    procedures = {name: _scores(name, outcome, names) for name in outcome.metrics}
    protocol = _protocol(outcome, config, loaded, dataset) | {
        "views": views,
        "fitted": fitted or "temperature and threshold are those of the config",
        "images_per_class_mean": _images_per_class(procedures),
        "test_loss": UNTEMPERED if config.predict.temperature != 1 and views == ONE_VIEW else None,
    }
    if fitted and protocol["note"]:
        protocol["note"] += "; what was fitted on them (T_tuned, the temperature) looks better here than elsewhere"
    content: dict[str, Any] = {"protocol": protocol, "procedures": procedures}
    found = compare(outcome.metrics, names, config.predict.test)
    if found is not None:
        content["comparison"] = found
    if reliability is not None:
        content["reliability"] = dict(reliability)
    if fitted is None and config.predict.temperature == 1 and outcome.images >= FEW_IMAGES:
        said = advice(procedures.get("rankdice", {}))
        if said:
            content["advice"] = said
    return _plain(content)


def advice(scores: Mapping[str, Any]) -> str | None:
    """Return what to do about probabilities that are not right, seen by the Dice that rankdice expects and gets.

    Args:
        scores: of rankdice, taken without a fitted temperature.
    """
    expected, measured = scores.get("Expected_Dice", math.nan), scores.get("Measured_Dice", math.nan)
    if not abs(expected - measured) > FAR_OFF:
        return None
    how = "surer" if expected > measured else "less sure"
    return (
        f"rankdice expects a Dice of {expected:.3f} of its masks, and they got {measured:.3f}: the network is {how} "
        "than it should be. Fit a temperature on validation data, test.py -r CHECKPOINT --fit, and test its checkpoint."
    )


def _scores(name: str, outcome: Evaluation, class_names: Sequence[str]) -> dict[str, Any]:
    metrics = outcome.metrics[name]
    scores = metrics.compute()
    entry: dict[str, Any] = {"test_loss": outcome.loss}
    for key, value in scores.items():
        entry[key] = dict(zip(class_names, value, strict=True)) if isinstance(value, list) else value
    if math.isnan(entry["Multiclass_Accuracy"]):
        del entry["Multiclass_Accuracy"]  # masks may overlap: there is no one label to be right or wrong
    entry["Worst_Tenth_Dice"] = worst_mean(image_means(metrics))
    entry["milliseconds_per_image"] = 1000 * outcome.seconds[name] / max(outcome.images, 1)
    if outcome.peak_bytes[name]:
        entry["peak_mebibytes"] = outcome.peak_bytes[name] / 2**20
    return entry


def _images_per_class(procedures: Mapping[str, Mapping[str, Any]]) -> dict[str, list[int]]:
    """Return the fewest and most images behind each class's mean; procedures differ where they see false alarms."""
    images = [scores["Class_Images"] for scores in procedures.values()]
    found = {c: [of_one[c] for of_one in images] for c in (images[0] if images else {})}
    return {c: [min(counts), max(counts)] for c, counts in found.items()}


def _protocol(outcome: Evaluation, config: Config, loaded: LoadedModel, dataset: Any) -> dict[str, Any]:
    loader = config.loader("test")
    assert loader is not None  # its data have just been scored
    crop = getattr(dataset, "crop_size", None) if getattr(dataset, "val", False) else None
    names = loaded.facts.class_names
    interest = config.predict.CoI
    return {
        "checkpoint": str(loaded.path),
        "epoch": loaded.epoch,
        "model": config.arch.type,
        "loss": config.loss.type,
        "data": loader.type,
        "split": loader.args.get("split"),
        "note": optimism(config),
        "images": outcome.images,
        "resolution": f"shorter side to {min(crop)}, centre crop {crop[0]} x {crop[1]}" if crop else "whole images",
        "image_sizes": _sizes(outcome.sizes),
        "scores": "per image and class, mean over classes, then over images (RankSEG paper, Appendix A); "
        "Dataset_*: counts of all images added up first",
        "absent_classes": ABSENT_CLASSES,
        "ignored_pixels": "count as wrong predictions" if config.predict.count_ignored else "count nowhere",
        "ignore_index": loaded.facts.ignore_index,
        "classes_of_interest": "all" if interest == "all" else [names[c] for c in interest],
        "temperature": config.predict.temperature,
        "threshold": config.predict.threshold,
        "rankdice": config.predict.rankdice.model_dump(),
        "forward_milliseconds_per_image": 1000 * outcome.forward_seconds / max(outcome.images, 1),
        "memory": _memory_note(outcome, loaded),
        "device": str(next(loaded.model.parameters()).device),
        "torch": torch.__version__,
    }


def optimism(config: Config) -> str | None:
    """Return a warning where the test data are those that chose the checkpoint and fitted the threshold."""
    test, val = config.test_loader, config.val_loader
    if val is None:
        return None
    if test is None:
        return "there is no test_loader: scored on the validation data that chose the checkpoint; scores are optimistic"

    def data(loader: Component, *but: str) -> tuple[str, dict[str, Any]]:
        aside = ("batch_size", "num_workers", "cache", *but)
        return loader.type, {k: v for k, v in loader.args.items() if k not in aside}

    if data(test) == data(val):
        return "the test data are the validation data that chose the checkpoint: scores are optimistic"
    # Without a split the folder alone tells test from validation data.
    if test.args.get("split") and data(test, "data_dir") == data(val, "data_dir"):
        return (
            "the test data are those that chose the checkpoint, in another folder (data_dir); "
            "unless that holds other images, scores are optimistic"
        )
    return None


def _sizes(sizes: Sequence[tuple[int, int]]) -> str | None:
    if not sizes:
        return None
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    smallest, largest = by_area[0], by_area[-1]
    text = f"{smallest[0]} x {smallest[1]}"
    return text if smallest == largest else f"{text} to {largest[0]} x {largest[1]} (height x width)"


def _memory_note(outcome: Evaluation, loaded: LoadedModel) -> str:
    if not any(outcome.peak_bytes.values()):
        return "not measured"
    if next(loaded.model.parameters()).device.type == "cuda":
        return "peak of torch's CUDA allocations in a procedure, beside the probabilities of a batch"
    return "peak of torch's CPU allocations in a procedure (profiled), beside the probabilities of the largest batch"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ---------------------------------------------------------------------------------------------------
# Text


def text(content: Mapping[str, Any]) -> str:
    """Return the protocol, and the full report of a procedure, or, for several, tables that compare them."""
    protocol, procedures = content["protocol"], content["procedures"]
    parts = [_header(protocol)]
    if len(procedures) > 1:
        parts += [
            _class_table(procedures, "Class_Dice", protocol),
            _class_table(procedures, "Class_IoU", protocol),
            _comparison(procedures),
        ]
    else:
        parts += [_report(name, scores, protocol) for name, scores in procedures.items()]
    if "reliability" in content:
        parts.append(_reliability(content["reliability"]))
    if "comparison" in content:
        parts.append(_differences(content["comparison"]))
    if "advice" in content:
        parts.append(f"\n    ## Advice\n{_wrapped(content['advice'])}")
    return "\n".join(parts)


def _header(protocol: Mapping[str, Any]) -> str:
    shown = ["checkpoint", "model", "loss", "data", "split", "note", "images", "resolution", "image_sizes", "views"]
    shown += ["scores", "absent_classes", "ignored_pixels", "classes_of_interest", "temperature", "threshold", "fitted"]
    shown += ["test_loss"]
    lines = [_line(key, _shown(protocol[key])) for key in shown if protocol[key] is not None]
    counts = ", ".join(f"{c} {_range(n)}" for c, n in protocol["images_per_class_mean"].items())
    return "\n".join(["\n    ## Protocol", *lines, _line("images_per_class_mean", counts)])


def _line(key: str, value: str) -> str:
    head = f"    {key:<22}: "
    return textwrap.fill(value, 118, initial_indent=head, subsequent_indent=" " * len(head)) if value else head


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _wrapped(value: str) -> str:
    return textwrap.fill(value, 118, initial_indent="    ", subsequent_indent="    ")


def _range(counts: Sequence[int]) -> str:
    return str(counts[0]) if counts[0] == counts[1] else f"{counts[0]} to {counts[1]}"


def _differences(found: Mapping[str, Any]) -> str:
    level = f"{found['level']:.0%}"
    rows = [
        [
            name,
            *(_number(d[key], signed=True) for key in ("mean", "low", "high")),
            *(str(d[key]) for key in ("better", "same", "worse")),
            *(_number(d[key], signed=True) for key in ("largest_gain", "largest_loss")),
        ]
        for name, d in found["Mean_Dice"].items()
    ]
    header = ["procedure", "difference", f"{level} from", "to", "better", "same", "worse", "best image", "worst image"]
    title = f"\n    ## mDice against {found['baseline']} (paired bootstrap over images, {found['resamples']:,} draws; "
    title += f"same: within {found['same_within']})\n"
    return title + table(header, rows) + f"\n\n    ## Verdict\n{_wrapped(found['verdict'])}"


def _reliability(found: Mapping[str, Any]) -> str:
    shown = (("NLL", "NLL"), ("Brier", "Brier"), ("ECE", "ECE"), ("Class_ECE", "class ECE"))
    row = [_number(found[key]) for key, _ in shown]
    title = f"\n    ## Calibration of the probabilities ({found['pixels']:,} pixels)\n"
    return title + table([title for _, title in shown], [row])


def _report(name: str, scores: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    lines = [f"\n    ## Results of {name}"]
    for key, value in scores.items():
        if not isinstance(value, dict):
            lines.append(f"    {key:<22}: {_number(value)}")
    interest = protocol["classes_of_interest"]
    for key in ("Class_IoU", "Class_Dice"):
        listing = ", ".join(f"{_marked(c, interest)}: {_number(v, 3)}" for c, v in scores[key].items())
        lines.append(f"    {key:<22}: {{{listing}}}")
    return "\n".join(lines)


def _marked(name: str, interest: str | Sequence[str]) -> str:
    return name if interest == "all" or name in interest else f"{name} (not of interest)"


def _comparison(procedures: Mapping[str, Mapping[str, Any]]) -> str:
    columns = [
        (key, title) for key, title in COLUMNS if any(scores.get(key) is not None for scores in procedures.values())
    ]
    rows = [[name, *(_number(scores.get(key)) for key, _ in columns)] for name, scores in procedures.items()]
    loss = next(iter(procedures.values()))["test_loss"]
    notes = [f"test_loss, the same for all: {_number(loss)}"]
    notes += [f"{name}: {what}" for name, what in EXPLAINED.items() if name in procedures]
    text = "\n    ## Comparison\n" + table(["procedure", *(title for _, title in columns)], rows)
    return "\n".join([text, *(_wrapped(note) for note in notes)])


def _class_table(procedures: Mapping[str, Mapping[str, Any]], key: str, protocol: Mapping[str, Any]) -> str:
    first = next(iter(procedures.values()))
    images, interest = protocol["images_per_class_mean"], protocol["classes_of_interest"]
    rows = [
        [_marked(name, interest), *(_number(s[key][name]) for s in procedures.values()), _range(images[name])]
        for name in first[key]
    ]
    return f"\n    ## {key.replace('_', ' ')}\n" + table(["class", *procedures, "images"], rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned table; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, ["-" * w for w in widths], *rows]:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("    " + "  ".join(cells))
    return "\n".join(lines)


def _number(value: Any, digits: int = 4, signed: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:{'+' if signed else ''}.{digits}f}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------------------------------
# Files


def write(content: Mapping[str, Any], outcome: Evaluation, facts: Facts, folder: Path) -> list[Path]:
    """Write ``results.json`` and ``per_image.csv``, each whole or not at all; return their paths.

    A ``report.html`` that lies there is of an earlier run and is removed: files side by side belong together.
    """
    paths = [folder / "results.json", folder / "per_image.csv"]
    with suppress(OSError):  # where it cannot be made, writing says why
        folder.mkdir(parents=True, exist_ok=True)
    write_file(paths[0], json.dumps(content, indent=2) + "\n")
    write_file(paths[1], _per_image(outcome, facts))
    with suppress(OSError):
        (folder / PAGE).unlink(missing_ok=True)
    return paths


def to_be_replaced(folder: Path, protocol: Mapping[str, Any]) -> str | None:
    """Return whose results in a folder the new ones replace, in words.

    None where there are none, or those of the same checkpoint over no more images.
    """
    try:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))["protocol"]
        checkpoint, images = str(found["checkpoint"]), int(found["images"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if Path(checkpoint).resolve() != Path(protocol["checkpoint"]).resolve():
        return f"the results of {checkpoint}"
    return f"results over {images} images" if images > protocol["images"] else None


def write_scalars(content: Mapping[str, Any], folder: Path) -> None:
    """Write the scores as TensorBoard scalars into the folder, ``test_PROCEDURE/SCORE`` (``tester.tensorboard``)."""
    from torch.utils.tensorboard import SummaryWriter

    epoch = content["protocol"]["epoch"]
    with SummaryWriter(str(folder)) as writer:
        for name, scores in content["procedures"].items():
            for key, value in scores.items():
                values = {f"{key}/{c}": v for c, v in value.items()} if isinstance(value, Mapping) else {key: value}
                for tag, number in values.items():
                    if number is not None:
                        writer.add_scalar(f"test_{name}/{tag}", number, epoch)


def _per_image(outcome: Evaluation, facts: Facts) -> str:
    """Return one line per image, worst mean Dice of the last procedure first."""
    names = list(outcome.metrics)
    header = ["image"]
    columns: dict[str, list[list[float]]] = {}
    for name in names:
        metrics = outcome.metrics[name]
        images, scores, expected = metrics.rows()
        interest = metrics.classes
        values = [
            scores.dice[:, interest].nanmean(dim=1),
            scores.iou[:, interest].nanmean(dim=1),
            scores.pixel_accuracy[:, interest].mean(dim=1),
        ]
        header += [f"{name}_{key}" for key in ("mDice", "mIoU", "PixelAcc")]
        if expected is not None:
            values.append(expected[:, interest].nanmean(dim=1))
            header.append(f"{name}_expected_{'IoU' if metrics.expects == 'iou' else 'Dice'}")
        header += [f"{name}_Dice_{facts.class_names[c]}" for c in interest]
        columns[name] = torch.cat([torch.stack(values, dim=1), scores.dice[:, interest]], dim=1).tolist()
    last = columns[names[-1]]
    order = sorted(range(len(images)), key=lambda i: (math.isnan(last[i][0]), last[i][0], images[i]))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    for i in order:
        cells = ["" if math.isnan(v) else f"{v:.6f}" for name in names for v in columns[name][i]]
        writer.writerow([images[i], *cells])
    return stream.getvalue()


def write_file(path: Path, content: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        UserError: it could not be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path}: could not be written: {error.strerror}") from None
