"""PaDiM: distances against numpy and scipy place by place, maps against scipy."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import mahalanobis
from torch import Tensor

from unispect.detectors.methods import build
from unispect.detectors.padim import PaDiM
from unispect.errors import ConfigError, UnispectError
from unispect.inspector import complete
from unispect.types import Features, Scores

Shapes = list[tuple[int, int, int]]
SHAPES: Shapes = [(5, 6, 4), (7, 3, 2), (4, 1, 1)]
SIDE = 12
SMALL: dict[str, Any] = {"dimension": 6, "map_side": SIDE, "sigma": 1.5}


def images(count: int, seed: int, shapes: Shapes = SHAPES) -> Features:
    """Means and correlations that differ from place to place."""
    random, world = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    levels = []
    for channels, height, width in shapes:
        mean = 3 * torch.randn(channels, height, width, generator=world)
        mixing = torch.randn(height, width, channels, channels, generator=world) / 2
        levels.append(
            mean + torch.einsum("hwde,nehw->ndhw", mixing, torch.randn(count, channels, height, width, generator=random))
        )
    return levels


def taught(detector: PaDiM, features: Features, batch: int = 8) -> PaDiM:
    for start in range(0, len(features[0]), batch):
        part = [level[start : start + batch] for level in features]
        detector.update(part, torch.zeros(len(part[0]), dtype=torch.int64))
    assert detector.finish() is False
    return detector


def learnt(count: int = 20, shapes: Shapes = SHAPES, **options: Any) -> PaDiM:
    return taught(PaDiM(shapes, 2, **SMALL | options), images(count, 1, shapes))


def assert_same(one: Scores, other: Scores) -> None:
    assert torch.equal(one.image, other.image)
    assert torch.equal(one.maps, other.maps)


# The oracle


def stacked(features: Features, subset: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Chosen channels of the dense levels, each place repeated over the places that it covers, (N, d, h, w)."""
    parts = []
    for level in features:
        if level.shape[2] * level.shape[3] > 1:
            rows = np.arange(grid[0]) * level.shape[2] // grid[0]
            columns = np.arange(grid[1]) * level.shape[3] // grid[1]
            parts.append(level.double().numpy()[:, :, rows][:, :, :, columns])
    return np.concatenate(parts, 1)[:, subset.numpy()]


def distances(train: np.ndarray, test: np.ndarray, ridge: float) -> Tensor:
    """(N, h, w), place by place."""
    found = np.zeros((len(test), *test.shape[2:]))
    for row, column in np.ndindex(*test.shape[2:]):
        vectors = train[:, :, row, column]
        covariance = np.cov(vectors.T) + ridge * np.eye(train.shape[1])
        for image, vector in enumerate(test[:, :, row, column]):
            found[image, row, column] = mahalanobis(vector, vectors.mean(0), np.linalg.inv(covariance))
    return torch.from_numpy(found).float()


def resized(maps: Tensor) -> Tensor:
    return torch.nn.functional.interpolate(maps[:, None], (SIDE, SIDE), mode="bilinear", align_corners=False)[:, 0]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shapes", "grid"),
    [
        (SHAPES, (6, 4)),
        (SHAPES[::-1], (6, 4)),
        ([(3, 2, 2), (4, 5, 7)], (5, 7)),
        ([(6, 4, 4)], (4, 4)),
        ([(6, 7, 7), (5, 4, 4), (3, 2, 3)], (7, 7)),
        ([(3, 1, 5), (2, 1, 2)], (1, 5)),
    ],
)
def test_distances_are_those_of_numpy_and_scipy(shapes: Shapes, grid: tuple[int, int]) -> None:
    options = SMALL | {"sigma": 0.0}
    detector = build(complete({"method": "padim", "padim": options}), shapes, 2)
    assert isinstance(detector, PaDiM)
    train, test = images(20, 1, shapes), images(3, 2, shapes)
    scores = taught(detector, train)(test)
    assert len(detector.subset) == min(6, sum(channels for channels, height, width in shapes if height * width > 1))
    expected = distances(stacked(train, detector.subset, grid), stacked(test, detector.subset, grid), 0.01)
    close(scores.maps, resized(expected))
    close(scores.image, resized(expected).flatten(1).amax(1))
    assert scores.products is None


