"""What is known of a published data set, and the text for a user who has not got it, or not quite where it was sought.

Nothing is ever downloaded: the licences ask for a person's consent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from unispect.data.folder import images_below
from unispect.data.records import Record, content_hash
from unispect.errors import DataError

PACKED = (".tar", ".xz", ".gz", ".tgz", ".bz2", ".zip", ".7z", ".rar")


@dataclass(frozen=True, slots=True)
class DataSet:
    """A published data set.

    read      root folder -> records, in a fixed order
    layout    the tree below the root, one line a folder
    source    where to get it
    licence   its terms
    counts    product -> (train, test good, test defective) as published; {} where unknown
    archives  file name of a published archive -> its SHA-256 in hexadecimal; {} where unknown
    notes     what a reader of numbers measured on it should know
    """

    name: str
    title: str
    read: Callable[[Path], list[Record]]
    layout: str
    source: str
    licence: str
    counts: Mapping[str, tuple[int, int, int]]
    archives: Mapping[str, str]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        kept = ("name", "title", "layout", "source", "licence", "notes")
        about = {name: getattr(self, name) for name in kept}
        products = {name: list(numbers) for name, numbers in self.counts.items()}
        return about | {"products": products, "archives": dict(self.archives)}

    def text(self) -> str:
        """What it is, where to get it, how it lies on disk."""
        size = ""
        if self.counts:
            train, good, defective = (sum(column) for column in zip(*self.counts.values(), strict=True))
            size = f", {len(self.counts)} products: {train} images to train, {good} good and {defective} defective to test"
        lines = [f"{self.name}: {self.title}{size}", f"  from {self.source}", f"  licence: {self.licence}", self.layout]
        return "\n".join([*lines, *(f"  - {note}" for note in self.notes)])


def check_root(dataset: DataSet, root: Path, expected: Collection[str] = ()) -> None:
    """A DataError that tells what to do, unless the root holds at least one of the folders that the data set has.

    expected   names of folders right in the root; those of the published products unless given
    """
    names = expected or dataset.counts.keys()
    if root.is_file():
        raise DataError(_packed(dataset, root))
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. {how_to_get(dataset, root)}")
    if not _holds(root, names):
        raise DataError(_elsewhere(dataset, root, names))


def how_to_get(dataset: DataSet, root: Path) -> str:
    """What to get, from where, under which licence, and where to put it."""
    archives = " or ".join(dataset.archives)
    return (
        f"{dataset.title} is not downloaded by unispect: get {archives or 'it'} from {dataset.source} "
        f"(licence: {dataset.licence}) and unpack it into {root}, so that it holds\n{dataset.layout}"
    )


def product_folders(root: Path) -> list[Path]:
    """Folders right in the root that hold train/ or test/, in the order of names."""
    return [folder for folder in folders_in(root) if _holds(folder, ("train", "test"))]


def folders_in(folder: Path) -> list[Path]:
    """Folders right in a folder, in the order of names; none where there is no such folder."""
    return sorted(path for path in folder.glob("*") if path.is_dir() and not path.name.startswith("."))


def images_in(folder: Path) -> list[Path]:
    """Image files in a folder and below it, in the order of names; none where there is no such folder."""
    return list(images_below(folder)) if folder.is_dir() else []


def _holds(folder: Path, names: Collection[str]) -> bool:
    return any(os.path.isdir(folder / name) for name in names)  # false, where Path would raise


def _packed(dataset: DataSet, file: Path) -> str:
    if file.suffix.lower() not in PACKED:
        return f"{file}: a file, where the folder of {dataset.title} was expected. {how_to_get(dataset, file.parent)}"
    return f"{file}: an archive, where its folder was expected. {_genuine(dataset, file)} {_unpack(dataset, file)}"


def _genuine(dataset: DataSet, file: Path) -> str:
    """Whether the archive is the published one."""
    if not dataset.archives:
        return f"No checksum of {dataset.title} is published."
    found = content_hash(file)
    if found in dataset.archives.values():
        return "Its SHA-256 is the published one."
    known = ", ".join(f"{digest} ({name})" for name, digest in dataset.archives.items())
    return f"Its SHA-256 is {found}, not the published {known}: another version, or damaged; get it from {dataset.source}."


def _unpack(dataset: DataSet, file: Path) -> str:
    folder = file.parent / dataset.name
    command = f"unzip '{file}' -d '{folder}'" if file.suffix.lower() == ".zip" else f"tar -xf '{file}' -C '{folder}'"
    return f"Unpack it: mkdir -p '{folder}' && {command}; then pass {folder}"


def _elsewhere(dataset: DataSet, root: Path, names: Collection[str]) -> str:
    """The text for a folder that is not the root: above it, below it, or another one."""
    near = next((folder for folder in _near(root) if _holds(folder, names)), None)
    if near is not None:
        return f"{root}: not the root of {dataset.title}, but {near} is: pass that folder"
    archive = next((root / name for name in dataset.archives if (root / name).is_file()), None)
    if archive is not None:
        return f"{root}: holds {archive.name}, still packed. {_unpack(dataset, archive)}"
    return f"{root}: holds none of {', '.join(names)}. {how_to_get(dataset, root)}"


def _near(root: Path) -> Iterator[Path]:
    """Folders up to two levels below, and the two above."""
    below = chain(folders_in(root), chain.from_iterable(map(folders_in, folders_in(root))))
    return chain(below, list(root.resolve().parents)[:2])
