"""Evaluation: one forward pass for all procedures, the same scores for any batches, views, limits and costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from utils import evaluation
from utils.batch import Batch
from utils.errors import UserError
from utils.evaluation import Decision, Evaluator, Limited, Part, all_decisions, evaluate, single_decision
from utils.evaluation.cost import Clock, cpu_peak
from utils.facts import Facts
from utils.losses import build
from utils.metrics import Metrics
from utils.predict import PROCEDURES, PredictOptions, label_map, probabilities
from utils.predict.network import Network

FACTS = Facts(3, ("a", "b", "c"), ((0, 0, 0), (255, 0, 0), (0, 255, 0)), (0.4,) * 3, (0.2,) * 3, 255)


class Net(nn.Module):
    """Logits that depend on position and neighbors, so that views of an image differ."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x) * 3


def data(count: int = 7, size: tuple[int, int] = (32, 40), batch: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, *size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (count, *size), generator=generator, dtype=torch.uint8)
    labels[:, :3] = 255
    names = [f"image{i}" for i in range(count)]
    return [Batch(images[i : i + batch], labels[i : i + batch], names[i : i + batch]) for i in range(0, count, batch)]


def evaluator(loss: nn.Module | None = None, **changes: Any) -> Evaluator:
    return Evaluator(Network(Net(), FACTS, "softmax", **changes), loss=loss)


ROWS = ["T", "max", "max_present", "rankdice", "rankdice_paper", "rankdice_map", "rankdice_iou"]


def test_all_decisions() -> None:
    assert list(all_decisions(PredictOptions())) == ROWS
    found = all_decisions(PredictOptions(threshold=0.3, solver="ba", prune=0.4, classes=(1,), presence="rule"))
    assert list(found) == ["T", "T_tuned", *ROWS[1:]]
    assert found["T"].options.threshold == 0.5
    assert found["T_tuned"].options.threshold == 0.3
    assert (found["rankdice"].options.solver, found["rankdice"].options.metric) == ("ba", "dice")
    assert (found["rankdice_iou"].options.solver, found["rankdice_iou"].options.metric) == ("exact", "iou")
    assert not found["max"].options.restricts_max
    assert found["max_present"].options.restricts_max
    assert found["rankdice"].options.chooses_by == "rule"
    assert (found["rankdice_paper"].options.chooses_by, found["rankdice_paper"].options.prune) == ("prune", 0.5)
    assert [d.expects for d in found.values()] == [None, None, None, None, "dice", "dice", None, "iou"]
    assert all(d.options.classes == (1,) for d in found.values())
    # With a config that maximizes IoU, both columns still contain what their names say.
    assert all_decisions(PredictOptions(metric="iou"))["rankdice"].expects == "dice"


def test_a_single_procedure_has_the_name_of_its_row() -> None:
    assert list(single_decision("max", PredictOptions())) == ["max"]
    assert list(single_decision("max", PredictOptions(presence="rule"))) == ["max_present"]
    assert list(single_decision("rankdice", PredictOptions(presence="rule"))) == ["rankdice"]


def test_the_row_of_the_label_map_is_the_label_map() -> None:
    probs = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(3)).mul(3).softmax(1)
    for how in ("auto", "rule", "all"):
        options = PredictOptions(presence=how)
        found = all_decisions(options)["rankdice_map"](probs)
        assert torch.equal(found.labels, label_map("rankdice", probs, options))


def test_one_forward_pass_serves_all_and_each_scores_as_alone() -> None:
    used = evaluator(temperature=1.5, loss=build("CrossEntropyLoss2d"))
    decisions = all_decisions(PredictOptions(threshold=0.4))
    together = evaluate(used, data(), decisions)
    assert used.network.model.calls == 3
    assert together.images == 7
    assert together.sizes == {(32, 40)}
    for name, decision in decisions.items():
        alone = evaluate(used, data(batch=2), {"x": decision})
        a, b = together.metrics[name].compute(), alone.metrics["x"].compute()
        assert a.keys() == b.keys()
        for key in a:
            if "Expected" in key:  # in other batches, sums are rounded differently
                assert a[key] == pytest.approx(b[key], rel=1e-9, nan_ok=True), (name, key)
            else:
                assert str(a[key]) == str(b[key]), (name, key)  # the same bits, nan included
        assert together.loss == pytest.approx(alone.loss, rel=1e-6)


def test_scores_are_those_of_a_plain_loop() -> None:
    used = evaluator()
    metrics, losses, loss = Metrics(3, keep_images=True), [], build("CrossEntropyLoss2d")
    with torch.no_grad():
        for batch in data(batch=1):
            logits = used.network.model((batch.images.float() / 255 - 0.4) / 0.2)
            metrics.update(
                PROCEDURES["T"](probabilities(logits, "softmax"), PredictOptions()), batch.labels, batch.names
            )
            losses.append(float(loss(logits, batch.labels)))
    found = evaluate(replace(used, loss=loss), data(), {"T": Decision("T")})
    assert found.metrics["T"].compute()["Mean_Dice"] == pytest.approx(metrics.compute()["Mean_Dice"], abs=1e-4)
    assert found.loss == pytest.approx(sum(losses) / 7, rel=1e-4)


