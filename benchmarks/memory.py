"""Peak memory of learning over 1, 4 and 16 times the images: python benchmarks/memory.py

Features are drawn image by image and never kept, so what grows is what a detector holds. Each figure is the highest resident
memory of a process of its own, less what it held before learning. Caps are set so that they bind at 1x.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unispect.benchmark import environment
from unispect.detectors.base import StatisticalDetector
from unispect.detectors.methods import build
from unispect.fit import Labelled, learn
from unispect.inspector import complete

SHAPES = [(80, 8, 8), (112, 8, 8), (320, 1, 1)]
PRODUCTS, IMAGES, SIZES = 6, 120, (1, 4, 16)
OPTIONS: dict[str, dict[str, Any]] = {
    "opca": {},
    "padim": {},
    "patchcore": {"patchcore": {"max_bank_vectors": 500, "max_ram": 16}},
    "spade": {"spade": {"max_images": 60}},
    "neighbours": {"neighbours": {"max_ram": 16}},
    "ensemble": {"ensemble": {"statistics": 12}, "neighbours": {"max_ram": 16}},
}


class Drawn:
    """Features of so many images, drawn anew in every pass."""

    def __init__(self, count: int) -> None:
        self.count, self.shapes = count, SHAPES

    def __len__(self) -> int:
        return self.count

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, list[Tensor]]]:
        """As a FeatureSet gives them."""
        for start in range(0, self.count, size):
            numbers = np.arange(start, min(start + size, self.count))
            random = torch.Generator().manual_seed(start)
            level = torch.from_numpy(numbers % PRODUCTS)[:, None, None, None]
            yield numbers, [level + torch.randn(len(numbers), *shape, generator=random) for shape in SHAPES]


def resident(key: str) -> float:
    """VmHWM (highest) or VmRSS (now) of this process, MiB."""
    found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text("utf-8"))
    return int(found[1]) / 1024 if found else float("nan")


def measure(method: str, size: int) -> float:
    """MiB that learning needs beyond what was there before, in this process."""
    count = IMAGES * size
    warm = torch.randn(16, 192, 192).double()
    torch.linalg.eigh(warm @ warm.mT)  # libraries take their workspace now
    detector = build(complete({"method": method} | OPTIONS[method]), SHAPES, PRODUCTS)
    assert isinstance(detector, StatisticalDetector)
    before = resident("VmRSS")
    learn(detector, Labelled(Drawn(count), np.arange(count) % PRODUCTS))  # type: ignore[arg-type]
    return resident("VmHWM") - before


def main() -> None:
    """Every method and size in a process of its own, then the table."""
    if len(sys.argv) == 3:
        print(measure(sys.argv[1], int(sys.argv[2])))
        return
    about = environment()
    lines = ["# Peak memory of learning over the number of images", "", "Command: `python benchmarks/memory.py`", ""]
    lines += [f"{about['machine']}; {about['versions']}", "", "MiB beyond what the process held before:", ""]
    lines += [
        "| method | " + " | ".join(f"{IMAGES * size} images" for size in SIZES) + " |",
        "| --- |" + " ---: |" * len(SIZES),
    ]
    for method in OPTIONS:
        command = [sys.executable, __file__, method]
        peaks = [float(subprocess.check_output([*command, str(size)]).split()[-1]) for size in SIZES]
        lines.append(f"| {method} | " + " | ".join(f"{peak:.0f}" for peak in peaks) + " |")
        print(lines[-1], flush=True)
    (Path(__file__).parent / "results" / "memory.md").write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
