"""The decision keeps its promise: against exact rational arithmetic, simulation and the closed form."""

import json
from fractions import Fraction
from math import ceil

import numpy as np
import pytest
from scipy.stats import beta, binom, kstest

from unispect.decide.conformal import ConformalRule, band, needed, smallest_rate
from unispect.errors import CalibrationError, ConfigError, StoreError

RATES = [0.001, 0.005, 0.01, 0.02, 0.025, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.29, 0.3, 0.57, 0.7, 0.9, 0.99]


def exact_rank(n: int, rate: float) -> int:
    """k by the definition, in rationals of the decimal as it was typed."""
    return ceil((n + 1) * (1 - Fraction(str(rate))))


@pytest.mark.parametrize("rate", RATES)
def test_threshold_is_the_kth_smallest_of_exact_arithmetic(rate: float) -> None:
    for n in range(needed(rate), needed(rate) + 300):
        assert ConformalRule(np.arange(1, n + 1)).threshold(rate) == exact_rank(n, rate), n


def test_ninety_nine_images_support_one_percent_without_round_off() -> None:
    assert ConformalRule(np.arange(1, 100)).threshold(0.01) == 99


@pytest.mark.parametrize("rate", RATES)
def test_needed_is_the_smallest_number_that_does(rate: float) -> None:
    n = needed(rate)
    assert Fraction(1, n + 1) <= Fraction(str(rate))
    assert n == 1 or Fraction(1, n) > Fraction(str(rate))


@pytest.mark.parametrize("n", [1, 2, 6, 48, 99, 1000, 12345])
def test_smallest_rate_is_supported_and_nothing_below(n: int) -> None:
    rule, rate = ConformalRule(np.arange(n)), smallest_rate(n)
    assert rule.threshold(rate) == n - 1
    assert needed(rate) == n
    with pytest.raises(CalibrationError):
        rule.threshold(np.nextafter(rate, 0))


@pytest.mark.parametrize("values", [2, 5, 10**6], ids=["two values", "many ties", "no ties"])
def test_p_value_and_threshold_are_one_decision(values: int) -> None:
    random = np.random.default_rng(values)
    for n in range(1, 60):
        rule = ConformalRule(random.integers(values, size=n) / 7)
        asked = [rate for rate in [*RATES, *(np.arange(1, n + 1) / (n + 1))] if rate >= smallest_rate(n)]
        scores = np.concatenate([rule.scores, rule.scores + 1e-9, rule.scores - 1e-9, [-np.inf, np.inf]])
        p_values = np.array([rule.p_value(score) for score in scores])
        for rate in asked:
            assert ((p_values <= rate) == (scores > rule.threshold(rate))).all(), (n, rate)


def test_p_value_counts_by_the_definition() -> None:
    rule = ConformalRule([3.0, 1.0, 2.0, 2.0])
    for score, as_high in [(0.0, 4), (1.0, 4), (1.5, 3), (2.0, 3), (2.5, 1), (3.0, 1), (3.5, 0)]:
        assert rule.p_value(score) == (1 + as_high) / 5


@pytest.mark.parametrize(("n", "rate"), [(19, 0.05), (50, 0.05), (99, 0.01), (30, 0.2)])
def test_false_alarms_stay_below_the_promise_on_average(n: int, rate: float) -> None:
    """Marginal coverage: exactly m / (n + 1) for continuous scores, over draws of calibration set and new image."""
    draws = np.random.default_rng(n).normal(size=(20_000, n + 1))
    calibration, new = np.sort(draws[:, :n]), draws[:, n]
    alarms = int((new > calibration[:, exact_rank(n, rate) - 1]).sum())
    promised = (n + 1 - exact_rank(n, rate)) / (n + 1)
    low, high = binom.ppf([0.001, 0.999], len(draws), promised)
    assert promised <= rate
    assert low <= alarms <= high
    assert ConformalRule(calibration[0]).threshold(rate) == calibration[0, exact_rank(n, rate) - 1]


def test_ties_only_lower_the_false_alarms() -> None:
    draws = np.random.default_rng(0).integers(4, size=(20_000, 20))
    alarms = [score > ConformalRule(row).threshold(0.05) for *row, score in draws[:4000].tolist()]
    assert np.mean(alarms) <= 0.05


