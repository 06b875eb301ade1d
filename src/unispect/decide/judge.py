"""What is said of an image, from its scores: threshold, p-values, product and regions. No torch.

The scores may come from a detector in memory or from an exported one (see unispect.runtime): what is made of them is this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from unispect.data.loader import Preparation
from unispect.decide.conformal import ConformalRule, needed
from unispect.decide.regions import Candidate, NormalRegions, candidates, height
from unispect.errors import CalibrationError, ConfigError, StoreError, unknown_name
from unispect.metrics.regions import regions
from unispect.types import Finding, Region

RULES = ("family", "discovery")  # for regions


@dataclass(frozen=True, slots=True)
class DecisionSettings:
    """The promise: at most this share of normal images raises an alarm. What it says of regions: docs/regions.md.

    unknown_rate   at most this share of normal images of known products is taken for a product never seen; 0, or too few
                   calibration images for it: none is, and no image is called unknown
    regions        "family": at most `false_alarm_rate` of normal images have any region; "discovery": of the regions of an
                   image a share of at most `discovery_rate` is false, on average over images
    min_area       pixels of the score map that a region has at least; the map has `map_side` of them a side, a setting of
                   the method, 256 unless set
    min_size_mm    takes the place of min_area where it is above 0: diameter, millimetres, of a circle of the least area of a
                   region
    mm_per_pixel   millimetres of a pixel of the original image, one number or one for each product; 0: not known
    """

    false_alarm_rate: float = 0.01
    unknown_rate: float = 0.01
    regions: str = "family"
    discovery_rate: float = 0.1
    min_area: int = 16
    min_size_mm: float = 0.0
    mm_per_pixel: float | dict[str, float] = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.unknown_rate < 1:
            raise ConfigError(f"unknown_rate: got {self.unknown_rate}, expected a share from 0 to below 1")
        if self.regions not in RULES:
            raise ConfigError(unknown_name("regions", self.regions, RULES))
        if not 0 < self.discovery_rate < 1:
            raise ConfigError(f"discovery_rate: got {self.discovery_rate}, expected a share between 0 and 1, such as 0.1")
        if self.min_area < 1:
            raise ConfigError(f"min_area: got {self.min_area}, expected at least 1 pixel of the score map")
        _check_scale(self.min_size_mm, self.mm_per_pixel)

    @property
    def minimum(self) -> dict[str, Any]:
        """The settings that a minimum size comes from."""
        in_mm = {"min_size_mm": self.min_size_mm, "mm_per_pixel": self.mm_per_pixel}
        return in_mm if self.min_size_mm else {"min_area": self.min_area}

    def least(self, product: str | None, place: float) -> int:
        """Minimum size in pixels of a map, each of which covers `place` pixels of the original.

        Where the product is not known, the coarsest of several scales counts: no region of the size asked for is lost.
        """
        if not self.min_size_mm:
            return self.min_area
        scale = self.scale(product) or max(_scales(self.mm_per_pixel))
        return max(1, math.ceil(math.pi / 4 * self.min_size_mm**2 / (scale**2 * place) - 1e-9))

    def scale(self, product: str | None) -> float | None:
        """Millimetres of a pixel of the original, where known for a product."""
        known = set(_scales(self.mm_per_pixel))
        if isinstance(self.mm_per_pixel, dict) and len(known) > 1:
            return self.mm_per_pixel.get(product or "")
        return known.pop() or None

    def check_discovery(self, images: int) -> None:
        """Raises CalibrationError where so many calibration images cannot bound false discoveries."""
        least = needed(self.discovery_rate)
        if self.regions == "discovery" and images < least:
            raise CalibrationError(
                f"{images} calibration images cannot support discovery_rate={self.discovery_rate}: "
                f"at least {least} are needed"
            )

    def check_products(self, names: Sequence[str | None], more: bool = False) -> None:
        """Raises ConfigError where scales are given by product, and not for just these; `more`: or for others, too."""
        if not isinstance(self.mm_per_pixel, dict):
            return
        if None in names:
            raise ConfigError("mm_per_pixel: a table by product, but no image has a product's name: give one number")
        for name in self.mm_per_pixel:
            if name not in names and not more:
                raise ConfigError(f"mm_per_pixel: {unknown_name('product', name, [str(known) for known in names])}")
        if missing := sorted(str(name) for name in set(names) - set(self.mm_per_pixel)):
            raise ConfigError(
                f"mm_per_pixel: no number for product {', '.join(missing)}: expected one for each, or one for all"
            )


def _scales(given: float | Mapping[str, float]) -> list[float]:
    return [given] if isinstance(given, int | float) else list(given.values())


def _check_scale(size: float, given: float | Mapping[str, float]) -> None:
    """Raises ConfigError for what is no scale, and for a size in millimetres without one."""
    named = isinstance(given, Mapping)
    for scale in _scales(given):
        number = isinstance(scale, int | float) and not isinstance(scale, bool) and math.isfinite(scale)
        if not number or scale < 0 or (named and not scale):
            raise ConfigError(f"mm_per_pixel: got {scale!r}, expected millimetres of a pixel of the original, such as 0.05")
    if not 0 <= size < math.inf:
        raise ConfigError(f"min_size_mm: got {size}, expected millimetres, or 0 for none")
    if size and not any(_scales(given)):
        raise ConfigError(
            f"min_size_mm={size} needs mm_per_pixel, millimetres of a pixel of the original image: set it, too"
        )


NUMBERS = ("scores", "peaks", "medians", "novelty")  # of a calibration, image by image


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the calibration normals scored, image by image, so that products can come and go.

    scores     (n,) of the images
    peaks      (n,) of the highest place of each map
    medians    (n,) of the median place of each map
    novelty    (n,) how unlike every known product each image is
    products   name of each image's product; None where the data names none
    regions    what the maps show under the minimum size of a region; None where that was not kept
    """

    scores: np.ndarray
    peaks: np.ndarray
    medians: np.ndarray
    novelty: np.ndarray
    products: tuple[str | None, ...]
    regions: NormalRegions | None = None

    @cached_property
    def images(self) -> ConformalRule:
        """The rule for images."""
        return ConformalRule(self.scores)

    @cached_property
    def pixels(self) -> ConformalRule:
        """The rule for places: that of the highest place of an image."""
        return ConformalRule(self.peaks)

    @cached_property
    def strangers(self) -> ConformalRule:
        """The rule for products never seen."""
        return ConformalRule(self.novelty)

    @cached_property
    def median(self) -> float:
        """The median place of normal images."""
        return float(np.median(self.medians))

    def scaled(self, scores: np.ndarray, threshold: float) -> np.ndarray:
        """A map in units of the calibration normals: 0 is their median, 1 the pixel threshold."""
        return ((scores - self.median) / max(threshold - self.median, 1e-9)).astype(np.float32)

    def with_also(self, other: Calibration) -> Calibration:
        """These images and those of another."""
        return Calibration(
            np.concatenate((self.scores, other.scores)),
            np.concatenate((self.peaks, other.peaks)),
            np.concatenate((self.medians, other.medians)),
            np.concatenate((self.novelty, other.novelty)),
            self.products + other.products,
            None if self.regions is None else self.regions.with_also(other.regions),
        )

    def without(self, product: str) -> Calibration:
        """The images of all other products."""
        kept = np.array([name != product for name in self.products], bool)
        names = tuple(name for name in self.products if name != product)
        regions = None if self.regions is None else self.regions.of_images(kept)
        return Calibration(self.scores[kept], self.peaks[kept], self.medians[kept], self.novelty[kept], names, regions)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; every score comes back bit by bit."""
        numbers = {name: getattr(self, name).tolist() for name in NUMBERS}
        regions = {} if self.regions is None else {"regions": self.regions.as_dict()}
        return {"rule": "conformal"} | numbers | {"products": list(self.products)} | regions

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Calibration:
        """What `as_dict` gave.

        Raises StoreError where it is damaged or of an older unispect.
        """
        try:
            numbers = {name: np.array(table[name], np.float64) for name in NUMBERS}
            names = tuple(table["products"])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"the calibration is damaged or of an older unispect ({error!r}): fit the model again"
            ) from error
        if table.get("rule") != "conformal" or {len(values) for values in numbers.values()} != {len(names)}:
            raise StoreError(
                f"the calibration has rule={table.get('rule')!r} and lists of unlike length: fit the model again"
            )
        return cls(**numbers, products=names, regions=NormalRegions.from_dict(table.get("regions"), len(names)))


@dataclass(frozen=True, slots=True)
class Said:
    """What a model says of one image.

    score      the image score
    map        (h, w) a score for each place
    products   (K,) log-probability of each known product, or None
    novelty    how unlike every known product it is
    unaligned  the image score before products were brought to one scale, or None
    """

    score: float
    map: np.ndarray
    products: np.ndarray | None
    novelty: float
    unaligned: float | None = None


class Judge:
    """Decides by calibration images.

    products           names of the known products
    threshold          of an image score; a higher one is an alarm
    pixel_threshold    of a region: some place of it of the minimum size is above
    unknown_threshold  of novelty; infinite where the calibration images cannot support the rate

    Where the minimum size is not the one that calibration maps were looked at with, thresholds of regions go by their peaks,
    which are upper bounds: they still hold, but are higher than needed.
    """

    def __init__(
        self, calibration: Calibration, decision: DecisionSettings, products: Sequence[str], preparation: Preparation
    ) -> None:
        self.calibration, self.decision = calibration, decision
        self.products, self.preparation = tuple(products), preparation
        self.threshold = calibration.images.threshold(decision.false_alarm_rate)
        self._normal = _fitting(calibration.regions, decision)
        self._heights = calibration.pixels if self._normal is None else ConformalRule(self._normal.tops)
        self.pixel_threshold = self._heights.threshold(decision.false_alarm_rate)
        self.unknown_threshold = _unknown_threshold(calibration, decision.unknown_rate)

    def finding(self, path: str | None, said: Said, size: tuple[int, int]) -> Finding:
        """The finding on an image of a size (width, height), pixels."""
        scaled = self.calibration.scaled(said.map, self.pixel_threshold)
        unknown, alarm = said.novelty > self.unknown_threshold, said.score > self.threshold
        product, probability = (None, None) if unknown else self.resembles(said.products)
        return Finding(
            path=path,
            score=said.score,
            threshold=self.threshold,
            p_value=self.calibration.images.p_value(said.score),
            anomalous=alarm,
            product=product,
            product_probability=probability,
            regions=self._regions(said, size, product) if alarm else (),
            map=scaled,
            width=size[0],
            height=size[1],
            unaligned=said.unaligned,
            unknown=unknown,
            unknown_p_value=self.calibration.strangers.p_value(said.novelty),
        )

    def resembles(self, products: np.ndarray | None) -> tuple[str | None, float | None]:
        """Name and probability of the likeliest product, from (K,) log-probabilities."""
        if products is None:
            return None, None
        best = int(products.argmax())
        return self.products[best], math.exp(products[best])

    def _regions(self, said: Said, size: tuple[int, int], product: str | None) -> tuple[Region, ...]:
        """Parts of the map that the rule reports; where there is none, the surroundings of the highest place."""
        place = self.preparation.place_area(len(said.map), *size)
        least = self.decision.least(self.resembles(said.products)[0], place)  # as for calibration images, known or not
        found, level = self._reported(said.map, least)
        if not found:
            level = self.calibration.median + 0.8 * (float(said.map.max()) - self.calibration.median)
            highest = regions(said.map, min(level, self.pixel_threshold), 1)[:1]
            top = height(said.map, least)
            return tuple(self._region(box, top, False, len(said.map), size, product) for box in highest)
        return tuple(self._region(part.above(level), part.height, True, len(said.map), size, product) for part in found)

    def _region(
        self,
        part: tuple[int, int, int, int, float, int],
        top: float,
        promised: bool,
        side: int,
        size: tuple[int, int],
        product: str | None,
    ) -> Region:
        """A part of a map of a side, with its height, on the original."""
        *box, peak, places = part
        area, scale = places * self.preparation.place_area(side, *size), self.decision.scale(product)
        left, top_row, right, bottom = box
        return Region(
            *self.preparation.box_to_original(left, top_row, right, bottom, side, *size),
            peak=float(self.calibration.scaled(np.array([peak], np.float32), self.pixel_threshold)[0]),
            area=max(1, round(area)),
            p_value=self._heights.p_value(top),
            area_mm2=None if scale is None else area * scale**2,
            promised=promised,
        )

    def _reported(self, scores: np.ndarray, least: int) -> tuple[list[Candidate], float]:
        """Parts of a map that the rule reports, highest first, and the level that they exceed."""
        if self._normal is None or self.decision.regions == "family":
            return candidates(scores, self.pixel_threshold, least), self.pixel_threshold
        found = candidates(scores, self._normal.base, least)
        count, level = self._normal.discovered([part.height for part in found], self.decision.discovery_rate)
        return found[:count], level


def normal_regions(
    maps: Sequence[np.ndarray],
    products: Sequence[str | None],
    sizes: Sequence[tuple[int, int]],
    decision: DecisionSettings,
    preparation: Preparation,
    base: float | None = None,
) -> NormalRegions:
    """What the maps of calibration images show, which resemble products and have sizes (width, height), pixels.

    base   level above which candidates lie, where it is set already
    """
    side = len(maps[0])
    places = [preparation.place_area(side, *size) for size in sizes]
    least = [decision.least(product, place) for product, place in zip(products, places, strict=True)]
    return NormalRegions.of(maps, least, decision.minimum, base)


def _fitting(known: NormalRegions | None, decision: DecisionSettings) -> NormalRegions | None:
    """What calibration maps show under the minimum size that is decided with; None where they were not looked at so.

    Raises CalibrationError where false discoveries are to be bounded, and that is not known or the images are too few.
    """
    fits = known is not None and dict(known.minimum) == decision.minimum
    if decision.regions == "family":
        return known if fits else None
    if known is None or not fits:
        raise CalibrationError(
            f"regions='discovery' needs the calibration maps under {decision.minimum}, and this model has "
            f"{'none' if known is None else dict(known.minimum)}: fit it with these settings, or set regions='family'"
        )
    decision.check_discovery(len(known.tops))
    return known


def _unknown_threshold(calibration: Calibration, rate: float) -> float:
    """Novelty above which an image shows no known product; infinite where the calibration images cannot support the rate."""
    if not rate or len(calibration.novelty) < needed(rate):
        return math.inf
    return calibration.strangers.threshold(rate)
