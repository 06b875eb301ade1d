"""MVTec 3D-AD, the RGB images of it.

*The MVTec 3D-AD Dataset for Unsupervised 3D Anomaly Detection and Localization (Bergmann et al., 2022)*,
https://arxiv.org/abs/2112.09045
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from unispect.data.dataset import DataSet, check_root, folders_in, images_in, product_folders
from unispect.data.records import Record


def read_mvtec3d(root: Path) -> list[Record]:
    """Records of all products, in the order of names: train, validation, test. No file is opened."""
    check_root(MVTEC3D, root)
    return [record for folder in product_folders(root) for record in _product(folder)]


def _product(folder: Path) -> Iterator[Record]:
    for part in ("train", "validation"):
        yield from (Record(path, folder.name, 0) for path in images_in(folder / part / "good" / "rgb"))
    for kind in folders_in(folder / "test"):
        yield from _good(kind, folder.name) if kind.name == "good" else _defective(kind, folder.name)


def _good(folder: Path, product: str) -> Iterator[Record]:
    """Their masks are black, and say nothing."""
    return (Record(path, product, 0, split="test") for path in images_in(folder / "rgb"))


def _defective(folder: Path, product: str) -> Iterator[Record]:
    masks = {path.stem: path for path in images_in(folder / "gt")}
    for path in images_in(folder / "rgb"):
        yield Record(path, product, 1, folder.name, masks.get(path.stem), split="test")


MVTEC3D = DataSet(
    name="mvtec3d",
    title="MVTec 3D-AD (RGB)",
    read=read_mvtec3d,
    layout="""\
  ROOT/<product>/train/good/rgb/*.png
  ROOT/<product>/validation/good/rgb/*.png
  ROOT/<product>/test/good/rgb/*.png, test/<defect>/rgb/*.png, test/<defect>/gt/*.png
with 10 products: bagel, cable_gland, ...; xyz/*.tiff are not read""",
    source="https://www.mvtec.com/company/research/datasets/mvtec-3d-ad",
    licence="CC BY-NC-SA 4.0, not for commercial use",
    counts={  # train: with the validation images
        "bagel": (244 + 22, 22, 88),
        "cable_gland": (223 + 23, 21, 87),
        "carrot": (286 + 29, 27, 132),
        "cookie": (210 + 22, 28, 103),
        "dowel": (288 + 34, 26, 104),
        "foam": (236 + 27, 20, 80),
        "peach": (361 + 42, 26, 106),
        "potato": (300 + 33, 22, 92),
        "rope": (298 + 33, 32, 69),
        "tire": (210 + 29, 25, 87),
    },
    archives={},
    notes=(
        "Colour images only: the depth in xyz/ is not used, so defects of pure shape may not be visible.",
        "The 294 validation images are good: they count as training images (2656 + 294), of which held-out and calibration "
        "images are drawn.",
    ),
)
