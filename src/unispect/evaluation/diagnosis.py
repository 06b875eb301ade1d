"""What a flow makes of normal and defective images: is a better likelihood a better detector, and are all centres alive?

The "homogeneous mapping" of *Hierarchical Gaussian Mixture Normalizing Flow Modeling for Unified Anomaly Detection* (Yao et
al., 2024), https://arxiv.org/abs/2403.13349, Figure 2: training lowers the loss, normal and defective images move together,
and the AUROC falls. Labelled images are looked at here and learnt from nowhere: the model is made before they are read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unispect.data.records import Record
from unispect.detectors.base import Detector, HasCentres, HasLikelihoods
from unispect.errors import ConfigError, DataError
from unispect.evaluation.cases import product_of
from unispect.evaluation.run import labelled_test
from unispect.features.cache import FeatureCache, FeatureSet
from unispect.inspector import Inspector
from unispect.metrics.ranking import auroc
from unispect.nn.maps import top_mean
from unispect.types import Features

LEAST = 0.01  # share of the least likely places that stand for an image
BATCH = 16
Progress = Callable[[str, int, int, dict[str, float]], None]


@dataclass(frozen=True, slots=True)
class Look:
    """One image: how unlikely its least likely places are, -log-likelihood per dimension, nats, mean over the levels."""

    path: str
    product: str
    defective: bool
    unlikely: float


@dataclass(frozen=True, slots=True)
class Check:
    """A look at the detector in training: loss on held-out normals, and AUROC of `unlikely`, pooled over all images.

    held_out   mean over the levels of the negative log-likelihood per dimension, nats
    auroc      None where good or defective images are missing
    """

    step: int
    held_out: float
    auroc: float | None


@dataclass(frozen=True, slots=True)
class Centres:
    """The mixture of one level.

    distances   (K, K) between the main centres of the products
    shares      (K, M) of each product's normal vectors that its centres take; None of a product without normal images
    sharp       (K,) mean over these vectors of the share of the centre that has most of it: 1/M where all centres lie as
                one, 1 where each vector belongs to one alone
    """

    level: str
    distances: list[list[float]]
    shares: list[list[float] | None]
    sharp: list[float | None]

    def alive(self, product: int) -> float | None:
        """Effective number of centres inside a product, exp of the entropy of their shares: from 1 to M."""
        share = self.shares[product]
        if share is None:
            return None
        kept = np.array([value for value in share if value > 0])
        return float(np.exp(-(kept * np.log(kept)).sum()))


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that was seen.

    training   None where it was not run again; `missing` says why
    same       whether training again gave the model's own weights, bit by bit
    centres    empty for a method whose prior has none
    """

    method: str
    products: tuple[str, ...]
    looks: tuple[Look, ...]
    training: tuple[Check, ...] | None
    kept: tuple[int, ...]
    same: bool | None
    missing: str
    centres: tuple[Centres, ...]

    @property
    def auroc(self) -> float | None:
        """Of `unlikely`, pooled."""
        return _auroc([look.unlikely for look in self.looks], [look.defective for look in self.looks])

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"auroc": self.auroc, "alive": [_alive(centres) for centres in self.centres]}


