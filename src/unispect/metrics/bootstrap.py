"""Bootstrap by image: how much a metric would scatter over other test sets of the same kind.

Each replicate gives every image a weight drawn from Poisson(1), which is resampling with replacement in the limit of many
images and needs no list of them, so it can be streamed: Estimating uncertainty for massive data streams (Chamandy et
al., 2012), https://research.google/pubs/pub43157. An image's weights depend on the seed and its number alone.
"""

from __future__ import annotations

import numpy as np

from unispect.metrics.regions import area_up_to
from unispect.metrics.streaming import keys, region_shares

CHUNK = 4_000_000  # weights that are looked at together: 32 MB for each of a few arrays
COARSE = 5  # bits kept of a score in pixel replicates
FEWEST = 0.9  # share of replicates that must be measurable
LIMIT = 0.3  # false positive rate at which AUPRO stops


def weights(images: int, replicates: int, seed: int = 0, start: int = 0) -> np.ndarray:
    """How often each of `images` images, the first of them number `start`, occurs in each replicate, (B, N) uint8."""
    drawn = np.empty((replicates, images), np.uint8)
    for place in range(images):
        generator = np.random.Generator(np.random.Philox(key=[seed, start + place]))
        drawn[:, place] = generator.poisson(1.0, replicates)
    return drawn


