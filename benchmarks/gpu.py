"""Measure everything on a GPU, in one call of less than eight minutes.

    python -m benchmarks.gpu --json gpu.json --markdown gpu.md
    python -m benchmarks.gpu --short --device cpu      # the same parts in a short form, to try them

Each part has its own time limit. If a part fails, the error is reported and the other parts run:

* ``tests``: the tests marked ``gpu``.
* ``rankdice``: RankDice, label map and presence against argmax, sort and package rankseg over a table of sizes; how
  many kernels a call launches and how often the host waits, from the profiler; peak memory.
* ``scripts``: ``test.py -p rankdice`` against ``-p max`` on the same images.
* ``training``: images per second, share of the peak arithmetic (``--peak-tflops``) and peak memory of PSPNet-ResNet-50
  and DeepLab-ResNet-101 at 512 x 512, in float32, bf16, + channels_last, + torch.compile; against torchvision's
  reference loop (references/segmentation/train.py) with the same network.

If the package rankseg is not installed, its columns are left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import markdown
from benchmarks.rankdice import TABLE, field_logits, package, race, to_probs
from benchmarks.training import _silence, make_trainer
from utils import presence, tables
from utils.rankdice import label_map, rank_dice

LIMIT_S = 450.0  # no new part starts later
NETWORKS = {"PSPNet": {"backbone": "resnet50"}, "DeepLab": {"backbone": "resnet101"}}
SHORT_NETWORKS = {"UNet": {"width": 8}}
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"amp": "bf16"},
    "bf16, channels_last": {"amp": "bf16", "channels_last": True},
    "bf16, channels_last, compile": {"amp": "bf16", "channels_last": True, "compile": True},
}


def parse_arguments() -> Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Measure a GPU, part by part.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--short", action="store_true", help="small maps and networks, few rounds")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--peak-tflops", type=float, help="peak of the device in bf16, to compute the utilization")
    parser.add_argument("--batch-size", type=int, default=8, help="images per training step")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="every number (default: %(default)s)")
    parser.add_argument("--markdown", type=Path, default=Path("gpu.md"), help="one table (default: %(default)s)")
    return parser.parse_args()


def where(device: str) -> dict[str, str]:
    """Return what the numbers were measured on."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        "Python": platform.python_version(),
    }


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: str, run: Callable[[], object]) -> float | None:
    """Return the peak memory of ``run`` in GiB, in addition to the memory in use before; None without a GPU."""
    if device != "cuda":
        run()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / 2**30


# -- parts -----------------------------------------------------------------------------------------------------


