"""What every aligner keeps to, on planted scores of three products. A new aligner adds a line to CASES.

The scores of the products have another offset and are 1, 3 and 10 times as large: one threshold cannot serve them, and the
aligners are to find it out from features that say what an image shows.
"""

import inspect
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from unispect.align.aligners import ALIGNERS, PROVIDED, build
from unispect.align.base import Aligner, AlignsGiven, Pairs, Statistics, view, width
from unispect.config import settings
from unispect.errors import ConfigError
from unispect.types import Features, Scores

SGD = {"rule": "sgd", "learning_rate": 5e-2, "anneal": False, "steps": 1000}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("cada", {"steps": 1500, "dropout": 0.1}),
    ("cada", {"spread": "sigma", "score": "map"}),
    ("cada", {"score": "map", "blur": True, "grid": 4, "kernel": 3}),
    ("cada", {"gap": "plain", "balanced": False, "score": "map"} | SGD),
    ("cada-b", {}),
    ("cada-b", {"spread": "sigma", "score": "map", "blur": True} | SGD),
]
PLAIN = 3  # as published, where nothing makes a product with small scores count as much as one with large
every_case = pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{name}-{n}" for n, (name, _) in enumerate(CASES)])
QUICK = {"steps": 800, "hidden": 64, "dropout": 0.25}
SCALES = torch.tensor([1.0, 3.0, 10.0])
OFFSETS = torch.tensor([0.0, 6.0, 3.0])
SIDE = 16


@dataclass(frozen=True)
class World:
    """Images of three products: features that show the product, and what a detector says of them."""

    features: Features
    scores: Scores
    product: Tensor
    defective: Tensor

    def __getitem__(self, chosen: Any) -> "World":
        scores = Scores(self.scores.image[chosen], self.scores.maps[chosen])
        return World([level[chosen] for level in self.features], scores, self.product[chosen], self.defective[chosen])


