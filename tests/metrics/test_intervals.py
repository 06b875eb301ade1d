"""Intervals hold their numbers, shrink with more images, and cover as often as they say."""

import numpy as np
import pytest

from unispect.metrics.intervals import intervals
from unispect.metrics.pixels import PixelResult
from unispect.metrics.protocol import table


def drawn(images: int, seed: int, products: str = "ab") -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Scores, labels, alarms and products; the true AUROC of each product is Phi(1.5 / sqrt 2) = .856."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, images)
    scores = random.normal(size=images) + 1.5 * labels
    return scores, labels, scores > 2, [products[number % len(products)] for number in range(images)]


def found(images: int, seed: int, products: str = "ab") -> dict[str, dict[str, tuple[float, float]]]:
    scores, labels, alarms, names = drawn(images, seed, products)
    return intervals(scores, labels, alarms, names, table(scores, labels, names), {}, 400)


def test_every_number_lies_in_its_interval() -> None:
    scores, labels, alarms, names = drawn(200, 0)
    results = table(scores, labels, names)
    made = intervals(scores, labels, alarms, names, results, {}, 400)
    rows = {"pooled": results.pooled, "mean": results.mean, "product:a": results.products["a"]}
    for place, row in rows.items():
        for metric in ("image_auroc", "image_ap", "image_f1max", "detection_at_1"):
            low, high = made[place][metric]
            assert low <= getattr(row, metric) <= high
    low, high = made["pooled"]["detection_rate"]
    assert low <= alarms[labels == 1].mean() <= high
    assert "pixel_auroc" not in made["pooled"]


def test_more_images_make_it_narrower() -> None:
    wide, narrow = (found(images, 1)["pooled"]["image_auroc"] for images in (50, 800))
    assert narrow[1] - narrow[0] < 0.5 * (wide[1] - wide[0])


def test_one_product_is_its_own_pool() -> None:
    made = found(100, 2, "a")
    assert made["product:a"] == made["pooled"]
    assert made["mean"]["image_auroc"] == made["pooled"]["image_auroc"]


def test_a_class_that_is_missing_has_no_interval() -> None:
    scores, labels, alarms, names = np.arange(8.0), np.zeros(8, int), np.arange(8) > 6, ["a"] * 8
    made = intervals(scores, labels, alarms, names, table(scores, labels, names), {}, 100)
    assert "image_auroc" not in made["pooled"]
    assert "detection_rate" not in made["pooled"]
    assert "false_alarm_rate" in made["pooled"]


def test_pixels_of_some_products_only() -> None:
    """A product without maps has no pixel interval, and the mean is over those that have."""
    scores, labels, alarms, names = drawn(60, 3)
    spread = np.linspace(0.7, 0.9, 50)
    known = PixelResult({"pixel_auroc": 0.8}, {"pixel_auroc": 0.0}, {"pixel_auroc": spread}, {"pixel_auroc": 0.8})
    bare = PixelResult({"pixel_auroc": float("nan")}, {"pixel_auroc": 0.0})
    pixels = {"a": known, "b": bare, None: known}
    results = table(scores, labels, names, {product: result.values for product, result in pixels.items()})
    made = intervals(scores, labels, alarms, names, results, pixels, 100)
    assert made["product:a"]["pixel_auroc"] == made["mean"]["pixel_auroc"] == pytest.approx((0.705, 0.895))
    assert "pixel_auroc" not in made["product:b"]


@pytest.mark.slow
def test_it_covers_the_true_auroc_about_as_often_as_it_says() -> None:
    true = 0.8555778  # Phi(1.5 / sqrt 2)
    covered = [low <= true <= high for low, high in (found(160, seed, "a")["pooled"]["image_auroc"] for seed in range(250))]
    assert 0.90 <= np.mean(covered) <= 0.985
