"""Maps one at a time, product by product: exact against all at once, streamed against exact."""

from collections.abc import Sequence

import numpy as np
import pytest

from unispect.metrics.pixels import PixelResult, Pixels
from unispect.metrics.protocol import pixel_metrics

SIDE = 24


def images(count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Maps and masks, every second with a defect."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        mask = np.zeros((SIDE, SIDE), bool)
        if number % 2:
            mask[4:9, 3 : 6 + number % 5] = mask[15:18, 15:20] = True
        made.append(((random.normal(size=mask.shape) + 1.5 * mask).astype(np.float32), mask))
    return made


PRODUCTS = {"a": images(6), "b": [(10 * scores, mask) for scores, mask in images(9, 1)], "c": images(4, 2)}


def collected(exact: bool, products: Sequence[str] = "abc", replicates: int = 0) -> dict[str | None, PixelResult]:
    with Pixels(exact, replicates) as pixels:
        number = 0
        for name in products:
            for scores, mask in PRODUCTS[name]:
                pixels.add(name, scores, mask, number)
                number += 1
        return pixels.results()


def at_once(products: Sequence[str]) -> dict[str, float]:
    parts = [part for name in products for part in PRODUCTS[name]]
    return pixel_metrics([scores for scores, _ in parts], [mask for _, mask in parts])


def test_exact_is_the_same_as_all_at_once() -> None:
    found = collected(exact=True)
    assert set(found) == {"a", "b", "c", None}
    for product, parts in (("a", "a"), ("b", "b"), ("c", "c"), (None, "abc")):
        assert found[product].values == at_once(parts)
        assert set(found[product].bounds.values()) == {0.0}


def test_streamed_is_within_its_bound() -> None:
    exact, streamed = collected(exact=True), collected(exact=False)
    for product, result in streamed.items():
        for name, value in result.values.items():
            assert abs(value - exact[product].values[name]) <= result.bounds[name] + 1e-12
            assert result.bounds[name] < 0.01


def test_one_product_is_its_own_pool() -> None:
    found = collected(exact=True, products="b")
    assert found[None] is found["b"]


def test_without_maps_there_is_nothing() -> None:
    with Pixels(exact=True) as pixels:
        assert pixels.results() == {}
        assert pixels.normalised() == {}
        assert pixels.overlap_curve() is None


def test_a_product_in_two_parts_is_an_error() -> None:
    with Pixels(exact=False) as pixels:
        for name in "ab":
            pixels.add(name, *PRODUCTS[name][0])
        with pytest.raises(ValueError, match="product 'a' comes again after others"):
            pixels.add("a", *PRODUCTS["a"][1])


def test_normalised_takes_each_products_own_extremes() -> None:
    with Pixels(exact=False) as pixels:
        scaled, masks = [], []
        for name in "abc":
            low = min(float(scores.min()) for scores, _ in PRODUCTS[name])
            high = max(float(scores.max()) for scores, _ in PRODUCTS[name])
            for scores, mask in PRODUCTS[name]:
                pixels.add(name, scores, mask)
                scaled.append((scores - low) / (high - low))
                masks.append(mask)
        found = pixels.normalised()
    for name, value in pixel_metrics(scaled, masks).items():
        assert found[name] == pytest.approx(value, abs=2e-3)


def test_the_curve_for_drawing_is_the_one_that_is_measured() -> None:
    with Pixels(exact=False) as pixels:
        for scores, mask in PRODUCTS["a"]:
            pixels.add("a", scores, mask)
        curve = pixels.overlap_curve()
        value = pixels.results()["a"].values["aupro"]
    assert curve is not None
    x, y = curve
    assert x[0] == 0.0
    assert x[-1] == pytest.approx(0.3)
    assert np.trapezoid(y, x) / 0.3 == pytest.approx(value, abs=5e-3)


def test_replicates_scatter_around_the_number_and_do_not_depend_on_the_other_products() -> None:
    found, alone = collected(exact=True, replicates=100), collected(exact=True, products="a", replicates=100)
    for name, drawn in found["a"].replicates.items():
        assert np.array_equal(drawn, alone["a"].replicates[name], equal_nan=True)
        assert np.nanstd(drawn) > 0
        assert abs(np.nanmean(drawn) - found["a"].coarse[name]) < 3 * np.nanstd(drawn)
        assert found["a"].coarse[name] == pytest.approx(found["a"].values[name], abs=0.02)


def test_an_image_keeps_its_weight_whatever_comes_before_it() -> None:
    """The number decides the weights: the same images under other numbers give other replicates."""

    def replicates(start: int) -> np.ndarray:
        with Pixels(exact=False, replicates=50) as pixels:
            for number, (scores, mask) in enumerate(PRODUCTS["a"], start=start):
                pixels.add("a", scores, mask, number)
            return pixels.results()["a"].replicates["pixel_auroc"]

    assert np.array_equal(replicates(0), replicates(0), equal_nan=True)
    assert not np.array_equal(replicates(0), replicates(3), equal_nan=True)
