"""Train a model: ``python train.py --config config.json``; see README.md.

Continue a run with ``-r CHECKPOINT`` (``-r auto`` for the newest run of the config), override any field of the
config with ``--set trainer.epochs=3``, use several GPUs or machines with torchrun (docs/scaling.md).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

from utils.cli import Parser, add_device, add_overrides, add_trust, end_quietly, select_devices


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="train.py", description="Train a segmentation model from a config.")
    parser.add_argument(
        "-c",
        "--config",
        help="config file; with -r it replaces the checkpoint's config and must have the same arch or no arch",
    )
    parser.add_argument(
        "-r",
        "--resume",
        metavar="CHECKPOINT",
        help="checkpoint of the run to continue; 'auto' continues the newest run of the config given with -c",
    )
    parser.add_argument(
        "-w", "--weights", metavar="CHECKPOINT", help="start a new run from the weights of a checkpoint (fine-tuning)"
    )
    add_device(parser)
    add_overrides(parser)
    add_trust(parser)
    args = parser.parse_args()
    if not args.config and not args.resume:
        parser.error("pass a config (--config), or a checkpoint to continue (--resume)")
    if args.resume and args.weights:
        parser.error("--resume continues a run with its own weights; use --weights without --resume")
    if args.resume == "auto" and not args.config:
        parser.error("--resume auto needs --config: it continues the newest run of that config")
    return args


if __name__ == "__main__":
    parse_arguments()  # the imports below take seconds; --help and wrong options must not wait for them
    end_quietly()

import torch
from torch import nn

import dataloaders
import models
from base import runs
from base.base_trainer import Data, Interrupted
from base.resume import nothing_left, refused_if_malformed
from base.rng import seed_everything
from base.signals import sigterm_as_ctrl_c
from dataloaders.check.leaks import warn_about_loaders
from trainer import Trainer
from utils import checkpoint, distributed
from utils import config as configs
from utils.config import building, data_checks
from utils.config.schema import Config
from utils.errors import UserError, run
from utils.evaluation import checkpoint_fit
from utils.facts import Facts
from utils.files import expand


class Resumed(NamedTuple):
    """The checkpoint of a run to continue."""

    path: Path
    state: dict[str, Any]


def open_config(args: argparse.Namespace) -> tuple[Config, Resumed | None]:
    """Return the config of the run, and the checkpoint to continue; None for a new run."""
    overrides = args.set + select_devices(args.device)
    stages, resume = ("train", "val"), args.resume
    if resume in (None, "auto"):
        config = configs.load(args.config, overrides, models=models.MODELS, loaders=dataloaders.LOADERS, stages=stages)
        if resume is None:
            return config, None
        resume = runs.newest(config)
    path = expand(resume).resolve()
    state = checkpoint_fit.without_fit(checkpoint.read(path))  # training goes on without what was fitted after it
    if not args.config:
        with refused_if_malformed():
            overrides = [*runs.moved(state, path.parent), *overrides]
    config = checkpoint.config_of(state, path, args.config, overrides, stages=stages, trust_code=args.trust_code)
    if not args.config and not any(item.startswith(("trainer.log_dir=", "trainer=")) for item in args.set):
        config = runs.with_own_logs(config, path.parent)
    return config, Resumed(path, state)


def is_over(resumed: Resumed, config: Config) -> bool:
    """Print what has changed since a run was stopped; return whether it has nothing left to do."""
    path, state = resumed
    if "processes" not in state or "scheduler" not in state:
        return False  # not a run of this framework; the trainer says so
    if state.get("arch", config.arch.type) != config.arch.type:
        raise UserError(
            f"{path}: this run trains {state['arch']}, the config asks for {config.arch.type}. Start a new run: "
            "train.py --config CONFIG (with --weights CHECKPOINT, it starts from the weights that fit)"
        )
    with refused_if_malformed():
        done = nothing_left(state, config)
        if distributed.is_first():
            # The config may have changed by mistake, or an override may have been forgotten.
            changes = configs.differences(state["config"], config)
            if changes:
                print("changed since the checkpoint was written:", *changes, sep="\n    ", file=sys.stderr)
            runs.restore_links(state, path)
            if done:
                print(f"nothing to do: {done}")
    return done is not None


def build_data(config: Config, resumed: Resumed | None) -> Data:
    """Build the loaders that the config names, and warn about mistakes that make training useless.

    A resumed run keeps the mean and std that it measured.
    """
    train = building.build_loader(dataloaders.build, config, "train")
    if config.val_loader is None:
        val = train.get_val_loader()
    else:
        val = building.build_loader(dataloaders.build, config, "val")
    facts = Facts.of(train.dataset)
    data_checks.check_facts(config, facts, {"val_loader": Facts.of(val.dataset)} if val is not None else {})
    if resumed is not None and "facts" in resumed.state:
        with refused_if_malformed():
            stored = Facts.from_dict(resumed.state["facts"])
        facts = data_checks.resumed_facts(config, stored, facts)
    warn_about_loaders(train, val)
    data_checks.warn_about_loss(config, [config.predict.train, config.predict.val])
    data_checks.warn_about_schedule(config, len(train))
    return Data(train, val, facts)


def build_model(config: Config, facts: Facts, weights: str | None, resumed: bool) -> nn.Module:
    """Build the model that the config names, and start from ``weights`` if they are given.

    The model of a resumed run is built without pretrained weights, because those of the checkpoint replace them.
    """
    arguments = checkpoint.arch_arguments(config, facts)
    if resumed and "pretrained" in arguments:
        arguments["pretrained"] = False
    model = building.build_section("arch.args", models.build, config.arch.type, facts.num_classes, **arguments)
    if weights:
        done = checkpoint.start_from(model, weights, facts.class_names)
        if distributed.is_main():
            print(done)
    return model


def lacks_fit(folder: Path, config: Config) -> bool:
    """Return whether a run that is over was stopped before the fit of its best model."""
    best = folder / runs.BEST
    return config.trainer.fit and best.is_file() and "calibration" not in checkpoint.read(best)


def fit_best(config: Config, data: Data, device: torch.device, folder: Path) -> None:
    """Fit temperature, presence and threshold on the validation data, into best_model.pth."""
    path = folder / runs.BEST
    distributed.gather(None)  # wait until the main process has written it
    if not config.trainer.fit or data.val is None or not path.exists():
        return
    state = checkpoint.read(path)
    loaded = checkpoint.build_model(state, path, config, device)
    limit = config.trainer.limit_batches
    # The fit uses whole images, as test.py and inference.py do, not the crops of validation.
    val = data.train.get_val_loader(whole=True) if config.val_loader is None else data.val
    try:
        with sigterm_as_ctrl_c():
            found = checkpoint_fit.fit(loaded, val, device, limit and limit * val.batches.batch_size)
    except KeyboardInterrupt:
        raise Interrupted from None  # a resumed run does the fit
    if distributed.is_main():
        print(checkpoint_fit.text(found, config))
        checkpoint.save(checkpoint_fit.with_fit(state, config, found), path)
        print(f"    fitted : {path}")


def main() -> int:
    """Train the model that the config describes, from the start or from a checkpoint."""
    args = parse_arguments()
    config, resumed = open_config(args)
    over = resumed is not None and is_over(resumed, config)
    if resumed is not None and over and not lacks_fit(resumed.path.parent, config):
        return 0
    if distributed.needs_processes(config.use_synch_bn, config.n_gpu):
        return distributed.launch(__file__, sys.argv[1:], distributed.usable_gpus(config.n_gpu))

    device = distributed.choose_device(config.n_gpu)
    with distributed.process_group(device):
        seed_everything(config.seed, config.deterministic)
        data = build_data(config, resumed)
        model = build_model(config, data.facts, args.weights, resumed is not None)
        loss = building.build_loss(config, data.train.dataset, data.facts.ignore_index)
        with runs.new(config) if resumed is None else runs.locked(resumed.path.parent) as folder:
            trainer = Trainer(config, model, loss, data, device, folder)
            if resumed is not None:
                trainer.restore(resumed.state)
            try:
                if not over:
                    trainer.train()
                fit_best(config, data, device, folder)
            except Interrupted:
                if distributed.is_main():
                    latest = folder / runs.LATEST
                    print(f"stopped and saved; continue with: python train.py -r {latest}", file=sys.stderr)
                return 130
    return 0


if __name__ == "__main__":
    run(main)
