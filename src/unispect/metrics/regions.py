"""Connected parts of masks and maps: AUPRO over defects, boxes over what lies above a threshold.

Pixels that touch by an edge or a corner are connected, as in the official MVTec routine:
The MVTec Anomaly Detection Dataset (Bergmann et al., 2021), https://doi.org/10.1007/s11263-020-01400-4
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np

from unispect.metrics import ranking
from unispect.metrics.ranking import Arrays, Curve


def aupro(maps: Arrays, masks: Arrays, limit: float = 0.3) -> float:
    """Area under the per-region overlap curve up to a false positive rate, divided by that rate.

    The overlap at a threshold is the mean, over all defect regions of the set, of the share of the region above it;
    the false positive rate counts all normal pixels of the set, good images included. This is the limit of the
    official routine when every normal pixel's score is a threshold: defect pixels that merely tie with normal ones
    are not yet found, so a constant map earns 0. NaN without a region or without normal pixels.

    maps   N maps, each (h, w)
    masks  N masks, each (h, w); nonzero is defective
    limit  the false positive rate at which to stop, in (0, 1]
    """
    return overlap(ranking.curve(maps, masks), maps, masks, limit)


def overlap(counts: Curve, maps: Arrays, masks: Arrays, limit: float = 0.3) -> float:
    """AUPRO where the curve of the same pixels is known already, which saves the sort."""
    if not 0.0 < limit <= 1.0:
        raise ValueError(f"limit={limit}: a false positive rate above 0 and at most 1 was expected, such as 0.3")
    if not counts.measurable:
        return float("nan")
    last = np.flatnonzero(np.append(np.diff(counts.false) != 0, True))  # of the thresholds with equal false positives
    right, after = counts.false[last], _region_share(counts, maps, masks)[last]
    left, before = np.maximum(right - 1, 0), np.concatenate([[0.0], after[:-1]])
    x, y = ranking.corners(left / counts.negatives, right / counts.negatives, before, after)
    return area_up_to(limit, x, y) / limit


@dataclass(frozen=True, slots=True)
class Runs:
    """Unbroken stretches of a mask's rows, in reading order, and the part that each belongs to, (n,) each.

    The parts are numbered from 0 in the order of their first pixels. No scipy: what inspects needs no more than numpy.
    """

    row: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    part: np.ndarray

    @classmethod
    def of(cls, mask: np.ndarray) -> Self:
        """Of a mask (h, w)."""
        edges = np.diff(np.pad(np.asarray(mask, bool), ((0, 0), (1, 1))).astype(np.int8), axis=1)
        row, start = np.nonzero(edges == 1)
        stop = np.nonzero(edges == -1)[1]
        width = edges.shape[1] + 1
        # Those of the next row that a run touches, corners included, follow one another.
        first = np.searchsorted(row * width + stop, (row + 1) * width + start)
        last = np.searchsorted(row * width + start, (row + 1) * width + stop, side="right")
        above = np.repeat(np.arange(len(row)), last - first)
        below = np.arange(len(above)) + np.repeat(first - np.cumsum(last - first) + (last - first), last - first)
        return cls(row, start, stop, np.unique(_joined(len(row), above, below), return_inverse=True)[1])

    @property
    def count(self) -> int:
        """Number of parts."""
        return int(self.part.max()) + 1 if len(self.part) else 0

    @property
    def areas(self) -> np.ndarray:
        """Pixels of each part, (count,)."""
        return np.bincount(self.part, weights=self.stop - self.start, minlength=self.count).astype(int)

    def labels(self, shape: tuple[int, ...]) -> np.ndarray:
        """Numbers 1..count of the parts, 0 elsewhere, (h, w)."""
        steps = np.zeros((shape[0], shape[1] + 1), np.int32)
        steps[self.row, self.start] += self.part + 1
        steps[self.row, self.stop] -= self.part + 1
        return np.cumsum(steps, axis=1, dtype=np.int32)[:, :-1]


def _joined(count: int, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The lowest of all numbers below `count` that each is joined with by pairs, (p,) and (p,) -> (count,)."""
    lowest, before = np.arange(count), None
    while before is None or not np.array_equal(lowest, before):
        before = lowest.copy()
        least = np.minimum(lowest[one], lowest[other])
        for side in (one, other):
            np.minimum.at(lowest, before[side], least)
            np.minimum.at(lowest, side, least)
        lowest = lowest[lowest]
    return lowest


