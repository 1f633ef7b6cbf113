"""``python -m dataloaders check``: look at the data of a config before training on it."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

import dataloaders
from base.base_dataset import BaseDataSet
from base.entries import Sample
from base.statistics import mean_and_std, moments
from dataloaders.check.sheet import contact_sheet
from utils.config import load
from utils.config.schema import Component, Config
from utils.errors import DataFolderError, UserError, plural
from utils.images import write_png

DEFAULT_SAMPLES = 500
PROBLEMS_EXIT_CODE = 1
_SHEET_SAMPLES = 12
_SHOWN = 10
_NAMED = 3
_STRIDE = 32  # of the networks: crops are best multiples of it
_NOT_TAKEN = ("cache", "on_error", "sampler", "num_workers", "val_split", "drop_last")


def main(args: argparse.Namespace) -> int:
    """Run the subcommand; return 0, or 1 when something is wrong with the data."""
    if args.samples is not None and args.samples < 0:
        raise UserError(f"--samples: found {args.samples}; give a number of images, or 0 for all")
    config = load(args.config, args.set)
    stages = ("train", "val", "test") if args.loader == "all" else (args.loader,)
    opened = list(open_stages(config, stages))
    sheets, wrong, summary = [], False, []
    for stage, component, dataset in opened:
        findings = inspect(dataset, DEFAULT_SAMPLES if args.samples is None else args.samples)
        print(report(stage, component, dataset, findings))
        wrong |= bool(findings.problems or findings.illegal)
        summary.append(f"{stage}_loader: {_count_of_problems(findings)}")
        pictures = draw(dataset, findings)
        if pictures:
            sheets.append((f"{stage}: {component.type}, {dataset.split}", pictures, dataset))
    for message in shared_images(opened):
        print(f"warning: {message}")
    if sheets:
        write_png(args.out, contact_sheet(sheets))
        print(f"\ncontact sheet: {args.out}")
    if wrong:
        print("", *summary, sep="\n")
    return PROBLEMS_EXIT_CODE if wrong else 0


def open_stages(config: Config, stages: tuple[str, ...]) -> Iterator[tuple[str, Component, BaseDataSet]]:
    """Yield (stage, loader of the config, data set) of each stage that has a loader of its own.

    Broken files must not stop the look at the others, so ``on_error`` is "skip" whatever the config says.
    """
    seen: list[Component] = []
    for stage in stages:
        component = config.loader(stage)
        if component is None or component in seen:
            continue
        seen.append(component)
        path = f"{stage}_loader.args"
        args = {name: value for name, value in component.args.items() if name not in _NOT_TAKEN}
        try:
            loader = dataloaders.build(
                component.type,
                **args,
                on_error="skip",
                num_workers=0,
                seed=config.seed,
                ignore_index=config.ignore_index,
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: {error}") from error
        except DataFolderError as error:
            raise UserError(f"{path}.data_dir: {error}") from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        yield stage, component, loader.dataset


@dataclass
class Findings:
    """What a look at some samples of a data set showed.

    Attributes:
        looked_at: indices of the samples.
        good: those of them that could be read.
        sizes: (width, height) -> images.
        stored: value in the label files -> pixels, as they are before translation.
        illegal: stored value that is no class -> the first file with it.
        problems: one message per file that cannot be used.
        alike: what such messages say beside their files and counts -> (name of the sample, message) of each.
        pixels: per class id, and last for ignored ones.
        images: in how many images each of these occurs.
        mean, std: of the images per channel, intensities in [0, 1].
        weights: what the loss's ``"weight": "balanced"`` comes to on these samples; empty without labelled pixels.
    """

    looked_at: list[int]
    good: list[int] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    stored: Counter[int] = field(default_factory=Counter)
    illegal: dict[int, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    alike: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(0))
    images: np.ndarray = field(default_factory=lambda: np.zeros(0))
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    std: np.ndarray = field(default_factory=lambda: np.zeros(0))
    weights: list[float] = field(default_factory=list)


@dataclass
class _Look:
    """One sample's share of the findings."""

    index: int
    size: tuple[int, int] | None = None
    stored: tuple[np.ndarray, np.ndarray] | None = None
    counts: np.ndarray | None = None
    moments: np.ndarray | None = None
    problem: str | None = None


def inspect(dataset: BaseDataSet, samples: int = 0) -> Findings:
    """Read ``samples`` images and label maps, evenly spread over the set (0: all), and gather what is found."""
    count = min(samples or len(dataset), len(dataset))
    findings = Findings(np.linspace(0, len(dataset) - 1, count).astype(int).tolist())
    findings.pixels = np.zeros(dataset.label_count + 1, np.int64)
    findings.images = np.zeros(dataset.label_count + 1, np.int64)
    found_moments = []
    with ThreadPoolExecutor(max_workers=4) as pool:
        looks = pool.map(lambda index: _look(dataset, index), findings.looked_at)
        for look in tqdm(looks, total=count, desc=f"read {dataset.split}", unit="image", disable=None):
            _add(findings, look, dataset)
            if look.moments is not None:
                found_moments.append(look.moments)
    findings.mean, findings.std = mean_and_std(found_moments or [np.zeros((3, dataset.in_channels))])
    if findings.pixels[:-1].any():
        findings.weights = [float(weight) for weight in dataset.class_weights(count)]
    return findings


