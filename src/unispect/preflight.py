"""What a fit will take, before it starts: memory, disk, minutes, and whether its promise can be kept.

Sizes follow from shapes and settings. Seconds are measured here and now: a few images go through decoding, the network and
every stage of the method (see `rehearsal`), and what grows otherwise than with the number of images (choosing and searching
banks) is counted in comparisons, of which some are timed (see `nn.growth`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np

from unispect.align.aligners import NONE
from unispect.config import construct, merge, read_toml
from unispect.data.nearness import SIDE
from unispect.data.records import Record, Split
from unispect.detectors.base import Detector, GradientDetector, Grows, Recipe
from unispect.detectors.methods import METHODS, sections
from unispect.errors import CalibrationError, ConfigError, UnispectError
from unispect.features.cache import FeatureCache, FeatureSet, affordable
from unispect.features.engine import Engine, available_cores
from unispect.fit import Labelled
from unispect.inspector import MOST_PAIRS, FeatureSettings, Fit, complete, empty_detector
from unispect.nn.growth import Growth, Work
from unispect.rehearsal import Pace, comparing, peak, rehearse, resident

Lowered = dict[str, tuple[float, float]]  # settings by name: from, to
MIB = 2**20
LOOK = 2.0  # s for features of a few images
FIRST, MOST = 2, 16  # images that are looked at
SAMPLE, LARGEST = 16, 64  # images of the rehearsal, the same ones again where there are fewer
SHARES = (0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625, 0.03125)  # of max_ram that are tried when less must do
PACKED = 4  # copies of a model while it is saved: itself, plain, as one file and as bytes
UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


@dataclass(frozen=True, slots=True)
class Memory:
    """Highest resident memory of the process, MiB, by what it is made of.

    process    libraries, network and all that the process holds already
    work       batches, gradients and what they leave behind
    held       what the method holds of the images that it learns from, or of the model that is saved
    mapped     features in the cache that were looked at: the system takes them back where it needs to
    """

    process: float
    work: float
    held: float
    mapped: float

    @property
    def total(self) -> float:
        """The highest."""
        return self.process + self.work + self.held + self.mapped


@dataclass(frozen=True, slots=True)
class Disk:
    """MiB. Features are those that are not in the cache yet; a checkpoint goes when the model is saved."""

    features: float
    checkpoint: float
    model: float

    @property
    def total(self) -> float:
        """All at once."""
        return self.features + self.checkpoint + self.model


@dataclass(frozen=True, slots=True)
class Minutes:
    """By stage; of training steps all are counted, though training may stop earlier."""

    features: float
    learning: float
    aligner: float
    calibration: float

    @property
    def total(self) -> float:
        """All stages."""
        return self.features + self.learning + self.aligner + self.calibration


@dataclass(frozen=True, slots=True)
class Plan:
    """What a fit will take.

    config     the full table of settings, with what was lowered
    images     of each role, and those whose features are not in the cache
    products   their number; images without a name are taken for one product
    cores      that this process may use, on which the minutes were measured
    lowered    settings that were lowered to keep to max_ram, by name: from, to
    refusal    what `fit` will refuse, in its words; None where it will start
    """

    config: Mapping[str, Any]
    images: Mapping[str, int]
    products: int
    cores: int
    memory: Memory
    disk: Disk
    minutes: Minutes
    lowered: Mapping[str, tuple[float, float]]
    refusal: str | None

    def check(self, max_ram: float | None = None) -> None:
        """Raises CalibrationError for what `fit` would refuse, UnispectError where memory is above max_ram, MiB."""
        if self.refusal is not None:
            raise CalibrationError(self.refusal)
        if max_ram is not None and self.memory.total > max_ram:
            raise UnispectError(self._too_much(max_ram))

    def _too_much(self, max_ram: float) -> str:
        parts = sorted(asdict(self.memory).items(), key=lambda part: -part[1])
        return (
            f"max_ram: {self.config['method']} on {self.images['train']} images is predicted to take "
            f"{self.memory.total:.0f} MiB ({', '.join(f'{name} {size:.0f}' for name, size in parts)}), more than the "
            f"{max_ram:.0f} MiB allowed: {_advice(self.config, parts[0][0])}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: MiB and minutes."""
        parts: dict[str, Memory | Disk | Minutes] = {"memory": self.memory, "disk": self.disk, "minutes": self.minutes}
        return {
            "method": self.config["method"],
            "aligner": self.config["aligner"],
            "images": dict(self.images),
            "products": self.products,
            "cores": self.cores,
            **{name: asdict(part) | {"total": part.total} for name, part in parts.items()},
            "lowered": {name: list(pair) for name, pair in self.lowered.items()},
            "refusal": self.refusal,
        }

    def text(self) -> str:
        """A short table."""
        images = self.images
        rows = [
            (
                "Images",
                f"{images['train']} to learn from, {images['held_out']} held out, {images['calibration']} to calibrate",
            ),
            ("Features", f"{images['missing']} images not in the cache yet"),
            ("Memory", f"{self.memory.total:.0f} MiB: {_listed(asdict(self.memory), 'MiB')}"),
            ("Disk", f"{self.disk.total:.0f} MiB: {_listed(asdict(self.disk), 'MiB')}"),
            ("Time", f"{_time(self.minutes.total)} on {self.cores} cores: {_times(asdict(self.minutes))}"),
            *(("Lowered", f"{name} from {was:g} to {now:g}") for name, (was, now) in self.lowered.items()),
            ("Promise", self.refusal or f"{images['calibration']} calibration images support it"),
        ]
        return "\n".join(f"{name:<9} {text}" for name, text in rows)


