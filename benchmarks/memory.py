"""Does the memory of a long run grow? Record the private memory of a training process over its iterations.

``python -m benchmarks.memory [--iterations 5000] [--json FILE]``

Runs ``train.py`` as it is on a tiny network and built-in images, with scores of every batch, logs, TensorBoard,
checkpoints and validation, and looks at it from outside: whenever a line appears in the run's ``log.jsonl``, the
kernel is asked for the memory that belongs to the process alone (``/proc/PID/smaps_rollup``; Linux). Prints the
series and its slope over the second half, when caches are full.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BATCHES, BATCH_SIZE = 50, 4  # of an epoch
SHOWN = 20  # lines of the table
POLL = 0.02  # seconds; several looks per line of the log


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description="Measure the memory of a long run."
    )
    parser.add_argument("--iterations", type=int, default=5000, help=f"rounded up to whole epochs of {BATCHES}")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    series = watch(-(-args.iterations // BATCHES))
    step = max(1, len(series) // SHOWN)
    print(f"{'iteration':>9}  {'private MiB':>11}")
    for iteration, size in [*series[::step], series[-1]]:
        print(f"{iteration:>9}  {size / 2**20:>11.1f}")
    slope, spread = trend(series[len(series) // 2 :])
    print(f"second half: {slope / 2**20 * 1000:+.2f} MiB per 1,000 iterations, spread {spread / 2**20:.1f} MiB")
    if args.json:
        Path(args.json).write_text(json.dumps({"series": series, "bytes_per_iteration": slope, "spread": spread}))


def watch(epochs: int) -> list[tuple[int, int]]:
    """Train, and return (iteration, private bytes of the process) for the lines of the log."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(tiny_run(folder, epochs)))
        command = [sys.executable, "train.py", "--config", str(config), "--device", "cpu"]
        with (Path(folder) / "output").open("w") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        series: list[tuple[int, int]] = []
        try:
            while process.poll() is None:
                time.sleep(POLL)
                iteration = last_iteration(Path(folder))
                if iteration > (series[-1][0] if series else 0) and (size := private_bytes(process.pid)):
                    series.append((iteration, size))
        finally:
            process.terminate()
            process.wait()
        if process.returncode:
            raise SystemExit((Path(folder) / "output").read_text())
    return series


def tiny_run(folder: str, epochs: int) -> dict:
    """Return the config. It switches on everything that could accumulate memory."""

    def images(split: str, length: int, shuffle: bool) -> dict:
        args = {"split": split, "length": length, "size": 32, "batch_size": BATCH_SIZE, "num_workers": 0}
        return {"type": "Shapes", "args": args | {"shuffle": shuffle}}

    return {
        "name": "memory",
        "arch": {"type": "UNet", "args": {"width": 4}},
        "train_loader": images("train", BATCHES * BATCH_SIZE, True),
        "val_loader": images("val", 20, False),
        "predict": {"train": "max", "val": "rankdice"},
        "trainer": {
            "epochs": epochs,
            "save_dir": folder,
            "log_dir": f"{folder}/runs",
            "save_period": 10,
            "keep_last": 2,
            "val_per_epochs": 5,
            "log_per_iter": 10,
            "ema": 0.99,
        },
    }


def last_iteration(folder: Path) -> int:
    """Return the iteration of the log's last complete line; 0 before there is one."""
    log = next(folder.glob("memory/*/*/*/log.jsonl"), None)
    if log is None:
        return 0
    with log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
        lines = file.read().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["iteration"]) if lines else 0


def private_bytes(pid: int) -> int:
    """Return the memory that only this process uses, which would be freed if it ended; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def trend(series: list[tuple[int, int]]) -> tuple[float, int]:
    """Return the slope of the least squares line, in bytes per iteration, and the largest less the smallest size."""
    iterations, sizes = zip(*series, strict=True)
    slope = statistics.linear_regression(iterations, sizes).slope
    return slope, max(sizes) - min(sizes)


if __name__ == "__main__":
    main()
