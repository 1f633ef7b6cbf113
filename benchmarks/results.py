"""Train and test the networks of ``docs/results.md``, and write its tables.

    python -m benchmarks.results --camvid DIR --drive DIR                # every row; continues where it was stopped
    python -m benchmarks.results --camvid DIR camvid_enet --seeds 1      # one row, one seed
    python -m benchmarks.results --jobs 6 --set n_gpu=1                  # six runs side by side
    python -m benchmarks.results --write-docs                            # the tables of what has been run
    python -m benchmarks.results camvid_enet --save-probs                # keep the probabilities (hundreds of MB)

Each run is trained by train.py, which ends with the fit on the held-out images. ``test.py -p all`` scores it twice:
with the fit (``fitted``) and without it (``plain``). With ``--save-probs`` the second one saves the network's
probabilities, and ``python -m utils.predict --probs OUT/ROW/SEED/probs -p all --labels LABELS`` decides again without
the network. ``--camvid`` is the folder that contains ``VOCdevkit``,
``--drive`` the folder that contains ``images_split``. Without the folder, its rows are skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from benchmarks import letters, markdown

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "results.md"
PROCEDURES = ("T", "max", "max_present", "rankdice_paper", "rankdice", "rankdice_map")
UNFITTED = ("predict.temperature=1", "predict.threshold=0.5", "predict.presence=prune", "predict.bias=null")
LITE0 = "EfficientNet-Lite0"


@dataclass(frozen=True)
class Row:
    """A row of the tables: a network and its data.

    Args:
        data: heading of the data, as in DATA.
        network: for the reader.
        config: file of the config.
        changes: fields of the config that differ.
        seeds: runs.
    """

    data: str
    network: str
    config: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 3


# Heading of the data -> (option that names its folder, or None; where in it the images are).
DATA = {
    "CamVid, one clip": ("camvid", "VOCdevkit/VOC2012"),
    "CamVid, another drive": ("camvid", "VOCdevkit/VOC2012"),
    "DRIVE, vessels": ("drive", "."),
    "Letters, 63 classes": (None, "."),
    "Shapes": (None, "."),
}
_CLIP, _DRIVE, _VESSELS, _LETTERS, _SHAPES = DATA
_SCRATCH = {"optimizer.args.lr": 0.002, "trainer.epochs": 60, "trainer.val_per_epochs": 10}


_CAMVID, _DRIVES = "configs/results/camvid.json", "configs/results/drive.json"


def _encoder(network: str) -> dict[str, Any]:
    return {"arch.type": network}


# The cheapest network on this encoder: an epoch of 331 images takes a minute on one core.
_PYRAMID = {**_encoder("UperNet"), "arch.args.fpn_out": 64, "trainer.epochs": 80}


def _scratch(network: str, **args: Any) -> dict[str, Any]:
    return {"arch": {"type": network, "args": args}, **_SCRATCH}


_R18 = {"backbone": "resnet18", "pretrained": False}
ROWS = {
    "camvid_unet_lite0": Row(_CLIP, f"U-Net decoder, {LITE0}", _CAMVID),
    "camvid_pspnet_lite0": Row(_CLIP, f"PSPNet, {LITE0}", _CAMVID, _encoder("PSPNet")),
    "camvid_upernet_lite0": Row(_CLIP, f"UperNet (64 channels), {LITE0}", _CAMVID, _PYRAMID),
    "camvid_deeplab_lite0": Row(_CLIP, f"DeepLabV3+, {LITE0}", _CAMVID, _encoder("DeepLab")),
    "drives_unet_lite0": Row(_DRIVE, f"U-Net decoder, {LITE0}", _CAMVID),
    "drives_pspnet_lite0": Row(_DRIVE, f"PSPNet, {LITE0}", _CAMVID, _encoder("PSPNet")),
    "drives_upernet_lite0": Row(_DRIVE, f"UperNet (64 channels), {LITE0}", _CAMVID, _PYRAMID),
    "drives_deeplab_lite0": Row(_DRIVE, f"DeepLabV3+, {LITE0}", _CAMVID, _encoder("DeepLab")),
    "camvid_enet": Row(_CLIP, "ENet, from scratch", _CAMVID, _scratch("ENet")),
    "camvid_unet": Row(_CLIP, "U-Net (width 32), from scratch", _CAMVID, _scratch("UNet", width=32)),
    "camvid_pspnet": Row(_CLIP, "PSPNet-R18, from scratch", _CAMVID, _scratch("PSPNet", **_R18)),
    "camvid_deeplab": Row(_CLIP, "DeepLabV3+-R18, from scratch", _CAMVID, _scratch("DeepLab", **_R18)),
    "drive_unet_lite0": Row(_VESSELS, f"U-Net decoder, {LITE0}", _DRIVES),
    "drive_unet": Row(
        _VESSELS,
        "U-Net (width 32), from scratch",
        _DRIVES,
        {"arch": {"type": "UNet", "args": {"width": 32}}, "optimizer.args.lr": 0.002},
    ),
    "letters_upernet_lite0": Row(_LETTERS, f"UperNet (64 channels), {LITE0}", "configs/results/letters.json"),
    "shapes_unet": Row(_SHAPES, "U-Net (width 8), from scratch", "config.json", seeds=5),
}


# -- data ----------------------------------------------------------------------------------------------------------


def write_lists(camvid: Path, out: Path) -> None:
    """Write the lists of images for CamVid's rows: ``out/clip/{split}.txt`` and ``out/drives/{split}.txt``.

    Held-out images (``val``) choose the epoch and are fitted on. They are the last ones of each drive, so that hardly
    any of them is the neighbor of a training image.

    * clip: trained on train, tested on the published val split, which is one continuous clip.
    * drives: trained on two of train's drives, tested on the third, 0006R0.
    """
    lists = camvid / "ImageSets" / "Segmentation"
    train, val = ((lists / f"{name}.txt").read_text().split() for name in ("train", "val"))
    drives: dict[str, list[str]] = {}
    for name in train:
        drives.setdefault(name.split("_")[0], []).append(name)
    for folder, test, share in (("clip", val, 0.1), ("drives", drives["0006R0"], 0.2)):
        used = [sorted(images) for images in drives.values() if images != test]
        kept = [round(len(images) * (1 - share)) for images in used]
        splits = {
            "train": [name for images, n in zip(used, kept, strict=True) for name in images[:n]],
            "val": [name for images, n in zip(used, kept, strict=True) for name in images[n:]],
            "test": test,
        }
        (out / folder).mkdir(parents=True, exist_ok=True)
        for split, names in splits.items():
            lines = [f"JPEGImages/{name}.jpg\tSegmentationClass/{name}.png\n" for name in names]
            (out / folder / f"{split}.txt").write_text("".join(lines))


def fields(row: Row, seed: int, data: Path | None, folder: Path, lists: Path) -> list[str]:
    """Return the ``--set`` options of a run."""
    changes = {
        "seed": seed,
        "trainer.save_dir": str(folder),
        "trainer.log_dir": str(folder / "runs"),
        **row.changes,
    }
    if row.data == _LETTERS:
        changes |= {f"{kind}_loader.args.data_dir": str(lists / "letters") for kind in ("train", "val", "test")}
    if data is not None:
        loaders = ["train_loader", "test_loader"] + ["val_loader"] * (row.data in (_CLIP, _DRIVE))
        changes |= {f"{loader}.args.data_dir": str(data) for loader in loaders}
        if row.data in (_CLIP, _DRIVE):
            which = lists / ("clip" if row.data == _CLIP else "drives") / "{split}.txt"
            changes |= {f"{loader}.args.list_file": str(which) for loader in loaders}
    return [f"--set={key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changes.items()]


# -- running -------------------------------------------------------------------------------------------------------


def script(log: Path, *arguments: object) -> None:
    """Run one of the project's scripts; its output goes to ``log``."""
    command = [sys.executable, *map(str, arguments)]
    with open(log, "a", encoding="utf-8") as file:
        print("$", *command[1:], file=file, flush=True)
        done = subprocess.run(command, cwd=ROOT, check=False, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{arguments[0]} ended with {done.returncode}; its output is in {log}")


def run(row: Row, folder: Path, options: Sequence[str], probs: bool = False) -> None:
    """Train and test, skipping steps that are already done; with ``probs``, save the probabilities."""
    log = folder / "log.txt"
    timing = folder / "seconds.json"
    if not timing.exists():
        start = time.perf_counter()
        resume = ["-r", "auto"] if list(folder.rglob("latest.pth")) else []
        script(log, "train.py", "-c", row.config, *options, *resume)
        timing.write_text(json.dumps({"train": time.perf_counter() - start, "resumed": bool(resume)}))
    (best,) = folder.rglob("best_model.pth")
    scoring = [option for option in options if not option.startswith(("--set=arch", "--set=optimizer"))]
    for part, changes in (("fitted", ()), ("plain", UNFITTED)):
        result, saved = folder / part / "results.json", folder / "probs"
        saving = probs and part == "plain"
        if saving and not saved.is_dir():
            result.unlink(missing_ok=True)
        if not result.exists():
            more = [f"--set={change}" for change in changes] + ["--save-probs", str(saved)] * saving
            script(log, "test.py", "-r", best, "-p", "all", "-o", folder / part, *scoring, *more)


# -- tables --------------------------------------------------------------------------------------------------------


def gather(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Return ``{row: [one entry per finished seed]}`` of what has been run, in the order of ROWS."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in ROWS:
        for folder in sorted((out / name).glob("seed*")):
            files = {part: folder / part / "results.json" for part in ("fitted", "plain")}
            if all(path.exists() for path in files.values()):
                entry = {part: json.loads(path.read_text()) for part, path in files.items()}
                found.setdefault(name, []).append(entry)
    return found


def mean(entries: Sequence[Any], value: Callable[[Any], float | None], form: str = ".1f") -> str:
    """Return the mean of ``value`` in percent over the seeds, with the standard deviation if there are several."""
    values = [100 * v for v in map(value, entries) if v is not None]
    if not values:
        return "-"
    text = format(statistics.fmean(values), form)
    return text if len(values) == 1 else f"{text} ± {format(statistics.stdev(values), form.lstrip('+'))}"


def score(entry: Mapping[str, Any], procedure: str, key: str, part: str = "fitted") -> float | None:
    """Return a score of a run, or None if the procedure was not run."""
    return entry[part]["procedures"].get(procedure, {}).get(key)


def _heads(name: str, entries: Sequence[Any]) -> list[str]:
    row, seeds = ROWS[name], len(entries)
    return [row.data, row.network, str(seeds)]


def score_table(runs: Mapping[str, Sequence[Any]], key: str) -> str:
    """Return a table of one score: a line per row, a column per procedure."""
    rows = [
        [*_heads(name, entries), *(mean(entries, partial(score, procedure=p, key=key)) for p in PROCEDURES)]
        for name, entries in runs.items()
    ]
    return markdown.table(["data", "network", "seeds", *PROCEDURES], rows)


def difference_table(runs: Mapping[str, Sequence[Any]]) -> str:
    """Return the differences to ``max`` in mDice points: with one seed their interval, with several the spread."""
    rows = []
    for name, entries in runs.items():
        cells = _heads(name, entries)
        for procedure in PROCEDURES:
            if procedure == "max":
                continue
            found = [e["fitted"]["comparison"]["Mean_Dice"].get(procedure) for e in entries]
            found = [d for d in found if d]
            text = mean(found, lambda d: d["mean"], "+.1f")
            if found and found[0]["low"] is not None:
                low, high = min(d["low"] for d in found), max(d["high"] for d in found)
                text += f" ({100 * low:+.1f} to {100 * high:+.1f})"
            cells.append(text)
        rows.append(cells)
    return markdown.table(["data", "network", "seeds", *(p for p in PROCEDURES if p != "max")], rows)


def fit_table(runs: Mapping[str, Sequence[Any]]) -> str:
    """Return what the fit changed: scores and expected Dice before and after it, and what was fitted."""
    rows = []
    for name, entries in runs.items():
        cells = _heads(name, entries)
        for part in ("plain", "fitted"):
            cells += [
                mean(entries, partial(score, procedure="rankdice", key=f"{kind}_Dice", part=part))
                for kind in ("Mean", "Expected", "Measured")
            ]
            cells.append(mean([entry[part]["reliability"] for entry in entries], itemgetter("ECE")))
        temperatures = [e["fitted"]["protocol"]["temperature"] for e in entries]
        cells.append(f"{statistics.fmean(temperatures):.2f}")
        rows.append(cells)
    parts = [f"{what} {when}" for when in ("before", "after") for what in ("mDice", "expected", "measured", "ECE")]
    return markdown.table(["data", "network", "seeds", *parts, "temperature"], rows)


def write_docs(texts: Mapping[str, str], path: Path = DOCS) -> None:
    """Put each table between its markers of the page."""
    page = path.read_text(encoding="utf-8")
    for name, text in texts.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"{path} lacks the lines {begin} and {end}")
        page = f"{before}{begin}\n{text}\n{end}{after}"
    path.write_text(page, encoding="utf-8")


# -- command line --------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("rows", nargs="*", metavar="ROW", help=f"rows to run (default: all): {', '.join(ROWS)}")
    add("--camvid", type=Path, metavar="DIR", help="folder of CamVid in Pascal VOC's layout")
    add("--drive", type=Path, metavar="DIR", help="folder of DRIVE in Kvasir-SEG's layout")
    add("--seeds", type=int, help="runs per row (default: 3; 5 for Shapes)")
    add("--jobs", type=int, default=1, help="number of runs in parallel")
    add("--out", type=Path, default=Path("saved/results"), help="default: saved/results")
    add("--set", action="append", default=[], metavar="PATH=VALUE", help="as for train.py, in all runs")
    add("--save-probs", action="store_true", help="also save the probabilities of the test images, OUT/ROW/SEED/probs")
    add("--write-docs", action="store_true", help=f"put the tables into {DOCS.relative_to(ROOT)}")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.rows) - set(ROWS))
    if unknown:
        parser.error(f"no such row: {', '.join(unknown)}; expected {', '.join(ROWS)}")
    return args


