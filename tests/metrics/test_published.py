"""AUPRO of other code bases against the official routine's own numbers and against loops written from their descriptions."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import auc, f1_score

from unispect.errors import ConfigError
from unispect.metrics import regions
from unispect.metrics.published import VARIANTS, aupro, f1_max_ader, flipped, official

ORACLE = Path(__file__).parents[1] / "fixtures" / "metrics.npz"
EIGHT = np.ones((3, 3))


@pytest.mark.parametrize("thresholds", [100, 1000, 10000])
def test_official_equal_to_what_the_routine_gave(thresholds: int) -> None:
    oracle = np.load(ORACLE)
    expected = float(oracle[f"aupro03_official_{thresholds}"])
    assert official(oracle["maps"], oracle["masks"], thresholds) == pytest.approx(expected, abs=1e-12)


def test_exact_is_the_limit_of_the_official_one() -> None:
    oracle = np.load(ORACLE)
    gaps = [abs(official(oracle["maps"], oracle["masks"], n) - aupro(oracle["maps"], oracle["masks"])) for n in (10, 10000)]
    assert gaps[1] < 1e-4 < gaps[0]


def with_holes(area: np.ndarray) -> np.ndarray:
    """The region and the background that no walk over edges and corners can reach from outside."""
    background, _ = ndimage.label(~np.pad(area, 1), EIGHT)
    return (background != background[0, 0])[1:-1, 1:-1]


def naive(maps: np.ndarray, masks: np.ndarray, variant: str) -> float:
    """Threshold by threshold, region by region."""
    low, high = float(maps.min()), float(maps.max())
    cflow = variant == "cflow"
    thresholds = [high - k * (high - low) / 1000 for k in range(1000)] if cflow else np.arange(low, high, (high - low) / 200)
    areas = []
    for number, mask in enumerate(masks):
        numbered, count = ndimage.label(mask, EIGHT)
        for area in (numbered == part for part in range(1, count + 1)):
            areas.append((number, with_holes(area) if cflow else area, int(area.sum())))
    x, y = [], []
    for threshold in thresholds:
        above = maps > threshold
        shares = [int((above[number] & counted).sum()) / size for number, counted, size in areas]
        rate = float((above & ~masks).sum() / (~masks).sum())
        if rate < 0.3 or (cflow and rate == 0.3):
            x.append(rate)
            y.append(float(np.mean(shares)))
    grid = np.array(x)
    start = 0.0 if variant == "dinomaly" else grid.min()
    return float(auc((grid - start) / (grid.max() - start), y))


def case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    masks = np.zeros((4, 14, 14), bool)
    masks[0, 2:7, 2:7] = True
    masks[0, 4, 4] = False  # a hole
    masks[1, 3, 3] = masks[1, 4, 4] = masks[1, 10, 2] = True  # diagonal neighbours are one region
    masks[2, 5:9, 6:12] = True
    return np.round(random.normal(size=masks.shape) + masks, 2), masks


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_loops_written_from_the_descriptions(seed: int) -> None:
    maps, masks = case(seed)
    for variant in ("cflow", "ader", "dinomaly"):
        assert aupro(maps, masks, variant) == pytest.approx(naive(maps, masks, variant), abs=1e-12)
    each = [naive(maps[i : i + 1], masks[i : i + 1], "dinomaly") for i in range(3)]
    assert aupro(maps, masks, "rd4ad") == pytest.approx(np.mean(each), abs=1e-12)


@pytest.mark.parametrize("variant", ["cflow", "ader", "dinomaly"])
@pytest.mark.parametrize("seed", range(5))
def test_equal_where_many_pixels_share_the_ends(variant: str, seed: int) -> None:
    maps, masks = case(seed)
    maps = np.clip(maps, 0.9, 1.3)  # few normal pixels are above the lowest score, some are at the highest
    assert aupro(maps, masks, variant) == pytest.approx(naive(maps, masks, variant), abs=1e-12)


def test_dinomaly_loses_what_lies_before_the_lowest_rate() -> None:
    mask = np.zeros((1, 1, 10), bool)
    mask[0, 0, :2] = True
    scores = np.array([[[1.0, 0.5, 1.0, 0.5, *np.linspace(0.0, 0.2, 6)]]])  # rates 1/8, 2/8; overlaps 1/2, 1
    assert aupro(scores, mask, "ader") == pytest.approx((0.5 + 1.0) / 2)
    assert aupro(scores, mask, "dinomaly") == pytest.approx((0.5 + 1.0) / 4)


def test_a_rate_at_the_limit_counts_for_cflow_alone() -> None:
    mask = np.zeros((1, 1, 11), bool)
    mask[0, 0, 0] = True
    scores = np.array([[[0.7, 1.0, 0.9, 0.5, *np.linspace(0.0, 0.2, 7)]]])  # found at 2/10; the next rate is 3/10
    assert aupro(scores, mask, "cflow") == pytest.approx(0.1 / 0.3)
    assert aupro(scores, mask, "ader") == aupro(scores, mask, "dinomaly") == 0.0


@pytest.mark.parametrize("name", ["cflow", "ader", "dinomaly", "rd4ad"])
def test_no_number_where_the_routine_divides_by_zero(name: str) -> None:
    mask = np.zeros((1, 5, 5), bool)
    mask[0, 2, 2] = True
    assert math.isnan(aupro(np.ones((1, 5, 5)), mask, name))
    assert aupro(np.ones((1, 5, 5)), mask, "official") == 0.0
    halves = np.where(np.arange(25).reshape(1, 5, 5) < 12, 1.0, 0.0)  # no rate between 0 and the limit
    assert math.isnan(aupro(halves, mask, name))


def test_cflow_never_looks_at_the_last_thousandth() -> None:
    mask = np.zeros((1, 1, 11), bool)
    mask[0, 0, 0] = True
    scores = np.zeros((1, 1, 11))
    scores[0, 0, 1:3] = 1.0, 0.9
    scores[0, 0, [0, 3]] = 0.0005  # the defect and a third normal pixel, below the last threshold, which is 0.001
    assert aupro(scores, mask, "cflow") == 0.0
    scores[0, 0, [0, 3]] = 0.0015  # above it: (2/10, 0) and (3/10, 1) on the curve
    assert aupro(scores, mask, "cflow") == pytest.approx(0.1 / 2 / 0.3)


def test_a_hole_that_is_open_at_a_corner_is_not_filled() -> None:
    mask = np.zeros((1, 20, 20), bool)
    mask[0, 5, 6:9] = mask[0, 9, 6:9] = mask[0, 6:9, 5] = mask[0, 6:9, 9] = True  # corners are missing
    scores = 0.5 * np.random.default_rng(0).random((1, 20, 20))
    scores[0, 5:10, 5:10] = 1.0
    assert aupro(scores, mask, "cflow") == pytest.approx(naive(scores, mask, "cflow"), abs=1e-12)
    assert aupro(scores, mask, "cflow") <= 1.0


def test_a_filled_hole_makes_an_overlap_above_one() -> None:
    mask = np.zeros((1, 20, 20), bool)
    mask[0, 5:12, 5:12] = True
    mask[0, 7:10, 7:10] = False
    scores = 0.5 * np.random.default_rng(0).random((1, 20, 20))
    scores[0, 5:12, 5:12] = 1.0  # finds the hole, too
    assert aupro(scores, mask, "cflow") > 1.0
    assert aupro(scores, mask, "exact") <= 1.0


def test_the_variants_differ_and_agree_on_a_perfect_map() -> None:
    maps, masks = case(0)
    values = {name: aupro(maps, masks, name) for name in ("exact", *VARIANTS)}
    assert len({round(value, 4) for value in values.values()}) >= 4
    perfect = masks + np.linspace(0, 0.5, masks.size).reshape(masks.shape) * ~masks
    masks[0, 4, 4] = True
    perfect[0, 4, 4] = 1.0
    for name in ("exact", *VARIANTS):
        assert aupro(perfect, masks, name) == pytest.approx(1.0, abs=5e-3)


@pytest.mark.parametrize("name", ["exact", *VARIANTS])
def test_what_cannot_be_measured_is_no_number(name: str) -> None:
    nothing = np.zeros((2, 5, 5), bool)
    assert math.isnan(aupro(np.zeros((2, 5, 5)), nothing, name))
    assert math.isnan(aupro(np.zeros((2, 5, 5)), ~nothing, name))


@pytest.mark.parametrize("name", ["exact", *VARIANTS])
def test_no_images_and_images_without_a_mask(name: str) -> None:
    assert math.isnan(aupro([], [], name))
    with pytest.raises(ValueError):
        aupro(np.arange(18.0).reshape(2, 3, 3), np.eye(3)[None], name)


def test_an_unknown_variant_is_told() -> None:
    with pytest.raises(ConfigError, match="unknown AUPRO variant 'cflw': did you mean 'cflow'"):
        aupro(np.zeros((1, 2, 2)), np.eye(2)[None], "cflw")


def test_f1_on_a_coarse_grid_is_no_better_than_the_best() -> None:
    maps, masks = case(1)
    low, high = maps.min(), maps.max()
    scaled = (maps - low) / (high - low)
    grid = [f1_score(masks.ravel(), scaled.ravel() > t, zero_division=0) for t in np.linspace(0, 1, 21)]
    assert f1_max_ader(maps, masks) == pytest.approx(max(grid), abs=1e-12)
    assert math.isnan(f1_max_ader(maps, np.zeros_like(masks)))
    assert math.isnan(f1_max_ader(maps, np.ones_like(masks)))
    # Only what is above a step counts: the lowest score never does, so a map that is constant finds nothing.
    assert f1_max_ader(np.array([[[0.0, 0.25, 1.0]]]), np.array([[[True, False, False]]])) == 0.0
    assert f1_max_ader(np.ones((1, 2, 2)), np.eye(2)[None]) == 0.0


def test_flipped() -> None:
    assert (flipped(0.3), flipped(0.8)) == (0.7, 0.8)
    assert math.isnan(flipped(math.nan))


def test_exact_is_ours() -> None:
    maps, masks = case(2)
    assert aupro(maps, masks) == regions.aupro(maps, masks)
