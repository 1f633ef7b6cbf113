"""``python -m dataloaders plan``: write a first config for a folder of data, with a comment for each choice."""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import json5

from dataloaders import LOADERS
from dataloaders.plan.choices import Reasons, choose
from dataloaders.plan.survey import Survey, survey
from utils.config import resolve
from utils.errors import UserError, plural
from utils.files import expand, write_text

_WIDTH = 110


def main(args: argparse.Namespace) -> int:
    """Run the subcommand; return its exit code."""
    out = expand(args.out)
    if out.exists() and not args.force:
        raise UserError(f"--out: {out} already exists; choose another name, or pass --force to replace it")
    found = survey(expand(args.data_dir), args.images, args.masks, args.classes)
    name = re.sub(r"\W+", "_", expand(args.data_dir).resolve().name)
    config, reasons = choose(found, name)
    text = as_text(config, reasons, _heading(found, out))
    resolve(json5.loads(text), source=str(out), loaders=LOADERS)
    write_text(out, text)
    print(_summary(found, config, reasons, out))
    return 0


def _heading(found: Survey, out: Path) -> str:
    sizes = found.findings.sizes
    (width, height), _ = sizes.most_common(1)[0]
    classes = plural(found.dataset.num_classes, "class")
    size = f"{width} x {height}" if len(sizes) == 1 else f"{len(sizes)} sizes, most often {width} x {height}"
    return (
        f"A first config for {found.args['data_dir']}: {plural(len(found.dataset), 'training image')} ({size}), "
        f"{classes}. Written by python -m dataloaders plan; change what does not fit. Check the data with python -m "
        f"dataloaders check --config {out}, then train with python train.py --config {out}."
    )


def as_text(config: dict[str, Any], reasons: Reasons, heading: str) -> str:
    """Return the config as JSON with comments: each reason above its field."""
    lines = ["{", *_comment(heading, 1)]
    lines += _fields(config, reasons, ())
    return "\n".join([*lines, "}"]) + "\n"


def _fields(config: dict[str, Any], reasons: Reasons, path: tuple[str, ...]) -> list[str]:
    lines, depth = [], len(path) + 1
    for i, (key, value) in enumerate(config.items()):
        where, comma = (*path, key), "," if i < len(config) - 1 else ""
        if where in reasons:
            lines += _comment(reasons[where], depth)
        indent = "    " * depth
        if isinstance(value, dict) and (len(path) < 1 or key == "args") and value:
            lines += [f"{indent}{json.dumps(key)}: {{", *_fields(value, reasons, where), f"{indent}}}{comma}"]
        else:
            lines.append(f"{indent}{json.dumps(key)}: {json.dumps(value)}{comma}")
    return lines


def _comment(text: str, depth: int) -> list[str]:
    indent = "    " * depth
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}// ", subsequent_indent=f"{indent}// ")


def _summary(found: Survey, config: dict[str, Any], reasons: Reasons, out: Path) -> str:
    lines = [f"{out}:"]
    for path, why in reasons.items():
        value: Any = config
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        shown = json.dumps(value) if value is not None and not isinstance(value, dict) else ""
        name = {"arch": "network", "train_loader": "data"}.get(path[-1], path[-1])
        head = f"  {name}{': ' + shown if shown and len(shown) < 60 else ''}"
        lines += textwrap.wrap(f"{head} - {why}", _WIDTH, subsequent_indent="      ")
    if found.findings.problems:
        lines.append(f"  {plural(len(found.findings.problems), 'sample')} could not be read: see dataloaders check")
    return "\n".join(
        [*lines, "", f"next: python -m dataloaders check --config {out}", f"      python train.py --config {out}"]
    )
