"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

import utils  # noqa: F401 - before torch: sets how long its idle threads wait

if "PYTEST_XDIST_WORKER" in os.environ:  # one core per worker, and per process that a test starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is not a failure
hypothesis.settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parent.parent
MEMORY_PER_WORKER = 3 * 2**30  # two processes that have imported torch's CUDA build, and a large network


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return how many workers ``-n auto`` starts: one per usable core, fewer where the memory is small."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores, memory // MEMORY_PER_WORKER))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device on this machine")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the repository's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Return the folder with real data and recorded facts; skip where it is absent, as in a user's clone."""
    folder = Path(os.environ.get("SEGMENTATION_SHARED", ROOT.parent / "shared"))
    if not (folder / "README.md").is_file():
        pytest.skip(f"the optional folder with real data and recorded facts is absent ({folder})")
    return folder
