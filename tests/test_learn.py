"""Learning in passes: which batches come in which order, and who is told what."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unispect.detectors.base import DealsFolds, StatisticalDetector
from unispect.detectors.ensemble import Ensemble
from unispect.errors import UnispectError
from unispect.fit import BATCH, Labelled, learn
from unispect.nn.alignment import deal
from unispect.types import Features, Scores

SHAPES = [(2, 3, 3), (4, 1, 1)]
PRODUCTS = 3


class Numbered:
    """Features in memory, standing in for a FeatureSet; the number of the image is in all of them."""

    def __init__(self, count: int) -> None:
        self.shapes, self.count, self.passes = SHAPES, count, 0

    def __len__(self) -> int:
        return self.count

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, Features]]:
        self.passes += 1
        for start in range(0, self.count, size):
            number = torch.arange(start, min(start + size, self.count))
            yield number.numpy() + 1000, [number[:, None, None, None].float().expand(-1, *shape) for shape in SHAPES]


class Diary(StatisticalDetector):
    """Writes down all that it is told."""

    def __init__(self, passes: int = 1, fails: bool = False) -> None:
        super().__init__()
        self.passes, self.fails = passes, fails
        self.told: list[tuple[str, Any]] = []

    def update(self, features: Features, product: Tensor) -> None:
        assert [tuple(level.shape[1:]) for level in features] == SHAPES
        assert product.dtype == torch.int64
        self.told.append(("update", (features[0][:, 0, 0, 0].long().tolist(), product.tolist())))

    def finish(self) -> bool:
        if self.fails:
            raise UnispectError("nothing to learn here")
        self.told.append(("finish", None))
        return self.names.count("finish") < self.passes

    def forward(self, features: Features) -> Scores:
        raise AssertionError("learning scores nothing")

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.told]

    @property
    def batches(self) -> list[tuple[list[int], list[int]]]:
        return [what for name, what in self.told if name == "update"]


class Dealing(Diary):
    """Wants to know of all images first."""

    def begin(self, product: Tensor, unit: Tensor) -> None:
        self.told.append(("begin", (product, unit)))


def labelled(count: int, unit: np.ndarray | None = None) -> Labelled:
    product = np.arange(count, dtype=np.int64) * 7 % PRODUCTS
    return Labelled(Numbered(count), product, unit)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, BATCH - 1, BATCH, BATCH + 1, 3 * BATCH, 50])
@pytest.mark.parametrize("passes", [1, 3])
def test_every_pass_brings_all_images_in_order_with_their_products(count: int, passes: int) -> None:
    detector, train = Diary(passes), labelled(count)
    assert learn(detector, train) == passes
    assert train.features.passes == passes  # type: ignore[attr-defined]
    each = len(detector.batches) // passes
    assert each == -(-count // BATCH)
    assert detector.names == (["update"] * each + ["finish"]) * passes
    for start in range(0, len(detector.batches), each):
        once = detector.batches[start : start + each]
        assert [number for numbers, _ in once for number in numbers] == list(range(count))
        assert [y for _, product in once for y in product] == train.product.tolist()
        assert all(len(numbers) == len(product) <= BATCH for numbers, product in once)


def test_progress_is_told_after_every_batch_and_anew_in_every_pass() -> None:
    told: list[tuple[int, int, dict[str, float]]] = []
    learn(Diary(2), labelled(40), lambda done, total, losses: told.append((done, total, losses)))
    assert told == [(16, 40, {}), (32, 40, {}), (40, 40, {})] * 2


def test_learning_needs_no_one_to_tell_and_does_not_score() -> None:
    assert learn(Diary(), labelled(20), None) == 1


def test_progress_may_stop_the_learning() -> None:
    def stop(done: int, total: int, losses: dict[str, float]) -> None:
        raise KeyboardInterrupt

    detector = Diary()
    with pytest.raises(KeyboardInterrupt):
        learn(detector, labelled(40), stop)
    assert detector.names == ["update"]


def test_what_a_detector_raises_comes_through() -> None:
    with pytest.raises(UnispectError, match="nothing to learn here"):
        learn(Diary(fails=True), labelled(5))


# Folds


@pytest.mark.parametrize("given", [True, False])
def test_products_and_units_are_handed_over_once_before_the_first_batch(given: bool) -> None:
    unit = np.arange(40, dtype=np.int64) // 4
    detector, train = Dealing(2), labelled(40, unit if given else None)
    assert isinstance(detector, DealsFolds)
    assert learn(detector, train) == 2
    assert detector.names == ["begin", *["update", "update", "update", "finish"] * 2]
    product, units = detector.told[0][1]
    assert product.tolist() == train.product.tolist()
    assert units.tolist() == (unit if given else np.arange(40)).tolist()
    assert product.dtype == units.dtype == torch.int64


def test_a_detector_that_deals_nothing_is_handed_nothing() -> None:
    detector = Diary()
    assert not isinstance(detector, DealsFolds)
    learn(detector, labelled(20, np.zeros(20, np.int64)))
    assert "begin" not in detector.names


class Asked(Diary):
    """Scores by number, and remembers whom it was asked about after having learnt whom; copies write in one list."""

    def __init__(self, passes: int, asked: list[tuple[int, frozenset[int]]]) -> None:
        super().__init__(passes)
        self.asked = asked

    def __deepcopy__(self, memo: Any) -> Asked:
        copy = Asked(self.passes, self.asked)
        copy.told = list(self.told)
        return copy

    def forward(self, features: Features) -> Scores:
        learnt = frozenset(number for numbers, _ in self.batches for number in numbers)
        self.asked.extend((int(number), learnt) for number in features[0][:, 0, 0, 0])
        return Scores(features[0].mean((1, 2, 3)), features[0][:, 0])


def ensemble(asked: list[tuple[int, frozenset[int]]], passes: int = 2, folds: int = 4) -> Ensemble:
    return Ensemble(SHAPES, PRODUCTS, {"one": Asked(passes, asked)}, ("one",), (1.0,), folds, map_side=3, sigma=0.0, seed=5)


def test_an_ensemble_deals_by_the_units_of_the_data() -> None:
    asked: list[tuple[int, frozenset[int]]] = []
    train = labelled(48, np.arange(48, dtype=np.int64) // 8)
    assert train.unit is not None
    assert learn(ensemble(asked), train) == 4 * 3 + 2
    dealt = deal(torch.from_numpy(train.product), torch.from_numpy(train.unit), 4, seed=5)
    assert sorted(number for number, _ in asked) == list(range(48))
    for number, learnt in asked:
        assert learnt == {other for other in range(48) if dealt[other] != dealt[number]}


def test_images_without_units_are_dealt_one_by_one() -> None:
    asked: list[tuple[int, frozenset[int]]] = []
    train = labelled(48)
    learn(ensemble(asked, passes=1), train)
    dealt = deal(torch.from_numpy(train.product), torch.arange(48), 4, seed=5)
    assert all(learnt == {other for other in range(48) if dealt[other] != dealt[number]} for number, learnt in asked)
    assert all(len(learnt) == 36 for _, learnt in asked)


def test_passes_of_an_ensemble_all_report_progress() -> None:
    told: list[int] = []
    passes = learn(ensemble([], passes=1, folds=2), labelled(20), lambda done, total, losses: told.append(done))
    assert passes == 2 * 2 + 1
    assert told == [16, 20] * passes
