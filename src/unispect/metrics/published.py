"""AUPRO and F1-max as other code bases compute them, to compare numbers with theirs. Our own are in `regions` and `ranking`.

The same maps can differ by a point from one to the next, so a published AUPRO says little without the name of its routine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from unispect.errors import ConfigError, unknown_name
from unispect.metrics import regions
from unispect.metrics.ranking import Arrays

EIGHT = np.ones((3, 3), dtype=int)  # the neighbours of a pixel
LIMIT = 0.3


def aupro(maps: Arrays, masks: Arrays, variant: str = "exact") -> float:
    """AUPRO up to a false positive rate of 0.3 by the routine named. NaN without a region or without normal pixels.

    maps, masks   N each, (h, w)
    variant       "exact", our own, or one of VARIANTS

    Raises ConfigError for an unknown variant.
    """
    if variant == "exact":
        return regions.aupro(maps, masks)
    if variant not in VARIANTS:
        raise ConfigError(unknown_name("AUPRO variant", variant, ["exact", *VARIANTS]))
    return VARIANTS[variant](maps, masks)


def official(maps: Arrays, masks: Arrays, thresholds: int = 10_000) -> float:
    """As the routine published with MVTec 3D-AD: thresholds at equal steps among the sorted scores of normal pixels.

    The MVTec 3D-AD Dataset (Bergmann et al., 2022), https://arxiv.org/abs/2112.09045
    """
    parts = list(_parts(maps, masks))
    normal = np.sort(np.concatenate([part.normal for part in parts])) if parts else np.empty(0)
    areas = [np.sort(area) for part in parts for area in part.areas]
    if not areas or not len(normal):
        return float("nan")
    places = np.linspace(0, len(normal) - 1, thresholds).astype(int)
    rate = 1.0 - (places + 1) / len(normal)
    overlap = np.mean([1.0 - np.searchsorted(area, normal[places], side="right") / len(area) for area in areas], axis=0)
    x, y = np.append(rate[::-1], 1.0), np.append(overlap[::-1], 1.0)
    return regions.area_up_to(LIMIT, x, y) / LIMIT


def cflow(maps: Arrays, masks: Arrays) -> float:
    """As CFLOW-AD's train.py (gudovskiy/cflow-ad): 1000 equal steps of score down from the highest, the lowest left out;
    holes of a region filled in the numerator only, so that a region with a hole can count for more than one; rates up to
    0.3, stretched to 0..1."""
    low, high = _span(maps)
    rate, overlap = _overlap(maps, masks, high - (high - low) / 1000 * np.arange(1000), filled=True)
    chosen = rate <= LIMIT
    return _stretched(rate[chosen], overlap[chosen], from_lowest=True)


def ader(maps: Arrays, masks: Arrays) -> float:
    """As ADer's util/metric.py (zhangzjn/ADer): 200 equal steps of score up from the lowest; rates below 0.3, the
    lowest to the highest of them stretched to 0..1."""
    return _rising(maps, masks, from_lowest=True)


def dinomaly(maps: Arrays, masks: Arrays) -> float:
    """As Dinomaly's utils.py (guojiajeremy/Dinomaly): `ader`, but rates are divided by the highest, and what lies before the
    lowest is lost: less where normal pixels reach the highest score."""
    return _rising(maps, masks, from_lowest=False)


def rd4ad(maps: Arrays, masks: Arrays) -> float:
    """As RD4AD's test.py (hq-deng/RD4AD): `dinomaly` of each defective image with the normal pixels of that image only; then
    the mean."""
    alone = [dinomaly([scores], [mask]) for scores, mask in zip(maps, masks, strict=True) if np.any(mask)]
    measured = [value for value in alone if not np.isnan(value)]
    return float(np.mean(measured)) if measured else float("nan")


def f1_max_ader(maps: Arrays, masks: Arrays, thresholds: int = 21) -> float:
    """Pixel F1-max as ADer: the best of 21 equal steps of score only. NaN when a class is missing."""
    scores = np.concatenate([np.ravel(one) for one in maps]).astype(np.float64)
    label = np.concatenate([np.ravel(mask) for mask in masks]).astype(bool)
    if not label.any() or label.all():
        return float("nan")
    low, high = scores.min(), scores.max()
    scaled = (scores - low) / (high - low if high > low else 1.0)
    best = 0.0
    for threshold in np.linspace(0.0, 1.0, thresholds):
        above = scaled > threshold
        found = int(np.sum(above & label))
        best = max(best, 2 * found / (int(above.sum()) + int(label.sum())))
    return best


def flipped(auroc: float) -> float:
    """AUROC as UniAD's code reports it: turned round where it is below one half, with the test labels in sight."""
    return auroc if np.isnan(auroc) else max(auroc, 1.0 - auroc)


