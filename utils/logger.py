"""The logs of a run: TensorBoard, ``log.csv`` (one line per epoch) and ``log.jsonl``.

``log.csv`` contains only what the run computed, so two equal runs write equal files; times and speeds are in
``log.jsonl`` under ``"timing"`` and in TensorBoard. A resumed run continues the same files: records after the
checkpoint are dropped, because they will be computed again.
"""

from __future__ import annotations

import json
import math
import textwrap
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from utils.errors import UserError, warn
from utils.files import csv_text, reason, write_text


class RunLog:
    """The logs of one run; on processes other than the main one it does nothing.

    Args:
        folder: the run's folder, for ``log.csv`` and ``log.jsonl``.
        tensorboard_dir: for TensorBoard; None: none.
        active: whether this process writes.
        epoch, iteration: where the run continues; later records are dropped.
        batch: batches done in the current epoch; 0: it has not begun.
    """

    def __init__(
        self,
        folder: Path,
        tensorboard_dir: Path | None,
        active: bool = True,
        epoch: int = 0,
        iteration: int = 0,
        batch: int = 0,
    ) -> None:
        self.folder = folder
        self.active = active
        self.writer: Any = None
        self._session_end: Any = None
        if not active:
            return
        with _explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._forget_after(epoch, iteration)
        if tensorboard_dir is not None:
            with _explained(tensorboard_dir):
                self._open_tensorboard(tensorboard_dir, iteration, batch)

    def _open_tensorboard(self, folder: Path, iteration: int, batch: int) -> None:
        """Open an event file that begins with what earlier ones contain up to the checkpoint; remove those."""
        _silence_writer_threads()
        earlier = sorted(folder.glob("events.out.tfevents.*"))
        self.writer = SummaryWriter(str(folder))
        seen: set[tuple[str, int]] = set()
        for path in earlier:
            for data in RawEventFileLoader(str(path)).Load():
                event = Event.FromString(data)
                tags = [value.tag for value in event.summary.value]
                keys = {(tag, event.step) for tag in tags}
                if tags and not keys & seen and all(_kept(tag, event.step, iteration, batch) for tag in tags):
                    self.writer.file_writer.event_writer.add_event(event)
                    seen |= keys
        self.writer.flush()
        for path in earlier:
            path.unlink()

    def _forget_after(self, epoch: int, iteration: int) -> None:
        """Drop the records that the run will compute again, and an incomplete last line."""
        kept = [r for r in self._records() if _precedes(r, epoch, iteration)]
        path, text = self.folder / "log.jsonl", "".join(json.dumps(r) + "\n" for r in kept)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            write_text(path, text)
        self._write_csv(kept)

    def _records(self) -> list[dict[str, Any]]:
        path = self.folder / "log.jsonl"
        if not path.exists():
            return []
        records = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break  # an incomplete line of a run that was killed; it is later than every checkpoint
        return records

    def _write_csv(self, records: list[dict[str, Any]]) -> None:
        epochs = {
            r["epoch"]: {"epoch": r["epoch"], "iteration": r["iteration"], **r["values"]}
            for r in records
            if r["kind"] == "epoch"
        }
        path = self.folder / "log.csv"
        if not epochs:
            path.unlink(missing_ok=True)
            return
        columns = list(dict.fromkeys(key for row in epochs.values() for key in row))
        write_text(path, csv_text([columns, *([row.get(column, "") for column in columns] for row in epochs.values())]))

    def record(
        self,
        kind: str,
        epoch: int,
        iteration: int,
        values: Mapping[str, float],
        timing: Mapping[str, float] | None = None,
    ) -> None:
        """Append one record; ``kind`` is "train" (some iterations) or "epoch" (a whole one, with its validation)."""
        if not self.active:
            return
        record = {"kind": kind, "epoch": epoch, "iteration": iteration, "values": _plain(values)}
        if timing:
            record["timing"] = _plain(timing)
        with _explained(self.folder):
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            if kind == "epoch":
                self._write_csv(self._records())

    def _write(self, method: str, *args: Any, **options: Any) -> None:
        """Call a method of TensorBoard's writer, if there is one."""
        if self.writer is not None:
            with _explained(Path(self.writer.log_dir)):
                getattr(self.writer, method)(*args, **options)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars to TensorBoard, by their full tags."""
        for tag, value in values.items():
            if math.isfinite(value):
                self._write("add_scalar", tag, value, step)

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Write an RGB image, uint8 ``(H, W, 3)``, to TensorBoard."""
        self._write("add_image", tag, image, step, dataformats="HWC")

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Write preformatted text to TensorBoard."""
        self._write("add_text", tag, textwrap.indent(text, "    "), step)

    def hparams(self, settings: Mapping[str, Any], scores: Iterable[str]) -> None:
        """Write the hyper-parameters to TensorBoard, and the tags of the scalars that runs are compared by."""
        if self.writer is not None:
            experiment, session, self._session_end = hparams(dict(settings), dict.fromkeys(scores, 0.0))
            for summary in (experiment, session):
                self.writer.file_writer.add_summary(summary)

    def flush(self) -> None:
        """Write everything to the disk, before a checkpoint refers to it."""
        self._write("flush")

    def close(self, finished: bool = False) -> None:
        """Close the files; ``finished``: the run has come to its end."""
        if self.writer is None:
            return
        try:
            if finished and self._session_end is not None:
                self.writer.file_writer.add_summary(self._session_end)
            self.writer.close()
        except OSError as error:
            warn(f"{self.writer.log_dir}: TensorBoard's logs are incomplete: {reason(error)}")


def _kept(tag: str, step: int, iteration: int, batch: int) -> bool:
    """Return whether an event of TensorBoard was written before a checkpoint, and will not be written again."""
    if tag.startswith(("_hparams_/", "final/")):
        return False  # written at each start; the tags of earlier versions
    if step != iteration:
        return step < iteration
    if tag.startswith("val"):
        return batch == 0  # validation comes after an epoch's last batch
    return not tag.startswith("config")


def _silence_writer_threads() -> None:
    """Keep TensorBoard's writing thread from printing a traceback: its error is raised at the next call as well."""
    hook = threading.excepthook
    if getattr(hook, "silences", False):
        return

    def silent(args: Any) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__name__ == "_AsyncWriterThread"):
            hook(args)

    silent.silences = True  # type: ignore[attr-defined]
    threading.excepthook = silent


def _precedes(record: Mapping[str, Any], epoch: int, iteration: int) -> bool:
    """Return whether a record was written before a checkpoint with these finished epochs and iterations."""
    if record["iteration"] != iteration:
        return record["iteration"] < iteration
    # Saved in the middle of an epoch, after the iteration's own record; an epoch's record comes with its end.
    return record["kind"] != "epoch" or record["epoch"] <= epoch


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: the run's logs cannot be written: {reason(error)}") from None


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    # JSON has no nan: a value that nothing defines is null.
    return {key: float(v) if math.isfinite(v) else None for key, v in values.items()}
