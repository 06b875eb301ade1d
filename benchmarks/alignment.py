"""What aligners give, detector by detector, from the cells of benchmarks: `python benchmarks/alignment.py`.

Reads the results of grids whose methods are X, X-cada-b and X-cada, or some of them, at one seed on one backbone, and writes
results/alignment.md. It measures nothing itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
GRIDS = ("cada-regressor", "cada", "cada-pixels", "cada-draem", "flows")  # where two have the same cell, the first counts
COLUMNS = ("image_auroc", "image_ap", "pixel_ap")
FEW = 0.02  # gaps up to this are not judged
HEAD = (
    "| detector | aligner | image AUROC, mean | pooled | of the gap closed | image AP, mean | pooled | "
    "pixel AP, mean | pooled | found | false alarms |"
)


def main() -> None:
    """Write the page."""
    cells: dict[str, Any] = {}
    for name in GRIDS:
        file = RESULTS / f"{name}.json"
        found = json.loads(file.read_text("utf-8"))["cells"] if file.is_file() else []
        for cell in found:
            about = cell["cell"]
            if cell["status"] == "done" and about["backbone"] == "lite0-256" and about["seed"] == 0:
                cells.setdefault(about["method"], cell["evaluation"])
    out = RESULTS / "alignment.md"
    out.write_text(page(cells), "utf-8")
    print(out.read_text("utf-8"))


def page(cells: Mapping[str, Any]) -> str:
    """The digest as Markdown."""
    bases = sorted(method for method in cells if {f"{method}-cada", f"{method}-cada-b"} <= cells.keys())
    return "\n".join(
        [
            "# What aligners give, detector by detector",
            "",
            f"From {', '.join(f'[{name}]({name}.md)' for name in GRIDS)} (Lite0 at 256 px, seed 0), by `python "
            "benchmarks/alignment.py`.",
            "",
            "Closed: the share of the gap between the mean over products and the pooled image AUROC, both without an "
            "aligner, that the pooled figure gains; of gaps up to two points nothing is said. CaDA-A is told the product of "
            "each test image and not deployable (*). Found and false alarms: shares of the defective and of the good test "
            "images above the threshold, with 1 % of false alarms promised.",
            "",
            HEAD,
            "| --- | --- |" + " ---: |" * 9,
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
    return [*numbers[:2], closed(evaluation, raw), *numbers[2:], *alarms(evaluation)]


def alarms(evaluation: Mapping[str, Any]) -> tuple[str, str]:
    """Shares of defective and of good test images that raised an alarm; CaDA-A has no threshold."""
    if "detection_rate" not in evaluation:
        return "–", "–"
    return f"{evaluation['detection_rate']:.1%}", f"{evaluation['false_alarm_rate']['realised']:.1%}"


def closed(evaluation: Mapping[str, Any], raw: Mapping[str, Any]) -> str:
    """Share of the gap, or nothing where it is small or the line is the detector's own."""
    before, goal = raw["pooled"]["image_auroc"], raw["mean"]["image_auroc"]
    if evaluation is raw or goal - before <= FEW:
        return "–"
    return f"{(evaluation['pooled']['image_auroc'] - before) / (goal - before):.0%}"


if __name__ == "__main__":
    main()
