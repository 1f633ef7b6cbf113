"""How fast are training samples made? ``python -m benchmarks.data [--data-dir DIR] [--quick] [--json FILE]``.

One process with one thread, as in one loader worker, goes over the same images with three pipelines that do the same to
them: rescale to 0.5-2 times the longer side, rotate by up to 10 degrees, pad, crop, flip, blur.

* ours: the VOC loader of this project: one warp on bytes. Its samples are bytes; conversion and normalization follow
  on the device. ``ours, normalized`` does them here too.
* separate: one OpenCV step after the other on float32, then to tensor and normalize.
* torchvision: transforms.v2 on uint8 tensors, then to float32 and normalize.

Each is timed with reading the files and without (images kept in memory). Rounds alternate between the pipelines;
the table shows medians of images per second and their ratio to ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import get_worker_info
from torchvision import transforms, tv_tensors
from torchvision.transforms import v2

import dataloaders
from base.base_dataloader import BaseDataLoader
from base.base_dataset import BaseDataSet
from base.entries import collate
from dataloaders.shapes.__main__ import write_voc
from utils.batch import Normalize
from utils.errors import UserError, run
from utils.files import write_text

CROP = 320
IGNORED = 255
MADE_IMAGES, MADE_SIZE = 64, 448
MEMORY_SAMPLES = 20_000


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.data",
        description="Images per second of one worker: this project, separate OpenCV steps, torchvision v2.",
    )
    top.add_argument("--data-dir", help="folder in VOC layout, with classes.txt (default: generated scenes)")
    top.add_argument("--images", type=int, default=100, help="images per round (default: 100)")
    top.add_argument("--rounds", type=int, default=7, help="rounds (default: 7)")
    top.add_argument("--quick", action="store_true", help="40 images, 5 rounds")
    top.add_argument("--memory", action="store_true", help="also measure the memory of a worker over 20,000 samples")
    top.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
    return top


def main() -> int:
    args = parser().parse_args()
    if args.quick:
        args.images, args.rounds = 40, 5
    if args.images < 1 or args.rounds < 1:
        raise UserError("--images and --rounds must be at least 1")

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.data_dir or _made(Path(temporary))
        result = measure(folder, args.images, args.rounds)
        if args.memory:
            result["memory"] = memory(folder)
    _print(result)
    if args.json:
        write_text(args.json, json.dumps(result, indent=2))
    return 0


def _made(folder: Path) -> str:
    write_voc(folder, MADE_IMAGES, MADE_SIZE)
    return str(folder)


def dataset(folder: str, **options: Any) -> BaseDataSet:
    return dataloaders.LOADERS["VOC"](folder, "train", classes="classes.txt", **options)


def measure(folder: str, images: int, rounds: int) -> dict[str, Any]:
    """Return images per second of each pipeline, with and without reading, as lists over the rounds."""
    ours = dataset(folder, crop_size=CROP, augment=True, blur=True)
    indices = [i % len(ours) for i in range(images)]
    decoded = {i: ours.read(i) for i in sorted(set(indices))}
    normalize = Normalize(ours.mean, ours.std)
    separate, tv = Separate(ours), Torchvision(ours)
    read = ours.load
    kept = decoded.__getitem__

    def our_sample(index: int, load: Callable[..., Any]) -> Any:
        ours.load = lambda i, epoch=0: load(i)  # type: ignore[assignment, method-assign]
        return ours[(next(epoch), index)]

    epoch = iter(range(10**9))
    pipelines: dict[str, Callable[[int, Callable[..., Any]], Any]] = {
        "ours": our_sample,
        "ours, normalized": lambda i, load: normalize(our_sample(i, load).image[None]),
        "separate": lambda i, load: separate(*load(i)),
        "torchvision": lambda i, load: tv(*load(i)),
    }
    times: dict[str, dict[str, list[float]]] = {name: {"files": [], "memory": []} for name in pipelines}
    for turn in range(rounds + 1):
        for name, make in pipelines.items():
            for source, load in (("files", read), ("memory", kept)):
                start = time.perf_counter()
                for index in indices:
                    make(index, load)
                seconds = time.perf_counter() - start
                if turn:  # the first round warms up
                    times[name][source].append(len(indices) / seconds)
    return {
        "folder": folder,
        "image": list(decoded[indices[0]][1].shape),
        "crop": CROP,
        "images": images,
        "rounds": rounds,
        "machine": f"{_processor()}, one thread; Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, OpenCV {cv2.__version__}",
        "images_per_second": times,
    }


class Separate:
    """One OpenCV step after the other on the whole float32 image: how such loaders are commonly written."""

    def __init__(self, data: BaseDataSet) -> None:
        self.to_tensor, self.normalize = transforms.ToTensor(), transforms.Normalize(data.mean, data.std)
        self.as_label = lambda label: torch.from_numpy(label.astype("int64"))
        self.random = random.Random(0)

    def __call__(self, image: np.ndarray, label: np.ndarray) -> Any:
        image, label = image.astype(np.float32), label.astype(np.int32)
        height, width = label.shape
        long_side = self.random.randint(int(max(height, width) * 0.5), int(max(height, width) * 2))
        scale = long_side / max(height, width)
        size = round(width * scale), round(height * scale)
        image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)

        turn = cv2.getRotationMatrix2D((size[0] / 2, size[1] / 2), self.random.uniform(-10, 10), 1.0)
        image = cv2.warpAffine(image, turn, size, flags=cv2.INTER_LINEAR)
        label = cv2.warpAffine(
            label.astype(np.float32), turn, size, flags=cv2.INTER_NEAREST, borderValue=IGNORED
        ).astype(np.int32)

        missing = max(CROP - size[1], 0), max(CROP - size[0], 0)
        if any(missing):
            edges = 0, missing[0], 0, missing[1], cv2.BORDER_CONSTANT
            image = cv2.copyMakeBorder(image, *edges, value=0)
            label = cv2.copyMakeBorder(label, *edges, value=IGNORED)
        top = self.random.randint(0, label.shape[0] - CROP)
        left = self.random.randint(0, label.shape[1] - CROP)
        image = image[top : top + CROP, left : left + CROP]
        label = label[top : top + CROP, left : left + CROP]
        if self.random.random() > 0.5:
            image, label = np.fliplr(image).copy(), np.fliplr(label).copy()
        sigma = self.random.random()
        side = int(3.3 * sigma)
        side += 1 - side % 2
        image = cv2.GaussianBlur(image, (side, side), sigma) if sigma > 0 else image

        return self.normalize(self.to_tensor(Image.fromarray(np.uint8(image)))), self.as_label(label)


class Torchvision:
    """The same with torchvision.transforms.v2 on uint8 tensors, its fastest documented way on a CPU."""

    def __init__(self, data: BaseDataSet) -> None:
        fill = {tv_tensors.Image: [round(255 * m) for m in data.mean], tv_tensors.Mask: IGNORED}
        self.image, self.mask, self.torch = tv_tensors.Image, tv_tensors.Mask, torch
        self.random = random.Random(0)
        self.resize, self.bilinear = v2.functional.resize, v2.InterpolationMode.BILINEAR
        self.rest = v2.Compose(
            [
                v2.RandomRotation(10, interpolation=v2.InterpolationMode.BILINEAR, fill=fill),
                v2.RandomCrop(CROP, pad_if_needed=True, fill=fill),
                v2.RandomHorizontalFlip(),
                v2.GaussianBlur(5, (0.1, 1.0)),
                v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}, scale=True),
                v2.Normalize(data.mean, data.std),
            ]
        )

    def __call__(self, image: np.ndarray, label: np.ndarray) -> Any:
        picture = self.image(self.torch.tensor(image).permute(2, 0, 1))
        mask = self.mask(self.torch.tensor(label))
        scale = self.random.uniform(0.5, 2.0)
        size = [round(label.shape[0] * scale), round(label.shape[1] * scale)]
        # Without antialiasing, as the others.
        picture = self.resize(picture, size, self.bilinear, antialias=False)
        mask = self.resize(mask, size)
        return self.rest(picture, mask)


def memory(folder: str, samples: int = MEMORY_SAMPLES) -> dict[str, list[float]]:
    """Return a worker's private memory in MiB after each tenth of the samples."""
    data = dataset(folder, crop_size=CROP, augment=True, blur=True, jitter=True)
    sizes: list[float] = []

    def with_size(items: list[Any]) -> Any:
        collated = collate(items)
        assert get_worker_info() is not None
        return collated._replace(problems=[f"{_private_mib():.1f}"])

    loader = BaseDataLoader(data, 20, shuffle=True, num_workers=1)
    loader.collate_fn = with_size
    done, number = 0, 0
    while done < samples:
        loader.set_epoch(number)
        # What the workers report instead of skipped files; the loader's own iteration would log it.
        for collated in super(BaseDataLoader, loader).__iter__():
            done += len(collated.batch.names)
            if done >= samples * (len(sizes) + 1) / 10:
                sizes.append(float(collated.problems[0]))
        number += 1
    return {"samples": [samples], "private_mib": sizes}


def _private_mib() -> float:
    """Return this process's memory that no other shares, in MiB (Linux)."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({os.cpu_count()} cores)"


def _print(result: dict[str, Any]) -> None:
    height, width = result["image"]
    print(result["machine"])
    print(f"{result['folder']}: images of {width}x{height}, crops of {CROP}x{CROP}, {result['images']} images x")
    print(f"{result['rounds']} rounds; medians of images per second, and how many times faster ours is\n")
    rates = {
        name: {source: statistics.median(values) for source, values in by_source.items()}
        for name, by_source in result["images_per_second"].items()
    }
    print(f"{'':18} {'from files':>18} {'from memory':>18}")
    for name, by_source in rates.items():
        cells = (f"{by_source[s]:9.0f} {rates['ours'][s] / by_source[s]:7.2f}x" for s in ("files", "memory"))
        print(f"{name:18} " + " ".join(f"{cell:>18}" for cell in cells))
    if "memory" in result:
        sizes = ", ".join(f"{size:.0f}" for size in result["memory"]["private_mib"])
        print(f"\na worker's private memory over {result['memory']['samples'][0]} samples, MiB: {sizes}")
    sys.stdout.flush()


if __name__ == "__main__":
    run(main)
