"""Score a checkpoint: ``python test.py -r saved/.../best_model.pth -p rankdice`` (or ``T``, ``max``, ``all``).

The config comes from the checkpoint, unless ``-c`` is given. All procedures share one forward pass. The scores are
printed and written to ``results.json`` and ``per_image.csv``, and with ``-p all`` to ``report.html``. ``--fit`` fits
temperature, presence and threshold on the validation data and writes a checkpoint with the values that help. See
docs/testing.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.cli import PROCEDURES, Parser, add_device, add_overrides, add_trust, end_quietly, select_devices

VIEWS = ("flip", "multiscale")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="test.py", description="Score a checkpoint on the test data of its config.")
    add = parser.add_argument
    add(
        "-r",
        "--resume",
        nargs="+",
        metavar="CHECKPOINT",
        help="the checkpoint to score; several checkpoints form an ensemble (mean of their probabilities). With -c "
        "also a network in a file (.pt2, TorchScript, .onnx; default: arch.args.file of the config)",
    )
    add(
        "--folds",
        nargs="+",
        metavar="CHECKPOINT",
        help="cross-validation: score the checkpoint of each fold (val_fold) on the images that it held out; also "
        "reports mean and standard deviation over the folds",
    )
    add("-c", "--config", help="config file; replaces the checkpoint's config, except arch")
    add(
        "-p",
        "--predict",
        choices=(*PROCEDURES, "all"),
        help="prediction procedure (default: predict.test of the config); 'all' compares all of them and also writes "
        "report.html",
    )
    add("--details", action="store_true", help="with -p all, print all scores of all procedures")
    add("--fit", action="store_true", help="do not score; fit on the validation data and write NAME_calibrated.pth")
    add(
        "-o",
        "--output",
        metavar="FOLDER",
        help="folder for the results (default: the folder of best_model.pth; for another NAME.pth, the folder NAME "
        "next to it; for several checkpoints, 'ensemble' next to the first; with --folds, 'folds' in the folder "
        "that contains all checkpoints)",
    )
    add("--limit", type=int, metavar="N", help="score only the first N images")
    add(
        "--tta",
        nargs="+",
        choices=VIEWS,
        help="average the probabilities over flips and/or scales (default: over scales if predict.mode is multiscale, "
        "as inference.py does)",
    )
    add("--boundary", action="store_true", help="also report the boundary IoU (Cheng et al., CVPR 2021)")
    add("--save-masks", action="store_true", help="write palette PNGs, masks/PROCEDURE/NAME.png, next to the results")
    add("--save-probs", metavar="FOLDER", help="save the probabilities, for python -m utils.predict --probs FOLDER")
    add("--force", action="store_true", help="allow --save-probs to remove the probabilities of another run")
    add_device(parser)
    add_overrides(parser)
    add_trust(parser)
    args = parser.parse_args()
    check_arguments(parser, args)
    return args


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options that cannot be combined."""
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit}: expected at least 1")
    if args.fit and len(args.resume or []) > 1:
        parser.error("--fit: fit the members of an ensemble one by one")
    if args.fit and (args.predict or args.tta or args.save_masks or args.save_probs or args.boundary or args.details):
        parser.error(
            "--fit uses single views of the validation data; it cannot be combined with -p, --tta, --boundary, "
            "--details or --save-..."
        )
    if args.folds and (args.resume or args.fit or args.limit or args.save_masks or args.save_probs or args.boundary):
        parser.error("--folds cannot be combined with -r, --fit, --limit, --boundary or --save-...")
    if args.folds and len(args.folds) < 2:
        parser.error("--folds: pass the checkpoints of all folds")


if __name__ == "__main__":
    parse_arguments()  # the imports below take seconds; --help and wrong options must not wait for them
    end_quietly()

import torch

import dataloaders
from base.rng import seed_everything
from base.runs import BEST
from dataloaders.check import leaks
from utils import checkpoint, distributed, report, stamps
from utils import config as configs
from utils.checkpoint import LoadedModel
from utils.config import building, data_checks
from utils.config.schema import Config
from utils.errors import UserError, run
from utils.evaluation import Evaluator, checkpoint_fit
from utils.facts import Facts
from utils.files import check_folder, expand
from utils.predict import PredictOptions
from utils.predict.network import SCALES
from utils.report import folds
from utils.report.recorder import Recorder
from utils.report.scoring import Scoring


