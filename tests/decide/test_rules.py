"""For whom a promise is kept: crepes as oracle, and simulation."""

import dataclasses

import numpy as np
import pytest
from crepes import ConformalClassifier
from scipy.stats import binom

from unispect.data.loader import Preparation
from unispect.decide.conformal import ConformalRule
from unispect.decide.judge import Calibration, DecisionSettings, Judge, Rules, Said
from unispect.errors import CalibrationError, ConfigError, StoreError
from unispect.types import Finding


def calibration(scores: np.ndarray, recognised: list[str | None], groups: list[str | None] | None = None) -> Calibration:
    scores, nobody = np.asarray(scores, np.float64), (None,) * len(scores)
    return Calibration(scores, scores + 1, scores - 1, scores.copy(), nobody, tuple(groups or nobody), tuple(recognised))


def test_p_values_are_those_of_crepes() -> None:
    random = np.random.default_rng(0)
    scores, asked = random.normal(size=200).round(1), random.normal(size=300).round(1)
    oracle = ConformalClassifier().fit(scores)
    found = [ConformalRule(scores).p_value(score) for score in asked]
    assert found == pytest.approx(oracle.predict_p(asked[:, None], smoothing=False)[:, 0])


def test_p_values_of_products_are_those_of_crepes_with_a_bin_for_each() -> None:
    random = np.random.default_rng(1)
    scores, bins = random.normal(size=300).round(1), random.choice(["nut", "screw", "tile"], 300)
    asked, asked_bins = random.normal(size=200).round(1), random.choice(["nut", "screw", "tile"], 200)
    oracle = ConformalClassifier().fit(scores, bins=bins)
    rules = Rules(scores, calibration(scores, bins.tolist()), DecisionSettings(0.05, guarantee="product"))
    found = [rules.of(name).p_value(score) for score, name in zip(asked, asked_bins, strict=True)]
    assert found == pytest.approx(oracle.predict_p(asked[:, None], bins=asked_bins, smoothing=False)[:, 0])


def test_products_with_few_images_share_and_are_joined_until_they_are_enough() -> None:
    names = ["a"] * 40 + ["b"] * 25 + ["c"] * 5 + ["d"] * 3
    scores = np.arange(len(names), dtype=float)
    rules = Rules(scores, calibration(scores, names), DecisionSettings(0.05, guarantee="product"))
    assert rules.of("a").threshold(0.05) == ConformalRule(scores[:40]).threshold(0.05)
    # c and d have 8 together, of 19 needed, so b, the smallest that could stand alone, joins them.
    for name in ("b", "c", "d"):
        assert rules.of(name).threshold(0.05) == ConformalRule(scores[40:]).threshold(0.05)
    assert rules.of(None).threshold(0.05) == ConformalRule(scores).threshold(0.05)


def test_each_product_keeps_the_promise_by_itself_where_one_threshold_does_not() -> None:
    random, rate, rounds = np.random.default_rng(2), 0.1, 1500
    alarms = {(kind, name): 0 for kind in ("image", "product") for name in ("quiet", "loud")}
    for _ in range(rounds):
        names = ["quiet"] * 60 + ["loud"] * 20
        scores = np.concatenate([random.normal(0, 1, 60), random.normal(2, 1, 20)])
        for kind in ("image", "product"):
            rules = Rules(scores, calibration(scores, names), DecisionSettings(rate, guarantee=kind))
            for name, level in (("quiet", 0), ("loud", 2)):
                alarms[kind, name] += random.normal(level, 1) > rules.of(name).threshold(rate)
    high = binom.ppf(0.999, rounds, rate)
    assert max(alarms["product", "quiet"], alarms["product", "loud"]) <= high
    assert alarms["image", "loud"] > 2 * high


# Judge.


def said(score: float, product: int | None = None, novelty: float = 0.0) -> Said:
    known = None if product is None else np.where(np.arange(2) == product, -0.1, -3.0)
    return Said(score, np.full((8, 8), score), known, novelty)


def judge(decision: DecisionSettings, groups: list[str | None] | None = None) -> Judge:
    random = np.random.default_rng(0)
    scores = np.concatenate([random.normal(0, 1, 60), random.normal(10, 1, 60)])
    known = calibration(scores, ["nut"] * 60 + ["screw"] * 60, groups)
    return Judge(known, decision, ["nut", "screw"], Preparation(32))


def test_findings_are_decided_by_the_recognised_product() -> None:
    one = judge(DecisionSettings(0.05, guarantee="product", unknown_rate=0))
    nut, screw = (one.finding(None, said(6.0, product), (32, 32)) for product in (0, 1))
    assert (nut.product, nut.anomalous) == ("nut", True)
    assert (screw.product, screw.anomalous) == ("screw", False)
    assert nut.threshold < screw.threshold == one.threshold
    assert nut.p_value == 1 / 61
    assert not judge(DecisionSettings(0.05, unknown_rate=0)).finding(None, said(6.0, 0), (32, 32)).anomalous


@pytest.mark.parametrize("guarantee", ["image", "group", "product"])
def test_an_alarm_is_a_p_value_of_at_most_the_rate(guarantee: str) -> None:
    one = judge(DecisionSettings(0.1, guarantee=guarantee, unknown_rate=0), [f"day {n % 12}" for n in range(120)])
    for score in np.linspace(-4, 14, 100):
        for product in (0, 1):
            found = one.finding(None, said(float(score), product), (32, 32))
            assert found.anomalous == (found.p_value <= 0.1) == (score > found.threshold)


def test_a_fixed_score_decides_whatever_the_rate() -> None:
    one = judge(DecisionSettings(0.05, threshold=3.5))
    assert one.threshold == 3.5
    assert one.finding(None, said(3.6), (32, 32)).anomalous
    assert not one.finding(None, said(3.4), (32, 32)).anomalous
    assert one.pixel_threshold == judge(DecisionSettings(0.05)).pixel_threshold


def test_a_finding_has_what_thresholds_are_set_from() -> None:
    found: Finding = judge(DecisionSettings(0.05)).finding(None, said(2.0, 0, 7.0), (32, 32))
    assert (found.score, found.peak, found.median, found.novelty) == (2.0, 2.0, 2.0, 7.0)
    assert {"peak", "median", "novelty"} <= found.as_dict().keys()


def test_settings_that_are_none() -> None:
    with pytest.raises(ConfigError, match=r"guarantee 'groups'.*did you mean 'group'"):
        DecisionSettings(guarantee="groups")
    with pytest.raises(ConfigError, match="threshold: got nan, expected a finite score"):
        DecisionSettings(threshold=float("nan"))
    with pytest.raises(CalibrationError, match="no calibration image has a group"):
        judge(DecisionSettings(0.05, guarantee="group"))


def test_json_keeps_every_bit_and_damage_is_told() -> None:
    known = judge(DecisionSettings(0.05), ["a"] * 120).calibration
    again = Calibration.from_dict(known.as_dict())
    for field in dataclasses.fields(Calibration):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(known, field.name))
    with pytest.raises(StoreError, match="lists of unlike length"):
        Calibration.from_dict(known.as_dict() | {"groups": ["a"]})
    with pytest.raises(StoreError, match=r"of an older unispect \(KeyError\('recognised'\)\)"):
        Calibration.from_dict({name: value for name, value in known.as_dict().items() if name != "recognised"})


def test_some_of_the_images() -> None:
    known = judge(DecisionSettings(0.05)).calibration
    kept = known.of(known.scores > 5)
    assert len(kept) == 60
    assert set(kept.recognised) == {"screw"}
    assert len(kept.with_also(known)) == 180
