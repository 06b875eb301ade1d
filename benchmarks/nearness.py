"""How well near-duplicates are told from images that merely look alike: `python benchmarks/nearness.py --realdata DIR`.

Training images are stored. Genuine test images should not be suspicious; changed copies of training images should. The
built-in products are always measured; real ones, in the MVTec layout, where a folder is given.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from unispect.data.factory import write_products
from unispect.data.folder import read_folder
from unispect.data.loader import decode
from unispect.data.nearness import Near, Nearness, fingerprint
from unispect.data.records import Record

RESULTS = Path(__file__).parent / "results"
SAMPLE = 300  # training images that are changed


def saved(image: np.ndarray, quality: int) -> np.ndarray:
    file = BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


def halved(image: np.ndarray) -> np.ndarray:
    size = (max(1, image.shape[1] // 2), max(1, image.shape[0] // 2))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


def cropped(image: np.ndarray, top: float, bottom: float) -> np.ndarray:
    """Without these shares of the height above and below, and of the width left and right."""
    height, width = image.shape[:2]
    down, across = (round(top * height), round((1 - bottom) * height)), (round(top * width), round((1 - bottom) * width))
    return np.ascontiguousarray(image[slice(*down), slice(*across)])


def moved(image: np.ndarray, pixels: int) -> np.ndarray:
    """Down and to the right; the border is repeated where nothing is known."""
    return np.pad(image, ((pixels, 0), (pixels, 0), (0, 0)), "edge")[:-pixels, :-pixels]


def brighter(image: np.ndarray, gain: float) -> np.ndarray:
    return np.clip(image * gain + 0.5, 0, 255).astype(np.uint8)


def curved(image: np.ndarray, gamma: float) -> np.ndarray:
    return (255 * (image / 255) ** gamma + 0.5).astype(np.uint8)


def noisy(image: np.ndarray, grey_levels: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, grey_levels, image.shape)
    return np.clip(image + noise + 0.5, 0, 255).astype(np.uint8)


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "JPEG, quality 90": lambda image: saved(image, 90),
    "JPEG, quality 60": lambda image: saved(image, 60),
    "JPEG, quality 30": lambda image: saved(image, 30),
    "half the size": halved,
    "5 % brighter": lambda image: brighter(image, 1.05),
    "gamma 0.8": lambda image: curved(image, 0.8),
    "gamma 1.25": lambda image: curved(image, 1.25),
    "noise of 4 grey levels": lambda image: noisy(image, 4),
    "2 % cropped (1 % on each side)": lambda image: cropped(image, 0.01, 0.01),
    "2 % cropped (at one corner)": lambda image: cropped(image, 0.02, 0),
    "4 % cropped (2 % on each side)": lambda image: cropped(image, 0.02, 0.02),
    "moved by 2 pixels": lambda image: moved(image, 2),
    "next of a burst: 1 pixel, 1 %, noise 2, JPEG 90": lambda image: saved(noisy(brighter(moved(image, 1), 1.01), 2), 90),
    "2 % cropped, halved, 5 % brighter, JPEG 60": lambda image: saved(
        brighter(halved(cropped(image, 0.01, 0.01)), 1.05), 60
    ),
    "turned by 90 degrees": lambda image: np.ascontiguousarray(np.rot90(image)),
    "mirrored": lambda image: np.ascontiguousarray(image[:, ::-1]),
}


def measure(root: Path) -> tuple[list[str], dict[str, str]]:
    """Lines about genuine images, and for each change how many changed copies are suspicious and point to their origin."""
    records = read_folder(root)
    train, test = ([record for record in records if record.split == split] for split in ("train", "test"))
    known = Nearness([fingerprint(decode(record.path)) for record in train])
    return genuine(known, train, test, root), {name: caught(known, train, change) for name, change in CHANGES.items()}


def genuine(known: Nearness, train: list[Record], test: list[Record], root: Path) -> list[str]:
    found = [(record, near(known, decode(record.path))) for record in test]
    pairs = [
        f"- {record.path.relative_to(root)} and {train[one.index].path.relative_to(root)} ({one.distance:.3f})"
        for record, one in found
        if one.suspicious
    ]
    count = f"{len(pairs)} of {len(test)} ({len(pairs) / len(test):.1%}), {len(train)} training images stored"
    return [f"Genuine test images that are suspicious: {count}.", "", *pairs]


def caught(known: Nearness, train: list[Record], change: Callable[[np.ndarray], np.ndarray]) -> str:
    places = np.random.default_rng(0).choice(len(train), min(SAMPLE, len(train)), replace=False).tolist()
    found = [(place, near(known, change(decode(train[place].path)))) for place in places]
    hits = sum(one.suspicious and one.index == place for place, one in found)
    return f"{hits} of {len(places)} ({hits / len(places):.0%})"


def near(known: Nearness, image: np.ndarray) -> Near:
    found = known.nearest(fingerprint(image))
    assert found is not None, "no training images"
    return found


def page(command: str, measured: dict[str, tuple[list[str], dict[str, str]]]) -> str:
    """The results as Markdown."""
    lines = ["# Near-duplicates", "", f"Command: `{command}`", ""]
    for name, (about, _) in measured.items():
        lines += [f"## {name}", "", *about, ""]
    lines += ["## Changed copies of training images", ""]
    lines += [f"| changed copy, suspicious and traced | {' | '.join(measured)} |", "|---" * (len(measured) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(hits[name] for _, hits in measured.values())} |" for name in CHANGES]
    return "\n".join([*lines, ""])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--realdata", type=Path, help="folder of real products in the MVTec layout")
    parser.add_argument("-o", "--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = {"built-in": measure(write_products(Path(folder), train=60, good=40, bad=4, seed=5))}
    command = "python benchmarks/nearness.py"
    if chosen.realdata and chosen.realdata.is_dir():
        measured["real"] = measure(chosen.realdata)
        command += " --realdata ../shared/realdata"
    else:
        print("real products: skipped, as --realdata names no folder")
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "nearness.md").write_text(page(command, measured), "utf-8")
    print(page(command, measured))


if __name__ == "__main__":
    main()
