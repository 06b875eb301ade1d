"""Inspector + labelled test records -> Evaluation.

What is reported first was scored without product, label, defect, mask and group: they are taken off each record before
it is handed over. The papers' own protocols, where they are asked for, run beside it and are marked.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from unispect.data.datasets import read_data
from unispect.data.leak import Seen
from unispect.data.loader import Failure, Preparation
from unispect.data.records import Record
from unispect.errors import DataError, unknown_name
from unispect.evaluation.cases import Case, Chosen, product_of
from unispect.evaluation.result import Comparison, Evaluation, failures_sentence
from unispect.metrics.calibration import calibrated
from unispect.metrics.intervals import intervals
from unispect.metrics.pixels import EXACT, PixelResult, Pixels
from unispect.metrics.protocol import Rates, Table, rates, table
from unispect.types import Finding

IMAGE_REPLICATES, PIXEL_REPLICATES = 1000, 200  # of the bootstrap
GIVEN = "the detector is told the product of each test image"
NORMALISED = "scores of each product are scaled to 0..1 by the extremes of its whole test set"


class Inspects(Protocol):
    """What evaluation needs of an inspector: findings in the order of the records, one for each.

    seen   the images it has learnt from or was calibrated on
    smallest_false_alarm_rate   that its calibration images support
    takes_product   whether it would score differently if told the product
    """

    @property
    def preparation(self) -> Preparation: ...
    @property
    def threshold(self) -> float: ...
    @property
    def false_alarm_rate(self) -> float: ...
    @property
    def smallest_false_alarm_rate(self) -> float: ...
    @property
    def takes_product(self) -> bool: ...
    @property
    def seen(self) -> Seen: ...
    def findings(self, records: Sequence[Record]) -> Iterator[tuple[Record, Finding | Failure]]: ...
    def findings_given(self, records: Sequence[Record]) -> Iterator[tuple[Record, Finding | Failure, Finding | None]]: ...


def evaluate(
    inspector: Inspects,
    data: Path | str | Sequence[Record],
    ignore_masks: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
    *,
    comparisons: bool = True,
    exact: bool | None = None,
    bootstrap: bool = True,
) -> Evaluation:
    """Score the labelled test images of a folder, of a manifest or of a list of records, and compare with the labels.

    ignore_masks   products whose masks are boxes rather than outlines: left out of the pixel metrics
    progress       called with (images done, images in all) after each image
    comparisons    the papers' own protocols too: label given, normalised by the test set; marked as not deployable
    exact          sort all pixels; False: stream them in constant memory with a bound of the error. Unless given, exact
                   up to 2e8 pixels
    bootstrap      95 % intervals, by image

    Raises DataError without labelled test images, and LeakError where a test image was learnt from, held out or used to
    calibrate, recognised by its content.
    """
    records = sorted(labelled_test(data), key=product_of)
    masked = _masked_products(records, ignore_masks)
    warnings = inspector.seen.refuse(records)
    with ExitStack() as stack:
        tally = _Tally(inspector.preparation, masked, len(records), exact, bootstrap, stack)
        told = comparisons and inspector.takes_product
        for done, (record, result, given) in enumerate(_results(inspector, records, told), start=1):
            tally.add(record, result, (given or result) if told else None)
            if progress is not None:
                progress(done, len(records))
        return tally.evaluation(inspector, ignore_masks, warnings, comparisons)


def labelled_test(data: Path | str | Sequence[Record]) -> list[Record]:
    """Test records with a label; those of the train split are good by assumption and would flatter the result."""
    records: Sequence[Record] = read_data(data) if isinstance(data, str | Path) else data
    chosen = [record for record in records if record.split == "test" and record.label is not None]
    if not chosen:
        where = str(data) if isinstance(data, str | Path) else f"the {len(records)} records given"
        raise DataError(
            f"{where}: no labelled test images to evaluate on: expected <product>/test/good/ with good images and "
            "<product>/test/<defect>/ with defective ones (masks, where known, in <product>/ground_truth/<defect>/)"
        )
    return chosen


def _masked_products(records: Sequence[Record], ignored: Collection[str]) -> frozenset[str]:
    """Products with a mask for at least one defect, less those whose masks are to be ignored."""
    known = {product_of(record) for record in records}
    for name in ignored:
        if name not in known:
            raise DataError(f"ignore_masks: {unknown_name('product', name, known)}")
    return frozenset(product_of(record) for record in records if record.mask is not None) - frozenset(ignored)


def _results(
    inspector: Inspects, records: Sequence[Record], given: bool
) -> Iterator[tuple[Record, Finding | Failure, Finding | None]]:
    """Findings beside the full records, from an inspector that saw only their paths, and their product where given."""
    bare = [replace(record, label=None, defect=None, mask=None, group=None) for record in records]
    anonymous = [replace(record, product=None) for record in bare]
    found: Iterator[tuple[Record, Finding | Failure, Finding | None]] = (
        inspector.findings_given(bare)
        if given
        else ((record, result, None) for record, result in inspector.findings(anonymous))
    )
    for record, (seen, result, told) in zip(records, found, strict=True):
        if seen.path != record.path:
            raise ValueError(f"inspector.findings: gave {seen.path} where {record.path} was due: keep the order")
        yield record, result, told


@dataclass(frozen=True, slots=True)
class _Seen:
    """What remains of an image once its map has been counted."""

    path: str
    product: str
    label: int
    score: float
    anomalous: bool
    p_value: float
    unaligned: float | None
    given: float | None


@dataclass(slots=True)
class _Tally:
    """What has been seen so far. The images of a product come one after another."""

    preparation: Preparation
    masked: frozenset[str]
    images: int
    exact: bool | None
    bootstrap: bool
    stack: ExitStack
    pixels: Pixels | None = None
    given_pixels: Pixels | None = None
    seen: list[_Seen] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    chosen: defaultdict[str, Chosen] = field(default_factory=lambda: defaultdict(Chosen))
    without_mask: Counter[str] = field(default_factory=Counter)
    empty_mask: Counter[str] = field(default_factory=Counter)

    def add(self, record: Record, result: Finding | Failure, given: Finding | Failure | None) -> None:
        """Count one image. What the inspector says when told the product is what it says anyway, where it knows none."""
        if isinstance(result, Failure) or isinstance(given, Failure):
            self.failures += [one for one in (result,) if isinstance(one, Failure)]
            return
        _check_finite(record, result)
        product, told = product_of(record), None if given is None else given.score
        truth = self._truth(record, result)
        self.seen.append(
            _Seen(
                str(record.path),
                product,
                record.label or 0,
                result.score,
                result.anomalous,
                result.p_value,
                result.unaligned,
                told,
            )
        )
        self.chosen[product].offer(Case(record, result, truth))
        if product in self.masked:
            self._add_pixels(product, record, result, given, truth)

    def _truth(self, record: Record, finding: Finding) -> np.ndarray | None:
        """The mask at the size of the map; None where there is none."""
        if record.mask is None:
            return None
        height, width = finding.map.shape
        if height != width:
            raise ValueError(f"finding.map: shape {finding.map.shape}: a square map was expected, as masks are square")
        return self.preparation.mask(record.mask, height)

    def _add_pixels(
        self, product: str, record: Record, finding: Finding, given: Finding | None, truth: np.ndarray | None
    ) -> None:
        """Good images count with an empty mask; a defect whose place is unknown cannot count."""
        if record.label == 1 and truth is None:
            self.without_mask[product] += 1
            return
        if record.label == 1 and truth is not None and not truth.any():
            self.empty_mask[product] += 1
        mask = np.zeros(finding.map.shape, bool) if truth is None else truth
        if self.pixels is None:
            self.pixels = self._opened(finding.map.size, PIXEL_REPLICATES if self.bootstrap else 0)
        self.pixels.add(product, finding.map, mask, len(self.seen) - 1)
        if given is not None:
            if self.given_pixels is None:
                self.given_pixels = self._opened(finding.map.size, 0)
            self.given_pixels.add(product, given.map, mask)

    def _opened(self, places: int, replicates: int) -> Pixels:
        exact = places * self.images <= EXACT if self.exact is None else self.exact
        return self.stack.enter_context(Pixels(exact, replicates))

    def evaluation(
        self, inspector: Inspects, ignored: Collection[str], warnings: Sequence[str], comparisons: bool
    ) -> Evaluation:
        """All numbers, once everything has been seen."""
        if not self.seen:
            raise DataError(f"no test image could be read: {failures_sentence(self.failures)}")
        scores, labels, alarms, p_values = (
            np.array([getattr(one, name) for one in self.seen]) for name in ("score", "label", "anomalous", "p_value")
        )
        names = [one.product for one in self.seen]
        found = {} if self.pixels is None else self.pixels.results()
        results = table(scores, labels, names, _values(found))
        by_product = self._rates(names, labels, alarms)
        return Evaluation(
            table=results,
            rates=by_product,
            total=rates(labels, alarms),
            threshold=inspector.threshold,
            promised=inspector.false_alarm_rate,
            calibration=calibrated(p_values[labels == 0], inspector.false_alarm_rate, inspector.smallest_false_alarm_rate),
            intervals=intervals(scores, labels, alarms, names, results, found, IMAGE_REPLICATES) if self.bootstrap else {},
            comparisons=tuple(self._comparisons(scores, labels, names, found)) if comparisons else (),
            pixel_bounds={product or "pooled": result.bounds for product, result in found.items()},
            scores=scores,
            labels=labels,
            products=tuple(names),
            p_values=p_values,
            unaligned=self._unaligned(),
            pro=None if self.pixels is None else self.pixels.overlap_curve(),
            paths=tuple(one.path for one in self.seen),
            cases={name: self.chosen[name].cases() for name in by_product},
            warnings=tuple(warnings),
            notes=tuple(self._notes(by_product, ignored)),
            failures=tuple(self.failures),
            preparation=self.preparation,
        )

    @staticmethod
    def _rates(names: Sequence[str], labels: np.ndarray, alarms: np.ndarray) -> dict[str, Rates]:
        own = {name: np.array([other == name for other in names]) for name in sorted(set(names))}
        return {name: rates(labels[chosen], alarms[chosen]) for name, chosen in own.items()}

    def _unaligned(self) -> np.ndarray | None:
        values = [one.unaligned for one in self.seen]
        return None if None in values else np.array(values, dtype=np.float64)

    def _comparisons(
        self, scores: np.ndarray, labels: np.ndarray, names: Sequence[str], found: dict[str | None, PixelResult]
    ) -> Iterator[Comparison]:
        """The protocols of the papers: each needs the product's name, its whole test set, or both."""
        given = np.array([one.given for one in self.seen if one.given is not None])
        values = {} if self.given_pixels is None else _values(self.given_pixels.results())
        if len(given):
            yield Comparison("label given", GIVEN, table(given, labels, names, values))
        yield Comparison("test-normalised", NORMALISED, _normalised(scores, labels, names, _values(found), self.pixels))
        if len(given):
            both = _normalised(given, labels, names, values, self.given_pixels)
            yield Comparison("both", f"{GIVEN}, and {NORMALISED}: as HGAD and CFLOW-AD report themselves", both)

    def _notes(self, by_product: dict[str, Rates], ignored: Collection[str]) -> Iterator[str]:
        """What was left out of the pixel metrics, and why."""
        bare = [name for name in by_product if name not in self.masked and name not in ignored]
        if bare:
            yield f"No masks, so no pixel metrics: {', '.join(bare)}."
        if ignored:
            yield f"Masks ignored as asked, so no pixel metrics: {', '.join(sorted(ignored))}."
        for name, count in sorted(self.without_mask.items()):
            yield f"{name}: {_images(count)} without a mask left out of the pixel metrics."
        for name, count in sorted(self.empty_mask.items()):
            yield f"{name}: {_images(count)} with a mask that is empty at the size of the map; kept, all pixels normal."


def _values(found: dict[str | None, PixelResult]) -> dict[str | None, dict[str, float]]:
    return {product: result.values for product, result in found.items()}


def _normalised(
    scores: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    pixels: dict[str | None, dict[str, float]],
    collected: Pixels | None,
) -> Table:
    """The same table with each product's scores and maps scaled by their own extremes; only what is pooled changes."""
    product, scaled = np.asarray(names, dtype=object), np.array(scores, dtype=np.float64)
    for name in set(names):
        own = product == name
        low, high = float(scaled[own].min()), float(scaled[own].max())
        scaled[own] = (scaled[own] - low) / (high - low if high > low else 1.0)
    pooled: dict[str | None, dict[str, float]] = {} if collected is None else {None: collected.normalised()}
    return table(scaled, labels, names, {**pixels, **pooled})


def _images(count: int) -> str:
    return "1 defective image" if count == 1 else f"{count} defective images"


def _check_finite(record: Record, finding: Finding) -> None:
    """A score that is no number has no rank and must not pass for a normal one."""
    if not np.isfinite(finding.score) or not np.isfinite(finding.map).all():
        raise DataError(
            f"{record.path}: score {finding.score}, or a place of its map, is not a finite number: the model is "
            "damaged or its training diverged; fit it again"
        )
