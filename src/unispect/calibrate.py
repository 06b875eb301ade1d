"""Decide anew without learning anew: other images, another promise, a cheaper threshold, or what people said of findings.

What would change is a `Change`, to be looked at; `keep` makes it the model's next version, which can be undone. All of it
works on models as they were learnt and as they were exported, there without torch.
"""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np

from unispect.config import write_toml
from unispect.data.loader import Failure
from unispect.data.records import Record, content_hash
from unispect.decide.groups import Spread, spread
from unispect.decide.judge import Calibration, DecisionSettings, Judge, Said, calibration_of
from unispect.decide.operating import Costs, OperatingPoint, cheapest
from unispect.decide.promise import promise, revised
from unispect.decide.versions import Versions
from unispect.errors import CalibrationError, ConfigError, DataError
from unispect.store import MODEL, kind_of, pack_json, rewrite

NAMED = 3  # paths in a message
NUMBERS = ("score", "peak", "median", "novelty")  # of a finding
KEPT = ("path", *NUMBERS, "nearest", "unknown")
Row = Mapping[str, Any]


class Decides(Protocol):
    """A model, as it was learnt or as it was exported.

    learnt   content hashes of the images that it has learnt from
    """

    versions: Versions
    judge: Judge

    @property
    def products(self) -> Sequence[str]: ...
    @property
    def learnt(self) -> frozenset[str]: ...
    def said(self, records: Sequence[Record], strict: bool = False) -> Iterator[tuple[Record, Said | Failure]]: ...
    def with_versions(self, versions: Versions) -> Self: ...


M = TypeVar("M", bound=Decides)


