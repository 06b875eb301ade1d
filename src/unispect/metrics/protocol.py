"""Two ways to sum up a test set of several products, side by side.

Pooled ("absolute-unified"): all images in one ranking, so one threshold serves every product. Mean over products
("model-unified"): each product ranked alone, then the unweighted mean, which forgives scores on different scales.
Worst: the product that does least well, which a mean hides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from scipy.special import betaincinv

from unispect.metrics import ranking, regions
from unispect.metrics.ranking import Arrays

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Row:
    """Metrics of one set of images, NaN where not measurable. `images` counts those with an image score.

    detection_at_1   share of defects found at 1 % false alarms, where the threshold is set on these very images
    """

    image_auroc: float = NAN
    image_ap: float = NAN
    image_f1max: float = NAN
    detection_at_1: float = NAN
    pixel_auroc: float = NAN
    pixel_ap: float = NAN
    pixel_f1max: float = NAN
    aupro: float = NAN
    images: int = 0

    def as_dict(self) -> dict[str, float | int | None]:
        """Plain values; None where not measurable, as JSON knows no NaN."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: None if np.isnan(value) else value for name, value in values.items()}


METRICS = tuple(field.name for field in fields(Row) if field.name != "images")


@dataclass(frozen=True, slots=True)
class Table:
    """Both protocols and what the mean is taken over, products in alphabetical order.

    worst            the lowest value of each metric over the products
    worst_products   whose value that is, by metric
    """

    pooled: Row
    mean: Row
    worst: Row
    worst_products: dict[str, str]
    products: dict[str, Row]


def table(
    scores: np.ndarray,
    labels: np.ndarray,
    products: Sequence[str],
    pixels: Mapping[str | None, Mapping[str, float]] | None = None,
) -> Table:
    """All metrics of N images.

    scores, labels, products   (N,) each; label 1 is defective
    pixels                     pixel metrics by product, under None those of all products pooled
    """
    names, known = np.asarray(products, dtype=object), pixels or {}

    def row(product: str | None) -> Row:
        chosen = slice(None) if product is None else names == product
        count = len(scores[chosen])
        return Row(**image_metrics(scores[chosen], labels[chosen]), **known.get(product, {}), images=count)

    rows = {product: row(product) for product in sorted(set(products))}
    pooled = rows[next(iter(rows))] if len(rows) == 1 else row(None)
    return Table(pooled, mean(list(rows.values())), *worst(rows), rows)


def image_metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metrics of N image scores, by their name in Row; sorted once."""
    counts = ranking.curve(scores, labels)
    return {
        "image_auroc": ranking.area(counts),
        "image_ap": ranking.precision(counts),
        "image_f1max": ranking.best_f1(counts),
        "detection_at_1": ranking.detection_at(scores, labels, 0.01),
    }


def pixel_metrics(maps: Arrays, masks: Arrays) -> dict[str, float]:
    """Metrics of M maps (h, w), by their name in Row; the pixels are sorted once for all four. Exact."""
    counts = ranking.curve(maps, masks)
    return {
        "pixel_auroc": ranking.area(counts),
        "pixel_ap": ranking.precision(counts),
        "pixel_f1max": ranking.best_f1(counts),
        "aupro": regions.overlap(counts, maps, masks),
    }


def worst(rows: Mapping[str, Row]) -> tuple[Row, dict[str, str]]:
    """The lowest value of each metric over the products, and whose it is; the first of equals."""
    lowest: dict[str, float] = {}
    whose: dict[str, str] = {}
    for metric in METRICS:
        values = {name: getattr(row, metric) for name, row in rows.items() if not np.isnan(getattr(row, metric))}
        if values:
            whose[metric] = min(values, key=values.__getitem__)
            lowest[metric] = values[whose[metric]]
    return Row(**lowest, images=sum(row.images for row in rows.values())), whose


def mean(rows: Sequence[Row]) -> Row:
    """Unweighted mean of each metric over the rows where it is measurable; images are summed."""
    measured = {name: [value for row in rows if not np.isnan(value := getattr(row, name))] for name in METRICS}
    means = {name: float(np.mean(values)) if values else NAN for name, values in measured.items()}
    return Row(**means, images=sum(row.images for row in rows))


@dataclass(frozen=True, slots=True)
class Rates:
    """What the one threshold did: how many of the good images raised an alarm, how many defects were found."""

    good: int = 0
    false_alarms: int = 0
    defective: int = 0
    detected: int = 0

    @property
    def false_alarm_rate(self) -> float:
        """Share of good images that raised an alarm, NaN without good images."""
        return self.false_alarms / self.good if self.good else NAN

    @property
    def detection_rate(self) -> float:
        """Share of defective images that raised an alarm, NaN without defective images."""
        return self.detected / self.defective if self.defective else NAN


def rates(labels: np.ndarray, anomalous: np.ndarray) -> Rates:
    """Counts of N decisions, (N,) labels and (N,) alarms, both 0 or 1."""
    defective, alarm = np.asarray(labels, dtype=bool), np.asarray(anomalous, dtype=bool)
    return Rates(
        good=int(np.sum(~defective)),
        false_alarms=int(np.sum(~defective & alarm)),
        defective=int(np.sum(defective)),
        detected=int(np.sum(defective & alarm)),
    )


def interval(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of a rate that gave `hits` in `trials` (Clopper and Pearson, 1934); (0, 1) without trials."""
    tail = (1.0 - confidence) / 2.0
    low = betaincinv(hits, trials - hits + 1, tail) if hits > 0 else 0.0
    high = betaincinv(hits + 1, trials - hits, 1.0 - tail) if hits < trials else 1.0
    return float(low), float(high)
