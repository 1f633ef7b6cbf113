"""``report.html``: all results of a test on one page, which needs no network, no script and no other file."""

from __future__ import annotations

import base64
import importlib.metadata
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from utils.config import dump
from utils.config.schema import Config
from utils.evaluation.confusion import shares
from utils.metrics import Metrics
from utils.report import charts
from utils.report.content import COLUMNS, EXPLAINED, forecast
from utils.report.gallery import BOTH_WRONG, MAX_RIGHT, RANKDICE_RIGHT, Gallery
from utils.report.text import difference_rows, images
from utils.tables import number

SHOWN = ("T", "max", "rankdice")
# Points of the scatter plot; of more images every n-th is drawn.
MAX_POINTS = 2000
PACKAGES = ("torch", "torchvision", "numpy", "opencv-python-headless", "pydantic")
RANKED = ("Mean_Dice", "Mean_IoU", "Worst_Tenth_Dice", "Dataset_mDice", "Dataset_mIoU", "Pixel_Accuracy")

# Header and rows; a cell is a text, or {"best": text} where it is the best of its column.
Table = tuple[list[str], list[list[Any]]]


def page(
    content: Mapping[str, Any],
    metrics: Mapping[str, Metrics],
    gallery: Gallery,
    confusion: Mapping[str, Sequence[Sequence[int]]],
    config: Config,
    command: Sequence[str] = (),
) -> str:
    """Return the report as one HTML document.

    Args:
        content: of ``results.json`` (:func:`utils.report.content`), with ``comparison`` and ``reliability``.
        metrics: by procedure; they keep their images.
        gallery: pictures.
        confusion: matrices by procedure.
        config: of the run.
        command: the command line.
    """
    protocol, procedures = content["protocol"], content["procedures"]
    comparison, reliability = content.get("comparison") or {}, content.get("reliability") or {}
    shown = {name: charts.COLORS[name] for name in SHOWN if name in procedures}
    split = f" {protocol['split']}" if protocol["split"] else ""
    points = expected_points(metrics["rankdice"]) if "rankdice" in metrics else []
    every = max(1, -(-len(points) // MAX_POINTS))
    counts = (f"{cls} {images(of_class)}" for cls, of_class in protocol["images_per_class_mean"].items())
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    template.filters |= {"number": number, "source": _source}
    return template.get_template("page.html").render(
        title=f"{config.name}: {protocol['model']} on {protocol['data']}{split}",
        content=content,
        protocol=protocol,
        comparison=comparison or {"verdict": ""},
        reliability=reliability,
        notes=[text for text in (protocol["note"], content.get("advice")) if text],
        procedures=_procedures(procedures),
        explained={name: what for name, what in EXPLAINED.items() if name in procedures},
        differences=difference_rows(comparison) if comparison else None,
        shown=shown,
        classes=_classes(procedures, protocol, comparison),
        charts={name: Markup(chart) for name, chart in _charts(content, points[::every], shown).items()},
        every=every,
        reliability_colors={DIAGRAMS["classes"]: charts.COLORS["max"], DIAGRAMS["confidence"]: charts.COLORS["T"]},
        confusion={
            name: Markup(charts.heat_map(shares(matrix), gallery.facts.label_names))
            for name, matrix in confusion.items()
        },
        galleries={
            "Where rankdice gains most": gallery.gains,
            "Where rankdice loses most": gallery.losses,
        },
        disagreement={
            "rankdice right, max wrong": _rgb(RANKDICE_RIGHT),
            "max right, rankdice wrong": _rgb(MAX_RIGHT),
            "both wrong, differently": _rgb(BOTH_WRONG),
        },
        palette={n: _rgb(c) for n, c in zip(gallery.facts.label_names, gallery.palette.tolist(), strict=False)},
        shown_protocol={
            key.replace("_", " "): value
            for key, value in (protocol | {"images_per_class_mean": ", ".join(counts)}).items()
            if value is not None
        },
        config=dump(config),
        environment=environment(command),
    )


def environment(command: Sequence[str]) -> dict[str, str]:
    """Return the command, the system and the versions of a run."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "command": " ".join(command),
        "Python": sys.version.split()[0],
        "system": platform.platform(),
        **versions,
        "GPU": gpu,
        "threads": str(torch.get_num_threads()),
    }


# -- tables ------------------------------------------------------------------------------------------------------------


def _procedures(procedures: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = [(key, name) for key, name in COLUMNS if key.partition("_")[0] not in ("Expected", "Measured")]
    columns = [(key, name) for key, name in columns if any(s.get(key) is not None for s in procedures.values())]
    digits = {"milliseconds_per_image": 2, "peak_mebibytes": 1}
    top = {key: max((s[key] for s in procedures.values() if s[key] is not None), default=None) for key in RANKED}
    rows: list[list[Any]] = []
    for name, scores in procedures.items():
        cells = [number(scores.get(key), digits.get(key, 4), missing="–") for key, _ in columns]
        best = [scores.get(key) is not None and scores[key] == top.get(key) for key, _ in columns]
        kind, expected, measured = forecast(scores)
        both = "–" if expected is None else f"{kind} {number(expected)} / {number(measured)}"
        rows.append([name, *({"best": c} if b else c for c, b in zip(cells, best, strict=True)), both])
    return ["", *(name for _, name in columns), "expected / measured"], rows


def _classes(
    procedures: Mapping[str, Mapping[str, Any]], protocol: Mapping[str, Any], comparison: Mapping[str, Any]
) -> Table:
    change = comparison.get("Class_Dice", {}).get("rankdice")
    rows: list[list[Any]] = []
    for cls, counts in protocol["images_per_class_mean"].items():
        row = [cls, *(number(s[key][cls], missing="–") for key in KINDS for s in procedures.values())]
        if change:
            d = change[cls]
            interval = f" ({d['low']:+.3f} to {d['high']:+.3f})" if d["low"] is not None else ""
            row.append(number(d["mean"], 3, signed=True, missing="–") + interval)
        rows.append([*row, images(counts)])
    header = ["class", *(f"{kind} {name}" for kind in KINDS.values() for name in procedures)]
    return [*header, *["Dice rankdice − max"] * bool(change), "images"], rows


KINDS = {"Class_Dice": "Dice", "Class_IoU": "IoU"}
DIAGRAMS = {"classes": "every class at every pixel", "confidence": "the most probable class"}


# -- charts ------------------------------------------------------------------------------------------------------------


def _charts(
    content: Mapping[str, Any], points: Sequence[tuple[str, float, float]], shown: Mapping[str, str]
) -> dict[str, str]:
    """Return the SVG of each chart, empty if there is nothing to draw; ``points``: of :func:`expected_points`."""
    rows = (content.get("comparison") or {}).get("Mean_Dice", {}).items()
    reliability = content.get("reliability") or {}
    intervals = [(name, d["mean"], d["low"], d["high"]) for name, d in rows if d["low"] is not None]
    dice = {name: content["procedures"][name]["Class_Dice"] for name in shown}
    diagrams = {title: reliability[key] for key, title in DIAGRAMS.items()} if reliability.get("pixels") else {}
    color = charts.COLORS["rankdice"]
    return {
        "intervals": charts.intervals(intervals) if intervals else "",
        "bars": charts.bars(dice, list(next(iter(dice.values())))) if dice else "",
        "reliability": charts.reliability(diagrams) if diagrams else "",
        "expected": charts.scatter(points, "expected without labels", "measured", color) if points else "",
    }


def expected_points(metrics: Metrics) -> list[tuple[str, float, float]]:
    """Return name, expected and measured mean Dice of each image, over the classes that have both."""
    names, scores, expected = metrics.rows()
    if expected is None:
        return []
    both = expected.isfinite() & scores.dice.isfinite()
    means = [
        torch.where(both, values, torch.nan)[:, metrics.classes].nanmean(dim=1).tolist()
        for values in (expected, scores.dice)
    ]
    return [(n, x, y) for n, x, y in zip(names, *means, strict=True) if x == x and y == y]


# -- pictures ----------------------------------------------------------------------------------------------------------


def _rgb(color: Sequence[int]) -> str:
    return f"rgb({color[0]},{color[1]},{color[2]})"


def _source(picture: NDArray[Any], name: str) -> str:
    """Return a picture as a data address: JPEG for photographs, PNG for label maps."""
    photo = name in ("image", "rankdice against max")
    kind, options = (".jpg", [cv2.IMWRITE_JPEG_QUALITY, 85]) if photo else (".png", [cv2.IMWRITE_PNG_COMPRESSION, 9])
    data = cv2.imencode(kind, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), options)[1]
    media = "jpeg" if photo else "png"
    return f"data:image/{media};base64,{base64.b64encode(data.tobytes()).decode()}"
