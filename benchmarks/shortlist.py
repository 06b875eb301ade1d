"""How often PatchCore's short list misses the nearest vector, on real products: python benchmarks/shortlist.py ROOT

ROOT has the MVTec-AD layout. Features: EfficientNet-Lite0, 256 pixels, blocks.3 and blocks.4.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unispect.detectors.patchcore import PatchCore
from unispect.features.engine import Engine, engine
from unispect.features.pyramid import PyramidExtractor
from unispect.nn.memory import nearest
from unispect.nn.shortlist import Shortlist

LAYERS, SIDE, ROUNDING = ("blocks.3", "blocks.4"), 256, 1e-5
LISTS = [(64, 32), (96, 8), (96, 16), (128, 16)]  # axes, candidates


def levels(network: Engine, path: Path) -> list[Tensor]:
    """Features of one image, (1, C, h, w) each."""
    image = Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return network(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].contiguous())


def some(folder: Path, pattern: str, most: int) -> Iterator[Path]:
    """At most so many files, spread over all of them."""
    found = sorted(folder.glob(pattern))
    yield from found[:: max(1, len(found) // most)][:most]


def patches(detector: PatchCore, network: Engine, paths: list[Path]) -> Tensor:
    """Vectors of 3000 places, drawn from all images, (n, C)."""
    every = torch.cat([detector.embed(levels(network, path))[0] for path in paths])
    return every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:3000]]


def compared(bank: Tensor, queries: Tensor, axes: int, candidates: int) -> tuple[float, float]:
    """Share of the queries whose nearest is missed, and the largest error of a distance, relative."""
    exact = nearest(queries, bank)[0][:, 0]
    places = Shortlist(bank, axes)(queries, candidates)
    parts = zip(queries.split(100), places.split(100), strict=True)
    listed = torch.cat([torch.linalg.vector_norm(part[:, None] - bank[own], dim=2).amin(1) for part, own in parts])
    error = listed / exact.clamp(min=1e-6) - 1
    return float((error > ROUNDING).float().mean()), float(error.max())


def main() -> None:
    """Learn the bank from all products, then compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("--train", type=int, default=60, help="images of each product")
    parser.add_argument("--test", type=int, default=8, help="good and defective images of each product")
    given = parser.parse_args()
    network = engine(PyramidExtractor("tf_efficientnet_lite0", LAYERS))
    products = sorted(path for path in given.root.iterdir() if path.is_dir())
    detector = PatchCore([(80, 16, 16), (112, 16, 16)], len(products), coreset=0.15)
    for number, folder in enumerate(products):
        for path in some(folder, "train/good/*", given.train):
            detector.update(levels(network, path), torch.tensor([number]))
    detector.finish()
    print(f"bank of {len(detector.bank.vectors)} vectors of {len(products)} products")
    good = [path for folder in products for path in some(folder, "test/good/*", given.test)]
    bad = [path for folder in products for path in some(folder, "test/[!g]*/*", given.test)]
    for name, paths in {"good": good, "defective": bad}.items():
        queries = patches(detector, network, paths)
        for axes, candidates in LISTS:
            missed, worst = compared(detector.bank.vectors, queries, axes, candidates)
            print(f"{name:10s} {axes:4d} axes {candidates:3d} candidates: missed {missed:.2%}, worst error {worst:.1%}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
