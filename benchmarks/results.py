"""Train, test and calibrate the networks of ``docs/results.md``, and write its tables.

    python -m benchmarks.results --camvid DIR --medical DIR                  # every row; goes on where it was stopped
    python -m benchmarks.results --camvid DIR camvid_unet --seeds 1          # one row, one seed
    python -m benchmarks.results --write-docs                                # tables of what has been run

A row is a config of ``configs/results/``. Each is trained by train.py, scored by ``test.py -p all``, scored by rankdice
without pruning, fitted by ``test.py --fit`` on what its training data holds out, and scored again. ``--camvid`` and
``--medical`` are the folders of the data sets (``VOCdevkit`` inside the one, ``images_split`` inside the other).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "results"
DOCS = ROOT / "docs" / "results.md"
# Seeds of a row; one where nothing is said: a run takes long on a CPU.
SEEDS = {"medical_unet": 3}
# Heading of a row: network and loss as the config says are enough for a program, not for a reader.
TITLES = {
    "camvid_unet": "U-Net (width 16), CE",
    "camvid_pspnet": "PSPNet-R18, CE",
    "camvid_pspnet_focal": "PSPNet-R18, focal, 10 epochs",
    "camvid_pspnet_bce": "PSPNet-R18, BCE, 10 epochs",
    "camvid_deeplab": "DeepLabV3+-R18, CE",
    "camvid_fcn8": "FCN8-VGG16bn, CE",
    "medical_unet": "U-Net (width 16), CE",
}
DATASETS = {"camvid": "CamVid val", "medical": "DRIVE val, vessels"}
PROCEDURES = ("T", "max", "rankdice")
# What a run is scored as: as trained; with rankdice.prune off; with the fitted temperature and threshold.
PARTS = ("plain", "unpruned", "fitted")


# -- running -------------------------------------------------------------------------------------------------------


def script(*arguments: object) -> None:
    """Run one of the project's scripts, its output shown; its failure ends this program."""
    command = [sys.executable, *map(str, arguments)]
    print("$", *command[1:], flush=True)
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def run(row: str, seed: int, data: Path, folder: Path, extra: Sequence[str]) -> None:
    """Train, score, fit and score again, as far as that has not been done."""
    config = CONFIGS / f"{row}.json"
    fields = {
        "seed": seed,
        "trainer.save_dir": folder,
        "trainer.log_dir": folder / "runs",
        "train_loader.args.data_dir": data,
        "test_loader.args.data_dir": data,
    }
    options = [f"--set={field}={value}" for field, value in fields.items()] + list(extra)
    timing = folder / "seconds.json"
    if not timing.exists():
        start = time.perf_counter()
        resume = ["-r", "auto"] if list(folder.rglob("latest.pth")) else []
        script("train.py", "-c", config, *options, *resume)
        timing.write_text(json.dumps({"train": time.perf_counter() - start, "resumed": bool(resume)}))
    (best,) = folder.rglob("best_model.pth")
    if not (folder / "plain" / "results.json").exists():
        script("test.py", "-r", best, "-p", "all", "-o", folder / "plain", *options)
    if not (folder / "unpruned" / "results.json").exists():
        unpruned = [*options, "--set=predict.rankdice.prune=null"]
        script("test.py", "-r", best, "-p", "rankdice", "-o", folder / "unpruned", *unpruned)
    fitted = folder / "fitted" / "best_model_calibrated.pth"
    if not fitted.exists():
        fitted.parent.mkdir(exist_ok=True)
        script("test.py", "-r", best, "--fit", "-o", fitted.parent, *options)
    if not (folder / "fitted" / "results.json").exists():
        script("test.py", "-r", fitted, "-p", "all", "-o", folder / "fitted", *options)


# -- tables --------------------------------------------------------------------------------------------------------


