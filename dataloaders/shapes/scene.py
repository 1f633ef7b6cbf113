"""Render one scene: an image, and labels that are uncertain given the image, as real labels are.

The labels are drawn at random, with probabilities that depend on what can be seen:

* where the border of a soft object is (clouds, and a narrow seam around coins and buttons);
* whether a faint object is labeled (sparks, boxes and triangles of low contrast);
* which of two classes an object belongs to (coins are yellow, buttons are blue, and some are in between).

So even the best possible network is uncertain. :func:`render` can also return the exact probabilities of the labels,
with which calibration can be tested.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

CLASS_NAMES = ("background", "box", "triangle", "coin", "button", "cloud", "spark", "star")
PALETTE = (
    (40, 40, 48),
    (214, 96, 77),
    (90, 174, 97),
    (244, 200, 60),
    (67, 120, 200),
    (210, 230, 245),
    (255, 120, 220),
    (150, 80, 190),
)
CLASS_COUNT = len(CLASS_NAMES)
BACKGROUND, BOX, TRIANGLE, COIN, BUTTON, CLOUD, SPARK, STAR = range(8)
IGNORED = 255
SPLITS = ("train", "val", "test")
SMALLEST = 32  # pixels: side of the smallest scene

_UNIT = 128.0  # lengths below are for scenes of this side
_RARE = 0.08  # share of the scenes with a star
_BAND = 1.3  # half width in pixels of the ignored band around objects with hard borders
_SEAM = 1.2  # pixels: how far annotators stray from the border of a coin
_FAINT = 0.4  # contrast at which half of the faint objects are labeled
_FAINT_SLOPE = 0.13
_HUE_DOUBT = 0.25  # hue is -1 (coin) to 1 (button); normal annotators' error in it
_STRAY = 1.1  # pixels: correlation length (sigma) of where a border is drawn
_COLORS = {  # RGB of the object's body
    BOX: (0.70, 0.30, 0.22),
    TRIANGLE: (0.08, 0.66, 0.20),
    COIN: (0.85, 0.70, 0.18),
    BUTTON: (0.20, 0.40, 0.80),
    CLOUD: (0.90, 0.93, 0.97),
    SPARK: (0.98, 0.60, 0.85),
    STAR: (0.55, 0.22, 0.68),
}


class Scene(NamedTuple):
    """``image`` uint8 ``(H, W, 3)``, ``label`` uint8 ``(H, W)``, and ``probability`` float32 ``(classes, H, W)``: of
    the labels given the image, for pixels that are not ignored (0 where they always are); or None.
    """

    image: np.ndarray
    label: np.ndarray
    probability: np.ndarray | None


def numbered(seed: int, split: str, number: int, height: int, width: int, with_probability: bool = False) -> Scene:
    """Render scene ``number`` of a split: the same one each time."""
    return render(np.random.default_rng([seed, SPLITS.index(split), number]), height, width, with_probability)


class Thing(NamedTuple):
    """One object; ``kind`` is the class of its shape, ``contrast`` is in (0, 1], ``hue`` in [-1, 1]."""

    kind: int
    x: float
    y: float
    radius: float
    angle: float
    aspect: float
    contrast: float
    hue: float
    tint: np.ndarray


def render(rng: np.random.Generator, height: int, width: int, with_probability: bool = False) -> Scene:
    """Render a scene from the generator's numbers; ``with_probability`` changes none of them."""
    canvas = _Canvas(rng, height, width, with_probability)
    for thing in _things(rng, height, width):
        canvas.add(thing)
    return canvas.finish()


