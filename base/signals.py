"""Ctrl-C and SIGTERM: ask the run to stop at the end of the current optimizer step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from utils import distributed


class StopSignals:
    """A context manager that keeps the first signal in ``received``; a second signal interrupts at once.

    torchrun repeats a Ctrl-C to its processes as SIGTERM, so there only the same signal counts as a second one.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def ignore(self) -> None:
        """Ignore the signals of torchrun from now on: after an error the processes end by themselves."""
        if distributed.under_torchrun():
            for number in self._previous:
                signal.signal(number, signal.SIG_IGN)
            self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and (number == self.received or not distributed.under_torchrun()):
            raise KeyboardInterrupt
        self.received = number
        if distributed.is_main():  # not print(), which must not be called again while it is interrupted
            os.write(2, b"\nstopping after this step, then saving; once more: stop at once\n")


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, as Ctrl-C does, so that the program can report what is not done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
