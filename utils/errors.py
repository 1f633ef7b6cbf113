"""Errors that the user can fix: one clear message, exit code 2, no traceback."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

USER_ERROR_EXIT_CODE = 2


class UserError(Exception):
    """Something in the config, the files or the command line that the user can fix.

    The message names the field or file, what was found, what was expected and how to fix it.
    """


class DataFolderError(UserError):
    """A data set's folder lacks what it needs; the caller adds the config's field, ``...args.data_dir``."""


def not_installed(what: str, *packages: str) -> UserError:
    """Return the error for optional packages that are missing: what needs them, and the pip command."""
    are = "is" if len(packages) == 1 else "are"
    command = f"pip install {' '.join(packages)}"
    return UserError(f"{what} needs {' and '.join(packages)}, which {are} not installed: {command}")


def import_extra(module: str, what: str, package: str = "") -> Any:
    """Import an optional package, which ``what`` needs. ``package``: its name for pip, if that is another one.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise not_installed(what, package or module.partition(".")[0]) from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence: ``"; did you mean X?"`` for the nearest known name, else a full stop."""
    known = list(known)
    folded = {k.lower(): k for k in known}
    nearest = get_close_matches(str(name).lower(), list(folded), n=1, cutoff=0.5)
    return f"; did you mean {folded[nearest[0]]}?" if nearest else "."


def listed(items: Iterable[object], limit: int) -> str:
    """Return the first ``limit`` items separated by commas, and ", ..." if there are more."""
    texts = [str(item) for item in items]
    return ", ".join([*texts[:limit], *(["..."] if len(texts) > limit else [])])


def plural(count: int, noun: str) -> str:
    """Return a number with its noun, which gets an s (or es, after an s) unless there is one."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count} {noun}{ending}"


def are(count: int, noun: str) -> str:
    """Return a number with its noun, and "is" or "are"."""
    return f"{plural(count, noun)} {'is' if count == 1 else 'are'}"


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the memory of the machine or of a GPU is full."""
    if isinstance(error, UserError):
        return False
    # torch's errors by their texts: this module must not import torch, and on a CPU they are plain RuntimeErrors.
    texts = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "Insufficient memory")
    full = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    return full or any(text in str(error) for text in texts)


def warn(text: str) -> None:
    """Print a warning to the error stream."""
    print(f"warning: {text}", file=sys.stderr)


class _Warnings(logging.Handler):
    """Prints the warnings of the data loaders in the form of the scripts' own warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(record.getMessage())


def run(main: Callable[[], int | None]) -> None:
    """Run a script's ``main`` and exit: a :class:`UserError` becomes one message and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    data = logging.getLogger("data")
    if not any(isinstance(handler, _Warnings) for handler in data.handlers):
        data.addHandler(_Warnings(logging.WARNING))
    try:
        _interruptible()
        code = main()
    except BrokenPipeError:
        # The reader of the output has closed it (``| head``), which is not an error.
        sys.stderr.close()
        code = 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        said = _message(error)
        if said is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        code = USER_ERROR_EXIT_CODE
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:  # as distributed.under_torchrun, which imports torch
        _leave_at_once(code or 0)
    sys.exit(code or 0)


def _message(error: Exception) -> str | None:
    """Return what a script prints about an error; None for our bugs."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"  # a name that is too long, no permission, no space
    if out_of_memory(error):
        said = (str(error).strip() or "no memory left").splitlines()[0]
        return f"out of memory: {said[:300]}; use a smaller batch size or image, or another device"
    return None


def _interruptible() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, even if :func:`utils.cli.end_quietly` was called."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave_at_once(code: int) -> NoReturn:
    """End a process that torchrun started, without Python's usual clean-up.

    During the clean-up, a thread of gloo sometimes frees a tensor and aborts the process (SIGABRT, "terminate called
    without an active exception"), although the run succeeded.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed already, or nobody reads it
            stream.flush()
    os._exit(code)
