"""95 % bootstrap intervals, by image, of everything in a table: each product, their mean, and all pooled."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from unispect.metrics.bootstrap import image_replicates, interval, weights
from unispect.metrics.pixels import PixelResult
from unispect.metrics.protocol import METRICS, Row, Table

Intervals: TypeAlias = dict[str, tuple[float, float]]
Replicates: TypeAlias = dict[str, np.ndarray]


def intervals(
    scores: np.ndarray,
    labels: np.ndarray,
    alarms: np.ndarray,
    products: Sequence[str],
    table: Table,
    pixels: Mapping[str | None, PixelResult],
    replicates: int,
    seed: int = 0,
) -> dict[str, Intervals]:
    """Intervals of "pooled", "mean" and "product:<name>", by the name of the metric in Row, and of the two rates.

    An image keeps its weight in all of them, so a mean over products is resampled as a whole. Images of a product are
    few where its interval is wide; a metric that cannot be measured has none.

    scores, labels, alarms, products   (N,) each
    replicates                         of the image metrics; those of pixels come with them
    """
    drawn, names = weights(len(scores), replicates, seed), np.asarray(products, dtype=object)
    everything = np.ones(len(scores), dtype=bool)
    own = {name: _drawn(scores, labels, alarms, drawn, names == name) for name in table.products}
    rates = {name: _rates(labels, alarms, names == name) for name in table.products}
    found = {
        "pooled": _intervals(
            _drawn(scores, labels, alarms, drawn, everything), table.pooled, _rates(labels, alarms, everything)
        ),
        "mean": _intervals({metric: _mean([own[name][metric] for name in own]) for metric in METRICS[:4]}, table.mean, {}),
    }
    found |= {f"product:{name}": _intervals(own[name], row, rates[name]) for name, row in table.products.items()}
    places = {"pooled": None} | {f"product:{name}": name for name in table.products}
    for place, product in places.items():
        if product in pixels:
            found[place] |= _pixel_intervals(pixels[product])
    return found | {"mean": found["mean"] | _mean_of_pixels(table, pixels)}


def _drawn(scores: np.ndarray, labels: np.ndarray, alarms: np.ndarray, drawn: np.ndarray, chosen: np.ndarray) -> Replicates:
    """(B,) replicates of the image metrics and rates of some images."""
    own, label = drawn[:, chosen], labels[chosen].astype(bool)
    alarm = alarms[chosen].astype(np.float64)
    found = dict(image_replicates(scores[chosen], labels[chosen], own))
    for name, kind in (("false_alarm_rate", ~label), ("detection_rate", label)):
        total = own[:, kind].sum(1, dtype=np.float64)
        found[name] = np.divide(own[:, kind] @ alarm[kind], total, out=np.full(len(own), np.nan), where=total > 0)
    return found


def _rates(labels: np.ndarray, alarms: np.ndarray, chosen: np.ndarray) -> dict[str, float]:
    label, alarm = labels[chosen].astype(bool), alarms[chosen].astype(np.float64)
    named = {"false_alarm_rate": alarm[~label], "detection_rate": alarm[label]}
    return {name: float(values.mean()) for name, values in named.items() if len(values)}


def _intervals(drawn: Replicates, row: Row, rates: Mapping[str, float]) -> Intervals:
    points = {name: rates[name] if name in rates else getattr(row, name, float("nan")) for name in drawn}
    made = {name: interval(drawn[name], point, point) for name, point in points.items() if not np.isnan(point)}
    return _measurable(made)


def _pixel_intervals(result: PixelResult) -> Intervals:
    return _measurable(
        {name: interval(drawn, result.values[name], result.coarse[name]) for name, drawn in result.replicates.items()}
    )


def _mean_of_pixels(table: Table, pixels: Mapping[str | None, PixelResult]) -> Intervals:
    known = [result for product, result in pixels.items() if product is not None and result.replicates]
    made = {}
    for name in known[0].replicates if known else ():
        measured = [result for result in known if not np.isnan(result.values[name])]
        if measured:
            coarse = float(np.mean([result.coarse[name] for result in measured]))
            mean = _mean([result.replicates[name] for result in measured])
            made[name] = interval(mean, getattr(table.mean, name), coarse)
    return _measurable(made)


def _mean(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over products of (B,) replicates, over those that can be measured in the replicate."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return np.asarray(np.nanmean(np.stack(parts), axis=0))


def _measurable(made: Intervals) -> Intervals:
    return {name: pair for name, pair in made.items() if not np.isnan(pair[0])}
