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
    """As CFLOW-AD's code (gudovskiy/cflow-ad): 1000 equal steps of score, holes of a region filled in the numerator only,
    so that a region with a hole can count for more than one; rates up to 0.3 stretched to 0..1."""
    return _stepped(maps, masks, 1000, filled=True, inclusive=True)


def ader(maps: Arrays, masks: Arrays) -> float:
    """As ADer (zhangzjn/ADer) and Dinomaly: 200 equal steps of score, rates below 0.3 stretched to 0..1."""
    return _stepped(maps, masks, 200, filled=False, inclusive=False)


def rd4ad(maps: Arrays, masks: Arrays) -> float:
    """As RD4AD (hq-deng/RD4AD): `ader` of each defective image with the normal pixels of that image only; then the mean."""
    alone = [ader([scores], [mask]) for scores, mask in zip(maps, masks, strict=True) if np.any(mask)]
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
        numbered, count = regions.components(label)
        each = [numbered == number for number in range(1, count + 1)]
        areas = [scores[area] for area in each]
        yield _Part(scores[~label], areas, [scores[ndimage.binary_fill_holes(area)] for area in each])


def _stepped(maps: Arrays, masks: Arrays, steps: int, filled: bool, inclusive: bool) -> float:
    """Overlap against the false positive rate at equal steps of score, up to 0.3, the rates stretched to 0..1."""
    parts = list(_parts(maps, masks))
    areas = [area for part in parts for area in part.areas]
    if not areas or not sum(len(part.normal) for part in parts):
        return float("nan")
    above = [np.sort(area) for part in parts for area in (part.filled if filled else part.areas)]
    normal = np.sort(np.concatenate([part.normal for part in parts]))
    low, high = min(float(np.min(one)) for one in maps), max(float(np.max(one)) for one in maps)
    thresholds = high - (high - low) * np.arange(steps + 1) / steps
    rate = 1.0 - np.searchsorted(normal, thresholds, side="right") / len(normal)
    sizes = [len(area) for area in areas]
    overlap = np.mean(
        [(len(a) - np.searchsorted(a, thresholds, side="right")) / n for a, n in zip(above, sizes, strict=True)], axis=0
    )
    chosen = rate <= LIMIT if inclusive else rate < LIMIT
    x, y = rate[chosen], overlap[chosen]
    low_rate = x.min() if inclusive and len(x) else 0.0
    if not len(x) or x.max() <= low_rate:
        return float(y.max()) if len(y) else float("nan")
    x = (x - low_rate) / (x.max() - low_rate)
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2)


VARIANTS: dict[str, Callable[[Arrays, Arrays], float]] = {
    "official": official,
    "cflow": cflow,
    "rd4ad": rd4ad,
    "ader": ader,
}
