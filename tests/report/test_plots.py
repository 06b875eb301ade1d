"""Drawings are well-formed SVG and show every image once."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from unispect.report import plots


def heights(svg: str, kind: str) -> float:
    """Summed height of the bars of one kind."""
    return sum(float(bar.get("height", 0)) for bar in ElementTree.fromstring(svg).iter("rect") if bar.get("class") == kind)


def test_bars_are_proportional_to_counts_and_lose_nothing() -> None:
    rng = np.random.default_rng(0)
    good, defective = rng.normal(0, 1, 90), rng.normal(400, 1, 30)
    shared = plots.axis(np.concatenate([good, defective]), 2.0)
    svg = plots.histogram("x", good, defective, shared)
    assert shared.cut
    assert "and more" in svg
    assert heights(svg, "good") / heights(svg, "bad") == pytest.approx(3.0, rel=0.05)


def test_the_threshold_is_at_the_same_place_in_every_histogram() -> None:
    scores = np.random.default_rng(0).normal(size=50)
    shared = plots.axis(scores, 1.5)
    lines = set()
    for part in (scores[:10], scores[10:]):
        tree = ElementTree.fromstring(plots.histogram("x", part, part, shared))
        lines |= {line.get("x1") for line in tree.iter("line") if line.get("class") == "threshold"}
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("scores", "threshold"), [([1.0], 1.0), ([0.0, 1.0], 5.0), ([0.0, 1.0], -5.0), ([2.0, 1e9], 2.0), ([3.0, 3.0], 4.0)]
)
def test_degenerate_axes(scores: list[float], threshold: float) -> None:
    shared = plots.axis(np.array(scores), threshold)
    assert shared.low < shared.high
    assert shared.low <= threshold <= shared.high
    svg = plots.histogram("x", np.array(scores), np.empty(0), shared)
    assert ElementTree.fromstring(svg).get("role") == "img"


def test_names_are_escaped_once() -> None:
    svg = plots.histogram('<script>"&', np.zeros(2), np.ones(2), plots.axis(np.array([0.0, 1.0]), 0.5))
    title = ElementTree.fromstring(svg).find("title")
    assert title is not None
    assert str(title.text).startswith('Scores of <script>"&: 2 good, 0 of them above')


def test_roc_goes_from_corner_to_corner() -> None:
    svg = plots.roc_curve(np.array([0.0, 1, 2, 3]), np.array([0, 1, 0, 1]), 1.5)
    assert svg is not None
    curve = ElementTree.fromstring(svg).find("polyline")
    assert curve is not None
    points = [tuple(map(float, point.split(","))) for point in str(curve.get("points")).split()]
    assert points[0][0] < points[-1][0]
    assert points[0][1] > points[-1][1]
    assert "50.0% false alarms and 50.0% detected" in svg


def test_no_roc_of_one_class() -> None:
    assert plots.roc_curve(np.zeros(3), np.zeros(3), 0.0) is None


def test_ridges_show_every_product_in_its_row() -> None:
    random = np.random.default_rng(0)
    rows = [(f"product <{number}>", random.normal(size=30), random.normal(2, 1, 10)) for number in range(4)]
    tree = ElementTree.fromstring(plots.ridges("told", rows, 1.0))
    assert [text.text for text in tree.iter("text") if text.get("class") == "name"] == [name for name, *_ in rows]
    assert sum(line.get("class") == "threshold" for line in tree.iter("line")) == 1
    assert ElementTree.fromstring(plots.ridges("told", rows, None)).find("title") is not None
    empty = [("one class", np.zeros(3), np.empty(0))]
    assert ElementTree.fromstring(plots.ridges("told", empty, None)) is not None


def test_curves_stay_in_their_square() -> None:
    drawings = [
        plots.pro_curve(np.linspace(0, 0.3, 20), np.linspace(0, 1, 20)),
        plots.calibration_curve([(0.01, 0.05), (0.2, 0.4), (0.05, 0.0)], 0.01, 0.03),
    ]
    for drawing in drawings:
        tree = ElementTree.fromstring(drawing)
        points = [pair for line in tree.iter("polyline") for pair in str(line.get("points")).split()]
        assert points
        for pair in points:
            x, y = map(float, pair.split(","))
            assert plots.PAD <= x <= plots.PAD + plots.SIDE
            assert 10 <= y <= 10 + plots.SIDE


def test_a_dot_for_each_value() -> None:
    tree = ElementTree.fromstring(plots.dots("told", [("a", [0.9, 0.95]), ("b", [0.2])], 0.5))
    assert len(list(tree.iter("circle"))) == 3
