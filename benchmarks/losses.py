"""Which loss goes with which prediction procedure? A small network on Shapes, every loss, three seeds.

Same network, data, optimizer and schedule for all; only the loss differs. Each trained network is scored on the
same test scenes under T, max and rankdice. Shapes' labels are uncertain by construction, as real ones are, so that
there is something for rankdice to decide.

    python -m benchmarks.losses --quick                  # a minute: does it run?
    python -m benchmarks.losses --json saved/losses.json # the study; an interrupted one goes on where it was
    python -m benchmarks.losses --json saved/losses.json --write-docs
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
        import torch

        import dataloaders
        from utils.facts import Facts

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
        self.test_loader = dataloaders.build("Shapes", split="test", length=recipe.test_length, **shared)
        self.facts = Facts.of(self.train_loader.dataset)
        self.weights = self.train_loader.dataset.class_weights().tolist()

    def run(self, variant: str, seed: int) -> dict[str, Any]:
        """Train and test one network; returns the scores of each procedure."""
        from utils import losses

        name, args = VARIANTS[variant]
        if args.get("weight") == "balanced":
            args = {**args, "weight": self.weights}
        loss = losses.build(name, self.facts.ignore_index, **args).to(self.device)
        start = time.perf_counter()
        model = self._train(loss, seed)
        scores = self._test(model, loss)
        return {"proper": loss.proper, "seconds": round(time.perf_counter() - start, 1), "scores": scores}

    def _train(self, loss: Any, seed: int) -> Any:
        import torch

        import models
        from utils import lr_scheduler, optim
        from utils.batch import Normalize

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

    def _test(self, model: Any, loss: Any) -> dict[str, dict[str, float]]:
        from utils.evaluation import Decision, Evaluator, evaluate

        evaluator = Evaluator(model, self.facts, loss.activation, self.device)
        outcome = evaluate(evaluator, self.test_loader, {name: Decision(name) for name in PROCEDURES})
        wanted = ("Mean_Dice", "Mean_IoU", "Expected_Dice", "Measured_Dice")
        computed = {name: metrics.compute() for name, metrics in outcome.metrics.items()}
        return {name: {k: scores[k] for k in wanted if k in scores} for name, scores in computed.items()}


def table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the Markdown table of ``{variant: results of its seeds}``; scores are percentages.

    ``gain``: mDice of rankdice minus the better of T and max (mean and standard deviation over the seeds).
    ``expected - measured``: the mDice that rankdice expects of its masks minus the one measured; 0 where the
    probabilities are right.
    """
    lines = [
        "| loss | proper | T | max | rankdice | gain | expected - measured |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant, results in runs.items():
        cells = []
        for procedure in PROCEDURES:
            dice, iou = (
                100 * statistics.fmean(r["scores"][procedure][key] for r in results)
                for key in ("Mean_Dice", "Mean_IoU")
            )
            cells.append(f"{dice:.1f} / {iou:.1f}")
        scores = [{p: 100 * r["scores"][p]["Mean_Dice"] for p in PROCEDURES} for r in results]
        gain = [d["rankdice"] - max(d["T"], d["max"]) for d in scores]
        spread = f" ± {statistics.stdev(gain):.1f}" if len(gain) > 1 else ""
        off = [
            100 * (r["scores"]["rankdice"]["Expected_Dice"] - r["scores"]["rankdice"]["Measured_Dice"]) for r in results
        ]
        proper = "yes" if results[0]["proper"] else "no"
        cells += [f"{statistics.fmean(gain):+.1f}{spread}", f"{statistics.fmean(off):+.1f}"]
        lines.append(f"| {variant} | {proper} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def caption(recipe: Recipe, seeds: int, device: str) -> str:
    """Return the sentence under the table that lets someone repeat it."""
    import torch

    where = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    many = f"{seeds} seeds" if seeds > 1 else "1 seed"
    return (
        f"mDice / mIoU in percent, mean over {many}. UNet (width {recipe.width}), {recipe.epochs} epochs of "
        f"{recipe.length} scenes of {recipe.size} x {recipe.size}, batch {recipe.batch_size}, AdamW at {recipe.lr:g}, "
        f"OneCycle, {recipe.precision}; {recipe.test_length} test scenes. torch {torch.__version__}, {where}."
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
    parser.add_argument("--quick", action="store_true", help="tiny data, one seed: to see whether it runs")
    parser.add_argument("--losses", nargs="+", metavar="NAME", help="rows called so, or whose label begins so")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    for field, default in asdict(Recipe()).items():
        option = f"--{field.replace('_', '-')}"
        choices = ("fp32", "bf16") if field == "precision" else None
        parser.add_argument(option, type=type(default), choices=choices, help=f"default: {default}")
    parser.add_argument("--json", type=Path, help="keep results here after each run, and go on from it")
    parser.add_argument("--write-docs", action="store_true", help=f"put the table into {DOCS.relative_to(ROOT)}")
    return parser.parse_args(argv)


QUICK = {"epochs": 1, "length": 32, "test_length": 8, "size": 64}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    given = {field: getattr(args, field) for field in asdict(Recipe()) if getattr(args, field) is not None}
    recipe = Recipe(**{**(QUICK if args.quick else {}), **given})
    seeds = 1 if args.quick else args.seeds
    wanted = args.losses or list(VARIANTS)
    variants = [v for v in VARIANTS if v in wanted or any(v.startswith(w) for w in wanted if w not in VARIANTS)]

    import torch

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
    text = f"{table(runs)}\n\n{caption(recipe, seeds, device)}"
    print(text)
    if args.write_docs:
        write_docs(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
