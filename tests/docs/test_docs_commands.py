"""Every command that the documentation gives is run: here, on small data, or by the test that is named here.

What no test can run (a cluster, a camera, packages to install) stands in ``NOT_RUN`` with the reason. A command that is
new in the documentation is run here by itself; where that cannot be, one of the two lists must say so.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.config.test_configs import TREES
from tests.docs.markdown import ROOT, Command, commands, commands_of, ours, pages
from tests.predecessors import PUBLISHED
from tests.running import run_here
from tests.small_checkpoint import needs_new_torch
from utils import config as configs

Words = tuple[str, ...]

# Run by a test of the part itself, downloads from a server of its own, GPUs as processes on the CPU. The command's
# beginning, as a regular expression: the test.
ELSEWHERE = {
    r"python -m dataloaders prepare voc --dir data/voc": (
        "tests/dataloaders/test_prepare.py::test_voc_with_augmented_lists_from_the_command_line"
    ),
    r"python -m dataloaders prepare ade20k": (
        "tests/dataloaders/test_prepare.py::test_ade20k_lands_where_its_loader_looks"
    ),
    r"python -m dataloaders prepare cityscapes": (
        "tests/dataloaders/test_prepare.py::test_files_put_there_by_hand_need_no_network"
    ),
    r"python -m dataloaders prepare coco_stuff": (
        "tests/dataloaders/test_prepare.py::test_coco_stuff_lands_where_its_loader_looks"
    ),
    r"python -m dataloaders prepare cvat --from export.zip": (
        "tests/dataloaders/test_convert.py::test_the_archive_that_a_tool_exports"
    ),
    r"python -m dataloaders prepare (coco|labelme) --from": (
        "tests/dataloaders/test_convert.py::test_coco_polygons_and_what_overlaps"
    ),
    r"python -m dataloaders plan --data-dir": "tests/dataloaders/test_plan.py::test_a_complete_commented_config",
    r"python -m utils\.export .*--format onnx": (
        "tests/scripts/test_export.py::test_the_program_and_its_metadata_decide_as_the_predictor_does"
    ),
    r"python test\.py -r \S+ \S+\.pth": (
        "tests/scripts/test_test_script.py::test_an_ensemble_scores_the_mean_of_the_probabilities"
    ),
    r"python test\.py --folds": (
        "tests/scripts/test_folds.py::test_each_image_is_scored_once_by_the_checkpoint_that_held_it_out"
    ),
    r"python inference\.py -m \S+ \S+\.pth": "tests/inference/test_script.py::test_an_ensemble",
    r"python -m utils\.predict .*--labels": "tests/predict/test_saved.py::test_scores_are_those_of_the_metrics",
    r"python -m utils\.predict .*--use": "tests/predict/test_saved.py::test_a_fit_is_applied_to_other_probabilities",
    r"python -m utils\.demo --model": "tests/scripts/test_demo.py::test_the_page_is_built_and_answers",
    r"torchrun --standalone --nproc_per_node 4 train\.py": (
        "tests/scripts/test_train_script.py::test_two_processes_train"
    ),
    r"torchrun --nproc_per_node 4 test\.py": (
        "tests/scripts/test_test_script.py::test_two_processes_report_what_one_does"
    ),
    r"torchrun --nproc_per_node 4 inference\.py": (
        "tests/inference/test_videos_and_processes.py::test_several_processes_share_a_folder"
    ),
    r"python train\.py .*n_gpu=4 --set use_synch_bn=true": (
        "tests/scripts/test_train_script.py::test_the_launcher_for_synchronized_batch_norm"
    ),
    r"python test\.py -r net\.pt2": (
        "tests/models/test_external.py::test_an_exported_network_is_scored_and_used_without_its_code"
    ),
    r"make demo$": "tests/docs/test_docs_commands.py::test_what_make_demo_runs",
    r"python -m models( PSPNet DeepLab)?$": "tests/models/test_models.py::test_the_table_is_printed",
    r"diff /tmp/before": "tests/docs/test_docs_commands.py::test_the_same_twice",
}

_NETWORK = "installs packages from the network; continuous integration does it through make"
_HOURS = "takes minutes to hours; tests/benchmarks/ runs its parts"
_GPUS = "needs several GPUs"
NOT_RUN = {
    r"python3 -m venv": _NETWORK,
    r"source \.venv/bin/activate": "changes the shell it is typed into",
    r"pip install": _NETWORK,
    r"pre-commit install": "changes the repository; make lint runs the same checks",
    r"make (test|lint|format)": "this suite, ruff and mypy in an environment of their own: continuous integration",
    r"\.venv/bin/python -m (pytest|mypy)": "this suite; make lint",
    r"make bench": _HOURS,
    r"python -m benchmarks\.": _HOURS,
    r"tensorboard --logdir": "a server that runs until it is stopped; tests/test_logger.py reads what it would show",
    r"python train\.py .*-d 0,1": _GPUS,
    r"python -m models .*--device cuda": "needs a GPU",
    r"python train\.py .*n_gpu=4": _GPUS,
    r"torchrun --nnodes 2": "needs two machines",
    r"docker run": "needs Docker",
    r"srun |scontrol |head -n 1": "needs Slurm",
}

# These appear in sentences without their arguments; they print how they are used.
MENTIONS = {
    ("-m", "dataloaders", "check"),
    ("-m", "dataloaders", "plan"),
    ("-m", "dataloaders", "prepare"),
    ("-m", "dataloaders.shapes"),
    ("-m", "utils.config", "check"),
    ("-m", "utils.demo"),
    ("-m", "utils.lr_scheduler"),
    ("-m", "utils.predict"),
    ("-m", "utils.export"),
}


def listed(words: Words, table: dict[str, str]) -> bool:
    line = " ".join(words)
    return any(re.match(pattern, line) for pattern in table)


def in_run(word: str) -> str:
    """Replace the folder of a checkpoint by RUN: ``saved/.../best_model.pth``, ``best_model.pth``."""
    return re.sub(r"^(?!old/).*?(\w+\.pth)$", r"RUN/\1", word)


def to_run() -> list[Words]:
    """Return the commands of this project that are in neither list, each once, wherever its checkpoint is."""
    found = dict.fromkeys(tuple(map(in_run, c.words)) for page in pages() for c in commands(page) if ours(c))
    return [words for words in found if not listed(words, ELSEWHERE) and not listed(words, NOT_RUN)]


# -- the lists -----------------------------------------------------------------------------------------------------


def test_every_command_is_run_or_listed() -> None:
    for page in pages():
        for command in commands(page):
            known = ours(command) or listed(command.words, ELSEWHERE) or listed(command.words, NOT_RUN)
            assert known, (
                f"{command}: is no program of ours; say in ELSEWHERE what runs it, or in NOT_RUN why nothing can"
            )


@pytest.mark.parametrize("pattern", [*ELSEWHERE, *NOT_RUN])
def test_the_lists_contain_only_what_exists(pattern: str) -> None:
    lines = [" ".join(c.words) for page in pages() for c in commands(page)]
    assert any(re.match(pattern, line) for line in lines), f"no page gives a command like {pattern}"


@pytest.mark.parametrize("test", sorted(set(ELSEWHERE.values())))
def test_the_tests_that_are_named_exist(test: str) -> None:
    file, _, name = test.partition("::")
    assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("words", dict.fromkeys(c.words for p in pages() for c in commands(p) if c.words[0] == "make"))
def test_make_knows_what_to_do(words: Words) -> None:
    done = subprocess.run([*words, "-n"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert ".venv/bin/python" in done.stdout


# -- a folder to run them in -----------------------------------------------------------------------------------------

SMALL = """
    n_gpu=0 trainer.epochs=1 trainer.limit_batches=2 trainer.val_per_epochs=1 trainer.amp=off arch.args.width=4
    train_loader.args.num_workers=0 train_loader.args.batch_size=4