@dataclass(frozen=True, slots=True)
class History:
    """What would have become of findings that were made.

    good, defective   images that were confirmed to be, with the number that raised an alarm (before, after)
    alarms            of all findings (before, after)
    unreviewed        alarms of which nobody said what they were, taken for false ones
    lost              defective images that raised an alarm and would no more
    """

    findings: int
    alarms: tuple[int, int]
    good: int
    good_alarms: tuple[int, int]
    defective: int
    defective_alarms: tuple[int, int]
    unreviewed: int
    lost: tuple[str, ...]

    def text(self) -> str:
        """For people."""
        lines = [
            f"On {self.findings} findings: alarms {_change(self.alarms)}",
            f"  of {self.good} images confirmed good, {_change(self.good_alarms)}",
            f"  of {self.defective} images confirmed defective, {_change(self.defective_alarms)}",
        ]
        if self.lost:
            lines.append(f"  no more found: {_some(self.lost)}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Change(Generic[M]):
    """What deciding anew changes, before it is kept.

    before, after   the model under the version in force and under the new one
    notes           what a person should know
    spread          between groups of the calibration images, where they have groups
    point           the cheapest threshold, where one was asked for
    history         what would have become of findings, where they were given
    """

    before: M
    after: M
    notes: tuple[str, ...] = ()
    spread: Spread | None = None
    point: OperatingPoint | None = None
    history: History | None = None

    def text(self) -> str:
        """For people."""
        old, new = self.before.judge, self.after.judge
        version = self.after.versions.current
        parts = [f"Version {version.number}: {version.reason}", _table(old, new), f"Promise: {promise(new)}"]
        parts += [part.text() for part in (self.point, self.history) if part is not None]
        parts += [_spread_text(self.spread)] if self.spread is not None else []
        return "\n".join([*parts, *(f"Note: {note}" for note in self.notes)])

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        version = self.after.versions.current
        return {
            "version": version.number,
            "reason": version.reason,
            "before": _numbers(self.before.judge),
            "after": _numbers(self.after.judge),
            "promise": promise(self.after.judge),
            "notes": list(self.notes),
            "spread": None if self.spread is None else asdict(self.spread),
            "point": None if self.point is None else asdict(self.point),
            "history": None if self.history is None else asdict(self.history),
        }


# Ways to decide anew.


def recalibrated(
    model: M,
    records: Sequence[Record],
    changes: Mapping[str, Any] | None = None,
    add: bool = False,
    strict: bool = False,
    command: str = "recalibrated",
) -> Change[M]:
    """Thresholds from other good images than those it was fitted with.

    records   of which the good training images are taken; test images are not
    changes   settings of [decision] that change with them
    add       to the present calibration images instead of in their place
    strict    the first broken image is an error instead of being left out

    Raises DataError without good images, CalibrationError where the model has learnt from one of them or they are too few
    for the promise.
    """
    normal = [record for record in records if record.split == "train" and record.label != 1]
    if not normal:
        raise DataError(f"data: {len(records)} images, none of them to calibrate on: expected good images in train/good")
    contents, notes = _new(model, normal, set(model.versions.images) if add else set())
    found, readable, more = _calibration(model, list(contents), strict, add)
    if not readable:
        raise DataError(f"none of {len(normal)} images is left to calibrate on: {'; '.join([*notes, *more])}")
    joined = model.versions.current.calibration.with_also(found) if add else found
    reason = f"calibrated on {len(readable)} {'more ' if add else ''}images"
    images = {contents[record]: str(record.path) for record in readable}
    decision = _decision(model, changes, not add)
    versions = model.versions.then(command, reason, decision, joined, images)
    return _changed(model, versions, [*notes, *more])


def _calibration(
    model: Decides, records: Sequence[Record], strict: bool, add: bool
) -> tuple[Calibration, list[Record], list[str]]:
    """What the model says of the images that can be read, which these are, and notes."""
    readable: list[Record] = []
    failures: list[str] = []

    def said() -> Iterator[Said]:
        for record, one in model.said(records, strict):
            if isinstance(one, Failure):
                failures.append(f"{one.path}: {one.reason}")
            else:
                readable.append(record)
                yield one

    judge, known = model.judge, model.judge.calibration.regions
    base = known.base if add and known is not None else None
    found = calibration_of(said(), readable, model.products, judge.decision, judge.preparation, base)
    notes = [f"left out, as they cannot be read: {len(failures)} ({_some(failures)})"] if failures else []
    strange = int((found.novelty > model.judge.unknown_threshold).sum())
    notes += [f"{strange} of {len(readable)} images are unlike every product that the model knows"] if strange else []
    return found, readable, notes


def redecided(model: M, changes: Mapping[str, Any], command: str = "redecided") -> Change[M]:
    """Another promise or a fixed score, by the present calibration images.

    Raises ConfigError for an impossible setting, CalibrationError where the images are too few for the promise.
    """
    told = ", ".join(f"{name}={value}" for name, value in changes.items())
    return _changed(model, model.versions.then(command, told, _decision(model, changes)), [])


def cheaper(model: M, labelled: Sequence[Record], costs: Costs, strict: bool = False, command: str = "cheaper") -> Change[M]:
    """The threshold with the lowest expected cost on labelled images, which no evaluation may use from then on.

    Raises CalibrationError where the model has learnt from one of them, or there are too few of either kind.
    """
    known = [record for record in labelled if record.label is not None]
    contents, notes = _new(model, known, set())
    scores: dict[int, list[float]] = {0: [], 1: []}
    images = {}
    for record, one in model.said(list(contents), strict):
        if isinstance(one, Failure):
            notes.append(f"left out, as it cannot be read: {one.path}: {one.reason}")
        elif record.label is not None:
            scores[record.label].append(one.score)
            images[contents[record]] = str(record.path)
    point = cheapest(np.array(scores[0]), np.array(scores[1]), costs)
    reason = (
        f"cheapest threshold at {costs.miss:g} a miss, {costs.false_alarm:g} a false alarm, {costs.defect_rate:g} defective"
    )
    decision = _decision(model, {"threshold": point.threshold})
    return replace(_changed(model, model.versions.then(command, reason, decision, images=images), notes), point=point)


def reconsidered(
    model: M,
    findings: Iterable[Row],
    truths: Mapping[str, str],
    changes: Mapping[str, Any] | None = None,
    add: bool = False,
    command: str = "reconsidered",
) -> Change[M]:
    """Thresholds from what the line has made: all findings but those on images that are known to be defective.

    Taking the confirmed false alarms alone would fill the calibration with the highest scores of normal images. The whole
    history is a sample of what the line makes, and an alarm of which nobody said what it was counts as false, which errs
    to the side of fewer alarms.

    findings   as `Finding.as_dict` gives them; of several on one path the last counts
    truths     path -> "good" or "defective" (see unispect.feedback)
    """
    rows = _last(findings)
    good = [row for row in rows if _is_good(row, truths)]
    if not good:
        raise DataError(
            f"history: {len(rows)} findings, none of them on an image that may be good: expected a log of the line"
        )
    known = {str(row["path"]) for row in rows}
    astray = sorted(path for path in truths if path not in known)
    notes = [f"{len(astray)} verdicts are on images without a finding in the history ({_some(astray)})"] if astray else []
    found = _of_findings(good)
    joined = model.versions.current.calibration.with_also(found) if add else found
    versions = model.versions.then(command, f"history of {len(good)} findings", _decision(model, changes, not add), joined)
    change = _changed(model, versions, notes)
    history = _history(model.judge, change.after.judge, rows, truths)
    if history.unreviewed:
        notes.append(f"{history.unreviewed} alarms were not reviewed and count as false alarms")
    if history.lost:
        notes.append(f"{len(history.lost)} defective images would no more be found")
    return replace(change, history=history, notes=tuple(notes))


def undone(model: M, command: str = "undone") -> Change[M]:
    """As before the version in force; undone again, as before that."""
    return _changed(model, model.versions.undone(command), [])


def keep(change: Change[Any], folder: Path, out: Path | None = None, overwrite: bool = False) -> Path:
    """Make the change part of the model in a folder, in place unless `out` is given; nothing else in it is touched.

    Raises StoreError where the folder is no model, or something else is in the way.
    """
    versions, kind = change.after.versions, kind_of(folder)

    def changed(files: Mapping[str, bytes]) -> dict[str, bytes]:
        card = revised(files["card.md"].decode(), change.after.judge).encode()
        if kind == MODEL:
            config = tomllib.loads(files["config.toml"].decode()) | {"decision": versions.current.decision.as_dict()}
            told = {"config.toml": write_toml(config).encode(), "calibration.json": pack_json(versions.as_list())}
            return told | {"card.md": card}
        decision = json.loads(files["decision.json"]) | {"versions": versions.as_list()}
        return {"decision.json": pack_json(decision), "card.md": card}

    return rewrite(folder, out or folder, changed, overwrite or out is None)


# Parts.


def _decision(model: Decides, changes: Mapping[str, Any] | None, anew: bool = False) -> DecisionSettings:
    """The settings in force with some changed. A rate takes the place of a fixed score, unless one comes with it.

    anew   by calibration images none of which it was fitted with
    """
    given = dict(changes or {})
    now = model.judge.decision.guarantee
    if "cross" in (now, given.get("guarantee", now)) and not anew and given.get("guarantee", now) != now:
        raise ConfigError(
            f"guarantee: the model has {now!r}, which cannot become {given['guarantee']!r} by the images that it has: "
            "'cross' is made when a model is fitted (split.cross), and left by calibrating it on other images"
        )
    if now == "cross" and anew:
        given.setdefault("guarantee", "image")
    if "false_alarm_rate" in given:
        given.setdefault("threshold", None)
    return replace(model.judge.decision, **given)


def _new(model: Decides, records: Sequence[Record], known: set[str]) -> tuple[dict[Record, str], list[str]]:
    """Content hash of each image that is not there twice or known already; what was left out, in words.

    Raises CalibrationError where the model has learnt from one.
    """
    contents = {record: content_hash(record.path) for record in records if record.path.is_file()}
    learnt = [str(record.path) for record, content in contents.items() if content in model.learnt]
    if learnt:
        raise CalibrationError(
            f"the model has learnt from {len(learnt)} of {len(records)} images ({_some(learnt)}), which score lower than "
            "others: a threshold by them would be too low; give images that it has not seen"
        )
    first: dict[str, Record] = {}
    for record, content in contents.items():
        first.setdefault(content, record)
    new = {record: content for content, record in first.items() if content not in known}
    notes = []
    for count, why in [
        (len(records) - len(contents), "no such file"),
        (len(contents) - len(first), "the same as another, byte for byte"),
        (len(first) - len(new), "in the calibration already"),
    ]:
        notes += [f"{count} of {len(records)} images left out: {why}"] if count else []
    return new, notes


def _changed(model: M, versions: Versions, notes: Sequence[str]) -> Change[M]:
    after, decision = model.with_versions(versions), versions.current.decision
    known = versions.current.calibration
    if None in known.groups or decision.threshold is not None:
        return Change(model, after, tuple(notes))
    found = spread(known.scores, known.groups, decision.false_alarm_rate)
    warned = [*notes]
    if found.differ and decision.guarantee != "group":
        warned.append(
            "the groups differ by more than chance, so a promise for images alone does not hold for a new group: see "
            "--guarantee group"
        )
    return Change(model, after, tuple(warned), found)


def _last(findings: Iterable[Row]) -> list[Row]:
    """The last finding on each path; those without a path are all kept."""
    rows: dict[Any, Row] = {}
    for number, row in enumerate(findings):
        if "error" in row:
            continue
        for name in NUMBERS:
            if not isinstance(row.get(name), int | float):
                raise DataError(
                    f"history: the finding on {row.get('path')} has {name}={row.get(name)!r}, expected a number: it was "
                    "made by an older unispect, inspect the images again"
                )
        kept = {name: row.get(name) for name in KEPT}  # a log is long, and findings are wide
        rows[row["path"] if row.get("path") is not None else number] = kept
    return list(rows.values())


def _is_good(row: Row, truths: Mapping[str, str]) -> bool:
    truth = truths.get(str(row["path"]))
    return truth == "good" or (truth is None and not row["unknown"])


def _of_findings(rows: Sequence[Row]) -> Calibration:
    scores, peaks, medians, novelty = (np.array([row[name] for row in rows], np.float64) for name in NUMBERS)
    products = tuple(row.get("nearest") for row in rows)
    return Calibration(scores, peaks, medians, novelty, products, (None,) * len(rows), products)


def _history(before: Judge, after: Judge, rows: Sequence[Row], truths: Mapping[str, str]) -> History:
    def alarms(judge: Judge) -> list[bool]:
        return [row["score"] > judge.threshold_of(row.get("nearest")) for row in rows]

    paths = [str(row["path"]) for row in rows]
    told = [truths.get(path) for path in paths]
    both = list(zip(alarms(before), alarms(after), told, paths, strict=True))
    count = Counter(told)

    def pair(truth: str) -> tuple[int, int]:
        chosen = [(old, new) for old, new, said, _ in both if said == truth]
        return sum(old for old, _ in chosen), sum(new for _, new in chosen)

    return History(
        findings=len(rows),
        alarms=(sum(old for old, *_ in both), sum(new for _, new, *_ in both)),
        good=count["good"],
        good_alarms=pair("good"),
        defective=count["defective"],
        defective_alarms=pair("defective"),
        unreviewed=sum(old and said is None for old, _, said, _ in both),
        lost=tuple(path for old, new, said, path in both if said == "defective" and old and not new),
    )


# Words.


def _numbers(judge: Judge) -> dict[str, Any]:
    decided = judge.decision
    return {
        "threshold": judge.threshold,
        "pixel_threshold": judge.pixel_threshold,
        "unknown_threshold": None if np.isinf(judge.unknown_threshold) else judge.unknown_threshold,
        "false_alarm_rate": decided.false_alarm_rate,
        "guarantee": decided.guarantee,
        "fixed": decided.threshold is not None,
        "images": len(judge.calibration),
    }


def _table(old: Judge, new: Judge) -> str:
    before, after = _numbers(old), _numbers(new)
    rows = [(name.replace("_", " "), _shown(before[name]), _shown(after[name])) for name in before]
    return "\n".join(f"  {name:18} {was:>12}  ->  {now}" for name, was, now in rows)


def _shown(value: Any) -> str:
    return "none" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _spread_text(found: Spread) -> str:
    lines = [f"Groups, each under a threshold of the others, for {found.promised:.2%} promised:"]
    for group in sorted(found.groups, key=lambda one: -(one.rate or 0))[:10]:
        rate = "too few others" if group.rate is None else f"{group.rate:.2%}"
        lines.append(f"  {group.name:24} {group.images:5} images  {rate}")
    if len(found.groups) > 10:
        lines.append(f"  and {len(found.groups) - 10} more")
    chance = "" if found.p_value is None else f"; that they are alike has p = {found.p_value:.3g}"
    return "\n".join([*lines, f"  {len(found.groups)} groups{chance}"])


def _change(pair: tuple[int, int]) -> str:
    return f"{pair[0]} -> {pair[1]}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