def main() -> int:
    """Load, then score or fit."""
    args = parse_arguments()
    overrides = args.set + select_devices(args.device)
    if args.folds:
        score_folds(args, [*overrides, "test_loader=null"])  # so that what test.py scores is what was held out
        return 0
    args.resume, *args.members = map(str, map(expand, args.resume or [checkpoint.network_of(args.config)]))
    state = checkpoint.read(args.resume)
    if args.fit:
        state = checkpoint_fit.without_fit(state)  # a second fit starts where the first one did
    stages = ("test",) if not args.fit else ("val",)
    overrides = configs.for_scored_data(configs.read(args.config) if args.config else state.get("config"), overrides)
    config = checkpoint.config_of(state, args.resume, args.config, overrides, stages=stages, trust_code=args.trust_code)
    folder = check_folder(results_folder(args, config))
    device = distributed.choose_device(config.n_gpu)
    with distributed.process_group(device):
        seed_everything(config.seed, config.deterministic)
        loaded = checkpoint.build_model(state, args.resume, config, device)
        loaded.others = [
            checkpoint.load_model(path, device, args.config, args.trust_code, overrides) for path in args.members
        ]
        if args.fit:
            fit(args, state, loaded, device)
        else:
            score(args, prepare(args, state, loaded, device), folder)
    return 0


def results_folder(args: argparse.Namespace, config: Config) -> Path:
    """Return the folder of the results; without ``-o``, each checkpoint in a folder has a different one.

    ``--fit`` writes next to the checkpoint.
    """
    path = Path(args.resume)
    if args.members:
        path = path.with_name("ensemble.pth")
    if args.output or args.fit:
        return expand(args.output or path.parent)
    folder = path.parent
    if config.tester.out_dir:
        chosen = expand(config.tester.out_dir)
        # A checkpoint from somebody else must not choose where files are written.
        asked = args.config or any(item.startswith(("tester.out_dir=", "tester=")) for item in args.set)
        if asked or chosen.resolve().is_relative_to(folder.resolve()):
            folder = chosen
        else:
            print(
                f"note: results go next to the checkpoint. Its config names {chosen} (tester.out_dir), which is "
                f"outside the run's folder; to write there: -o {shlex.quote(str(chosen))}",
                file=sys.stderr,
            )
    if path.name == BEST:
        return folder
    return folder / (path.stem if path.suffix else f"{path.name}_results")


def score(args: argparse.Namespace, scoring: Scoring, folder: Path) -> None:
    """Score the test data under one procedure, or under all of them."""
    recorder = Recorder(
        scoring.loaded, scoring.decisions, scoring.evaluator, report=scoring.everything, boundary=args.boundary
    )
    if distributed.is_main():
        stamps.remove(folder / "masks", "*.png")  # those of an earlier run
    distributed.gather(None)  # no process writes new ones before that
    if args.save_masks:
        recorder.save_masks(folder / "masks")
    if args.save_probs:
        recorder.save_probs(expand(args.save_probs), scoring.options, scoring.procedure, args.force)
    outcome = scoring.evaluate("TEST", recorder, args.limit)
    if distributed.is_main():
        scoring.report(outcome, folder, args.details, recorder)


