"""The findings as text: a table of classes, suggestions for the config, warnings and problems."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable

import numpy as np

from base.base_dataset import BaseDataSet
from dataloaders.check.findings import Findings, OnDisk, likely_largest
from utils.config.schema import Component
from utils.errors import listed, plural

_SHOWN = 10
_NAMED = 3
_STRIDE = 32  # of the networks; crops should be multiples of it


def report(stage: str, component: Component, dataset: BaseDataSet, findings: Findings) -> str:
    """Return the findings as text."""
    where = component.args.get("data_dir", "generated")
    looked_at = len(findings.looked_at)
    of_all = "all of them" if looked_at == len(dataset) else f"{looked_at} of them, evenly spread"
    lines = [
        f"\n== {stage}_loader: {component.type}, split {dataset.split!r}, {where}",
        f"pairs           {len(dataset)} (looked at {of_all})",
    ]
    if dataset.layout:
        alone, more = [str(path) for path in dataset.alone[:_SHOWN]], len(dataset.alone) - _SHOWN
        lines += _beside("no partner", [*alone, *([f"... and {more} more"] if more > 0 else [])] or ["none"])
    lines += _beside("sizes", [_sizes(findings.sizes)])
    kinds = (
        f"{plural(channels, 'channel')}{' and transparency' if alpha else ''} of {dtype}, {seen.low:.6g} to "
        f"{seen.high:.6g} ({plural(seen.files, 'image')})"
        for (channels, alpha, dtype), seen in _kinds(findings)
    )
    lines += _beside("stored as", kinds)
    if findings.stored:
        values = [f"{v}{' (ILLEGAL)' if v in findings.illegal else ''}" for v in sorted(findings.stored)]
        count = f", ... ({len(values)} values)" if len(values) > 40 else ""
        lines += _beside("stored values", [", ".join(values[:40]) + count])
    if findings.good:
        weights = json.dumps([round(w, 3) for w in findings.weights])
        of_loss = [f'weights         loss args {{"weight": {weights}}}, or "balanced"'] if stage == "train" else []
        lines += ["", *_class_table(dataset, findings), "", *of_loss]
        lines.append(f'mean and std    "mean": {_numbers(findings.mean)}, "std": {_numbers(findings.std)}')
        lines.append(f"used at present {_numbers(dataset.mean)}, {_numbers(dataset.std)}")
    lines += [f"warning: {text}" for text in warnings(dataset, findings)]
    return "\n".join([*lines, *_problems(findings)])


def _beside(title: str, lines: Iterable[str]) -> list[str]:
    return [f"{'' if i else title:<16}{line}" for i, line in enumerate(lines)]


def _kinds(findings: Findings) -> list[tuple[tuple[int, bool, str], OnDisk]]:
    """Return the kinds of image files, the most frequent first."""
    return sorted(findings.on_disk.items(), key=lambda kind: -kind[1].files)


def _problems(findings: Findings) -> list[str]:
    """Return each kind of problem once: its first message, how many files have it, and a few of their names."""
    if not findings.problems:
        return ["no file with a problem"]
    lines = []
    groups = list(findings.alike.values())
    for group in groups[:_SHOWN]:
        lines.append(f"problem: {group[0][1]}")
        if len(group) > 1:
            names = listed((name for name, _ in group), _NAMED)
            lines.append(f"         {len(group)} files have this problem: {names}")
    left = sum(map(len, groups[_SHOWN:]))
    if left:
        lines.append(f"problem: ... and {plural(left, 'file')} more")
    return lines


def count_of_problems(findings: Findings) -> str:
    """Return how many files have a problem, as text."""
    count = len(findings.problems)
    return f"{plural(count, 'file')} with a problem, see above" if count else "no file with a problem"


def _sizes(sizes: Counter[tuple[int, int]]) -> str:
    if not sizes:
        return "unknown: no image could be read"
    if len(sizes) <= 3:
        return ", ".join(f"{w}x{h} ({plural(n, 'image')})" for (w, h), n in sizes.most_common())
    every = np.array(list(sizes.elements()))
    low, middle, high = (np.percentile(every, q, axis=0, method="nearest") for q in (0, 50, 100))
    return (
        f"{len(sizes)} different; width {low[0]} to {high[0]} (median {middle[0]}), "
        f"height {low[1]} to {high[1]} (median {middle[1]})"
    )


def _class_table(dataset: BaseDataSet, findings: Findings) -> list[str]:
    names = dataset.facts.label_names
    share = findings.pixels / max(1, findings.pixels.sum())
    weights = [f"{w:.3f}" for w in findings.weights] or [""] * len(names)
    width = max(len(name) for name in (*names, "not labeled"))
    lines = [f"{'id':>4} {'class':<{width}} {'pixels':>9} {'images':>7} {'weight':>8}"]
    rows = zip([*range(len(names)), dataset.ignore_index], [*names, "not labeled"], [*weights, ""], strict=True)
    for position, (i, name, weight) in enumerate(rows):
        lines.append(f"{i:>4} {name:<{width}} {share[position]:>9.4%} {findings.images[position]:>7} {weight:>8}")
    return lines


def _numbers(values: Iterable[float]) -> str:
    return json.dumps([round(float(v), 4) for v in values])


def warnings(dataset: BaseDataSet, findings: Findings) -> list[str]:
    """Return messages about things that are suspicious, but not errors."""
    found = []
    names, total = dataset.facts.label_names, findings.pixels.sum()
    if 0 <= dataset.ignore_index < dataset.label_count:
        found.append(
            f"ignore_index {dataset.ignore_index} is also the id of {names[dataset.ignore_index]!r}: all pixels of "
            "this class are ignored"
        )
    if findings.good:
        never = [names[i] for i in np.flatnonzero(findings.pixels[:-1] == 0)]
        if never:
            more = f" and {len(never) - _SHOWN} more" if len(never) > _SHOWN else ""
            found.append(f"no pixel of {', '.join(never[:_SHOWN])}{more} in the files that were read")
        if findings.pixels[-1] > 0.5 * total:
            found.append(f"{findings.pixels[-1] / total:.0%} of all pixels are unlabeled")
        if findings.turned:
            found.append(
                f"EXIF data turns {plural(len(findings.turned), 'image')} otherwise than the masks, such as "
                f"{findings.turned[0]}, and the sizes do not show whether the masks were made before or after that. "
                "Look at them; if a mask does not fit, remove the EXIF orientation from the image"
            )
        if np.isfinite(findings.std).all() and (findings.std < 0.01).any():
            found.append(
                "the brightness of the images hardly varies: are they 12-bit or 16-bit data stored without scaling?"
            )
        found += [*_unfitting_files(dataset, findings), *_unfitting_normalization(dataset, findings)]
        found += _too_large_a_crop(dataset, findings)
    return found


def _unfitting_files(dataset: BaseDataSet, findings: Findings) -> list[str]:
    """Return messages if channels or values of the files do not fit the loader's arguments."""
    messages = []
    types = sorted({dtype for _, _, dtype in findings.on_disk})
    mixed = len(types) > 1
    if dataset.value_limits.limits is not None and mixed:
        first = {dtype: seen.first for (_, _, dtype), seen in reversed(_kinds(findings))}
        named = ", ".join(f"{dtype} (such as {first[dtype]})" for dtype in types)
        messages.append(f"value_range applies to all images, but they have different types: {named}")
    for (channels, alpha, dtype), seen in _kinds(findings):
        wanted = dataset.in_channels
        files = plural(seen.files, "image") + (f", such as {seen.first}" if len(findings.on_disk) > 1 else "")
        if channels == 1 and wanted == 3 and len(findings.on_disk) > 1:
            messages.append(f"gray images among color images: {files}; they are converted to RGB")
        elif channels == 3 and wanted == 1:
            messages.append(f"color images, which are converted to gray (in_channels 1): {files}")
        elif channels not in (1, 3) and channels != wanted:
            messages.append(f"images with {channels} channels, but in_channels is {wanted}: {files}")
        if alpha and wanted != channels + 1:
            messages.append(f"images with transparency, which is dropped: {files}")
        top = seen.largest or (np.iinfo(dtype).max if dtype.startswith(("uint", "int")) else 0)
        if dataset.value_limits.limits is None and top > 255 and 0 < seen.high < top / 3:
            messages.append(_dark(dtype, seen, top, files if mixed else ""))
    return messages