@pytest.mark.parametrize(("n", "rate"), [(19, 0.05), (120, 0.01), (200, 0.1)])
def test_realised_rate_of_one_calibration_set_follows_the_band(n: int, rate: float) -> None:
    """With uniform scores the long-run rate of a threshold t is 1 - t."""
    sets = np.random.default_rng(7).random((4000, n))
    realised = np.array([1 - ConformalRule(row).threshold(rate) for row in sets])
    k = exact_rank(n, rate)
    low, high = band(n, rate)
    # A level that chance hardly reaches; a rank that is off by one gives far less than 1e-9.
    assert kstest(realised, beta(n + 1 - k, k).cdf).pvalue > 1e-4
    assert kstest(realised, beta(n + 2 - k, k).cdf).pvalue < 1e-9
    assert ((low <= realised) & (realised <= high)).mean() == pytest.approx(0.9, abs=0.02)
    assert [low, high] == pytest.approx(beta(n + 1 - k, k).ppf([0.05, 0.95]))


def test_band_narrows_with_images_and_widens_with_coverage() -> None:
    width = [high - low for low, high in (band(n, 0.05) for n in (19, 99, 999))]
    assert width == sorted(width, reverse=True)
    (low, high), (lower, higher) = band(99, 0.05, 0.5), band(99, 0.05, 0.99)
    assert lower < low < high < higher


def test_order_does_not_matter_and_the_scores_stay_as_they_are() -> None:
    scores = np.array([2.0, 1.0, 3.0], dtype=np.float32)
    rule = ConformalRule(scores)
    scores[:] = 0
    assert rule.scores.tolist() == [1, 2, 3]
    assert rule.scores.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        rule.scores[0] = 9


def test_json_keeps_every_bit() -> None:
    rule = ConformalRule(np.random.default_rng(1).normal(size=50))
    again = ConformalRule.from_dict(json.loads(json.dumps(rule.as_dict())))
    np.testing.assert_array_equal(again.scores, rule.scores)


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({}, "rule=None: expected 'conformal'"),
        ({"rule": "conformal"}, "no usable scores"),
        ({"rule": "conformal", "scores": []}, "at least one"),
        ({"rule": "conformal", "scores": ["a"]}, "no usable scores"),
        ({"rule": "conformal", "scores": None}, "no usable scores"),
    ],
)
def test_damaged_calibration_is_named(table: dict, text: str) -> None:
    with pytest.raises(StoreError, match=text):
        ConformalRule.from_dict(table)


def test_too_few_images_say_how_many_are_needed() -> None:
    text = "10 calibration images cannot support false_alarm_rate=0.05: at least 19 are needed, or false_alarm_rate >= "
    with pytest.raises(CalibrationError) as caught:
        ConformalRule(np.arange(10)).threshold(0.05)
    assert str(caught.value) == text + "0.09091"
    with pytest.raises(CalibrationError, match=r"^1 calibration image cannot .* >= 0.5$"):
        ConformalRule([1.0]).threshold(0.01)
    with pytest.raises(CalibrationError, match=r"^0 calibration images cannot .*: at least 99 are needed$"):
        band(0, 0.01)


@pytest.mark.parametrize("n", [1, 2, 10, 11, 99, 1233, 10**6])
def test_the_rate_that_is_advised_works(n: int) -> None:
    with pytest.raises(CalibrationError) as caught:
        band(n, smallest_rate(n) / 2)
    advised = float(str(caught.value).rpartition(">= ")[2])
    assert band(n, advised)[0] > 0
    assert advised == pytest.approx(smallest_rate(n), rel=1e-3)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, 5, float("nan"), float("inf")])
def test_impossible_rates_are_refused(rate: float) -> None:
    rule = ConformalRule(np.arange(10))
    for ask in (needed, rule.threshold, lambda rate: band(10, rate), lambda rate: band(99, 0.1, coverage=rate)):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            ask(rate)


@pytest.mark.parametrize("rate", [5e-324, 1e-300, 1e-9, 1 - 2**-53])
def test_extreme_rates_count_images(rate: float) -> None:
    assert needed(rate) >= 1
    assert 1 / (needed(rate) + 1) <= rate


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_calibration_scores_are_refused(bad: float) -> None:
    with pytest.raises(CalibrationError, match="1 of 3 calibration scores are nan or infinite"):
        ConformalRule([1.0, bad, 2.0])


def test_shape_of_the_scores_is_checked() -> None:
    for scores in ([], [[1.0, 2.0]]):
        with pytest.raises(CalibrationError, match=r"expected \(n,\)"):
            ConformalRule(scores)


def test_a_nan_score_has_no_p_value() -> None:
    with pytest.raises(ValueError, match="score is nan"):
        ConformalRule([1.0]).p_value(float("nan"))
