"""Apply a prediction procedure to saved probabilities, score them, or fit on them.

    python -m utils.predict --probs FOLDER -p rankdice -o masks
    python -m utils.predict --probs FOLDER -p all --labels LABELS
    python -m utils.predict --probs FOLDER --labels LABELS --fit fit.json
    python -m utils.predict --probs OTHERS --use fit.json -o masks

FOLDER was written by test.py --save-probs or inference.py --probs. It may also contain plain .npz or .npy files of
another program, such as nnU-Net's saved softmax, with arrays (classes, height, width) or (classes, depth, height,
width).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from utils import stamps
from utils.checkpoint import LoadedModel
from utils.cli import PROCEDURES, Parser
from utils.config.errors import explain
from utils.config.errors import report as report_problems
from utils.config.schema import Component, Config, Predict, Presence
from utils.errors import UserError, plural, run
from utils.evaluation import Evaluator, fitting
from utils.facts import Facts
from utils.files import check_folder, expand, write_text
from utils.predict import PredictOptions
from utils.predict.files import write_classes
from utils.predict.network import SavedNetwork, choose_device
from utils.predict.saved_probs import Case, SavedProbs, flat, output_path, write_labels
from utils.predict.segmentation import Decider
from utils.progress import progress_bar
from utils.rankdice import METRICS, SOLVERS
from utils.report.content import Setting
from utils.report.scoring import Scoring


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        prog="python -m utils.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--probs", metavar="FOLDER", required=True, help="the saved probabilities")
    add("-p", "--predict", choices=(*PROCEDURES, "all"), help="prediction procedure; 'all' scores every procedure")
    add(
        "-o",
        "--output",
        metavar="FOLDER",
        help="folder for masks and scores (default: masks/PROCEDURE in the folder of --probs)",
    )
    add("--details", action="store_true", help="with -p all, print all scores of all procedures")
    add("--labels", metavar="DIR", help="score against label files of the same names, and write no masks")
    add("--fit", metavar="FILE", help="fit temperature, threshold and presence on the labels and write them to a file")
    add("--use", metavar="FILE", help="apply a fit that --fit wrote")
    add("--class-names", nargs="+", metavar="NAME", help="class names for plain files, in the order of their channels")
    add("--coi", nargs="+", type=int, metavar="ID", help="classes of interest: those in the mean scores (default: all)")
    add("--ignore-index", type=int, default=255, help="label that is ignored, for plain files (default: 255)")
    add("--masks", action="store_true", help="also write the overlapping masks of T and rankdice, one PNG per class")
    add("--force", action="store_true", help="replace files in the output folder that this program did not write")
    add("-d", "--device", default="cpu", help="default: cpu; use the device of the run to get exactly its masks")
    options = parser.add_argument_group(
        "options of the procedures (default: those of the run)", argument_default=argparse.SUPPRESS
    ).add_argument
    options("--threshold", type=float, help="threshold of procedure T")
    options("--metric", choices=METRICS, help="the score whose expected value rankdice maximizes")
    options("--solver", choices=SOLVERS, help="solver of rankdice")
    options("--smooth", type=float, help="smoothing of rankdice's Dice or IoU")
    options(
        "--prune", type=prune, metavar="P", help="no rankdice mask for classes that are at most P everywhere; or off"
    )
    options("--presence", choices=get_args(Presence), help="which classes get a mask")
    args = parser.parse_args()
    if args.fit and (not args.labels or args.use):
        parser.error("--fit needs --labels, and cannot be combined with --use")
    if args.predict == "all" and not args.labels:
        parser.error("-p all scores every procedure: add --labels, or name one procedure")
    return args


def prune(text: str) -> float | None:
    """Read the value of ``--prune``."""
    return None if text == "off" else float(text)


@dataclass(frozen=True)
class Job:
    """What is done with which probabilities."""

    probs: SavedProbs
    facts: Facts
    predict: Predict
    procedure: str
    device: torch.device

    @property
    def options(self) -> PredictOptions:
        """The options of the procedures."""
        return PredictOptions.from_config(self.predict)

    @property
    def network(self) -> SavedNetwork:
        """The probabilities of the images."""
        own = self.predict
        return SavedNetwork(self.facts, self.probs.activation, self.device, own.temperature, own.bias)


def main() -> int:
    """Write masks, or scores."""
    args = parse_arguments()
    job = prepare(args)
    (fit if args.fit else score if args.labels else decode)(args, job)
    return 0


def prepare(args: argparse.Namespace) -> Job:
    """Read the folder, and what the command line says about it.

    Raises:
        UserError: the folder cannot be used.
    """
    probs = SavedProbs(expand(args.probs), expand(args.labels) if args.labels else None, args.ignore_index)
    index = probs.index
    facts = index.facts
    if args.class_names:
        if len(args.class_names) != facts.num_classes:
            raise UserError(f"--class-names: expected {facts.num_classes} names, found {len(args.class_names)}")
        facts = replace(facts, class_names=tuple(args.class_names))
    if wrong := sorted({c for c in args.coi or () if not 0 <= c < facts.num_classes or args.coi.count(c) > 1}):
        raise UserError(f"--coi: found {wrong}; expected different class ids from 0 to {facts.num_classes - 1}")
    of_run = vars(index.options) | {"classes": args.coi or index.options.classes}
    fields = {"threshold": of_run["threshold"], "presence": of_run["presence"], "presence_fit": of_run["fit"]}
    fields["test"] = index.procedure
    if args.use:
        fields |= fitted(expand(args.use), facts.num_classes)
    fields |= {name: getattr(args, name) for name in ("threshold", "presence") if name in args}
    if fields["presence"] == "fitted" and fields["presence_fit"] is None:
        raise UserError("--presence fitted: there is no fit; pass a file that --fit wrote with --use")
    ranking = {name: getattr(args, name, of_run[name]) for name in ("solver", "metric", "smooth", "prune")}
    classes = "all" if of_run["classes"] is None else list(of_run["classes"])
    try:
        predict = Predict.model_validate(fields | {"CoI": classes, "rankdice": ranking})
    except ValidationError as error:
        raise UserError(report_problems("the options", explain(error))) from None
    return Job(probs, facts, predict, args.predict or index.procedure, choose_device(args.device))


# ------------------------------------------------------------------------------------------------------ fits


def fit(args: argparse.Namespace, job: Job) -> None:
    """Fit on labeled images, and write what was found: fields of the config's ``predict``."""
    procedure = job.procedure if job.procedure in PROCEDURES else "rankdice"
    evaluator = Evaluator(job.network, job.options.classes)
    found = fitting.fit(evaluator, job.probs, job.options, procedure=procedure)
    print(fitting.text(found, args.probs))
    path = expand(args.fit)
    write_text(path, json.dumps({k: v for k, v in found.fields().items() if k != "mode"}, indent=2) + "\n")
    print(f"written: {path}; apply it to other probabilities with --use")


