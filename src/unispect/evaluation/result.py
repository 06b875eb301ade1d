"""What an evaluation found, as plain values, as a table for the terminal and in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unispect.data.loader import Failure, Preparation
from unispect.evaluation.cases import Cases
from unispect.metrics.calibration import Calibrated
from unispect.metrics.intervals import Intervals
from unispect.metrics.protocol import Rates, Row, Table, interval

HEAD = (
    "",
    "images",
    "image AUROC",
    "AP",
    "F1max",
    "found at 1 %",
    "pixel AUROC",
    "AP",
    "F1max",
    "AUPRO",
    "false alarms",
    "detected",
)
SHOWN = (
    "image_auroc",
    "image_ap",
    "image_f1max",
    "detection_at_1",
    "pixel_auroc",
    "pixel_ap",
    "pixel_f1max",
    "aupro",
)
MARK = " *"  # of rows that no deployed model could have scored


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same images under a protocol of the papers that needs what a line does not have. Not deployable.

    why   what it needs
    """

    name: str
    why: str
    table: Table


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """How a model did on a test set.

    table              both protocols, the worst product and every product
    rates, total       what the threshold did, per product and over all
    promised           the false-alarm rate that calibration promised
    calibration        how that promise, and others that could have been made, were kept
    intervals          95 % bootstrap intervals, by image: "pooled", "mean" or "product:<name>" -> metric -> (low, high)
    comparisons        the papers' own protocols, not deployable
    pixel_bounds       how far a streamed pixel metric can be from the exact one: "pooled" or product -> metric -> bound
    scores, labels     (N,) each, with products and p_values: what the histograms and the ROC curve are drawn from
    unaligned          (N,) scores before products were brought to one scale; None where nothing aligns them
    pro                false positive rates (k,) and the pooled per-region overlap there (k,), for drawing
    paths              of the images, as the scores
    warnings           what may make the numbers too good
    notes              what was left out, and why
    failures           files that could not be read
    """

    table: Table
    rates: dict[str, Rates]
    total: Rates
    threshold: float
    promised: float
    calibration: Calibrated
    intervals: dict[str, Intervals]
    comparisons: tuple[Comparison, ...]
    pixel_bounds: dict[str, dict[str, float]]
    scores: np.ndarray
    labels: np.ndarray
    products: tuple[str, ...]
    p_values: np.ndarray
    unaligned: np.ndarray | None
    pro: tuple[np.ndarray, np.ndarray] | None
    paths: tuple[str, ...]
    cases: dict[str, Cases]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    failures: tuple[Failure, ...]
    preparation: Preparation

    def as_dict(self) -> dict[str, Any]:
        """The stable JSON shape; None where not measurable."""
        low, high = interval(self.total.false_alarms, self.total.good)
        return {
            **_plain(self.table),
            "products": {name: self._product(name) for name in self.table.products},
            "threshold": self.threshold,
            "false_alarm_rate": {
                "promised": self.promised,
                "realised": _or_none(self.total.false_alarm_rate),
                "low": low,
                "high": high,
            },
            "detection_rate": _or_none(self.total.detection_rate),
            "calibration": self.calibration.as_dict(),
            "intervals": {place: {k: list(pair) for k, pair in found.items()} for place, found in self.intervals.items()},
            "pixel_bounds": self.pixel_bounds,
            "comparisons": {
                one.name: {"why": one.why, "deployable": False, **_plain(one.table), "products": _rows(one.table)}
                for one in self.comparisons
            },
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """An aligned table for the terminal, with the promise and what became of it."""
        lines = _aligned([list(HEAD), *self._summary(), *self._products()])
        width, above = max(map(len, lines)), 4 + 2 * len(self.comparisons)
        ruled = [lines[0], "-" * width, *lines[1:above], "-" * width, *lines[above:]]
        warned = [f"Warning: {text}" for text in self.warnings]
        return "\n".join([*ruled, "", *warned, *self.sentences(), *self._footnotes(), *self.notes])

    def sentences(self) -> list[str]:
        """The outcome in plain words."""
        return [
            f"{_alarms_sentence(self.total, self.promised)} {_found_sentence(self.total)}",
            *([_interval_sentence(self.total)] if self.total.good else []),
            *_auroc_sentence(self.intervals, self.table),
            *([failures_sentence(self.failures)] if self.failures else []),
        ]

    def _product(self, name: str) -> dict[str, float | int | None]:
        tally = self.rates[name]
        return self.table.products[name].as_dict() | {
            "false_alarm_rate": _or_none(tally.false_alarm_rate),
            "detection_rate": _or_none(tally.detection_rate),
        }

    def _summary(self) -> Iterator[list[str]]:
        yield cells("pooled", self.table.pooled, self.total)
        yield cells("mean", self.table.mean, None)
        yield cells("worst product", self.table.worst, None)
        for one in self.comparisons:
            yield cells(f"{one.name}, pooled{MARK}", one.table.pooled, None)
            yield cells(f"{one.name}, mean{MARK}", one.table.mean, None)

    def _products(self) -> Iterator[list[str]]:
        for name, row in self.table.products.items():
            yield cells(name, row, self.rates[name])

    def _footnotes(self) -> Iterator[str]:
        """What the marked rows need, and how far streamed numbers can be off."""
        if self.comparisons:
            yield f"{MARK.strip()} Not deployable, for comparison with the papers only:"
        for one in self.comparisons:
            yield f"  {one.name}: {one.why}."
        worst = max((bound for found in self.pixel_bounds.values() for bound in found.values()), default=0.0)
        if worst > 0:
            yield f"Pixel metrics were streamed: none is further than {worst:.2g} from the exact number (--exact sorts all)."


def cells(name: str, row: Row, tally: Rates | None) -> list[str]:
    """A line of the results as text, in the columns of HEAD."""
    values = [getattr(row, metric) for metric in SHOWN]
    alarms = "" if tally is None else share(tally.false_alarms, tally.good)
    found = "" if tally is None else share(tally.detected, tally.defective)
    return [name, str(row.images), *("-" if np.isnan(value) else f"{value:.3f}" for value in values), alarms, found]


def share(part: int, whole: int) -> str:
    """`2/120  1.7 %`, always to a tenth so that columns line up, or a dash without a whole."""
    return f"{part}/{whole} {100 * part / whole:5.1f} %" if whole else "-"


def percent(rate: float) -> str:
    """`1.7 %`, `1 %` and, below one, `0.05 %`: no figures that say nothing."""
    digits = 1 if rate >= 0.01 else 2
    return f"{100 * rate:.{digits}f}".rstrip("0").rstrip(".") + " %"


def failures_sentence(failures: Sequence[Failure]) -> str:
    """How many files could not be read, and the first of them."""
    files = "1 file" if len(failures) == 1 else f"{len(failures)} files"
    return f"{files} could not be read and count nowhere; the first: {failures[0].path}: {failures[0].reason}."


def _plain(table: Table) -> dict[str, Any]:
    return {
        "pooled": table.pooled.as_dict(),
        "mean": table.mean.as_dict(),
        "worst": table.worst.as_dict(),
        "worst_products": dict(table.worst_products),
    }


def _rows(table: Table) -> dict[str, dict[str, float | int | None]]:
    return {name: row.as_dict() for name, row in table.products.items()}


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value


def _aligned(rows: list[list[str]]) -> list[str]:
    """Columns of equal width, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _alarms_sentence(total: Rates, promised: float) -> str:
    if not total.good:
        return f"No good test images: the promise of at most {percent(promised)} false alarms could not be checked."
    alarms = "1 raised an alarm" if total.false_alarms == 1 else f"{total.false_alarms or 'none'} raised an alarm"
    return (
        f"Of {total.good} good images, {alarms} ({percent(total.false_alarm_rate)}; promised at most {percent(promised)})."
    )


def _interval_sentence(total: Rates) -> str:
    """How far so many images can be trusted."""
    low, high = (percent(rate) for rate in interval(total.false_alarms, total.good))
    return f"With {total.good} good images the true false-alarm rate lies between {low} and {high} (95 % interval)."


def _found_sentence(total: Rates) -> str:
    if not total.defective:
        return "No defective test images: detection could not be measured."
    found = "1 was found" if total.detected == 1 else f"{total.detected or 'none'} were found"
    missed = total.defective - total.detected
    return f"Of {total.defective} defective images, {found} ({percent(total.detection_rate)}), {missed or 'none'} missed."


def _auroc_sentence(intervals: Mapping[str, Intervals], table: Table) -> Iterator[str]:
    """The two headline numbers with their intervals, and the product that the mean hides."""
    known = [(name, row, intervals.get(name, {}).get("image_auroc")) for name, row in _headlines(table)]
    said = [f"{name} {row.image_auroc:.3f} [{pair[0]:.3f}, {pair[1]:.3f}]" for name, row, pair in known if pair]
    if said:
        lowest = table.worst_products["image_auroc"]
        yield (
            f"Image AUROC with 95 % bootstrap intervals by image: {', '.join(said)}; "
            f"worst product {lowest} {table.worst.image_auroc:.3f}."
        )


def _headlines(table: Table) -> tuple[tuple[str, Row], ...]:
    return ("pooled", table.pooled), ("mean", table.mean)