@pytest.mark.parametrize("count", [2, 4, 30])
def test_maps_are_bilinear_and_blurred_by_scipy(count: int) -> None:
    detector, train, test = learnt(count, ridge=0.1), images(count, 1), images(3, 2)
    expected = distances(stacked(train, detector.subset, (6, 4)), stacked(test, detector.subset, (6, 4)), 0.1)
    maps = torch.stack([torch.from_numpy(gaussian_filter(row.numpy(), 1.5)) for row in resized(expected)])
    close(detector(test).maps, maps)
    close(detector(test).image, maps.flatten(1).amax(1))


def test_deeper_levels_are_repeated() -> None:
    features, _ = images(2, 0, [(2, 4, 4), (3, 2, 2)]), None
    detector = PaDiM([(2, 4, 4), (3, 2, 2)], 1, dimension=5)
    embedded = detector.embed(features)
    assert embedded.shape == (16, 2, 5)
    repeated = features[1].repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = torch.cat([features[0], repeated], 1).permute(2, 3, 0, 1).flatten(0, 1)
    assert torch.equal(embedded, expected)


def test_a_large_mean_costs_no_digits() -> None:
    train, test = images(20, 1), images(3, 2)
    far = taught(PaDiM(SHAPES, 2, **SMALL), [level + 1024 for level in train])
    torch.testing.assert_close(far([level + 1024 for level in test]).maps, learnt()(test).maps, rtol=2e-2, atol=0)


def test_it_does_not_matter_how_images_are_batched() -> None:
    features = images(3, 2)
    whole = learnt()(features)
    for batch in (1, 3, 20):
        torch.testing.assert_close(taught(PaDiM(SHAPES, 2, **SMALL), images(20, 1), batch)(features).maps, whole.maps)
    rows = [learnt()([level[n : n + 1] for level in features]) for n in range(3)]
    torch.testing.assert_close(torch.cat([row.maps for row in rows]), whole.maps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([row.image for row in rows]), whole.image, rtol=1e-5, atol=1e-5)


def test_products_have_no_say() -> None:
    detector = PaDiM(SHAPES, 2, **SMALL)
    detector.update(images(20, 1), torch.arange(20) % 2)
    detector.finish()
    features = images(3, 2)
    torch.testing.assert_close(detector(features).maps, learnt()(features).maps)


# Channels


def test_the_subset_is_seeded_and_sorted() -> None:
    subsets = [PaDiM(SHAPES, 2, dimension=6, seed=seed).subset for seed in range(8)]
    assert len({tuple(subset.tolist()) for subset in subsets}) > 4
    for seed, subset in enumerate(subsets):
        assert subset.tolist() == sorted(set(subset.tolist()))
        assert set(subset.tolist()) <= set(range(12))
        assert torch.equal(subset, PaDiM(SHAPES, 2, dimension=6, seed=seed).subset)


