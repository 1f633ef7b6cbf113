"""``python -m dataloaders check``: look at the data of a config before training on it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import dataloaders
from base.base_dataloader import BaseDataLoader
from base.base_dataset import BaseDataSet
from base.entries import Sample, spread
from dataloaders.check.findings import Findings, inspect
from dataloaders.check.leaks import in_same_order, shared
from dataloaders.check.report import count_of_problems, report
from dataloaders.check.sheet import contact_sheet
from utils.config import load
from utils.config.building import loader_errors
from utils.config.schema import Component, Config
from utils.errors import UserError
from utils.images import write_png

DEFAULT_SAMPLES = 500
PROBLEMS_EXIT_CODE = 1
_SHEET_SAMPLES = 12


def main(args: argparse.Namespace) -> int:
    """Run the subcommand; return 0, or 1 if the data has problems."""
    if args.samples is not None and args.samples < 0:
        raise UserError(f"--samples: found {args.samples}; give a number of images, or 0 for all")
    config = load(args.config, args.set)
    stages = ("train", "val", "test") if args.loader == "all" else (args.loader,)
    sheets, wrong, summary = [], False, []
    loaders: dict[str, BaseDataLoader] = {}
    for stage, component, loader in open_stages(config, stages):
        loaders[stage], dataset = loader, loader.dataset
        findings = inspect(dataset, DEFAULT_SAMPLES if args.samples is None else args.samples)
        print(report(stage, component, dataset, findings))
        wrong |= bool(findings.problems or findings.illegal)
        summary.append(f"{stage}_loader: {count_of_problems(findings)}")
        pictures = draw(dataset, findings)
        if pictures:
            sheets.append((f"{stage}: {component.type}, {dataset.split}", pictures, dataset))
    train = loaders.get("train")
    if train is not None:
        held_out = train.get_val_loader() if config.val_loader is None else None
        if held_out is not None:
            loaders.setdefault("val", held_out)
        for message in (*in_same_order(train), *shared(loaders)):
            print(f"warning: {message}")
    if sheets:
        write_png(args.out, contact_sheet(sheets))
        print(f"\ncontact sheet: {args.out}")
    if wrong:
        print("", *summary, sep="\n")
    return PROBLEMS_EXIT_CODE if wrong else 0


def open_stages(config: Config, stages: tuple[str, ...]) -> Iterator[tuple[str, Component, BaseDataLoader]]:
    """Yield (stage, section of the config, loader) of each stage that has its own loader.

    ``on_error`` is always "skip", so that broken files do not stop the check of the others.
    """
    for stage in stages:
        component = config.loader(stage)
        if component is None or (stage == "test" and config.test_loader is None and "val" in stages):
            continue
        args = dataloaders.list_only(component.type, component.args) | {"on_error": "skip", "drop_last": False}
        args |= {"seed": config.seed, "ignore_index": config.ignore_index}
        with loader_errors(f"{stage}_loader"):
            loader = dataloaders.build(component.type, **args)
        yield stage, component, loader


def draw(dataset: BaseDataSet, findings: Findings) -> list[Sample]:
    """Return some samples as training will use them: augmented, cropped, or whole."""
    samples = (dataset[index] for index in spread(findings.good, _SHEET_SAMPLES))
    return [sample for sample in samples if isinstance(sample, Sample)]
