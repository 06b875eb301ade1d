"""What is known of one image, and which normal images each stage may learn from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, Self

from unispect.errors import DataError

ROLES = ("train", "held_out", "calibration")


@dataclass(frozen=True, slots=True)
class Record:
    """One image file and what its place says about it.

    product   None where products have no names
    label     0 good, 1 defective, None unknown
    defect    name of the defect
    mask      file whose non-zero pixels are defective, a folder of such files, or FILE.npy#INDEX, a slice of an array
    group     images taken together (one part, one session): they stay on one side of every split
    split     "train" for images to learn from, "test" for those that only evaluation may see
    """

    path: Path
    product: str | None
    label: int | None
    defect: str | None = None
    mask: Path | None = None
    group: str | None = None
    split: str = "train"

    def __post_init__(self) -> None:
        if not isinstance(self.path, Path):
            raise DataError(f"path: got {self.path!r}, expected a pathlib.Path")
        if self.label not in (0, 1, None):
            raise DataError(f"{self.path}: label {self.label!r}: expected 0 (good), 1 (defective) or None (unknown)")
        if self.split not in ("train", "test"):
            raise DataError(f"{self.path}: split {self.split!r}: expected 'train' or 'test'")
        if self.label == 0 and self.defect is not None:
            raise DataError(f"{self.path}: defect {self.defect!r} with label 0 (good): expected label 1 or no defect")
        if "" in (self.product, self.group):
            raise DataError(f"{self.path}: empty product or group: expected a name, or None where there is none")


@dataclass(frozen=True, slots=True)
class Split:
    """Disjoint sets of normal images, one for each thing that is learnt.

    train         the detector
    held_out      when to stop, and the alignment of scores
    calibration   the threshold
    hashes        content hash of each file; those not given are read when needed
    """

    train: tuple[Record, ...]
    held_out: tuple[Record, ...]
    calibration: tuple[Record, ...]
    hashes: Mapping[Path, str] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, list[dict[str, Any]]]:
        """Plain values for JSON: for each role its images, with path, product, label, group and content hash."""
        return {role: [self._entry(record) for record in getattr(self, role)] for role in ROLES}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """The split that `as_dict` described; no file is read."""
        try:
            entries = {role: list(stored[role]) for role in ROLES}
            hashes = {Path(entry["path"]): str(entry["sha256"]) for role in ROLES for entry in entries[role]}
            train, held_out, calibration = (tuple(map(_normal, entries[role])) for role in ROLES)
        except (KeyError, TypeError) as error:
            raise DataError(
                f"stored split: {error!r}: expected lists {', '.join(ROLES)} as made by Split.as_dict"
            ) from error
        return cls(train, held_out, calibration, hashes)

    def _entry(self, record: Record) -> dict[str, Any]:
        return {
            "path": str(record.path),
            "product": record.product,
            "label": record.label,
            "group": record.group,
            "sha256": self.hashes.get(record.path) or content_hash(record.path),
        }


def _normal(entry: Mapping[str, Any]) -> Record:
    return Record(Path(entry["path"]), entry["product"], entry["label"], group=entry["group"])


def content_hash(path: Path) -> str:
    """SHA-256 of the file, in hexadecimal."""
    try:
        with path.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def split_normals(
    records: Sequence[Record],
    held_out: float,
    calibration: float,
    seed: int,
    hashes: Mapping[Path, str] | None = None,
    whole_groups: bool = False,
) -> Split:
    """Divide normal training images into train, held-out and calibration.

    What must not be torn apart is a unit: the images of one capture group, and files that are byte for byte the same
    (two groups that share such a file become one unit). Each product is divided by itself. Its n units are put in the
    order of sha256(seed, name of the unit), which knows neither paths nor the order of the files; the first
    round(calibration * n) are calibration, the next round(held_out * n) held-out, at least one of each and of train.
    A product of 1 to 3 units keeps them all in train, for taking one away would cost the detector more than one image
    could tell the threshold. A fraction of 0 asks for an empty set.

    records                 label 0 or None, split "train"
    held_out, calibration   fractions of the units of each product
    hashes                  content hashes known already; the others are read from the files
    whole_groups            a group that has images of several products stays together, too: all are divided as one product
    """
    _check_fractions(held_out, calibration)
    _check_normal(records)
    known = dict(hashes or {})
    known |= {record.path: content_hash(record.path) for record in records if record.path not in known}
    roles: dict[Path, str] = {}
    for of_product in [list(records)] if whole_groups else _by_product(records):
        roles |= _roles(_units(of_product, known), held_out, calibration, seed)
    train, kept, judged = (tuple(record for record in records if roles[record.path] == role) for role in ROLES)
    return Split(train, kept, judged, {record.path: known[record.path] for record in records})


def unit_numbers(records: Sequence[Record], hashes: Mapping[Path, str]) -> list[int]:
    """A number for each image, the same for images of one unit (see `split_normals`), in the order of their paths."""
    first: dict[Path, Path] = {}
    for of_product in _by_product(records):
        for unit in _units(of_product, hashes).values():
            first |= dict.fromkeys((record.path for record in unit), min(record.path for record in unit))
    number = {path: place for place, path in enumerate(sorted(set(first.values())))}
    return [number[first[record.path]] for record in records]


def _check_fractions(held_out: float, calibration: float) -> None:
    if not (held_out >= 0 and calibration >= 0 and held_out + calibration < 1):
        raise DataError(
            f"held_out={held_out} and calibration={calibration}: expected fractions of at least 0 whose sum is "
            "below 1, so that images are left to train on"
        )


def _check_normal(records: Sequence[Record]) -> None:
    if not records:
        raise DataError("no normal images to split: expected at least one record with split 'train' and label 0")
    for record in records:
        if record.label == 1:
            raise DataError(
                f"{record.path}: a defective image among the normal ones: only good images are learnt from; "
                "move it to test/<defect>/"
            )
        if record.split != "train":
            raise DataError(f"{record.path}: a test image among the training ones: pass records of split 'train' only")


def _by_product(records: Iterable[Record]) -> Iterable[list[Record]]:
    products: dict[str | None, list[Record]] = defaultdict(list)
    for record in records:
        products[record.product].append(record)
    return products.values()


Key = tuple[int, str]  # (0, capture group) or (1, content): the smaller names the unit, so a group keeps its name


def _units(records: Iterable[Record], hashes: Mapping[Path, str]) -> dict[Key, list[Record]]:
    """Connected parts of the graph whose edges are (capture group, content), by the smallest key in each."""
    above: dict[Key, Key] = {}

    def root(key: Key) -> Key:
        while above.setdefault(key, key) != key:
            key = above[key]
        return key

    records = list(records)
    for record in records:
        low, high = sorted(map(root, _keys(record, hashes)))
        above[high] = low
    units: dict[Key, list[Record]] = defaultdict(list)
    for record in records:
        units[root((1, hashes[record.path]))].append(record)
    return units


def _keys(record: Record, hashes: Mapping[Path, str]) -> tuple[Key, Key]:
    content = (1, hashes[record.path])
    return (content if record.group is None else (0, record.group)), content


def _roles(units: Mapping[Key, Sequence[Record]], held_out: float, calibration: float, seed: int) -> dict[Path, str]:
    """The role of each image of one product."""
    order = sorted(units, key=lambda key: sha256(f"{seed}/{key[0]}/{key[1]}".encode()).digest())
    kept, judged = _counts(len(order), held_out, calibration)
    names = ["calibration"] * judged + ["held_out"] * kept + ["train"] * (len(order) - kept - judged)
    return {record.path: name for key, name in zip(order, names, strict=True) for record in units[key]}


def _counts(units: int, held_out: float, calibration: float) -> tuple[int, int]:
    """How many units are held out and how many calibrate."""
    if units < 4:
        return 0, 0
    judged = min(max(round(calibration * units), calibration > 0), units - 2)
    kept = min(max(round(held_out * units), held_out > 0), units - 1 - judged)
    return kept, judged
