"""A folder of images -> records, by where each file lies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from unispect.data.loader import extensions
from unispect.data.records import Record
from unispect.errors import DataError

LAYOUTS = """\
Understood are:
  ROOT/<product>/train/good/*            good images to learn from
  ROOT/<product>/test/good/*             good images to test with
  ROOT/<product>/test/<defect>/*         defective ones; masks in ROOT/<product>/ground_truth/<defect>/<name>_mask.png
  ROOT/train/good/* ...                  the same for a single product
  ROOT/<product>/*                       good images only
  ROOT/*                                 good images of one product without a name
A folder below good/ or <product>/ is a capture group: its images stay together."""
STRUCTURE = {"train", "test", "good"}
JUNK = {"__macosx", "@eadir", "thumbs.db"}  # left by macOS, Synology and Windows; some hold thumbnails


def read_folder(root: Path | str) -> list[Record]:
    """Records of all images below a folder, product by product, train before test, in the order of names.

    The layouts are those of LAYOUTS. Names of endings and of the folders train, test, good and ground_truth may be in
    any case; hidden files are left out. No file is opened.
    """
    root = Path(root)
    if root.is_file():
        raise DataError(f"{root}: a file, where a folder of images was expected (an archive must be unpacked first)")
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. {LAYOUTS}")
    records = list(_records(root))
    if not records:
        raise DataError(f"{root}: no image found. {LAYOUTS}")
    return records


def images_below(folder: Path) -> Iterator[Path]:
    """Image files in a folder and below it, those of the folder itself first, in the order of names."""
    yield from _files(folder)
    for child in _folders(folder).values():
        yield from images_below(child)


def _records(root: Path) -> Iterator[Record]:
    if STRUCTURE & {name.lower() for name in _folders(root)}:
        yield from _product(root, root.resolve().name or None)
        return
    loose = _files(root)
    products = {name: child for name, child in _folders(root).items() if next(images_below(child), None)}
    if loose and products:
        raise DataError(
            f"{root}: holds images ({loose[0].name}) beside folders of images ({next(iter(products))}): put each image "
            "in the folder of its product, or give one folder without others in it"
        )
    yield from (Record(path, None, 0) for path in loose)
    for name, folder in products.items():
        yield from _product(folder, name)


def _product(folder: Path, name: str | None) -> Iterator[Record]:
    """Records of one product, with train and test folders or with good images only."""
    parts = {child.lower(): path for child, path in _folders(folder).items()}
    if not STRUCTURE & parts.keys():
        yield from _good(folder, name, "train")
        return
    if "good" in parts:
        _check_alone(folder, parts)
        yield from _good(parts["good"], name, "train")
        return
    if "train" in parts:
        yield from _train(parts["train"], name)
    if "test" in parts:
        yield from _test(parts["test"], parts.get("ground_truth"), name)


def _check_alone(folder: Path, parts: Mapping[str, Path]) -> None:
    """Nothing may lie beside good/: whether it is good too, or to be tested, only the user knows."""
    for name, path in parts.items():
        if name != "good" and next(images_below(path), None):
            raise DataError(
                f"{folder}: holds good/ beside {path.name}/: move good/ to train/good/, and what is defective to "
                "test/<defect>/ (keep some good images for test/good/)"
            )


def _train(folder: Path, product: str | None) -> Iterator[Record]:
    """Good images, in train/good or right in train. What other folders hold is taken as defective, and never learnt."""
    yield from (Record(path, product, 0) for path in _files(folder))
    kinds = _folders(folder)
    if kinds and not _files(folder) and "good" not in {name.lower() for name in kinds}:
        raise DataError(f"{folder}: holds {next(iter(kinds))}/ but no good/: put the good images in {folder / 'good'}")
    for name, child in kinds.items():
        if name.lower() == "good":
            yield from _good(child, product, "train")
        else:
            yield from (Record(path, product, 1, defect=name) for path in images_below(child))


def _test(folder: Path, truth: Path | None, product: str | None) -> Iterator[Record]:
    """Images right in test have no label."""
    yield from (Record(path, product, None, split="test") for path in _files(folder))
    masked = {} if truth is None else _folders(truth)
    for name, child in _folders(folder).items():
        if name.lower() == "good":
            yield from _good(child, product, "test")
        else:
            masks = _masks(masked[name]) if name in masked else {}
            yield from _defective(child, product, name, masks)


def _good(folder: Path, product: str | None, split: str) -> Iterator[Record]:
    for path in images_below(folder):
        yield Record(path, product, 0, group=_group(path, folder), split=split)


def _defective(folder: Path, product: str | None, defect: str, masks: Mapping[Path, Path]) -> Iterator[Record]:
    for path in images_below(folder):
        mask = masks.get(path.relative_to(folder).with_suffix(""))
        yield Record(path, product, 1, defect, mask, _group(path, folder), "test")


def _masks(folder: Path) -> dict[Path, Path]:
    """Mask files by the image they belong to, without its ending; <name>_mask goes before <name>."""
    files = [(path.relative_to(folder).with_suffix(""), path) for path in images_below(folder)]
    exact = dict(files)
    return exact | {key.with_name(key.name.removesuffix("_mask")): path for key, path in files if key.name.endswith("_mask")}


def _group(path: Path, folder: Path) -> str | None:
    """The first folder between; what lies deeper belongs to it too."""
    between = path.relative_to(folder).parts[:-1]
    return between[0] if between else None


def _files(folder: Path) -> list[Path]:
    return [path for path in _children(folder) if path.suffix.lower() in extensions() and path.is_file()]


def _folders(folder: Path) -> dict[str, Path]:
    """Folders by name. Links are followed, but not back to where we come from."""
    found = [path for path in _children(folder) if path.is_dir()]
    return {path.name: path for path in found if not (path.is_symlink() and _leads_back(path))}


def _leads_back(link: Path) -> bool:
    return link.parent.resolve().is_relative_to(link.resolve())


def _children(folder: Path) -> list[Path]:
    try:
        found = sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error.strerror or error}") from error
    return [path for path in found if not path.name.startswith(".") and path.name.lower() not in JUNK]
