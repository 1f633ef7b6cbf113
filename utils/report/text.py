"""Test results on the screen."""

from __future__ import annotations

import textwrap
from collections.abc import Container, Mapping, Sequence
from typing import Any

from utils import tables
from utils.predict import PROCEDURES
from utils.report.content import COLUMNS, EXPLAINED, forecast

INDENT = "    "
WIDTH = 100
# Columns of the comparison on the screen; report.html has all of COLUMNS.
ON_SCREEN = ("Mean_Dice", "Mean_IoU", "Worst_Tenth_Dice", "Dataset_mIoU", "Mean_Boundary_IoU", "Pixel_Accuracy")
SUMMARY = [column for column in COLUMNS if column[0] in ON_SCREEN]
COSTS = ("milliseconds_per_image", "peak_mebibytes")
# Lines of the protocol that the screen shows; results.json has all of them.
PROTOCOL = (
    *("checkpoint", "probabilities", "model", "loss", "data", "split", "part", "note", "images", "resolution"),
    *("image_sizes", "views", "scores", "absent_classes", "ignored_pixels", "classes_of_interest", "temperature"),
    *("threshold", "fitted", "test_loss"),
)


def text(content: Mapping[str, Any], details: bool = False) -> str:
    """Return the protocol and the report of each procedure; of several procedures, tables that compare them.

    Args:
        content: of ``results.json``.
        details: of several procedures, the report and the scores per class of all of them, not only of the one that
            inference uses.
    """
    protocol, procedures = content["protocol"], content["procedures"]
    several, parts = len(procedures) > 1, [_header(protocol)]
    reported = [name for name in procedures if details or not several or name == protocol["deployed"]]
    blocks = [_report(name, procedures[name], protocol) for name in reported]
    if several:
        same = _same(procedures)
        distinct = {name: scores for name, scores in procedures.items() if details or name not in same}
        parts.append(_comparison(distinct, protocol, {} if details else same))
        if "comparison" in content:
            parts.append(_differences(content["comparison"], distinct))
        if details:
            blocks += [_class_table(procedures, key, protocol) for key in ("Class_Dice", "Class_IoU")]
    if "reliability" in content:
        parts.append(_reliability(content["reliability"]))
    parts += blocks
    if "comparison" in content:
        parts.append(_title("Verdict") + wrapped(content["comparison"]["verdict"]))
    if "advice" in content:
        parts.append(_title("Advice") + wrapped(content["advice"]))
    return "\n".join(parts)


def wrapped(value: str) -> str:
    """Return a paragraph, indented and as wide as the tables."""
    return textwrap.fill(value, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)


def images(counts: Sequence[int]) -> str:
    """Return the number of images behind a mean, or the fewest and the most."""
    return str(counts[0]) if counts[0] == counts[1] else f"{counts[0]} to {counts[1]}"


def _title(text: str) -> str:
    return f"\n{INDENT}## {text}\n"


def _line(key: str, value: str) -> str:
    head = f"{INDENT}{key:<22}: "
    return textwrap.fill(value, WIDTH, initial_indent=head, subsequent_indent=" " * len(head)) if value else head


def _header(protocol: Mapping[str, Any]) -> str:
    shown = {key: protocol[key] for key in PROTOCOL if protocol.get(key) is not None}
    lines = [_line(key, f"{v:.4g}" if isinstance(v, float) else str(v)) for key, v in shown.items()]
    counts = ", ".join(f"{c} {images(n)}" for c, n in protocol["images_per_class_mean"].items())
    return _title("Protocol") + "\n".join([*lines, _line("images_per_class_mean", counts)])