def world(count: int, seed: int, defects: bool = False) -> World:
    """Half of the images, or none, have a defect: it raises 3 x 3 places of the map, and moves a place of the features."""
    generator = torch.Generator().manual_seed(seed)
    shown = torch.Generator().manual_seed(0)
    product = torch.arange(count) % 3
    levels = []
    for channels, side in ((64, 4), (32, 2)):
        means = torch.randn(3, channels, 1, 1, generator=shown)
        levels.append(means[product] + 0.3 * torch.randn(count, channels, side, side, generator=generator))
    maps = 1 + 0.5 * torch.rand(count, SIDE, SIDE, generator=generator)
    maps = maps + 0.2 * torch.rand(count, 1, 1, generator=generator)
    defective = (torch.arange(count) // 3 % 2 == 1) & torch.tensor(defects)
    for image in torch.nonzero(defective).flatten().tolist():
        row, column = torch.randint(SIDE - 3, (2,), generator=generator).tolist()
        maps[image, row : row + 3, column : column + 3] += 1
        levels[0][image, :, row // 4, column // 4] += 2 * torch.randn(64, generator=generator)
    maps = OFFSETS[product, None, None] + SCALES[product, None, None] * maps
    return World(levels, Scores(maps.flatten(1).amax(1), maps), product, defective)


def pairs(seen: World, grid: int) -> Pairs:
    return Pairs(view(seen.features, seen.scores, grid), Statistics.of(seen.scores), seen.product)


def empty(case: int, seed: int = 0, **other: Any) -> Aligner:
    name, options = CASES[case]
    table = {"aligner": name, "seed": seed, name: QUICK | options | other}
    made = build(table, 96, 3)
    assert made is not None
    return made


def learnt(case: int, seed: int = 0, **other: Any) -> Aligner:
    aligner, seen = empty(case, seed, **other), world(240, 1)
    aligner.learn(pairs(seen, aligner.grid))
    return aligner.eval()


def moved(scores: Scores, offset: float, scale: float) -> Scores:
    return Scores(offset + scale * scores.image, offset + scale * scores.maps)


shared = lru_cache(maxsize=None)(learnt)  # for tests that only read


def aligned(case: int, seen: World) -> Scores:
    scores: Scores = shared(case)(seen.features, seen.scores)
    return scores


def by_product(scores: Tensor, seen: World) -> float:
    """AUROC, mean over the products."""
    parts = [roc_auc_score(seen.defective[seen.product == y], scores[seen.product == y]) for y in range(3)]
    return float(sum(parts) / 3)


def test_every_aligner_has_a_case() -> None:
    assert {name for name, _ in CASES} == set(ALIGNERS)


@every_case
def test_one_threshold_serves_products_of_unlike_scores(case: int) -> None:
    seen = world(600, 2, defects=True)
    scores = aligned(case, seen)
    raw = roc_auc_score(seen.defective, seen.scores.image)
    assert raw < 0.7
    assert by_product(seen.scores.image, seen) > 0.97
    if case == PLAIN:
        assert roc_auc_score(seen.defective, scores.image) > raw + 0.05
        return
    assert roc_auc_score(seen.defective, scores.image) > 0.95
    assert roc_auc_score(seen.defective, scores.image) > by_product(scores.image, seen) - 0.02


@every_case
def test_places_compare_across_products_too(case: int) -> None:
    if case == PLAIN:
        pytest.skip("as published: the map of the product with the smallest scores is lost")
    seen = world(600, 2, defects=True)
    usual = 1.7  # no normal place reaches it, before its product's offset and scale
    bad = (seen.scores.maps - OFFSETS[seen.product, None, None]) / SCALES[seen.product, None, None] > usual
    raw = average_precision_score(bad.flatten(), seen.scores.maps.flatten())
    assert raw < 0.4
    assert average_precision_score(bad.flatten(), aligned(case, seen).maps.flatten()) > 0.7


@every_case
def test_within_an_image_nothing_changes_its_place(case: int) -> None:
    if case == PLAIN:
        pytest.skip("as published: nothing keeps g above u, and then the map is turned upside down")
    if CASES[case][1].get("blur"):
        pytest.skip("blurred")
    seen = world(30, 3, defects=True)
    for before, after in zip(seen.scores.maps, aligned(case, seen).maps, strict=True):
        assert spearmanr(before.flatten(), after.flatten()).statistic > 0.9999


@every_case
def test_normal_maps_reach_from_zero_to_one(case: int) -> None:
    if CASES[case][1].get("blur"):
        pytest.skip("blurred: the highest place is lower")
    if case == PLAIN:
        pytest.skip("as published: only on average over products")
    maps = aligned(case, world(300, 4)).maps.flatten(1)
    highest = maps.std(1) * 3 if CASES[case][1].get("spread") == "sigma" else maps.amax(1)
    assert float(maps.mean(1).median()) == pytest.approx(0, abs=0.15)
    assert float(highest.median()) == pytest.approx(1, abs=0.15)


@every_case
def test_it_does_not_follow_the_defect(case: int) -> None:
    """A defect moves the score, not what the image is compared with: the score rises as it does under fixed statistics."""
    good, bad = world(300, 5), world(300, 5, defects=True)
    spoilt = bad.defective
    levels = [good.features, bad.features]
    # The same maps, under the views with and without the defect: what is predicted is all that differs.
    under = [shared(case)(features, good.scores).image[spoilt] for features in levels]
    risen = aligned(case, bad).image[spoilt] - under[0]
    moved_by = (under[1] - under[0]).abs()
    assert risen.median() > 0
    assert moved_by.median() < 0.25 * risen.median()


@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1e3), (-4.0, 0.25), (7.0, 3.0)])
@every_case
def test_the_unit_of_the_scores_does_not_matter(case: int, offset: float, scale: float) -> None:
    """In double precision and over few steps, since many steps make much of the last bits."""

    def scored(offset: float, scale: float) -> Scores:
        aligner, seen = empty(case, steps=40).double(), exact(world(120, 1))
        aligner.learn(pairs(replace(seen, scores=moved(seen.scores, offset, scale)), aligner.grid))
        asked = exact(world(60, 6, defects=True))
        scores: Scores = aligner.eval()(asked.features, moved(asked.scores, offset, scale))
        return scores

    one, other = scored(0.0, 1.0), scored(offset, scale)
    torch.testing.assert_close(other.image, one.image, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(other.maps, one.maps, rtol=1e-6, atol=1e-6)


def exact(seen: World) -> World:
    scores = Scores(seen.scores.image.double(), seen.scores.maps.double())
    return replace(seen, features=[level.double() for level in seen.features], scores=scores)


@every_case
def test_an_image_scores_the_same_alone_and_among_others(case: int) -> None:
    seen = world(12, 7, defects=True)
    whole = aligned(case, seen)
    for image in range(12):
        alone = aligned(case, seen[image : image + 1])
        torch.testing.assert_close(alone.image[0], whole.image[image], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone.maps[0], whole.maps[image], rtol=1e-4, atol=1e-4)


@every_case
def test_scoring_changes_nothing_and_keeps_what_came(case: int) -> None:
    seen, aligner = world(12, 7), shared(case)
    before = {name: value.clone() for name, value in aligner.state_dict().items()}
    copies = [seen.scores.image.clone(), seen.scores.maps.clone()]
    scores = aligner(seen.features, seen.scores)
    assert torch.equal(scores.unaligned, seen.scores.image)
    assert all(torch.equal(one, other) for one, other in zip(copies, (seen.scores.image, seen.scores.maps), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in aligner.state_dict().items())
    assert not scores.image.requires_grad
    known = replace(seen.scores, unaligned=seen.scores.image + 5, products=torch.zeros(12, 3))
    kept = aligner(seen.features, known)
    assert torch.equal(kept.unaligned, known.unaligned)
    assert torch.equal(kept.products, known.products)


@every_case
def test_state_goes_round(case: int) -> None:
    other, seen = empty(case), world(12, 7)
    other.load_state_dict(shared(case).state_dict())
    assert torch.equal(other.eval()(seen.features, seen.scores).image, aligned(case, seen).image)


@every_case
def test_the_seed_decides(case: int) -> None:
    """By a few steps, which is enough to tell."""
    again, different = (learnt(case, seed=seed, steps=8).state_dict() for seed in (0, 1))
    assert all(torch.equal(value, again[name]) for name, value in learnt(case, steps=8).state_dict().items())
    assert not all(torch.equal(value, again[name]) for name, value in different.items())


@every_case
def test_learning_leaves_other_draws_alone(case: int) -> None:
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    learnt(case, steps=8)
    assert torch.equal(torch.randn(2), expected)


@pytest.mark.parametrize("name", ALIGNERS)
def test_no_product_is_asked_for_when_scoring(name: str) -> None:
    forward = inspect.signature(getattr(ALIGNERS[name], "forward"))  # noqa: B009
    assert list(forward.parameters) == ["self", "features", "scores"]


@every_case
def test_few_images_are_enough_to_learn_something(case: int) -> None:
    aligner, seen = empty(case), world(3, 8)
    aligner.learn(pairs(seen, aligner.grid))
    scores = aligner(seen.features, seen.scores)
    assert torch.isfinite(scores.image).all()
    assert torch.isfinite(scores.maps).all()


@every_case
def test_detectors_that_always_say_the_same_are_no_reason_to_divide_by_zero(case: int) -> None:
    aligner, seen = empty(case), world(30, 9)
    flat = replace(seen, scores=Scores(torch.full((30,), 2.0), torch.full((30, SIDE, SIDE), 2.0)))
    aligner.learn(pairs(flat, aligner.grid))
    if CASES[case][1].get("gap") == "plain":
        return  # published: nothing keeps its gap from 0
    assert torch.isfinite(aligner(flat.features, flat.scores).image).all()


# The product given: CaDA-A


@pytest.mark.parametrize("case", [4, 5])
def test_told_the_right_product_it_scores_as_under_its_own_guess(case: int) -> None:
    seen, aligner = world(60, 6, defects=True), shared(case)
    assert isinstance(aligner, AlignsGiven)
    scores = aligned(case, seen)
    assert scores.products is not None
    right = scores.products.argmax(1) == seen.product
    assert right.float().mean() > 0.95
    given = aligner.forward_given(seen.features, seen.scores, seen.product)
    assert torch.equal(given.image[right], scores.image[right])
    other = aligner.forward_given(seen.features, seen.scores, (seen.product + 1) % 3)
    assert not torch.isclose(other.image, given.image).any()


def test_without_labels_it_is_as_good_as_with_them() -> None:
    seen, told = world(600, 2, defects=True), shared(4)
    assert isinstance(told, AlignsGiven)
    known = roc_auc_score(seen.defective, told.forward_given(seen.features, seen.scores, seen.product).image)
    assert roc_auc_score(seen.defective, aligned(0, seen).image) > known - 0.01


def test_statistics_of_each_product_are_the_papers() -> None:
    seen = world(240, 1)
    known = seen.scores.maps.flatten(1)
    for case, spread in ((4, "max"), (5, "sigma")):
        aligner = shared(case)
        for y in range(3):
            own = known[seen.product == y]
            level = own.mean()
            reach = own.amax(1).mean() - level if spread == "max" else 3 * own.std(1, correction=0).mean()
            assert float(aligner.get_buffer("level")[y]) == pytest.approx(float(level), rel=1e-5)
            assert float(aligner.get_buffer("reach")[y]) == pytest.approx(float(reach), rel=1e-4)


# Settings


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("cada", {"spread": "median"}, r"\[cada\] unknown spread 'median': known: max, sigma"),
        ("cada", {"gap": "wide"}, "unknown gap 'wide': known: plain, safe"),
        ("cada", {"gap": "plain"}, 'gap="plain": .* set balanced to false'),
        ("cada", {"threshold": 0.0}, r"grid=1, threshold=0\.0"),
        ("cada", {"kernel": 2}, "kernel=2.*odd kernel"),
        ("cada", {"dropout": 1.0}, r"dropout=1\.0"),
        ("cada", {"steps": 0}, "steps: got 0, expected at least 1"),
        ("cada", {"images": 1}, "images: got 1, expected at least 2"),
        ("cada", {"learning_rate": 0.0}, r"learning_rate=0\.0"),
        ("cada", {"score": "best"}, "unknown score 'best': known: map, own"),
        ("cada", {"top": 0.0}, r"top: got 0\.0"),
        ("cada-b", {"spread": "median"}, r"\[cada-b\] unknown spread"),
        ("cada-b", {"grid": 0}, "grid: got 0"),
    ],
)
def test_settings_that_cannot_be(name: str, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build({"aligner": name, "seed": 0, name: wrong}, 96, 3)


def test_both_have_the_same_settings_where_they_do_the_same() -> None:
    regressor, classifier = (settings(ALIGNERS[name], {}, PROVIDED) for name in ("cada", "cada-b"))
    assert classifier.pop("steps") > regressor["steps"]  # what stops the regressor early has no meaning for a classifier
    assert {name: regressor[name] for name in classifier} == classifier


def test_a_view_is_the_bottleneck_where_there_is_one() -> None:
    seen = world(4, 1)
    assert view(seen.features, seen.scores, 2).shape == (4, width(seen.features, seen.scores), 2, 2) == (4, 96, 2, 2)
    torch.testing.assert_close(view(seen.features, seen.scores, 1)[:, 64:, 0, 0], seen.features[1].mean((2, 3)))
    narrow = replace(seen.scores, context=seen.features[1])
    assert torch.equal(view(seen.features, narrow, 2), seen.features[1])
    assert width(seen.features, narrow) == 32
