"""Pixel metrics in constant memory, each with a bound of its error that the sums themselves prove.

Scores are counted in bins that need no range beforehand: a float32, read as an integer of the same order, with its last
bits dropped, so a bin is as fine as a share of its score (2^-14 at the default). A bin knows how many normal and
defective pixels it holds but not their order in it. Whatever that order is, a metric lies between its value for the best
and for the worst one: `Bounded` is the middle of that range and half its width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy.special import digamma

from unispect.metrics.regions import components

BUFFER = 2_000_000  # pixels that wait to be counted: 8 MB
POINTS = 400  # of a curve that is drawn
MANTISSA = 23  # bits of a float32


@dataclass(frozen=True, slots=True)
class Bounded:
    """A number and how far it can be from the exact one; NaN where not measurable."""

    value: float
    error: float

    @classmethod
    def between(cls, low: float, high: float) -> Self:
        """The middle of a range that holds the exact number, with room for rounding."""
        return cls((low + high) / 2, max(0.0, (high - low) / 2) + 1e-12)


NOTHING = Bounded(float("nan"), float("nan"))


def keys(scores: np.ndarray, bits: int) -> np.ndarray:
    """Bins of scores, uint32 in the order of the scores: the float32 with `bits` of its 23 bits behind the point."""
    pattern = np.ascontiguousarray(scores, np.float32).ravel() + np.float32(0)  # + 0 makes -0 the same as 0
    unsigned = pattern.view(np.uint32)
    ordered = np.where(unsigned >> 31, ~unsigned, unsigned | np.uint32(1 << 31))
    return np.asarray(ordered >> np.uint32(MANTISSA - bits))


def middles(bins: np.ndarray, bits: int) -> np.ndarray:
    """A score in the middle of each bin, float32."""
    shift = MANTISSA - bits
    ordered = (bins.astype(np.uint32) << np.uint32(shift)) | np.uint32((1 << shift) >> 1)
    unsigned = np.where(ordered >> 31, ordered ^ np.uint32(1 << 31), ~ordered)
    return np.ascontiguousarray(unsigned.astype(np.uint32)).view(np.float32)


def region_shares(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """1 / size of the region of each defective pixel (p,) in row-major order, and the number of regions."""
    labelled, count = components(mask)
    inside = labelled[labelled > 0]
    return 1.0 / np.bincount(inside, minlength=count + 1)[inside], count


class PixelSums:
    """Counts of normal and defective pixels by score. Sums add over images, batches and processes.

    Memory depends on the spread of the scores and not on their number: at most 2^(9 + bits) bins of 28 bytes, in
    practice under a million, and a buffer of 8 MB.

    bits   of precision kept of a score; the bins are 2^-bits of the score wide
    """

    def __init__(self, bits: int = 14) -> None:
        if not 1 <= bits <= MANTISSA - 1:
            raise ValueError(f"bits={bits}: expected 1 to {MANTISSA - 1}")
        self.bits = bits
        self._bins = np.empty(0, np.uint32)
        self._counts = np.empty((2, 0), np.int64)  # normal, defective
        self._overlap = np.empty(0)  # summed 1 / size of regions
        self._regions = 0
        self._low, self._high = np.inf, -np.inf
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._pixels = 0

    @property
    def extremes(self) -> tuple[float, float]:
        """Lowest and highest score."""
        return float(self._low), float(self._high)

    @property
    def bins(self) -> int:
        """How many bins hold anything."""
        self._count()
        return len(self._bins)

    def add(self, scores: np.ndarray, mask: np.ndarray) -> None:
        """Count one map (h, w) and its mask (h, w), nonzero where defective."""
        scores, mask = np.asarray(scores), np.asarray(mask, dtype=bool)
        if scores.shape != mask.shape or scores.ndim != 2:
            raise ValueError(f"mask: shape {mask.shape} for scores of shape {scores.shape}: both must be (h, w)")
        low, high = float(scores.min()), float(scores.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("scores: NaN or infinite found, and it has no rank: every score must be a finite number")
        self._low, self._high = min(self._low, low), max(self._high, high)
        found, inside = keys(scores, self.bits), mask.ravel()
        shares, regions = region_shares(mask) if inside.any() else (np.empty(0), 0)
        self._waiting.append((found[~inside], found[inside], shares))
        self._regions += regions
        self._pixels += found.size
        if self._pixels >= BUFFER:
            self._count()

    def merged(self, other: PixelSums) -> PixelSums:
        """The sums of both."""
        if self.bits != other.bits:
            raise ValueError(f"bits: {self.bits} and {other.bits}: sums of one precision were expected")
        self._count()
        other._count()
        total = PixelSums(self.bits)
        total._regions = self._regions + other._regions
        total._low, total._high = min(self._low, other._low), max(self._high, other._high)
        for part in (self, other):
            total._join(part._bins, part._counts, part._overlap)
        return total

    def rescaled(self, low: float, high: float) -> PixelSums:
        """The sums of (score - low) / (high - low), as if every pixel had the middle score of its bin."""
        self._count()
        scaled = PixelSums(self.bits)
        scaled._regions = self._regions
        if len(self._bins):
            values = np.clip(middles(self._bins, self.bits).astype(np.float64), self._low, self._high)
            values = (values - low) / (high - low if high > low else 1.0)
            scaled._low, scaled._high = float(values.min()), float(values.max())
            scaled._join(keys(values, self.bits), self._counts, self._overlap)
        return scaled

    def auroc(self) -> Bounded:
        """Area under the ROC curve. Pairs in one bin count half; in truth they count between nothing and all."""
        negative, positive, _, total_n, total_p = self._descending()
        if not total_n or not total_p:
            return NOTHING
        above = np.cumsum(positive) - positive
        undecided = float(positive.astype(np.float64) @ negative)
        beaten = float(negative.astype(np.float64) @ above)
        pairs = float(total_n) * total_p
        return Bounded.between(beaten / pairs, (beaten + undecided) / pairs)

    def average_precision(self) -> Bounded:
        """Average precision. Best order in a bin: its defective pixels first, at one score; worst: last, one by one."""
        negative, positive, _, total_n, total_p = self._descending()
        if not total_n or not total_p:
            return NOTHING
        some = positive > 0
        before_p, before_n = (np.cumsum(part) - part for part in (positive, negative))
        p, n, found, alarms = (part[some].astype(np.float64) for part in (positive, negative, before_p, before_n))
        best = p * (found + p) / (found + p + alarms)
        worst = _one_by_one(found, p, alarms + n)
        return Bounded.between(float(np.minimum(worst, best).sum()) / total_p, float(best.sum()) / total_p)

    def f1_max(self) -> Bounded:
        """Best F1. The lower ends of bins are thresholds indeed; inside a bin no more is found than by its end."""
        negative, positive, _, total_n, total_p = self._descending()
        if not total_n or not total_p:
            return NOTHING
        found, alarms = np.cumsum(positive), np.cumsum(negative)
        sure = 2.0 * found / (found + alarms + total_p)
        possible = 2.0 * found / (found + (alarms - negative) + total_p)
        return Bounded.between(float(sure.max()), float(possible.max()))

    def aupro(self, limit: float = 0.3) -> Bounded:
        """AUPRO up to a false positive rate, as `regions.aupro`. The curve is known at the ends of bins, and rises."""
        _check_limit(limit)
        negative, _, overlap, total_n, _ = self._descending()
        if not total_n or not self._regions:
            return NOTHING
        x = np.cumsum(negative) / total_n
        y = np.cumsum(overlap) / self._regions
        left, right = np.minimum(x - negative / total_n, limit), np.minimum(x, limit)
        width = right - left
        low = float(width @ (y - overlap / self._regions))
        high = float(width @ y)
        slanted = 1.0 / total_n  # the exact curve rises over the width of one normal pixel, perhaps the one before
        return Bounded.between(low / limit, min(1.0, (high + slanted) / limit))

    def pro(self, limit: float = 0.3) -> tuple[np.ndarray, np.ndarray] | None:
        """Per-region overlap (k,) at false positive rates (k,) from 0 to the limit; None without regions or normals."""
        _check_limit(limit)
        negative, _, overlap, total_n, _ = self._descending()
        if not total_n or not self._regions:
            return None
        x = np.concatenate([[0.0], np.cumsum(negative) / total_n])
        y = np.concatenate([[0.0], np.cumsum(overlap) / self._regions])
        grid = np.linspace(0.0, limit, POINTS)
        return grid, np.interp(grid, x, y)

    def _descending(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
        """Normal and defective pixels and overlap of each bin, highest scores first, and both totals."""
        self._count()
        negative, positive = self._counts[:, ::-1]
        return negative, positive, self._overlap[::-1], int(negative.sum()), int(positive.sum())

    def _count(self) -> None:
        """Sort what waits into the bins."""
        if not self._waiting:
            return
        normal, defective, shares = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._pixels = [], 0
        self._join(*_runs(normal), np.zeros(0))
        order = np.argsort(defective, kind="stable")
        bins, counts = _runs(defective[order], 1)
        starts = np.concatenate([[0], np.cumsum(counts[1])[:-1]]).astype(np.int64)
        self._join(bins, counts, np.add.reduceat(shares[order], starts) if len(bins) else np.empty(0))

    def _join(self, bins: np.ndarray, counts: np.ndarray, overlap: np.ndarray) -> None:
        """Add bins, of which several may be the same."""
        if not len(bins):
            return
        union, place = np.unique(np.concatenate([self._bins, bins]), return_inverse=True)
        grown, shares = np.zeros((2, len(union)), np.int64), np.zeros(len(union))
        old = len(self._bins)
        grown[:, place[:old]] = self._counts
        shares[place[:old]] = self._overlap
        for row in range(2):
            np.add.at(grown[row], place[old:], counts[row])
        if len(overlap):
            np.add.at(shares, place[old:], overlap)
        self._bins, self._counts, self._overlap = union, grown, shares


def _runs(bins: np.ndarray, row: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Distinct bins, ascending, and how often each occurs, in the given row of (2, k)."""
    ascending = np.sort(bins)
    first = np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]])) if len(ascending) else np.empty(0, int)
    counts = np.zeros((2, len(first)), np.int64)
    counts[row] = np.diff(np.append(first, len(ascending)))
    return ascending[first], counts


