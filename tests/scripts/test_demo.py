"""The demo page without a browser, and the message if gradio is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.small_checkpoint import everything_fitted, photo, write_checkpoint
from utils import demo, errors
from utils.checkpoint import LoadedModel
from utils.predictor import Predictor


@pytest.fixture(scope="module", params=["plain", "fitted"])
def predictor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    fields = everything_fitted() if request.param == "fitted" else {}
    return Predictor(write_checkpoint(tmp_path_factory.mktemp("model") / "best.pth", **fields), mode="single")


@pytest.fixture
def image(tmp_path: Path) -> str:
    Image.fromarray(photo(60, 80)).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def test_one_pass_serves_three_procedures(predictor: Predictor, image: str) -> None:
    seen = demo.compare(predictor, image)
    assert list(seen.labels) == ["T", "max", "rankdice"]
    for name, labels in seen.labels.items():
        alone = Predictor(predictor_model(predictor), predict=name, mode="single")(image)
        np.testing.assert_array_equal(labels, alone.labels)
    np.testing.assert_allclose(seen.scores, alone.scores, atol=1e-6)
    if predictor.options.fit is None:
        assert alone.presence is None
        assert np.isnan(seen.presence).all()
    else:
        np.testing.assert_allclose(seen.presence, alone.presence, atol=1e-6)
    assert seen.pixels["rankdice"] == alone.volumes.tolist()
    assert sum(seen.pixels["max"]) == 60 * 80
    assert [p.shape for p in demo.pictures(seen, predictor.facts, 0.5)] == [(360, 480, 3)] * 3


def test_the_page_says_how_it_decides(predictor: Predictor) -> None:
    said = demo.settings(predictor)
    if predictor.options.fit is None:
        assert said == (
            "Temperature 1. T: probability above 0.5. rankdice: highest Dice. Classes with a mask: probability above "
            "0.5 at some pixel."
        )
    else:
        assert said == (
            "Temperature 1.4 and a bias per class. T: probability above 0.42. rankdice: highest Dice. Classes with a "
            "mask: fitted presence."
        )


def predictor_model(predictor: Predictor) -> LoadedModel:
    return LoadedModel(predictor.network.model, predictor.facts, predictor.config, "softmax", Path(), 0)


def test_one_class(tmp_path: Path, image: str) -> None:
    predictor = Predictor(write_checkpoint(tmp_path / "one.pth", num_classes=1), mode="single")
    seen = demo.compare(predictor, image)
    for name, labels in seen.labels.items():
        assert seen.pixels[name] == [int((labels == 1).sum())]
    assert "dog / cat" in demo.table(seen, predictor.facts)


def test_the_table_names_what_was_found(predictor: Predictor, image: str) -> None:
    seen = demo.compare(predictor, image)
    text = demo.table(seen, predictor.facts)
    for c, name in enumerate(predictor.facts.class_names):
        assert (name in text) == any(pixels[c] for pixels in seen.pixels.values())
    for score, volume in zip(seen.scores, seen.pixels["rankdice"], strict=True):
        assert not volume or f"{score:.3f}" in text


def test_large_pictures_are_shown_smaller(predictor: Predictor, tmp_path: Path) -> None:
    Image.fromarray(photo(40, 3200)).save(tmp_path / "wide.png")
    shown = demo.pictures(demo.compare(predictor, str(tmp_path / "wide.png")), predictor.facts, 1.0)
    assert shown[0].shape == (20, 1600, 3)


def test_images_beyond_memory_are_refused(predictor: Predictor, image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "memory", 100)
    with pytest.raises(errors.UserError, match=r"inference\.py"):
        demo.compare(predictor, image)


def test_without_gradio_one_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["demo", "--model", "best.pth"])
    with pytest.raises(errors.UserError, match="pip install gradio"):
        demo.main()


def test_the_page_is_built_and_answers(predictor: Predictor, image: str) -> None:
    pytest.importorskip("gradio", reason="gradio, an optional extra, is not installed")
    demo.check_gradio()
    page = demo.page(predictor)
    segment, redraw = (function.fn for function in page.fns.values())
    state, *shown, text = segment(image, 0.3)
    assert len(shown) == 3
    assert "<table" in text
    np.testing.assert_array_equal(redraw(state, 0.0)[0][::6, ::6], state.image)
    assert redraw(None, 0.5) == [None] * 3
    assert segment(None, 0.5)[1:4] == (None, None, None)
