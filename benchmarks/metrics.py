"""Time and memory of the metrics against scikit-learn, and of streaming: `python benchmarks/metrics.py`.

Everything is timed in one process, the best of three runs, with numpy and scikit-learn on the same arrays. Memory is what
Python and numpy allocate beyond the input (tracemalloc), measured in a run of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import tracemalloc
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from unispect.metrics import ranking, regions
from unispect.metrics.streaming import PixelSums, each

RESULTS = Path(__file__).parent / "results"
SIDE = 256
PACKAGES = ("numpy", "scipy", "scikit-learn")


def images(pixels: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Maps (N, h, w) float32 and masks: a defect of 2 to 12 % of the pixels in every second image."""
    random = np.random.default_rng(seed)
    count = -(-pixels // SIDE**2)
    masks = np.zeros((count, SIDE, SIDE), bool)
    for number in range(0, count, 2):
        top, left, height, width = random.integers([20, 20, 30, 40], [120, 120, 80, 100])
        masks[number, top : top + height, left : left + width] = True
    maps = random.standard_normal(masks.shape, dtype=np.float32)
    maps += np.float32(1.5) * masks
    return maps, masks


def timed(work: Callable[[], object], runs: int = 3) -> float:
    """Seconds of the fastest run."""
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def peak(work: Callable[[], object]) -> float:
    """MiB allocated at most beyond what there was."""
    tracemalloc.start()
    work()
    most = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return most


def best_f1(labels: np.ndarray, scores: np.ndarray) -> float:
    """F1-max by scikit-learn."""
    precision, recall, _ = precision_recall_curve(labels, scores)
    both = precision + recall
    return float(np.max(2 * precision * recall / np.where(both > 0, both, 1)))


def all_three(maps: np.ndarray, masks: np.ndarray) -> tuple[float, float, float]:
    """AUROC, AP and F1-max from one sort, as an evaluation takes them."""
    counts = ranking.curve(maps, masks)
    return ranking.area(counts), ranking.precision(counts), ranking.best_f1(counts)


def against_scikit_learn(pixels: int) -> list[dict[str, float | str]]:
    """Rows of metric, seconds and memory of both, ratio and difference."""
    maps, masks = images(pixels)
    scores, labels = maps.ravel(), masks.ravel()
    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "AUROC": (lambda: ranking.auroc(maps, masks), lambda: roc_auc_score(labels, scores)),
        "AP": (lambda: ranking.average_precision(maps, masks), lambda: average_precision_score(labels, scores)),
        "F1-max": (lambda: ranking.f1_max(maps, masks), lambda: best_f1(labels, scores)),
        "all three": (
            lambda: all_three(maps, masks),
            lambda: (roc_auc_score(labels, scores), average_precision_score(labels, scores), best_f1(labels, scores)),
        ),
    }
    rows: list[dict[str, float | str]] = []
    for name, (ours, theirs) in pairs.items():
        gap = float(np.max(np.abs(np.subtract(ours(), theirs()))))
        seconds, others = timed(ours), timed(theirs)
        rows.append(
            {
                "metric": name,
                "ours_s": round(seconds, 3),
                "sklearn_s": round(others, 3),
                "ratio": round(others / seconds, 1),
                "ours_mib": round(peak(ours), 1),
                "sklearn_mib": round(peak(theirs), 1),
                "difference": gap,
            }
        )
    return rows


def streamed(pixels: int) -> dict[str, object]:
    """Time, memory and bounds of streaming so many pixels; the true errors too, where they can still be sorted."""
    maps, masks = images(min(pixels, 10_000_000))
    passes = max(1, round(pixels / maps.size))

    def run() -> PixelSums:
        sums = PixelSums()
        for number in range(passes):
            shift = np.float32(1e-3 * number)  # other scores each time
            for scores, mask in zip(maps, masks, strict=True):
                sums.add(scores + shift, mask)
        return sums

    start = time.perf_counter()
    sums = run()
    found = dict(each(sums))
    seconds = time.perf_counter() - start
    row: dict[str, object] = {
        "pixels": passes * maps.size,
        "s": round(seconds, 1),
        "million_pixels_per_s": round(passes * maps.size / seconds / 1e6, 1),
        "bins": sums.bins,
        "largest_bound": max(bounded.error for bounded in found.values()),
    }
    if passes == 1:
        counts = ranking.curve(maps, masks)
        exact = {
            "pixel_auroc": ranking.area(counts),
            "pixel_ap": ranking.precision(counts),
            "pixel_f1max": ranking.best_f1(counts),
            "aupro": regions.overlap(counts, maps, masks),
        }
        row["largest_error"] = max(abs(found[name].value - value) for name, value in exact.items())
    if passes <= 10:
        row["peak_mib"] = round(peak(run), 1)
    return row


def page(content: dict[str, object], pairs: list[dict[str, float | str]], streams: list[dict[str, object]]) -> str:
    """The results as Markdown."""
    lines = [
        "# Metrics: time and memory",
        "",
        "Command: `python benchmarks/metrics.py`  ",
        f"Machine: {content['machine']}  ",
        f"Versions: {content['versions']}",
        "",
        f"## Against scikit-learn, {content['pixels']:,} pixels, one process",
        "",
        "| metric | ours, s | scikit-learn, s | ratio | ours, MiB | scikit-learn, MiB | largest difference |",
        "|---|---|---|---|---|---|---|",
    ]
    columns = ("metric", "ours_s", "sklearn_s", "ratio", "ours_mib", "sklearn_mib")
    lines += ["| " + " | ".join([*(str(row[key]) for key in columns), f"{row['difference']:.0e}"]) + " |" for row in pairs]
    lines += [
        "",
        "Memory is beyond the input. Scores are float32, as maps are; one sort serves all three metrics.",
        "",
        "## Streamed: AUROC, AP, F1-max and AUPRO",
        "",
        "| pixels | s | million pixels / s | bins | peak MiB | largest bound | largest error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in streams:
        error = f"{row['largest_error']:.1e}" if "largest_error" in row else "not sorted"
        cells = [
            f"{row['pixels']:,}",
            row["s"],
            row["million_pixels_per_s"],
            f"{row['bins']:,}",
            row.get("peak_mib", "as above"),
        ]
        lines.append("| " + " | ".join([*map(str, cells), f"{row['largest_bound']:.1e}", error]) + " |")
    lines += [
        "",
        "The bound is proven by the sums for each metric; the error is against the exact metrics of the same pixels.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pixels", type=int, default=10_000_000)
    parser.add_argument("--streams", type=int, nargs="*", default=[10**6, 10**7, 10**8, 10**9])
    parser.add_argument("-o", "--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    cpu = [line for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines() if line.startswith("model name")]
    name = cpu[0].split(":")[1].strip() if cpu else platform.processor()
    content: dict[str, object] = {
        "machine": f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": ", ".join(f"{package} {version(package)}" for package in PACKAGES),
        "pixels": chosen.pixels,
    }
    pairs, streams = against_scikit_learn(chosen.pixels), [streamed(pixels) for pixels in chosen.streams]
    chosen.out.mkdir(parents=True, exist_ok=True)
    results = content | {"against_scikit_learn": pairs, "streamed": streams}
    (chosen.out / "metrics.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    (chosen.out / "metrics.md").write_text(page(content, pairs, streams), "utf-8")
    print(page(content, pairs, streams))


if __name__ == "__main__":
    main()
