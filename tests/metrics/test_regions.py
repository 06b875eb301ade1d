"""AUPRO against the official routine's numbers and a naive loop; regions against planted boxes."""

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from unispect.metrics.regions import aupro, components, regions

ORACLE = Path(__file__).parents[1] / "fixtures" / "metrics.npz"


def naive(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
    """The definition: each normal score a threshold, each region's share strictly above it."""
    parts = []
    for scores, mask in zip(maps, masks, strict=True):
        labelled, count = ndimage.label(mask, np.ones((3, 3)))
        parts += [scores[labelled == number] for number in range(1, count + 1)]
    normal = np.sort(maps[~masks])[::-1]
    x = np.append(np.arange(len(normal)) / len(normal), 1.0)
    y = np.append([np.mean([np.mean(part > threshold) for part in parts]) for threshold in normal], 1.0)
    fine = np.union1d(x[x <= limit], limit)
    return float(np.trapezoid(np.interp(fine, x, y), fine)) / limit


def draw(seed: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise over blobs that are slightly hotter; few levels make many ties. The first image is good."""
    rng = np.random.default_rng(seed)
    masks = ndimage.gaussian_filter(rng.normal(size=(4, 14, 11)), (0, 1.5, 1.5)) > 0.25
    masks[0] = False
    maps = rng.normal(size=masks.shape) + masks
    return (np.floor(maps * levels) if levels else maps).astype(np.float32), masks


@pytest.mark.parametrize("levels", [0, 1, 3, 30])
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_equal_to_the_definition(levels: int, limit: float) -> None:
    for seed in range(4):
        maps, masks = draw(seed, levels)
        assert aupro(maps, masks, limit) == pytest.approx(naive(maps, masks, limit), abs=1e-12)


def test_official_routine() -> None:
    given = np.load(ORACLE)
    value = aupro(given["maps"], given["masks"])
    assert abs(value - float(given["aupro03_official_10000"])) < 1e-4
    assert value == aupro(list(given["maps"]), list(given["masks"]))


def test_perfect_random_and_constant_maps() -> None:
    masks = np.zeros((6, 60, 60), bool)
    masks[1:, 10:30, 20:40] = True
    assert aupro(masks.astype(np.float32), masks) == pytest.approx(1.0, abs=1e-12)
    assert aupro(np.zeros(masks.shape), masks) == 0.0
    noise = np.random.default_rng(0).random(masks.shape)
    assert aupro(noise, masks) == pytest.approx(0.15, abs=0.02)


def test_a_ring_with_a_hole_is_one_region_and_its_hole_is_normal() -> None:
    ring = np.zeros((1, 20, 20), bool)
    ring[0, 4:14, 4:14], ring[0, 7:11, 7:11] = True, False
    assert components(ring[0])[1] == 1
    filled = ndimage.binary_fill_holes(ring[0])[None]
    assert aupro(ring.astype(float), ring) == pytest.approx(1.0, abs=1e-12)
    assert aupro(filled.astype(float), ring) < 0.95


def test_pixels_that_touch_by_a_corner_are_one_region() -> None:
    diagonal = np.eye(5, dtype=bool)
    assert components(diagonal)[1] == 1
    assert [box[:4] for box in regions(diagonal.astype(float), 0.5)] == [(0, 0, 5, 5)]


def test_small_regions_weigh_as_much_as_large_ones() -> None:
    masks = np.zeros((1, 30, 30), bool)
    masks[0, 2:4, 2:4], masks[0, 10:26, 10:26] = True, True
    small, large = np.zeros(masks.shape), np.zeros(masks.shape)
    small[0, 2:4, 2:4], large[0, 10:26, 10:26] = 1.0, 1.0
    assert aupro(small, masks) == pytest.approx(aupro(large, masks), abs=1e-12)


def test_nan_without_regions_or_without_normal_pixels() -> None:
    maps = np.random.default_rng(0).random((2, 5, 5))
    assert np.isnan(aupro(maps, np.zeros(maps.shape, bool)))
    assert np.isnan(aupro(maps, np.ones(maps.shape, bool)))
    assert np.isnan(aupro([], []))


def test_errors_name_the_argument() -> None:
    maps = np.zeros((2, 5, 5))
    with pytest.raises(ValueError, match=r"limit=0: .* such as 0\.3"):
        aupro(maps, maps > 0, limit=0)
    with pytest.raises(ValueError, match=r"each must be \(h, w\)"):
        aupro(np.zeros((2, 5)), np.eye(2, 5, dtype=bool))


def test_regions_are_boxes_peaks_and_areas_highest_first() -> None:
    scores = np.zeros((12, 16), np.float32)
    scores[1:4, 2:7], scores[2, 3] = 2.0, 5.0
    scores[8:10, 10:16] = 7.0
    scores[6, 0] = 3.0
    assert regions(scores, 1.0) == [(10, 8, 16, 10, 7.0, 12), (2, 1, 7, 4, 5.0, 15), (0, 6, 1, 7, 3.0, 1)]
    assert regions(scores, 1.0, min_area=2) == [(10, 8, 16, 10, 7.0, 12), (2, 1, 7, 4, 5.0, 15)]
    assert regions(scores, 7.0) == []  # above, not at


@pytest.mark.parametrize("seed", range(5))
def test_regions_cover_what_is_above_and_nothing_twice(seed: int) -> None:
    scores = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(40, 30)), 1.5)
    found = regions(scores, 0.1)
    assert sum(area for *_, area in found) == int(np.sum(scores > 0.1))
    assert max(peak for *_, peak, _ in found) == scores.max()
    for left, top, right, bottom, peak, _ in found:
        assert peak <= scores[top:bottom, left:right].max()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.6, 1.0])
def test_parts_and_their_numbers_are_scipys(share: float) -> None:
    rng = np.random.default_rng(3)
    for shape in [(1, 1), (1, 40), (40, 1), (17, 23), (40, 40), (0, 5)]:
        for _ in range(20):
            mask = rng.random(shape) < share
            expected, count = ndimage.label(mask, np.ones((3, 3)))
            labelled, found = components(mask)
            assert found == count
            np.testing.assert_array_equal(labelled, expected)


def test_a_spiral_is_one_part() -> None:
    mask = np.zeros((64, 64), bool)
    for turn in range(0, 32, 4):
        mask[turn, max(turn - 2, 0) : 64 - turn] = mask[turn : 64 - turn, 63 - turn] = mask[63 - turn, turn : 64 - turn] = (
            True
        )
        mask[turn + 4 : 64 - turn, turn + 2] = True
    assert components(mask)[1] == ndimage.label(mask, np.ones((3, 3)))[1]


def test_regions_are_those_of_scipy() -> None:
    rng = np.random.default_rng(5)
    for _ in range(30):
        scores = ndimage.gaussian_filter(rng.normal(size=(30, 41)), 2)
        labelled, count = ndimage.label(scores > 0.1, np.ones((3, 3)))
        boxes = ndimage.find_objects(labelled)
        areas = ndimage.sum_labels(np.ones_like(scores), labelled, range(1, count + 1))
        peaks = ndimage.maximum(scores, labelled, range(1, count + 1))
        expected = {
            (columns.start, rows.start, columns.stop, rows.stop, float(peak), int(area))
            for (rows, columns), peak, area in zip(boxes, peaks, areas, strict=True)
            if area >= 4
        }
        found = regions(scores, 0.1, 4)
        assert set(found) == expected
        assert [region[4] for region in found] == sorted((region[4] for region in found), reverse=True)
