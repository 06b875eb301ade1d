"""Plots as inline SVG: score histograms that share one axis and one threshold, curves, and rows of dots.

Colours are CSS variables of the page (--good, --bad, --line) and currentColor, so that light and dark both work. Good
is drawn above the axis and defective below it: the two are told apart without colour, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from unispect.metrics import ranking

WIDTH, HEIGHT = 340, 150  # of a histogram, SVG units
LEFT, RIGHT, TOP, BOTTOM = 10, 330, 18, 124  # the plotting area within
BINS = 48
ROC_SIDE = 300
PAD, SIDE = 34, ROC_SIDE - 50  # of a square plot
ROW = 30  # height of a product in `ridges`


@dataclass(frozen=True, slots=True)
class Axis:
    """The scores that all histograms of a page show, and the one threshold. Scores beyond share the last bar."""

    low: float
    high: float
    threshold: float
    cut: bool

    def x(self, score: float) -> float:
        """Horizontal place of a score, SVG units."""
        share = (min(max(score, self.low), self.high) - self.low) / (self.high - self.low)
        return LEFT + share * (RIGHT - LEFT)


def axis(scores: np.ndarray, threshold: float) -> Axis:
    """An axis from the lowest score to the highest, cut where far defects would squeeze the rest into one bar."""
    low, high = min(float(scores.min()), threshold), max(float(scores.max()), threshold)
    reach = threshold + 3.0 * (threshold - low)
    cut = low < threshold and reach < high
    high = reach if cut else high
    return Axis(low, high if high > low else low + 1.0, threshold, cut)


def histogram(name: str, good: np.ndarray, defective: np.ndarray, shared: Axis) -> Markup:
    """Scores of one product: good ones upwards, defective ones downwards, each side counting images."""
    edges = np.linspace(shared.low, shared.high, BINS + 1)
    up, down = (np.histogram(np.clip(part, shared.low, shared.high), edges)[0] for part in (good, defective))
    tallest = max(int(up.max()), int(down.max()), 1)
    middle, half = (TOP + BOTTOM) / 2, (BOTTOM - TOP) / 2
    bars = _bars(up, middle, -half / tallest, "good") + _bars(down, middle, half / tallest, "bad")
    told = (
        f"Scores of {name}: {len(good)} good, {int(np.sum(good > shared.threshold))} of them above the threshold "
        f"{shared.threshold:.3g}; {len(defective)} defective, "
        f"{int(np.sum(defective > shared.threshold))} of them above it."
    )
    return _svg(WIDTH, HEIGHT, told, bars + _frame(shared, middle))


def roc_curve(scores: np.ndarray, labels: np.ndarray, threshold: float) -> Markup | None:
    """ROC curve of all images with the working point of the threshold; None when a class is missing."""
    x, y = ranking.roc(scores, labels)
    if not len(x):
        return None
    label = np.asarray(labels, dtype=bool)
    alarms, found = float(np.mean(scores[~label] > threshold)), float(np.mean(scores[label] > threshold))
    told = f"ROC curve of all images; at the threshold {alarms:.1%} false alarms and {found:.1%} detected."
    return _square(told, "false alarms", "detected", 1.0, 1.0, _line(x, y) + _dot(alarms, found) + _diagonal())


def pro_curve(x: np.ndarray, y: np.ndarray) -> Markup:
    """Per-region overlap (k,) against the false positive rate (k,) of pixels, up to the last rate."""
    limit = float(x[-1])
    told = f"Per-region overlap: {float(y[-1]):.1%} of the average defect found at {limit:.0%} false positive pixels."
    return _square(told, "false positive pixels", "overlap", limit, 1.0, _line(x / limit, y))


def calibration_curve(points: Sequence[tuple[float, float]], promised: float, realised: float) -> Markup:
    """Realised against promised false-alarm rates; the dot is the model's own promise. Above the diagonal is too many."""
    most = max(promised, realised, *(value for point in points for value in point))
    steps = sorted(points)
    x, y = (np.array([point[axis] for point in steps]) / most for axis in (0, 1))
    told = f"Promised {promised:.1%}, realised {realised:.1%}; " + ", ".join(f"{a:.1%}: {b:.1%}" for a, b in steps)
    body = _diagonal() + _line(x, y) + _dot(promised / most, realised / most)
    return _square(told, "promised false alarms", "realised", most, most, body)


