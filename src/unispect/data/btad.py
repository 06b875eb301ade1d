"""BTAD, beanTech anomaly detection.

*VT-ADL: A Vision Transformer Network for Image Anomaly Detection and Localization (Mishra et al., 2021)*,
https://arxiv.org/abs/2104.10036
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from unispect.data.dataset import DataSet, check_root, images_in, product_folders
from unispect.data.records import Record

UNPACKED = "BTech_Dataset_transformed"  # the folder that the archive holds
DEFECT = "ko"


def read_btad(root: Path) -> list[Record]:
    """Records of all products, in the order of names; the root may be the folder above theirs. No file is opened."""
    root = root / UNPACKED if (root / UNPACKED).is_dir() else root
    check_root(BTAD, root)
    return [record for folder in product_folders(root) for record in _product(folder)]


def _product(folder: Path) -> Iterator[Record]:
    name = folder.name
    yield from (Record(path, name, 0) for path in images_in(folder / "train" / "ok"))
    yield from (Record(path, name, 0, split="test") for path in images_in(folder / "test" / "ok"))
    masks = {path.stem: path for path in images_in(folder / "ground_truth" / DEFECT)}
    for path in images_in(folder / "test" / DEFECT):
        yield Record(path, name, 1, DEFECT, masks.get(path.stem), split="test")


BTAD = DataSet(
    name="btad",
    title="BTAD (beanTech)",
    read=read_btad,
    layout="""\
  ROOT/<product>/train/ok/*
  ROOT/<product>/test/ok/*, test/ko/*
  ROOT/<product>/ground_truth/ko/*
with 3 products: 01, 02, 03; images and masks are .bmp or .png""",
    source="https://avires.dimi.uniud.it/papers/btad/btad.zip",
    licence="CC BY-SA 4.0",
    counts={"01": (400, 21, 49), "02": (399, 30, 200), "03": (1000, 400, 41)},
    archives={"btad.zip": "461c9387e515bfed41ecaae07c50cf6b10def647b36c9e31d239ab2736b10d2a"},
    notes=(
        "The official training set holds a few defective images (CADA, Tab. 5: 'noisy BTAD'); they are records with label "
        "0, as in the papers. To leave them out, write a manifest and delete their rows.",
        "11 masks are empty (1 of product 02, 10 of 03): those images have no defective pixel to find.",
        "One kind of defect, 'ko'. Images of product 03 are not square.",
    ),
)
