"""What is said of an image, from its scores: threshold, p-values, product and regions. No torch.

The scores may come from a detector in memory or from an exported one (see unispect.runtime): what is made of them is this.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from unispect.data.loader import Preparation, size_of
from unispect.data.records import Record
from unispect.decide.conformal import ConformalRule, needed
from unispect.decide.groups import GroupRule, Strictest
from unispect.decide.regions import Candidate, NormalRegions, candidates, height
from unispect.errors import CalibrationError, ConfigError, StoreError, unknown_name
from unispect.metrics.regions import regions
from unispect.types import Finding, Region


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
    guarantee      for whom the promise is kept: "image", for images like the calibration ones; "group", for those of a
                   day, lot or camera that was not among them, too; "product", for those of each product by itself, as the
                   model recognises it, where a product with too few calibration images shares with others like it;
                   "cross", of a model that was fitted with split.cross: see unispect.cross
    threshold      a fixed score above which an image raises an alarm, whatever the rate: an expert's, or the cheapest one
                   that `unispect calibrate` found. The rate stays what regions are told by
    """

    false_alarm_rate: float = 0.01
    unknown_rate: float = 0.01
    regions: str = "family"
    discovery_rate: float = 0.1
    min_area: int = 16
    min_size_mm: float = 0.0
    mm_per_pixel: float | dict[str, float] = 0.0
    guarantee: str = "image"
    threshold: float | None = None

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
        if self.guarantee not in GUARANTEES:
            raise ConfigError(unknown_name("guarantee", self.guarantee, GUARANTEES))
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ConfigError(f"threshold: got {self.threshold}, expected a finite score, or none")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON and TOML, without what is None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

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


RULES = ("family", "discovery")  # for regions
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
    regions     what the maps show under the minimum size of a region; None where that was not kept
    """

    scores: np.ndarray
    peaks: np.ndarray
    medians: np.ndarray
    novelty: np.ndarray
    products: tuple[str | None, ...]
    groups: tuple[str | None, ...]
    recognised: tuple[str | None, ...]
    regions: NormalRegions | None = None

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
        return Calibration(**joined, regions=None if self.regions is None else self.regions.with_also(other.regions))

    def without(self, product: str) -> Calibration:
        """The images of all other products."""
        return self.of([name != product for name in self.products])

    def of(self, kept: Sequence[bool] | np.ndarray) -> Calibration:
        """Some of the images, (n,) of bool."""
        chosen: dict[str, Any] = {name: getattr(self, name)[np.array(kept, bool)] for name in NUMBERS}
        for name in NAMES:
            chosen[name] = tuple(one for one, keep in zip(getattr(self, name), kept, strict=True) if keep)
        return Calibration(**chosen, regions=None if self.regions is None else self.regions.of_images(np.array(kept, bool)))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; every score comes back bit by bit."""
        numbers = {name: getattr(self, name).tolist() for name in NUMBERS}
        regions = {} if self.regions is None else {"regions": self.regions.as_dict()}
        return {"rule": "conformal"} | numbers | {name: list(getattr(self, name)) for name in NAMES} | regions

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
        return cls(**found, regions=NormalRegions.from_dict(table.get("regions"), lengths.pop()))


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


def calibration_of(
    said: Iterable[Said],
    records: Sequence[Record],
    names: Sequence[str],
    decision: DecisionSettings,
    preparation: Preparation,
    base: float | None = None,
) -> Calibration:
    """What was said of normal images, as what decides from now on.

    said      maps are wanted twice, and wait on the disk
    records   of the images, which may come to be known while they are said; files are read where sizes in mm are asked for
    names     of the known products
    base      level above which candidates for regions lie, where it is set already
    """
    rows = []
    with TemporaryFile() as file:
        shape: tuple[int, ...] = (0, 0)
        for one in said:
            rows.append((one.score, one.peak, one.median, one.novelty, recognised(names, one.products)[0]))
            shape = one.map.shape
            file.write(one.map.astype(np.float32).tobytes())
        file.flush()
        scores, peaks, medians, novelty, products = zip(*rows, strict=True) if rows else [()] * 5
        regions = None
        if rows:
            sizes = [size_of(record.path) if decision.min_size_mm else (1, 1) for record in records]
            maps = list(np.memmap(file, np.float32, "r", shape=(len(rows), *shape)))
            regions = normal_regions(maps, products, sizes, decision, preparation, base)
    return Calibration(
        scores=np.array(scores, np.float64),
        peaks=np.array(peaks, np.float64),
        medians=np.array(medians, np.float64),
        novelty=np.array(novelty, np.float64),
        products=tuple(record.product for record in records),
        groups=tuple(record.group for record in records),
        recognised=products,
        regions=regions,
    )