def _dark(dtype: str, seen: OnDisk, top: float, files: str) -> str:
    """Return a message about dark images; ``files`` says which ones they are if others have another type."""
    text = f"the {dtype} images contain values up to {seen.high:.6g} of {top}, so they are dark"
    white = likely_largest(seen.high)
    if not files:
        return f'{text}. If they have fewer bits, set "value_range": [0, {white}]'
    return (
        f"{text} ({files}). Other images have another type, and value_range applies to all images, so do not set it: "
        f"if white is {white} in these files, convert them to 8 bits, or multiply them by {top} / {white}"
    )


def _unfitting_normalization(dataset: BaseDataSet, findings: Findings) -> list[str]:
    """Return a message if the mean and std in use leave images far from mean 0 and std 1."""
    std = np.array(dataset.std)
    shift, spread = (findings.mean - dataset.mean) / std, findings.std / std
    if (findings.std >= 0.01).all() and ((abs(shift) > 1).any() or (spread < 0.4).any() or (spread > 2.5).any()):
        return [
            f"mean and std do not fit: normalized images have mean {_numbers(shift)} and std {_numbers(spread)} per "
            'channel; set the values above, or "mean": "auto", "std": "auto" (keep those of a pretrained encoder)'
        ]
    return []


def _too_large_a_crop(dataset: BaseDataSet, findings: Findings) -> list[str]:
    """Return a message if training crops are wider and higher than every image."""
    plan = dataset.augmentation
    if plan is None or plan.crop_size is None:
        return []
    height, width = plan.crop_size
    # (width, height, count) after base_size has rescaled the images.
    sizes = [
        (w * scale, h * scale, count)
        for (w, h), count in findings.sizes.items()
        for scale in ((plan.base_size or max(w, h)) / max(w, h),)
    ]
    widest, highest = max(w for w, _, _ in sizes), max(h for _, h, _ in sizes)
    if widest >= width or highest >= height:
        return []
    factors = np.linspace(*plan.scale, 31)
    filled = sum(
        count * float((np.minimum(w * factors, width) * np.minimum(h * factors, height)).mean())
        for w, h, count in sizes
    )
    padding = 1 - filled / (width * height * findings.sizes.total())
    crop = str(height) if height == width else f"{height} x {width} (height x width)"
    brought = f" at base_size {plan.base_size}" if plan.base_size else ""
    better = max(_STRIDE, int(max(widest, highest)) // _STRIDE * _STRIDE)
    return [
        f"crop_size {crop} is larger than every image seen{brought} ({widest:.0f} x {highest:.0f}): "
        f"{padding:.0%} of a training crop is padding" + (f"; try {better}" if better < min(height, width) else "")
    ]
