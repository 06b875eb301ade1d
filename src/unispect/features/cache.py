"""Features on disk: computed once for each content of a file, preparation and network, then memory-mapped.

One file an image, `<root>/<fingerprint>/<content[:2]>/<content>.f16`. It appears whole or not at all, so a killed
process leaves nothing wrong behind, and two that compute the same features at once merely do the work twice.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from unispect.errors import ConfigError, DataError, UnispectError
from unispect.features.engine import Engine
from unispect.types import Batch, Features

Shape: TypeAlias = tuple[int, int, int]  # C, h, w of a level

MAGIC = b"UNISPF16"
VERSION = 1
ALIGNMENT = 64  # bytes: a level starts on a cache line
LARGEST = 6e4  # half precision ends at 65504
DAY = 86400.0  # s


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """UNISPECT_CACHE, else the folder that the platform has for caches."""
    if environment.get("UNISPECT_CACHE"):
        return Path(environment["UNISPECT_CACHE"])
    if environment.get("XDG_CACHE_HOME"):
        return Path(environment["XDG_CACHE_HOME"]) / "unispect"
    if sys.platform == "win32" and environment.get("LOCALAPPDATA"):
        return Path(environment["LOCALAPPDATA"]) / "unispect"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "unispect"


class FeatureSet:
    """Features of some images, read from disk when asked for. Places 0 .. len-1 are the images that could be read.

    indices   (len,) int64, the place of each image in the list of records
    """

    def __init__(self, files: Sequence[Path], indices: np.ndarray, shapes: Sequence[Shape], open_files: int) -> None:
        self.files = list(files)
        self.indices = indices
        self.shapes = list(shapes)
        self.open_files = open_files
        self._read = lru_cache(maxsize=affordable(open_files))(self._map)

    def __len__(self) -> int:
        return len(self.files)

    def part(self, images: np.ndarray) -> FeatureSet:
        """Some of the images, (m,) int64 places."""
        return FeatureSet([self.files[image] for image in images], self.indices[images], self.shapes, self.open_files)

    def read(self, image: int) -> list[np.ndarray]:
        """Levels of one image, each (h*w, C) float16, memory-mapped and read-only."""
        return self._read(image)

    def gather(self, level: int, images: np.ndarray, places: np.ndarray) -> Tensor:
        """Vectors of one level: (n,) images and (n, m) places of each -> (n*m, C) float32."""
        vectors = np.empty((*places.shape, self.shapes[level][0]), np.float16)
        for row, image in enumerate(images):
            vectors[row] = self.read(int(image))[level][places[row]]
        return torch.from_numpy(vectors).float().flatten(0, 1)

    def batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, Features]]:
        """All images in order: their places in the list of records (N,), and their features (N, C, h, w) float32."""
        for start in range(0, len(self), batch_size):
            images = range(start, min(start + batch_size, len(self)))
            yield self.indices[images.start : images.stop], self.stacked(images)

    def stacked(self, images: Iterable[int]) -> Features:
        """Some images: L levels (N, C, h, w) float32."""
        levels = zip(*(self.read(image) for image in images), strict=True)
        return [_dense(np.stack(level), shape) for level, shape in zip(levels, self.shapes, strict=True)]

    def _map(self, image: int) -> list[np.ndarray]:
        file = self.files[image]
        try:
            with file.open("rb") as stream:
                content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise UnispectError(f"{file} left the feature cache while it was in use ({error}): run again") from error
        return [
            np.frombuffer(content, np.float16, c * h * w, start).reshape(h * w, c)
            for (c, h, w), start in zip(self.shapes, _starts(self.shapes), strict=True)
        ]


class FeatureCache:
    """A folder of features, shared by all models and processes of this machine.

    root         the folder; `cache_folder()`/features unless given
    open_files   how many images stay mapped at once
    clock        seconds since 1970
    """

    def __init__(self, root: Path | None = None, open_files: int = 4096, clock: Callable[[], float] = time.time) -> None:
        self.root = root or cache_folder() / "features"
        self.open_files = open_files
        self.clock = clock

    def features(
        self,
        paths: Sequence[Path],
        contents: Sequence[str],
        batches: Callable[[list[int]], Iterable[Batch]],
        engine: Engine,
        key: str,
        progress: Callable[[int, int], None] | None = None,
    ) -> FeatureSet:
        """Features of a list of images, computing those that are missing. Images that `batches` leaves out stay out.

        paths      of the images, for messages
        contents   sha256 of each file; files with the same bytes are computed once
        batches    places in the list -> these images, with the places as their index
        key        what else the pixels depend on: the fingerprint of the preparation
        progress   called with the number of missing images done and in all
        """
        files = [self._file(_fingerprint(engine, key), content) for content in contents]
        found = {file: _shapes_of(file) for file in dict.fromkeys(files)}
        first = {file: place for place, file in reversed(list(enumerate(files)))}
        missing = sorted(first[file] for file, shapes in found.items() if shapes is None)
        _touch([file for file, shapes in found.items() if shapes], self.clock())
        if missing:
            found |= _compute(missing, paths, files, batches, engine, progress)
        return _feature_set(files, found, self.open_files)

    def missing(self, contents: Sequence[str], engine: Engine, key: str) -> list[int]:
        """Places of the images whose features would have to be computed; arguments as of `features`."""
        return [
            n for n, content in enumerate(contents) if _shapes_of(self._file(_fingerprint(engine, key), content)) is None
        ]

    def note(self, kind: str, content: str) -> bytes | None:
        """What `keep_note` kept of a file with this content; None where nothing was."""
        try:
            return self._note_file(kind, content).read_bytes()
        except FileNotFoundError:
            return None

    def keep_note(self, kind: str, content: str, note: bytes) -> None:
        """Keep a few bytes about a file, by its content."""
        _place(self._note_file(kind, content), note)

    def _note_file(self, kind: str, content: str) -> Path:
        return self.root / kind / content[:2] / f"{content}.note"

    def size(self) -> dict[str, tuple[int, int]]:
        """Files and bytes for each fingerprint, unfinished files included."""
        sizes: dict[str, tuple[int, int]] = {}
        for file, status in self._listing():
            count, total = sizes.get(_folder(file), (0, 0))
            sizes[_folder(file)] = (count + 1, total + status.st_size)
        return sizes

    def prune(
        self,
        older_than_days: float | None = None,
        max_bytes: int | None = None,
        fingerprint: str | None = None,
        everything: bool = False,
    ) -> tuple[int, int]:
        """Remove files by any of the conditions, and what killed writers left; gives the files and bytes removed.

        older_than_days   not used for so long
        max_bytes         the least recently used ones, until the rest is no larger
        fingerprint       all of one network and preparation, as `size` lists them
        """
        now = self.clock()
        listing = sorted(self._listing(), key=lambda entry: entry[1].st_mtime)
        doomed = [
            (file, status.st_size)
            for file, status in listing
            if everything
            or (file.suffix == ".tmp" and now - status.st_mtime > DAY)
            or (older_than_days is not None and now - status.st_mtime > older_than_days * DAY)
            or (fingerprint is not None and _folder(file) == fingerprint[:16])
        ]
        if max_bytes is not None:
            doomed = _oldest_beyond(max_bytes, [(file, status.st_size) for file, status in listing], doomed)
        return _remove(doomed)

    def _file(self, fingerprint: str, content: str) -> Path:
        return self.root / fingerprint[:16] / content[:2] / f"{content}.f16"

    def _listing(self) -> Iterator[tuple[Path, os.stat_result]]:
        for file in self.root.glob("*/*/*"):
            with suppress(FileNotFoundError):  # another process was faster
                yield file, file.stat()


def _fingerprint(engine: Engine, key: str) -> str:
    return hashlib.sha256(f"{VERSION} {engine.fingerprint} {key}".encode()).hexdigest()


def _folder(file: Path) -> str:
    return file.parent.parent.name


def _feature_set(files: Sequence[Path], found: Mapping[Path, list[Shape] | None], open_files: int) -> FeatureSet:
    indices = np.array([place for place, file in enumerate(files) if found[file]], np.int64)
    if not len(indices):
        raise DataError(f"none of {len(files)} images could be read, so there are no features")
    readable = [files[place] for place in indices]
    shapes = found[readable[0]] or []
    for file in readable:
        if found[file] != shapes:
            raise DataError(f"features differ in size, {shapes} and {found[file]}: bring all images to one size")
    return FeatureSet(readable, indices, shapes, open_files)


def _compute(
    missing: list[int],
    paths: Sequence[Path],
    files: Sequence[Path],
    batches: Callable[[list[int]], Iterable[Batch]],
    engine: Engine,
    progress: Callable[[int, int], None] | None,
) -> dict[Path, list[Shape] | None]:
    done: dict[Path, list[Shape] | None] = {}
    for batch in batches(missing):
        levels = engine(batch.images)
        for row, place in enumerate(batch.index.tolist()):
            done[files[place]] = _write(files[place], [level[row] for level in levels], paths[place])
        if progress:
            progress(len(done), len(missing))
    return done


def _write(file: Path, levels: Features, image: Path) -> list[Shape]:
    """Levels (C, h, w) of one image, to a name of its own first."""
    for number, level in enumerate(levels):
        if not bool((level.abs() < LARGEST).all()):  # also where it is not a number
            peak = float(level.abs().max())
            raise UnispectError(
                f"{image}: features of level {number} reach {peak:g}, too large for the cache (below {LARGEST:g}): "
                "use other layers or weights"
            )
    _place(file, _packed(levels))
    return [_shape(level) for level in levels]


def _place(file: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    unfinished = file.with_name(f"{file.stem}.{uuid.uuid4().hex}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(content)
        unfinished.replace(file)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        raise UnispectError(
            f"cannot write to the feature cache {file.parent} ({error}): prune it, or name another with UNISPECT_CACHE"
        ) from error


def _shape(level: Tensor) -> Shape:
    c, h, w = level.shape
    return c, h, w


def _packed(levels: Features) -> bytes:
    """Header, then each level (h*w, C) float16 in row-major order on an aligned start."""
    shapes = [_shape(level) for level in levels]
    content = bytearray(_length(shapes))
    content[: _header_length(len(shapes))] = _header(shapes)
    for level, start in zip(levels, _starts(shapes), strict=True):
        vectors = level.permute(1, 2, 0).to(torch.float16).contiguous().numpy().tobytes()
        content[start : start + len(vectors)] = vectors
    return bytes(content)


def _header(shapes: Sequence[Shape]) -> bytes:
    numbers = [VERSION, len(shapes), *(number for shape in shapes for number in shape)]
    return MAGIC + struct.pack(f"<{len(numbers)}I", *numbers)


def _header_length(levels: int) -> int:
    return len(MAGIC) + 4 * (2 + 3 * levels)


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


def _starts(shapes: Sequence[Shape]) -> list[int]:
    """Byte where each level begins."""
    starts = [_aligned(_header_length(len(shapes)))]
    for c, h, w in shapes[:-1]:
        starts.append(_aligned(starts[-1] + 2 * c * h * w))
    return starts


def _length(shapes: Sequence[Shape]) -> int:
    c, h, w = shapes[-1]
    return _starts(shapes)[-1] + 2 * c * h * w


def _shapes_of(file: Path) -> list[Shape] | None:
    """Shapes of the levels in a file; None where it is missing, short, long or not of this format."""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(MAGIC) + 8)
            version, levels = struct.unpack("<2I", start[len(MAGIC) :])
            if start[: len(MAGIC)] != MAGIC or version != VERSION or levels == 0:
                return None
            shapes = list(struct.iter_unpack("<3I", stream.read(12 * levels)))
            size = os.fstat(stream.fileno()).st_size
    except (OSError, struct.error):
        return None
    return shapes if len(shapes) == levels and size == _length(shapes) else None


def _touch(files: Iterable[Path], now: float) -> None:
    """The time of change is the time of last use, by which `prune` goes."""
    for file in files:
        with suppress(OSError):  # a cache that may only be read is a good cache
            os.utime(file, (now, now))


def _oldest_beyond(
    max_bytes: int, listing: Sequence[tuple[Path, int]], doomed: Sequence[tuple[Path, int]]
) -> list[tuple[Path, int]]:
    """`doomed` and, of the rest of the listing in its order, as many as it takes to leave no more than max_bytes."""
    gone = dict(doomed)
    total = sum(size for file, size in listing if file not in gone)
    for file, size in listing:
        if total > max_bytes and file not in gone and file.suffix != ".tmp":
            gone[file] = size
            total -= size
    return list(gone.items())


def _remove(files: Sequence[tuple[Path, int]]) -> tuple[int, int]:
    for file, _ in files:
        file.unlink(missing_ok=True)
    parents = {file.parent for file, _ in files}
    for folder in (*parents, *{parent.parent for parent in parents}):
        with suppress(OSError):  # others are in it
            folder.rmdir()
    return len(files), sum(size for _, size in files)


def affordable(open_files: int) -> int:
    """A map holds its file open, and a process may only open so many: at most half of them are for the cache."""
    if open_files < 1:
        raise ConfigError(f"open_files={open_files}: expected at least 1")
    if sys.platform == "win32":
        return open_files
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return open_files if limit == resource.RLIM_INFINITY else max(1, min(open_files, limit // 2))


def _dense(vectors: np.ndarray, shape: Shape) -> Tensor:
    """(N, h*w, C) float16 -> (N, C, h, w) float32."""
    c, h, w = shape
    return torch.from_numpy(vectors).float().reshape(-1, h, w, c).permute(0, 3, 1, 2).contiguous()