def _one_by_one(found: np.ndarray, more: np.ndarray, alarms: np.ndarray) -> np.ndarray:
    """Sum over i = 1..more of (found + i) / (found + i + alarms), or a little less, (k,) each.

    Two numbers that the sum cannot be below. By the harmonic series it is more - alarms x (a difference of digammas): exact
    but for rounding, which is taken off, and which leaves no digit where alarms are very many. And the summand is concave
    in i, so it lies above its chord, which is close where `more` is small beside the rest.
    """
    end = digamma(found + more + alarms + 1)
    rounding = 8 * np.finfo(np.float64).eps * alarms * end
    series = more - alarms * (end - digamma(found + alarms + 1)) - rounding
    first, last = ((found + i) / (found + i + alarms) for i in (1, more))
    return np.asarray(np.maximum(series, more * (first + last) / 2))


def _check_limit(limit: float) -> None:
    if not 0.0 < limit <= 1.0:
        raise ValueError(f"limit={limit}: a false positive rate above 0 and at most 1 was expected, such as 0.3")


def each(sums: PixelSums) -> Iterator[tuple[str, Bounded]]:
    """All metrics of sums, by their name in `metrics.protocol.Row`."""
    yield "pixel_auroc", sums.auroc()
    yield "pixel_ap", sums.average_precision()
    yield "pixel_f1max", sums.f1_max()
    yield "aupro", sums.aupro()
