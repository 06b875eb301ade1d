"""Where not to look: an image file for each product, of the size of its images.

    [masks.ignore]        # white, or anything that is not zero: not looked at
    gear = "gear.png"

    [masks.interest]      # white: looked at, and nothing else
    wood = "wood.png"

A name that is not absolute is relative to the file of settings. A product that has both is looked at where both let it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unispect.data.loader import Preparation, read_mask
from unispect.errors import ConfigError, ImageError, unknown_name

KINDS = ("ignore", "interest")
Files = dict[str, dict[str, str]]  # for each kind, product -> file


def mask_files(given: Any) -> Files:
    """The section of the settings, checked as far as that goes without files; kinds without a product are left out."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"masks: got {given!r}, expected tables [masks.ignore] and [masks.interest]")
    for kind, table in given.items():
        if kind not in KINDS:
            raise ConfigError(
                f"[masks] {unknown_name('kind of mask', kind, KINDS)}: expected [masks.ignore] product = 'file'"
            )
        if not isinstance(table, Mapping):
            raise ConfigError(f"masks.{kind}: got {table!r}, expected a table of products and files")
        for product, file in table.items():
            if not isinstance(file, str | Path):
                raise ConfigError(f"masks.{kind}.{product}: got {file!r}, expected the name of an image file")
    return {kind: {name: str(file) for name, file in given[kind].items()} for kind in KINDS if given.get(kind)}


def located(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Settings read from a file in a folder, with masks relative to it made absolute."""
    if "masks" not in settings:
        return dict(settings)
    files = mask_files(settings["masks"])
    found = {kind: {name: str((folder / file).resolve()) for name, file in table.items()} for kind, table in files.items()}
    return {**settings, "masks": found}


def ignored(
    files: Files, preparation: Preparation, sizes: Mapping[str | None, Mapping[tuple[int, int], Path]]
) -> dict[str, np.ndarray]:
    """Pixels of the prepared image that are not looked at, (size, size) bool, by product.

    sizes   of each product, (width, height) of its images, pixels, and one that has it

    Raises ConfigError for a product that is not there, and for a mask that cannot be read, has another size than the
    images, marks nothing or leaves nothing.
    """
    found: dict[str, np.ndarray] = {}
    for kind, table in files.items():
        for product, file in table.items():
            where = f"masks.{kind}.{product}"
            if None in sizes:
                raise ConfigError(f"{where}: no image has a product's name, expected named products")
            if product not in sizes:
                raise ConfigError(f"masks.{kind}: {unknown_name('product', product, [str(name) for name in sizes])}")
            own = _read(where, file, kind, sizes[product])
            marked = preparation.touched(own)
            if not marked.any():
                raise ConfigError(f"{where}: {file} leaves every pixel that is seen to be looked at, so it does nothing")
            found[product] = marked | found[product] if product in found else marked
    for product, one in found.items():
        if one.all():
            raise ConfigError(f"masks: of product {product!r} no pixel is left to be looked at")
    return found


def _read(where: str, file: str, kind: str, sizes: Mapping[tuple[int, int], Path]) -> np.ndarray:
    """The mask at its own size, (H, W) bool; True is not looked at."""
    try:
        white = read_mask(Path(file))
    except ImageError as error:
        raise ConfigError(f"{where}: {error}") from error
    for (width, height), image in sizes.items():
        if white.shape != (height, width):
            raise ConfigError(
                f"{where}: {file} has {white.shape[1]} x {white.shape[0]} pixels and {image} has {width} x {height}: "
                "expected a mask of the size of all images of its product"
            )
    return ~white if kind == "interest" else white


def mentioned(files: Files) -> Sequence[str]:
    """Products that have a mask."""
    return sorted({product for table in files.values() for product in table})
