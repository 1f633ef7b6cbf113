"""What do the prediction procedures cost from end to end? ``python -m benchmarks.procedures [--quick] [--json FILE]``.

There are three parts. In each, the candidates and the fastest form of each peer run in one process, in turns:

* label maps: from probabilities to one label per pixel: RankDice for every class, the decision which classes are in the
  image (the rule of presence), and the label map; against package rankseg's multiclass form and argmax.
* scoring: what test.py does with a batch, from images to the scores of a procedure, the forward pass included; against
  a plain loop with the same network and torchmetrics' DiceScore. ``all`` scores every procedure of ``-p all`` in one
  pass; its peer runs the loop for T, max and rankdice, one after the other, as the published test.py does.
* fit: temperature, bias, presence and threshold, each cross-validated, from logits; against the usual temperature
  scaling alone (L-BFGS on all pixels; Guo et al., ICML 2017).
"""

# ruff: noqa: E402 (threads are set up before torch is imported)
from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import utils  # noqa: F401 - before torch: sets how long its idle threads wait

# isort: split

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import models
from benchmarks.rankdice import field_logits, race
from utils import presence
from utils.batch import Batch
from utils.evaluation import Evaluator, all_decisions, evaluate
from utils.evaluation.fitting import fit
from utils.facts import Facts
from utils.images import voc_colormap
from utils.predict import PredictOptions
from utils.predict.network import Network
from utils.rankdice import label_map, rank_dice

Shape = tuple[int, int, int, int]
Way = Callable[[Tensor], Tensor]
MAPS: list[Shape] = [(1, 2, 512, 512), (8, 11, 240, 320), (1, 21, 512, 512), (1, 19, 512, 1024), (1, 150, 512, 512)]
QUICK_MAPS: list[Shape] = [(8, 11, 240, 320), (1, 19, 512, 1024)]
SCORING: Shape = (4, 11, 240, 320)
FIT: Shape = (100, 8, 96, 96)
QUICK_FIT: Shape = (40, 8, 64, 64)
IGNORED = 255


def rankseg(mode: str, **options: Any) -> Way | None:
    """Return a predictor of package rankseg, or None where it is not installed."""
    try:
        from rankseg import RankSEG
    except ImportError:
        return None
    predict: Way = RankSEG(metric="dice", solver="RMA", output_mode=mode, **options).predict
    return predict


# -- label maps ------------------------------------------------------------------------------------------------


def our_map(probs: Tensor) -> Tensor:
    """Return the label map of the classes that the rule of presence chooses."""
    found = rank_dice(probs, prune=None)
    chosen, _ = presence.choose(found.highest, found.scores)
    return label_map(probs, chosen, found=found)


def label_maps(shape: Shape, device: str, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every way to a label map."""
    probs = field_logits(shape, device).softmax(1)
    ways: dict[str, Way] = {"ours": our_map, "argmax": lambda p: p.argmax(1)}
    for name, options in (
        ("rankseg multiclass RMA", {}),
        ("rankseg multiclass RMA, screened", {"safe_screening": "auto"}),
    ):
        peer = rankseg("multiclass", **options)
        if peer is not None:
            ways[name] = peer
    return race({name: partial(way, probs) for name, way in ways.items()}, rounds, device)


# -- scoring ---------------------------------------------------------------------------------------------------


class Batches:
    """Batches made once, with a length for the fit."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.made = batches
        self.dataset = range(sum(len(batch.names) for batch in batches))

    def __len__(self) -> int:
        return len(self.made)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.made)


def facts(classes: int, channels: int) -> Facts:
    """Return facts of made-up data."""
    names = tuple(map(str, range(classes)))
    return Facts(classes, names, voc_colormap(classes), (0.5,) * channels, (0.25,) * channels, IGNORED)


