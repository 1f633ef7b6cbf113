"""Commands about data: ``python -m dataloaders check`` and ``python -m dataloaders prepare``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from utils.errors import run

PREPARED = ("voc", "ade20k", "coco_stuff", "cityscapes")


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser; nothing heavy is imported for it."""
    top = argparse.ArgumentParser(prog="python -m dataloaders", description="Look at, or fetch, data sets.")
    commands = top.add_subparsers(dest="command", required=True, metavar="{check,prepare}")

    check = commands.add_parser(
        "check",
        help="look at the data that a config names, before training on it",
        description="Pairs, files without a partner, sizes, label values, pixel share and suggested weight per "
        "class, mean and std, and a contact sheet of images as training will see them.",
    )
    check.add_argument("-c", "--config", default="config.json", help="config file (default: config.json)")
    check.add_argument(
        "--loader",
        choices=("train", "val", "test", "all"),
        default="all",
        help="which of the config's loaders to look at (default: all)",
    )
    check.add_argument(
        "--samples", type=int, metavar="N", help="read N images and masks, evenly spread; 0: all (default: 500)"
    )
    check.add_argument("--out", default="data_check.png", help="the contact sheet's file (default: data_check.png)")
    check.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="override a field of the config"
    )

    prepare = commands.add_parser(
        "prepare",
        help="download a public data set and lay it out",
        description="Downloads with progress and checksums, goes on where an interrupted download stopped, "
        "unpacks. Without a network it says which files to put where.",
    )
    prepare.add_argument("name", choices=PREPARED, help="the data set")
    prepare.add_argument("--dir", required=True, help="folder to put it in: the config's data_dir")
    prepare.add_argument("--aug", action="store_true", help="voc: also build the augmented lists from SBD")
    prepare.add_argument(
        "--partition",
        choices=("CocoStuff164k", "CocoStuff10k"),
        default="CocoStuff164k",
        help="coco_stuff: which edition (default: CocoStuff164k)",
    )
    prepare.add_argument("--mirror", metavar="URL", help="fetch the archives from below this address instead")
    prepare.add_argument(
        "--no-verify", action="store_true", help="do not compare checksums (a mirror with repacked archives)"
    )
    prepare.add_argument("--delete-archives", action="store_true", help="remove archives after unpacking")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    args = parser().parse_args(argv)
    if args.command == "check":
        from dataloaders.check import main as command
    else:
        from dataloaders.prepare import main as command
    return command(args)


if __name__ == "__main__":
    run(main)
