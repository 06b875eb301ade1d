"""What is said of an image, from its scores: threshold, p-values, product and regions. No torch.

The scores may come from a detector in memory or from an exported one (see unispect.runtime): what is made of them is this.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from unispect.data.loader import Preparation
from unispect.data.records import Record
from unispect.decide.conformal import ConformalRule, needed
from unispect.decide.groups import GroupRule, Strictest
from unispect.errors import ConfigError, StoreError, unknown_name
from unispect.metrics.regions import regions
from unispect.types import Finding, Region


@dataclass(frozen=True, slots=True)
class DecisionSettings:
    """The promise: at most this share of normal images raises an alarm. Regions smaller than min_area pixels go.

    unknown_rate   at most this share of normal images of known products is taken for a product never seen; 0, or too few
                   calibration images for it: none is, and no image is called unknown
    guarantee      for whom the promise is kept: "image", for images like the calibration ones; "group", for those of a
                   day, lot or camera that was not among them, too; "product", for those of each product by itself, as the
                   model recognises it, where a product with too few calibration images shares with others like it;
                   "cross", of a model that was fitted with split.cross: see unispect.cross
    threshold      a fixed score above which an image raises an alarm, whatever the rate: an expert's, or the cheapest one
                   that `unispect calibrate` found. The rate stays what regions are told by
    """

    false_alarm_rate: float = 0.01
    unknown_rate: float = 0.01
    min_area: int = 16
    guarantee: str = "image"
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.unknown_rate < 1:
            raise ConfigError(f"unknown_rate: got {self.unknown_rate}, expected a share from 0 to below 1")
        if self.guarantee not in GUARANTEES:
            raise ConfigError(unknown_name("guarantee", self.guarantee, GUARANTEES))
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ConfigError(f"threshold: got {self.threshold}, expected a finite score, or none")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON and TOML, without what is None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


GUARANTEES = ("image", "group", "product", "cross")
NUMBERS = ("scores", "peaks", "medians", "novelty")  # of a calibration, image by image
NAMES = ("products", "groups", "recognised")


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the calibration normals scored, image by image, so that products can come and go.

    scores      (n,) of the images
    peaks       (n,) of the highest place of each map
    medians     (n,) of the median place of each map
    novelty     (n,) how unlike every known product each image is
    products    name of each image's product; None where the data names none
    groups      day, lot or camera of each; None where the data names none
    recognised  the product that the model took each for
    """

    scores: np.ndarray
    peaks: np.ndarray
    medians: np.ndarray
    novelty: np.ndarray
    products: tuple[str | None, ...]
    groups: tuple[str | None, ...]
    recognised: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def median(self) -> float:
        """The median place of normal images."""
        return float(np.median(self.medians))

    def scaled(self, scores: np.ndarray, threshold: float) -> np.ndarray:
        """A map in units of the calibration normals: 0 is their median, 1 the pixel threshold."""
        return ((scores - self.median) / max(threshold - self.median, 1e-9)).astype(np.float32)

    def with_also(self, other: Calibration) -> Calibration:
        """These images and those of another."""
        joined: dict[str, Any] = {name: np.concatenate((getattr(self, name), getattr(other, name))) for name in NUMBERS} | {
            name: getattr(self, name) + getattr(other, name) for name in NAMES
        }
        return Calibration(**joined)

    def without(self, product: str) -> Calibration:
        """The images of all other products."""
        return self.of([name != product for name in self.products])

    def of(self, kept: Sequence[bool] | np.ndarray) -> Calibration:
        """Some of the images, (n,) of bool."""
        chosen: dict[str, Any] = {name: getattr(self, name)[np.array(kept, bool)] for name in NUMBERS}
        for name in NAMES:
            chosen[name] = tuple(one for one, keep in zip(getattr(self, name), kept, strict=True) if keep)
        return Calibration(**chosen)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; every score comes back bit by bit."""
        numbers = {name: getattr(self, name).tolist() for name in NUMBERS}
        return {"rule": "conformal"} | numbers | {name: list(getattr(self, name)) for name in NAMES}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Calibration:
        """What `as_dict` gave.

        Raises StoreError where it is damaged or of an older unispect.
        """
        try:
            found: dict[str, Any] = {name: np.array(table[name], np.float64) for name in NUMBERS}
            found |= {name: tuple(table[name]) for name in NAMES}
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"the calibration is damaged or of an older unispect ({error!r}): fit the model again"
            ) from error
        lengths = {len(values) for values in found.values()}
        if table.get("rule") != "conformal" or len(lengths) != 1:
            raise StoreError(
                f"the calibration has rule={table.get('rule')!r} and lists of unlike length: fit the model again"
            )
        return cls(**found)


Rule = ConformalRule | GroupRule | Strictest


class Rules:
    """What decides about one number of an image, by the calibration images and for whom the promise is kept.

    values   (n,) the number of each calibration image
    """

    def __init__(self, values: np.ndarray, calibration: Calibration, decision: DecisionSettings) -> None:
        self._own: dict[str | None, Rule] = {}
        self._all: Rule = ConformalRule(values)
        if decision.guarantee == "group":
            self._all = Strictest(self._all, GroupRule(values, calibration.groups))
        if decision.guarantee == "product":
            self._own = _by_product(values, calibration.recognised, needed(decision.false_alarm_rate))

    def of(self, product: str | None) -> Rule:
        """The rule for an image that is taken for a product; None where it is for none."""
        return self._own.get(product, self._all)


def _by_product(values: np.ndarray, recognised: Sequence[str | None], least: int) -> dict[str | None, Rule]:
    """A rule for each product. Those with too few images are taken together, and others join them until they are enough;
    which they are depends on numbers of images alone, never on scores, so each promise is kept exactly."""
    counts = Counter(recognised).most_common()
    alone = [name for name, count in counts if count >= least]
    together = [name for name, count in counts if count < least]
    while together and alone and sum(name in together for name in recognised) < least:
        together.append(alone.pop())
    groups = [[name] for name in alone] + ([together] if together else [])
    rules: list[tuple[list[str | None], Rule]] = [
        (group, ConformalRule(values[np.array([name in group for name in recognised], bool)])) for group in groups
    ]
    return {name: rule for group, rule in rules for name in group}


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

    @property
    def peak(self) -> float:
        """The highest place."""
        return float(self.map.max())

    @property
    def median(self) -> float:
        """The median place, of every fourth in both directions: maps are blurred, and a whole one takes its time."""
        return float(np.median(self.map[::4, ::4]))


def recognised(names: Sequence[str], products: np.ndarray | None) -> tuple[str | None, float | None]:
    """The product that an image resembles most and how surely, of log-probabilities (K,); None where there are none."""
    if products is None:
        return None, None
    best = int(products.argmax())
    return names[best], math.exp(products[best])


def calibration_of(said: Iterable[Said], records: Sequence[Record], names: Sequence[str]) -> Calibration:
    """What was said of normal images, as what decides from now on; maps are let go one by one.

    names   of the known products
    """
    rows = [(one.score, one.peak, one.median, one.novelty, recognised(names, one.products)[0]) for one in said]
    scores, peaks, medians, novelty, products = zip(*rows, strict=True) if rows else [()] * 5
    return Calibration(
        scores=np.array(scores, np.float64),
        peaks=np.array(peaks, np.float64),
        medians=np.array(medians, np.float64),
        novelty=np.array(novelty, np.float64),
        products=tuple(record.product for record in records),
        groups=tuple(record.group for record in records),
        recognised=products,
    )


def check_support(groups: Sequence[str | None], decision: DecisionSettings) -> None:
    """Raises CalibrationError where so many images, the group of each, are too few for the promise."""
    zeros = np.zeros(max(1, len(groups)))
    if len(groups) < needed(decision.false_alarm_rate):
        ConformalRule(zeros).threshold(decision.false_alarm_rate)
    if decision.guarantee == "group":
        GroupRule(zeros, groups).threshold(decision.false_alarm_rate)


class Judge:
    """Decides by calibration images.

    products           names of the known products
    threshold          of an image score; a higher one is an alarm. The highest, where products have their own
    pixel_threshold    of the places of a map; likewise
    unknown_threshold  of novelty; infinite where the calibration images cannot support the rate

    Raises CalibrationError where the calibration images cannot support the promise.
    """

    def __init__(
        self, calibration: Calibration, decision: DecisionSettings, products: Sequence[str], preparation: Preparation
    ) -> None:
        self.calibration, self.decision = calibration, decision
        self.products, self.preparation = tuple(products), preparation
        self.images = Rules(calibration.scores, calibration, decision)
        self.pixels = Rules(calibration.peaks, calibration, decision)
        self.strangers = ConformalRule(calibration.novelty)
        known = {*calibration.recognised, None} if decision.guarantee == "product" else {None}
        self._thresholds = {name: self._threshold(name) for name in known}
        self._pixel_thresholds = {name: self.pixels.of(name).threshold(decision.false_alarm_rate) for name in known}
        self.threshold = max(self._thresholds.values())
        self.pixel_threshold = max(self._pixel_thresholds.values())
        self.unknown_threshold = _unknown_threshold(self.strangers, decision.unknown_rate)

    def _threshold(self, product: str | None) -> float:
        if self.decision.threshold is not None:
            return self.decision.threshold
        return self.images.of(product).threshold(self.decision.false_alarm_rate)

    def threshold_of(self, product: str | None) -> float:
        """The threshold of the score of an image that is taken for a product."""
        return self._thresholds.get(product, self._thresholds[None])

    def finding(self, path: str | None, said: Said, size: tuple[int, int]) -> Finding:
        """The finding on an image of a size (width, height), pixels."""
        unknown = said.novelty > self.unknown_threshold
        product, probability = recognised(self.products, said.products)
        threshold = self.threshold_of(product)
        scaled = self.calibration.scaled(said.map, self._pixel_thresholds.get(product, self._pixel_thresholds[None]))
        alarm = said.score > threshold
        return Finding(
            path=path,
            score=said.score,
            threshold=threshold,
            p_value=self.images.of(product).p_value(said.score),
            anomalous=alarm,
            product=None if unknown else product,
            product_probability=None if unknown else probability,
            regions=self._regions(scaled, size) if alarm else (),
            map=scaled,
            width=size[0],
            height=size[1],
            unaligned=said.unaligned,
            unknown=unknown,
            unknown_p_value=self.strangers.p_value(said.novelty),
            nearest=product,
            peak=said.peak,
            median=said.median,
            novelty=said.novelty,
        )

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


def _unknown_threshold(strangers: ConformalRule, rate: float) -> float:
    """Novelty above which an image shows no known product; infinite where the calibration images cannot support the rate."""
    if not rate or len(strangers.scores) < needed(rate):
        return math.inf
    return strangers.threshold(rate)
