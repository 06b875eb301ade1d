"""A grid of method x data x backbone x seed -> one result file a cell. Resumable; every cell is a process of its own.

OUT/cells/<method>--<data>--<backbone>--s<seed>.json    what was measured, and the key by which it is not run again
OUT/cells/<method>--<data>--<backbone>--s<seed>/        the model, report.html, scores.csv of each image
OUT/data/, OUT/cache/                                   generated products; features, shared by all cells
"""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

from unispect.config import construct, merge, read_toml
from unispect.data.datasets import DATASETS, read_data
from unispect.data.factory import write_products
from unispect.data.records import ROLES, Record
from unispect.errors import ConfigError, DataError, UnispectError, unknown_name
from unispect.evaluation import Evaluation, evaluate
from unispect.features.cache import FeatureCache
from unispect.inspector import Inspector, complete
from unispect.published.tables import Comparison, Measured, Published, compare
from unispect.report.results import provenance, write_results

Result = dict[str, Any]
PACKAGES = ("unispect", "torch", "timm", "openvino", "numpy", "pillow")
TABLES = ("title", "seeds", "data", "backbones", "methods")
TIMED = 200  # about so many images tell the pace
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # safe in the name of a file


@dataclass(frozen=True, slots=True)
class Products:
    """Built-in products to generate: good ones to train, good and bad ones to test with, side in pixels."""

    train: int = 130
    good: int = 40
    bad: int = 8
    side: int = 256
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """Where the images of a data set are.

    root           folder or manifest; empty for generated products
    dataset        name of the public data set that it is; empty for the usual layouts
    partial        go on where it is not complete
    ignore_masks   products whose masks are no outlines
    generate       the built-in products instead
    """

    root: str = ""
    dataset: str = ""
    partial: bool = False
    ignore_masks: tuple[str, ...] = ()
    generate: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.root) == bool(self.generate):
            raise ConfigError('expected exactly one of root = "FOLDER" and generate = { train = 130, ... }')
        if self.dataset and self.dataset not in DATASETS:
            raise ConfigError(unknown_name("data set", self.dataset, DATASETS))
        construct(Products, self.generate, "generate")

    def records(self, generated: Path) -> list[Record]:
        """Its records; products that are not there yet are drawn into a folder."""
        if self.root:
            return read_data(Path(self.root), self.dataset or None, self.partial)
        if not (generated / "done").is_file():
            products = construct(Products, self.generate, "generate")
            write_products(generated / "images", products.train, products.good, products.bad, products.side, products.seed)
            (generated / "done").touch()
        return read_data(generated / "images")


@dataclass(frozen=True, slots=True)
class Cell:
    """One fit and one evaluation. The settings are complete."""

    method: str
    data: str
    backbone: str
    seed: int
    settings: dict[str, Any]
    source: Source

    @property
    def name(self) -> str:
        """Name of its result file."""
        return f"{self.method}--{self.data}--{self.backbone}--s{self.seed}"


@dataclass(frozen=True, slots=True)
class Grid:
    """What is to be measured."""

    title: str
    cells: tuple[Cell, ...]


