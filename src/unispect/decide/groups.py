"""A promise for images of a day, lot or camera that was not there when the threshold was set.

Images taken together are alike, so many images of few groups tell less than their number says. What is exchangeable then is
the groups. With K groups of N_k calibration scores the p-value of a score s is

    p(s) = (1 + sum over k of #{i: s_ki >= s} / N_k) / (K + 1)

and P(p <= a) <= a for an image of a new group, however many images each group has and however alike they are.
*Distribution-free inference with hierarchical data* (Lee, Barber, Willett, 2023), https://arxiv.org/abs/2306.06342;
*Distribution-free prediction sets for two-layer hierarchical models* (Dunn, Wasserman, Ramdas, 2022),
https://arxiv.org/abs/1809.07441. With one image a group it is the rule of `decide.conformal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan

import numpy as np

from unispect.decide.conformal import ConformalRule, advised_rate, check_rate, needed
from unispect.errors import CalibrationError

SHUFFLES = 999  # of the names, to see whether groups differ


class GroupRule:
    """Decides by the scores of K groups of normal calibration images.

    scores   (n,)
    groups   (n,) the group of each image

    >>> rule = GroupRule(np.arange(6.0), ["mon", "mon", "mon", "tue", "tue", "wed"])
    >>> rule.p_value(5.5), rule.p_value(5.0), rule.threshold(0.5)
    (0.25, 0.5, 4.0)

    Raises CalibrationError where an image has no group.
    """

    def __init__(self, scores: np.ndarray, groups: Sequence[str | None]) -> None:
        names = checked(groups, len(scores))
        rule = ConformalRule(scores)  # which checks and sorts them
        order = np.argsort(np.asarray(scores, np.float64), kind="stable")
        _, number, sizes = np.unique(np.array(names, dtype=object).astype(str), return_inverse=True, return_counts=True)
        self.scores, self.groups = rule.scores, len(sizes)
        weights = (1 / sizes)[number][order]
        # Of the scores from each place on; rounded, so that three thirds are one.
        self._above = np.concatenate([np.cumsum(weights[::-1]).round(12)[::-1], [0.0]])

    def p_value(self, score: float) -> float:
        """Mean share of a group's images that score at least as high, the new group's as if it were all of it."""
        if isnan(score):
            raise ValueError("score is nan: expected a number; the detector is broken or the image holds no pixels")
        place = int(np.searchsorted(self.scores, score, side="left"))
        return min(1.0, float(1 + self._above[place]) / (self.groups + 1))

    def threshold(self, false_alarm_rate: float) -> float:
        """The lowest calibration score above which every score has a p-value of at most the rate."""
        check_rate(false_alarm_rate)
        if 1 / (self.groups + 1) > false_alarm_rate:
            raise CalibrationError(_too_few(self.groups, false_alarm_rate))
        # Above score i count those after its last equal.
        after = np.searchsorted(self.scores, self.scores, side="right")
        kept = (1 + self._above[after]) / (self.groups + 1) <= false_alarm_rate
        return float(self.scores[int(np.argmax(kept))])


class Strictest:
    """The more careful of several rules: the highest threshold, and the p-value that goes with it."""

    def __init__(self, *rules: ConformalRule | GroupRule) -> None:
        self.rules = rules

    def p_value(self, score: float) -> float:
        """The largest."""
        return max(rule.p_value(score) for rule in self.rules)

    def threshold(self, false_alarm_rate: float) -> float:
        """The highest."""
        return max(rule.threshold(false_alarm_rate) for rule in self.rules)


@dataclass(frozen=True, slots=True)
class Group:
    """What became of a group's images under a threshold set on all other groups.

    alarms      of its own images
    threshold   set on the images of the other groups, image by image; None where they are too few
    """

    name: str
    images: int
    alarms: int
    threshold: float | None

    @property
    def rate(self) -> float | None:
        """Share of its images that raised an alarm."""
        return None if self.threshold is None else self.alarms / self.images


@dataclass(frozen=True, slots=True)
class Spread:
    """How much groups differ, each held out as a whole in turn.

    p_value   of all groups being alike: share of shufflings of the names whose mean ranks lie as far apart (the statistic of
              Kruskal and Wallis, 1952); None with fewer than two groups
    """

    promised: float
    groups: tuple[Group, ...]
    p_value: float | None

    @property
    def worst(self) -> Group | None:
        """The group with the highest rate."""
        known = [group for group in self.groups if group.rate is not None]
        return max(known, key=lambda group: group.rate or 0.0, default=None)

    @property
    def differ(self) -> bool:
        """Whether the groups differ by more than chance, at 1 in 100."""
        return self.p_value is not None and self.p_value <= 0.01


def spread(scores: np.ndarray, groups: Sequence[str | None], false_alarm_rate: float, seed: int = 0) -> Spread:
    """Each group under a threshold of the others, (n,) scores and the group of each."""
    names = np.array(checked(groups, len(scores)), dtype=object).astype(str)
    scores = np.asarray(scores, np.float64)
    found = [_held_out(name, scores, names == name, false_alarm_rate) for name in np.unique(names)]
    alike = _alike(scores, names, seed) if len(found) > 1 else None
    return Spread(false_alarm_rate, tuple(found), alike)


def checked(groups: Sequence[str | None], images: int) -> list[str]:
    """The groups of so many images. Raises CalibrationError where one has none."""
    named = [name for name in groups if name is not None]
    if len(groups) != images or len(named) < images:
        count = "no calibration image has" if not named else f"{images - len(named)} of {images} calibration images have no"
        group = " a group" if not named else " group"
        raise CalibrationError(
            f"guarantee='group': {count}{group}: name day, lot or camera in the manifest's column `group`, or put the "
            "images of each into a folder below good/"
        )
    return named


def _held_out(name: str, scores: np.ndarray, own: np.ndarray, rate: float) -> Group:
    count, others = int(own.sum()), scores[~own]
    if len(others) < needed(rate):
        return Group(name, count, 0, None)
    threshold = ConformalRule(others).threshold(rate)
    return Group(name, count, int((scores[own] > threshold).sum()), threshold)


def _alike(scores: np.ndarray, names: np.ndarray, seed: int) -> float:
    ranks = np.searchsorted(np.sort(scores), scores, side="left") + np.searchsorted(np.sort(scores), scores, side="right")
    _, number, sizes = np.unique(names, return_inverse=True, return_counts=True)
    generator = np.random.default_rng(seed)
    own = _apart(ranks, number, sizes)
    apart = [_apart(generator.permutation(ranks), number, sizes) for _ in range(SHUFFLES)]
    # Sums of whole numbers: those that are equal come out equal but for their division.
    return float(1 + sum(value >= own * (1 - 1e-12) for value in apart)) / (SHUFFLES + 1)


def _apart(ranks: np.ndarray, number: np.ndarray, sizes: np.ndarray) -> float:
    """How far the groups' rank sums lie apart; grows with the statistic of Kruskal and Wallis."""
    return float((np.bincount(number, ranks) ** 2 / sizes).sum())


def _too_few(count: int, rate: float) -> str:
    groups = "1 group" if count == 1 else f"{count} groups"
    return (
        f"guarantee='group': {groups} of calibration images cannot support false_alarm_rate={rate} for a group not seen: at "
        f"least {needed(rate)} groups are needed, or false_alarm_rate >= {advised_rate(count)}"
    )
