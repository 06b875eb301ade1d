"""The images of a test set that a person should look at: misses, false alarms, and a few right decisions."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field, replace
from hashlib import sha256

import numpy as np

from unispect.data.records import Record
from unispect.types import Finding

UNNAMED = "all"  # the product of records that name none
WORST, TYPICAL = 6, 3  # cases kept of each kind and product


def product_of(record: Record) -> str:
    """The name under which a record is counted."""
    return UNNAMED if record.product is None else record.product


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
class Chosen:
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
