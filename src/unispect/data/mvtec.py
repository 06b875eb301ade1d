"""MVTec AD.

*The MVTec Anomaly Detection Dataset: A Comprehensive Real-World Dataset for Unsupervised Anomaly Detection (Bergmann et
al., 2021)*, https://doi.org/10.1007/s11263-020-01400-4
"""

from __future__ import annotations

from pathlib import Path

from unispect.data.dataset import DataSet, check_root
from unispect.data.folder import read_folder
from unispect.data.records import Record


def read_mvtec(root: Path) -> list[Record]:
    """Records of all products, in the order of names. No file is opened."""
    check_root(MVTEC, root)
    return read_folder(root)


MVTEC = DataSet(
    name="mvtec",
    title="MVTec AD",
    read=read_mvtec,
    layout="""\
  ROOT/<product>/train/good/*.png
  ROOT/<product>/test/good/*.png, test/<defect>/*.png
  ROOT/<product>/ground_truth/<defect>/*_mask.png
with 15 products: bottle, cable, ...""",
    source="https://www.mvtec.com/company/research/datasets/mvtec-ad",
    licence="CC BY-NC-SA 4.0, not for commercial use",
    counts={
        "bottle": (209, 20, 63),
        "cable": (224, 58, 92),
        "capsule": (219, 23, 109),
        "carpet": (280, 28, 89),
        "grid": (264, 21, 57),
        "hazelnut": (391, 40, 70),
        "leather": (245, 32, 92),
        "metal_nut": (220, 22, 93),
        "pill": (267, 26, 141),
        "screw": (320, 41, 119),
        "tile": (230, 33, 84),
        "toothbrush": (60, 12, 30),
        "transistor": (213, 60, 40),
        "wood": (247, 19, 60),
        "zipper": (240, 32, 119),
    },
    archives={"mvtec_anomaly_detection.tar.xz": "cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d"},
    notes=("Images of grid, screw and zipper are grey.",),
)
