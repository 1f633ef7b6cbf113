"""Charts of the test report, as SVG text: no library, no script; colors follow the page's light or dark scheme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

# Okabe & Ito's colors, which color-blind readers can tell apart.
COLORS = {
    "T": "#e69f00",
    "T_tuned": "#cc79a7",
    "max": "#0072b2",
    "max_present": "#332288",
    "rankdice": "#009e73",
    "rankdice_paper": "#d55e00",
    "rankdice_map": "#999933",
    "rankdice_iou": "#56b4e9",
}
SIDE = 300  # of the unit square


def _svg(width: float, height: float, title: str, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg" style="max-width:{width * 1.6:g}px">'
        f"<title>{escape(title)}</title>{''.join(body)}</svg>"
    )


def _text(x: float, y: float, content: str, anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{escape(content)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str = "grid") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def bars(values: Mapping[str, Mapping[str, float | None]], classes: Sequence[str]) -> str:
    """Return one bar per class and procedure, of values in [0, 1]; None is left empty."""
    names, left, right, thick = list(values), 108, 32, 11  # the values beside the bars are 9 high
    row = thick * len(names) + 8
    width, height = 380, row * len(classes) + 22
    scale = width - left - right
    body = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x = left + tick * scale
        body += [_line(x, 0, x, height - 18), _text(x, height - 6, f"{tick:g}", "middle", 'class="small"')]
    for i, cls in enumerate(classes):
        top = i * row + 3
        short = cls if len(cls) <= 16 else cls[:15] + "…"
        body.append(_text(left - 5, top + row / 2, short, "end", 'class="small" dominant-baseline="middle"'))
        for j, name in enumerate(names):
            value, y = values[name][cls], top + j * thick
            if value is None:
                body.append(_text(left + 2, y + thick - 1, "–", extra='class="small"'))
                continue
            body.append(
                f'<rect x="{left}" y="{y:.1f}" width="{value * scale:.1f}" height="{thick - 1}" '
                f'fill="{COLORS[name]}"><title>{escape(cls)}, {escape(name)}: {value:.4f}</title></rect>'
            )
            body.append(_text(left + value * scale + 3, y + thick - 2, f"{value:.2f}", extra='class="tiny"'))
    return _svg(width, height, "Dice per class and procedure", body)


def _square(x_title: str, y_title: str) -> tuple[list[str], float, float]:
    """Return the axes of a unit square with its diagonal, and the offsets of its origin."""
    left, top, side = 42, 8, SIDE
    bottom = top + side
    body = [_line(left, bottom, left + side, top, "diagonal")]
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1):
        x, y = left + tick * side, bottom - tick * side
        body += [_line(x, top, x, bottom), _line(left, y, left + side, y)]
        body += [
            _text(x, bottom + 14, f"{tick:g}", "middle", 'class="small"'),
            _text(left - 5, y + 4, f"{tick:g}", "end", 'class="small"'),
        ]
    middle = top + side / 2
    body += [
        _text(left + side / 2, bottom + 30, x_title, "middle"),
        _text(12, middle, y_title, "middle", f'transform="rotate(-90 12 {middle:g})"'),
    ]
    return body, left, bottom


def reliability(diagrams: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Return reliability diagrams, ``title -> [[mean probability, share true, share of pixels], ...]``."""
    body, left, bottom = _square("predicted probability", "fraction that is correct")
    for (title, bins), color in zip(diagrams.items(), (COLORS["max"], COLORS["T"]), strict=False):
        points = [(left + p * SIDE, bottom - true * SIDE) for p, true, _ in bins]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        body.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        for (x, y), (p, true, share) in zip(points, bins, strict=True):
            radius = 2.5 + 6 * share**0.5
            body.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{color}" fill-opacity="0.6">'
                f"<title>{escape(title)}: probability {p:.3f}, true {true:.3f}, {share:.1%} of them</title></circle>"
            )
    return _svg(left + SIDE + 14, bottom + 38, "Reliability diagram", body)


def scatter(points: Sequence[tuple[str, float, float]], x_title: str, y_title: str, color: str) -> str:
    """Return a point per image: name, x and y in [0, 1], and the diagonal."""
    body, left, bottom = _square(x_title, y_title)
    for name, x, y in points:
        body.append(
            f'<circle cx="{left + x * SIDE:.1f}" cy="{bottom - y * SIDE:.1f}" r="3" fill="{color}" '
            f'fill-opacity="0.55"><title>{escape(name)}: {x:.3f}, {y:.3f}</title></circle>'
        )
    return _svg(left + SIDE + 14, bottom + 38, f"{y_title} against {x_title}", body)


def intervals(rows: Sequence[tuple[str, float, float, float]]) -> str:
    """Return intervals around differences: name, mean, lower and upper end; zero is marked."""
    left = 24 + 7 * max((len(name) for name, *_ in rows), default=0)
    width, row = 380, 24
    height = row * len(rows) + 24
    ends = [abs(v) for _, *values in rows for v in values]
    reach = max([*ends, 1e-3]) * 1.15
    scale = (width - left - 14) / (2 * reach)
    zero = left + reach * scale
    body = [_line(zero, 0, zero, height - 20, "axis"), _text(zero, height - 6, "0", "middle", 'class="small"')]
    for sign in (-1, 1):
        body.append(_text(zero + sign * reach * scale * 0.87, height - 6, f"{sign * reach * 0.87:+.3f}", "middle",
                          'class="small"'))  # fmt: skip
    for i, (name, mean, low, high) in enumerate(rows):
        y = i * row + row / 2
        color = COLORS.get(name, "#888")
        x1, x2 = zero + low * scale, zero + high * scale
        body += [
            _text(left - 5, y + 4, name, "end", 'class="small"'),
            f'<line x1="{x1:.1f}" y1="{y}" x2="{x2:.1f}" y2="{y}" stroke="{color}" stroke-width="3"/>',
            f'<circle cx="{zero + mean * scale:.1f}" cy="{y}" r="5" fill="{color}"/>',
        ]
    return _svg(width, height, "Differences in mDice with their intervals", body)


def heat_map(shares: Sequence[Sequence[float | None]], classes: Sequence[str]) -> str:
    """Return a confusion matrix with rows that sum to 1: targets down, predictions across; None is left empty."""
    cell = 26 if len(classes) <= 24 else max(6, 624 // len(classes))
    label, numbers = 108, cell >= 26
    side = cell * len(classes)
    short = [cls if len(cls) <= 16 else cls[:15] + "…" for cls in classes]
    body = []
    for i, row in enumerate(shares):
        y = label + i * cell
        if numbers:
            middle = y + cell / 2
            body.append(_text(label - 5, middle + 3, short[i], "end", 'class="small"'))
            x = label + i * cell + cell / 2 + 3
            turned = f'class="small" transform="rotate(-90 {x:g} {label - 6})"'
            body.append(_text(x, label - 6, short[i], extra=turned))
        for j, share in enumerate(row):
            if not share:
                continue
            x, title = label + j * cell, f"{escape(classes[i])} predicted as {escape(classes[j])}: {share:.2%}"
            color = COLORS["max"] if i == j else COLORS["rankdice_paper"]
            body.append(
                f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" fill="{color}" '
                f'fill-opacity="{share:.3f}"><title>{title}</title></rect>'
            )
            if numbers and share >= 0.005:
                body.append(_text(x + cell / 2, y + cell / 2 + 3, f"{100 * share:.0f}", "middle", 'class="small"'))
    return _svg(label + side, label + side, "Confusion matrix", body)