def read_grid(path: Path, roots: Mapping[str, Path] | None = None, seeds: Sequence[int] | None = None) -> Grid:
    """A grid from a TOML file; what it names is checked before anything runs.

    title, seeds                 of the benchmark
    [data.NAME]                  a Source: root, dataset, partial, ignore_masks, or generate
    [backbones.NAME]             tables of settings, such as features and preparation
    [methods.NAME]               method, config (a TOML file), and tables of settings
    roots                        folders of data sets, instead of those in the file
    seeds                        instead of those in the file

    Paths in the file are relative to it. Raises ConfigError for unknown names and impossible values, DataError where
    a folder is missing.
    """
    table, folder = read_toml(path), path.parent
    for name in table:
        if name not in TABLES:
            raise ConfigError(f"{path}: {unknown_name('table', name, TABLES)}")
    for name in ("data", "methods"):
        if not table.get(name):
            raise ConfigError(f"{path}: no [{name}.NAME]: at least one is needed")
    for name in ("data", "methods", "backbones"):
        _check_names(path, name, table.get(name, {}))
    chosen = _checked_seeds(path, table.get("seeds", [0]) if seeds is None else list(seeds))
    given = dict(roots or {})
    for name in given:
        if name not in table["data"]:
            raise ConfigError(f"--data {name}={given[name]}: {unknown_name('data set', name, table['data'])}")
    sources = {name: _source(name, about, folder, given.get(name)) for name, about in table["data"].items()}
    methods = {name: _method(about, folder) for name, about in table["methods"].items()}
    backbones = table.get("backbones") or {"default": {}}
    cells = tuple(
        Cell(
            method,
            data,
            backbone,
            seed,
            _settings(f"{path}: backbones.{backbone} and methods.{method}", methods[method], backbones[backbone], seed),
            sources[data],
        )
        for data in sources
        for method in methods
        for backbone in backbones
        for seed in chosen
    )
    return Grid(str(table.get("title", path.stem)), cells)


def _check_names(path: Path, kind: str, tables: Any) -> None:
    """A table of tables, whose names can be part of the name of a file."""
    if not isinstance(tables, Mapping):
        raise ConfigError(f"{path}: {kind}={tables!r}: expected tables [{kind}.NAME]")
    for name, about in tables.items():
        if not isinstance(about, Mapping):
            raise ConfigError(f"{path}: {kind}.{name}={about!r}: expected a table [{kind}.{name}]")
        if not NAME.fullmatch(name):
            raise ConfigError(f"{path}: {kind} {name!r}: expected a name of letters, digits, _, . and -: it names files")


def _checked_seeds(path: Path, seeds: Any) -> list[int]:
    """Their kind is checked with the other settings."""
    if not isinstance(seeds, list) or not seeds or len({repr(seed) for seed in seeds}) < len(seeds):
        raise ConfigError(f"{path}: seeds={seeds!r}: expected a list of different whole numbers, such as [0, 1, 2]")
    return seeds


def _source(name: str, about: Mapping[str, Any], folder: Path, root: Path | None) -> Source:
    given = dict(about)
    if root is not None:
        given = {key: value for key, value in given.items() if key != "generate"} | {"root": str(root)}
    elif given.get("root"):
        given["root"] = str((folder / given["root"]).resolve())
    source = construct(Source, given, f"data.{name}")
    if source.root and not Path(source.root).exists():
        how = f"; {DATASETS[source.dataset].source}" if source.dataset else ""
        raise DataError(f"data.{name}: {source.root}: no such folder: name it with --data {name}=FOLDER{how}")
    return source


