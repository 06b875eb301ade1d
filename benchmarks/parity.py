"""How far exported models are from eager torch, every method under every aligner: `python benchmarks/parity.py`.

Models are learnt on three built-in products with few steps: compared are two ways to compute the same, not how good it is.
Every number is the largest difference over calibration images and drawn ones, in the units of export.parity.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unispect import Inspector, write_products
from unispect.align.aligners import ALIGNERS
from unispect.benchmark import environment
from unispect.detectors.base import GradientDetector
from unispect.detectors.methods import METHODS
from unispect.errors import ExportError
from unispect.export.bundle import EXPORTERS, export
from unispect.export.parity import PREPARED, RAW, Parity

OUT = Path(__file__).parent / "results" / "parity.md"
PRODUCTS, IMAGES, SIDE, STEPS = ["fabric", "gear", "wood"], 30, 128, 6
HEAD = (
    "| method | aligner | exported to | score | map | product | novelty | where the graph resizes | file, MiB | export, s |"
)


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="*", default=sorted(METHODS), help="instead of all")
    parser.add_argument("--aligners", nargs="*", default=["none", *ALIGNERS], help="instead of all")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = write_products(Path(folder) / "data", IMAGES, 1, 1, SIDE, products=PRODUCTS)
        lines = [line for method in chosen.methods for line in rows(method, chosen.aligners, data, Path(folder))]
    about = environment()
    end = ["", f"Machine: {about['machine']}  ", f"Versions: {about['versions']}", ""]
    OUT.write_text("\n".join([*head(), *lines, *end]), "utf-8")
    print(OUT.read_text("utf-8"))


def head() -> list[str]:
    """What stands above the rows."""
    return [
        "# Exported models against torch",
        "",
        f"Command: `{' '.join(['python benchmarks/parity.py', *sys.argv[1:]])}`",
        "",
        "Largest difference between an exported model and eager torch over calibration images and drawn ones, alone "
        "and several at once. Of scores and novelty in standard deviations of calibration images, of maps in units of a "
        "finding's map, and relative to the value itself where that is larger; of products it is a probability. An export "
        f"whose difference is above {PREPARED:g}, or above {RAW:g} where the graph resizes images itself (some values are "
        "rounded to the neighbouring grey level), fails and writes nothing. Three built-in products, Lite0 at "
        f"{SIDE} px, {STEPS} training steps, seed 0.",
        "",
        HEAD,
        "| --- | --- | --- |" + " ---: |" * 7,
    ]


def rows(method: str, aligners: Sequence[str], data: Path, folder: Path) -> Iterator[str]:
    """Of a method under some aligners."""
    for aligner in aligners:
        inspector = Inspector.fit(data, settings(method, aligner))
        for to in EXPORTERS:
            place, start = folder / f"{method}-{aligner}-{to}", time.perf_counter()
            try:
                found = export(inspector, place, to)
            except ExportError as error:
                yield f"| {method} | {aligner} | {to} | {error} |"
                continue
            seconds = time.perf_counter() - start
            size = sum(file.stat().st_size for file in place.glob("model.*")) / 2**20
            print(method, aligner, to, found, flush=True)
            yield row(f"| {method} | {aligner} | {to} |", found.parity) + f" {size:.1f} | {seconds:.0f} |"


def settings(method: str, aligner: str) -> dict[str, Any]:
    """Small ones."""
    table: dict[str, Any] = {"method": method, "aligner": aligner, "preparation": {"size": SIDE}}
    table |= {"decision": {"false_alarm_rate": 0.1}}
    if issubclass(METHODS[method], GradientDetector):
        table["training"] = {"steps": STEPS, "images": 4, "checks": 1}
    return table


def row(start: str, found: Parity) -> str:
    """The numbers of an export."""
    numbers = [
        f"{found.prepared[name]:.1e}" if name in found.prepared else "–" for name in ("score", "map", "product", "novelty")
    ]
    return f"{start} {' | '.join(numbers)} | {max(found.raw.values()):.1e} |"


if __name__ == "__main__":
    main()
