"""The command line: each verb parses, calls one function of the library, and prints.

Results go to stdout; progress, warnings and errors go to stderr. Exit codes: 0 done, 1 anomalies or changes found where
--fail-on-anomaly or --fail-on-change asks, 2 an error that the user can mend, 3 a bug, 130 stopped by Ctrl-C. What is
heavy is imported inside the verbs, so that --help is quick.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress, TaskID

from unispect.errors import ConfigError, DataError, ImageError, StoreError, UnispectError, unknown_name

if TYPE_CHECKING:
    from unispect.calibrate import Change
    from unispect.data.loader import Failure
    from unispect.data.records import Record
    from unispect.inspector import Inspector
    from unispect.runtime import Inspector as Runtime
    from unispect.types import Finding

DONE, ANOMALIES, USER_ERROR, BUG, STOPPED, PIPE_CLOSED = 0, 1, 2, 3, 130, 141
FITTING = {"torch", "torchvision", "timm", "scipy", "safetensors", "jinja2", "tomli_w"}  # not there for inspection alone
QUIET = 2.0  # seconds before a bar appears
CHUNK = 256  # files inspected between two looks at the list of paths
COMPARED = 32  # images of --images that an export is compared on
PICTURED = 100  # findings that keep their map for a report
COLUMNS = (
    "path",
    "anomalous",
    "score",
    "threshold",
    "p_value",
    "product",
    "product_probability",
    "unknown",
    "unknown_p_value",
)
BOX = ("left", "top", "right", "bottom", "peak")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Visual inspection of many products with one model, no class label and one threshold.",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]
Rate = Annotated[
    float | None, typer.Option("--false-alarm-rate", help="At most this share of good images may raise an alarm.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first file that cannot be read.")]
Cache = Annotated[Path | None, typer.Option("--cache", help="Folder of the feature cache; the user's unless given.")]
Model = Annotated[Path, typer.Argument(help="Folder that `unispect fit` wrote.")]
AnyModel = Annotated[Path, typer.Argument(help="Folder that `unispect fit` or `unispect export` wrote.")]
Data = Annotated[Path, typer.Argument(help="Folder of images, or a manifest (.csv, .parquet); `unispect check` tells more.")]
Dataset = Annotated[
    str | None, typer.Option("--dataset", help="DATA is a public data set of this name; `unispect datasets` lists them.")
]
Partial = Annotated[bool, typer.Option("--partial", help="Go on where the data set is not complete.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # names of files may hold bytes that are no text
    try:
        return _run([argument for argument in given if argument != "--debug"])
    except BrokenPipeError:
        # Whoever read our output has seen enough; nothing more may be written, not even when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        return _report_error(error)


@app.callback()
def _start(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None: ...


def _run(arguments: list[str]) -> int:
    """Without typer's own handling of errors, whose exit codes are others."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("unispect", arguments, obj=shlex.join(["unispect", *arguments])) as context:
            command.invoke(context)
        code = DONE
    except typer.Exit as stop:
        code = stop.exit_code
    sys.stdout.flush()
    return code


def _report_error(error: BaseException) -> int:
    """One line on stderr, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return _said(str(error) or "stopped", STOPPED)
    if isinstance(error, UnispectError):
        return _said(f"error: {error}", USER_ERROR)
    if hasattr(error, "format_message"):  # a usage error; typer has had its base class in several places
        return _said(f"error: {error.format_message()}" if str(error) else "", USER_ERROR)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in FITTING:
        return _said(f"error: this needs the package {error.name}: pip install unispect[fit]", USER_ERROR)
    if isinstance(error, OSError) and error.filename is not None:
        return _said(f"error: {error.filename}: {error.strerror}", USER_ERROR)
    text = " ".join(str(error).split())
    return _said(f"internal error: {type(error).__name__}: {text} (--debug shows where; please report it)", BUG)


def _said(text: str, code: int) -> int:
    _say(text)
    return code


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print_json(value: Any, indent: int | None = 1) -> None:
    print(json.dumps(value, indent=indent, allow_nan=False), flush=True)


class _Bars:
    """A bar for each stage with losses and time left; nothing before two seconds, nothing where no person looks."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._started, self._wanted = clock, clock(), sys.stderr.isatty()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, stage: str, done: int, total: int, losses: dict[str, float]) -> None:
        if not self._wanted or self._clock() - self._started < QUIET:
            return
        if self._progress is None:
            self._progress = _progress()
            self._progress.start()
        if self._task is None or stage != self._stage:
            self._task, self._stage = self._progress.add_task(stage, losses=""), stage
        text = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
        self._progress.update(self._task, completed=done, total=total, losses=text)

    def stage(self, name: str) -> Callable[[int, int], None]:
        """The same for what counts one thing only."""
        return lambda done, total: self(name, done, total, {})


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )
    return Progress(*columns, console=Console(stderr=True))


# demo


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for all that it writes.")] = Path("out/demo"),
    false_alarm_rate: Annotated[float, typer.Option(help="At most this share of good images may raise an alarm.")] = 0.01,
    seed: Annotated[int, typer.Option(min=0, help="Of the pictures and of the fit.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", hidden=True, help="Few small pictures, for tests.")] = False,
) -> None:
    """Fit, evaluate and report on six built-in products: no data and no network needed."""
    from unispect.demo import FULL, QUICK
    from unispect.demo import demo as run

    start = time.monotonic()
    with _Bars() as bars:
        done = run(out, false_alarm_rate, seed, QUICK if quick else FULL, bars)
    print(done.evaluation.text())
    rates = done.evaluation.as_dict()["false_alarm_rate"]
    print(f"\nFalse-alarm rate: promised {rates['promised']:.2%}, realised {rates['realised']:.2%}.")
    print(f"Took {time.monotonic() - start:.0f} s.")
    print(f"Model: {done.model}")
    print(f"Report: {done.report}")


# check


@app.command()
def check(
    data: Data,
    as_json: Json = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 2 where anything is an error.")] = False,
    dataset: Dataset = None,
) -> None:
    """Say what is in a folder, what can and cannot be evaluated, and how to mend what is wrong."""
    from unispect.data.check import check as look
    from unispect.inspector import SplitSettings

    shares = SplitSettings()
    with _Bars() as bars:
        found = look(
            data,
            held_out=shares.held_out,
            calibration=shares.calibration,
            progress=bars.stage("reading"),
            dataset=dataset,
        )
    if as_json:
        _print_json(found.as_dict())
    else:
        print(found.text())
    if strict and found.count("error"):
        raise typer.Exit(USER_ERROR)


# fit


