"""What a method takes on this machine, tried on a few images: every stage of learning and scoring once, on a small scale."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unispect.align.aligners import NONE
from unispect.align.aligners import build as build_aligner
from unispect.align.base import Pairs, Statistics, view, width
from unispect.config import construct
from unispect.decide.unknown import Novelty
from unispect.detectors.base import DealsFolds, Detector, GradientDetector, Pass, Recipe, StatisticalDetector
from unispect.errors import UnispectError
from unispect.features.engine import Engine
from unispect.fit import Labelled, Trial
from unispect.inspector import empty_detector
from unispect.nn.growth import COVER, SEARCH, Work
from unispect.nn.memory import gaps, greedy, nearest

SECONDS = 1.5  # after which nothing is tried a second time
FEW = 2  # images of a training step where as many as the recipe has would take longer
MOST_VECTORS, MOST_QUERIES, MOST_CENTRES = 8192, 1024, 1024  # of a comparison that is tried
PASSED = 16  # images of a pass, where there are not more products
SCHOOLED = 8  # training steps of an aligner that are tried
NEAREST = {"search": 20, "around": 50}  # neighbours that are asked for


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds, without the comparisons that grow with the images (see nn.growth); bytes.

    image        of learning, for each training image
    any_image    of learning, for each training or held-out image
    fixed        of learning, however many images there are
    step         of a training step, on all levels
    look         of a check, for each held-out image
    score        of scoring, for each image
    known        of learning what tells unknown products, for each training image
    schooling    of training the aligner
    checkpoint   bytes of its file
    state        bytes of the model before it has learnt
    more         bytes of a training step beyond what was tried
    """

    image: float = 0.0
    any_image: float = 0.0
    fixed: float = 0.0
    step: float = 0.0
    look: float = 0.0
    score: float = 0.0
    known: float = 0.0
    schooling: float = 0.0
    checkpoint: int = 0
    state: int = 0
    more: int = 0