def fitted(path: Path, classes: int) -> dict[str, Any]:
    """Return what ``--fit`` wrote, as fields of the config's ``predict``.

    Raises:
        UserError: the file is not one of those, or for another number of classes.
    """
    try:
        found = Predict(**json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"--use {path}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"--use {path}: expected a file that --fit wrote: {error}") from None
    if found.bias is not None and len(found.bias) != classes:
        raise UserError(f"--use {path}: was fitted on {len(found.bias)} classes, the probabilities have {classes}")
    return found.model_dump(include={"temperature", "bias", "threshold", "presence", "presence_fit"})


# ------------------------------------------------------------------------------------------------------ masks


def decode(args: argparse.Namespace, job: Job) -> None:
    """Write the label map of every image, and with ``--masks`` the masks of its classes."""
    folder = expand(args.output) if args.output else job.probs.folder / "masks" / job.procedure
    expected = []
    for case in progress_bar(job.probs.cases, desc="DECODE", unit="image"):
        mean = _decode_one(args, job, case, folder)
        if mean is not None:
            expected.append(mean)
    print(f"written: {plural(len(job.probs), 'mask')} of {job.procedure} in {folder}")
    if expected:
        mean = sum(expected) / len(expected)
        print(f"expected {job.options.metric}, mean over images and their masks: {mean:.4f}")


def _decode_one(args: argparse.Namespace, job: Job, case: Case, folder: Path) -> float | None:
    """Write the outputs of one image; return the mean expected score of its masks."""
    saved = job.probs.read(case)
    shape = tuple(saved.shape[1:])
    path = output_path(folder, case, len(shape))
    if not args.force:
        stamps.refuse_foreign([path], folder)
    if args.masks and len(shape) > 2:
        raise UserError("--masks: PNG files cannot contain volumes; remove this option")
    try:
        tall = flat(saved)
        # Where the softmax is 0 for all classes, the image had no data.
        missing = (tall == 0).all(0).numpy() if job.probs.activation == "softmax" else None
        probs = job.network.forward(tall[None])[1]
        found = Decider(job.procedure, job.options, args.masks)(probs, [missing])[0]
    except ValueError as error:  # options that cannot be combined
        raise UserError(f"{case.path}: {error}") from None
    write_labels(path, job.facts, case, found.labels.reshape(shape))
    if isinstance(found.masks, np.ndarray):
        masks = ((c, mask.astype(np.uint8) * 255) for c, mask in enumerate(found.masks) if mask.any())
        write_classes(folder / f"{case.name}_masks", job.facts, masks)
    return found.expected


# ------------------------------------------------------------------------------------------------------ scores


def score(args: argparse.Namespace, job: Job) -> None:
    """Print the report of test.py, and write it if ``--output`` names a folder."""
    # The report reads from a config what was done. What it says of a training does not apply.
    none, labels = Component(type="none"), Component(type="labels", args={"data_dir": args.labels})
    config = Config(
        name="saved probabilities", arch=none, loss=none, train_loader=none, test_loader=labels, predict=job.predict
    )
    scoring = Scoring(
        LoadedModel(nn.Identity(), job.facts, config, job.probs.activation, job.probs.folder, 0),
        job.probs,
        Evaluator(job.network, job.options.classes),
        job.options,
        job.procedure,
        setting(args, job),
    )
    scoring.report(scoring.evaluate("SCORE"), check_folder(args.output) if args.output else None, args.details)


def setting(args: argparse.Namespace, job: Job) -> Setting:
    """Return in words how the scores come about, as far as the folder tells it."""
    index = job.probs.index
    of_run = {
        "temperature": f"temperature {index.temperature:g} (in the saved probabilities)",
        "threshold": f"threshold {index.options.threshold:g}",
        "presence": f"{'a' if index.options.fit else 'no'} presence fit",
    }
    fitted, values = None, "no fit: the folder does not mention one"
    if args.use:
        names = [name for name in ("temperature", "bias", "threshold", "presence") if name not in args]
        fitted = values = f"{', '.join(names)} are those of {args.use}"
    elif job.probs.known:
        own = ", ".join(text for name, text in of_run.items() if name not in args)
        values = f"fitted or set in the run that saved the probabilities: {own}"
        fitted = values if index.options.fit else None
    return Setting(
        "as saved",
        fitted,
        index.note or None,
        ("--labels DIR --fit FILE", "apply it with --use FILE"),
        {
            "checkpoint": index.checkpoint if job.probs.known else None,
            "probabilities": str(job.probs.folder),
            "data": f"labels in {args.labels}",
            "fitted": values,
        }
        | dict.fromkeys(("model", "loss", "epoch")),
    )


if __name__ == "__main__":
    run(main)
