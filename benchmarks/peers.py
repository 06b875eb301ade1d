"""Speed and memory beside anomalib's PatchCore, PaDiM and FastFlow: `python benchmarks/peers.py FOLDER`.

All models learn from the same good images of three products of FOLDER (see data.folder), brought to 256 px once for all, and
take their features from the same layers of the same network with the same weights. anomalib lives in an environment of its
own (WORK/venv, from PyPI, with the versions of torch, timm, numpy and OpenVINO that are installed here), learns there
(`peers_learn.py`) and exports its models to OpenVINO by its own export. Nothing is fetched when models are made or run.

Each model is then run in a process of its own on the same cores (`peers_run.py`), by its own inferencer and as a bare
compiled model, f32, on the same images of bytes in memory. In each process the bare backbone (up to blocks.4) takes its turn
round by round, and ratios are to it: models measured at different times compare. All processes are run in turns, repeatedly.

What is learnt is kept in WORK, so that a second run only measures; `--again` learns and exports anew. Left out: the files'
decoding, and anomalib's inferencer on two streams, since it takes one image after another.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from PIL import Image
from safetensors.torch import save_file

from unispect.benchmark import environment
from unispect.data.datasets import read_data
from unispect.data.loader import Preparation, decode
from unispect.data.records import Record
from unispect.export.bundle import export as export_model
from unispect.features.cache import FeatureCache
from unispect.features.engine import _converted as converted
from unispect.features.pyramid import PyramidExtractor
from unispect.features.weights import load_backbone_weights
from unispect.inspector import Inspector
from unispect.metrics.ranking import auroc

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "peers.md"
PRODUCTS = ("magnetic_tile", "screw", "paper_reflect")
GOOD, TESTED = 48, 8  # images of each product: good ones to learn from and to set thresholds; measured, good and defective
BACKBONE, LAYERS = "tf_efficientnet_lite0", ("blocks.3", "blocks.4")
ANOMALIB = "anomalib[openvino]==2.7.0"
ALIKE = ("torch", "torchvision", "timm", "numpy", "openvino", "pillow")  # of the same version in both environments
THEIRS = ("patchcore", "padim", "fastflow")
SAME = {"features": {"layers": list(LAYERS), "pooled": []}}
OURS: dict[str, dict[str, Any]] = {
    # the same models as anomalib's, as far as options go
    "patchcore": {**SAME, "patchcore": {"dimension": 192, "coreset": 0.1, "reweighting": "softmax"}},
    "padim": {**SAME, "padim": {"dimension": 100}},
    "fastflow": {
        **SAME,
        "training": {
            "steps": 4,
            "images": 32,
            "checks": 0,
        },  # an epoch, as anomalib's: what is learnt has no say in the time
        "fastflow": {"blocks": 8, "kernels": [3, 1], "affine": True},
    },
    # as they are by default
    "opca": {},
    "neighbours": {},
    "ensemble": {},
    "hgad": {},
}
COMMON = {"split": {"held_out": 0.1, "calibration": 0.2}, "decision": {"false_alarm_rate": 0.05}}


@dataclass(frozen=True, slots=True)
class Thing:
    """What is measured: a model and who runs it, in which Python; folder is what lies on disk."""

    name: str
    by: str
    kind: str
    python: Path
    model: Path
    folder: Path


@dataclass(slots=True)
class Measured:
    """Of one thing with one number of streams, over all its processes.

    peak        most memory, MiB, of each process
    begun       seconds from nothing to the first score, of each process
    seconds     of single images, or of all where several are in flight
    rounds      seconds of all images, the backbone's and the model's
    scores      of the images
    """

    peak: list[float] = field(default_factory=list)
    begun: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    rounds: list[tuple[float, float]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def add(self, told: Mapping[str, Any]) -> None:
        """What a process told."""
        self.peak.append(told["peak"])
        self.begun.append(told["begun"])
        self.seconds += [second for _, own in told["rounds"] for second in own]
        self.rounds += [(sum(floor), sum(own)) for floor, own in told["rounds"]]
        self.scores = told["scores"]

    @property
    def ratio(self) -> float:
        """Time of the model / time of the backbone, the median of rounds."""
        return statistics.median(own / floor for floor, own in self.rounds)

    def pace(self, images: int) -> float:
        """Images a second, the median of rounds."""
        return images / statistics.median(own for _, own in self.rounds)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of products")
    parser.add_argument("--products", nargs="+", default=PRODUCTS)
    parser.add_argument("--work", type=Path, default=Path("out/peers"), help="for environment, images and models")
    parser.add_argument("--cores", type=int, nargs="+", default=sorted(os.sched_getaffinity(0)), help="that models run on")
    parser.add_argument("--rounds", type=int, default=3, help="of all images in a process")
    parser.add_argument("--repeats", type=int, default=2, help="processes of each model")
    parser.add_argument("--ours", nargs="+", choices=OURS, default=list(OURS), help="methods of unispect")
    parser.add_argument("--again", action="store_true", help="learn and export anew")
    parser.add_argument("--note", default="", help="put below the table: what else ran on the machine")
    given = parser.parse_args()
    work = given.work.resolve()
    python = peer_environment(work / "venv")
    if given.again:
        for part in ("data", "saved", "unispect", "anomalib"):
            shutil.rmtree(work / part, ignore_errors=True)
    if not (work / "data").is_dir():
        prepare(given.data, given.products, work)
    learn_ours(work, given.ours)
    learn_theirs(work, python)
    write_floor(work / "floor")
    measured = measure(list(measurable(work, python, given.ours)), work, given.cores, given.rounds, given.repeats)
    RESULTS.write_text(page(measured, work, python, given), "utf-8")
    print(RESULTS.read_text("utf-8"))


# Both environments.


def peer_environment(folder: Path) -> Path:
    """Python of an environment with anomalib, made where it is missing or of another version."""
    python, wanted = folder / "bin" / "python", [ANOMALIB, *(f"{name}=={version(name)}" for name in ALIKE)]
    ready = folder / "ready.json"
    if not ready.is_file() or read(ready) != wanted:
        beside = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        uv = shutil.which("uv", path=beside)
        if uv is None:
            raise SystemExit("uv is not there, which makes anomalib's environment: pip install uv")
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder], check=True)
        subprocess.run([uv, "pip", "install", "--quiet", "--python", python, *wanted], check=True)
        ready.write_text(json.dumps(wanted), "utf-8")
    return python


def variables(python: Path) -> dict[str, str]:
    """The environment variables of a process; unispect's source is no part of anomalib's environment."""
    threads = str(len(os.sched_getaffinity(0)))
    # In CI OpenVINO's converter, which anomalib's export calls, reports nothing to its maker.
    own = os.environ | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "CI": "true"}
    return own if python == Path(sys.executable) else {name: value for name, value in own.items() if name != "PYTHONPATH"}


# What is learnt.


def prepare(data: Path, products: Sequence[str], work: Path) -> None:
    """The images at their size, in folders by product, and those to measure on as one array."""
    records = [record for record in read_data(data) if record.product in products]
    learnt = [record for product in products for record in first(records, product, "train", 0, GOOD)]
    tested = [
        record for product in products for label in (0, 1) for record in first(records, product, "test", label, TESTED)
    ]
    for record in (*learnt, *tested):
        kind = "bad" if record.label else "good"
        folder = work / "data" / str(record.product) / record.split / kind
        target = folder / f"{record.defect or kind}-{record.path.stem}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(square(record.path).transpose(1, 2, 0)).save(target)
    np.save(work / "images.npy", np.stack([square(record.path) for record in tested]))
    (work / "labels.json").write_text(json.dumps([record.label for record in tested]), "utf-8")


def first(records: Sequence[Record], product: str, split: str, label: int, count: int) -> list[Record]:
    """So many images of a kind, evenly taken."""
    found = [record for record in records if (record.product, record.split, record.label or 0) == (product, split, label)]
    if len(found) < count:
        raise SystemExit(f"{product}: {len(found)} images of {split} with label {label}, expected at least {count}")
    return [found[place] for place in np.linspace(0, len(found) - 1, count).astype(int)]


def square(path: Path) -> np.ndarray:
    """(3, 256, 256) uint8."""
    return Preparation().image(decode(path))


def learn_ours(work: Path, methods: Sequence[str]) -> None:
    """Our models that are not there yet, exported."""
    records, cache = read_data(work / "data"), FeatureCache(work / "cache")
    for method in methods:
        saved = work / "saved" / method
        if not saved.is_dir():
            inspector = Inspector.fit(records, {"method": method} | COMMON | OURS[method], cache=cache)
            inspector.save(saved)
        target = work / "unispect" / method
        if not target.is_dir():
            export_model(Inspector.load(saved), target, "openvino")


def hand_over(work: Path) -> None:
    """To anomalib: the images that ours learn from and set their thresholds with, and defective ones; the weights."""
    split = Inspector.load(work / "saved" / "patchcore").split
    bad = [record for record in read_data(work / "data") if record.label == 1]
    for role, records in {"learn": split.train, "good": split.calibration, "bad": bad}.items():
        target = work / "anomalib" / "data" / role
        target.mkdir(parents=True)
        for record in records:
            shutil.copy(record.path, target / f"{record.product}-{record.path.name}")
    state, _ = load_backbone_weights(BACKBONE)
    save_file({name: value.contiguous() for name, value in state.items()}, work / "anomalib" / "weights.safetensors")


def learn_theirs(work: Path, python: Path) -> None:
    """anomalib's models that are not there yet."""
    folder = work / "anomalib"
    if all((folder / method / "about.json").is_file() for method in THEIRS):
        return
    if not folder.is_dir():
        hand_over(work)
    command = [python, HERE / "peers_learn.py", folder]
    # Its choice of a coreset takes and frees 25 MB for each vector, by which glibc's heap grows by 16 MB a vector, to over
    # 30 GB, unless such blocks are kept off the heap.
    own = variables(python) | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    with tempfile.TemporaryDirectory() as elsewhere:  # it writes beside where it stands
        subprocess.run(command, check=True, env=own, cwd=elsewhere)


