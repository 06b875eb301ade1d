"""Which parts of a map are reported: parts of a minimum size, and how few of them may be false.

The height of a part is the highest level above which `least` connected pixels of it lie; of an image, the highest of its
parts'. With `least` = 1 that is the peak. A part of at least so many pixels reaches above a level if and only if its height
is above it.

*Family-wise.* The height of an image is one number, so it is decided upon as scores are (see decide.conformal): at most a
share alpha of normal images has any part above the threshold.

*False discovery.* Candidates are the parts of {map > base} of at least `least` pixels. Let C(t) be the number of candidates
of all n calibration images as high as t, and R(t) that of the image. Candidates above the lowest t with

    (C(t) + R(t)) / (n + 1)  <=  q R(t)

are reported: the left side is the number of false ones to expect in a normal image, the image itself counted among them.
It is the step-up of *Controlling the false discovery rate* (Benjamini, Hochberg, 1995),
https://doi.org/10.1111/j.2517-6161.1995.tb02031.x, over parts of a map as in *False discovery rate revisited: FDR and
topological inference using Gaussian random fields* (Chumbley, Friston, 2009),
https://doi.org/10.1016/j.neuroimage.2008.05.021, with levels from calibration images, as in *Testing for outliers with
conformal p-values* (Bates et al., 2021), https://arxiv.org/abs/2104.08279. What it guarantees, and why: docs/regions.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unispect.errors import ConfigError, StoreError
from unispect.metrics.regions import Runs, bounds


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A connected part of a map above a level.

    left, top   of its box, pixels of the map
    inside      (h, w) its scores in its box; -inf elsewhere
    height      see above
    """

    left: int
    top: int
    inside: np.ndarray
    height: float

    def above(self, level: float = -np.inf) -> tuple[int, int, int, int, float, int]:
        """What of it is above a level, or all: left, top, right, bottom of the half-open box, peak and area."""
        rows, columns = np.nonzero(self.inside > np.float64(level))
        box = self.left + columns.min(), self.top + rows.min(), self.left + columns.max() + 1, self.top + rows.max() + 1
        left, top, right, bottom = (int(side) for side in box)
        return left, top, right, bottom, float(self.inside.max()), len(rows)


def height(scores: np.ndarray, least: int, cap: float = np.inf) -> float:
    """Highest level t at which {scores >= t} has a connected part of `least` pixels; -inf where there is none.

    cap   a level above which it does not matter how high: what reaches above it has the next number to it as its height
    """
    if least <= 1:
        return float(scores.max())
    if np.count_nonzero(scores > np.float64(cap)) >= least and Runs.of(scores > np.float64(cap)).areas.max() >= least:
        return float(np.nextafter(cap, np.inf))
    levels = np.sort(scores[scores > -np.inf])[::-1]

    def reaches(place: int) -> bool:
        return bool(Runs.of(scores >= levels[place]).areas.max() >= least)

    low, high, last = least - 2, least - 1, len(levels) - 1  # so many pixels there are only from there on
    if high > last or not reaches(last):
        return -np.inf
    while not reaches(high):
        low, high = high, min(2 * high + 1, last)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return float(levels[high])


def candidates(scores: np.ndarray, level: float, least: int, cap: float = np.inf) -> list[Candidate]:
    """Parts of {scores > level} of at least `least` pixels, highest first; cap as in `height`."""
    runs = Runs.of(scores > np.float64(level))  # a bare float would be rounded to the map's precision
    labels, found = runs.labels(scores.shape), []
    for number, (left, top, right, bottom, _, area) in enumerate(bounds(scores, runs), start=1):
        if area >= least:
            box = slice(top, bottom), slice(left, right)
            inside = np.where(labels[box] == number, scores[box], -np.inf)
            found.append(Candidate(left, top, inside, height(inside, least, cap)))
    return sorted(found, key=lambda part: (-part.height, -part.inside.max(), part.top, part.left))


