"""A list of images as a table, CSV or Parquet, one row an image: what no layout of folders can say.

Columns: path (required), product, label, defect, mask, group, split. A column whose name starts with "_" is for the
owner of the file and is not read.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from unispect.data.records import Record
from unispect.errors import DataError, MissingExtraError, unknown_name

COLUMNS = ("path", "product", "label", "defect", "mask", "group", "split")
NAMES = ("product", "defect", "group")
GOOD = {"0", "good", "normal", "ok", "false"}
DEFECTIVE = {"1", "defective", "defect", "anomaly", "anomalous", "bad", "ko", "ng", "true"}
UNKNOWN = {"", "none", "null", "nan", "unknown"}
SHOWN = 5  # bad rows in an error
SEPARATORS = ",;\t"


def read_manifest(path: Path | str) -> list[Record]:
    """Records of a table, in its order. Its images and masks are not opened; paths in it are relative to its folder.

    label   0, good, normal or ok; 1, defective, anomaly, bad, ko or ng; empty where unknown
    split   train or test; empty is train for what is good or unknown, and test for what is defective

    Raises DataError for unknown columns, for bad rows (the first few by their line, and how many more), among them a path
    that comes twice and a defective image to learn from, and MissingExtraError where Parquet is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file: expected a manifest, a table with the columns {', '.join(COLUMNS)}")
    rows = _parquet_rows(path) if path.suffix.lower() == ".parquet" else _csv_rows(path)
    reader = _Reader(path)
    records = [record for number, row in rows if (record := reader.record(number, row)) is not None]
    reader.check()
    if not records:
        raise DataError(f"{path}: holds no row: expected one for each image")
    return records


