"""Draw the learning rate and the momentum of a run: what ``python -m utils.lr_scheduler`` does."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from utils.config.schema import Config

Colour = tuple[int, int, int]

INK: Colour = (60, 60, 60)
GRID: Colour = (228, 228, 228)
# Blue, orange, green, purple (RGB): told apart by all kinds of colour vision.
LINES: tuple[Colour, ...] = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167))
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 92, 28, 70, 56
# Drawn larger and shrunk: OpenCV's own anti-aliasing leaves thin text ragged.
OVERSAMPLING = 3
ASSUMED = 100  # batches per epoch where the data are not there


@dataclass(frozen=True)
class Panel:
    """One pair of axes: curves ``{name: values per step}`` over the same steps."""

    label: str
    curves: dict[str, np.ndarray]


def simulate(config: Config, epochs: int, batches: int) -> list[Panel]:
    """Run the schedule of ``config`` without a network and return the panels to draw.

    Args:
        config: its optimizer, scheduler and ``trainer.accumulate`` are used.
        epochs, batches: the run's length; ``batches`` per epoch.
    """
    import numpy as np
    import torch
    from torch import nn

    from utils import lr_scheduler, optim

    class TwoParts(nn.Module):
        """The smallest model with both parameter groups; matrices, since some optimizers take nothing else."""

        def __init__(self) -> None:
            super().__init__()
            self.decoder, self.backbone = nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(1, 1))

        def get_decoder_params(self) -> list[nn.Parameter]:
            return [self.decoder]

        def get_backbone_params(self) -> list[nn.Parameter]:
            return [self.backbone]

    chosen = config.optimizer
    optimizer = optim.build(
        chosen.type, TwoParts(), chosen.differential_lr, chosen.backbone_lr_factor, False, **chosen.args
    )
    total = lr_scheduler.optimizer_steps(epochs, batches, config.trainer.accumulate)
    schedule = lr_scheduler.build(config.lr_scheduler.type, optimizer, total, **config.lr_scheduler.args)
    rates: dict[str, list[float]] = {name: [] for name in optim.learning_rates(optimizer)}
    momentum: list[float] = []
    for _ in range(total):
        for name, rate in optim.learning_rates(optimizer).items():
            rates[name].append(rate)
        group = optimizer.param_groups[0]
        momentum.append(group["betas"][0] if "betas" in group else group.get("momentum", math.nan))
        optimizer.step()
        schedule.step()
    panels = [Panel("learning rate", {name: np.array(values) for name, values in rates.items()})]
    if not math.isnan(momentum[0]):
        label = "beta 1" if "betas" in optimizer.param_groups[0] else "momentum"
        panels.append(Panel(label, {label: np.array(momentum)}))
    return panels


def batches_of(config: Config, build: Callable[..., Any]) -> int:
    """Return how many batches an epoch of the config's run has; without its data limit_batches, or 100 and a warning.

    ``build``: :func:`dataloaders.build`.
    """
    from utils.config import data_checks as checks
    from utils.errors import UserError

    limit = config.trainer.limit_batches
    try:
        found = len(checks.build_loader(build, config, "train"))
    except UserError as error:
        found = limit or ASSUMED
        if limit is None:
            print(
                f"warning: the training data cannot be read, so {ASSUMED} batches per epoch are assumed "
                f"(--iters-per-epoch N says how many there are). {error}",
                file=sys.stderr,
            )
    return min(found, limit or found)


def draw(panels: Sequence[Panel], title: str, width: int = 960, heights: Sequence[int] = (320, 180)) -> np.ndarray:
    """Return an RGB uint8 image ``(H, W, 3)`` of the panels, one below the other, over the optimizer step."""
    import cv2
    import numpy as np

    heights = heights[: len(panels)]
    height = MARGIN_TOP + sum(heights) + MARGIN_BOTTOM * len(panels)
    canvas = _Canvas(np.full((height * OVERSAMPLING, width * OVERSAMPLING, 3), 255, np.uint8))
    canvas.text((MARGIN_LEFT, 24), title, 0.62, align="left", colour=(20, 20, 20))
    top = MARGIN_TOP
    for panel, panel_height in zip(panels, heights, strict=True):
        box = (MARGIN_LEFT, top, width - MARGIN_RIGHT, top + panel_height)
        _draw_panel(canvas, panel, box, last=panel is panels[-1])
        top += panel_height + MARGIN_BOTTOM
    return cv2.resize(canvas.pixels, (width, height), interpolation=cv2.INTER_AREA)


def _draw_panel(canvas: _Canvas, panel: Panel, box: tuple[int, int, int, int], last: bool) -> None:
    import numpy as np

    left, top, right, bottom = box
    everything = np.concatenate(list(panel.curves.values()))
    y_ticks = _ticks(0.0 if panel.label == "learning rate" else everything.min(), everything.max(), 5)
    steps = len(next(iter(panel.curves.values())))
    x_ticks = [tick for tick in _ticks(0, steps, 8) if tick <= steps]
    low, high = y_ticks[0], y_ticks[-1]

    def place(step: Any, value: Any) -> tuple[Any, Any]:
        return left + (right - left) * step / max(steps, 1), bottom - (bottom - top) * (value - low) / (high - low)

    for tick in y_ticks:
        y = place(0, tick)[1]
        canvas.line((left, y), (right, y), GRID)
        canvas.text((left - 10, y), f"{tick:.4g}", 0.45, align="right")
    for tick in x_ticks:
        x = place(tick, low)[0]
        canvas.line((x, top), (x, bottom), GRID)
        canvas.line((x, bottom), (x, bottom + 5), INK)
        canvas.text((x, bottom + 17), f"{tick:g}", 0.45)
    canvas.line((left, top), (left, bottom), INK)
    canvas.line((left, bottom), (right, bottom), INK)
    for (_, values), colour in zip(panel.curves.items(), _cycle(LINES, len(panel.curves)), strict=True):
        canvas.curve(*place(np.arange(steps), values), colour)
    canvas.text((left, top - 14), panel.label, 0.5, align="left")
    if len(panel.curves) > 1:
        _legend(canvas, panel, right, top)
    if last:
        canvas.text(((left + right) / 2, bottom + 40), "optimizer step", 0.5)


def _legend(canvas: _Canvas, panel: Panel, right: int, top: int) -> None:
    x = right - 150
    for row, (name, colour) in enumerate(zip(panel.curves, _cycle(LINES, len(panel.curves)), strict=True)):
        y = top + 18 + 20 * row
        canvas.line((x, y), (x + 26, y), colour, thickness=2.2)
        canvas.text((x + 36, y), name, 0.45, align="left")


def _cycle(colours: Sequence[Colour], count: int) -> list[Colour]:
    return [colours[i % len(colours)] for i in range(count)]


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` round numbers whose range holds [low, high] (1, 2 or 5 times a power of ten apart)."""
    if not high > low:
        high, low = (high + abs(high) * 0.1, low - abs(low) * 0.1) if high else (1.0, 0.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    # Multiplied up and rounded, so that 3 * 0.1 reads 0.3.
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


class _Canvas:
    """OpenCV's drawing in the coordinates of the final image."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def line(self, start: tuple[float, float], end: tuple[float, float], colour: Colour, thickness: float = 1) -> None:
        import cv2

        a, b = (tuple(round(v * OVERSAMPLING) for v in point) for point in (start, end))
        cv2.line(self.pixels, a, b, colour, round(thickness * OVERSAMPLING), cv2.LINE_AA)

    def curve(self, x: np.ndarray, y: np.ndarray, colour: Colour) -> None:
        import cv2
        import numpy as np

        points = np.round(np.stack([x, y], axis=1) * OVERSAMPLING).astype(np.int32)
        cv2.polylines(self.pixels, [points], False, colour, round(2.2 * OVERSAMPLING), cv2.LINE_AA)

    def text(
        self, where: tuple[float, float], text: str, size: float, align: str = "centre", colour: Colour = INK
    ) -> None:
        """Write ``text`` with its middle (or left or right end) at ``where``."""
        import cv2

        font, scale, thickness = cv2.FONT_HERSHEY_SIMPLEX, size * OVERSAMPLING, OVERSAMPLING
        (width, height), _ = cv2.getTextSize(text, font, scale, thickness)
        shift = {"left": 0.0, "centre": width / 2, "right": float(width)}[align]
        x, y = (v * OVERSAMPLING for v in where)
        cv2.putText(
            self.pixels, text, (round(x - shift), round(y + height / 2)), font, scale, colour, thickness, cv2.LINE_AA
        )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.lr_scheduler",
        description="Draw the learning rate and the momentum over the run that a config describes.",
    )
    parser.add_argument("-c", "--config", required=True, help="the run's config")
    parser.add_argument("-o", "--out", default="lr.png", help="the picture to write (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="instead of the config's trainer.epochs")
    parser.add_argument(
        "--iters-per-epoch",
        type=int,
        help=f"batches of an epoch (default: as many as the config's training data give; {ASSUMED} where they are not "
        "there)",
    )
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override a config field")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Read the config, run its schedule, write the picture."""
    args = parse(argv)

    import cv2

    import dataloaders
    from utils import config as configs
    from utils.errors import UserError

    config = configs.load(args.config, args.set, stages=())
    epochs = config.trainer.epochs if args.epochs is None else args.epochs
    if epochs < 1 or (args.iters_per_epoch is not None and args.iters_per_epoch < 1):
        raise UserError("--epochs and --iters-per-epoch: expected numbers from 1 up")
    batches = args.iters_per_epoch or batches_of(config, dataloaders.build)
    try:
        panels = simulate(config, epochs, batches)
    except (TypeError, ValueError) as error:
        raise UserError(f"{args.config}: optimizer or lr_scheduler: {error}") from None
    title = f"{config.name}: {config.lr_scheduler.type}, {config.optimizer.type}, {epochs} epochs of {batches} batches"
    picture = draw(panels, title)
    if Path(args.out).suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: expected a name that ends in .png")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(args.out, picture[:, :, ::-1]):
        raise UserError(f"--out {args.out}: cannot be written")
    print(f"wrote {args.out}: {title}")
    return 0
