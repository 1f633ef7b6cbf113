"""The outputs for a segmented image: mask, overlay, probabilities, JSON.

Every file is written completely or not at all, and has a stamp that says which run wrote it (:mod:`utils.stamps`). The
mask is written last, so an image with a mask has all of its outputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch import Tensor

from utils import stamps
from utils.errors import UserError
from utils.facts import Facts
from utils.files import atomic, reason, write_bytes, write_text
from utils.images.palette import overlay, write_mask
from utils.inference.table import Row, Table
from utils.predict.files import write_classes, write_probs
from utils.predict.segmentation import Segmentation
from utils.predict.spool import Spool

_JPEG_LARGEST_SIDE = 65500


@dataclass(frozen=True)
class Wanted:
    """Outputs in addition to the masks."""

    opacity: float | None = None  # of overlays; None: no overlays
    probs: str | None = None  # "npz" (see utils.predict.files), "png" (8 bits per class), or None
    json: bool = False  # a JSON file per image
    masks: bool = False  # the overlapping masks, a PNG per class


@dataclass(frozen=True)
class Decoding:
    """What the outputs say about how they were made."""

    procedure: str
    metric: str = "dice"  # what expected scores are of, or "iou"
    digest: str = stamps.NO_RUN  # of the model and all options that masks depend on
    probs_digest: str = stamps.NO_RUN  # of those that probabilities depend on
    why_empty: str = ""  # why RankDice may leave an image without a mask


@dataclass
class Outputs:
    """Writes the outputs of images into a folder."""

    folder: Path  # is created as needed
    facts: Facts  # the classes' names and colors
    made: Decoding
    wanted: Wanted = Wanted()
    force: bool = False  # replace files that this program did not write
    video: Callable[[np.ndarray], None] | None = None  # takes the overlays of frames, instead of a picture each

    @property
    def table(self) -> Table:
        """The table of expected scores."""
        return Table(self.folder, self.facts, self.made.metric)

    def mask_path(self, name: str) -> Path:
        """Return where the mask of an image goes."""
        return self.folder / f"{name}.png"

    def _outputs(self, name: str) -> dict[Path, str | None]:
        """Return every output that an image may have, with the stamp of this run; None: not requested.

        ``NAME_probs`` and ``NAME_masks`` are folders with a PNG per class.
        """
        wanted, made = self.wanted, self.made
        shown = wanted.opacity is not None and self.video is None
        outputs = {
            ".npz": made.probs_digest if wanted.probs == "npz" else None,
            "_probs": made.probs_digest if wanted.probs == "png" else None,
            "_masks": made.digest if wanted.masks else None,
            ".json": made.digest if wanted.json else None,
            "_overlay.jpg": self._overlay_digest if shown else None,
            ".png": made.digest,
        }
        return {self.folder / f"{name}{end}": stamp for end, stamp in outputs.items()}

    @property
    def _overlay_digest(self) -> str:
        return stamps.digest({"run": self.made.digest, "opacity": self.wanted.opacity})

    def exists(self, name: str) -> bool:
        """Return whether a run with this model and these options has written all requested outputs of an image."""
        outputs = self._outputs(name).items()
        return all(stamp is None or all(stamps.stamp_of(p) == stamp for p in _files(path)) for path, stamp in outputs)

    def refuse_foreign(self, names: Iterable[str]) -> None:
        """Raise UserError if an output of these images would replace a file that this program did not write."""
        if not self.force:
            wanted = (path for name in names for path, own in self._outputs(name).items() if own is not None)
            stamps.refuse_foreign((file for path in wanted for file in _files(path, "*")), self.folder)

    def _remove(self, name: str, failed: bool = False) -> None:
        """Remove outputs of earlier runs that this run does not write; if the image failed, also those of this run."""
        for path, own in self._outputs(name).items():
            if failed == (own is None):
                continue
            kept = (None,) if path.is_dir() else (None, self.made.digest, self.made.probs_digest)
            for file in _files(path):
                stamp = stamps.stamp_of(file)
                if stamp == own if failed else stamp not in kept:
                    file.unlink(missing_ok=True)
            if path.is_dir():
                with suppress(OSError):
                    path.rmdir()

    def write(self, name: str, source: str, image: np.ndarray | None, result: Segmentation) -> Row | None:
        """Write everything of one image; return its line for the table, if the procedure expects a score.

        ``image`` may be drawn over. If a file cannot be written, those already written of the image are removed.

        Raises:
            UserError: a file could not be written, or one is in the way.
        """
        with closing(result):
            self.refuse_foreign([name])
            try:
                if self.wanted.opacity is not None:
                    assert image is not None
                    self._write_overlay(name, image, result.labels, self.wanted.opacity)
                if self.wanted.probs:
                    assert result.probs is not None
                    self._write_probs(name, result.probs)
                if self.wanted.masks:
                    self._write_class_masks(name, result)
                row = self._row(source, result)
                if self.wanted.json:
                    text = json.dumps(self._describe(source, result, row), indent=2, ensure_ascii=False)
                    write_text(self.folder / f"{name}.json", f"{text}\n")
                write_mask(self.mask_path(name), result.labels, self.facts.palette, stamps.text(self.made.digest))
                self._remove(name)
            except (OSError, UserError) as error:
                self._remove(name, failed=True)
                cause = reason(error) if isinstance(error, OSError) else error
                raise UserError(f"{source}: its outputs could not be written: {cause}") from None
        return row

    def _write_overlay(self, name: str, image: np.ndarray, labels: np.ndarray, opacity: float) -> None:
        picture = overlay(image, labels, self.facts.palette, opacity, in_place=True)
        cv2.cvtColor(picture, cv2.COLOR_RGB2BGR, dst=picture)
        if self.video is not None:
            self.video(picture)
            return
        shrink = max(picture.shape[:2]) / _JPEG_LARGEST_SIDE
        if shrink > 1:
            picture = cv2.resize(picture, None, fx=1 / shrink, fy=1 / shrink, interpolation=cv2.INTER_AREA)
        data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
        write_bytes(self.folder / f"{name}_overlay.jpg", stamps.jpeg(data, self._overlay_digest))

    def _write_probs(self, name: str, probs: Tensor | Spool) -> None:
        if self.wanted.probs == "npz":
            write_probs(self.folder / f"{name}.npz", probs, self.made.probs_digest)
            return

        def picture(c: int) -> np.ndarray:
            planes = probs.planes(c) if isinstance(probs, Spool) else [probs[c].numpy()]
            # rounded, so that 0 and 1 stay what they are
            return np.concatenate([np.rint(p.astype(np.float32) * 255).astype(np.uint8) for p in planes])

        pictures = ((c, picture(c)) for c in range(probs.shape[0]))
        write_classes(self.folder / f"{name}_probs", self.facts, pictures, self.made.probs_digest)

    def _write_class_masks(self, name: str, result: Segmentation) -> None:
        masks, volumes = result.masks, result.volumes
        assert masks is not None
        found = (c for c in range(self.facts.num_classes) if volumes is None or volumes[c])
        pictures = ((c, mask.astype(np.uint8) * 255) for c in found if (mask := masks[c]).any())
        write_classes(self.folder / f"{name}_masks", self.facts, pictures, self.made.digest)

    def _row(self, source: str, result: Segmentation) -> Row | None:
        if result.scores is None or result.volumes is None:
            return None
        scores = tuple(
            float(s) if v else None for s, v in zip(result.scores.tolist(), result.volumes.tolist(), strict=True)
        )
        return Row(source, result.expected, scores, _presence(result))

    def _describe(self, source: str, result: Segmentation, row: Row | None) -> dict[str, Any]:
        classes, metric = self.facts.num_classes, f"expected_{self.made.metric}"
        labels, names, presence, entries = _count_labels(result.labels), self.facts.label_names, _presence(result), []
        for label in range(max(2, classes)):
            pixels, c = int(labels[label]), label - (classes == 1)
            entry: dict[str, Any] = {"id": label, "name": names[label], "pixels": pixels}
            if row is not None and result.volumes is not None and c >= 0:
                entry |= {metric: row.per_class[c], "mask_pixels": int(result.volumes[c])}
            if presence and c >= 0:
                entry["presence"] = presence[c]
            if pixels or entry.get("mask_pixels"):
                entries.append(entry)
        height, width = result.labels.shape
        described = {"written_by": stamps.text(self.made.digest), "image": source, "width": width, "height": height}
        described |= {"procedure": self.made.procedure} | ({} if row is None else {metric: row.expected})
        unassigned = int(labels[max(2, classes) :].sum())
        return described | {"classes": entries, "unassigned_pixels": unassigned}


@contextmanager
def overlay_video(path: Path, rate: float, digest: str = stamps.NO_RUN) -> Iterator[Callable[[np.ndarray], None]]:
    """Give a function that adds a picture, uint8 ``(H, W, 3)`` BGR, to a video; the file is there if all went well.

    Args:
        path: where to; ``.mp4``.
        rate: frames per second.
        digest: of the run, for the stamp.
    """
    writer: cv2.VideoWriter | None = None
    with ExitStack() as files:

        def append(picture: np.ndarray) -> None:
            nonlocal writer
            if writer is None:
                temporary = files.enter_context(atomic(path, path.suffix))
                size = (picture.shape[1], picture.shape[0])
                writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
                files.callback(stamps.append_mp4, temporary, digest)
                files.callback(writer.release)
                if not writer.isOpened():
                    raise UserError(f"{path}: this build of OpenCV cannot write mp4 video; remove --overlay")
            writer.write(picture)

        yield append


def _files(path: Path, pattern: str = "*.png") -> list[Path]:
    """Return the files of an output: the file itself, or those in a folder."""
    return list(path.glob(pattern)) if path.is_dir() else [path]


def _presence(result: Segmentation) -> tuple[float | None, ...]:
    """Return the presence of each class, None for classes of no interest; empty if it is not known."""
    values = [] if result.presence is None else result.presence.tolist()
    return tuple(None if value != value else value for value in values)


def _count_labels(labels: np.ndarray, rows: int = 256) -> np.ndarray:
    """Return how often each label occurs; a few rows at a time, since ``bincount`` makes int64 of all it is given."""
    counts = np.zeros(int(np.iinfo(labels.dtype).max) + 1, np.int64)
    for y in range(0, len(labels), rows):
        counts += np.bincount(labels[y : y + rows].ravel(), minlength=len(counts))
    return counts
