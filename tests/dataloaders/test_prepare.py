"""Interrupted, resumed and damaged downloads; malicious archives; VOC's augmented lists from SBD; no network needed."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataloaders.__main__ import main
from dataloaders.ade20k import ADE20K
from dataloaders.labels import labels
from dataloaders.prepare import download
from dataloaders.prepare.download import Archive, Unreachable, fetch, unpack, verify
from dataloaders.prepare.public import RECIPES, Recipe, by_hand, prepare
from utils.errors import UserError


class FileServer(ThreadingHTTPServer):
    """Serves bytes from memory, with Range and If-Range; can also break connections or ignore these headers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.break_after: list[int] = []  # one entry per answer: after how many bytes the connection breaks
        self.ranges = True
        self.asked: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FileServer

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        content = self.server.files.get(self.path.lstrip("/"))
        wanted = self.headers.get("Range")
        self.server.asked.append((self.path, wanted))
        if content is None:
            self.send_error(404)
            return
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        start = 0
        if wanted and self.server.ranges and self.headers.get("If-Range", tag) == tag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = len(content)
        if self.server.break_after:
            end = start + self.server.break_after.pop(0)
        self.wfile.write(content[start:end])


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


CONTENT = np.random.default_rng(0).bytes(300_000)
SHA1 = f"sha1:{hashlib.sha1(CONTENT).hexdigest()}"


def test_download_of_a_whole_file(server: FileServer, tmp_path: Path) -> None:
    server.files["a.bin"] = CONTENT
    fetch(f"{server.url}/a.bin", tmp_path / "new" / "a.bin", SHA1)
    assert (tmp_path / "new" / "a.bin").read_bytes() == CONTENT
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.bin"], "nothing else stays behind"


def test_broken_connections_are_resumed_by_range(server: FileServer, tmp_path: Path) -> None:
    server.files["a.bin"] = CONTENT
    server.break_after = [100_000, 50_000]
    fetch(f"{server.url}/a.bin", tmp_path / "a.bin", SHA1, pause=0)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == [None, "bytes=100000-", "bytes=150000-"]


def test_a_later_run_continues_where_the_first_stopped(server: FileServer, tmp_path: Path) -> None:
    server.files["a.bin"] = CONTENT
    server.break_after = [100_000, 0, 0]
    with pytest.raises(Unreachable):
        fetch(f"{server.url}/a.bin", tmp_path / "a.bin", SHA1, attempts=2, pause=0)
    assert not (tmp_path / "a.bin").exists()
    server.asked.clear()
    fetch(f"{server.url}/a.bin", tmp_path / "a.bin", SHA1)
    assert server.asked == [("/a.bin", "bytes=100000-")]
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_changed_file_is_not_glued_to_the_old_beginning(server: FileServer, tmp_path: Path) -> None:
    server.files["a.bin"] = b"old" * 50_000
    server.break_after = [1000, 0]
    with pytest.raises(Unreachable):
        fetch(f"{server.url}/a.bin", tmp_path / "a.bin", attempts=1, pause=0)
    server.files["a.bin"] = CONTENT
    server.break_after = []
    fetch(f"{server.url}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_server_without_ranges_starts_over(server: FileServer, tmp_path: Path) -> None:
    server.files["a.bin"] = CONTENT
    server.ranges = False
    server.break_after = [100_000]
    fetch(f"{server.url}/a.bin", tmp_path / "a.bin", SHA1, pause=0)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("left", [CONTENT, CONTENT + b"more than there is"])
def test_a_part_that_is_already_whole_or_too_long(server: FileServer, tmp_path: Path, left: bytes) -> None:
    server.files["a.bin"] = CONTENT
    (tmp_path / "a.bin.part").write_bytes(left)
    fetch(f"{server.url}/a.bin", tmp_path / "a.bin", SHA1, pause=0)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_no_file(server: FileServer, tmp_path: Path) -> None:
    server.files["a.bin"] = CONTENT[:-1] + b"!"
    with pytest.raises(UserError, match="sha1 is .* expected"):
        fetch(f"{server.url}/a.bin", tmp_path / "a.bin", SHA1)
    assert not list(tmp_path.glob("a.bin*.part"))
    assert not (tmp_path / "a.bin").exists()


def test_missing_files_and_absent_servers_are_distinguished(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="404"):
        fetch(f"{server.url}/none.bin", tmp_path / "none.bin")
    with pytest.raises(Unreachable, match="cannot be reached"):
        fetch("http://127.0.0.1:1/a.bin", tmp_path / "a.bin")


def test_a_lack_of_disk_space_is_reported_before_the_disk_is_full(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["a.bin"] = CONTENT
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="GB more"):
        fetch(f"{server.url}/a.bin", tmp_path / "a.bin")


# --------------------------------------------------------------------------------------------------------


def tar_of(files: dict[str, bytes], mode: str = "w", links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return buffer.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


FILES = {"a/b/one.txt": b"1", "a/two.txt": b"2" * 1000}


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.tar", tar_of(FILES)), ("x.tgz", tar_of(FILES, "w:gz")), ("x.zip", zip_of(FILES))],
    ids=["tar", "tgz", "zip"],
)
def test_unpacking_merges_into_what_is_there(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "mine.txt").write_text("kept")
    unpack(tmp_path / name, tmp_path / "out")
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == {"a/b/one.txt", "a/two.txt", "a/mine.txt"}
    assert (tmp_path / "out" / "a" / "two.txt").read_bytes() == b"2" * 1000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.tar", tar_of({"ok.txt": b"", "../evil.txt": b"!"})),
        ("x.tar", tar_of({"/evil.txt": b"!"})),
        ("x.tar", tar_of({}, links={"a": "/etc"})),
        ("x.zip", zip_of({"ok.txt": b"", "a/../../evil.txt": b"!"})),
        ("x.zip", zip_of({"..\\evil.txt": b"!"})),
        ("x.zip", zip_of({"C:\\evil.txt": b"!"})),
    ],
    ids=["tar-up", "tar-absolute", "tar-link", "zip-up", "zip-backslash", "zip-drive"],
)
def test_archives_that_reach_outside_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="not unpacked"):
        unpack(tmp_path / name, tmp_path / "out")
    assert not list(tmp_path.rglob("evil.txt"))
    assert not list((tmp_path / "out").iterdir()), "nothing half-done stays"


