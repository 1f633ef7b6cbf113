"""Measure the cost of the steps of an evaluation: seconds, and peak memory."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_Result = Any


class Clock:
    """Adds up what each step takes.

    On CUDA the memory is that of torch's allocator above what was there before, taken in every lap. On the CPU
    torch keeps no such count; :meth:`measure_memory` runs a step once more under its profiler.

    Args:
        device: where the steps compute.
        names: of the steps.
    """

    def __init__(self, device: torch.device, names: Iterable[str]) -> None:
        self.cuda = device if device.type == "cuda" else None
        names = list(names)
        self.laps: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
        self.peak = dict.fromkeys(names, 0)

    @contextmanager
    def measure(self, name: str, images: int) -> Iterator[None]:
        """Time one step over ``images`` images."""
        if self.cuda is not None:
            torch.cuda.synchronize(self.cuda)
            torch.cuda.reset_peak_memory_stats(self.cuda)
            memory = torch.cuda.memory_allocated(self.cuda)
        start = time.perf_counter()
        yield
        if self.cuda is not None:
            torch.cuda.synchronize(self.cuda)
            self.peak[name] = max(self.peak[name], torch.cuda.max_memory_allocated(self.cuda) - memory)
        self.laps[name].append((time.perf_counter() - start, images))

    def measure_memory(self, name: str, step: Callable[[], _Result]) -> None:
        """Run ``step`` to measure its memory, which laps do not know on the CPU; it must return its result."""
        if self.cuda is None:
            self.peak[name] = max(self.peak[name], cpu_peak(step) or 0)

    def totals(self) -> dict[str, tuple[float, int]]:
        """Return seconds and images of each step, without the first lap, which warms up, where there are more."""
        totals = {}
        for name, laps in self.laps.items():
            counted = laps[1:] or laps
            totals[name] = (sum(seconds for seconds, _ in counted), sum(images for _, images in counted))
        return totals


def cpu_peak(step: Callable[[], _Result]) -> int | None:
    """Return the peak bytes of the CPU tensors created inside ``step``; None if torch cannot say.

    Exact for torch's own allocations, its kernels' temporaries included; it sees nothing of NumPy. This is the old
    profiler of torch: the new one takes seconds to start.
    """
    try:
        from torch.autograd import _disable_profiler_legacy  # may be absent from later versions of torch
        from torch.autograd.profiler_legacy import profile

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            profiler = profile(profile_memory=True)
            profiler.__enter__()
    except (ImportError, AttributeError, TypeError, RuntimeError):  # another version of torch, or a profiler is running
        return None
    try:
        kept = step()
    finally:
        threads = _disable_profiler_legacy()
    del kept
    total = 0
    for records in threads:
        held = peak = 0
        for record in records:
            if record.kind() == "memory_alloc":
                held += record.cpu_memory_usage()
                peak = max(peak, held)
        total += peak
    return total
