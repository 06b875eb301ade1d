"""Tiny trees with the true quirks of each published data set: names, endings, sizes, values of masks.

Each function writes below a root and gives back the same root. Every image differs, so that none is a copy.
"""

from collections.abc import Iterable
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

_numbers = count()


def image(path: Path, size: tuple[int, int] = (12, 12), mode: str = "RGB") -> Path:
    """A file of noise; size is (width, height)."""
    shape = (size[1], size[0], 3)[: 3 if mode == "RGB" else 2]
    return save(path, np.random.default_rng(next(_numbers)).integers(0, 256, shape, dtype=np.uint8))


def mask(path: Path, size: tuple[int, int] = (12, 12), value: int = 255, top: int = 2) -> Path:
    """An L-shaped defect; value 0 leaves the mask black."""
    values = np.zeros((size[1], size[0]), np.uint8)
    values[top : top + 3, 2:4] = value
    values[top + 2, 2:8] = value
    return save(path, values)


def save(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def text(path: Path, content: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def mvtec(root: Path) -> Path:
    """Two products: colour and grey, numbers of three digits, `_mask` in the names of masks, texts beside the folders."""
    for product, mode in (("bottle", "RGB"), ("grid", "L")):
        folder = root / product
        for number in range(5):
            image(folder / f"train/good/{number:03d}.png", mode=mode)
        for number in range(2):
            image(folder / f"test/good/{number:03d}.png", mode=mode)
        for defect in ("broken_large", "contamination"):
            for number in range(2):
                image(folder / f"test/{defect}/{number:03d}.png", mode=mode)
                mask(folder / f"ground_truth/{defect}/{number:03d}_mask.png")
        text(folder / "license.txt")
        text(folder / "readme.txt")
    text(root / "license.txt")
    return root


def visa(root: Path) -> Path:
    """Images wider than high, `.JPG`, mask values 1, 2, ...; only the CSV tells train from test, and lists all unsorted."""
    size, rows = (15, 10), []
    for product in ("pcb1", "candle"):
        images = f"{product}/Data/Images"
        for number in (4, 0, 2, 1, 3):
            image(root / f"{images}/Normal/{number:04d}.JPG", size)
            split = "test" if number in (0, 3) else "train"
            rows.append(f"{product},{split},normal,{images}/Normal/{number:04d}.JPG,")
        for number in (1, 0):
            image(root / f"{images}/Anomaly/{number:03d}.JPG", size)
            mask(root / f"{product}/Data/Masks/Anomaly/{number:03d}.png", size, value=number + 1)
            files = f"{images}/Anomaly/{number:03d}.JPG,{product}/Data/Masks/Anomaly/{number:03d}.png"
            rows.append(f"{product},test,anomaly,{files}")
        text(root / product / "image_anno.csv", "image,label,mask\n")
    visa_list(root, rows)
    text(root / "split_csv/2cls_fewshot.csv", "object,split,label,image,mask\n")
    return root


def visa_list(root: Path, rows: Iterable[str], columns: str = "object,split,label,image,mask") -> Path:
    return text(root / "split_csv/1cls.csv", "\n".join([columns, *rows, ""]))


def btad(root: Path) -> Path:
    """bmp images with png masks (01), png with png (02), bmp with bmp, not square, an empty mask, values 0 and 1 (03)."""
    kinds = {"01": ("bmp", "png", (12, 12)), "02": ("png", "png", (10, 10)), "03": ("bmp", "bmp", (16, 12))}
    for product, (ending, mask_ending, size) in kinds.items():
        for number in range(4):
            image(root / f"{product}/train/ok/{number:04d}.{ending}", size)
        for number in range(2):
            image(root / f"{product}/test/ok/{number:04d}.{ending}", size)
            image(root / f"{product}/test/ko/{number:04d}.{ending}", size)
            value = {"01": 255, "02": 255, "03": number}[product]
            mask(root / f"{product}/ground_truth/ko/{number:04d}.{mask_ending}", size, value)
    return root


def mvtec3d(root: Path) -> Path:
    """Points as float tiff beside the images; black masks of good ones; the same numbers in train and in validation."""
    for product in ("bagel", "tire"):
        for part, numbers in (("train", 4), ("validation", 2)):
            for number in range(numbers):
                scan(root / product / part / "good", number)
        for number in range(2):
            mask(scan(root / product / "test/good", number) / f"gt/{number:03d}.png", value=0)
            for defect in ("hole", "combined"):
                mask(scan(root / product / f"test/{defect}", number) / f"gt/{number:03d}.png")
    text(root / "bagel/calibration/camera_parameters.json", "{}")
    text(root / "calibration/camera_parameters.json", "{}")
    return root


def scan(folder: Path, number: int) -> Path:
    image(folder / f"rgb/{number:03d}.png")
    save(folder / f"xyz/{number:03d}.tiff", np.full((12, 12), 0.5, np.float32))
    return folder


def loco(root: Path) -> Path:
    """A folder of masks for each defective image, with values that name the kind of defect; a validation part."""
    size = (16, 10)
    for product in ("juice_bottle", "pushpins"):
        for part, numbers in (("train", 4), ("validation", 2), ("test", 2)):
            for number in range(numbers):
                image(root / product / part / f"good/{number:03d}.png", size)
        for kind, values in (("logical_anomalies", (254, 253)), ("structural_anomalies", (240,))):
            for number in range(2):
                image(root / product / f"test/{kind}/{number:03d}.png", size)
                for place, value in enumerate(values):
                    file = root / product / f"ground_truth/{kind}/{number:03d}/{place:03d}.png"
                    mask(file, size, value, top=2 + 4 * place)
        text(root / product / "defects_config.json", "[]")
    return root