def diagnose(
    inspector: Inspector,
    data: Path | str | Sequence[Record],
    *,
    training: bool = True,
    cache: FeatureCache | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Look at the likelihoods of labelled test images, and at the mixture.

    data       labelled test images: a folder, a manifest or records, as for `evaluate`
    training   train again, and look at every check; the model is not changed

    Raises ConfigError for a method without likelihoods, DataError where no labelled image is of a product that the model
    knows, and LeakError where one was learnt from.
    """
    detector = inspector.detector
    if not isinstance(detector, HasLikelihoods):
        raise ConfigError(
            f"method {inspector.config['method']!r} has no likelihoods to look at: diagnose a flow (hgad, cflow, fastflow)"
        )
    records = labelled_test(data)
    inspector.seen.refuse(records)
    known = [record for record in records if record.product in inspector.products or not _named(inspector)]
    if not known:
        raise DataError(f"none of {len(records)} labelled test images is of a product that the model knows")
    features, readable = inspector.features(known, cache=cache, progress=progress)
    seen = _Images(features, readable, _numbers(inspector, features, readable))
    checks, kept, same, missing = _trained_again(inspector, seen, cache, progress) if training else (None, (), None, "")
    return Diagnosis(
        method=str(inspector.config["method"]),
        products=inspector.products,
        looks=seen.looks(detector),
        training=checks,
        kept=kept,
        same=same,
        missing=missing,
        centres=_centres(detector, seen) if isinstance(detector, HasCentres) else (),
    )


@dataclass(frozen=True, slots=True)
class _Images:
    """Features of the labelled images, their records and the numbers of their products, (n,)."""

    features: FeatureSet
    records: Sequence[Record]
    product: Tensor

    def unlikely(self, detector: HasLikelihoods) -> np.ndarray:
        """(n,) of the images."""
        found = []
        with torch.inference_mode():
            for levels, part in self.batches():
                densities = detector.likelihoods(levels, self.product[part])
                found.append(torch.stack([top_mean(-density, LEAST) for density in densities]).mean(0))
        return torch.cat(found).double().numpy()

    def batches(self) -> Iterator[tuple[Features, slice]]:
        """Levels and the images that they are of."""
        start = 0
        for _, levels in self.features.batches(BATCH):
            yield levels, slice(start, start + len(levels[0]))
            start += len(levels[0])

    def looks(self, detector: HasLikelihoods) -> tuple[Look, ...]:
        pairs = zip(self.records, self.unlikely(detector).tolist(), strict=True)
        return tuple(Look(str(record.path), product_of(record), record.label == 1, value) for record, value in pairs)


def _named(inspector: Inspector) -> bool:
    return not inspector.facts["clustered"]


def _numbers(inspector: Inspector, features: FeatureSet, records: Sequence[Record]) -> Tensor:
    """Number of each image's product; of a model whose products have no names, its own guess."""
    if _named(inspector):
        return torch.tensor([inspector.products.index(str(record.product)) for record in records])
    guesses = []
    with torch.inference_mode():
        for _, levels in features.batches(BATCH):
            products = inspector.detector(levels).products
            guesses.append(torch.zeros(len(levels[0]), dtype=torch.int64) if products is None else products.argmax(1))
    return torch.cat(guesses)


def _trained_again(
    inspector: Inspector, seen: _Images, cache: FeatureCache | None, progress: Progress | None
) -> tuple[tuple[Check, ...] | None, tuple[int, ...], bool | None, str]:
    """Checks, the kept step of each level, whether the weights are the model's, and why there is nothing."""
    found: list[tuple[int, float | None]] = []
    defective = [record.label == 1 for record in seen.records]

    def watch(step: int, detector: Detector) -> None:
        assert isinstance(detector, HasLikelihoods)
        found.append((step, _auroc(seen.unlikely(detector).tolist(), defective)))

    try:
        detector, history = inspector.train_again(watch, cache=cache, progress=progress)
    except DataError as error:
        return None, (), None, str(error)
    if not found:
        return None, tuple(history.kept), None, "training.checks is 0, so nothing was looked at in training"
    losses = [[level[min(number, len(level) - 1)] for level in history.held_out] for number in range(len(found))]
    checks = tuple(Check(step, float(np.mean(loss)), value) for (step, value), loss in zip(found, losses, strict=True))
    mine, again = inspector.detector.state_dict(), detector.state_dict()
    same = mine.keys() == again.keys() and all(torch.equal(value, again[name]) for name, value in mine.items())
    return checks, tuple(history.kept), same, ""


def _centres(detector: HasCentres, seen: _Images) -> tuple[Centres, ...]:
    """Distances of main centres, and what share of each product's normal vectors its centres take."""
    mains = detector.main_centres()
    good = torch.tensor([record.label == 0 for record in seen.records])
    sums: dict[tuple[int, int], Tensor] = {}
    highest: defaultdict[tuple[int, int], float] = defaultdict(float)
    with torch.inference_mode():
        for levels, part in seen.batches():
            product, kept = seen.product[part], good[part]
            for number, shares in enumerate(detector.responsibilities(levels, product)):
                for y in product[kept].unique().tolist():
                    chosen = shares[kept & (product == y)].double().flatten(0, 1)
                    sums[number, y] = sums.get((number, y), torch.zeros_like(chosen[0])) + chosen.sum(0)
                    highest[number, y] += float(chosen.amax(1).sum())
    return tuple(
        Centres(
            f"level {number + 1} of {len(mains)}, {main.shape[1]} channels",
            torch.cdist(main.double(), main.double()).tolist(),
            [_shares(sums.get((number, y))) for y in range(len(main))],
            [highest[number, y] / float(sums[number, y].sum()) if (number, y) in sums else None for y in range(len(main))],
        )
        for number, main in enumerate(mains)
    )


def _shares(total: Tensor | None) -> list[float] | None:
    return None if total is None else [float(value) for value in total / total.sum()]


def _alive(centres: Centres) -> list[float | None]:
    return [centres.alive(product) for product in range(len(centres.shares))]


def _auroc(scores: Sequence[float], defective: Sequence[bool]) -> float | None:
    """None where a class is missing."""
    if len(set(defective)) < 2:
        return None
    return float(auroc(np.array(scores), np.array(defective)))
