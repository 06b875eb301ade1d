"""Sequential tests for a change: oracles are integrals, Kolmogorov-Smirnov, naive sums, and simulation with its error."""

import json
from collections.abc import Callable

import numpy as np
import pytest
from scipy import integrate, stats

from unispect.decide.conformal import ConformalRule
from unispect.decide.drift import BETS, BULK, SHIFT, TAIL, TAILS, Chart, Charts, Ranks, between, readings

SMALLEST = 1e-3  # a test of uniformity fails by chance this seldom; seeds are fixed


def ranked(calibration: np.ndarray, stream: np.ndarray, most: int = 10_000, seed: int = 0) -> np.ndarray:
    ranks, chance = Ranks(calibration.tolist(), most), np.random.default_rng(seed)
    return np.array([ranks.p_value(float(value), chance) for value in stream])


# P-values

DRAWS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda draw, n: draw.normal(size=n),
    "three values": lambda draw, n: draw.integers(3, size=n).astype(float),
    "one value": lambda draw, n: np.zeros(n),
    "half of them zero": lambda draw, n: np.maximum(draw.standard_cauchy(n), 0),
}


def test_a_p_value_is_the_share_that_is_as_high() -> None:
    """The formula, naively, with the chance that was drawn."""
    draw = np.random.default_rng(1)
    calibration, stream = draw.integers(5, size=20).astype(float), draw.integers(-1, 7, size=50).astype(float)
    seen, chance = list(calibration), np.random.default_rng(0)
    for value, p in zip(stream, ranked(calibration, stream), strict=True):
        above, equal = sum(one > value for one in seen), sum(one == value for one in seen) + 1
        assert p == pytest.approx((above + (1 - chance.random()) * equal) / (len(seen) + 1))
        seen.append(value)


@pytest.mark.parametrize("most", [10_000, 8])
@pytest.mark.parametrize("draws", DRAWS)
def test_p_values_are_uniform_and_independent(draws: str, most: int) -> None:
    """Over many calibration sets of five images only, some of which are thinned on the way."""
    draw = np.random.default_rng(2)
    runs = [DRAWS[draws](draw, 5 + 12) for _ in range(1500)]
    p = np.array([ranked(run[:5], run[5:], most, seed) for seed, run in enumerate(runs)])  # (runs, 12)
    for column in p.T:
        assert stats.kstest(column, "uniform").pvalue > SMALLEST
    for first, second in ((0, 1), (0, 11), (5, 9), (10, 11)):
        counts, _, _ = np.histogram2d(p[:, first], p[:, second], bins=4, range=[[0, 1], [0, 1]])
        assert stats.chisquare(counts.ravel()).pvalue > SMALLEST
    assert stats.kstest(p.min(1), lambda x: 1 - (1 - x) ** 12).pvalue > SMALLEST


def test_p_values_of_p_values_are_uniform_and_independent() -> None:
    """Novelty is known by its conformal p-value alone; every second calibration image is of the product."""
    draw = np.random.default_rng(3)
    p = np.empty((1500, 10))
    for seed in range(len(p)):
        others, values = draw.normal(1, 2, size=6), draw.normal(size=16)
        calibration = np.concatenate((values[:6], others))
        rule = ConformalRule(calibration)
        stream = [1 - round(rule.p_value(value) * 13) for value in values[6:]]
        p[seed] = ranked(between(calibration)[:6], np.array(stream, float), seed=seed)
    for column in p.T:
        assert stats.kstest(column, "uniform").pvalue > SMALLEST
    counts, _, _ = np.histogram2d(p[:, 0], p[:, 9], bins=4, range=[[0, 1], [0, 1]])
    assert stats.chisquare(counts.ravel()).pvalue > SMALLEST


def test_memory_is_bounded() -> None:
    ranks, chance = Ranks([0.0] * 10, 100), np.random.default_rng(0)
    sizes = []
    for value in range(1000):
        ranks.p_value(value, chance)
        sizes.append(len(ranks.values))
        assert ranks.values == sorted(ranks.values)
    assert max(sizes) == 100
    assert sizes.count(50) > 5  # thinned again and again


# Bets


@pytest.mark.parametrize("kind", BETS)
def test_a_bet_is_a_density(kind: str) -> None:
    for number in range(BETS[kind](np.zeros(())).size):
        whole, _ = integrate.quad(lambda p, n=number: float(BETS[kind](np.array(p))[n]), 0, 1, points=[*TAILS, BULK])
        assert whole == pytest.approx(1, abs=1e-6)


def test_a_shift_is_bet_on_by_the_bulk_alone() -> None:
    """Given that a p-value is in the bulk, a bet on it is a density, and else nothing is bet."""
    assert (BETS[SHIFT](np.linspace(0, BULK, 20)) == 1).all()
    assert (np.ptp(BETS[TAIL](np.linspace(BULK, 1, 20)), axis=0) == 0).all()


@pytest.mark.parametrize("number", range(readings(0.5).size))
def test_what_an_alarm_is_told_by_are_likelihoods(number: int) -> None:
    whole, _ = integrate.quad(lambda p: float(np.exp(readings(p)[number])), 0, 1, points=[1e-4, 0.01, 0.03, 0.05], limit=200)
    assert whole == pytest.approx(1, abs=0.12)  # p-values below 1e-4 count as 1e-4


# Charts


