"""One loader for all data sets: order, ranks, workers, batches."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from base.base_dataset import BaseDataSet
from base.entries import BROKEN_FILES_HINT, Key, available_cores, collate
from base.splits import grouping, split_by_fold, split_by_fraction
from utils import distributed
from utils.batch import Batch
from utils.bounds import BatchSize, Count, Positive, Seed, ShareBelowOne, WorkerCount
from utils.errors import UserError, are, plural

log = logging.getLogger("data")

MAX_DEFAULT_WORKERS = 8
PREFETCHED_BATCHES = 4  # per worker
_REPORTED_FILES = 5
_ORDER, _HELD_OUT = 1, 2  # tags that keep different uses of one seed apart


class BaseDataLoader(DataLoader[Any]):
    """Batches of a data set in an order that depends on (seed, epoch) alone.

    Iterating yields :class:`utils.batch.Batch`. Under ``torch.distributed`` each process gets its share. In training
    (``shuffle``), shares have equal length, and the few samples left over are dropped. In evaluation, each sample goes
    to exactly one process, so shares may differ by one sample.

    Args:
        dataset: what to load.
        batch_size: samples per batch (and process).
        shuffle: use a new random order in each epoch; set it for training.
        val_split: share of the samples held out of this loader for :meth:`get_val_loader`.
        val_fold: (k, n): hold out fold k (from 0) of n instead, for cross-validation.
        group_by: regular expression; samples with the same match in their names are held out together or not at all.
        num_workers: number of worker processes; 0: load in the main process; at most one per core. None: cores - 1, at
            most 8.
        drop_last: drop the last batch if it is not full. In training a last batch of one image is always dropped,
            because batch norm cannot use it.
        sampler: "weighted" samples images with rare classes more often (with replacement); needs ``shuffle``.
        seed: random seed of the order.
        pin_memory: load batches into page-locked memory, so that copies to the GPU overlap with computation; None: yes
            if CUDA is available.
    """

    dataset: BaseDataSet

    def __init__(
        self,
        dataset: BaseDataSet,
        /,
        batch_size: BatchSize = 8,
        shuffle: bool = False,
        *,
        val_split: ShareBelowOne | None = None,
        val_fold: tuple[Count, Positive] | None = None,
        group_by: str | None = None,
        num_workers: WorkerCount | None = None,
        drop_last: bool = False,
        sampler: Literal["weighted"] | None = None,
        seed: Seed = 0,
        pin_memory: bool | None = None,
    ) -> None:
        if sampler and not shuffle:
            raise ValueError("sampler 'weighted' needs shuffle: true (it is only for training)")
        dataset.replace_broken = shuffle
        train, self._held_out = _split(dataset, val_split, val_fold, group_by, seed)
        weights = dataset.sample_weights()[train] if sampler else None
        batches = EpochBatches(train, batch_size, shuffle=shuffle, drop_last=drop_last, seed=seed, weights=weights)
        self._group_by = group_by or dataset.group_by
        self._build(dataset, batches, num_workers, pin_memory)

    def _build(
        self, dataset: BaseDataSet, batches: EpochBatches, num_workers: int | None, pin_memory: bool | None
    ) -> None:
        self.batches = batches
        self.skipped: dict[str, int] = {}
        self._workers, self._pin = num_workers, pin_memory
        workers = _worker_count(num_workers)
        super().__init__(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
            persistent_workers=workers > 0,
            prefetch_factor=PREFETCHED_BATCHES if workers else None,
            worker_init_fn=_start_worker if workers else None,
            # For the seeds of the workers. If they were drawn from torch's default generator, dropout would get other
            # numbers, and a resumed run would differ from one that was never stopped.
            generator=torch.Generator().manual_seed(batches.seed),
        )

    @property
    def names(self) -> list[str]:
        """The names of all samples of an epoch, of all processes together."""
        return [self.dataset.entries[index].name for index in self.batches.indices.tolist()]

    @property
    def group_of(self) -> Callable[[str], str] | None:
        """The function from a sample's name to its group (``group_by``); None if samples have no groups."""
        return None if self._group_by is None else grouping(self._group_by)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch of the next iteration and the batch it starts with; ``len`` stays that of a whole epoch."""
        self.batches.set_epoch(epoch, start_batch)

    def close(self) -> None:
        """Stop the worker processes; the next iteration starts new ones.

        Do not leave it to the garbage collector: it may close the workers' queues before it stops the workers, and
        then waits five seconds for each of them.
        """
        workers, self._iterator = self._iterator, None
        if isinstance(workers, _MultiProcessingDataLoaderIter):
            workers._shutdown_workers()

    def get_val_loader(self, whole: bool = False) -> BaseDataLoader | None:
        """Return a loader of the samples that were held out, without augmentation; None if there are none.

        Samples are held out by ``val_split``, by ``val_fold``, or by the data set (``BaseDataSet.held_out``).

        Args:
            whole: yield whole images, as test.py and inference.py do, even if there is a ``crop_size``.
        """
        if self._held_out is None and self.dataset.held_out is None:
            return None
        dataset = self.dataset.for_validation(whole)
        loader = BaseDataLoader.__new__(BaseDataLoader)
        loader._held_out, loader._group_by = None, self._group_by
        indices = np.arange(len(dataset)) if self._held_out is None else self._held_out
        batches = EpochBatches(indices, self.batches.batch_size, seed=self.batches.seed)
        loader._build(dataset, batches, self._workers, self._pin)
        return loader

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        read = 0
        for collated in _waited_for(super().__iter__()):
            if collated.failure is not None:
                raise UserError(f"{collated.failure}{BROKEN_FILES_HINT}")
            for reason in collated.problems:
                self._report(reason)
            if collated.batch is not None:
                read += 1
                yield collated.batch
        if not read and len(self) > self.batches.start_batch:
            reasons = "".join(f"\n    {reason}" for reason in list(self.skipped)[:_REPORTED_FILES])
            raise UserError(
                f'no image could be read ("on_error": "skip" skipped {plural(len(self.skipped), "file")}):{reasons}'
            )

    def _report(self, reason: str) -> None:
        new = reason not in self.skipped
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        if new and len(self.skipped) <= _REPORTED_FILES:
            log.warning("skipped (file %d so far): %s", len(self.skipped), reason)
        elif new and len(self.skipped) % 100 == 0:
            log.warning("skipped %d files so far", len(self.skipped))


class EpochBatches(Sampler[list[Key]]):
    """Batches of keys (:data:`base.entries.Key`).

    A key contains the epoch, because workers run through all epochs. If a weighted epoch draws an index again, the key
    also contains the number of the draw, so that the sample is augmented differently.
    """

    def __init__(
        self,
        indices: np.ndarray,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        weights: np.ndarray | None = None,
    ) -> None:
        self.indices, self.batch_size, self.seed = indices, batch_size, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self.weights = None if weights is None else weights / weights.sum()
        self.epoch = self.start_batch = 0
        self.rank, self.world = distributed.rank(), distributed.world_size()
        share = len(range(self.rank, len(indices), self.world))
        self.share = len(indices) // self.world if shuffle else share
        self._length = self._count_batches()

    def _count_batches(self) -> int:
        full, left = divmod(self.share, self.batch_size)
        single = self.shuffle and left == 1 and self.batch_size > 1
        if single and not self.drop_last:
            log.info(
                "the last batch of each training epoch would contain only one image and is dropped (batch norm "
                "cannot learn from a single image)"
            )
        batches = full + (left > 0 and not self.drop_last and not single)
        if batches == 0 and self.shuffle:
            raise UserError(
                f"{are(len(self.indices), 'training sample')} too few for {plural(self.world, 'process')} and a batch "
                f"of {self.batch_size}: lower `batch_size` or `val_split`, or switch off `drop_last`"
            )
        return batches

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Set the epoch of the next iteration and the batch it begins with."""
        self.epoch, self.start_batch = epoch, start_batch

    def keys(self, epoch: int) -> list[Key]:
        """Return the keys of this process in an epoch, in order."""
        order, rng = self.indices, np.random.default_rng([self.seed, epoch, _ORDER])
        if self.weights is not None:
            order = rng.choice(order, size=len(order), p=self.weights)
        elif self.shuffle:
            order = rng.permutation(order)
        drawn: Counter[int] = Counter()
        keys: list[Key] = []
        for index in order.tolist():
            keys.append((epoch, index, drawn[index]) if drawn[index] else (epoch, index))
            drawn[index] += 1
        return keys[self.rank :: self.world][: self.share]

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[Key]]:
        keys = self.keys(self.epoch)
        for batch in range(self.start_batch, self._length):
            yield keys[batch * self.batch_size : (batch + 1) * self.batch_size]


