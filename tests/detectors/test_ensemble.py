"""The ensemble against its own words: who has seen what, and every scale restated in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unispect.detectors.base import DealsFolds, HoldsProducts, StatisticalDetector, TakesProduct
from unispect.detectors.ensemble import LIFT, Ensemble
from unispect.detectors.neighbours import Neighbours
from unispect.detectors.opca import OPCA
from unispect.detectors.padim import PaDiM
from unispect.errors import ConfigError, UnispectError
from unispect.nn.alignment import TAIL, deal, finest, without_itself
from unispect.types import Features, Scores

SIDE = 5
SHAPES = [(3, SIDE, SIDE), (4, 1, 1)]
PRODUCTS = 2


class Log:
    """What members were asked, shared by their copies: number of the image and the images learnt, pass by pass."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, tuple[tuple[int, ...], ...]]] = []

    def __deepcopy__(self, memo: Any) -> Log:
        return self


class Witness(StatisticalDetector):
    """Remembers the images it has learnt by the number in their first channel; its map is another channel.

    gain, offset   of what it says of each product
    """

    def __init__(
        self,
        channel: int = 1,
        local: bool = True,
        passes: int = 2,
        gain: Sequence[float] = (1.0, 1.0),
        offset: Sequence[float] = (0.0, 0.0),
        log: Log | None = None,
    ) -> None:
        super().__init__()
        self.channel, self.local, self.passes, self.gain, self.offset = channel, local, passes, gain, offset
        self.log, self.seen = log or Log(), [[]]  # type: ignore[var-annotated]

    def update(self, features: Features, product: Tensor) -> None:
        self.seen[-1].extend(features[0][:, 0, 0, 0].long().tolist())

    def finish(self) -> bool:
        if len(self.seen) < self.passes:
            self.seen.append([])
            return True
        return False

    def forward_given(self, features: Features, product: Tensor) -> Scores:
        seen = tuple(map(tuple, self.seen))
        numbers = features[0][:, 0, 0, 0].long().tolist()
        self.log.asked.extend((number, y, seen) for number, y in zip(numbers, product.tolist(), strict=True))
        gain, offset = torch.tensor(self.gain)[product], torch.tensor(self.offset)[product]
        maps = features[0][:, self.channel] * gain[:, None, None] + offset[:, None, None]
        return Scores(maps.flatten(1).mean(1), maps)

    def forward(self, features: Features) -> Scores:
        return self.forward_given(features, torch.zeros(len(features[0]), dtype=torch.int64))


def images(count: int, seed: int = 0, products: int = PRODUCTS) -> tuple[Features, Tensor]:
    """Products in turn, told apart by the pooled level; the first channel numbers the images."""
    random, product = torch.Generator().manual_seed(seed), torch.arange(count) % products
    dense = torch.randn(count, *SHAPES[0], generator=random) * (1 + torch.arange(SIDE))[:, None] + torch.arange(SIDE)
    dense[:, 0] = torch.arange(count)[:, None, None].float()
    pooled = torch.randn(count, *SHAPES[1], generator=random) + 20 * product[:, None, None, None]
    return [dense, pooled], product


def joined(*parts: StatisticalDetector, weights: Sequence[float] | None = None, **more: Any) -> Ensemble:
    named = {f"part{number}": part for number, part in enumerate(parts)}
    options: dict[str, Any] = {"products": PRODUCTS, "map_side": SIDE, "sigma": 0.0, **more}
    return Ensemble(SHAPES, parts=named, members=tuple(named), weights=tuple(weights or [1.0] * len(parts)), **options)


def teach(detector: Ensemble, features: Features, product: Tensor, unit: Tensor | None = None, size: int = 7) -> int:
    """Number of passes."""
    detector.begin(product, torch.arange(len(product)) if unit is None else unit)
    passes, more = 0, True
    while more:
        for start in range(0, len(product), size):
            detector.update([level[start : start + size] for level in features], product[start : start + size])
        passes, more = passes + 1, detector.finish()
    return passes


def taught(detector: Ensemble, count: int = 40, unit: Tensor | None = None) -> Ensemble:
    teach(detector, *images(count), unit)
    return detector


