"""Lines of JSON in, lines of JSON out: for programs that keep a model running beside them.

Asked  {"path": "part.png", "id": 7}  or, with the file's content in base64,  {"image": "iVBORw0...", "id": 7}
Said   the finding, with the id that came, or  {"error": "...", "id": 7};  one line for each line, in their order.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from unispect.errors import DataError, UnispectError
from unispect.types import Finding

KNOWN = ("path", "image", "id")


class InspectsOne(Protocol):
    """A model, as it was learnt or as it was exported."""

    def inspect(self, source: Any) -> Finding | list[Finding]:
        """What is to be said of an image: a file, or the content of one."""


def answers(inspector: InspectsOne, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """What is said to each line that is not empty. A line that is wrong is answered, and the next one heard."""
    for line in lines:
        if not line.strip():
            continue
        name: dict[str, Any] = {}
        try:
            asked = _asked(line)
            name = {"id": asked["id"]} if "id" in asked else {}
            found = inspector.inspect(_source(asked))
            assert isinstance(found, Finding)
            yield name | found.as_dict()
        except UnispectError as error:
            yield name | {"error": str(error)}


def _asked(line: str) -> dict[str, Any]:
    try:
        asked = json.loads(line)
    except ValueError as error:
        raise DataError(f"not a line of JSON: {error}") from error
    if not isinstance(asked, dict):
        raise DataError(f'got {line.strip()[:80]}, expected an object such as {{"path": "part.png", "id": 7}}')
    unknown = sorted(asked.keys() - set(KNOWN))
    if unknown:
        raise DataError(f"unknown key {unknown[0]!r}: known: {', '.join(KNOWN)}")
    return asked


def _source(asked: dict[str, Any]) -> Path | bytes:
    """The file to read, or the content of one."""
    given = {name: asked[name] for name in ("path", "image") if asked.get(name) is not None}
    if len(given) != 1 or not all(isinstance(value, str) for value in given.values()):
        raise DataError('expected exactly one of "path", the name of a file, and "image", its content in base64')
    if "path" in given:
        return _file(Path(given["path"]))
    try:
        return base64.b64decode(given["image"], validate=True)
    except ValueError as error:
        raise DataError(f'"image" is not base64: {error}') from error


def _file(path: Path) -> Path:
    if path.is_dir():
        raise DataError(f"{path}: a folder, where an image was expected")
    return path
