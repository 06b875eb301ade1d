"""Image files -> batches: decoding with limits, one size for all, and threads that never run far ahead.

Nothing here looks at more than one image at a time: values are scaled by fixed factors, never by an image's own range.
"""

from __future__ import annotations

import re
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import IO, TypeAlias, TypeVar

import numpy as np
from PIL import Image, ImageOps

from unispect.data.records import Record
from unispect.errors import ConfigError, ImageError, unknown_name
from unispect.types import Batch

MAX_PIXELS = 100_000_000
COMMON = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM")
# The first five are recognised by Pillow but not decoded; the others would start Ghostscript on the file.
UNSUPPORTED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS", "PDF"}
GREY_MODES = {"1", "L", "I", "I;16", "I;16L", "I;16B", "I;16N", "F"}
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "lanczos": Image.Resampling.LANCZOS}
SUPPORTS = {"bilinear": 1, "lanczos": 3}  # pixels to either side, of the larger of both grids
FITS = ("squash", "crop")
POINTER = b"version https://git-lfs"
SLICE = re.compile(r"(.+\.npy)#(\d+)")

Source: TypeAlias = Path | str | bytes | np.ndarray | Image.Image
Item = TypeVar("Item")
Result = TypeVar("Result")


def decode(source: Source, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Any image as (H, W, 3) uint8 RGB, upright.

    EXIF rotation is applied and transparency laid on black. Grey values of 16 bits lose their lower eight, whatever
    their range; integers outside 0..65535 and floats outside 0..1 have no known scale and are errors. Of an animation
    the first frame counts. Arrays are (H, W), (H, W, 1), (H, W, 3) RGB or (H, W, 4) RGBA.

    source       file name, content of a file, array or Pillow image
    max_pixels   of width x height; judged by the header, before anything is decoded
    """
    with named(_name(source)):
        if isinstance(source, np.ndarray):
            return _from_array(source, max_pixels)
        with opened(source, max_pixels) as image:
            return pixels(image)


def read_mask(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The mask at its own size, (H, W) bool: whatever is not zero, black or transparent is anomalous.

    path   image file; folder of image files of one size, whose union counts; or FILE.npy#INDEX, one slice of an array
           (T, H, W) on disk, of which no other slice is read
    """
    with named(str(path)):
        if stored := SLICE.fullmatch(str(path)):
            return _slice(Path(stored[1]), int(stored[2]), max_pixels)
        return _union(path, max_pixels) if path.is_dir() else _mask(path, max_pixels)


def size_of(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of an image file, upright, pixels. It is decoded: what a header says of rotation differs by format."""
    with named(str(path)), opened(path, max_pixels) as image:
        return image.size


def _mask(path: Path, max_pixels: int) -> np.ndarray:
    with opened(path, max_pixels) as image:
        return marked(image)


def _union(folder: Path, max_pixels: int) -> np.ndarray:
    """All masks of a folder in one, (H, W) bool."""
    union, files = None, (path for path in folder.iterdir() if path.suffix.lower() in extensions())
    for path in sorted(path for path in files if not path.name.startswith(".")):
        with named(path.name):
            mask = _mask(path, max_pixels)
        if union is not None and union.shape != mask.shape:
            raise ImageError(f"{path.name}: shape {mask.shape}, where the masks before it have {union.shape}")
        union = mask if union is None else union | mask
    if union is None:
        raise ImageError("a folder without a mask in it")
    return union


def _slice(file: Path, index: int, max_pixels: int) -> np.ndarray:
    """One slice of a (T, H, W) array, (H, W) bool. Mapped, so nothing is unpickled and nothing else is read."""
    array = np.lib.format.open_memmap(file, mode="r")
    if array.ndim != 3 or index >= len(array):
        raise ImageError(f"shape {array.shape}: expected (T, H, W) with T above {index}")
    _check_size((array.shape[2], array.shape[1]), max_pixels)
    return np.array(array[index] != 0)


@contextmanager
def named(name: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes an ImageError that starts with this name."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error.__cause__
    except Exception as error:  # damaged files make decoders fail in every way there is
        raise ImageError(f"{name}: {_reason(error)}") from error


def _name(source: Source) -> str:
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "") or "image")
    return "array" if isinstance(source, np.ndarray) else "bytes" if isinstance(source, bytes) else str(source)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "a folder, where an image was expected"
    if isinstance(error, Image.DecompressionBombError):
        return "too large: more pixels than its header says, or than Pillow allows"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    return f"damaged: {str(error) or type(error).__name__}"


@contextmanager
def opened(source: Path | str | bytes | Image.Image, max_pixels: int) -> Iterator[Image.Image]:
    """The decoded image, turned upright. Its errors do not say which file: wrap it in `named`."""
    if isinstance(source, Image.Image):
        _check_size(source.size, max_pixels)
        yield _upright(source)
        return
    with BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        image = _header(file)
        _check_size(image.size, max_pixels)
        yield _upright(image)


def _header(file: IO[bytes]) -> Image.Image:
    """As Image.open, but without its size check, which warns through a global filter and is not ours to set."""
    prefix = file.read(64)
    if not prefix:
        raise ImageError("zero bytes")
    if prefix.startswith(POINTER):
        raise ImageError("a Git LFS pointer in the place of the image: run `git lfs pull`")
    damaged = None
    for name in formats():
        factory, accept = Image.OPEN[name]
        if accept is not None and not _accepted(accept(prefix[:16])):
            continue
        file.seek(0)
        try:
            return factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):
            damaged = damaged or (name if name in COMMON else None)
    raise ImageError(f"damaged: its {damaged} header cannot be read" if damaged else "not an image of a known format")


def _accepted(answer: bool | str) -> bool:
    return bool(answer) and not isinstance(answer, str)  # text tells why Pillow was built without this format


@cache
def formats() -> tuple[str, ...]:
    """Names of the formats tried, in order: common ones first, those that recognise no prefix last."""
    Image.init()
    usable = [name for name in Image.OPEN if name not in UNSUPPORTED]
    return tuple(sorted(usable, key=lambda name: (Image.OPEN[name][1] is None, name not in COMMON, name)))


@cache
def extensions() -> frozenset[str]:
    """Endings of image files, in lower case and with the dot."""
    return frozenset(end.lower() for end, name in Image.registered_extensions().items() if name in formats())


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{width} x {height} pixels: it is empty")
    if width * height > max_pixels:
        raise ImageError(
            f"too large: {width} x {height} = {width * height:,} pixels, max_pixels={max_pixels:,}: "
            "scale or cut the image, or raise max_pixels"
        )


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF that cannot be read says nothing of the rotation; the pixels are fine
        return image


def pixels(image: Image.Image) -> np.ndarray:
    """Values of a Pillow image as RGB, (H, W, 3) uint8."""
    if image.mode.startswith("I"):
        return _in_colour(_high_byte(np.asarray(image)))
    if image.mode == "F":
        return _in_colour(_from_unit(np.asarray(image)))
    if image.has_transparency_data:
        return _on_black(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def marked(image: Image.Image) -> np.ndarray:
    """Where a mask is not zero, (H, W) bool. Grey values are taken as they are, so 0 and 1 will do."""
    if image.mode in GREY_MODES and not image.has_transparency_data:
        return np.array(np.asarray(image) != 0)
    return np.array(pixels(image).any(axis=2))


def _from_array(array: np.ndarray, max_pixels: int) -> np.ndarray:
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        raise ImageError(f"shape {array.shape}: expected (H, W), (H, W, 1), (H, W, 3) RGB or (H, W, 4) RGBA")
    _check_size((array.shape[1], array.shape[0]), max_pixels)
    values = _to_bytes(array)
    if values.ndim == 3 and values.shape[2] == 4:
        return _on_black(values)
    return values.copy() if values.shape[2:] == (3,) else _in_colour(values.reshape(values.shape[:2]))


def _to_bytes(array: np.ndarray) -> np.ndarray:
    """Array of any accepted type -> uint8, by a fixed factor."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return _high_byte(array)
    if array.dtype.kind == "f":
        return _from_unit(array)
    raise ImageError(f"type {array.dtype}: expected uint8, uint16, bool, or floats in 0..1; convert it with astype")


def _high_byte(values: np.ndarray) -> np.ndarray:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError(f"integers from {low} to {high}: expected 0..65535; save the image with 8 or 16 bits")
    return (values >> 8).astype(np.uint8)


def _from_unit(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ImageError("holds NaN or infinite values: expected floats in 0..1")
    low, high = float(values.min()), float(values.max())
    if low < -1e-6 or high > 1 + 1e-6:  # room for rounding
        raise ImageError(f"floats from {low:.6g} to {high:.6g}: expected 0..1; divide by the full scale, or pass uint8")
    return np.rint(values.clip(0, 1).astype(np.float64) * 255).astype(np.uint8)


def _in_colour(grey: np.ndarray) -> np.ndarray:
    """(H, W) -> (H, W, 3)."""
    return np.repeat(grey[:, :, None], 3, axis=2)


def _on_black(rgba: np.ndarray) -> np.ndarray:
    """(H, W, 4) -> (H, W, 3), both uint8."""
    alpha = rgba[:, :, 3:].astype(np.uint16)
    return ((rgba[:, :, :3] * alpha + 127) // 255).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class Preparation:
    """How an image of any size becomes a square, and how places on the square find back.

    size     side of the square, pixels
    fit      "squash" shows the whole image and gives up its aspect ratio; "crop" scales the shorter side to `size`
             and keeps the centre
    filter   "bilinear" or "lanczos", both with antialiasing
    """

    size: int = 256
    fit: str = "squash"
    filter: str = "bilinear"

    def __post_init__(self) -> None:
        _check_least("size", self.size, 1)
        if self.fit not in FITS:
            raise ConfigError(unknown_name("fit", self.fit, FITS))
        if self.filter not in FILTERS:
            raise ConfigError(unknown_name("filter", self.filter, FILTERS))

    def image(self, array: np.ndarray) -> np.ndarray:
        """(H, W, 3) -> (3, size, size), both uint8."""
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise ImageError(f"array: got {array.dtype} {array.shape}, expected uint8 (H, W, 3), as decode gives it")
        square = self._square(Image.fromarray(array), self.size, FILTERS[self.filter])
        return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))

    def mask(self, path: Path, side: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """The mask on the places of a map, (side, side) bool, nearest neighbour."""
        image = Image.fromarray(read_mask(path, max_pixels).astype(np.uint8))
        return np.array(np.asarray(self._square(image, side, Image.Resampling.NEAREST)) != 0)

    def touched(self, mask: np.ndarray) -> np.ndarray:
        """Pixels of the prepared image into which a marked one enters, however little, (H, W) bool -> (size, size) bool."""
        across, down = self._shown(mask.shape[1], mask.shape[0])
        rows, columns = self._entering(mask.shape[0], down), self._entering(mask.shape[1], across)
        return np.array(rows @ mask.astype(np.float32) @ columns.T > 0.5)

    def _entering(self, length: int, shown: int) -> np.ndarray:
        """Which pixels of a line enter into each of the new ones when Pillow resizes it, (size, length), 0 or 1."""
        scale = shown / self.size
        middles = (length - shown) / 2 + (np.arange(self.size) + 0.5) * scale
        apart = np.abs(np.arange(length) + 0.5 - middles[:, None])
        return (apart < SUPPORTS[self.filter] * max(scale, 1.0) - 1e-6).astype(np.float32)

    def box_to_original(
        self, left: int, top: int, right: int, bottom: int, map_size: int, width: int, height: int
    ) -> tuple[int, int, int, int]:
        """Half-open box on a (map_size, map_size) map -> smallest half-open box of whole pixels that covers it.

        width, height   of the original image, pixels
        """
        across, down = self._shown(width, height)
        return (
            _place(left, map_size, across, width),
            _place(top, map_size, down, height),
            -_place(right, map_size, -across, -width),  # the floor of the negative: rounded up
            -_place(bottom, map_size, -down, -height),
        )

    def place_area(self, side: int, width: int, height: int) -> float:
        """Pixels of an original image (width, height) that a place of a (side, side) map covers."""
        across, down = self._shown(width, height)
        return across * down / side**2

    def _shown(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the part that is seen, in the middle of the image."""
        return (width, height) if self.fit == "squash" else (min(width, height), min(width, height))

    def _square(self, image: Image.Image, side: int, resampling: Image.Resampling) -> Image.Image:
        across, down = self._shown(*image.size)
        left, top = (image.width - across) / 2, (image.height - down) / 2
        return image.resize((side, side), resampling, box=(left, top, left + across, top + down))


def _place(place: int, places: int, shown: int, length: int) -> int:
    """Floor of (length - shown) / 2 + place * shown / places, in whole numbers so that no rounding error creeps in."""
    return ((length - shown) * places + 2 * place * shown) // (2 * places)


@dataclass(frozen=True, slots=True)
class Failure:
    """A file that could not be read."""

    path: Path
    reason: str

    @classmethod
    def of(cls, path: Path, error: ImageError) -> Failure:
        """The failure that an error of `decode(path)` tells of."""
        return cls(path, str(error).removeprefix(f"{path}: "))


@dataclass(frozen=True, slots=True)
class _Prepared:
    image: np.ndarray  # (3, size, size) uint8
    size: tuple[int, int]


class Loader:
    """Batches of prepared images, in the order of the records, the same for any number of workers.

    Files that cannot be read are left out and listed in `failures`; index tells which record each image came from.
    Decoding runs at most one batch and `workers` images ahead, so memory does not grow with the number of records.

    workers    threads; 0 decodes in the caller's
    strict     raise the error of the first broken file instead
    witness    called with each record and its decoded image (H, W, 3) uint8, on the threads that decode
    failures   of the last pass, in the order of the records
    sizes      (width, height) of each image read in the last pass, upright, by index, pixels
    """

    def __init__(
        self,
        records: Sequence[Record],
        preparation: Preparation,
        batch_size: int = 8,
        workers: int = 2,
        strict: bool = False,
        max_pixels: int = MAX_PIXELS,
        witness: Callable[[Record, np.ndarray], None] | None = None,
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("workers", workers, 0),
            ("max_pixels", max_pixels, 1),
        ):
            if value < least:
                raise ConfigError(f"{name}={value}: expected at least {least}")
        self.records = records
        self.preparation = preparation
        self.batch_size = batch_size
        self.workers = workers
        self.strict = strict
        self.max_pixels = max_pixels
        self.witness = witness
        self.failures: list[Failure] = []
        self.sizes: dict[int, tuple[int, int]] = {}

    def __iter__(self) -> Iterator[Batch]:
        self.failures, self.sizes = [], {}
        readable = self._readable()
        while chosen := list(islice(readable, self.batch_size)):
            yield _batch(chosen)

    def _readable(self) -> Iterator[tuple[int, np.ndarray]]:
        most = self.batch_size + self.workers
        for index, result in enumerate(ahead(self._prepared, self.records, self.workers, most)):
            if isinstance(result, _Prepared):
                self.sizes[index] = result.size
                yield index, result.image
            elif self.strict:
                raise result
            else:
                self.failures.append(Failure.of(self.records[index].path, result))

    def _prepared(self, record: Record) -> _Prepared | ImageError:
        try:
            array = decode(record.path, self.max_pixels)
        except ImageError as error:
            return error
        if self.witness is not None:
            self.witness(record, array)
        return _Prepared(self.preparation.image(array), (array.shape[1], array.shape[0]))


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name}={value}: expected at least {least}")


def _batch(chosen: Sequence[tuple[int, np.ndarray]]) -> Batch:
    import torch  # here, so that decoding alone needs no torch

    index, images = zip(*chosen, strict=True)
    return Batch(torch.from_numpy(np.stack(images)), torch.tensor(index, dtype=torch.int64))


def ahead(function: Callable[[Item], Result], items: Iterable[Item], workers: int, most: int) -> Iterator[Result]:
    """As map, in order, on threads, with at most `most` results under way or waiting; no thread with 0 workers."""
    if workers == 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="unispect-decode")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # also when the caller stops half-way
        pool.shutdown(wait=True, cancel_futures=True)
