"""Make the pictures of the README and the docs from a trained checkpoint.

``python -m benchmarks.figures --checkpoint saved/UNet_Shapes/.../best_model.pth [--tensorboard saved]``

* ``docs/images/gain.png``: image, target, and the label maps of argmax and RankDice of test images;
* with ``--tensorboard``: ``tensorboard-scalars.png`` and ``tensorboard-images.png``, screenshots of a headless Chromium
  (needs the packages selenium, chromium and chromium-driver).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

import dataloaders
from utils import checkpoint
from utils.config import building
from utils.evaluation import Evaluator, Part, all_decisions, evaluate
from utils.images.palette import displayable, grid
from utils.predict import PredictOptions

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
ROWS = 3
CELL = 216
PORT = 6017
VIEWS = {
    "tensorboard-scalars": "?tagFilter=train%2Floss%7Cval%2FMean%7Cval%2FDataset%7Clr%2F#timeseries",
    "tensorboard-images": "#images",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description="Make the figures of the docs.")
    parser.add_argument("--checkpoint", required=True, help="a trained model; its test loader is used")
    parser.add_argument("--tensorboard", metavar="LOGDIR", help="also take a screenshot of TensorBoard for this folder")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    IMAGES.mkdir(parents=True, exist_ok=True)
    gain(args.checkpoint)
    if args.tensorboard:
        photograph(args.tensorboard)


def gain(path: str) -> None:
    """Draw label maps of argmax and RankDice for test images with the median gain: what inference.py writes."""
    loaded = checkpoint.load_model(path)
    loader = building.build_loader(dataloaders.build, loaded.config, "test")
    chosen = all_decisions(PredictOptions.from_config(loaded.config.predict))
    decisions = {name: chosen[name] for name in ("max", "rankdice_map")}
    maps: dict[str, list[Any]] = {}  # per image: the image, the target, and the two label maps

    def keep(part: Part) -> None:
        for i, name in enumerate(part.batch.names):
            found = [part.predictions[decision].labels for decision in decisions]
            labels = [part.target[i], *(one[i] for one in found if one is not None)]
            image = displayable(part.batch.images[i].permute(1, 2, 0).numpy())
            maps[name] = [image, *(colors[np.minimum(one.numpy(), len(colors) - 1)] for one in labels)]

    pale = np.array([[235, 235, 235]], np.uint8)  # ignored pixels
    colors = np.concatenate([np.array(loaded.facts.palette, np.uint8), pale])
    outcome = evaluate(Evaluator(loaded.network()), loader, decisions, on_part=keep)
    names, ranked, _ = outcome.metrics["rankdice_map"].rows()
    means = [scores.dice.nanmean(dim=1).numpy() for scores in (outcome.metrics["max"].rows()[1], ranked)]
    difference = means[1] - means[0]
    order = np.argsort(difference)
    typical = [i for i in order if difference[i] >= np.median(difference)][:ROWS]
    pictures = []
    for index in typical:
        titles = (
            "image",
            "target",
            *(f"{n}, Dice {m[index]:.2f}" for n, m in zip(("argmax", "RankDice"), means, strict=True)),
        )
        for title, cell in zip(titles, maps[names[index]], strict=True):
            big = cv2.resize(cell, (CELL, CELL), interpolation=cv2.INTER_NEAREST)
            strip = np.full((22, CELL, 3), 255, np.uint8)
            cv2.putText(strip, title, (4, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (30, 30, 30), 1, cv2.LINE_AA)
            pictures.append(np.concatenate([strip, big]))
    cv2.imwrite(str(IMAGES / "gain.png"), grid(pictures, columns=4)[:, :, ::-1])


def photograph(logdir: str) -> None:
    """Take screenshots of TensorBoard."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", logdir, "--port", str(PORT)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with tempfile.TemporaryDirectory() as profile:
            options = Options()
            flags = ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking")
            for flag in (*flags, "disable-sync", "window-size=1300,900", f"user-data-dir={profile}"):
                options.add_argument(f"--{flag}")
            # The driver of the system: selenium would look for one on the network.
            browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
            time.sleep(12)  # the server reads its logs
            for name, view in VIEWS.items():
                browser.get("about:blank")
                browser.get(f"http://localhost:{PORT}/{view}")
                time.sleep(10)
                browser.save_screenshot(str(IMAGES / f"{name}.png"))
            browser.quit()
    finally:
        server.terminate()


if __name__ == "__main__":
    main()
