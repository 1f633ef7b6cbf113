"""Run the benchmarks one after the other and write docs/benchmarks.md: ``python -m benchmarks.page [--full]``.

Each benchmark runs in its own process, in its short form unless ``--full`` is given. It writes its numbers to
saved/benchmarks/NAME.json. The page is generated from these files. With ``--only NAME ...`` the other benchmarks keep
the numbers of an earlier run, if it had the same form, machine and versions.

The page shows the error of a benchmark that fails, and the exit status is then 1. Without matplotlib, the page has no
plots.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import textwrap
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import BENCHMARKS, Benchmark, Row, number
from utils.errors import run
from utils.files import write_bytes

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
IMAGES = ROOT / "docs" / "images"
RESULTS = ROOT / "saved" / "benchmarks"
UNREADABLE = (OSError, ValueError, LookupError, TypeError)  # raised by files with unexpected contents
LIBRARIES = ("torch", "torchvision", "numpy", "opencv-python-headless")


@dataclass
class Outcome:
    """The result of one run: numbers, or the reason for their absence."""

    command: str
    facts: dict[str, str]
    date: str
    seconds: float = 0.0
    error: str = ""
    result: dict[str, Any] = field(default_factory=dict)


# -- the machine -----------------------------------------------------------------------------------------------


def version_of(package: str) -> str:
    """Return a package's version, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """Return the processor's name from Linux, otherwise from Python."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def memory() -> str:
    """Return the machine's memory."""
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (AttributeError, ValueError):
        return "unknown"


def system() -> str:
    """Return the operating system, without the machine's name."""
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.release()
    return f"{platform.system()} ({name}), {platform.machine()}"


