"""Progress bars for a terminal, a notebook, or a log file."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

from tqdm.auto import tqdm

# Seconds between two updates. A terminal can be redrawn; in a file, every update is another line.
TERMINAL_SECONDS, FILE_SECONDS = 0.5, 30.0


class _Lines:
    """A stream that writes each update of a bar as a separate line."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        # A bar begins with a carriage return and, when it closes, ends with a line feed.
        text = text.strip("\r\n")
        if text:
            self.stream.write(text + "\n")

    def flush(self) -> None:
        self.stream.flush()


def live_scores(scores: Mapping[str, float]) -> str:
    """Return the scores shown at the end of a bar: ``Loss 0.412 | Accuracy 0.91 | Mean IoU ... | Mean Dice ... |``.

    Accuracy is the share of correct labels. Where masks may overlap, there is only PixelAcc, which is always high.
    """
    labeled = not math.isnan(scores.get("Multiclass_Accuracy", math.nan))
    accuracy = {"Multiclass_Accuracy": "Accuracy"} if labeled else {"Pixel_Accuracy": "PixelAcc"}
    names = {"loss": "Loss"} | accuracy | {"Mean_IoU": "Mean IoU", "Mean_Dice": "Mean Dice"}
    return " | ".join(f"{short} {scores[name]:.3f}" for name, short in names.items() if name in scores) + " |"


def progress_bar(
    iterable: Iterable[Any] | None = None,
    *,
    desc: str,
    total: int | None = None,
    initial: int = 0,
    unit: str = "it",
) -> tqdm:
    """Return a tqdm bar on stderr; silent in all processes but the main one.

    In a file or a pipe it writes a line every half a minute, and one at the end. Bytes (unit "B") are shown in kB, MB
    and so on.
    """
    interactive = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(
        iterable,
        desc=desc,
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=unit == "B",
        disable=os.environ.get("RANK", "0") != "0",  # as distributed.is_first, which imports torch
        file=None if interactive else _Lines(sys.stderr),
        mininterval=TERMINAL_SECONDS if interactive else FILE_SECONDS,
        maxinterval=10 * TERMINAL_SECONDS if interactive else FILE_SECONDS,
        dynamic_ncols=interactive,
    )
