"""Decoding of every kind of file, the geometry of preparation, and batches that any number of threads make alike."""

import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from io import BytesIO
from math import ceil, floor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unispect.data.loader import Failure, Loader, Preparation, ahead, decode, extensions, read_mask, size_of
from unispect.data.records import Record
from unispect.errors import ConfigError, DataError, ImageError


def noise(*shape: int, low: int = 0, high: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape, dtype=np.uint8)


COLOUR = noise(6, 9, 3)
GREY = COLOUR[:, :, 0].copy()
ALPHA = noise(6, 9, 1, seed=1)
DEEP = np.random.default_rng(2).integers(0, 65536, (6, 9), dtype=np.uint16)
LARGE = noise(64, 64, 3)


def saved(path: Path, array: np.ndarray, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)  # type: ignore[arg-type]
    return path


def grey(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, axis=2)


def on_black(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.floor(values.astype(float) * alpha / 255 + 0.5).astype(np.uint8)


# Decoding


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "tga", "ppm", "webp", "jp2", "sgi", "qoi"])
def test_lossless_formats_give_the_very_values(tmp_path: Path, ending: str) -> None:
    options: dict[str, object] = {"lossless": True} if ending == "webp" else {}
    found = decode(saved(tmp_path / f"x.{ending}", COLOUR, **options))
    assert found.dtype == np.uint8
    assert np.array_equal(found, COLOUR)


def test_jpeg_is_close(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(60), np.arange(90)).astype(np.uint8)
    found = decode(saved(tmp_path / "x.jpg", grey(smooth), quality=95))
    assert np.abs(found.astype(int) - grey(smooth)).max() <= 4


def test_grey_palette_and_bilevel_become_colour(tmp_path: Path) -> None:
    bits = GREY > 127
    palette = Image.fromarray(COLOUR).quantize(256)
    palette.save(tmp_path / "p.png")
    assert np.array_equal(decode(saved(tmp_path / "l.png", GREY)), grey(GREY))
    assert np.array_equal(decode(saved(tmp_path / "1.png", bits)), grey(bits * np.uint8(255)))
    assert np.array_equal(decode(tmp_path / "p.png"), np.asarray(palette.convert("RGB")))


def test_transparency_is_laid_on_black(tmp_path: Path) -> None:
    assert np.array_equal(decode(saved(tmp_path / "rgba.png", np.concatenate([COLOUR, ALPHA], 2))), on_black(COLOUR, ALPHA))
    both = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA[:, :, 0])])
    both.save(tmp_path / "la.png")
    assert np.array_equal(decode(tmp_path / "la.png"), on_black(grey(GREY), ALPHA))


