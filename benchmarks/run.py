"""Measure again what benchmarks/results holds: `make bench` for the built-in products, with REALDATA=DIR for real ones.

Every figure comes from `unispect fit` and `unispect evaluate` run here: fixed steps, no test image seen in learning or
calibration, no product label in scoring. Results are one JSON and one Markdown file for each data set.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "timm", "openvino", "numpy", "pillow")


def run(*arguments: str) -> float:
    """Seconds that a unispect command took."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "unispect", *arguments], check=True)
    return time.perf_counter() - start


def processor() -> str:
    """Model name of the CPU."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def measure(data: Path, ignored: list[str], seed: int, folder: Path) -> dict[str, object]:
    """Fit and evaluate once, with an empty feature cache."""
    os.environ["UNISPECT_CACHE"] = str(folder / "cache")
    model, out = folder / "model", folder / "evaluation"
    fit = run("fit", str(data), "-o", str(model), "--seed", str(seed))
    flags = [flag for name in ignored for flag in ("--ignore-masks", name)]
    evaluate = run("evaluate", str(model), str(data), "-o", str(out), *flags)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    table = json.loads((out / "evaluation.json").read_text("utf-8"))
    size = sum(file.stat().st_size for file in model.iterdir()) / 2**20
    facts = {
        "fit_s": round(fit, 1),
        "evaluate_s": round(evaluate, 1),
        "peak_gib": round(peak, 2),
        "model_mib": round(size, 1),
    }
    return {"seed": seed, **facts, "table": table, "text": (out / "table.txt").read_text("utf-8")}


def record(name: str, data: Path, command: str, ignored: list[str], seeds: list[int]) -> None:
    """Measure every seed and write NAME.json and NAME.md."""
    machine = f"{processor()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    runs = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            runs.append(measure(data, ignored, seed, Path(folder)))
    RESULTS.mkdir(exist_ok=True)
    content = {"command": command, "machine": machine, "versions": versions, "runs": runs}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    (RESULTS / f"{name}.md").write_text(page(name, content, runs), "utf-8")


def page(name: str, content: dict[str, object], runs: list[dict[str, object]]) -> str:
    """The results as Markdown."""
    lines = [
        f"# {name}: HGAD, default settings",
        "",
        f"Command: `{content['command']}`  ",
        f"Machine: {content['machine']}  ",
    ]
    lines += [f"Versions: {content['versions']}", ""]
    lines += [
        "| seed | image AUROC mean / pooled | pixel AUROC mean / pooled | false alarms at 1 % | fit s | peak GiB | MiB |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for result in runs:
        table = result["table"]
        assert isinstance(table, dict)
        cells = [f"{table['mean'][key]:.3f} / {table['pooled'][key]:.3f}" for key in ("image_auroc", "pixel_auroc")]
        realised = f"{table['false_alarm_rate']['realised']:.2%}"
        costs = [str(result[key]) for key in ("fit_s", "peak_gib", "model_mib")]
        lines.append("| " + " | ".join([str(result["seed"]), *cells, realised, *costs]) + " |")
    return "\n".join(
        [*lines, "", "Seed " + str(runs[0]["seed"]) + ":", "", "```text", str(runs[0]["text"]).rstrip(), "```", ""]
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--realdata", type=Path, help="folder of real products in the MVTec layout")
    parser.add_argument("--ignore-masks", nargs="*", default=["pcb"], help="products of --realdata whose masks are boxes")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    chosen = parser.parse_args()
    if chosen.realdata:
        record("realdata", chosen.realdata, "make bench REALDATA=../shared/realdata", chosen.ignore_masks, chosen.seeds)
        return
    with tempfile.TemporaryDirectory() as folder:
        from unispect import write_products

        record("builtin", write_products(Path(folder) / "data", train=130), "make bench", [], chosen.seeds)


if __name__ == "__main__":
    main()
