"""Whether promises are kept: 200 calibrations on the built-in products, on groups that differ, and on real data.

    python benchmarks/guarantee.py [--images 6000]

One model is fitted on the built-in products. It scores a pool of good images that it has not seen; each of 200 repetitions
draws calibration images from it and counts the alarms among all others. The groups are days: the same pool, each twenty
images under a light of their own. On real data nothing is fitted: the rates are those of the cells of results/*.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import betabinom

from unispect.benchmark import environment
from unispect.data.factory import PRODUCTS, draw, write_products
from unispect.decide.conformal import ConformalRule
from unispect.decide.groups import GroupRule
from unispect.decide.judge import Calibration, DecisionSettings, Rules
from unispect.features.cache import FeatureCache
from unispect.inspector import Inspector
from unispect.metrics.ranking import auroc
from unispect.types import Finding

RESULTS = Path(__file__).parent / "results"
ROUNDS, SIDE, DAY = 200, 128, 20  # repetitions, pixels, images of a day
SIZES = (50, 200, 1000)  # calibration images
RATES = (0.01, 0.02, 0.05, 0.10)
LIGHT = 0.08  # spread of the logarithm of a day's gain of each colour
SEEN = 100_000  # seeds of pictures from here on were not learnt from
DETECTORS = ("cada", "cada-regressor", "flows")  # grids whose cells tell what became of promises on realdata


def main() -> None:
    """Measure and write results/guarantee.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=6000, help="good images in the pool, a multiple of 20")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        inspector = fitted(Path(folder))
    pool = Pool(inspector, given.images)
    about = f"The pool: {given.images} good images of {len(PRODUCTS)} products, {SIDE} px. Seed 0."
    command = f"Command: `python benchmarks/guarantee.py --images {given.images}`"
    parts = ["# Promises and what became of them", command, about, bands(pool), groups(pool), products(pool), realdata()]
    machine = "  \n".join(f"{name.capitalize()}: {text}" for name, text in environment().items())
    (RESULTS / "guarantee.md").write_text("\n\n".join([*parts, machine]) + "\n", encoding="utf-8")
    print((RESULTS / "guarantee.md").read_text(encoding="utf-8"))


def fitted(folder: Path) -> Inspector:
    """OPCA-MVG on the built-in products, under CADA."""
    data = write_products(folder / "data", 100, 1, 0, SIDE)
    settings: dict[str, Any] = {"method": "opca", "aligner": "cada", "preparation": {"size": SIDE}}
    return Inspector.fit(data, settings | {"decision": {"false_alarm_rate": 0.05}}, cache=FeatureCache(folder / "cache"))


