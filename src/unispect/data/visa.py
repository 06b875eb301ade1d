"""VisA, with the official one-class split.

*SPot-the-Difference Self-Supervised Pre-training for Anomaly Detection and Segmentation (Zou et al., 2022)*,
https://arxiv.org/abs/2207.14315
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from unispect.data.dataset import DataSet, check_root, how_to_get
from unispect.data.records import Record
from unispect.errors import DataError

SPLIT = Path("split_csv", "1cls.csv")
COLUMNS = ("object", "split", "label", "image", "mask")
LABELS = {"normal": 0, "anomaly": 1}


def read_visa(root: Path) -> list[Record]:
    """Records of the images that split_csv/1cls.csv lists, product by product, train before test.

    The folders do not tell the split: good images for training and for testing lie side by side. Images that are listed
    but missing are left out, so that the counts tell. Only the list is opened.
    """
    check_root(VISA, root)
    if not (root / SPLIT).is_file():
        raise DataError(
            f"{root}: holds no {SPLIT}, which says what is for training. (A copy rearranged into train/ and test/ is read "
            f"as a plain folder, without naming the data set.) {how_to_get(VISA, root)}"
        )
    records = [record for record in _listed(root) if record.path.is_file()]
    return sorted(records, key=lambda record: (record.product, record.split == "test", record.label, record.path))


def _listed(root: Path) -> Iterator[Record]:
    with (root / SPLIT).open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames is None or not set(COLUMNS) <= set(rows.fieldnames):
            raise DataError(f"{root / SPLIT}: columns {rows.fieldnames}: expected {', '.join(COLUMNS)}")
        for row in rows:
            try:
                yield _record(root, row)
            except (KeyError, TypeError, DataError) as error:
                raise DataError(
                    f"{root / SPLIT}, line {rows.line_num}: {row}: expected a product, train or test, normal or anomaly, "
                    "an image, and for an anomaly a mask; get the file again"
                ) from error


def _record(root: Path, row: dict[str, str]) -> Record:
    label = LABELS[row["label"]]
    if label == 0:
        return Record(root / row["image"], row["object"], 0, split=row["split"])
    if not row["mask"]:
        raise DataError("no mask")
    return Record(root / row["image"], row["object"], 1, row["label"], root / row["mask"], split=row["split"])


VISA = DataSet(
    name="visa",
    title="VisA",
    read=read_visa,
    layout="""\
  ROOT/split_csv/1cls.csv
  ROOT/<product>/Data/Images/Normal/*.JPG, Data/Images/Anomaly/*.JPG
  ROOT/<product>/Data/Masks/Anomaly/*.png
with 12 products: candle, capsules, ...""",
    source="https://github.com/amazon-science/spot-diff",
    licence="CC BY 4.0",
    counts={
        "candle": (900, 100, 100),
        "capsules": (542, 60, 100),
        "cashew": (450, 50, 100),
        "chewinggum": (453, 50, 100),
        "fryum": (450, 50, 100),
        "macaroni1": (900, 100, 100),
        "macaroni2": (900, 100, 100),
        "pcb1": (904, 100, 100),
        "pcb2": (901, 100, 100),
        "pcb3": (905, 101, 100),
        "pcb4": (904, 101, 100),
        "pipe_fryum": (450, 50, 100),
    },
    archives={"VisA_20220922.tar": "2eb8690c803ab37de0324772964100169ec8ba1fa3f7e94291c9ca673f40f362"},
    notes=(
        "The official one-class split (split_csv/1cls.csv).",
        "Images are not square; one kind of defect, 'anomaly'.",
        "Mask values are small numbers, one for each kind of defect; every value but 0 is defective.",
    ),
)