@pytest.mark.parametrize("name", ["x.tgz", "x.zip"])
def test_damaged_archives_are_refused_whole(tmp_path: Path, name: str) -> None:
    noise = {"a.txt": CONTENT, "b.txt": CONTENT[::-1]}
    content = bytearray(tar_of(noise, "w:gz") if name == "x.tgz" else zip_of(noise))
    content[len(content) // 2] ^= 0xFF
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(tmp_path / name, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_checksums_know_their_algorithm(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(CONTENT)
    verify(tmp_path / "f", f"md5:{hashlib.md5(CONTENT).hexdigest()}")
    verify(tmp_path / "f", None)
    with pytest.raises(UserError, match="md5 is"):
        verify(tmp_path / "f", "md5:00")


# --------------------------------------------------------------------------------------------------------


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def jpg(size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 60)).save(buffer, "JPEG")
    return buffer.getvalue()


def mat(array: np.ndarray) -> bytes:
    scipy_io = pytest.importorskip("scipy.io")
    buffer = io.BytesIO()
    # The nesting of SBD's files: a 1x1 struct array that holds the matrix.
    scipy_io.savemat(buffer, {"GTcls": {"Segmentation": array, "Boundaries": np.zeros((20, 1))}})
    return buffer.getvalue()


def voc_archives() -> dict[str, bytes]:
    """Return VOC with images 1-5 (1 train, 2 val annotated) and SBD with masks for 1-4 (4 only there)."""
    root = "VOCdevkit/VOC2012"
    voc = {f"{root}/JPEGImages/{i}.jpg": jpg() for i in range(1, 6)}
    voc |= {f"{root}/SegmentationClass/{i}.png": png(np.full((6, 8), i, np.uint8)) for i in (1, 2)}
    lists = f"{root}/ImageSets/Segmentation"
    voc |= {f"{lists}/train.txt": b"1\n", f"{lists}/val.txt": b"2\n", f"{lists}/trainval.txt": b"1\n2\n"}
    contours = {f"benchmark_RELEASE/dataset/cls/{i}.mat": mat(np.full((6, 8), 10 + i, np.uint8)) for i in range(1, 5)}
    return {"VOCtrainval_11-May-2012.tar": tar_of(voc), "benchmark.tgz": tar_of(contours, "w:gz")}


def test_voc_with_augmented_lists_from_the_command_line(
    server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files = voc_archives()
    command = ["prepare", "voc", "--dir", str(tmp_path), "--aug", "--mirror", server.url, "--no-verify"]
    assert main(command) == 0
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    lists = voc / "ImageSets" / "Segmentation"
    line = "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png".format
    assert lists.joinpath("train_aug.txt").read_text().splitlines() == [line(1), line(3), line(4)]
    assert lists.joinpath("val_aug.txt").read_text().splitlines() == [line(2)]
    assert lists.joinpath("trainval_aug.txt").read_text().splitlines() == [line(1), line(3), line(4), line(2)]
    values = {p.stem: set(np.asarray(Image.open(p)).flat) for p in (voc / "SegmentationClassAug").iterdir()}
    assert values == {"1": {1}, "2": {2}, "3": {13}, "4": {14}}, "VOC's own masks take precedence"
    palette = Image.open(voc / "SegmentationClassAug" / "3.png").getpalette()
    assert tuple(palette[39:42]) == labels("voc")[1][13]
    assert "python -m dataloaders check --config configs/voc_aug.json" in capsys.readouterr().out

    server.asked.clear()
    assert main(command) == 0
    assert server.asked == [], "a second run downloads nothing"


def test_the_mirror_s_other_archives_are_refused_without_no_verify(server: FileServer, tmp_path: Path) -> None:
    server.files = {"ADEChallengeData2016.zip": zip_of({"ADEChallengeData2016/x": b""})}
    with pytest.raises(UserError, match="sha1"):
        main(["prepare", "ade20k", "--dir", str(tmp_path), "--mirror", server.url])
    assert not (tmp_path / "ADEChallengeData2016").exists()


def test_ade20k_lands_where_its_loader_looks(server: FileServer, tmp_path: Path) -> None:
    parts = {"images": ("jpg", jpg()), "annotations": ("png", png(np.ones((6, 8), np.uint8)))}
    files = {f"ADEChallengeData2016/{part}/training/1.{kind}": data for part, (kind, data) in parts.items()}
    server.files = {"ADEChallengeData2016.zip": zip_of(files)}
    assert main(["prepare", "ade20k", "--dir", str(tmp_path), "--mirror", server.url, "--no-verify"]) == 0
    (entry,) = ADE20K(data_dir=str(tmp_path), split="training").entries
    assert (entry.name, entry.image.suffix, entry.label.suffix) == ("1", ".jpg", ".png")


def test_coco_stuff_lands_where_its_loader_looks(server: FileServer, tmp_path: Path) -> None:
    server.files = {
        "train2017.zip": zip_of({"train2017/1.jpg": jpg()}),
        "val2017.zip": zip_of({"val2017/2.jpg": jpg()}),
        "stuffthingmaps_trainval2017.zip": zip_of({"train2017/1.png": b"", "val2017/2.png": b""}),
    }
    args = ["prepare", "coco_stuff", "--dir", str(tmp_path), "--mirror", server.url, "--no-verify"]
    assert main([*args, "--delete-archives"]) == 0
    expected = {"images/train2017/1.jpg", "images/val2017/2.jpg"}
    expected |= {"annotations/train2017/1.png", "annotations/val2017/2.png"}
    found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*") if p.suffix in (".jpg", ".png")}
    assert found == expected
    assert not list(tmp_path.rglob("*.zip"))
    assert main(args) == 0, "what was unpacked and deleted is not fetched again"


def test_files_put_there_by_hand_need_no_network(tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    for name in ("gtFine_trainvaltest.zip", "leftImg8bit_trainvaltest.zip"):
        folder = name.removesuffix("_trainvaltest.zip")
        (tmp_path / "downloads" / name).write_bytes(zip_of({f"{folder}/train/ulm/x.png": b""}))
    assert main(["prepare", "cityscapes", "--dir", str(tmp_path)]) == 0
    assert (tmp_path / "leftImg8bit" / "train" / "ulm" / "x.png").exists()


def test_offline_says_which_files_to_put_where(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        main(["prepare", "voc", "--aug", "--dir", str(tmp_path), "--mirror", "http://127.0.0.1:1"])
    message = str(error.value)
    assert "VOCtrainval_11-May-2012.tar" in message
    assert "benchmark.tgz" in message
    assert str(tmp_path / "downloads") in message
    assert "6cd6e144f989b92b3379bac3b3de84fd" in message
    with pytest.raises(UserError, match=r"account[\s\S]*leftImg8bit_trainvaltest.zip"):
        main(["prepare", "cityscapes", "--dir", str(tmp_path)])


def test_an_archive_that_the_publisher_changed_is_found(tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "a.zip").write_bytes(zip_of({"a": b"1"}))
    recipe = Recipe((Archive("a.zip", "http://127.0.0.1:1/a.zip", "md5:00"),), "c.json", "page", "note")
    with pytest.raises(UserError, match="md5 is"):
        prepare(recipe, tmp_path)
    assert "[there]" in by_hand(recipe, tmp_path / "downloads")


def test_every_recipe_names_a_config_and_a_page(root: Path) -> None:
    for name, recipe in RECIPES.items():
        assert (root / recipe.config).is_file(), name
        assert recipe.page.startswith("http")
        assert all(a.url is None or a.url.endswith(a.filename) for a in recipe.archives)


def test_aug_is_only_for_voc(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--aug"):
        main(["prepare", "ade20k", "--aug", "--dir", str(tmp_path)])


def test_help_imports_neither_torch_nor_opencv(root: Path) -> None:
    code = "import sys, runpy; sys.argv = ['x', '--help']\n"
    code += "try: runpy.run_module('dataloaders', run_name='__main__')\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'cv2', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
