"""Compare the cost of RankDice with its alternatives, in one process.

    python -m benchmarks.rankdice                      # every table; some minutes
    python -m benchmarks.rankdice --quick              # the best peers only, but for two maps; a minute or two
    python -m benchmarks.rankdice --device cuda        # timed by events
    python -m benchmarks.rankdice --probs FILE         # a real map: array or tensor "probs" (B, C, H, W), .npz or .pt
    python -m benchmarks.rankdice --json FILE --plots docs/images

The candidates take turns, in another order each round, so that a busy machine slows all of them alike; medians, minima
and ratios are printed. The maps are smooth random fields with a little noise through a softmax. "authors' loop" is our
own plain implementation of what the published program does (blind approximation, a loop over images and classes, sorted
rows, a direct correlation with the distribution of the count). It stands in for the published program, which is not
part of this repository. The package rankseg is measured when it is installed (``pip install rankseg matplotlib``).
"""

# ruff: noqa: E402 (threads are set up before torch is imported)
from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

import utils  # noqa: F401 - before torch: sets how long its idle threads wait

# isort: split

import torch
from torch import Tensor
from torch.nn.functional import conv1d, interpolate

from utils.rankdice import rank_dice
from utils.rankdice.integral import ORDERS, Goal, Window, integrate

TABLE: list[tuple[int, ...]] = [
    (1, 1, 64, 64),
    (1, 2, 128, 128),
    (8, 8, 96, 96),
    (1, 21, 128, 128),
    (1, 2, 512, 512),
    (8, 1, 352, 352),
    (1, 21, 512, 512),
    (4, 19, 256, 512),
    (1, 19, 512, 1024),
    (1, 150, 512, 512),
    (1, 19, 1024, 2048),
]
SINGLE = (1, 1, 8192, 8192)
FULL_SHAPES = [(1, 2, 512, 512), (1, 21, 512, 512)]  # all candidates take part, in the short form too
BEST_PEERS = ("rankseg RMA dice", "rankseg RMA dice, screened")
SMALL, SMALL_ROUNDS = 1_000_000, 6  # times of small maps vary more: so many times as many rounds
LIMIT_S = 8.0  # a candidate is not started again once it has used this much time on one map


