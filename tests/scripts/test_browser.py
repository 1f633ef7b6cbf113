"""The report and the demo page in a real browser: phone and desktop, light and dark, without a network."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.evaluation.test_evaluation import data
from tests.report.test_report import config
from tests.scripts import browser
from tests.small_checkpoint import photo, write_checkpoint
from utils import report
from utils.checkpoint import LoadedModel
from utils.evaluation import Evaluator, Part, all_decisions, evaluate
from utils.evaluation.confusion import Confusion
from utils.evaluation.reliability import Reliability
from utils.facts import Facts
from utils.images import voc_colormap
from utils.predict import PredictOptions
from utils.predict.network import Network
from utils.report.gallery import Gallery
from utils.report.page import page

CLASSES = 12
IMAGES = 2 * 12 * 6  # gains and losses, six pictures each


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    driver = browser.start()
    yield driver
    driver.quit()


# -- the report ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a report with everything it can contain: long names, a full gallery, a long command."""
    names = tuple(f"class number {i} with a long name" for i in range(CLASSES))
    facts = Facts(CLASSES, names, voc_colormap(CLASSES), (0.4,) * 3, (0.2,) * 3, 255)
    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, CLASSES, 5, padding=2)
    for p in net.parameters():
        p.data.mul_(8)
    gallery, reliability = Gallery(facts), Reliability(CLASSES, 255, "softmax")
    confusion = Confusion(CLASSES, 255)

    def look(part: Part) -> None:
        gallery.add(part)
        reliability.add(part)
        confusion.add(part)

    images = data(40, (24, 32), 8)
    for batch in images:
        batch.names[:] = [f"{'deeply_nested_folder/' * 5}{name}" for name in batch.names]
    used = Evaluator(Network(net, facts, "softmax"))
    outcome = evaluate(used, images, all_decisions(PredictOptions(threshold=0.4)), on_part=look)
    outcome.peak_bytes.update(dict.fromkeys(outcome.peak_bytes, 2**40))
    assert len(gallery.gains) == len(gallery.losses) == 12
    settings = config(name="a_run_with_a_name_that_goes_on_and_on", about="about " * 40)
    loaded = LoadedModel(net, facts, settings, "softmax", Path("best.pth"), 7)
    gathered = {"reliability": reliability.compute(), "confusion": confusion.compute()}
    content = report.results(outcome, loaded, None, gathered=gathered)
    command = ["test.py", "-r", "saved/" + "folder/" * 12 + "best_model.pth", "-p", "all"]
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page(content, outcome.metrics, gallery, confusion.compute(), settings, command), encoding="utf-8")
    return path


@pytest.mark.parametrize("scheme", browser.SCHEMES)
@pytest.mark.parametrize("width", browser.WIDTHS)
def test_the_report_can_be_read(driver: Any, report_page: Path, width: int, scheme: str) -> None:
    browser.look(driver, width, scheme)
    driver.get(report_page.as_uri())
    driver.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.overflow(driver) <= 0
    written = browser.texts(driver)
    assert len(written) > 500
    assert not [text for text in written if text[1] < 4.5]
    assert not [text for text in written if text[2] < 8.5]
    assert browser.requests(driver) == {report_page.as_uri()}
    assert not driver.get_log("browser")


def test_the_comparison_is_seen_without_scrolling(driver: Any, report_page: Path) -> None:
    """On a desktop, with all procedures, the tuned threshold and memory."""
    browser.look(driver, 1200)
    driver.get(report_page.as_uri())
    hidden = "return [...document.querySelectorAll('.wide')].slice(0, 2).map(d => d.scrollWidth - d.clientWidth)"
    assert driver.execute_script(hidden) == [0, 0]


@pytest.mark.parametrize("width", browser.WIDTHS)
def test_charts_and_pictures_are_shown(driver: Any, report_page: Path, width: int) -> None:
    browser.look(driver, width)
    driver.get(report_page.as_uri())
    seen = driver.execute_script(
        "return [...document.querySelectorAll('svg, img')].map(e => [e.tagName, e.getBoundingClientRect().width,"
        " e.getBoundingClientRect().height, e.complete === false ? 0 : e.naturalWidth ?? 1])"
    )
    charts, pictures = ([e for e in seen if e[0] == tag] for tag in ("svg", "IMG"))
    assert len(charts) == 5  # intervals, bars, confusion, reliability, expected against measured
    assert all(w > 300 and h > 80 for _, w, h, _ in charts)
    assert len(pictures) == IMAGES
    assert all(w > 90 and h > 60 and stored == 32 for _, w, h, stored in pictures)
    outside = driver.execute_script(
        "return [...document.querySelectorAll('svg text')].filter(t => { const a = t.getBoundingClientRect(),"
        " b = t.ownerSVGElement.getBoundingClientRect(); return a.left < b.left - 1 || a.right > b.right + 1"
        " || a.top < b.top - 2 || a.bottom > b.bottom + 2 }).map(t => t.textContent)"
    )
    assert not outside
    # Visible marks: bars and circles, not only axes.
    marks = driver.execute_script(
        "return [...document.querySelectorAll('svg')].map(s => [...s.querySelectorAll('rect, circle')]"
        ".filter(m => m.getBoundingClientRect().width > 1).length)"
    )
    assert all(count >= 3 for count in marks), marks


