"""Score a checkpoint: ``python test.py -r saved/.../best_model.pth -p rankdice`` (or ``T``, ``max``, ``all``).

The config comes from the checkpoint, unless one is given. One forward pass serves all procedures; the report goes to
the screen, to ``results.json`` and to one CSV with the scores of each image.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from utils.cli import add_device, add_overrides, select_devices
from utils.errors import run
from utils.schema import PROCEDURES


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="test.py", description="Score a checkpoint on the test data of its config.")
    parser.add_argument("-r", "--resume", metavar="CHECKPOINT", required=True, help="the checkpoint to score")
    parser.add_argument("-c", "--config", help="config file; replaces the checkpoint's config, except arch")
    parser.add_argument(
        "-p",
        "--predict",
        choices=(*PROCEDURES, "all"),
        help="prediction procedure; all: every one, from one forward pass (default: the config's predict.test)",
    )
    parser.add_argument(
        "-o", "--output", metavar="FOLDER", help="folder of the results (default: beside the checkpoint)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="score only the first N batches")
    add_device(parser)
    add_overrides(parser)
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit}: expected at least 1")
    return args


def main() -> int:
    """Load, score once, report."""
    args = parse_arguments()
    overrides = args.set + select_devices(args.device)

    import dataloaders
    from base.base_trainer import AMP_DTYPES, seed_everything
    from utils import checkpoint, checks, distributed, losses, report
    from utils.evaluation import Decision, Evaluator, evaluate
    from utils.predict import PredictOptions

    state = checkpoint.read(args.resume)
    config = checkpoint.config_of(state, args.resume, args.config, overrides, stages=("test",))
    procedures = PROCEDURES if args.predict == "all" else (args.predict or config.predict.test,)
    folder = report.prepare_folder(args.output or config.tester.out_dir or Path(args.resume).parent)
    device = distributed.choose_device(config.n_gpu)
    with distributed.process_group(device):
        seed_everything(config.seed, config.deterministic)
        loaded = checkpoint.build_model(state, args.resume, config, device)
        loader = checks.build_loader(dataloaders.build, config, "test")
        checks.check_facts(config, loaded.facts, {"test_loader": checkpoint.Facts.of(loader.dataset)})
        checks.warn_about_loss(config, list(procedures))
        arguments = checks.loss_arguments(config, loader.dataset)
        loss = checks.built("loss.args", losses.build, config.loss.type, loaded.facts.ignore_index, **arguments)
        options = PredictOptions.from_config(config.predict)
        evaluator = Evaluator(
            model=loaded.model,
            facts=loaded.facts,
            activation=loaded.activation,
            device=device,
            temperature=config.predict.temperature,
            classes=options.classes,
            count_ignored=config.predict.count_ignored,
            loss=loss.to(device),
            amp=AMP_DTYPES[config.trainer.amp],
            channels_last=config.trainer.channels_last,
        )
        outcome = evaluate(
            evaluator,
            loader,
            {name: Decision(name, options) for name in procedures},
            progress=report.progress_bar("TEST"),
            limit_batches=args.limit,
        )
        if distributed.is_main():
            results = report.results(outcome, config, loaded, loader.dataset)
            print(report.text(results))
            for path in report.write(results, outcome, loaded.facts, folder):
                print(f"written: {path}")
    return 0


if __name__ == "__main__":
    run(main)
