"""Command-line options that the scripts share. This module imports nothing heavy, because ``--help`` must be fast."""

from __future__ import annotations

import argparse
import os
import re
import signal
from typing import Any, Literal, NoReturn, get_args

from utils.errors import UserError, did_you_mean

Procedure = Literal["T", "max", "rankdice"]
"""The prediction procedures (:mod:`utils.predict`)."""
Mode = Literal["single", "multiscale", "sliding"]
"""How an image is seen (:class:`utils.predictor.Predictor`)."""
PROCEDURES: tuple[str, ...] = get_args(Procedure)
MODES: tuple[str, ...] = get_args(Mode)


class Parser(argparse.ArgumentParser):
    """A parser that refuses empty values, and names the nearest choice if an option or a command has another value."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the options; an empty value is an error, because it usually comes from a variable that is not set."""
        found = super().parse_args(args, namespace)
        for name, value in vars(found).items():
            if value == "" or (isinstance(value, list) and "" in value):
                self.error(f"{name}: the value is empty (is a variable of the shell not set?)")
        return found

    def error(self, message: str) -> NoReturn:
        """Print the message and exit."""
        found = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message)
        hint = did_you_mean(found[1], re.findall(r"[^', ]+", found[2])).rstrip(".") if found else ""
        super().error(message + hint)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add ``--set``."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="override a field of the config, such as trainer.epochs=3 (may be given several times)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``-d``."""
    parser.add_argument(
        "-d", "--device", metavar="IDS", help="GPUs to use, such as 0 or 0,1, or cpu (default: n_gpu of the config)"
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust-code``."""
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="allow the checkpoint's config to run code (arch type External); only for files that you trust",
    )


def end_quietly() -> None:
    """Let Ctrl-C end the program without a traceback while torch is imported, until :func:`utils.errors.run`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def select_devices(device: str | None) -> list[str]:
    """Make only the chosen GPUs visible, before torch is imported; return the overrides of the config that follow.

    Raises:
        UserError: not a list of GPU numbers.
    """
    if device is None:
        return []
    if device == "cpu":
        return ["n_gpu=0"]
    numbers = device.split(",")
    if not re.fullmatch(r"\d+(,\d+)*", device) or len(set(numbers)) < len(numbers):
        raise UserError(f"--device {device}: expected GPU numbers such as 0 or 0,1, each once, or cpu")
    os.environ["CUDA_VISIBLE_DEVICES"] = device
    return [f"n_gpu={len(numbers)}"]