class Guided(nn.Module):
    """A network whose logits come from additional channels of the images, so that it behaves like a trained one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return 0.01 * self.model(x[:, :3]) + 4 * x[:, 3:]


def plain(network: Network, batches: Batches, decide: Way, classes: int) -> float:
    """Return the mean Dice from a plain loop: network, decision, torchmetrics."""
    from torchmetrics.segmentation import DiceScore

    score = DiceScore(classes, average="macro", aggregation_level="samplewise", input_format="one-hot")
    score.to(network.device)
    numbers = torch.arange(classes, device=network.device).view(-1, 1, 1)
    with torch.no_grad():
        for images, labels, _ in batches:
            assert isinstance(images, Tensor)
            assert isinstance(labels, Tensor)
            probs = network.model(network.normalize(images.to(network.device))).softmax(1)
            found, target = decide(probs), labels.to(network.device)[:, None]
            masks = found if found.ndim == 4 else found[:, None] == numbers
            score.update((masks & (target != IGNORED)).int(), (target == numbers).int())
    return float(score.compute())


def guided(shape: Shape, device: str) -> tuple[Network, Batches]:
    """Return a U-Net and two batches for which its probabilities look like those of a trained network."""
    count, classes, height, width = shape
    torch.manual_seed(0)
    model = Guided(models.build("UNet", classes, width=8)).to(device).eval()
    logits = field_logits(shape, "cpu")
    images = torch.cat([torch.rand(count, 3, height, width), (logits / 16 + 0.5).clamp(0, 1)], 1)
    target = torch.distributions.Categorical(logits=logits.movedim(1, -1)).sample().byte()
    target[:, :2] = IGNORED
    batches = [Batch(images, target, [f"{part}{i}" for i in range(count)]) for part in "ab"]
    return Network(model, facts(classes, 3 + classes), "softmax", torch.device(device)), Batches(batches)


def scoring(shape: Shape, device: str, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return per procedure the seconds of ours and of a plain loop, and of all procedures."""
    network, batches = guided(shape, device)
    decisions = all_decisions(PredictOptions())
    peer = rankseg("multilabel", safe_screening="auto")
    theirs: dict[str, Way] = {"T": lambda p: p > 0.5, "max": lambda p: p.argmax(1)}
    theirs |= {} if peer is None else {"rankdice": peer}

    def loops(names: Sequence[str]) -> None:
        for name in names:
            plain(network, batches, theirs[name], shape[1])

    result = {}
    for name, ours in {**{name: {name: decisions[name]} for name in theirs}, "all": decisions}.items():
        candidates: dict[str, Callable[[], object]] = {
            "ours": partial(evaluate, Evaluator(network), batches, ours),
            "plain loop": partial(loops, list(theirs) if name == "all" else [name]),
        }
        result[name] = race(candidates, rounds, device)
    return result


# -- fit -------------------------------------------------------------------------------------------------------


class Given(nn.Module):
    """A network whose logits are its input, so that only the fit is timed."""

    def forward(self, x: Tensor) -> Tensor:
        return 4 * x


def lbfgs(network: Network, batches: Batches) -> float:
    """Return the temperature that minimizes the cross-entropy of all pixels."""
    kept: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for images, labels, _ in batches:
            assert isinstance(images, Tensor)
            assert isinstance(labels, Tensor)
            kept.append((network.model(network.normalize(images)), labels.long()))
    logits, target = (torch.cat(parts) for parts in zip(*kept, strict=True))
    inverse = torch.ones(1, device=logits.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([inverse], lr=0.1, max_iter=50)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(logits * inverse, target, ignore_index=IGNORED)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type,no-untyped-call]
    return 1 / float(inverse.detach())


def fitting(shape: Shape, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of our fit and of temperature scaling alone, on the CPU."""
    count, classes, _, _ = shape
    logits = field_logits(shape, "cpu") / 2
    images = (logits / 4 * 0.25 + 0.5).clamp(0, 1)
    target = torch.distributions.Categorical(logits=logits.movedim(1, -1)).sample().byte()
    target[:, :2] = IGNORED
    network = Network(Given(), facts(classes, classes), "softmax")
    step = 10
    batches = Batches([
        Batch(images[i : i + step], target[i : i + step], [f"image{j:04d}" for j in range(i, min(count, i + step))])
        for i in range(0, count, step)
    ])  # fmt: skip
    ours = partial(fit, Evaluator(network), batches, PredictOptions())
    return race({"ours": ours, "temperature scaling, L-BFGS": partial(lbfgs, network, batches)}, rounds, "cpu")


# -- command line ----------------------------------------------------------------------------------------------


def show(title: str, seconds: dict[str, list[float]]) -> None:
    """Print medians and their ratio to ours."""
    print(f"\n{title}\n  {'':36s}{'median ms':>12s}{'x ours':>10s}")
    base = median(seconds["ours"])
    for name, spent in seconds.items():
        print(f"  {name:36s}{1e3 * median(spent):12.2f}{median(spent) / base:10.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.procedures", description="Time procedures end to end.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer maps, fewer rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    args = parser.parse_args()
    rounds = 5 if args.quick else 9
    text = "x".join
    result: dict[str, dict[str, Any]] = {"label maps": {}, "scoring": {}, "fit": {}}
    for shape in QUICK_MAPS if args.quick else MAPS:
        title = text(map(str, shape))
        result["label maps"][title] = label_maps(shape, args.device, rounds)
        show(f"label map {title}", result["label maps"][title])
    for name, seconds in scoring(SCORING, args.device, rounds).items():
        title = f"{name}, {text(map(str, SCORING))}"
        result["scoring"][title] = seconds
        show(f"scoring {title}", seconds)
    shape = QUICK_FIT if args.quick else FIT
    result["fit"][text(map(str, shape))] = fitting(shape, rounds)
    show(f"fit {text(map(str, shape))}", result["fit"][text(map(str, shape))])
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
