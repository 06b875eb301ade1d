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


def naive(maps: np.ndarray, masks: np.ndarray, steps: int, filled: bool, inclusive: bool) -> float:
    """Threshold by threshold, region by region, pixel by pixel."""
    low, high = float(maps.min()), float(maps.max())
    x, y = [], []
    for step in range(steps + 1):
        above = maps.astype(float) > high - (high - low) * step / steps
        shares = []
        for one, mask in zip(above, masks, strict=True):
            numbered, count = ndimage.label(mask, EIGHT)
            for number in range(1, count + 1):
                area = numbered == number
                counted = ndimage.binary_fill_holes(area) if filled else area
                shares.append(int((one & counted).sum()) / int(area.sum()))
        rate = float((above & ~masks).sum() / (~masks).sum())
        if rate < 0.3 or (inclusive and rate == 0.3):
            x.append(rate)
            y.append(float(np.mean(shares)))
    grid = np.array(x)
    return float(auc((grid - grid.min()) / (grid.max() - grid.min()), y)) if inclusive else float(auc(grid / grid.max(), y))


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
    assert aupro(maps, masks, "cflow") == pytest.approx(naive(maps, masks, 1000, True, True), abs=1e-12)
    assert aupro(maps, masks, "ader") == pytest.approx(naive(maps, masks, 200, False, False), abs=1e-12)
    each = [naive(maps[i : i + 1], masks[i : i + 1], 200, False, False) for i in range(3)]
    assert aupro(maps, masks, "rd4ad") == pytest.approx(np.mean(each), abs=1e-12)


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


def test_flipped() -> None:
    assert (flipped(0.3), flipped(0.8)) == (0.7, 0.8)
    assert math.isnan(flipped(math.nan))


def test_exact_is_ours() -> None:
    maps, masks = case(2)
    assert aupro(maps, masks) == regions.aupro(maps, masks)
