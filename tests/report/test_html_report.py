"""The report page: self-contained, well-formed, escaped, and showing the numbers and images that were scored."""

from __future__ import annotations

import base64
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.evaluation.test_evaluation import data
from tests.report.test_report import config
from utils import report
from utils.batch import Batch
from utils.checkpoint import LoadedModel
from utils.evaluation import Evaluator, Part, all_decisions, evaluate
from utils.evaluation.confusion import Confusion
from utils.evaluation.reliability import Reliability
from utils.facts import Facts
from utils.metrics import Metrics, count
from utils.predict import Prediction, PredictOptions
from utils.predict.network import Network
from utils.report import charts as html_charts
from utils.report.gallery import BOTH_WRONG, MAX_RIGHT, PALEST, RANKDICE_RIGHT, UNASSIGNED, Gallery
from utils.report.page import expected_points, page

FACTS = Facts(3, ("road", "cat & <dog>", "c"), ((0, 0, 0), (255, 0, 0), (0, 255, 0)), (0.4,) * 3, (0.2,) * 3, 255)
VOID = {"meta", "link", "img", "input"}


class Checker(HTMLParser):
    """Follows the tags of a page, and checks that each is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def made() -> tuple[str, Gallery, dict]:
    """Return the page of an evaluation of 40 images, its gallery and its numbers."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 5, padding=2))
    for p in net.parameters():
        p.data.mul_(4)
    used = Evaluator(Network(net, FACTS, "softmax"))
    decisions = all_decisions(PredictOptions(threshold=0.4))
    gallery, reliability, confusion = Gallery(FACTS), Reliability(3, 255, "softmax"), Confusion(3, 255)

    def look(part: Part) -> None:
        gallery.add(part)
        reliability.add(part)
        confusion.add(part)

    outcome = evaluate(used, data(40, (24, 32), 8), decisions, on_part=look)
    settings = config(name="<b>run", about="</pre><script>alert(1)</script>")
    loaded = LoadedModel(net, FACTS, settings, "softmax", Path("best.pth"), 7)
    content = report.results(
        outcome,
        loaded,
        None,
        gathered={"reliability": reliability.compute(), "confusion": confusion.compute()},
    )
    return (
        page(content, outcome.metrics, gallery, confusion.compute(), settings, ["test.py", "-p", "all"]),
        gallery,
        content,
    )


def test_the_page_is_well_formed_and_needs_nothing_else(made) -> None:
    text, _, _ = made
    checker = Checker()
    checker.feed(text.partition("\n")[2])
    checker.close()
    assert checker.open == []
    for tag, attributes in checker.tags:
        assert tag not in ("script", "iframe", "object")
        for key in ("src", "href"):
            assert attributes.get(key, "data:").startswith("data:"), (tag, attributes)
        if tag == "img":
            assert attributes["alt"]
    assert not re.search(r"url\(|@import", text)
    assert set(re.findall(r"https?://[^\"' <)]+", text)) == {"http://www.w3.org/2000/svg"}
    assert '<meta name="viewport" content="width=device-width' in text


def test_names_are_escaped(made) -> None:
    text, _, _ = made
    assert "<b>run" not in text
    assert "&lt;b&gt;run" in text
    assert "<script" not in text
    assert "<dog>" not in text
    assert "cat &amp; &lt;dog&gt;" in text


def test_the_numbers_of_the_results_are_shown(made) -> None:
    text, _, content = made
    for name, scores in content["procedures"].items():
        assert f"<td>{name}</td>" in text
        for key in ("Mean_Dice", "Mean_IoU", "Dataset_mIoU", "Worst_Tenth_Dice"):
            assert f">{scores[key]:.4f}</td>" in text
        for value in scores["Class_Dice"].values():
            assert f">{value:.4f}</td>" in text
    assert content["comparison"]["verdict"].split(":")[0] in text
    assert f"{content['reliability']['ECE']:.4f}" in text
    largest = content["confusion"]["max"][0]
    assert f"{largest['share']:.1%} of {escape(largest['target'])} predicted as" in text
    for word in ("threshold", "whole images", "ignored", "test.py -p all", "&#34;name&#34;", "Python"):
        assert word in text


