"""One run of ``inference.py``: load the model, segment every image, write the outputs, print a summary."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

from utils import checkpoint, distributed, stamps
from utils.errors import USER_ERROR_EXIT_CODE, UserError, listed, plural
from utils.files import check_folder, expand
from utils.inference.outputs import Decoding, Outputs, Wanted, overlay_video
from utils.inference.pipeline import Pipeline, Report
from utils.inference.sources import Found, Item, Video, find_images, is_video, printable
from utils.predict.files import Index, digest_of_run, prepare_folder
from utils.predict.network import choose_device
from utils.predictor import SCALES, Predictor
from utils.progress import progress_bar
from utils.rankdice import METRICS

_SHOWN = 20  # failures that the summary repeats


def segment_all(args: argparse.Namespace) -> int:
    """Segment all images that the command line names; return the exit code.

    Raises:
        UserError: nothing was segmented, because the images, the model or the output folder cannot be used.
    """
    Image.MAX_IMAGE_PIXELS = None  # large images are wanted here
    rank, world = distributed.launched_as()
    source = open_source(args, rank, world)
    predictor = load(args)
    outputs = open_outputs(args, predictor, source)
    video: AbstractContextManager = nullcontext()
    if isinstance(source, Video) and args.overlay is not None and world == 1:
        path = outputs.folder / f"{source.name}_overlay.mp4"
        if not args.force:
            stamps.refuse_foreign([path], outputs.folder)
        video = overlay_video(path, source.rate, outputs.made.digest)

    started = time.monotonic()
    problems = source.problems if rank == 0 else []
    most = source.total and min(source.total, args.limit or source.total)
    with image_bar(most) as (advance, say), video as outputs.video:
        for problem in problems:
            say(problem)
        pipeline = Pipeline(predictor, outputs, advance, args.skip_existing)
        report = pipeline.run(islice(source, args.limit))
    report.failures[:0] = problems
    with distributed.process_group(torch.device("cpu"), timeout=timedelta(days=7)):  # the slowest may take long
        total = Report.merged(distributed.gather(report))
    if rank == 0:
        summarize(total, outputs, predictor.mode, time.monotonic() - started)
        if source.passed_over:
            print(source.passed_over)
    if report.interrupted:
        return 130
    return USER_ERROR_EXIT_CODE if total.failures else 0


def open_source(args: argparse.Namespace, rank: int, world: int) -> Found | Video:
    """Find the images of this process."""
    args.images = str(expand(args.images))
    if is_video(args.images):
        return Video(args.images, (rank, world))
    found = find_images(args.images, args.output, args.extension)
    return replace(found, items=found.items[rank::world])


def load(args: argparse.Namespace) -> Predictor:
    """Return the predictor that the command line describes.

    Raises:
        UserError: a checkpoint or the device cannot be used.
    """
    device = choose_device(args.device)
    args.model = [str(expand(path)) for path in args.model or [checkpoint.network_of(args.config)]]
    loaded = [
        checkpoint.load_model(path, device, args.config, args.trust_code, overrides=args.set) for path in args.model
    ]
    predictor = Predictor(
        loaded,
        predict=args.predict,
        mode=args.mode,
        scales=args.scales or SCALES,
        flip=args.flip,
        tile=None if not args.tile else args.tile[0] if len(args.tile) == 1 else tuple(args.tile),
        overlap=args.overlap,
        batch_size=args.batch_size,
        device=device,
        max_pixels=args.max_pixels,
        memory=int(args.memory * 2**30) if args.memory else None,
        amp=args.amp,
        keep_masks=args.masks,
        keep_probs=args.probs is not None,
    )
    if args.masks and predictor.procedure == "max":
        raise UserError("--masks: procedure max has no overlapping masks; use -p rankdice or -p T, or remove --masks")
    return predictor


def open_outputs(args: argparse.Namespace, predictor: Predictor, source: Found | Video) -> Outputs:
    """Prepare the output folder.

    Raises:
        UserError: it cannot be written to, or contains files of another program or another checkpoint.
    """
    folder = expand(args.output)
    probs_digest = digest_of_run(map(Path, args.model), predictor.network, **predictor.views())
    options = asdict(predictor.options)
    digest = stamps.digest({"probs": probs_digest, "procedure": predictor.procedure, "options": options})
    made = Decoding(predictor.procedure, predictor.options.metric, digest, probs_digest, predictor.options.why_empty)
    wanted = Wanted(args.overlay, args.probs, args.json, args.masks)
    outputs = Outputs(folder, predictor.facts, made, wanted, args.force)
    if not args.force:
        outputs.table.refuse_foreign()
    if isinstance(source, Found):
        outputs.refuse_foreign(item.name for item in source)
    check_folder(folder)
    if args.probs == "npz":
        temperature = predictor.network.temperature
        path = ", ".join(args.model)
        index = Index(predictor.facts, predictor.options, predictor.procedure, temperature, path, probs_digest)
        prepare_folder(folder, index, args.force)
    return outputs


@contextmanager
def image_bar(total: int | None) -> Iterator[tuple[Callable, Callable]]:
    """Show progress; give functions that note a finished item, and that print a line above the bar."""
    with progress_bar(total=total, unit="image", desc="segmenting") as bar:

        def say(problem: str) -> None:
            bar.write(f"error: {problem}", file=sys.stderr)

        def advance(item: Item, problem: str | None) -> None:
            if problem is not None:
                say(problem)
            bar.set_postfix_str(printable(Path(item.name).name), refresh=False)
            bar.update()

        yield advance, say


def summarize(report: Report, outputs: Outputs, mode: str, seconds: float) -> None:
    """Print what was done, what failed, and where everything is; write the table of expected scores."""
    made, done, folder = outputs.made, plural(report.done, "image"), printable(outputs.folder)
    speed = f", {report.done / seconds:.2f} images/s" if report.done else ""
    print(f"segmented {done} by {made.procedure}, mode {mode}, in {seconds:.1f} s{speed}; masks: {folder}")
    if report.skipped:
        print(f"skipped {plural(len(report.skipped), 'image')} with outputs of this model and these options")
    if report.outdated:
        replaced = plural(report.outdated, "image")
        print(f"replaced outputs of another model, other options or another program: {replaced}")
    if report.tiled:
        print(
            f"cut {plural(len(report.tiled), 'image')} into tiles, because they are too large for one pass: "
            f"{listed(report.tiled, 3)}"
        )
    if report.unassigned:
        share = 100 * report.unassigned / report.pixels
        print(f"{share:.1f} % of the pixels are unassigned: no class was chosen for them by {made.procedure}")
    if report.empty:
        empty = plural(len(report.empty), "image")
        print(f"no RankDice mask in {empty}, because {made.why_empty}: {listed(report.empty, 3)}")
    print_table(outputs, report)
    if report.interrupted:
        print("interrupted; to continue where this run stopped, use --skip-existing")
    if report.failures:
        print(f"{len(report.failures)} failed:", *report.failures[:_SHOWN], sep="\n  ")
        if len(report.failures) > _SHOWN:
            print(f"  ... and {len(report.failures) - _SHOWN} more, see above")


def print_table(outputs: Outputs, report: Report) -> None:
    """Write the table of expected scores and say where it is; without scores, remove that of an earlier run."""
    if not report.rows:
        if not report.skipped:
            outputs.table.remove()
        return
    written = outputs.table.write(report.rows, keep=report.skipped)
    lowest = next((row for row in written if row.expected is not None), None)
    name = METRICS[outputs.made.metric].title
    found = f" (lowest: {lowest.expected:.3f}, {lowest.image})" if lowest else ""
    print(f"expected {name} per image and class, worst first: {printable(outputs.table.path)}{found}")
