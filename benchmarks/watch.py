"""10 000 files through `unispect watch`, killed again and again: `python benchmarks/watch.py MODEL`.

MODEL is an exported model. Counted are findings that are missing, damaged, written twice or left over. A finding that was
written twice would be another file: its number on the disk (inode) would change between two kills.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

from unispect.benchmark import environment
from unispect.data.factory import draw

RESULTS = Path(__file__).parent / "results" / "watch.md"
DRAWN = 16  # different pictures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder that `unispect export` wrote")
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--work", type=Path, default=Path("out/watch"))
    given = parser.parse_args()
    shutil.rmtree(given.work, ignore_errors=True)
    source, out = given.work / "in", given.work / "out"
    fill(source, given.files)
    found = watched(given.model, source, out, given.kills)
    RESULTS.write_text(page(found, given.files, given.model), "utf-8")
    print(RESULTS.read_text("utf-8"))


def fill(folder: Path, files: int) -> None:
    """So many images, in ten folders; every hundredth is broken."""
    content = []
    for number in range(DRAWN):
        place = folder / "drawn.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw("gear", number, size=96)[0]).save(place)
        content.append(place.read_bytes())
        place.unlink()
    for number in range(files):
        place = folder / f"{number % 10}" / f"{number:05}.jpg"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(b"broken" if number % 100 == 99 else content[number % DRAWN])


def watched(model: Path, source: Path, out: Path, kills: int) -> dict[str, float]:
    """Run until all is done, killed at random moments, and count."""
    random.seed(0)
    states: dict[str, tuple[int, int]] = {}
    count, start, twice, slices = 0, time.perf_counter(), 0, []
    command = [sys.executable, "-m", "unispect", "watch", model, source, "--out", out, "--once", "--settle", "0", "--json"]
    while True:
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            code = process.wait(random.uniform(2, 8) if count < kills else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            code = process.wait()
            count += 1
        now = {str(path.relative_to(out)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.rglob("*.json")}
        twice += sum(now.get(name) != state for name, state in states.items())
        slices.append(len(now) - len(states))
        states = now
        if code == 0:
            break
    images = {f"{path.relative_to(source)}.json" for path in source.rglob("*.jpg")}
    said = [json.loads((out / name).read_text()) for name in states if not Path(name).name.startswith(".")]
    return {
        "kills": count,
        "findings": sum("score" in one for one in said),
        "errors": sum("error" in one for one in said),
        "missing": len(images - states.keys()),
        "of no image": len(states.keys() - images),
        "written twice": twice,
        "left over": sum(1 for _ in out.rglob("*.partial")),
        "kills in the middle of work": sum(part > 0 for part in slices[:-1]),
        "seconds": time.perf_counter() - start,
    }


def page(found: dict[str, float], files: int, model: Path) -> str:
    """The results as Markdown."""
    about = environment()
    return "\n".join(
        [
            "# A watch that is killed",
            "",
            f"Command: `python benchmarks/watch.py {model}`",
            "",
            f"{files} files, one in a hundred of them no image, through `unispect watch`, which gets SIGKILL after 2 to 8 "
            "seconds and is started again.",
            "",
            "| | |",
            "| --- | ---: |",
            *(f"| {name} | {value:.0f} |" for name, value in found.items()),
            "",
            f"Machine: {about['machine']}  ",
            f"Versions: {about['versions']}",
            "",
        ]
    )


if __name__ == "__main__":
    main()