"""
SHAPES = "{0}_loader.args.length=8 {0}_loader.args.size=32 {0}_loader.args.num_workers=0"
CROPS = "train_loader.args.crop_size=32"


def small(file: str, overrides: str) -> dict[str, Any]:
    """Return a config that is small enough for a test."""
    raw = configs.override(configs.read(ROOT / file), [*SMALL.split(), *overrides.split()])
    for stage in ("val_loader", "test_loader"):
        if stage in raw:
            raw[stage]["args"]["num_workers"] = 0
    return raw


def predecessors(**loaders: str) -> dict[str, Any]:
    """Return a small config as in the predecessors' checkpoints; ``loaders``: the data folder of each loader."""
    small = PUBLISHED | {
        "arch": {"type": "UNet", "args": {"width": 4, "backbone": "resnet50", "freeze_bn": False}},
        "trainer": PUBLISHED["trainer"] | {"epochs": 1, "val_per_epochs": 1},
    }
    for stage, folder in loaders.items():
        args = {"data_dir": folder, "split": "val", "batch_size": 2, "crop_size": 32, "num_workers": 0}
        args |= {"split": "train", "augment": True, "shuffle": True} if stage == "train" else {"val": True}
        small[f"{stage}_loader"] = {"type": "VOC", "args": args}
    return small


