"""The folders of runs: create a new one, lock it while the run is active, find the newest one to resume."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from base.resume import changes_of_identity
from utils import checkpoint, distributed, files
from utils import config as configs
from utils.config.schema import Config
from utils.errors import UserError
from utils.evaluation import checkpoint_fit
from utils.files import expand

try:
    import fcntl
except ImportError:  # Windows: runs are not locked there
    fcntl = None  # type: ignore[assignment]

LATEST, BEST = "latest.pth", "best_model.pth"
EPOCH = "checkpoint-epoch{}.pth"
LOCK = ".lock"


def parent_folder(config: Config) -> Path:
    """Return the folder with the runs of a config: ``save_dir/name/loss/predict.val``."""
    return expand(config.trainer.save_dir) / config.name / config.loss.type / config.predict.val


def tensorboard_folder(config: Config, folder: Path) -> Path | None:
    """Return the folder of a run's TensorBoard logs, ``log_dir/name/MM-DD_HH-MM``; None: no logs."""
    if not config.trainer.tensorboard:
        return None
    return expand(config.trainer.log_dir) / config.name / folder.name


def with_own_logs(config: Config, folder: Path) -> Config:
    """Return the config of a checkpoint, with its TensorBoard logs in the folder of the run.

    If the logs are already at the place that the config names, the run continues them there. Otherwise the config is
    not followed, because a checkpoint from somebody else must not choose where files are written.
    """
    logs = tensorboard_folder(config, folder)
    if logs is None or any(logs.glob("events*")) or logs.resolve().is_relative_to(folder.resolve()):
        return config
    own = folder / "tensorboard"
    if distributed.is_first():
        print(f"note: TensorBoard's logs go to {own}; to choose another folder: --set trainer.log_dir=FOLDER")
    settings = config.trainer.model_copy(update={"log_dir": str(own)})
    return config.model_copy(update={"trainer": settings})


def moved(state: Mapping[str, Any], folder: Path) -> list[str]:
    """Return overrides for a run that has moved: folders that cannot be written to here are replaced by its own."""
    trainer = (state.get("config") or {}).get("trainer") or {}
    own = {"save_dir": folder, "log_dir": folder / "tensorboard"}
    lost = [name for name in own if isinstance(trainer.get(name), str) and files.unwritable(trainer[name])]
    return [f"trainer.{name}={json.dumps(str(own[name]))}" for name in lost]


@contextmanager
def new(config: Config) -> Iterator[Path]:
    """Create and lock the folder of a new run, ``.../MM-DD_HH-MM``, the same for all its processes.

    No other run uses this folder or its folder of TensorBoard logs. If the run ends before it has saved anything, the
    folders are removed.
    """
    made = _claim(config) if distributed.is_main() else []
    folder = Path(distributed.broadcast(str(made[0]) if made else ""))
    with locked(folder):
        try:
            yield folder
        finally:
            if distributed.is_main() and not any(folder.glob("*.pth")):
                _remove(made, (folder, tensorboard_folder(config, folder)))


def _claim(config: Config) -> list[Path]:
    """Create the folder of a run and that of its TensorBoard logs; return all new folders, that of the run first."""
    stamp, number = datetime.now().strftime("%m-%d_%H-%M"), 1
    while True:
        folder = parent_folder(config) / (stamp if number == 1 else f"{stamp}-{number}")
        wanted = [path for path in (folder, tensorboard_folder(config, folder)) if path is not None]
        made: list[Path] = []
        try:
            for path in wanted:
                above = [p for p in path.parents if not p.exists()]
                path.parent.mkdir(parents=True, exist_ok=True)
                made += above
                path.mkdir()  # fails if another run has created it, so each run gets a folder for itself
                made.append(path)
        except FileExistsError:
            _remove(made, wanted)
            number += 1
        except OSError as error:
            _remove(made, wanted)
            raise UserError(f"{folder}: the run's folder cannot be created: {files.reason(error)}") from None
        else:
            made.remove(folder)
            return [folder, *made]


