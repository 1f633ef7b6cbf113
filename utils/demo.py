"""A web page to try a model: upload an image and see the three procedures side by side.

    pip install gradio
    python -m utils.demo --model best_model.pth

By default, only this machine can open the page (see --host). No usage data is sent anywhere.
"""

from __future__ import annotations

import argparse
import html
import math
import os
from importlib.util import find_spec
from typing import Any, NamedTuple

from utils.cli import MODES, Parser


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        prog="python -m utils.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", required=True, help="checkpoint, such as saved/.../best_model.pth")
    parser.add_argument("-mo", "--mode", choices=MODES, help="default: predict.mode")
    parser.add_argument("-d", "--device", help="cpu, cuda, or a GPU's number (default: the GPU if there is one)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to serve at; 0.0.0.0 lets other machines open the page (default: 127.0.0.1)",
    )
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    return parser.parse_args()


if __name__ == "__main__":
    parse_arguments()  # the imports below take seconds; --help and wrong options must not wait for them

import cv2
import numpy as np
import torch

from utils.errors import UserError, not_installed, plural, run
from utils.facts import Facts
from utils.images.palette import displayable, overlay
from utils.predict.network import check_finite
from utils.predict.segmentation import Decider, Segmentation
from utils.predictor import Predictor
from utils.rankdice import METRICS

PROCEDURES = {"T": "T: above the threshold", "max": "max: most probable class", "rankdice": "rankdice: highest score"}
# Narrow enough for six columns on a telephone: the last one is what the page is for.
_CELL = 'style="padding:.4em .2em;font-size:.8rem"'
SMALLEST_SHOWN, LARGEST_SHOWN = 480, 1600  # pixels of the longer side of pictures sent to the browser


class Comparison(NamedTuple):
    """One image under the three procedures."""

    image: np.ndarray  # uint8 RGB (H, W, 3)
    labels: dict[str, np.ndarray]  # per procedure (H, W)
    pixels: dict[str, list[int]]  # per procedure, those of each class's mask
    scores: list[float]  # the expected Dice of each class's rankdice mask
    presence: list[float]  # of each class in the image; NaN for classes of no interest, and without a fit


def main() -> int:
    """Serve the page until Ctrl-C."""
    args = parse_arguments()
    check_gradio()
    predictor = Predictor(args.model, mode=args.mode, device=args.device)
    try:
        page(predictor).launch(server_name=args.host, server_port=args.port, quiet=False)
    except OSError as error:
        raise UserError(f"--port {args.port}: the page cannot be served there: {error}") from None
    return 0


def check_gradio() -> None:
    """Raise UserError if gradio is not installed; switch off its analytics if it is."""
    if find_spec("gradio") is None:
        raise not_installed("the demo page", "gradio")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")


def compare(predictor: Predictor, path: str) -> Comparison:
    """Segment an image file once and apply every procedure.

    Raises:
        UserError: the file cannot be read, or is too large for a page.
    """
    image, missing = predictor.read(path)
    if predictor.streams(*image.shape[:2]):
        raise UserError(f"the image has {image.shape[1]} x {image.shape[0]} pixels: use inference.py for such sizes")
    probs = predictor.probabilities(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])
    check_finite(probs)
    found = {name: Decider(name, predictor.options, keep_masks=True)(probs, [missing])[0] for name in PROCEDURES}
    labels = {name: one.labels for name, one in found.items()}
    pixels = {name: _pixels(one, predictor.facts.num_classes) for name, one in found.items()}
    best = found["rankdice"]
    assert best.scores is not None
    seen = [math.nan] * len(best.scores) if best.presence is None else best.presence.tolist()
    return Comparison(displayable(image), labels, pixels, best.scores.tolist(), seen)


def _pixels(found: Segmentation, classes: int) -> list[int]:
    """Return the pixels of each class's mask, or of its label."""
    if isinstance(found.masks, np.ndarray):
        return found.masks.sum((1, 2)).tolist()
    counts = np.bincount(found.labels.ravel(), minlength=max(2, classes)).tolist()  # and unassigned
    return counts[1:2] if classes == 1 else counts[:classes]


