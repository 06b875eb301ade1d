"""Split conformal decision: a threshold that keeps a promised false-alarm rate.

*Algorithmic Learning in a Random World* (Vovk, Gammerman, Shafer, 2005), https://doi.org/10.1007/b106715
*Distribution-free predictive inference for regression* (Lei et al., 2018), https://arxiv.org/abs/1604.04173

With n calibration scores of normal images the p-value of a score s is p(s) = (1 + #{calibration >= s}) / (n + 1). If a
new normal image is exchangeable with the calibration images, then P(p <= a) <= a for every rate a. Let m be the largest
count with m / (n + 1) <= a. Then p(s) <= a says that at most m - 1 calibration scores reach s, that is s > the m-th
largest = the k-th smallest with k = n + 1 - m = ceil((n + 1)(1 - a)). So `p <= a` and `score > threshold` are one and
the same decision. Ties do not break it: a score equal to the threshold is reached by m calibration scores or more, so
it is normal; many ties only make the realised rate lower than promised.

"m / (n + 1) <= a" is asked of doubles, as the p-value is one: a decimal rate such as 0.01 counts as the decimal that
was typed (n = 99 gives k = 99), and 1 / 3 is a rate that two images can support.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context
from fractions import Fraction
from math import floor, isnan
from typing import Any, Self

import numpy as np

from unispect.errors import CalibrationError, ConfigError, StoreError


def smallest_rate(n: int) -> float:
    """The lowest false-alarm rate that n calibration images can support: 1 / (n + 1)."""
    return 1 / (n + 1)


def needed(false_alarm_rate: float) -> int:
    """How many calibration images a false-alarm rate needs at least: the smallest n with 1 / (n + 1) <= rate."""
    check_rate(false_alarm_rate)
    count = floor(1 / Fraction(false_alarm_rate))
    return count - 1 if 1 / count <= false_alarm_rate else count


def band(n: int, false_alarm_rate: float, coverage: float = 0.9) -> tuple[float, float]:
    """Range of the false-alarm rate that a threshold from n images realises in the long run, (low, high).

    The promise is kept on average over calibration sets. For one set and continuous scores the realised rate follows
    Beta(n + 1 - k, k); the range holds `coverage` of it, with equal tails.
    """
    from scipy.special import betaincinv  # here, so that deciding alone needs no more than numpy

    _check_coverage(coverage)
    k = _rank(n, false_alarm_rate)
    tail = (1 - coverage) / 2
    low, high = betaincinv(n + 1 - k, k, [tail, 1 - tail])
    return float(low), float(high)


@dataclass(frozen=True, eq=False, slots=True)
class ConformalRule:
    """Decides by the scores of n normal calibration images, which no other stage has learnt from.

    scores   (n,) float64, ascending; may be given in any order

    >>> rule = ConformalRule(np.arange(99))
    >>> rule.threshold(0.01), rule.p_value(98.0), rule.p_value(98.5)
    (98.0, 0.02, 0.01)
    """

    scores: np.ndarray

    def __post_init__(self) -> None:
        scores = np.sort(np.array(self.scores, dtype=np.float64))
        _check_scores(scores)
        scores.flags.writeable = False
        object.__setattr__(self, "scores", scores)

    def threshold(self, false_alarm_rate: float) -> float:
        """The k-th smallest calibration score; an image is anomalous if and only if its score is above."""
        return float(self.scores[_rank(len(self.scores), false_alarm_rate) - 1])

    def p_value(self, score: float) -> float:
        """Share of normal images that score at least as high, the image itself among them."""
        if isnan(score):
            raise ValueError("score is nan: expected a number; the detector is broken or the image holds no pixels")
        n = len(self.scores)
        as_high = n - int(np.searchsorted(self.scores, score, side="left"))
        return (1 + as_high) / (n + 1)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; every score comes back bit by bit."""
        return {"rule": "conformal", "scores": self.scores.tolist()}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Self:
        """The inverse of `as_dict`."""
        if table.get("rule") != "conformal":
            raise StoreError(f"the calibration has rule={table.get('rule')!r}: expected 'conformal'; fit the model again")
        try:
            return cls(table["scores"])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"the calibration is damaged: no usable scores ({error}); fit the model again") from error


def _rank(n: int, rate: float) -> int:
    """k = ceil((n + 1)(1 - rate)), the place of the threshold among n ascending scores, counted from 1."""
    check_rate(rate)
    above = round(rate * (n + 1))
    if above / (n + 1) > rate:
        above -= 1
    if above < 1:
        raise CalibrationError(_too_few(n, rate))
    return n + 1 - above


def _too_few(n: int, rate: float) -> str:
    images = "1 calibration image" if n == 1 else f"{n} calibration images"
    text = f"{images} cannot support false_alarm_rate={rate}: at least {needed(rate)} are needed"
    return f"{text}, or false_alarm_rate >= {advised_rate(n)}" if n else text


def advised_rate(n: int) -> str:
    """The lowest rate that n calibration images or groups can support, for people."""
    # Rounded up, so that the rate that is advised does work: 1 / 11 reads 0.09091.
    shown = Context(prec=4, rounding=ROUND_CEILING).divide(1, n + 1)
    return f"{shown.normalize():f}"


def check_rate(rate: float) -> None:
    """Raises ConfigError where a false-alarm rate is none."""
    if not 0 < rate < 1:
        raise ConfigError(f"false_alarm_rate={rate}: expected a number between 0 and 1, such as 0.01")


def _check_coverage(coverage: float) -> None:
    if not 0 < coverage < 1:
        raise ConfigError(f"coverage={coverage}: expected a number between 0 and 1, such as 0.9")


def _check_scores(scores: np.ndarray) -> None:
    if scores.ndim != 1 or not scores.size:
        raise CalibrationError(f"calibration scores have shape {scores.shape}: expected (n,) with at least one image")
    broken = int((~np.isfinite(scores)).sum())
    if broken:
        raise CalibrationError(
            f"{broken} of {scores.size} calibration scores are nan or infinite: expected finite numbers; "
            "the detector has not learnt, fit it again"
        )
