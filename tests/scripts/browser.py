"""A headless Chromium for tests of pages as readers see them; these tests are skipped if it is not installed."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

WIDTHS = (390, 1200)  # a telephone, a desk
SCHEMES = ("light", "dark")

# All visible texts, their colors, and the first opaque color behind each.
_TEXTS = """
const behind = element => {
  for (let e = element; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor;
    if (c !== 'rgba(0, 0, 0, 0)' && c !== 'transparent') return c;
  }
  return 'rgb(255, 255, 255)';
};
const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const e = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
  if (!text || !e.getClientRects().length) continue;
  const style = getComputedStyle(e);
  const color = e.ownerSVGElement ? style.fill : style.color;
  const m = e.ownerSVGElement && e.getScreenCTM(), scale = m ? Math.hypot(m.a, m.b) : 1;
  found.push([text, color, behind(e), parseFloat(style.fontSize) * scale]);
}
return found;
"""


def start() -> Any:
    """Return a driver of a headless browser that logs the page's console and requests."""
    pytest.importorskip("selenium", reason="selenium, which drives the browser, is not installed")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("chromium and chromedriver, which show the pages, are not both installed")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    # In containers no user may create a sandbox, and /dev/shm is small; the pages are the project's own.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"):
        options.add_argument(argument)
    return webdriver.Chrome(options=options, service=Service(driver))


def look(driver: Any, width: int, scheme: str = "light") -> None:
    """Show the page on a screen of that width, in the light or dark color scheme."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def requests(driver: Any) -> set[str]:
    """Return the addresses requested since the last call, without those inside the page (data:)."""
    messages = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    urls = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    return {url for url in urls if not url.startswith("data:")}


def errors(driver: Any) -> list[str]:
    """Return the page's console errors since the last call."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


def overflow(driver: Any) -> int:
    """Return how many pixels the page is wider than the screen."""
    return driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")


def texts(driver: Any) -> list[tuple[str, float, float]]:
    """Return the texts of the page, with their contrast to the background and their size in pixels."""
    return [(text, contrast(rgb(color), rgb(back)), size) for text, color, back, size in driver.execute_script(_TEXTS)]


def rgb(color: str) -> tuple[float, float, float]:
    """Return the channels of a computed, opaque color, ``rgb(1, 2, 3)``."""
    assert color.startswith("rgb("), color
    red, green, blue = (float(c) for c in color[4:-1].split(","))
    return red, green, blue


def contrast(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    """Return the contrast ratio of two colors, 1 to 21 (WCAG 2.2; 4.5 is asked of text, 3 of lines)."""
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


def _luminance(color: tuple[float, float, float]) -> float:
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in color))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