def prepare(args: argparse.Namespace, state: Mapping[str, Any], loaded: LoadedModel, device: torch.device) -> Scoring:
    """Build the loader, the loss and the evaluator, and choose the procedures."""
    config, facts = loaded.config, loaded.facts
    loader = building.build_loader(dataloaders.build, config, "test")
    data_checks.check_facts(config, facts, {"test_loader": Facts.of(loader.dataset)})
    loss = building.build_loss(config, loader.dataset, facts.ignore_index).to(device)
    # inference.py also uses the views of predict.mode, so its outputs are what is scored here.
    views = args.tta or (["multiscale"] if config.predict.mode == "multiscale" else [])
    network = loaded.network(device, scales=SCALES if "multiscale" in views else (1.0,), flip="flip" in views)
    options = PredictOptions.from_config(config.predict)
    scoring = Scoring(
        loaded,
        loader,
        Evaluator(network, options.classes, config.predict.count_ignored, loss),
        options,
        args.predict or config.predict.test,
        report.Setting(
            report.views_in_words(views, config.predict.mode),
            checkpoint_fit.note(state, config),
            shared_with_training(config, loader),
        ),
    )
    if distributed.is_main():
        data_checks.warn_about_loss(config, list(scoring.decisions))
    return scoring


def shared_with_training(config: Config, loader: Any) -> str | None:
    """Return what the test data have in common with the data of the training or those that chose the checkpoint."""
    if config.test_loader is None or report.optimism(config):
        return None
    light = config.model_copy(deep=True)
    found = []
    for stage, component in (("train", light.train_loader), ("val", light.val_loader)):
        if component is None:
            continue
        component.args = dataloaders.list_only(component.type, component.args)
        component.args |= {name: None for name in ("mean", "std") if component.args.get(name) == "auto"}
        with suppress(UserError):  # the other data need not be here
            other = building.build_loader(dataloaders.build, light, stage)
            found.append(leaks.common_images(f"{stage}_loader and test_loader", other, loader))
    return "; ".join(filter(None, found)) or None


def score_folds(args: argparse.Namespace, overrides: list[str]) -> None:
    """Score the checkpoint of each fold on the images that it held out; see :mod:`utils.report.folds`."""
    paths = [str(expand(path)) for path in args.folds]
    folder = check_folder(expand(args.output) if args.output else folds.folder_of(paths))
    states = [checkpoint.read(path) for path in paths]
    of_folds = [
        checkpoint.config_of(state, path, args.config, overrides, stages=("test",), trust_code=args.trust_code)
        for state, path in zip(states, paths, strict=True)
    ]
    folds.check([fold(path, config) for path, config in zip(paths, of_folds, strict=True)])
    first = of_folds[0]
    args.predict = args.predict or first.predict.test
    device = distributed.choose_device(first.n_gpu)
    with distributed.process_group(device):
        seed_everything(first.seed, first.deterministic)
        models = [checkpoint.build_model(*one, device) for one in zip(states, paths, of_folds, strict=True)]
        folds.check_models(models)
        results, pooled = folds.score([prepare(args, *one, device) for one in zip(states, models, strict=True)])
        if distributed.is_main():
            print(report.text(results, args.details), folds.text(results, args.details), sep="\n")
            for path in report.write(results, pooled, models[0].facts, folder):
                print(f"written: {path}")


def fold(path: str, config: Config) -> folds.Fold:
    """Return which images a checkpoint was trained on and which it is scored on."""
    train, held_out = (building.build_loader(dataloaders.build, config, stage) for stage in ("train", "test"))
    return folds.Fold(path, frozenset(train.names), frozenset(held_out.names))


def fit(args: argparse.Namespace, state: Mapping[str, Any], loaded: LoadedModel, device: torch.device) -> None:
    """Fit temperature, bias, presence and threshold on the validation data; write a checkpoint that uses them."""
    config = loaded.config
    loader = building.build_loader(dataloaders.build, config, "val")
    data_checks.check_facts(config, loaded.facts, {"val_loader": Facts.of(loader.dataset)})
    found = checkpoint_fit.fit(loaded, loader, device, args.limit)
    if not distributed.is_main():
        return
    print(checkpoint_fit.text(found, config))
    if not found.changes(config.predict):
        print("nothing written: no fit improves this checkpoint")
        return
    source = Path(args.resume)
    path = Path(args.output or source.parent) / f"{source.stem.removesuffix('_calibrated')}_calibrated.pth"
    checkpoint.save(checkpoint_fit.for_use(checkpoint_fit.with_fit(state, config, found)), path)
    print(f"written: {path}")
    print(f"now    : python test.py -r {shlex.quote(str(path))} -p all")


if __name__ == "__main__":
    run(main)
