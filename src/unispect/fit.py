"""How detectors learn. Those of statistics: in passes. Those with gradients: in one loop that can stop and go on.

What a step sees depends on the seed and the number of the step alone, and a checkpoint holds all state; so a run that
was killed and resumed ends, on the CPU, with the same bits as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unispect.detectors.base import (
    DealsFolds,
    GradientDetector,
    ImageDetector,
    Pass,
    Recipe,
    StatisticalDetector,
    VectorDetector,
)
from unispect.errors import ConfigError, UnispectError
from unispect.features.cache import FeatureSet
from unispect.nn.coupling import Flow
from unispect.store import read_checkpoint, write_checkpoint
from unispect.types import Features

BATCH = 16  # images in a pass for statistics
Progress = Callable[[int, int, dict[str, float]], None]
Watch = Callable[[int, GradientDetector], None]


@dataclass(frozen=True, slots=True)
class Labelled:
    """Features of some normal images, the product of each, (n,) int64, and its unit: images of one unit stay together.

    unit   (n,) int64; each image is a unit unless given
    """

    features: FeatureSet
    product: np.ndarray
    unit: np.ndarray | None = None

    def part(self, images: np.ndarray) -> Labelled:
        """Some of the images, (m,) int64 places."""
        unit = None if self.unit is None else self.unit[images]
        return Labelled(self.features.part(images), self.product[images], unit)

    def batches(self) -> Pass:
        """A pass over all images, as detectors take it."""

        def start() -> Any:
            place = 0
            for _, levels in self.features.batches(BATCH):
                count = len(levels[0])
                yield levels, torch.from_numpy(self.product[place : place + count])
                place += count

        return start


@dataclass
class History:
    """What the loop saw: held-out loss of each level at each check, and the step of the state that was kept."""

    held_out: list[list[float]] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    stopped: list[bool] = field(default_factory=list)


def learning_rate(progress: float, recipe: Recipe) -> float:
    """Cosine in `stairs` steps down to a thousandth; over the first two a linear warm-up from a tenth. Or, under "drop",
    constant but for its drops.

    progress   share of the steps already made, in [0, 1)
    """
    if recipe.schedule == "drop":
        return recipe.learning_rate * recipe.drop ** sum(progress >= share for share in recipe.drops)
    floor, warm = recipe.learning_rate * 1e-3, 2 / recipe.stairs
    if progress < warm:
        goal = _cosine(warm, recipe.learning_rate, floor)
        return recipe.learning_rate / 10 + (goal - recipe.learning_rate / 10) * progress / warm
    return _cosine(math.floor(progress * recipe.stairs + 1e-9) / recipe.stairs, recipe.learning_rate, floor)


def _cosine(progress: float, highest: float, lowest: float) -> float:
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * progress)) / 2


class ImageSampler:
    """Images of a step, without replacement within a pass."""

    def __init__(self, data: Labelled, recipe: Recipe, seed: int) -> None:
        self.data, self.recipe, self.seed = data, recipe, seed
        self.count = min(recipe.images, len(data.features))
        self.per_pass = max(1, len(data.features) // self.count)

    def images(self, step: int) -> np.ndarray:
        """Numbers of the images of a step, (m,)."""
        turn, place = divmod(step, self.per_pass)
        order = self._order(np.random.default_rng((self.seed, turn)))
        return order[place * self.count : (place + 1) * self.count]

    def draw(self, step: int) -> tuple[Features, Tensor]:
        """L levels (m, C, h, w) and products (m,)."""
        images = self.images(step)
        return self.data.features.stacked(images.tolist()), torch.from_numpy(self.data.product[images])

    def _order(self, generator: np.random.Generator) -> np.ndarray:
        """Images of a pass; with balance those of small products come several times, of large ones not all."""
        order: np.ndarray = generator.permutation(len(self.data.features))
        if not self.recipe.balance:
            return order
        products, counts = np.unique(self.data.product, return_counts=True)
        chosen = []
        for y, quota in zip(products, quotas(counts ** (1 - self.recipe.balance), len(order)), strict=True):
            own = order[self.data.product[order] == y]
            turns = [generator.permutation(own) for _ in range(-(-quota // len(own)))]
            chosen.append(np.concatenate([*turns, own[:0]])[:quota])
        return generator.permutation(np.concatenate(chosen))


class Sampler:
    """Vectors of a step: those of an ImageSampler's images, places of each at random in each cell."""

    def __init__(self, data: Labelled, detector: VectorDetector, recipe: Recipe, seed: int) -> None:
        self.data, self.recipe, self.seed = data, recipe, seed
        self.grids = [detector.grid(number) for number in range(len(detector.levels))]
        self.images = ImageSampler(data, recipe, seed).images

    def draw(self, step: int, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors (m, c, q, C), places (m, c, q) and products (m,)."""
        images = self.images(step)
        places = self._places(np.random.default_rng((self.seed, step, level, 1)), self.grids[level], len(images))
        found, product = vectors(self.data, level, images, places)
        return found, places, product

    def parts(self, step: int, level: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What the optimizer steps of a step see, as `draw` gives it; where a recipe asks for so many vectors at a time,
        each stands for an image: (n, 1, 1, C), (n, 1, 1) and (n,)."""
        found, places, product = self.draw(step, level)
        size = self.recipe.vectors
        if not size:
            yield found, places, product
            return
        order = np.random.default_rng((self.seed, step, level, 2)).permutation(places.numel())
        whole = max(size, len(order) - len(order) % size)
        each = places[0].numel()
        for part in torch.from_numpy(order[:whole]).split(size):
            x, place = found.flatten(0, 2)[part], places.flatten()[part]
            yield x[:, None, None], place[:, None, None], product[part // each]

    def _places(self, generator: np.random.Generator, grid: Tensor, images: int) -> Tensor:
        most = grid.shape[1]
        if not self.recipe.places or self.recipe.places >= most:
            return grid.expand(images, -1, -1)
        ranks = torch.from_numpy(generator.random((images, *grid.shape), np.float32))
        chosen = ranks.argsort(2)[:, :, : self.recipe.places]
        return grid.expand(images, -1, -1).gather(2, chosen)


def quotas(weights: np.ndarray, total: int) -> list[int]:
    """Whole shares of a total in proportion to weights, the largest remainders rounded up; their sum is the total."""
    exact = weights / weights.sum() * total
    shares = np.floor(exact).astype(np.int64)
    missing = total - int(shares.sum())
    shares[np.argsort(shares - exact, kind="stable")[:missing]] += 1
    return [int(share) for share in shares]


def vectors(data: Labelled, level: int, images: np.ndarray, places: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors (m, c, q, C) of chosen images (m,) at places (m, c, q), and the images' products (m,)."""
    found = data.features.gather(level, images, places.flatten(1).numpy())
    return found.reshape(*places.shape, -1), torch.from_numpy(data.product[images])


def learn(detector: StatisticalDetector, train: Labelled, progress: Progress | None = None) -> int:
    """Learn in place from as many passes as the detector wants; gives their number.

    progress   called after each batch with images seen in this pass, images in all and no losses
    """
    if isinstance(detector, DealsFolds):
        detector.begin(*_told(train))
    passes, more = 0, True
    while more:
        done = 0
        for features, product in train.batches()():
            detector.update(features, product)
            done += len(product)
            if progress:
                progress(done, len(train.features), {})
        passes, more = passes + 1, detector.finish()
    return passes


def _told(*sets: Labelled) -> tuple[Tensor, Tensor]:
    """Products and units of all images, one set after another; no unit is in two sets."""
    units, above = [], 0
    for data in sets:
        unit = np.arange(len(data.product)) if data.unit is None else data.unit
        units.append(unit + above)
        above += int(unit.max(initial=-1)) + 1
    return torch.from_numpy(np.concatenate([data.product for data in sets])), torch.from_numpy(np.concatenate(units))


def fit(
    detector: GradientDetector,
    train: Labelled,
    held_out: Labelled,
    recipe: Recipe,
    seed: int,
    checkpoint: Path | None = None,
    identity: str = "",
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> History:
    """Learn in place; the state with the lowest held-out loss is kept, level by level, the one before any step included.

    checkpoint   file to write at every check, and to go on from if it is there
    identity     what the run is of (settings and data); a checkpoint of another run is an error
    progress     called after each step with steps made, steps in all and the latest losses
    watch        called at each check with the step and the detector, which it must leave as it is

    Raises UnispectError for a checkpoint of another run.
    """
    if isinstance(detector, DealsFolds):
        detector.begin(*_told(train, held_out))
    detector.eval()
    loop = _Loop(detector, train, held_out, recipe, seed, checkpoint, identity, watch)
    if not loop.resume():
        detector.prepare(train.batches())
        loop.begin()
    loop.run(progress)
    detector.finish(train.batches(), held_out.batches())
    return loop.history


class Trial:
    """Single steps of a run, for who wants to know what they take."""

    def __init__(self, detector: GradientDetector, train: Labelled, held_out: Labelled, recipe: Recipe, seed: int) -> None:
        detector.eval()
        self._loop = _Loop(detector, train, held_out, recipe, seed, None, "")
        self._loop.begin()
        # The last stage has all losses, and is the longest.
        self._loop.step = min(int(self._loop.steps * max(detector.stages, default=0.0)) + 1, self._loop.steps - 1)
        set_precision(detector, recipe.precision)

    def look(self) -> None:
        """The held-out loss of every level, whose states are remembered."""
        self._loop.check()

    def step(self) -> None:
        """One step on every level."""
        self._loop.advance()

    def save(self, checkpoint: Path) -> None:
        """Write the state as a run does at every check."""
        self._loop.checkpoint = checkpoint
        self._loop.save()


class _Loop:
    """The state of a run: detector, optimizers, best states and history."""

    def __init__(
        self,
        detector: GradientDetector,
        train: Labelled,
        held_out: Labelled,
        recipe: Recipe,
        seed: int,
        checkpoint: Path | None,
        identity: str,
        watch: Watch | None = None,
    ) -> None:
        self.detector, self.held_out, self.recipe, self.watch = detector, held_out, recipe, watch
        self.checkpoint, self.identity = checkpoint, identity
        self.seed, self.lessons = seed, _lessons(detector, train, held_out, recipe, seed)
        self.loss: Callable[..., dict[str, Tensor]] = self.lessons.loss
        if recipe.compile:
            self.loss = torch.compile(self.loss, dynamic=False)
        self.steps = recipe.total(len(train.features))
        self.every = max(1, math.ceil(self.steps / recipe.checks)) if recipe.checks else self.steps + 1
        self.optimizers = self._optimizers()
        self.levels = range(len(detector.levels))
        self.best: dict[str, Tensor] = {}
        self.history, self.step = History(), 0

    def _optimizers(self) -> list[torch.optim.Adam]:
        groups = [self._grouped(level) for level in range(len(self.detector.levels))]
        if self.recipe.optimizer == "shared":
            shared = self._adam([group for level in groups for group in level])
            return [shared] * len(groups)
        return [self._adam(level) for level in groups]

    def _grouped(self, level: int) -> list[dict[str, Any]]:
        decay = self.recipe.decay
        return [
            {"params": list(group.parameters), "weight_decay": decay if group.decayed else 0.0, "pace": group.pace}
            for group in self.detector.groups(level)
        ]

    def _adam(self, groups: list[dict[str, Any]]) -> torch.optim.Adam:
        recipe = self.recipe
        return torch.optim.Adam(
            groups,
            lr=0.0,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.epsilon,
            amsgrad=recipe.amsgrad,
            decoupled_weight_decay=recipe.rule == "adamw",
        )

    def begin(self) -> None:
        """Look at the state before any step: nothing worse than it is ever kept."""
        self.history.stopped = [False] * len(self.detector.levels)
        self.history.kept = [0] * len(self.detector.levels)
        self.history.held_out = [[] for _ in self.detector.levels]
        if self.recipe.checks:
            self.check()
        self.save()

    def run(self, progress: Progress | None) -> None:
        """All remaining steps, then the best states back in place."""
        losses: dict[str, float] = {}
        set_precision(self.detector, self.recipe.precision)
        while self.step < self.steps and not all(self.history.stopped):
            losses = self.advance()
            if self.step % self.every == 0 or (self.recipe.checks and self.step == self.steps):
                self.check()
                self.save()
            if progress:
                progress(self.step, self.steps, losses | self._latest())
        set_precision(self.detector, "f32")
        if self.recipe.checks:
            self._restore()

    def advance(self) -> dict[str, float]:
        """One step on every level that still learns; the losses of the last one."""
        losses: dict[str, float] = {}
        for level in self.levels:
            if not self.history.stopped[level]:
                losses = self._advance(level)
        self.step += 1
        return losses

    def _advance(self, level: int) -> dict[str, float]:
        """One step on one level: one optimizer step, or one for each part of its vectors."""
        optimizer, done = self.optimizers[level], self.step / self.steps
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done, self.recipe) * group["pace"]
        losses: dict[str, Tensor] = {}
        # One number a stage: a compiled loss is compiled anew for every other.
        stage = max((share for share in self.detector.stages if share <= done), default=0.0)
        with self._random(level):
            for lesson in self.lessons.of(self.step, level):
                optimizer.zero_grad(set_to_none=self.recipe.optimizer == "per_level")
                losses = self.loss(*lesson, stage)
                torch.autograd.backward(losses["total"])
                self._clip(optimizer)
                optimizer.step()
        return {name: float(value.detach()) for name, value in losses.items()}

    def _clip(self, optimizer: torch.optim.Adam) -> None:
        if self.recipe.clip:
            parameters = [value for group in optimizer.param_groups for value in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.recipe.clip)

    @contextmanager
    def _random(self, level: int) -> Iterator[None]:
        """Noise and dropout, where a detector has them, depend on seed, step and level alone; elsewhere there are none."""
        with _seeded(self.seed, self.step, level, 3):
            self.detector.train()
            yield
            self.detector.eval()

    def _latest(self) -> dict[str, float]:
        seen = [values[-1] for values in self.history.held_out if values]
        return {"held_out": sum(seen) / len(seen)} if seen else {}

    @torch.no_grad()
    def check(self) -> None:
        """Held-out loss of every level that still learns; its state is remembered where it is the best so far."""
        self.history.steps.append(self.step)
        for level in self.levels:
            if self.history.stopped[level]:
                continue
            loss, seen = self._held_out_loss(level), self.history.held_out[level]
            if not seen or loss < min(seen):
                self.history.kept[level] = self.step
                self._remember(level)
            seen.append(loss)
            best = min(range(len(seen)), key=seen.__getitem__)
            self.history.stopped[level] = len(seen) - 1 - best >= self.recipe.patience
        if self.watch:
            self.watch(self.step, self.detector)

    def _held_out_loss(self, level: int) -> float:
        """Over at most `held_out_images` images, evenly taken. What is drawn (planted defects) is the same every time."""
        count = len(self.held_out.features)
        images = np.unique(np.linspace(0, count - 1, min(count, self.recipe.held_out_images)).astype(np.int64))
        with _seeded(self.seed, level, 4):
            parts = np.split(images, range(BATCH, len(images), BATCH))
            loss = sum(self.lessons.held_out_loss(level, part) * len(part) for part in parts) / len(images)
        return loss if math.isfinite(loss) else math.inf

    def _remember(self, level: int) -> None:
        prefix = f"levels.{level}."
        for name, value in self.detector.state_dict().items():
            if name.startswith(prefix):
                self.best[name] = value.clone()

    def _restore(self) -> None:
        self.detector.load_state_dict(self.detector.state_dict() | self.best)

    def save(self) -> None:
        if self.checkpoint is None:
            return
        tensors = {f"detector.{name}": value for name, value in self.detector.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for number, optimizer in enumerate(self._distinct()):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"adam.{number}.{index}.{name}": value for name, value in state.items()}
        meta = {"identity": self.identity, "step": self.step, "history": vars(self.history)}
        write_checkpoint(self.checkpoint, tensors, meta)

    def _distinct(self) -> list[torch.optim.Adam]:
        return self.optimizers[:1] if self.recipe.optimizer == "shared" else self.optimizers

    def resume(self) -> bool:
        """Go on from the checkpoint; False where there is none."""
        found = read_checkpoint(self.checkpoint) if self.checkpoint else None
        if found is None:
            return False
        tensors, meta = found
        if meta["identity"] != self.identity:
            raise UnispectError(
                f"{self.checkpoint} belongs to a run with other settings or data: give the same ones again, "
                "or choose another output, or delete it to start anew"
            )
        self.detector.load_state_dict(_below(tensors, "detector."))
        self.best = _below(tensors, "best.")
        for number, optimizer in enumerate(self._distinct()):
            _fill(optimizer, _below(tensors, f"adam.{number}."))
        self.step, self.history = meta["step"], History(**meta["history"])
        return True


class _VectorLessons:
    """What a detector of vectors learns from."""

    def __init__(self, detector: VectorDetector, train: Labelled, held_out: Labelled, recipe: Recipe, seed: int) -> None:
        self.detector, self.held_out, self.loss = detector, held_out, detector.loss
        self.sampler = Sampler(train, detector, recipe, seed)

    def of(self, step: int, level: int) -> Iterator[tuple[Any, ...]]:
        """What the losses of the optimizer steps of a step are given."""
        for part in self.sampler.parts(step, level):
            yield level, *part

    def held_out_loss(self, level: int, images: np.ndarray) -> float:
        """Over all places of some held-out images."""
        places = self.sampler.grids[level].expand(len(images), -1, -1)
        found, product = vectors(self.held_out, level, images, places)
        return float(self.detector.held_out_loss(level, found, places, product))


class _ImageLessons:
    """What a detector of whole images learns from."""

    def __init__(self, detector: ImageDetector, train: Labelled, held_out: Labelled, recipe: Recipe, seed: int) -> None:
        self.detector, self.held_out, self.loss = detector, held_out, detector.loss
        self.sampler = ImageSampler(train, recipe, seed)

    def of(self, step: int, level: int) -> Iterator[tuple[Any, ...]]:
        """What the loss of the optimizer step of a step is given."""
        yield self.sampler.draw(step)

    def held_out_loss(self, level: int, images: np.ndarray) -> float:
        """Over some held-out images."""
        product = torch.from_numpy(self.held_out.product[images])
        return float(self.detector.held_out_loss(self.held_out.features.stacked(images.tolist()), product))


def _lessons(
    detector: GradientDetector, train: Labelled, held_out: Labelled, recipe: Recipe, seed: int
) -> _VectorLessons | _ImageLessons:
    if isinstance(detector, ImageDetector):
        if recipe.places != Recipe().places or recipe.vectors:
            raise ConfigError(
                f"training.places={recipe.places}, training.vectors={recipe.vectors}: {type(detector).__name__} learns from "
                "whole images, leave both out"
            )
        return _ImageLessons(detector, train, held_out, recipe, seed)
    assert isinstance(detector, VectorDetector)
    return _VectorLessons(detector, train, held_out, recipe, seed)


@contextmanager
def _seeded(*numbers: int) -> Iterator[None]:
    """What torch draws inside depends on the numbers alone, and what it draws afterwards not on the inside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.default_rng(numbers).integers(2**63)))
        yield


def set_precision(detector: GradientDetector, precision: str) -> None:
    """Of the products inside the couplings, in training alone: scores are always computed in single precision."""
    for part in detector.modules():
        if isinstance(part, Flow):
            part.set_precision(torch.bfloat16 if precision == "bf16" else torch.float32)


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _fill(optimizer: torch.optim.Adam, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    for parameter in optimizer.state:  # a shared Adam moves those with a gradient of zero, not those without one
        parameter.grad = torch.zeros_like(parameter)
