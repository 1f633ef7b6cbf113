"""Commands about data: ``python -m dataloaders check``, ``prepare`` and ``plan``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from utils.cli import Parser, add_overrides
from utils.errors import run

PREPARED = ("voc", "ade20k", "coco_stuff", "cityscapes")
EXPORTS = ("coco", "labelme", "cvat", "label_studio", "roboflow", "yolo")


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    top = Parser(prog="python -m dataloaders", description="Check data, prepare data, and plan a training run.")
    commands = top.add_subparsers(dest="command", required=True, metavar="{check,prepare,plan}")

    check = commands.add_parser(
        "check",
        help="check the data of a config before training",
        description="Print pairs, unpaired files, sizes, label values, the pixel share and suggested weight of each "
        "class, mean and std. Draw a contact sheet of images as training will see them.",
    )
    check.add_argument("-c", "--config", default="config.json", help="config file (default: config.json)")
    check.add_argument(
        "--loader",
        choices=("train", "val", "test", "all"),
        default="all",
        help="which of the config's loaders to check (default: all)",
    )
    check.add_argument(
        "--samples", type=int, metavar="N", help="read N images and masks, evenly spread; 0: all (default: 500)"
    )
    check.add_argument("--out", default="data_check.png", help="file of the contact sheet (default: data_check.png)")
    add_overrides(check)
    _add_prepare(commands)
    _add_plan(commands)
    return top


def _add_prepare(commands: argparse._SubParsersAction[Parser]) -> None:
    prepare = commands.add_parser(
        "prepare",
        help="download a public data set, or convert the export of a labeling tool",
        description=f"Public data sets ({', '.join(PREPARED)}): download, verify and unpack. An interrupted download "
        "continues when the command is run again. Without a network connection, list the files to download and "
        f"where to put them. Exports of labeling tools ({', '.join(EXPORTS)}): write images, masks and "
        "classes.txt for the Folder loader, and report overlapping classes.",
    )
    prepare.add_argument("name", choices=(*PREPARED, *EXPORTS), help="the data set, or the format of an export")
    prepare.add_argument("--dir", required=True, help="folder to write to; use it as data_dir in the config")

    exports = prepare.add_argument_group("exports of labeling tools")
    exports.add_argument("--from", dest="source", metavar="PATH", help="the exported file or folder")
    exports.add_argument("--images", metavar="DIR", help="folder of the images, if they are not in the export")
    exports.add_argument(
        "--void",
        action="append",
        metavar="NAME",
        help="ignore the pixels of this label; may be repeated (default: void, ignore, unlabeled, ...)",
    )
    exports.add_argument(
        "--rest",
        choices=("background", "void"),
        help="what pixels without annotation become: the class background (default), or ignored",
    )
    exports.add_argument(
        "--order",
        choices=("file", "area"),
        help="drawing order: later shapes of the file over earlier ones (default), or small shapes over large ones",
    )
    exports.add_argument("--link", action="store_true", help="link to the images instead of copying them")

    public = prepare.add_argument_group("public data sets")
    public.add_argument("--aug", action="store_true", help="voc: also build the augmented lists from SBD")
    public.add_argument(
        "--partition",
        choices=("CocoStuff164k", "CocoStuff10k"),
        default="CocoStuff164k",
        help="coco_stuff: the edition (default: CocoStuff164k)",
    )
    public.add_argument("--mirror", metavar="URL", help="download the archives from this base address instead")
    public.add_argument(
        "--no-verify", action="store_true", help="do not compare checksums (for a mirror with repacked archives)"
    )
    public.add_argument("--delete-archives", action="store_true", help="remove archives after unpacking")


def _add_plan(commands: argparse._SubParsersAction[Parser]) -> None:
    plan = commands.add_parser(
        "plan",
        help="write a first config for a folder of data",
        description="Look at images and masks and write a complete config: loader, classes, crop, batch size, mean "
        "and std, network, epochs. Comments in it explain the choices.",
    )
    plan.add_argument("--data-dir", required=True, help="folder of the data")
    plan.add_argument("--out", default="plan.json", help="the config to write (default: plan.json)")
    plan.add_argument("--images", metavar="NAME", help="subfolder of the images, if it has an unusual name")
    plan.add_argument("--masks", metavar="NAME", help="subfolder of the masks, if it has an unusual name")
    plan.add_argument("--classes", metavar="NAMES", help="class names separated by commas, or a file with them")
    plan.add_argument("--force", action="store_true", help="replace the config if it exists")


if __name__ == "__main__":
    parser().parse_args()  # the imports below take seconds: --help and wrong options do not wait for them

from dataloaders import check, plan, prepare


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    args = parser().parse_args(argv)
    return {"check": check.main, "plan": plan.main, "prepare": prepare.main}[args.command](args)


if __name__ == "__main__":
    run(main)
