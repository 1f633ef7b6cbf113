"""Segment images with a trained model: a file, a folder with its subfolders, a video or a camera.

    python inference.py -m saved/.../best_model.pth -i photos -o masks

Masks are palette PNG files with the class ids, of the same size as the images. See docs/inference.md.
"""

from __future__ import annotations

import argparse

from utils.cli import MODES, PROCEDURES, Parser, add_overrides, add_trust, end_quietly
from utils.errors import UserError, run


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        *("-m", "-r", "--model"),
        nargs="+",
        metavar="CHECKPOINT",
        help="the checkpoint; several checkpoints form an ensemble. With -c also a network in a file (.pt2, "
        "TorchScript, .onnx; default: arch.args.file of the config)",
    )
    add("-i", "--images", required=True, help="image, folder, video file, or camera:0")
    add("-o", "--output", default="outputs", help="folder for the masks (default: outputs)")
    add("-c", "--config", help="config to use instead of the one in the checkpoint")
    add("-e", "--extension", nargs="+", metavar="EXT", help="only files with these extensions (default: all known)")
    add(
        "-mo",
        "--mode",
        choices=MODES,
        help="view each image as a whole, at several scales, or in tiles (default: predict.mode of the config)",
    )
    add(
        "-p",
        "--predict",
        choices=PROCEDURES,
        help="prediction procedure (default: rankdice if it is predict.test of the config, else max)",
    )
    add("-d", "--device", help="cpu, cuda, or a GPU's number (default: the GPU if there is one)")
    add_overrides(parser)
    add_trust(parser)
    _add_views(parser.add_argument_group("how the network sees an image"))
    _add_outputs(parser.add_argument_group("output"))
    return parser.parse_args()


def _add_views(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--scales",
        type=float,
        nargs="+",
        metavar="S",
        help="scales of mode multiscale (default: 0.75 to 2 in steps of 0.25)",
    )
    add("--flip", action="store_true", help="also average over the mirror image of every view")
    add(
        "--tile",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="side of a tile, or its height and width (default: the crop size of the training, else 512)",
    )
    add("--overlap", type=float, default=0.25, help="fraction of a tile that its neighbor overlaps (default: 0.25)")
    add("--batch-size", type=int, default=4, help="images or tiles per forward pass (default: 4)")
    add("--max-pixels", type=int, default=2**23, help="cut larger images into tiles (default: 2^23)")
    add(
        "--memory",
        type=float,
        metavar="GIB",
        help="probabilities larger than this are kept on disk (default: 0.5 on the CPU, a tenth of a GPU's memory)",
    )
    add("--amp", choices=("off", "bf16", "fp16"), help="precision (default: trainer.amp of the config, as in test.py)")


def _add_outputs(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    opacity = "also write the masks drawn over the images (default opacity: 0.5)"
    add("--overlay", type=float, nargs="?", const=0.5, metavar="OPACITY", help=opacity)
    add("--masks", action="store_true", help="also write the overlapping masks of T and rankdice, one PNG per class")
    kinds = "also write the probabilities: npz, or one PNG per class"
    add("--probs", choices=("npz", "png"), nargs="?", const="npz", help=kinds)
    add("--json", action="store_true", help="also write the classes, their pixels and expected scores of each image")
    add("--skip-existing", action="store_true", help="skip images that already have the outputs of this run")
    add(
        "--force",
        action="store_true",
        help="also replace files that inference.py did not write, and probabilities of another checkpoint",
    )
    add("--limit", type=int, metavar="N", help="only the first N images or frames")


def check(args: argparse.Namespace) -> None:
    """Refuse values out of their range, before anything is loaded.

    Raises:
        UserError: names the option.
    """
    for name in ("batch_size", "max_pixels", "limit", "memory"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected a number above 0")
    if args.tile and (len(args.tile) > 2 or min(args.tile) <= 0):
        given = " ".join(map(str, args.tile))
        raise UserError(f"--tile {given}: expected the side of a tile in pixels, or its height and width")
    if not 0 <= args.overlap < 1:
        raise UserError(f"--overlap {args.overlap}: expected a share from 0 to below 1, such as 0.25")
    if args.overlay is not None and not 0 <= args.overlay <= 1:
        raise UserError(f"--overlay {args.overlay}: expected an opacity from 0 to 1, such as 0.5")
    if args.scales and min(args.scales) <= 0:
        raise UserError(f"--scales {min(args.scales)}: expected numbers above 0, such as 0.75 1 1.25")


if __name__ == "__main__":
    parse_arguments()  # the import below takes seconds; --help and wrong options must not wait for it
    end_quietly()

from utils.inference.run import segment_all


def main() -> int:
    """Segment everything; return 2 if an image failed."""
    args = parse_arguments()
    check(args)
    return segment_all(args)


if __name__ == "__main__":
    run(main)
