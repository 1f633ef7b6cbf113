"""The benchmarks of docs/benchmarks.md: their descriptions, commands, and how their JSON becomes table rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

SCALE = ("one read (sum)", "softmax", "torch.sort")  # not peers: simple operations, for comparison
PIPELINES = {"separate": "OpenCV step by step on floats", "torchvision": "torchvision transforms.v2"}
LOOPS = {"bare": "bare loop: model, loss, backward, step", "predecessor": "published procedure: two forward passes"}
SCORES = {"histograms": "histograms of the batch, as the predecessor", "loop": "loop over images and classes"}


class Row(NamedTuple):
    """One comparison: milliseconds of ours and of a peer on the same case; ``note`` has its own column."""

    case: str
    peer: str
    ours: float
    theirs: float
    note: str = ""

    @property
    def ratio(self) -> float:
        """Time of the peer divided by ours: above 1, ours is faster."""
        return self.theirs / self.ours


@dataclass(frozen=True)
class Benchmark:
    """One script of this folder and how its JSON becomes rows."""

    name: str
    title: str
    about: str
    rows: Callable[[dict[str, Any]], list[Row]]
    note: str = ""  # heading of the column of notes
    peers: tuple[str, ...] = ()  # packages that are measured when they are installed
    arguments: tuple[str, ...] = ()
    on_device: bool = True  # takes --device

    def command(self, full: bool, device: str, out: Path | None = None) -> list[str]:
        """Return the words after ``python``."""
        words = ["-m", f"benchmarks.{self.name}", *self.arguments]
        words += [] if full else ["--quick"]
        words += ["--device", device] if self.on_device else []
        return words + (["--json", str(out)] if out else [])


# -- rows of each benchmark's JSON -----------------------------------------------------------------------------


def number(value: float) -> str:
    """Return three significant digits, without an exponent."""
    digits = f"{value:.3g}"
    return digits if "e" not in digits else f"{value:.0f}"


def ms(seconds: Sequence[float]) -> float:
    """Return the median in milliseconds."""
    return 1e3 * median(seconds)


def rankdice_rows(result: dict[str, Any]) -> list[Row]:
    """Compare exact Dice or IoU with every candidate, our approximations with rankseg's, and simple operations."""
    rows = []
    for one in result["maps"].values():
        times, case = one["seconds"], "x".join(map(str, one["shape"]))
        lost = {name: f"{value['mean']:.0e}" for name, value in one.get("lost", {}).items()}
        for name, spent in times.items():
            if name not in SCALE and not name.startswith(("exact", "our ")):
                ours = "exact iou" if "iou" in name else "exact dice"
                rows.append(Row(f"{case}, {ours}", name, ms(times[ours]), ms(spent), lost.get(name, "")))
        for solver in ("rma", "ba"):
            name = f"rankseg {solver.upper()} dice"
            if name in times and f"our {solver} dice" in times:
                case_of_solver = f'{case}, our `solver="{solver}"`'
                rows.append(Row(case_of_solver, name, ms(times[f"our {solver} dice"]), ms(times[name]), lost[name]))
        rows += [
            Row(f"{case}, for scale", name, ms(times["exact dice"]), ms(times[name])) for name in SCALE if name in times
        ]
    return rows


def data_rows(result: dict[str, Any]) -> list[Row]:
    """Milliseconds per sample; ours returns bytes, as the trainer uses them, or normalized floats, as the peers."""
    rates = result["images_per_second"]
    rows = []
    for source, words in (("files", "from files"), ("memory", "from memory")):
        for ours, end in (("ours", "ours returns bytes"), ("ours, normalized", "ours normalized too")):
            for peer in ("separate", "torchvision"):
                times = [1e3 / median(rates[name][source]) for name in (ours, peer)]
                rows.append(Row(f"{words}, {end}", PIPELINES[peer], *times))
    return rows


def training_rows(result: dict[str, Any]) -> list[Row]:
    """Milliseconds per iteration."""
    times = {name: row["milliseconds"] for name, row in result["iteration"].items()}
    return [Row(result["title"], words, times["ours"], times[name]) for name, words in LOOPS.items()]


