"""Compare losses and prediction procedures: a small network on Shapes, every loss, three seeds.

All runs use the same network, data, optimizer and schedule; only the loss differs. Each trained network is scored on
the same test scenes under T, max and rankdice, without and with a temperature fitted on validation scenes. The labels
of Shapes are uncertain by construction, as real labels are, so the procedures give different masks.

    python -m benchmarks.losses --quick                  # a test run, one minute
    python -m benchmarks.losses --json saved/losses.json # the study; repeat the command to continue an interrupted one
    python -m benchmarks.losses --json saved/losses.json --write-docs
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import dataloaders
import models
from benchmarks import markdown
from utils import losses, lr_scheduler, optim
from utils.batch import Normalize
from utils.evaluation import Decision, Evaluator, evaluate
from utils.evaluation.fitting import fit
from utils.facts import Facts
from utils.predict import PredictOptions
from utils.predict.network import Network

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "losses.md"
BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"

# Label of a row -> loss and arguments.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "CrossEntropyLoss2d": ("CrossEntropyLoss2d", {}),
    "CrossEntropyLoss2d, balanced": ("CrossEntropyLoss2d", {"weight": "balanced"}),
    "CrossEntropyLoss2d, label_smoothing 0.1": ("CrossEntropyLoss2d", {"label_smoothing": 0.1}),
    "CrossEntropyLoss2d, top_k 0.2": ("CrossEntropyLoss2d", {"top_k": 0.2}),
    "BCEWithLogitsLoss2d": ("BCEWithLogitsLoss2d", {}),
    "FocalLoss": ("FocalLoss", {}),
    "BCEWithLogitsFocalLoss2d": ("BCEWithLogitsFocalLoss2d", {}),
    "CE_DiceLoss": ("CE_DiceLoss", {}),
    "CE_DiceLoss, per_class": ("CE_DiceLoss", {"per_class": True}),
    "BCEDiceLoss": ("BCEDiceLoss", {}),
    "DiceLoss": ("DiceLoss", {}),
    "DiceLoss, per_class": ("DiceLoss", {"per_class": True}),
    "BDiceLoss": ("BDiceLoss", {}),
    "LogCoshDiceLoss": ("LogCoshDiceLoss", {}),
    "TverskyLoss": ("TverskyLoss", {}),
    "LovaszSoftmax": ("LovaszSoftmax", {}),
    "LovaszHinge": ("LovaszHinge", {}),
}
PROCEDURES = ("T", "max", "rankdice")


@dataclass(frozen=True)
class Recipe:
    """How every network is trained and tested; runs of different recipes are never mixed."""

    epochs: int = 20
    length: int = 640
    val_length: int = 200
    test_length: int = 200
    size: int = 64
    batch_size: int = 8
    width: int = 8
    lr: float = 0.01
    precision: str = "bf16"  # of the forward pass in training; tests always run in float32


class Study:
    """Builds the data once and trains one network per variant and seed on it.

    Args:
        recipe: what all runs share.
        device: such as "cuda" or "cpu".
    """

    def __init__(self, recipe: Recipe, device: str) -> None:
        self.recipe, self.device = recipe, torch.device(device)
        shared = {"size": recipe.size, "batch_size": recipe.batch_size, "num_workers": 0, "cache": "ram"}
        self.train_loader = dataloaders.build(
            "Shapes",
            split="train",
            length=recipe.length,
            endless=False,
            shuffle=True,
            augment=True,
            scale=False,
            rotate=False,
            **shared,
        )
        self.val_loader = dataloaders.build("Shapes", split="val", length=recipe.val_length, **shared)
        self.test_loader = dataloaders.build("Shapes", split="test", length=recipe.test_length, **shared)
        self.facts = Facts.of(self.train_loader.dataset)
        self.weights = self.train_loader.dataset.class_weights().tolist()

    def run(self, variant: str, seed: int) -> dict[str, Any]:
        """Train one network and test it, without and with a fitted temperature; returns each procedure's scores."""
        name, args = VARIANTS[variant]
        if args.get("weight") == "balanced":
            args = {**args, "weight": self.weights}
        loss = losses.build(name, self.facts.ignore_index, **args).to(self.device)
        start = time.perf_counter()
        model = self._train(loss, seed)
        network = Network(model, self.facts, loss.activation, self.device)
        evaluator = Evaluator(network)
        scores = self._test(evaluator)
        temperature = self._temperature(evaluator)
        fitted = self._test(replace(evaluator, network=replace(network, temperature=temperature)))
        return {
            "proper": loss.proper,
            "seconds": round(time.perf_counter() - start, 1),
            "scores": scores,
            "temperature": temperature,
            "fitted": fitted,
        }

    def _train(self, loss: Any, seed: int) -> Any:
        torch.manual_seed(seed)
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16")
        model = models.build("UNet", self.facts.num_classes, width=self.recipe.width).train()
        model = model.to(self.device).to(memory_format=torch.channels_last)
        normalize = Normalize(self.facts.mean, self.facts.std).to(self.device)
        optimizer = optim.build("AdamW", model, lr=self.recipe.lr, weight_decay=1e-4)
        steps = lr_scheduler.optimizer_steps(self.recipe.epochs, len(self.train_loader))
        schedule = lr_scheduler.build("OneCycle", optimizer, steps)
        for epoch in range(self.recipe.epochs):
            self.train_loader.set_epoch(seed * self.recipe.epochs + epoch)  # another order for each seed
            for batch in self.train_loader:
                assert isinstance(batch.images, torch.Tensor)  # crops are of one size
                assert isinstance(batch.labels, torch.Tensor)
                images = normalize(batch.images.to(self.device)).contiguous(memory_format=torch.channels_last)
                with half:
                    value = loss(model(images), batch.labels.to(self.device))
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                optimizer.step()
                schedule.step()
        return model

    def _temperature(self, evaluator: Evaluator) -> float:
        return fit(evaluator, self.val_loader, PredictOptions()).temperature

    def _test(self, evaluator: Evaluator) -> dict[str, dict[str, float]]:
        outcome = evaluate(evaluator, self.test_loader, {name: Decision(name) for name in PROCEDURES})
        wanted = ("Mean_Dice", "Mean_IoU", "Expected_Dice", "Measured_Dice")
        computed = {name: metrics.compute() for name, metrics in outcome.metrics.items()}
        return {name: {k: scores[k] for k in wanted if k in scores} for name, scores in computed.items()}


