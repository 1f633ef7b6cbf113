"""What is written for a segmented image: mask, overlay, probabilities, JSON; and the table over all images.

Every file is complete or not there: it is written beside its place under another name and renamed. The mask comes
last, so an image whose mask is there has all of its outputs.
"""

from __future__ import annotations

import csv
import json
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch import Tensor

from utils.errors import UserError
from utils.facts import Facts
from utils.files import atomic, csv_text, reason, unescape, write_bytes, write_text
from utils.images import write_png
from utils.images.palette import overlay, write_mask
from utils.predict.spool import Spool
from utils.predictor import Segmentation

_JPEG_LARGEST_SIDE = 65500


@dataclass(frozen=True)
class Row:
    """One line of the table of expected scores: an image, its mean, and the score per class (None: no mask)."""

    image: str
    expected: float | None
    per_class: tuple[float | None, ...]


@dataclass
class Outputs:
    """Writes what was asked for into a folder.

    Args:
        folder: where to; made as needed.
        facts: the classes' names and colours.
        procedure: for the JSON files.
        metric: what expected scores are of, "dice" or "iou".
        opacity: of overlays; None: no overlays.
        probs: "npz" (float16, key ``probs``), "png" (8 bits per class), or None.
        json: whether to write a JSON file per image.
        video: where overlays of frames go instead of a picture each.
    """

    folder: Path
    facts: Facts
    procedure: str
    metric: str = "dice"
    opacity: float | None = None
    probs: str | None = None
    json: bool = False
    video: OverlayVideo | None = field(default=None)

    def mask_path(self, name: str) -> Path:
        """Return where the mask of an image goes."""
        return self.folder / f"{name}.png"

    def exists(self, name: str) -> bool:
        """Return whether an earlier run has written all that is wanted of an image."""
        wanted = [self.mask_path(name)]
        if self.opacity is not None and self.video is None:
            wanted.append(self.folder / f"{name}_overlay.jpg")
        if self.probs:
            wanted.append(self.folder / (f"{name}.npz" if self.probs == "npz" else f"{name}_probs"))
        if self.json:
            wanted.append(self.folder / f"{name}.json")
        return all(path.exists() for path in wanted)

    def write(self, name: str, source: str, image: np.ndarray | None, result: Segmentation) -> Row | None:
        """Write everything of one image; return its line for the table, where the procedure expects a score.

        ``image`` may be drawn over. Files already written of an image are removed again when a later one fails.

        Raises:
            UserError: a file could not be written.
        """
        written: list[Path] = []
        try:
            if self.opacity is not None:
                assert image is not None
                self._write_overlay(name, image, result.labels, self.opacity, written)
            if self.probs:
                assert result.probs is not None
                self._write_probs(name, result.probs, written)
            row = self._row(source, result)
            if self.json:
                written.append(self.folder / f"{name}.json")
                text = json.dumps(self._describe(source, result, row), indent=2, ensure_ascii=False)
                write_text(written[-1], f"{text}\n")
            write_mask(self.mask_path(name), result.labels, self.facts.palette)
        except (OSError, UserError) as error:
            cause = reason(error) if isinstance(error, OSError) else error
            for path in written:
                path.unlink(missing_ok=True)
            if self.probs == "png":
                with suppress(OSError):
                    (self.folder / f"{name}_probs").rmdir()
            raise UserError(f"{source}: its outputs could not be written: {cause}") from None
        finally:
            if isinstance(result.probs, Spool):
                result.probs.close()
        return row

    def _write_overlay(
        self, name: str, image: np.ndarray, labels: np.ndarray, opacity: float, written: list[Path]
    ) -> None:
        picture = overlay(image, labels, self.facts.palette, opacity, in_place=True)
        cv2.cvtColor(picture, cv2.COLOR_RGB2BGR, dst=picture)
        if self.video is not None:
            self.video.append(picture)
            return
        written.append(self.folder / f"{name}_overlay.jpg")
        shrink = max(picture.shape[:2]) / _JPEG_LARGEST_SIDE
        if shrink > 1:
            picture = cv2.resize(picture, None, fx=1 / shrink, fy=1 / shrink, interpolation=cv2.INTER_AREA)
        write_bytes(written[-1], cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes())

    def _write_probs(self, name: str, probs: Tensor | Spool, written: list[Path]) -> None:
        if self.probs == "npz":
            written.append(self.folder / f"{name}.npz")
            write_npz(written[-1], probs)
            return
        classes = probs.shape[0]
        for c in range(classes):
            planes = probs.planes(c) if isinstance(probs, Spool) else [probs[c].numpy()]
            # float16 to 8 bits: rounded, so that 0 and 1 stay what they are
            plane = np.concatenate([np.rint(p.astype(np.float32) * 255).astype(np.uint8) for p in planes])
            written.append(self.folder / f"{name}_probs" / f"{c:03d}_{_file_name(self._class_name(c))}.png")
            write_png(written[-1], plane)

    def _class_name(self, c: int) -> str:
        return self.facts.class_names[c] if c < len(self.facts.class_names) else f"class {c}"

    def _label_name(self, label: int) -> str:
        """Return a label's name: with one channel, label 1 is the class and 0 its background."""
        if self.facts.num_classes > 1:
            return self._class_name(label)
        return (
            self._class_name(label) if len(self.facts.class_names) > 1 else ["background", self._class_name(0)][label]
        )

    def _row(self, source: str, result: Segmentation) -> Row | None:
        if result.scores is None or result.volumes is None:
            return None
        scores = tuple(
            float(s) if v else None for s, v in zip(result.scores.tolist(), result.volumes.tolist(), strict=True)
        )
        return Row(source, result.expected, scores)

    def _describe(self, source: str, result: Segmentation, row: Row | None) -> dict[str, Any]:
        labels = _count_labels(result.labels)
        single = self.facts.num_classes == 1
        classes = []
        for label in range(2 if single else self.facts.num_classes):
            pixels = int(labels[label])
            entry: dict[str, Any] = {"id": label, "name": self._label_name(label), "pixels": pixels}
            channel = label - 1 if single else label
            if row is not None and result.volumes is not None and channel >= 0:
                entry[f"expected_{self.metric}"] = row.per_class[channel]
                entry["mask_pixels"] = int(result.volumes[channel])
            if pixels or entry.get("mask_pixels"):
                classes.append(entry)
        height, width = result.labels.shape
        described = {"image": source, "width": width, "height": height, "procedure": self.procedure}
        if row is not None:
            described[f"expected_{self.metric}"] = row.expected
        return described | {"classes": classes, "unassigned_pixels": int(labels[self._known :].sum())}

    @property
    def _known(self) -> int:
        return max(2, self.facts.num_classes)

    # ------------------------------------------------------------------------------------------ the table

    @property
    def table_path(self) -> Path:
        """Return where the table of expected scores goes."""
        return self.folder / f"expected_{self.metric}.csv"

    def write_table(self, rows: Iterable[Row], keep: Iterable[str] = ()) -> list[Row]:
        """Write the table of expected scores, worst image first, and return its rows.

        Lines of an earlier table are kept for the images ``keep`` (those skipped now because they are done).
        """
        rows = list(rows)
        known = {row.image for row in rows}
        wanted = set(keep) - known
        rows += [row for row in self._read_table() if row.image in wanted]
        rows.sort(key=lambda row: (row.expected is None, row.expected or 0.0, row.image))
        names = [self._class_name(c) for c in range(self.facts.num_classes)]
        table = [["image", f"expected_{self.metric}", *names]]
        for row in rows:
            table.append([row.image, *("" if s is None else f"{s:.6f}" for s in (row.expected, *row.per_class))])
        write_text(self.table_path, csv_text(table))
        return rows

    def _read_table(self) -> Iterator[Row]:
        if not self.table_path.is_file():
            return
        with self.table_path.open(encoding="utf-8", newline="") as file:
            lines = csv.reader(file)
            header = next(lines, [])
            if len(header) != 2 + self.facts.num_classes:
                return  # of another model
            for image, *scores in lines:
                expected, *per_class = (float(s) if s else None for s in scores)
                yield Row(unescape(image), expected, tuple(per_class))


