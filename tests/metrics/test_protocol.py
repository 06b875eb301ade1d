"""Both protocols from the metrics of their parts."""

import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from unispect.metrics import ranking, regions
from unispect.metrics.protocol import METRICS, Rates, Row, interval, mean, pixel_metrics, rates, table, worst


def sets() -> dict[str, np.ndarray]:
    """Three products on different scales; 'c' has no defect, 'b' no maps."""
    rng = np.random.default_rng(0)
    products = np.array(["b"] * 20 + ["a"] * 30 + ["c"] * 10)
    labels = np.concatenate([rng.integers(0, 2, 50), np.zeros(10, int)])
    scores = rng.normal(size=60) + 2 * labels + np.where(products == "a", 3.0, 0.0)
    pixels = np.flatnonzero(products != "b")
    masks = np.zeros((len(pixels), 8, 8), bool)
    masks[:, 2:5, 3:6] = (labels[pixels] == 1)[:, None, None]
    maps = (rng.normal(size=masks.shape) + masks).astype(np.float32)
    return {"scores": scores, "labels": labels, "products": products, "maps": maps, "masks": masks, "at": pixels}


def pixels(s: dict[str, np.ndarray]) -> dict[str | None, dict[str, float]]:
    """Pixel metrics of each product that has maps, and of all."""
    of_map = s["products"][s["at"]]
    groups: list[str | None] = [None, *sorted(set(of_map))]
    chosen = {name: slice(None) if name is None else of_map == name for name in groups}
    return {name: pixel_metrics(s["maps"][which], s["masks"][which]) for name, which in chosen.items()}


def test_parts_of_the_table() -> None:
    s = sets()
    result = table(s["scores"], s["labels"], s["products"], pixels(s))
    assert list(result.products) == ["a", "b", "c"]
    assert result.pooled.image_auroc == ranking.auroc(s["scores"], s["labels"])
    assert result.pooled.pixel_ap == ranking.average_precision(s["maps"], s["masks"])
    assert result.pooled.aupro == regions.aupro(s["maps"], s["masks"])
    own, seen = s["products"] == "a", s["products"][s["at"]] == "a"
    assert result.products["a"].image_f1max == ranking.f1_max(s["scores"][own], s["labels"][own])
    assert result.products["a"].pixel_auroc == ranking.auroc(s["maps"][seen], s["masks"][seen])
    assert math.isnan(result.products["b"].pixel_auroc)
    assert math.isnan(result.products["c"].image_auroc)
    assert [row.images for row in (result.pooled, result.mean, *result.products.values())] == [60, 60, 30, 20, 10]


def test_mean_is_over_the_products_where_measurable() -> None:
    s = sets()
    result = table(s["scores"], s["labels"], s["products"])
    measured = [result.products[name].image_auroc for name in "ab"]
    assert result.mean.image_auroc == pytest.approx(np.mean(measured))
    assert math.isnan(result.mean.aupro)
    assert all(math.isnan(getattr(mean([]), name)) for name in METRICS)


def test_scales_that_differ_hurt_pooled_and_not_the_mean() -> None:
    labels = np.array([0, 0, 1, 1] * 2)
    scores = np.array([0.0, 1, 2, 3, 10, 11, 12, 13])
    result = table(scores, labels, ["x"] * 4 + ["y"] * 4)
    assert result.mean.image_auroc == 1.0
    assert result.pooled.image_auroc == 0.75


def test_one_product_is_its_own_pool_and_mean() -> None:
    s = sets()
    result = table(s["scores"], s["labels"], ["all"] * 60)
    assert result.pooled == result.products["all"]
    assert result.mean.image_ap == result.pooled.image_ap


def test_worst_is_the_lowest_of_each_metric_with_its_product() -> None:
    rows = {"a": Row(image_auroc=0.9, aupro=0.2), "b": Row(image_auroc=0.7), "c": Row(image_auroc=0.7, aupro=0.4, images=5)}
    lowest, whose = worst(rows)
    assert lowest == Row(image_auroc=0.7, aupro=0.2, images=5)
    assert whose == {"image_auroc": "b", "aupro": "a"}
    assert worst({}) == (Row(), {})


def test_row_as_json_values() -> None:
    assert Row(image_auroc=0.5, images=3).as_dict() == {
        "image_auroc": 0.5,
        "image_ap": None,
        "image_f1max": None,
        "detection_at_1": None,
        "pixel_auroc": None,
        "pixel_ap": None,
        "pixel_f1max": None,
        "aupro": None,
        "images": 3,
    }


def test_rates_count_decisions() -> None:
    tally = rates(np.array([0, 0, 0, 1, 1]), np.array([True, False, False, True, False]))
    assert tally == Rates(good=3, false_alarms=1, defective=2, detected=1)
    assert (tally.false_alarm_rate, tally.detection_rate) == (1 / 3, 0.5)
    assert math.isnan(Rates().false_alarm_rate)
    assert math.isnan(Rates().detection_rate)


@pytest.mark.parametrize(("hits", "trials"), [(0, 1), (1, 1), (0, 50), (2, 120), (50, 50), (7, 9)])
def test_interval_equal_to_scipy(hits: int, trials: int) -> None:
    exact = binomtest(hits, trials).proportion_ci(0.95, method="exact")
    assert interval(hits, trials) == pytest.approx((exact.low, exact.high), abs=1e-12)


def test_interval_covers_at_least_as_often_as_it_says() -> None:
    rate, trials = 0.03, 80
    chance = binom.pmf(np.arange(trials + 1), trials, rate)
    covered = [low <= rate <= high for low, high in (interval(hits, trials) for hits in range(trials + 1))]
    assert float(chance[covered].sum()) >= 0.95
    assert interval(0, 0) == (0.0, 1.0)
