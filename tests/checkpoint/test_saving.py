"""Saved checkpoints are complete, or the earlier file stays."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.states import names_in, state
from utils import checkpoint
from utils.checkpoint import read, save
from utils.errors import UserError


def test_what_is_saved_is_read(tmp_path) -> None:
    path = tmp_path / "new" / "folder" / "model.pth"
    content = state()
    save(content, path)
    again = read(path)
    assert again.keys() == content.keys()
    assert all(torch.equal(again["state_dict"][k], v) for k, v in content["state_dict"].items())
    assert {k: v for k, v in again.items() if k != "state_dict"} == {
        k: v for k, v in content.items() if k != "state_dict"
    }
    assert names_in(path.parent) == ["model.pth"]


@pytest.fixture
def old(tmp_path) -> Iterator[Path]:
    """A checkpoint that the test does not change, and no other visible file beside it."""
    path = tmp_path / "model.pth"
    save({"state_dict": {"a": torch.ones(3)}}, path)
    before = path.read_bytes()
    yield path
    assert path.read_bytes() == before
    assert [name for name in names_in(tmp_path) if not name.startswith(".")] == ["model.pth"]


class Boom(Exception):
    """Something that goes wrong in the middle of writing."""


@pytest.mark.parametrize(
    ("failure", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError, "the disk is full; the earlier file is"),
        (OSError(errno.EIO, "Input/output error"), UserError, "Input/output error"),
        (RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"), UserError, "disk full?"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
        (Boom("program error"), Boom, "program error"),
    ],
)
def test_a_failure_in_the_middle_leaves_the_old_file_and_nothing_else(
    old, monkeypatch, failure, raised, message
) -> None:
    def broken(content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise failure

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(raised) as error:
        save({"state_dict": {"a": torch.zeros(3)}}, old)
    assert message in str(error.value)
    assert names_in(old.parent) == ["model.pth"]


def test_a_disk_that_takes_no_more_bytes(old) -> None:
    """A real error of the operating system inside torch's writer: a limit on the file size."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match="could not be written: File too large; the earlier file is untouched"):
            save({"state_dict": {"a": torch.ones(10**6)}}, old)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert names_in(old.parent) == ["model.pth"]


def test_a_process_killed_in_the_middle_leaves_the_old_file(old) -> None:
    """Its unfinished file is hidden, so nothing takes it for a checkpoint."""
    child = os.fork()
    if child == 0:  # dies at once, without clean-up
        torch.save = lambda content, file: (file.write(b"half"), file.flush(), os.kill(os.getpid(), signal.SIGKILL))
        save({"state_dict": {"a": torch.zeros(3)}}, old)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert list(old.parent.glob("*.pth")) == [old]


def test_places_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        save({"state_dict": {}}, tmp_path / "file" / "model.pth")
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(UserError, match="could not be written"):
        save({"state_dict": {}}, tmp_path / "folder.pth")
    assert names_in(tmp_path) == ["file", "folder.pth"]


def test_a_checkpoint_has_several_names(tmp_path) -> None:
    first, best = tmp_path / "checkpoint-epoch1.pth", tmp_path / "best_model.pth"
    save({"state_dict": {"a": torch.ones(3)}}, first)
    checkpoint.link(first, best)
    checkpoint.link(first, best)  # a second call changes nothing
    assert best.samefile(first)
    second = tmp_path / "checkpoint-epoch2.pth"
    save({"state_dict": {"a": torch.zeros(3)}}, second)
    checkpoint.link(second, best)
    first.unlink()
    assert read(best)["state_dict"]["a"].tolist() == [0, 0, 0]
    assert names_in(tmp_path) == ["best_model.pth", "checkpoint-epoch2.pth"]


def test_a_copy_where_links_are_not_possible(tmp_path, monkeypatch) -> None:
    source, other = tmp_path / "a.pth", tmp_path / "b.pth"
    save(state(), source)

    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    checkpoint.link(source, other)
    assert read(other).keys() == read(source).keys()
    assert not other.samefile(source)
    assert names_in(tmp_path) == ["a.pth", "b.pth"]