def _report(name: str, scores: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    """Return the scores in the format of pytorch-segmentation: a line per score, classes as dictionaries."""
    lines = [
        _line(key, value) if isinstance(value, str) else f"{INDENT}{key:<22}: {tables.number(value)}"
        for key, value in scores.items()
        if not isinstance(value, dict)
    ]
    for key in ("Class_IoU", "Class_Dice"):
        listing = ", ".join(f"{c}: {tables.number(v, 3)}" for c, v in scores[key].items())
        lines.append(_line(key, f"{{{listing}}}"))
    of = [protocol[key] for key in ("probabilities", "model", "loss") if protocol.get(key)]
    return _title(f"Results of {', '.join([*of, name])}") + "\n".join(lines)


def _class_table(procedures: Mapping[str, Mapping[str, Any]], key: str, protocol: Mapping[str, Any]) -> str:
    counts = protocol["images_per_class_mean"]
    rows = [
        [c, *(tables.number(s[key][c]) for s in procedures.values()), images(counts[c])]
        for c in next(iter(procedures.values()))[key]
    ]
    return _title(key.replace("_", " ")) + tables.plain(["class", *procedures, "images"], rows, INDENT, WIDTH)


def _same(procedures: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return name -> an earlier one with equal scores, of the procedures whose names a config does not know."""
    known: dict[str, list[Any]] = {}
    same: dict[str, str] = {}
    for name, scores in procedures.items():
        values = [scores["Class_Dice"], *(scores.get(key) for key, _ in COLUMNS if key not in COSTS)]
        equal = [other for other, found in known.items() if found == values]
        if not equal or name in PROCEDURES:
            known[name] = values
        else:
            same[name] = next((other for other in equal if name.startswith(other)), equal[0])
    return same


def _comparison(
    procedures: Mapping[str, Mapping[str, Any]], protocol: Mapping[str, Any], same: Mapping[str, str]
) -> str:
    columns = [(key, title) for key, title in SUMMARY if any(s.get(key) is not None for s in procedures.values())]
    rows = [
        [
            name,
            *(tables.number(s.get(key)) for key, _ in columns),
            *map(tables.number, forecast(s)[1:]),
            tables.number(s.get("milliseconds_per_image"), 2),
        ]
        for name, s in procedures.items()
    ]
    header = ["procedure", *(title for _, title in columns), "expected", "measured", "ms/image"]
    notes = [f"{name}: {what}" for name, what in EXPLAINED.items() if name in procedures]
    notes += [f"{name}: the same scores as {other}" for name, other in same.items()]
    notes.append(
        "PixelAcc counts for each class whether a pixel is correctly inside or outside it, so it is high for any "
        "network (docs/metrics.md)"
    )
    saved = "probabilities" in protocol
    user, why = (
        ("utils.predict", "unless -p names another") if saved else ("inference.py", "by predict.test of the config")
    )
    notes.append(f"{user} uses {protocol['deployed']}, {why}")
    return "\n".join([_title("Comparison") + tables.plain(header, rows, INDENT, WIDTH), *map(wrapped, notes)])


def _reliability(found: Mapping[str, Any]) -> str:
    shown = {"NLL": "NLL", "Brier": "Brier", "ECE": "ECE", "Class_ECE": "class ECE"}
    title = _title(f"Calibration of the probabilities ({found['pixels']:,} pixels)")
    return title + tables.plain(list(shown.values()), [[tables.number(found[key]) for key in shown]], INDENT)


def difference_rows(found: Mapping[str, Any], names: Container[str] | None = None) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table of differences to the baseline; ``names``: only of these."""
    header = ["procedure", "mDice", f"{found['level']:.0%} from", "to", "better", "same", "worse", "best", "worst"]
    rows = [
        [
            name,
            *(tables.number(d[key], signed=True) for key in ("mean", "low", "high")),
            *(str(d[key]) for key in ("better", "same", "worse")),
            *(tables.number(d[key], signed=True) for key in ("largest_gain", "largest_loss")),
        ]
        for name, d in found["Mean_Dice"].items()
        if names is None or name in names
    ]
    return header, rows


def _differences(found: Mapping[str, Any], names: Container[str]) -> str:
    title = _title(f"Difference to {found['baseline']}")
    note = (
        f"Paired bootstrap over images, {found['resamples']:,} draws. better, same, worse: number of images "
        f"(same: within {found['same_within']}). best, worst: largest gain and loss of one image."
    )
    return f"{title}{tables.plain(*difference_rows(found, names), INDENT, WIDTH)}\n{wrapped(note)}"
