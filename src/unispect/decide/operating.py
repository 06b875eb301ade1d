"""The threshold that costs least: what a missed defect costs, what a false alarm costs, and how many parts are defective.

Of a threshold t, with a share d of defective images, the expected cost of an image is

    d * miss * P(defective image scores <= t) + (1 - d) * false_alarm * P(good image scores > t)

*The foundations of cost-sensitive learning* (Elkan, 2001), https://dl.acm.org/doi/10.5555/1642194.1642224. The shares are
those of labelled images, in which d may be anything. A threshold that was chosen on images looks cheaper on them than it is:
the cost that is told is of images that the bootstrap left out when it chose. *Improvements on cross-validation: the .632+
bootstrap method* (Efron, Tibshirani, 1997), https://doi.org/10.1080/01621459.1997.10474007.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unispect.errors import CalibrationError, ConfigError

REPLICATES = 1000
FEWEST = 10  # good and defective images each, below which nothing is said


@dataclass(frozen=True, slots=True)
class Costs:
    """What errors cost, in any unit.

    miss          of a defective part that goes through
    false_alarm   of a good part that is stopped
    defect_rate   share of parts that are defective on the line, not in the data
    """

    miss: float
    false_alarm: float
    defect_rate: float

    def __post_init__(self) -> None:
        for name in ("miss", "false_alarm"):
            if not 0 < getattr(self, name) < np.inf:
                raise ConfigError(f"cost of {name}: got {getattr(self, name)}, expected a number above 0")
        if not 0 < self.defect_rate < 1:
            raise ConfigError(f"defect_rate: got {self.defect_rate}, expected a share between 0 and 1, such as 0.01")


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """The threshold with the lowest expected cost, and how sure that is.

    low, high            range of the thresholds that the bootstrap chose
    cost                 of an image, expected on images that had no part in the choice; with its range
    misses, false_alarms   shares of the labelled images at the threshold
    never, always        cost of an image if no part were stopped, and if all were
    """

    threshold: float
    low: float
    high: float
    cost: float
    cost_low: float
    cost_high: float
    misses: float
    false_alarms: float
    never: float
    always: float
    good: int
    defective: int
    coverage: float

    def text(self) -> str:
        """For people."""
        return (
            f"Cheapest threshold: {self.threshold:.6g}; {self.coverage:.0%} of resamplings choose {self.low:.6g} to "
            f"{self.high:.6g}\n"
            f"Cost of an image: {self.cost:.4g}, from {self.cost_low:.4g} to {self.cost_high:.4g}, on images that had no "
            f"part in the choice; {self.never:.4g} without inspection, {self.always:.4g} if every part is stopped\n"
            f"Of {self.defective} defective images {self.misses:.2%} are missed, of {self.good} good ones "
            f"{self.false_alarms:.2%} raise an alarm"
        )


def cheapest(
    good: np.ndarray, defective: np.ndarray, costs: Costs, coverage: float = 0.9, replicates: int = REPLICATES, seed: int = 0
) -> OperatingPoint:
    """The threshold with the lowest expected cost on scores of good (n,) and defective (m,) images.

    Of equally cheap ones it is the highest, which raises the fewest alarms. It lies in the middle between two scores.

    Raises CalibrationError for fewer than 10 images of either kind.
    """
    good, defective = (np.asarray(scores, np.float64) for scores in (good, defective))
    for name, scores in {"good": good, "defective": defective}.items():
        if len(scores) < FEWEST:
            raise CalibrationError(
                f"{len(scores)} {name} labelled images cannot tell a threshold by cost: at least {FEWEST} are needed, "
                "and 100 are wise"
            )
        if not np.isfinite(scores).all():
            raise CalibrationError(
                f"scores of {name} images are nan or infinite: expected finite numbers; fit the model again"
            )
    tried = _Tried(good, defective, costs)
    whole = (np.ones(len(good)), np.ones(len(defective)))
    best = _last_lowest(tried.costs(*whole))
    places, outside = _resampled(tried, replicates, seed)
    tail = (1 - coverage) / 2
    low, high = np.quantile(tried.thresholds[places], [tail, 1 - tail])
    cost_low, cost_high = np.quantile(outside, [tail, 1 - tail])
    stopped, missed = tried.shares(*whole)
    return OperatingPoint(
        float(tried.thresholds[best]), float(low), float(high), float(np.mean(outside)), float(cost_low), float(cost_high),
        float(missed[best]), float(stopped[best]), tried.of_miss, tried.of_alarm, len(good), len(defective), coverage,
    )  # fmt: skip


class _Tried:
    """Thresholds that differ on the images: one below all scores, one between each two, and the highest score."""

    def __init__(self, good: np.ndarray, defective: np.ndarray, costs: Costs) -> None:
        self.good, self.defective = np.sort(good), np.sort(defective)
        known = np.unique(np.concatenate([good, defective]))
        below, between = np.nextafter(known[0], -np.inf), (known[:-1] + known[1:]) / 2
        self.thresholds = np.concatenate([[below], between, known[-1:]])
        self.of_alarm, self.of_miss = (1 - costs.defect_rate) * costs.false_alarm, costs.defect_rate * costs.miss
        # Number of images up to each threshold.
        self._good = np.searchsorted(self.good, self.thresholds, side="right")
        self._defective = np.searchsorted(self.defective, self.thresholds, side="right")

    def shares(self, good: np.ndarray, defective: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shares of the good images that are stopped and of the defective ones that are missed, at each threshold.

        good, defective   weight of each image, in the order of their scores
        """
        passed, missed = (np.concatenate([[0.0], np.cumsum(weights)]) / weights.sum() for weights in (good, defective))
        return 1 - passed[self._good], missed[self._defective]

    def costs(self, good: np.ndarray, defective: np.ndarray) -> np.ndarray:
        """Expected cost of an image at each threshold."""
        stopped, missed = self.shares(good, defective)
        cost: np.ndarray = self.of_alarm * stopped + self.of_miss * missed
        return cost


def _resampled(tried: _Tried, replicates: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the thresholds that resamplings choose, and what each costs on the images that were left out."""
    generator, places, outside = np.random.default_rng(seed), [], []
    sizes = len(tried.good), len(tried.defective)
    for _ in range(replicates):
        picks = [generator.multinomial(size, np.full(size, 1 / size)).astype(float) for size in sizes]
        places.append(_last_lowest(tried.costs(*picks)))
        left = [(pick == 0).astype(float) for pick in picks]
        if min(part.sum() for part in left) > 0:
            outside.append(tried.costs(*left)[places[-1]])
    return np.array(places), np.array(outside)


def _last_lowest(costs: np.ndarray) -> int:
    """Place of the lowest cost, of equal ones the last; rounding does not make a difference."""
    return int(np.flatnonzero(costs <= costs.min() + 1e-12 * costs.max())[-1])