def _method(about: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    own = dict(about)
    config = own.pop("config", "")
    if not isinstance(config, str):
        raise ConfigError(f"config={config!r}: expected the path of a TOML file")
    return merge(read_toml(folder / config) if config else {}, own)


def _settings(where: str, own: Mapping[str, Any], backbone: Mapping[str, Any], seed: int) -> dict[str, Any]:
    try:
        return complete(merge(merge(own, backbone), {"seed": seed}))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def run(grid: Grid, out: Path, jobs: int = 1, progress: Callable[[int, int], None] | None = None) -> list[Result]:
    """Run the cells that have no result yet, `jobs` at a time, and return the results of all, in their order.

    A cell that fails has status "failed" and its error, and is run again next time; the others go on. Features are
    shared, so only the first cell of a data set and backbone computes them: see "images" in its result.

    progress   called with (cells done, cells in all)
    """
    if jobs < 1:
        raise ConfigError(f"jobs={jobs}: expected at least 1")
    for folder in ("cells", "data", "cache"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    keys = _keys(grid, out)
    results: dict[str, Result] = {}
    waiting = []
    for cell in grid.cells:
        known = _known(out, cell, keys[cell.name])
        if known is None:
            waiting.append(cell)
        else:
            results[cell.name] = known
    if progress is not None:
        progress(len(results), len(grid.cells))
    for cell in {cell.data: cell for cell in waiting if cell.source.generate}.values():
        cell.source.records(_generated(out, cell))  # drawn here, so that two cells do not both draw them
    with closing(_all(waiting, out, keys, jobs)) as finished:
        for cell, result in finished:
            results[cell.name] = result
            if progress is not None:
                progress(len(results), len(grid.cells))
    return [results[cell.name] for cell in grid.cells]


def _all(cells: Sequence[Cell], out: Path, keys: Mapping[str, str], jobs: int) -> Generator[tuple[Cell, Result]]:
    """Cells with their results as they come, each on cores of its own."""
    slots: SimpleQueue[list[int]] = SimpleQueue()
    for cores in _shares(jobs):
        slots.put(cores)
    processes = _Processes()

    def one(cell: Cell) -> Result:
        cores = slots.get()
        try:
            return _run_cell(cell, out, keys[cell.name], cores, processes)
        finally:
            slots.put(cores)

    with ThreadPoolExecutor(jobs) as pool:
        tasks = {pool.submit(one, cell): cell for cell in cells}
        try:
            for task in as_completed(tasks):
                yield tasks[task], task.result()
        except BaseException:
            for task in tasks:
                task.cancel()
            processes.stop()
            raise


class _Processes:
    """Those that run now. Once stopped, no other is started, whatever a thread was about to do."""

    def __init__(self) -> None:
        self._lock, self._running, self.stopped = Lock(), set[subprocess.Popen[bytes]](), False

    def run(self, command: Sequence[str], variables: Mapping[str, str], log: Path) -> int:
        """Exit code; what it says goes to a file."""
        with log.open("wb") as said:
            with self._lock:
                if self.stopped:
                    return -1
                process = subprocess.Popen(command, env=variables, stdout=said, stderr=subprocess.STDOUT)
                self._running.add(process)
            code = process.wait()
        with self._lock:
            self._running.discard(process)
        return code

    def stop(self) -> None:
        """End them all."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                process.terminate()


def _shares(jobs: int) -> list[list[int]]:
    """Cores of this process dealt to the jobs; with more jobs than cores, several share one."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return [cores[number::jobs] or [cores[number % len(cores)]] for number in range(jobs)]


def _run_cell(cell: Cell, out: Path, key: str, cores: list[int], processes: _Processes) -> Result:
    """Run a cell in a process and return what it wrote, or how it ended."""
    folder, target = out / "cells" / cell.name, _file(out, cell)
    folder.mkdir(parents=True, exist_ok=True)
    job, log = folder / "job.json", folder / "log.txt"
    about = {"cell": asdict(cell), "key": key, "out": str(out.resolve()), "cores": cores, "parent": os.getpid()}
    job.write_text(json.dumps(about, indent=1), "utf-8")
    threads = str(len(cores))
    variables = os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    code = processes.run([sys.executable, "-m", "unispect.benchmark", str(job)], variables, log)
    result = _read(target)
    if code == 0 and result is not None and result.get("key") == key:
        return result
    said = log.read_text("utf-8", errors="replace").splitlines()
    last = next((line for line in reversed(said) if line.strip()), "nothing was said")
    failed = _failed(cell, f"ended with code {code}: {last} (see {log})")
    if not processes.stopped:
        _write(target, failed, key)
    return failed


def _file(out: Path, cell: Cell) -> Path:
    """Where its result goes."""
    return out / "cells" / f"{cell.name}.json"


def _write(target: Path, result: Result, key: str) -> None:
    """A result file, which appears whole or not at all."""
    draft = target.with_name(f"{target.name}.{os.getpid()}.part")
    draft.write_text(json.dumps(result | {"key": key}, indent=1, allow_nan=False) + "\n", "utf-8")
    draft.replace(target)


def _failed(cell: Cell, error: str) -> Result:
    about = {"method": cell.method, "data": cell.data, "backbone": cell.backbone, "seed": cell.seed}
    empty = dict.fromkeys(("costs", "evaluation", "report", "scores"))
    return {
        "cell": about,
        "status": "failed",
        "error": " ".join(error.split()),
        **empty,
        "environment": environment(),
        "settings": cell.settings,
    }


def _keys(grid: Grid, out: Path) -> dict[str, str]:
    """What decides whether a result still holds: settings, data (names, sizes, times of change) and version."""
    listings: dict[str, str] = {}
    for cell in grid.cells:
        if cell.data not in listings:
            listings[cell.data] = _listing(cell.source, _generated(out, cell))
    return {
        cell.name: sha256(
            json.dumps(
                {
                    "settings": cell.settings,
                    "ignore_masks": cell.source.ignore_masks,
                    "data": listings[cell.data],
                    "version": version("unispect"),
                },
                sort_keys=True,
            ).encode()
        ).hexdigest()
        for cell in grid.cells
    }


def _generated(out: Path, cell: Cell) -> Path:
    """Folder of generated products, by what they are."""
    about = sha256(json.dumps(cell.source.generate, sort_keys=True).encode()).hexdigest()[:8]
    return out / "data" / f"{cell.data}-{about}"


def _listing(source: Source, generated: Path) -> str:
    if source.generate:
        return json.dumps(source.generate, sort_keys=True)
    digest, root = sha256(), Path(source.root)
    for record in source.records(generated):
        for path in (record.path, record.mask):
            if path is not None and path.exists():
                status, name = path.stat(), path.relative_to(root) if path.is_relative_to(root) else path
                digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
        digest.update(f"{record.product} {record.label} {record.group} {record.split}\n".encode())
    return digest.hexdigest()


def _known(out: Path, cell: Cell, key: str) -> Result | None:
    result = _read(_file(out, cell))
    return result if result is not None and result.get("key") == key and result.get("status") == "done" else None


def _read(path: Path) -> Result | None:
    """A result file; None where it is missing or damaged."""
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError):
        return None


# One cell, in its own process


def main(job: Path) -> int:
    """Run the cell that a job file describes and write its result; an error of the user's becomes a failed result."""
    about = json.loads(job.read_text("utf-8"))
    if about["parent"] == os.getppid():
        Thread(target=_end_with_parent, args=(about["parent"],), daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, about["cores"])
    named = about["cell"]
    cell = Cell(**(named | {"source": construct(Source, named["source"], "source")}))
    out = Path(about["out"])
    try:
        result = _measured(cell, out)
    except UnispectError as error:
        result = _failed(cell, str(error))
    _write(_file(out, cell), result, about["key"])
    return 0


def _end_with_parent(parent: int, every: float = 0.5) -> None:
    """End this process soon after the one that started it was killed: nothing works on unseen. `every` in seconds."""
    while os.getppid() == parent:
        time.sleep(every)
    os._exit(1)


def _measured(cell: Cell, out: Path) -> Result:
    """Fit, evaluate and write the cell's own report."""
    folder = out / "cells" / cell.name
    records = cell.source.records(_generated(out, cell))
    computed: dict[str, int] = {}  # stage -> images whose features were not in the cache

    def count(stage: str, done: int, total: int, _: Mapping[str, float]) -> None:
        if stage.startswith("features"):
            computed[stage] = done

    start = time.perf_counter()
    inspector = Inspector.fit(records, cell.settings, cache=FeatureCache(out / "cache"), progress=count)
    fitted = time.perf_counter()
    model = inspector.save(folder / "model", overwrite=True)
    measuring = time.perf_counter()
    evaluation = evaluate(inspector, records, cell.source.ignore_masks)
    done = time.perf_counter()
    test = [record for record in records if record.split == "test"]
    pace = _pace(inspector, test[:: max(1, len(test) // TIMED)])
    facts = provenance(inspector, f"unispect benchmark, cell {cell.name}")
    report = write_results(evaluation, folder, f"{cell.method} on {cell.data}, {cell.backbone}, seed {cell.seed}", facts)
    return {
        "cell": {"method": cell.method, "data": cell.data, "backbone": cell.backbone, "seed": cell.seed},
        "status": "done",
        "error": None,
        "costs": {
            "fit_s": round(fitted - start, 1),
            "evaluate_s": round(done - measuring, 1),
            "images_per_s": pace,
            "peak_gib": _peak(),
            "model_mib": round(sum(file.stat().st_size for file in model.iterdir()) / 2**20, 1),
        },
        "evaluation": evaluation.as_dict(),
        "images": {role: len(getattr(inspector.split, role)) for role in ROLES} | {"computed": sum(computed.values())},
        "report": str(report.relative_to(out)),
        "scores": str(_write_scores(evaluation, folder / "scores.csv").relative_to(out)),
        "environment": environment(),
        "dataset": cell.source.dataset or cell.data,
        "settings": cell.settings,
    }


def _pace(inspector: Inspector, records: Sequence[Record]) -> float:
    """Images a second from file to finding, of some that lie all over the test set."""
    start = time.perf_counter()
    count = sum(1 for _ in inspector.findings(records))
    return round(count / (time.perf_counter() - start), 1)


def _peak(status: Path = Path("/proc/self/status")) -> float | None:
    """Most memory that this process has held, GiB; None where the system does not tell.

    Linux counts what the parent held into ru_maxrss of the child, so it is asked elsewhere.
    """
    if status.exists():
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text("utf-8"))
        return round(int(found[1]) / 2**20, 2) if found else None
    if sys.platform == "win32":
        return None
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30, 2)  # bytes on macOS


def _write_scores(evaluation: Evaluation, path: Path) -> Path:
    """A row for each test image: what any other number can be computed from."""
    unaligned = [""] * len(evaluation.scores) if evaluation.unaligned is None else evaluation.unaligned.tolist()
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "product", "label", "score", "unaligned", "p_value"])
        writer.writerows(
            zip(
                evaluation.paths,
                evaluation.products,
                evaluation.labels.tolist(),
                evaluation.scores.tolist(),
                unaligned,
                evaluation.p_values.tolist(),
                strict=True,
            )
        )
    return path


