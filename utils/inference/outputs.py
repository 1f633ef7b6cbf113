"""What is written for a segmented image: mask, overlay, probabilities, JSON.

Every file is written whole or not at all, and has a stamp that says which run wrote it (:mod:`utils.stamps`). The mask
is written last, so an image with a mask has all of its outputs.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
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
from utils.images import write_png
from utils.images.palette import overlay, write_mask
from utils.inference.table import Row, Table
from utils.predict.files import class_file, write_class_masks, write_probs
from utils.predict.segmentation import Segmentation
from utils.predict.spool import Spool

_JPEG_LARGEST_SIDE = 65500


@dataclass(frozen=True)
class Wanted:
    """What is written in addition to the masks.

    Attributes:
        opacity: of overlays; None: no overlays.
        probs: "npz" (see :mod:`utils.predict.files`), "png" (8 bits per class), or None.
        json: a JSON file per image.
        masks: the overlapping masks, a PNG per class.
    """

    opacity: float | None = None
    probs: str | None = None
    json: bool = False
    masks: bool = False


@dataclass(frozen=True)
class Run:
    """What the outputs say about the run.

    Attributes:
        procedure: its name.
        metric: what expected scores are of, "dice" or "iou".
        digest: of the model and all options that masks depend on.
        probs_digest: of those that probabilities depend on.
        why_empty: why RankDice may leave an image without a mask.
    """

    procedure: str
    metric: str = "dice"
    digest: str = "0" * 16
    probs_digest: str = "0" * 16
    why_empty: str = ""


@dataclass
class Outputs:
    """Writes the outputs of images into a folder.

    Args:
        folder: is created as needed.
        facts: the classes' names and colors.
        run: what the files say about the run.
        wanted: what is written in addition to the masks.
        force: replace files that this program did not write.
        video: takes the overlays of frames, instead of a picture each.
    """

    folder: Path
    facts: Facts
    run: Run
    wanted: Wanted = Wanted()
    force: bool = False
    video: OverlayVideo | None = None

    @property
    def table(self) -> Table:
        """The table of expected scores."""
        return Table(self.folder, self.facts, self.run.metric)

    def mask_path(self, name: str) -> Path:
        """Return where the mask of an image goes."""
        return self.folder / f"{name}.png"

    def _files(self, name: str) -> dict[Path, str | None]:
        """Return every file that an image may have, with the stamp that this run gives it; None: not wanted."""
        wanted, digest = self.wanted, self.run.digest
        shown = wanted.opacity is not None and self.video is None
        return {
            self.folder / f"{name}.npz": self.run.probs_digest if wanted.probs == "npz" else None,
            self.folder / f"{name}.json": digest if wanted.json else None,
            self.folder / f"{name}_overlay.jpg": self._overlay_digest if shown else None,
            self.mask_path(name): digest,
        }

    @property
    def _overlay_digest(self) -> str:
        return stamps.digest({"run": self.run.digest, "opacity": self.wanted.opacity})

    def _folders(self, name: str) -> dict[Path, str | None]:
        """Return the folders of files per class that an image may have, as :meth:`_files`."""
        wanted = self.wanted
        return {
            self.folder / f"{name}_probs": self.run.probs_digest if wanted.probs == "png" else None,
            self.folder / f"{name}_masks": self.run.digest if wanted.masks else None,
        }

    def exists(self, name: str) -> bool:
        """Return whether a run with this model and these options has written all that is wanted of an image."""
        files = all(run is None or stamps.stamp_of(path) == run for path, run in self._files(name).items())
        return files and all(
            run is None or path.is_dir() and all(stamps.stamp_of(p) == run for p in path.glob("*.png"))
            for path, run in self._folders(name).items()
        )

    def refuse_foreign(self, names: Iterable[str]) -> None:
        """Raise UserError if an output of these images would replace a file that this program did not write."""
        if not self.force:
            stamps.refuse_foreign((path for name in names for path in self._replaced(name)), self.folder)

    def _replaced(self, name: str) -> Iterator[Path]:
        yield from (path for path, run in self._files(name).items() if run is not None)
        for path, run in self._folders(name).items():
            if run is not None:
                yield from path.glob("*")

    def _remove_stale(self, name: str) -> None:
        """Remove what an earlier run wrote for an image and this one does not: it would not go with the new mask."""
        for path, run in self._files(name).items():
            if run is None and stamps.stamp_of(path) not in (None, self.run.digest, self.run.probs_digest):
                path.unlink(missing_ok=True)
        for folder, run in self._folders(name).items():
            if run is None and folder.is_dir():
                for path in folder.glob("*.png"):
                    if stamps.stamp_of(path) is not None:
                        path.unlink(missing_ok=True)
                with suppress(OSError):
                    folder.rmdir()

    def write(self, name: str, source: str, image: np.ndarray | None, result: Segmentation) -> Row | None:
        """Write everything of one image; return its line for the table, if the procedure expects a score.

        ``image`` may be drawn over. If a file cannot be written, those already written of the image are removed.

        Raises:
            UserError: a file could not be written, or one is in the way.
        """
        written: list[Path] = []
        try:
            self.refuse_foreign([name])
            if self.wanted.opacity is not None:
                assert image is not None
                self._write_overlay(name, image, result.labels, self.wanted.opacity, written)
            if self.wanted.probs:
                assert result.probs is not None
                self._write_probs(name, result.probs, written)
            if self.wanted.masks:
                self._write_class_masks(name, result, written)
            row = self._row(source, result)
            if self.wanted.json:
                written.append(self.folder / f"{name}.json")
                text = json.dumps(self._describe(source, result, row), indent=2, ensure_ascii=False)
                write_text(written[-1], f"{text}\n")
            write_mask(self.mask_path(name), result.labels, self.facts.palette, stamps.text(self.run.digest))
            self._remove_stale(name)
        except (OSError, UserError) as error:
            cause = reason(error) if isinstance(error, OSError) else error
            for path in written:
                path.unlink(missing_ok=True)
            for folder in self._folders(name):
                with suppress(OSError):
                    folder.rmdir()
            raise UserError(f"{source}: its outputs could not be written: {cause}") from None
        finally:
            result.close()
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
        data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
        write_bytes(written[-1], stamps.jpeg(data, self._overlay_digest))

    def _write_probs(self, name: str, probs: Tensor | Spool, written: list[Path]) -> None:
        if self.wanted.probs == "npz":
            written.append(self.folder / f"{name}.npz")
            write_probs(written[-1], probs, self.run.probs_digest)
            return
        for c in range(probs.shape[0]):
            planes = probs.planes(c) if isinstance(probs, Spool) else [probs[c].numpy()]
            # rounded, so that 0 and 1 stay what they are
            plane = np.concatenate([np.rint(p.astype(np.float32) * 255).astype(np.uint8) for p in planes])
            written.append(self.folder / f"{name}_probs" / class_file(self.facts, c))
            write_png(written[-1], plane, software=stamps.text(self.run.probs_digest))

    def _write_class_masks(self, name: str, result: Segmentation, written: list[Path]) -> None:
        folder = self.folder / f"{name}_masks"
        folder.mkdir(parents=True, exist_ok=True)  # also without any mask: an empty folder shows that
        assert result.masks is not None
        every = range(self.facts.num_classes)
        found = [c for c in every if (result.masks[c].any() if result.volumes is None else result.volumes[c])]
        written += [folder / class_file(self.facts, c) for c in found]
        write_class_masks(folder, self.facts, result.masks, found, self.run.digest)

    def _label_name(self, label: int) -> str:
        """Return a label's name: with one channel, label 1 is the class and 0 its background."""
        if self.facts.num_classes == 1 and len(self.facts.class_names) < 2:
            return ["background", self.facts.class_name(0)][label]
        return self.facts.class_name(label)

    def _row(self, source: str, result: Segmentation) -> Row | None:
        if result.scores is None or result.volumes is None:
            return None
        scores = tuple(
            float(s) if v else None for s, v in zip(result.scores.tolist(), result.volumes.tolist(), strict=True)
        )
        return Row(source, result.expected, scores, _presence(result))

    def _describe(self, source: str, result: Segmentation, row: Row | None) -> dict[str, Any]:
        labels = _count_labels(result.labels)
        single = self.facts.num_classes == 1
        presence = _presence(result)
        classes = []
        for label in range(2 if single else self.facts.num_classes):
            pixels = int(labels[label])
            entry: dict[str, Any] = {"id": label, "name": self._label_name(label), "pixels": pixels}
            channel = label - 1 if single else label
            if row is not None and result.volumes is not None and channel >= 0:
                entry[f"expected_{self.run.metric}"] = row.per_class[channel]
                entry["mask_pixels"] = int(result.volumes[channel])
            if presence and channel >= 0:
                entry["presence"] = presence[channel]
            if pixels or entry.get("mask_pixels"):
                classes.append(entry)
        height, width = result.labels.shape
        size = {"width": width, "height": height}
        described = {
            "written_by": stamps.text(self.run.digest),
            "image": source,
            **size,
            "procedure": self.run.procedure,
        }
        if row is not None:
            described[f"expected_{self.run.metric}"] = row.expected
        unassigned = int(labels[max(2, self.facts.num_classes) :].sum())
        return described | {"classes": classes, "unassigned_pixels": unassigned}