def discovered(heights: np.ndarray, normal: np.ndarray, images: int, rate: float) -> tuple[int, float]:
    """How many of an image's candidates, highest first, are reported at a false-discovery rate, and the level they exceed.

    heights   (r,) of the candidates, descending
    normal    (m,) of all candidates of the calibration images, ascending
    images    n, number of calibration images
    """
    own = np.arange(1, len(heights) + 1)
    false = len(normal) - np.searchsorted(normal, heights, side="left")
    passes = np.flatnonzero((false + own) / ((images + 1) * own) <= rate)
    if not len(passes):
        return 0, np.inf
    count = int(passes[-1]) + 1
    borne = np.flatnonzero((np.arange(len(normal) + 1) + count) / ((images + 1) * count) <= rate)[-1]  # most that C may be
    return count, float(normal[-1 - borne]) if borne < len(normal) else -np.inf


@dataclass(frozen=True, eq=False)
class NormalRegions:
    """What the maps of n calibration images show under one minimum size.

    minimum   the settings of that size
    base      level above which candidates lie: the median of `tops` when the model was learnt
    tops      (n,) height of each image
    heights   of the candidates of each image, highest first
    """

    minimum: Mapping[str, Any]
    base: float
    tops: np.ndarray
    heights: tuple[tuple[float, ...], ...]

    @classmethod
    def of(
        cls, maps: Sequence[np.ndarray], least: Sequence[int], minimum: Mapping[str, Any], base: float | None = None
    ) -> NormalRegions:
        """Of n maps (h, w), with the minimum size of each in pixels of its map.

        Raises ConfigError for a minimum size that no map can hold.
        """
        if max(least) > (places := maps[0].size):
            asked = ", ".join(f"decision.{name}={value}" for name, value in minimum.items())
            raise ConfigError(f"{asked}: that is {max(least)} pixels of a map of {places}, which nothing reaches: lower it")
        tops = np.array([height(one, size) for one, size in zip(maps, least, strict=True)], np.float64)
        level = float(np.median(tops)) if base is None else base
        heights = tuple(
            tuple(part.height for part in candidates(one, level, size)) if top > level else ()
            for one, size, top in zip(maps, least, tops, strict=True)
        )
        return cls(minimum, level, tops, heights)

    def discovered(self, heights: Sequence[float], rate: float) -> tuple[int, float]:
        """How many of an image's candidates, highest first, are reported at a rate, and the level that they exceed."""
        normal = np.sort(np.array([one for image in self.heights for one in image], np.float64))
        return discovered(np.array(heights, np.float64), normal, len(self.tops), rate)

    def with_also(self, other: NormalRegions | None) -> NormalRegions | None:
        """These images and those of another; None where they cannot be put together."""
        if other is None or (dict(other.minimum), other.base) != (dict(self.minimum), self.base):
            return None
        return NormalRegions(self.minimum, self.base, np.concatenate((self.tops, other.tops)), self.heights + other.heights)

    def of_images(self, kept: np.ndarray) -> NormalRegions:
        """Of some of the images, (n,) bool."""
        heights = tuple(one for one, keep in zip(self.heights, kept, strict=True) if keep)
        return NormalRegions(self.minimum, self.base, self.tops[kept], heights)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; every number comes back bit by bit."""
        heights = [list(one) for one in self.heights]
        return {"minimum": dict(self.minimum), "base": self.base, "tops": self.tops.tolist(), "heights": heights}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any] | None, images: int) -> NormalRegions | None:
        """What `as_dict` gave of so many images; None for nothing, as models of older versions have.

        Raises StoreError where it is damaged.
        """
        if table is None:
            return None
        try:
            tops, heights = np.array(table["tops"], np.float64), tuple(tuple(map(float, one)) for one in table["heights"])
            found = cls(dict(table["minimum"]), float(table["base"]), tops, heights)
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"the calibration's regions are damaged ({error!r}): fit the model again") from error
        if tops.shape != (images,) or len(heights) != images:
            raise StoreError("the calibration's regions are not those of its images: fit the model again")
        return found
