"""Streamed pixel metrics: never further from the exact ones than they say, and the same however they were added."""

import tracemalloc

import numpy as np
import pytest

from unispect.metrics import ranking, regions
from unispect.metrics.streaming import PixelSums, keys, middles

EXACT = {
    "auroc": ranking.auroc,
    "average_precision": ranking.average_precision,
    "f1_max": ranking.f1_max,
    "aupro": regions.aupro,
}


def case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Maps (N, h, w) and masks of a random kind: smooth, tied, constant, tiny, negative, of huge range."""
    random = np.random.default_rng(seed)
    count, side = int(random.integers(1, 6)), int(random.integers(2, 20))
    masks = random.random((count, side, side)) < random.choice([0.02, 0.2, 0.6])
    maps = random.normal(size=masks.shape) + random.choice([0.0, 1.0, 3.0]) * masks
    kind = seed % 6
    if kind == 1:
        maps = np.round(maps * 2) / 2
    elif kind == 2:
        maps = np.zeros_like(maps)
    elif kind == 3:
        maps = np.sign(maps) * np.exp(8 * np.abs(maps))
    elif kind == 4:
        maps = 1000 + maps / 100
    elif kind == 5:
        maps = maps * 1e-30
    return maps.astype(np.float32), masks


def streamed(maps: np.ndarray, masks: np.ndarray, bits: int = 14) -> PixelSums:
    sums = PixelSums(bits)
    for scores, mask in zip(maps, masks, strict=True):
        sums.add(scores, mask)
    return sums


@pytest.mark.parametrize("bits", [1, 8, 14, 22])
@pytest.mark.parametrize("name", EXACT)
def test_no_metric_is_further_from_the_exact_one_than_it_says(name: str, bits: int) -> None:
    measured = 0
    for seed in range(120):
        maps, masks = case(seed)
        found, exact = getattr(streamed(maps, masks, bits), name)(), EXACT[name](maps, masks)
        assert np.isnan(found.value) == np.isnan(exact), seed
        if not np.isnan(exact):
            assert abs(found.value - exact) <= found.error, (seed, found, exact)
            measured += 1
    assert measured > 80


@pytest.mark.parametrize("normal", [10**5, 10**6])
@pytest.mark.parametrize("defective", [1, 2, 3, 10])
def test_the_worst_order_stays_in_the_bound_of_average_precision(defective: int, normal: int) -> None:
    """Few defective pixels, one by one, below many normal ones of the same bin: differences of large numbers lose digits."""
    lowest = np.float32(1.0).view(np.uint32) + np.arange(defective, dtype=np.uint32)
    maps = np.concatenate([lowest.view(np.float32), np.full(normal, 1.4, np.float32)])[None, None]
    masks = np.arange(maps.size).reshape(maps.shape) < defective
    found, exact = streamed(maps, masks, 1).average_precision(), ranking.average_precision(maps, masks)
    assert abs(found.value - exact) <= found.error


@pytest.mark.parametrize("name", EXACT)
def test_the_bound_is_not_idle(name: str) -> None:
    """Sums that lie by more than they say would be noticed: the bound is small where scores spread."""
    random = np.random.default_rng(0)
    masks = np.zeros((8, 64, 64), bool)
    masks[::2, 10:20, 10:30] = True
    maps = (random.normal(size=masks.shape) + 2 * masks).astype(np.float32)
    found = getattr(streamed(maps, masks), name)()
    assert found.error < 1e-3
    assert found.value == pytest.approx(EXACT[name](maps, masks), abs=1e-3)
    assert getattr(streamed(maps, masks, 2), name)().error > 5 * found.error


def test_bins_keep_the_order_of_scores() -> None:
    random = np.random.default_rng(1)
    scores = np.sort(np.concatenate([random.normal(size=500) * 10.0 ** random.integers(-30, 30, 500), [0.0, -0.0]]))
    found = keys(scores.astype(np.float32), 14).astype(np.int64)
    assert (np.diff(found) >= 0).all()
    assert keys(np.float32([0.0]), 14) == keys(np.float32([-0.0]), 14)
    inside = middles(found.astype(np.uint32), 14)
    assert np.array_equal(keys(inside, 14), found)
    assert np.allclose(inside, scores.astype(np.float32), rtol=2**-14, atol=1e-38)


def test_sums_do_not_depend_on_how_images_were_grouped() -> None:
    maps, masks = case(7)
    maps, masks = np.concatenate([maps] * 3), np.concatenate([masks] * 3)
    whole = streamed(maps, masks)
    parts = streamed(maps[:1], masks[:1]).merged(streamed(maps[1:], masks[1:]))
    back = streamed(maps[::-1], masks[::-1])
    for name in EXACT:
        assert getattr(parts, name)().value == pytest.approx(getattr(whole, name)().value, abs=1e-12)
        assert getattr(back, name)().value == pytest.approx(getattr(whole, name)().value, abs=1e-12)
    assert parts.extremes == whole.extremes == (float(maps.min()), float(maps.max()))
    with pytest.raises(ValueError, match="bits: 14 and 8"):
        whole.merged(PixelSums(8))


def test_a_small_buffer_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    maps, masks = case(9)
    whole = streamed(maps, masks)
    monkeypatch.setattr("unispect.metrics.streaming.BUFFER", 5)
    often = streamed(maps, masks)
    for name in EXACT:
        assert getattr(often, name)().value == pytest.approx(getattr(whole, name)().value, abs=1e-12)


def test_rescaled_as_if_the_scores_had_been() -> None:
    maps, masks = case(12)
    low, high = float(maps.min()), float(maps.max())
    scaled = streamed(maps, masks).rescaled(low, high)
    other = streamed((maps - low) / (high - low), masks)
    assert scaled.extremes == pytest.approx((0.0, 1.0), abs=1e-3)
    for name in EXACT:
        assert getattr(scaled, name)().value == pytest.approx(getattr(other, name)().value, abs=2e-2)


def test_the_curve_rises_to_what_is_measured() -> None:
    maps, masks = case(0)
    curve = streamed(maps, masks).pro()
    assert curve is not None
    x, y = curve
    assert len(x) == len(y) <= 400
    assert (np.diff(y) >= 0).all()
    assert (x[0], x[-1]) == (0.0, 0.3)
    assert y[-1] <= 1.0
    assert PixelSums().pro() is None


def test_the_curve_starts_with_what_is_found_without_a_false_positive() -> None:
    mask = np.zeros((10, 10), bool)
    mask[2:4, 2:7] = True  # ten pixels, four of them above every normal one
    scores = np.linspace(0, 1, 100).reshape(10, 10).astype(np.float32)
    scores[mask] = [0.5] * 6 + [9.0] * 4
    curve = streamed(scores[None], mask[None]).pro()
    assert curve is not None
    assert curve[1][0] == pytest.approx(0.4)
    missed = scores.copy()
    missed[mask] = -1.0
    none = streamed(missed[None], mask[None]).pro()
    assert none is not None
    assert none[1][0] == 0.0


def test_a_perfect_map_is_no_better_than_one() -> None:
    mask = np.zeros((5, 5), bool)
    mask[1, 1] = True
    found = streamed(mask[None].astype(np.float32), mask[None]).aupro()
    assert found.value + found.error <= 1.0 + 2e-12
    assert found.value == pytest.approx(1.0, abs=0.2)


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    random = np.random.default_rng(3)
    mask = np.zeros((256, 256), bool)
    mask[100:120, 100:140] = True
    sums, peaks = PixelSums(), []
    tracemalloc.start()
    for _ in range(4):
        for _ in range(40):  # 2.6 million pixels
            sums.add(random.normal(size=mask.shape).astype(np.float32) + mask, mask)
        peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert sums.bins < 400_000
    assert peaks[3] < 1.15 * peaks[2]
    assert peaks[3] < 100e6


def test_bad_input_is_told() -> None:
    with pytest.raises(ValueError, match="bits=0: expected 1 to 22"):
        PixelSums(0)
    with pytest.raises(ValueError, match=r"mask: shape \(2, 3\) for scores of shape \(3, 3\)"):
        PixelSums().add(np.zeros((3, 3)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="NaN"):
        PixelSums().add(np.full((2, 2), np.nan), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="limit=0"):
        PixelSums().aupro(0)
