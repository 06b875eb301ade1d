"""Neighbours against literal computations, and what one product may do to another: nothing."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from unispect.detectors.base import HoldsProducts, TakesProduct
from unispect.detectors.neighbours import Neighbours
from unispect.errors import ConfigError, UnispectError
from unispect.nn.neighbourhood import PLAIN
from unispect.types import Features

SHAPES = [(4, 6, 6), (3, 3, 3), (5, 1, 1)]
DENSE = 7  # channels of the dense levels


def images(count: int, seed: int, products: int = 3) -> tuple[Features, Tensor]:
    """Correlated channels of unlike variance; every product has its own mean."""
    random, product, levels = torch.Generator().manual_seed(seed), torch.arange(count) % products, []
    for channels, height, width in SHAPES:
        mixing = torch.randn(channels, channels, generator=torch.Generator().manual_seed(channels))
        drawn = torch.randn(count, channels, height, width, generator=random)
        levels.append(torch.einsum("dc,nchw->ndhw", mixing, drawn) + 15 * product[:, None, None, None])
    return levels, product


def part(features: Features, chosen: Tensor) -> Features:
    return [level[chosen] for level in features]


def taught(features: Features, product: Tensor, sizes: tuple[int, ...] = (16,), **options: Any) -> Neighbours:
    """Learnt in batches whose sizes come in turn."""
    products = options.pop("products", int(product.max()) + 1)
    detector = Neighbours(SHAPES, products, **{"map_side": 6, "sigma": 0.0, "bank_images": 5.0} | options)
    more = True
    while more:
        start = turn = 0
        while start < len(product):
            stop = start + sizes[turn % len(sizes)]
            detector.update([level[start:stop] for level in features], product[start:stop])
            start, turn = stop, turn + 1
        more = detector.finish()
    return detector


def plain_vectors(features: Features) -> np.ndarray:
    """(N, 36, 7) float64: bilinear interpolation by scipy of the dense levels."""
    place = (np.arange(6) + 0.5) / 2 - 0.5  # of a pixel of the 6 x 6 grid in the 3 x 3 grid
    grid = np.stack(np.meshgrid(place, place, indexing="ij"))
    rows = []
    for fine, coarse in zip(features[0].double().numpy(), features[1].double().numpy(), strict=True):
        raised = [map_coordinates(channel, grid, order=1, mode="nearest") for channel in coarse]
        rows.append(np.concatenate([fine, raised]).reshape(DENSE, 36).T)
    return np.stack(rows)


def relative(vectors: np.ndarray, known: Any, neighbours: int, support: int, around: int) -> np.ndarray:
    """The distance as the docstrings say it, (n, C) -> (n,), from what was learnt but `usual`."""
    bank = known.bank.double().numpy()
    around, neighbours, support = min(around, len(bank) - 1), min(neighbours, len(bank)), min(support, len(bank))
    local = NearestNeighbors(n_neighbors=around + 1, algorithm="brute").fit(bank).kneighbors(bank)[0][:, 1:].mean(1)
    white = (vectors - known.shift.double().numpy()) @ known.whiten.double().numpy()
    found = NearestNeighbors(n_neighbors=max(neighbours, support), algorithm="brute").fit(bank).kneighbors(white)
    return found[0][:, :neighbours].mean(1) / (local[found[1][:, :support]].mean(1) + PLAIN * local.mean() + 1e-6)


# Distances


@pytest.mark.parametrize(("neighbours", "support", "around"), [(3, 20, 50), (1, 1, 1), (7, 2, 4), (1000, 1000, 1000)])
def test_distances_are_those_of_a_literal_computation(neighbours: int, support: int, around: int) -> None:
    features, product = images(30, 1)
    detector = taught(features, product, neighbours=neighbours, support=support, around=around)
    new, its = images(6, 2)
    scores = detector.forward_given(new, its)
    for row, y in enumerate(its.tolist()):
        expected = relative(plain_vectors(new)[row], detector.product(y), neighbours, support, around)
        np.testing.assert_allclose(scores.maps[row].flatten().numpy(), expected, rtol=2e-4)


@pytest.mark.parametrize(("top", "places"), [(0.01, 1), (0.1, 3), (1.0, 36)])
def test_the_image_score_is_the_mean_of_the_highest_places(top: float, places: int) -> None:
    features, product = images(12, 1)
    scores = taught(features, product, top=top)(images(6, 2)[0])
    expected = np.sort(scores.maps.flatten(1).numpy(), axis=1)[:, -places:].mean(1)
    np.testing.assert_allclose(scores.image.numpy(), expected, rtol=1e-5)


def test_without_a_label_an_image_is_scored_under_its_recognised_product() -> None:
    features, product = images(30, 1)
    detector = taught(features, product)
    new, its = images(9, 2)
    own, given = detector(new), detector.forward_given(new, its)
    assert own.products is not None
    assert torch.equal(own.products.argmax(1), its)
    assert torch.equal(own.image, given.image)
    assert torch.equal(own.maps, given.maps)
    wrong = detector.forward_given(new, (its + 1) % 3)
    assert (wrong.image > 2 * own.image).all()


# Whitening


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 0.25])
def test_whitened_features_have_a_power_of_the_level_scaled_covariance(power: float) -> None:
    features, product = images(45, 1)
    detector = taught(features, product, whitening=power)
    for y in range(3):
        vectors = plain_vectors(part(features, product == y)).reshape(-1, DENSE)
        scaled = vectors.copy()
        for level in (slice(0, 4), slice(4, 7)):
            scaled[:, level] /= np.sqrt(vectors[:, level].var(0).sum())
        values, basis = np.linalg.eigh(np.cov(scaled.T, bias=True))
        expected = (basis * values ** (1 - power)) @ basis.T
        known = detector.product(y)
        white = (vectors - known.shift.double().numpy()) @ known.whiten.double().numpy()
        found = np.cov(white.T, bias=True)
        np.testing.assert_allclose(found, expected / np.trace(expected), rtol=1e-4, atol=1e-5)
        assert np.trace(found) == pytest.approx(1, abs=1e-4)
        np.testing.assert_allclose(white.mean(0), 0, atol=1e-4)


def test_the_unit_of_one_level_does_not_matter() -> None:
    features, product = images(30, 1)
    new, its = images(6, 2)
    one = taught(features, product).forward_given(new, its)
    stretched = taught([features[0], 50 * features[1], features[2]], product)
    other = stretched.forward_given([new[0], 50 * new[1], new[2]], its)
    torch.testing.assert_close(one.maps, other.maps, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_the_unit_of_one_product_does_not_matter(factor: float) -> None:
    """Relative: all features of product 1 by a constant, the others as they are."""
    features, product = images(30, 1)
    new, its = images(9, 2)

    def stretched(levels: Features, labels: Tensor) -> Features:
        return [torch.where((labels == 1)[:, None, None, None], factor * level, level) for level in levels]

    one = taught(features, product).forward_given(new, its)
    other = taught(stretched(features, product), product).forward_given(stretched(new, its), its)
    torch.testing.assert_close(one.image, other.image, rtol=2e-3, atol=0)
    torch.testing.assert_close(one.maps, other.maps, rtol=2e-3, atol=0)


def test_a_rough_product_is_forgiven_what_a_plain_one_is_not() -> None:
    """The same step away from the normal patches counts less where these lie far from each other."""
    features, product = images(30, 1, products=2)
    centre = 15 * product[:, None, None, None].float()
    features = [torch.where(product[:, None, None, None] == 1, centre + (level - centre) * 0.1, level) for level in features]
    detector = taught(features, product, whitening=0.0)
    new = part(features, torch.tensor([0, 1]))
    new[0][:, :, 2, 2] += 10.0
    rough, smooth = detector.forward_given(new, torch.tensor([0, 1])).maps[:, 2, 2]
    assert smooth > 4 * rough


# Banks


def test_all_patches_are_kept_where_they_fit_and_only_patches_are_kept() -> None:
    features, product = images(12, 1)
    for bank_images, kept in ((5.0, 144), (2.0, 72), (0.5, 18)):
        detector = taught(features, product, bank_images=bank_images)
        for y in range(3):
            known = detector.product(y)
            vectors = detector.embed(part(features, product == y)).flatten(0, 1)
            gaps = torch.cdist(known.bank.double(), known.white(vectors).double()).amin(1)
            assert len(known.bank) == len(known.usual) == kept
            assert len(known.bank.unique(dim=0)) == kept
            assert gaps.max() < 1e-5


def test_a_coreset_covers_better_than_the_first_patches() -> None:
    features, product = images(30, 1, products=1)
    known = taught(features, product, bank_images=2.0).product(0)
    white = known.white(taught(features, product).embed(features).flatten(0, 1))
    assert torch.cdist(white, known.bank).amin(1).max() < 0.8 * torch.cdist(white, white[:72]).amin(1).max()


def test_a_hundred_products_share_what_may_be_kept() -> None:
    features, product = images(200, 1, products=100)
    for most, each in ((100, 1), (350, 3)):
        detector = taught(features, product, max_bank_vectors=most)
        sizes = [len(detector.product(y).bank) for y in range(100)]
        assert sizes == [each] * 100
        assert torch.isfinite(detector(part(features, torch.arange(5))).image).all()


def test_memory_while_learning_is_bounded_by_max_ram() -> None:
    """What is held does not grow with the number of images."""
    held = []
    for count in (40, 160):
        features, product = images(count, 1, products=2)
        detector = Neighbours(SHAPES, 2, map_side=6, sigma=0.0, max_ram=0.1, bank_images=3.0)
        detector.update(features, product)
        assert detector.finish()
        most = 0
        for start in range(0, count, 8):
            detector.update([level[start : start + 8] for level in features], product[start : start + 8])
            most = max(most, sum(coreset.held_bytes for coreset in detector._coresets.values()))
        held.append(most)
        assert not detector.finish()
        assert sum(len(detector.product(y).bank) for y in range(2)) <= 2 * 108
        assert not detector._coresets
        assert not detector._sums
    assert max(held) <= 0.1 * 2**20


def test_batches_do_not_matter() -> None:
    features, product = images(30, 1)
    one = taught(features, product, (30,), bank_images=2.0).state_dict()
    for sizes in ((1,), (7, 2, 11), (16,)):
        other = taught(features, product, sizes, bank_images=2.0).state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())


# Products that come and go


def same_rows(one: Neighbours, other: Neighbours, features: Features, number: Tensor, shifted: Tensor) -> bool:
    a, b = one.forward_given(features, number), other.forward_given(features, shifted)
    return torch.equal(a.image, b.image) and torch.equal(a.maps, b.maps)


def test_a_product_that_joins_is_as_if_learnt_with_the_others_and_changes_none() -> None:
    features, product = images(30, 1)
    new, its = images(9, 2)
    two, third = part(features, product < 2), part(features, product == 2)
    whole, pair = taught(features, product), taught(two, product[product < 2])
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    own = its < 2
    alone = pair.forward_given(part(new, own), its[own])
    pair.add(taught(third, torch.zeros(10, dtype=torch.int64)))
    assert isinstance(pair, HoldsProducts)
    assert isinstance(pair, TakesProduct)
    assert all(torch.equal(value, pair.state_dict()[name]) for name, value in before.items())
    later = pair.forward_given(part(new, own), its[own])
    assert torch.equal(alone.image, later.image)
    assert torch.equal(alone.maps, later.maps)
    one, other = whole.state_dict(), pair.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert torch.equal(whole(new).image, pair(new).image)


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_product_that_leaves_changes_none_of_the_others(gone: int) -> None:
    features, product = images(30, 1)
    new, its = images(9, 2)
    whole, fewer = taught(features, product), taught(features, product)
    fewer.remove(gone)
    stay = its != gone
    number = its[stay]
    assert same_rows(whole, fewer, part(new, stay), number, number - (number > gone).long())
    scores = fewer(part(new, stay))
    assert scores.products is not None
    assert scores.products.shape == (6, 2)
    assert torch.equal(scores.products.argmax(1), number - (number > gone).long())
    assert torch.equal(scores.image, whole(part(new, stay)).image)


def test_what_joined_is_a_copy() -> None:
    features, product = images(20, 1, products=2)
    one, other = taught(features, product), taught(features, product)
    one.add(other)
    kept = one.product(2).bank.clone()
    other.product(0).bank.zero_()
    assert torch.equal(one.product(2).bank, kept)


# Poor images


def poor(kind: str) -> tuple[Features, Tensor]:
    features, product = images(18, 1)
    if kind == "copies of one image":
        return [level[:3].repeat(6, 1, 1, 1) for level in features], product
    if kind == "constant features":
        return [torch.full_like(level, 0.1) for level in features], product
    if kind == "a constant channel":
        features[0][:, 1] = 3.7
    if kind == "a constant level":
        features[1][:] = 3.7
    if kind == "constant in an image":
        features = [level.mean((2, 3), keepdim=True).expand_as(level).contiguous() for level in features]
    if kind == "two images":
        return part(features, torch.arange(6)), product[:6]
    if kind == "one image":
        return part(features, torch.arange(3)), product[:3]
    return features, product


KINDS = ["copies of one image", "constant features", "a constant channel", "a constant level", "constant in an image"]


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", [*KINDS, "two images", "one image"])
def test_poor_images_give_finite_scores(kind: str, whitening: float) -> None:
    features, product = poor(kind)
    detector = taught(features, product, whitening=whitening)
    for levels in (features, images(6, 2)[0]):
        scores = detector(levels)
        assert torch.isfinite(scores.image).all()
        assert torch.isfinite(scores.maps).all()


def test_a_bank_of_copies_still_tells_near_from_far() -> None:
    features, product = poor("copies of one image")
    detector, own = taught(features, product), part(features, torch.arange(3))
    near = [level + 0.1 for level in own]
    far = [level + 10.0 for level in own]
    its = torch.arange(3)
    scores = [detector.forward_given(levels, its).image for levels in (own, near, far)]
    assert (scores[0] < scores[1]).all()
    assert (scores[1] < scores[2]).all()


def test_pooled_levels_alone_are_enough() -> None:
    shapes = [(4, 1, 1), (3, 1, 1)]
    random = torch.Generator().manual_seed(0)
    features = [torch.randn(40, *shape, generator=random) for shape in shapes]
    detector = Neighbours(shapes, 1, map_side=8)
    more = True
    while more:
        detector.update(features, torch.zeros(40, dtype=torch.int64))
        more = detector.finish()
    good, bad = detector([level[:5] for level in features]), detector([level[:5] + 9 for level in features])
    assert len(detector.product(0).bank) == 15
    assert good.maps.shape == (5, 8, 8)
    assert (bad.image > good.image).all()


# Errors


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"neighbours": 0}, "neighbours: got 0, expected at least 1"),
        ({"support": 0}, "support: got 0, expected at least 1"),
        ({"around": -1}, "around: got -1, expected at least 1"),
        ({"whitening": -0.1}, "whitening: got -0.1, expected a number from 0 to 1"),
        ({"whitening": float("nan")}, "whitening: got nan, expected a number from 0 to 1"),
        ({"bank_images": 0.0}, "bank_images: got 0.0, expected a number above 0"),
        ({"max_bank_vectors": 2}, "max_bank_vectors: got 2, expected one for each of 3 products"),
    ],
)
def test_impossible_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Neighbours(SHAPES, 3, **options)


def test_a_share_above_all_places_is_refused() -> None:
    with pytest.raises(ConfigError, match="top"):
        Neighbours(SHAPES, 3, top=2.0)


def test_nothing_is_scored_before_it_is_learnt() -> None:
    with pytest.raises(UnispectError, match="neighbours has learnt nothing yet: fit it on normal images first"):
        Neighbours(SHAPES, 3)(images(3, 1)[0])
    with pytest.raises(UnispectError, match="neighbours saw no image: call update with normal images before finish"):
        Neighbours(SHAPES, 3).finish()
    half = Neighbours(SHAPES, 3)
    half.update(*images(6, 1))
    assert half.finish()
    with pytest.raises(UnispectError, match="has learnt nothing yet"):
        half(images(3, 1)[0])
