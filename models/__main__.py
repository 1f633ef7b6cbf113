"""Print a Markdown table of what each network costs to run."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from models import MODELS
from utils.cli import Parser


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="python -m models", description=__doc__)
    parser.add_argument("models", nargs="*", help=f"models to measure (default: all): {', '.join(MODELS)}")
    parser.add_argument("--size", type=int, default=512, help="height and width of the image (default: 512)")
    parser.add_argument("--classes", type=int, default=21, help="number of classes (default: 21)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: cpu)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="number of forward passes; the fastest one counts (default: 3)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments()  # the imports below take seconds; --help and wrong options must not wait for them

import torch

from models.cost import Cost, measure
from utils.errors import plural, run
from utils.predict.network import choose_device

#: The rows: each model with its arguments. A model without a row here gets one with its defaults.
ROWS: dict[str, tuple[dict[str, Any], ...]] = {
    "FCN8": ({"backbone": "vgg16"},),
    "UNetResnet": ({"backbone": "resnet50"},),
    "SegResNet": ({"backbone": "resnet50"},),
    "GCN": ({"backbone": "resnet50"}, {"backbone": "resnet101"}),
    "DeepLab": (
        {"backbone": "resnet50"},
        {"backbone": "resnet101"},
        {"backbone": "resnet101", "output_stride": 8},
        {"backbone": "xception"},
    ),
    "DeepLab_DUC_HDC": ({"backbone": "resnet101"},),
    "UperNet": ({"backbone": "resnet50"}, {"backbone": "resnet101"}),
    "PSPNet": ({"backbone": "resnet18"}, {"backbone": "resnet50"}, {"backbone": "resnet101"}),
    "PSPDenseNet": ({"backbone": "densenet121"}, {"backbone": "densenet201"}),
}


def rows(names: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Return (model, arguments) for each line of the table."""
    return [(name, args) for name in names for args in ROWS.get(name, ({},))]


def line(name: str, args: dict[str, Any], cost: Cost) -> str:
    """Return one line of the table."""
    extra = ", ".join(f"{k} {v}" for k, v in args.items() if k != "backbone")
    backbone = args.get("backbone", "-") + (f" ({extra})" if extra else "")
    memory = "-" if cost.megabytes is None else f"{cost.megabytes:,.0f} MB"
    return (
        f"| {name} | {backbone} | {cost.parameters / 1e6:.1f} M | {cost.gflops:.1f} | {cost.output_stride} "
        f"| {cost.seconds * 1000:,.0f} ms | {memory} |"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    options = parse_arguments(argv)
    choose_device(options.device)  # one that cannot be used is an error before the table
    names = [MODELS.canonical(name) for name in options.models] or [n for n in MODELS if n != "External"]

    print("| model | backbone | parameters | GFLOPs | output stride | forward | peak memory |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for name, args in rows(names):
        # A new process per row, so that the peak memory of one network does not include that of another.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            job = (name, args, options.size, options.classes, options.device, options.repeats)
            print(line(name, args, pool.submit(measure, *job).result()), flush=True)
    print(
        f"\nOne image of {options.size} x {options.size}, {options.classes} classes, on {_describe(options.device)}, "
        "float32, evaluation mode. GFLOPs count two operations per multiply-add of convolutions."
    )


def _describe(device: str) -> str:
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"a CPU with {plural(torch.get_num_threads(), 'thread')}, torch {torch.__version__}"


if __name__ == "__main__":
    run(main)
