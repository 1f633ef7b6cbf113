"""Apply a prediction procedure to saved probabilities, or score them: ``python -m utils.predict``.

    python -m utils.predict --probs FOLDER -p rankdice -o masks
    python -m utils.predict --probs FOLDER -p all --labels LABELS
    python -m utils.predict --probs FOLDER --labels LABELS --fit fit.json
    python -m utils.predict --probs OTHERS --use fit.json -o masks

FOLDER was written by ``test.py --save-probs`` or ``inference.py --probs``. It may also contain plain .npz or .npy files
of another program, such as nnU-Net's saved softmax: (classes, height, width) or (classes, depth, height, width).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from torch import nn

from utils import report, stamps
from utils.checkpoint import LoadedModel
from utils.cli import PROCEDURES
from utils.config.schema import Component, Config, Predict, Presence, RankDiceOptions, Tester
from utils.errors import UserError, run
from utils.evaluation import Evaluator, all_decisions, evaluate, fitting, single_decision
from utils.facts import Facts
from utils.files import expand, write_text
from utils.predict import PredictOptions, stored
from utils.predict.network import SavedNetwork, choose_device
from utils.predict.saved import Case, SavedProbs, flat, output_path, write_labels
from utils.predict.segmentation import Decider
from utils.progress import progress_bar


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--probs", metavar="FOLDER", required=True, help="the saved probabilities")
    add("-p", "--predict", choices=(*PROCEDURES, "all"), help="prediction procedure; all: score every one")
    add("-o", "--output", metavar="FOLDER", help="where masks and scores go (default: masks/PROCEDURE in the folder)")
    add(
        "--labels",
        metavar="DIR",
        help="score against label files with the same names as the probabilities; writes no masks",
    )
    add("--fit", metavar="FILE", help="fit temperature, threshold and presence on the labels and write them to a file")
    add("--use", metavar="FILE", help="apply what --fit wrote")
    add("--class-names", nargs="+", metavar="NAME", help="class names for plain files, in the order of their channels")
    add("--coi", nargs="+", type=int, metavar="ID", help="classes of interest: those in the mean scores (default: all)")
    add("--ignore-index", type=int, default=255, help="label that is ignored, for plain files (default: 255)")
    add("--threshold", type=float, help="threshold of procedure T")
    add("--metric", choices=("dice", "iou"), help="the score whose expected value rankdice maximizes")
    add("--solver", choices=("exact", "ba", "trna", "paper", "rma"), help="solver of rankdice")
    add("--smooth", type=float, help="smoothing of rankdice's Dice or IoU")
    add(
        "--prune",
        type=_prune,
        metavar="P",
        help="no rankdice mask for classes whose highest probability is at most P; or off",
    )
    add("--presence", choices=get_args(Presence), help="which classes get a mask")
    add("--masks", action="store_true", help="also write the overlapping masks of T and rankdice, one PNG per class")
    add("--force", action="store_true", help="replace files in the output folder that this program did not write")
    add(
        "-d",
        "--device",
        default="cpu",
        help="cpu or cuda (default: cpu); on the device of the run, the masks are identical to those of the run",
    )
    args = parser.parse_args()
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        parser.error(f"--threshold {args.threshold}: expected a number in [0, 1]")
    if args.fit and (not args.labels or args.use):
        parser.error("--fit needs --labels, and cannot be combined with --use")
    if args.predict == "all" and not args.labels:
        parser.error("-p all scores every procedure: give --labels, or one procedure")
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


@dataclass(frozen=True)
class Job:
    """What is done with which probabilities."""

    probs: SavedProbs
    network: SavedNetwork
    options: PredictOptions
    procedure: str

    @property
    def facts(self) -> Facts:
        """The classes."""
        return self.network.facts


def main() -> int:
    """Write masks, or scores."""
    args = parse_arguments()
    job = prepare(args)
    if args.fit:
        fit(args, job)
    elif args.labels:
        score(args, job)
    else:
        decode(args, job)
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
    network = SavedNetwork(facts, probs.activation, choose_device(args.device))
    options = index.options
    if args.use:
        options, network = _fitted(expand(args.use), options, network)
    if args.coi:
        wrong = sorted({c for c in args.coi if not 0 <= c < facts.num_classes or args.coi.count(c) > 1})
        if wrong:
            raise UserError(f"--coi: found {wrong}; expected different class ids from 0 to {facts.num_classes - 1}")
        options = replace(options, classes=tuple(args.coi))
    given = {key: getattr(args, key) for key in ("threshold", "metric", "solver", "smooth", "presence")}
    options = replace(options, **{key: value for key, value in given.items() if value is not None})
    if args.prune is not None:
        options = replace(options, prune=None if args.prune == "off" else args.prune)
    if options.decides == "fitted" and options.fit is None:
        raise UserError("--presence fitted: nothing was fitted; give --use with a file that --fit wrote")
    return Job(probs, network, options, args.predict or index.procedure)


# ------------------------------------------------------------------------------------------------------ fits


def fit(args: argparse.Namespace, job: Job) -> None:
    """Fit on labeled images, and write what was found: fields of the config's ``predict``."""
    procedure = job.procedure if job.procedure in PROCEDURES else "rankdice"
    evaluator = Evaluator(job.network, job.options.classes)
    found = fitting.fit(
        evaluator,
        job.probs,
        job.options,
        lambda title: lambda loader: progress_bar(loader, desc=title),
        procedure=procedure,
    )
    print(fitting.text(found, args.probs))
    path = expand(args.fit)
    write_text(path, json.dumps({k: v for k, v in found.fields().items() if k != "mode"}, indent=2) + "\n")
    print(f"written: {path}; apply it to other probabilities with --use")


