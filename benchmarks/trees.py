"""A tree of MVTec AD's true size, drawn: its 15 classes, its 5354 images with masks, in its layout. For time and memory.

    python benchmarks/trees.py out/mvtec-size

The pictures are the built-in products, small, told apart by exchanged or inverted colours. They are no stand-in for the
photographs: numbers measured on them say nothing about MVTec AD.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from unispect.data.datasets import deviations
from unispect.data.factory import DEFECTS, draw, random
from unispect.data.mvtec import MVTEC
from unispect.features.engine import available_cores


@dataclass(frozen=True, slots=True)
class Look:
    """A built-in product under another order of its colour channels, inverted or not, at a side in pixels."""

    product: str
    channels: tuple[int, int, int]
    inverted: bool
    side: int

    def of(self, picture: np.ndarray) -> np.ndarray:
        """(h, w, 3) -> (h, w, 3) uint8; nothing moves, so masks hold."""
        seen = picture[..., self.channels]
        return 255 - seen if self.inverted else seen


AS_DRAWN, TURNED, BACK, SWAPPED = (0, 1, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)
LOOKS = {
    "bottle": Look("blister", AS_DRAWN, False, 80),
    "cable": Look("board", AS_DRAWN, False, 96),
    "capsule": Look("blister", BACK, True, 88),
    "carpet": Look("fabric", AS_DRAWN, False, 64),
    "grid": Look("gear", AS_DRAWN, True, 96),
    "hazelnut": Look("terrazzo", SWAPPED, True, 72),
    "leather": Look("wood", AS_DRAWN, False, 64),
    "metal_nut": Look("gear", AS_DRAWN, False, 88),
    "pill": Look("blister", TURNED, False, 96),
    "screw": Look("terrazzo", AS_DRAWN, True, 80),
    "tile": Look("terrazzo", AS_DRAWN, False, 72),
    "toothbrush": Look("board", SWAPPED, True, 88),
    "transistor": Look("board", BACK, False, 80),
    "wood": Look("wood", SWAPPED, True, 72),
    "zipper": Look("fabric", AS_DRAWN, True, 64),
}
GREY = ("grid", "screw", "zipper")  # as in MVTec AD


def roles(name: str) -> Iterator[tuple[str, int]]:
    """Folders of a class and how many pictures each holds; defects in turn, so that their sum is the published one."""
    train, good, bad = MVTEC.counts[name]
    yield from (("train/good", train), ("test/good", good))
    kinds = DEFECTS[LOOKS[name].product]
    yield from ((f"test/{kind}", len(range(place, bad, len(kinds)))) for place, kind in enumerate(kinds))


def write_role(root: Path, name: str, role: str, count: int) -> int:
    """Draw one folder of a class, and its masks where it is of a defect; returns the number of pictures."""
    look, kind = LOOKS[name], role.rpartition("/")[2]
    for number in range(count):
        seed = int(random(name, role, number).integers(2**63))
        picture, mask = draw(look.product, seed, None if kind == "good" else kind, look.side)
        image = Image.fromarray(np.ascontiguousarray(look.of(picture)))
        save(image.convert("L") if name in GREY else image, root / name / role / f"{number:03d}.png")
        if kind != "good":
            place = root / name / "ground_truth" / kind / f"{number:03d}_mask.png"
            save(Image.fromarray(mask.astype(np.uint8) * 255), place)
    return count


def save(image: Image.Image, path: Path) -> None:
    """As a PNG, in a folder that need not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, compress_level=1)


def write_tree(root: Path, processes: int) -> int:
    """Draw all classes; returns the number of images. The same pictures whatever the number of processes."""
    tasks = [(root, name, role, count) for name in LOOKS for role, count in roles(name)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return sum(pool.map(write_role, *zip(*tasks, strict=True)))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="a folder that is not there yet, or one that this wrote")
    parser.add_argument("--processes", type=int, default=available_cores())
    chosen = parser.parse_args()
    images = write_tree(chosen.root, chosen.processes)
    found = deviations(MVTEC, MVTEC.read(chosen.root))
    print(f"{images} images in {chosen.root}; {'as many of each class as published' if not found else '; '.join(found)}")


if __name__ == "__main__":
    main()
