"""The cheapest threshold: against trying all, scikit-learn, and the closed form of two normal distributions."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from unispect.decide.operating import Costs, cheapest
from unispect.errors import CalibrationError, ConfigError


def cost(good: np.ndarray, defective: np.ndarray, threshold: float, costs: Costs) -> float:
    labels = np.concatenate([np.zeros(len(good)), np.ones(len(defective))])
    said = np.concatenate([good, defective]) > threshold
    (_, stopped), (missed, _) = confusion_matrix(labels, said, normalize="true", labels=[0, 1])
    return (1 - costs.defect_rate) * costs.false_alarm * stopped + costs.defect_rate * costs.miss * missed


@pytest.mark.parametrize(("miss", "rate"), [(1, 0.5), (100, 0.01), (3, 0.2), (1e6, 0.5), (1, 1e-6)])
def test_no_other_threshold_is_cheaper(miss: float, rate: float) -> None:
    random, costs = np.random.default_rng(0), Costs(miss, 1, rate)
    good, defective = random.normal(0, 1, 60).round(1), random.normal(1.5, 1, 45).round(1)
    found = cheapest(good, defective, costs, replicates=20)
    own = cost(good, defective, found.threshold, costs)
    for other in np.linspace(-4, 6, 2001):
        assert cost(good, defective, other, costs) >= own - 1e-12
    assert own <= min(found.never, found.always) + 1e-12
    above = np.concatenate([good, defective])
    above = above[above > found.threshold]
    if len(above):  # and a higher one is dearer
        assert cost(good, defective, float(above.min()), costs) > own


def test_many_images_find_the_threshold_of_the_closed_form() -> None:
    """Equal spreads: t = d / 2 + log((1 - p) c_f / (p c_m)) / d for means 0 and d."""
    random, apart, costs = np.random.default_rng(1), 3.0, Costs(20, 1, 0.02)
    good, defective = random.normal(0, 1, 1500), random.normal(apart, 1, 1500)
    found = cheapest(good, defective, costs, replicates=100)
    truth = apart / 2 + np.log(0.98 / (0.02 * 20)) / apart
    assert found.low <= truth <= found.high
    assert found.threshold == pytest.approx(truth, abs=0.35)


def test_cost_is_that_of_images_that_had_no_part_in_the_choice() -> None:
    random, costs = np.random.default_rng(2), Costs(10, 1, 0.1)
    seen, true, told = [], [], []
    many = random.normal(0, 1, 20_000), random.normal(1, 1, 20_000)
    for _ in range(60):
        good, defective = random.normal(0, 1, 20), random.normal(1, 1, 20)
        found = cheapest(good, defective, costs, replicates=60)
        seen.append(cost(good, defective, found.threshold, costs))
        true.append(cost(*many, found.threshold, costs))
        told.append(found.cost)
    assert np.mean(seen) < np.mean(true) - 0.03  # what it was chosen on flatters it
    assert np.mean(told) == pytest.approx(np.mean(true), abs=0.05)


def test_the_extremes_stop_none_and_all() -> None:
    good, defective = np.arange(20.0), np.arange(20.0) - 0.5
    none = cheapest(good, defective, Costs(1, 1, 1e-9), replicates=20)
    assert (none.false_alarms, none.misses) == (0, 1)
    everything = cheapest(good, defective, Costs(1e9, 1, 0.5), replicates=20)
    assert everything.misses == 0


def test_bad_input_is_told() -> None:
    with pytest.raises(CalibrationError, match=r"9 defective labelled images cannot .* at least 10 are needed"):
        cheapest(np.arange(20.0), np.arange(9.0), Costs(1, 1, 0.5))
    with pytest.raises(CalibrationError, match="scores of good images are nan"):
        cheapest(np.full(20, np.nan), np.arange(20.0), Costs(1, 1, 0.5))
    for costs, text in [
        ((0, 1, 0.1), "cost of miss: got 0"),
        ((1, -1, 0.1), "false_alarm"),
        ((1, 1, 1), "defect_rate: got 1"),
    ]:
        with pytest.raises(ConfigError, match=text):
            Costs(*costs)
