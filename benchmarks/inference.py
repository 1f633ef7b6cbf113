"""Compare the speed of multi-scale and sliding inference with that of yassouali/pytorch-segmentation.

    python -m benchmarks.inference [--quick] [--json FILE] [--device cpu] [--amp]

The predecessor resizes images with SciPy on the CPU, one scale after the other, processes one tile at a time, and sums
float64 scores in NumPy. Both methods run the same network with the same scales, tile size and flips, from an image in
memory to a label map. "network" is the time of the forward passes alone in the predecessor's method. Sliding is timed
twice: with the predecessor's overlap (1/3, four tiles a row), and with ours (1/4, three tiles a row; the blending
window hides the seams that the larger overlap was for).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

import models
from utils.checkpoint import LoadedModel
from utils.config import resolve
from utils.facts import Facts
from utils.images import voc_colormap
from utils.predictor import SCALES, Predictor

CLASSES = 21
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "UNet width 8": ("UNet", {"width": 8}),
    "ENet": ("ENet", {}),
    "PSPNet resnet18": ("PSPNet", {"backbone": "resnet18", "pretrained": False}),
}
TILE_SHARE, OVERLAP = 1 / 2.5, 1 / 3
# mode, our overlap
WAYS = (("multiscale", 0.0), ("sliding", OVERLAP), ("sliding", 0.25))


class TimedNetwork(nn.Module):
    """A network that sums the time of its forward passes."""

    def __init__(self, network: nn.Module, wait: Callable[[], None]) -> None:
        super().__init__()
        self.network, self.wait, self.seconds = network, wait, 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.wait()
        start = time.perf_counter()
        y = self.network(x)
        self.wait()
        self.seconds += time.perf_counter() - start
        return y


def older_multiscale(network: nn.Module, image: Tensor, device: torch.device) -> np.ndarray:
    """Sum logits over scales in NumPy; images are resized by scipy."""
    size = image.shape[-2:]
    total = np.zeros((CLASSES, *size))
    pixels = image.numpy()
    for scale in SCALES:
        scaled = torch.from_numpy(ndimage.zoom(pixels, (1, 1, scale, scale), order=1, prefilter=False)).to(device)
        logits = F.interpolate(network(scaled).cpu(), size=size, mode="bilinear", align_corners=True)
        total += logits[0].numpy()
    return torch.from_numpy(total / len(SCALES)).softmax(0).argmax(0).numpy()


def older_sliding(network: nn.Module, image: Tensor, device: torch.device) -> np.ndarray:
    """Sum logits of tiles and of their mirror images in NumPy, one at a time; the last tiles are padded."""
    height, width = image.shape[-2:]
    tall, wide = int(height * TILE_SHARE), int(width * TILE_SHARE)
    stride = ceil(tall * (1 - OVERLAP))
    total, count = np.zeros((CLASSES, height, width)), np.zeros((height, width))
    for y in range(0, ceil((height - tall) / stride) * stride + 1, stride):
        for x in range(0, ceil((width - wide) / stride) * stride + 1, stride):
            tile = image[:, :, y : y + tall, x : x + wide]
            h, w = tile.shape[-2:]
            tile = F.pad(tile, (0, wide - w, 0, tall - h)).to(device)
            logits = 0.5 * (network(tile) + network(tile.flip(-1)).flip(-1))
            total[:, y : y + h, x : x + w] += logits[0, :, :h, :w].cpu().numpy()
            count[y : y + h, x : x + w] += 1
    return torch.from_numpy(total / count).softmax(0).argmax(0).numpy()


def in_turns(actions: list[Callable[[], object]], rounds: int) -> list[float]:
    """Return the median time of each action. They take turns, so a busy machine slows all of them equally."""
    times: list[list[float]] = [[] for _ in actions]
    for _ in range(rounds):
        for action, spent in zip(actions, times, strict=True):
            start = time.perf_counter()
            action()
            spent.append(time.perf_counter() - start)
    return [median(spent) for spent in times]


def compare(name: str, mode: str, overlap: float, side: int, device: torch.device, rounds: int, amp: bool) -> dict:
    """Time both methods on one square image."""
    kind, args = NETWORKS[name]
    torch.manual_seed(0)
    network = models.build(kind, CLASSES, **args).eval()
    facts = Facts(
        CLASSES, tuple(map(str, range(CLASSES))), voc_colormap(CLASSES), (0.45,) * 3, (0.25,) * 3, ignore_index=255
    )
    loaders = {"train_loader": {"type": "Shapes"}, "val_loader": {"type": "Shapes"}}
    config = resolve({"name": "benchmark", "arch": {"type": kind}, **loaders, "predict": {"test": "max"}})
    picture = np.random.default_rng(0).integers(0, 256, (side // 8, side // 8, 3))
    picture = np.kron(picture, np.ones((8, 8, 1))).astype(np.uint8)
    normalized = (torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255 - 0.45) / 0.25
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    older = older_multiscale if mode == "multiscale" else older_sliding

    clock = TimedNetwork(network.to(device), wait)
    inside = []

    def older_way() -> None:
        clock.seconds = 0.0
        older(clock, normalized, device)
        inside.append(clock.seconds)

    predictor = Predictor(
        LoadedModel(network, facts, config, "softmax", Path(), 0),
        mode=mode, flip=mode == "sliding", tile=int(side * TILE_SHARE), overlap=overlap, batch_size=4, device=device,
        max_pixels=2**30, memory=2**34, amp=amp,
    )  # fmt: skip
    with torch.no_grad():
        actions = [older_way, lambda: predictor(picture).labels]
        in_turns(actions, 1)  # warms up
        before, after = in_turns(actions, rounds)
    return {
        "network": name,
        "mode": mode if mode == "multiscale" else f"sliding, overlap {overlap:.2f}",
        "image": f"{side} x {side}",
        "older_s": before,
        "network_s": median(inside[1:]),
        "ours_s": after,
        "times": before / after,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller image")
    parser.add_argument("--json", metavar="FILE", help="write the numbers")
    parser.add_argument("--amp", action="store_true", help="run ours in half precision")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    side, rounds = (320, 3) if args.quick else (480, 5)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    print(f"torch {torch.__version__}, {where}, {platform.machine()}; {CLASSES} classes, {len(SCALES)} scales\n")
    print("| network | mode | image | predecessor's method, s | network alone, s | ours, s | times faster |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for name in NETWORKS:
        for mode, overlap in WAYS:
            row = compare(name, mode, overlap, side, device, rounds, args.amp)
            rows.append(row)
            print(
                f"| {name} | {row['mode']} | {row['image']} | {row['older_s']:.2f} | {row['network_s']:.2f} | "
                f"{row['ours_s']:.2f} | {row['times']:.1f} |",
                flush=True,
            )
    if args.json:
        Path(args.json).write_text(json.dumps({"torch": torch.__version__, "device": where, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