def test_the_subset_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    PaDiM(SHAPES, 2, dimension=6, seed=1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dimension", [12, 13, 100])
def test_all_channels_where_there_are_fewer(dimension: int) -> None:
    assert PaDiM(SHAPES, 2, dimension=dimension).subset.tolist() == list(range(12))


def test_channels_that_are_not_chosen_have_no_say() -> None:
    detector, features = learnt(), images(3, 2)
    changed = [level.clone() for level in features]
    for channel in set(range(12)) - set(detector.subset.tolist()):
        changed[channel >= 5][:, channel - 5 * (channel >= 5)] += 100
    changed[2] += 100  # globally pooled
    assert_same(detector(features), detector(changed))


def test_the_subset_is_part_of_the_state() -> None:
    detector, other = learnt(seed=1), PaDiM(SHAPES, 2, **SMALL, seed=2)
    assert not torch.equal(detector.subset, other.subset)
    assert torch.equal(detector.state_dict()["subset"], detector.subset)
    other.load_state_dict(detector.state_dict())
    assert torch.equal(other.subset, detector.subset)
    assert_same(detector(images(3, 2)), other(images(3, 2)))


# Little to learn from


def test_duplicates_and_constants_are_at_no_distance() -> None:
    for features in (
        [level.expand(5, -1, -1, -1) for level in images(1, 1)],
        [torch.full((5, *shape), 7.0) for shape in SHAPES],
    ):
        detector = taught(PaDiM(SHAPES, 1, **SMALL), features)
        assert not detector(features).maps.any()
        # Nothing but the ridge is known of the variance: one off in 6 channels is sqrt(6 / 0.01).
        away = detector([level + 1 for level in features]).image
        torch.testing.assert_close(away, torch.full((5,), 600.0).sqrt(), rtol=1e-4, atol=0)


def test_a_single_pooled_level() -> None:
    shapes: Shapes = [(4, 1, 1)]
    detector, train, test = learnt(shapes=shapes), images(20, 1, shapes), images(3, 2, shapes)
    expected = distances(train[0].double().numpy()[:, detector.subset.numpy()], test[0].double().numpy(), 0.01)
    close(detector(test).image, expected[:, 0, 0])
    close(detector(test).maps, expected.expand(3, SIDE, SIDE))


def test_a_batch_may_be_empty() -> None:
    scores = learnt()([level[:0] for level in images(1, 2)])
    assert scores.image.shape == (0,)
    assert scores.maps.shape == (0, SIDE, SIDE)


def test_learning_again_forgets() -> None:
    detector = taught(learnt(seed=0), images(12, 5))
    expected = taught(PaDiM(SHAPES, 2, **SMALL), images(12, 5))
    assert_same(detector(images(3, 2)), expected(images(3, 2)))


def test_sums_are_let_go_and_do_not_grow() -> None:
    sizes = []
    for count in (20, 200):
        detector = PaDiM(SHAPES, 2, **SMALL)
        detector.update(images(count, 1), torch.zeros(count, dtype=torch.int64))
        sizes.append([detector._shift.nbytes, detector._sum.nbytes, detector._second.nbytes])
        detector.finish()
        assert detector._second.nbytes == 0
    assert sizes[0] == sizes[1]


# Errors


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images(count: int) -> None:
    detector = PaDiM(SHAPES, 2, **SMALL)
    detector.update(images(count, 1), torch.zeros(count, dtype=torch.int64))
    with pytest.raises(UnispectError, match=f"PaDiM needs at least 2 training images, got {count}"):
        detector.finish()


def test_before_learning_there_is_no_score() -> None:
    detector = PaDiM(SHAPES, 2, **SMALL)
    for _ in range(2):
        with pytest.raises(
            UnispectError, match="PaDiM has learnt nothing yet: call update and finish first, or load its state"
        ):
            detector(images(3, 2))
        detector.update(images(3, 1), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("dimension", 0, "dimension: got 0, expected at least 1"),
        ("dimension", -3, "dimension: got -3, expected at least 1"),
        ("ridge", 0.0, "ridge: got 0.0, expected a number above 0, without which covariances have no inverse"),
        ("ridge", -1.0, "ridge: got -1.0, expected a number above 0"),
    ],
)
def test_impossible_settings(option: str, value: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PaDiM(SHAPES, 2, **{option: value})


def test_an_unknown_setting_gives_the_nearest_known() -> None:
    with pytest.raises(ConfigError, match=r"did you mean '(padim\.)?dimension'"):
        complete({"method": "padim", "padim": {"dimensions": 5}})