def gpu_tests(args: Namespace) -> dict[str, Any]:
    """Run the tests marked gpu; on a CPU, only collect them."""
    files = [str(path) for path in Path("tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *files]
    command += ["--continue-on-collection-errors"] + ["--collect-only"] * (args.device == "cpu")
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"result": lines[-1] if lines else done.stderr.strip()[-300:], "failed": failed}


def launches(run: Callable[[], object], device: str) -> tuple[int, int]:
    """Return how many kernels a call launches, and how often the host waits for the device."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    run()
    synchronize(device)
    with profile(activities=activities) as record:
        run()
    names = [event.name for event in record.events()]
    kernels = sum(
        name in ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx") for name in names
    )
    waits = sum(name in ("cudaStreamSynchronize", "cudaEventSynchronize") for name in names)
    if device == "cuda":
        return kernels, waits
    return sum(name.startswith("aten::") for name in names), sum(name == "aten::_local_scalar_dense" for name in names)


def decisions(probs: Tensor) -> Tensor:
    """Return label maps of the classes that the rule of presence chooses."""
    found = rank_dice(probs, prune=None)
    chosen, _ = presence.choose(found.highest, found.scores)
    return label_map(probs, chosen, found=found)


def rankdice(args: Namespace) -> dict[str, Any]:
    """Time RankDice and its peers over the table of sizes."""
    shapes = TABLE[:3] if args.short else TABLE
    peers = package()
    rows = {}
    for shape in shapes:
        probs = to_probs(field_logits(shape, args.device))
        candidates: dict[str, Callable[[], object]] = {
            "RankDice": partial(rank_dice, probs),
            "RankDice IoU": partial(rank_dice, probs, "iou"),
            "presence + label map": partial(decisions, probs),
            "argmax": partial(torch.argmax, probs, 1),
            "sort": partial(torch.sort, probs.flatten(2), dim=2, descending=True),
        }
        for name in ("rankseg RMA dice", "rankseg RMA dice, screened"):
            if name in peers:
                candidates[name.replace(" dice", "")] = partial(peers[name], probs)
        times = race(candidates, 3 if args.short else 9, args.device)
        row: dict[str, Any] = {name: 1e3 * sorted(spent)[len(spent) // 2] for name, spent in times.items()}
        for name in ("RankDice", "presence + label map"):
            row[f"{name}, launches"], row[f"{name}, waits"] = launches(candidates[name], args.device)
        row["peak GiB"] = peak_memory(args.device, candidates["RankDice"])
        rows["x".join(map(str, shape))] = row
    return {"milliseconds": rows, "rankseg": "measured" if peers else "not installed"}


def scripts(args: Namespace) -> dict[str, Any]:
    """Time test.py with both procedures on the same images: train a little on built-in data first."""
    with tempfile.TemporaryDirectory() as name:
        settings = (f"save_dir={name}", "epochs=1", "limit_batches=4", "val=false", "monitor=off", "fit=false")
        common = [part for setting in settings for part in ("--set", f"trainer.{setting}")]
        device = ["-d", "cpu"] if args.device == "cpu" else []
        done = _script("train.py", "--config", "config.json", *common, *device)
        checkpoints = sorted(Path(name).rglob("*.pth"))
        if not checkpoints:
            return {"error": f"train.py left no checkpoint: {done[-300:]}"}
        limit = ["--set", "trainer.limit_batches=2"] if args.short else []
        rows = {}
        for procedure in ("max", "rankdice", "max", "rankdice"):  # the first round warms up
            start = time.perf_counter()
            folder = Path(name) / procedure
            _script("test.py", "-r", str(checkpoints[-1]), "-p", procedure, "-o", str(folder), *limit, *device)
            seconds = time.perf_counter() - start
            results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            rows[procedure] = {
                "seconds in all": seconds,
                "images": results["protocol"]["images"],
                "network, ms an image": results["protocol"]["forward_milliseconds_per_image"],
                "procedure, ms an image": results["procedures"][procedure]["milliseconds_per_image"],
            }
    return {"test.py -p": rows}


def _script(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout


def training(args: Namespace) -> dict[str, Any]:
    """Measure the trainer in several settings, and torchvision's loop with the same network."""
    rows: dict[str, Any] = {}
    networks = SHORT_NETWORKS if args.short else NETWORKS
    start = time.perf_counter()
    for arch, arch_args in networks.items():
        for name, settings in SETTINGS.items():
            compiling = settings.get("compile")
            if compiling and (args.short or arch != next(iter(networks)) or time.perf_counter() - start > 120):
                continue  # compiling takes minutes: one network shows what it is worth
            setup = Namespace(
                arch=arch, classes=19, batch_size=2 if args.short else args.batch_size, size=64 if args.short else 512,
                iterations=2 if args.short else 10, device=args.device,
            )  # fmt: skip
            try:
                rows[f"{arch}, {name}"] = _throughput(setup, arch_args, settings, args.peak_tflops)
            except Exception as error:  # noqa: BLE001 - out of memory, no compiler, ...
                rows[f"{arch}, {name}"] = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
            if args.device == "cuda":
                torch.cuda.empty_cache()
    return {"training": rows}


def _throughput(
    setup: Namespace, arch_args: dict[str, Any], settings: dict[str, Any], peak: float | None
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, _silence():
        trainer = make_trainer(setup, arch_args, Path(folder), **settings)
        batch = trainer.data.train.made[0]
        images, labels = trainer.normalize(batch.images.to(setup.device)), batch.labels.to(setup.device)
        with FlopCounterMode(display=False) as flops:
            loss, _ = trainer._forward(images, labels)
            loss.backward()
        trainer.model.zero_grad()

        def ours() -> None:
            trainer.batch = 0
            trainer.meter.reset()
            trainer._train_epoch(1)

        reference = torchvision_epoch(trainer, bool(settings.get("amp")))
        seconds: dict[str, list[float]] = {"ours": [], "torchvision's loop": []}
        memory = None
        for round_ in range(4):
            for name, run in (("ours", ours), ("torchvision's loop", reference)):
                begin = time.perf_counter()
                peak_now = peak_memory(setup.device, run)
                synchronize(setup.device)
                if round_:
                    seconds[name].append((time.perf_counter() - begin) / setup.iterations)
                    memory = peak_now if name == "ours" else memory
        trainer.log.close()
    best = {name: min(values) for name, values in seconds.items()}
    row: dict[str, Any] = {f"images/s, {name}": setup.batch_size / value for name, value in best.items()}
    if peak:
        row["share of peak"] = flops.get_total_flops() / best["ours"] / (peak * 1e12)
    return row | {"peak GiB": memory}


def torchvision_epoch(trainer: Any, amp: bool) -> Callable[[], None]:
    """Return an epoch as in torchvision's reference script: one optimizer step and one ``loss.item()`` a batch."""
    model, device = trainer.model, trainer.device
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=100_000, power=0.9)

    def epoch() -> None:
        model.train()
        for batch in trainer.data.train:
            images, target = trainer.normalize(batch.images.to(device)), batch.labels.to(device).long()
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                output = model(images)
                outputs = output if isinstance(output, dict) else {"out": output}
                losses = {k: torch.nn.functional.cross_entropy(x, target, ignore_index=255) for k, x in outputs.items()}
                loss = losses["out"] + 0.5 * losses["aux"] if "aux" in losses else losses["out"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss.item()

    return epoch


PARTS: dict[str, Callable[[Namespace], dict[str, Any]]] = {
    "rankdice": rankdice,
    "scripts": scripts,
    "training": training,
    "tests": gpu_tests,
}


# -- results ---------------------------------------------------------------------------------------------------


TITLES = {
    "rankdice": (
        "RankDice",
        "Milliseconds per call, medians. *launches* are the kernels that a call starts, *waits* is how often the host "
        "waits for the GPU; both are from the profiler.",
    ),
    "scripts": ("test.py", "The same 300 images of the built-in data, tested with argmax and with RankDice."),
    "training": (
        "Training",
        "Images of 512 x 512 pixels with 19 classes, already in memory, against torchvision's reference loop with the "
        "same network. Ours also computes the scores of the progress bar and checks the loss.",
    ),
    "tests": ("Tests", ""),
}


def page(result: dict[str, Any]) -> str:
    """Return all numbers as a Markdown page: for each part a table of its cases, and its other results."""
    facts = ", ".join(f"{name} {value}" for name, value in result["where"].items())
    blocks = [
        "# Measured on a GPU",
        f"`python -m benchmarks.gpu`, {result['seconds']:.0f} s in all: {facts}.",
    ]
    for part, found in result["parts"].items():
        title, about = TITLES[part]
        blocks += [f"## {title}"] + [about] * bool(about)
        for name, value in found.items():
            if isinstance(value, dict):
                cases = value if all(isinstance(case, dict) for case in value.values()) else {"": value}
                columns = list(dict.fromkeys(column for case in cases.values() for column in case))
                rows = [[name, *(_cell(case.get(column)) for column in columns)] for name, case in cases.items()]
                blocks.append(markdown.table([name, *columns], rows))
            elif value not in (None, []) and name not in ("took s", "rankseg"):
                blocks.append(f"{name}: {_cell(value)}")
    return "\n\n".join(blocks) + "\n"


def _cell(value: object) -> str:
    text = f"{value:#.3g}" if isinstance(value, float) and value < 100 else tables.number(value, 0)
    return text.rstrip(".").replace("|", "/").replace("\n", " ")


def main() -> int:
    args = parse_arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device; --short --device cpu tries the parts on a CPU", file=sys.stderr)
        return 2
    start = time.perf_counter()
    result: dict[str, Any] = {"where": where(args.device), "short": args.short, "parts": {}}
    for name in args.parts:
        begin = time.perf_counter()
        if begin - start > LIMIT_S:
            result["parts"][name] = {"skipped": f"{LIMIT_S:.0f} s were over"}
            continue
        try:
            found = PARTS[name](args)
        except Exception as error:  # noqa: BLE001 - the other parts are worth having
            found = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        result["parts"][name] = found | {"took s": time.perf_counter() - begin}
        result["seconds"] = time.perf_counter() - start
        args.json.write_text(json.dumps(result, indent=1))
        args.markdown.write_text(page(result))
        print(f"{name}: {time.perf_counter() - begin:.0f} s")
    print(f"written: {args.markdown} and {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