def work(args: argparse.Namespace, out: Path) -> list[tuple[Row, Path, list[str]]]:
    """Return the runs to do, the first seed of every row first."""
    if args.camvid is not None:
        write_lists(args.camvid / DATA[_CLIP][1], out / "lists")
    if any(ROWS[name].data == _LETTERS for name in args.rows or ROWS):
        letters.write(out / "lists" / "letters")
    todo = []
    for seed in range(args.seeds or max(row.seeds for row in ROWS.values())):
        for name in args.rows or ROWS:
            row = ROWS[name]
            option, inside = DATA[row.data]
            data = None if option is None else getattr(args, option)
            if (option is None or data is not None) and seed < (args.seeds or row.seeds):
                folder = out / name / f"seed{seed}"
                folder.mkdir(parents=True, exist_ok=True)
                place = None if data is None else (data / inside).resolve()
                options = fields(row, seed, place, folder, out / "lists") + [f"--set={one}" for one in args.set]
                todo.append((row, folder, options))
    return todo


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is left to run, and print the tables."""
    args = parse(argv)
    out = args.out.resolve()
    todo = work(args, out)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // args.jobs)))
    failed = []

    def one(task: tuple[Row, Path, list[str]]) -> None:
        start = time.perf_counter()
        try:
            run(*task, probs=args.save_probs)
            print(f"{task[1].parent.name} {task[1].name}: {time.perf_counter() - start:.0f} s", flush=True)
        except RuntimeError as error:
            failed.append(str(error))
            print(f"{task[1].parent.name} {task[1].name}: {error}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, todo))
    runs = gather(out)
    texts = {
        "mDice": score_table(runs, "Mean_Dice"),
        "differences": difference_table(runs),
        "mIoU": score_table(runs, "Mean_IoU"),
        "dataset mIoU": score_table(runs, "Dataset_mIoU"),
        "accuracy": score_table(runs, "Pixel_Accuracy"),
        "fit": fit_table(runs),
    }
    for title, text in texts.items():
        print(f"\n{title}\n\n{text}")
    if args.write_docs:
        write_docs(texts)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
