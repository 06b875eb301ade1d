"""Measure again what benchmarks/results holds: `make bench`, with REALDATA=DIR for real products.

A thin layer over `unispect benchmark`: it runs a grid in an empty folder and keeps the summary as NAME.md and NAME.json.
Nothing that learns or calibrates sees a test image; columns with a star are the exception and say so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def record(name: str, command: str, options: list[str], out: Path) -> None:
    """Run the grid of this name in a folder and keep its summary with the command that made it."""
    arguments = ["benchmark", str(HERE / "grids" / f"{name}.toml"), "-o", str(out), *options]
    subprocess.run([sys.executable, "-m", "unispect", *arguments], check=True)
    title, rest = (out / "table.md").read_text("utf-8").split("\n", 1)
    tables = [(path.parent.name, path.read_text("utf-8")) for path in sorted(out.glob("cells/*/table.txt"))]
    content = json.loads((out / "table.json").read_text("utf-8"))
    first = tables[:1] if tables else []
    details = "".join(f"\n## {cell}\n\n```text\n{text.rstrip()}\n```\n" for cell, text in first)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(f"{title}\n\nCommand: `{command}`\n{rest.rstrip()}\n{details}", "utf-8")
    (RESULTS / f"{name}.json").write_text(json.dumps({"command": command} | content, indent=1) + "\n", "utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--realdata", type=Path, help="folder of real products in the MVTec layout")
    parser.add_argument("--mvtec-size", type=Path, help="folder that benchmarks/trees.py made")
    parser.add_argument("--grid", help="one grid of benchmarks/grids by name, such as statistical")
    parser.add_argument("--seeds", help="instead of those of the grid, such as 0,1,2")
    parser.add_argument("--jobs", type=int, default=1, help="cells that run at once, each with its share of the cores")
    parser.add_argument("--work", type=Path, help="folder to run in and keep: a run that was stopped goes on there")
    chosen = parser.parse_args()
    if chosen.work is not None:
        run(chosen, chosen.work)
        return
    with tempfile.TemporaryDirectory() as folder:
        run(chosen, Path(folder))


def run(chosen: argparse.Namespace, out: Path) -> None:
    """The grid that was asked for."""
    options = ["--jobs", str(chosen.jobs)] + ([] if chosen.seeds is None else ["--seeds", chosen.seeds])
    jobs = "" if chosen.jobs == 1 else f" JOBS={chosen.jobs}"
    if chosen.grid:
        data = [] if chosen.realdata is None else ["--data", f"realdata={chosen.realdata.resolve()}"]
        where = "REALDATA=../shared/realdata " if chosen.realdata else ""
        record(chosen.grid, f"make bench {where}GRID={chosen.grid}{jobs}", options + data, out)
    elif chosen.realdata:
        options += ["--data", f"realdata={chosen.realdata.resolve()}"]
        record("realdata", f"make bench REALDATA=../shared/realdata{jobs}", options, out)
    elif chosen.mvtec_size:
        options += ["--data", f"mvtec-size={chosen.mvtec_size.resolve()}"]
        record("mvtec-size", "python benchmarks/run.py --mvtec-size out/mvtec-size", options, out)
    else:
        record("builtin", f"make bench{jobs}", options, out)


if __name__ == "__main__":
    main()
