"""Ranking metrics against scikit-learn, ties and all."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from unispect.metrics import ranking

ORACLE = Path(__file__).parents[1] / "fixtures" / "metrics.npz"


def sklearn_f1(labels: np.ndarray, scores: np.ndarray) -> float:
    precision, recall, _ = precision_recall_curve(labels, scores)
    precision, recall = precision[:-1], recall[:-1]
    return float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-300)))


def draws() -> list[tuple[np.ndarray, np.ndarray]]:
    """Scores with many, few and no ties, constant ones, rare positives, both precisions."""
    rng = np.random.default_rng(0)
    cases = []
    for size, levels, share in [(2, 3, 0.5), (7, 2, 0.5), (50, 3, 0.2), (300, 1, 0.5), (4000, 40, 0.01), (999, 0, 0.7)]:
        labels = (rng.random(size) < share).astype(int)
        labels[:2] = [0, 1]
        scores = rng.normal(size=size) + labels
        cases.append((np.floor(scores * levels) if levels else scores, labels))
        cases.append((np.zeros(size), labels))
        cases.append((-scores.astype(np.float32), labels))
    return cases


@pytest.mark.parametrize(("scores", "labels"), draws())
def test_equal_to_sklearn(scores: np.ndarray, labels: np.ndarray) -> None:
    assert ranking.auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert ranking.average_precision(scores, labels) == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    assert ranking.f1_max(scores, labels) == pytest.approx(sklearn_f1(labels, scores), abs=1e-12)


@pytest.mark.parametrize(("scores", "labels"), draws())
def test_roc_has_the_corners_of_sklearn(scores: np.ndarray, labels: np.ndarray) -> None:
    x, y = ranking.roc(scores, labels)
    assert np.all(np.diff(x) >= 0)
    assert np.all(np.diff(y) >= 0)
    assert np.trapezoid(y, x) == pytest.approx(ranking.auroc(scores, labels), abs=1e-12)
    theirs = np.stack(roc_curve(labels, scores, drop_intermediate=False)[:2], axis=1)
    before, after = np.diff(theirs[:-1], axis=0), np.diff(theirs[1:], axis=0)
    turns = np.abs(before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]) > 1e-12
    ours = np.stack([x, y], axis=1)
    for corner in theirs[1:-1][turns]:
        assert np.abs(ours - corner).max(axis=1).min() < 1e-12


def test_published_pixel_metrics() -> None:
    given = np.load(ORACLE)
    assert ranking.auroc(given["maps"], given["masks"]) == pytest.approx(float(given["pixel_auroc"]), abs=1e-12)
    assert ranking.average_precision(given["maps"], given["masks"]) == pytest.approx(float(given["pixel_ap"]), abs=1e-12)
    assert ranking.f1_max(given["maps"], given["masks"]) == pytest.approx(float(given["pixel_f1max"]), abs=1e-12)


@pytest.mark.parametrize("metric", [ranking.auroc, ranking.average_precision, ranking.f1_max])
@pytest.mark.parametrize("labels", [np.zeros(4), np.ones(4), np.zeros(0)])
def test_nan_when_a_class_is_missing(metric: object, labels: np.ndarray) -> None:
    assert np.isnan(metric(np.arange(len(labels), dtype=float), labels))  # type: ignore[operator]
    assert not len(ranking.roc(np.arange(len(labels), dtype=float), labels)[0])


def test_a_list_of_pieces_is_one_set() -> None:
    rng = np.random.default_rng(1)
    scores, labels = rng.integers(0, 9, (5, 4, 6)).astype(np.float32), rng.random((5, 4, 6)) < 0.3
    whole = ranking.auroc(scores.ravel(), labels.ravel())
    assert ranking.auroc(scores, labels) == whole
    assert ranking.auroc([*scores], [*labels]) == whole
    assert np.isnan(ranking.auroc([], []))


def test_only_order_counts_and_the_input_is_left_alone() -> None:
    rng = np.random.default_rng(2)
    scores, labels = rng.integers(-5, 5, 200).astype(np.float64), rng.random(200) < 0.5
    before = scores.copy()
    value = ranking.auroc(scores, labels)
    assert ranking.auroc(np.exp(scores), labels) == pytest.approx(value, abs=1e-15)
    assert ranking.auroc(-scores, labels) == pytest.approx(1 - value, abs=1e-12)
    assert np.array_equal(scores, before)


def test_float32_counts_beyond_its_integers_are_exact() -> None:
    """2^25 negatives cannot be counted in float32; half a positive's worth is lost to a tie."""
    scores, labels = np.zeros(2**25 + 2, np.float32), np.zeros(2**25 + 2, bool)
    scores[:2], labels[:2] = [1.0, 0.0], True
    assert ranking.auroc(scores, labels) == 0.75
    assert ranking.curve(scores, labels).false[-1] == 2**25


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="NaN"):
        ranking.auroc(np.array([1.0, np.nan]), np.array([0, 1]))
    with pytest.raises(ValueError, match=r"shape \(3,\) for scores of shape \(2,\)"):
        ranking.auroc(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="1 for 2 scores"):
        ranking.auroc([np.zeros(2)] * 2, [np.zeros(2)])


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_parts_sorted_by_threads_count_the_same(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    labels = random.random(4000) < 0.1
    scores = np.round(random.normal(size=4000) + labels, 1)
    whole = ranking.curve(scores, labels)
    monkeypatch.setattr(ranking, "LEAST", 300)
    monkeypatch.setattr(ranking, "_cores", lambda: cores)
    parts = ranking.curve(scores, labels)
    for name in ("thresholds", "true", "false", "above"):
        assert np.array_equal(getattr(parts, name), getattr(whole, name))