def _remove(made: list[Path], own: Any) -> None:
    """Remove the folders of a run that saved nothing, and the new folders above them if they are empty."""
    for path in sorted(made, key=lambda path: len(path.parts), reverse=True):
        if path in own:
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):  # another run uses it by now
                path.rmdir()


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Stop other processes from resuming a run while this one trains it; the lock of a killed process is released.

    Raises:
        UserError: another process trains the run.
    """
    if fcntl is None or not distributed.is_main():
        yield folder
        return
    with _lock_file(folder / LOCK) as file:
        try:
            yield folder
        finally:
            with suppress(OSError):
                if file is not None:
                    (folder / LOCK).unlink()


def _lock_file(path: Path) -> Any:
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (the caller closes it, which releases the lock)
        try:
            # Not flock: workers inherit it, and would keep it for a while after the main process was killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return file  # a file system without locks
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise UserError(
                f"{path.parent}: another process trains this run ({owner}); wait for it or stop it, or start a new run"
            ) from None
        with suppress(OSError):
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
                return file
        file.close()  # its owner has just removed it


def newest(config: Config) -> Path:
    """Return the newest checkpoint of the config's runs.

    Runs with another seed, model, optimizer, schedule, loss or data are skipped, so that each run of a sweep continues
    itself.

    Raises:
        UserError: there is no such checkpoint.
    """
    parent = parent_folder(config)
    found = [p for name in (LATEST, BEST) for p in parent.glob(f"*/{name}")]
    found += [p for folder in parent.glob("*") if folder.is_dir() for p in _numbered(folder).values()]
    found.sort(key=lambda p: (p.stat().st_mtime_ns, p.name == LATEST), reverse=True)
    if not found:
        raise UserError(f"-r auto: there is no run with a checkpoint below {parent}; start one without -r")
    changes: dict[Path, list[str]] = {}
    for path in found:
        if path.parent not in changes:
            changes[path.parent] = changes_of_identity(_config_of_run(path), config)
        if not changes[path.parent]:
            # The fit writes best_model.pth again, so it may be newer than the last state of the run.
            others = [p for p in found if p.parent == path.parent and p.name != BEST]
            fitted = path.name == BEST and others and "calibration" in checkpoint.read(path)
            return others[0] if fitted else path
    nearest = found[0]
    listed = "".join(f"\n    {change}" for change in changes[nearest.parent][:8])
    raise UserError(
        f"-r auto: no run below {parent} has this config. The newest one, {nearest.parent.name}, differs:{listed}\n"
        f"to continue it with these changes: -r {nearest} -c CONFIG; to start a new run, leave -r out"
    )


def _config_of_run(path: Path) -> Mapping[str, Any]:
    try:
        return configs.read(path.parent / "config.json")
    except UserError:
        return checkpoint_fit.without_fit(checkpoint.read(path)).get("config") or {}


def restore_links(state: Mapping[str, Any], path: Path) -> None:
    """Give a checkpoint all its names, in case the run was killed after it wrote the first one."""
    for name in state.get("names", ()):
        other = path.parent / name
        if name not in (LATEST, BEST) or other.exists() and other.samefile(path):
            continue
        if not other.exists() or checkpoint.read(other).get("iteration", 0) < state["iteration"]:
            checkpoint.link(path, other)


def prune(folder: Path, keep: int | None, epoch: int) -> None:
    """Remove the numbered checkpoints up to ``epoch``, except the last ``keep``; None: keep all.

    A run that continues from an earlier checkpoint keeps the later ones until it writes them again.
    """
    if keep is not None:
        numbered = {number: path for number, path in _numbered(folder).items() if number <= epoch}
        for number in sorted(numbered)[:-keep]:
            numbered[number].unlink()


def _numbered(folder: Path) -> dict[int, Path]:
    """Return the numbered checkpoints by epoch; files such as checkpoint-epoch5_calibrated.pth are none."""
    names = ((re.fullmatch(r"checkpoint-epoch(\d+)\.pth", path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in names if match}
