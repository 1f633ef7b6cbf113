"""Write a trained model in a form that runs without this project: ONNX, or a torch.export program.

    python -m utils.export --model best_model.pth --format onnx

The exported program takes images, float32 (B, channels, H, W), RGB in [0, 1], of any batch size, height and width. It
returns probabilities, float32 (B, classes, H, W). Normalization, temperature and softmax (or sigmoid) are included, so
its output can be passed to utils.rankdice.rank_dice. Before the file is written, the output is compared with PyTorch's
on three image sizes.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

from utils.cli import Parser, add_overrides, add_trust

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        prog="python -m utils.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", required=True, help="checkpoint, such as saved/.../best_model.pth")
    parser.add_argument("-f", "--format", choices=tuple(SUFFIXES), default="onnx", help="default: onnx")
    parser.add_argument("-o", "--output", help="file to write (default: next to the checkpoint)")
    parser.add_argument("-c", "--config", help="config to use instead of the one in the checkpoint")
    parser.add_argument("--logits", action="store_true", help="return logits instead of probabilities")
    add_overrides(parser)
    add_trust(parser)
    return parser.parse_args()


if __name__ == "__main__":
    parse_arguments()  # the imports below take seconds; --help and wrong options must not wait for them

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from utils.checkpoint import LoadedModel, load_model
from utils.errors import UserError, not_installed, run
from utils.files import atomic, expand
from utils.predict import PredictOptions
from utils.predict.network import SMALLEST_SIDE, Network

Runner = Callable[[np.ndarray], np.ndarray]

STEPS = ("trace the network", "write the file", "compare its outputs with those of PyTorch")
SECONDS_OF_SILENCE = 20.0
DEFERRED = "prefer_deferred_runtime_asserts_over_guards"  # an argument of torch.export.export since torch 2.9
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch-export": ()}
# One more than a multiple of 32: no level of a network divides evenly, so every resize in it is traced as one.
TRACED_SIZE = (2, 97, 161)
_SIZES = ((1, 64, 96), (3, 97, 130), (2, 161, 224))
CHECKED_SIZES = {"torch-export": _SIZES, "onnx": (*_SIZES, (2, 20, 45))}
# torch.export takes a size of 1 for a constant, so five halvings of the smallest side must leave two pixels.
SMALLEST_TRACED, LARGEST_TRACED, LARGEST_BATCH = 2 * SMALLEST_SIDE, 16384, 1024
# What float32 rounding may change: a little of the result, or of the size of the logits that it is made from.
TOLERANCE, TOLERANCE_OF_LOGITS = 1e-3, 1e-5


def main() -> int:
    """Export a checkpoint."""
    args = parse_arguments()
    output = expand(args.output or Path(args.model).with_suffix(SUFFIXES[args.format]))
    if output.suffix != SUFFIXES[args.format]:
        raise UserError(f"--output {output}: a file of format {args.format} is named {SUFFIXES[args.format]}")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")

    loaded = load_model(args.model, config=args.config, trust_code=args.trust_code, overrides=args.set)
    print(f"exporting {loaded.config.arch.type} in {len(STEPS)} steps; large networks take minutes", flush=True)
    with signs_of_life():
        worst = export(loaded, output, args.format, args.logits, progress=steps())
    sizes = ", ".join("x".join(map(str, size)) for size in CHECKED_SIZES[args.format])
    print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB; largest difference to PyTorch {worst:.1e} (on {sizes})")
    if loaded.config.predict.mode != "single":
        print(
            "note: the exported program processes each image in a single view, but inference.py uses mode "
            f"{loaded.config.predict.mode}"
        )
    return 0


@contextmanager
def signs_of_life() -> Iterator[None]:
    """Print the elapsed time regularly, because tracing a large network takes minutes without any output."""
    start, done, screen = time.perf_counter(), threading.Event(), sys.stdout

    def show() -> None:
        while not done.wait(SECONDS_OF_SILENCE):
            print(f"   {time.perf_counter() - start:.0f} s so far", file=screen, flush=True)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def steps() -> Callable[[str], None]:
    """Return a function that prints that a step of :data:`STEPS` begins, and how long the one before it took."""
    begun: list[float] = []

    def show(step: str) -> None:
        begun.append(time.perf_counter())
        took = f" ({begun[-1] - begun[-2]:.0f} s for the step before)" if len(begun) > 1 else ""
        print(f"{len(begun)} of {len(STEPS)}: {step}{took}", flush=True)

    return show


def check_packages(kind: str) -> None:
    """Raise UserError if a package that the format needs is not installed, or torch is too old for dynamic sizes."""
    if DEFERRED not in inspect.signature(torch.export.export).parameters:
        raise UserError(
            f"exporting needs torch 2.9 or newer, found {torch.__version__}: pip install --upgrade torch torchvision"
        )
    missing = [package for package in PACKAGES[kind] if find_spec(package) is None]
    if missing:
        raise not_installed(f"--format {kind}", *missing)


def export(
    loaded: LoadedModel,
    path: str | Path,
    kind: str = "onnx",
    logits: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> float:
    """Export a model; the file appears only after its output agreed with PyTorch's.

    Args:
        loaded: from :func:`utils.checkpoint.load_model`.
        path: the file to write.
        kind: "onnx" or "torch-export".
        logits: whether the program returns logits instead of probabilities.
        progress: is called with each of ``STEPS`` when it begins.

    Returns:
        The largest absolute difference to PyTorch over ``CHECKED_SIZES``.

    Raises:
        UserError: a package is missing, torch is too old, the model cannot be exported, or the outputs of the exported
            program differ from PyTorch's.
    """
    check_packages(kind)
    path = Path(path)
    deployed = deployable(loaded, logits)
    facts = _facts(loaded, logits)
    name = loaded.config.arch.type
    try:
        with atomic(path, path.suffix) as temporary:
            write, start = (_write_onnx, _start_onnx) if kind == "onnx" else (_write_program, _start_program)
            progress(STEPS[0])
            with _quiet(), _traceable(), torch.no_grad():
                program = _trace(deployed, loaded.facts.in_channels)
            progress(STEPS[1])
            with _quiet(), torch.no_grad():
                write(program, str(temporary), facts)
                del program
                runner = start(str(temporary))
            progress(STEPS[2])
            return _compare(deployed, runner, loaded.facts.in_channels, name, kind)
    except UserError:
        raise
    except Exception as error:  # the exporters raise many kinds of errors
        raise UserError(
            f"{name} cannot be exported as {kind} with free height, width and batch by torch {torch.__version__}: "
            f"{_reason(error)}"
        ) from error


def _reason(error: BaseException) -> str:
    """Return the exporter's reason in one line, without its advice to developers."""
    if type(error).__name__ == "ConversionError" and error.__cause__ is not None:
        error = error.__cause__  # the outer one only says that it failed
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {line[:300]}"


