"""Realised against promised: the same alarms as the rule, and no gap where p-values are uniform."""

import json

import numpy as np
import pytest

from unispect.decide.conformal import ConformalRule, smallest_rate
from unispect.metrics.calibration import calibrated
from unispect.metrics.protocol import interval


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rate", [0.02, 0.05, 0.1, 0.2, 0.34])
def test_alarms_are_those_of_the_rule(rate: float, ties: bool) -> None:
    for seed in range(30):
        random = np.random.default_rng(seed)
        size = int(random.integers(50, 120))
        scores, new = random.normal(size=size), random.normal(size=80)
        if ties:
            scores, new = np.round(scores, 1), np.round(new, 1)
        rule = ConformalRule(scores)
        alarms = int(np.sum(new > rule.threshold(rate)))
        found = calibrated(np.array([rule.p_value(score) for score in new]), rate, smallest_rate(size))
        assert found.realised == alarms / 80
        assert (found.low, found.high) == interval(alarms, 80)
        assert found.error == pytest.approx(alarms / 80 - rate)


def test_a_rate_just_below_a_p_value_raises_no_alarm_as_the_rule_says() -> None:
    rule, rate = ConformalRule(np.arange(9.0)), 0.7 - 0.4  # 0.29999999999999993
    p = np.array([rule.p_value(6.5)])
    assert p[0] == 0.3
    assert rule.threshold(rate) >= 6.5
    assert calibrated(p, rate, 0.1).realised == 0.0
    assert calibrated(p, 0.3, 0.1).realised == 1.0


def test_uniform_p_values_keep_the_promise() -> None:
    p = np.random.default_rng(0).random(4000)
    found = calibrated(p, 0.05, 0.0)
    assert found.kept
    assert found.largest_gap is not None
    assert found.largest_gap < 1.63 / np.sqrt(4000)  # Kolmogorov, 99 %
    assert found.mean_gap is not None
    assert found.mean_gap < 0.01
    assert [rate for rate, _ in found.curve] == [0.005, 0.01, 0.02, 0.05, 0.1, 0.2]


def test_too_many_alarms_are_a_promise_broken_with_where_it_was_worst() -> None:
    p = np.concatenate([np.full(20, 0.01), np.linspace(0.3, 1.0, 80)])
    found = calibrated(p, 0.05, 0.01)
    assert (found.realised, found.kept) == (0.2, False)
    assert found.largest_gap == pytest.approx(0.19)
    assert found.largest_at == 0.01
    for p in (np.full(50, 1.0), np.array([0.5, 1.0])):
        never = calibrated(p, 0.05, 0.01)
        assert (never.largest_gap, never.largest_at) == (0.0, None)


@pytest.mark.parametrize("seed", range(10))
def test_largest_gap_is_the_largest_of_a_fine_grid_of_rates(seed: int) -> None:
    p = np.round(np.random.default_rng(seed).random(40) ** 1.5, 2)
    grid = np.arange(5, 100) / 100
    gaps = [float(np.mean(p <= rate)) - rate for rate in grid]
    found = calibrated(p, 0.1, 0.05)
    assert found.largest_gap == pytest.approx(max(gaps))
    assert found.largest_at == grid[int(np.argmax(gaps))]


def test_kept_up_to_the_end_of_the_interval() -> None:
    p = np.append(np.full(4, 0.01), np.full(46, 0.9))  # 4 of 50 alarms; the interval is 2.2 % to 19.2 %
    assert calibrated(p, 0.023, 0.01).kept is True
    assert calibrated(p, 0.022, 0.01).kept is False
    low = interval(4, 50)[0]
    assert calibrated(p, low, 0.01).kept is True


def test_as_dict_and_mean_gap_speak_of_the_curve() -> None:
    found = calibrated(np.array([0.05, 0.1, 0.5, 0.9]), 0.1, 0.05)
    assert found.curve == ((0.05, 0.25), (0.1, 0.5), (0.2, 0.5))
    assert found.mean_gap == pytest.approx((0.2 + 0.4 + 0.3) / 3)
    named = found.as_dict()
    assert json.loads(json.dumps(named)) == named
    assert (named["curve"][0], named["error"], named["kept"]) == ([0.05, 0.25], pytest.approx(0.4), True)


def test_rates_that_calibration_does_not_support_are_left_out() -> None:
    assert [rate for rate, _ in calibrated(np.array([0.1, 0.5]), 0.1, 1 / 60).curve] == [0.02, 0.05, 0.1, 0.2]


def test_without_good_images_nothing_is_said() -> None:
    found = calibrated(np.empty(0), 0.05, 0.01)
    assert (found.realised, found.error, found.kept, found.mean_gap, found.largest_gap) == (None,) * 5
    assert (found.low, found.high, found.curve, found.as_dict()["good"]) == (0.0, 1.0, (), 0)
