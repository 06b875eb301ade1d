"""How well near-duplicates are told from images that merely look alike: `python benchmarks/nearness.py --realdata DIR`.

Training images are stored. Genuine test images should not be suspicious; changed copies of training images should.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from unispect.data.folder import read_folder
from unispect.data.loader import decode
from unispect.data.nearness import CLOSER, Nearness, fingerprint
from unispect.data.records import Record

RESULTS = Path(__file__).parent / "results"
SAMPLE = 200  # training images that are changed


def saved(quality: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(image: np.ndarray) -> np.ndarray:
        file = BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file).convert("RGB"))

    return change


def halved(image: np.ndarray) -> np.ndarray:
    size = (max(1, image.shape[1] // 2), max(1, image.shape[0] // 2))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


def cropped(image: np.ndarray) -> np.ndarray:
    top, left = image.shape[0] // 100 + 1, image.shape[1] // 100 + 1
    return np.ascontiguousarray(image[top:-top, left:-left])


def noisy(image: np.ndarray) -> np.ndarray:
    return np.clip(image + np.random.default_rng(0).normal(0, 4, image.shape), 0, 255).astype(np.uint8)


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "JPEG, quality 90": saved(90),
    "JPEG, quality 60": saved(60),
    "JPEG, quality 30": saved(30),
    "half the size": halved,
    "5 % brighter": lambda image: np.clip(image * 1.05, 0, 255).astype(np.uint8),
    "gamma 0.9": lambda image: (255 * (image / 255) ** 0.9).astype(np.uint8),
    "noise of 4 grey levels": noisy,
    "2 % cropped": cropped,
    "moved by 2 pixels": lambda image: np.roll(image, (2, 2), (0, 1)),
    "mirrored": lambda image: np.ascontiguousarray(image[:, ::-1]),
}


def marks(records: list[Record]) -> list[bytes]:
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda record: fingerprint(decode(record.path)), records))


def genuine(known: Nearness, train: list[Record], test: list[Record], root: Path) -> Iterator[str]:
    """The genuine test images that are suspicious."""
    for record, mark in zip(test, marks(test), strict=True):
        near = known.nearest(mark)
        if near is not None and near.suspicious:
            yield f"{record.path.relative_to(root)} and {train[near.index].path.relative_to(root)}"


def caught(known: Nearness, train: list[Record]) -> Iterator[tuple[str, int, int]]:
    """Name of each change, how many changed copies are suspicious and point to their origin, and how many there were."""
    chosen = np.random.default_rng(0).choice(len(train), min(SAMPLE, len(train)), replace=False).tolist()
    images = [decode(train[place].path) for place in chosen]
    for name, change in CHANGES.items():
        found = [known.nearest(fingerprint(change(image))) for image in images]
        hits = sum(near is not None and near.suspicious for near in found)
        yield name, hits, len(chosen)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--realdata", type=Path, required=True, help="folder of real products in the MVTec layout")
    parser.add_argument("-o", "--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    records = read_folder(chosen.realdata)
    train, test = ([record for record in records if record.split == split] for split in ("train", "test"))
    known = Nearness(marks(train))
    alarms = list(genuine(known, train, test, chosen.realdata))
    lines = [
        "# Near-duplicates",
        "",
        "Command: `python benchmarks/nearness.py --realdata ../shared/realdata`  ",
        f"{len(train)} stored training images of {len({record.product for record in train})} products; suspicious below "
        f"{CLOSER} of the median distance of the eight next ones.",
        "",
        f"Genuine test images that are suspicious: {len(alarms)} of {len(test)} ({len(alarms) / len(test):.1%}).",
        "",
        *(f"- {pair}" for pair in alarms),
        "",
        "| changed copy of a training image | suspicious |",
        "|---|---|",
        *(f"| {name} | {hits} of {total} ({hits / total:.0%}) |" for name, hits, total in caught(known, train)),
        "",
    ]
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "nearness.md").write_text("\n".join(lines), "utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