def facts() -> dict[str, str]:
    """Return everything that the numbers depend on, in the order of the page."""
    affinity = getattr(os, "sched_getaffinity", None)
    peers = dict.fromkeys(peer for one in BENCHMARKS.values() for peer in one.peers)
    return {
        "processor": processor(),
        "cores": str(len(affinity(0)) if affinity else os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "memory": memory(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": system(),
        "Python": platform.python_version(),
        **{package: version_of(package) for package in (*LIBRARIES, *peers)},
    }


# -- running ---------------------------------------------------------------------------------------------------


def measure(one: Benchmark, full: bool, device: str, known: dict[str, str], results: Path = RESULTS) -> Outcome:
    """Run one benchmark, show its output, and write its numbers to ``results``."""
    results.mkdir(parents=True, exist_ok=True)
    numbers = results / f"{one.name}.json"
    numbers.unlink(missing_ok=True)
    outcome = Outcome("python " + " ".join(one.command(full, device)), known, date.today().isoformat())
    print(f"\n=== {outcome.command}\n", flush=True)
    start = time.perf_counter()
    status, last = stream([sys.executable, "-u", *one.command(full, device, numbers)])
    outcome.seconds = time.perf_counter() - start
    if status:
        outcome.error = f"exit status {status}: {last or 'no message'}"
    else:
        try:
            outcome.result = json.loads(numbers.read_text(encoding="utf-8"))
            one.rows(outcome.result)
        except UNREADABLE as error:
            outcome.error = f"cannot read its results: {type(error).__name__}: {error}"
    write(results / f"{one.name}.run.json", json.dumps(asdict(outcome), indent=1).encode())
    return outcome


def stream(words: list[str]) -> tuple[int, str]:
    """Run a command in the project's folder and show its output; return its status and its last line."""
    last: deque[str] = deque(maxlen=1)
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.strip():
                last.append(line.strip())
    return process.returncode, "".join(last)


def earlier(one: Benchmark, full: bool, device: str, known: dict[str, str], results: Path = RESULTS) -> Outcome | None:
    """Return the result of an earlier run with the same form, machine and versions, or None."""
    try:
        outcome = Outcome(**json.loads((results / f"{one.name}.run.json").read_text(encoding="utf-8")))
        if not outcome.error:
            one.rows(outcome.result)
    except UNREADABLE:
        return None
    same = outcome.facts == known and outcome.command == "python " + " ".join(one.command(full, device))
    return outcome if same else None


def write(path: Path, data: bytes) -> None:
    """Write a file completely or not at all."""
    write_bytes(path, data)


# -- the page --------------------------------------------------------------------------------------------------


def prose(text: str) -> str:
    """Return a paragraph in lines of the usual length."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def table(rows: list[Row], note: str) -> list[str]:
    """Return the lines of a Markdown table."""
    heads = ["case", "peer", "ours, ms", "peer, ms", "peer / ours"] + ([note] if note else [])
    lines = ["| " + " | ".join(heads) + " |", "| --- | --- | ---: | ---: | ---: |" + (" --- |" if note else "")]
    for row in rows:
        cells = [row.case, row.peer, number(row.ours), number(row.theirs), number(row.ratio)]
        lines.append("| " + " | ".join(cells + ([row.note] if note else [])) + " |")
    return lines


def draw(rows: list[Row]) -> bytes | None:
    """Return a PNG of the ratios, None without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return None
    ratios = [row.ratio for row in rows]
    figure, axes = pyplot.subplots(figsize=(10, 1.2 + 0.27 * len(rows)))
    # Bars start at 1: to the right the peer is slower, to the left ours is.
    colors = ["#4c72b0" if ratio >= 1 else "#c44e52" for ratio in ratios]
    axes.barh(range(len(rows)), [ratio - 1 for ratio in ratios], left=1, color=colors)
    axes.set_xscale("log")
    axes.set_xlim(min([0.5, *ratios]) / 4, max([2, *ratios]) * 4)  # room for the numbers
    axes.margins(y=0.01)
    for place, ratio in enumerate(ratios):
        axes.text(ratio, place, f" {number(ratio)} ", va="center", ha="left" if ratio >= 1 else "right", fontsize=8)
    labels = [f"{row.case} | {row.peer}".replace("`", "") for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("time of the peer / time of ours (right of 1: ours is faster)")
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    pyplot.close(figure)
    return picture.getvalue()


def section(one: Benchmark, outcome: Outcome | None, images: Path) -> list[str]:
    """Return the section of a benchmark, and write its plot."""
    lines = ["", f"## {one.title}", "", prose(one.about), ""]
    if outcome is None:
        return [*lines, f"**Not measured** in this form on this machine. Run `make bench`, or use `--only {one.name}`."]
    if outcome.error:
        reason = outcome.error.replace(str(ROOT), ".").replace("`", "'")
        return [*lines, f"**Failed:** `{outcome.command}`: {reason}"]
    for peer in one.peers:
        if outcome.facts.get(peer) == "not installed":
            lines += [f"The rows of {peer} are missing, because it is not installed (`pip install {peer}`).", ""]
    rows = one.rows(outcome.result)
    lines += table(rows, one.note)
    picture = draw(rows)
    if picture is not None:
        write(images / f"benchmarks-{one.name}.png", picture)
        lines += ["", f"![peer's time over ours: {one.title}](images/benchmarks-{one.name}.png)"]
    return [*lines, "", f"`{outcome.command}`, {outcome.date}, {outcome.seconds:.0f} s."]


def page(outcomes: dict[str, Outcome | None], known: dict[str, str], full: bool, images: Path = IMAGES) -> str:
    """Return the page; plots go to ``images``."""
    plots = "" if version_of("matplotlib") != "not installed" else " There are no plots: matplotlib is not installed."
    form = "in full" if full else "in short form"
    lines = [
        "# Benchmarks",
        "",
        "<!-- generated by benchmarks/page.py: edit that file instead -->",
        "",
        prose(
            f"This page compares the speed of each part with other implementations, measured {form}. Below each "
            "table are its command and date. `make bench` measures again and writes this page. `python -m "
            "benchmarks.page --full` runs more cases and rounds, and `python -m benchmarks.page --only rankdice` "
            "runs only one part."
        ),
        "",
        prose(
            "All times are medians over rounds. In each round, all candidates run one after the other in the same "
            "process. **peer / ours** above 1 means that ours is faster. On other machines, expect similar ratios "
            f"rather than similar times.{plots}"
        ),
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in known.items()),
    ]
    for name, outcome in outcomes.items():
        lines += section(BENCHMARKS[name], outcome, images)
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.page", description="Run the benchmarks and write docs/benchmarks.md."
    )
    top.add_argument("--full", action="store_true", help="all cases and rounds (default: the short form of each)")
    top.add_argument("--only", nargs="+", metavar="NAME", choices=list(BENCHMARKS), help=", ".join(BENCHMARKS))
    top.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return top


def main(words: Sequence[str] | None = None) -> int:
    args = parser().parse_args(words)
    known = facts() | {"measured on": "the GPU" if args.device == "cuda" else "the CPU"}
    chosen = args.only or list(BENCHMARKS)
    outcomes: dict[str, Outcome | None] = {}
    for name, one in BENCHMARKS.items():
        act = measure if name in chosen else earlier
        outcomes[name] = act(one, args.full, args.device, known)
    write(PAGE, page(outcomes, known, args.full).encode())
    failed = {name: o.error for name, o in outcomes.items() if name in chosen and o is not None and o.error}
    print(f"\nwritten: {PAGE.relative_to(ROOT)}")
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