def test_a_transparent_palette_entry_is_black(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 100, 50, 10, 20, 30])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "index.gif", transparency=0)
    image.save(tmp_path / "bytes.png", transparency=bytes([0, 255]))
    for name in ("index.gif", "bytes.png"):
        assert decode(tmp_path / name).tolist() == [[[0, 0, 0], [10, 20, 30]]]


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "x.tif")
    assert decode(tmp_path / "x.tif")[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_16_bits_lose_the_lower_eight_whatever_their_range(tmp_path: Path, ending: str) -> None:
    for name, values in (("full", DEEP), ("dark", DEEP // 100)):
        assert np.array_equal(decode(saved(tmp_path / f"{name}.{ending}", values)), grey((values >> 8).astype(np.uint8)))


def test_big_endian_16_bits(tmp_path: Path) -> None:
    image = Image.frombytes("I;16B", (9, 6), DEEP.astype(">u2").tobytes())
    image.save(tmp_path / "x.tif")
    assert np.array_equal(decode(tmp_path / "x.tif"), grey((DEEP >> 8).astype(np.uint8)))


def test_32_bit_integers_count_as_16_bits_or_not_at_all(tmp_path: Path) -> None:
    assert np.array_equal(decode(saved(tmp_path / "x.tif", DEEP.astype(np.int32))), grey((DEEP >> 8).astype(np.uint8)))
    for value in (70_000, -1):
        path = saved(tmp_path / "y.tif", np.full((2, 2), value, np.int32))
        with pytest.raises(ImageError, match=rf"y\.tif: integers from {value} to {value}: expected 0\.\.65535"):
            decode(path)


def test_floats_of_unit_range_are_scaled(tmp_path: Path) -> None:
    values = np.array([[0, 0.5, 1.0]], np.float32)
    assert decode(saved(tmp_path / "x.tif", values))[0, :, 0].tolist() == [0, 128, 255]
    with pytest.raises(ImageError, match=r"y\.tif: floats from 0 to 200: expected 0\.\.1; divide"):
        decode(saved(tmp_path / "y.tif", values * 200))
    with pytest.raises(ImageError, match=r"z\.tif: holds NaN"):
        decode(saved(tmp_path / "z.tif", values * np.float32(np.nan)))


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(tmp_path: Path, ending: str, orientation: int) -> None:
    """The first row and column of a rotated file lie where the EXIF standard says; here by numpy."""
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :16], upright[:8, 16:], upright[8:, :16] = 80, 160, 240
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.T, 6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, object] = {"lossless": True} if ending == "webp" else {}
    path = saved(tmp_path / f"x.{ending}", grey(np.ascontiguousarray(stored)), exif=exif, **options)
    found = decode(path)
    assert found.shape == (16, 32, 3)
    assert np.abs(found.astype(int) - grey(upright)).max() <= 2
    assert size_of(path) == (32, 16)


def test_16_bits_are_rotated_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    found = decode(saved(tmp_path / "x.png", np.ascontiguousarray(np.rot90(DEEP)), exif=exif))
    assert np.array_equal(found[:, :, 0], DEEP >> 8)


def test_damaged_exif_leaves_the_picture_as_it_is(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.jpg", COLOUR, exif=b"Exif\x00\x00this is no TIFF header at all")
    assert decode(path).shape == (6, 9, 3)
    assert size_of(path) == (9, 6)


@pytest.mark.parametrize("ending", ["gif", "png", "tif", "webp"])
def test_of_an_animation_the_first_frame_counts(tmp_path: Path, ending: str) -> None:
    frames = [Image.new("RGB", (4, 4), (value, value, value)) for value in (40, 200)]
    frames[0].save(tmp_path / f"x.{ending}", save_all=True, append_images=frames[1:])
    assert abs(int(decode(tmp_path / f"x.{ending}").mean()) - 40) <= 2


def test_file_bytes_and_pillow_images_are_alike(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.png", COLOUR)
    with Image.open(path) as image:
        for source in (path, str(path), path.read_bytes(), image):
            assert np.array_equal(decode(source), COLOUR)
    with Image.open(path) as image:
        pass
    with pytest.raises(ImageError, match=r"x\.png: damaged"):
        decode(image)  # closed before anything was read


def test_the_content_decides_not_the_ending(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.png", COLOUR)
    assert np.array_equal(decode(path.rename(tmp_path / "x.jpg")), COLOUR)


# Arrays


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (COLOUR, COLOUR),
        (GREY, grey(GREY)),
        (GREY[:, :, None], grey(GREY)),
        (np.concatenate([COLOUR, ALPHA], 2), on_black(COLOUR, ALPHA)),
        (DEEP, grey((DEEP >> 8).astype(np.uint8))),
        (DEEP.astype(">u2"), grey((DEEP >> 8).astype(np.uint8))),
        (GREY > 9, grey((GREY > 9) * np.uint8(255))),
        (COLOUR / 255, COLOUR),
        ((COLOUR / 255).astype(np.float32), COLOUR),
        (COLOUR[::-1, ::2], COLOUR[::-1, ::2]),
    ],
)
def test_arrays(array: np.ndarray, expected: np.ndarray) -> None:
    before = array.copy()
    found = decode(array)
    found += 1  # is ours to change
    assert np.array_equal(found - 1, expected)
    assert np.array_equal(array, before)


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.zeros(4, np.uint8), "array: shape (4,): expected (H, W)"),
        (np.zeros((4, 4, 2), np.uint8), "array: shape (4, 4, 2)"),
        (np.zeros((3, 40, 50), np.uint8), "array: shape (3, 40, 50): expected (H, W), (H, W, 1), (H, W, 3)"),
        (np.zeros((0, 4), np.uint8), "array: 4 x 0 pixels: it is empty"),
        (np.zeros((4, 4), np.int64), "array: type int64: expected uint8"),
        (np.full((4, 4), np.nan), "array: holds NaN"),
        (np.full((4, 4), np.inf, np.float32), "array: holds NaN or infinite"),
        (np.full((4, 4), 255.0), "array: floats from 255 to 255: expected 0..1"),
        (np.full((4, 4), -0.5), "array: floats from -0.5 to -0.5"),
        (np.array([["a"]]), "array: type <U1"),
    ],
)
def test_arrays_that_mean_nothing(array: np.ndarray, text: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode(array)
    assert text in str(caught.value)


# Files that cannot be read


def huge_png(width: int, height: int) -> bytes:
    """A header that promises this size, and next to no data."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def png(array: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "zero bytes"),
        (b"this is no image", "not an image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (png(LARGE)[:3000], "damaged: "),
        (png(LARGE)[:20], "damaged: "),
        (png(LARGE)[:12] + bytes(30), "damaged: its PNG header cannot be read"),
        (huge_png(12_000, 9_000), "too large: 12000 x 9000 = 108,000,000 pixels, max_pixels=100,000,000"),
        (huge_png(60_000, 60_000), "too large: 60000 x 60000"),
        (huge_png(9_900, 9_900), "damaged: "),
    ],
)
def test_a_broken_file_is_named_with_its_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    """The last is beyond the size at which Pillow warns: here a warning would be an error."""
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        decode(path)
    assert str(caught.value).startswith(f"{path}: {reason}")
    with pytest.raises(ImageError, match=f"^bytes: {reason[:12]}"):
        decode(content)


@pytest.mark.parametrize("ending", ["jpg", "png", "bmp", "tif", "webp", "gif", "jp2"])
def test_any_truncation_of_any_format_is_an_image_error_or_a_picture(tmp_path: Path, ending: str) -> None:
    content = saved(tmp_path / f"x.{ending}", LARGE).read_bytes()
    failed = 0
    for length in range(0, len(content) * 9 // 10, max(1, len(content) // 25)):
        try:
            assert decode(content[:length]).shape == (64, 64, 3)
        except ImageError:
            failed += 1
    assert failed >= 10


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"gone\.png: no such file"):
        decode(tmp_path / "gone.png")
    with pytest.raises(ImageError, match=r": a folder, where an image was expected"):
        decode(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.png", COLOUR)
    path.chmod(0)
    with pytest.raises(ImageError, match=r"x\.png: cannot be read: Permission denied"):
        decode(path)


def test_the_limit_can_be_chosen_and_counts_for_everything(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.png", COLOUR)
    assert decode(path, max_pixels=54).shape == (6, 9, 3)
    for source in (path, COLOUR, Image.fromarray(COLOUR)):
        with pytest.raises(ImageError, match=r"too large: 9 x 6 = 54 pixels, max_pixels=53"):
            decode(source, max_pixels=53)


def test_pillow_itself_is_left_as_it_was(tmp_path: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ImageError):
        decode(huge_png(60_000, 60_000))
    assert before == Image.MAX_IMAGE_PIXELS


def test_decoding_needs_no_torch() -> None:
    code = (
        "import sys, numpy\nfrom unispect.data import check, loader\n"
        "loader.Preparation(4).image(loader.decode(numpy.zeros((9, 9))))\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_endings_are_lower_case_and_decodable() -> None:
    assert {".png", ".jpg", ".tif", ".bmp"} <= extensions()
    assert all(ending == ending.lower() and ending.startswith(".") for ending in extensions())
    assert not {".pdf", ".eps", ".h5", ".mpg", ".wmf"} & extensions()


# Preparation


def test_squash_is_the_antialiased_resize_of_pillow_and_of_torch() -> None:
    array = noise(90, 120, 3)
    found = Preparation(32).image(array)
    assert (found.shape, found.dtype) == ((3, 32, 32), np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1)[None].float()
    oracle = torch.nn.functional.interpolate(tensor, (32, 32), mode="bilinear", antialias=True)[0]
    assert np.abs(found - oracle.numpy()).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(64, 128), (128, 64), (64, 64), (192, 64)])
@pytest.mark.parametrize("resampling", ["bilinear", "lanczos"])
def test_crop_is_resize_then_centre_crop(height: int, width: int, resampling: str) -> None:
    """Sizes at which both are exact, values that do not overshoot, and the inside: at the border a filter sees less."""
    array = noise(height, width, 3, low=64, high=192)
    scaled = Image.fromarray(array).resize((width // 2, height // 2), Image.Resampling[resampling.upper()])
    left, top = (width // 2 - 32) // 2, (height // 2 - 32) // 2
    oracle = np.asarray(scaled.crop((left, top, left + 32, top + 32))).transpose(2, 0, 1)
    found = Preparation(32, "crop", resampling).image(array)
    assert np.abs(found.astype(int) - oracle)[:, 4:-4, 4:-4].max() <= 1


def test_lanczos_is_not_bilinear() -> None:
    array = noise(90, 120, 3)
    assert not np.array_equal(Preparation(32).image(array), Preparation(32, filter="lanczos").image(array))


@pytest.mark.parametrize("fit", ["squash", "crop"])
@pytest.mark.parametrize(("height", "width"), [(37, 91), (64, 64), (1, 5), (200, 3)])
def test_a_mask_lands_where_its_image_does(tmp_path: Path, fit: str, height: int, width: int) -> None:
    mask = noise(height, width) > 127
    found = Preparation(32, fit).mask(saved(tmp_path / "m.png", mask), 16)
    shown = (height, width) if fit == "squash" else (min(height, width),) * 2
    rows, columns = (
        np.floor((length - part) / 2 + (np.arange(16) + 0.5) * part / 16).astype(int)
        for length, part in zip((height, width), shown, strict=True)
    )
    assert found.dtype == bool
    assert np.array_equal(found, mask[np.ix_(rows, columns)])


@pytest.mark.parametrize(
    "values",
    [
        GREY > 200,
        (GREY > 200).astype(np.uint8),
        (GREY > 200) * np.uint8(255),
        (GREY > 200).astype(np.uint16),
        (GREY > 200).astype(np.int32) * 70_000,
        (GREY > 200).astype(np.float32),
        grey((GREY > 200) * np.uint8(9)),
        np.concatenate([np.full((6, 9, 3), 255, np.uint8), ((GREY > 200) * np.uint8(255))[:, :, None]], 2),
    ],
)
def test_a_mask_of_any_kind_marks_what_is_not_zero(tmp_path: Path, values: np.ndarray) -> None:
    path = saved(tmp_path / "m.tif", values)
    assert np.array_equal(read_mask(path), GREY > 200)
    assert np.array_equal(Preparation().mask(path, 18), Preparation().mask(saved(tmp_path / "n.png", GREY > 200), 18))


def test_a_palette_mask_marks_what_is_not_black(tmp_path: Path) -> None:
    image = Image.fromarray((GREY > 200).astype(np.uint8), "L").convert("P")
    image.putpalette([0, 0, 0, 128, 0, 0])
    image.save(tmp_path / "m.png")
    assert np.array_equal(read_mask(tmp_path / "m.png"), GREY > 200)


def test_a_broken_mask_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.png").touch()
    with pytest.raises(ImageError, match=r"m\.png: zero bytes"):
        Preparation().mask(tmp_path / "m.png", 8)


@pytest.mark.parametrize(("height", "width"), [(37, 91), (91, 37), (64, 64), (1, 5), (1000, 999), (67, 32)])
def test_a_box_on_the_map_covers_the_same_place_of_the_image(height: int, width: int) -> None:
    squash, crop = Preparation(32), Preparation(32, "crop")
    side = min(height, width)
    assert squash.box_to_original(0, 0, 16, 16, 16, width, height) == (0, 0, width, height)
    left, top, right, bottom = crop.box_to_original(0, 0, 16, 16, 16, width, height)
    assert (left, top) == ((width - side) // 2, (height - side) // 2)
    assert (right, bottom) == (width - left, height - top)
    for place in range(16):
        left, _, right, _ = squash.box_to_original(place, 0, place + 1, 1, 16, width, height)
        assert left <= place * width / 16 < (place + 1) * width / 16 <= right
        assert right - left < width / 16 + 2
        _, top, _, bottom = crop.box_to_original(0, place, 1, place + 1, 16, width, height)
        first = (height - side) / 2 + place * side / 16
        assert (top, bottom) == (floor(first), ceil(first + side / 16))


@pytest.mark.parametrize("fit", ["squash", "crop"])
def test_boxes_and_masks_agree(tmp_path: Path, fit: str) -> None:
    """Paint a box of the map on the original: as a mask it marks that box and no other place."""
    preparation = Preparation(32, fit)
    assert preparation.place_area(16, 160, 96) * 16**2 == (160 * 96 if preparation.fit == "squash" else 96 * 96)
    left, top, right, bottom = preparation.box_to_original(3, 5, 7, 6, 16, 160, 96)
    mask = np.zeros((96, 160), bool)
    mask[top:bottom, left:right] = True
    expected = np.zeros((16, 16), bool)
    expected[5:6, 3:7] = True
    assert np.array_equal(preparation.mask(saved(tmp_path / "m.png", mask), 16), expected)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Preparation(0), "size=0: expected at least 1"),
        (lambda: Preparation(fit="squas"), "unknown fit 'squas': did you mean 'squash'?"),
        (lambda: Preparation(filter="nearest"), "unknown filter 'nearest': known: bilinear, lanczos"),
        (lambda: Loader([], Preparation(), batch_size=0), "batch_size=0: expected at least 1"),
        (lambda: Loader([], Preparation(), workers=-1), "workers=-1: expected at least 0"),
        (lambda: Loader([], Preparation(), max_pixels=0), "max_pixels=0: expected at least 1"),
    ],
)
def test_wrong_settings(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert text in str(caught.value)


def test_only_decoded_arrays_are_prepared() -> None:
    with pytest.raises(DataError, match=r"array: got float64 \(4, 4\), expected uint8 \(H, W, 3\)"):
        Preparation().image(np.zeros((4, 4)))


# Loader


@pytest.fixture
def many(tmp_path: Path) -> list[Record]:
    """21 images of different sizes, of which the first, two in the middle and the last are broken."""
    made = []
    for number in range(21):
        path = saved(tmp_path / f"{number:02}.png", noise(8 + number, 30, 3, seed=number))
        if number in (0, 7, 8, 20):
            path.write_bytes(b"" if number else b"nothing")
        made.append(Record(path, None, 0))
    return made


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 17, 100])
def test_batches_hold_every_readable_image_in_order(many: list[Record], workers: int, batch_size: int) -> None:
    preparation = Preparation(16)
    loader = Loader(many, preparation, batch_size, workers)
    for _ in range(2):
        batches = list(loader)
        index = [int(place) for batch in batches for place in batch.index]
        assert index == [place for place in range(21) if place not in (0, 7, 8, 20)]
        assert all(len(batch.index) == batch_size for batch in batches[:-1])
        images = torch.cat([batch.images for batch in batches])
        oracle = np.stack([preparation.image(decode(many[place].path)) for place in index])
        assert images.dtype == torch.uint8
        assert torch.equal(images, torch.from_numpy(oracle))
        assert loader.failures == [
            Failure(many[0].path, "not an image of a known format"),
            *(Failure(many[place].path, "zero bytes") for place in (7, 8, 20)),
        ]
        assert loader.sizes == {place: (30, 8 + place) for place in index}


@pytest.mark.parametrize("workers", [0, 3])
def test_strict_raises_at_the_first_broken_file(many: list[Record], workers: int) -> None:
    loader = iter(Loader(many[1:], Preparation(8), 3, workers, strict=True))
    assert next(loader).index.tolist() == [0, 1, 2]
    assert next(loader).index.tolist() == [3, 4, 5]
    with pytest.raises(ImageError, match=r"07\.png: zero bytes"):
        next(loader)


def test_nothing_readable_means_no_batch(many: list[Record]) -> None:
    loader = Loader([many[0], many[7]], Preparation(8))
    assert list(loader) == []
    assert len(loader.failures) == 2
    assert list(Loader([], Preparation(8))) == []


def test_look_ahead_is_bounded() -> None:
    started: list[int] = []
    results = ahead(lambda item: started.append(item) or item, iter(range(1000)), workers=3, most=5)
    for number in range(20):
        assert next(results) == number
    results.close()  # waits for what runs
    assert 20 <= len(started) <= 20 + 5


def test_stopping_half_way_leaves_no_thread(many: list[Record]) -> None:
    before = threading.active_count()
    for _ in Loader(many, Preparation(8), 2, 3):
        break
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        pass
    assert threading.active_count() == before


def test_results_keep_their_order_and_errors_their_place() -> None:
    def work(item: int) -> int:
        if item == 7:
            raise ValueError("seven")
        return item * item

    results = ahead(work, range(9), workers=4, most=4)
    assert [next(results) for _ in range(7)] == [item * item for item in range(7)]
    with pytest.raises(ValueError, match="seven"):
        next(results)
