"""Harder versions of a set of products, as manifests: nobody named the products, or some have few images to learn from.

    python benchmarks/variants.py ../shared/realdata out/variants
    unispect benchmark benchmarks/grids/hgad-variants.toml -o out/hgad-variants

Test images stay as they are.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from unispect.data.datasets import read_data
from unispect.data.manifest import write_manifest
from unispect.data.records import Record

FEW, EVERY = 16, 3  # images that are left of every third product, in the order of their names


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


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder of products")
    parser.add_argument("out", type=Path, help="folder for the manifests")
    chosen = parser.parse_args()
    records = read_data(chosen.data)
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name, found in {"unlabelled": unlabelled(records), "few": few(records)}.items():
        print(write_manifest(found, chosen.out / f"{name}.csv"))


if __name__ == "__main__":
    main()
