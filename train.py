"""Train a model: ``python train.py --config config.json``; see README.md.

Continue a run with ``-r CHECKPOINT`` (``-r auto`` for the newest run of the config), override any field of the
config with ``--set trainer.epochs=3``, use several GPUs or machines with torchrun (docs/scaling.md).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import add_device, add_overrides, select_devices, share_cores
from utils.errors import run

if TYPE_CHECKING:
    from utils.config.schema import Config


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="train.py", description="Train a segmentation model from a config.")
    parser.add_argument(
        "-c",
        "--config",
        help="config file; with -r it replaces the checkpoint's config; its arch, if it has one, must be the same",
    )
    parser.add_argument(
        "-r",
        "--resume",
        metavar="CHECKPOINT",
        help="continue the run of a checkpoint; 'auto': the newest run of the config's name, as -r FILE -c CONFIG",
    )
    parser.add_argument(
        "-w", "--weights", metavar="CHECKPOINT", help="start a new run from the weights of a checkpoint (fine-tuning)"
    )
    add_device(parser)
    add_overrides(parser)
    args = parser.parse_args()
    if not args.config and not args.resume:
        parser.error("give a config with --config, or a checkpoint to continue with --resume")
    if args.resume and args.weights:
        parser.error("--resume continues a run with its own weights; give --weights without it")
    if args.resume == "auto" and not args.config:
        parser.error("--resume auto needs --config, to know whose newest run to continue")
    return args


def finished(state: Mapping[str, Any], config: Config) -> bool:
    """Say what a continued run will do otherwise than before; return whether it has nothing left to do."""
    from utils import config as configs
    from utils import distributed

    if "processes" not in state:
        return False  # no run of ours: the trainer says so
    through = bool(state["epoch"] >= config.trainer.epochs)
    if distributed.is_first():
        # A config may have changed by mistake, or an override been forgotten.
        changes = configs.differences(state["config"], config)
        if changes:
            print("changed since the checkpoint was written:", *changes, sep="\n    ", file=sys.stderr)
        if through:
            done = f"{state['epoch']} of {config.trainer.epochs} epochs are done"
            print(f"nothing to do: {done}; train longer with --set trainer.epochs=N")
    return through


def main() -> int:
    """Build what the config names, and train it."""
    args = parse_arguments()
    share_cores()
    overrides = args.set + select_devices(args.device)

    import dataloaders
    import models
    from base.base_trainer import Interrupted, newest_run, run_folder, seed_everything
    from dataloaders.check.leaks import announce
    from trainer import Trainer
    from utils import checkpoint, distributed, losses
    from utils import config as configs
    from utils.config import data_checks as checks
    from utils.facts import Facts

    stages = ("train", "val")
    resume, state = args.resume, None
    if resume in (None, "auto"):
        config = configs.load(args.config, overrides, models=models.MODELS, loaders=dataloaders.LOADERS, stages=stages)
        resume = newest_run(config) if resume == "auto" else None
    if resume:
        state = checkpoint.read(resume)
        config = checkpoint.config_of(state, resume, args.config, overrides, stages=stages)
        if finished(state, config):
            return 0
    if distributed.needs_processes(config):
        return distributed.launch(__file__, sys.argv[1:], distributed.usable_gpus(config.n_gpu))

    device = distributed.choose_device(config.n_gpu)
    with distributed.process_group(device):
        seed_everything(config.seed, config.deterministic)
        train_loader = checks.build_loader(dataloaders.build, config, "train")
        if config.val_loader is None:
            val_loader = train_loader.get_val_loader()
        else:
            val_loader = checks.build_loader(dataloaders.build, config, "val")
        facts = Facts.of(train_loader.dataset)
        others = {"val_loader": Facts.of(val_loader.dataset)} if val_loader is not None else {}
        checks.check_facts(config, facts, others)
        announce(train_loader, val_loader)
        checks.warn_about_loss(config, [config.predict.train, config.predict.val])
        checks.warn_about_schedule(config, len(train_loader))
        arguments = checkpoint.arch_arguments(config, facts)
        model = checks.built("arch.args", models.build, config.arch.type, facts.num_classes, **arguments)
        if args.weights:
            checkpoint.load_weights(model, args.weights)
        arguments = checks.loss_arguments(config, train_loader.dataset)
        loss = checks.built("loss.args", losses.build, config.loss.type, facts.ignore_index, **arguments)
        folder = Path(resume).resolve().parent if resume else run_folder(config)
        trainer = Trainer(config, model, loss, train_loader, val_loader, facts, device, folder, resume=state)
        try:
            trainer.train()
        except Interrupted:
            if distributed.is_main():
                print(f"stopped and saved; continue with: python train.py -r {folder / 'latest.pth'}", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    run(main)
