"""Many images through a predictor: read ahead, predict in batches, write in the background; skip bad files."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import reduce
from operator import add

import numpy as np
import torch

from utils.errors import UserError, out_of_memory
from utils.images import Pixels
from utils.inference.outputs import Outputs
from utils.inference.sources import Item
from utils.inference.table import Row
from utils.predictor import Predictor

# The most pixels of all images between reading and writing; a single larger image is also processed.
PIXELS_IN_FLIGHT = 2**25
READERS = 2


@dataclass
class Report:
    """The results of a run, for its summary."""

    done: int = 0  # how many were segmented
    outdated: int = 0  # how many of them had outputs of another model or other options
    unassigned: int = 0  # pixels without a class, and all pixels, of the images done
    pixels: int = 0
    skipped: list[str] = field(default_factory=list)  # those with all outputs of this model and these options
    failures: list[str] = field(default_factory=list)  # one message each
    tiled: list[str] = field(default_factory=list)  # predicted in tiles: the mode's views of them would not fit
    empty: list[str] = field(default_factory=list)  # those in which RankDice found no mask
    rows: list[Row] = field(default_factory=list)  # of the table of expected scores
    interrupted: bool = False  # by the user

    @classmethod
    def merged(cls, reports: Sequence[Report]) -> Report:
        """Return the reports of all processes as one."""
        return cls(*(reduce(add, values) for values in zip(*(vars(one).values() for one in reports), strict=True)))


@dataclass(frozen=True)
class _Job:
    item: Item
    pixels: int
    future: Future


@dataclass
class Pipeline:
    """Segments items and writes their outputs."""

    predictor: Predictor
    outputs: Outputs
    # Called with each finished, skipped or failed item, and its error message or None.
    advance: Callable[[Item, str | None], None] = lambda item, problem: None
    skip_existing: bool = False  # skip items that already have all outputs of this run
    report: Report = field(default_factory=Report, init=False)
    _reading: deque[_Job] = field(default_factory=deque, init=False)
    _writing: deque[_Job] = field(default_factory=deque, init=False)
    _in_flight: int = field(default=0, init=False)  # pixels

    def run(self, items: Iterable[Item]) -> Report:
        """Segment all items, in order; Ctrl-C finishes what is being written and returns what is done."""
        with ThreadPoolExecutor(READERS) as self._readers, ThreadPoolExecutor(1) as self._writer:
            try:
                for batch in self._batches(self._wanted(items)):
                    self._segment(batch)
            except KeyboardInterrupt:
                self.report.interrupted = True
                for job in self._reading:
                    job.future.cancel()
            while self._writing:
                self._finish_oldest()
        return self.report

    def _wanted(self, items: Iterable[Item]) -> Iterator[Item]:
        try:
            for item in items:
                if self.skip_existing and self.outputs.exists(item.name):
                    self.report.skipped.append(item.source)
                    self.advance(item, None)
                    continue
                self.report.outdated += self.skip_existing and self.outputs.mask_path(item.name).exists()
                yield item
        except UserError as error:  # a truncated video: the frames before the end are still segmented
            self.report.failures.append(str(error))

    # ------------------------------------------------------------------------------------------- reading

    def _batches(self, items: Iterator[Item]) -> Iterator[list[tuple[_Job, Pixels]]]:
        """Yield images of equal size that follow each other, read in the background."""
        batch: list[tuple[_Job, Pixels]] = []
        depth = 2 * self.predictor.batch_size
        upcoming = next(items, None)
        while True:
            while upcoming is not None and len(self._reading) < depth:
                pixels = upcoming.pixels()
                if self._in_flight and self._in_flight + pixels > PIXELS_IN_FLIGHT:
                    break
                self._in_flight += pixels
                future = self._readers.submit(self.predictor.read, upcoming.image)
                self._reading.append(_Job(upcoming, pixels, future))
                upcoming = next(items, None)
            loaded = self._next_loaded()
            if batch and (loaded is None or not self._together(batch, loaded[1].image)):
                yield batch
                batch = []
            if loaded is not None:
                batch.append(loaded)
                del loaded
            elif upcoming is None and not self._reading:
                return
            elif not self._reading and self._writing:
                self._finish_oldest()  # there is no room for the next image until this one is written

    def _next_loaded(self) -> tuple[_Job, Pixels] | None:
        """Return the next image that could be read; None when nothing is being read."""
        while self._reading:
            job = self._reading.popleft()
            try:
                return job, job.future.result()
            except Exception as error:
                self._fail(job, error)
        return None

    def _together(self, batch: list[tuple[_Job, Pixels]], image: np.ndarray) -> bool:
        first = batch[0][1].image
        same = first.shape == image.shape and first.dtype == image.dtype
        return same and len(batch) < self.predictor.batch_size and not self.predictor.streams(*image.shape[:2])

    # ------------------------------------------------------------------------------------------- predicting

    def _segment(self, batch: list[tuple[_Job, Pixels]]) -> None:
        try:
            results = self.predictor.segment([pixels for _, pixels in batch])
        except Exception as error:
            if len(batch) == 1:
                self._fail(batch[0][0], error)
            else:  # find out which of them fails
                for one in batch:
                    self._segment([one])
            return
        for (job, pixels), result in zip(batch, results, strict=True):
            if result.tiled:
                self.report.tiled.append(job.item.source)
            if result.volumes is not None and not result.volumes.any():
                self.report.empty.append(job.item.source)
            self.report.pixels += result.labels.size
            known = max(2, self.predictor.facts.num_classes)
            without_class = result.labels >= known
            if pixels.missing is not None:
                without_class &= ~pixels.missing
            self.report.unassigned += int(np.count_nonzero(without_class))
            shown = pixels.image if self.outputs.wanted.opacity is not None else None
            future = self._writer.submit(self.outputs.write, job.item.name, job.item.source, shown, result)
            self._writing.append(_Job(job.item, job.pixels, future))
        batch.clear()
        while self._writing and (self._writing[0].future.done() or len(self._writing) > 2 * self.predictor.batch_size):
            self._finish_oldest()

    # ------------------------------------------------------------------------------------------- writing

    def _finish_oldest(self) -> None:
        job = self._writing.popleft()
        try:
            row = job.future.result()
        except Exception as error:
            self._fail(job, error)
            return
        if row is not None:
            self.report.rows.append(row)
        self.report.done += 1
        self._in_flight -= job.pixels
        self.advance(job.item, None)

    def _fail(self, job: _Job, error: Exception) -> None:
        message = explain(job.item.source, error)
        self.report.failures.append(message)
        self._in_flight -= job.pixels
        self.advance(job.item, message)


def explain(source: str, error: Exception) -> str:
    """Return one line on what went wrong with an image."""
    if out_of_memory(error):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return f"{source}: out of memory; try --mode sliding, or a smaller --max-pixels, --tile or --batch-size"
    text = " ".join(str(error).split())
    if not isinstance(error, UserError | ValueError):
        text = f"{type(error).__name__}: {text}"
    return text if source in text else f"{source}: {text}"