def plan(
    data: Path | str | Sequence[Record],
    config: Mapping[str, Any] | Path | str | None = None,
    *,
    cache: FeatureCache | None = None,
    max_ram: float | None = None,
    strict: bool = False,
) -> Plan:
    """What `Inspector.fit` with the same arguments will take. Learns nothing and leaves nothing behind.

    max_ram   MiB that the process may take: settings `max_ram` of methods that are not in `config` are lowered until the
              prediction keeps to it, or none does

    Raises what `fit` raises for data and settings; see `Plan.check` for the rest.
    """
    given = read_toml(Path(config)) if isinstance(config, Path | str) else dict(config or {})
    table = complete(given)
    if table["split"]["cross"]:
        raise ConfigError(
            "split.cross: what several models take is not predicted: plan without it, and expect that many times"
        )
    look = _Look(table, cache or FeatureCache(), strict)
    with TemporaryDirectory(prefix="unispect-") as folder:
        start = perf_counter()
        look.divide(data)
        reading = perf_counter() - start
        sample = look.sample(Path(folder))
        before = resident()
        pace = rehearse(table, sample, look.products, look.eyes, Path(folder))
        tried = _Tried(before, peak(), reading, look.features_seconds)
        return _fitting(look, sample, pace, tried, given, max_ram)


def mebibytes(text: str) -> float:
    """Of a size as a person writes it: 4GiB, 512 MiB, 2G, or a plain number of bytes.

    Raises ConfigError for what is none.
    """
    bare = text.strip().lower().removesuffix("b").removesuffix("i")
    unit = bare[-1:] if bare[-1:] in UNITS else ""
    try:
        size = float(bare.removesuffix(unit)) * UNITS[unit] / MIB
    except ValueError:
        size = 0.0
    if not size > 0:
        raise ConfigError(f"max_ram: got {text!r}, expected a size above 0, such as 4GiB or 512MiB")
    return size


@dataclass(frozen=True, slots=True)
class _Tried:
    """What the look at a few images found: bytes before and after the rehearsal, seconds of reading and of features."""

    before: int
    after: int
    reading: float
    features: float