def _look(dataset: BaseDataSet, index: int) -> _Look:
    look = _Look(index)
    entry = dataset.entries[index]
    try:
        if entry.label is not None:
            stored = dataset.load_label(entry.label)
            look.stored = _histogram(stored)
        image, label = dataset.read(index)
    except UserError as error:
        look.problem = str(error)
        return look
    look.size = (label.shape[1], label.shape[0])
    ignored = label == dataset.ignore_index
    counts = np.bincount(label[~ignored], minlength=dataset.label_count)
    look.counts = np.append(counts, ignored.sum())
    look.moments = moments(image)
    return look


def _histogram(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values that occur and how often."""
    if stored.dtype != np.uint8:
        return np.unique(stored, return_counts=True)
    counts = np.bincount(stored.reshape(-1), minlength=256)
    values = np.flatnonzero(counts)
    return values, counts[values]


def _add(findings: Findings, look: _Look, dataset: BaseDataSet) -> None:
    if look.stored is not None:
        for value, pixels in zip(*(part.tolist() for part in look.stored), strict=True):
            if value not in findings.stored and not is_legal(dataset, value):
                findings.illegal[value] = str(dataset.entries[look.index].label)
            findings.stored[value] += pixels
    if look.problem is not None:
        findings.problems.append(look.problem)
        entry = dataset.entries[look.index]
        kind = re.sub(r"\d+ pixels?\b", "", look.problem)
        for path in (entry.image, entry.label):
            kind = kind.replace(str(path), "")
        findings.alike.setdefault(kind, []).append((entry.name, look.problem))
        return
    assert look.size is not None
    assert look.counts is not None
    findings.good.append(look.index)
    findings.sizes[look.size] += 1
    findings.pixels += look.counts
    findings.images += look.counts > 0


def is_legal(dataset: BaseDataSet, value: int) -> bool:
    """Say whether a stored label value stands for a class or for "not labelled"."""
    probe = np.full((1, 1), value, np.uint8 if 0 <= value <= 255 else np.int32)
    try:
        dataset.label_table.translate(probe, "")
    except UserError:
        return False
    return True


# ---- the report


def report(stage: str, component: Component, dataset: BaseDataSet, findings: Findings) -> str:
    """Return the findings as text."""
    where = component.args.get("data_dir", "generated")
    looked_at = len(findings.looked_at)
    of_all = "all of them" if looked_at == len(dataset) else f"{looked_at} of them, evenly spread"
    lines = [
        f"\n== {stage}_loader: {component.type}, split {dataset.split!r}, {where}",
        f"pairs           {len(dataset)} (looked at {of_all})",
        *(_alone(dataset) if dataset.layout else ()),
        f"sizes           {_sizes(findings.sizes)}",
    ]
    if findings.stored:
        lines.append(f"stored values   {_values(findings)}")
    if findings.good:
        lines += ["", *_class_table(dataset, findings), "", *_suggestions(stage, dataset, findings)]
    lines += [f"warning: {text}" for text in warnings(dataset, findings)]
    return "\n".join([*lines, *_problems(findings)])


def _problems(findings: Findings) -> list[str]:
    """Return each kind of problem once: its first message, and how many samples have it, with a few of them."""
    if not findings.problems:
        return ["no file with a problem"]
    lines = []
    groups = list(findings.alike.values())
    for group in groups[:_SHOWN]:
        lines.append(f"problem: {group[0][1]}")
        if len(group) > 1:
            names = ", ".join(name for name, _ in group[:_NAMED])
            more = ", ..." if len(group) > _NAMED else ""
            lines.append(f"         {len(group)} files have this problem: {names}{more}")
    left = sum(map(len, groups[_SHOWN:]))
    if left:
        lines.append(f"problem: ... and {plural(left, 'file')} more")
    return lines


def _count_of_problems(findings: Findings) -> str:
    count = len(findings.problems)
    return f"{plural(count, 'file')} with a problem, see above" if count else "no file with a problem"


def _alone(dataset: BaseDataSet) -> list[str]:
    alone = getattr(dataset, "alone", [])
    if not alone:
        return ["no partner      none"]
    more = [f"                ... and {len(alone) - _SHOWN} more"] if len(alone) > _SHOWN else []
    first, *rest = (str(path) for path in alone[:_SHOWN])
    return [f"no partner      {first}", *(f"                {path}" for path in rest), *more]


def _sizes(sizes: Counter[tuple[int, int]]) -> str:
    if not sizes:
        return "of no image: none could be used"
    if len(sizes) <= 3:
        return ", ".join(f"{w}x{h} ({plural(n, 'image')})" for (w, h), n in sizes.most_common())
    every = np.repeat(np.array(list(sizes)), list(sizes.values()), axis=0)
    low, middle, high = (np.percentile(every, q, axis=0, method="nearest") for q in (0, 50, 100))
    return (
        f"{len(sizes)} different; width {low[0]} to {high[0]} (median {middle[0]}), "
        f"height {low[1]} to {high[1]} (median {middle[1]})"
    )


def _values(findings: Findings) -> str:
    shown = [f"{v}{' (ILLEGAL)' if v in findings.illegal else ''}" for v in sorted(findings.stored)]
    return ", ".join(shown[:40]) + (f", ... ({len(shown)} values)" if len(shown) > 40 else "")


def _class_table(dataset: BaseDataSet, findings: Findings) -> list[str]:
    names = class_labels(dataset)
    share = findings.pixels / max(1, findings.pixels.sum())
    weights = [f"{w:.3f}" for w in findings.weights] or [""] * len(names)
    width = max(len(name) for name in (*names, "not labelled"))
    lines = [f"{'id':>4} {'class':<{width}} {'pixels':>9} {'images':>7} {'weight':>8}"]
    rows = zip([*range(len(names)), dataset.ignore_index], [*names, "not labelled"], [*weights, ""], strict=True)
    for position, (i, name, weight) in enumerate(rows):
        lines.append(f"{i:>4} {name:<{width}} {share[position]:>9.4%} {findings.images[position]:>7} {weight:>8}")
    return lines


def class_labels(dataset: BaseDataSet) -> list[str]:
    """Return a name per label id; a single class has an unnamed background before it."""
    names = list(dataset.class_names)
    return names if len(names) == dataset.label_count else ["(background)", *names]


def _suggestions(stage: str, dataset: BaseDataSet, findings: Findings) -> list[str]:
    """Return arguments to paste into a config; weights only from data that is trained on."""
    weights = json.dumps([round(w, 3) for w in findings.weights])
    of_loss = [f'weights         loss args {{"weight": {weights}}}, or "balanced"'] if stage == "train" else []
    return [
        *of_loss,
        f'mean and std    "mean": {_numbers(findings.mean)}, "std": {_numbers(findings.std)}',
        f"used at present {_numbers(dataset.mean)}, {_numbers(dataset.std)}",
    ]


def _numbers(values: Iterable[float]) -> str:
    return json.dumps([round(float(v), 4) for v in values])


def warnings(dataset: BaseDataSet, findings: Findings) -> list[str]:
    """Return what is suspicious though not wrong."""
    found = []
    names, total = class_labels(dataset), findings.pixels.sum()
    if 0 <= dataset.ignore_index < dataset.label_count:
        found.append(
            f"ignore_index {dataset.ignore_index} is also the id of {names[dataset.ignore_index]!r}, whose pixels "
            "so count nowhere"
        )
    if findings.good:
        never = [names[i] for i in np.flatnonzero(findings.pixels[:-1] == 0)]
        if never:
            more = f" and {len(never) - _SHOWN} more" if len(never) > _SHOWN else ""
            found.append(f"no pixel of {', '.join(never[:_SHOWN])}{more} in what was looked at")
        if findings.pixels[-1] > 0.5 * total:
            found.append(f"{findings.pixels[-1] / total:.0%} of all pixels are not labelled")
        if np.isfinite(findings.std).all() and (findings.std < 0.01).any():
            found.append("the images hardly vary in brightness: are they 12 or 16 bit data stored without scaling?")
        found += _too_large_a_crop(dataset, findings)
    return found


def _too_large_a_crop(dataset: BaseDataSet, findings: Findings) -> list[str]:
    """Return a message where training crops are larger, both ways, than every image seen."""
    plan = dataset.augmentation
    if plan is None or plan.crop_size is None:
        return []
    height, width = plan.crop_size
    # As base_size brings the images; (width, height) like the sizes.
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


def shared_images(opened: list[tuple[str, Component, BaseDataSet]]) -> list[str]:
    """Return a message for each two stages that have image files in common, which makes scores worthless."""
    files = {
        stage: {str(entry.image.resolve()) for entry in dataset.entries if entry.image is not None}
        for stage, _, dataset in opened
    }
    stages = list(files)
    messages = []
    for i, first in enumerate(stages):
        for second in stages[i + 1 :]:
            common = files[first] & files[second]
            if common and "train" in (first, second):
                messages.append(f"{first} and {second} have {len(common)} images in common, such as {min(common)}")
    return messages


def draw(dataset: BaseDataSet, findings: Findings) -> list[Sample]:
    """Return some samples as the network will see them: augmented, cropped, or whole."""
    chosen = np.linspace(0, len(findings.good) - 1, min(_SHEET_SAMPLES, len(findings.good))).astype(int)
    samples = (dataset[findings.good[i]] for i in chosen)
    return [sample for sample in samples if isinstance(sample, Sample)]
