"""The fit on validation data keeps what helps on held-out images, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from utils.batch import Batch
from utils.config import resolve
from utils.evaluation import Evaluator, checkpoint_fit, evaluate, fitting, held_out, single_decision
from utils.evaluation.fitting import Fit, fit
from utils.evaluation.held_out import OWN, SCALED, SHIFTED, Calibrations
from utils.evaluation.temperature import Calibration
from utils.facts import Facts
from utils.predict import PredictOptions
from utils.predict.network import Network
from utils.predictor import SCALES
from utils.presence import learning

CLASSES = 4
FACTS = Facts(CLASSES, ("ground", "a", "b", "c"), ((0, 0, 0),) * CLASSES, (0.0,) * 3, (1 / 255,) * 3, 255)


class Noisy(nn.Module):
    """Returns the logits at the index in an image's first channel, ``sure`` times as large as they should be."""

    def __init__(self, table: Tensor, sure: float = 1.0, shift: tuple[float, ...] = (0.0,) * CLASSES) -> None:
        super().__init__()
        self.table, self.sure, self.shift = table, sure, torch.tensor(shift)

    def forward(self, x: Tensor) -> Tensor:
        index = x[:, 0].round().long().clamp(0, len(self.table) - 1)
        return (self.sure * (self.table[index] + self.shift)).permute(0, 3, 1, 2)


