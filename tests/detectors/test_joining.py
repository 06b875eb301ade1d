"""The ensemble: nothing is scored by what has learnt it, and scales are those of scores out of fold."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unispect.detectors.base import StatisticalDetector
from unispect.detectors.ensemble import LIFT, Alignment, Ensemble, deal, without_itself
from unispect.detectors.methods import build
from unispect.errors import ConfigError, UnispectError
from unispect.fit import Labelled, learn
from unispect.inspector import complete
from unispect.types import Features, Scores

SIDE = 4
SHAPES = [(2, SIDE, SIDE), (3, 1, 1)]


class Witness(StatisticalDetector):
    """Remembers which images it has learnt, by the number in their first channel; scores are the second, scaled."""

    def __init__(self, local: bool = True, passes: int = 2, scale: tuple[float, ...] = (1.0, 1.0)) -> None:
        super().__init__()
        self.local, self.passes, self.scale = local, passes, scale
        self.seen: list[list[int]] = [[]]
        self.asked: list[tuple[int, frozenset[int]]] = []

    def update(self, features: Features, product: Tensor) -> None:
        self.seen[-1] += features[0][:, 0, 0, 0].long().tolist()

    def finish(self) -> bool:
        more = len(self.seen) < self.passes
        if more:
            self.seen.append([])
        return more

    def forward_given(self, features: Features, product: Tensor) -> Scores:
        ASKED.extend((int(number), frozenset(self.seen[0])) for number in features[0][:, 0, 0, 0])
        maps = features[0][:, 1] * torch.tensor(self.scale)[product][:, None, None]
        return Scores(maps.flatten(1).mean(1) * 7, maps)

    def forward(self, features: Features) -> Scores:
        return self.forward_given(features, torch.zeros(len(features[0]), dtype=torch.int64))


ASKED: list[tuple[int, frozenset[int]]] = []


class Memory:
    """Features in memory, standing in for a FeatureSet."""

    def __init__(self, levels: Features) -> None:
        self.levels, self.shapes = levels, SHAPES

    def __len__(self) -> int:
        return len(self.levels[0])

    def batches(self, size: int) -> Any:
        for start in range(0, len(self), size):
            yield np.arange(start, min(start + size, len(self))), [level[start : start + size] for level in self.levels]


def images(count: int, seed: int = 0) -> tuple[Features, Tensor]:
    """Two products in turn, told apart by the pooled level; the first channel numbers the images."""
    random, product = torch.Generator().manual_seed(seed), torch.arange(count) % 2
    dense = torch.randn(count, 2, SIDE, SIDE, generator=random)
    dense[:, 0] = torch.arange(count)[:, None, None].float()
    pooled = torch.randn(count, 3, 1, 1, generator=random) + 20 * product[:, None, None, None]
    return [dense, pooled], product


def joined(parts: dict[str, StatisticalDetector], weights: tuple[float, ...] | None = None, **more: Any) -> Ensemble:
    return Ensemble(SHAPES, 2, parts, tuple(parts), weights or (1.0,) * len(parts), map_side=8, sigma=0.0, **more)


def taught(ensemble: Ensemble, count: int = 40, unit: np.ndarray | None = None) -> Ensemble:
    ASKED.clear()
    features, product = images(count)
    learn(ensemble, Labelled(Memory(features), product.numpy(), unit))  # type: ignore[arg-type]
    return ensemble


def test_every_image_is_scored_once_by_members_that_have_not_learnt_it() -> None:
    ensemble = taught(joined({"one": Witness(), "two": Witness(passes=1)}))
    assert sorted(number for number, _ in ASKED) == sorted([*range(40), *range(40)])
    assert all(number not in learnt and len(learnt) == 30 for number, learnt in ASKED)
    for part, passes in zip(ensemble.members, (2, 1), strict=True):
        assert isinstance(part, Witness)
        assert part.seen == [list(range(40))] * passes


def test_a_capture_group_is_never_torn_apart() -> None:
    unit = np.arange(40) // 5
    taught(joined({"one": Witness()}), unit=unit)
    for number, learnt in ASKED:
        mates = {other for other in range(40) if unit[other] == unit[number] and other % 2 == number % 2}
        assert not mates & learnt


@pytest.mark.parametrize("scale", [1.0, 10.0, 0.01])
def test_the_units_of_a_product_do_not_matter(scale: float) -> None:
    plain, scaled = taught(joined({"one": Witness()})), taught(joined({"one": Witness(scale=(1.0, scale))}))
    features, _ = images(30, seed=5)
    one, other = plain(features), scaled(features)
    torch.testing.assert_close(one.image, other.image, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one.maps, other.maps, rtol=1e-3, atol=1e-3)
    assert (one.products.argmax(1) == torch.arange(30) % 2).all()  # type: ignore[union-attr]


def test_one_sure_member_is_heard_and_many_small_doubts_are_not() -> None:
    ensemble = joined({name: Witness() for name in "abcd"})
    sure, doubtful = torch.tensor([[8.0, 0, 0, 0]]), torch.tensor([[2.0, 2, 2, 2]])
    assert sure.sum() == doubtful.sum()
    assert ensemble._joined(sure) > 1.5 * ensemble._joined(doubtful)
    z = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    expected = (np.log1p(np.exp(z.double().numpy() + LIFT)) ** 3).sum(1) ** (1 / 3)
    np.testing.assert_allclose(ensemble._joined(z).numpy(), expected, rtol=1e-5)


def test_a_member_without_maps_gives_its_image_score_and_no_map() -> None:
    with_it = taught(joined({"map": Witness(), "whole": Witness(local=False)}))
    alone = taught(joined({"map": Witness()}))
    features, _ = images(10, seed=3)
    torch.testing.assert_close(with_it(features).maps, alone(features).maps)
    loud = [features[0].clone(), features[1]]
    loud[0][:, 1] += 3
    assert (with_it(loud).image > with_it(features).image).all()


def test_leaving_out_is_what_a_loop_does() -> None:
    maps, prior = torch.randn(7, 2, 3, 3, generator=torch.Generator().manual_seed(0)).double() * 3 + 5, 20.0
    found = without_itself(maps, prior)
    for left in range(7):
        rest = np.delete(maps.numpy(), left, axis=0)
        mean, variance = rest.mean(0), rest.var(0)
        typical, spread = mean.mean((1, 2), keepdims=True), variance.mean((1, 2), keepdims=True)
        scale = np.sqrt((6 * variance + prior * spread) / (6 + prior))
        expected = (maps[left].numpy() - (6 * mean + prior * typical) / (6 + prior)) / scale
        np.testing.assert_allclose(found[left].numpy(), expected, rtol=1e-5)


def test_alignment_brings_the_tail_to_zero_and_the_spread_to_one() -> None:
    alignment, values = Alignment(1, 2), torch.randn(200, generator=torch.Generator().manual_seed(0)) * 4 + 9
    alignment.learn_sum(values)
    aligned = alignment.sum(values).numpy()
    assert np.quantile(aligned, 0.95) == pytest.approx(0, abs=1e-5)
    assert aligned.std(ddof=1) == pytest.approx(1, abs=1e-5)


def test_folds_are_even_shuffled_and_keep_units_together() -> None:
    product = torch.arange(90) % 3
    dealt = deal(product, torch.arange(90), 4, seed=0)
    for y in range(3):
        counts = dealt[product == y].bincount(minlength=4)
        assert counts.max() - counts.min() <= 1
    assert torch.equal(dealt, deal(product, torch.arange(90), 4, seed=0))
    assert not torch.equal(dealt, deal(product, torch.arange(90), 4, seed=1))
    unit = torch.arange(90) // 9
    grouped = deal(product, unit, 4, seed=0)
    for y in range(3):
        for u in unit.unique():
            assert len(grouped[(product == y) & (unit == u)].unique()) == 1
    single = deal(torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int64), 4, seed=0)
    assert single.bincount().tolist() == [2, 2, 2, 2]  # one unit alone would leave nothing to learn from


def test_statistics_are_capped() -> None:
    ensemble = joined({"one": Witness()}, statistics=8)
    features, product = images(200)
    ensemble.begin(product, torch.arange(200))
    most, more = 0, True
    while more:
        for start in range(0, 200, 16):
            ensemble.update([level[start : start + 16] for level in features], product[start : start + 16])
            kept = ensemble._fitting._kept.values()  # type: ignore[union-attr]
            most = max([most, *map(len, kept)])
        more = ensemble.finish()
    assert most == 8


def test_two_images_of_a_product_are_enough() -> None:
    ensemble = taught(joined({"one": Witness()}), count=4)
    assert torch.isfinite(ensemble(images(6, seed=2)[0]).image).all()


def test_what_cannot_be_done_is_told() -> None:
    with pytest.raises(UnispectError, match="has not learnt this product yet"):
        joined({"one": Witness()})(images(3)[0])
    with pytest.raises(UnispectError, match="saw no image"):
        joined({"one": Witness()}).finish()
    with pytest.raises(ConfigError, match="Witness learns all products as one"):
        taught(joined({"one": Witness()})).remove(0)
    with pytest.raises(ConfigError, match=r"weights=\[1.0\]: expected one above 0 for each of 2 members"):
        joined({"one": Witness(), "two": Witness()}, (1.0,))
    with pytest.raises(ConfigError, match="folds: got 1, expected at least 2"):
        joined({"one": Witness()}, folds=1)


@pytest.mark.parametrize(
    ("members", "text"),
    [
        (["patchcor"], "did you mean 'patchcore'"),
        (["hgad"], "unknown"),
        (["ensemble"], "unknown"),
        ([], "expected a list of different methods"),
        (["opca", "opca"], "expected a list of different methods"),
    ],
)
def test_members_are_checked_before_any_work(members: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        complete({"method": "ensemble", "ensemble": {"members": members}})


def test_members_read_their_own_sections() -> None:
    table = complete({"method": "ensemble", "neighbours": {"neighbours": 2}})
    assert table["opca"]["mode"] == "pooled"
    ensemble = build(table, SHAPES, 2)
    assert isinstance(ensemble, Ensemble)
    assert getattr(ensemble.members[0], "neighbours") == 2  # noqa: B009
    assert ensemble.mapping.tolist() == [True, False]


def test_methods_that_learn_in_passes_take_no_training_section() -> None:
    with pytest.raises(ConfigError, match=r"\[training\]: ensemble takes no training steps"):
        complete({"method": "ensemble", "training": {"steps": 3}})
    assert "training" not in complete({"method": "padim"})
    assert complete({"method": "padim"})["split"]["held_out"] == 0
    assert complete({"method": "padim", "split": {"held_out": 0.1}})["split"]["held_out"] == 0.1
