"""Regions on the built-in products: how often normal images have one, which are false, and which defects are found.

    python benchmarks/regions.py

One model for all six products, `opca`, the quickest method, on the features of the default one. A region is false where its
box touches no pixel of the image's mask; a defect, a connected part of the mask, is found where some box touches it. Only
regions that the promise speaks of count.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from unispect.benchmark import environment
from unispect.data.datasets import read_data
from unispect.data.factory import write_products
from unispect.data.loader import read_mask
from unispect.data.records import Record
from unispect.features.cache import FeatureCache
from unispect.inspector import Inspector, complete
from unispect.metrics.regions import components
from unispect.types import Finding

RESULTS = Path(__file__).parent / "results" / "regions.md"
ALARMS, FALSE = 0.05, 0.1  # promised
SIZES = (1, 16, 400)  # least pixels of a map of 256 x 256
HEAD = (
    "| rule | least area | good images with a region | false, of the regions of a defective image | defects found "
    "| regions an image |"
)


def main() -> None:
    """Draw, learn once for each least area, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=130, help="images of each product to learn from")
    parser.add_argument("--good", type=int, default=100, help="good test images of each product")
    parser.add_argument("--bad", type=int, default=8, help="test images of each product and kind of defect")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = write_products(Path(folder) / "data", given.train, given.good, given.bad, 256, given.seed)
        records, cache = read_data(data), FeatureCache(Path(folder) / "cache")
        rows = [row for least in SIZES for row in rows_of(records, least, cache, given.seed)]
    RESULTS.write_text(text(rows, records, given.seed), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


def rows_of(
    records: Sequence[Record], least: int, cache: FeatureCache, seed: int
) -> list[tuple[str, int, dict[str, float]]]:
    """Both rules under one least area."""
    decision = {"false_alarm_rate": ALARMS, "discovery_rate": FALSE, "min_area": least}
    config = {"method": "opca", "seed": seed, "features": complete(None)["features"], "decision": decision}
    inspector = Inspector.fit(records, config, cache=cache)
    test = [record for record in records if record.split == "test"]
    return [(rule, least, measured(under(inspector, rule), test)) for rule in ("family", "discovery")]


def under(inspector: Inspector, rule: str) -> Inspector:
    """The same model under a rule for regions."""
    decision = asdict(replace(inspector.decision, regions=rule))
    parts = inspector.engine, inspector.detector, inspector.aligner, inspector.novelty
    config: dict[str, Any] = inspector.config | {"decision": decision}
    return Inspector(config, inspector.products, *parts, inspector.calibration, inspector.split, inspector.facts)


def measured(inspector: Inspector, records: Sequence[Record]) -> dict[str, float]:
    """Means over images, and of defects over all."""
    alarms, shares, counts, found, defects = [], [], [], 0, 0
    for record, finding in inspector.findings(records):
        assert isinstance(finding, Finding)
        boxes = [np.s_[one.top : one.bottom, one.left : one.right] for one in finding.regions if one.promised]
        if not record.label:
            alarms.append(bool(boxes))
            continue
        assert record.mask is not None
        parts, number = components(read_mask(record.mask))
        touched = {int(part) for box in boxes for part in np.unique(parts[box]) if part}
        shares.append(sum(not parts[box].any() for box in boxes) / max(1, len(boxes)))
        counts.append(len(boxes))
        found, defects = found + len(touched), defects + number
    return {
        "alarms": float(np.mean(alarms)),
        "false": float(np.mean(shares)),
        "error": float(np.std(shares) / len(shares) ** 0.5),
        "found": found / defects,
        "regions": float(np.mean(counts)),
        "defects": float(defects),
    }


def text(rows: Sequence[tuple[str, int, dict[str, float]]], records: Sequence[Record], seed: int) -> str:
    """The page."""
    test, about = [record for record in records if record.split == "test"], environment()
    good, bad = sum(not record.label for record in test), sum(bool(record.label) for record in test)
    lines = [
        "# Regions on the built-in products",
        "",
        "Command: `python benchmarks/regions.py`",
        "",
        f"One `opca` model of six products; {good} good and {bad} defective test images with {int(rows[0][2]['defects'])} "
        f"defects. Promised: at most {ALARMS:.0%} of good images have a region, under either rule; under `discovery`, of "
        f"the regions of an image at most {FALSE:.0%} are false on average. Least area in pixels of the score map, "
        f"256 x 256. A region is false where its box touches no pixel of the mask. Seed {seed}.",
        "",
        HEAD,
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {rule} | {least} | {one['alarms']:.1%} | {one['false']:.1%} ± {one['error']:.1%} | {one['found']:.1%} "
            f"| {one['regions']:.2f} |"
            for rule, least, one in rows
        ),
        "",
        "± is one standard error over images.",
        "",
        f"Machine: {about['machine']}  ",
        f"Versions: {about['versions']}",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
