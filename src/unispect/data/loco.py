"""MVTec LOCO AD: structural and logical anomalies.

*Beyond Dents and Scratches: Logical Constraints in Unsupervised Anomaly Detection and Localization (Bergmann et al.,
2022)*, https://doi.org/10.1007/s11263-022-01578-9
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from unispect.data.dataset import DataSet, check_root, folders_in, images_in, product_folders
from unispect.data.records import Record


def read_loco(root: Path) -> list[Record]:
    """Records of all products, in the order of names: train, validation, test. No file is opened.

    The mask of an image is a folder: a file for each defect in it.
    """
    check_root(LOCO, root)
    return [record for folder in product_folders(root) for record in _product(folder)]


def _product(folder: Path) -> Iterator[Record]:
    for part in ("train", "validation"):
        yield from (Record(path, folder.name, 0) for path in images_in(folder / part / "good"))
    for kind in folders_in(folder / "test"):
        if kind.name == "good":
            yield from (Record(path, folder.name, 0, split="test") for path in images_in(kind))
        else:
            yield from _defective(kind, folder / "ground_truth" / kind.name, folder.name)


def _defective(folder: Path, truth: Path, product: str) -> Iterator[Record]:
    for path in images_in(folder):
        masks = truth / path.stem
        yield Record(path, product, 1, folder.name, masks if masks.is_dir() else None, split="test")


LOCO = DataSet(
    name="loco",
    title="MVTec LOCO AD",
    read=read_loco,
    layout="""\
  ROOT/<product>/train/good/*.png
  ROOT/<product>/validation/good/*.png
  ROOT/<product>/test/good/*.png, test/logical_anomalies/*.png, test/structural_anomalies/*.png
  ROOT/<product>/ground_truth/<kind>/<name>/000.png, 001.png, ...
with 5 products: breakfast_box, juice_bottle, ...""",
    source="https://www.mvtec.com/company/research/datasets/mvtec-loco",
    licence="CC BY-NC-SA 4.0, not for commercial use",
    counts={  # train: with the validation images
        "breakfast_box": (351 + 62, 102, 173),
        "juice_bottle": (335 + 54, 94, 236),
        "pushpins": (372 + 69, 138, 172),
        "screw_bag": (360 + 60, 122, 219),
        "splicing_connectors": (360 + 60, 119, 193),  # of the archive; the paper has 354 + 59
    },
    archives={"mvtec_loco_anomaly_detection.tar.xz": "9e7c84dba550fd2e59d8e9e231c929c45ba737b6b6a6d3814100f54d63aae687"},
    notes=(
        "The set's own metric, sPRO with saturation thresholds, is not computed: pixel metrics treat the union of an "
        "image's masks as one defect map.",
        "The validation images are good: they count as training images, of which held-out and calibration images are drawn.",
        "Counts are those of the published archive: 1778 + 305 good images to learn from, where the paper has 1772 + 304; "
        "the seven more are of splicing_connectors.",
    ),
)
