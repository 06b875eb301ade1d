"""The whole line as one object: images -> features -> detector -> decision -> finding."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from dataclasses import replace as changed
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from PIL import Image
from torch import nn

from unispect.align.aligners import ALIGNERS, NONE
from unispect.align.aligners import PROVIDED as OF_ALIGNERS
from unispect.align.aligners import build as build_aligner
from unispect.align.base import Aligner, AlignsGiven, Pairs, Statistics, view, width
from unispect.config import construct, merge, read_toml, settings, write_toml
from unispect.cross import Crossed, CrossedNovelty, crossed
from unispect.data.datasets import read_data
from unispect.data.folder import images_below
from unispect.data.leak import Seen
from unispect.data.loader import Failure, Loader, Preparation, ahead, decode
from unispect.data.masks import ignored, located, mask_files, mentioned
from unispect.data.nearness import fingerprint
from unispect.data.records import ROLES, Record, Split, content_hash, split_normals, unit_numbers
from unispect.decide.conformal import needed, smallest_rate
from unispect.decide.judge import Calibration, DecisionSettings, Judge, Said, calibration_of, check_support
from unispect.decide.promise import card_lines
from unispect.decide.unknown import Novelty
from unispect.decide.versions import Versions
from unispect.detectors.base import Detector, GradientDetector, HoldsProducts, Recipe, StatisticalDetector, TakesProduct
from unispect.detectors.methods import METHODS, PROVIDED, build, sections
from unispect.errors import CalibrationError, ConfigError, DataError, ImageError, StoreError, unknown_name
from unispect.features.cache import FeatureCache, FeatureSet
from unispect.features.engine import Engine, WithImage, engine
from unispect.features.pixels import PixelExtractor
from unispect.features.pyramid import PyramidExtractor, TrainedEncoder
from unispect.fit import BATCH, History, Labelled, Watch, fit, learn
from unispect.nn.alignment import deal
from unispect.nn.blank import Blank
from unispect.nn.clusters import discover
from unispect.nn.recognition import Recogniser
from unispect.store import pack_json, pack_tensors, read_model, unpack_tensors, write_folder
from unispect.types import Batch, Features, Finding, Scores

FILES = ("config.toml", "weights.safetensors", "calibration.json", "split.json", "card.md")
BESIDE = "beside."  # begins the names of tensors that are not the detector's
MARKS = "marks-2"  # notes in the feature cache: fingerprints of images
FOLDS = 4  # for an aligner of a detector that needs them (see Detector.spares_held_out), unless the settings say otherwise
MOST_PAIRS = 4096  # images that an aligner learns from at the most
SECTIONS = ("preparation", "features", "split", "training", "decision")
Progress = Callable[[str, int, int, dict[str, float]], None]
Source = Path | str | bytes | np.ndarray | Image.Image


@dataclass(frozen=True, slots=True)
class FeatureSettings:
    """Which frozen network looks at the images, and how (see features.pyramid and features.engine).

    With the backbone "pixels" it is none: the image itself is the one level, in torch.

    image   the image itself comes after all levels, for a detector that trains an encoder
    """

    backbone: str = "tf_efficientnet_lite0"
    layers: tuple[str, ...] = ("blocks.3", "blocks.4")
    joined: bool = False
    scales: tuple[float, ...] = (1.0,)
    pooled: tuple[str, ...] = ("blocks.5", "blocks.6")
    weights: str = "auto"
    padding: str = "zeros"
    image: bool = False
    engine: str = "auto"
    precision: str = "f32"

    def build(self) -> Engine:
        """The network, ready to run."""
        if self.backbone == "pixels":
            return self._pixels()
        extractor = PyramidExtractor(
            self.backbone, self.layers, self.scales, self.pooled, self.weights, self.joined, self.padding
        )
        found = engine(extractor, self.engine, self.precision)
        return WithImage(found) if self.image else found

    def _pixels(self) -> Engine:
        needed = asdict(FeatureSettings("pixels", layers=(), pooled=(), engine=self.engine))
        for name, value in asdict(self).items():
            if value != needed[name]:
                raise ConfigError(
                    f"features.{name}={_shown(value)}: backbone='pixels' has no network, expected {_shown(needed[name])}"
                )
        if self.engine == "openvino":
            raise ConfigError("features.engine='openvino': backbone='pixels' has no network, expected 'auto' or 'torch'")
        return engine(PixelExtractor(), "torch" if self.engine == "auto" else self.engine, self.precision)


@dataclass(frozen=True, slots=True)
class SplitSettings:
    """Shares of the normal images of each product that the detector does not learn from.

    folds   an aligner learns from images that the detector has not learnt from: the held-out ones where this is 0;
            otherwise all training images, dealt into so many folds, each scored by a detector of the others. Of methods
            that learn in passes, and of HGAD, it is 4 where there is an aligner
    cross   instead of calibration images of their own, so many models that each leave out a part of the images and are
            calibrated on it: for few images, at a weaker guarantee and as many times the work (see unispect.cross)
    """

    held_out: float = 0.1
    calibration: float = 0.14
    folds: int = 0
    cross: int = 0

    def __post_init__(self) -> None:
        for name in ("folds", "cross"):
            if getattr(self, name) < 0 or getattr(self, name) == 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected 0 or at least 2")


def complete(config: Mapping[str, Any] | Path | str | None = None) -> dict[str, Any]:
    """The full table of settings: what is given, and the default of everything else.

    Raises ConfigError for unknown names and impossible values, naming the section.
    """
    file = Path(config) if isinstance(config, Path | str) else None
    given = dict(config or {}) if file is None else located(read_toml(file), file.parent)  # type: ignore[arg-type]
    method = given.get("method", "hgad")
    if method not in METHODS:
        raise ConfigError(unknown_name("method", str(method), METHODS))
    aligner = given.get("aligner", NONE)
    if aligner not in (NONE, *ALIGNERS):
        raise ConfigError(unknown_name("aligner", str(aligner), (NONE, *ALIGNERS)))
    known = {"method", "aligner", "seed", "masks", *SECTIONS, *METHODS, *ALIGNERS}
    kind, wanted = METHODS[method], METHODS[method].wants
    if aligner != NONE and (issubclass(kind, StatisticalDetector) or not kind.spares_held_out):
        wanted = merge(wanted, {"split": {"folds": FOLDS}})
    for name in given:
        if name not in known:
            raise ConfigError(unknown_name("setting", name, known))
    for name in (*SECTIONS, *METHODS, *ALIGNERS):
        if not isinstance(given.get(name, {}), Mapping):
            raise ConfigError(f"{name}: got {given[name]!r}, expected a table [{name}] of settings")
    seed = given.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ConfigError(f"seed: got {seed!r}, expected a whole number >= 0")
    factories = {
        "preparation": Preparation,
        "features": FeatureSettings,
        "split": SplitSettings,
        "training": Recipe,
        "decision": DecisionSettings,
    }
    if not issubclass(kind, GradientDetector):
        del factories["training"]
        if given.get("training"):
            raise ConfigError(f"[training]: {method} takes no training steps, it learns in passes: leave the section out")
    table: dict[str, Any] = {"method": method, "aligner": aligner, "seed": seed}
    for name, factory in factories.items():
        own = merge(wanted.get(name, {}), given.get(name, {}))
        construct(factory, own, name)
        told = settings(factory, own, where=name)
        table[name] = {key: value for key, value in told.items() if value is not None}  # as TOML, which has no null
    for name in sections(method, given.get(method, {})):
        table[name] = settings(METHODS[name], merge(wanted.get(name, {}), given.get(name, {})), PROVIDED, name)
    if masks := mask_files(given.get("masks", {})):
        table["masks"] = masks
    _check_cross(table)
    if aligner != NONE:
        table[aligner] = settings(ALIGNERS[aligner], given.get(aligner, {}), OF_ALIGNERS, aligner)
        if not table["split"]["folds"] and not (kind.spares_held_out and table["split"]["held_out"]):
            held_out = (
                "set split.held_out above 0, or " if kind.spares_held_out else f"{method} learns from held-out ones, so "
            )
            raise ConfigError(
                f"aligner={aligner!r} learns from images that the detector has not learnt from: {held_out}"
                "set split.folds to 2 or more"
            )
    return table


def _check_cross(table: dict[str, Any]) -> None:
    """The promise of cross-conformal calibration is one of its own."""
    crossed, guarantee = table["split"]["cross"] > 0, table["decision"]["guarantee"]
    if crossed and guarantee not in ("image", "cross"):
        raise ConfigError(
            f"split.cross={table['split']['cross']}: cross-conformal calibration has no promise for each {guarantee}: leave "
            "decision.guarantee out, or split.cross"
        )
    if crossed and table.get("masks"):
        raise ConfigError("split.cross: a model of several takes no masks: leave [masks] out, or split.cross")
    if guarantee == "cross" and not crossed:
        raise ConfigError("decision.guarantee='cross': expected split.cross, the number of parts, such as 5, instead")
    table["decision"]["guarantee"] = "cross" if crossed else guarantee


class Inspector:
    """A learnt model: images in, findings out, under one threshold and with no product label.

    config       the full table of settings
    products     names of the products it has learnt
    threshold    a higher score is an alarm
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        products: Sequence[str],
        eyes: Engine,
        detector: Detector,
        aligner: Aligner | None,
        novelty: Novelty | CrossedNovelty,
        versions: Versions,
        split: Split,
        facts: Mapping[str, Any],
        blank: Blank | None = None,
    ) -> None:
        self.versions, self.decision = versions, versions.current.decision
        self.config = dict(config) | {"decision": self.decision.as_dict()}
        self.products, self.split, self.calibration = tuple(products), split, versions.current.calibration
        self.engine, self.detector = eyes, detector.eval()
        self.aligner, self.novelty = None if aligner is None else aligner.eval(), novelty.eval()
        self.blank = blank
        self.preparation = construct(Preparation, config["preparation"], "preparation")
        self.facts = dict(facts)
        self.judge = Judge(self.calibration, self.decision, self.products, self.preparation)
        self.threshold, self.unknown_threshold = self.judge.threshold, self.judge.unknown_threshold

    @property
    def false_alarm_rate(self) -> float:
        """The promised share of normal images that raise an alarm."""
        return float(self.decision.false_alarm_rate)

    @property
    def smallest_false_alarm_rate(self) -> float:
        """The lowest rate that the calibration images can support."""
        return smallest_rate(len(self.calibration.scores))

    @property
    def takes_product(self) -> bool:
        """Whether it would score an image differently if told its product, which only `evaluate` ever does."""
        able = _takes_product(self.aligner) or isinstance(self.detector, TakesProduct)
        return able and not self.facts["clustered"]

    @property
    def seen(self) -> Seen:
        """The images it has learnt from, held out or was calibrated on: what `evaluate` must not be given again."""
        known = Seen.of(self.split, {content: bytes.fromhex(mark) for content, mark in self.facts["marks"].items()})
        return known.with_also(self.versions.images)

    @property
    def learnt(self) -> frozenset[str]:
        """Content hashes of the images it has learnt from: what it must not be calibrated on."""
        return frozenset(self.split.hashes[record.path] for record in (*self.split.train, *self.split.held_out))

    @classmethod
    def fit(
        cls,
        data: Path | str | Sequence[Record],
        config: Mapping[str, Any] | Path | str | None = None,
        *,
        cache: FeatureCache | None = None,
        checkpoint: Path | None = None,
        strict: bool = False,
        progress: Progress | None = None,
        command: str = "Inspector.fit",
    ) -> Inspector:
        """Learn from the good training images of all products at once.

        data         a folder (see data.folder for the layouts), a manifest (.csv, .parquet) or records; test images in
                     it are not touched
        config       a TOML file or table of settings; what it does not say has its default
        cache        where features are kept; the user's cache folder unless given
        checkpoint   file that makes the run go on where it was killed
        strict       the first broken image is an error instead of being left out
        command      what is kept as what was run

        Raises DataError, ConfigError, CalibrationError (too few images for the promised rate) and WeightsError.
        """
        return Fit(complete(config), cache or FeatureCache(), checkpoint, strict, progress).run(data, command)

    # Findings.

    def findings(self, records: Sequence[Record], strict: bool = False) -> Iterator[tuple[Record, Finding | Failure]]:
        """A finding for each record, in order, or what is wrong with its file. Reads the path of a record only."""
        for record, result, _ in self._judged(records, strict, given=False):
            yield record, result

    def findings_given(self, records: Sequence[Record]) -> Iterator[tuple[Record, Finding | Failure, Finding | None]]:
        """As `findings`, and beside each what the detector says when told the record's product. Not deployable.

        The paper's own protocol, for comparison in `evaluate` only. None where the detector takes no product, or the
        model does not know the record's.
        """
        yield from self._judged(records, False, given=self.takes_product)

    def said(self, records: Sequence[Record], strict: bool = False) -> Iterator[tuple[Record, Said | Failure]]:
        """What the model says of each record's image, undecided, in order, or what is wrong with its file."""
        for record, said, _, _ in self._said(records, strict, given=False):
            yield record, said

    def _judged(
        self, records: Sequence[Record], strict: bool, given: bool
    ) -> Iterator[tuple[Record, Finding | Failure, Finding | None]]:
        for record, said, size, told in self._said(records, strict, given):
            if isinstance(said, Failure):
                yield record, said, None
                continue
            path = str(record.path)
            found = self.judge.finding(path, said, size)
            other = found if given and record.product in self.products else None
            yield record, found, other if told is None else self.judge.finding(path, told, size)

    def _said(
        self, records: Sequence[Record], strict: bool, given: bool
    ) -> Iterator[tuple[Record, Said | Failure, tuple[int, int], Said | None]]:
        """With the size of each image and, where it differs, what is said when told the record's product."""
        loader = Loader(records, self.preparation, strict=strict)
        done, failed = 0, 0
        for batch in loader:
            chosen = batch.index.tolist()
            names = [records[index].product for index in chosen]
            scores, novelty, told = self._scored(batch.images, names if given else None)
            for place, index in enumerate(chosen):
                while done < index:
                    yield records[done], loader.failures[failed], (0, 0), None
                    done, failed = done + 1, failed + 1
                strange = float(novelty[place])
                other = _said(*told[place], strange) if place in told else None
                yield records[index], _said(scores, place, strange), loader.sizes[index], other
                done = index + 1
        for missing in range(done, len(records)):
            yield records[missing], loader.failures[failed + missing - done], (0, 0), None

    def inspect(self, source: Source | Sequence[Source]) -> Finding | list[Finding]:
        """What is to be said of an image, or of several.

        source   a file, its content, an array (H, W), (H, W, 3) or (H, W, 4), a Pillow image: one finding;
                 a folder, an array (N, H, W, 3) or a sequence of the above: a list, in order

        Raises ImageError for what is not an image.
        """
        if isinstance(source, np.ndarray) and source.ndim == 4:
            return [self._one(image) for image in source]
        if isinstance(source, Path | str) and Path(source).is_dir():
            return [self._one(path) for path in images_below(Path(source))]
        if isinstance(source, Path | str | bytes | np.ndarray | Image.Image):
            return self._one(source)
        return [self._one(image) for image in source]

    def _one(self, source: Source) -> Finding:
        array = decode(Path(source) if isinstance(source, str) else source)
        images = torch.from_numpy(self.preparation.image(array))[None]
        name = str(source) if isinstance(source, Path | str) else None
        scores, novelty, _ = self._scored(images)
        return self.judge.finding(name, _said(scores, 0, float(novelty[0])), (array.shape[1], array.shape[0]))

    @torch.inference_mode()
    def _scored(
        self, images: torch.Tensor, names: Sequence[str | None] | None = None
    ) -> tuple[Scores, torch.Tensor, dict[int, tuple[Scores, int]]]:
        """Scores without a label, novelty and, where names are given, other scores and a row in them for the images whose
        named product is not the one that they were taken for: told their product, all others score as they do anyway."""
        features, shown = (self.engine(images), None) if self.blank is None else self.blank.look(images, self.engine)
        plain: Scores = self.detector(features)
        scores = _hidden(self.blank, shown, _aligned(self.aligner, features, plain))
        novelty = self.novelty(features)
        known = {place: self.products.index(name) for place, name in enumerate(names or ()) if name in self.products}
        if _takes_product(self.aligner):
            places = list(known)
        else:
            guess = [None] * len(images) if scores.products is None else scores.products.argmax(1).tolist()
            places = [place for place, number in known.items() if number != guess[place]]
        if not places:
            return scores, novelty, {}
        told = self._told([level[places] for level in features], plain.of(places), [known[place] for place in places])
        told = _hidden(self.blank, None if shown is None else shown[places], told)
        return scores, novelty, {place: (told, row) for row, place in enumerate(places)}

    def _told(self, features: Features, plain: Scores, products: Sequence[int]) -> Scores:
        """Scores under products: an aligner that can be told them is, else the detector, before it is aligned."""
        numbers = torch.tensor(products)
        if _takes_product(self.aligner):
            return self.aligner.forward_given(features, plain, numbers)
        if isinstance(self.detector, TakesProduct):
            plain = self.detector.forward_given(features, numbers)
        return _aligned(self.aligner, features, plain)

    # Looking inside.

    def features(
        self, records: Sequence[Record], *, cache: FeatureCache | None = None, progress: Progress | None = None
    ) -> tuple[FeatureSet, list[Record]]:
        """Features of some images as the detector gets them, and the records of those that can be read.

        Raises DataError for no images, ImageError where none can be read.
        """
        run = Fit(self.config, cache or FeatureCache(), None, False, progress)
        found, readable = run.read(records, self.split, self.engine, "images")
        if self.blank is None:
            return found, readable
        run.blank = self.blank
        return run.read(readable, self.split, self.engine, "images", _shown_in(found, self.blank))

    def train_again(
        self, watch: Watch, *, cache: FeatureCache | None = None, progress: Progress | None = None
    ) -> tuple[Detector, History]:
        """Train as this model was trained: the same settings, seed and images, on a CPU with the same bits.

        watch   called at each check with the step and the detector as it is then, which it must leave as it is

        Raises DataError where an image that it learnt from is gone or has changed.
        """
        run = Fit(self.config, cache or FeatureCache(), None, True, progress)
        if self.config["split"]["cross"]:
            raise ConfigError(
                "split.cross: the model is several, each trained on other images: none can be trained again alone"
            )
        run.blank = self.blank
        for record in (*self.split.train, *self.split.held_out):
            if not record.path.is_file() or content_hash(record.path) != self.split.hashes.get(record.path):
                raise DataError(
                    f"{record.path}: gone or changed since the model learnt from it, so it cannot be trained again"
                )
        return run.again(self.split, self.engine, watch)

    # Keeping.

    def save(self, path: Path | str, overwrite: bool = False) -> Path:
        """Write the model as a folder, all or nothing.

        Raises StoreError where something else is there.
        """
        files = {
            "config.toml": write_toml(self.config).encode(),
            "weights.safetensors": pack_tensors(_state(self.detector, self.aligner, self.novelty, self.blank)),
            "calibration.json": pack_json(self.versions.as_list()),
            "split.json": pack_json({"products": self.products, "split": self.split.as_dict(), "facts": self.facts}),
            "card.md": self.card().encode(),
        }
        return write_folder(Path(path), files, overwrite)

    @classmethod
    def load(cls, path: Path | str) -> Inspector:
        """Read a model that `save` wrote.

        Raises StoreError for a damaged or foreign folder, or where the backbone's weights are not those it learnt with.
        """
        files = read_model(Path(path), FILES)
        config = complete(_toml(files["config.toml"]))
        about = json.loads(files["split.json"])
        eyes = construct(FeatureSettings, config["features"], "features").build()
        if eyes.fingerprint != about["facts"]["features"]:
            raise StoreError(
                f"{path}: the weights of {config['features']['backbone']} on this machine are not those it learnt with: "
                f"see `unispect doctor`, and set features.weights to the file that was used"
            )
        detector, aligner, novelty = _empty(config, about["facts"], len(about["products"]), eyes)
        blank = _empty_blank(config["preparation"]["size"], about["products"], about["facts"])
        try:
            _fill(detector, aligner, novelty, blank, unpack_tensors(files["weights.safetensors"]))
        except RuntimeError as error:
            raise StoreError(
                f"{path}: the weights are not those of method {config['method']!r} in this version of unispect: "
                "the model was saved by another version, fit it again"
            ) from error
        versions = Versions.from_list(json.loads(files["calibration.json"]))
        split = Split.from_dict(about["split"])
        parts = eyes, detector, aligner, novelty, versions, split, about["facts"], blank
        return cls(config, about["products"], *parts)

    def with_false_alarm_rate(self, rate: float) -> Inspector:
        """The same model under another promise; nothing is learnt anew.

        Raises CalibrationError where the calibration images cannot support it.
        """
        decision = changed(self.decision, false_alarm_rate=rate, threshold=None)
        return self.with_versions(self.versions.then("with_false_alarm_rate", f"false_alarm_rate={rate}", decision))

    def with_versions(self, versions: Versions) -> Inspector:
        """The same model, decided by the last of these versions; nothing is learnt anew.

        Raises CalibrationError where its calibration images cannot support its promise.
        """
        parts = self.engine, self.detector, self.aligner, self.novelty
        return Inspector(self.config, self.products, *parts, versions, self.split, self.facts, self.blank)

    def with_product(
        self,
        name: str,
        records: Sequence[Record],
        *,
        replace: bool = False,
        cache: FeatureCache | None = None,
        strict: bool = False,
        progress: Progress | None = None,
    ) -> Inspector:
        """The same model and one more product, learnt from its good training images alone.

        Nothing that is known of the other products is touched: their images score the same, bit by bit, unless they are
        taken for the new one. The threshold is set anew from the calibration images of all; those of the other products
        keep the scores that they had.

        replace   the product is known, and what is known of it is forgotten first

        Raises ConfigError where the name is taken or the method learns all products as one, and what `fit` raises.
        """
        holding = self._holding()
        if (name in self.products) != replace:
            why = "does not know it: add it without replace" if replace else "knows it already: replace it (--replace)"
            raise ConfigError(f"product {name!r}: the model {why}")
        own = [changed(record, product=name) for record in records if record.split == "train"]
        self.decision.check_products([*self.products, name], more=True)
        run = Fit(self.config, cache or FeatureCache(), None, strict, progress)
        part, new, split, facts = run.run_more(own, self.engine)
        if facts["shapes"] != self.facts["shapes"]:
            raise DataError(f"product {name!r}: its features are {facts['shapes']}, expected {self.facts['shapes']}")
        detector, novelty = deepcopy(holding), deepcopy(self.novelty)
        assert isinstance(novelty, Novelty)
        detector.add(part)
        novelty.add(new)
        if replace:
            detector.remove(self.products.index(name))
            novelty.remove(self.products.index(name))
        assert isinstance(detector, Detector)
        names = [*(other for other in self.products if other != name), name]
        calibration, notes = run.calibrate_more(detector, novelty, split, self.engine, names, self.calibration)
        old, scores, known = self._without(name) if replace else (self.split, self.calibration, self.facts)
        merged = _split_of(
            {role: getattr(old, role) + getattr(split, role) for role in ROLES}, {**old.hashes, **split.hashes}
        )
        about = known | {"failures": known["failures"] + notes["failures"], "marks": known["marks"] | notes["marks"]}
        versions = self.versions.then(
            "with_product", f"product {name} {'replaced' if replace else 'added'}", None, scores.with_also(calibration)
        )
        return Inspector(self.config, names, self.engine, detector, None, novelty, versions, merged, about)

    def without_product(self, name: str) -> Inspector:
        """The same model without a product, whose images and scores leave it, too.

        Raises ConfigError for an unknown or the only product, or a method that learns all products as one;
        CalibrationError where the images that are left cannot support the promised rate.
        """
        holding = self._holding()
        if name not in self.products:
            raise ConfigError(unknown_name("product", name, self.products))
        if len(self.products) == 1:
            raise ConfigError(f"product {name!r} is the only one that the model knows: a model of nothing can judge nothing")
        detector, novelty = deepcopy(holding), deepcopy(self.novelty)
        assert isinstance(novelty, Novelty)
        detector.remove(self.products.index(name))
        novelty.remove(self.products.index(name))
        assert isinstance(detector, Detector)
        split, calibration, facts = self._without(name)
        names = [known for known in self.products if known != name]
        versions = self.versions.then("without_product", f"product {name} removed", None, calibration)
        return Inspector(self.config, names, self.engine, detector, None, novelty, versions, split, facts)

    def _without(self, name: str) -> tuple[Split, Calibration, dict[str, Any]]:
        """The images, calibration scores and facts of all other products."""
        kept = {role: tuple(record for record in getattr(self.split, role) if record.product != name) for role in ROLES}
        split = _split_of(kept, self.split.hashes)
        hashes = {split.hashes[record.path] for role in ROLES for record in kept[role]}
        marks = {content: mark for content, mark in self.facts["marks"].items() if content in hashes}
        return split, self.calibration.without(name), self.facts | {"marks": marks}

    def counts(self) -> dict[str, dict[str, int]]:
        """How many images of each product were learnt from, held out and used to calibrate; clusters are not told apart."""
        named = [None] if self.facts["clustered"] else list(self.products)
        return {
            name or ", ".join(self.products): {
                role: sum(record.product == name for record in getattr(self.split, role)) for role in ROLES
            }
            for name in named
        }

    def _holding(self) -> HoldsProducts:
        """The detector, which knows its products one by one."""
        if self.config["split"]["cross"]:
            raise ConfigError(
                "split.cross: the model is several, to which no product can be added alone: fit it again on all"
            )
        if self.aligner is not None:
            raise ConfigError(
                f"aligner {self.config['aligner']!r} learns all products as one, so none can be added or removed alone: "
                "fit the model again on all of them"
            )
        if self.blank is not None:
            raise ConfigError("the model has masks, with which no product is added or removed alone: fit it again on all")
        if self.facts["clustered"]:
            raise ConfigError("the products of this model were found by clustering and have no names: fit it on named ones")
        if not isinstance(self.detector, HoldsProducts):
            able = ", ".join(name for name, kind in METHODS.items() if hasattr(kind, "remove"))
            raise ConfigError(
                f"method {self.config['method']!r} learns all products as one, so none can be added or removed alone: "
                f"fit it again on all, or use one of {able}"
            )
        return self.detector

    def card(self) -> str:
        """What the model is, in words a person can file: data, settings, promise and limits."""
        kinds = "found by clustering: no product was named" if self.facts["clustered"] else "named in the data"
        lines = [
            f"# Model card: {self.config['method']} on {len(self.products)} product{'s' * (len(self.products) != 1)}",
            "",
            f"- Products ({kinds}): {', '.join(self.products)}",
            f"- Images: {len(self.split.train)} to learn from, {len(self.split.held_out)} held out for scales and "
            f"stopping, {len(self.split.calibration)} to calibrate the threshold. All were taken to be good.",
            f"- Backbone: {self.config['features']['backbone']}, {self.config['preparation']['size']} px, precision "
            f"{self.config['features']['precision']}; fingerprint {self.facts['features'][:16]}",
            *card_lines(self.judge),
            f"- Scores of products are brought to one scale by: {_alignment(self.config)}.",
            f"- Seed {self.config['seed']}; {_learning(self.facts)}",
            f"- A product it has never seen: {_strangers(self.unknown_threshold, float(self.decision.unknown_rate))}",
            *self._masks_told(),
            "- Not covered: changes of camera, light or lens.",
            "",
        ]
        return "\n".join(lines)

    def _masks_told(self) -> Iterator[str]:
        """Which part of which product is not looked at."""
        for name in self.facts.get("masked", []):
            assert self.blank is not None
            yield f"- Not looked at: {self.blank.share(self.products.index(name)):.1%} of images of {name}, by its mask."


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """A model of all images but some, and what it says of those."""

    names: list[str]
    detector: Detector
    aligner: Aligner | None
    novelty: Novelty
    facts: dict[str, Any]
    calibration: Calibration


