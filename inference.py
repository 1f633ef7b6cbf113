"""Segment images with a trained model: a file, a folder with its subfolders, a video or a camera.

    python inference.py -m saved/.../best_model.pth -i photos -o masks

Masks are PNG files in the classes' colours that hold the class ids, at the images' size. See docs/inference.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import add_overrides, share_cores
from utils.errors import USER_ERROR_EXIT_CODE, UserError, run

if TYPE_CHECKING:
    from utils.inference.outputs import Outputs
    from utils.inference.pipeline import Report
    from utils.inference.sources import Item
    from utils.predictor import Predictor


def parse_arguments() -> argparse.Namespace:
    """Read the command line; without torch, so that ``--help`` answers at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-m", "--model", required=True, help="checkpoint, such as saved/.../best_model.pth")
    add("-i", "--images", required=True, help="image, folder, video file, or camera:0")
    add("-o", "--output", default="outputs", help="folder for the masks (default: outputs)")
    add("-c", "--config", help="config to use in place of the one in the checkpoint")
    add("-e", "--extension", nargs="+", metavar="EXT", help="only files with these extensions (default: all known)")
    add("-mo", "--mode", choices=("multiscale", "sliding", "single"), default="multiscale", help="default: multiscale")
    add("-p", "--predict", choices=("T", "max", "rankdice"), help="procedure (default: predict.test of the config)")
    add("-d", "--device", help="cpu, cuda, or a GPU's number (default: a GPU where there is one)")
    add_overrides(parser)
    seen = parser.add_argument_group("how the network sees an image")
    add = seen.add_argument
    add("--scales", type=float, nargs="+", metavar="S", help="of mode multiscale (default: 0.75 to 2 in steps of 0.25)")
    add("--flip", action="store_true", help="see the mirror image of every view as well")
    add("--tile", type=int, help="side of a tile in pixels (default: the crop size of the training, else 512)")
    add("--overlap", type=float, default=0.25, help="share of a tile that its neighbour covers too (default: 0.25)")
    add("--batch-size", type=int, default=4, help="images or tiles per forward pass (default: 4)")
    add("--max-pixels", type=int, default=2**23, help="views with more pixels are cut into tiles (default: 2^23)")
    add(
        "--memory",
        type=float,
        metavar="GIB",
        help="probabilities above this are kept on disk (default: 0.5 on the CPU)",
    )
    add(
        "--amp",
        choices=("off", "bf16", "fp16"),
        help="precision of the network (default: trainer.amp of the config, as test.py)",
    )
    written = parser.add_argument_group("what is written beside the masks")
    add = written.add_argument
    add(
        "--overlay",
        type=float,
        nargs="?",
        const=0.5,
        metavar="OPACITY",
        help="the masks over the images (default: 0.5)",
    )
    add("--probs", choices=("npz", "png"), nargs="?", const="npz", help="probabilities: float16 npz, or PNG per class")
    add("--json", action="store_true", help="classes, pixels and expected scores per image")
    add("--skip-existing", action="store_true", help="leave images alone whose outputs are there")
    add("--limit", type=int, metavar="N", help="only the first N images or frames")
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Refuse numbers out of their range before anything heavy starts."""
    for name in ("tile", "batch_size", "max_pixels", "limit", "memory"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected a number above 0")
    if not 0 <= args.overlap < 1:
        raise UserError(f"--overlap {args.overlap}: expected a share from 0 to below 1, such as 0.25")
    if args.overlay is not None and not 0 <= args.overlay <= 1:
        raise UserError(f"--overlay {args.overlay}: expected an opacity from 0 to 1, such as 0.5")
    if args.scales and min(args.scales) <= 0:
        raise UserError(f"--scales {min(args.scales)}: expected numbers above 0, such as 0.75 1 1.25")


def main() -> int:
    """Segment everything; return 2 when an image failed."""
    args = parse_arguments()
    share_cores()
    check(args)

    from PIL import Image

    from utils import distributed
    from utils.inference.outputs import Outputs, OverlayVideo, check_folder
    from utils.inference.pipeline import Pipeline, take
    from utils.inference.sources import Video, find_images, is_video

    Image.MAX_IMAGE_PIXELS = None  # the images are the user's own: large ones are wanted
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    folder = Path(args.output)
    problems: list[str] = []
    video = None
    items: Iterable[Item]
    if is_video(args.images):
        items = video = Video(args.images, (rank, world))
        total = video.frames and -(-(video.frames - rank) // world)
    else:
        found, problems = find_images(args.images, folder, args.extension)
        items, problems = found[rank::world], problems if rank == 0 else []
        total = len(items)
    predictor = load(args)
    check_folder(folder)
    outputs = Outputs(
        folder,
        predictor.facts,
        predictor.procedure,
        metric=predictor.options.metric,
        opacity=args.overlay,
        probs=args.probs,
        json=args.json,
    )
    if video is not None and args.overlay is not None and world == 1:
        outputs.video = OverlayVideo(folder / f"{video.name}_overlay.mp4", video.rate)

    started = time.monotonic()
    bar = progress_bar(min(total, args.limit) if total and args.limit else total, rank)
    with bar as (advance, say), outputs.video or nullcontext():
        for problem in problems:
            say(problem)
        pipeline = Pipeline(predictor, outputs, advance, args.skip_existing)
        report = pipeline.run(take(items, args.limit))
    report.failures[:0] = problems
    with group(world):
        reports = distributed.gather(report)
    if rank == 0:
        summarise(reports, outputs, args.mode, time.monotonic() - started)
    if report.interrupted:
        return 130
    return USER_ERROR_EXIT_CODE if any(r.failures for r in reports) else 0


def load(args: argparse.Namespace) -> Predictor:
    """Return the predictor that the command line describes."""
    from utils import checkpoint
    from utils.predictor import SCALES, Predictor, choose_device

    device = choose_device(args.device)
    state = checkpoint.read(args.model)
    config = checkpoint.config_of(state, args.model, args.config, args.set)
    return Predictor(
        checkpoint.build_model(state, args.model, config, device),
        predict=args.predict,
        mode=args.mode,
        scales=args.scales or SCALES,
        flip=args.flip,
        tile=args.tile,
        overlap=args.overlap,
        batch_size=args.batch_size,
        device=device,
        max_pixels=args.max_pixels,
        memory=int(args.memory * 2**30) if args.memory else None,
        amp=args.amp,
        keep_masks=False,
        keep_probs=args.probs is not None,
    )


@contextmanager
def progress_bar(total: int | None, rank: int) -> Iterator[tuple[Callable, Callable]]:
    """Show progress; give functions that note a finished item, and that print a line above the bar."""
    from tqdm import tqdm

    with tqdm(total=total, unit="image", desc="segmenting", disable=rank > 0, dynamic_ncols=True) as bar:

        def say(problem: str) -> None:
            bar.write(f"error: {problem}", file=sys.stderr)

        def advance(item: Item, problem: str | None) -> None:
            if problem is not None:
                say(problem)
            bar.set_postfix_str(Path(item.name).name, refresh=False)
            bar.update()

        yield advance, say


@contextmanager
def group(world: int) -> Iterator[None]:
    """Join the processes of torchrun, to bring their reports together; however long the slowest takes."""
    if world == 1:
        yield
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield
    finally:
        dist.destroy_process_group()


def summarise(reports: Sequence[Report], outputs: Outputs, mode: str, seconds: float) -> None:
    """Print what was done, what failed, and where everything is; write the table of expected scores."""
    from utils.inference.outputs import worst

    done, skipped = sum(r.done for r in reports), [s for r in reports for s in r.skipped]
    failures = [f for r in reports for f in r.failures]
    tiled = [t for r in reports for t in r.tiled]
    speed = f", {done / seconds:.2f} images/s" if done else ""
    print(
        f"segmented {done} image(s) by {outputs.procedure}, mode {mode}, in {seconds:.1f} s{speed}; "
        f"masks: {outputs.folder}"
    )
    if skipped:
        print(f"skipped {len(skipped)} image(s) whose outputs were there")
    if tiled:
        print(f"{len(tiled)} image(s) were too large to be seen whole and were predicted in tiles: {some(tiled)}")
    rows = [row for report in reports for row in report.rows]
    if rows:
        lowest = worst(outputs.write_table(rows, keep=skipped))
        name = outputs.metric.upper() if outputs.metric == "iou" else outputs.metric.capitalize()
        found = f" (lowest: {lowest.expected:.3f}, {lowest.image})" if lowest else ""
        print(f"expected {name} per image and class, worst first: {outputs.table_path}{found}")
    if any(r.interrupted for r in reports):
        print("interrupted: --skip-existing continues where this run stopped")
    if failures:
        print(f"{len(failures)} failed:")
        for failure in failures[:20]:
            print(f"  {failure}")
        if len(failures) > 20:
            print(f"  ... and {len(failures) - 20} more, see above")


def some(names: Sequence[str]) -> str:
    """Return the first few names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


if __name__ == "__main__":
    run(main)
