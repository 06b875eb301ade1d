"""Detection at a false-alarm rate against the corners of scikit-learn's ROC curve."""

import math

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from unispect.metrics.ranking import detection_at


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("digits", [0, 1, 6])
def test_equal_to_the_corners_of_the_curve(rate: float, digits: int) -> None:
    for seed in range(20):
        random = np.random.default_rng(seed)
        labels = np.append(random.integers(0, 2, 90), [0, 1])
        scores = np.round(random.normal(size=92) + labels, digits)
        alarms, found, _ = roc_curve(labels, scores, drop_intermediate=False)
        assert detection_at(scores, labels, rate) == pytest.approx(found[alarms <= rate].max())


def test_a_tie_with_a_good_image_is_not_found() -> None:
    assert detection_at(np.array([1.0, 1.0, 2.0]), np.array([0, 1, 1]), 0.0) == 0.5
    assert detection_at(np.array([1.0, 1.0]), np.array([0, 1]), 0.0) == 0.0


@pytest.mark.parametrize("alarms", range(1, 100))
def test_a_share_of_the_good_is_compared_as_the_quotient_it_is(alarms: int) -> None:
    scores = np.append(np.arange(100.0), 100.0 - alarms - 0.5)  # exactly `alarms` of 100 are above
    assert detection_at(scores, np.append(np.zeros(100), 1), alarms / 100) == 1.0
    assert detection_at(scores, np.append(np.zeros(100), 1), (alarms - 0.5) / 100) == 0.0


def test_edges() -> None:
    assert math.isnan(detection_at(np.array([1.0]), np.array([1])))
    assert detection_at(np.array([0.0, 1.0]), np.array([0, 1])) == 1.0
    with pytest.raises(ValueError, match="rate=2"):
        detection_at(np.array([0.0, 1.0]), np.array([0, 1]), 2)
