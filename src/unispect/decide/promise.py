"""What is promised, in a sentence that a person can file."""

from __future__ import annotations

from contextlib import suppress

from unispect.decide.conformal import band, needed
from unispect.decide.judge import Judge

STARTS = PROMISE, THRESHOLD, CALIBRATED = "- Promise:", "- Threshold:", "- Calibrated on:"  # of lines of a model card


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
    if kind == "cross":
        return (
            f"about {rate:.2%} of normal images raise an alarm, and at most {2 * rate:.2%} and a term that falls with the "
            f"number of parts are proven, as long as images are exchangeable with the {size} that it was learnt from and "
            "calibrated on."
        )
    said = (
        f"at most {rate:.2%} of normal images raise an alarm, on average over calibration sets, as long as images are "
        f"exchangeable with those it was calibrated on."
    )
    with suppress(ImportError):  # where only inspection is installed, without scipy
        low, high = band(size, rate)
        said += f" With {size} calibration images the long-run rate lies between {low:.2%} and {high:.2%} in 90 of 100 fits."
    return said


def card_lines(judge: Judge) -> list[str]:
    """What a model card says of the decision."""
    threshold = f"score > {judge.threshold:.6g}, the same for all products"
    if judge.decision.guarantee == "product" and judge.decision.threshold is None:
        threshold = f"one for each product that the model recognises, {judge.threshold:.6g} at the most"
    return [
        f"{PROMISE} {promise(judge)}",
        f"{THRESHOLD} {threshold}. No product label is used in scoring.",
        f"{CALIBRATED} {len(judge.calibration)} images, taken to be good.",
    ]


def revised(card: str, judge: Judge) -> str:
    """A model card as it reads after the model was calibrated anew."""
    told = dict(zip(STARTS, card_lines(judge), strict=True))
    return "\n".join(next((new for start, new in told.items() if line.startswith(start)), line) for line in card.split("\n"))