def write_manifest(records: Iterable[Record], path: Path | str) -> Path:
    """Write records as a table, .csv or .parquet by its name; `read_manifest` gives them back. Returns the path.

    Paths below the folder of the table are written relative to it, others whole. Raises DataError for a defective image to
    learn from, as reading does.
    """
    path = Path(path)
    rows = [_row(record, path.parent) for record in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    if path.suffix.lower() == ".parquet":
        _write_parquet(rows, draft)
    elif path.suffix.lower() == ".csv":
        with draft.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(["" if value is None else value for value in row] for row in rows)
    else:
        raise DataError(f"{path}: a manifest ends with .csv or .parquet")
    draft.replace(path)
    return path


@dataclass(slots=True)
class _Reader:
    """Turns rows into records and keeps what is wrong with them, so that one error tells it all."""

    path: Path
    problems: list[str]
    lines: dict[Path, int]

    def __init__(self, path: Path) -> None:
        self.path, self.problems, self.lines = path, [], {}

    def record(self, line: int, row: dict[str, Any]) -> Record | None:
        """The record of a row; None where it is bad."""
        try:
            record = _record(row, self.path.parent)
        except DataError as error:
            self.problems.append(f"row {line}: {error}")
            return None
        if (first := self.lines.setdefault(record.path, line)) != line:
            self.problems.append(f"row {line}: {record.path} is in row {first} already")
        return record

    def check(self) -> None:
        """One error for all bad rows."""
        if self.problems:
            more = f"; and {len(self.problems) - SHOWN} more" if len(self.problems) > SHOWN else ""
            raise DataError(f"{self.path}: {'; '.join(self.problems[:SHOWN])}{more}")


def _record(row: dict[Any, Any], folder: Path) -> Record:
    if None in row:
        raise DataError("more cells than columns: put quotes around cells with commas")
    values = {name: _text(row.get(name)) for name in COLUMNS}
    for name in NAMES:
        _check_utf8(values[name])
    if values["path"] is None:
        raise DataError("no path")
    label = _label(row.get("label"))
    split = (values["split"] or ("test" if label == 1 else "train")).strip().lower()
    if split not in ("train", "test"):
        raise DataError(f"split {values['split']!r}: expected train or test")
    _check_learnt(label, split)
    mask = None if values["mask"] is None else folder / values["mask"]
    return Record(folder / values["path"], values["product"], label, values["defect"], mask, values["group"], split)


def _check_learnt(label: int | None, split: str) -> None:
    if label == 1 and split == "train":
        raise DataError("a defective image with split train: only good images are learnt from: make its split test")


def _check_utf8(text: str | None, where: str = "") -> None:
    """Other bytes were let through as surrogates, since paths may hold them; names may not."""
    if text is not None and not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DataError(f"{where}{text!r} is not UTF-8: save the table as 'CSV UTF-8'")


def _text(value: Any) -> str | None:
    """None for an empty cell."""
    return None if value is None or not str(value).strip() else str(value)


def _label(value: Any) -> int | None:
    text = "" if value is None else str(value).strip().lower().removesuffix(".0")
    if text in UNKNOWN:
        return None
    if text in GOOD:
        return 0
    if text in DEFECTIVE:
        return 1
    raise DataError(f"label {value!r}: expected 0, good or normal; 1, defective or anomaly; or nothing")


def _check_columns(path: Path, names: Sequence[str | None]) -> None:
    known = [name for name in names if name is not None]
    for name in known:
        _check_utf8(name, f"{path}: ")
        if name not in COLUMNS and not name.startswith("_"):
            raise DataError(f"{path}: {unknown_name('column', name, COLUMNS)} (those that start with _ are not read)")
    if "path" not in known:
        raise DataError(f"{path}: no column 'path': expected a first row with names, of {', '.join(COLUMNS)}")
    if len(set(known)) < len(known):
        raise DataError(f"{path}: a column comes twice: {', '.join(known)}")


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and rows. The separator is what the first line holds most of."""
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = csv.DictReader(file, delimiter=_separator(file))
            _check_columns(path, [name.strip() for name in rows.fieldnames or ()])
            rows.fieldnames = [name.strip() for name in rows.fieldnames or ()]
            for row in rows:
                if any(row.values()):  # spreadsheets end in rows of empty cells
                    yield rows.line_num, row
    except (OSError, csv.Error) as error:
        raise DataError(f"{path}: not a table of comma-separated values: {error}") from error


def _separator(file: IO[str]) -> str:
    first = file.readline()
    file.seek(0)
    return max(SEPARATORS, key=first.count)


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row numbers from 1, and rows, a group at a time."""
    parquet = _pyarrow("parquet")
    try:
        table = parquet.ParquetFile(path)
        _check_columns(path, table.schema_arrow.names)
        wanted = [name for name in table.schema_arrow.names if name in COLUMNS]
        number = 0
        for batch in table.iter_batches(columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a Parquet file: {error}") from error


def _write_parquet(rows: Sequence[tuple[Any, ...]], path: Path) -> None:
    arrow, parquet = _pyarrow(), _pyarrow("parquet")
    kinds = {name: arrow.int8() if name == "label" else arrow.string() for name in COLUMNS}
    columns = zip(*rows, strict=True) if rows else [()] * len(COLUMNS)
    try:
        arrays = [arrow.array(list(column), kinds[name]) for name, column in zip(COLUMNS, columns, strict=True)]
    except UnicodeEncodeError as error:
        raise DataError(f"{error.object!r} is not UTF-8, as Parquet asks: write a .csv manifest") from error
    parquet.write_table(arrow.table(arrays, names=list(COLUMNS)), path)


def _pyarrow(part: str = "") -> Any:
    from importlib import import_module

    try:
        return import_module(f"pyarrow.{part}" if part else "pyarrow")
    except ImportError as error:
        raise MissingExtraError("Parquet needs pyarrow: pip install 'unispect[parquet]', or use a .csv manifest") from error


def _row(record: Record, folder: Path) -> tuple[Any, ...]:
    try:
        _check_learnt(record.label, record.split)
    except DataError as error:
        raise DataError(f"{record.path}: {error}") from error
    mask = None if record.mask is None else _relative(record.mask, folder)
    place = _relative(record.path, folder)
    return place, record.product, record.label, record.defect, mask, record.group, record.split


def _relative(path: Path, folder: Path) -> str:
    """Relative to the folder where it is below it."""
    whole, base = path.absolute(), folder.absolute()
    return str(whole.relative_to(base)) if whole.is_relative_to(base) else str(whole)
