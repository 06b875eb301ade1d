"""What aligners give, detector by detector, from the cells of a benchmark: `python benchmarks/alignment.py`.

Reads results/NAME.json of a grid whose methods are X, X-cada-b and X-cada and writes results/NAME-digest.md. It measures
nothing itself.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("image_auroc", "image_ap", "pixel_ap")
FEW = 0.02  # gaps up to this are not judged
HEAD = (
    "| detector | aligner | image AUROC, mean | pooled | of the gap closed | image AP, mean | pooled | "
    "pixel AP, mean | pooled |"
)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="cada")
    name = parser.parse_args().name
    found = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    cells = {cell["cell"]["method"]: cell["evaluation"] for cell in found["cells"] if cell["status"] == "done"}
    out = RESULTS / f"{name}-digest.md"
    out.write_text(page(name, cells), "utf-8")
    print(out.read_text("utf-8"))


def page(name: str, cells: Mapping[str, Any]) -> str:
    """The digest as Markdown."""
    bases = [method for method in cells if f"{method}-cada" in cells]
    return "\n".join(
        [
            "# What aligners give, detector by detector",
            "",
            f"From [{name}.json]({name}.json) by `python benchmarks/alignment.py`; measured as [{name}.md]({name}.md) says.",
            "",
            "Closed: the share of the gap between the mean over products and the pooled image AUROC, both without an "
            "aligner, that the pooled figure gains; of gaps up to two points nothing is said. CaDA-A is told the product of "
            "each test image and not deployable (*).",
            "",
            HEAD,
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            *(line for base in bases for line in rows(base, cells)),
            "",
        ]
    )


def rows(base: str, cells: Mapping[str, Any]) -> list[str]:
    """Of one detector: as it is, and under each aligner."""
    raw = cells[base]
    given = cells[f"{base}-cada-b"]["comparisons"]["label given"]
    shown = {"none": raw, "CaDA-A*": given, "CaDA-B": cells[f"{base}-cada-b"], "CADA": cells[f"{base}-cada"]}
    return [f"| {base} | {name} | {' | '.join(row(evaluation, raw))} |" for name, evaluation in shown.items()]


def row(evaluation: Mapping[str, Any], raw: Mapping[str, Any]) -> list[str]:
    """The columns of one line."""
    mean, pooled = evaluation["mean"], evaluation["pooled"]
    numbers = [f"{part[column]:.3f}" for column in COLUMNS for part in (mean, pooled)]
    return [*numbers[:2], closed(evaluation, raw), *numbers[2:]]


def closed(evaluation: Mapping[str, Any], raw: Mapping[str, Any]) -> str:
    """Share of the gap, or nothing where it is small or the line is the detector's own."""
    before, goal = raw["pooled"]["image_auroc"], raw["mean"]["image_auroc"]
    if evaluation is raw or goal - before <= FEW:
        return "–"
    return f"{(evaluation['pooled']['image_auroc'] - before) / (goal - before):.0%}"


if __name__ == "__main__":
    main()