def environment() -> dict[str, str]:
    """Machine and versions that a figure belongs to."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "machine": f"{name}, {cores} cores, {platform.system()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{package} {version(package)}" for package in PACKAGES if _installed(package)),
    }


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


# Beside published tables


def compared(table: Published, results: Sequence[Result]) -> Comparison:
    """A published table beside what was measured on the same data sets, deployable and with the label given."""
    return compare(table, [one for result in results if result["status"] == "done" for one in _as_measured(result)])


def _as_measured(result: Result) -> Iterator[Measured]:
    evaluation, settings = result["evaluation"], result["settings"]
    protocol = {
        "backbone": settings["features"]["backbone"],
        "image_size": settings["preparation"]["size"],
        "checkpoint": "held-out normals",
        "aupro": "exact",
        "label_given": False,
        "test_normalised": False,
    }
    yield from _rows(result, evaluation, protocol)
    if "label given" in evaluation["comparisons"]:
        yield from _rows(result, evaluation["comparisons"]["label given"], protocol | {"label_given": True})


def _rows(result: Result, found: Mapping[str, Any], protocol: dict[str, Any]) -> Iterator[Measured]:
    rows = {"mean": found["mean"], "pooled": found["pooled"], **found["products"]}
    for product, row in rows.items():
        values = {name: value for name, value in row.items() if value is not None and name != "images"}
        yield Measured(result["settings"]["method"], result["dataset"], product, values, protocol)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