def field_logits(shape: tuple[int, ...], device: str, seed: int = 0) -> Tensor:
    """Return logits (B, C, H, W): smooth random fields plus a little noise. One class is given a rival of zeros."""
    generator = torch.Generator().manual_seed(seed)
    batch, classes, height, width = shape
    coarse = torch.randn(batch, classes, max(1, height // 32), max(1, width // 32), generator=generator)
    logits = interpolate(coarse, (height, width), mode="bicubic", align_corners=False).mul_(6)
    for image in logits:
        for part in image:
            part.add_(torch.randn(part.shape, generator=generator), alpha=0.3)
    return logits.to(device)


def to_probs(logits: Tensor) -> Tensor:
    """Return what a network would hand over: softmax, or sigmoid for one class."""
    return logits.softmax(1) if logits.shape[1] > 1 else logits.sigmoid()


def authors_loop(probs: Tensor) -> Tensor:
    """Blind approximation row by row, written plainly: a stand-in for the cost of the published program."""
    masks = torch.zeros_like(probs, dtype=torch.bool)
    pixels = probs[0, 0].numel()
    for b in range(probs.shape[0]):
        for c in range(probs.shape[1]):
            row = probs[b, c].flatten()
            if row.max() <= 0.5:
                continue
            ordered, order = row.sort(descending=True)
            mass = ordered.cumsum(0)
            mean = float(row.sum())
            deviation = math.sqrt(max(float((row * (1 - row)).sum()), 1e-6))
            skew = float((row * (1 - row) * (1 - 2 * row)).sum()) / deviation**3
            low = max(0, int(mean - 4 * deviation))
            volumes = torch.arange(low, int(mean + 4 * deviation) + 2, device=row.device)
            x = (volumes + 0.5 - mean) / deviation
            cdf = torch.special.ndtr(x) + skew * (1 - x * x) * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi) / 6
            pmf = cdf.diff()
            steps = torch.arange(pixels + pmf.numel() - 1, device=row.device)
            reciprocal = conv1d((1 / (steps + low + 3.0)).view(1, 1, -1), pmf.float().view(1, 1, -1)).flatten()
            volume = int((2 * mass * reciprocal).argmax()) + 1
            masks[b, c].view(-1)[order[:volume]] = True
    return masks


def package() -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the candidates of package rankseg, or none with a message."""
    try:
        from rankseg import RankSEG
    except ImportError:
        print("package rankseg is not installed (pip install rankseg): its columns are missing\n")
        return {}

    def candidate(**options: object) -> Callable[[Tensor], Tensor]:
        return RankSEG(output_mode="multilabel", **options).predict

    return {
        "rankseg RMA dice": candidate(metric="dice", solver="RMA"),
        "rankseg RMA dice, screened": candidate(metric="dice", solver="RMA", safe_screening="auto"),
        "rankseg RMA iou": candidate(metric="iou", solver="RMA"),
        "rankseg BA dice": candidate(metric="dice", solver="BA"),
    }


def once(run: Callable[[], object], device: str) -> float:
    """Return the seconds one run takes."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def race(candidates: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Time the candidates in turns after a warm-up round of the cheap ones.

    Each round has its own order, because a candidate is faster after one that leaves the map in the cache.
    """
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    first = {name: once(run, device) for name, run in candidates.items()}
    for _ in range(rounds):
        for name in order.sample(list(candidates), len(candidates)):
            if first[name] + sum(times[name]) < LIMIT_S:
                times[name].append(once(candidates[name], device))
    return {name: spent or [first[name]] for name, spent in times.items()}


def table(times: dict[str, list[float]], base: str) -> None:
    """Print medians, minima and the ratio of the minima to ``base``."""
    print(f"  {'':28s}{'median ms':>12s}{'least ms':>12s}{'x exact':>10s}")
    for name, spent in times.items():
        ratio = min(spent) / min(times[base])
        print(f"  {name:28s}{median(spent) * 1e3:12.2f}{min(spent) * 1e3:12.2f}{ratio:10.2f}")


def exact_score(row: Tensor, volume: int, metric: str) -> float:
    """Return the exact expected score of the top ``volume`` pixels of a row (N,), all pixels taken one by one."""
    values = row.double().sort(descending=True).values.unsqueeze(0)
    values = torch.cat([torch.zeros_like(values[:, :1]), values], 1)
    steps, none = torch.arange(values.shape[1], device=row.device).double().unsqueeze(0), values.new_zeros(1, 1, 1)
    goal = Goal(metric, 0.0)
    rate = goal.rate(values.sum(1, keepdim=True), steps, values.cumsum(1))
    window = Window(steps, steps * none, values, none, none.expand(1, ORDERS, 2), rate[:, volume, None], 0)
    return float(integrate(goal, window, 1)[0, volume])


def lost_scores(probs: Tensor, others: dict[str, Callable[[Tensor], Tensor]], most: int = 12) -> dict[str, dict]:
    """Print and return how much expected Dice each approximation loses against exact, on up to ``most`` active rows."""
    flat = probs.flatten(2).flatten(0, 1)
    exact = rank_dice(flat.unsqueeze(0))
    rows = exact.volumes[0].nonzero().view(-1)[:most].tolist()
    chosen = flat[rows].unsqueeze(0)
    volumes = {"exact": exact.volumes[0, rows], "threshold 0.5": (chosen > 0.5).sum(2)[0]}
    volumes |= {name: rank_dice(chosen, solver=name).volumes[0] for name in ("ba", "paper", "rma")}
    for name, run in others.items():
        if "iou" not in name:
            volumes[name] = run(chosen).sum(2)[0]
    scores = {
        name: [exact_score(flat[row], int(v), "dice") if v else 0.0 for row, v in zip(rows, volume, strict=True)]
        for name, volume in volumes.items()
    }
    best = np.array(scores["exact"])
    print(f"  expected Dice lost against exact ({len(rows)} rows, mean {best.mean():.4f}): mean, largest")
    result = {}
    for name, score in scores.items():
        lost = best - np.array(score)
        result[name] = {"mean": float(lost.mean()), "most": float(lost.max())}
        print(f"  {name:28s}{lost.mean():12.2e}{lost.max():12.2e}")
    return result


def summary(maps: dict[str, dict]) -> None:
    """Print the exact solver and its fastest peers at every size, including the sizes at which it is slower."""
    peers = ("rankseg RMA dice", "rankseg RMA dice, screened", "torch.argmax", "torch.sort")
    print(
        f"\nmedians in ms; in brackets how many times as long as exact Dice\n\n  {'map':18s}{'exact dice':>12s}", end=""
    )
    print("".join(f"{name:>28s}" for name in peers))
    for title, one in maps.items():
        times = {name: 1e3 * median(spent) for name, spent in one["seconds"].items()}
        ours = times["exact dice"]
        cells = [f"{times[n]:.2f} ({times[n] / ours:.2f})" if n in times else "" for n in peers]
        lost = any(times[name] < ours for name in peers[:2] if name in times)
        print(f"  {title:18s}{ours:12.2f}" + "".join(f"{cell:>28s}" for cell in cells) + ("  lost" if lost else ""))


def extra_memory(probs: Tensor, run: Callable[[], object]) -> float:
    """Return the peak memory of the tensors that ``run`` creates, as a multiple of the map."""
    size = probs.numel() * probs.element_size()
    if probs.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / size
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    return float(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max()) / size


def against_the_best(probs: Tensor, rounds: int, others: dict, device: str) -> dict:
    """Print and return the race of exact Dice with the best peers alone."""
    title = "x".join(map(str, probs.shape))
    candidates: dict[str, Callable[[], object]] = {
        "exact dice": lambda: rank_dice(probs),
        "torch.argmax": lambda: probs.argmax(1),
    }
    candidates |= {name: partial(others[name], probs) for name in BEST_PEERS if name in others}
    times = race(candidates, rounds, device)
    print(f"\n{title}")
    table(times, "exact dice")
    return {"shape": list(probs.shape), "seconds": times}


def one_map(title: str, probs: Tensor, logits: Tensor | None, rounds: int, others: dict, device: str) -> dict:
    """Print and return the race on one map."""
    rows = probs.shape[0] * probs.shape[1]
    found = rank_dice(probs)
    active = int((found.volumes > 0).sum())
    print(f"\n{title}: {active} of {rows} rows active, {probs.numel() * probs.element_size() / 2**20:.0f} MiB")
    candidates: dict[str, Callable[[], object]] = {
        "exact dice": lambda: rank_dice(probs),
        "exact iou": lambda: rank_dice(probs, metric="iou"),
        "one read (sum)": lambda: probs.sum(),
        "torch.argmax": lambda: probs.argmax(1),
        "torch.sort": lambda: probs.flatten(2).sort(dim=2, descending=True),
    }
    if logits is not None:
        candidates["softmax"] = lambda: to_probs(logits)
    if probs.numel() < 1 << 25:
        candidates["our rma dice"] = lambda: rank_dice(probs, solver="rma")
        candidates["our ba dice"] = lambda: rank_dice(probs, solver="ba")
        for name, run in others.items():
            candidates[name] = partial(run, probs)
        candidates["authors' loop (stand-in)"] = lambda: authors_loop(probs)
    times = race(candidates, rounds, device)
    table(times, "exact dice")
    memory = extra_memory(probs, lambda: rank_dice(probs))
    print(f"  peak extra memory of exact dice: {memory:.2f} x the map")
    result = {"shape": list(probs.shape), "active": active, "memory": memory, "seconds": times}
    if probs.numel() < 1 << 25:
        result["lost"] = lost_scores(probs, others)
    return result


def growth(device: str, rounds: int, quick: bool) -> dict:
    """Print and return how the time grows with the pixels, the classes, and the active among many classes."""
    sides = (128, 256, 512) if quick else (128, 256, 512, 1024, 2048)
    counts = (4, 8, 16) if quick else (4, 8, 16, 32, 64, 128)
    result: dict[str, dict] = {"pixels": {}, "classes": {}, "active": {}}

    def measure(kind: str, key: int, probs: Tensor) -> None:
        spent = race({"dice": lambda: rank_dice(probs), "iou": lambda: rank_dice(probs, metric="iou")}, rounds, device)
        least = {metric: min(times) for metric, times in spent.items()}
        result[kind][key] = least
        per = {metric: 1e9 * t / probs.numel() for metric, t in least.items()}
        print(
            f"  {kind:8s}{key:10d}{least['dice'] * 1e3:12.2f} ms dice{least['iou'] * 1e3:12.2f} ms iou"
            f"{per['dice']:8.2f} {per['iou']:8.2f} ns per value"
        )

    print("\ngrowth (4 classes; then 256 x 256 pixels; then the number of active classes among 150 of 512 x 512)")
    for side in sides:
        measure("pixels", side * side, to_probs(field_logits((1, 4, side, side), device)))
    for count in counts:
        # Independent maps per class: all rows stay active, however many.
        logits = field_logits((1, count, 256, 256), device)
        measure("classes", count, (logits - 4).sigmoid())
    if not quick:
        sleeping = torch.rand(1, 150, 512, 512, device=device) * 0.01
        for count in (1, 4, 16, 64, 150):
            probs = sleeping.clone()
            probs[:, :count] = (field_logits((1, count, 512, 512), device) - 4).sigmoid()
            measure("active", count, probs)
    return result


def plots(results: dict, folder: Path) -> None:
    """Draw the times on the first large map and the growth."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("matplotlib is not installed: no plots")
        return
    folder.mkdir(parents=True, exist_ok=True)
    shown = results["maps"].get("1x21x512x512") or next(iter(results["maps"].values()))
    names = sorted(shown["seconds"], key=lambda name: min(shown["seconds"][name]))
    least = [1e3 * min(shown["seconds"][name]) for name in names]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    colors = ["#c44e52" if name.startswith("exact") else "#8c8c8c" for name in names]
    axes.barh(names, least, color=colors)
    for place, value in enumerate(least):
        axes.text(value, place, f" {value:.0f}", va="center")
    axes.set_xscale("log")
    axes.set_xlim(right=4 * max(least))
    axes.set_xlabel("milliseconds, map of " + " x ".join(map(str, shown["shape"])))
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(folder / "rankdice-time.png", dpi=120)
    figure, pair = pyplot.subplots(1, 2, figsize=(7, 3), sharey=True)
    for axes, kind in zip(pair, ("pixels", "classes"), strict=True):
        line = results["growth"][kind]
        for metric in ("dice", "iou"):
            axes.loglog(list(line), [1e3 * row[metric] for row in line.values()], "o-", label=f"exact {metric}")
        first, last = min(line), max(line)
        top = 1e3 * line[last]["dice"]
        axes.loglog([first, last], [top * first / last, top], "k:", label="linear")
        axes.set_xlabel(kind)
        axes.legend()
    pair[0].set_ylabel("milliseconds")
    figure.tight_layout()
    figure.savefig(folder / "rankdice-growth.png", dpi=120)
    print(f"plots in {folder}")


def load_probs(path: Path) -> Tensor:
    """Return the array "probs" of an .npz or .pt file, or a tensor saved alone."""
    if path.suffix == ".npz":
        return torch.from_numpy(np.load(path)["probs"])
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return loaded["probs"] if isinstance(loaded, dict) else loaded


def main() -> None:
    parser = argparse.ArgumentParser(description="Time RankDice and its alternatives.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="the best peers only, but for two maps; few rounds")
    parser.add_argument("--rounds", type=int, help="timed rounds per candidate (default 7, quick 5; small maps: more)")
    parser.add_argument("--probs", type=Path, help="a real map: .npz or .pt with 'probs' (B, C, H, W)")
    parser.add_argument("--shapes", nargs="*", metavar="BxCxHxW", help="these maps instead of the usual ones")
    parser.add_argument("--no-growth", action="store_true")
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--plots", type=Path, help="draw the plots of docs/rankdice.md into this folder")
    options = parser.parse_args()
    rounds = options.rounds or (5 if options.quick else 7)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {name}, {rounds} rounds")
    others = package()
    results: dict = {"torch": torch.__version__, "device": name, "maps": {}}
    if options.probs:
        probs = load_probs(options.probs).to(options.device)
        results["maps"][options.probs.name] = one_map(
            f"{options.probs.name} {tuple(probs.shape)}", probs, None, rounds, others, options.device
        )
    else:
        shapes = [*TABLE, SINGLE] if not options.quick else TABLE[:-1]
        if options.shapes:
            shapes = [tuple(int(n) for n in text.split("x")) for text in options.shapes]
        for shape in shapes:
            logits = field_logits(shape, options.device)
            title = "x".join(map(str, shape))
            times = rounds * (SMALL_ROUNDS if math.prod(shape) < SMALL else 1)
            if options.quick and shape not in FULL_SHAPES:
                results["maps"][title] = against_the_best(to_probs(logits), 2 * times, others, options.device)
                continue
            results["maps"][title] = one_map(title, to_probs(logits), logits, times, others, options.device)
    summary(results["maps"])
    if not options.no_growth and not options.probs:
        results["growth"] = growth(options.device, rounds, options.quick)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if options.plots:
        plots(results, options.plots)


if __name__ == "__main__":
    main()
