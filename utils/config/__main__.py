"""The command ``python -m utils.config``: check a config, or print its JSON Schema or the reference of its fields."""

from __future__ import annotations

import argparse
import json

from dataloaders import LOADERS
from models import MODELS
from utils.config import dump, json_schema, load, reference
from utils.errors import run


def main() -> int:
    """Check a config, or print the JSON Schema or the reference."""
    parser = argparse.ArgumentParser(prog="python -m utils.config", description="Check a config, or print its schema.")
    commands = parser.add_subparsers(dest="command", required=True)
    checker = commands.add_parser("check", help="check a config file and print it with all defaults")
    checker.add_argument("config")
    checker.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override a field")
    commands.add_parser("schema", help="print the JSON Schema of configs")
    page = commands.add_parser("reference", help="print the reference of all fields and arguments in Markdown")
    page.add_argument("--write", metavar="FILE", help="put it between the marks of a Markdown file instead")
    args = parser.parse_args()

    if args.command == "schema":
        print(json.dumps(json_schema(MODELS, LOADERS), indent=2))
    elif args.command == "reference":
        text = reference.reference(MODELS, LOADERS)
        reference.write(args.write, text) if args.write else print(text)
    else:
        print(dump(load(args.config, args.set, models=MODELS, loaders=LOADERS)), end="")
    return 0


if __name__ == "__main__":
    run(main)
