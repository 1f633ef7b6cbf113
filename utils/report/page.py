"""``report.html``: everything a test found, on one page that needs no network, no script and no other file."""

from __future__ import annotations

import base64
import importlib.metadata
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import cv2
import torch
from numpy.typing import NDArray

from utils.config import dump
from utils.config.schema import Config
from utils.metrics import Metrics
from utils.report import COLUMNS, EXPLAINED, charts
from utils.report.gallery import BOTH_WRONG, MAX_RIGHT, RANKDICE_RIGHT, Case, Gallery

SHOWN = ("T", "max", "rankdice")
# Points of the scatter plot; of more images every n-th is drawn.
MAX_POINTS = 2000
PACKAGES = ("torch", "torchvision", "numpy", "opencv-python-headless", "pydantic")

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #57606a; --line: #d0d7de; --back: #fff; --box: #f6f8fa;
  --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --soft: #9aa4af; --line: #3d444d; --back: #0d1117;
  --box: #161b22; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 12px 14px 48px; max-width: 1080px; color: var(--text); background: var(--back);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.45rem; margin: .4em 0; } h2 { font-size: 1.15rem; margin: 1.8em 0 .5em; }
.verdict { border-left: 4px solid var(--accent); background: var(--box); padding: 10px 14px; font-size: 1.05rem; }
.note { border-left: 4px solid #e69f00; background: var(--box); padding: 8px 14px; }
.soft, figcaption { color: var(--soft); font-size: .87rem; }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem; white-space: nowrap; }
th, td { padding: 4px 9px; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--back); }
thead th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; }
td.best { font-weight: 700; }
dl { display: grid; grid-template-columns: minmax(7em, 14em) 1fr; gap: 2px 12px; font-size: .87rem; }
dt { color: var(--soft); } dd { margin: 0; min-width: 0; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--text); font-size: 11px; }
svg .small { font-size: 10px; } svg .tiny { font-size: 9px; fill: var(--soft); }
svg .grid { stroke: var(--line); stroke-width: .6; } svg .axis { stroke: var(--soft); stroke-width: 1; }
svg .diagonal { stroke: var(--soft); stroke-dasharray: 4 4; }
.pair { display: grid; gap: 20px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 14px; margin: 6px 0; font-size: .87rem; }
.key { display: inline-flex; align-items: center; gap: 5px; } .key i { width: 12px; height: 12px; border-radius: 2px;
  border: 1px solid var(--line); }