class Deployed(nn.Module):
    """One view of a :class:`utils.predict.network.Network` as a module, from images to probabilities or logits."""

    def __init__(self, network: Network, logits: bool) -> None:
        super().__init__()
        self.normalize, self.model = network.normalize, network.model
        self._network, self._gives_logits = network, logits

    def forward(self, images: Tensor) -> Tensor:
        """Return probabilities ``(B, C, H, W)``, or logits, of images in [0, 1]."""
        return self.logits(images) if self._gives_logits else self._network.probabilities(images)

    def logits(self, images: Tensor) -> Tensor:
        """Return logits ``(B, C, H, W)`` of images in [0, 1]."""
        return self._network.logits(images)


def deployable(loaded: LoadedModel, logits: bool = False) -> Deployed:
    """Return a module from images in [0, 1] to probabilities, or logits; in float32 on the CPU."""
    return Deployed(loaded.single("cpu", amp=None, channels_last=False), logits).eval()


def _facts(loaded: LoadedModel, logits: bool) -> dict[str, str]:
    """Return what a user of the file needs to know, as text."""
    facts, predict = loaded.facts, loaded.config.predict
    options = PredictOptions.from_config(predict)
    return {
        "class_names": json.dumps(facts.class_names),
        "palette": json.dumps(facts.palette),
        "input": f"images: float32 (B, {facts.in_channels}, H, W) in [0, 1]",
        "output": f"{'logits' if logits else 'probabilities'}: float32 (B, {facts.num_classes}, H, W)",
        "activation": "sigmoid" if facts.num_classes == 1 else loaded.activation,
        "temperature": str(predict.temperature),
        "bias": json.dumps(predict.bias),
        # how to decide on the probabilities: the fields of utils.predict.PredictOptions
        "procedure": predict.test,
        "mode": predict.mode,
        "threshold": str(options.threshold),
        "metric": options.metric,
        "prune": json.dumps(options.prune),
        "presence": options.chooses_by,
        "options": json.dumps(asdict(options)),
    }