def _things(rng: np.random.Generator, height: int, width: int) -> list[Thing]:
    """Draw the objects of the scene at random, from back to front."""
    unit = min(height, width) / _UNIT
    area = height * width / min(height, width) ** 2
    large = rng.choice(
        [BOX, TRIANGLE, COIN, CLOUD], size=round(area * rng.integers(3, 7)), p=[0.20, 0.22, 0.36, 0.22]
    ).tolist()
    sparks = round(area * rng.integers(6, 19)) if rng.random() < 0.7 else 0
    kinds = large + [SPARK] * sparks + [STAR] * (rng.random() < _RARE)
    u = rng.random((len(kinds), 10)).astype(np.float32)
    return [_thing(kind, row, height, width, unit) for kind, row in zip(kinds, u, strict=True)]


def _thing(kind: int, u: np.ndarray, height: int, width: int, unit: float) -> Thing:
    if kind == SPARK:
        # Some are bright; most are dim enough to be left out more often than not.
        radius = 1.6 + 1.6 * u[0]
        contrast = 0.6 + 0.35 * u[2] if u[1] < 0.3 else 0.34 + 0.07 * u[2]
    elif kind == STAR:
        radius, contrast = 7 + 8 * u[0], 0.9
    elif kind == CLOUD:
        radius, contrast = 12 + 14 * u[0], 0.8 + 0.2 * u[1]
    else:
        # Mostly of medium size, sometimes very small; a quarter of boxes and triangles can hardly be seen.
        radius = 6 + 18 * u[0] ** 1.5
        faint = kind in (BOX, TRIANGLE) and u[1] < 0.25
        contrast = 0.25 + 0.3 * u[2] if faint else 0.75 + 0.25 * u[2]
    return Thing(
        kind,
        x=float(u[3] * width),
        y=float(u[4] * height),
        radius=float(radius * unit),
        angle=float(u[5] * 2 * np.pi),
        aspect=float(0.6 + 0.4 * u[6]),
        contrast=float(contrast),
        hue=float(2 * u[9] - 1),
        tint=(u[[7, 8, 6]] - 0.5) * 0.24,
    )


def label_probability(contrast: float) -> float:
    """Return the probability that an object of this contrast is labeled."""
    return float(_normal_cdf(np.float64((contrast - _FAINT) / _FAINT_SLOPE)))


def button_probability(hue: float) -> float:
    """Return the probability that a labeled coin-like object of this hue is a button."""
    return float(_normal_cdf(np.float64(hue / _HUE_DOUBT)))