.case { border-top: 1px solid var(--line); padding: 8px 0 4px; } .case p { margin: 0 0 5px; font-size: .9rem; }
.strip { display: grid; gap: 5px; grid-template-columns: repeat(3, 1fr); }
@media (min-width: 700px) { .strip { grid-template-columns: repeat(6, 1fr); } }
figure { margin: 0; } .strip img { width: 100%; display: block; border-radius: 3px; image-rendering: auto; }
.strip img.labels { image-rendering: pixelated; }
details { margin: 8px 0; } summary { cursor: pointer; font-weight: 600; padding: 4px 0; }
pre { overflow-x: auto; background: var(--box); padding: 10px; font-size: .8rem; }
"""


def page(
    content: Mapping[str, Any],
    metrics: Mapping[str, Metrics],
    gallery: Gallery,
    config: Config,
    command: Sequence[str] = (),
) -> str:
    """Return the report as one HTML document.

    Args:
        content: of ``results.json`` (:func:`utils.report.results`), with ``comparison`` and ``reliability``.
        metrics: per procedure, with the images kept.
        gallery: of gains and losses.
        config: of the run.
        command: the command line.
    """
    protocol, procedures = content["protocol"], content["procedures"]
    title = f"{config.name}: {protocol['model']} on {protocol['data']}"
    if protocol["split"]:
        title += f" {protocol['split']}"
    verdict = content.get("comparison", {}).get("verdict", "")
    notes = (protocol["note"], content.get("advice"))
    note = "".join(f'<p class="note">{escape(text)}</p>' for text in notes if text)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{protocol["images"]} images · {escape(protocol["resolution"])} · epoch {protocol["epoch"]}'
        f" · {escape(protocol['loss'])}</p>",
        f'<p class="verdict">{escape(verdict)}</p>{note}',
        _comparison(procedures, protocol),
        _differences(content.get("comparison")),
        _classes(procedures, protocol, content.get("comparison")),
        _calibration(content.get("reliability"), protocol),
        _expected(metrics, procedures),
        _cases("Where rankdice gains most", gallery.gains, gallery),
        _cases("Where rankdice loses most", gallery.losses, gallery),
        _protocol(protocol),
        _details("Config", f"<pre>{escape(dump(config))}</pre>"),
        _details("Environment", _list(environment(command))),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n'
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def environment(command: Sequence[str]) -> dict[str, str]:
    """Return what the run ran on."""
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


# ---------------------------------------------------------------------------------------------------- tables


def _number(value: Any, digits: int = 4, signed: bool = False) -> str:
    if value is None:
        return "–"
    return f"{value:{'+' if signed else ''}.{digits}f}" if isinstance(value, float) else str(value)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], best: Sequence[Sequence[bool]] = ()) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = []
    for i, row in enumerate(rows):
        marks = best[i] if best else [False] * len(row)
        cells = (
            f'<td class="best">{escape(cell)}</td>' if mark else f"<td>{escape(cell)}</td>"
            for cell, mark in zip(row, marks, strict=True)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _comparison(procedures: Mapping[str, Mapping[str, Any]], protocol: Mapping[str, Any]) -> str:
    columns = [(key, name) for key, name in COLUMNS if key.partition("_")[0] not in ("Expected", "Measured")]
    columns = [(key, name) for key, name in columns if any(s.get(key) is not None for s in procedures.values())]
    digits = {"milliseconds_per_image": 2, "peak_mebibytes": 1}
    rows = [
        [name, *(_number(s.get(key), digits.get(key, 4)) for key, _ in columns), _foretold(s)]
        for name, s in procedures.items()
    ]
    ranked = ("Mean_Dice", "Mean_IoU", "Worst_Tenth_Dice", "Dataset_mDice", "Dataset_mIoU", "Pixel_Accuracy")
    top = {key: max((s[key] for s in procedures.values() if s[key] is not None), default=None) for key in ranked}
    best = [
        [False, *(s.get(key) is not None and s[key] == top.get(key) for key, _ in columns), False]
        for s in procedures.values()
    ]
    others = "".join(f" {name}: {escape(what)}." for name, what in EXPLAINED.items() if name in procedures)
    return (
        "<h2>Procedures</h2>"
        + _table(["", *(name for _, name in columns), "expected / measured"], rows, best)
        + '<p class="soft">mDice and mIoU: per image and class, mean over classes, then over images. worst 10 %: '
        "mDice of that tenth of the images in which a procedure does worst. Expected: what the procedure foretold "
        "without labels, over the masks whose measured score stands beside it. ms/image: deciding alone, one forward "
        f"pass ({protocol['forward_milliseconds_per_image']:.1f} ms per image) serves all. Memory: "
        f"{escape(protocol['memory'])}.{others}</p>"
    )


def _foretold(scores: Mapping[str, Any]) -> str:
    for kind in ("Dice", "IoU"):
        if scores.get(f"Expected_{kind}") is not None:
            return f"{kind} {_number(scores[f'Expected_{kind}'])} / {_number(scores[f'Measured_{kind}'])}"
    return "–"


def _differences(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    rows = []
    for name, d in found["Mean_Dice"].items():
        numbers = [_number(d[key], signed=True) for key in ("mean", "low", "high", "largest_gain", "largest_loss")]
        rows.append([name, *numbers[:3], *(str(d[key]) for key in ("better", "same", "worse")), *numbers[3:]])
    level = f"{found['level']:.0%}"
    header = ["", "mDice", f"{level} from", "to", "better", "same", "worse", "best image", "worst image"]
    drawn = [(name, d["mean"], d["low"], d["high"]) for name, d in found["Mean_Dice"].items() if d["low"] is not None]
    return (
        f"<h2>Differences to {escape(found['baseline'])}</h2>"
        + (charts.intervals(drawn) if drawn else "")
        + _table(header, rows)
        + f'<p class="soft">Paired bootstrap over images, {found["resamples"]:,} draws. better, same, worse: images; '
        f"the same: within {found['same_within']}.</p>"
    )


def _classes(
    procedures: Mapping[str, Mapping[str, Any]], protocol: Mapping[str, Any], found: Mapping[str, Any] | None
) -> str:
    names = [name for name in SHOWN if name in procedures]
    if not names:
        return ""
    dice = {name: procedures[name]["Class_Dice"] for name in names}
    classes = list(dice[names[0]])
    counts = protocol["images_per_class_mean"]
    change = (found or {}).get("Class_Dice", {}).get("rankdice")
    interest = protocol["classes_of_interest"]
    rows = []
    for cls in classes:
        low, high = counts[cls]
        mark = "" if interest == "all" or cls in interest else " (not of interest)"
        row = [cls + mark, *(_number(s["Class_Dice"][cls]) for s in procedures.values())]
        row += [_number(s["Class_IoU"][cls]) for s in procedures.values()]
        if change:
            d = change[cls]
            interval = f" ({d['low']:+.3f} to {d['high']:+.3f})" if d["low"] is not None else ""
            row.append(_number(d["mean"], 3, signed=True) + interval)
        rows.append([*row, str(low) if low == high else f"{low} to {high}"])
    header = ["class", *(f"Dice {name}" for name in procedures), *(f"IoU {name}" for name in procedures)]
    header += ["Dice rankdice − max"] * bool(change) + ["images"]
    return (
        "<h2>Classes</h2>"
        + charts.legend(names)
        + charts.bars(dice, classes)
        + '<p class="soft">Dice per class, mean over the images where it is defined: '
        + escape(protocol["absent_classes"])
        + ".</p>"
        + _details("All numbers per class", _table(header, rows))
    )


# ---------------------------------------------------------------------------------------------------- charts


def _calibration(found: Mapping[str, Any] | None, protocol: Mapping[str, Any]) -> str:
    if not found or not found["pixels"]:
        return ""
    pixels, classes = "every class at every pixel", "the most probable class"
    keys = "".join(
        f'<span class="key"><i style="background:{charts.COLOURS[c]}"></i>{name}</span>'
        for c, name in (("max", pixels), ("T", classes))
    )
    numbers = _list(
        {
            "ECE of the most probable class": _number(found["ECE"]),
            "ECE per class, mean": _number(found["Class_ECE"]),
            "NLL": _number(found["NLL"]),
            "Brier score": _number(found["Brier"]),
            "pixels": f"{found['pixels']:,}",
            "temperature": _number(float(protocol["temperature"])),
            "fitted": str(protocol["fitted"]),
        }
    )
    return (
        "<h2>Are the probabilities right?</h2>"
        f'<p class="legend">{keys}</p><div class="pair"><div>'
        + charts.reliability({pixels: found["classes"], classes: found["confidence"]})
        + f'</div><div>{numbers}<p class="soft">On the diagonal, what is given probability p is true in a share p '
        "of the cases. Below it the network is too sure of itself. RankDice uses every class's probability at every "
        "pixel; <code>test.py --fit</code> fits a temperature. The ECE weighs the gaps by the pixels in each bin (the "
        "area of the circles).</p></div></div>"
    )


def _expected(metrics: Mapping[str, Metrics], procedures: Mapping[str, Mapping[str, Any]]) -> str:
    if "rankdice" not in metrics:
        return ""
    points = expected_points(metrics["rankdice"])
    if not points:
        return ""
    shown = points[:: -(-len(points) // MAX_POINTS)]
    scores = procedures["rankdice"]
    every = f" Every {-(-len(points) // MAX_POINTS)}th image is drawn." if len(shown) < len(points) else ""
    return (
        '<h2>Dice expected and measured</h2><div class="pair"><div>'
        + charts.scatter(shown, "expected without labels", "measured", charts.COLOURS["rankdice"])
        + '</div><div><p class="soft">One point per image: the mean Dice that rankdice expected of its masks, and the '
        f"Dice they got, over the same masks. Means: expected {_number(scores.get('Expected_Dice'))}, measured "
        f"{_number(scores.get('Measured_Dice'))}. Under the diagonal an image went worse than foretold; where the two "
        f"agree, the expected score finds bad images without labels.{every}</p></div></div>"
    )


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


# ---------------------------------------------------------------------------------------------------- images


def _cases(title: str, cases: Sequence[Case], gallery: Gallery) -> str:
    if not cases:
        return f'<h2>{escape(title)}</h2><p class="soft">No image.</p>'
    parts = [
        f"<h2>{escape(title)}</h2>",
        '<p class="soft">T and rankdice give each class a mask of its own: a pixel in several shows the most probable '
        "of their classes, a pixel in none, and an ignored one, is pale.</p>",
        _disagreement_legend(),
        _palette_legend(gallery),
    ]
    for case in cases:
        figures = "".join(
            f'<figure><img {"" if name == "image" else "class=labels "}alt="{escape(name)} of {escape(case.name)}" '
            f'src="{_source(picture, photo=name in ("image", "rankdice against max"))}">'
            f"<figcaption>{escape(name)}</figcaption></figure>"
            for name, picture in case.pictures.items()
        )
        parts.append(
            f'<div class="case"><p><b>{case.gain:+.4f}</b> {escape(case.name)} <span class="soft">max '
            f"{case.baseline:.4f}, rankdice {case.rankdice:.4f}</span></p>"
            f'<div class="strip">{figures}</div></div>'
        )
    return "".join(parts)


def _key(colour: Sequence[int], name: str) -> str:
    return f'<span class="key"><i style="background:rgb({colour[0]},{colour[1]},{colour[2]})"></i>{escape(name)}</span>'


def _disagreement_legend() -> str:
    keys = (
        _key(RANKDICE_RIGHT, "rankdice right, max wrong"),
        _key(MAX_RIGHT, "max right, rankdice wrong"),
        _key(BOTH_WRONG, "both wrong, differently"),
    )
    return f'<p class="legend">{"".join(keys)}</p>'


def _palette_legend(gallery: Gallery) -> str:
    facts = gallery.facts
    keys = "".join(_key(colour, name) for name, colour in zip(facts.class_names, facts.palette, strict=False))
    return _details("Colours of the classes", f'<p class="legend">{keys}</p>')


def _source(picture: NDArray[Any], photo: bool) -> str:
    """Return a picture as a data address: JPEG for photographs, PNG for label maps."""
    kind, options = (".jpg", [cv2.IMWRITE_JPEG_QUALITY, 85]) if photo else (".png", [cv2.IMWRITE_PNG_COMPRESSION, 9])
    data = cv2.imencode(kind, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), options)[1]
    media = "jpeg" if photo else "png"
    return f"data:image/{media};base64,{base64.b64encode(data.tobytes()).decode()}"


# ---------------------------------------------------------------------------------------------------- the rest


def _protocol(protocol: Mapping[str, Any]) -> str:
    shown = {key.replace("_", " "): value for key, value in protocol.items() if value is not None}
    shown["images per class mean"] = ", ".join(
        f"{cls} {low}" if low == high else f"{cls} {low} to {high}"
        for cls, (low, high) in protocol["images_per_class_mean"].items()
    )
    return "<h2>Protocol</h2>" + _list({key: str(value) for key, value in shown.items()})


def _list(values: Mapping[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(v)}</dd>' for k, v in values.items())}</dl>"


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"
