"""What CADA adds to the time of scoring: `python benchmarks/overhead.py`.

Of each image in turn, in one process: the time of `Inspector.inspect` without CADA (decoding of files left out), and that of
CADA alone on what the detector says of it. Compared are the medians: a difference of two long times would drown in the
noise of the machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unispect.benchmark import environment
from unispect.data.datasets import read_data
from unispect.data.factory import write_products
from unispect.data.loader import decode
from unispect.data.records import Record
from unispect.features.cache import FeatureCache
from unispect.inspector import Inspector

RESULTS = Path(__file__).parent / "results" / "overhead.md"
SHORT = {"training": {"steps": 2, "checks": 0}}  # what is learnt has no say in the time
METHODS: dict[str, dict[str, Any]] = {"opca": {}, "neighbours": {}, "patchcore": {}, "hgad": SHORT, "revdist": SHORT}
IMAGES = 20


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="looks at each of 20 images")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        records = read_data(write_products(Path(folder), train=40, good=4, bad=2, seed=0))
        cache = FeatureCache(Path(folder) / "cache")
        rows = [(name, measure(name, records, cache, given.rounds)) for name in METHODS]
    RESULTS.write_text(page(rows, given.rounds), "utf-8")
    print(RESULTS.read_text("utf-8"))


def measure(method: str, records: Sequence[Record], cache: FeatureCache, rounds: int) -> tuple[float, float]:
    """Seconds an image without CADA, and those of CADA."""
    config = {"method": method, "aligner": "cada", "decision": {"false_alarm_rate": 0.05}} | METHODS[method]
    aligned = Inspector.fit(records, config, cache=cache)
    parts = aligned.novelty, aligned.versions, aligned.split, aligned.facts
    plain = Inspector(aligned.config | {"aligner": "none"}, aligned.products, aligned.engine, aligned.detector, None, *parts)
    images = [decode(record.path) for record in records if record.split == "test"][:IMAGES]
    pairs = [look(aligned, plain, image) for _ in range(rounds) for image in images]
    first, second = zip(*pairs[len(images) :], strict=True)  # the first round warms up
    return statistics.median(first), statistics.median(second)


@torch.inference_mode()
def look(aligned: Inspector, plain: Inspector, image: np.ndarray) -> tuple[float, float]:
    """Seconds for an image, and for CADA on it."""
    start = time.perf_counter()
    plain.inspect(image)
    seconds = time.perf_counter() - start
    features = plain.engine(torch.from_numpy(plain.preparation.image(image))[None])
    scores, aligner = plain.detector(features), aligned.aligner
    assert aligner is not None
    start = time.perf_counter()
    aligner(features, scores)
    return seconds, time.perf_counter() - start


def page(rows: Sequence[tuple[str, tuple[float, float]]], rounds: int) -> str:
    """The results as Markdown."""
    about = environment()
    return "\n".join(
        [
            "# What CADA adds to the time of scoring",
            "",
            "Command: `python benchmarks/overhead.py`",
            "",
            f"Images of 256 px, one at a time, Lite0 in f32; medians of {rounds - 1} looks at {IMAGES} images, in turns.",
            "",
            "| method | without, ms | CADA, ms | with / without |",
            "| --- | ---: | ---: | ---: |",
            *(f"| {name} | {1e3 * plain:.2f} | {1e3 * cada:.2f} | {1 + cada / plain:.3f} |" for name, (plain, cada) in rows),
            "",
            f"Machine: {about['machine']}  ",
            f"Versions: {about['versions']}",
            "",
        ]
    )


if __name__ == "__main__":
    main()
