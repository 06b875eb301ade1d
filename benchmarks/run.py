"""Measure again what benchmarks/results holds: `make bench`, with REALDATA=DIR for real products.

A thin layer over `unispect benchmark`: it runs a grid in an empty folder and keeps the summary as NAME.md and NAME.json.
Nothing that learns or calibrates sees a test image; columns with a star are the exception and say so.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def record(name: str, command: str, options: list[str]) -> None:
    """Run the grid of this name and keep its summary with the command that made it."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["benchmark", str(HERE / "grids" / f"{name}.toml"), "-o", folder, *options]
        subprocess.run([sys.executable, "-m", "unispect", *arguments], check=True)
        out = Path(folder)
        title, rest = (out / "table.md").read_text("utf-8").split("\n", 1)
        tables = [(path.parent.name, path.read_text("utf-8")) for path in sorted(out.glob("cells/*/table.txt"))]
        content = json.loads((out / "table.json").read_text("utf-8"))
        first = tables[:1] if tables else []
        details = "".join(f"\n## {cell}\n\n```text\n{text.rstrip()}\n```\n" for cell, text in first)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text(f"{title}\n\nCommand: `{command}`\n{rest.rstrip()}\n{details}", "utf-8")
        (RESULTS / f"{name}.json").write_text(json.dumps({"command": command} | content, indent=1) + "\n", "utf-8")
        shutil.rmtree(out / "cells", ignore_errors=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--realdata", type=Path, help="folder of real products in the MVTec layout")
    parser.add_argument("--mvtec-size", type=Path, help="folder that benchmarks/trees.py made")
    parser.add_argument("--grid", help="one grid of benchmarks/grids by name, such as statistical")
    parser.add_argument("--seeds", help="instead of those of the grid, such as 0,1,2")
    chosen = parser.parse_args()
    options = [] if chosen.seeds is None else ["--seeds", chosen.seeds]
    if chosen.grid:
        data = [] if chosen.realdata is None else ["--data", f"realdata={chosen.realdata.resolve()}"]
        where = "REALDATA=../shared/realdata " if chosen.realdata else ""
        record(chosen.grid, f"make bench {where}GRID={chosen.grid}", options + data)
    elif chosen.realdata:
        options += ["--data", f"realdata={chosen.realdata.resolve()}"]
        record("realdata", "make bench REALDATA=../shared/realdata", options)
    elif chosen.mvtec_size:
        options += ["--data", f"mvtec-size={chosen.mvtec_size.resolve()}"]
        record("mvtec-size", "python benchmarks/run.py --mvtec-size out/mvtec-size", options)
    else:
        record("builtin", "make bench", options)


if __name__ == "__main__":
    main()