class Fit:
    """One run of `Inspector.fit`, or of what is to be known before it."""

    def __init__(
        self, config: dict[str, Any], cache: FeatureCache, checkpoint: Path | None, strict: bool, progress: Progress | None
    ) -> None:
        self.config, self.cache, self.checkpoint, self.strict = config, cache, checkpoint, strict
        self.tell = progress or (lambda stage, done, total, losses: None)
        self.preparation = construct(Preparation, config["preparation"], "preparation")
        self.decision = construct(DecisionSettings, config["decision"], "decision")
        self.failures: list[Failure] = []
        self.marks: dict[str, bytes] = {}
        self.blank: Blank | None = None

    def run(self, data: Path | str | Sequence[Record], command: str) -> Inspector:
        split = self.divided(data)
        self.check_promise(split)
        self.decision.check_products([record.product for record in split.train])
        self.blank = self._blank(split)
        eyes = construct(FeatureSettings, self.config["features"], "features").build()
        if self.config["split"]["cross"]:
            return self._crossed(split, eyes, command)
        names, detector, facts, seen_by = self._learnt(split, eyes)
        aligner, seen = self._learnt_aligner(detector.eval(), seen_by, len(names), eyes)
        novelty = _acquainted(seen_by["train"], len(names))
        if self.blank is not None and len(names) > 1:
            self.blank.known = _acquainted(self._unmasked(split, names, eyes), len(names)).known
        calibration = self._calibrate(detector, aligner, novelty, split, eyes, names)
        self._check_calibration(calibration)
        about = facts | seen | self._notes() | self._masked()
        images = {split.hashes[record.path]: str(record.path) for record in split.calibration}
        versions = Versions.first(self.decision, calibration, images, command, "fitted")
        parts = eyes, detector, aligner, novelty, versions, split, about, self.blank
        return Inspector(self.config, names, *parts)

    def _crossed(self, split: Split, eyes: Engine, command: str) -> Inspector:
        """A model of as many as there are parts of the images, each of which is calibrated on the part that it left out."""
        records, count = split.train, self.config["split"]["cross"]
        self.checkpoint = None  # which is of one model: a run that was killed begins anew
        parts = [self._without_part(split, records, part, eyes) for part in self._parts(split, count)]
        if parts[0].facts["clustered"] and max(len(part.names) for part in parts) > 1:
            raise DataError(
                "split.cross: products without names are other clusters in each part: name them, or leave it out"
            )
        detector = Crossed([part.detector for part in parts], [part.aligner for part in parts])
        novelty = CrossedNovelty([part.novelty for part in parts])
        calibration = crossed(detector, novelty, [part.calibration for part in parts])
        self._check_calibration(calibration)
        versions = Versions.first(self.decision, calibration, {}, command, "fitted")
        facts = parts[0].facts | self._notes()
        return Inspector(self.config, parts[0].names, eyes, detector, None, novelty, versions, split, facts)

    def _parts(self, split: Split, count: int) -> list[np.ndarray]:
        """Places of the images in each part; those of a unit are in one."""
        names = sorted({str(record.product) for record in split.train})
        products = torch.tensor([names.index(str(record.product)) for record in split.train])
        units = torch.tensor(unit_numbers(split.train, split.hashes))
        dealt = deal(products, units, count, self.config["seed"]).numpy()
        found = [np.flatnonzero(dealt == part) for part in range(count)]
        if min(map(len, found)) == 0:
            raise DataError(f"split.cross={count}: {len(split.train)} images are too few for so many parts: expected fewer")
        return found

    def _without_part(self, split: Split, records: Sequence[Record], part: np.ndarray, eyes: Engine) -> _Part:
        """A model of all images but a part, and what it says of that part."""
        out = set(part.tolist())
        others = [record for place, record in enumerate(records) if place not in out]
        learning = split_normals(others, self.config["split"]["held_out"], 0.0, self.config["seed"], split.hashes)
        names, detector, facts, seen_by = self._learnt(learning, eyes)
        aligner, seen = self._learnt_aligner(detector.eval(), seen_by, len(names), eyes)
        novelty = _acquainted(seen_by["train"], len(names))
        left_out = Split((), (), tuple(records[place] for place in part), split.hashes)
        calibration = self._calibrate(detector, aligner, novelty, left_out, eyes, names)
        return _Part(names, detector, aligner, novelty, facts | seen, calibration)

    def run_more(self, data: Sequence[Record], eyes: Engine) -> tuple[Detector, Novelty, Split, dict[str, Any]]:
        """A detector of these images alone, as a part of another model that brings the engine and calibrates."""
        split = self.divided(data)
        _, detector, facts, seen_by = self._learnt(split, eyes)
        return detector.eval(), _acquainted(seen_by["train"], 1), split, facts

    def calibrate_more(
        self,
        detector: Detector,
        novelty: Novelty,
        split: Split,
        eyes: Engine,
        names: Sequence[str],
        known: Calibration,
    ) -> tuple[Calibration, dict[str, Any]]:
        """Scores of the calibration images of a split, to join those known, and what is to be noted of all images."""
        base = None if known.regions is None else known.regions.base
        return self._calibrate(detector, None, novelty, split, eyes, names, base), self._notes()

    def again(self, split: Split, eyes: Engine, watch: Watch) -> tuple[Detector, History]:
        """The detector trained on a split, watched, and what the loop saw."""
        _, detector, facts, _ = self._learnt(split, eyes, watch)
        return detector.eval(), History(**facts["history"])

    def _learnt(
        self, split: Split, eyes: Engine, watch: Watch | None = None
    ) -> tuple[list[str], Detector, dict[str, Any], dict[str, Labelled]]:
        """Names of the products, the learnt detector, facts about it, and what it was learnt with."""
        gradients = issubclass(METHODS[self.config["method"]], GradientDetector)
        aligned = self.config["aligner"] != NONE and not self.config["split"]["folds"]
        wanted = ("train", "held_out") if gradients or aligned else ("train",)
        roles = {name: self._read_named(getattr(split, name), split, eyes, name) for name in wanted}
        names, labels, clustered = self._products(split, roles)
        data = {
            name: Labelled(found, labels[name], np.array(unit_numbers(records, split.hashes), np.int64))
            for name, (found, records) in roles.items()
        }
        _check_enough(data["train"].product, names)
        shapes = data["train"].features.shapes
        detector = empty_detector(self.config, shapes, len(names), eyes)
        identity = self._identity(split, eyes)
        history, passes = self._learn(detector, data["train"], data.get("held_out"), self.checkpoint, identity, watch)
        about = {"features": eyes.fingerprint, "shapes": [list(shape) for shape in shapes], "clustered": clustered}
        return names, detector, about | {"history": asdict(history), "passes": passes}, data

    # Masks.

    def _blank(self, split: Split) -> Blank | None:
        """The masks of the settings, filled with the mean of the training images of their products."""
        if "masks" not in self.config:
            return None
        names = sorted({str(record.product) for record in (*split.train, *split.held_out)})
        sizes: dict[str | None, dict[tuple[int, int], Path]] = {record.product: {} for record in split.train}
        means = {}
        for name in (known for known in mentioned(self.config["masks"]) if known in sizes):
            means[name], sizes[name] = self._mean([record for record in split.train if record.product == name])
        return Blank.of(names, ignored(self.config["masks"], self.preparation, sizes), means)

    def _mean(self, records: Sequence[Record]) -> tuple[np.ndarray, dict[tuple[int, int], Path]]:
        """Mean of the prepared images, (3, size, size), and an image for each size that there is."""
        loader, total, count = Loader(records, self.preparation), np.zeros(1), 0
        for batch in loader:
            total = total + batch.images.numpy().sum(0, dtype=np.float64)
            count += len(batch.images)
        return total / max(1, count), {size: records[place].path for place, size in loader.sizes.items()}

    def _masked(self) -> dict[str, Any]:
        """Which products have a mask."""
        return {"masked": mentioned(self.config["masks"])} if "masks" in self.config else {}

    def _read_named(
        self, records: Sequence[Record], split: Split, eyes: Engine, stage: str
    ) -> tuple[FeatureSet, list[Record]]:
        """As `read`, each image under the mask of the product that it is named as."""
        if self.blank is None:
            return self.read(records, split, eyes, stage)
        names = sorted({str(record.product) for record in (*split.train, *split.held_out)})
        return self.read(records, split, eyes, stage, [names.index(str(record.product)) for record in records])

    def _unmasked(self, split: Split, names: Sequence[str], eyes: Engine) -> Labelled:
        """The training images as they are, by which products are recognised before they are masked."""
        found, records = self.read(split.train, split, eyes, "train, without masks")
        return Labelled(found, _numbers(records, {name: number for number, name in enumerate(names)}))

    # The aligner.

    def _learnt_aligner(
        self, detector: Detector, data: Mapping[str, Labelled], products: int, eyes: Engine
    ) -> tuple[Aligner | None, dict[str, Any]]:
        """The aligner that the settings ask for, and the channels that it reads."""
        if self.config["aligner"] == NONE:
            return None, {}
        features = data["train"].features.stacked([0])
        with torch.inference_mode():
            channels = width(features, detector(features))
        aligner = build_aligner(self.config, channels, products)
        assert aligner is not None
        aligner.learn(self._pairs(detector, data, products, eyes, aligner.grid))
        return aligner.eval(), {"view": channels}

    def _pairs(self, detector: Detector, data: Mapping[str, Labelled], products: int, eyes: Engine, grid: int) -> Pairs:
        """Views and scores of images that the detector that scored them had not learnt from."""
        folds, train = self.config["split"]["folds"], data["train"]
        if not folds:
            return self._watched(detector, detector, _evenly(data["held_out"], MOST_PAIRS), grid)
        unit = np.arange(len(train.product)) if train.unit is None else train.unit
        dealt = deal(torch.from_numpy(train.product), torch.from_numpy(unit), folds, self.config["seed"]).numpy()
        parts = []
        for fold in range(folds):
            other = empty_detector(self.config, train.features.shapes, products, eyes)
            self._learn(other, train.part(np.flatnonzero(dealt != fold)), data.get("held_out"), None, "", None)
            scored = _evenly(train.part(np.flatnonzero(dealt == fold)), MOST_PAIRS // folds)
            parts.append(self._watched(detector, other.eval(), scored, grid))
        return Pairs.joined(parts)

    def _watched(self, detector: Detector, scorer: Detector, data: Labelled, grid: int) -> Pairs:
        """What an aligner of a detector reads of images, and what the scorer says of them."""
        views, said = [], []
        with torch.no_grad():
            for done, (features, _) in enumerate(data.batches()()):
                scores: Scores = scorer(features)
                own: Scores = scores if scorer is detector or scores.context is None else detector(features)
                views.append(view(features, own, grid))
                said.append(Statistics.of(scores))
                self.tell("scores to align", min((done + 1) * BATCH, len(data.product)), len(data.product), {})
        return Pairs(torch.cat(views), Statistics.joined(said), torch.from_numpy(data.product))

    def _notes(self) -> dict[str, Any]:
        """Facts about the images."""
        return {
            "failures": list(dict.fromkeys(f"{failure.path}: {failure.reason}" for failure in self.failures)),
            "marks": {content: mark.hex() for content, mark in self.marks.items()},
        }

    def _learn(
        self,
        detector: Detector,
        train: Labelled,
        held_out: Labelled | None,
        checkpoint: Path | None,
        identity: str,
        watch: Watch | None,
    ) -> tuple[History, int]:
        """What a loop saw of held-out images, and the number of passes for statistics."""
        if isinstance(detector, StatisticalDetector):
            return History(), learn(detector, train, self._step)
        assert isinstance(detector, GradientDetector)
        assert held_out is not None
        recipe = construct(Recipe, self.config["training"], "training")
        seed = self.config["seed"]
        return fit(detector, train, held_out, recipe, seed, checkpoint, identity, self._step, watch), 0

    def check_promise(self, split: Split) -> None:
        """Raises CalibrationError where there are too few calibration images, before anything is learnt in vain."""
        used = split.train if self.config["split"]["cross"] else split.calibration
        check_support([record.group for record in used], self.decision)

    def divided(self, data: Path | str | Sequence[Record]) -> Split:
        """The images by what each is for."""
        records = read_data(data) if isinstance(data, Path | str) else list(data)
        normal = [record for record in records if record.split == "train"]
        if not normal:
            raise DataError(f"data: {len(records)} images, none of them to learn from: expected good images in train/good")
        normal = self._present(normal)
        shares, seed = self.config["split"], self.config["seed"]
        whole = self.config["decision"]["guarantee"] == "group"
        if shares["cross"]:
            return split_normals(normal, 0.0, 0.0, seed)
        return split_normals(normal, shares["held_out"], shares["calibration"], seed, whole_groups=whole)

    def _present(self, records: Sequence[Record]) -> list[Record]:
        """Records whose files are there; a missing one is named like any other that cannot be read."""
        for record in records:
            if not record.path.is_file():
                if self.strict:
                    raise ImageError(f"{record.path}: no such file")
                self.failures.append(Failure(record.path, "no such file"))
        return [record for record in records if record.path.is_file()]

    @property
    def key(self) -> str:
        """What features depend on besides the network, for the cache."""
        return json.dumps(asdict(self.preparation), sort_keys=True)

    def read(
        self,
        records: Sequence[Record],
        split: Split,
        eyes: Engine,
        stage: str,
        shown: Sequence[int] | None = None,
    ) -> tuple[FeatureSet, list[Record]]:
        """Features of the images that can be read, and their records.

        shown   number of the product of each, whose mask is laid over it; none is unless given
        """
        if not records:
            raise DataError(f"{stage}: no image is left for it: give more images, or larger shares under [split]")
        contents = [split.hashes.get(record.path) or content_hash(record.path) for record in records]
        content_of = {record.path: content for record, content in zip(records, contents, strict=True)}

        def witness(record: Record, image: np.ndarray) -> None:
            self.cache.keep_note(MARKS, content_of[record.path], fingerprint(image))

        def batches(wanted: list[int]) -> Iterator[Batch]:
            loader = Loader([records[place] for place in wanted], self.preparation, strict=self.strict, witness=witness)
            places = torch.tensor(wanted)
            for batch in loader:
                yield self._filled(Batch(batch.images, places[batch.index]), shown)
            self.failures += loader.failures

        found = self.cache.features(
            [record.path for record in records],
            self._masked_contents(contents, shown),
            batches,
            eyes,
            self.key,
            lambda done, total: self.tell(f"features: {stage}", done, total, {}),
        )
        if not len(found):
            raise ImageError(f"{stage}: none of {len(records)} images can be read: see `unispect check`")
        readable = [records[index] for index in found.indices]
        self._mark({content_of[record.path]: record.path for record in readable})
        return found, readable

    def _filled(self, batch: Batch, shown: Sequence[int] | None) -> Batch:
        """A batch under the masks of products, by place."""
        if self.blank is None or shown is None:
            return batch
        return Batch(self.blank(batch.images, torch.tensor([shown[place] for place in batch.index.tolist()])), batch.index)

    def _masked_contents(self, contents: Sequence[str], shown: Sequence[int] | None) -> list[str]:
        """Names in the cache for images under the masks of products; of those without a mask, their own."""
        if self.blank is None or shown is None:
            return list(contents)
        marks = {number: self.blank.mark(number) for number in set(shown)}
        pairs = zip(contents, (marks[number] for number in shown), strict=True)
        return [sha256(f"{content} {mark}".encode()).hexdigest() if mark else content for content, mark in pairs]

    def _mark(self, files: Mapping[str, Path]) -> None:
        """Fingerprints of the images, by content, by which `evaluate` knows near-duplicates; kept in the cache, too."""
        for content, mark in zip(files, ahead(self._marked, files.items(), 2, 16), strict=True):
            self.marks[content] = mark

    def _marked(self, file: tuple[str, Path]) -> bytes:
        content, path = file
        mark = self.cache.note(MARKS, content)
        if mark is None:
            mark = fingerprint(decode(path))
            self.cache.keep_note(MARKS, content, mark)
        return mark

    def _products(
        self, split: Split, roles: Mapping[str, tuple[Any, list[Record]]]
    ) -> tuple[list[str], dict[str, np.ndarray], bool]:
        """Names of the products and the number of each image's; clusters of pooled features where none is named."""
        named = {record.product for _, records in roles.values() for record in records}
        if None not in named:
            names = sorted(str(name) for name in named)
            place = {name: number for number, name in enumerate(names)}
            return names, {role: _numbers(records, place) for role, (_, records) in roles.items()}, False
        if len(named) > 1:
            raise DataError("some images have a product and some have none: name the product of all images, or of none")
        counts = {role: len(records) for role, (_, records) in roles.items()}
        found = discover(torch.cat([_pooled(features) for features, _ in roles.values()]), seed=self.config["seed"]).numpy()
        found = _inhabited(found, counts["train"])
        names = [f"cluster-{number + 1}" for number in range(int(found.max()) + 1)]
        parts = np.split(found, np.cumsum(list(counts.values()))[:-1])
        return names, dict(zip(counts, parts, strict=True)), True

    def _calibrate(
        self,
        detector: Detector,
        aligner: Aligner | None,
        novelty: Novelty,
        split: Split,
        eyes: Engine,
        names: Sequence[str],
        base: float | None = None,
    ) -> Calibration:
        features, records = self.read(split.calibration, split, eyes, "calibration")
        shown = [] if self.blank is None else _shown_in(features, self.blank)
        if self.blank is not None:
            features, records = self.read(records, split, eyes, "calibration", shown)

        def said() -> Iterator[Said]:
            with torch.inference_mode():
                for start, (_, levels) in zip(range(0, len(records), 8), features.batches(8), strict=True):
                    novel, part = novelty(levels), torch.tensor(shown[start : start + 8])
                    scores = _hidden(self.blank, part, _aligned(aligner, levels, detector(levels)))
                    yield from (_said(scores, place, float(novel[place])) for place in range(len(novel)))

        return calibration_of(said(), records, names, self.decision, self.preparation, base)

    def _check_calibration(self, calibration: Calibration) -> None:
        rate, count = self.config["decision"]["false_alarm_rate"], len(calibration.scores)
        if count < needed(rate):
            raise CalibrationError(
                f"{count} readable calibration images cannot support false_alarm_rate={rate}: "
                f"at least {needed(rate)} are needed"
            )

    def _step(self, done: int, total: int, losses: dict[str, float]) -> None:
        self.tell("training", done, total, losses)

    def _identity(self, split: Split, eyes: Engine) -> str:
        about = {"config": self.config, "split": split.as_dict(), "features": eyes.fingerprint}
        if self.blank is not None:  # a mask may change while its name stays
            about["masks"] = [self.blank.mark(number) for number in range(len(self.blank.get_buffer("row")))]
        return sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def empty_detector(config: Mapping[str, Any], shapes: Sequence[tuple[int, ...]], products: int, eyes: Engine) -> Detector:
    """The detector that the settings describe, before it has learnt anything."""
    method = config["method"]
    if not METHODS[method].trains_encoder:
        return build(config, shapes, products)
    if not config["features"].get("image") or not isinstance(eyes.extractor, PyramidExtractor):
        raise ConfigError(
            f"features: {method} trains a copy of the backbone and needs the image, so features.image must be true and "
            f"features.backbone a network; got image={_shown(config['features']['image'])}, "
            f"backbone={_shown(config['features']['backbone'])}"
        )
    return build(config, shapes, products, TrainedEncoder(eyes.extractor))


def _empty(
    config: Mapping[str, Any], facts: Mapping[str, Any], products: int, eyes: Engine
) -> tuple[Detector, Aligner | None, Novelty | CrossedNovelty]:
    """What learns, before it has."""
    shapes = [tuple(shape) for shape in facts["shapes"]]
    count = config["split"]["cross"]
    built = [
        (
            empty_detector(config, shapes, products, eyes),
            build_aligner(config, facts.get("view", 0), products),
            Novelty(tuple(shape[0] for shape in shapes), products),
        )
        for _ in range(count or 1)
    ]
    if not count:
        return built[0]
    detectors, aligners, novelty = zip(*built, strict=True)
    return Crossed(detectors, aligners), None, CrossedNovelty(novelty)


def _shown(value: Any) -> str:
    return repr(list(value)) if isinstance(value, tuple) else repr(value)


def _aligned(aligner: Aligner | None, features: Features, scores: Scores) -> Scores:
    """Scores on the common scale."""
    if aligner is None:
        return scores
    aligned: Scores = aligner(features, scores)
    return aligned


def _hidden(blank: Blank | None, shown: torch.Tensor | None, scores: Scores) -> Scores:
    """Scores whose maps show nothing where the masks of products ignore it."""
    if blank is None or shown is None:
        return scores
    return changed(scores, maps=blank.hidden(scores.maps, shown))


@torch.inference_mode()
def _shown_in(features: FeatureSet, blank: Blank) -> list[int]:
    """The number of the product that each image resembles most, by features of what nothing masks yet."""
    return [number for _, levels in features.batches(8) for number in blank.resembled(levels).tolist()]


def _empty_blank(size: int, products: Sequence[str], facts: Mapping[str, Any]) -> Blank | None:
    """Masks of some products, to be filled; None where none has one."""
    masked = sorted(products.index(name) for name in facts.get("masked", []))
    known = Recogniser([shape[0] for shape in facts["shapes"]], len(products)) if len(products) > 1 else None
    return Blank(masked, len(products), size, known) if masked else None


@torch.no_grad()
def _acquainted(train: Labelled, products: int) -> Novelty:
    """What tells products never seen from those that were learnt."""
    novelty = Novelty(tuple(shape[0] for shape in train.features.shapes), products)
    for features, product in train.batches()():
        novelty.update(features, product)
    novelty.finish()
    return novelty.eval()


def _strangers(threshold: float, rate: float) -> str:
    if threshold == math.inf:
        return f"not told, since nothing was asked for or too few images calibrate unknown_rate={rate}."
    return f"called unknown, and so are at most {rate:.2%} of normal images of the known products."


def _takes_product(aligner: object) -> TypeGuard[AlignsGiven]:
    return isinstance(aligner, AlignsGiven)


def _beside(aligner: Aligner | None, novelty: nn.Module, blank: Blank | None) -> nn.ModuleDict:
    """What is learnt beside a detector, by name."""
    known = {"novelty": novelty, "aligner": aligner, "blank": blank}
    return nn.ModuleDict({name: part for name, part in known.items() if part is not None})


def _state(detector: Detector, aligner: Aligner | None, novelty: nn.Module, blank: Blank | None) -> dict[str, torch.Tensor]:
    """All that was learnt, by name."""
    more = _beside(aligner, novelty, blank).state_dict()
    return {**detector.state_dict(), **{f"{BESIDE}{name}": value for name, value in more.items()}}


def _fill(
    detector: Detector,
    aligner: Aligner | None,
    novelty: nn.Module,
    blank: Blank | None,
    state: Mapping[str, torch.Tensor],
) -> None:
    """Put what `_state` gave in its place. Raises RuntimeError where it does not fit."""
    detector.load_state_dict({name: value for name, value in state.items() if not name.startswith(BESIDE)})
    own = {name.removeprefix(BESIDE): value for name, value in state.items() if name.startswith(BESIDE)}
    _beside(aligner, novelty, blank).load_state_dict(own)


def _said(scores: Scores, place: int, novelty: float) -> Said:
    """Of one image among the scores of several."""
    return Said(
        float(scores.image[place]),
        scores.maps[place].numpy(),
        None if scores.products is None else scores.products[place].numpy(),
        novelty,
        None if scores.unaligned is None else float(scores.unaligned[place]),
    )


def _evenly(data: Labelled, most: int) -> Labelled:
    """At most so many images, evenly taken."""
    count = len(data.product)
    return data if count <= most else data.part(np.linspace(0, count - 1, most).astype(np.int64))


def _alignment(config: Mapping[str, Any]) -> str:
    """What brings products to one scale."""
    if config["aligner"] == NONE:
        return "the detector's own means alone"
    folds = config["split"]["folds"]
    learnt = f"in {folds} folds" if folds else "on held-out images"
    return f"{config['aligner']}, learnt {learnt} that the detector which scored them had not learnt from"


def _learning(facts: Mapping[str, Any]) -> str:
    """How the detector was learnt."""
    if facts.get("passes"):
        return f"learnt in {facts['passes']} passes over the training images, without gradients"
    return f"held-out loss by level and check: {json.dumps(facts['history'])}"


def _numbers(records: Sequence[Record], place: Mapping[str, int]) -> np.ndarray:
    return np.array([place[str(record.product)] for record in records], dtype=np.int64)


def _split_of(roles: Mapping[str, tuple[Record, ...]], hashes: Mapping[Path, str]) -> Split:
    return Split(roles["train"], roles["held_out"], roles["calibration"], hashes)


def _pooled(features: Any) -> torch.Tensor:
    """Mean vector of the last level of each image, (n, C)."""
    return torch.cat([levels[-1].mean((2, 3)) for _, levels in features.batches(16)])


def _inhabited(labels: np.ndarray, train: int) -> np.ndarray:
    """Clusters with under two training images join the first one that has more; numbers are made dense."""
    counts = np.bincount(labels[:train], minlength=int(labels.max()) + 1)
    large = np.flatnonzero(counts >= 2)
    kept = labels if not len(large) else np.where(np.isin(labels, large), labels, large[0])
    return np.unique(kept, return_inverse=True)[1].astype(np.int64)


def _check_enough(product: np.ndarray, names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        if (count := int((product == number).sum())) < 2:
            raise DataError(f"product {name!r}: {count} readable training images: at least 2 are needed, and 20 are wise")


def _toml(content: bytes) -> dict[str, Any]:
    import tomllib

    return tomllib.loads(content.decode())
