"""Whether images have changed since calibration, tested after every image with a promised number of false alarms.

*Algorithmic Learning in a Random World* (Vovk, Gammerman, Shafer, 2005), https://doi.org/10.1007/b106715
*Retrain or not retrain: conformal test martingales for change-point detection* (Vovk et al., 2021),
https://arxiv.org/abs/2102.10439
*E-detectors: a nonparametric framework for sequential change detection* (Shin, Ramdas, Rinaldo, 2022),
https://arxiv.org/abs/2203.03532

**P-values.** A new score is ranked among the calibration scores and all stream scores before it, ties in random order. If
all of these are exchangeable, its rank is uniform whatever the ranks before it were, so the p-values are independent and
uniform: exactly, for any distribution, however few the calibration images. Scores are ranked within their product. Then it
does not matter in what order products come, or whether their scores are on one scale.

**Bets.** A bet is a density on (0, 1), so E[bet(p)] = 1 as long as p is uniform. Bets on a shift look at p-values above
`BULK` alone, brought back to (0, 1); bets on the tail look at whether p is below 0.05 or 0.01 alone.

**Charts.** For a bet e the Shiryaev-Roberts statistic is R = (R + 1) e, from R = 0, at images that the chart is about. E[R]
grows by at most 1 at each, and so does the mean over bets. A chart of weight w raises an alarm where w R >= A, and drops to
0. The weights of all charts that are about one image sum to 1 at most. So over n images the drops sum to n at most, on
average, and each is A or more: **the expected number of false alarms in n images is at most n / A**, for every n, after
alarms as before them, for any number of products. Sums of expectations ask for no independence of charts. Charts that share
their p-values have a mean time to the first false alarm of A or more, too.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

BULK = 0.1  # p-values above this one tell of all images, those below of defects, too
POWERS = np.array([1.25, 1.5, 2.0, 3.0, 5.0])
TAILS = np.array([0.05] * 4 + [0.01] * 4)  # p-values that are bet on, and the shares of them that bets are best for
SHARES = np.array([0.08, 0.15, 0.3, 0.6, 0.02, 0.05, 0.15, 0.4])
TOP = 0.05  # a p-value as low is told as "in the tail"
MOVED = np.array([0.5, 1.0, 1.5, 2.0, 2.5])  # shifts that an alarm of the tail may come from, standard deviations
BURSTS = np.array([(share, top) for share in (0.05, 0.1, 0.2, 0.4, 0.6, 0.95) for top in (0.01, 0.03, 0.05)])
SHIFT, TAIL = "shift", "tail"
NORMAL = NormalDist()
FACTS = ("images", "p", "top", "strange")  # sums since a chart was last at its low
At = tuple[int, str | None]  # the number of an image, from 1 on, and its name


def shift_bets(p: np.ndarray) -> np.ndarray:
    """Bets on all scores having moved, (...) -> (..., 10): the first half on risen ones, the second on fallen ones.

    With q uniform given p > BULK: k (1 - q)^(k - 1) and k q^(k - 1), which integrate to 1. No bet where p <= BULK.
    """
    q = np.clip((p - BULK) / (1 - BULK), 0, 1)[..., None]
    bets = np.concatenate((POWERS * (1 - q) ** (POWERS - 1), POWERS * q ** (POWERS - 1)), -1)
    return np.where(np.asarray(p)[..., None] > BULK, bets, 1.0)


def tail_bets(p: np.ndarray) -> np.ndarray:
    """Bets on more low p-values than there should be, (...) -> (..., 8)."""
    low = np.asarray(p)[..., None] <= TAILS
    bets: np.ndarray = np.where(low, SHARES / TAILS, (1 - SHARES) / (1 - TAILS))
    return bets


def readings(p: float) -> np.ndarray:
    """Log-likelihood ratio of a p-value to no change, (5 + 18,): normal scores moved by MOVED; a share of BURSTS in the top.

    They decide nothing but how an alarm is told.
    """
    z = -NORMAL.inv_cdf(min(max(p, 1e-4), 1 - 1e-9))
    share, top = BURSTS.T
    return np.concatenate((MOVED * z - MOVED**2 / 2, np.log(1 - share + np.where(p <= top, share / top, 0))))


BETS: dict[str, Callable[[np.ndarray], np.ndarray]] = {SHIFT: shift_bets, TAIL: tail_bets}
NUMBER = {kind: bets(np.zeros(())).size for kind, bets in BETS.items()}
WIDTH = len(FACTS) + len(MOVED) + len(BURSTS)


class Ranks:
    """Values seen, in ascending order; the next one is ranked among them and joins them.

    Where there are more than `most`, a random half stays. It is chosen without regard to age, calibration images included:
    then ranks among those that stay are as independent of the ranks before as ranks among all, because ranks tell nothing of
    *which* values there are.
    """

    def __init__(self, values: Sequence[float], most: int) -> None:
        self.values, self.most = sorted(values), most

    def p_value(self, value: float, chance: np.random.Generator) -> float:
        """Share of values that are as high, the new one among them, ties in random order; in (0, 1]."""
        left, right = bisect_left(self.values, value), bisect_right(self.values, value)
        p = (len(self.values) - right + (1 - chance.random()) * (right - left + 1)) / (len(self.values) + 1)
        self.values.insert(right, value)
        if len(self.values) > self.most:
            stay = np.sort(chance.choice(len(self.values), self.most // 2, replace=False))
            self.values = [self.values[place] for place in stay]
        return float(p)


def between(values: np.ndarray) -> np.ndarray:
    """Calibration values on the scale of minus how many of them a new value is reached by, (n,) -> (n,).

    A finding has the p-value of its novelty, (1 + reached by) / (n + 1), which says between which two calibration images it
    lies. On this scale it is an integer and they lie half-way. Where several new ones lie in one gap, `Ranks` draws their
    order. Values in one gap are exchangeable, so ranks are as uniform as those of the values themselves, of any part of the
    calibration images, too. (Calibration values that tie with new ones would not do: they would count as higher.)

    >>> between(np.array([1.0, 3.0, 2.0]))
    array([-2.5, -0.5, -1.5])
    """
    places = np.empty(len(values))
    places[np.argsort(-values, kind="stable")] = -0.5 - np.arange(len(values))
    return places


@dataclass(frozen=True, slots=True)
class Change:
    """What a chart found.

    kind      "shift" of all scores, or more in the "tail" than there should be
    product   whose scores, or None: those of all products
    up        whether they rose
    since     the image after which it became likely
    images    looked at since then
    mean_p    of their p-values; 0.5 where nothing changed
    top       share of their p-values in the lowest 5 %
    strange   share of the images that show an unknown product
    """

    kind: str
    product: str | None
    up: bool
    since: At
    images: int
    mean_p: float
    top: float
    strange: float


class Chart:
    """A Shiryaev-Roberts statistic for each bet on one kind of change, and sums since each bet was last at its low.

    The low is that of the bet's running log-likelihood ratio: the likeliest time of a change before now.

    rises   (J,) statistics
    gains   (J,) log-likelihood ratio above its low
    sums    (J, WIDTH) of FACTS and of `readings`
    first   J images, the first after the low
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.reset()

    def reset(self) -> None:
        """Nothing found."""
        bets = NUMBER[self.kind]
        self.rises, self.gains = np.zeros(bets), np.zeros(bets)
        self.sums = np.zeros((bets, WIDTH))
        self.first: list[At] = [(0, None)] * bets

    @property
    def height(self) -> float:
        """Mean of the statistics."""
        return float(self.rises.sum()) / len(self.rises)

    def advance(self, bets: np.ndarray, says: bool, facts: np.ndarray, at: At) -> None:
        """Take in an image. says: whether its p-value is one that this chart looks at."""
        low = self.gains <= 0
        self.sums[low] = 0
        self.first = [at if fresh else one for fresh, one in zip(low.tolist(), self.first, strict=True)]
        self.sums += facts
        if says:
            self.rises = (self.rises + 1) * bets
            self.gains = np.maximum(self.gains + _log(bets), 0)

    def change(self, product: str | None) -> Change:
        """What the bet that has won most says. More in the tail is a shift where a shift explains all p-values better."""
        best = int(self.rises.argmax())
        images, p, top, strange = self.sums[best, : len(FACTS)].tolist()
        moved, burst = np.split(self.sums[best, len(FACTS) :], [len(MOVED)])
        return Change(
            SHIFT if self.kind == SHIFT or _likelihood(moved) > _likelihood(burst) else TAIL,
            product,
            self.kind == TAIL or best < len(POWERS),
            self.first[best],
            int(images),
            p / images,
            top / images,
            strange / images,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; every number comes back bit by bit."""
        arrays = {"rises": self.rises.tolist(), "gains": self.gains.tolist(), "sums": self.sums.tolist()}
        return arrays | {"first": [list(one) for one in self.first]}

    def restore(self, table: Mapping[str, Any]) -> None:
        """What `as_dict` gave."""
        shapes = {name: getattr(self, name).shape for name in ("rises", "gains", "sums")}
        for name, shape in shapes.items():
            setattr(self, name, np.array(table[name], np.float64).reshape(shape))
        self.first = [(int(number), name) for number, name in table["first"]]
        if len(self.first) != len(self.rises):
            raise ValueError(f"{len(self.first)} first images, expected {len(self.rises)}")


class Charts:
    """Charts that look at the same p-values: of all images (None), and of products, each for a shift and for the tail.

    weights   of the charts of each; a product without one is looked at with all others only
    """

    def __init__(self, weights: Mapping[str | None, float]) -> None:
        self.weights = dict(weights)
        self._charts = {(one, kind): Chart(kind) for one in weights for kind in BETS}

    def take(self, p: float, product: str | None, strange: bool, at: At, run_length: float) -> Change | None:
        """Take in the p-value of an image; what has changed, if a chart raises an alarm."""
        value = np.array(p)
        bets = {kind: bet(value) for kind, bet in BETS.items()}
        facts = np.concatenate(((1, p, p <= TOP, strange), readings(p)))
        about = [one for one in dict.fromkeys((None, product)) if one in self.weights]
        for one in about:
            for kind in BETS:
                self._charts[one, kind].advance(bets[kind], kind == TAIL or p > BULK, facts, at)
        found = [(self.weights[one] * self._charts[one, kind].height, one, kind) for one in about for kind in BETS]
        height, one, kind = max(found, key=lambda each: each[0])
        return self._alarm(one, kind) if height >= run_length else None

    def _alarm(self, product: str | None, kind: str) -> Change:
        """What to say. Where one product alone explains an alarm of all, that product is named."""
        if product is None:
            product, kind = max(self._charts, key=lambda one: self._charts[one].height)
        change = self._charts[product, kind].change(product)
        for (one, _), chart in self._charts.items():
            if product is None or one in (None, product):
                chart.reset()
        return change

    def as_dict(self) -> list[dict[str, Any]]:
        """Plain values for JSON."""
        return [{"of": one, "kind": kind} | chart.as_dict() for (one, kind), chart in self._charts.items()]

    def restore(self, tables: Sequence[Mapping[str, Any]]) -> None:
        """What `as_dict` gave.

        Raises KeyError, TypeError or ValueError where it is of other charts.
        """
        if {(table["of"], table["kind"]) for table in tables} != set(self._charts):
            raise ValueError("these are not the charts of this model")
        for table in tables:
            self._charts[table["of"], table["kind"]].restore(table)


def _likelihood(logs: np.ndarray) -> float:
    """Log of the mean of what is given as logs."""
    return float(np.logaddexp.reduce(logs)) - float(np.log(len(logs)))


def _log(bets: np.ndarray) -> np.ndarray:
    logs: np.ndarray = np.log(np.maximum(bets, 1e-300))
    return logs