def write_predecessors_checkpoint(path: Path, words: list[str]) -> None:
    """Write ``best_model.pth`` as the predecessors do; its data folder is missing if ``words`` name another one."""
    import models

    loaders = dict.fromkeys(("train", "val", "test"), "data")
    moved = next((stage for stage in ("test", "val") if f"{stage}_loader.args.data_dir=data" in words), None)
    if moved == "val":  # the older project had no test_loader
        del loaders["test"]
    if moved:
        loaders = dict.fromkeys(loaders, "moved/away")
    torch.manual_seed(0)
    weights = models.build("UNet", 21, width=4).state_dict()
    content = {
        "arch": "DataParallel",
        "epoch": 80,
        "state_dict": {f"module.{name}": value for name, value in weights.items()},
        "optimizer": {"state": {}, "param_groups": []},
        "monitor_best": np.float64(0.7),
        "config": predecessors(**loaders),
    }
    path.parent.mkdir(exist_ok=True)
    torch.save(content, path, _use_new_zipfile_serialization=False)


class Workspace:
    """A folder with small versions of everything that the documented commands need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder  # of the training, as soon as there is one

    def fill(self) -> None:
        """Write configs and data, train, fit, and save probabilities."""
        shapes = " ".join(SHAPES.format(stage) for stage in ("train", "val", "test"))
        own = small("configs/folder.json", CROPS)
        for file, content in (
            ("config.json", small("config.json", shapes)),
            ("mine.json", own | {"name": "mine"}),
            ("configs/folder.json", own),
            ("old.json", predecessors(train="data", val="data", test="data")),
        ):
            path = self.folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content), encoding="utf-8")
        TREES["Folder"](self.folder / "data/mine", {}, 2)
        for split in ("train", "val"):
            TREES["VOC"](self.folder / "data/camvid", {"split": split}, 11)
        shutil.copytree(ROOT / "docs", self.folder / "docs")
        self.call("python -m dataloaders.shapes --out data --n 8 --size 48")
        for photos in ("photos", "folder", "new_images", "data/shapes/VOCdevkit/VOC2012/JPEGImages"):
            shutil.copytree(self.folder / "data/VOCdevkit/VOC2012/JPEGImages", self.folder / photos)
        self.call("python train.py --config config.json")
        (self.run,) = (self.folder / "saved").glob("UNet_Shapes/*/*/*-*")
        self.call("python test.py -r RUN/best_model.pth --fit")
        self.call("python test.py -r RUN/best_model.pth --save-probs probs")

    def call(self, line: str) -> None:
        self.execute(tuple(line.split()))

    def launch(self, command: Words) -> str:
        """Run a command that starts processes; return what they printed."""
        script = self.adapted(command)
        options = command[1 : command.index(script[0])]
        words = [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / script[0]), *script[1:]]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, cwd=self.folder, env=env, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def execute(self, command: Words) -> None:
        """Run a command in the folder and in this process, which has already imported torch."""
        words = self.adapted(command)
        if "--save-probs" in words:  # outputs of another checkpoint, from earlier commands, are not mixed with these
            shutil.rmtree(self.folder / words[words.index("--save-probs") + 1], ignore_errors=True)
        code = run_here(words, self.folder)
        assert not code, f"{shlex.join(words)}: exit code {code}"

    def adapted(self, command: Words) -> list[str]:
        """Replace the documentation's files by those of this folder: runs, places in /tmp, FILE."""
        words = ours(Command("", command))
        assert words is not None
        if words in MENTIONS:
            return [*words, "--help"]
        file = "RUN/best_model.pth" if "-r" in words else "config.json"
        adapted = [in_run(file if word == "FILE" else word) for word in words]
        adapted = [word.replace("/tmp/", "tmp/").replace("RUN/", f"{self.run}/") for word in adapted]
        if "old/best_model.pth" in adapted:
            write_predecessors_checkpoint(self.folder / "old/best_model.pth", adapted)
        if adapted[0] == "train.py" and "-r" in adapted:  # one more epoch
            adapted += ["--set", f"trainer.epochs={self.epochs(self.run) + 1}"]
        return adapted

    def files(self) -> set[tuple[Path, int]]:
        """Return all files and when they were written."""
        return {(path, path.stat().st_mtime_ns) for path in self.folder.rglob("*")}

    @staticmethod
    def epochs(run: Path) -> int:
        return (run / "log.csv").read_text(encoding="utf-8").count("\n") - 1


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    made = Workspace(tmp_path_factory.mktemp("docs"))
    made.fill()
    return made


