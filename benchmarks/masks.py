"""Masks on the built-in products: what a defect does where nobody looks, at the edge, and beside it.

    python benchmarks/masks.py

Two models of all six products, `opca` on the features of the default method, one with a mask of 96 x 96 pixels in the middle
of every product. Into good test images of 256 x 256 pixels a patch of 48 x 48 of another product's image is put.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from unispect.benchmark import environment
from unispect.data.datasets import read_data
from unispect.data.factory import write_products
from unispect.data.loader import decode
from unispect.features.cache import FeatureCache
from unispect.inspector import Inspector, complete
from unispect.types import Finding

RESULTS = Path(__file__).parent / "results" / "masks.md"
SIDE, LEFT, RIGHT, PATCH, ALARMS = 256, 80, 176, 48, 0.05
PLACES = {"none": None, "well inside": 104, "inside, up to the edge": 80, "half across the edge": 56, "beside it": 32}
HEAD = (
    "| patch | alarms without masks | alarms with | score changed | taken for another product | called unknown "
    "| regions inside the mask |"
)


def main() -> None:
    """Draw, learn with and without masks, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, cache = (
            write_products(Path(folder) / "data", 130, 20, 1, SIDE, given.seed),
            FeatureCache(Path(folder) / "cache"),
        )
        records = read_data(data)
        white = np.zeros((SIDE, SIDE), np.uint8)
        white[LEFT:RIGHT, LEFT:RIGHT] = 255
        Image.fromarray(white).save(Path(folder) / "mask.png")
        names = sorted({str(record.product) for record in records})
        config = {"method": "opca", "seed": given.seed, "features": complete(None)["features"]}
        config["decision"] = {"false_alarm_rate": ALARMS}
        masks = {"ignore": dict.fromkeys(names, str(Path(folder) / "mask.png"))}
        plain, masked = (Inspector.fit(records, config | more, cache=cache) for more in ({}, {"masks": masks}))
        good = [(str(one.product), decode(one.path)) for one in records if one.split == "test" and not one.label]
        rows = [(place, row(plain, masked, good, left)) for place, left in PLACES.items()]
    RESULTS.write_text(text(rows, len(good), given.seed), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


def row(plain: Inspector, masked: Inspector, good: Sequence[tuple[str, np.ndarray]], left: int | None) -> list[float]:
    """Shares of images."""
    seen = []
    for number, (name, image) in enumerate(good):
        other = next(one for known, one in good[number:] + good[:number] if known != name)
        bad = image.copy()
        if left is not None:
            bad[104 : 104 + PATCH, left : left + PATCH] = other[104 : 104 + PATCH, left : left + PATCH]
        before, without, found = masked.inspect(image), plain.inspect(bad), masked.inspect(bad)
        assert isinstance(before, Finding)
        assert isinstance(without, Finding)
        assert isinstance(found, Finding)
        changed = found.score != before.score or not np.array_equal(found.map, before.map)
        corners = (min(one.left, one.top) >= LEFT and max(one.right, one.bottom) <= RIGHT for one in found.regions)
        strange = not found.unknown and found.product != name
        seen.append([without.anomalous, found.anomalous, changed, strange, found.unknown, any(corners)])
    return [float(share) for share in np.mean(seen, axis=0)]


def text(rows: Sequence[tuple[str, Sequence[float]]], images: int, seed: int) -> str:
    """The page."""
    about = environment()
    lines = [
        "# Masks on the built-in products",
        "",
        "Command: `python benchmarks/masks.py`",
        "",
        f"Shares of {images} good test images into which a patch of another product's image is put; the mask is 96 x 96 of "
        f"256 x 256 pixels in the middle, the patch 48 x 48. Score changed: score or map is another than without the patch, "
        f"by as little as one bit. {ALARMS:.0%} false alarms promised. Seed {seed}.",
        "",
        HEAD,
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(f"| {place} | {' | '.join(f'{share:.1%}' for share in shares)} |" for place, shares in rows),
        "",
        f"Machine: {about['machine']}  ",
        f"Versions: {about['versions']}",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
