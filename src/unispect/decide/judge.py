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
from unispect.errors import ConfigError, StoreError
from unispect.metrics.regions import regions
from unispect.types import Finding, Region


@dataclass(frozen=True, slots=True)
class DecisionSettings:
    """The promise: at most this share of normal images raises an alarm. Regions smaller than min_area pixels go.

    unknown_rate   at most this share of normal images of known products is taken for a product never seen; 0, or too few
                   calibration images for it: none is, and no image is called unknown
    """

    false_alarm_rate: float = 0.01
    unknown_rate: float = 0.01
    min_area: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.unknown_rate < 1:
            raise ConfigError(f"unknown_rate: got {self.unknown_rate}, expected a share from 0 to below 1")


NUMBERS = ("scores", "peaks", "medians", "novelty")  # of a calibration, image by image


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the calibration normals scored, image by image, so that products can come and go.

    scores     (n,) of the images
    peaks      (n,) of the highest place of each map
    medians    (n,) of the median place of each map
    novelty    (n,) how unlike every known product each image is
    products   name of each image's product; None where the data names none
    """

    scores: np.ndarray
    peaks: np.ndarray
    medians: np.ndarray
    novelty: np.ndarray
    products: tuple[str | None, ...]

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
        )

    def without(self, product: str) -> Calibration:
        """The images of all other products."""
        kept = np.array([name != product for name in self.products], bool)
        names = tuple(name for name in self.products if name != product)
        return Calibration(self.scores[kept], self.peaks[kept], self.medians[kept], self.novelty[kept], names)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; every score comes back bit by bit."""
        numbers = {name: getattr(self, name).tolist() for name in NUMBERS}
        return {"rule": "conformal"} | numbers | {"products": list(self.products)}

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
        return cls(**numbers, products=names)


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
    pixel_threshold    of the places of a map
    unknown_threshold  of novelty; infinite where the calibration images cannot support the rate
    """

    def __init__(
        self, calibration: Calibration, decision: DecisionSettings, products: Sequence[str], preparation: Preparation
    ) -> None:
        self.calibration, self.decision = calibration, decision
        self.products, self.preparation = tuple(products), preparation
        self.threshold = calibration.images.threshold(decision.false_alarm_rate)
        self.pixel_threshold = calibration.pixels.threshold(decision.false_alarm_rate)
        self.unknown_threshold = _unknown_threshold(calibration, decision.unknown_rate)

    def finding(self, path: str | None, said: Said, size: tuple[int, int]) -> Finding:
        """The finding on an image of a size (width, height), pixels."""
        scaled = self.calibration.scaled(said.map, self.pixel_threshold)
        unknown, alarm = said.novelty > self.unknown_threshold, said.score > self.threshold
        nearest, near = self._resembles(said.products)
        return Finding(
            path=path,
            score=said.score,
            threshold=self.threshold,
            p_value=self.calibration.images.p_value(said.score),
            anomalous=alarm,
            product=None if unknown else nearest,
            product_probability=None if unknown else near,
            regions=self._regions(scaled, size) if alarm else (),
            map=scaled,
            width=size[0],
            height=size[1],
            unaligned=said.unaligned,
            unknown=unknown,
            unknown_p_value=self.calibration.strangers.p_value(said.novelty),
            nearest=nearest,
        )

    def _resembles(self, products: np.ndarray | None) -> tuple[str | None, float | None]:
        if products is None:
            return None, None
        best = int(products.argmax())
        return self.products[best], math.exp(products[best])

    def _regions(self, scaled: np.ndarray, size: tuple[int, int]) -> tuple[Region, ...]:
        """Parts of the map above its threshold; where there is none, the surroundings of the highest place."""
        found = regions(scaled, 1.0, self.decision.min_area)
        if not found:
            found = regions(scaled, min(1.0, 0.8 * float(scaled.max())), 1)[:1]
        side = scaled.shape[0]
        return tuple(
            Region(*self.preparation.box_to_original(left, top, right, bottom, side, *size), peak, area)
            for left, top, right, bottom, peak, area in found
        )


def _unknown_threshold(calibration: Calibration, rate: float) -> float:
    """Novelty above which an image shows no known product; infinite where the calibration images cannot support the rate."""
    if not rate or len(calibration.novelty) < needed(rate):
        return math.inf
    return calibration.strangers.threshold(rate)