def ridges(told: str, rows: Sequence[tuple[str, np.ndarray, np.ndarray]], threshold: float | None) -> Markup:
    """Scores of several products on one axis, a row each: good images upwards, defective ones downwards.

    rows   name, scores of good images, scores of defective ones
    """
    every = np.concatenate([part for _, good, defective in rows for part in (good, defective)])
    low, high = (float(edge) for edge in np.quantile(every, [0.0, 0.98]))
    if threshold is not None:
        low, high = min(low, threshold), max(high, threshold)
    high = high if high > low else low + 1.0
    edges, height = np.linspace(low, high, BINS + 1), TOP + ROW * len(rows) + 18
    body = Markup("")
    for number, (name, good, defective) in enumerate(rows):
        middle = TOP + ROW * number + ROW * 0.6
        up, down = (np.histogram(np.clip(part, low, high), edges)[0] for part in (good, defective))
        body += _bars(up, middle, -ROW * 0.55 / max(1, int(up.max())), "good")
        body += _bars(down, middle, ROW * 0.35 / max(1, int(down.max())), "bad")
        body += Markup('<line x1="{}" y1="{y:.1f}" x2="{}" y2="{y:.1f}" class="base"/>').format(LEFT, RIGHT, y=middle)
        body += Markup('<text x="{}" y="{:.1f}" text-anchor="end" class="name">{}</text>').format(
            RIGHT, middle - 3, name if len(name) < 26 else name[:24] + "…"
        )
    if threshold is not None:
        x = LEFT + (threshold - low) / (high - low) * (RIGHT - LEFT)
        body += Markup('<line x1="{x:.1f}" y1="{}" x2="{x:.1f}" y2="{}" class="threshold"/>').format(TOP, height - 18, x=x)
    body += Markup('<text x="{}" y="{}">{:.3g}</text><text x="{}" y="{}" text-anchor="end">{:.3g} and more</text>').format(
        LEFT, height - 4, low, RIGHT, height - 4, high
    )
    return _svg(WIDTH, height, told, body)


def dots(told: str, rows: Sequence[tuple[str, Sequence[float]]], low: float) -> Markup:
    """Values of 0..1 as dots, a row each, from `low` to 1; the bar ends at their mean."""
    height, left = TOP + 20 * len(rows) + 18, 120
    body = Markup("")
    for number, (name, values) in enumerate(rows):
        y = TOP + 20 * number + 10
        at = [left + (max(value, low) - low) / (1 - low) * (RIGHT - left) for value in values]
        body += Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(left - 8, y + 4, name[:18])
        body += Markup('<line x1="{}" y1="{y}" x2="{}" y2="{y}" class="frame"/>').format(left, RIGHT, y=y)
        body += Markup("").join(Markup('<circle cx="{:.1f}" cy="{}" r="4" class="good"/>').format(x, y) for x in at)
    body += Markup('<text x="{}" y="{y}">{:.2f}</text><text x="{}" y="{y}" text-anchor="end">1</text>').format(
        left, low, RIGHT, y=height - 4
    )
    return _svg(WIDTH, height, told, body)


def course(told: str, steps: Sequence[int], values: Sequence[float]) -> Markup:
    """A value over steps, from its lowest to its highest."""
    low, high = min(values), max(values)
    height, span = max(high - low, 1e-12), max(steps[-1] - steps[0], 1)
    x = [52 + (step - steps[0]) / span * (RIGHT - 62) for step in steps]
    y = [TOP + (high - value) / height * (BOTTOM - TOP) for value in values]
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    body = Markup('<polyline points="{}" class="curve"/>').format(points)
    body += Markup("").join(
        Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2.5" class="point"/>').format(a, b) for a, b in zip(x, y, strict=True)
    )
    body += Markup(
        '<text x="46" y="{}" text-anchor="end">{:.4g}</text><text x="46" y="{}" text-anchor="end">{:.4g}</text>'
        '<text x="52" y="{under}">step {}</text><text x="{}" y="{under}" text-anchor="end">{}</text>'
    ).format(TOP + 4, high, BOTTOM + 4, low, steps[0], RIGHT - 10, steps[-1], under=HEIGHT - 6)
    ends = ", ".join(f"{step}: {value:.4g}" for step, value in zip(steps, values, strict=True))
    return _svg(WIDTH, HEIGHT, f"{told}: {ends}", body)


