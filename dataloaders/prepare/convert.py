"""Convert exports of labeling tools to images, masks and ``classes.txt`` for the Folder loader."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from base.classes import Color
from dataloaders.prepare.download import unpack
from dataloaders.prepare.export import Export, Images, Picture
from dataloaders.prepare.formats import FORMATS
from utils.errors import UserError, listed, plural, warn
from utils.files import write_text
from utils.images import voc_colormap, write_png
from utils.images.formats import orientation, read_bytes, upright_size
from utils.images.raster import upright
from utils.progress import progress_bar

VOID = 255
VOID_NAMES = ("void", "ignore", "ignored", "unlabeled", "unlabelled", "don't care", "dontcare")
BACKGROUND = "background"
_SHOWN = 10


@dataclass(frozen=True)
class Options:
    """Options of a conversion; see ``python -m dataloaders prepare --help``."""

    images: Path | None = None
    void: tuple[str, ...] = VOID_NAMES
    rest: str = "background"
    order: str = "file"
    link: bool = False


@dataclass
class Tally:
    """Counts for the summary of a conversion."""

    over: Counter[tuple[str, str]] = field(default_factory=Counter)  # (upper class, lower class): pixels covered
    over_images: Counter[tuple[str, str]] = field(default_factory=Counter)  # the same: images
    pixels: Counter[int] = field(default_factory=Counter)  # by class id, or 255
    empty: int = 0  # images without any annotation
    vanished: int = 0  # shapes that cover no pixel
    turned: dict[Path, int] = field(default_factory=dict)  # images whose EXIF turn is not in the size: orientation


def run(kind: str, source: Path, out: Path, options: Options) -> None:
    """Convert an export, ``kind`` of :data:`dataloaders.prepare.formats.FORMATS`, and print what was done.

    Raises:
        UserError: the export cannot be read, its images are missing, or ``out`` already contains images or masks.
    """
    if not source.exists():
        raise UserError(f"--from: there is no file or folder {source}")
    with TemporaryDirectory() as folder, TemporaryDirectory() as unpacked:
        if zipfile.is_zipfile(source):
            if options.link and options.images is None:
                raise UserError(f"--link: {source} is an archive; unpack it and pass its folder to --from")
            unpack(source, Path(folder))
            source = Path(folder)
        _run(kind, source, out, options, Path(unpacked))


def _run(kind: str, source: Path, out: Path, options: Options, unpacked: Path) -> None:
    for name in ("images", "masks"):
        if (out / name).exists() and any((out / name).iterdir()):
            raise UserError(f"--dir: {out / name} already contains files; choose an empty folder")
    images = Images(options.images or (source if source.is_dir() else source.parent), unpacked)
    export = FORMATS[kind](source, images)
    if not export.pictures:
        named = f"; the export names {images.missing[0]!r}" if images.missing else ""
        raise UserError(
            f"{source}: no annotated image was found in {images.folder}{named}. Give their folder with --images"
        )
    export.strip_names()
    classes = class_ids(export, options)
    tally = _write_whole(export, classes, out, options)
    print(summary(export, classes, tally, images.missing, out, options.rest))
    for text in [*similar_names(export, classes), *undecided_turns(tally), *found_elsewhere(images)]:
        warn(text)
    known = {_plain(name) for name in export.classes}
    for name in options.void if options.void != VOID_NAMES else ():
        if _plain(name) not in known:
            warn(f"--void: the export has no label {name!r}, only {listed(export.classes, _SHOWN)}")


def _write_whole(export: Export, classes: dict[str, int], out: Path, options: Options) -> Tally:
    """Write all files or none: into a hidden folder, whose contents are moved at the end."""
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(dir=out, prefix=".") as part:
            tally = write(export, classes, Path(part), options)
            for path in Path(part).iterdir():
                if (out / path.name).is_dir():
                    (out / path.name).rmdir()  # an empty folder
                path.rename(out / path.name)
        return tally
    finally:
        if is_new and not any(out.iterdir()):
            out.rmdir()


def class_ids(export: Export, options: Options) -> dict[str, int]:
    """Return label -> id: void labels get 255, the background (if there is one) 0, the others follow in order."""
    void = {_plain(name) for name in options.void}
    ids = {name: VOID for name in export.classes if _plain(name) in void}
    kept = [name for name in dict.fromkeys(export.classes) if name not in ids]
    behind = [name for name in kept if _plain(name) == BACKGROUND]
    draws = any(picture.ids is None for picture in export.pictures)
    if not behind and draws and options.rest == "background":
        behind = [BACKGROUND]
    kept = [*behind, *(name for name in kept if name not in behind)]
    if not kept:
        raise UserError(f"every label is void ({', '.join(export.classes)}); choose other labels with --void")
    if len(kept) > VOID:
        raise UserError(f"the export has {len(kept)} classes; masks can contain at most {VOID}")
    return {name: i for i, name in enumerate(kept)} | ids


def similar_names(export: Export, classes: dict[str, int]) -> list[str]:
    """Return a message for each group of classes whose names differ only in case, blanks or underscores."""
    shapes = Counter(label for picture in export.pictures for label, _ in picture.shapes)
    drawn = any(picture.ids is None for picture in export.pictures)
    groups: dict[str, list[str]] = {}
    for name, i in classes.items():
        if i != VOID:
            groups.setdefault(_plain(name).replace(" ", ""), []).append(name)
    return [
        "these classes differ only in case, blanks or underscores: "
        + ", ".join(f"{name!r}" + (f" ({plural(shapes[name], 'shape')})" if drawn else "") for name in names)
        + ". If they are one class, give it one name in the labeling tool and export again"
        for names in groups.values()
        if len(names) > 1
    ]


def undecided_turns(tally: Tally) -> list[str]:
    """Return a message if the size of some images does not say for which orientation they were annotated."""
    if not tally.turned:
        return []
    path, turn = next(iter(tally.turned.items()))
    return [
        f"EXIF data turns or mirrors {plural(len(tally.turned), 'image')}, such as {path} (orientation {turn}), "
        "and the size of the annotations does not show whether they were made before or after that. Assumed: after, "
        "on the image as viewers show it. Look at some masks; if they are turned, remove the EXIF orientation from "
        "these images and run prepare again"
    ]


def found_elsewhere(images: Images) -> list[str]:
    """Return a message if images were found by their names only, in other folders than the export says."""
    if not images.elsewhere:
        return []
    name, path = next(iter(images.elsewhere.items()))
    return [
        f"{plural(len(images.elsewhere), 'image')} found in a folder with another name than in the export, such as "
        f"{path} for {name!r}. If they are other images, pass the folder of the right ones with --images"
    ]


def _plain(name: str) -> str:
    return name.strip().strip("_").replace("_", " ").lower()


def write(export: Export, classes: dict[str, int], out: Path, options: Options) -> Tally:
    """Write the masks, the images and ``classes.txt``."""
    tally = Tally()
    targets = _targets(export)
    palette = _palette(export, classes)
    for picture, target in progress_bar(list(zip(export.pictures, targets, strict=True)), desc="convert", unit="image"):
        mask = _mask(picture, export, classes, options, tally)
        tally.pixels.update(dict(enumerate(np.bincount(mask.ravel(), minlength=256).tolist())))
        write_png(out / "masks" / target.with_suffix(".png"), mask, palette)
        copy = out / "images" / target
        copy.parent.mkdir(parents=True, exist_ok=True)
        if options.link and not picture.embedded:
            copy.symlink_to(os.path.abspath(picture.image))
        else:
            shutil.copyfile(picture.image, copy)
    kept = sorted((i, name) for name, i in classes.items() if i != VOID)
    lines = (" ".join(f"{value:3d}" for value in palette[i]) + f"  {name}\n" for i, name in kept)
    write_text(out / "classes.txt", "".join(lines))
    return tally


def _targets(export: Export) -> list[Path]:
    """Return the path of each image below ``images``: split and name; equal names also get the name of the folder."""
    is_split = any(picture.split for picture in export.pictures)
    stems = Counter((picture.split, picture.image.stem) for picture in export.pictures)
    targets = []
    for picture in export.pictures:
        path = picture.image
        name = path.name if stems[picture.split, path.stem] == 1 else f"{path.parent.name}_{path.name}"
        targets.append(Path(picture.split or "train", name) if is_split else Path(name))
    taken: dict[Path, Picture] = {}
    for target, picture in zip(targets, export.pictures, strict=True):
        place = target.with_suffix("")
        other = taken.setdefault(place, picture)
        if other.image == picture.image and other is not picture:
            raise UserError(f"the export contains {picture.image} twice; remove one of its annotations")
        if other is not picture:
            raise UserError(f"{other.image} and {picture.image} would both be written as {place}; rename one of them")
    return targets


def _palette(export: Export, classes: dict[str, int]) -> list[Color]:
    colors = list(voc_colormap(256))
    given = {i: export.colors[name] for name, i in classes.items() if name in export.colors and i != VOID}
    if len(set(given.values())) == len(given) == sum(i != VOID for i in classes.values()):
        colors[: len(given)] = [given[i] for i in sorted(given)]
    return colors


def _mask(picture: Picture, export: Export, classes: dict[str, int], options: Options, tally: Tally) -> np.ndarray:
    """Return the ids of an image, uint8 ``(H, W)``, upright."""
    data = read_bytes(picture.image)
    (height, width), turn = upright_size(data, picture.image), orientation(data)
    ids = None
    if picture.ids is not None:
        ids = np.array([classes[name] for name in export.classes], np.uint8)[picture.ids()]
    size = (ids.shape[1], ids.shape[0]) if ids is not None else picture.size or (width, height)
    is_turned = size != (width, height)
    if is_turned and not (turn >= 5 and size == (height, width)):
        raise UserError(
            f"{picture.image} is {width} x {height} (width x height), but its annotations are for {size[0]} x "
            f"{size[1]}; use the images that were labeled"
        )
    mask = _drawn(picture, size, classes, options, tally) if ids is None else ids
    if is_turned:
        return np.ascontiguousarray(upright(mask, turn))
    known = picture.ids is not None or picture.size is not None
    if turn > 1 and (turn < 5 or width == height or not known):
        tally.turned[picture.image] = turn
    return mask


def _drawn(
    picture: Picture, size: tuple[int, int], classes: dict[str, int], options: Options, tally: Tally
) -> np.ndarray:
    names = {i: name for name, i in classes.items()}
    rest = 0 if options.rest == "background" else VOID
    mask = np.full(size[::-1], rest, np.uint8)
    drawn = np.zeros(size[::-1], bool)
    areas = []
    for label, render in picture.shapes:
        try:
            areas.append((label, render(size[1], size[0])))
        except (ValueError, TypeError, KeyError, ArithmeticError) as error:
            raise UserError(f"{picture.image}: a shape of class {label!r} cannot be drawn: {error}") from None
    if options.order == "area":
        areas.sort(key=lambda area: -int(area[1].sum()))
    tally.empty += not areas
    pairs = set()
    for label, area in areas:
        new = classes[label]
        tally.vanished += not area.any()
        below = np.bincount(mask[area & drawn], minlength=256)
        for i in np.flatnonzero(below).tolist():
            if i != new:
                pair = (label, names[i] if i != VOID else "void")
                tally.over[pair] += int(below[i])
                pairs.add(pair)
        mask[area] = new
        drawn |= area
    tally.over_images.update(pairs)
    return mask


def summary(export: Export, classes: dict[str, int], tally: Tally, missing: list[str], out: Path, rest: str) -> str:
    """Return a text about the files written, overlapping classes, what was left out, and what to do next."""
    splits = Counter(picture.split for picture in export.pictures)
    parts = ", ".join(f"{n} {split}" for split, n in splits.items() if split)
    lines = [f"{plural(len(export.pictures), 'image')} written to {out}" + (f" ({parts})" if parts else "")]
    total = max(1, sum(tally.pixels.values()))
    lines += [f"{i:>4} {name}: {tally.pixels[i] / total:.2%} of the pixels" for name, i in classes.items() if i != VOID]
    void = [name for name, i in classes.items() if i == VOID]
    if void or tally.pixels[VOID]:
        what = f" ({', '.join(void)})" if void else ""
        lines.append(f"{VOID:>4} void{what}, ignored: {tally.pixels[VOID] / total:.2%} of the pixels")
    if tally.over:
        lines.append("overlaps (the first class is drawn over the second):")
        lines += [
            f"     {pair[0]} over {pair[1]}: {plural(pixels, 'pixel')} in {plural(tally.over_images[pair], 'image')}"
            for pair, pixels in tally.over.most_common(_SHOWN)
        ]
        if len(tally.over) > _SHOWN:
            lines.append(f"     and {len(tally.over) - _SHOWN} more pairs of classes")
    if tally.empty:
        lines.append(f"{plural(tally.empty, 'image')} without any annotation: all their pixels are {rest}")
    if tally.vanished:
        lines.append(f"{plural(tally.vanished, 'shape')} too small to contain the center of a pixel")
    lines += [f"left out: {plural(count, noun)} {why}" for (noun, why), count in export.left_out.items()]
    if missing:
        count = plural(len(missing), "annotated image")
        lines.append(f"left out: {count} (not found): {listed(missing, 3)}. Give their folder with --images")
    config = re.sub(r"\W+", "_", out.resolve().name) + ".json"
    lines += ["", f"next: python -m dataloaders plan --data-dir {shlex.quote(str(out))} --out {config}"]
    return "\n".join(lines)
