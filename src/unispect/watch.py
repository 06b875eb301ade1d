"""A folder that images arrive in -> one finding an image in another folder, each written once, whatever is killed when.

What is done is told by what is there: the finding on IN/a/b.png is OUT/a/b.png.json, which appears whole or not at all and
has the time of change of its image. So a run that was killed goes on where it stopped, an image that was changed is
inspected anew, no list grows, and no image has two findings. The folder is looked through again and again, which works on
network disks, too.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Protocol

from unispect.data.folder import images_below
from unispect.data.loader import Failure
from unispect.data.records import Record
from unispect.errors import ConfigError, DataError
from unispect.store import locked
from unispect.types import Finding

CHUNK = 64  # images handed over at once
Result = tuple[Path, Finding | Failure]


class Inspects(Protocol):
    """A model, as it was learnt or as it was exported."""

    def findings(self, records: Sequence[Record]) -> Iterator[tuple[Record, Finding | Failure]]:
        """A finding for each record, in order, or what is wrong with its file."""


def watch(
    inspector: Inspects,
    folder: Path,
    out: Path,
    settle: float = 1.0,
    poll: float = 1.0,
    once: bool = False,
    clock: Callable[[], float] | None = None,
    sleep: Callable[[float], None] | None = None,
) -> Iterator[Result]:
    """Inspect what is in a folder and what comes; yields each image with its finding, once that is written.

    settle   seconds for which a file must not have changed, so that none is read while it is being written
    poll     seconds between two looks at the folder
    once     end when everything that is there has been inspected

    Raises DataError where there is no such folder, ConfigError where another watch writes to the same one.
    """
    import time

    now, wait = clock or time.time, sleep or time.sleep
    for name, value in {"settle": settle, "poll": poll}.items():
        if not value >= 0:
            raise ConfigError(f"{name}: got {value}, expected seconds from 0 on")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder: expected the one that images arrive in")
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        while True:
            waiting = _Waiting(folder, out, settle, now)
            while chosen := list(islice(waiting, CHUNK)):
                yield from _inspected(inspector, chosen, folder, out)
            if once and not waiting.unsettled:
                return
            wait(poll)


class _Waiting:
    """Images without a finding of their present state; those that may still be written are counted and left out."""

    def __init__(self, folder: Path, out: Path, settle: float, now: Callable[[], float]) -> None:
        self.unsettled = 0
        self._folder, self._out, self._settle, self._now = folder, out, settle, now
        self._found = self._settled()

    def __iter__(self) -> Iterator[tuple[Path, int]]:
        return self._found

    def _settled(self) -> Iterator[tuple[Path, int]]:
        """Image and its time of change, ns."""
        for path in images_below(self._folder):
            changed = _changed(path)
            if changed is None or changed == _changed(_target(path, self._folder, self._out)):
                continue
            if 0 <= self._now() - changed / 1e9 < self._settle:
                self.unsettled += 1
                continue
            yield path, changed


def _inspected(inspector: Inspects, chosen: Sequence[tuple[Path, int]], folder: Path, out: Path) -> Iterator[Result]:
    records = [Record(path, None, None, split="test") for path, _ in chosen]
    for (path, changed), (_, result) in zip(chosen, inspector.findings(records), strict=True):
        if changed != _changed(path):
            continue  # gone, or written to meanwhile: it is for the next look
        _write(_target(path, folder, out), result, changed)
        yield path, result


def _target(path: Path, folder: Path, out: Path) -> Path:
    """The file of an image's finding."""
    place = out / path.relative_to(folder)
    return place.with_name(f"{place.name}.json")


def _changed(path: Path) -> int | None:
    """Time of change, ns; None where there is no such file."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def as_dict(result: Finding | Failure) -> dict[str, object]:
    """Plain values for JSON."""
    return result.as_dict() if isinstance(result, Finding) else {"path": str(result.path), "error": result.reason}


def _write(target: Path, result: Finding | Failure, changed: int) -> None:
    """Whole or not at all: what is half written has another name, which the next run writes over."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    with partial.open("w", encoding="utf-8", errors="surrogateescape") as stream:
        json.dump(as_dict(result), stream)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.utime(partial, ns=(changed, changed))
    os.replace(partial, target)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """The folder for one writer alone."""
    try:
        with locked(out, wait=sys.platform == "win32"):  # where a folder cannot be locked
            yield
    except BlockingIOError as error:
        raise ConfigError(f"{out}: another watch writes to this folder: choose another --out") from error