class Pool:
    """Scores of good images as they are and by days, of defective ones, and the product that each is taken for."""

    def __init__(self, inspector: Inspector, images: int) -> None:
        random, names = np.random.default_rng(0), list(PRODUCTS)
        self.scores, self.by_day = np.empty(images), np.empty(images)
        self.recognised: list[str | None] = []
        for place in range(images):
            if place % DAY == 0:
                gain = np.exp(random.normal(0, LIGHT, 3))
            picture = draw(names[place % len(names)], SEEN + place, None, SIDE)[0]
            found = self._found(inspector, picture)
            self.scores[place] = found.score
            self.recognised.append(found.nearest)
            lit = (picture * gain).clip(0, 255).round().astype(np.uint8)
            self.by_day[place] = self._found(inspector, lit).score
        self.day = np.arange(images) // DAY
        self.defective = np.array([self._found(inspector, picture).score for picture in _defective(images // 20)])

    @staticmethod
    def _found(inspector: Inspector, picture: np.ndarray) -> Finding:
        found = inspector.inspect(picture)
        assert isinstance(found, Finding)
        return found


def _defective(images: int) -> Sequence[np.ndarray]:
    """Pictures with a defect, each product and kind in turn."""
    kinds = [(name, kind) for name, product in PRODUCTS.items() for kind in product.defects]
    return [draw(*_kind(kinds, place), SIDE)[0] for place in range(images)]


def _kind(kinds: Sequence[tuple[str, str]], place: int) -> tuple[str, int, str]:
    name, kind = kinds[place % len(kinds)]
    return name, 2 * SEEN + place, kind


def bands(pool: Pool) -> str:
    """How often the realised rate lies in the band of its calibration set."""
    lines = [
        f"## Bands\n\n{ROUNDS} draws of n calibration images; the realised rate is that of all other images of the pool. "
        "The band is that of a rank among n and m further images (beta-binomial), which `band` has for m without end.",
        "",
        "| n | promised | realised, mean | in the 90 % band | in the 95 % band | standard error of these | threshold n/50 "
        "ranks too low: in the 95 % band |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for n in SIZES:
        for rate in RATES:
            if 1 / (n + 1) <= rate:
                lines.append(_band_row(pool, n, rate))
    return "\n".join(lines)


def _band_row(pool: Pool, n: int, rate: float) -> str:
    random, rest = np.random.default_rng(n), len(pool.scores) - n
    alarms, wrong = [], []
    for _ in range(ROUNDS):
        order = random.permutation(len(pool.scores))
        own, others = np.sort(pool.scores[order[:n]]), pool.scores[order[n:]]
        threshold = ConformalRule(own).threshold(rate)
        alarms.append(int((others > threshold).sum()))
        # What a bug would look like: whether this check can fail.
        wrong.append(int((others > own[max(0, int(np.searchsorted(own, threshold)) - max(1, n // 50))]).sum()))
    above = round(rate * (n + 1)) if round(rate * (n + 1)) / (n + 1) <= rate else round(rate * (n + 1)) - 1
    law = betabinom(rest, above, n + 1 - above)
    inside = [np.mean([law.ppf(t) <= one <= law.ppf(1 - t) for one in alarms]) for t in (0.05, 0.025)]
    false = np.mean([law.ppf(0.025) <= one <= law.ppf(0.975) for one in wrong])
    error = np.sqrt(0.05 * 0.95 / ROUNDS)
    shares = " | ".join(f"{share:.1%}" for share in (*inside, error, false))
    return f"| {n} | {rate:.0%} | {np.mean(alarms) / rest:.2%} | {shares} |"


def groups(pool: Pool) -> str:
    """Calibrated on some days, judged on others: image by image and by whole days."""
    lines = [
        f"## Days\n\nEach day has {DAY} images under a light of its own (gain of each colour, spread {LIGHT:.0%}). {ROUNDS} "
        "draws of days to calibrate on; the realised rate is that of all other days. Found: share of defective images, "
        "which have the light of no day.",
        "",
        "| days | images | promised | by image: realised, mean | worst tenth of draws | in the 95 % band | found | by day: "
        "realised, mean | worst tenth of draws | found |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for days, rate in ((5, 0.05), (10, 0.10), (20, 0.05), (50, 0.02), (100, 0.01)):
        lines.append(_day_row(pool, days, rate))
    return "\n".join(lines)


def _day_row(pool: Pool, days: int, rate: float) -> str:
    random, every = np.random.default_rng(days), np.unique(pool.day)
    rates: dict[str, list[float]] = {"image": [], "day": []}
    found: dict[str, list[float]] = {"image": [], "day": []}
    inside = []
    for _ in range(ROUNDS):
        own = np.isin(pool.day, random.choice(every, days, replace=False))
        scores, others = pool.by_day[own], pool.by_day[~own]
        thresholds = {"image": ConformalRule(scores).threshold(rate)}
        if 1 / (days + 1) <= rate:
            by_day = GroupRule(scores, [str(day) for day in pool.day[own]]).threshold(rate)
            thresholds["day"] = max(by_day, thresholds["image"])
        for kind, threshold in thresholds.items():
            rates[kind].append(float((others > threshold).mean()))
            found[kind].append(float((pool.defective > threshold).mean()))
        above = int(rate * (len(scores) + 1) + 1e-9)
        law = betabinom(len(others), above, len(scores) + 1 - above)
        inside.append(law.ppf(0.025) <= (others > thresholds["image"]).sum() <= law.ppf(0.975))
    cells = [f"{days}", f"{days * DAY}", f"{rate:.0%}", *_told(rates["image"]), f"{np.mean(inside):.1%}"]
    cells += [f"{np.mean(found['image']):.1%}", *_told(rates["day"])]
    cells.append(f"{np.mean(found['day']):.1%}" if found["day"] else f"refused: {int(np.ceil(1 / rate)) - 1} days needed")
    return f"| {' | '.join(cells)} |"


def _told(rates: Sequence[float]) -> tuple[str, str]:
    return (f"{np.mean(rates):.2%}", f"{np.quantile(rates, 0.9):.2%}") if rates else ("–", "–")


def products(pool: Pool, n: int = 600, rate: float = 0.05) -> str:
    """Each product's realised rate under one threshold and under one of its own, by the product that it is taken for."""
    names, random = sorted(PRODUCTS), np.random.default_rng(1)
    true = np.array([list(PRODUCTS)[place % len(PRODUCTS)] for place in range(len(pool.scores))])
    rates: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in names} for kind in ("image", "product")}
    for _ in range(ROUNDS):
        order = random.permutation(len(pool.scores))
        own, others = order[:n], order[n:]
        taken = tuple(pool.recognised[place] for place in own)
        nobody = (None,) * n
        scores = pool.scores[own]
        known = Calibration(scores, scores, scores, scores, nobody, nobody, taken)
        for kind, told in rates.items():
            rules = Rules(scores, known, DecisionSettings(rate, guarantee=kind))
            thresholds = {name: rules.of(name).threshold(rate) for name in {*pool.recognised}}
            alarm = np.array([pool.scores[place] > thresholds[pool.recognised[place]] for place in others])
            for name in names:
                told[name].append(float(alarm[true[others] == name].mean()))
    right = np.mean([one == other for one, other in zip(true, pool.recognised, strict=True)])
    labels = np.arange(len(pool.scores) + len(pool.defective)) >= len(pool.scores)
    lines = [
        f"## Products\n\nn = {n}, {rate:.0%} promised, mean of {ROUNDS} draws; products are told by the model's own "
        f"recognition, which is right for {right:.1%} of these images. Image AUROC against defective images: "
        f"{auroc(np.concatenate([pool.scores, pool.defective]), labels):.3f}.",
        "",
        f"| guarantee | {' | '.join(names)} |",
        "| --- |" + " ---: |" * len(names),
    ]
    lines += [f"| {kind} | {' | '.join(f'{np.mean(told[name]):.2%}' for name in names)} |" for kind, told in rates.items()]
    return "\n".join(lines)


def realdata() -> str:
    """Promised and realised rates of every detector on realdata, from cells that other benchmarks have measured."""
    sources = ", ".join(f"[{name}]({name}.md)" for name in DETECTORS)
    lines = [
        "## Real data\n\nEleven real products, 385 good test images, seed 0, Lite0 at 256 px: realised rate at each "
        f"promised one, with its exact 95 % interval at 1 %. From {sources}.",
        "",
        "| detector | 1 % | its interval | 2 % | 5 % | 10 % |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    seen = set()
    for grid in DETECTORS:
        for cell in json.loads((RESULTS / f"{grid}.json").read_text("utf-8"))["cells"]:
            about = cell["cell"]
            if cell["status"] != "done" or about["backbone"] != "lite0-256" or about["seed"] or about["method"] in seen:
                continue
            seen.add(about["method"])
            told = cell["evaluation"]["calibration"]
            curve = {round(promised, 3): realised for promised, realised in told["curve"]}
            realised = [f"{curve[rate]:.1%}" if rate in curve else "–" for rate in RATES]
            interval = f"{told['low']:.1%} to {told['high']:.1%}"
            lines.append(f"| {about['method']} | {realised[0]} | {interval} | {' | '.join(realised[1:])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
