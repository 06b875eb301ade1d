"""How well scores separate two classes: AUROC, average precision and the best F1. Exact, ties included.

All three depend on the positives only through their distinct scores, so the negatives, which are nearly all of the
pixels, are sorted alone, on all cores and in their own precision: 6e7 float32 pixels need about 1 GB. Labels: nonzero
is positive. Scores may come as one array or as a list of arrays (one an image), which are then not copied into one first.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

LEAST = 500_000  # values that are worth a thread
Arrays: TypeAlias = np.ndarray | Sequence[np.ndarray]


@dataclass(frozen=True, slots=True)
class Curve:
    """Counts at each of the k distinct scores of positives, highest first.

    thresholds  (k,) the scores
    true        (k,) positives that score at least the threshold
    false       (k,) negatives that score at least the threshold
    above       (k,) negatives that score more than the threshold
    """

    thresholds: np.ndarray
    true: np.ndarray
    false: np.ndarray
    above: np.ndarray
    positives: int
    negatives: int

    @property
    def measurable(self) -> bool:
        """Whether both classes are there."""
        return self.positives > 0 and self.negatives > 0


def auroc(scores: Arrays, labels: Arrays) -> float:
    """Area under the ROC curve: P(positive scores higher) + P(equal) / 2. NaN when a class is missing.

    >>> auroc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([0, 0, 1, 1]))
    0.875
    """
    return area(curve(scores, labels))


def average_precision(scores: Arrays, labels: Arrays) -> float:
    """Sum over thresholds of (recall step) x precision, without interpolation. NaN when a class is missing."""
    return precision(curve(scores, labels))


def f1_max(scores: Arrays, labels: Arrays) -> float:
    """Largest F1 = 2 TP / (TP + FP + positives) over all thresholds. NaN when a class is missing."""
    return best_f1(curve(scores, labels))


def curve(scores: Arrays, labels: Arrays) -> Curve:
    """Sort once and count; `area`, `precision` and `best_f1` read their numbers from it."""
    positive, negative = divide(scores, labels)
    positive.sort()
    thresholds, true = _distinct(positive)
    false, above = _counted(negative, thresholds)
    return Curve(thresholds, true, false, above, positives=len(positive), negatives=len(negative))


def area(counts: Curve) -> float:
    """AUROC from counts: each positive beats the negatives below it and half of those equal to it."""
    if not counts.measurable:
        return float("nan")
    beaten_by = counts.false + counts.above  # twice the number, to stay in integers
    new = np.diff(counts.true, prepend=0)
    lost = float(np.dot(new.astype(np.float64), beaten_by.astype(np.float64))) / 2
    return 1.0 - lost / (counts.positives * counts.negatives)


def precision(counts: Curve) -> float:
    """Average precision from counts. Thresholds without a positive add no recall and are not needed."""
    if not counts.measurable:
        return float("nan")
    new = np.diff(counts.true, prepend=0)
    return float(np.sum(new * (counts.true / (counts.true + counts.false)))) / counts.positives


def best_f1(counts: Curve) -> float:
    """Largest F1 from counts. Lowering a threshold past negatives only lowers F1, so positives' scores are enough."""
    if not counts.measurable:
        return float("nan")
    return float(np.max(2.0 * counts.true / (counts.true + counts.false + counts.positives)))


def detection_at(scores: Arrays, labels: Arrays, rate: float = 0.01) -> float:
    """Largest share of positives above a threshold that at most `rate` of the negatives are above, without interpolation.

    The threshold is set on these very scores. NaN when a class is missing.
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"rate={rate}: a false-alarm rate from 0 to 1 was expected, such as 0.01")
    counts = curve(scores, labels)
    if not counts.measurable:
        return float("nan")
    tolerable = counts.false / counts.negatives <= rate  # as a quotient: 29 of 100 are 0.29, but 0.29 * 100 < 29
    return float(np.max(counts.true[tolerable], initial=0)) / counts.positives


def roc(scores: Arrays, labels: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the ROC curve from (0, 0) to (1, 1): false and true positive rates, (2k + 2,) each.

    Straight lines between the corners are exact: ties of positives and negatives are the slanted ones.
    """
    counts = curve(scores, labels)
    if not counts.measurable:
        return np.empty(0), np.empty(0)
    before = np.concatenate([[0], counts.true[:-1]])
    return corners(
        counts.above / counts.negatives,
        counts.false / counts.negatives,
        before / counts.positives,
        counts.true / counts.positives,
    )


def corners(left: np.ndarray, right: np.ndarray, before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners from (0, 0) to (1, 1) of a curve that rises from `before` to `after` between `left` and `right`, (k,)."""
    x = np.stack([left, right], axis=1).ravel()
    y = np.stack([before, after], axis=1).ravel()
    return np.concatenate([[0.0], x, [1.0]]), np.concatenate([[0.0], y, [1.0]])


def divide(scores: Arrays, labels: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Scores of positives and of negatives, each a new flat array in the precision of the scores."""
    pairs = _pairs(scores, labels)
    positives = sum(int(np.count_nonzero(label)) for _, label in pairs)
    total = sum(label.size for _, label in pairs)
    kind = np.result_type(*[score.dtype for score, _ in pairs]) if pairs else np.dtype(np.float64)
    positive, negative = np.empty(positives, kind), np.empty(total - positives, kind)
    p = n = 0
    for score, label in pairs:
        chosen, other = score[label], score[~label]
        positive[p : p + len(chosen)], negative[n : n + len(other)] = chosen, other
        p, n = p + len(chosen), n + len(other)
    return positive, negative


def _counted(values: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many values are at least, and how many are more than, each of k thresholds, (k,) each; sorts parts of `values`.

    Each part is sorted by a thread of its own, in place: counts add up, so the parts need not be merged.
    """
    parts = np.array_split(values, min(_cores(), max(1, len(values) // LEAST)))

    def count(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        part.sort()
        low, high = (np.searchsorted(part, thresholds, side=side) for side in ("left", "right"))
        return len(part) - low, len(part) - high

    if len(parts) == 1:
        return count(parts[0])
    with ThreadPoolExecutor(len(parts), thread_name_prefix="unispect-sort") as threads:
        counts = list(threads.map(count, parts))
    return sum(false for false, _ in counts), sum(above for _, above in counts)  # type: ignore[return-value]


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pairs(scores: Arrays, labels: Arrays) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pieces of (scores, labels as bool), checked to match."""
    if isinstance(scores, np.ndarray) and scores.ndim <= 1:
        scores, labels = [scores], [np.asarray(labels)]
    if len(scores) != len(labels):
        raise ValueError(f"labels: {len(labels)} for {len(scores)} scores: give one label for each score")
    pairs = [(np.asarray(score), np.asarray(label, dtype=bool)) for score, label in zip(scores, labels, strict=True)]
    for score, label in pairs:
        if score.shape != label.shape:
            raise ValueError(f"labels: shape {label.shape} for scores of shape {score.shape}: give one for each score")
        if np.isnan(score).any():
            raise ValueError("scores: NaN found, and it has no rank: every score must be a number")
    return pairs


def _distinct(ascending: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values, highest first, and how many values are at least that: (n,) -> (k,), (k,)."""
    if not len(ascending):
        return ascending, np.empty(0, np.int64)
    first = np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]]))
    return ascending[first][::-1], (len(ascending) - first)[::-1]
