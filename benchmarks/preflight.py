"""What a fit was predicted to take beside what it took: python benchmarks/preflight.py DATA

Every method is planned and fitted in a process of its own, with an empty cache. Minutes are those from the end of the
imports to the saved model. Also: size and time of installing, and the time to a first result. Results are kept method by
method in --work, so that a run that was stopped goes on; delete a file there to measure it again.

A prediction of minutes is measured on the machine as it is then: other jobs disturb both it and the fit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unispect.benchmark import environment
from unispect.config import assignment, merge
from unispect.detectors.methods import METHODS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "preflight.md"
RUNTIME = ("numpy", "pillow", "onnxruntime")
MIB = 2**20


def main() -> None:
    """Command line."""
    if len(sys.argv) == 3 and sys.argv[1] == "--job":
        job(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of products")
    parser.add_argument("--work", type=Path, default=Path("out/preflight"), help="where results wait for the table")
    parser.add_argument("--methods", nargs="*", default=[*METHODS, "opca+cada"], help="METHOD or METHOD+ALIGNER")
    parser.add_argument("--set", action="append", default=[], help="settings for all, such as training.steps=50")
    parser.add_argument("--lock", type=Path, default=ROOT / "requirements.lock", help="what is installed")
    parser.add_argument("--no-install", action="store_true", help="leave out installing and the first result")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    for name in given.methods:
        kept(given.work / f"{name}.json", lambda name=name: measured(given.data, name, given.set))
    if not given.no_install:
        kept(given.work / "install.json", lambda: installed(["-r", str(given.lock)]))
        kept(given.work / "runtime.json", lambda: installed(list(RUNTIME)))
        kept(given.work / "first.json", first_result)
    RESULTS.write_text(page(given.work, given.data, given.set), "utf-8")
    print(RESULTS.read_text("utf-8"))


def kept(file: Path, measure: Any) -> None:
    """Measure once."""
    if not file.exists():
        file.write_text(json.dumps(measure() | {"environment": environment()}, indent=1), "utf-8")
        print(file.stem, flush=True)


def measured(data: Path, name: str, settings: Sequence[str]) -> dict[str, Any]:
    """A plan and a fit, each in a process of its own."""
    method, _, aligner = name.partition("+")
    config: dict[str, Any] = {"method": method, "aligner": aligner or "none"}
    for text in settings:
        if not text.startswith("training.") or hasattr(METHODS[method], "stages"):
            config = merge(config, assignment(text))
    with tempfile.TemporaryDirectory() as folder:
        about = {"data": str(data.resolve()), "config": config, "folder": folder}
        return {step: process(about | {"step": step}) for step in ("plan", "fit")}


def process(about: dict[str, Any]) -> dict[str, Any]:
    """What a job prints."""
    done = subprocess.run([sys.executable, __file__, "--job", json.dumps(about)], stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def job(about: dict[str, Any]) -> None:
    """Plan or fit in this process, and print what it took."""
    import resource

    from unispect.features.cache import FeatureCache
    from unispect.inspector import Inspector
    from unispect.preflight import plan

    folder, start, found = Path(about["folder"]), time.perf_counter(), {}
    cache = FeatureCache(folder / "cache")
    if about["step"] == "plan":
        found = plan(Path(about["data"]), about["config"], cache=cache).as_dict()
    else:
        checkpoint = folder / "work" / "checkpoint.safetensors"
        inspector = Inspector.fit(Path(about["data"]), about["config"], cache=cache, checkpoint=checkpoint)
        model = inspector.save(folder / "model")
        found = {
            "features": sum(file.stat().st_size for file in (folder / "cache").rglob("*.f16")) / MIB,
            "model": sum(file.stat().st_size for file in model.iterdir()) / MIB,
            "kept": inspector.facts["history"]["steps"],
        }
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found | {"seconds": seconds, "peak": peak, "load": os.getloadavg()[0]}))


def installed(packages: Sequence[str]) -> dict[str, Any]:
    """MiB and seconds of a fresh environment, with uv's cache and without it."""
    with tempfile.TemporaryDirectory() as folder:
        place, uv = Path(folder) / "venv", [sys.executable, "-m", "uv"]
        subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, str(place)], check=True)
        seconds = {}
        for name, extra in {"fetched": ["--no-cache"], "cached": []}.items():
            start = time.perf_counter()
            command = [*uv, "pip", "install", "--quiet", "--reinstall", "--python", str(place / "bin" / "python"), *extra]
            subprocess.run([*command, *packages], check=True)
            seconds[name] = time.perf_counter() - start
        files = [file for file in place.rglob("*") if file.is_file() and not file.is_symlink()]
        return seconds | {"size": sum(file.stat().st_size for file in files) / MIB}


def first_result() -> dict[str, Any]:
    """Seconds of `unispect demo --quick` and of `unispect demo`, products drawn, fitted, evaluated and reported."""
    seconds = {}
    for name, extra in {"quick": ["--quick", "--false-alarm-rate", "0.1"], "full": []}.items():
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            command = [sys.executable, "-m", "unispect", "demo", "-o", str(Path(folder) / "demo"), *extra]
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            seconds[name] = time.perf_counter() - start
    return seconds


def page(work: Path, data: Path, settings: Sequence[str]) -> str:
    """The results as Markdown."""
    found = {file.stem: json.loads(file.read_text("utf-8")) for file in sorted(work.glob("*.json"))}
    about = next(iter(found.values()))["environment"]
    more = "".join(f" --set {text}" for text in settings)
    lines = [
        "# What a fit was predicted to take, and what it took",
        "",
        f"Command: `python benchmarks/preflight.py {data}{more}`",
        "",
        "Predicted / measured, each in a process of its own. Minutes from the end of the imports to the saved model; load "
        "is the machine's when the fit ended, and above the number of cores it disturbs both. Prediction itself took the "
        "seconds of the last column.",
        "",
        "| method | memory, MiB | minutes | features, MiB | model, MiB | steps looked at | load | plan, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(row(name, one) for name, one in found.items() if "fit" in one),
        "",
    ]
    if "install" in found:
        lines += ["| installing into a fresh environment | MiB | seconds, fetched | seconds, from uv's cache |"]
        lines += ["| --- | ---: | ---: | ---: |"]
        lines += [install(name, found[name]) for name in ("install", "runtime") if name in found] + [""]
    if "first" in found:
        first = found["first"]
        lines += [
            f"First result: `unispect demo --quick` {first['quick']:.0f} s, `unispect demo` {first['full']:.0f} s.",
            "",
        ]
    return "\n".join([*lines, f"Machine: {about['machine']}  ", f"Versions: {about['versions']}", ""])


def row(name: str, one: dict[str, Any]) -> str:
    """One method."""
    said, took = one["plan"], one["fit"]
    pairs = (
        (said["memory"]["total"], took["peak"], ".0f"),
        (said["minutes"]["total"], took["seconds"] / 60, ".2f"),
        (said["disk"]["features"], took["features"], ".0f"),
        (said["disk"]["model"], took["model"], ".1f"),
    )
    cells = " | ".join(f"{a:{form}} / {b:{form}}" for a, b, form in pairs)
    steps = took["kept"][-1] if took["kept"] else "-"
    return f"| {name} | {cells} | {steps} | {took['load']:.1f} | {said['seconds']:.0f} |"


def install(name: str, one: dict[str, Any]) -> str:
    """One set of packages."""
    what = "requirements.lock" if name == "install" else ", ".join(RUNTIME)
    return f"| {what} | {one['size']:.0f} | {one['fetched']:.0f} | {one['cached']:.0f} |"


if __name__ == "__main__":
    main()