_waiting = threading.Event()


def _waited_for(iterator: Iterator[Any]) -> Iterator[Any]:
    """Yield what an iterator yields; if a worker process dies, raise the error only while waiting for its data.

    torch's signal handler would raise it anywhere, even in the middle of an optimizer step.
    """
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    main = threading.current_thread() is threading.main_thread()
    if main and callable(handler) and not isinstance(handler, int) and not getattr(handler, "waits", False):
        raise_if_dead = handler

        def handle(number: int, frame: Any) -> None:
            if _waiting.is_set():
                raise_if_dead(number, frame)

        handle.waits = True  # type: ignore[attr-defined]
        signal.signal(signal.SIGCHLD, handle)
    while True:
        _waiting.set()
        try:
            item = next(iterator, None)
        except (EOFError, ConnectionError) as error:  # it died while it sent a batch
            raise RuntimeError("DataLoader worker (pid unknown) has ended unexpectedly") from error
        finally:
            _waiting.clear()
        if item is None:
            return
        yield item


def _start_worker(worker: int) -> None:
    # The workers are the parallelism; OpenCV's threads in each of them would compete for the cores.
    cv2.setNumThreads(0)
    # Ctrl-C and a launcher that stops a run signal the whole process group. Workers leave the group, so that they go on
    # while the main process saves; it ends them afterwards.
    with contextlib.suppress(OSError, AttributeError):
        os.setpgid(0, 0)