def same(one: Scores, other: Scores, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(one.image, other.image, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(one.maps, other.maps, rtol=tolerance, atol=tolerance)


# Who has seen what


@pytest.mark.parametrize("folds", [2, 3, 4, 7])
def test_a_score_comes_from_a_copy_that_has_not_seen_the_image(folds: int) -> None:
    log = Log()
    taught(joined(Witness(log=log), folds=folds))
    _, product = images(40)
    assert sorted(number for number, _, _ in log.asked) == list(range(40))
    for number, y, seen in log.asked:
        assert y == product[number]
        assert len(seen) == 2
        assert all(number not in once for once in seen)
    copies = {seen for _, _, seen in log.asked}
    assert len(copies) == folds
    for seen in copies:  # what a copy did not learn is what it is asked, and every pass was the same
        assert seen[0] == seen[1]
        assert set(seen[0]) | {number for number, _, by in log.asked if by == seen} == set(range(40))


def test_a_score_comes_from_a_copy_that_has_not_seen_the_unit() -> None:
    log, unit = Log(), torch.arange(42) // 6
    taught(joined(Witness(log=log)), 42, unit)
    assert len(log.asked) == 42
    for number, y, seen in log.asked:
        mates = {other for other in range(42) if unit[other] == unit[number] and other % 2 == y}
        assert len(mates) == 3
        assert not mates & set(seen[0])


@pytest.mark.parametrize("folds", [2, 4])
@pytest.mark.parametrize("most", [1, 3])
def test_members_learn_all_images_once_a_pass(folds: int, most: int) -> None:
    ensemble = joined(Witness(passes=most), Witness(passes=1), folds=folds)
    assert teach(ensemble, *images(20)) == folds * (most + 1) + most
    for part, passes in zip(ensemble.members, (most, 1), strict=True):
        assert part.seen == [list(range(20))] * passes


def test_the_batches_do_not_matter() -> None:
    one, other = joined(Witness(), Witness(2)), joined(Witness(), Witness(2))
    features, product = images(30)
    teach(one, features, product, size=30)
    teach(other, features, product, size=1)
    same(one(features), other(features), 1e-5)
    assert [part.seen for part in one.members] == [part.seen for part in other.members]


def test_without_begin_every_image_is_scored_out_of_fold_all_the_same() -> None:
    log = Log()
    ensemble, (features, product) = joined(Witness(log=log), folds=3), images(20)
    more = True
    while more:
        ensemble.update(features, product)
        more = ensemble.finish()
    assert sorted(number for number, _, _ in log.asked) == list(range(20))
    assert all(number not in seen[0] for number, _, seen in log.asked)
    assert torch.isfinite(ensemble(features).image).all()


def test_without_begin_a_copy_has_learnt_the_product_that_it_is_asked_about() -> None:
    log = Log()
    ensemble, (features, product) = joined(Witness(log=log), folds=2), images(20)
    more = True
    while more:
        ensemble.update(features, product)
        more = ensemble.finish()
    assert all(any(other % 2 == y for other in seen[0]) for _, y, seen in log.asked)


def test_learning_again_forgets_the_folds_of_before() -> None:
    log = Log()
    ensemble = taught(joined(Witness(log=log, passes=1), folds=2))
    log.asked.clear()
    for part in ensemble.members:
        part.seen = [[]]
    teach(ensemble, *images(26, seed=3))
    assert sorted(number for number, _, _ in log.asked) == list(range(26))
    assert all(number not in seen[0] for number, _, seen in log.asked)


# Dealing


def test_units_are_dealt_evenly_and_stay_together() -> None:
    random = torch.Generator().manual_seed(0)
    product, unit = torch.randint(3, (120,), generator=random), torch.randint(40, (120,), generator=random)
    for folds in (2, 4, 5):
        dealt = deal(product, unit, folds, seed=0)
        assert dealt.shape == (120,)
        for y in range(3):
            own = {int(u): set(dealt[(product == y) & (unit == u)].tolist()) for u in unit[product == y].unique()}
            assert all(len(found) == 1 for found in own.values())
            sizes = np.bincount([found.pop() for found in own.values()], minlength=folds)
            assert sizes.max() - sizes.min() <= 1


def test_dealing_depends_on_the_seed_and_on_the_own_images_alone() -> None:
    product, unit = torch.arange(60) % 3, torch.arange(60) // 2
    dealt = deal(product, unit, 4, seed=5)
    assert torch.equal(dealt, deal(product, unit, 4, seed=5))
    assert not torch.equal(dealt, deal(product, unit, 4, seed=6))
    own = product == 1
    assert torch.equal(dealt[own], deal(torch.zeros(20, dtype=torch.int64), unit[own], 4, seed=5))
    state = torch.get_rng_state()
    deal(product, unit, 4, seed=5)
    assert torch.equal(state, torch.get_rng_state())


def test_images_of_one_unit_alone_are_dealt_one_by_one() -> None:
    product, unit = torch.tensor([0] * 8 + [1] * 8), torch.tensor([3] * 8 + [4] * 4 + [5] * 4)
    dealt = deal(product, unit, 4, seed=0)
    assert dealt[:8].bincount(minlength=4).tolist() == [2, 2, 2, 2]
    assert len(dealt[8:12].unique()) == len(dealt[12:].unique()) == 1
    assert dealt[8] != dealt[12]


def test_two_images_go_to_two_folds() -> None:
    for seed in range(5):
        assert len(deal(torch.zeros(2, dtype=torch.int64), torch.arange(2), 4, seed).unique()) == 2


# Scales


def places(maps: np.ndarray, prior: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale of each place of maps (n, g, g), drawn towards those of all places by `prior` images."""
    count, mean, variance = len(maps), maps.mean(0), maps.var(0)
    share = count / (count + prior)
    return share * mean + (1 - share) * mean.mean(), np.sqrt(share * variance + (1 - share) * variance.mean())


def left_out(maps: np.ndarray, prior: float) -> np.ndarray:
    """Each map in units of what the others say of its places."""
    rows = []
    for number in range(len(maps)):
        mean, scale = places(np.delete(maps, number, axis=0), prior)
        rows.append((maps[number] - mean) / scale)
    return np.stack(rows)


def highest(maps: np.ndarray, top: float) -> np.ndarray:
    flat = np.sort(maps.reshape(len(maps), -1), axis=1)
    return flat[:, -max(1, int(top * flat.shape[1])) :].mean(1)


def norm(evidence: np.ndarray, weights: Sequence[float], power: float) -> np.ndarray:
    """p-norm of the weighted soft positive parts, (n, M) -> (n,)."""
    soft = np.log1p(np.exp(evidence + LIFT)) * np.array(weights)
    return (soft**power).sum(1) ** (1 / power)


def own_maps(features: Features, product: Tensor, y: int, channel: int) -> np.ndarray:
    return features[0][product == y, channel].double().numpy()


@pytest.mark.parametrize("count", [3, 4, 9])
@pytest.mark.parametrize("prior", [0.0, 1.0, 20.0, 1e6])
def test_leaving_out_is_a_loop(count: int, prior: float) -> None:
    maps = torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 3 + 5
    found = without_itself(maps, prior).numpy()
    for member in range(2):
        np.testing.assert_allclose(found[:, member], left_out(maps[:, member].double().numpy(), prior), rtol=1e-4, atol=1e-4)


def test_leaving_out_does_not_touch_what_it_is_given() -> None:
    maps = torch.randn(4, 1, 2, 2)
    copy = maps.clone()
    without_itself(maps, 1.0)
    assert torch.equal(maps, copy)


@pytest.mark.parametrize("prior", [0.0, 20.0])
def test_scales_of_places_are_those_of_the_formula(prior: float) -> None:
    ensemble, (features, product) = taught(joined(Witness(), Witness(2), prior=prior)), images(40)
    for y in range(2):
        for member in range(2):
            mean, scale = places(own_maps(features, product, y, member + 1), prior)
            np.testing.assert_allclose(ensemble.alignment(y).place_mean[member].numpy(), mean, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(ensemble.alignment(y).place_scale[member].numpy(), scale, rtol=1e-5)


def test_a_large_prior_gives_all_places_one_scale() -> None:
    alignment = taught(joined(Witness(), prior=1e9)).alignment(0)
    assert alignment.place_mean.std() < 1e-5
    assert alignment.place_scale.std() < 1e-5


@pytest.mark.parametrize(
    ("power", "top", "weights"), [(3.0, 0.01, (1.0, 0.35)), (1.0, 0.2, (2.0, 1.0)), (8.0, 1.0, (1.0, 1.0))]
)
def test_scores_are_those_of_a_literal_computation(power: float, top: float, weights: tuple[float, ...]) -> None:
    """All of it in numpy, from the training images' out-of-fold maps to the score of a new image."""
    prior = 5.0
    ensemble = taught(joined(Witness(), Witness(2, local=False), weights=weights, power=power, top=top, prior=prior))
    (features, product), (new, its) = images(40), images(14, seed=9)
    scores = ensemble(new)
    for y in range(2):
        maps, whole = own_maps(features, product, y, 1), own_maps(features, product, y, 2).mean((1, 2))
        evidence = np.stack([highest(left_out(maps, prior), top), whole], 1)
        mean, scale = evidence.mean(0), evidence.std(0, ddof=1)
        known = norm((evidence - mean) / scale, weights, power)
        tail, spread = np.quantile(known, TAIL), known.std(ddof=1)
        usual, unit = places(maps, prior)
        placed = (own_maps(new, its, y, 1) - usual) / unit
        fresh = np.stack([highest(placed, top), own_maps(new, its, y, 2).mean((1, 2))], 1)
        expected = (norm((fresh - mean) / scale, weights, power) - tail) / spread
        np.testing.assert_allclose(scores.image[its == y].numpy(), expected, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(scores.maps[its == y].numpy(), placed, rtol=1e-4, atol=1e-4)


def test_aligned_out_of_fold_scores_have_their_tail_at_zero_and_spread_one() -> None:
    ensemble, (features, product) = taught(joined(Witness(), Witness(2), weights=(1.0, 0.35)), 120), images(120)
    for y in range(2):
        evidence = [highest(left_out(own_maps(features, product, y, channel), 20.0), 0.01) for channel in (1, 2)]
        alignment = ensemble.alignment(y)
        standard = alignment.scales.members(torch.from_numpy(np.stack(evidence, 1)).float())
        np.testing.assert_allclose(standard.mean(0).numpy(), 0, atol=1e-4)
        np.testing.assert_allclose(standard.std(0).numpy(), 1, atol=1e-4)
        aligned = alignment.scales.sum(ensemble._joined(standard)).double().numpy()
        assert np.quantile(aligned, 0.95) == pytest.approx(0, abs=1e-4)
        assert aligned.std(ddof=1) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("gain", "offset"), [(10.0, 0.0), (0.1, 3.0), (1000.0, -50.0), (1.0, 100.0)])
@pytest.mark.parametrize("local", [True, False])
def test_an_affine_change_of_a_members_scores_of_a_product_changes_nothing(gain: float, offset: float, local: bool) -> None:
    plain = taught(joined(Witness(local=local), Witness(2)))
    changed = taught(joined(Witness(local=local, gain=(1.0, gain), offset=(0.0, offset)), Witness(2)))
    new, _ = images(20, seed=4)
    same(plain(new), changed(new), 2e-4)


def test_products_of_unlike_scores_become_comparable() -> None:
    """Without alignment every image of product 1 is above all those of product 0; with it, half of them is."""
    ensemble = taught(joined(Witness(gain=(1.0, 10.0), offset=(0.0, 100.0))), 200)
    new, its = images(200, seed=4)
    scores = ensemble(new)
    assert scores.unaligned is not None
    assert scores.unaligned[its == 1].min() > scores.unaligned[its == 0].max()
    above = (scores.image[its == 1][:, None] > scores.image[its == 0]).float().mean()
    assert 0.35 < above < 0.65
    alarms = [(scores.image[its == y] > 0).float().mean() for y in range(2)]
    assert all(share < 0.15 for share in alarms)


def test_the_unaligned_score_is_the_weighted_sum_of_what_members_say() -> None:
    ensemble = taught(joined(Witness(), Witness(2, local=False), weights=(2.0, 0.5), top=0.2))
    new, its = images(12, seed=4)
    scores, dense = ensemble.forward_given(new, its), new[0].double().numpy()
    expected = 2 * highest(dense[:, 1], 0.2) + 0.5 * dense[:, 2].mean((1, 2))
    assert scores.unaligned is not None
    np.testing.assert_allclose(scores.unaligned.numpy(), expected, rtol=1e-4)


# Joining


@pytest.mark.parametrize("power", [1.0, 3.0, 6.0])
def test_evidence_is_joined_as_a_norm(power: float) -> None:
    ensemble = joined(Witness(), Witness(), Witness(), weights=(1.0, 0.5, 2.0), power=power)
    evidence = 3 * torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(
        ensemble._joined(evidence).numpy(), norm(evidence.double().numpy(), (1, 0.5, 2), power), rtol=1e-5
    )


def test_a_member_that_alone_is_sure_raises_the_score() -> None:
    ensemble = joined(*(Witness() for _ in range(4)))
    quiet, mild, sure = torch.zeros(1, 4), torch.full((1, 4), 2.0), torch.tensor([[8.0, 0, 0, 0]])
    assert ensemble._joined(sure) > 1.5 * ensemble._joined(mild) > 1.5 * ensemble._joined(quiet)
    for member in range(4):
        more = quiet.clone()
        for height in (1.0, 4.0, 16.0):
            before = float(ensemble._joined(more))
            more[0, member] = height
            assert float(ensemble._joined(more)) > before
    contrary = torch.tensor([[8.0, -9.0, -9.0, -9.0]])  # those that are calm do not outvote it
    assert ensemble._joined(contrary) > 0.95 * ensemble._joined(sure)


def test_a_defect_that_one_member_sees_raises_the_score_of_its_image() -> None:
    ensemble = taught(joined(Witness(), Witness(2)))
    new, _ = images(10, seed=4)
    marked = [new[0].clone(), new[1]]
    marked[0][3, 2, 1, 1] += 40
    one, other = ensemble(new), ensemble(marked)
    assert other.image[3] > one.image[3] + 3
    assert int(other.maps[3].argmax()) == SIDE + 1
    rest = torch.arange(10) != 3
    assert torch.equal(one.image[rest], other.image[rest])


def test_a_member_that_does_not_map_gives_its_image_score_and_nothing_to_the_map() -> None:
    both, alone = taught(joined(Witness(), Witness(2, local=False))), taught(joined(Witness()))
    new, _ = images(10, seed=4)
    same_map, loud = both(new), [new[0].clone(), new[1]]
    torch.testing.assert_close(same_map.maps, alone(new).maps)
    loud[0][:, 2, 0, 0] += 500
    assert torch.equal(both(loud).maps, same_map.maps)
    assert (both(loud).image > same_map.image).all()


class Loud(Witness):
    """Its image scores have nothing to do with its maps."""

    def forward_given(self, features: Features, product: Tensor) -> Scores:
        scores = super().forward_given(features, product)
        return Scores(1e6 * scores.image.square(), scores.maps)


def test_of_a_member_that_maps_the_map_alone_counts() -> None:
    new, _ = images(10, seed=4)
    same(taught(joined(Loud(), Witness(2)))(new), taught(joined(Witness(), Witness(2)))(new))
    quiet = taught(joined(Loud(local=False), Witness(2)))(new)
    assert not torch.equal(quiet.image, taught(joined(Witness(local=False), Witness(2)))(new).image)


def test_maps_are_joined_by_weight() -> None:
    ensemble = taught(joined(Witness(), Witness(2), Witness(2, local=False), weights=(3.0, 1.0, 5.0)))
    single = [taught(joined(Witness(channel))) for channel in (1, 2)]
    new, _ = images(10, seed=4)
    expected = (3 * single[0](new).maps + single[1](new).maps) / 4
    torch.testing.assert_close(ensemble(new).maps, expected, rtol=1e-4, atol=1e-4)


def test_where_no_member_maps_there_is_a_map_of_all() -> None:
    quiet = [Witness(1, local=False), Witness(2, local=False)]
    new, _ = images(10, seed=4)
    torch.testing.assert_close(taught(joined(*quiet))(new).maps, taught(joined(Witness(), Witness(2)))(new).maps)


def test_the_map_has_the_side_that_was_asked_for() -> None:
    ensemble = taught(joined(Witness(), map_side=20, sigma=2.0))
    assert ensemble(images(3, seed=4)[0]).maps.shape == (3, 20, 20)
    assert finest([(3, 4, 7), (9, 2, 2), (4, 1, 1)]) == 7


# Few images, many images


@pytest.mark.parametrize(("statistics", "kept"), [(8, 8), (40, 40), (1000, 50)])
def test_what_is_kept_of_a_product_is_capped(statistics: int, kept: int) -> None:
    assert _most_kept(statistics) == kept


@pytest.mark.parametrize("statistics", [10, 4])
def test_the_cap_of_what_is_kept_is_hard(statistics: int) -> None:
    assert _most_kept(statistics) <= statistics


def _most_kept(statistics: int) -> int:
    """Of a product of 50 images, in 4 folds."""
    ensemble, (features, product) = joined(Witness(), statistics=statistics), images(100)
    ensemble.begin(product, torch.arange(100))
    most, more = 0, True
    while more:
        for start in range(0, 100, 9):
            ensemble.update([level[start : start + 9] for level in features], product[start : start + 9])
            assert ensemble._fitting is not None
            most = max([most, *(len(rows) for rows in ensemble._fitting._kept.values())])
        more = ensemble.finish()
    assert ensemble._fitting is None
    return most


@pytest.mark.parametrize("members", ["toy", "real"])
@pytest.mark.parametrize("count", [4, 6])
def test_two_or_three_images_of_a_product_are_enough(members: str, count: int) -> None:
    plain: dict[str, Any] = {"map_side": SIDE, "sigma": 0.0}
    real = (Neighbours(SHAPES, 2, **plain), OPCA(SHAPES, 2, mode="pooled", **plain))
    ensemble = taught(joined(*(real if members == "real" else (Witness(), Witness(2, local=False)))), count)
    for y in range(2):
        scores = ensemble.forward_given(images(8, seed=3)[0], torch.full((8,), y))
        assert torch.isfinite(scores.image).all()
        assert torch.isfinite(scores.maps).all()


def test_copies_of_one_image_give_finite_scores() -> None:
    features, product = images(24)
    features = [level[:2].repeat(12, 1, 1, 1) for level in features]
    ensemble = joined(Witness(), Witness(2, local=False))
    teach(ensemble, features, product)
    for levels in (features, images(6, seed=3)[0]):
        scores = ensemble(levels)
        assert torch.isfinite(scores.image).all()
        assert torch.isfinite(scores.maps).all()


def test_a_product_of_one_unit_is_learnt_all_the_same() -> None:
    log = Log()
    ensemble = taught(joined(Witness(log=log)), 40, torch.arange(40) % 2)
    assert sorted(number for number, _, _ in log.asked) == list(range(40))
    assert torch.isfinite(ensemble(images(6, seed=3)[0]).image).all()


def test_scores_of_an_image_do_not_depend_on_the_images_beside_it() -> None:
    ensemble, (new, _) = taught(joined(Witness(), Witness(2, local=False))), images(9, seed=4)
    before = {name: value.clone() for name, value in ensemble.state_dict().items()}
    whole = ensemble(new)
    for row in range(9):
        alone = ensemble([level[row : row + 1] for level in new])
        same(alone, Scores(whole.image[row : row + 1], whole.maps[row : row + 1]), 1e-5)
    assert all(torch.equal(value, before[name]) for name, value in ensemble.state_dict().items())


# Products that come and go


def real(products: int, **more: Any) -> Ensemble:
    plain: dict[str, Any] = {"map_side": SIDE, "sigma": 0.0}
    parts = Neighbours(SHAPES, products, **plain), OPCA(SHAPES, products, mode="pooled", **plain)
    return joined(*parts, weights=(1.0, 0.35), products=products, **more)


@cache
def learnt(*chosen: int) -> Ensemble:
    """Learnt from the images of some of three products, numbered anew; not to be changed."""
    features, product = images(30, products=3)
    own, number = torch.isin(product, torch.tensor(chosen)), torch.tensor([*range(len(chosen)), 0, 0])
    ensemble = real(len(chosen), folds=2)
    teach(ensemble, [level[own] for level in features], number[product[own] - min(chosen)])
    return ensemble


def test_a_product_that_joins_is_as_if_learnt_with_the_others_and_changes_none() -> None:
    whole, pair = learnt(0, 1, 2), deepcopy(learnt(0, 1))
    new, its = images(12, seed=7, products=3)
    known = its < 2
    old = [level[known] for level in new]
    before = pair.forward_given(old, its[known])
    pair.add(learnt(2))
    assert isinstance(pair, HoldsProducts)
    after = pair.forward_given(old, its[known])
    assert torch.equal(before.image, after.image)
    assert torch.equal(before.maps, after.maps)
    one, other = whole.state_dict(), pair.state_dict()
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-5, msg=name)
    same(whole(new), pair(new), 1e-4)


@pytest.mark.parametrize("gone", [0, 2])
def test_a_product_that_leaves_changes_none_of_the_others(gone: int) -> None:
    whole, fewer = learnt(0, 1, 2), deepcopy(learnt(0, 1, 2))
    fewer.remove(gone)
    new, its = images(12, seed=7, products=3)
    stay = its != gone
    kept = [level[stay] for level in new]
    one, other = whole.forward_given(kept, its[stay]), fewer.forward_given(kept, its[stay] - (its[stay] > gone).long())
    assert torch.equal(one.image, other.image)
    assert torch.equal(one.maps, other.maps)
    assert len(fewer.alignments) == 2
    found = fewer(kept).products
    assert found is not None
    assert torch.equal(found.argmax(1), its[stay] - (its[stay] > gone).long())


def with_padim() -> Ensemble:
    plain: dict[str, Any] = {"map_side": SIDE, "sigma": 0.0}
    return joined(Neighbours(SHAPES, 2, **plain), PaDiM(SHAPES, 2, dimension=3, **plain), folds=2)


def test_a_member_that_learns_all_products_as_one_cannot_be_changed() -> None:
    for change in (lambda: with_padim().remove(0), lambda: with_padim().add(with_padim())):
        with pytest.raises(ConfigError, match="PaDiM learns all products as one: none can be added to or removed"):
            change()


@pytest.mark.parametrize("change", ["add", "remove"])
def test_a_change_that_is_refused_leaves_all_as_it_was(change: str) -> None:
    ensemble, other = with_padim(), with_padim()
    before = list(ensemble.state_dict())
    with pytest.raises(ConfigError):
        ensemble.add(other) if change == "add" else ensemble.remove(0)
    assert list(ensemble.state_dict()) == before


# Errors


def test_nothing_is_scored_before_it_is_learnt() -> None:
    assert isinstance(joined(Witness()), DealsFolds)
    assert isinstance(joined(Witness()), TakesProduct)
    text = "ensemble has not learnt this product yet: fit it on normal images first"
    with pytest.raises(UnispectError, match=text):
        joined(Witness())(images(3)[0])
    half = joined(Witness())
    half.begin(torch.zeros(4, dtype=torch.int64), torch.arange(4))
    with pytest.raises(UnispectError, match="ensemble saw no image: call update with normal images before finish"):
        half.finish()
    half.update(*images(4))
    assert half.finish()
    with pytest.raises(UnispectError, match=text):
        half(images(3)[0])
    absent = joined(Witness(gain=(1.0, 1.0, 1.0), offset=(0.0, 0.0, 0.0)), products=3)
    teach(absent, *images(20))
    with pytest.raises(UnispectError, match=text):
        absent.forward_given(images(2)[0], torch.tensor([2, 2]))
    assert torch.isfinite(absent(images(6, seed=3)[0]).image).all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"weights": (1.0,)}, r"weights=\[1.0\]: expected one above 0 for each of 2 members"),
        ({"weights": (1.0, 0.0)}, r"weights=\[1.0, 0.0\]: expected one above 0 for each of 2 members"),
        ({"weights": (1.0, -2.0)}, "expected one above 0 for each of 2 members"),
        ({"folds": 1}, "folds: got 1, expected at least 2"),
        ({"statistics": 1}, "statistics: got 1, expected at least 4"),
        ({"prior": -1.0}, "prior=-1.0, power=3.0: expected at least 0 and at least 1"),
        ({"power": 0.5}, "prior=20.0, power=0.5: expected at least 0 and at least 1"),
    ],
)
def test_impossible_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        joined(Witness(), Witness(), **options)


@pytest.mark.parametrize("options", [{"top": 2.0}, {"weights": (float("nan"), 1.0)}, {"prior": float("nan")}], ids=str)
def test_impossible_options_that_are_not_noticed(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        joined(Witness(), Witness(), **options)