@app.command()
def fit(
    context: typer.Context,
    data: Data,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the model.")],
    config: Annotated[Path | None, typer.Option("--config", help="TOML file of settings.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="section.name=value, such as hgad.blocks=8; may be repeated.")
    ] = None,
    false_alarm_rate: Rate = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the split and of the fit.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where this fit was stopped or killed.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older model.")] = False,
    strict: Strict = False,
    cache: Cache = None,
    dataset: Dataset = None,
    partial: Partial = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will take, and learn nothing.")] = False,
    max_ram: Annotated[
        str | None, typer.Option("--max-ram", help="Start only where this memory, such as 4GiB, is predicted to do.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON to stdout.")] = False,
) -> None:
    """Learn all products in DATA at once from their good images."""
    from unispect.data.datasets import read_data
    from unispect.features.cache import FeatureCache
    from unispect.inspector import Inspector, complete

    if as_json and not dry_run:
        raise ConfigError("--json: a fit prints text, expected --dry-run with it")
    given = _settings(config, settings or [], false_alarm_rate, seed)
    table = complete(given)
    _check_free(out, overwrite)
    if dry_run or max_ram is not None:
        table = _planned(read_data(data, dataset, partial), given, cache, strict, max_ram, dry_run, as_json)
        if dry_run:
            return
    checkpoint = _checkpoint(out, resume)
    try:
        with _Bars() as bars:
            inspector = Inspector.fit(
                read_data(data, dataset, partial),
                table,
                cache=FeatureCache(cache),
                checkpoint=checkpoint,
                strict=strict,
                progress=bars,
                command=context.obj,
            )
        inspector.save(out, overwrite)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped: the same command with --resume continues") from None
    _tidy(checkpoint)
    print(_summary(inspector, out))


def _planned(
    records: Sequence[Record],
    given: dict[str, Any],
    cache: Path | None,
    strict: bool,
    max_ram: str | None,
    dry_run: bool,
    as_json: bool,
) -> dict[str, Any]:
    """The settings under which a fit keeps to the memory allowed; what it will take is said in a dry run."""
    from unispect.features.cache import FeatureCache
    from unispect.preflight import mebibytes, plan

    most = None if max_ram is None else mebibytes(max_ram)
    found = plan(records, given, cache=FeatureCache(cache), max_ram=most, strict=strict)
    if dry_run:
        _print_json(found.as_dict()) if as_json else print(found.text())
    found.check(most)
    for name, (was, now) in found.lowered.items() if not dry_run else ():
        _say(f"{name} lowered from {was:g} to {now:g} MiB to keep to --max-ram {max_ram}")
    return dict(found.config)


def _settings(config: Path | None, assignments: Sequence[str], rate: float | None, seed: int | None) -> dict[str, Any]:
    """The file, then --set, then the options of their own: what comes later wins."""
    from unispect.config import assignment, merge, read_toml
    from unispect.data.masks import located

    table = located(read_toml(config), config.parent) if config else {}
    for text in assignments:
        table = merge(table, assignment(text))
    own = {} if rate is None else {"decision": {"false_alarm_rate": rate}}
    return merge(table, own if seed is None else own | {"seed": seed})


def _check_free(out: Path, overwrite: bool) -> None:
    """Asked before the long work, so that nothing is learnt in vain."""
    from unispect.store import MANIFEST

    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST).is_file():
        raise StoreError(f"{out}: holds something other than a model, which is left alone: choose another -o")
    if not overwrite:
        raise StoreError(f"{out} exists; choose another -o or pass --overwrite")


def _checkpoint(out: Path, resume: bool) -> Path:
    """Where a fit keeps its state: a folder beside the model. An older state goes unless it is to be resumed."""
    place = out.resolve()
    checkpoint = place.with_name(f"{place.name}.work") / "checkpoint.safetensors"
    if not resume:
        checkpoint.unlink(missing_ok=True)
    elif not checkpoint.exists():
        _say(f"nothing to resume in {checkpoint.parent}: starting from the beginning")
    return checkpoint


def _tidy(checkpoint: Path) -> None:
    """Remove the state once the model is saved, and the folder where nothing else is in it."""
    checkpoint.unlink(missing_ok=True)
    for partial in checkpoint.parent.glob(f".{checkpoint.name}.*.partial"):  # of a writer that was killed
        shutil.rmtree(partial, ignore_errors=True)
    if checkpoint.parent.is_dir() and not any(checkpoint.parent.iterdir()):
        checkpoint.parent.rmdir()


def _summary(inspector: Inspector, out: Path) -> str:
    """What was learnt from what, the promise, what was left out, and where the model is."""
    from unispect.decide.promise import promise

    split, history = inspector.split, inspector.facts["history"]
    how = "found by clustering" if inspector.facts["clustered"] else "named in the data"
    lines = [
        f"Products ({how}): {', '.join(inspector.products)}",
        f"Images: {len(split.train)} to learn from, {len(split.held_out)} held out, {len(split.calibration)} to calibrate",
        f"Passes over the training images: {passes}"
        if (passes := inspector.facts.get("passes"))
        else f"Kept steps, by level: {', '.join(map(str, history['kept']))} of {max(history['steps'], default=0)}",
        f"Threshold: {inspector.threshold:.6g}. Promise: {promise(inspector.judge)}",
    ]
    broken = inspector.facts["failures"]
    lines += [f"Left out, as they cannot be read: {len(broken)}", *(f"  {text}" for text in broken)] if broken else []
    return "\n".join([*lines, f"Model: {out}"])


# products


