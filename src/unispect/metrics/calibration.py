"""How well a promised false-alarm rate was kept: realised against promised, at the promise and at others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from unispect.metrics.protocol import interval

RATES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)  # promises that the curve looks at


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What became of a promise on `good` normal test images; None where there are none.

    promised      at most this share of normal images raises an alarm
    realised      the share that did
    low, high     exact 95 % interval of the true share (Clopper and Pearson, 1934)
    curve         (promised, realised) for other promises that the calibration images support
    largest_gap   most that realised exceeds promised by, over all rates that are supported; 0 where it never does
    largest_at    the promised rate where that is
    """

    promised: float
    good: int
    realised: float | None
    low: float
    high: float
    curve: tuple[tuple[float, float], ...]
    largest_gap: float | None
    largest_at: float | None

    @property
    def error(self) -> float | None:
        """Realised - promised: above 0 where there were more alarms than promised."""
        return None if self.realised is None else self.realised - self.promised

    @property
    def kept(self) -> bool | None:
        """False where the whole interval lies above the promise; None without good images."""
        return None if self.realised is None else self.low <= self.promised

    @property
    def mean_gap(self) -> float | None:
        """Mean of |realised - promised| over the curve."""
        return float(np.mean([abs(realised - rate) for rate, realised in self.curve])) if self.curve else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "promised": self.promised,
            "realised": self.realised,
            "good": self.good,
            "low": self.low,
            "high": self.high,
            "error": self.error,
            "kept": self.kept,
            "curve": [list(point) for point in self.curve],
            "largest_gap": self.largest_gap,
            "largest_at": self.largest_at,
            "mean_gap": self.mean_gap,
        }


def calibrated(p_values: np.ndarray, promised: float, smallest: float) -> Calibrated:
    """From the p-values (N,) of normal test images: at a rate, those with p <= rate are the alarms.

    No tolerance is added: the rule compares the same doubles (see `decide.conformal`).

    promised   the false-alarm rate of the model
    smallest   the lowest rate that its calibration images support; lower ones are left out
    """
    p = np.sort(np.asarray(p_values, dtype=np.float64))
    if not len(p):
        return Calibrated(promised, 0, None, 0.0, 1.0, (), None, None)

    def share(rate: float) -> float:
        return float(np.searchsorted(p, rate, side="right")) / len(p)

    realised = share(promised)
    low, high = interval(round(realised * len(p)), len(p))
    curve = tuple((rate, share(rate)) for rate in RATES if rate >= smallest)
    rates = np.unique(np.append(p[p > smallest], smallest))  # between them only the promise grows
    gaps = np.searchsorted(p, rates, side="right") / len(p) - rates
    worst = int(np.argmax(gaps))
    if gaps[worst] <= 0:
        return Calibrated(promised, len(p), realised, low, high, curve, 0.0, None)
    return Calibrated(promised, len(p), realised, low, high, curve, float(gaps[worst]), float(rates[worst]))
