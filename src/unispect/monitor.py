"""A log of findings -> what has changed since calibration: all scores, more defects, or unknown products. No torch.

    found = monitor(Path("model"), Path("findings.jsonl"))
    for alarm in found.alarms:
        print(alarm.text())

The mathematics is that of decide.drift. Scores are ranked within the product that an image comes nearest to. An image that
is called unknown is ranked by its novelty alone, so calibration images that would be called so are left out of scores.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from statistics import NormalDist
from typing import Any, TextIO

import numpy as np

from unispect.decide.conformal import ConformalRule, needed
from unispect.decide.drift import SHIFT, Change, Charts, Ranks, between
from unispect.decide.judge import Calibration, DecisionSettings, Rules
from unispect.decide.versions import Versions
from unispect.errors import ConfigError, DataError, StoreError
from unispect.findings import Place, read_findings
from unispect.store import EXPORT, MODEL, kind_of, read_model, write_file

RUN_LENGTH = 10_000
POOL = 10_000  # values kept of each product
ENOUGH = 20  # calibration images that a product must have for charts of its own
MOST = 0.9  # share of images called unknown from which on nothing else is told
FORMAT, VERSION = "unispect-monitor", 1
SCORE, NOVELTY = "score", "novelty"
ACTIONS = {
    "shift": "Check light, lens and camera, and whether a new batch came in. If these images are good, recalibrate: "
    "unispect calibrate",
    "tail": "Look at the parts, and stop the line if they are defective",
    "unknown": "Look whether a new product came in: unispect products MODEL add. If these are known products, check light, "
    "lens and camera",
}


@dataclass(frozen=True, slots=True)
class Alarm:
    """What has changed.

    kind      "shift" of all scores, burst in the "tail", or "unknown" products
    measure   by which it was found: "score" or "novelty"
    product   that it is about; None: all
    up        whether it rose
    at, path  number of the image at which it was found, from 1 on in the whole log, and its file
    since, since_path   the image from which on it is likely
    images    that were looked at since then
    mean_p    of their p-values; 0.5 where nothing changed
    top       share of them among the highest 5 %
    shift     of a normal distribution that would give this mean p-value, standard deviations
    """

    kind: str
    measure: str
    product: str | None
    up: bool
    at: int
    path: str | None
    since: int
    since_path: str | None
    images: int
    mean_p: float
    top: float
    shift: float

    @property
    def action(self) -> str:
        """What to do."""
        return ACTIONS[self.kind]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"action": self.action, "text": self.text()}

    def text(self) -> str:
        """For people."""
        whose = "all products" if self.product is None else self.product
        since = f"since about image {_named(self.since, self.since_path)}"
        return f"{_named(self.at, self.path)}: {whose}: {self._what()}, {since}: {self._size()}. {self.action}."

    def _what(self) -> str:
        if self.kind == "unknown":
            return "images of an unknown product"
        if self.kind == "tail":
            return "more high scores than before, the others about as they were"
        way = "risen" if self.up else "fallen"
        return f"all scores have {way}" if self.measure == SCORE else f"the unlikeness to known products has {way}"

    def _size(self) -> str:
        what = "" if self.kind != "shift" else f", as if by {abs(self.shift):.1f} standard deviations"
        return f"{self.images} images, {self.top:.0%} of them among the highest 5 %, mean p-value {self.mean_p:.2f}{what}"


def _named(number: int, path: str | None) -> str:
    return str(number) if path is None else f"{number} ({path})"


@dataclass(frozen=True, slots=True)
class Report:
    """What was read, and what was found.

    images    findings that were looked at
    errors    images that could not be read
    foreign   findings left out: made by another model, or by this one before it was calibrated again
    late      findings left out of a folder: older than others that had been read already
    alarms    in the order in which they were raised
    """

    images: int
    errors: int
    foreign: int
    late: int
    alarms: tuple[Alarm, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {name.name: getattr(self, name.name) for name in fields(self)} | {"alarms": len(self.alarms)}

    def text(self) -> str:
        """For people."""
        parts = [f"{self.images} images", f"{len(self.alarms)} alarms"]
        parts += [f"{self.errors} images could not be read"] if self.errors else []
        parts += [f"{self.foreign} findings of another model or calibration left out"] if self.foreign else []
        parts += [f"{self.late} findings left out that came late"] if self.late else []
        return ", ".join(parts)


def monitor(
    model: Path,
    log: Path | TextIO,
    run_length: float = RUN_LENGTH,
    state: Path | None = None,
    seed: int = 0,
    tell: Callable[[Alarm], None] = lambda alarm: None,
) -> Report:
    """Look through findings for a change.

    model        folder that `unispect fit` or `unispect export` wrote
    log          file of findings, a folder that `unispect watch` writes, or a stream of lines
    run_length   images among which there is one false alarm at most, on average
    state        file that says how far an earlier call came; what is new in the log is looked at, and the file written anew
    seed         of the order of ties
    tell         is told each alarm at once

    Raises DataError for a line that is no finding, StoreError for a damaged model or state, or a state of another model.
    """
    watcher, place = Monitor.of(model, run_length, seed), Place()
    if state is not None and state.exists():
        _resume(watcher, place, state)
    before, late = dict(watcher.counts), place.late
    alarms: list[Alarm] = []
    try:
        for where, said in read_findings(log, place):
            for alarm in watcher.take(said, where):
                alarms.append(alarm)
                tell(alarm)
    except KeyboardInterrupt:
        _save(watcher, place, state)
        raise
    counts = {name: count - before[name] for name, count in watcher.counts.items()}
    if counts["foreign"] and not counts["images"]:
        raise DataError(f"none of {counts['foreign']} findings is of {model} as it is calibrated now: expected its own log")
    _save(watcher, place, state)
    return Report(**counts, late=place.late - late, alarms=tuple(alarms))


def read_calibration(model: Path) -> tuple[Calibration, DecisionSettings]:
    """What a model that was learnt or exported decides by; its network is not built."""
    kind, name = (EXPORT, "decision.json") if kind_of(model) == EXPORT else (MODEL, "calibration.json")
    try:
        table = json.loads(read_model(model, [name], kind)[name])
        versions = table["versions"] if kind == EXPORT else table
    except (KeyError, ValueError, TypeError) as error:
        raise StoreError(f"{model} is damaged or of another version of unispect ({error!r}): fit or export again") from error
    current = Versions.from_list(versions).current
    return current.calibration, current.decision


class Monitor:
    """Charts of a model's scores and novelty, and what they have seen.

    counts   images, errors and foreign findings so far
    """

    def __init__(self, calibration: Calibration, decision: DecisionSettings, run_length: float, seed: int) -> None:
        if not run_length >= 1:
            raise ConfigError(f"run_length: got {run_length}, expected a number of images from 1 on, such as {RUN_LENGTH}")
        self.calibration, self.run_length = calibration, run_length
        self.counts = {"images": 0, "errors": 0, "foreign": 0}
        self._identity = _identity(calibration, decision, seed)
        self._rate = decision.unknown_rate if len(calibration.novelty) >= _needed(decision.unknown_rate) else 0.0
        self._chance = np.random.default_rng(seed)
        self._products = set(calibration.recognised) - {None}
        self._images = Rules(calibration.scores, calibration, decision)
        self._charts = {SCORE: Charts(_weights(calibration)), NOVELTY: Charts({None: _common(calibration)})}
        self._ranks: dict[str, dict[str | None, Ranks]] = {SCORE: {}, NOVELTY: {}}

    @classmethod
    def of(cls, model: Path, run_length: float = RUN_LENGTH, seed: int = 0) -> Monitor:
        """Of a folder that `unispect fit` or `unispect export` wrote."""
        return cls(*read_calibration(model), run_length, seed)

    def take(self, said: Mapping[str, Any], where: str = "a finding") -> list[Alarm]:
        """Take in a finding as `Finding.as_dict` gives it, or an error; the alarms that it raises.

        Raises DataError where it is neither.
        """
        if "error" in said:
            self.counts["errors"] += 1
            return []
        score, p_value, unknown_p = (_number(said, name, where) for name in ("score", "p_value", "unknown_p_value"))
        place = unknown_p * (len(self.calibration.novelty) + 1)
        product = self._product(said, where)
        if abs(self._images.of(product).p_value(score) - p_value) > 1e-9 or abs(place - round(place)) > 1e-6:
            self.counts["foreign"] += 1
            return []
        self.counts["images"] += 1
        unknown = unknown_p <= self._rate
        values = {NOVELTY: 1.0 - round(place)} if unknown else {SCORE: score, NOVELTY: 1.0 - round(place)}
        taken = (self._take(measure, value, product, unknown, said.get("path")) for measure, value in values.items())
        return [alarm for alarm in taken if alarm is not None]

    def _take(self, measure: str, value: float, product: str | None, unknown: bool, path: Any) -> Alarm | None:
        ranks = self._ranks[measure]
        if product not in ranks:
            ranks[product] = Ranks(self._calibrated(measure, product), POOL)
        p, at = ranks[product].p_value(value, self._chance), (self.counts["images"], path)
        change = self._charts[measure].take(p, product, unknown, at, self.run_length)
        return None if change is None else _alarm(change, measure, at, bool(self._rate))

    def _product(self, said: Mapping[str, Any], where: str) -> str | None:
        """The product among whose images it is ranked; None where calibration images have no names."""
        if not self._products:
            return None
        if "nearest" not in said and said.get("unknown"):
            raise DataError(f'{where}: no "nearest" product: the finding is of an older unispect: inspect anew')
        found = said.get("nearest", said.get("product"))
        if found is not None and not isinstance(found, str):
            raise DataError(f'{where}: "nearest" is {found!r}: expected the name of a product or null')
        return found

    def _calibrated(self, measure: str, product: str | None) -> list[float]:
        """What the calibration images of a product are ranked by; of all where none is named."""
        calibration = self.calibration
        chosen = np.array([product in (None, name) for name in calibration.recognised], bool)
        if measure == NOVELTY:
            return list(map(float, between(calibration.novelty)[chosen]))
        if self._rate:  # without the one at the threshold: then those below are as stream images below are
            chosen &= calibration.novelty < ConformalRule(calibration.novelty).threshold(self._rate)
        return list(map(float, calibration.scores[chosen]))

    # Keeping.

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; goes on bit by bit."""
        return {
            "model": self._identity,
            "counts": self.counts,
            "chance": self._chance.bit_generator.state,
            "ranks": {
                measure: [{"of": one, "values": ranks.values} for one, ranks in groups.items()]
                for measure, groups in self._ranks.items()
            },
            "charts": {measure: charts.as_dict() for measure, charts in self._charts.items()},
        }

    def restore(self, table: Mapping[str, Any]) -> None:
        """What `as_dict` gave.

        Raises StoreError where it is of another model; KeyError, TypeError or ValueError where it is damaged.
        """
        if table["model"] != self._identity:
            raise StoreError("it is of another model, calibration or seed: choose another file, or remove it to start anew")
        self.counts = {name: int(table["counts"][name]) for name in self.counts}
        self._chance.bit_generator.state = table["chance"]
        for measure in (SCORE, NOVELTY):
            groups = {one["of"]: Ranks(list(map(float, one["values"])), POOL) for one in table["ranks"][measure]}
            self._ranks[measure] = groups
            self._charts[measure].restore(table["charts"][measure])


