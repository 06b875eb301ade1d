"""PatchCore: patches against a literal restatement, scores against scikit-learn, re-weighting against a loop."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from unispect.detectors import patchcore
from unispect.detectors.patchcore import PatchCore
from unispect.errors import ConfigError, UnispectError
from unispect.types import Features, Scores

SHAPES = [(5, 6, 4), (7, 3, 2), (4, 1, 1)]
GRID = (6, 4)
SMALL: dict[str, Any] = {"dimension": 12, "map_side": 8, "sigma": 1.0}


def images(count: int, seed: int, shapes: list[tuple[int, int, int]] = SHAPES) -> tuple[Features, Tensor]:
    """Two products with means of their own."""
    generator, product = torch.Generator().manual_seed(seed), torch.arange(count) % 2
    signs = (2.0 * product - 1)[:, None, None, None]
    return [2 * signs + torch.randn(count, *shape, generator=generator) for shape in shapes], product


def learnt(count: int = 20, **options: Any) -> PatchCore:
    detector = PatchCore(SHAPES, 2, **SMALL | options)
    features, product = images(count, 1)
    for start in range(0, count, 8):
        detector.update([level[start : start + 8] for level in features], product[start : start + 8])
    assert detector.finish() is False
    return detector


def assert_same(one: Scores, other: Scores, tolerance: float = 0.0) -> None:
    for name in ("image", "maps", "products"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=tolerance)


# Patches, as the published code makes them, one at a time


def patch_of(level: np.ndarray, row: int, column: int, side: int) -> np.ndarray:
    """Neighbourhood of a place of (C, h, w), channel first, zeros outside."""
    margin = side // 2
    padded = np.pad(level, ((0, 0), (margin, margin), (margin, margin)))
    return padded[:, row : row + side, column : column + side].flatten()


def resized_patch(level: np.ndarray, row: int, column: int, side: int) -> np.ndarray:
    """Patch of a coarser level at a place of GRID: bilinear between patches, half-pixel centres."""
    found, (_, height, width) = np.zeros(level.shape[0] * side**2), level.shape
    y = min(max((row + 0.5) * height / GRID[0] - 0.5, 0), height - 1)
    x = min(max((column + 0.5) * width / GRID[1] - 0.5, 0), width - 1)
    for i in range(height):
        for j in range(width):
            found += max(0, 1 - abs(y - i)) * max(0, 1 - abs(x - j)) * patch_of(level, i, j, side)
    return found


def averaged(vector: np.ndarray, size: int) -> np.ndarray:
    """Adaptive average pooling: runs from floor(i n / size) to ceil((i + 1) n / size)."""
    n = len(vector)
    return np.array([vector[i * n // size : -(-(i + 1) * n // size)].mean() for i in range(size)])


@pytest.mark.parametrize(("side", "dimension"), [(1, 3), (3, 12), (3, 50), (5, 9)])
def test_patches_are_those_of_the_published_code(side: int, dimension: int) -> None:
    features, _ = images(2, 0)
    found = PatchCore(SHAPES, 2, dimension=dimension, neighbourhood=side).embed(features)
    assert found.shape == (2, 24, dimension)
    for image in range(2):
        for place in range(24):
            row, column = divmod(place, GRID[1])
            levels = [level[image].double().numpy() for level in features[:2]]
            parts = [averaged(resized_patch(level, row, column, side), dimension) for level in levels]
            expected = torch.from_numpy(averaged(np.concatenate(parts), dimension)).float()
            torch.testing.assert_close(found[image, place], expected, rtol=0, atol=1e-5)


def test_the_order_of_levels_does_not_decide_the_grid() -> None:
    detector = PatchCore(SHAPES[::-1], 2, **SMALL)
    assert detector.grid == GRID
    assert detector.embed(images(3, 0, SHAPES[::-1])[0]).shape == (3, 24, 12)


def test_pooled_levels_are_used_only_where_there_is_nothing_else() -> None:
    features, _ = images(3, 0)
    changed = [*features[:2], features[2] + 100]
    detector = learnt()
    assert_same(detector(features), detector(changed))
    alone = PatchCore([(4, 1, 1)], 2, **SMALL)
    alone.update(*images(6, 1, [(4, 1, 1)]))
    alone.finish()
    assert alone(images(5, 2, [(4, 1, 1)])[0]).maps.shape == (5, 8, 8)


# Scores


@pytest.mark.parametrize("neighbours", [1, 3])
def test_distances_are_those_of_sklearn(neighbours: int) -> None:
    detector, (features, _) = learnt(neighbours=neighbours), images(4, 2)
    oracle = NearestNeighbors(n_neighbors=neighbours, algorithm="brute").fit(detector.bank.vectors.numpy())
    patches = detector.embed(features)
    distances, places = oracle.kneighbors(patches.flatten(0, 1).numpy())
    score = torch.from_numpy(distances.mean(1)).float().reshape(4, *GRID)
    scores = detector(features)
    torch.testing.assert_close(scores.image, score.flatten(1).amax(1), rtol=0, atol=1e-5)
    votes = np.stack([np.bincount(detector.bank.product.numpy()[row], minlength=2) for row in places[:, 0].reshape(4, -1)])
    torch.testing.assert_close(scores.products, torch.from_numpy(np.log((votes + 1) / (24 + 2))).float())
    raw = learnt(neighbours=neighbours, sigma=0.0)(features).maps
    expected = torch.nn.functional.interpolate(score[:, None], (8, 8), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(raw, expected, rtol=0, atol=1e-5)


def test_maps_are_blurred() -> None:
    features, _ = images(4, 2)
    rough, smooth = learnt(sigma=0.0)(features).maps, learnt(sigma=2.0)(features).maps
    assert (smooth.std((1, 2)) < rough.std((1, 2))).all()


def test_squared_is_the_square_of_plain_on_patches() -> None:
    shapes = [(5, 8, 8)]
    plain, squared = (PatchCore(shapes, 2, **SMALL | {"distance": name, "sigma": 0.0}) for name in ("plain", "squared"))
    for detector in (plain, squared):
        detector.update(*images(6, 1, shapes))
        detector.finish()
    features, _ = images(4, 2, shapes)
    torch.testing.assert_close(squared(features).maps, plain(features).maps.square())
    torch.testing.assert_close(squared(features).image, plain(features).image.square())


@pytest.mark.parametrize("distance", ["plain", "squared"])
def test_reweighting_is_equation_7(distance: str) -> None:
    detector, (features, _) = learnt(reweighting="softmax", distance=distance), images(4, 2)
    bank, patches = detector.bank.vectors.double(), detector.embed(features).double()
    expected = []
    for image in range(4):
        gaps = [(bank - patch).norm(dim=1) for patch in patches[image]]
        worst = max(range(24), key=lambda place: float(gaps[place].min()))
        support = (bank - bank[gaps[worst].argmin()]).norm(dim=1).argsort()[:9]
        far = [float((patches[image, worst] - bank[other]).norm()) for other in support]
        weight = 1 - np.exp(far[0]) / np.exp(far).sum()
        expected.append(weight * (far[0] if distance == "plain" else far[0] ** 2))
    torch.testing.assert_close(detector(features).image, torch.tensor(expected).float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(detector(features).maps, learnt(distance=distance)(features).maps)


def test_one_bank_vector_is_not_reweighted() -> None:
    detectors = []
    for name in ("none", "softmax"):
        detector = PatchCore(SHAPES, 1, **SMALL, reweighting=name, max_bank_vectors=1)
        detector.update(images(4, 1)[0], torch.zeros(4, dtype=torch.int64))
        detector.finish()
        detectors.append(detector)
    features, _ = images(3, 2)
    assert_same(detectors[0](features), detectors[1](features))
    assert (detectors[1](features).image > 0).all()


def test_normal_images_of_the_bank_score_nothing() -> None:
    detector = learnt(coreset=1.0)
    assert not detector(images(20, 1)[0]).image.any()


# State and batches


@pytest.mark.parametrize("options", [{}, {"neighbours": 3, "reweighting": "softmax"}])
def test_state_goes_round(options: dict[str, Any]) -> None:
    detector, other = learnt(**options), PatchCore(SHAPES, 2, **SMALL | options)
    other.load_state_dict(detector.state_dict())
    features, _ = images(5, 2)
    assert_same(detector(features), other(features))


def test_images_score_alike_in_chunks_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    features, _ = images(9, 2)
    detector = learnt()
    whole = detector(features)
    rows = [detector([level[n : n + 1] for level in features]) for n in range(9)]
    assert_same(
        whole, Scores(*(torch.cat([getattr(r, name) for r in rows]) for name in ("image", "maps", "products"))), 1e-5
    )
    monkeypatch.setattr(patchcore, "NUMBERS", 1)
    assert_same(whole, detector(features), 1e-5)
    assert torch.equal(learnt().bank.vectors, detector.bank.vectors)


def test_a_batch_may_be_empty() -> None:
    scores = learnt()([level[:0] for level in images(1, 2)[0]])
    assert scores.image.shape == (0,)
    assert scores.maps.shape == (0, 8, 8)


def test_the_seed_decides() -> None:
    assert torch.equal(learnt(seed=1).bank.vectors, learnt(seed=1).bank.vectors)
    assert not torch.equal(learnt(seed=1).bank.vectors, learnt(seed=2).bank.vectors)


def test_learning_again_forgets() -> None:
    detector = learnt()
    detector.update(*images(20, 1))
    detector.finish()
    assert torch.equal(detector.bank.vectors, learnt().bank.vectors)


# The bank


def test_the_bank_is_a_share_up_to_a_cap() -> None:
    assert len(learnt(coreset=0.1).bank.vectors) == 48  # of 20 * 24 patches
    assert len(learnt(coreset=0.1, max_bank_vectors=30).bank.vectors) == 30


def test_ten_times_more_images_take_no_more_memory() -> None:
    for count in (60, 600):
        detector = PatchCore(SHAPES, 2, **SMALL, max_bank_vectors=100, max_ram=0.3)
        features, product = images(count, 1)
        for start in range(0, count, 20):
            detector.update([level[start : start + 20] for level in features], product[start : start + 20])
            assert detector._seen is not None
            assert detector._seen.held_bytes < 0.3 * 2**20
        detector.finish()
        assert len(detector.bank.vectors) == 100
        assert detector._seen is None


def test_little_memory_lowers_the_cap_and_says_so() -> None:
    detector = learnt(max_ram=0.1, coreset=1.0)
    assert len(detector.bank.vectors) == detector.max_bank_vectors < 480


def test_a_hundred_products_are_recognised() -> None:
    shapes = [(8, 2, 2)]
    centre = 9 * torch.randn(100, 8, 1, 1, generator=torch.Generator().manual_seed(0))
    detector = PatchCore(shapes, 100, **SMALL | {"dimension": 16}, max_bank_vectors=300, max_ram=0.3, coreset=1.0)
    for seed in range(4):
        detector.update(
            [centre + torch.randn(100, 8, 2, 2, generator=torch.Generator().manual_seed(seed))], torch.arange(100)
        )
    detector.finish()
    assert detector.max_bank_vectors < 400
    products = detector([centre + torch.randn(100, 8, 2, 2)]).products
    assert products is not None
    torch.testing.assert_close(products.exp().sum(1), torch.ones(100))
    assert (products.argmax(1) == torch.arange(100)).float().mean() > 0.95


@pytest.mark.parametrize("constant", [False, True])
def test_copies_of_one_image(constant: bool) -> None:
    features, _ = images(1, 1)
    levels = [(torch.ones_like(level) if constant else level).repeat(12, 1, 1, 1) for level in features]
    detector = PatchCore(SHAPES, 2, **SMALL)
    detector.update(levels, torch.arange(12) % 2)
    detector.finish()
    scores = detector(images(5, 2)[0])
    assert torch.isfinite(scores.image).all()
    assert torch.isfinite(scores.maps).all()


# Errors


def test_nothing_was_learnt() -> None:
    with pytest.raises(UnispectError, match="patchcore has learnt nothing yet: fit it"):
        PatchCore(SHAPES, 2)(images(1, 1)[0])
    with pytest.raises(UnispectError, match="patchcore saw no image"):
        PatchCore(SHAPES, 2).finish()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"distance": "square"}, "unknown distance 'square': did you mean 'squared'"),
        ({"reweighting": "soft"}, "unknown reweighting 'soft': did you mean 'softmax'"),
        ({"index": "exakt"}, "unknown index 'exakt': did you mean 'exact'"),
        ({"neighbours": 0}, "neighbours: got 0, expected at least 1"),
        ({"neighbourhood": 2}, "neighbourhood: got 2, expected an odd number"),
        ({"coreset": 0.0}, "coreset: got 0, expected a share above 0 and up to 1"),
        ({"coreset": 10}, "coreset: got 10, expected"),
        ({"max_bank_vectors": 1}, r"max_bank_vectors=1 and max_ram=1024 MiB have room for 1 vectors, .* 2 products"),
        ({"max_ram": 0.001}, r"max_ram=0\.001 MiB has no room"),
    ],
)
def test_impossible_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        PatchCore(SHAPES, 2, **options)