def pictures(comparison: Comparison, facts: Facts, opacity: float) -> list[np.ndarray]:
    """Return one overlay per procedure. Very small pictures are enlarged by whole pixels, very large ones reduced."""
    longest = max(comparison.image.shape[:2])
    scale = min(1.0, LARGEST_SHOWN / longest) if longest > SMALLEST_SHOWN else max(1, SMALLEST_SHOWN // longest)
    size = [max(1, round(side * scale)) for side in comparison.image.shape[1::-1]]
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    shown = [overlay(comparison.image, labels, facts.palette, opacity) for labels in comparison.labels.values()]
    return [cv2.resize(picture, size, interpolation=method) if scale != 1 else picture for picture in shown]


def table(comparison: Comparison, facts: Facts, metric: str = "dice") -> str:
    """Return an HTML table of the classes that any procedure found.

    Colors, shares of the image, the probability that the class is in the image, and the expected score of its rankdice
    mask.
    """
    total = comparison.image.shape[0] * comparison.image.shape[1]
    lines = []
    for c in range(facts.num_classes):
        counts = [comparison.pixels[name][c] for name in PROCEDURES]
        if not any(counts):
            continue
        name = html.escape(facts.class_names[c])
        color = "#{:02x}{:02x}{:02x}".format(*facts.palette[c])
        swatch = (
            f'<span style="display:inline-block;width:1em;height:1em;background:{color};border:1px solid #888"></span>'
        )
        score = f"{comparison.scores[c]:.3f}" if counts[-1] else "–"
        shares = (f"{100 * count / total:.2f}" for count in counts)
        presence = "–" if math.isnan(comparison.presence[c]) else f"{comparison.presence[c]:.2f}"
        cells = (f"{swatch} {name}", *shares, presence, f"<b>{score}</b>")
        lines.append(f"<tr>{''.join(f'<td {_CELL}>{cell}</td>' for cell in cells)}</tr>")
    titles = ("class", "T, %", "max, %", "rankdice, %", "in the image", f"expected {METRICS[metric].title}")
    head = "".join(f"<th {_CELL}>{text}</th>" for text in titles)
    body = f"<tr>{head}</tr>{''.join(lines)}"
    return f'<div style="overflow-x:auto"><table id="found" style="width:100%">{body}</table></div>'


def settings(predictor: Predictor) -> str:
    """Return what the masks depend on besides the image and the weights."""
    options, predict = predictor.options, predictor.config.predict
    how = {
        "fitted": "fitted presence",
        "rule": "the rule of presence",
        "all": "all",
        "prune": "all" if options.prune is None else f"probability above {options.prune:g} at some pixel",
    }
    bias = "" if predict.bias is None else " and a bias per class"
    return (
        f"Temperature {predict.temperature:.4g}{bias}. T: probability above {options.threshold:g}. rankdice: highest "
        f"{METRICS[options.metric].title}. Classes with a mask: {how[options.chooses_by]}."
    )


def page(predictor: Predictor) -> Any:
    """Return the gradio page."""
    import gradio as gr  # an extra

    facts, metric = predictor.facts, predictor.options.metric
    classes = plural(facts.num_classes, "class")

    def segment(path: str | None, opacity: float) -> tuple:
        if path is None:
            return None, *([None] * len(PROCEDURES)), ""
        try:
            comparison = compare(predictor, path)
        except (UserError, ValueError) as error:
            raise gr.Error(str(error)) from None
        return comparison, *pictures(comparison, facts, opacity), table(comparison, facts, metric)

    def redraw(comparison: Comparison | None, opacity: float) -> list:
        return [None] * len(PROCEDURES) if comparison is None else pictures(comparison, facts, opacity)

    with gr.Blocks(title="Segmentation: T, max, rankdice", analytics_enabled=False) as blocks:
        gr.Markdown(
            f"## {html.escape(predictor.config.arch.type)}, {classes}, mode {predictor.mode}\n\n{settings(predictor)}"
        )
        state = gr.State(None)
        with gr.Row():
            upload = gr.Image(
                type="filepath", image_mode=None, label="image", sources=["upload", "clipboard"], elem_id="upload"
            )
            with gr.Column():
                opacity = gr.Slider(0, 1, value=0.5, step=0.05, label="opacity of the masks", elem_id="opacity")
                found = gr.HTML()
        with gr.Row():
            shown = [gr.Image(label=label, elem_id=f"mask-{name}") for name, label in PROCEDURES.items()]
        upload.change(segment, [upload, opacity], [state, *shown, found])
        # Redraw on every change (mouse, key, number or reset button). While one picture is drawn, only the last change
        # waits.
        opacity.change(redraw, [state, opacity], shown, trigger_mode="always_last", show_progress="hidden")
    return blocks


if __name__ == "__main__":
    run(main)
