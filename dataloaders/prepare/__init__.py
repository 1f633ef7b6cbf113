"""``python -m dataloaders prepare``: download a public data set, or convert what a labeling tool exports."""

from __future__ import annotations

import argparse

from dataloaders.prepare import convert, public
from dataloaders.prepare.formats import FORMATS
from utils.errors import UserError
from utils.files import expand


def main(args: argparse.Namespace) -> int:
    """Run the subcommand; return its exit code."""
    exported = ("source", "images", "void", "rest", "order", "link")
    fetched = ("aug", "mirror", "no_verify", "delete_archives")
    for name in fetched if args.name in FORMATS else exported:
        if getattr(args, name):
            kind = "is for public data sets" if name in fetched else "is for exports of labeling tools"
            option = "from" if name == "source" else name.replace("_", "-")
            raise UserError(f"--{option} {kind}, not for {args.name}")
    if args.name in FORMATS:
        if args.source is None:
            raise UserError(f"--from is missing: pass the file or folder that was exported as {args.name}")
        options = convert.Options(
            images=None if args.images is None else expand(args.images),
            void=tuple(args.void) if args.void else convert.VOID_NAMES,
            rest=args.rest or "background",
            order=args.order or "file",
            link=args.link,
        )
        convert.run(args.name, expand(args.source), expand(args.dir), options)
    else:
        public.run(args)
    return 0
