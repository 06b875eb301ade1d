"""The whole line on the built-in products: draw, fit, evaluate, report. Needs no data and no network."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unispect.data.factory import write_products
from unispect.errors import DataError
from unispect.evaluation import Evaluation, evaluate
from unispect.features.cache import FeatureCache
from unispect.inspector import Inspector
from unispect.report.results import provenance, write_results

MARK = ".made-by-unispect-demo"
Progress = Callable[[str, int, int, dict[str, float]], None]


@dataclass(frozen=True, slots=True)
class Size:
    """How much is drawn of each of the six products: good ones, bad ones of each kind of defect, side in pixels.

    The default share for calibration makes 130 train images six times 18, enough to promise a rate of 0.01.
    """

    train: int = 130
    good: int = 40
    bad: int = 8
    side: int = 256

    def settings(self) -> dict[str, Any]:
        """What a model of such images needs besides the defaults: fewer steps where there is little to learn."""
        small = {"training": {"steps": 10}, "hgad": {"map_side": self.side}}
        return {"preparation": {"size": self.side}} | (small if self.side < 256 else {})


FULL, QUICK = Size(), Size(train=20, good=4, bad=1, side=64)


@dataclass(frozen=True, slots=True, eq=False)
class Demo:
    """What a run left: the model's evaluation, and where the report and the model are."""

    evaluation: Evaluation
    report: Path
    model: Path


def demo(
    out: Path, false_alarm_rate: float = 0.01, seed: int = 0, size: Size = FULL, progress: Progress | None = None
) -> Demo:
    """Draw the products, learn them, and measure what was learnt on test images that fit has not seen.

    out        folder for data/, cache/, model/, report.html, evaluation.json and table.txt; an older demo in it goes
    progress   called with a stage, steps done, steps in all and losses

    Raises DataError where out/data holds something else.
    """
    tell = progress or (lambda stage, done, total, losses: None)
    again = _clear(out / "data")
    tell("drawing products", 0, 1, {})
    write_products(out / "data", size.train, size.good, size.bad, size.side, seed)
    tell("drawing products", 1, 1, {})
    config = size.settings() | {"seed": seed, "decision": {"false_alarm_rate": false_alarm_rate}}
    inspector = Inspector.fit(out / "data", config, cache=FeatureCache(out / "cache"), progress=progress)
    model = inspector.save(out / "model", overwrite=again)
    evaluation = evaluate(inspector, out / "data", progress=lambda done, total: tell("evaluating", done, total, {}))
    facts = provenance(inspector, f"unispect demo --seed {seed} --false-alarm-rate {false_alarm_rate}")
    report = write_results(evaluation, out, "unispect on its built-in products", facts)
    return Demo(evaluation, report, model)


def _clear(data: Path) -> bool:
    """Remove the pictures of an older demo and mark the folder as ours; True where there were any."""
    again = (data / MARK).is_file()
    if data.exists() and not again and any(data.iterdir()):
        raise DataError(f"{data}: holds files that no demo has made, which are left alone: choose another -o")
    if again:
        shutil.rmtree(data)
    data.mkdir(parents=True, exist_ok=True)
    (data / MARK).touch()
    return again