# --------------------------------------------------------------------------------------------------- tracing


def _trace(deployed: nn.Module, channels: int):
    """Trace the module with dynamic batch, height and width."""
    batch, height, width = TRACED_SIZE
    free = {
        0: Dim("batch", min=1, max=LARGEST_BATCH),
        2: Dim("height", min=SMALLEST_TRACED, max=LARGEST_TRACED),
        3: Dim("width", min=SMALLEST_TRACED, max=LARGEST_TRACED),
    }
    # Networks compare sizes to skip a resize that would change nothing. The traced program always resizes, which is
    # correct for every size. But torch cannot always prove the comparison for pooled sizes, and adds an assertion to
    # the program.
    arguments: dict[str, Any] = {"dynamic_shapes": (free,), "strict": False, DEFERRED: True}
    images = (torch.rand(batch, channels, height, width),)
    program = torch.export.export(deployed, images, **arguments)
    _drop_size_assertions(program)
    return program


def _drop_size_assertions(program) -> None:
    """Remove the deferred comparisons; whether the program is right for other sizes is then checked by running it."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and "_assert_scalar" in str(node.target):
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


@contextmanager
def _traceable() -> Iterator[None]:
    """Replace some operations of torch and timm by forms that can be traced for dynamic sizes."""
    with ExitStack() as patches:
        patches.enter_context(patch.object(F, "adaptive_avg_pool2d", adaptive_average))
        if "timm.layers.padding" in sys.modules:
            patches.enter_context(patch.object(sys.modules["timm.layers.padding"], "get_same_padding", same_padding))
        yield


def same_padding(length: int, kernel_size: int, stride: int, dilation: int) -> int:
    """Do what timm's ``get_same_padding`` does, of TensorFlow's padding "same", with whole numbers only.

    Its floating-point division stays in the sizes of every later layer, so that tracing took more than ten minutes.
    """
    reach = (kernel_size - 1) * dilation + 1
    missing = ((length + stride - 1) // stride - 1) * stride + reach - length
    return missing if reach >= stride else max(missing, 0)


def adaptive_average(x: Tensor, output_size: int | Sequence[int | None]) -> Tensor:
    """Do what ``torch.nn.functional.adaptive_avg_pool2d`` does: each bin is the mean of the pixels it touches."""
    rows, columns = (output_size, output_size) if isinstance(output_size, int) else output_size
    if rows == columns == 1:
        return x.mean(dim=(2, 3), keepdim=True)
    height, width = x.shape[-2:]
    vertical = _bins(rows or height, height, x)
    horizontal = _bins(columns or width, width, x)
    return vertical @ x @ horizontal.transpose(0, 1)


def _bins(count: int, length: int, like: Tensor) -> Tensor:
    """Return ``(count, length)``: bin i is the mean from ``floor(i l / n)`` to ``ceil((i + 1) l / n)``."""
    index = torch.arange(count, device=like.device)[:, None]
    position = torch.arange(length, device=like.device)[None]
    first = (index * length) // count
    stop = -((-(index + 1) * length) // count)
    inside = ((position >= first) & (position < stop)).to(like.dtype)
    return inside / inside.sum(dim=1, keepdim=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' own progress and warnings off the terminal."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


# --------------------------------------------------------------------------------------------------- formats


def _write_onnx(program, path: str, facts: dict[str, str]) -> None:
    import onnx  # an extra

    output = facts["output"].partition(":")[0]
    torch.onnx.export(
        program, (), path, dynamo=True, external_data=False, input_names=["images"], output_names=[output]
    )
    model = onnx.load(path)
    _pad_small_images(model.graph)
    onnx.helper.set_model_props(model, facts)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _pad_small_images(graph: Any) -> None:
    """Let an ONNX graph pad sides under ``SMALLEST_SIDE``; the traced program lacks this, it is for larger images."""
    import onnx  # an extra

    images, output = graph.input[0].name, graph.output[0].name
    for names in (names for node in graph.node for names in (node.input, node.output)):
        names[:] = [{images: "padded_images", output: "padded_output"}.get(name, name) for name in names]
    around = onnx.parser.parse_graph(f"""
        around (float[b, c, h, w] {images}) => (float[b, k, h, w] {output}) {{
            side_lengths = Shape <start = 2> ({images})
            smallest_side = Constant <value_ints = [{SMALLEST_SIDE}]> ()
            enough_pixels = Max (side_lengths, smallest_side)
            missing_pixels = Sub (enough_pixels, side_lengths)
            nothing_else = Constant <value_ints = [0, 0, 0, 0, 0, 0]> ()
            pixels_to_add = Concat <axis = 0> (nothing_else, missing_pixels)
            padded_images = Pad <mode = "edge"> ({images}, pixels_to_add)
            top_left = Constant <value_ints = [0, 0]> ()
            height_and_width = Constant <value_ints = [2, 3]> ()
            {output} = Slice (padded_output, top_left, side_lengths, height_and_width)
        }}""")
    nodes = [*around.node[:7], *graph.node, *around.node[7:]]
    del graph.node[:]
    graph.node.extend(nodes)


def _start_onnx(path: str) -> Runner:
    import onnxruntime  # an extra

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def _write_program(program, path: str, facts: dict[str, str]) -> None:
    torch.export.save(program, path, extra_files={"facts.json": json.dumps(facts)})


def _start_program(path: str) -> Runner:
    module = torch.export.load(path).module()
    return lambda images: module(torch.from_numpy(images)).detach().numpy()


def _compare(deployed: Any, runner: Runner, channels: int, name: str, kind: str) -> float:
    """Return the largest difference of the exported program to PyTorch over the checked sizes."""
    worst, generator = 0.0, np.random.default_rng(0)
    for batch, height, width in CHECKED_SIZES[kind]:
        images = generator.random((batch, channels, height, width), dtype=np.float32)
        with torch.no_grad():
            expected = deployed(torch.from_numpy(images)).numpy()
            logits = deployed.logits(torch.from_numpy(images))
        found = runner(images)
        size = f"{batch} x {channels} x {height} x {width}"
        if found.shape != expected.shape:
            raise UserError(f"{name} as {kind}: images {size} give shape {found.shape}, PyTorch gives {expected.shape}")
        difference = float(np.abs(found - expected).max())
        if not difference <= max(TOLERANCE, TOLERANCE_OF_LOGITS * float(logits.abs().max())):
            raise UserError(
                f"{name} as {kind} does not match PyTorch: images {size} differ by {difference:.2g}; "
                "no file was written"
            )
        worst = max(worst, difference)
    return worst


if __name__ == "__main__":
    run(main)