# -- the commands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", to_run(), ids=" ".join)
def test_a_command_does_what_it_is_given_for(command: Words, workspace: Workspace, capsys) -> None:
    if "utils.export" in command and needs_new_torch.args[0]:
        pytest.skip(needs_new_torch.kwargs["reason"])
    before = workspace.files()
    if command[0] == "torchrun":
        printed = workspace.launch(command)
    else:
        workspace.execute(command)
        printed = capsys.readouterr().out
    assert printed or workspace.files() != before, "it has done nothing that could be seen"


def test_the_same_twice(workspace: Workspace) -> None:
    """CONTRIBUTING.md compares ``log.csv`` with diff, so it contains only computed values."""
    (command,) = (c for c in to_run() if "trainer.save_dir=/tmp/before" in c)
    for name in ("before", "after"):
        workspace.execute(tuple(word.replace("/tmp/before", f"/tmp/twice_{name}") for word in command))
    before, after = (workspace.folder / "tmp" / f"twice_{name}" for name in ("before", "after"))
    (log,) = before.glob("UNet_Shapes/*/*/*/log.csv")
    (again,) = after.glob("UNet_Shapes/*/*/*/log.csv")
    assert log.read_text() == again.read_text()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_what_make_demo_runs(workspace: Workspace) -> None:
    done = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.replace("\\\n", " ").splitlines()
    found = [words for line in lines for words in commands_of(line) if ours(Command("Makefile", words))]
    assert [Path(words[1]).name for words in found] == ["train.py", "test.py", "-m", "inference.py"]
    for words in found:
        workspace.execute(words)
    demo = workspace.folder / "saved/demo"
    photos = {path.stem for path in (demo / "VOCdevkit/VOC2012/JPEGImages").iterdir()}
    assert {path.stem for path in (demo / "masks").glob("*.png")} == photos
