"""All data sets by name, and the one entry to records: a folder, a manifest, or a published data set.

Nothing is ever downloaded. What is read is compared with the published counts, so that a half-unpacked archive is not
mistaken for the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from unispect.data.btad import BTAD
from unispect.data.dataset import DataSet, how_to_get
from unispect.data.folder import read_folder
from unispect.data.loco import LOCO
from unispect.data.manifest import read_manifest
from unispect.data.mvtec import MVTEC
from unispect.data.mvtec3d import MVTEC3D
from unispect.data.realiad import REALIAD
from unispect.data.records import Record
from unispect.data.stc import STC
from unispect.data.union import UNION
from unispect.data.visa import VISA
from unispect.errors import ConfigError, DataError, unknown_name

DATASETS: dict[str, DataSet] = {
    "mvtec": MVTEC,
    "visa": VISA,
    "btad": BTAD,
    "mvtec3d": MVTEC3D,
    "loco": LOCO,
    "stc": STC,
    "realiad": REALIAD,
    "union": UNION,
}
MANIFESTS = (".csv", ".parquet")
SHOWN = 3  # deviations in an error
KINDS = {
    ("train", 0): "training images",
    ("test", 0): "good test images",
    ("test", 1): "defective test images",
    ("train", 1): "defective images in the training set",
    ("train", None): "training images without a label",
    ("test", None): "test images without a label",
}  # (split, label); published are the first three


def read_data(source: Path | str, dataset: str | None = None, partial: bool = False) -> list[Record]:
    """Records of a folder of images, of a manifest (.csv, .parquet), or of a published data set.

    source    folder or manifest; the root of the data set where one is named
    dataset   a name in DATASETS
    partial   go on where the data set is not complete; products that are not part of it are left out
    """
    source = Path(source)
    if dataset is not None:
        return read_dataset(dataset, source, partial)
    if source.suffix.lower() in MANIFESTS and not source.is_dir():
        return read_manifest(source)
    return read_folder(source)


def read_dataset(name: str, root: Path | str, partial: bool = False) -> list[Record]:
    """Records of a published data set; a DataError where their number is not the published one, unless partial."""
    dataset = find_dataset(name)
    records = dataset.read(Path(root))
    if not records:
        raise DataError(f"{root}: no image of {dataset.title} found. {how_to_get(dataset, Path(root))}")
    found = deviations(dataset, records)
    if found and not partial:
        raise DataError(
            f"{root}: not {dataset.title} as published: {in_short(found)}. Get what is missing from {dataset.source}, or "
            "go on with what is there: pass partial=True (--partial)"
        )
    return published(dataset, records)


def find_dataset(name: str) -> DataSet:
    """The data set of this name."""
    if name not in DATASETS:
        raise ConfigError(unknown_name("data set", name, DATASETS))
    return DATASETS[name]


def deviations(dataset: DataSet, records: Iterable[Record]) -> list[str]:
    """Where records differ from the published counts, product by product; nothing where no counts are published."""
    if not dataset.counts:
        return []
    tally = Counter((record.product, record.split, record.label) for record in records)
    products = {product for product, _, _ in tally}
    extra = sorted(str(product) for product in products - dataset.counts.keys())
    of_products = (text for product in dataset.counts for text in _of_product(dataset, product, tally))
    return [*of_products, *(f"{product}: not a product of {dataset.title}" for product in extra)]


def published(dataset: DataSet, records: Sequence[Record]) -> list[Record]:
    """Those records that are of a published product."""
    return [record for record in records if not dataset.counts or record.product in dataset.counts]


def in_short(found: Sequence[str]) -> str:
    """The first few, and how many more."""
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return "; ".join(found[:SHOWN]) + more


def _of_product(dataset: DataSet, product: str, tally: Counter[tuple[str | None, str, int | None]]) -> Iterator[str]:
    counts = {kind: tally[product, *kind] for kind in KINDS}
    if not any(counts.values()):
        yield f"{product}: missing"
        return
    expected = (*dataset.counts[product], 0, 0, 0)
    for (kind, count), number in zip(counts.items(), expected, strict=True):
        if count != number:
            yield f"{product}: {count} {KINDS[kind]} where {number} are published"
