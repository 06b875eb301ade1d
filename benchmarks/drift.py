"""False alarms and delays of `unispect monitor`, beside a chart of means and a Kolmogorov-Smirnov window.

    python benchmarks/drift.py [--data ../shared/realdata MODEL ...]

Scores and novelty are drawn, so that the truth is known. The baselines are told the distribution and are set, by simulation,
to the run length that the monitor promises; what they do with 200 calibration images and textbook limits stands beside.
Each MODEL, exported from a fit on DATA, inspects its test images: good ones product by product, then mixed with defective.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from unispect.benchmark import environment
from unispect.data.datasets import read_data
from unispect.data.records import Record
from unispect.decide.conformal import ConformalRule
from unispect.decide.drift import BETS, BULK, SHIFT, Ranks
from unispect.decide.judge import Calibration, DecisionSettings
from unispect.monitor import RUN_LENGTH, Monitor, read_calibration
from unispect.runtime import Inspector as Runtime

RESULTS = Path(__file__).parent / "results" / "drift.md"
CALIBRATION, MOST, LAST = 200, 10_000, 3000  # images to calibrate; kept in a pool; looked at after a change
BATCH, WINDOW = 25, 100  # images in a batch of the charts of means, and in a window, which moves by a batch
REAL_LENGTH = 1000
FAR = 6.0  # standard deviations by which defects and unknown products are higher
LIMITS = {"Shewhart": 3.023, "EWMA": 2.962}  # P(|Z| > 3.023) = 1 / 400; Lucas and Saccucci (1990), weight 0.2, 500 batches
WEIGHTS = {"Shewhart": 1.0, "EWMA": 0.2}
Draw = Callable[[np.random.Generator, Any], np.ndarray]


@dataclass(frozen=True)
class Law:
    """Scores of good images, and how they are distributed."""

    draw: Draw
    cdf: Callable[[np.ndarray], np.ndarray]
    mean: float
    deviation: float


LAWS = {
    "normal": Law(lambda draw, size: draw.normal(size=size), special.ndtr, 0.0, 1.0),
    "lognormal": Law(
        lambda draw, size: draw.lognormal(size=size),
        lambda x: special.ndtr(np.log(np.maximum(x, 1e-300))),
        float(np.exp(0.5)),
        float(np.sqrt((np.e - 1) * np.e)),
    ),
}


@dataclass(frozen=True)
class Case:
    """A change: all scores move, or a share of images is far off, in scores or in novelty."""

    name: str
    moved: float = 0.0
    share: float = 0.0
    novelty: bool = False

    def of(self, law: Law, draw: np.random.Generator, size: Any) -> np.ndarray:
        """Values after the change."""
        far = FAR * (draw.random(size) < self.share) if self.share else 0.0
        return np.asarray(law.draw(draw, size) + law.deviation * (self.moved + far))


CASES = (
    Case("shift of 0.5 sd", 0.5),
    Case("shift of 1 sd", 1.0),
    Case("shift of 2 sd", 2.0),
    Case("shift of -1 sd", -1.0),
    Case("5 % defects", share=0.05),
    Case("20 % defects", share=0.2),
    Case("5 % unknown products", share=0.05, novelty=True),
)


def main() -> None:
    """Simulate, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--data", type=Path)
    parser.add_argument("models", type=Path, nargs="*", help="folders that `unispect export` wrote")
    given = parser.parse_args()
    start = time.process_time()
    found = {
        "run_length": run_lengths(given.runs),
        "baselines": {name: baseline_rates(law, given.runs) for name, law in LAWS.items()},
        "delay": {name: delays(law, given.runs) for name, law in LAWS.items()},
        "told": {case.name: told(case, max(10, given.runs // 5)) for case in CASES},
        "real": [real(model, read_data(given.data)) for model in given.models],
        "minutes": (time.process_time() - start) / 60,
        "runs": given.runs,
    }
    about = environment()
    RESULTS.with_suffix(".json").write_text(json.dumps(found | about, indent=1) + "\n", "utf-8")
    RESULTS.write_text(page(found, about), "utf-8")
    print(RESULTS.read_text("utf-8"))


# The monitor, many runs at once


class Family:
    """Charts of one measure in many runs: of all images and of each product. The statistics of decide.drift, vectorised."""

    def __init__(self, runs: int, weights: np.ndarray, threshold: float) -> None:
        self.weights, self.threshold = weights, threshold
        self.rises = {kind: np.zeros((runs, len(weights), bets(np.zeros(())).size)) for kind, bets in BETS.items()}

    def take(self, p: np.ndarray, product: int | None = None) -> np.ndarray:
        """P-values (runs,) of images of one product -> (runs,) alarms; where there is one, the family starts anew."""
        about = [0] if product is None else [0, product]
        alarm = np.zeros(len(p), bool)
        for kind, bets in BETS.items():
            says = (p > BULK) if kind == SHIFT else np.ones(len(p), bool)
            rises = (self.rises[kind][:, about] + says[:, None, None]) * bets(p)[:, None]
            self.rises[kind][:, about] = rises
            alarm |= (self.weights[about] * rises.mean(2) >= self.threshold).any(1)
        for rises in self.rises.values():
            rises[alarm] = 0
        return alarm


def ranked(pools: list[Ranks], values: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """P-values of values (runs, T), each run with its pool."""
    return np.array([[pool.p_value(value, draw) for value in row.tolist()] for pool, row in zip(pools, values, strict=True)])


def run_lengths(runs: int) -> list[dict[str, Any]]:
    """False alarms under no change, for promises of several lengths."""
    draw, rows = np.random.default_rng(0), []
    images = 40_000
    few = max(20, runs // 4)
    pools = [[Ranks(draw.normal(size=CALIBRATION).tolist(), MOST) for _ in range(few)] for _ in range(2)]
    p = np.array([ranked(one, draw.normal(size=(few, images)), draw) for one in pools])  # (2, few, images)
    for promised in (1000, RUN_LENGTH):
        rows.append(counted(p, promised, np.array([0.25]), None) | {"products": 1})
    p = draw.random((2, runs, images))
    order = np.repeat(np.arange(images // 50 + 1) % 15 + 1, 50)[:images]  # 15 products, in runs of 50 images
    weights = np.array([1 / 8] + [1 / 4] * 15)
    rows.append(counted(p, RUN_LENGTH, weights, order) | {"products": 15})
    return rows


def counted(p: np.ndarray, promised: int, weights: np.ndarray, order: np.ndarray | None) -> dict[str, Any]:
    """Images to the first false alarm, and false alarms in as many images as are promised between two."""
    _, runs, images = p.shape
    families = Family(runs, weights, promised), Family(runs, weights[:1], promised)
    counts, first = np.zeros(runs), np.full(runs, images)
    for number in range(images):
        product = None if order is None else int(order[number])
        alarms = families[0].take(p[0, :, number], product).astype(int) + families[1].take(p[1, :, number])
        first = np.where((alarms > 0) & (counts == 0), number + 1, first)
        counts += alarms
    rate, quiet = counts * promised / images, counts == 0
    return {
        "promised": promised,
        "runs": runs,
        "first": float(first.sum() / max(1, (~quiet).sum())),  # of an exponential time, some of which end before it
        "first_error": float(first.sum() / max(1, (~quiet).sum()) ** 1.5),
        "alarms": float(rate.mean()),
        "alarms_error": float(rate.std(ddof=1) / np.sqrt(runs)),
    }


def delays(law: Law, runs: int) -> dict[str, dict[str, list[float]]]:
    """Case -> detector -> mean images to the alarm, its error, and the share of changes that were not found."""
    found: dict[str, dict[str, list[float]]] = {case.name: {} for case in CASES}
    for history in (500, 5000):
        for case, times in zip(CASES, monitor_delays(law, runs, history), strict=True):
            found[case.name][f"monitor, {history} good images before"] = summary(times)
    for name, detect in known(law).items():
        draw = np.random.default_rng(3)
        for case in CASES:
            before = law.draw(draw, (runs, 500))
            found[case.name][name] = summary(detect(np.concatenate((before, case.of(law, draw, (runs, LAST))), 1)) - 500)
    return found


def summary(times: np.ndarray) -> list[float]:
    """Of runs without a false alarm before the change; what is not found counts as found at the end."""
    kept = times[times > 0]
    return [float(kept.mean()), float(kept.std(ddof=1) / np.sqrt(len(kept))), float((kept >= LAST).mean())]


def monitor_delays(law: Law, runs: int, history: int) -> Iterator[np.ndarray]:
    """For each case, images from the change to the alarm in each run; 0 where there was an alarm before."""
    draw = np.random.default_rng(history)
    pools = [[Ranks(law.draw(draw, CALIBRATION).tolist(), MOST) for _ in range(runs)] for _ in range(2)]
    families = [Family(runs, np.array([0.25]), RUN_LENGTH) for _ in range(2)]
    early = np.zeros(runs, bool)
    for pool, family in zip(pools, families, strict=True):
        for p in ranked(pool, law.draw(draw, (runs, history)), draw).T:
            early |= family.take(p)
    for case in CASES:
        times = np.full((2, runs), LAST)
        for measure, (pool, family) in enumerate(zip(pools, families, strict=True)):
            changed = case if case.novelty == bool(measure) else Case("none")
            copies = [Ranks(one.values, MOST) for one in pool]
            times[measure] = first_alarm(copies, family, changed, law, draw)
        yield np.where(early, 0, times.min(0))


def first_alarm(pools: list[Ranks], family: Family, case: Case, law: Law, draw: np.random.Generator) -> np.ndarray:
    """Images from the change to the alarm in each run. The statistics of the family are left as they are."""
    here = Family(len(pools), family.weights, family.threshold)
    here.rises = {kind: rises.copy() for kind, rises in family.rises.items()}
    times = np.full(len(pools), LAST)
    for start in range(0, LAST, 100):
        waiting = np.flatnonzero(times == LAST)
        if not len(waiting):
            break
        p = np.full((len(pools), 100), 0.5)
        p[waiting] = ranked([pools[run] for run in waiting], case.of(law, draw, (len(waiting), 100)), draw)
        for number, column in enumerate(p.T, start + 1):
            times = np.where(here.take(column) & (times == LAST), number, times)
    return times


# Baselines


def means(
    values: np.ndarray, weight: float, mean: float | np.ndarray, deviation: float | np.ndarray, limit: float = np.inf
) -> np.ndarray:
    """Values (runs, T) -> (runs, T / BATCH) of a chart of batch means in its standard deviations, two-sided.

    limit   from which on it starts anew
    """
    spread = np.sqrt(weight / (2 - weight))
    batches = (values.reshape(len(values), -1, BATCH).mean(2) - mean) / deviation * np.sqrt(BATCH)
    state, path = np.zeros(len(batches)), np.empty_like(batches)
    for number in range(batches.shape[1]):
        state = (1 - weight) * state + weight * batches[:, number]
        path[:, number] = np.abs(state) / spread
        state[path[:, number] >= limit] = 0
    return path


def distances(values: np.ndarray, cdf: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Values (runs, T) -> (runs, T / BATCH) of the Kolmogorov-Smirnov distance of each window to a distribution."""
    u = cdf(values)
    path = np.zeros((len(values), values.shape[1] // BATCH))
    steps = np.arange(WINDOW + 1) / WINDOW
    for number in range(WINDOW // BATCH - 1, path.shape[1]):
        window = np.sort(u[:, (number + 1) * BATCH - WINDOW : (number + 1) * BATCH], 1)
        path[:, number] = np.maximum(steps[1:] - window, window - steps[:-1]).max(1)
    return path


def passed(path: np.ndarray, limit: float) -> np.ndarray:
    """The image at which each path is at the limit first; past the end where it never is."""
    high = path >= limit
    return np.where(high.any(1), (high.argmax(1) + 1) * BATCH, path.shape[1] * BATCH)


def limit_for(path: np.ndarray, run_length: float) -> float:
    """The limit with this mean run length, by bisection."""
    low, high = 0.0, float(path.max())
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if passed(path, middle).mean() < run_length else (low, middle)
    return high


def paths(law: Law) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Baselines that know the distribution."""
    charts = {
        name: (lambda values, weight=weight: means(values, weight, law.mean, law.deviation))
        for name, weight in WEIGHTS.items()
    }
    return charts | {"KS window": lambda values: distances(values, law.cdf)}


def known(law: Law) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Baselines that know the distribution, at limits that give them the run length: values -> times."""
    detectors = {}
    for name, path in paths(law).items():
        limit = limit_for(path(law.draw(np.random.default_rng(1), (400, 10 * RUN_LENGTH))), RUN_LENGTH)
        detectors[name] = lambda values, path=path, limit=limit: passed(path(values), limit)
    return detectors


def baseline_rates(law: Law, runs: int) -> dict[str, list[float]]:
    """With 200 calibration images and textbook limits: false alarms in 10 000 images, mean, error, 90th percentile."""
    draw = np.random.default_rng(2)
    images = 20_000
    calibration, values = law.draw(draw, (runs, CALIBRATION)), law.draw(draw, (runs, images))
    mean, deviation = calibration.mean(1, keepdims=True), calibration.std(1, ddof=1, keepdims=True)
    counts = {
        name: (means(values, weight, mean, deviation, LIMITS[name]) >= LIMITS[name]).sum(1)
        for name, weight in WEIGHTS.items()
    }
    # c(alpha) sqrt((n + m) / (n m)) with c = sqrt(-ln(alpha / 2) / 2), one window in RUN_LENGTH / BATCH
    c = np.sqrt(-np.log(BATCH / RUN_LENGTH / 2) / 2)
    limit = c * np.sqrt((CALIBRATION + WINDOW) / (CALIBRATION * WINDOW))
    both = zip(values, calibration, strict=True)
    counts["KS window"] = np.array([separate(two_samples(row, one) >= limit) for row, one in both])
    rates = {name: one * 10_000 / images for name, one in counts.items()}
    return {
        name: [float(one.mean()), float(one.std(ddof=1) / np.sqrt(runs)), float(np.quantile(one, 0.9))]
        for name, one in rates.items()
    }


def two_samples(values: np.ndarray, calibration: np.ndarray) -> np.ndarray:
    """Values (T,) -> (T / BATCH,) two-sample Kolmogorov-Smirnov distances of windows to the calibration images."""
    ordered, n = np.sort(calibration), len(calibration)
    path = np.zeros(len(values) // BATCH)
    for number in range(WINDOW // BATCH - 1, len(path)):
        window = np.sort(values[(number + 1) * BATCH - WINDOW : (number + 1) * BATCH])
        both = np.concatenate((ordered, window))
        gap = np.searchsorted(ordered, both, "right") / n - np.searchsorted(window, both, "right") / WINDOW
        path[number] = np.abs(gap).max()
    return path


def separate(high: np.ndarray) -> int:
    """Alarms of a run (batches,) of windows, where after each the next is a whole window later."""
    count, free = 0, 0
    for number in np.flatnonzero(high):
        if number >= free:
            count, free = count + 1, number + WINDOW // BATCH
    return count


# What is told


def told(case: Case, runs: int) -> dict[str, float]:
    """Kinds of first alarms of the monitor itself, shares: two products on scales of their own, 300 good images before."""
    law, kinds = LAWS["normal"], Counter()
    for seed in range(runs):
        draw = np.random.default_rng(1000 + seed)
        names = tuple("ab"[number % 2] for number in range(CALIBRATION))
        offset = np.array([30.0 * (name == "b") for name in names])
        scores, novelty = draw.normal(size=(2, CALIBRATION)) + offset
        calibration = Calibration(scores, scores, scores, novelty, names)
        kinds[first_kind(Monitor(calibration, DecisionSettings(), RUN_LENGTH, seed), case, law, draw)] += 1
    return {kind: count / runs for kind, count in kinds.most_common()}


def first_kind(monitor: Monitor, case: Case, law: Law, draw: np.random.Generator) -> str:
    strangers, images = ConformalRule(monitor.calibration.novelty), ConformalRule(monitor.calibration.scores)
    for number in range(300 + LAST):
        good = number < 300
        score, novelty = (
            float(law.draw(draw, ()) if good or case.novelty == (measure == 0) else case.of(law, draw, ()))
            for measure in (0, 1)
        )
        product = "ab"[int(draw.integers(2))]
        score, novelty = score + 30.0 * (product == "b"), novelty + 30.0 * (product == "b")
        novelty += 60.0 if novelty - 30.0 * (product == "b") > FAR - 2 else 0.0  # unlike both products
        said = {"score": score, "p_value": images.p_value(score), "unknown_p_value": strangers.p_value(novelty)}
        for alarm in monitor.take(said | {"nearest": product}):
            return "false alarm" if good else alarm.kind
    return "none"


# Real images


def real(model: Path, records: Sequence[Record]) -> dict[str, Any]:
    """Alarms on good test images in the order of products, and how soon 30 % of defective ones among them are noticed."""
    inspector = Runtime.load(model)
    test = [record for record in records if record.split == "test"]
    said = [(record.label, found.as_dict()) for record, found in inspector.findings(test, strict=True)]
    good, bad = ([finding for label, finding in said if bool(label) == defective] for defective in (False, True))
    calibration, decision = read_calibration(model)
    nameless = replace(calibration, products=(None,) * len(calibration.products))
    return {
        "model": f"{inspector.about['method']}, {len(calibration.scores)} calibration images",
        "images": len(good),
        "alarms": len(alarms(Monitor(calibration, decision, REAL_LENGTH, 0), good)),
        "pooled": len(alarms(Monitor(nameless, decision, REAL_LENGTH, 0), good)),
        "bursts": [burst(Monitor(calibration, decision, REAL_LENGTH, seed), good, bad, seed) for seed in range(20)],
    }


def alarms(monitor: Monitor, findings: Sequence[dict[str, Any]]) -> list[int]:
    return [alarm.at for finding in findings for alarm in monitor.take(finding)]


def burst(monitor: Monitor, good: Sequence[dict[str, Any]], bad: Sequence[dict[str, Any]], seed: int) -> int | None:
    """Images to an alarm from the 201st good one in random order on; 30 % of those are replaced by defective ones."""
    draw = np.random.default_rng(seed)
    order = [good[place] for place in draw.permutation(len(good))]
    mixed = [
        bad[draw.integers(len(bad))] if place >= 200 and draw.random() < 0.3 else one for place, one in enumerate(order)
    ]
    return next((at - 200 for at in alarms(monitor, mixed) if at > 200), None)


# The page


HEAD = f"""\
# What a monitor of findings notices, and what it raises in vain

Command: `python benchmarks/drift.py`

Drawn scores and novelty, {CALIBRATION} calibration images. `unispect monitor` has four charts here (shift and tail,
of scores and of novelty), or 34 with 15 products. ± is one standard error of the simulation.

## No change

| promised: images to a false alarm, at least | products | to the first | alarms in as many images (at most 1) |
| ---: | ---: | ---: | ---: |
"""
TEXTBOOK = f"""
One product: ranks of normal scores among {CALIBRATION} calibration images and a stream of 40 000, thinned at {MOST};
other continuous distributions have the same ranks. 15 products: uniform p-values, products in runs of 50 images.

The baselines at textbook limits for {RUN_LENGTH} images, told nothing but the {CALIBRATION} calibration images; false
alarms in 10 000 images, mean, and what one calibration set in ten has or exceeds:

| baseline | normal | lognormal |
| --- | ---: | ---: |
"""
CHANGE = f"""
Shewhart and EWMA (weight 0.2): means of batches of {BATCH} images, limits 3.023 and 2.962 standard deviations. KS
window: the last {WINDOW} scores against the calibration images after every batch, limit for one test in 400.

## A change

Mean images from the change to the alarm; one detector a column. The monitor has {CALIBRATION} calibration images and
has seen 500 or 5000 good images. The baselines **know the distribution**, and simulation gave them limits with
{RUN_LENGTH} images to a false alarm; they look after batches, so at {BATCH} images at the earliest; before the change
they saw 500 images. Defects and unknown products lie {FAR:g} standard deviations higher; for unknown products the
baselines look at novelty. In brackets: not found in {LAST} images, counted as {LAST}.
"""
TOLD = """
## What the first alarm was told as

`unispect.monitor.Monitor` itself, {} runs, two products, normal scores, 300 good images before.

"""
REAL = f"""
## Real images

Command: `python benchmarks/drift.py --data ../shared/realdata MODEL ...`, exported models of benchmarks/speed.py. Run
length {REAL_LENGTH}. Good test images of eleven products, product by product: alarms of the monitor, and of the same
monitor told no names, so that all products are one group. Then the same images in random order, 20 times, where from
the 201st on 30 % are defective ones: how often that is noticed within the 185 images that are left, and when.

| model | good images | alarms | alarms in one group | defects noticed | after, median |
| --- | ---: | ---: | ---: | ---: | ---: |
"""
KINDS = ("shift", "tail", "unknown", "false alarm", "none")


def page(found: dict[str, Any], about: dict[str, Any]) -> str:
    """The results as Markdown."""
    rates = found["baselines"]
    text = HEAD + table(
        [
            row["promised"],
            row["products"],
            *(both(row[name], row[f"{name}_error"], n) for name, n in (("first", 0), ("alarms", 2))),
        ]
        for row in found["run_length"]
    )
    text += TEXTBOOK + table([name, *(rate(rates[law][name]) for law in LAWS)] for name in rates["normal"])
    text += CHANGE
    for law, cases in found["delay"].items():
        names = list(next(iter(cases.values())))
        text += f"\n**{law}**\n\n| | {' | '.join(names)} |\n| --- |" + " ---: |" * len(names) + "\n"
        text += table([case, *(delay(row[name]) for name in names)] for case, row in cases.items())
    text += TOLD.format(max(10, found["runs"] // 5))
    text += f"| | {' | '.join(KINDS)} |\n| --- |" + " ---: |" * len(KINDS) + "\n"
    text += table([case, *(f"{row.get(kind, 0):.0%}" for kind in KINDS)] for case, row in found["told"].items())
    text += REAL + table(real_row(row) for row in found["real"]) if found["real"] else ""
    text += f"\nRuns: {found['runs']}. {found['minutes']:.1f} minutes of one core.  \n"
    return text + f"Machine: {about['machine']}  \nVersions: {about['versions']}\n"


def real_row(row: dict[str, Any]) -> list[Any]:
    found = sorted(one for one in row["bursts"] if one is not None)
    middle = f"{np.median(found):.0f} images" if found else "-"
    return [row["model"], row["images"], row["alarms"], row["pooled"], f"{len(found)} of {len(row['bursts'])}", middle]


def table(rows: Iterable[list[Any]]) -> str:
    """Rows of a table in Markdown."""
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


def both(value: float, error: float, digits: int) -> str:
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def rate(numbers: list[float]) -> str:
    mean, error, high = numbers
    return f"{mean:.2f} ± {error:.2f}; {high:.1f}"


def delay(numbers: list[float]) -> str:
    mean, error, missed = numbers
    return f"{mean:.0f} ± {error:.0f}" + (f" ({missed:.0%})" if missed else "")


if __name__ == "__main__":
    main()