def write_floor(folder: Path) -> None:
    """The bare backbone up to the last layer that is used, for one image of bytes."""
    side = Preparation().size
    folder.mkdir(parents=True, exist_ok=True)
    model = converted(PyramidExtractor(BACKBONE, LAYERS).eval(), side, side)
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)


# What is measured.


def measurable(work: Path, python: Path, methods: Sequence[str]) -> Iterator[Thing]:
    """All that there is to run."""
    here, floor = Path(sys.executable), work / "floor"
    yield Thing("backbone alone", "bare", "bare", here, floor / "model.xml", floor)
    for method in THEIRS:
        folder = work / "anomalib" / method / "weights" / "openvino"
        yield Thing(f"anomalib {method}", "bare", "bare", here, folder / "model.xml", folder)
        yield Thing(f"anomalib {method}", "its inferencer", "anomalib", python, folder / "model.xml", folder)
    for method in methods:
        folder = work / "unispect" / method
        yield Thing(f"unispect {method}", "bare", "bare", here, folder / "model.xml", folder)
        yield Thing(f"unispect {method}", "its inspector", "unispect", here, folder, folder)


def measure(
    things: Sequence[Thing], work: Path, cores: Sequence[int], rounds: int, repeats: int
) -> dict[tuple[Thing, int], Measured]:
    """Each thing with one and, where it can, with two streams; all in turns."""
    cases = [(thing, streams) for thing in things for streams in ((1,) if thing.kind == "anomalib" else (1, 2))]
    measured = {case: Measured() for case in cases}
    for repeat in range(repeats):
        for thing, streams in cases:
            print(f"{repeat + 1}/{repeats} {thing.name}, {thing.by}, {streams} streams", file=sys.stderr, flush=True)
            measured[thing, streams].add(told(thing, streams, work, cores, rounds))
    return measured