class Scenes:
    """A loader of images whose pixels are indices into a table of true logits, with labels drawn from these."""

    def __init__(self, images: int, everywhere: bool = False, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = 2.5 * torch.randn(250, CLASSES, generator=generator)
        self.table[:, 0] += 1.0
        self.images, self.labels = [], []
        for _ in range(images):
            shown = torch.rand(CLASSES, generator=generator) < 0.6
            shown[0] = True
            if everywhere:
                shown[:] = True
            allowed = torch.isin(self.table.argmax(1), shown.nonzero()[:, 0]).nonzero()[:, 0]
            pick = allowed[torch.randint(len(allowed), (144,), generator=generator)]
            label = torch.multinomial(self.table[pick].softmax(1), 1, generator=generator)[:, 0]
            if everywhere:
                label[:CLASSES] = torch.arange(CLASSES)
            elif not shown.all():  # a class that is not shown is absent, although the network gives it some probability
                label[~shown[label]] = 0
            self.images.append(pick.view(1, 12, 12).expand(3, 12, 12).to(torch.uint8))
            self.labels.append(label.view(12, 12).to(torch.uint8))
        self.dataset = range(images)

    def __len__(self) -> int:
        return -(-len(self.images) // 8)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, len(self.images), 8):
            part = slice(first, first + 8)
            names = [f"scene{i:03d}" for i in range(len(self.images))][part]
            yield Batch(torch.stack(self.images[part]), torch.stack(self.labels[part]), names)


class Unsure(Scenes):
    """Objects with low probabilities: a large blob usually belongs to a class in the image, a small one does not."""

    def __init__(self, images: int, seed: int = 0) -> None:
        super().__init__(0)
        generator = torch.Generator().manual_seed(seed)
        chances = [[0.97, 0.01, 0.01, 0.01]]
        for high in (0.45, 0.25):
            chances += [[1 - high - 0.02, *(high if k == c else 0.01 for k in (1, 2, 3))] for c in (1, 2, 3)]
        self.table = torch.tensor(chances).log()
        for _ in range(images):
            index, label = torch.zeros(144, dtype=torch.long), torch.zeros(144, dtype=torch.long)
            for c in (1, 2, 3):
                large = bool(torch.rand((), generator=generator) < 0.5)
                blob = slice(40 * c - 30, 40 * c - 30 + (30 if large else 6))
                index[blob] = c if large else c + 3
                if torch.rand((), generator=generator) < (0.9 if large else 0.1):
                    some = torch.rand(144, generator=generator)[blob] < (0.5 if large else 0.25)
                    label[blob] = torch.where(some, c, 0)
            self.images.append(index.view(1, 12, 12).expand(3, 12, 12).to(torch.uint8))
            self.labels.append(label.view(12, 12).to(torch.uint8))
        self.dataset = range(images)


def fitted_on(scenes: Scenes, **network: Any) -> Fit:
    return fit(evaluator(scenes, **network), scenes, PredictOptions())


def evaluator(scenes: Scenes, **network: Any) -> Evaluator:
    return Evaluator(Network(Noisy(scenes.table, **network), FACTS, "softmax"))


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Scenes(60)


def test_an_overconfident_network_gets_its_temperature_back() -> None:
    scenes = Scenes(60, everywhere=True)
    found = fitted_on(scenes, sure=4.0)
    assert found.temperature == pytest.approx(4.0, rel=0.15)
    own, kept = found.figures[OWN], found.figures[found.chosen]
    assert kept["NLL"] < own["NLL"]
    assert kept["rankdice"] > own["rankdice"]
    # every class is in every image
    assert found.presence is None
    assert any("every class is in every validation image" in note.lower() for note in found.notes)


def test_a_wrong_base_rate_gets_a_bias() -> None:
    found = fitted_on(Scenes(60, everywhere=True), shift=(0.0, 2.5, 0.0, -2.5))
    assert found.chosen == SHIFTED
    assert found.calibration.bias is not None
    assert found.calibration.bias[1] < -1.0
    assert found.calibration.bias[3] > 1.0


def test_presence_is_kept_where_it_helps_and_scores_what_was_promised() -> None:
    found = fitted_on(Unsure(60))
    assert found.presence is not None
    figures = found.figures[found.chosen]
    assert figures["presence"] > figures["rankdice"] + 0.1
    # New images reach the scores of the held-out images.
    test, calibration, scores = Unsure(100, seed=1), found.calibration, {}
    used = Evaluator(
        Network(Noisy(test.table), FACTS, "softmax", temperature=calibration.temperature, bias=calibration.bias)
    )
    for name, options in (("before", PredictOptions()), ("after", PredictOptions(fit=found.presence))):
        outcome = evaluate(used, test, single_decision("rankdice", options))
        scores[name] = outcome.metrics["rankdice"].compute()
    assert scores["after"]["Mean_Dice"] > scores["before"]["Mean_Dice"] + 0.1
    assert scores["after"]["Mean_Dice"] == pytest.approx(figures["presence"], abs=0.1)
    assert scores["after"]["Expected_Dice"] == pytest.approx(scores["after"]["Measured_Dice"], abs=0.04)


def test_logits_that_do_not_fit_into_memory_are_made_again(scenes: Scenes, monkeypatch) -> None:
    once = fitted_on(scenes, sure=2.0)
    monkeypatch.setattr(held_out, "KEPT_BYTES", 1000)
    again = fitted_on(scenes, sure=2.0)
    assert again.figures == once.figures
    assert again.fields() == once.fields()


def test_a_fold_is_scored_by_a_fit_that_has_not_seen_it(scenes: Scenes, monkeypatch) -> None:
    seen: list[set[int]] = []
    fit_temperature = held_out.fit_temperature

    def spy(logits: Tensor, target: Tensor, activation: Any, **start: float) -> Any:
        seen.append(set(range(60)) if len(seen) == 0 else {len(target)})
        return fit_temperature(logits, target, activation, **start)

    monkeypatch.setattr(held_out, "fit_temperature", spy)
    calibrations = Calibrations(_sample(scenes), "softmax", Calibration())
    assert len(seen) == 6  # all images, and five times four fifths of them
    assert all(lengths == {144 * 48} for lengths in seen[1:])
    assert [calibrations.fold[name] for name in calibrations.images] == [i // 12 for i in range(60)]
    assert len({calibrations.held_out(name)[1] for name in calibrations.images}) == 5


def test_groups_are_not_divided_among_folds(scenes: Scenes) -> None:
    calibrations = Calibrations(
        _sample(scenes), "softmax", Calibration(), group_of=lambda name: str(int(name[-3:]) % 7)
    )
    assert calibrations.groups == 7
    folds = {str(i): {calibrations.fold[f"scene{k:03d}"] for k in range(i, 60, 7)} for i in range(7)}
    assert all(len(found) == 1 for found in folds.values())
    assert set().union(*folds.values()) == set(range(5))
    assert Calibrations(_sample(scenes), "softmax", Calibration(), group_of=lambda name: "all").folds.tolist() == [
        i // 12 for i in range(60)
    ]


@pytest.mark.parametrize(("repeats", "grouped"), [(6, True), (1, False)])
def test_the_frames_of_a_video_are_one_group_by_their_names(repeats: int, grouped: bool) -> None:
    # Three videos. Only if frames resemble their neighbors, whole videos are held out.
    rows = list(_sample(Scenes(60 // repeats)).rows.values())
    sample = held_out.LogitSample(FACTS, 60)
    for i in range(60):
        sample.rows[f"{'ABC'[i // 20]}1_f{i:05d}"] = rows[i // repeats]
    calibrations = Calibrations(sample, "softmax", Calibration())
    assert calibrations.example == ("A1_f" if grouped else None)
    assert calibrations.folds.tolist() == [i // (20 if grouped else 12) for i in range(60)]
    own = Calibrations(sample, "softmax", Calibration(), group_of=lambda name: name[-1])
    assert len({own.fold[f"A1_f{i:05d}"] for i in (3, 13)}) == 1  # group_by has priority
    assert own.groups == 10


def test_a_single_clip_is_reported() -> None:
    class Clip(Scenes):
        """Each scene is shown eight times, like the frames of a video."""

        def __init__(self) -> None:
            super().__init__(5)
            self.images = [image for image in self.images for _ in range(6)]
            self.labels = [label for label in self.labels for _ in range(6)]
            self.dataset = range(30)
            self.group_of = lambda name: "clip"

    notes = fitted_on(Clip()).notes
    assert any("These 30 images count as" in note for note in notes)
    assert any("belong to one group" in note for note in notes)


def _sample(scenes: Scenes) -> Any:
    sample = held_out.LogitSample(FACTS, 60)
    evaluate(evaluator(scenes), scenes, {}, on_part=sample.add)
    return sample


def test_nothing_is_kept_that_does_not_help() -> None:
    # The labels are the argmax, so the network cannot be overconfident, and neither presence nor a threshold helps.
    scenes = Scenes(60)
    scenes.labels = [scenes.table[image[0].long()].argmax(-1).to(torch.uint8) for image in scenes.images]
    found = fitted_on(scenes, sure=30.0)
    assert found.chosen == OWN
    assert found.presence is None
    assert found.threshold == 0.5
    assert not found.changes(resolve(CONFIG).predict)
    assert any("Presence: not kept" in note for note in found.notes)


def test_links_are_judged_by_likelihood_and_must_not_lower_dice() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 0.01 * torch.randn(50, generator=generator, dtype=torch.float64)

    def trial(nll: float, dice: float) -> Any:
        # Images differ a lot, but all calibrations are compared on the same images.
        common = torch.linspace(0, 1, 50, dtype=torch.float64)
        return SimpleNamespace(
            nll=nll + common + noise, scores=lambda procedure: dice + common - noise.flip(0), worth=50
        )

    own = trial(0.3, 0.6)
    assert fitting._best_calibration({OWN: own, SCALED: trial(0.25, 0.6)}, "max") == SCALED
    assert fitting._best_calibration({OWN: own, SCALED: trial(0.25, 0.5)}, "max") == OWN  # mDice is lower
    assert fitting._best_calibration({OWN: own, SCALED: trial(0.35, 0.7)}, "max") == OWN  # less likely
    trials = {OWN: own, SCALED: trial(0.31, 0.6), SHIFTED: trial(0.28, 0.6)}
    assert fitting._best_calibration(trials, "max") == SHIFTED  # although the temperature alone does not help
    trials = {OWN: own, SCALED: trial(0.28, 0.6), SHIFTED: trial(0.28, 0.7)}
    assert fitting._best_calibration(trials, "max") == SCALED  # the simpler one


def test_few_images_are_reported() -> None:
    found = fitted_on(Scenes(12))
    assert any("12 validation images are few" in note for note in found.notes)


def test_the_view_that_scores_clearly_higher_is_chosen(scenes: Scenes, monkeypatch) -> None:
    found = fitted_on(scenes)
    assert found.mode == "single"  # indices into a table cannot be interpolated
    assert not any("count as" in note or "group" in note for note in found.notes)  # and these are not one clip
    monkeypatch.setattr(fitting, "SCALES", (1.0,))
    assert fitted_on(scenes).mode == "single"  # no gain

    def better(self: Network, images: Tensor) -> Tensor:
        if tuple(self.scales) != (1.0,):  # the mean over views of a network that knows the labels
            label = torch.stack(
                [scenes.labels[next(k for k, x in enumerate(scenes.images) if x.equal(i))] for i in images]
            )
            return nn.functional.one_hot(label.long(), CLASSES).permute(0, 3, 1, 2).float()
        return Network.forward(self, images)[1]

    monkeypatch.setattr(fitting, "SCALES", SCALES)
    monkeypatch.setattr(Network, "probabilities", better)
    assert fitted_on(scenes).mode == "multiscale"


def test_images_that_resemble_their_neighbors_count_less_for_the_mode(monkeypatch) -> None:
    scenes = Scenes(20)
    pairs = zip(scenes.images, scenes.labels, strict=True)
    seen: Any = SimpleNamespace(tried=[(str(i), image / 255, label) for i, (image, label) in enumerate(pairs)])
    found: Any = SimpleNamespace(calibration=Calibration(1.0, None), threshold=0.5, presence=None, notes=("before",))
    # A fifth of the images gains: clear with 20 independent images, but not with 16. Below 15 it is not tried.
    for worth, mode in ((400.0, "multiscale"), (20.0, "multiscale"), (16.0, "single"), (14.9, None)):
        scores = [dice for gain in [0.1, 0.0, 0.0, 0.0, 0.0] * 4 for dice in (0.5, 0.5 + gain)]
        monkeypatch.setattr(fitting, "_mean_dice", lambda *_, scores=scores: scores.pop(0))
        changed = fitting._mode(seen, evaluator(scenes), found, PredictOptions(), "max", worth)
        assert changed.get("mode") == mode, worth
        assert changed["notes"][1].startswith(f"Mode: {mode or 'not tried. This needs 15 independent images.'}")


CONFIG: dict[str, Any] = {
    "name": "x",
    "arch": {"type": "UNet"},
    "train_loader": {"type": "Shapes"},
    "val_loader": {"type": "Shapes", "args": {"split": "val"}},
}


def test_a_fit_goes_into_a_checkpoint_and_out_of_it_again(scenes: Scenes) -> None:
    found, config = fitted_on(scenes, sure=3.0), resolve(CONFIG)
    state = {"epoch": 3, "config": config.model_dump(), "optimizer": {}}
    state["config"]["predict"]["threshold"] = 0.4
    changed = checkpoint_fit.with_fit(state, config, found)
    assert changed["config"]["predict"] == state["config"]["predict"] | found.fields()
    assert changed["optimizer"] == {}
    assert "optimizer" not in checkpoint_fit.for_use(changed)
    assert checkpoint_fit.without_fit(changed) == state
    assert checkpoint_fit.without_fit(state) == state
    # A second fit replaces the first one, and still records the values from before the first.
    assert checkpoint_fit.without_fit(checkpoint_fit.with_fit(changed, config, found)) == state
    now = resolve(CONFIG | {"predict": changed["config"]["predict"]})
    assert " fitted on 60 validation images (Shapes val)" in str(checkpoint_fit.note(changed, now))
    other = resolve(CONFIG | {"predict": changed["config"]["predict"] | {"threshold": 0.1}})
    assert "threshold are overridden" in str(checkpoint_fit.note(changed, other))
    assert checkpoint_fit.note(state, config) is None
    assert PredictOptions.from_config(now.predict).chooses_by == ("fitted" if found.presence else "prune")
    assert learning.FEW_IMAGES <= 60


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ({}, "nothing: a fit on 7 validation images (Shapes val) kept no value, so temperature, "),
        ({"threshold": 0.19}, "threshold 0.19 was fitted on 7 validation images (Shapes val)"),
        ({"temperature": 1.3, "mode": "multiscale"}, "temperature 1.3000, mode multiscale were fitted on 7 "),
        ({"bias": [0.1, 0.2], "presence_fit": {"classes": [0]}}, "a bias per class, presence were fitted on 7 "),
    ],
)
def test_only_what_was_kept_is_called_fitted(kept, said) -> None:
    before = {"temperature": 2.0, "threshold": 0.4}
    base = {"temperature": 2.0, "bias": None, "threshold": 0.4, "presence_fit": None, "mode": "single"}
    found = base | kept
    record = {"images": 7, "data": "Shapes val", "replaced": before, "found": found}
    config = resolve(CONFIG)
    config.predict = config.predict.model_copy(update=found)
    assert str(checkpoint_fit.note({"calibration": record}, config)).startswith(said)
