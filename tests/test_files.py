"""Files are written completely or not at all, with the user's permissions; CSV cells are never formulas."""

import csv
import errno
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.errors import UserError
from utils.files import atomic, csv_text, unescape, write_bytes, write_text

ROOT = Path(__file__).resolve().parents[1]
WRITER = """
import sys
from utils.files import write_bytes
for _ in range(150):
    write_bytes(sys.argv[1], sys.argv[2].encode() * 300_000)
"""


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_three_processes_that_write_one_file_never_mix(tmp_path) -> None:
    path, letters = tmp_path / "results.json", "abc"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), letter], cwd=ROOT) for letter in letters]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            content = path.read_bytes().decode()
            assert len(content) == 300_000, "half a file"
            assert len(set(content)) == 1, "a mixed file"
            seen.add(content[0])
        time.sleep(0.001)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert len(seen) > 1  # they really wrote at the same time
    assert names_in(tmp_path) == ["results.json"]


def test_a_kill_while_writing_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    child = os.fork()
    if child == 0:
        with atomic(path) as temporary:
            temporary.write_text("new")
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)
    os.waitpid(child, 0)
    assert path.read_text() == "old"
    assert [n for n in names_in(tmp_path) if not n.startswith(".")] == ["a.txt"]


@pytest.mark.parametrize("wrong", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_error_while_writing_leaves_the_old_file(wrong, tmp_path) -> None:
    path = tmp_path / "deep" / "a.bin"
    write_bytes(path, b"old")
    expected = pytest.raises(UserError, match="a.bin: could not be written: the disk is full; the earlier file")
    with expected if isinstance(wrong, OSError) else pytest.raises(KeyboardInterrupt), atomic(path) as temporary:
        temporary.write_bytes(b"half")
        raise wrong
    assert path.read_bytes() == b"old"
    assert names_in(path.parent) == ["a.bin"]


def test_permissions_follow_the_umask(tmp_path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "group", "")
        os.umask(0o077)
        write_text(tmp_path / "own", "")
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("group", "own")}
    assert modes == {"group": 0o640, "own": 0o600}


def test_content_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch) -> None:
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *a: (order.append("replace"), replace(*a)))
    write_text(tmp_path / "a", "x")
    assert order == ["fsync", "replace"]


@pytest.mark.parametrize("place", ["file/a", "folder", "/dev/null"])
def test_places_that_cannot_contain_a_file(place, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="could not be written"):
        write_text(tmp_path / place, "x")
    assert names_in(tmp_path) == ["file", "folder"]
    assert not Path("/dev/null").is_file()


def test_long_names_and_names_of_other_scripts(tmp_path) -> None:
    for name in ("n" * 255, "ü" * 127, "\N{CJK UNIFIED IDEOGRAPH-4E00}" * 85):
        write_text(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"


def read_back(rows: list[list[str]]) -> list[list[str]]:
    return [[unescape(cell) for cell in row] for row in csv.reader(csv_text(rows).splitlines(keepends=True))]


@given(st.lists(st.text(st.sampled_from("'=+-@\ta1,\" \n"), max_size=6), min_size=1, max_size=4))
def test_cells_are_no_formulas_and_read_back_the_same(cells) -> None:
    for cell in next(csv.reader([csv_text([cells])], strict=True), [""]) if "\n" not in "".join(cells) else []:
        assert not cell.startswith(("=", "+", "-", "@", "\t")) or float(cell) is not None
    assert read_back([cells]) == [cells] or cells == [""]


def test_numbers_stay_numbers() -> None:
    assert csv_text([["-0.250000", -1.5, "1e-3", "", None, "-inf"]]) == "-0.250000,-1.5,1e-3,,,-inf\n"
    assert csv_text([["=1+1", "-1+cmd", "@a", "+x", "'=a", "a=b"]]) == "'=1+1,'-1+cmd,'@a,'+x,''=a,a=b\n"
