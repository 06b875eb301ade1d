"""Promises for groups that were not seen: the definition, simulation, and a closed form."""

import numpy as np
import pytest
from scipy.stats import binom, kruskal

from unispect.decide.conformal import ConformalRule
from unispect.decide.groups import GroupRule, Strictest, spread
from unispect.errors import CalibrationError


def names(sizes: list[int]) -> list[str]:
    return [f"day {number}" for number, size in enumerate(sizes) for _ in range(size)]


def by_definition(scores: np.ndarray, groups: list[str], score: float) -> float:
    shares = [(scores[np.array(groups) == name] >= score).mean() for name in sorted(set(groups))]
    return (1 + sum(shares)) / (len(shares) + 1)


@pytest.mark.parametrize("sizes", [[1], [3], [1, 1, 1], [2, 5, 1, 7], [4] * 30])
def test_p_values_are_those_of_the_definition(sizes: list[int]) -> None:
    random = np.random.default_rng(len(sizes))
    scores, groups = random.integers(9, size=sum(sizes)) / 4, names(sizes)
    rule = GroupRule(scores, groups)
    for score in np.concatenate([scores, scores + 0.01, [-1.0, 99.0]]):
        assert rule.p_value(score) == pytest.approx(by_definition(scores, groups, score), abs=1e-9)


@pytest.mark.parametrize("sizes", [[2, 5, 1, 7], [3] * 20, [1] * 40])
def test_p_value_and_threshold_are_one_decision(sizes: list[int]) -> None:
    random = np.random.default_rng(1)
    for ties in (3, 10**6):
        rule = GroupRule(random.integers(ties, size=sum(sizes)) / 7, names(sizes))
        scores = np.concatenate([rule.scores, rule.scores + 1e-9, rule.scores - 1e-9, [-np.inf, np.inf]])
        p_values = np.array([rule.p_value(score) for score in scores])
        for rate in np.linspace(1 / (len(sizes) + 1), 0.99, 23):
            assert ((p_values <= rate) == (scores > rule.threshold(rate))).all(), rate


def test_one_image_a_group_is_the_rule_for_images() -> None:
    scores = np.random.default_rng(0).normal(size=99)
    alone, plain = GroupRule(scores, names([1] * 99)), ConformalRule(scores)
    for rate in (0.01, 0.05, 0.3):
        assert alone.threshold(rate) == plain.threshold(rate)


def drawn(random: np.random.Generator, groups: int, most: int) -> tuple[np.ndarray, list[str]]:
    """Days of unlike size, each with a level of its own that is twice as strong as what images differ by."""
    sizes = random.integers(1, most, size=groups).tolist()
    levels = np.repeat(random.normal(0, 2, groups), sizes)
    return levels + random.normal(size=len(levels)), names(sizes)


def test_a_new_group_keeps_the_promise_where_images_alone_do_not() -> None:
    random, rate, rounds = np.random.default_rng(3), 0.1, 3000
    alarms = {"group": 0, "image": 0}
    for _ in range(rounds):
        scores, groups = drawn(random, 9, 40)
        new = random.normal(0, 2) + random.normal()
        alarms["group"] += GroupRule(scores, groups).p_value(new) <= rate
        alarms["image"] += ConformalRule(scores).p_value(new) <= rate
    high = binom.ppf(0.999, rounds, rate)
    assert alarms["group"] <= high
    assert alarms["image"] > high


def test_too_few_groups_say_how_many_are_needed() -> None:
    rule = GroupRule(np.arange(60.0), names([10] * 6))
    text = "6 groups of calibration images cannot support false_alarm_rate=0.05 for a group not seen: at least 19 groups"
    with pytest.raises(CalibrationError, match=text):
        rule.threshold(0.05)
    with pytest.raises(CalibrationError, match=r"false_alarm_rate >= 0.1429$"):
        rule.threshold(0.05)
    assert rule.threshold(0.1429) == 59


def test_images_without_a_group_are_refused() -> None:
    with pytest.raises(CalibrationError, match="no calibration image has a group: name day, lot or camera"):
        GroupRule(np.arange(3.0), [None] * 3)
    with pytest.raises(CalibrationError, match="1 of 3 calibration images have no group"):
        GroupRule(np.arange(3.0), ["a", None, "b"])


def test_the_strictest_is_the_higher_threshold_and_one_decision() -> None:
    scores, groups = drawn(np.random.default_rng(5), 30, 20)
    rules = ConformalRule(scores), GroupRule(scores, groups)
    both = Strictest(*rules)
    assert both.threshold(0.05) == max(rule.threshold(0.05) for rule in rules)
    for score in np.linspace(-6, 9, 200):
        assert (both.p_value(score) <= 0.05) == (score > both.threshold(0.05))


# The spread.


def test_spread_tells_days_that_differ_and_names_the_worst() -> None:
    random = np.random.default_rng(0)
    scores = random.normal(size=200)
    groups = names([50] * 4)
    alike = spread(scores, groups, 0.05)
    assert not alike.differ
    scores[50:100] += 3
    found = spread(scores, groups, 0.05)
    assert found.differ
    assert found.worst is not None
    assert found.worst.name == "day 1"
    others = np.delete(scores, slice(50, 100))
    assert found.worst.rate == (scores[50:100] > ConformalRule(others).threshold(0.05)).mean()


def test_its_p_value_is_that_of_kruskal_and_wallis() -> None:
    random = np.random.default_rng(2)
    scores, groups = random.normal(size=90).round(1), names([20, 40, 30])
    scores[:20] += 0.4
    parts = [scores[np.array(groups) == name] for name in sorted(set(groups))]
    assert spread(scores, groups, 0.1).p_value == pytest.approx(kruskal(*parts).pvalue, abs=0.03)


def test_groups_without_enough_others_have_no_rate() -> None:
    found = spread(np.arange(10.0), names([9, 1]), 0.2)
    assert [group.rate for group in found.groups] == [None, 1.0]
    assert spread(np.arange(4.0), names([4]), 0.5).p_value is None