def heatmap(told: str, rows: Sequence[str], columns: Sequence[str] | None, values: Sequence[Sequence[float]]) -> Markup:
    """Values >= 0 as shades, the largest darkest; the first column of names is at the left, columns are numbered."""
    most = max((value for row in values for value in row), default=0.0) or 1.0
    wide, left = len(values[0]) if len(values) else 0, 110
    side = max(6.0, min(22.0, (RIGHT - left) / max(wide, 1)))
    body = Markup("")
    for number, (name, row) in enumerate(zip(rows, values, strict=True)):
        y = TOP + side * number
        body += Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(left - 6, y + side * 0.7, name[:16])
        for place, value in enumerate(row):
            body += Markup(
                '<rect x="{:.1f}" y="{:.1f}" width="{s:.1f}" height="{s:.1f}" class="cell" fill-opacity="{:.3f}">'
                "<title>{}, {}: {:.3g}</title></rect>"
            ).format(left + side * place, y, value / most, name, (columns or rows)[place], value, s=side - 1)
    height = int(TOP + side * len(rows) + 22)
    body += Markup('<text x="{}" y="{}">0 to {:.3g}</text>').format(left, height - 6, most)
    return _svg(max(WIDTH, int(left + side * wide + 10)), height, told, body)


def _line(x: np.ndarray, y: np.ndarray) -> Markup:
    """A curve within the unit square."""
    points = " ".join(f"{PAD + SIDE * a:.1f},{10 + SIDE * (1 - b):.1f}" for a, b in zip(x, y, strict=True))
    return Markup('<polyline points="{}" class="curve"/>').format(points)


def _dot(x: float, y: float) -> Markup:
    return Markup('<circle cx="{:.1f}" cy="{:.1f}" r="5" class="point"/>').format(PAD + SIDE * x, 10 + SIDE * (1 - y))


def _diagonal() -> Markup:
    return Markup('<line x1="{}" y1="{}" x2="{}" y2="10" class="guide"/>').format(PAD, 10 + SIDE, PAD + SIDE)


def _square(told: str, across: str, up: str, right: float, top: float, body: Markup) -> Markup:
    """A square frame with its two axes, which start at 0."""
    frame = Markup(
        '<rect x="{pad}" y="10" width="{side}" height="{side}" class="frame"/>'
        '<text x="{middle}" y="{under}" text-anchor="middle">{across}</text>'
        '<text x="{pad}" y="{under}" text-anchor="middle">0</text>'
        '<text x="{far}" y="{under}" text-anchor="middle">{right:.2g}</text>'
        '<text x="22" y="{half}" text-anchor="middle" transform="rotate(-90 22 {half})">{up}</text>'
        '<text x="{beside}" y="18" text-anchor="end">{top:.2g}</text>'
    ).format(
        pad=PAD,
        side=SIDE,
        far=PAD + SIDE,
        middle=PAD + SIDE / 2,
        half=10 + SIDE / 2,
        under=26 + SIDE,
        beside=PAD - 4,
        across=across,
        up=up,
        right=right,
        top=top,
    )
    return _svg(ROC_SIDE, ROC_SIDE - 8, told, frame + body)


def _bars(counts: np.ndarray, base: float, unit: float, kind: str) -> Markup:
    """Bars from the base line; a unit below zero goes upwards."""
    step = (RIGHT - LEFT) / BINS
    bars = [
        Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" class="{}"/>').format(
            LEFT + place * step, min(base, base + unit * count), step - 0.8, abs(unit * count), kind
        )
        for place, count in enumerate(counts.tolist())
        if count
    ]
    return Markup("").join(bars)


def _frame(shared: Axis, middle: float) -> Markup:
    """Base line, threshold and the ends of the axis. The threshold's label stays inside the drawing."""
    x = shared.x(shared.threshold)
    anchor = "start" if x < LEFT + 45 else "end" if x > RIGHT - 45 else "middle"
    return Markup(
        '<line x1="{left}" y1="{middle}" x2="{right}" y2="{middle}" class="base"/>'
        '<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" class="threshold"/>'
        '<text x="{x:.1f}" y="12" text-anchor="{anchor}">threshold {threshold}</text>'
        '<text x="{left}" y="{under}">{low}</text><text x="{right}" y="{under}" text-anchor="end">{high}</text>'
    ).format(
        left=LEFT,
        right=RIGHT,
        top=TOP,
        bottom=BOTTOM,
        middle=middle,
        x=x,
        under=BOTTOM + 16,
        anchor=anchor,
        low=f"{shared.low:.3g}",
        threshold=f"{shared.threshold:.3g}",
        high=f"{shared.high:.3g}{' and more' if shared.cut else ''}",
    )


def _svg(width: int, height: int, told: str, body: Markup) -> Markup:
    """A drawing that scales with its box and says what it shows to those who cannot see it."""
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}"><title>{}</title>{}</svg>').format(
        width, height, escape(told), escape(told), body
    )