def told(thing: Thing, streams: int, work: Path, cores: Sequence[int], rounds: int) -> dict[str, Any]:
    """What one process measured."""
    command = [
        thing.python,
        HERE / "peers_run.py",
        thing.kind,
        thing.model,
        work / "floor" / "model.xml",
        work / "images.npy",
    ]
    command += ["--streams", streams, "--rounds", rounds, "--cores", *cores]
    with tempfile.TemporaryDirectory() as folder:  # anomalib's inferencer keeps compiled models where it stands
        output = subprocess.check_output(list(map(str, command)), env=variables(thing.python), cwd=folder, text=True)
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


# What is told.


def page(measured: Mapping[tuple[Thing, int], Measured], work: Path, python: Path, given: argparse.Namespace) -> str:
    """The results as Markdown."""
    labels = np.array(read(work / "labels.json"))
    ones = {thing: own for (thing, streams), own in measured.items() if streams == 1}
    about = environment()
    return "\n".join(
        [
            "# Speed and memory beside anomalib",
            "",
            f"Command: `python benchmarks/peers.py FOLDER --rounds {given.rounds} --repeats {given.repeats}`",
            "",
            *explained(work, given, len(labels)),
            "",
            "| model | run by | images/s | / backbone | p50 | p95 | p99 | 2 streams, images/s | / backbone |",
            "| --- | --- " + "| ---: " * 7 + "|",
            *(speed(thing, own, measured.get((thing, 2)), len(labels)) for thing, own in ones.items()),
            "",
            "| model | run by | MiB | 2 streams, MiB | on disk, MiB | first score, s | AUROC |",
            "| --- | --- " + "| ---: " * 5 + "|",
            *(memory(thing, own, measured.get((thing, 2)), labels) for thing, own in ones.items()),
            "",
            f"Machine: {about['machine']}  ",
            f"Versions: {about['versions']}  ",
            f"anomalib's environment: {peer_versions(python)}",
            *(["", given.note] if given.note else []),
            "",
        ]
    )