def test_the_images_with_the_biggest_changes_are_shown(made) -> None:
    text, gallery, _ = made
    assert len(gallery.gains) <= 12
    assert len(gallery.losses) <= 12
    cases = gallery.gains + gallery.losses
    assert cases
    assert [c.gain for c in gallery.gains] == sorted((c.gain for c in gallery.gains), reverse=True)
    assert [c.gain for c in gallery.losses] == sorted(c.gain for c in gallery.losses)
    assert text.count("<img") == 6 * len(cases)
    # Each opens in full size without a script, by a checkbox in a label.
    assert len(re.findall(r'<label><input type="checkbox"\s+aria-label="enlarge"><img', text)) == 6 * len(cases)
    assert re.search(r"input:checked \+ img \{ position: fixed; [^}]*width: 100vw; height: 100vh", text)
    sources = re.findall(r'src="data:image/(jpeg|png);base64,([^"]+)"', text)
    for _, source in sources[:6]:
        picture = cv2.imdecode(np.frombuffer(base64.b64decode(source), np.uint8), cv2.IMREAD_COLOR)
        assert picture.shape == (24, 32, 3)


# -- the gallery -----------------------------------------------------------------------------------------------


def cases(changes: list[float], names: list[str] | None = None) -> Part:
    """Return a part with images of 10 pixels: max is all wrong or all right; rankdice differs in ``changes`` tenths."""
    target = torch.zeros(len(changes), 1, 10, dtype=torch.long)
    base, ranked = [], []
    for change in changes:
        right = 5
        base.append([0] * right + [1] * (10 - right))
        right += round(change * 10)
        ranked.append([0] * right + [1] * (10 - right))
    base, ranked = torch.tensor(base)[:, None], torch.tensor(ranked)[:, None]
    masks = torch.stack([ranked == c for c in range(3)], dim=1)
    predictions = {"T": Prediction(masks=masks), "max": Prediction(labels=base), "rankdice": Prediction(masks=masks)}
    counts = {name: count(p, target, 3, 255) for name, p in predictions.items()}
    probs = masks.float()
    images = torch.zeros(len(changes), 3, 1, 10, dtype=torch.uint8)
    names = names or [f"image{i:03}" for i in range(len(changes))]
    return Part(Batch(images, target, names), probs, probs, target, predictions, counts)


def test_only_the_largest_are_kept_for_any_order_and_processes() -> None:
    changes = [0.1, 0.4, -0.2, 0.0, 0.3, -0.5, 0.2, -0.1, 0.5]
    whole = Gallery(FACTS, kept=2)
    whole.add(cases(changes))
    assert [c.name for c in whole.gains] == ["image008", "image001"]
    assert [c.name for c in whole.losses] == ["image005", "image002"]
    assert len(whole.gains) == len(whole.losses) == 2
    names = [f"image{i:03}" for i in range(9)]
    shares = []
    for members in ((8, 2, 5), (7, 0, 1), (3, 4, 6)):
        shares.append(Gallery(FACTS, kept=2))
        shares[-1].add(cases([changes[i] for i in members], [names[i] for i in members]))
    shares[0].merge(shares[1:])
    assert [(c.name, c.gain) for c in shares[0].gains] == [(c.name, c.gain) for c in whole.gains]
    assert [c.name for c in shares[0].losses] == [c.name for c in whole.losses]


def test_disagreement_says_who_is_right() -> None:
    gallery = Gallery(FACTS)
    image = np.full((1, 5, 3), 100, np.uint8)
    ranked, base = np.array([[0, 0, 1, 2, 1]]), np.array([[0, 1, 0, 1, 2]])
    target = np.array([[0, 0, 0, 0, 255]])
    found = gallery._disagreement(image, ranked, base, target)[0]
    assert found[1].tolist() == list(RANKDICE_RIGHT)
    assert found[2].tolist() == list(MAX_RIGHT)
    assert found[3].tolist() == list(BOTH_WRONG)
    assert found[0].tolist() == found[4].tolist() == [224] * 3  # alike, or ignored


def test_one_class_of_interest_is_drawn_as_inference_writes_it() -> None:
    """Rankdice then has no mask of the background. These pixels are neither errors nor unassigned."""
    facts = Facts(2, ("rest", "vessel"), ((0, 0, 0), (255, 255, 255)), (0.4,) * 3, (0.2,) * 3, 255)
    gallery = Gallery(facts, classes=[1])
    target = torch.tensor([[[0, 0, 0, 1, 1, 255]]])
    base, ranked = torch.tensor([[[0, 0, 1, 1, 0, 0]]]), torch.tensor([[[0, 1, 0, 1, 1, 1]]])
    masks = torch.stack([torch.zeros(1, 1, 6, dtype=torch.bool), ranked == 1], dim=1)
    found = {"T": Prediction(masks=masks), "max": Prediction(labels=base), "rankdice": Prediction(masks=masks)}
    batch = Batch(torch.zeros(1, 3, 1, 6, dtype=torch.uint8), target, ["x"])
    drawn = gallery._draw(Part(batch, masks.float(), masks.float(), target, found, {}), 0)
    assert drawn["rankdice"][0, :, 0].tolist() == [0, 255, 0, 255, 255, 255]
    colors = [tuple(color) for color in drawn["rankdice against max"][0].tolist()]
    pale = (PALEST,) * 3
    assert colors == [pale, MAX_RIGHT, RANKDICE_RIGHT, pale, RANKDICE_RIGHT, pale]
    # With more classes, those of no interest count as no class.
    gallery = Gallery(FACTS, classes=[1])
    found = gallery._disagreement(
        np.zeros((1, 4, 3), np.uint8), np.array([[-1, -1, 1, -1]]), np.array([[0, 2, 2, 1]]), np.array([[0, 2, 1, 1]])
    )[0]
    assert [tuple(color) for color in found.tolist()] == [pale, pale, RANKDICE_RIGHT, MAX_RIGHT]