def _fitted(path: Path, options: PredictOptions, network: SavedNetwork) -> tuple[PredictOptions, SavedNetwork]:
    """Return options and network with what ``--fit`` wrote.

    Raises:
        UserError: the file is not one of those, or for another number of classes.
    """
    try:
        found = Predict(**json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"--use {path}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"--use {path}: expected a file that --fit wrote: {error}") from None
    if found.bias is not None and len(found.bias) != network.facts.num_classes:
        raise UserError(
            f"--use {path}: was fitted on {len(found.bias)} classes, the probabilities have {network.facts.num_classes}"
        )
    fields = PredictOptions.from_config(found)
    options = replace(options, threshold=fields.threshold, presence=fields.presence, fit=fields.fit)
    return options, replace(network, temperature=found.temperature, bias=found.bias)


# ------------------------------------------------------------------------------------------------------ masks


def decode(args: argparse.Namespace, job: Job) -> None:
    """Write the label map of every image, and with ``--masks`` the masks of its classes."""
    folder = expand(args.output) if args.output else job.probs.folder / "masks" / job.procedure
    expected = []
    for case in progress_bar(job.probs.cases, desc="DECODE", unit="image"):
        mean = _decode_one(args, job, case, folder)
        if mean is not None:
            expected.append(mean)
    print(f"written: {len(job.probs)} masks of {job.procedure} in {folder}")
    if expected:
        mean = sum(expected) / len(expected)
        print(f"expected {job.options.metric}, mean over images and their masks: {mean:.4f}")


def _decode_one(args: argparse.Namespace, job: Job, case: Case, folder: Path) -> float | None:
    """Write the outputs of one image; return the mean expected score of its masks."""
    saved = job.probs.read(case)
    shape = tuple(saved.shape[1:])
    if not args.force:
        stamps.refuse_foreign([output_path(folder, case, len(shape))], folder)
    if args.masks and len(shape) > 2:
        raise UserError("--masks: PNG files cannot contain volumes; remove this option")
    try:
        tall = flat(saved)
        # Where the softmax is 0 for all classes, the image had no data.
        missing = (tall == 0).all(0).numpy() if job.network.activation == "softmax" else None
        probs = job.network.forward(tall[None])[1]
        found = Decider(job.procedure, job.options, args.masks)(probs, [missing])[0]
    except ValueError as error:  # options that do not go together
        raise UserError(f"{case.path}: {error}") from None
    write_labels(folder, job.facts, case, found.labels.reshape(shape))
    if found.masks is not None:
        classes = [c for c in range(job.facts.num_classes) if found.masks[c].any()]
        stored.write_class_masks(folder / f"{stored.file_name(case.name)}_masks", job.facts, found.masks, classes)
    return found.expected


# ------------------------------------------------------------------------------------------------------ scores


def score(args: argparse.Namespace, job: Job) -> None:
    """Print the report of test.py, and write it if ``--output`` names a folder."""
    everything = job.procedure == "all"
    decisions = all_decisions(job.options) if everything else single_decision(job.procedure, job.options)
    outcome = evaluate(
        Evaluator(job.network, job.options.classes),
        job.probs,
        decisions,
        progress=lambda loader: progress_bar(loader, desc="SCORE"),
    )
    config = _described(args, job)
    model = LoadedModel(nn.Identity(), job.facts, config, job.network.activation, job.probs.folder, 0)
    fitted = f"temperature, bias, threshold and presence are those of {args.use}" if args.use else None
    results = report.results(outcome, model, job.probs, views="as saved", fitted=fitted)
    if "advice" in results:
        results["advice"] = results["advice"].replace(report.FIT_COMMAND, "--labels DIR --fit FILE")
    print(report.text(results))
    if args.output:
        for path in report.write(results, outcome, job.facts, report.prepare_folder(args.output)):
            print(f"written: {path}")


def _described(args: argparse.Namespace, job: Job) -> Config:
    """Return what the report says about the run, in the form of a config."""
    options = job.options
    predict = Predict(
        threshold=options.threshold,
        CoI="all" if options.classes is None else list(options.classes),
        temperature=job.network.temperature,
        bias=None if job.network.bias is None else list(job.network.bias),
        presence=cast(Any, options.presence),
        presence_fit=cast(Any, options.fit),
        rankdice=RankDiceOptions(**{key: getattr(options, key) for key in ("solver", "metric", "smooth", "prune")}),
    )
    return Config.model_construct(
        name="saved probabilities",
        arch=Component(type=job.probs.index.checkpoint),
        loss=Component(type="none"),
        train_loader=Component(type="none"),
        val_loader=None,
        test_loader=Component(type="labels", args={"data_dir": args.labels}),
        predict=predict,
        tester=Tester(),
    )


if __name__ == "__main__":
    run(main)