def test_images_without_a_labeled_pixel_do_not_enter_the_loss() -> None:
    used = evaluator(loss=build("CrossEntropyLoss2d"))
    batches = data()
    expected = evaluate(
        used, [Batch(b.images[1:], b.labels[1:], b.names[1:]) for b in batches[:2]], {"T": Decision("T")}
    )
    for batch in batches[:2]:
        batch.labels[0] = 255
    batches[2].labels[:] = 255
    assert evaluate(used, batches, {"T": Decision("T")}).loss == pytest.approx(expected.loss, rel=1e-6)


def test_images_of_different_sizes_in_a_batch() -> None:
    small, large = data(2, (32, 32), 2)[0], data(1, (40, 64), 1)[0]
    mixed = Batch([*small.images, *large.images], [*small.labels, *large.labels], ["x", "y", "z"])
    found = evaluate(evaluator(), [mixed], {"max": Decision("max")})
    assert found.images == 3
    assert found.sizes == {(32, 32), (40, 64)}


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
@pytest.mark.parametrize("limit", [1, 4, 6, 7, 100])
def test_a_limit_counts_images_for_any_batch_size(batch, limit) -> None:
    used = evaluator()
    found = evaluate(used, Limited(data(batch=batch), images=limit), {"max": Decision("max")})
    names = [row["name"] for row in found.metrics["max"].images]
    assert names == [f"image{i}" for i in range(min(limit, 7))]
    assert used.network.model.calls == -(-min(limit, 7) // batch)


def test_a_limit_of_batches() -> None:
    used = evaluator()
    assert evaluate(used, Limited(data(), batches=2), {"max": Decision("max")}).images == 6
    assert used.network.model.calls == 2


def test_a_limit_is_shared_by_the_processes(monkeypatch) -> None:
    images = 0
    for rank in range(3):
        monkeypatch.setattr("utils.distributed.rank", lambda rank=rank: rank)
        monkeypatch.setattr("utils.distributed.world_size", lambda: 3)
        images += evaluate(evaluator(), Limited(data(), images=5), {"max": Decision("max")}).images
    assert images == 5


def test_observers_see_everything() -> None:
    parts: list[Part] = []
    evaluate(evaluator(), data(), all_decisions(PredictOptions()), on_part=parts.append)
    assert [len(p.target) for p in parts] == [3, 3, 1]
    first = parts[0]
    torch.testing.assert_close(first.logits.softmax(1), first.probs)
    assert list(first.predictions) == list(first.counts) == [*all_decisions(PredictOptions())]
    assert torch.equal(first.counts["T"].target[0], first.counts["max"].target[0])


def test_labels_the_model_has_no_class_for() -> None:
    batches = data()
    batches[1].labels[1, 5, 5] = 9
    with pytest.raises(UserError, match=r"image4: its labels contain \[9\], but the model has the classes 0 to 2"):
        evaluate(evaluator(), batches, {"max": Decision("max")})


def test_memory_is_measured_when_asked_for() -> None:
    decisions = all_decisions(PredictOptions())
    assert set(evaluate(evaluator(), data(), decisions).peak_bytes.values()) == {0}
    found = evaluate(evaluator(), data(), decisions, measure_memory=True).peak_bytes
    assert found["T"] >= 3 * 3 * 32 * 40  # a byte per pixel, class and image of the largest batch
    assert found["max"] >= 3 * 32 * 40 * 8
    assert found["rankdice"] >= found["T"]


def test_the_peak_is_what_lives_at_one_time() -> None:
    def work() -> Tensor:
        first = torch.zeros(1000, dtype=torch.float32)
        del first
        second = torch.zeros(2000, dtype=torch.float32)
        third = torch.zeros(500, dtype=torch.float32)
        return second[:500] + third

    peak = cpu_peak(work)
    assert 4 * 3000 <= peak < 4 * 3300
    with pytest.raises(ZeroDivisionError):
        cpu_peak(lambda: 1 / 0)
    assert 4 * 3000 <= cpu_peak(work) < 4 * 3300  # and the failed call left nothing behind


def test_the_first_lap_warms_up() -> None:
    clock = Clock(torch.device("cpu"), ["x", "y"])
    clock.laps["x"] = [(100.0, 4), (1.0, 4), (1.0, 2)]
    clock.laps["y"] = [(3.0, 4)]
    assert clock.totals() == {"x": (2.0, 6), "y": (3.0, 4)}


@pytest.mark.parametrize("name", PROCEDURES)
def test_probabilities_that_are_not_finite_stop_every_procedure(name) -> None:
    used = evaluator()
    with torch.no_grad():
        used.network.model.conv.bias[1] = torch.inf
    with pytest.raises(UserError, match=r"image0: the network's probabilities are not finite"):
        evaluate(used, data(), {name: Decision(name)})


def test_the_bar_shows_the_scores_so_far(monkeypatch) -> None:
    shown: list[str] = []

    class Bar(list[Batch]):
        def set_postfix_str(self, text: str, refresh: bool = True) -> None:
            shown.append(text)

    monkeypatch.setattr(evaluation, "progress_bar", lambda loader, desc: Bar(loader))
    outcome = evaluate(
        evaluator(build("CrossEntropyLoss2d", 255)), data(), single_decision("max", PredictOptions()), title="TEST"
    )
    scores = next(iter(outcome.metrics.values())).compute()
    assert len(shown) == len(data())
    names = {"Accuracy": "Multiclass_Accuracy", "Mean IoU": "Mean_IoU", "Mean Dice": "Mean_Dice"}
    wanted = " | ".join(f"{short} {scores[name]:.3f}" for short, name in names.items())
    assert shown[-1] == f"Loss {outcome.loss:.3f} | {wanted} |"