def image_replicates(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Image metrics of N images in each replicate, (B,) by their name in Row; NaN where a class has no weight.

    scores, labels   (N,); label 1 is defective
    weights          (B, N)
    """
    order = np.argsort(-scores, kind="stable")
    ranked, label = scores[order], labels[order].astype(bool)
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True)) if len(ranked) else np.empty(0, int)
    size = max(1, CHUNK // max(1, len(scores)))
    parts = [_ranked(weights[row : row + size, order], label, ends) for row in range(0, len(weights), size)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _ranked(weights: np.ndarray, label: np.ndarray, ends: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of images in descending order, equal scores up to each of `ends`."""
    found, alarms = (np.cumsum(weights * kind, axis=1, dtype=np.int64)[:, ends] for kind in (label, ~label))
    return _metrics(found.astype(np.float64), alarms.astype(np.float64))


def _metrics(found: np.ndarray, alarms: np.ndarray) -> dict[str, np.ndarray]:
    """From positives and negatives above each of k falling thresholds, (B, k) each."""
    total_p, total_n = (_last(part) for part in (found, alarms))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where((total_p > 0) & (total_n > 0), 1.0, np.nan)
        new_p, new_n = (np.diff(part, axis=1, prepend=0.0) for part in (found, alarms))
        beaten = (new_n * (found - new_p / 2)).sum(1)
        precision = np.where(found > 0, found / (found + alarms), 0.0)
        tolerable = np.where(alarms <= 0.01 * total_n[:, None], found, 0.0)
        return {
            "image_auroc": share * beaten / (total_p * total_n),
            "image_ap": share * (new_p * precision).sum(1) / total_p,
            "image_f1max": share * _highest(2 * found / (found + alarms + total_p[:, None])),
            "detection_at_1": share * _highest(tolerable) / total_p,
        }


def _last(part: np.ndarray) -> np.ndarray:
    return part[:, -1] if part.shape[1] else np.zeros(len(part))


def _highest(part: np.ndarray) -> np.ndarray:
    return np.asarray(part.max(axis=1, initial=0.0))


class PixelReplicates:
    """Pixel metrics of each replicate from coarse counts of pixels by score; memory does not grow with the images.

    Bins are 1/32 of a score wide, so a replicate is off by a little; `points` is what the whole set gives in the same
    bins, and an interval is moved by the difference to the exact number (see `interval`). At 200 replicates and the usual
    few thousand bins: 20 MB.
    """

    def __init__(self, replicates: int, bits: int = COARSE) -> None:
        self.replicates, self.bits = replicates, bits
        self._columns: dict[int, int] = {}
        self._sums = np.zeros((3, replicates + 1, 256))  # normal, defective, overlap; the first row has weight 1
        self._regions = np.zeros(replicates + 1)

    def add(self, scores: np.ndarray, mask: np.ndarray, weights: np.ndarray) -> None:
        """Count one map (h, w) and its mask (h, w) with its weight (B,) in each replicate."""
        found, inside = keys(scores, self.bits), np.asarray(mask, dtype=bool).ravel()
        bins, place = np.unique(found, return_inverse=True)
        counts = np.zeros((3, len(bins)))
        counts[0] = np.bincount(place[~inside], minlength=len(bins))
        regions = 0
        if inside.any():
            shares, regions = region_shares(mask)
            counts[1] = np.bincount(place[inside], minlength=len(bins))
            counts[2] = np.bincount(place[inside], weights=shares, minlength=len(bins))
        drawn = np.concatenate([[1.0], weights])
        columns = self._places(bins)
        for kind in range(3 if regions else 1):
            self._sums[kind][:, columns] += drawn[:, None] * counts[kind]
        self._regions += regions * drawn

    def merged(self, other: PixelReplicates) -> PixelReplicates:
        """The sums of both."""
        if (self.replicates, self.bits) != (other.replicates, other.bits):
            raise ValueError("other: replicates of another number or precision: sums of one kind were expected")
        total = PixelReplicates(self.replicates, self.bits)
        for part in (self, other):
            bins = np.array(list(part._columns), dtype=np.uint32)
            columns = total._places(bins)
            total._sums[:, :, columns] += part._sums[:, :, : len(bins)]
            total._regions += part._regions
        return total

    def metrics(self) -> dict[str, np.ndarray]:
        """(B,) replicates of each metric, by its name in Row; NaN where a class has no weight."""
        return {name: values[1:] for name, values in self._measured().items()}

    def points(self) -> dict[str, float]:
        """Each metric of the whole set in the same coarse bins."""
        return {name: float(values[0]) for name, values in self._measured().items()}

    def _places(self, bins: np.ndarray) -> np.ndarray:
        """Columns of bins, new ones at the end."""
        columns = np.array([self._columns.setdefault(key, len(self._columns)) for key in bins.tolist()], dtype=np.int64)
        if len(self._columns) > self._sums.shape[2]:
            wider = np.zeros((*self._sums.shape[:2], 2 * len(self._columns)))
            wider[:, :, : self._sums.shape[2]] = self._sums
            self._sums = wider
        return columns

    def _measured(self) -> dict[str, np.ndarray]:
        bins = np.array(list(self._columns), dtype=np.int64)
        alarms, found, overlap = np.cumsum(self._sums[:, :, np.argsort(-bins)], axis=2)
        ranked = _metrics(found, alarms)
        return {
            "pixel_auroc": ranked["image_auroc"],
            "pixel_ap": ranked["image_ap"],
            "pixel_f1max": ranked["image_f1max"],
            "aupro": self._aupro(alarms, overlap),
        }

    def _aupro(self, alarms: np.ndarray, overlap: np.ndarray) -> np.ndarray:
        areas = np.full(len(alarms), np.nan)
        for row, (normal, covered) in enumerate(zip(alarms, overlap, strict=True)):
            if len(normal) and normal[-1] > 0 and self._regions[row] > 0:
                x = np.concatenate([[0.0], normal / normal[-1]])
                y = np.concatenate([[0.0], covered / self._regions[row]])
                areas[row] = area_up_to(LIMIT, x, y) / LIMIT
        return areas


def interval(replicates: np.ndarray, point: float, coarse: float, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of (B,) replicates within 0..1, moved by point - coarse; NaN where too few are measurable.

    point    the metric of the whole set
    coarse   the same from the sums that the replicates come from; the same as `point` where those are exact
    """
    measured = replicates[~np.isnan(replicates)]
    if len(measured) < max(1.0, FEWEST * len(replicates)) or np.isnan(point):
        return float("nan"), float("nan")
    tail = (1 - level) / 2
    low, high = np.quantile(measured, [tail, 1 - tail]) + (point - coarse)
    return float(np.clip(low, 0.0, 1.0)), float(np.clip(high, 0.0, 1.0))