def contrast(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Return the contrast of two colors as the Web Content Accessibility Guidelines define it."""

    def luminance(color: tuple[int, ...]) -> float:
        parts = [v / 255 for v in color]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_thin_structures_can_be_seen() -> None:
    """Errors on a very pale and a very dark image, and two classes with similar colors."""
    for color in (RANKDICE_RIGHT, MAX_RIGHT, BOTH_WRONG):
        for gray in (PALEST, 255):
            assert contrast(color, (gray,) * 3) > 3
    for classes, palette in ((2, ((0, 0, 0), (128, 0, 0))), (1, ((128, 0, 0),)), (2, ((255, 255, 255), (255, 255, 0)))):
        names = ("rest", "vessel")[-classes:]
        facts = Facts(classes, names, palette, (0.4,) * 3, (0.2,) * 3, 255)
        shown = Gallery(facts)._colors(np.array([[0, 1]]))[0]
        assert contrast(*map(tuple, shown.tolist())) > 4.5
    kept = ((0, 0, 0), (255, 255, 0))  # already distinct
    facts = Facts(2, ("rest", "vessel"), kept, (0.4,) * 3, (0.2,) * 3, 255)
    assert Gallery(facts)._colors(np.array([[0, 1]]))[0].tolist() == [list(color) for color in kept]


def test_pictures_are_small_and_show_the_scored_masks() -> None:
    gallery = Gallery(FACTS)
    gallery.add(cases([0.3]))
    (case,) = gallery.gains
    assert list(case.pictures) == ["image", "target", "T", "max", "rankdice", "rankdice against max"]
    assert (case.pictures["rankdice"] == (255, 0, 0)).all(-1).sum() == 2
    assert (case.pictures["max"] == (255, 0, 0)).all(-1).sum() == 5
    colors = gallery._colors(np.array([[0, -1, 255, 1]]))[0].tolist()
    assert colors == [[0, 0, 0], list(UNASSIGNED), list(UNASSIGNED), [255, 0, 0]]
    large = Batch(torch.zeros(1, 3, 300, 700, dtype=torch.uint8), torch.zeros(1, 300, 700), ["x"])
    labels = torch.zeros(1, 300, 700, dtype=torch.long)
    masks = torch.zeros(1, 3, 300, 700, dtype=torch.bool)
    found = {"T": Prediction(masks=masks), "max": Prediction(labels=labels), "rankdice": Prediction(masks=masks)}
    drawn = gallery._draw(Part(large, masks.float(), masks.float(), labels, found, {}), 0)
    assert {p.shape for p in drawn.values()} == {(219, 512, 3)}


# -- charts ----------------------------------------------------------------------------------------------------


def test_points_are_those_behind_the_expected_and_measured_means() -> None:
    metrics = Metrics(2, keep_images=True)
    masks = torch.tensor([[[[1, 1]], [[0, 0]]], [[[0, 0]], [[0, 0]]]], dtype=torch.bool)
    scores = torch.tensor([[0.75, 0.0], [0.0, 0.0]])
    target = torch.tensor([[[0, 1]], [[1, 1]]])
    metrics.update(Prediction(masks=masks, scores=scores, volumes=masks.sum((2, 3))), target, ["a", "b"])
    (point,) = expected_points(metrics)
    assert point == ("a", 0.75, pytest.approx(2 / 3))


def test_bars_are_as_long_as_their_values_and_leave_gaps_for_none() -> None:
    svg = html_charts.bars({"T": {"a": 0.5, "b": None}, "max": {"a": 1.0, "b": 0.0}}, ["a", "b"])
    widths = [float(w) for w in re.findall(r'<rect [^>]*width="([\d.]+)"', svg)]
    assert len(widths) == 3
    assert widths[1] == pytest.approx(2 * widths[0])
    assert widths[2] == 0