class OverlayVideo:
    """Overlays of frames as a video file, a context manager: the file has its name only once all went well.

    Args:
        path: where to; ``.mp4``.
        rate: frames per second.
    """

    def __init__(self, path: Path, rate: float) -> None:
        self.path, self.rate = path, rate
        self._writer: cv2.VideoWriter | None = None
        self._file = ExitStack()

    def __enter__(self) -> OverlayVideo:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._writer is not None:
            self._writer.release()
            self._writer = None
        self._file.__exit__(*error)

    def append(self, picture: np.ndarray) -> None:
        """Add a picture, uint8 ``(H, W, 3)`` BGR."""
        if self._writer is None:
            temporary = self._file.enter_context(atomic(self.path, self.path.suffix))
            size = (picture.shape[1], picture.shape[0])
            self._writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter.fourcc(*"mp4v"), self.rate, size)
            if not self._writer.isOpened():
                raise UserError(f"{self.path}: this build of OpenCV cannot write mp4 video; leave --overlay out")
        self._writer.write(picture)


def write_npz(path: Path, probs: Tensor | Spool) -> None:
    """Write probabilities as ``numpy.savez_compressed(path, probs=...)`` would, float16 ``(C, H, W)``, in small pieces.

    The file is complete or not there.
    """
    header = {"descr": "<f2", "fortran_order": False, "shape": tuple(probs.shape)}
    with (
        atomic(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("probs.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        for c in range(probs.shape[0]):
            planes = probs.planes(c) if isinstance(probs, Spool) else [probs[c].half().numpy()]
            for plane in planes:
                member.write(np.ascontiguousarray(plane).data)


def _count_labels(labels: np.ndarray, rows: int = 256) -> np.ndarray:
    """Return how often each label occurs; a few rows at a time, since ``bincount`` makes int64 of all it is given."""
    counts = np.zeros(int(np.iinfo(labels.dtype).max) + 1, np.int64)
    for y in range(0, len(labels), rows):
        counts += np.bincount(labels[y : y + rows].ravel(), minlength=len(counts))
    return counts


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in text)


def check_folder(folder: Path) -> None:
    """Make the output folder and see that files can be written into it.

    Raises:
        UserError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--output {folder}: there is a file of that name; a folder is needed") from None
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written to: {reason(error)}") from None


def worst(rows: Sequence[Row]) -> Row | None:
    """Return the image with the lowest expected score of a sorted table."""
    return next((row for row in rows if row.expected is not None), None)
