"""Harder versions of a set of products, as manifests: nobody named the products, some have few images to learn from, or some
images to learn from are defective.

    python benchmarks/variants.py ../shared/realdata out/variants
    unispect benchmark benchmarks/grids/hgad-variants.toml -o out/hgad-variants
    unispect benchmark benchmarks/grids/cada-noisy.toml -o out/cada-noisy

Test images stay as they are, but for those that move to the training images in "noisy"; "clean" is without them altogether.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from unispect.data.datasets import read_data
from unispect.data.manifest import write_manifest
from unispect.data.records import Record

FEW, EVERY = 16, 3  # images that are left of every third product, in the order of their names
MIXED = 0.05  # share of defective images among those to learn from


def unlabelled(records: Sequence[Record]) -> list[Record]:
    """Images to learn from without a product."""
    return [replace(record, product=None) if record.split == "train" else record for record in records]


def few(records: Sequence[Record]) -> Iterator[Record]:
    """The first images of every third product, all images of the others."""
    names = sorted({str(record.product) for record in records})
    seen: Counter[str | None] = Counter()
    for record in sorted(records, key=lambda record: record.path):
        seen[record.product] += record.split == "train"
        short = names.index(str(record.product)) % EVERY == 0
        if record.split == "test" or not short or seen[record.product] <= FEW:
            yield record


def moved(records: Sequence[Record]) -> set[Path]:
    """Defective images for training: of each product as many as make 5 % of it, evenly taken from its sorted files."""
    chosen: set[Path] = set()
    for product in {record.product for record in records}:
        own = [record for record in records if record.product == product]
        bad = sorted(record.path for record in own if record.label == 1)
        wanted = round(MIXED / (1 - MIXED) * sum(record.split == "train" for record in own))
        places = np.linspace(0, len(bad) - 1, min(wanted, len(bad))).round().astype(int)
        chosen |= {bad[place] for place in places}
    return chosen


def noisy(records: Sequence[Record]) -> list[Record]:
    """Nobody has looked at the images to learn from, and 5 % of them are defective."""
    mixed = moved(records)
    return [
        replace(record, label=None, defect=None, mask=None, split="train") if record.path in mixed else record
        for record in records
    ]


def clean(records: Sequence[Record]) -> list[Record]:
    """The same images without those that "noisy" moves."""
    mixed = moved(records)
    return [record for record in records if record.path not in mixed]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder of products")
    parser.add_argument("out", type=Path, help="folder for the manifests")
    chosen = parser.parse_args()
    records = read_data(chosen.data)
    chosen.out.mkdir(parents=True, exist_ok=True)
    for variant in (unlabelled, few, noisy, clean):
        print(write_manifest(variant(records), chosen.out / f"{variant.__name__}.csv"))


if __name__ == "__main__":
    main()