class _Canvas:
    """The scene while it is painted."""

    def __init__(self, rng: np.random.Generator, height: int, width: int, with_probability: bool) -> None:
        self.rng, self.height, self.width = rng, height, width
        self.image = _background(rng, height, width)
        self.label = np.zeros((height, width), np.uint8)
        self.probability = None
        if with_probability:
            self.probability = np.zeros((CLASS_COUNT, height, width), np.float32)
            self.probability[BACKGROUND] = 1
        self.errors = _border_errors(rng, height, width)

    def add(self, thing: Thing) -> None:
        """Paint an object and its shadow over the scene, and label it as an annotator might."""
        rng = self.rng
        # Each object uses the same number of random numbers.
        u = rng.random(5)
        reach = int(1.5 * thing.radius + 6)
        rows, columns = self._window(thing.x, thing.y, reach)
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return
        y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - np.float32(thing.y)
        x = np.arange(columns.start, columns.stop, dtype=np.float32)[None] - np.float32(thing.x)
        depth = _depth(thing, x, y)
        if thing.kind not in (CLOUD, SPARK):
            self._shadow(rows, columns, depth, thing.contrast)
        self._paint(rows, columns, depth, thing)
        self._annotate(rows, columns, depth, thing, u)

    def _window(self, x: float, y: float, reach: int) -> tuple[slice, slice]:
        return (
            slice(max(0, int(y) - reach), min(self.height, int(y) + reach + 1)),
            slice(max(0, int(x) - reach), min(self.width, int(x) + reach + 1)),
        )

    def _shadow(self, rows: slice, columns: slice, depth: np.ndarray, contrast: float) -> None:
        """Darken what lies to the lower right of the object."""
        shift = 3
        below = slice(rows.start + shift, min(rows.stop + shift, self.height))
        right = slice(columns.start + shift, min(columns.stop + shift, self.width))
        part = depth[: max(0, below.stop - below.start), : max(0, right.stop - right.start)]
        if part.size:
            self.image[below, right] *= (1 - 0.4 * contrast * _ramp(part, 6.0))[:, :, None]

    def _paint(self, rows: slice, columns: slice, depth: np.ndarray, thing: Thing) -> None:
        window = self.image[rows, columns]
        color = _body_color(thing)
        body = 1 + 0.12 * np.sin(depth * np.float32(0.9 + 0.5 * thing.aspect))  # rings of light: a texture
        if thing.kind == CLOUD:
            cover = _ramp(depth, 1.4 * thing.radius)
        else:
            cover = _ramp(depth, 1.5)
            if thing.kind == COIN:  # a glow
                cover = np.maximum(cover, 0.4 * _ramp(2 * depth, 4 * _stray(thing, depth)))
        cover = (cover * np.float32(thing.contrast))[:, :, None]
        window += cover * (body[:, :, None] * color - window)

    def _annotate(self, rows: slice, columns: slice, depth: np.ndarray, thing: Thing, u: np.ndarray) -> None:
        """Write the label that one annotator gives; ``u``: uniform numbers for the decisions."""
        soft = thing.kind in (COIN, CLOUD)
        stray = _stray(thing, depth)
        top, left = (int(v * n) for v, n in zip(u[:2], self._room(depth.shape), strict=True))
        error = self.errors[top : top + depth.shape[0], left : left + depth.shape[1]]
        inside = depth > stray * error if soft else depth > 0
        p_labeled = 1.0 if soft else label_probability(thing.contrast)
        kind = thing.kind
        if kind == COIN and u[3] < button_probability(thing.hue):
            kind = BUTTON
        window = self.label[rows, columns]
        if u[2] < p_labeled:
            window[inside] = kind
        # The band is drawn also if the object is not labeled, so it does not reveal that.
        band = np.abs(depth) < _BAND if thing.kind in (BOX, TRIANGLE, STAR) else None
        if band is not None:
            window[band] = IGNORED
        if self.probability is not None:
            here = p_labeled * (_normal_cdf(depth / stray) if soft else inside)
            _mix(self.probability[:, rows, columns], here, thing, band)

    def _room(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return self.errors.shape[0] - shape[0] + 1, self.errors.shape[1] - shape[1] + 1

    def finish(self) -> Scene:
        """Return the scene as the camera sees it: light, blur, noise."""
        rng = self.rng
        u = rng.random(2)
        image = self.image
        if u[0] < 0.5:
            image = cv2.GaussianBlur(image, (3, 3), 0.4 + 0.5 * u[1])
        noise = rng.standard_normal(image.shape, dtype=np.float32)
        noise *= 4.0
        image = cv2.scaleAdd(image, 255.0, noise)
        if self.probability is not None:
            # Normalize: the probability of "ignored" is left out.
            total = self.probability.sum(0)
            self.probability /= np.where(total > 0, total, 1)
        return Scene(_to_bytes(image), self.label, self.probability)


def _to_bytes(image: np.ndarray) -> np.ndarray:
    return np.clip(image, 0, 255, out=image).astype(np.uint8)


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a float32 texture: patches of color, grain of two sizes, light from one side."""
    size = (width, height)
    color = 0.25 + 0.3 * rng.random(3, dtype=np.float32)
    patches = cv2.resize(rng.random((4, 4, 3), dtype=np.float32) - 0.5, size, interpolation=cv2.INTER_CUBIC)
    grain = cv2.resize(rng.random((14, 14), dtype=np.float32) - 0.5, size, interpolation=cv2.INTER_LINEAR)
    fine = cv2.resize(rng.random((48, 48), dtype=np.float32) - 0.5, size, interpolation=cv2.INTER_LINEAR)
    tilt = rng.random(2, dtype=np.float32) - 0.5
    light = tilt[0] * np.linspace(-0.2, 0.2, height, dtype=np.float32)[:, None]
    light = light + tilt[1] * np.linspace(-0.2, 0.2, width, dtype=np.float32)[None]
    grain = 0.14 * grain + 0.10 * fine + light
    return 0.22 * patches + (grain[:, :, None] + color)


def _border_errors(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a standard normal field that varies over a few pixels."""
    kernel = cv2.getGaussianKernel(9, _STRAY, cv2.CV_32F)
    # The blur mirrors the field at its border, which varies less there, so the border is cut off.
    white = rng.standard_normal((height + 8, width + 8), dtype=np.float32)
    field = cv2.sepFilter2D(white, cv2.CV_32F, kernel, kernel)[4:-4, 4:-4]
    return field / np.float32((kernel**2).sum())


def _body_color(thing: Thing) -> np.ndarray:
    color = np.array(_COLORS[thing.kind], np.float32)
    if thing.kind == COIN:
        share = np.float32((thing.hue + 1) / 2)
        color = (1 - share) * color + share * np.array(_COLORS[BUTTON], np.float32)
        return color + thing.tint * 0.3  # more tint would hide the hue
    return color + thing.tint


def _stray(thing: Thing, depth: np.ndarray) -> np.ndarray:
    """Return how far, in pixels, annotators stray from the border: little inwards, more into the glow around."""
    if thing.kind == CLOUD:
        return np.float32(0.45 * thing.radius)
    return np.where(depth < 0, np.float32(_SEAM + 0.2 * thing.radius), np.float32(_SEAM))


def _depth(thing: Thing, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return how deep each pixel lies inside the object, in pixels; negative outside."""
    cos, sin = np.float32(np.cos(thing.angle)), np.float32(np.sin(thing.angle))
    across, along = cos * x + sin * y, cos * y - sin * x
    radius, aspect = np.float32(thing.radius), np.float32(thing.aspect)
    if thing.kind == BOX:
        return np.minimum(radius - np.abs(across), aspect * radius - np.abs(along))
    if thing.kind == TRIANGLE:
        slope = np.abs(across) * np.float32(0.866) - along * np.float32(0.5)
        return np.minimum(0.6 * radius - slope, 0.6 * radius - along)
    distance = np.sqrt(across * across + along * along)
    if thing.kind == STAR:
        # Five points: the radius swings with the angle.
        return radius * (0.72 + 0.28 * np.cos(5 * np.arctan2(along, across))) - distance
    if thing.kind == CLOUD:
        turn = np.arctan2(along, across)
        return radius * (0.6 + 0.1 * np.cos(3 * turn) + 0.08 * np.sin(2 * turn + thing.tint[0] * 20)) - distance
    return radius - distance


def _mix(probability: np.ndarray, here: np.ndarray, thing: Thing, band: np.ndarray | None) -> None:
    """Update probabilities ``(classes, h, w)``: this object where it is labeled, else what was there before."""
    probability *= 1 - here
    if thing.kind == COIN:
        button = button_probability(thing.hue)
        probability[BUTTON] += here * button
        probability[COIN] += here * (1 - button)
    else:
        probability[thing.kind] += here
    if band is not None:
        probability[:, band] = 0


def _ramp(depth: np.ndarray, width: float | np.ndarray) -> np.ndarray:
    """Return 0 outside to 1 inside, over ``width`` pixels around the border."""
    return np.clip(depth * np.float32(1 / width) + np.float32(0.5), 0, 1)


def _normal_cdf(x: np.ndarray) -> np.ndarray:
    """Return the standard normal distribution function (Abramowitz & Stegun 26.2.17, error < 1e-7)."""
    t = 1 / (1 + 0.2316419 * np.abs(x))
    poly = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    tail = np.exp(-0.5 * x * x) * 0.3989422804014327 * poly
    return np.where(x >= 0, 1 - tail, tail)