def tables(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the two Markdown tables of ``{variant: results of its seeds}``; scores are percentages.

    ``gain``: mDice of rankdice minus the better of T and max (mean and standard deviation over the seeds).
        ``expected - measured``: the mDice that rankdice expects of its masks minus the measured mDice; 0 if the
        probabilities are calibrated.
    """
    first, second = [], []
    for variant, results in runs.items():
        proper = "yes" if results[0]["proper"] else "no"
        temperature = statistics.fmean(r["temperature"] for r in results)
        raw, fitted = [r["scores"] for r in results], [r["fitted"] for r in results]
        first.append([variant, proper, *(_both(raw, p) for p in PROCEDURES), *_gain(raw)])
        second.append([variant, f"{temperature:.2f}", *(_both(fitted, p) for p in PROCEDURES), *_gain(fitted)])
    last = [*PROCEDURES, "gain", "expected - measured"]
    return "\n".join(
        [
            "As the networks are:",
            "",
            markdown.table(["loss", "proper", *last], first, right=False),
            "",
            "The same networks with a temperature fitted on validation scenes, as `test.py --fit` does:",
            "",
            markdown.table(["loss", "temperature", *last], second, right=False),
        ]
    )


def _both(scores: Sequence[Mapping[str, Mapping[str, float]]], procedure: str) -> str:
    dice, iou = (100 * statistics.fmean(s[procedure][key] for s in scores) for key in ("Mean_Dice", "Mean_IoU"))
    return f"{dice:.1f} / {iou:.1f}"


def _gain(scores: Sequence[Mapping[str, Mapping[str, float]]]) -> tuple[str, str]:
    """Return two cells: the gain of rankdice, and its expected minus its measured score."""
    dice = [{p: 100 * s[p]["Mean_Dice"] for p in PROCEDURES} for s in scores]
    gain = [d["rankdice"] - max(d["T"], d["max"]) for d in dice]
    spread = f" ± {statistics.stdev(gain):.1f}" if len(gain) > 1 else ""
    off = [100 * (s["rankdice"]["Expected_Dice"] - s["rankdice"]["Measured_Dice"]) for s in scores]
    mean_off = statistics.fmean(off)  # nan where every mask is empty and nothing is expected
    return f"{statistics.fmean(gain):+.1f}{spread}", "" if math.isnan(mean_off) else f"{mean_off:+.1f}"


def caption(recipe: Recipe, seeds: int, device: str) -> str:
    """Return the text below the table, which describes how to repeat it."""
    where = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    many = f"{seeds} seeds" if seeds > 1 else "1 seed"
    return (
        f"mDice / mIoU in percent, mean over {many}. UNet (width {recipe.width}), {recipe.epochs} epochs of "
        f"{recipe.length} scenes of {recipe.size} x {recipe.size}, batch {recipe.batch_size}, AdamW at {recipe.lr:g}, "
        f"OneCycle, {recipe.precision}; {recipe.val_length} validation and {recipe.test_length} test "
        f"scenes. torch {torch.__version__}, {where}."
    )


def write_docs(text: str, path: Path = DOCS) -> None:
    """Put ``text`` between the markers of the page."""
    page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{path} lacks the lines {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.losses", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny data and one seed, for a test run")
    parser.add_argument("--losses", nargs="+", metavar="NAME", help="only rows with these names or prefixes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", help="cuda or cpu (default: cuda if available)")
    for field, default in asdict(Recipe()).items():
        option = f"--{field.replace('_', '-')}"
        choices = ("fp32", "bf16") if field == "precision" else None
        parser.add_argument(option, type=type(default), choices=choices, help=f"default: {default}")
    parser.add_argument("--json", type=Path, help="write results to this file after each run, and continue from it")
    parser.add_argument("--write-docs", action="store_true", help=f"put the table into {DOCS.relative_to(ROOT)}")
    return parser.parse_args(argv)


QUICK = {"epochs": 1, "length": 32, "val_length": 8, "test_length": 8, "size": 64}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    given = {field: getattr(args, field) for field in asdict(Recipe()) if getattr(args, field) is not None}
    recipe = Recipe(**{**(QUICK if args.quick else {}), **given})
    seeds = 1 if args.quick else args.seeds
    wanted = args.losses or list(VARIANTS)
    variants = [v for v in VARIANTS if v in wanted or any(v.startswith(w) for w in wanted if w not in VARIANTS)]

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    kept = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    key = json.dumps(asdict(recipe), sort_keys=True)
    results: dict[str, Any] = kept.setdefault(key, {})
    study = Study(recipe, device)
    # Seed by seed, so that an early stop leaves a complete table of fewer seeds.
    for seed in range(seeds):
        for variant in variants:
            name = f"{variant} #{seed}"
            if name not in results:
                results[name] = study.run(variant, seed)
                print(f"{name}: {results[name]['seconds']} s", file=sys.stderr, flush=True)
                if args.json:
                    args.json.parent.mkdir(parents=True, exist_ok=True)
                    args.json.write_text(json.dumps(kept, indent=1))
    runs = {v: [results[f"{v} #{seed}"] for seed in range(seeds)] for v in variants}
    text = f"{tables(runs)}\n\n{caption(recipe, seeds, device)}"
    print(text)
    if args.write_docs:
        write_docs(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
