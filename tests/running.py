"""Run commands in this process, which has already imported torch: a new process takes seconds to start."""

from __future__ import annotations

import os
import runpy
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def run_here(words: Sequence[str], folder: Path) -> Any:
    """Do what ``python WORDS`` does in a folder, the words beginning with a script of ours or ``-m``; return its code.

    What the command prints goes to :data:`sys.stdout`; working directory, ``sys.argv`` and torch's determinism are as
    before afterwards.
    """
    argv, cwd = sys.argv, Path.cwd()
    module = words[0] == "-m"
    sys.argv = list(words[1:] if module else words)
    os.chdir(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a module that tests also import
            if module:
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = argv
        os.chdir(cwd)
        torch.use_deterministic_algorithms(False)
    return 0
