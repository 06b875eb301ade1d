"""How fast exported models inspect, beside the bare backbone: `python benchmarks/speed.py ../shared/realdata`.

Models are exported to OpenVINO and ONNX, and inspect image files: decoding, resizing, network, detector and decision. The
floor is the backbone alone in OpenVINO (f32, a stream a core, one image a request) on the same images, which are decoded and
resized before. Both run in one process, in turns; ratios are of the medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unispect import Inspector
from unispect.benchmark import environment
from unispect.data.datasets import read_data
from unispect.data.loader import decode
from unispect.data.records import Record
from unispect.export.bundle import export
from unispect.features.engine import OpenVinoEngine, engine
from unispect.features.pyramid import PyramidExtractor
from unispect.runtime import Inspector as Runtime
from unispect.runtime import said_of

RESULTS = Path(__file__).parent / "results" / "speed.md"
METHODS = ("opca", "hgad", "patchcore", "neighbours", "ensemble", "padim", "spade")
GOALS = {"opca": 0.85, "hgad": 0.60, "patchcore": 0.60}
IMAGES, LATE = 192, 150  # of a round; looks one at a time
STARTED = """
import json, sys, time
start = time.perf_counter()
from unispect.runtime import Inspector
inspector = Inspector.load(sys.argv[1])
inspector.inspect(sys.argv[2])
seconds = time.perf_counter() - start
status = open("/proc/self/status").read()
print(json.dumps([seconds, int(status.split("VmHWM:")[1].split()[0]) / 1024, "torch" in sys.modules]))
"""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of products in the MVTec layout")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="instead of all")
    parser.add_argument("--work", type=Path, default=Path("out/speed"), help="folder in which models are kept")
    parser.add_argument("--rounds", type=int, default=5, help="that the medians are of")
    given = parser.parse_args()
    records = read_data(given.data)
    test = [record for record in records if record.split == "test"]
    chosen = [test[place] for place in np.linspace(0, len(test) - 1, IMAGES).astype(int)]
    rows = [measured(method, records, chosen, given.work, given.rounds) for method in given.methods]
    RESULTS.write_text(page(rows, given.data, given.rounds), "utf-8")
    print(RESULTS.read_text("utf-8"))


def measured(method: str, records: Sequence[Record], chosen: Sequence[Record], work: Path, rounds: int) -> dict[str, Any]:
    """All numbers of a method."""
    folder = work / method
    if not (folder / "openvino").exists():
        inspector = Inspector.fit(records, {"method": method})
        for to in ("openvino", "onnx"):
            export(inspector, folder / to, to)
        inspector.save(folder / "model")
    inspector = Inspector.load(folder / "model")
    squares = [inspector.preparation.image(decode(record.path)) for record in chosen]
    # Levels that the detector looks at, without what is done with them: the backbone alone.
    floor = bare(inspector)
    fast, other = Runtime.load(folder / "openvino"), Runtime.load(folder / "onnx")
    takes: dict[str, list[float]] = {"floor": [], "openvino": [], "graph": [], "onnxruntime": []}
    for _ in range(rounds + 1):
        takes["floor"].append(seconds(lambda: floor(torch.from_numpy(np.stack(squares)))))
        takes["openvino"].append(seconds(lambda: list(fast.findings(chosen))))
        takes["graph"].append(seconds(lambda: list(fast._ahead(fast.network.prepared, squares))))
        takes["onnxruntime"].append(seconds(lambda: list(other.findings(chosen))))
    pace = {name: len(chosen) / statistics.median(times[1:]) for name, times in takes.items()}  # the first round warms up
    quick = Runtime.load(folder / "openvino", hint="latency")
    late = sorted(1e3 * seconds(partial(quick.inspect, record.path)) for record in (chosen * 2)[:LATE])
    return {
        "method": method,
        "pace": pace,
        "late": [late[int(share * (len(late) - 1))] for share in (0.5, 0.95, 0.99)],
        "stages": stages(quick, chosen),
        "start": started(folder / "openvino", chosen[0].path),
        "start onnx": started(folder / "onnx", chosen[0].path),
        "size": sum(file.stat().st_size for file in (folder / "openvino").glob("model.*")) / 2**20,
    }


def bare(inspector: Inspector) -> OpenVinoEngine:
    """The network up to the last layer that the model reads, whose output is all that comes out."""
    extractor = inspector.engine.extractor
    assert isinstance(extractor, PyramidExtractor)
    last = (*extractor.layers, *extractor.pooled)[-1]
    found = engine(PyramidExtractor(inspector.config["features"]["backbone"], [last]), "openvino", "f32")
    assert isinstance(found, OpenVinoEngine)
    return found


def stages(inspector: Runtime, chosen: Sequence[Record]) -> dict[str, float]:
    """Milliseconds of each part of an image, one at a time, the network on all cores: medians."""
    rows = [looked(inspector, record.path) for record in chosen[:64]]
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def looked(inspector: Runtime, path: Path) -> dict[str, float]:
    """Milliseconds of each part of one image."""
    times = [time.perf_counter()]
    image = decode(path)
    times.append(time.perf_counter())
    square = inspector.preparation.image(image)
    times.append(time.perf_counter())
    outputs = inspector.network.prepared(square)
    times.append(time.perf_counter())
    inspector.judge.finding(str(path), said_of(outputs), (image.shape[1], image.shape[0]))
    times.append(time.perf_counter())
    return dict(zip(("decode", "resize", "graph", "decide"), 1e3 * np.diff(times), strict=True))


def started(folder: Path, image: Path) -> tuple[float, float]:
    """Seconds from the first import to the first finding, and MiB, in a process of its own: the best of three."""
    found = []
    for _ in range(3):
        ran = subprocess.run([sys.executable, "-c", STARTED, folder, image], capture_output=True, text=True, check=True)
        found.append(json.loads(ran.stdout))
        assert not found[-1][2], "torch was imported"
    return min((one[0], one[1]) for one in found)


def seconds(function: Callable[[], Any]) -> float:
    """That a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def page(rows: Sequence[dict[str, Any]], data: Path, rounds: int) -> str:
    """The results as Markdown."""
    about = environment()
    lines = [
        "# Speed of exported models",
        "",
        f"Command: `python benchmarks/speed.py {data}`",
        "",
        f"Images a second over {IMAGES} test images of {data.name} (JPEG files, up to 384 px), Lite0 at 256 px in f32, all "
        f"of {len(os.sched_getaffinity(0))} cores; medians of {rounds} rounds. Floor: the backbone alone in OpenVINO, to "
        "the last layer that the model reads, on images that are decoded and resized already. Whole: files to findings, "
        "by `unispect.runtime`. Graph: the exported graph alone, on the same images. Ratios are to the floor of the "
        "same process.",
        "",
        "| method | floor | graph, OpenVINO | ratio | whole, OpenVINO | ratio | goal | whole, onnxruntime | ratio |",
        "| --- |" + " ---: |" * 8,
    ]
    for row in rows:
        pace, goal = row["pace"], GOALS.get(row["method"])
        parts = [f"{pace['floor']:.1f}"]
        for name in ("graph", "openvino"):
            parts += [f"{pace[name]:.1f}", f"{pace[name] / pace['floor']:.0%}"]
        parts += ["–" if goal is None else f"{goal:.0%}"]
        parts += [f"{pace['onnxruntime']:.1f}", f"{pace['onnxruntime'] / pace['floor']:.0%}"]
        lines.append(f"| {row['method']} | {' | '.join(parts)} |")
    lines += [
        "",
        f"One image at a time, OpenVINO, all cores on it (hint latency), {LATE} files: milliseconds from file to finding, "
        "and the median of each stage. Start: seconds from the first import to the first finding in a new process, and its "
        "peak of memory.",
        "",
        "| method | p50 | p95 | p99 | decode | resize | graph | decide | start, s | MiB | the same, ONNX | MiB | size |",
        "| --- |" + " ---: |" * 12,
    ]
    for row in rows:
        parts = [f"{value:.1f}" for value in row["late"]]
        parts += [f"{row['stages'][name]:.2f}" for name in ("decode", "resize", "graph", "decide")]
        for name in ("start", "start onnx"):
            parts += [f"{row[name][0]:.2f}", f"{row[name][1]:.0f}"]
        lines.append(f"| {row['method']} | {' | '.join(parts)} | {row['size']:.1f} |")
    return "\n".join([*lines, "", f"Machine: {about['machine']}  ", f"Versions: {about['versions']}", ""])


if __name__ == "__main__":
    main()