class _Look:
    """The data of a fit, and a few images of it."""

    def __init__(self, config: dict[str, Any], cache: FeatureCache, strict: bool) -> None:
        self.config, self.cache, self.strict = config, cache, strict
        self.run = Fit(config, cache, None, strict, None)
        self.refusal: str | None = None
        self.features_seconds = 0.0

    def divide(self, data: Path | str | Sequence[Record]) -> None:
        """Who learns, is held out and calibrates; what is missing in the cache."""
        self.split = self.run.divided(data)
        try:
            self.run.check_promise(self.split)
        except CalibrationError as error:
            self.refusal = str(error)
        self.eyes: Engine = construct(FeatureSettings, self.config["features"], "features").build()
        gradients = issubclass(METHODS[self.config["method"]], GradientDetector)
        folds = self.config["split"]["folds"]
        wants_held_out = gradients or (self.config["aligner"] != NONE and not folds)
        self.counts = {
            "train": len(self.split.train),
            "held_out": len(self.split.held_out) if wants_held_out else 0,
            "calibration": len(self.split.calibration),
        }
        self.records = [record for role, count in self.counts.items() if count for record in getattr(self.split, role)]
        contents = [self.split.hashes[record.path] for record in self.records]
        self.missing = self.cache.missing(contents, self.eyes, self.run.key)
        named = Counter(record.product for record in self.split.train)
        self.each = list(named.values())
        self.products = len(named)

    def sample(self, folder: Path) -> Labelled:
        """Features of a few images, the same ones again and again where there are fewer than a rehearsal needs."""
        found = self._features(FeatureCache(folder)) if self.missing else self._known()
        wanted = max(SAMPLE, FIRST * self.products, min(LARGEST, len(self.split.train), self._batch()))
        places = np.resize(np.arange(len(found)), wanted)
        return Labelled(found.part(places), np.arange(wanted) % self.products)

    def _batch(self) -> int:
        """Images of a training step."""
        return int(self.config["training"]["images"]) if "training" in self.config else 0

    def _known(self) -> FeatureSet:
        return self._read(_evenly(self.records, MOST), self.cache)

    def _features(self, cache: FeatureCache) -> FeatureSet:
        """Of images that the cache lacks; the first ones make the network ready and say how many more there is time for."""
        missing = [self.records[place] for place in self.missing]
        start = perf_counter()
        found = self._read(missing[:FIRST], cache)
        ready = perf_counter() - start
        rest = missing[FIRST:]
        if not rest:
            self.features_seconds = ready
            return found
        start = perf_counter()
        self._read(rest[:FIRST], cache)
        one = (perf_counter() - start) / len(rest[:FIRST])
        chosen = _evenly(rest[FIRST:], min(MOST, int(LOOK / one)))
        if len(chosen) > FIRST:
            start = perf_counter()
            found = self._read(chosen, cache)
            one = (perf_counter() - start) / len(chosen)
        self.features_seconds = max(0.0, ready - FIRST * one) + one * len(missing)
        return found

    def _read(self, records: Sequence[Record], cache: FeatureCache) -> FeatureSet:
        found, _ = Fit(self.config, cache, None, self.strict, None).read(records, self.split, self.eyes, "a few images")
        return found


def _evenly(records: Sequence[Record], most: int) -> list[Record]:
    places = np.linspace(0, len(records) - 1, min(most, len(records))).astype(np.int64)
    return [records[place] for place in places]


def _fitting(
    look: _Look, sample: Labelled, pace: Pace, tried: _Tried, given: Mapping[str, Any], max_ram: float | None
) -> Plan:
    """The plan under the settings as they are or, where these take too much, under the largest that do not."""

    def empty(config: Mapping[str, Any]) -> Detector:
        return empty_detector(config, sample.features.shapes, look.products, look.eyes)

    def fits(config: Mapping[str, Any]) -> bool:
        return max_ram is None or _memory(empty(config), look, config, sample, pace, tried).total <= max_ram

    config, lowered, free = look.config, Lowered(), _free(look.config, given)
    if free and not fits(config):
        config, lowered = _lowered(config, free, fits)
    detector = empty(config)
    learnt = _growth(detector, look).learnt
    features = _bytes(sample) * len(look.missing)
    return Plan(
        config,
        look.counts | {"missing": len(look.missing)},
        look.products,
        available_cores(),
        _memory(detector, look, config, sample, pace, tried),
        Disk(features / MIB, 2 * pace.checkpoint / MIB, (pace.state + learnt + _text(look.split)) / MIB),
        _minutes(detector, look, config, sample, pace, tried),
        lowered,
        look.refusal,
    )


def _lowered(
    config: dict[str, Any], free: Sequence[str], fits: Callable[[Mapping[str, Any]], bool]
) -> tuple[dict[str, Any], Lowered]:
    """Settings whose max_ram is the largest share of what it was that fits; those given where none does."""
    for share in SHARES:
        values = {name: (config[name]["max_ram"], share * config[name]["max_ram"]) for name in free}
        table = merge(config, {name: {"max_ram": now} for name, (_, now) in values.items()})
        try:
            if fits(table):
                return table, {f"{name}.max_ram": pair for name, pair in values.items()}
        except ConfigError:  # less than the method can work with
            break
    return config, {}


