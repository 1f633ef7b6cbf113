"""The command ``python -m utils.predict``: decide saved probabilities again, under any procedure."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Literal

from utils.config.schema import PROCEDURES
from utils.errors import UserError


def parse_arguments() -> argparse.Namespace:
    """Read the command line; imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.predict",
        description="Turn probabilities that test.py --save-probs wrote into masks, without running the network. "
        "Options that are not given are those of the run.",
    )
    add = parser.add_argument
    add("--probs", metavar="FOLDER", required=True, help="the saved probabilities")
    add("-p", "--predict", choices=PROCEDURES, help="prediction procedure")
    add("-o", "--output", metavar="FOLDER", help="where the masks go (default: masks/PROCEDURE in the folder)")
    add("--threshold", type=float, help="of procedure T")
    add("--metric", choices=("dice", "iou"), help="what rankdice maximises the expectation of")
    add("--solver", choices=("exact", "ba", "trna", "paper", "rma"), help="of rankdice")
    add("--smooth", type=float, help="of rankdice")
    add("--prune", type=_prune, metavar="P", help="of rankdice: a probability, or off")
    add("--masks", action="store_true", help="also the overlapping masks of T and rankdice, a PNG per class")
    add("-d", "--device", default="cpu", help="cpu, or cuda; the device of the run gives its very masks")
    args = parser.parse_args()
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        parser.error(f"--threshold {args.threshold}: expected a number in [0, 1]")
    return args


def _prune(text: str) -> float | Literal["off"]:
    if text == "off":
        return "off"
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number in [0, 1], or off")
    return value


def main() -> int:
    """Decode every stored image."""
    args = parse_arguments()

    from tqdm import tqdm

    from utils.predict import PROCEDURES as DECIDE
    from utils.predict import stored
    from utils.predict.network import choose_device

    folder = Path(args.probs)
    index = stored.read_index(folder)
    procedure = args.predict or index.procedure
    given = {key: getattr(args, key) for key in ("threshold", "metric", "solver", "smooth")}
    options = replace(index.options, **{key: value for key, value in given.items() if value is not None})
    if args.prune is not None:
        options = replace(options, prune=None if args.prune == "off" else args.prune)
    output = Path(args.output) if args.output else folder / "masks" / procedure
    device = choose_device(args.device)
    # Without the masks written below the folder by an earlier call.
    images = [(name, path) for name, path in stored.stored(folder) if folder / "masks" not in path.parents]
    if not images:
        raise UserError(f"{folder}: holds no probabilities (*.npz)")
    expected = []
    for name, path in tqdm(images, desc="DECODE", mininterval=0.5):
        probs = stored.read_probs(path)[None].to(device)
        try:
            prediction = DECIDE[procedure](probs, options)
        except ValueError as error:  # options that do not go together, values that are no probabilities
            raise UserError(f"{path}: {error}") from None
        stored.write_masks(output, index.facts, [name], stored.pictures(procedure, probs, prediction, options))
        if args.masks and prediction.masks is not None:
            found = prediction.masks[0].flatten(1).any(1).nonzero()[:, 0].tolist()
            masks = prediction.masks[0].cpu().numpy()
            stored.write_class_masks(output / f"{stored.file_name(name)}_masks", index.facts, masks, found)
        scores, volumes = prediction.scores, prediction.volumes
        if scores is not None and volumes is not None and volumes.any():
            expected.append(float(scores[volumes > 0].mean()))
    print(f"written: {len(images)} masks of {procedure} in {output}")
    if expected:
        print(f"expected {options.metric}, mean over images and their masks: {sum(expected) / len(expected):.4f}")
    return 0