def explained(work: Path, given: argparse.Namespace, images: int) -> list[str]:
    """What the columns are."""
    patchcore = Inspector.load(work / "saved" / "patchcore")
    learnt, ours = len(patchcore.split.train), len(patchcore.detector.bank.vectors)
    theirs = read(work / "anomalib" / "patchcore" / "about.json")["vectors"]
    return [
        f"Models of {', '.join(given.products)} in one, learnt from the same {learnt} good images; 256 px, Lite0 in",
        f"f32, cores {', '.join(map(str, given.cores))}. PatchCore keeps {ours} vectors in unispect,",
        f"{theirs} in anomalib.",
        "",
        "Images of bytes, in memory: one after another (images/s and percentiles of ms), and two at a time on two streams.",
        "/ backbone: time over that of the bare backbone up to blocks.4, which takes turns with the model in its process;",
        f"medians of {given.rounds * given.repeats} rounds of {images} images. MiB: the most that a process has held that",
        "loads the model and runs it. First score: seconds from a bare Python. AUROC: of these few images, to show that",
        "something was learnt, no more; each FastFlow learnt for one epoch only.",
        "",
        "By its own inferencer a model of unispect also decides, names the product and outlines defects.",
    ]


def speed(thing: Thing, one: Measured, two: Measured | None, images: int) -> str:
    """A line of the first table; two is of two streams."""
    p50, p95, p99 = (1e3 * value for value in np.percentile(one.seconds, (50, 95, 99)))
    cells = [thing.name, thing.by, f"{one.pace(images):.1f}", f"{one.ratio:.2f}", f"{p50:.1f}", f"{p95:.1f}", f"{p99:.1f}"]
    cells += ["-", "-"] if two is None else [f"{two.pace(images):.1f}", f"{two.ratio:.2f}"]
    return f"| {' | '.join(cells)} |"


def memory(thing: Thing, one: Measured, two: Measured | None, labels: np.ndarray) -> str:
    """A line of the second table."""
    scores = np.array(one.scores)
    told = f"{auroc(scores, labels):.3f}" if np.isfinite(scores).all() else "-"
    cells = [thing.name, thing.by, f"{max(one.peak):.0f}", "-" if two is None else f"{max(two.peak):.0f}"]
    cells += [f"{size(thing.folder):.1f}", f"{statistics.median(one.begun):.1f}", told]
    return f"| {' | '.join(cells)} |"


def read(file: Path) -> Any:
    """Content of a JSON file."""
    return json.loads(file.read_text("utf-8"))


def size(folder: Path) -> float:
    """MiB of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20


def peer_versions(python: Path) -> str:
    """Versions of what anomalib runs on."""
    names = ("anomalib", *ALIKE, "nncf", "lightning")
    code = "import sys, importlib.metadata as m; print(', '.join(f'{name} {m.version(name)}' for name in sys.argv[1:]))"
    return subprocess.check_output([python, "-c", code, *names], text=True).strip()


if __name__ == "__main__":
    main()
