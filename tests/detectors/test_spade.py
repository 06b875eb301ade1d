"""SPADE: images and places against scikit-learn and a literal loop; what is kept is bounded and fair."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from unispect.detectors.spade import SPADE, Reservoir
from unispect.errors import ConfigError, UnispectError
from unispect.types import Features, Scores

SHAPES = [(5, 4, 4), (7, 3, 2), (4, 1, 1), (3, 1, 1)]
SMALL: dict[str, Any] = {"map_side": 8, "sigma": 1.0}


def images(count: int, seed: int, shapes: list[tuple[int, int, int]] = SHAPES) -> tuple[Features, Tensor]:
    """Two products with means of their own."""
    generator, product = torch.Generator().manual_seed(seed), torch.arange(count) % 2
    signs = (2.0 * product - 1)[:, None, None, None]
    return [2 * signs + torch.randn(count, *shape, generator=generator) for shape in shapes], product


def fitted(detector: SPADE, features: Features, product: Tensor, batch: int = 8) -> SPADE:
    for start in range(0, len(product), batch):
        detector.update([level[start : start + batch] for level in features], product[start : start + batch])
    assert detector.finish() is False
    return detector


def learnt(count: int = 20, batch: int = 8, **options: Any) -> SPADE:
    return fitted(SPADE(SHAPES, 2, **SMALL | options), *images(count, 1), batch)


def assert_same(one: Scores, other: Scores, tolerance: float = 0.0) -> None:
    for name in ("image", "maps", "products"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=tolerance)


# Scores


def image_neighbours(train: Features, test: Features, k: int) -> tuple[np.ndarray, np.ndarray]:
    vectors = [torch.cat([level.flatten(1) for level in features[2:]], 1).double().numpy() for features in (train, test)]
    distances, places = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(vectors[0]).kneighbors(vectors[1])
    return distances, places


def in_order_kept(features: Features, product: Tensor) -> Features:
    order = product.argsort(stable=True)
    return [level[order] for level in features]


@pytest.mark.parametrize("k", [1, 5])
def test_the_image_score_is_that_of_sklearn(k: int) -> None:
    (train, product), (test, _) = images(20, 1), images(6, 2)
    distances, places = image_neighbours(in_order_kept(train, product), test, k)
    scores = learnt(neighbours=k)(test)
    torch.testing.assert_close(scores.image, torch.from_numpy(distances.mean(1)).float(), rtol=0, atol=1e-5)
    votes = np.stack([np.bincount(row, minlength=2) for row in product.sort().values.numpy()[places]])
    torch.testing.assert_close(scores.products, torch.from_numpy(np.log((votes + 1) / (k + 2))).float())


def test_each_place_is_compared_with_all_places_of_the_neighbours() -> None:
    (train, product), (test, _) = images(20, 1), images(4, 2)
    kept = in_order_kept(train, product)
    _, neighbours = image_neighbours(kept, test, 5)
    maps = torch.zeros(4, 8, 8)
    for level, gallery in zip(test[:2], kept[:2], strict=True):
        for image in range(4):
            near = gallery[neighbours[image]].half().double().permute(0, 2, 3, 1).flatten(0, 2)
            gaps = torch.zeros(level.shape[2:])
            for row in range(level.shape[2]):
                for column in range(level.shape[3]):
                    gaps[row, column] = min((level[image, :, row, column].double() - other).norm() for other in near)
            maps[image] += torch.nn.functional.interpolate(gaps[None, None], (8, 8), mode="bilinear")[0, 0] / 2
    blurred = np.stack([gaussian_filter(single, 1.0) for single in maps.numpy()])
    torch.testing.assert_close(learnt()(test).maps, torch.from_numpy(blurred), rtol=0, atol=1e-5)


def test_without_a_pooled_level_the_last_dense_one_is_averaged() -> None:
    train, product = images(20, 1, SHAPES[:2])
    test, _ = images(4, 2, SHAPES[:2])
    detector = fitted(SPADE(SHAPES[:2], 2, **SMALL), train, product)
    vectors = [features[1].mean((2, 3)).numpy() for features in (train, test)]
    distances, _ = NearestNeighbors(n_neighbors=5).fit(vectors[0]).kneighbors(vectors[1])
    torch.testing.assert_close(detector(test).image, torch.from_numpy(distances.mean(1)).float(), rtol=0, atol=1e-5)


def test_pooled_levels_alone_give_a_flat_map() -> None:
    detector = fitted(SPADE(SHAPES[2:], 2, **SMALL), *images(20, 1, SHAPES[2:]))
    maps = detector(images(4, 2, SHAPES[2:])[0]).maps
    torch.testing.assert_close(maps, maps[:, :1, :1].expand(4, 8, 8), rtol=0, atol=1e-5)


def test_fewer_images_than_neighbours() -> None:
    scores = learnt(count=3)(images(4, 2)[0])
    assert torch.isfinite(scores.image).all()
    assert scores.products is not None
    torch.testing.assert_close(scores.products.exp().sum(1), torch.ones(4))


def test_copies_of_one_image_and_constants() -> None:
    for levels in (images(1, 1)[0], [torch.ones(1, *shape) for shape in SHAPES]):
        detector = fitted(SPADE(SHAPES, 1, **SMALL), [level.repeat(9, 1, 1, 1) for level in levels], torch.zeros(9).long())
        scores = detector(levels)
        assert scores.image.tolist() == [0.0]
        assert float(scores.maps.max()) < 1e-2  # half precision


def test_what_half_precision_cannot_hold_stays_finite() -> None:
    train, product = images(6, 1)
    detector = fitted(SPADE(SHAPES, 2, **SMALL), [1e6 * level for level in train], product)
    assert torch.isfinite(detector(train).maps).all()


# State and batches


def test_state_goes_round() -> None:
    detector, other = learnt(), SPADE(SHAPES, 2, **SMALL)
    other.load_state_dict(detector.state_dict())
    features, _ = images(5, 2)
    assert_same(detector(features), other(features))
    assert other.gallery.level(0).dtype == torch.float16


def test_images_score_alike_in_all_batches() -> None:
    features, _ = images(7, 2)
    detector = learnt()
    rows = [detector([level[n : n + 1] for level in features]) for n in range(7)]
    joined = Scores(*(torch.cat([getattr(row, name) for row in rows]) for name in ("image", "maps", "products")))
    assert_same(detector(features), joined, 1e-5)
    assert detector([level[:0] for level in features]).maps.shape == (0, 8, 8)


def test_what_is_learnt_does_not_depend_on_the_batches() -> None:
    one, other = learnt(60, batch=1, max_images=10), learnt(60, batch=60, max_images=10)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_the_seed_decides_what_is_kept() -> None:
    one, again, other = (learnt(60, max_images=10, seed=seed).gallery.pooled for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


# What is kept


def test_all_levels_of_a_slot_are_of_one_image() -> None:
    detector, (train, _) = learnt(60, max_images=10), images(60, 1)
    pooled = torch.cat([level.flatten(1) for level in train[2:]], 1)
    for slot, vector in enumerate(detector.gallery.pooled):
        source = int((pooled - vector).abs().sum(1).argmin())
        assert torch.equal(pooled[source], vector)
        assert source % 2 == detector.gallery.product[slot]
        assert all(torch.equal(detector.gallery.level(n)[slot], train[n][source].half()) for n in range(2))


def test_ten_times_more_images_take_no_more_memory() -> None:
    sizes = []
    for count in (40, 400):
        detector = SPADE(SHAPES, 2, **SMALL, max_images=10)
        features, product = images(count, 1)
        for start in range(0, count, 20):
            detector.update([level[start : start + 20] for level in features], product[start : start + 20])
            assert detector._seen is not None
            held = [tensor for slots in detector._seen.slots.values() for slot in slots for tensor in slot]
            sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in held))
        detector.finish()
        assert len(detector.gallery.pooled) == 10
    assert set(sizes) == {10 * (2 * (5 * 16 + 7 * 6) + 4 * 7)}


def test_a_hundred_products_share_alike() -> None:
    shapes = [(3, 2, 2)]
    sizes = torch.tensor([30] + [2] * 99)
    product = torch.arange(100).repeat_interleave(sizes)
    features = torch.randn(len(product), 3, 2, 2, generator=torch.Generator().manual_seed(0))
    detector = fitted(SPADE(shapes, 100, **SMALL, max_images=300), [features], product)
    assert detector.gallery.product.bincount().tolist() == [3] + [2] * 99


def test_the_sample_is_uniform() -> None:
    counts = np.zeros(20)
    for seed in range(2000):
        reservoir = Reservoir(5, seed)
        for number in range(20):
            slot = reservoir.place(0)
            if slot is not None:
                reservoir.put(0, slot, [torch.tensor(number)])
        counts[[int(slot[0]) for slot in reservoir.slots[0]]] += 1
    assert counts.sum() == 5 * 2000
    assert abs(counts / 2000 - 0.25).max() < 0.05  # five standard deviations


# Errors


def test_nothing_was_learnt() -> None:
    with pytest.raises(UnispectError, match="spade has learnt nothing yet: fit it"):
        SPADE(SHAPES, 2)(images(1, 1)[0])
    with pytest.raises(UnispectError, match="spade saw no image"):
        SPADE(SHAPES, 2).finish()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_images": 1}, "max_images: got 1, expected at least one for each of 2 products"),
        ({"neighbours": 0}, "neighbours: got 0, expected at least 1"),
        ({"map_side": 0}, "map_side: got 0, expected at least 1"),
    ],
)
def test_impossible_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        SPADE(SHAPES, 2, **options)
