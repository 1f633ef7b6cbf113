"""The command ``python -m utils.lr_scheduler``: draw the learning rate and the momentum of a run (needs matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import dataloaders
from utils import config as configs
from utils import lr_scheduler
from utils.cli import Parser, add_overrides
from utils.config import building
from utils.config.schema import Config
from utils.errors import UserError, import_extra, run, warn
from utils.files import atomic, expand

ASSUMED = 100  # batches per epoch where the data cannot be read


def batches_of(config: Config) -> int:
    """Return the batches of an epoch; without the data: limit_batches, or 100 and a warning."""
    limit = config.trainer.limit_batches
    try:
        found = len(building.build_loader(dataloaders.build, config, "train"))
    except UserError as error:
        found = limit or ASSUMED
        if limit is None:
            warn(
                f"cannot read the training data, so the picture assumes {ASSUMED} batches per epoch "
                f"(give the number with --iters-per-epoch N). {error}"
            )
    return min(found, limit or found)


def curves(config: Config, epochs: int, batches: int) -> dict[str, dict[str, list[float]]]:
    """Return the learning rate of each parameter group, and the momentum, in each step; no network is built."""
    schedule = building.schedule_alone(config, batches, epochs)
    first = schedule.optimizer.param_groups[0]
    momentum = "beta 1" if "betas" in first else "momentum" if "momentum" in first else None
    found: dict[str, dict[str, list[float]]] = {"learning rate": {}, **({momentum: {}} if momentum else {})}
    for groups in lr_scheduler.walk(schedule, schedule.total_steps):
        for group in groups:
            found["learning rate"].setdefault(group["name"], []).append(float(group["lr"]))
        if momentum:
            value = first["betas"][0] if "betas" in first else first["momentum"]
            found[momentum].setdefault(momentum, []).append(value)
    return found


def draw(panels: dict[str, dict[str, list[float]]], title: str, path: Path) -> None:
    """Write a picture of the curves of each panel over the optimizer step."""
    matplotlib = import_extra("matplotlib.figure", "the picture")
    figure = matplotlib.Figure(figsize=(9.6, 3 * len(panels)), layout="constrained")
    figure.suptitle(title)
    below = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (label, lines) in zip(below, panels.items(), strict=True):
        for name, values in lines.items():
            axes.plot(values, label=name)
        axes.set(xlabel="optimizer step", ylabel=label)
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend()
    try:
        with atomic(path, path.suffix) as temporary:
            figure.savefig(temporary)
    except ValueError as error:  # a kind of file that matplotlib does not write
        raise UserError(f"--out {path}: cannot write the picture: {error}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Read the config, run its schedule, write the picture."""
    parser = Parser(
        prog="python -m utils.lr_scheduler",
        description="Draw the learning rate and the momentum over the run that a config describes.",
    )
    parser.add_argument("-c", "--config", required=True, help="the config of the run")
    parser.add_argument("-o", "--out", default="lr.png", help="the picture to write (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="use this number instead of the config's trainer.epochs")
    parser.add_argument("--iters-per-epoch", type=int, help="batches per epoch (default: count the training data)")
    add_overrides(parser)
    args = parser.parse_args(argv)

    config = configs.load(args.config, args.set, stages=())
    epochs = config.trainer.epochs if args.epochs is None else args.epochs
    if epochs < 1 or (args.iters_per_epoch is not None and args.iters_per_epoch < 1):
        raise UserError("--epochs and --iters-per-epoch: expected numbers from 1 up")
    batches = args.iters_per_epoch or batches_of(config)
    title = f"{config.name}: {config.lr_scheduler.type}, {config.optimizer.type}, {epochs} epochs of {batches} batches"
    draw(curves(config, epochs, batches), title, expand(args.out))
    print(f"wrote {args.out}: {title}")
    return 0


if __name__ == "__main__":
    run(main)