@pytest.mark.parametrize("scheme", browser.SCHEMES)
def test_lines_and_marks_of_charts_stand_out(driver: Any, report_page: Path, scheme: str) -> None:
    browser.look(driver, 1200, scheme)
    driver.get(report_page.as_uri())
    back = browser.rgb(driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert (sum(back) < 120) == (scheme == "dark")
    lines = driver.execute_script(
        "return [...document.querySelectorAll('svg .axis, svg .diagonal')].map(e => getComputedStyle(e).stroke)"
    )
    marks = driver.execute_script(
        "return [...document.querySelectorAll('svg rect, svg circle')].map(e => getComputedStyle(e).fill)"
    )
    assert len(lines) == 3
    assert all(browser.contrast(browser.rgb(line), back) > 3 for line in lines)
    assert all(browser.contrast(browser.rgb(mark), back) > 2 for mark in marks)


# -- the demo --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Iterator[str]:
    """Serve the demo page of a small network with the command; yield its address."""
    pytest.importorskip("gradio", reason="gradio, an optional extra, is not installed")
    folder = tmp_path_factory.mktemp("demo")
    model = write_checkpoint(folder / "best.pth")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"GRADIO_TEMP_DIR": str(folder / "uploads"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "utils.demo", "--model", str(model), "--port", str(port), "--device", "cpu"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(20)


def wait(driver: Any, condition: str, *arguments: Any) -> Any:
    """Return the first truthy value of a JavaScript expression."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, 30, 0.1).until(lambda d: d.execute_script(f"return {condition}", *arguments))


def pictures(driver: Any) -> np.ndarray | None:
    """Return the three pictures as drawn, one pixel of each block of 6 x 6: ``(3, H, W, 3)``; None while they load."""
    shown = driver.execute_script(
        "return [...document.querySelectorAll('[id^=mask-] img')].map(i => { if (!i.complete) return [0, 0, []];"
        " const c = document.createElement('canvas'), x = c.getContext('2d');"
        " [c.width, c.height] = [i.naturalWidth / 6, i.naturalHeight / 6];"
        " x.imageSmoothingEnabled = false; x.drawImage(i, 0, 0, c.width, c.height);"
        " return [c.height, c.width, [...x.getImageData(0, 0, c.width, c.height).data]] })"
    )
    if len(shown) != 3 or not all(h for h, _, _ in shown):
        return None
    return np.array([np.reshape(values, (h, w, 4))[..., :3] for h, w, values in shown], dtype=float)


def drawn(driver: Any, expected: Callable[[np.ndarray], bool]) -> np.ndarray:
    """Return the three pictures once they are as expected."""
    seen = None
    for _ in range(200):
        seen = pictures(driver)
        if seen is not None and expected(seen):
            return seen
        time.sleep(0.1)
    raise AssertionError(f"the pictures are not as expected: {seen}")


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())


@pytest.mark.slow
def test_the_demo_answers(driver: Any, served: str, tmp_path: Path) -> None:
    from selenium.webdriver import ActionChains, Keys

    image = photo(60, 80)
    Image.fromarray(image).save(tmp_path / "a.png")
    browser.requests(driver), browser.errors(driver)  # forget those of other tests
    browser.look(driver, 1200)
    driver.get(served)
    wait(driver, "document.querySelector('#upload input[type=file]') !== null")
    driver.find_element("css selector", "#upload input[type=file]").send_keys(str(tmp_path / "a.png"))

    half = drawn(driver, lambda seen: seen.shape == (3, 60, 80, 3))
    assert all(np.abs(half[i] - half[j]).max() > 30 for i, j in ((0, 1), (0, 2), (1, 2)))  # the procedures differ
    for name in ("T", "max", "rankdice"):
        assert name in driver.find_element("id", f"mask-{name}").text
    wait(driver, "document.querySelector('#found') !== null")
    rows = driver.execute_script(
        "return [...document.querySelectorAll('#found tr')].map(r => [...r.cells].map(c => c.innerText.trim()))"
    )
    assert rows[0] == ["class", "T, %", "max, %", "rankdice, %", "expected Dice"]
    assert [row[0] for row in rows[1:]] == ["background", "dog / cat", "car", "tree"]
    assert all(0 < float(row[4]) <= 1 for row in rows[1:])
    assert sum(float(row[2]) for row in rows[1:]) == pytest.approx(100, abs=0.05)

    # Opacity 0 by mouse: the photograph, three times. One step up by key: almost. Back by the button.
    slider = driver.find_element("css selector", "#opacity input[type=range]")
    ActionChains(driver).drag_and_drop_by_offset(slider, -slider.size["width"] // 2, 0).perform()
    plain = drawn(driver, lambda seen: distance(seen, image) < 8)  # the pictures are compressed with losses
    assert distance(half, plain) > 20
    slider.send_keys(Keys.ARROW_RIGHT)
    drawn(driver, lambda seen: 0 < distance(seen, plain) < 0.3 * distance(half, plain))
    driver.find_element("css selector", "#opacity button").click()
    drawn(driver, lambda seen: distance(seen, half) == 0)

    for width in browser.WIDTHS:
        browser.look(driver, width)
        assert browser.overflow(driver) <= 0
        columns = "const d = document.querySelector('#found').parentElement; return d.scrollWidth - d.clientWidth"
        assert driver.execute_script(columns) <= 0  # the last one, expected Dice, is visible without scrolling
    assert all(url.startswith((served, served.replace("http", "ws"), "blob:")) for url in browser.requests(driver))
    assert not browser.errors(driver)