def _free(config: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Sections whose max_ram the user left alone."""
    own = sections(config["method"], config[config["method"]])
    return [name for name in own if "max_ram" in config[name] and "max_ram" not in given.get(name, {})]


def _memory(
    detector: Detector, look: _Look, config: Mapping[str, Any], sample: Labelled, pace: Pace, tried: _Tried
) -> Memory:
    grown = _growth(detector, look)
    work = max(0, tried.after - tried.before) + pace.more
    held = max(grown.held, PACKED * (pace.state + grown.learnt))
    return Memory(tried.before / MIB, work / MIB, held / MIB, _bytes(sample) * _mapped(look, config) / MIB)


def _bytes(sample: Labelled) -> int:
    """Of the features of an image."""
    return 2 * sum(map(prod, sample.features.shapes))


def _growth(detector: Detector, look: _Look, share: float = 1.0) -> Growth:
    """What the training images make grow, or a share of them; HGAD and its like learn from held-out ones, too."""
    more = 1 + look.counts["held_out"] / look.counts["train"] if isinstance(detector, GradientDetector) else 1.0
    if not isinstance(detector, Grows):
        return Growth()
    return detector.growth([max(1, round(count * share * more)) for count in look.each])


def _mapped(look: _Look, config: Mapping[str, Any]) -> int:
    """Images whose features are mapped at once: of each role, and of a fold beside those of all."""
    most = affordable(look.cache.open_files)
    folds = bool(config["aligner"] != NONE and config["split"]["folds"])
    return sum(min(count, most) for count in look.counts.values()) + folds * min(look.counts["train"], most)


def _text(split: Split) -> int:
    """Bytes of what a model says of its images: where they are, what they scored, and their fingerprints in hexadecimal."""
    said, images = split.as_dict(), sum(map(len, (split.train, split.held_out, split.calibration)))
    return len(json.dumps(said, indent=1)) + images * (2 * SIDE**2 + 80) + 170 * len(split.calibration)


def _minutes(
    detector: Detector, look: _Look, config: Mapping[str, Any], sample: Labelled, pace: Pace, tried: _Tried
) -> Minutes:
    counts, grown = look.counts, _growth(detector, look)
    scoring = pace.score + comparing(grown.scoring, sample)
    aligner = 0.0
    if config["aligner"] != NONE:
        folds = config["split"]["folds"]
        part = _growth(detector, look, (folds - 1) / folds) if folds else Growth()
        aligner = folds * _learning(look, config, sample, pace, part.learning, (folds - 1) / folds if folds else 0.0)
        aligner += scoring * min(counts["train" if folds else "held_out"], MOST_PAIRS) + pace.schooling
    learning = _learning(look, config, sample, pace, grown.learning, 1.0) + pace.known * counts["train"]
    features = tried.features + tried.reading
    return Minutes(features / 60, learning / 60, aligner / 60, scoring * counts["calibration"] / 60)


def _learning(
    look: _Look, config: Mapping[str, Any], sample: Labelled, pace: Pace, works: Sequence[Work], share: float
) -> float:
    """Seconds of learning from a share of the training images."""
    train, held_out = share * look.counts["train"], look.counts["held_out"]
    seconds = pace.image * train + pace.any_image * (train + held_out) + pace.fixed + comparing(works, sample)
    if "training" not in config:
        return seconds
    recipe = construct(Recipe, config["training"], "training")
    looks = min(held_out, recipe.held_out_images) * (recipe.checks + 1 if recipe.checks else 0)
    return seconds + pace.step * recipe.total(round(train)) + pace.look * looks


def _advice(config: Mapping[str, Any], largest: str) -> str:
    own = [f"{name}.max_ram" for name in sections(config["method"], config[config["method"]]) if "max_ram" in config[name]]
    lower = {
        "work": ["training.images", "preparation.size"],
        "held": [*own, "preparation.size"],
        "mapped": ["preparation.size", "the number of images"],
        "process": ["features.backbone to a smaller one"],
    }[largest]
    return f"lower {' or '.join(lower)}, or allow more"


def _listed(parts: Mapping[str, float], unit: str) -> str:
    return ", ".join(f"{name} {size:.0f}" for name, size in parts.items() if size >= 0.5) or f"under 1 {unit}"


def _time(minutes: float) -> str:
    return f"{60 * minutes:.0f} s" if minutes < 2 else f"{minutes:.0f} min"


def _times(parts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {_time(minutes)}" for name, minutes in parts.items() if minutes > 0)
