"""What a run leaves behind to look at: TensorBoard, ``log.csv`` (one line per epoch) and ``log.jsonl``.

``log.csv`` holds only what the run computed, so two equal runs write equal files; times and speeds stand in
``log.jsonl`` under ``"timing"`` and in TensorBoard. A run that is resumed continues the same files: what they
hold beyond the checkpoint is dropped, since it will be computed again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.files import csv_text, reason, write_text


class RunLog:
    """The logs of one run; on processes other than the main one it does nothing.

    Args:
        folder: the run's folder, for ``log.csv`` and ``log.jsonl``.
        tensorboard_dir: for TensorBoard; None: none.
        active: whether this process writes.
        epoch, iteration: where the run continues; later records are dropped.
    """

    def __init__(
        self, folder: Path, tensorboard_dir: Path | None, active: bool = True, epoch: int = 0, iteration: int = 0
    ) -> None:
        self.folder = folder
        self.active = active
        self.writer = None
        if not active:
            return
        with _told(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._forget_after(epoch, iteration)
        if tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(tensorboard_dir), purge_step=iteration + 1 if iteration else None)

    def _forget_after(self, epoch: int, iteration: int) -> None:
        """Drop what the run will compute again, and what a kill left of a line."""
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
                break  # a line cut short when the run was killed: it comes after every checkpoint
        return records

    def _write_csv(self, records: list[dict[str, Any]]) -> None:
        epochs: dict[int, dict[str, Any]] = {}
        for record in records:
            if record["kind"] == "epoch":
                epochs[record["epoch"]] = {
                    "epoch": record["epoch"],
                    "iteration": record["iteration"],
                    **record["values"],
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
        with _told(self.folder):
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            if kind == "epoch":
                self._write_csv(self._records())

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars to TensorBoard, by their full tags."""
        if self.writer is not None:
            for tag, value in values.items():
                if math.isfinite(value):
                    self.writer.add_scalar(tag, value, step)

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Write an RGB image, uint8 ``(H, W, 3)``, to TensorBoard."""
        if self.writer is not None:
            self.writer.add_image(tag, image, step, dataformats="HWC")

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Write preformatted text to TensorBoard."""
        if self.writer is not None:
            indented = "\n".join("    " + line for line in text.splitlines())
            self.writer.add_text(tag, indented, step)

    def hparams(self, settings: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        """Write the hyper-parameters beside the final scores to TensorBoard."""
        if self.writer is not None:
            finite = {f"final/{k}": v for k, v in scores.items() if math.isfinite(v)}
            self.writer.add_hparams(dict(settings), finite, run_name=".")

    def close(self) -> None:
        """Flush everything."""
        if self.writer is not None:
            self.writer.close()


def _precedes(record: Mapping[str, Any], epoch: int, iteration: int) -> bool:
    """Return whether a record was written before a checkpoint with so many finished epochs and iterations."""
    if record["iteration"] != iteration:
        return record["iteration"] < iteration
    # Saved in the middle of an epoch, after the iteration's own record; an epoch's record comes with its end.
    return record["kind"] != "epoch" or record["epoch"] <= epoch


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: the logs of the run cannot be written there: {reason(error)}") from None


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    # JSON has no nan: a value that nothing defines is null.
    return {key: float(v) if math.isfinite(v) else None for key, v in values.items()}