class Clock:
    """Seconds by what they went to."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what is inside."""
        start = perf_counter()
        yield
        self.add(name, perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Seconds that went to something."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def of(self, name: str) -> float:
        """Seconds so far."""
        return self.seconds.get(name, 0.0)

    def passes(self, name: str, data: Labelled) -> Pass:
        """Passes over the data whose time is noted, what is done with the images included."""

        def start() -> Any:
            begun = perf_counter()
            yield from data.batches()()
            self.add(name, perf_counter() - begun)

        return start


def rehearse(config: Mapping[str, Any], sample: Labelled, products: int, eyes: Engine, folder: Path) -> Pace:
    """Learn from a few images as a fit would, and score them.

    sample   at least two images of each product; they may be the same ones again
    folder   for a checkpoint
    """
    learnt, pace = _learnt(config, sample, products, eyes, folder)
    novelty = Novelty(tuple(shape[0] for shape in sample.features.shapes), products)
    clock = Clock()
    with torch.no_grad(), clock("known"):
        for features, product in sample.batches()():
            novelty.update(features, product)
    novelty.finish()
    score = _scoring(learnt.eval(), novelty.eval(), sample)
    schooling, aligner = _schooling(config, learnt, sample, products)
    state = size(empty_detector(config, sample.features.shapes, products, eyes)) + size(novelty) + aligner
    known = clock.of("known") / len(sample.product)
    return replace(pace, score=score, known=known, schooling=schooling, state=state)


def size(module: torch.nn.Module) -> int:
    """Bytes of its state."""
    return sum(value.nbytes for value in module.state_dict().values())


def _learnt(config: Mapping[str, Any], sample: Labelled, products: int, eyes: Engine, folder: Path) -> tuple[Detector, Pace]:
    """A detector that has learnt, and what that took; where it is quick a second time, for the first warms up."""
    start = perf_counter()
    for _ in range(2):
        detector = empty_detector(config, sample.features.shapes, products, eyes)
        if isinstance(detector, StatisticalDetector):
            pace = _passes(detector, sample)
        else:
            assert isinstance(detector, GradientDetector)
            recipe = construct(Recipe, config["training"], "training")
            pace = _steps(detector, sample, max(PASSED, 2 * products), recipe, config["seed"], folder)
        if perf_counter() - start > SECONDS:
            break
    return detector, pace


def _passes(detector: StatisticalDetector, sample: Labelled) -> Pace:
    clock, more = Clock(), True
    if isinstance(detector, DealsFolds):
        detector.begin(*_told(sample))
    while more:
        with clock("image"):
            for features, product in sample.batches()():
                detector.update(features, product)
        with clock("finish"):
            more = detector.finish()
    return Pace(image=clock.of("image") / len(sample.product), fixed=clock.of("finish"))


def _told(sample: Labelled) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(sample.product), torch.arange(len(sample.product))


def _steps(detector: GradientDetector, sample: Labelled, passed: int, recipe: Recipe, seed: int, folder: Path) -> Pace:
    """As `fit` does it: steps on the images of the sample, passes over so many of them."""
    few, some = sample.part(np.arange(FEW)), sample.part(np.arange(min(len(sample.product), passed)))
    clock, count = Clock(), len(some.product)
    if isinstance(detector, DealsFolds):
        product, unit = _told(some)
        detector.begin(torch.cat([product, product[:FEW]]), torch.cat([unit, unit[:FEW] + count]))
    with clock("prepare"):
        detector.prepare(clock.passes("image", some))
    step, share, more = _step(detector, sample, few, recipe, seed)
    trial = Trial(detector, sample, few, replace(recipe, checks=0), seed)
    with clock("look"):
        trial.look()
    checkpoint = folder / "checkpoint.safetensors"
    if recipe.checks:
        trial.step()
        trial.save(checkpoint)
    detector.eval()
    with clock("finish"):
        detector.finish(clock.passes("any", some), clock.passes("any", few))
    return Pace(
        image=clock.of("image") / count,
        any_image=clock.of("any") / (count + len(few.product)),
        fixed=clock.of("prepare") + clock.of("finish") - clock.of("image") - clock.of("any"),
        step=step * share,
        look=clock.of("look") / len(few.product),
        checkpoint=checkpoint.stat().st_size if checkpoint.exists() else 0,
        more=more,
    )


def _step(
    detector: GradientDetector, sample: Labelled, few: Labelled, recipe: Recipe, seed: int
) -> tuple[float, float, int]:
    """Seconds of a step, how many times as many images a step of the recipe has, and the bytes that those add."""
    before, images = resident(), min(recipe.images, len(sample.product))
    seconds = _tried(detector, sample, few, replace(recipe, images=FEW, checks=0), seed, 2)
    if seconds * images / FEW <= SECONDS:
        whole = replace(recipe, images=images, checks=0)
        return _tried(detector, sample, few, whole, seed, 3), recipe.images / images, 0
    share = recipe.images / FEW
    # A step in parts holds one part at a time, however many images it has.
    return seconds, share, 0 if recipe.vectors else int((share - 1) * max(0, peak() - before))


def _tried(detector: GradientDetector, train: Labelled, few: Labelled, recipe: Recipe, seed: int, steps: int) -> float:
    """Seconds of the quickest of some steps after the first."""
    trial, seconds = Trial(detector, train, few, recipe, seed), []
    for _ in range(steps):
        start = perf_counter()
        trial.step()
        seconds.append(perf_counter() - start)
    return min(seconds[1:])


def _scoring(detector: Detector, novelty: Novelty, sample: Labelled) -> float:
    """Seconds an image, on a batch as calibration has them; of two the second, where the first did not take long."""
    taken = math.inf
    for _ in range(2):
        start, (_, levels) = perf_counter(), next(iter(sample.features.batches(8)))
        with torch.inference_mode():
            detector(levels)
            novelty(levels)
        taken = (perf_counter() - start) / len(levels[0])
        if perf_counter() - start > SECONDS:
            break
    return taken


@torch.no_grad()
def _schooling(config: Mapping[str, Any], detector: Detector, sample: Labelled, products: int) -> tuple[float, int]:
    """Seconds of an aligner's training, and bytes of what it is."""
    name = config["aligner"]
    if name == NONE:
        return 0.0, 0
    features = sample.features.stacked(range(min(8, len(sample.product))))
    scores = detector(features)
    short = dict(config) | {name: config[name] | {"steps": SCHOOLED}}
    aligner = build_aligner(short, width(features, scores), products)
    assert aligner is not None
    rows = torch.arange(config[name]["images"]) % len(features[0])
    known = Statistics.of(scores.of(rows.tolist()))
    pairs = Pairs(view(features, scores, aligner.grid)[rows], known, torch.from_numpy(sample.product)[rows])
    aligner.learn(pairs)
    start = perf_counter()
    aligner.learn(pairs)
    return (perf_counter() - start) * config[name]["steps"] / SCHOOLED, size(aligner)


# Comparisons.


def comparing(works: Sequence[Work], sample: Labelled) -> float:
    """Seconds of some comparisons, by a smaller one of each kind on vectors of the sample."""
    groups: dict[tuple[str, int], list[Work]] = {}
    for work in works:
        groups.setdefault((work.kind, work.channels), []).append(work)
    return sum(_rate(max(group, key=_pairs), sample) * sum(map(_pairs, group)) for group in groups.values())


def _pairs(work: Work) -> int:
    return work.pairs


@torch.no_grad()
def _rate(work: Work, sample: Labelled) -> float:
    """Seconds for each distance."""
    if not work.pairs:
        return 0.0
    bank = _vectors(sample, min(MOST_VECTORS, work.vectors if work.kind == COVER else work.centres), work.channels)
    start = perf_counter()
    if work.kind == COVER:
        count = min(len(bank), max(32, min(MOST_CENTRES, len(bank) * work.centres // work.vectors)))
        greedy(bank, count, torch.Generator().manual_seed(0))
        return (perf_counter() - start) / (len(bank) * count)
    if work.kind == SEARCH:
        queries = bank[: min(MOST_QUERIES, work.vectors)] + 0.1
        nearest(queries, bank, min(NEAREST[SEARCH], len(bank)))
        return (perf_counter() - start) / (len(queries) * len(bank))
    gaps(bank, min(NEAREST[work.kind], len(bank) - 1)) if len(bank) > 1 else None
    return (perf_counter() - start) / len(bank) ** 2


def _vectors(sample: Labelled, count: int, channels: int) -> Tensor:
    """Vectors (count, channels) that lie as those of the finest level do, none twice."""
    level = max(range(len(sample.features.shapes)), key=lambda number: sample.features.shapes[number][1])
    found = sample.features.stacked(range(len(sample.product)))[level].permute(0, 2, 3, 1).flatten(0, 2)
    random = torch.Generator().manual_seed(0)
    chosen = found[torch.arange(count) % len(found)]
    projection = torch.randn(found.shape[1], channels, generator=random) / math.sqrt(found.shape[1])
    x = chosen @ projection
    return x + 0.1 * x.std() * torch.randn(x.shape, generator=random)


# Memory.


def peak() -> int:
    """Bytes that this process has had resident at the most.

    Raises UnispectError where the system does not tell.
    """
    if sys.platform == "win32":
        raise UnispectError("this system does not tell how much memory a process has had: plan a fit on Linux or macOS")
    import resource

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else 1024 * highest


def resident() -> int:
    """Bytes that this process has resident now; where the system does not tell, at the most so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text("utf-8").split()[1])
    except (OSError, ValueError):
        return peak()
    import resource

    return pages * resource.getpagesize()