def components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Numbers 1..n of the connected parts of a mask, 0 elsewhere: (h, w) -> (h, w), n."""
    runs = Runs.of(mask)
    return runs.labels(np.shape(mask)), runs.count


def regions(scores: np.ndarray, threshold: float, min_area: int = 1) -> list[tuple[int, int, int, int, float, int]]:
    """Connected parts of a map (h, w) above the threshold: (left, top, right, bottom, peak, area), highest peak first.

    Boxes are half-open and, like the area, in pixels of the map. Parts smaller than `min_area` are left out.
    """
    large = (region for region in bounds(scores, Runs.of(scores > threshold)) if region[5] >= min_area)
    return sorted(large, key=lambda region: (-region[4], region[1], region[0]))


def bounds(scores: np.ndarray, runs: Runs) -> Iterator[tuple[int, int, int, int, float, int]]:
    """As `regions`, of all parts of a mask of the map, in the order of their numbers."""
    peaks = np.full(runs.count, -np.inf)
    np.maximum.at(peaks, runs.part, _highest(scores, runs))
    columns = [
        _extreme(np.minimum, runs.start, runs),
        _extreme(np.minimum, runs.row, runs),
        _extreme(np.maximum, runs.stop, runs),
        _extreme(np.maximum, runs.row + 1, runs),
        peaks,
        runs.areas,
    ]
    yield from zip(*(column.tolist() for column in columns), strict=True)


def _highest(scores: np.ndarray, runs: Runs) -> np.ndarray:
    """Highest score of each run."""
    if not len(runs.row):
        return np.zeros(0)
    flat, line = np.append(scores, -np.inf), runs.row * scores.shape[1]
    ends = np.stack([line + runs.start, line + runs.stop], axis=1).ravel()  # every second stretch lies between two runs
    highest: np.ndarray = np.maximum.reduceat(flat, ends)[::2]
    return highest


def _extreme(extreme: np.ufunc, values: np.ndarray, runs: Runs) -> np.ndarray:
    """The lowest or highest value of each part's runs."""
    reduced = np.empty(runs.count, values.dtype)
    reduced[runs.part] = values  # any of the part's own to begin with
    extreme.at(reduced, runs.part, values)
    return reduced


def _region_share(counts: Curve, maps: Arrays, masks: Arrays) -> np.ndarray:
    """Mean over regions of the share that scores at least each threshold of the curve, (k,)."""
    ascending = counts.thresholds[::-1]
    gained, number = np.zeros(len(ascending)), 0
    for scores, sizes, count in _defects(maps, masks):
        place = np.searchsorted(ascending, scores)
        gained += np.bincount(place, weights=1.0 / sizes, minlength=len(ascending))
        number += count
    return np.cumsum(gained[::-1]) / number


def _defects(maps: Arrays, masks: Arrays) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """For each image with a defect: scores of its p defective pixels (p,), the size of the region of each, regions."""
    for scores, mask in zip(_each(maps), _each(masks), strict=True):
        labelled, count = components(mask)
        if count:
            inside = labelled > 0
            yield scores[inside], np.bincount(labelled.ravel())[labelled[inside]], count


def _each(arrays: Arrays) -> Arrays:
    """The same N arrays, checked to be (h, w) each."""
    for array in arrays:
        if np.ndim(array) != 2:
            raise ValueError(f"maps, masks: shape {np.shape(array)} found: each must be (h, w)")
    return arrays


def area_up_to(limit: float, x: np.ndarray, y: np.ndarray) -> float:
    """Integral of a polygonal curve with ascending x from 0 to the limit."""
    inside = int(np.searchsorted(x, limit, side="right"))
    x, y = np.append(x[:inside], limit), np.append(y[:inside], np.interp(limit, x, y))
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2)