def _alarm(change: Change, measure: str, at: tuple[int, str | None], names_unknown: bool) -> Alarm:
    shift = -math.sqrt(2) * NormalDist().inv_cdf(min(max(change.mean_p, 1e-9), 1 - 1e-9))
    kind = _kind(change, measure, names_unknown)
    found = kind, measure, change.product, change.up
    return Alarm(*found, *at, *change.since, change.images, change.mean_p, change.top, shift)


def _kind(change: Change, measure: str, names_unknown: bool) -> str:
    """Defects may be unlike known products, too; then few of them are so unlike that they are called unknown."""
    if measure == NOVELTY and change.strange >= MOST:
        return "unknown"
    if change.kind == SHIFT:
        return "shift"
    strangers = change.strange >= change.top / 2 or not names_unknown
    return "unknown" if measure == NOVELTY and strangers else "tail"


def _common(calibration: Calibration) -> float:
    """The weight of each chart of all products: two of scores and two of novelty."""
    return 1 / 8 if _own(calibration) else 1 / 4


def _weights(calibration: Calibration) -> dict[str | None, float]:
    """Of charts of scores: half of the weight that an image moves is with the two of its product."""
    return {None: _common(calibration)} | dict.fromkeys(_own(calibration), 1 / 4)


def _own(calibration: Calibration) -> list[str | None]:
    """Products that have charts of their own: not a single one, which those of all are about."""
    names = [name for name in calibration.recognised if name is not None]
    enough: list[str | None] = [name for name in sorted(set(names)) if names.count(name) >= ENOUGH]
    return enough if len(set(names)) > 1 else []