def check_support(groups: Sequence[str | None], decision: DecisionSettings) -> None:
    """Raises CalibrationError where so many images, the group of each, are too few for the promise."""
    zeros = np.zeros(max(1, len(groups)))
    if len(groups) < needed(decision.false_alarm_rate):
        ConformalRule(zeros).threshold(decision.false_alarm_rate)
    if decision.guarantee == "group":
        GroupRule(zeros, groups).threshold(decision.false_alarm_rate)
    decision.check_discovery(len(groups))


class Judge:
    """Decides by calibration images.

    products           names of the known products
    threshold          of an image score; a higher one is an alarm. The highest, where products have their own
    pixel_threshold    of a region: some place of it of the minimum size is above; likewise
    unknown_threshold  of novelty; infinite where the calibration images cannot support the rate

    Where the minimum size is not the one that calibration maps were looked at with, thresholds of regions go by their peaks,
    which are upper bounds: they still hold, but are higher than needed.

    Raises CalibrationError where the calibration images cannot support the promise.
    """

    def __init__(
        self, calibration: Calibration, decision: DecisionSettings, products: Sequence[str], preparation: Preparation
    ) -> None:
        self.calibration, self.decision = calibration, decision
        self.products, self.preparation = tuple(products), preparation
        self.images = Rules(calibration.scores, calibration, decision)
        self._normal = _fitting(calibration.regions, decision)
        heights = calibration.peaks if self._normal is None else self._normal.tops
        self.pixels, self._highest = Rules(heights, calibration, decision), float(heights.max())
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

    def _pixel_threshold(self, product: str | None) -> float:
        return self._pixel_thresholds.get(product, self._pixel_thresholds[None])

    def finding(self, path: str | None, said: Said, size: tuple[int, int]) -> Finding:
        """The finding on an image of a size (width, height), pixels."""
        unknown = said.novelty > self.unknown_threshold
        product, probability = recognised(self.products, said.products)
        threshold = self.threshold_of(product)
        scaled = self.calibration.scaled(said.map, self._pixel_threshold(product))
        alarm = said.score > threshold
        return Finding(
            path=path,
            score=said.score,
            threshold=threshold,
            p_value=self.images.of(product).p_value(said.score),
            anomalous=alarm,
            product=None if unknown else product,
            product_probability=None if unknown else probability,
            regions=self._regions(said, size, product, unknown) if alarm else (),
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

    def _regions(self, said: Said, size: tuple[int, int], product: str | None, unknown: bool) -> tuple[Region, ...]:
        """Parts of the map that the rule reports; where there is none, the surroundings of the highest place."""
        place = self.preparation.place_area(len(said.map), *size)
        least = self.decision.least(product, place)  # as for calibration images, known or not
        found, level = self._reported(said.map, least, product)
        about = len(said.map), size, product, unknown
        if not found:
            level = self.calibration.median + 0.8 * (float(said.map.max()) - self.calibration.median)
            highest = regions(said.map, min(level, self._pixel_threshold(product)), 1)[:1]
            top = height(said.map, least, self._highest)
            return tuple(self._region(box, top, False, *about) for box in highest)
        return tuple(self._region(part.above(level), part.height, True, *about) for part in found)

    def _region(
        self,
        part: tuple[int, int, int, int, float, int],
        top: float,
        promised: bool,
        side: int,
        size: tuple[int, int],
        product: str | None,
        unknown: bool,
    ) -> Region:
        """A part of a map of a side, with its height, on the original."""
        *box, peak, places = part
        area, scale = places * self.preparation.place_area(side, *size), self.decision.scale(None if unknown else product)
        left, top_row, right, bottom = box
        return Region(
            *self.preparation.box_to_original(left, top_row, right, bottom, side, *size),
            peak=float(self.calibration.scaled(np.array([peak], np.float32), self._pixel_threshold(product))[0]),
            area=max(1, round(area)),
            p_value=self.pixels.of(product).p_value(top),
            area_mm2=None if scale is None else area * scale**2,
            promised=promised,
        )

    def _reported(self, scores: np.ndarray, least: int, product: str | None) -> tuple[list[Candidate], float]:
        """Parts of a map that the rule reports, highest first, and the level that they exceed."""
        if self._normal is None or self.decision.regions == "family":
            level = self._pixel_threshold(product)
            return candidates(scores, level, least, self._highest), level
        found = candidates(scores, self._normal.base, least, self._highest)
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


def _unknown_threshold(strangers: ConformalRule, rate: float) -> float:
    """Novelty above which an image shows no known product; infinite where the calibration images cannot support the rate."""
    if not rate or len(strangers.scores) < needed(rate):
        return math.inf
    return strangers.threshold(rate)