def taken(p: np.ndarray, kind: str) -> Chart:
    chart = Chart(kind)
    for number, value in enumerate(p, 1):
        bets, says = BETS[kind](np.array(value)), kind == TAIL or value > BULK
        facts = np.concatenate(([1, value, value <= 0.05, 0], readings(value)))
        chart.advance(bets, says, facts, (number, None))
    return chart


@pytest.mark.parametrize("kind", BETS)
def test_a_chart_is_the_sum_over_all_times_of_a_change(kind: str) -> None:
    """Naively: sum over all beginnings of the product of bets since; the likeliest is where that is highest."""
    p = np.random.default_rng(4).random(60) ** np.where(np.arange(60) < 30, 1, 1.6)
    chart, says = taken(p, kind), (p > BULK) | (kind == TAIL)
    bets = BETS[kind](p)
    products = np.array([bets[start:].prod(0) for start in range(60)])  # (beginnings, J)
    assert chart.rises == pytest.approx(products[says].sum(0))
    assert chart.gains == pytest.approx(np.maximum(np.log(products.max(0)), 0))
    best = int(chart.rises.argmax())
    change, since = chart.change("gear"), chart.first[best][0]
    assert np.log(products[since - 1, best]) == pytest.approx(chart.gains[best])
    assert (change.images, change.product, change.since) == (61 - since, "gear", (since, None))
    assert change.mean_p == pytest.approx(p[since - 1 :].mean())
    assert change.top == pytest.approx((p[since - 1 :] <= 0.05).mean())


def alarms(charts: Charts, p: np.ndarray, run_length: float, products: np.ndarray | None = None) -> list[int]:
    names = [None] * len(p) if products is None else [str(name) for name in products]
    found = (charts.take(float(value), name, False, (1, None), run_length) for value, name in zip(p, names, strict=True))
    return [number for number, change in enumerate(found, 1) if change is not None]


@pytest.mark.parametrize("products", [False, True])
def test_there_are_no_more_false_alarms_than_promised(products: bool) -> None:
    """n / A of them among n images on average, and the first after A images or more; within three standard errors."""
    weights: dict[str | None, float] = {None: 0.25, "a": 0.25, "b": 0.25} if products else {None: 0.5}
    count, first = [], []
    for seed in range(60):
        draw = np.random.default_rng(seed)
        names = draw.choice(["a", "b", "c"], size=400) if products else None
        found = alarms(Charts(weights), draw.random(400), 40, names)
        count.append(len(found))
        first.append(found[0] if found else 400)
    assert np.mean(count) <= 400 / 40 + 3 * stats.sem(count)
    assert np.mean(first) >= 40 - 3 * stats.sem(first)
    assert np.mean(count) > 1  # the promise is not kept by silence


def test_it_says_what_has_changed() -> None:
    draw = np.random.default_rng(5)
    normal = draw.normal(size=400)
    planted = {
        (SHIFT, True): stats.norm.sf(normal + 0.7),
        (SHIFT, False): stats.norm.sf(normal - 0.7),
        (TAIL, True): stats.norm.sf(normal + 6 * (draw.random(400) < 0.15)),
    }
    for (kind, up), p in planted.items():
        charts = Charts({None: 0.5})
        found = (charts.take(float(one), None, False, (number, None), 1e4) for number, one in enumerate(p, 101))
        change = next(one for one in found if one is not None)
        assert (change.kind, change.up) == (kind, up)
        assert 101 <= change.since[0] < 120


def test_a_product_that_alone_has_changed_is_named_and_the_others_go_on() -> None:
    """As far as chance allows: now and then the other one has low p-values, too, and then it is told of all."""
    draw = np.random.default_rng(6)
    charts = Charts({None: 0.25, "a": 0.25, "b": 0.25})
    found = []
    for number in range(1, 2000):
        product = "ab"[number % 2]
        p = stats.norm.sf(draw.normal() + (product == "b"))
        change = charts.take(float(p), product, False, (number, None), 1e3)
        found += [change.product] if change else []
    assert len(found) > 20
    assert found.count("b") > 0.7 * len(found)
    assert "a" not in found


def test_after_an_alarm_charts_of_the_same_begin_anew() -> None:
    """Those of all images and of the product that is named; other products keep their evidence."""
    charts = Charts({None: 0.25, "a": 0.25, "b": 0.25})
    change = None
    while change is None:
        assert charts.take(0.5, "b", False, (1, None), 1e6) is None
        change = charts.take(0.001, "a", False, (2, None), 1e6)
    assert change.product == "a"
    heights = {(one["of"], one["kind"]): max(one["rises"]) for one in charts.as_dict()}
    assert {chart for chart, height in heights.items() if height > 0} == {("b", SHIFT), ("b", TAIL)}


def test_charts_go_on_bit_by_bit() -> None:
    draw = np.random.default_rng(7)
    p, names = draw.random(300) ** 1.3, draw.choice(["a", "b"], size=300)
    weights: dict[str | None, float] = {None: 0.25, "a": 0.25, "b": 0.25}
    whole, first, second = Charts(weights), Charts(weights), Charts(weights)
    found = alarms(whole, p, 100, names)
    before = alarms(first, p[:123], 100, names[:123])
    second.restore(json.loads(json.dumps(first.as_dict())))
    assert found == before + [123 + number for number in alarms(second, p[123:], 100, names[123:])]
    assert second.as_dict() == whole.as_dict()
    with pytest.raises(ValueError, match="not the charts of this model"):
        Charts({None: 1.0}).restore(first.as_dict())
