"""What people said of findings, in a log that is only ever added to.

One line of JSON a verdict: path, truth ("good", "defective" or null, which takes an earlier verdict back), when, by whom, a
note. Of several verdicts on one image the last counts; the others stay to be read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from unispect.errors import ConfigError, DataError

TRUTHS = ("good", "defective", None)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What someone said of an image.

    path    as it is in its finding
    truth   "good", "defective" or None, which takes an earlier one back
    made    when, in UTC, ISO 8601
    """

    path: str
    truth: str | None
    made: str
    by: str | None = None
    note: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def append(log: Path, paths: Sequence[str], truth: str | None, by: str | None = None, note: str | None = None) -> None:
    """Add a verdict on each path, all or none, on the disk when this returns.

    Raises ConfigError for no path or another truth, DataError where the log cannot be written.
    """
    if truth not in TRUTHS:
        raise ConfigError(f"truth: got {truth!r}, expected 'good', 'defective', or None to take a verdict back")
    if not paths:
        raise ConfigError("paths: none given, expected the image of a finding, or several")
    made = datetime.now(UTC).isoformat(timespec="seconds")
    lines = "".join(json.dumps(Verdict(path, truth, made, by, note).as_dict()) + "\n" for path in paths)
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab+") as stream:  # a line that a killed writer left open is closed first
            if stream.tell() and (stream.seek(-1, os.SEEK_END), stream.read(1))[1] != b"\n":
                lines = "\n" + lines
            stream.write(lines.encode("utf-8", "surrogateescape"))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise DataError(f"{log}: cannot be written: {error.strerror}") from error


def verdicts(log: Path) -> Iterator[Verdict]:
    """All of a log, in their order. Raises DataError for no log, or a line that is no verdict."""
    if not log.is_file():
        raise DataError(f"{log}: no such file: expected a log that `unispect feedback` wrote")
    with log.open(encoding="utf-8", errors="surrogateescape") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield _verdict(line, f"{log}:{number}")


def truths(log: Path) -> dict[str, str]:
    """The last verdict on each path, without those that were taken back."""
    last = {verdict.path: verdict.truth for verdict in verdicts(log)}
    return {path: truth for path, truth in last.items() if truth is not None}


def _verdict(line: str, where: str) -> Verdict:
    try:
        found = Verdict(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: not a verdict ({error}): expected a line that `unispect feedback` wrote") from error
    if found.truth not in TRUTHS or not isinstance(found.path, str):
        raise DataError(
            f"{where}: truth {found.truth!r} of {found.path!r}: expected 'good', 'defective' or null, and a path"
        )
    return found
