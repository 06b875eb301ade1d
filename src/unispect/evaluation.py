"""Inspector + labelled test records -> both protocols, realised rates, and the cases worth looking at.

The inspector never learns what it is asked about: product, label, defect, mask and group are taken off each record
before it is handed over. Maps wait for their metrics in a temporary file, so memory does not grow with the test set.
"""

from __future__ import annotations

import heapq
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from unispect.data.folder import read_folder
from unispect.data.loader import Failure, Preparation
from unispect.data.records import Record
from unispect.errors import DataError, unknown_name
from unispect.metrics.protocol import Rates, Row, Table, interval, rates, table
from unispect.types import Finding

UNNAMED = "all"  # the product of records that name none
WORST, TYPICAL = 6, 3  # cases kept of each kind and product


class Inspects(Protocol):
    """What evaluation needs of an inspector: findings in the order of the records, one for each."""

    @property
    def preparation(self) -> Preparation: ...
    @property
    def threshold(self) -> float: ...
    @property
    def false_alarm_rate(self) -> float: ...
    def findings(self, records: Sequence[Record]) -> Iterator[tuple[Record, Finding | Failure]]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One image, what was found, and what should have been: truth (h, w) bool is the mask at the map's size."""

    record: Record
    finding: Finding
    truth: np.ndarray | None

    @property
    def outcome(self) -> str:
        """Whether the decision was right, in two words at most."""
        if self.record.label == 1:
            return "detected" if self.finding.anomalous else "missed"
        return "false alarm" if self.finding.anomalous else "passed"


