"""Findings as other verbs have written them: lines of `inspect --json` and `stream`, the folder of `watch`.

A log grows while it is read. A `Place` says how far it has been read, so that the next reading goes on from there: a file is
known by its first line, a folder is read in the order of the times of change, which `watch` takes from the images.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

from unispect.errors import DataError

Line = tuple[str, dict[str, Any]]  # where it is, for errors, and what it says


@dataclass
class Place:
    """How far a log has been read.

    first   hash of the first line of a file
    lines   of this file that were read
    last    time of change, ns, and name of the last finding of a folder
    read    findings of this folder that were read
    late    of this folder, that came when later ones had been read
    """

    first: str | None = None
    lines: int = 0
    last: tuple[int, str] | None = None
    read: int = 0
    late: int = 0

    def restore(self, table: Mapping[str, Any]) -> None:
        """What `dataclasses.asdict` gave.

        Raises KeyError, TypeError or ValueError where it is damaged.
        """
        last = table["last"]
        self.first, self.last = table["first"], None if last is None else (int(last[0]), str(last[1]))
        self.lines, self.read, self.late = int(table["lines"]), int(table["read"]), int(table["late"])


def read_findings(log: Path | TextIO, place: Place) -> Iterator[Line]:
    """What is in a log behind a place, which moves along. Of a stream all is new.

    Raises DataError where there is no such log, where it was cut, and for a line that is no object of JSON.
    """
    if not isinstance(log, Path):
        for number, line in enumerate(log, 1):
            if line.strip():
                yield f"line {number}", _object(line, f"line {number}")
    elif log.is_dir():
        yield from _of_folder(log, place)
    elif log.exists():
        yield from _of_file(log, place)
    else:
        raise DataError(
            f"{log}: no such file or folder: expected findings, as `unispect inspect --json` or `watch` give them"
        )


def _of_file(log: Path, place: Place) -> Iterator[Line]:
    number = 0
    with log.open(encoding="utf-8", errors="surrogateescape") as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                _recognise(line, place)
            if number <= place.lines:
                continue
            where = f"{log}:{number}"
            if not line.endswith("\n") and not _is_json(line):
                return  # is being written
            place.lines = number
            if line.strip():
                yield where, _object(line, where)
    if number < place.lines:
        raise DataError(
            f"{log}: has {number} lines, of which {place.lines} have been read: it was cut; "
            "give the whole log, or another state"
        )


def _recognise(line: str, place: Place) -> None:
    """A file with another first line is another log, and is read from its beginning."""
    first = sha256(line.strip().encode("utf-8", "surrogateescape")).hexdigest()
    if first != place.first:
        place.first, place.lines = first, 0


def _of_folder(folder: Path, place: Place) -> Iterator[Line]:
    waiting, older = [], 0
    for path in folder.rglob("*.json"):
        if path.name.startswith(".") or not path.is_file():
            continue
        key = (path.stat().st_mtime_ns, path.relative_to(folder).as_posix())
        if place.last is None or key > place.last:
            waiting.append(key)
        else:
            older += 1
    came_late = max(0, older - place.read)
    place.late, place.read = place.late + came_late, place.read + came_late
    for key in sorted(waiting):
        place.last, place.read = key, place.read + 1
        path = folder / key[1]
        yield str(path), _object(path.read_text("utf-8", "surrogateescape"), str(path))


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        said = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: not a line of JSON: {error}: expected a finding of `unispect inspect --json`") from error
    if not isinstance(said, dict):
        raise DataError(f"{where}: got {text.strip()[:80]}: expected a finding, an object of JSON")
    return said


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