def _worker_count(num_workers: int | None) -> int:
    cores = available_cores()
    if num_workers is None:
        return min(MAX_DEFAULT_WORKERS, cores - 1)
    if num_workers > cores:
        _notice(f"num_workers {num_workers} lowered to the {cores} cores of this machine")
    return min(num_workers, cores)


_notice = functools.cache(log.info)  # once per message


def _split(
    dataset: BaseDataSet, val_split: float | None, val_fold: Sequence[int] | None, group_by: str | None, seed: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the indices to train on and those held out (None if none are), both sorted."""
    count = len(dataset)
    group_by = group_by or dataset.group_by
    if not val_split and val_fold is None:
        if group_by != dataset.group_by:
            raise ValueError("group_by has no effect without val_split or val_fold")
        return np.arange(count), None
    if dataset.held_out is not None or (val_split and val_fold is not None):
        raise ValueError("val_split, val_fold and val_fraction cannot be combined; use one of them")
    if val_fold is not None or group_by is not None:
        names = [entry.name for entry in dataset.entries]
        if val_fold is not None:
            _, held_out = split_by_fold(names, val_fold, group_by)
        else:
            held_out = split_by_fraction(names, {"val": val_split or 0}, "train", seed, group_by)["val"]
        chosen = np.array([name in held_out for name in names])
    else:
        chosen = np.zeros(count, bool)
        order = np.random.default_rng([seed, _HELD_OUT]).permutation(count)
        chosen[order[: round(count * (val_split or 0))]] = True
    if chosen.all() or not chosen.any():
        raise UserError(f"val_split {val_split} of {count} samples leaves the training or the validation set empty")
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)