class OverlayVideo:
    """Overlays of frames as a video file, a context manager: the file has its name only once all went well.

    Args:
        path: where to; ``.mp4``.
        rate: frames per second.
        digest: of the run, for the stamp.
    """

    def __init__(self, path: Path, rate: float, digest: str = "0" * 16) -> None:
        self.path, self.rate, self.digest = path, rate, digest
        self._writer: cv2.VideoWriter | None = None
        self._temporary = path
        self._file = ExitStack()

    def __enter__(self) -> OverlayVideo:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._writer is not None:
            self._writer.release()
            self._writer = None
            stamps.append_mp4(self._temporary, self.digest)
        self._file.__exit__(*error)

    def append(self, picture: np.ndarray) -> None:
        """Add a picture, uint8 ``(H, W, 3)`` BGR."""
        if self._writer is None:
            self._temporary = self._file.enter_context(atomic(self.path, self.path.suffix))
            size = (picture.shape[1], picture.shape[0])
            self._writer = cv2.VideoWriter(str(self._temporary), cv2.VideoWriter.fourcc(*"mp4v"), self.rate, size)
            if not self._writer.isOpened():
                raise UserError(f"{self.path}: this build of OpenCV cannot write mp4 video; remove --overlay")
        self._writer.write(picture)


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


def check_folder(folder: Path) -> None:
    """Make the output folder; raise UserError if files cannot be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--output {folder}: this is a file; expected a folder") from None
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written to: {reason(error)}") from None