@app.command()
def products(
    model: Model,
    action: Annotated[str, typer.Argument(help="list, add or remove.")] = "list",
    name: Annotated[str | None, typer.Argument(help="Of the product to add or remove.")] = None,
    data: Annotated[
        Path | None, typer.Argument(help="For add: its good images, a folder of them or one laid out for fit.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for the changed model; in place unless given.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="For add: the product is known and is learnt anew.")] = False,
    as_json: Json = False,
    strict: Strict = False,
    cache: Cache = None,
) -> None:
    """List the products of a model, or change one without touching what is known of the others."""
    from unispect.features.cache import FeatureCache
    from unispect.inspector import Inspector

    _check_action(action, name, data)
    if out is not None:
        _check_free(out, overwrite=False)
    inspector = Inspector.load(model)
    if action == "list" or name is None:
        print(json.dumps(inspector.counts(), indent=1) if as_json else _products_text(inspector))
        return
    if data is None:
        changed = inspector.without_product(name)
    else:
        with _Bars() as bars:
            images, kept = _good_images(data, name), FeatureCache(cache)
            changed = inspector.with_product(name, images, replace=replace, cache=kept, strict=strict, progress=bars)
    changed.save(out or model, overwrite=out is None)
    print(_products_text(changed))
    print(f"Model: {out or model}")


def _check_action(action: str, name: str | None, data: Path | None) -> None:
    wanted = {"list": (False, False), "remove": (True, False), "add": (True, True)}
    if action not in wanted:
        raise ConfigError(unknown_name("action", action, wanted))
    if (name is not None, data is not None) != wanted[action]:
        usage = {"list": "", "remove": " NAME", "add": " NAME DATA"}[action]
        raise ConfigError(f"products: expected `unispect products MODEL {action}{usage}`")


def _good_images(data: Path, name: str) -> list[Record]:
    """The good images of one product: its own of a layout that names products, or all that are there."""
    from unispect.data.datasets import read_data
    from unispect.data.folder import images_below
    from unispect.data.records import Record

    if data.is_dir() and not any(folder.is_dir() for folder in data.rglob("train")):
        return [Record(path, name, 0) for path in images_below(data)]
    records = [record for record in read_data(data) if record.split == "train"]
    named = {record.product for record in records}
    if len(named) > 1 and name not in named:
        known = ", ".join(sorted(map(str, named)))
        raise DataError(f"{data}: holds the products {known} and no {name!r}: name one of them, or give the folder of one")
    return [record for record in records if len(named) == 1 or record.product == name]


def _products_text(inspector: Inspector) -> str:
    rows = inspector.counts()
    width = max(len(str(name)) for name in rows)
    lines = [f"{'product':{max(width, 7)}}  learnt from  calibration"]
    lines += [f"{name:{max(width, 7)}}  {row['train']:11}  {row['calibration']:11}" for name, row in rows.items()]
    rate = f"Threshold: {inspector.threshold:.6g}, for at most {inspector.false_alarm_rate:.2%} false alarms"
    return "\n".join([*lines, rate])


# inspect


@app.command()
def inspect(
    model: AnyModel,
    paths: Annotated[list[str], typer.Argument(help="Files, folders, globs in quotes, or - for names on stdin.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="One row an image, its first region in it.")] = False,
    report: Annotated[Path | None, typer.Option("--report", help="HTML file with pictures.")] = None,
    fail_on_anomaly: Annotated[
        bool, typer.Option("--fail-on-anomaly", help="Exit with 1 where one, or an unknown product, is found.")
    ] = False,
    false_alarm_rate: Rate = None,
    strict: Strict = False,
    maps: Annotated[Path | None, typer.Option("--maps", help="Folder for the score maps, one .npy an image.")] = None,
) -> None:
    """Say of each image whether it is anomalous, how much, where, and what product it resembles."""
    if as_json and as_csv:
        raise typer.BadParameter("--json and --csv: choose one")
    sources = [source for text in paths for source in _sources(text)]
    inspector = _loaded_to_inspect(model, false_alarm_rate)
    printer = _Printer("json" if as_json else "csv" if as_csv else "text")
    kept = _Kept(report is not None)
    for number, result in enumerate(_inspected(inspector, sources, strict)):
        printer.show(result, None if maps is None else _saved_map(result, maps, number))
        kept.add(result)
    if report is not None:
        _write_findings(inspector, kept.results, report, model)
    _end(printer, fail_on_anomaly)


@dataclass(frozen=True, slots=True)
class _Some:
    """A source of paths: one at a time where someone may wait for each answer."""

    paths: Callable[[], Iterable[Path]]
    chunk: int = CHUNK


def _sources(text: str) -> list[_Some]:
    """What a PATH on the command line stands for. What is not there is told before any work."""
    from unispect.data.folder import images_below

    path = Path(text)
    if text == "-":
        return [_Some(lambda: (Path(line.rstrip("\r\n")) for line in sys.stdin if line.strip()), 1)]
    if path.is_dir():
        if next(images_below(path), None) is None:
            raise DataError(f"{path}: no image found in this folder")
        return [_Some(lambda: images_below(path))]
    if path.exists():
        return [_Some(lambda: [path])]
    found = sorted(glob.glob(text, recursive=True)) if glob.has_magic(text) else []
    if not found:
        kind = "no file has such a name" if glob.has_magic(text) else "no such file or folder"
        raise DataError(f"{text}: {kind}: expected files, folders, a glob in quotes, or - for names on stdin")
    return [source for name in found if Path(name).is_file() or _holds_images(name) for source in _sources(name)]


def _holds_images(folder: str) -> bool:
    from unispect.data.folder import images_below

    return next(images_below(Path(folder)), None) is not None


def _inspected(inspector: Inspector | Runtime, sources: Iterable[_Some], strict: bool) -> Iterator[Finding | Failure]:
    """Findings in the order of the paths; memory does not grow with their number."""
    from unispect.data.records import Record

    def records(source: _Some) -> Iterator[list[Record]]:
        paths = iter(source.paths())
        while chosen := list(islice(paths, source.chunk)):
            yield [Record(path, None, None, split="test") for path in chosen]

    for chunk in _joined(sources, records):
        for _, result in inspector.findings(chunk, strict):
            yield result


def _joined(sources: Iterable[_Some], records: Callable[[_Some], Iterator[list[Record]]]) -> Iterator[list[Record]]:
    """Single files, as a shell makes of a glob, go together; other sources by themselves."""
    waiting: list[Record] = []
    for source in sources:
        for chunk in records(source):
            waiting += chunk
            if len(waiting) >= source.chunk:
                yield waiting
                waiting = []
    if waiting:
        yield waiting


class _Printer:
    """Prints results one a line, as they come, and counts them."""

    def __init__(self, style: str) -> None:
        self.style, self.inspected, self.anomalous, self.broken = style, 0, 0, 0
        self._csv = csv.writer(sys.stdout, lineterminator="\n")
        if style == "csv":
            self._csv.writerow([*COLUMNS, *BOX, "error"])

    def show(self, result: Finding | Failure, saved: Path | None) -> None:
        """A finding, with the file of its map if there is one, or what is wrong with an image."""
        from unispect.types import Finding

        if isinstance(result, Finding):
            self.inspected += 1
            self.anomalous += result.anomalous or result.unknown
            self._show_finding(result, saved)
        else:
            self.broken += 1
            self._show_failure(result)
        sys.stdout.flush()

    def _show_finding(self, finding: Finding, saved: Path | None) -> None:
        if self.style == "json":
            _print_json(finding.as_dict() | ({} if saved is None else {"map": str(saved)}), None)
        elif self.style == "csv":
            first = finding.regions[0] if finding.regions else None
            box = ["" if first is None else getattr(first, name) for name in BOX]
            self._csv.writerow([*(getattr(finding, name) for name in COLUMNS), *box, ""])
        else:
            print(_line(finding))

    def _show_failure(self, failure: Failure) -> None:
        if self.style == "json":
            _print_json({"path": str(failure.path), "error": failure.reason}, None)
        elif self.style == "csv":
            self._csv.writerow([failure.path, *[""] * (len(COLUMNS) + len(BOX) - 1), failure.reason])
        _say(f"{failure.path}: {failure.reason}")


def _line(finding: Finding) -> str:
    """A finding for people: path, decision, score, p-value, product, first region."""
    verdict = finding.verdict if finding.verdict == "normal" else finding.verdict.upper()
    parts = [str(finding.path), verdict]
    parts += [f"score {finding.score:.4g}", f"p {finding.p_value:.3g}"]
    if finding.product is not None:
        parts.append(f"{finding.product} {finding.product_probability or 0:.0%}")
    if finding.regions:
        first, more = finding.regions[0], len(finding.regions) - 1
        box = f"at {first.left},{first.top} to {first.right},{first.bottom}"
        parts.append(f"{box} and {more} more" if more else box)
    return "  ".join(parts)


def _saved_map(result: Finding | Failure, folder: Path, number: int) -> Path | None:
    """Write the map of a finding; the number keeps images of one name apart."""
    import numpy as np

    from unispect.types import Finding

    if not isinstance(result, Finding):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number:06d}-{Path(str(result.path)).stem}.npy"
    np.save(path, result.map)
    return path


class _Kept:
    """Results for a report, where only the highest scores keep their maps: memory hardly grows."""

    def __init__(self, wanted: bool) -> None:
        self._wanted, self._full = wanted, 0
        self.results: list[Finding | Failure] = []

    def add(self, result: Finding | Failure) -> None:
        if not self._wanted:
            return
        self.results.append(result)
        self._full += 1
        if self._full > 2 * PICTURED:
            self.results, self._full = _lightened(self.results), PICTURED


def _lightened(results: Sequence[Finding | Failure]) -> list[Finding | Failure]:
    """The highest scores first and with their maps, the others with a single place."""
    from unispect.types import Finding

    findings = sorted((one for one in results if isinstance(one, Finding)), key=lambda one: -one.score)
    light = [replace(one, map=one.map[:1, :1].copy()) for one in findings[PICTURED:]]
    return [*findings[:PICTURED], *light, *(one for one in results if not isinstance(one, Finding))]


def _write_findings(inspector: Inspector | Runtime, results: Sequence[Finding | Failure], path: Path, model: Path) -> None:
    from unispect.report.page import write_findings_report
    from unispect.report.results import provenance
    from unispect.runtime import Inspector as Runtime

    command = f"unispect inspect {model}"
    facts = {"Command": command} | inspector.facts if isinstance(inspector, Runtime) else provenance(inspector, command)
    _say(f"Report: {write_findings_report(results, path, 'Inspection', facts, preparation=inspector.preparation)}")


def _end(printer: _Printer, fail_on_anomaly: bool) -> None:
    """Exit codes. A gate that asks for anomalies must not pass what nobody could look at."""
    if printer.broken and not printer.inspected:
        raise ImageError(f"none of {printer.broken} files could be read")
    if fail_on_anomaly and printer.anomalous:
        raise typer.Exit(ANOMALIES)
    if fail_on_anomaly and printer.broken:
        raise ImageError(f"{printer.broken} of {printer.broken + printer.inspected} files could not be read")


def _loaded(model: Path, false_alarm_rate: float | None) -> Inspector:
    """A model as it was learnt."""
    from unispect.store import EXPORT, kind_of

    if kind_of(model) == EXPORT:
        raise StoreError(f"{model} is an exported model, which can only inspect: give the model that it was exported from")
    from unispect.inspector import Inspector

    inspector = Inspector.load(model)
    return inspector if false_alarm_rate is None else inspector.with_false_alarm_rate(false_alarm_rate)


def _loaded_to_inspect(model: Path, false_alarm_rate: float | None) -> Inspector | Runtime:
    """A model as it was learnt or, without torch, as it was exported."""
    from unispect.store import EXPORT, kind_of

    if kind_of(model) != EXPORT:
        return _loaded(model, false_alarm_rate)
    from unispect.runtime import Inspector as Runtime

    exported = Runtime.load(model)
    return exported if false_alarm_rate is None else exported.with_false_alarm_rate(false_alarm_rate)


# calibrate, feedback


@app.command()
def calibrate(
    context: typer.Context,
    model: AnyModel,
    data: Annotated[Path | None, typer.Argument(help="Good images that the model has not seen, as for fit.")] = None,
    add: Annotated[bool, typer.Option("--add", help="To the present calibration images, not in their place.")] = False,
    false_alarm_rate: Rate = None,
    guarantee: Annotated[str | None, typer.Option("--guarantee", help="For whom: image, group or product.")] = None,
    threshold: Annotated[float | None, typer.Option("--threshold", help="A fixed score instead of a rate.")] = None,
    labelled: Annotated[
        Path | None, typer.Option("--labelled", help="Good and defective images, to find the cheapest threshold on.")
    ] = None,
    cost_miss: Annotated[float, typer.Option(help="With --labelled: of a defective part that goes through.")] = 0.0,
    cost_false_alarm: Annotated[float, typer.Option(help="With --labelled: of a good part that is stopped.")] = 1.0,
    defect_rate: Annotated[float, typer.Option(help="With --labelled: share of parts that are defective.")] = 0.01,
    history: Annotated[
        str | None, typer.Option("--history", help="Findings of the line: a log, a folder of `watch`, or - for stdin.")
    ] = None,
    feedback: Annotated[
        Path | None, typer.Option("--feedback", help="With --history: what people said, a log of `unispect feedback`.")
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="With --history: change the model, not only show it.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Go back to what decided before.")] = False,
    versions: Annotated[bool, typer.Option("--versions", help="List what has decided so far, and change nothing.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change, and change nothing.")] = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for the changed model; in place if not given.")
    ] = None,
    dataset: Dataset = None,
    partial: Partial = False,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Set thresholds anew without learning anew: from DATA, another promise, costs, or what people said of findings."""
    from unispect.calibrate import keep

    _check_one({"DATA": data, "--labelled": labelled, "--history": history, "--undo": undo, "--versions": versions})
    if feedback is not None and history is None:
        raise ConfigError("--feedback: says what findings were, expected --history with them")
    if out is not None:
        _check_free(out, overwrite=False)
    inspector = _loaded_to_inspect(model, None)
    if versions:
        _show_versions(inspector, as_json)
        return
    changes = {"false_alarm_rate": false_alarm_rate, "guarantee": guarantee, "threshold": threshold}
    asked = _Asked({name: value for name, value in changes.items() if value is not None}, add, strict, context.obj)
    costs = (cost_miss, cost_false_alarm, defect_rate)
    change = asked.change(inspector, data, labelled, costs, history, feedback, undo, (dataset, partial))
    _print_json(change.as_dict()) if as_json else print(change.text())
    if dry_run or (history is not None and not apply):
        _say("Nothing was changed: " + ("--dry-run" if dry_run else "look at it, then pass --apply"))
        return
    _say(f"Model: {keep(change, model, out)}")


def _check_one(given: dict[str, object]) -> None:
    """At most one way to decide anew."""
    named = [name for name, value in given.items() if value]
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(named)}: choose one; the second can follow in a command of its own")


@dataclass(frozen=True, slots=True)
class _Asked:
    """What to decide anew by."""

    changes: dict[str, Any]
    add: bool
    strict: bool
    command: str

    def change(
        self,
        inspector: Inspector | Runtime,
        data: Path | None,
        labelled: Path | None,
        costs: tuple[float, float, float],
        history: str | None,
        feedback: Path | None,
        undo: bool,
        dataset: tuple[str | None, bool],
    ) -> Change[Any]:
        from unispect.calibrate import cheaper, recalibrated, reconsidered, redecided, undone
        from unispect.data.datasets import read_data
        from unispect.decide.operating import Costs
        from unispect.feedback import truths
        from unispect.findings import Place, read_findings

        if undo:
            return undone(inspector, self.command)
        if labelled is not None:
            return cheaper(inspector, read_data(labelled, *dataset), Costs(*costs), self.strict, self.command)
        if history is not None:
            log = sys.stdin if history == "-" else Path(history)
            rows = (row for _, row in read_findings(log, Place()))
            known = {} if feedback is None else truths(feedback)
            return reconsidered(inspector, rows, known, self.changes, self.add, self.command)
        if data is not None:
            records = read_data(data, *dataset)
            return recalibrated(inspector, records, self.changes, self.add, self.strict, self.command)
        if not self.changes:
            raise ConfigError(
                "calibrate: nothing to do: expected DATA, --false-alarm-rate, --guarantee, --threshold, --labelled, "
                "--history, --undo or --versions"
            )
        return redecided(inspector, self.changes, self.command)


def _show_versions(inspector: Inspector | Runtime, as_json: bool) -> None:
    from unispect.decide.judge import Judge

    rows = []
    for version in inspector.versions.all:
        judge = Judge(version.calibration, version.decision, inspector.products, inspector.preparation)
        about = {"version": version.number, "made": version.made, "reason": version.reason, "command": version.command}
        decided = {"threshold": judge.threshold, "images": len(version.calibration), "new_images": dict(version.images)}
        rows.append(about | {"decision": version.decision.as_dict()} | decided)
    if as_json:
        _print_json(rows)
        return
    for row in rows:
        print(f"{row['version']}  {row['made']}  threshold {row['threshold']:.6g}  {row['images']} images  {row['reason']}")
        print(f"   {row['command']}")


@app.command()
def feedback(
    log: Annotated[Path, typer.Argument(help="File that verdicts are added to, one a line.")],
    paths: Annotated[
        list[str] | None, typer.Argument(help="Images, named as in their findings; none: list the log.")
    ] = None,
    good: Annotated[bool, typer.Option("--good", help="The part was good: a false alarm, if there was one.")] = False,
    defective: Annotated[bool, typer.Option("--defective", help="The part was defective: a miss, if none.")] = False,
    withdraw: Annotated[bool, typer.Option("--withdraw", help="Take back what was said.")] = False,
    by: Annotated[str | None, typer.Option("--by", help="Who says so.")] = None,
    note: Annotated[str | None, typer.Option("--note", help="Why.")] = None,
    as_json: Json = False,
) -> None:
    """Note what inspected parts turned out to be, for `unispect calibrate --feedback`."""
    from unispect.feedback import append, verdicts

    said = [name for name, value in {"good": good, "defective": defective, "withdraw": withdraw}.items() if value]
    if paths:
        if len(said) != 1:
            raise ConfigError(
                f"feedback: got {' and '.join(said) or 'no verdict'}, expected --good, --defective or --withdraw"
            )
        append(log, paths, None if withdraw else said[0], by, note)
        return
    if said:
        raise ConfigError(f"--{said[0]}: expected the images it is said of")
    known = list(verdicts(log))
    if as_json:
        _print_json([verdict.as_dict() for verdict in known])
        return
    for one in known:
        print("  ".join(part for part in (one.made, one.truth or "withdrawn", one.path, one.by, one.note) if part))


# watch, stream, monitor


@app.command()
def watch(
    model: AnyModel,
    folder: Annotated[Path, typer.Argument(help="Folder that images arrive in.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the findings, one .json an image.")],
    settle: Annotated[float, typer.Option(help="Seconds for which a file must not have changed.")] = 1.0,
    poll: Annotated[float, typer.Option(help="Seconds between two looks at the folder.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="End when everything that is there has been inspected.")] = False,
    false_alarm_rate: Rate = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, as findings are written.")] = False,
) -> None:
    """Inspect images as they arrive in a folder; each has one finding, also where this is killed and started again."""
    from unispect.watch import watch as inspected

    printer = _Printer("json" if as_json else "text")
    try:
        for _, result in inspected(_loaded_to_inspect(model, false_alarm_rate), folder, out, settle, poll, once):
            printer.show(result, None)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped after {printer.inspected + printer.broken} images") from None


@app.command()
def stream(model: AnyModel, false_alarm_rate: Rate = None) -> None:
    """Answer each line of JSON on stdin, {"path": FILE} or {"image": BASE64} and an "id", by one on stdout."""
    from unispect.stream import answers

    for answer in answers(_loaded_to_inspect(model, false_alarm_rate), sys.stdin):
        _print_json(answer, None)


@app.command()
def monitor(
    model: AnyModel,
    log: Annotated[str, typer.Argument(help="Findings: lines of `inspect --json` or `stream`, a folder of `watch`, or - .")],
    run_length: Annotated[float, typer.Option(help="Images to one false alarm at most, on average.")] = 10_000,
    state: Annotated[Path | None, typer.Option("--state", help="File in which this goes on where it was.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line: alarms, then what was read.")] = False,
    fail_on_change: Annotated[bool, typer.Option("--fail-on-change", help="Exit with 1 where there is an alarm.")] = False,
) -> None:
    """Say whether scores have shifted, defects or unknown products have come, from a log of findings."""
    from unispect.monitor import Alarm
    from unispect.monitor import monitor as look

    def tell(alarm: Alarm) -> None:
        _print_json(alarm.as_dict(), None) if as_json else print(alarm.text(), flush=True)

    found = look(model, sys.stdin if log == "-" else Path(log), run_length, state, tell=tell)
    _print_json(found.as_dict(), None) if as_json else print(found.text())
    if fail_on_change and found.alarms:
        raise typer.Exit(ANOMALIES)


# export


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the exported model.")],
    to: Annotated[str, typer.Option("--to", help="onnx or openvino.")] = "onnx",
    images: Annotated[
        Path | None, typer.Option("--images", help="Folder of more images to compare torch and the export on.")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Convolutions in 8 bits, if that costs no accuracy.")] = False,
    check: Annotated[
        Path | None, typer.Option("--check", help="Labelled images on which 8 bits are checked; else defects are planted.")
    ] = None,
    max_loss: Annotated[float, typer.Option(help="Image AUROC that 8 bits may cost.")] = 0.01,
    quick: Annotated[bool, typer.Option("--quick", help="Search PatchCore's bank by a short list, which may err.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older export.")] = False,
    as_json: Json = False,
) -> None:
    """Write a model as one graph that needs no torch, if it agrees with torch."""
    from unispect.data.datasets import read_data
    from unispect.data.folder import images_below
    from unispect.data.loader import decode
    from unispect.export.bundle import export as write

    more = [] if images is None else [decode(path) for path in islice(images_below(images), COMPARED)]
    labelled = [] if check is None else [record for record in read_data(check) if record.split == "test"]
    found = write(_loaded(model, None), out, to, overwrite, more, int8, labelled, max_loss, quick)
    if as_json:
        _print_json(found.as_dict())
        return
    print(found.text())
    print(f"Exported: {out}")


# evaluate


@app.command()
def evaluate(
    model: Model,
    data: Data,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for evaluation.json, table.txt and report.html.")
    ] = None,
    as_json: Json = False,
    ignore_masks: Annotated[
        list[str] | None, typer.Option(help="Product whose masks are no outlines; may be repeated.")
    ] = None,
    false_alarm_rate: Rate = None,
    dataset: Dataset = None,
    partial: Partial = False,
    comparisons: Annotated[
        bool, typer.Option(help="Also the papers' protocols, which need the product or the whole test set.")
    ] = True,
    exact: Annotated[
        bool | None,
        typer.Option(help="Sort all pixels, or stream them in constant memory; unless given, exact up to 2e8 pixels."),
    ] = None,
    bootstrap: Annotated[bool, typer.Option(help="95 % intervals, by image.")] = True,
) -> None:
    """Compare findings on the test images with their labels: per product, and pooled under one threshold."""
    from unispect.data.datasets import read_data
    from unispect.evaluation import evaluate as measure
    from unispect.report.results import provenance, write_results

    inspector = _loaded(model, false_alarm_rate)
    with _Bars() as bars:
        result = measure(
            inspector,
            read_data(data, dataset, partial),
            ignore_masks or (),
            bars.stage("evaluating"),
            comparisons=comparisons,
            exact=exact,
            bootstrap=bootstrap,
        )
    if as_json:
        _print_json(result.as_dict())
    else:
        print(result.text())
    if out is not None:
        facts = provenance(inspector, f"unispect evaluate {model} {data}")
        report = write_results(result, out, f"{model.name} on {data.name}", facts)
        _say(f"Report: {report}")


@app.command()
def report(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the report.")],
    diagnose: Annotated[
        bool,
        typer.Option(
            "--diagnose", help="Look inside a flow: likelihoods of good and defective images, its training, its centres."
        ),
    ] = False,
    training: Annotated[
        bool, typer.Option(help="With --diagnose: train again, and look at every check. The model is not changed.")
    ] = True,
    as_json: Json = False,
    cache: Cache = None,
    dataset: Dataset = None,
    partial: Partial = False,
) -> None:
    """Write what `evaluate` finds as an HTML page or, with --diagnose, what a flow makes of labelled images."""
    if not diagnose:
        evaluate(model, data, out, as_json, None, None, dataset, partial)
        return
    from unispect.data.datasets import read_data
    from unispect.evaluation import diagnose as look
    from unispect.features.cache import FeatureCache
    from unispect.report.diagnosis import lead, write_diagnosis
    from unispect.report.results import provenance

    inspector = _loaded(model, None)
    with _Bars() as bars:
        records = read_data(data, dataset, partial)
        found = look(inspector, records, training=training, cache=FeatureCache(cache), progress=bars)
    facts = provenance(inspector, f"unispect report {model} {data} --diagnose")
    page = write_diagnosis(found, out, f"{model.name} on {data.name}: diagnosis", facts)
    if as_json:
        _print_json(found.as_dict())
    else:
        print(lead(found))
    _say(f"Report: {page}")


# benchmark


@app.command()
def benchmark(
    grid: Annotated[Path, typer.Argument(help="TOML file: methods, data, backbones and seeds.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for results; what is there already is not run again.")],
    jobs: Annotated[int, typer.Option(min=1, help="Cells run at once; the cores are shared among them.")] = 1,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="NAME=FOLDER: where a data set of the grid is; may be repeated.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Instead of those of the grid, such as 0,1,2.")] = None,
    compare: Annotated[
        list[str] | None, typer.Option(help="Published table to set beside, such as hgad-table-1; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run method x data x backbone x seed, resumable; write tables as text, Markdown, LaTeX, JSON and HTML."""
    from unispect.benchmark import compared, read_grid, run
    from unispect.published.tables import published
    from unispect.report.summary import write_summary

    tables = [published(name) for name in compare or ()]
    chosen = read_grid(grid, dict(_root(text) for text in data or ()), None if seeds is None else _seeds(seeds))
    with _Bars() as bars:
        results = run(chosen, out, jobs, bars.stage("cells"))
    comparisons = [compared(table, results) for table in tables]
    page = write_summary(results, out, chosen.title, comparisons)
    if as_json:
        _print_json(json.loads((out / "table.json").read_text("utf-8")))
    else:
        print((out / "table.txt").read_text("utf-8").rstrip())
        print("".join(f"\n{one.text()}\n" for one in comparisons), end="")
    _say(f"Report: {page}")
    broken = [result for result in results if result["status"] != "done"]
    if broken:
        raise UnispectError(f"{len(broken)} of {len(results)} cells failed; the first: {broken[0]['error']}")


def _root(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise typer.BadParameter(f"--data {text}: expected NAME=FOLDER")
    return name, Path(folder)


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--seeds {text}: expected whole numbers with commas between them") from None


# datasets, manifest


@app.command()
def datasets(as_json: Json = False) -> None:
    """List the public data sets: what they hold, where to get them, and how to lay them out. Nothing is downloaded."""
    from unispect.data.datasets import DATASETS

    if as_json:
        _print_json({name: one.as_dict() for name, one in DATASETS.items()})
        return
    print("\n\n".join(one.text() for one in DATASETS.values()))


@app.command()
def manifest(
    data: Data,
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write, .csv or .parquet.")],
    dataset: Dataset = None,
    partial: Partial = False,
) -> None:
    """Write what is understood of DATA as a manifest, one image a row, which may be edited and used as DATA."""
    from unispect.data.datasets import read_data
    from unispect.data.manifest import write_manifest

    records = read_data(data, dataset, partial)
    print(f"{len(records)} images: {write_manifest(records, out)}")


# methods, cite


@dataclass(frozen=True, slots=True)
class Paper:
    """What a method is and how to cite it."""

    title: str
    link: str
    summary: str
    bibtex: str


PAPERS = {
    "hgad": Paper(
        "Hierarchical Gaussian mixture normalizing flow modeling for unified anomaly detection",
        "https://arxiv.org/abs/2403.13349",
        "a normalising flow for each feature level whose latent space holds a Gaussian mixture for each product",
        """\
@inproceedings{yao2024hgad,
  title = {Hierarchical {G}aussian Mixture Normalizing Flow Modeling for Unified Anomaly Detection},
  author = {Yao, Xincheng and Li, Ruoqi and Qian, Zefeng and Wang, Lu and Zhang, Chongyang},
  booktitle = {European Conference on Computer Vision},
  year = {2024},
  note = {arXiv:2403.13349}
}""",
    ),
    "cada": Paper(
        "Absolute-Unified Multi-Class Anomaly Detection via Class-Agnostic Distribution Alignment",
        "https://arxiv.org/abs/2404.00724",
        "aligner of any method: level and reach of a normal image's scores, predicted from what the image shows",
        """\
@misc{guo2024absolute,
  title = {Absolute-Unified Multi-Class Anomaly Detection via Class-Agnostic Distribution Alignment},
  author = {Guo, Jia and Han, Haonan and Lu, Shuai and Zhang, Weihang and Li, Huiqi},
  year = {2024},
  note = {arXiv:2404.00724}
}""",
    ),
    "cada-b": Paper(
        "Absolute-Unified Multi-Class Anomaly Detection via Class-Agnostic Distribution Alignment (section 3.2)",
        "https://arxiv.org/abs/2404.00724",
        "aligner of any method: level and reach of the product that a classifier takes the image for",
        """\
@misc{guo2024absolute,
  title = {Absolute-Unified Multi-Class Anomaly Detection via Class-Agnostic Distribution Alignment},
  author = {Guo, Jia and Han, Haonan and Lu, Shuai and Zhang, Weihang and Li, Huiqi},
  year = {2024},
  note = {arXiv:2404.00724}
}""",
    ),
    "cflow": Paper(
        "CFLOW-AD: Real-Time Unsupervised Anomaly Detection with Localization via Conditional Normalizing Flows",
        "https://arxiv.org/abs/2107.12571",
        "a normalising flow of the feature vectors of each level, conditioned on their place",
        """\
@inproceedings{gudovskiy2022cflow,
  title = {{CFLOW-AD}: Real-Time Unsupervised Anomaly Detection with Localization via Conditional Normalizing Flows},
  author = {Gudovskiy, Denis and Ishizaka, Shun and Kozuka, Kazuki},
  booktitle = {IEEE/CVF Winter Conference on Applications of Computer Vision},
  year = {2022},
  note = {arXiv:2107.12571}
}""",
    ),
    "draem": Paper(
        "DRAEM - a discriminatively trained reconstruction embedding for surface anomaly detection",
        "https://arxiv.org/abs/2108.07610",
        "draws the image anew as if it were good, and learns on planted defects to see what that changes",
        """\
@inproceedings{zavrtanik2021draem,
  title = {{DRAEM} - A Discriminatively Trained Reconstruction Embedding for Surface Anomaly Detection},
  author = {Zavrtanik, Vitjan and Kristan, Matej and Sko{\\v{c}}aj, Danijel},
  booktitle = {IEEE/CVF International Conference on Computer Vision},
  year = {2021}
}""",
    ),
    "ensemble": Paper(
        "Stacked generalization (the idea of learning from scores out of fold; the detector is unispect's own)",
        "https://doi.org/10.1016/S0893-6080(05)80023-1",
        "methods joined by what each says of normal images that it has not learnt; the strongest without training steps",
        """\
@article{wolpert1992stacked,
  title = {Stacked generalization},
  author = {Wolpert, David H.},
  journal = {Neural Networks},
  volume = {5},
  number = {2},
  pages = {241--259},
  year = {1992}
}""",
    ),
    "fastflow": Paper(
        "FastFlow: Unsupervised Anomaly Detection and Localization via 2D Normalizing Flows",
        "https://arxiv.org/abs/2111.07677",
        "a normalising flow of the whole feature map of each level, with convolutions inside",
        """\
@misc{yu2021fastflow,
  title = {{FastFlow}: Unsupervised Anomaly Detection and Localization via {2D} Normalizing Flows},
  author = {Yu, Jiawei and Zheng, Ye and Wang, Xiang and Li, Wei and Wu, Yushuang and Zhao, Rui and Wu, Liwei},
  year = {2021},
  note = {arXiv:2111.07677}
}""",
    ),
    "neighbours": Paper(
        "LOF: identifying density-based local outliers (the idea of relative distance; the detector is unispect's own)",
        "https://doi.org/10.1145/335191.335388",
        "distance of each patch to the nearest normal ones of its product, in units of what is usual around them",
        """\
@inproceedings{breunig2000lof,
  title = {{LOF}: identifying density-based local outliers},
  author = {Breunig, Markus M. and Kriegel, Hans-Peter and Ng, Raymond T. and Sander, J{\\"o}rg},
  booktitle = {ACM SIGMOD International Conference on Management of Data},
  year = {2000}
}""",
    ),
    "opca": Paper(
        "Build Gaussian Distribution Under Deep Features for Anomaly Detection and Localization",
        "https://doi.org/10.32604/jnm.2022.032447",
        "a Gaussian for each product and level on the principal components of least variance",
        """\
@article{wang2022build,
  title = {Build {G}aussian Distribution Under Deep Features for Anomaly Detection and Localization},
  author = {Wang, Mei and Xu, Hao and Chen, Yadang},
  journal = {Journal of New Media},
  year = {2022},
  doi = {10.32604/jnm.2022.032447}
}""",
    ),
    "padim": Paper(
        "PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection and Localization",
        "https://arxiv.org/abs/2011.08785",
        "a Gaussian at every place of the feature grid, one set for all products",
        """\
@inproceedings{defard2020padim,
  title = {{PaDiM}: a Patch Distribution Modeling Framework for Anomaly Detection and Localization},
  author = {Defard, Thomas and Setkov, Aleksandr and Loesch, Angelique and Audigier, Romaric},
  booktitle = {ICPR International Workshops and Challenges},
  year = {2021},
  note = {arXiv:2011.08785}
}""",
    ),
    "patchcore": Paper(
        "Towards total recall in industrial anomaly detection",
        "https://arxiv.org/abs/2106.08265",
        "distance of each patch to the nearest of a coreset of normal patches of all products",
        """\
@inproceedings{roth2022towards,
  title = {Towards total recall in industrial anomaly detection},
  author = {Roth, Karsten and Pemula, Latha and Zepeda, Joaquin and Sch{\\"o}lkopf, Bernhard and Brox, Thomas
    and Gehler, Peter},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2022},
  note = {arXiv:2106.08265}
}""",
    ),
    "recontrast": Paper(
        "ReContrast: Domain-Specific Anomaly Detection via Contrastive Reconstruction",
        "https://arxiv.org/abs/2306.02602",
        "what a decoder cannot predict of a frozen encoder from a trained one, and of the trained one from the frozen",
        """\
@inproceedings{guo2023recontrast,
  title = {{ReContrast}: Domain-Specific Anomaly Detection via Contrastive Reconstruction},
  author = {Guo, Jia and Lu, Shuai and Jia, Lize and Zhang, Weihang and Li, Huiqi},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  note = {arXiv:2306.02602}
}""",
    ),
    "revdist": Paper(
        "Anomaly Detection via Reverse Distillation from One-Class Embedding",
        "https://arxiv.org/abs/2201.10703",
        "what a decoder, learnt on good images of all products, cannot give back of a frozen network's features",
        """\
@inproceedings{deng2022anomaly,
  title = {Anomaly Detection via Reverse Distillation from One-Class Embedding},
  author = {Deng, Hanqiu and Li, Xingyu},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2022},
  note = {arXiv:2201.10703}
}""",
    ),
    "spade": Paper(
        "Sub-image anomaly detection with deep pyramid correspondences",
        "https://arxiv.org/abs/2005.02357",
        "distance to the nearest normal images, and of each place to the places of those images",
        """\
@misc{cohen2020subimage,
  title = {Sub-image anomaly detection with deep pyramid correspondences},
  author = {Cohen, Niv and Hoshen, Yedid},
  year = {2020},
  note = {arXiv:2005.02357}
}""",
    ),
    "uniad": Paper(
        "A unified model for multi-class anomaly detection",
        "https://arxiv.org/abs/2206.03687",
        "how far a transformer, whose places may not look at their neighbours, is from putting the features together again",
        """\
@inproceedings{you2022unified,
  title = {A Unified Model for Multi-class Anomaly Detection},
  author = {You, Zhiyuan and Cui, Lei and Shen, Yujun and Yang, Kai and Lu, Xin and Zheng, Yu and Le, Xinyi},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2022},
  note = {arXiv:2206.03687}
}""",
    ),
}


@app.command()
def methods(as_json: Json = False) -> None:
    """List the methods and aligners with their papers, and what they can be exported to."""
    from unispect.export.bundle import EXPORTERS

    formats = list(EXPORTERS)
    if as_json:
        about = {
            name: {"title": one.title, "link": one.link, "summary": one.summary, "exported_to": formats}
            for name, one in PAPERS.items()
        }
        _print_json(about)
        return
    for name, one in PAPERS.items():
        print(f"{name}: {one.summary}\n  {one.title}\n  {one.link}\n  exported to: {', '.join(formats)}")
    print("Not exported: models whose features.precision is bf16. A faiss index is exported as exact search.")


@app.command()
def cite(method: Annotated[str, typer.Argument(help="Name of a method.")] = "hgad") -> None:
    """Print BibTeX of unispect and of a method."""
    from importlib.metadata import version

    if method not in PAPERS:
        raise ConfigError(unknown_name("method", method, PAPERS))
    print(
        "@software{unispect,\n  title = {unispect: visual inspection of many products with one model},\n"
        f"  author = {{{{The unispect developers}}}},\n  version = {{{version('unispect')}}},\n  year = {{2026}}\n}}\n"
    )
    print(PAPERS[method].bibtex)


# doctor, cache


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed here, what it would run on, and whether the weights are whole."""
    facts = _diagnosis()
    if as_json:
        _print_json(facts)
        return
    for name, number in facts["versions"].items():
        print(f"{name:12} {number or 'not installed'}")
    print(f"{'cores':12} {facts['cores']}\n{'memory':12} {_bytes(facts['memory'])}\n{'engine':12} {facts['engine']}")
    for one in facts["weights"]:
        state = "whole" if one["intact"] else "damaged: reinstall it" if one["version"] else "not installed"
        print(f"{'weights':12} {one['backbone']}: {one['package']} {one['version'] or ''} {state}")
    print(f"{'cache':12} {facts['cache']['folder']}, {_bytes(facts['cache']['bytes'])}")


def _diagnosis() -> dict[str, Any]:
    import platform

    from unispect.features.cache import FeatureCache
    from unispect.features.engine import available_cores
    from unispect.features.weights import installed

    cache = FeatureCache()
    packages = ("unispect", "torch", "torchvision", "timm", "openvino", "numpy", "scipy", "pillow", "safetensors")
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        "cores": available_cores(),
        "memory": _memory(),
        "engine": _automatic_engine(),
        "weights": [
            {"backbone": one.backbone, "package": one.package, "version": one.version, "intact": one.intact}
            for one in installed()
        ],
        "cache": {"folder": str(cache.root), "bytes": sum(size for _, size in cache.size().values())},
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory() -> int | None:
    """Bytes of this machine; None where the system does not say."""
    names = getattr(os, "sysconf_names", {})
    if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(names):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _automatic_engine() -> str:
    """What the default settings would run on; found by building it, so that what stands in the way is told."""
    from unispect.inspector import FeatureSettings

    try:
        return FeatureSettings().build().name
    except UnispectError as error:
        return f"none: {error}"


@app.command()
def cache(
    prune_older_than: Annotated[
        float | None, typer.Option("--prune-older-than", min=0, help="Remove what was not used for so many days.")
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option("--max-bytes", min=0, help="Remove the least recently used until no more is left.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove everything.")] = False,
    as_json: Json = False,
    folder: Cache = None,
) -> None:
    """Show the size of the feature cache for each network and preparation, or remove parts of it."""
    from unispect.features.cache import FeatureCache

    kept = FeatureCache(folder)
    removed = (0, 0)
    if clear or prune_older_than is not None or max_bytes is not None:
        removed = kept.prune(prune_older_than, max_bytes, everything=clear)
    sizes = kept.size()
    if as_json:
        about = {name: {"files": files, "bytes": size} for name, (files, size) in sizes.items()}
        gone = {"files": removed[0], "bytes": removed[1]}
        _print_json({"folder": str(kept.root), "features": about, "removed": gone})
        return
    if removed[0]:
        print(f"Removed {removed[0]} files, {_bytes(removed[1])}.")
    for name, (files, size) in sizes.items():
        print(f"{name}  {files} files  {_bytes(size)}")
    print(f"{kept.root}: {_bytes(sum(size for _, size in sizes.values()))}")


def _bytes(count: int | None) -> str:
    """A size for people: `3.2 GB`."""
    if count is None:
        return "unknown"
    value, units = float(count), ["bytes", "kB", "MB", "GB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "bytes" else f"{value:.1f} {units[0]}"