def _needed(rate: float) -> float:
    return needed(rate) if rate else math.inf


def _number(said: Mapping[str, Any], name: str, where: str) -> float:
    value = said.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        got = f"{name!r} is {value!r}" if name in said else f"no {name!r}"
        raise DataError(f"{where}: {got}: expected a finding of `unispect inspect --json`, `stream` or `watch`")
    return float(value)


def _identity(calibration: Calibration, decision: DecisionSettings, seed: int) -> str:
    about = [calibration.as_dict(), decision.unknown_rate, seed]
    return sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _save(watcher: Monitor, place: Place, state: Path | None) -> None:
    if state is None:
        return
    table = {"format": FORMAT, "version": VERSION, "monitor": watcher.as_dict(), "place": asdict(place)}
    write_file(state, json.dumps(table).encode())


def _resume(watcher: Monitor, place: Place, state: Path) -> None:
    try:
        table = json.loads(state.read_bytes())
        if (table.get("format"), table.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"format {table.get('format')!r}, version {table.get('version')!r}")
        watcher.restore(table["monitor"])
        place.restore(table["place"])
    except StoreError as error:
        raise StoreError(f"--state {state}: {error}") from error
    except OSError as error:
        raise StoreError(f"--state {state} cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(
            f"--state {state} is damaged or no state of a monitor ({error!r}): "
            "choose another file, or remove it to start anew"
        ) from error