def gather(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Return ``{row: [one entry per finished seed]}`` of what has been run, in the order of TITLES."""
    import torch

    found: dict[str, list[dict[str, Any]]] = {}
    for row in TITLES:
        for folder in sorted((out / row).glob("seed*")):
            files = {part: folder / part / "results.json" for part in PARTS}
            if not all(path.exists() for path in files.values()):
                continue
            state = torch.load(folder / "fitted" / "best_model_calibrated.pth", map_location="cpu", weights_only=True)
            entry = {part: json.loads(path.read_text()) for part, path in files.items()}
            found.setdefault(row, []).append(entry | {"fit": state["calibration"]})
    return found


class Seeds:
    """The runs of one row, to read means and standard deviations from."""

    def __init__(self, entries: Sequence[Mapping[str, Any]]) -> None:
        self.entries = entries

    def text(self, value: Callable[[Mapping[str, Any]], float], form: str = ".1f") -> str:
        """Return the mean of ``value`` over the seeds, with the standard deviation where there are several."""
        values = [value(entry) for entry in self.entries]
        mean = format(statistics.fmean(values), form)
        return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form.lstrip('+'))}"

    def score(self, part: str, procedure: str, key: str) -> str:
        """Return a score in percent; ``part`` is one of PARTS."""
        return self.text(lambda entry: 100 * entry[part]["procedures"][procedure][key])

    def both(self, part: str, procedure: str) -> str:
        """Return mDice / mIoU."""
        return f"{self.score(part, procedure, 'Mean_Dice')} / {self.score(part, procedure, 'Mean_IoU')}"

    def expected(self, part: str) -> str:
        """Return the mDice that rankdice expected of its masks, and the one it got."""
        return f"{self.score(part, 'rankdice', 'Expected_Dice')} ({self.score(part, 'rankdice', 'Measured_Dice')})"

    def fitted(self, key: str, form: str) -> str:
        return self.text(lambda entry: entry["fit"][key], form)

    def before_after(self, key: str, form: str, scale: float = 1) -> str:
        """Return a measure of calibration on the held-out data, before and after the fit."""
        before = self.text(lambda entry: scale * entry["fit"]["before"][key], form)
        after = self.text(lambda entry: scale * entry["fit"]["after"][key], form)
        return f"{before} → {after}"


def table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the table of the scores as trained: one line per row, mDice / mIoU in percent."""
    lines = [
        "| data | network, loss | T | max | rankdice | rankdice - max | better / same / worse | expected (got) "
        "| without `prune` | expected (got) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row, entries in runs.items():
        seeds = Seeds(entries)
        differences = [entry["plain"]["comparison"]["Mean_Dice"]["rankdice"] for entry in entries]
        gain = seeds.text(lambda entry: 100 * entry["plain"]["comparison"]["Mean_Dice"]["rankdice"]["mean"], "+.1f")
        if len(entries) == 1:
            gain += f" ({100 * differences[0]['low']:+.1f} to {100 * differences[0]['high']:+.1f})"
        cells = [
            DATASETS[row.split("_")[0]],
            f"[{TITLES[row]}](../configs/results/{row}.json)" + (f", {len(entries)} seeds" if len(entries) > 1 else ""),
            *(seeds.both("plain", procedure) for procedure in PROCEDURES),
            gain,
            " / ".join(str(sum(d[key] for d in differences)) for key in ("better", "same", "worse")),
            seeds.expected("plain"),
            seeds.both("unpruned", "rankdice"),
            seeds.expected("unpruned"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def calibration_table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the table of what ``--fit`` changed: on the held-out data, and on the test images."""
    lines = [
        "| data | network, loss | temperature | NLL | ECE | T (threshold) | rankdice before | after | expected (got) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row, entries in runs.items():
        seeds = Seeds(entries)
        cells = [
            DATASETS[row.split("_")[0]],
            TITLES[row],
            seeds.fitted("temperature", ".2f"),
            seeds.before_after("NLL", ".3f"),
            seeds.before_after("ECE", ".1f", 100),
            f"{seeds.score('fitted', 'T_tuned', 'Mean_Dice')} ({seeds.fitted('threshold', '.2f')})",
            *(seeds.score(part, "rankdice", "Mean_Dice") for part in ("plain", "fitted")),
            seeds.expected("fitted"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_docs(tables: Mapping[str, str], path: Path = DOCS) -> None:
    """Put each table between its markers of the page."""
    page = path.read_text(encoding="utf-8")
    for name, text in tables.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"{path} lacks the lines {begin} and {end}")
        page = f"{before}{begin}\n{text}\n{end}{after}"
    path.write_text(page, encoding="utf-8")


# -- command line --------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"which to run (default: all): {', '.join(TITLES)}")
    for name, title in DATASETS.items():
        parser.add_argument(
            f"--{name}", type=Path, metavar="DIR", help=f"folder of {title}; without it none of its rows"
        )
    parser.add_argument("--seeds", type=int, help="runs per row (default: 3 of the cheapest row, 1 of the others)")
    parser.add_argument("--out", type=Path, default=Path("saved/results"), help="default: saved/results")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="as train.py's, for all runs")
    parser.add_argument("--write-docs", action="store_true", help=f"put the tables into {DOCS.relative_to(ROOT)}")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.rows) - set(TITLES))
    if unknown:
        parser.error(f"no such row: {', '.join(unknown)}; there are {', '.join(TITLES)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    out = args.out.resolve()
    for row in args.rows or TITLES:
        data = getattr(args, row.split("_")[0])
        if data is None:
            continue
        for seed in range(args.seeds or SEEDS.get(row, 1)):
            folder = out / row / f"seed{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            run(row, seed, data.resolve(), folder, [f"--set={one}" for one in args.set])
    runs = gather(out)
    tables = {"scores": table(runs), "calibration": calibration_table(runs)}
    print("\n" + "\n\n".join(tables.values()))
    if args.write_docs:
        write_docs(tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