def metrics_rows(result: dict[str, Any]) -> list[Row]:
    """Milliseconds per batch."""
    return [
        Row(
            title,
            SCORES.get(name, name),
            ms(one["seconds"]["ours"]),
            ms(spent),
            ", ".join(f"`{s}`" for s in one["gives"][name]),
        )
        for title, one in result["maps"].items()
        for name, spent in one["seconds"].items()
        if name != "ours"
    ]


def inference_rows(result: dict[str, Any]) -> list[Row]:
    """Milliseconds per image."""
    return [
        Row(
            f"{row['network']}, {row['mode']}, {row['image']}",
            "predecessor's method",
            1e3 * row["ours_s"],
            1e3 * row["older_s"],
            number(1e3 * row["network_s"]),
        )
        for row in result["rows"]
    ]


PROCEDURE_CASES = {"label maps": "label map", "scoring": "test.py", "fit": "fit of"}


def procedures_rows(result: dict[str, Any]) -> list[Row]:
    """Milliseconds from probabilities to label maps, from images to scores, and of the fit."""
    return [
        Row(f"{PROCEDURE_CASES[part]} {title}", name, ms(seconds["ours"]), ms(spent))
        for part, cases in result.items()
        for title, seconds in cases.items()
        for name, spent in seconds.items()
        if name != "ours"
    ]


BENCHMARKS = {
    one.name: one
    for one in (
        Benchmark(
            "rankdice",
            "RankDice",
            "The task: turn a map of probabilities (images x classes x height x width) into one mask per class. Our "
            "exact solution is compared with the package rankseg, and with a plain loop over images and classes "
            "that stands in for the authors' program. `argmax`, softmax, a sort and one read of the same map are "
            "included for scale. The last column is the expected Dice that the peer's masks lose on average against "
            "the exact masks. See [rankdice.md](rankdice.md).",
            rankdice_rows,
            note="expected Dice lost",
            peers=("rankseg",),
            arguments=("--no-growth",),
        ),
        Benchmark(
            "procedures",
            "Presence, label maps, scoring and the fit",
            "*label map*: from probabilities to one label per pixel. Ours runs RankDice for all classes and decides "
            "which classes are in the image. argmax and rankseg's multiclass form do not decide this. *test.py*: "
            "from images to the scores of one procedure, with a U-Net of width 8. The peer is a plain loop with the "
            "same network, rankseg's screened RMA for rankdice, and torchmetrics' DiceScore. `all` gives all rows "
            "of `-p all`; its peer runs the loop for T, max and rankdice. *fit*: temperature, bias, presence and "
            "threshold, each cross-validated on five folds. The peer is temperature scaling alone, which does less. "
            "See [presence.md](presence.md) and [testing.md](testing.md).",
            procedures_rows,
            peers=("rankseg", "torchmetrics"),
        ),
        Benchmark(
            "data",
            "Data pipeline",
            "The task: load one training sample in one thread, as in a loader's worker (scale, rotate, pad, crop to "
            "320 x 320, flip, blur). Ours applies a single warp to bytes, and the device normalizes the batch "
            "later. The peers apply one step after the other and normalize each sample. The table shows ours with "
            "and without normalization.",
            data_rows,
            on_device=False,
        ),
        Benchmark(
            "training",
            "Training",
            "The task: one iteration on batches prepared in advance. Our trainer also computes scores, writes logs "
            "and checks the loss. It is compared with a bare loop that does not, and with the published procedure, "
            "which runs the network a second time for the training scores. See [scaling.md](scaling.md).",
            training_rows,
        ),
        Benchmark(
            "metrics",
            "Scores",
            "The task: compute scores from the label maps or masks of a batch. Ours computes every score of the "
            "report. The last column lists the scores that the peer computes. The benchmark checks that they agree "
            "with ours. See [metrics.md](metrics.md).",
            metrics_rows,
            note="scores of the peer",
            peers=("torchmetrics",),
        ),
        Benchmark(
            "inference",
            "Inference",
            "The task: compute a label map from an image in memory, over six scales or in tiles with flips. The "
            "peer is the method of the predecessor with the same network: it resizes with SciPy, runs one tile at a "
            "time, and sums in NumPy. The last column is the time of the network alone in the predecessor's method. "
            "See [inference.md](inference.md).",
            inference_rows,
            note="network alone, ms",
            peers=("scipy",),
        ),
    )
}
