"""A product never seen, on real data: each product in turn is left out of learning, then shown.

    python benchmarks/unknown.py ../shared/realdata

Good test images of the product that was left out are to be called unknown, those of the products that were learnt not. The
detector has no say in it: models are fitted with `opca`, the quickest, on the features of the default method.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unispect.benchmark import environment
from unispect.data.datasets import read_data
from unispect.data.records import Record
from unispect.features.cache import FeatureCache
from unispect.inspector import Inspector, complete
from unispect.metrics.ranking import auroc
from unispect.types import Finding

RESULTS = Path(__file__).parent / "results" / "unknown.md"
KINDS = ("left out", "good", "defective")
HEAD = "| left out | AUROC | called unknown | known good ones, called unknown | known defective ones, called unknown |"


def main() -> None:
    """Fit without each product, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--cache", type=Path, help="folder of features; a temporary one unless given")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(given.cache or Path(folder))
        rows = table(read_data(given.data), cache, given.seed)
    RESULTS.write_text(text(rows, given.seed), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


def table(records: Sequence[Record], cache: FeatureCache, seed: int) -> list[tuple[str, list[float]]]:
    """A row for each product."""
    config = settings(seed)
    return [(name, row(records, name, config, cache)) for name in sorted({str(record.product) for record in records})]


def settings(seed: int) -> dict[str, Any]:
    """The features of the default method under the quickest one."""
    return {"method": "opca", "seed": seed, "features": complete(None)["features"]}


def row(records: Sequence[Record], left_out: str, config: dict[str, Any], cache: FeatureCache) -> list[float]:
    """AUROC of novelty, and shares that are called unknown."""
    inspector = Inspector.fit([record for record in records if record.product != left_out], config, cache=cache)
    test = [record for record in records if record.split == "test"]
    found = [(record, finding) for record, finding in inspector.findings(test) if isinstance(finding, Finding)]
    kinds = np.array([kind(record, left_out) for record, _ in found])
    strange = np.array([finding.unknown for _, finding in found])
    novelty = np.array([-finding.unknown_p_value for _, finding in found])
    chosen = np.isin(kinds, KINDS[:2])
    return [auroc(novelty[chosen], kinds[chosen] == "left out"), *(float(strange[kinds == one].mean()) for one in KINDS)]


def kind(record: Record, left_out: str) -> str:
    """What an image is to a model without a product."""
    if record.product == left_out:
        return "left out" if not record.label else "left out, defective"
    return "defective" if record.label else "good"


def text(rows: Sequence[tuple[str, list[float]]], seed: int) -> str:
    """The page."""
    shown = [*rows, ("mean", np.mean([numbers for _, numbers in rows], axis=0).tolist())]
    about = environment()
    lines = [
        "# A product never seen",
        "",
        "Command: `python benchmarks/unknown.py ../shared/realdata`",
        "",
        "Each product in turn is left out of learning, then shown. AUROC: good test images of the product left out against "
        "good ones of the others, by the p-value that a finding has. At most 1 % of good images of known products are "
        f"promised to be called unknown. Seed {seed}.",
        "",
        HEAD,
        "| --- | ---: | ---: | ---: | ---: |",
        *(f"| {name} | {first:.4f} | {' | '.join(f'{share:.1%}' for share in rest)} |" for name, (first, *rest) in shown),
        "",
        f"Machine: {about['machine']}  ",
        f"Versions: {about['versions']}",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
