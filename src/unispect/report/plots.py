"""Plots as inline SVG: score histograms that share one axis and one threshold, and the ROC curve.

Colours are CSS variables of the page (--good, --bad, --line) and currentColor, so that light and dark both work. Good
is drawn above the axis and defective below it: the two are told apart without colour, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from unispect.metrics import ranking

WIDTH, HEIGHT = 340, 150  # of a histogram, SVG units
LEFT, RIGHT, TOP, BOTTOM = 10, 330, 18, 124  # the plotting area within
BINS = 48
ROC_SIDE = 300


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
    label, side, pad = np.asarray(labels, dtype=bool), ROC_SIDE - 44, 34
    points = " ".join(f"{pad + side * a:.1f},{10 + side * (1 - b):.1f}" for a, b in zip(x, y, strict=True))
    alarms, found = float(np.mean(scores[~label] > threshold)), float(np.mean(scores[label] > threshold))
    body = Markup(
        '<rect x="{pad}" y="10" width="{side}" height="{side}" class="frame"/>'
        '<line x1="{pad}" y1="{end}" x2="{far}" y2="10" class="guide"/>'
        '<polyline points="{points}" class="curve"/>'
        '<circle cx="{cx:.1f}" cy="{cy:.1f}" r="5" class="point"/>'
        '<text x="{middle}" y="{under}" text-anchor="middle">false alarms</text>'
        '<text x="{pad}" y="{under}" text-anchor="middle">0</text>'
        '<text x="{far}" y="{under}" text-anchor="middle">1</text>'
        '<text x="22" y="{half}" text-anchor="middle" transform="rotate(-90 22 {half})">detected</text>'
        '<text x="26" y="18" text-anchor="end">1</text>'
    ).format(
        pad=pad,
        side=side,
        end=10 + side,
        far=pad + side,
        points=points,
        cx=pad + side * alarms,
        cy=10 + side * (1 - found),
        middle=pad + side / 2,
        half=10 + side / 2,
        under=26 + side,
    )
    told = f"ROC curve of all images; at the threshold {alarms:.1%} false alarms and {found:.1%} detected."
    return _svg(ROC_SIDE, ROC_SIDE - 8, told, body)


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
