"""What is promised, in a sentence that a person can file."""

from __future__ import annotations

from unispect.decide.conformal import band, needed
from unispect.decide.judge import Judge


def promise(judge: Judge) -> str:
    """Of a model, with its assumption."""
    size, rate, kind = len(judge.calibration), judge.decision.false_alarm_rate, judge.decision.guarantee
    if judge.decision.threshold is not None:
        return (
            f"none: the threshold is a fixed score, {judge.decision.threshold:.6g}. Of {size} normal calibration images "
            f"{int((judge.calibration.scores > judge.decision.threshold).sum())} score higher."
        )
    if kind == "group":
        groups = len(set(judge.calibration.groups))
        return (
            f"at most {rate:.2%} of normal images of a group that was not seen raise an alarm, on average over groups, "
            f"as long as groups are exchangeable with the {groups} that it was calibrated on."
        )
    if kind == "product":
        return (
            f"at most {rate:.2%} of normal images of each product, as the model recognises it, raise an alarm, on average "
            "over calibration sets, as long as images are exchangeable with those it was calibrated on; products with fewer "
            f"than {needed(rate)} of these share a promise."
        )
    low, high = band(size, rate)
    return (
        f"at most {rate:.2%} of normal images raise an alarm, on average over calibration sets, as long as images are "
        f"exchangeable with those it was calibrated on. With {size} calibration images the long-run rate lies between "
        f"{low:.2%} and {high:.2%} in 90 of 100 fits."
    )