@dataclass(frozen=True, slots=True)
class _Part:
    """One image: scores of its normal pixels, of each region, and of each region with its holes filled."""

    normal: np.ndarray
    areas: Sequence[np.ndarray]
    filled: Sequence[np.ndarray]


def _parts(maps: Arrays, masks: Arrays) -> Iterator[_Part]:
    for one, mask in zip(maps, masks, strict=True):
        scores, label = np.asarray(one, dtype=np.float64), np.asarray(mask, dtype=bool)
        numbered, _ = regions.components(label)
        boxes = ndimage.find_objects(numbered)
        alone = [(scores[box], numbered[box] == number) for number, box in enumerate(boxes, start=1)]
        # As regionprops of scikit-image: a hole that touches the outside by a corner is none.
        filled = [inside[ndimage.binary_fill_holes(area, EIGHT)] for inside, area in alone]
        yield _Part(scores[~label], [inside[area] for inside, area in alone], filled)


def _span(maps: Arrays) -> tuple[float, float]:
    """Lowest and highest score of all maps, (0, 0) without maps."""
    low, high = [float(np.min(one)) for one in maps], [float(np.max(one)) for one in maps]
    return min(low, default=0.0), max(high, default=0.0)


def _overlap(maps: Arrays, masks: Arrays, thresholds: np.ndarray, filled: bool) -> tuple[np.ndarray, np.ndarray]:
    """False positive rate and mean overlap of the regions above each of k thresholds, (k,) each; empty if not measurable."""
    parts = list(_parts(maps, masks))
    sizes = [len(area) for part in parts for area in part.areas]
    if not sizes or not sum(len(part.normal) for part in parts):
        return np.empty(0), np.empty(0)
    counted = [area for part in parts for area in (part.filled if filled else part.areas)]
    rate = _above(np.concatenate([part.normal for part in parts]), thresholds)
    overlap = [_above(area, thresholds) * (len(area) / size) for area, size in zip(counted, sizes, strict=True)]
    return rate, np.mean(overlap, axis=0)


def _above(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Share of scores above each threshold, (k,)."""
    return (len(scores) - np.searchsorted(np.sort(scores), thresholds, side="right")) / len(scores)


def _rising(maps: Arrays, masks: Arrays, from_lowest: bool) -> float:
    low, high = _span(maps)
    if low == high:
        return float("nan")
    # Rounding decides whether the highest score is a threshold, too: it does so in the same way there.
    thresholds = np.arange(low, high, (high - low) / 200)
    rate, overlap = _overlap(maps, masks, thresholds, filled=False)
    chosen = rate < LIMIT
    return _stretched(rate[chosen], overlap[chosen], from_lowest)


def _stretched(x: np.ndarray, y: np.ndarray, from_lowest: bool) -> float:
    """Area below y after x was stretched so that it ends at 1. NaN where x has no width: their routines divide by zero."""
    if not len(x) or x.max() == x.min():
        return float("nan")
    area = abs(float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2))
    return area / float(x.max() - (x.min() if from_lowest else 0.0))


VARIANTS: dict[str, Callable[[Arrays, Arrays], float]] = {
    "official": official,
    "cflow": cflow,
    "rd4ad": rd4ad,
    "ader": ader,
    "dinomaly": dinomaly,
}