@dataclass(frozen=True, slots=True)
class Cases:
    """The images of one product that a person should see.

    highest_good       the good images closest to an alarm or beyond, highest score first
    lowest_defective   the defects missed or nearly so, lowest score first
    detected, passed   a few right decisions, chosen by chance but always the same ones
    """

    highest_good: tuple[Case, ...]
    lowest_defective: tuple[Case, ...]
    detected: tuple[Case, ...]
    passed: tuple[Case, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """How a model did on a test set.

    table              both protocols and every product
    rates, total       what the threshold did, per product and over all
    promised           the false-alarm rate that calibration promised
    scores, labels     (N,) each, with products: what the histograms and the ROC curve are drawn from
    notes              what was left out, and why
    failures           files that could not be read
    """

    table: Table
    rates: dict[str, Rates]
    total: Rates
    threshold: float
    promised: float
    scores: np.ndarray
    labels: np.ndarray
    products: tuple[str, ...]
    cases: dict[str, Cases]
    notes: tuple[str, ...]
    failures: tuple[Failure, ...]
    preparation: Preparation

    def as_dict(self) -> dict[str, Any]:
        """The stable JSON shape; None where not measurable."""
        return {
            "pooled": self.table.pooled.as_dict(),
            "mean": self.table.mean.as_dict(),
            "products": {name: self._product(name) for name in self.table.products},
            "threshold": self.threshold,
            "false_alarm_rate": {"promised": self.promised, "realised": _or_none(self.total.false_alarm_rate)},
        }

    def text(self) -> str:
        """An aligned table for the terminal, with the promise and what became of it."""
        lines = _aligned([HEAD, *self._lines()])
        width = max(map(len, lines))
        ruled = [lines[0], "-" * width, *lines[1:3], "-" * width, *lines[3:]]
        return "\n".join([*ruled, "", *self.sentences(), *self.notes])

    def sentences(self) -> list[str]:
        """The outcome in plain words."""
        return [
            f"{_alarms_sentence(self.total, self.promised)} {_found_sentence(self.total)}",
            *([_interval_sentence(self.total)] if self.total.good else []),
            *([_failures_sentence(self.failures)] if self.failures else []),
        ]

    def _product(self, name: str) -> dict[str, float | int | None]:
        tally = self.rates[name]
        return self.table.products[name].as_dict() | {
            "false_alarm_rate": _or_none(tally.false_alarm_rate),
            "detection_rate": _or_none(tally.detection_rate),
        }

    def _lines(self) -> Iterator[list[str]]:
        yield cells("pooled", self.table.pooled, self.total)
        yield cells("mean", self.table.mean, None)
        for name, row in self.table.products.items():
            yield cells(name, row, self.rates[name])


HEAD = ["", "images", "image AUROC", "AP", "F1max", "pixel AUROC", "AP", "AUPRO", "false alarms", "detected"]


def evaluate(
    inspector: Inspects,
    data: Path | str | Sequence[Record],
    ignore_masks: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score the labelled test images of a folder, or of a list of records, and compare with the labels.

    ignore_masks   products whose masks are boxes rather than outlines: left out of the pixel metrics
    progress       called with (images done, images in all) after each image
    """
    records = _labelled_test(data)
    masked = _masked_products(records, ignore_masks)
    with _Pixels() as pixels:
        tally = _Tally(preparation=inspector.preparation, pixels=pixels, masked=masked)
        for done, (record, result) in enumerate(_results(inspector, records), start=1):
            tally.add(record, result)
            if progress is not None:
                progress(done, len(records))
        return tally.evaluation(inspector.threshold, inspector.false_alarm_rate, ignore_masks)


def product_of(record: Record) -> str:
    """The name under which a record is counted."""
    return UNNAMED if record.product is None else record.product


def cells(name: str, row: Row, tally: Rates | None) -> list[str]:
    """A line of the results as text, in the columns of HEAD."""
    values = (row.image_auroc, row.image_ap, row.image_f1max, row.pixel_auroc, row.pixel_ap, row.aupro)
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


def _failures_sentence(failures: Sequence[Failure]) -> str:
    files = "1 file" if len(failures) == 1 else f"{len(failures)} files"
    return f"{files} could not be read and count nowhere; the first: {failures[0].path}: {failures[0].reason}."


def _labelled_test(data: Path | str | Sequence[Record]) -> list[Record]:
    """Test records with a label; those of the train split are good by assumption and would flatter the result."""
    records: Sequence[Record] = read_folder(data) if isinstance(data, str | Path) else data
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


def _results(inspector: Inspects, records: Sequence[Record]) -> Iterator[tuple[Record, Finding | Failure]]:
    """Findings beside the full records, from an inspector that saw only their paths."""
    anonymous = [replace(record, product=None, label=None, defect=None, mask=None, group=None) for record in records]
    for record, (seen, result) in zip(records, inspector.findings(anonymous), strict=True):
        if seen.path != record.path:
            raise ValueError(f"inspector.findings: gave {seen.path} where {record.path} was due: keep the order")
        yield record, result


class _Pixels:
    """Maps and masks of the products whose defects are known by pixel, in two temporary files."""

    def __init__(self) -> None:
        self._products: list[str] = []
        self._shape: tuple[int, ...] = (0, 0)

    def __enter__(self) -> Self:
        with ExitStack() as files:
            self._maps = files.enter_context(tempfile.TemporaryFile(prefix="unispect-maps-"))
            self._masks = files.enter_context(tempfile.TemporaryFile(prefix="unispect-masks-"))
            self._files = files.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def add(self, product: str, scores: np.ndarray, mask: np.ndarray) -> None:
        """Append one map (h, w) and its mask (h, w)."""
        self._products.append(product)
        self._shape = scores.shape
        self._maps.write(np.ascontiguousarray(scores, dtype=np.float32).data)
        self._masks.write(np.ascontiguousarray(mask, dtype=bool).data)

    def arrays(self) -> tuple[Sequence[np.ndarray] | np.ndarray, Sequence[np.ndarray] | np.ndarray, list[str]]:
        """Maps (M, h, w) float32, masks (M, h, w) bool, product names (M,)."""
        if not self._products:
            return (), (), []
        shape = (len(self._products), *self._shape)
        self._maps.flush()
        self._masks.flush()
        maps = np.memmap(self._maps, dtype=np.float32, mode="r", shape=shape)
        return maps, np.memmap(self._masks, dtype=bool, mode="r", shape=shape), self._products


class _Largest:
    """The few cases with the largest keys of all that were offered."""

    def __init__(self, size: int) -> None:
        self._size, self._offered = size, 0
        self._heap: list[tuple[float, int, Case]] = []

    def offer(self, key: float, case: Case) -> None:
        """Keep the case if it belongs; of equal keys the first offered wins. The map is copied off its batch."""
        self._offered += 1
        if len(self._heap) < self._size or key > self._heap[0][0]:
            own = replace(case, finding=replace(case.finding, map=case.finding.map.copy()))
            heapq.heappush(self._heap, (key, -self._offered, own))
        if len(self._heap) > self._size:
            heapq.heappop(self._heap)

    def cases(self) -> tuple[Case, ...]:
        """What was kept, largest key first."""
        return tuple(case for *_, case in sorted(self._heap, key=lambda item: item[:2], reverse=True))


@dataclass(slots=True)
class _Chosen:
    """Collects the Cases of one product."""

    highest_good: _Largest = field(default_factory=lambda: _Largest(WORST))
    lowest_defective: _Largest = field(default_factory=lambda: _Largest(WORST))
    detected: _Largest = field(default_factory=lambda: _Largest(TYPICAL))
    passed: _Largest = field(default_factory=lambda: _Largest(TYPICAL))

    def offer(self, case: Case) -> None:
        """Show a case to the two collections that it may enter."""
        score, chance = case.finding.score, _chance(case.record)
        if case.record.label == 1:
            self.lowest_defective.offer(-score, case)
        else:
            self.highest_good.offer(score, case)
        if case.outcome == "detected":
            self.detected.offer(chance, case)
        elif case.outcome == "passed":
            self.passed.offer(chance, case)

    def cases(self) -> Cases:
        """What was kept."""
        kept = (self.highest_good, self.lowest_defective, self.detected, self.passed)
        return Cases(*(collection.cases() for collection in kept))


def _chance(record: Record) -> float:
    """A number in [0, 1) that depends on the name of the file alone, not on scores, order or place on disk."""
    name = "/".join((product_of(record), record.path.parent.name, record.path.name))
    return int.from_bytes(sha256(name.encode(errors="surrogateescape")).digest()[:6], "big") / 2**48


@dataclass(slots=True)
class _Tally:
    """What has been seen so far."""

    preparation: Preparation
    pixels: _Pixels
    masked: frozenset[str]
    seen: list[tuple[str, int, float, bool]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    chosen: defaultdict[str, _Chosen] = field(default_factory=lambda: defaultdict(_Chosen))
    without_mask: Counter[str] = field(default_factory=Counter)
    empty_mask: Counter[str] = field(default_factory=Counter)

    def add(self, record: Record, result: Finding | Failure) -> None:
        """Count one image."""
        if isinstance(result, Failure):
            self.failures.append(result)
            return
        _check_finite(record, result)
        product = product_of(record)
        truth = self._truth(record, result)
        self.seen.append((product, record.label or 0, result.score, result.anomalous))
        self.chosen[product].offer(Case(record, result, truth))
        if product in self.masked:
            self._add_pixels(product, record, result, truth)

    def _truth(self, record: Record, finding: Finding) -> np.ndarray | None:
        """The mask at the size of the map; None where there is none."""
        if record.mask is None:
            return None
        height, width = finding.map.shape
        if height != width:
            raise ValueError(f"finding.map: shape {finding.map.shape}: a square map was expected, as masks are square")
        return self.preparation.mask(record.mask, height)

    def _add_pixels(self, product: str, record: Record, finding: Finding, truth: np.ndarray | None) -> None:
        """Good images count with an empty mask; a defect whose place is unknown cannot count."""
        if record.label == 1 and truth is None:
            self.without_mask[product] += 1
            return
        if record.label == 1 and truth is not None and not truth.any():
            self.empty_mask[product] += 1
        self.pixels.add(product, finding.map, np.zeros(finding.map.shape, bool) if truth is None else truth)

    def evaluation(self, threshold: float, promised: float, ignored: Collection[str]) -> Evaluation:
        """All numbers, once everything has been seen."""
        if not self.seen:
            raise DataError(f"no test image could be read: {_failures_sentence(self.failures)}")
        products, labels, scores, alarms = (np.array(column) for column in zip(*self.seen, strict=True))
        names = [str(name) for name in products]
        by_product = {name: rates(labels[products == name], alarms[products == name]) for name in sorted(set(names))}
        return Evaluation(
            table=table(scores, labels, names, *self.pixels.arrays()),
            rates=by_product,
            total=rates(labels, alarms),
            threshold=threshold,
            promised=promised,
            scores=scores,
            labels=labels,
            products=tuple(names),
            cases={name: self.chosen[name].cases() for name in by_product},
            notes=tuple(self._notes(by_product, ignored)),
            failures=tuple(self.failures),
            preparation=self.preparation,
        )

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


def _images(count: int) -> str:
    return "1 defective image" if count == 1 else f"{count} defective images"


def _check_finite(record: Record, finding: Finding) -> None:
    """A score that is no number has no rank and must not pass for a normal one."""
    if not np.isfinite(finding.score) or not np.isfinite(finding.map).all():
        raise DataError(
            f"{record.path}: score {finding.score}, or a place of its map, is not a finite number: the model is "
            "damaged or its training diverged; fit it again"
        )
