"""What is in a folder of images: what can be learnt and measured, what is wrong, and how to mend it.

Every file is read and decoded once; what is kept of it is a line of facts. Whether a training image hides a defect no
file can tell.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy import ndimage

from unispect.data.datasets import deviations, find_dataset, in_short, published, read_data
from unispect.data.folder import images_below
from unispect.data.loader import MAX_PIXELS, Failure, ahead, named, opened, pixels, read_mask
from unispect.data.records import Record, split_normals
from unispect.errors import ImageError

UNNAMED = "all"  # the product of images that name none
SEVERITIES = ("error", "warning", "note")
MODES = {
    "1": "1-bit", "L": "grey", "LA": "grey+alpha", "P": "palette", "PA": "palette+alpha", "RGB": "colour",
    "RGBA": "colour+alpha", "CMYK": "CMYK", "F": "float", "I": "grey 32-bit", "I;16": "grey 16-bit",
    "I;16B": "grey 16-bit", "I;16L": "grey 16-bit",
}  # fmt: skip
BOX, FEWEST_BOXES, SMALLEST_BOX = 0.98, 3, 25  # filled share, masks, pixels: below them an outline may look like a box
SHOWN = 4  # paths of a problem listed in the text


@dataclass(frozen=True, slots=True)
class Problem:
    """Something to know before fitting.

    severity   "error": results would be wrong; "warning": they may be; "note": something cannot be measured
    where      the files or folders concerned; of pictures that occur more than once, copies stand together
    """

    severity: str
    what: str
    where: tuple[Path, ...]
    fix: str


@dataclass(frozen=True, slots=True)
class Product:
    """Readable images of one product.

    defects       test images of each defect
    masks         of defective test images: "present", "missing", "wrong size", "empty"
    boxes         whether the masks are filled rectangles
    sizes, modes  how many images have them; sizes as "width x height" in pixels, upright
    """

    name: str
    train: int
    test_good: int
    test_unlabelled: int
    defects: dict[str, int]
    masks: dict[str, int]
    boxes: bool
    sizes: dict[str, int]
    modes: dict[str, int]
    unreadable: int

    @property
    def defective(self) -> int:
        """All defective test images."""
        return sum(self.defects.values())

    @property
    def no_image_metrics(self) -> str | None:
        """Why good and defective images cannot be compared; None if they can."""
        if self.test_good and self.defective:
            return None
        return "no defective test images" if self.test_good else "no good test images"

    @property
    def no_pixel_metrics(self) -> str | None:
        """Why places cannot be compared with masks; None if they can."""
        if not self.defective:
            return "no defective test images"
        if self.masks["present"] <= self.masks["empty"]:
            return "no masks"
        return "masks are boxes" if self.boxes else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        named = {key: value for key, value in asdict(self).items() if key != "name"}
        return named | {
            "image_metrics": {"possible": self.no_image_metrics is None, "why_not": self.no_image_metrics},
            "pixel_metrics": {"possible": self.no_pixel_metrics is None, "why_not": self.no_pixel_metrics},
        }


@dataclass(frozen=True, slots=True)
class Check:
    """All there is to say of a folder.

    unreadable    images and masks, with the reason
    calibration   normal images that would set the threshold: n of them can promise a false-alarm rate of 1 / (n + 1)
    """

    root: Path
    products: tuple[Product, ...]
    problems: tuple[Problem, ...]
    unreadable: tuple[Failure, ...]
    calibration: int

    @property
    def smallest_rate(self) -> float | None:
        """The lowest false-alarm rate that can be promised; None without calibration images."""
        return 1 / (self.calibration + 1) if self.calibration else None

    def count(self, severity: str) -> int:
        """Number of problems of one severity."""
        return sum(problem.severity == severity for problem in self.problems)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with every path."""
        return {
            "root": str(self.root),
            "products": {product.name: product.as_dict() for product in self.products},
            "calibration": {"images": self.calibration, "smallest_false_alarm_rate": self.smallest_rate},
            "unreadable": [{"path": str(failure.path), "reason": failure.reason} for failure in self.unreadable],
            "problems": [asdict(problem) | {"where": [str(path) for path in problem.where]} for problem in self.problems],
        }

    def text(self) -> str:
        """For people: a table of the products, what can be promised, and the problems with their fixes."""
        lines = [*_table(self.products), "", *self._sentences()]
        for severity in SEVERITIES:
            found = [problem for problem in self.problems if problem.severity == severity]
            if found:
                lines += ["", f"{severity.upper()}S ({len(found)})"]
                lines += [line for problem in found for line in self._lines(problem)]
        return "\n".join(lines)

    def _sentences(self) -> Iterator[str]:
        train = sum(product.train for product in self.products)
        if self.smallest_rate is None:
            yield f"Threshold: {train} good training images leave none to calibrate it: no rate can be promised."
        else:
            yield (
                f"Threshold: of {train} good training images {self.calibration} would calibrate it; "
                f"the lowest false-alarm rate they can promise is {_percent(self.smallest_rate)}."
            )
        if train:
            yield "Whether a training image hides a defect cannot be told from the files: look through them once."
        if not self.problems:
            yield "No problems found."

    def _lines(self, problem: Problem) -> Iterator[str]:
        reasons = {failure.path: f": {failure.reason}" for failure in self.unreadable}
        yield f"  {problem.what}"
        for path in problem.where[:SHOWN]:
            yield f"      {_below(path, self.root)}{reasons.get(path, '')}"
        if len(problem.where) > SHOWN:
            yield f"      and {len(problem.where) - SHOWN} more (--json lists all)"
        yield f"    Fix: {problem.fix}"


def check(
    root: Path | str,
    max_pixels: int = MAX_PIXELS,
    held_out: float = 0.1,
    calibration: float = 0.2,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
    dataset: str | None = None,
) -> Check:
    """Read every image and mask of a folder, a manifest or a published data set once and say what is there.

    max_pixels              images with more are unreadable
    held_out, calibration   fractions of the normal images that fit will set aside
    workers                 threads
    progress                called with (images done, images in all) after each image
    dataset                 name of a published data set, of which root is the folder
    """
    root, seen = Path(root), []
    records, incomplete = _records(root, dataset)
    for facts in ahead(lambda record: _look(record, max_pixels), records, workers, 4 * workers):
        seen.append(facts)
        if progress is not None:
            progress(len(seen), len(records))
    products = tuple(_product(name, of_product) for name, of_product in _by_product(seen).items())
    problems = (
        *_deviation_problems(root, incomplete),
        *_problems(root, seen, products, plain=dataset is None and root.is_dir()),
    )
    return Check(root, products, _ordered(problems), _unreadable(seen), _calibrating(seen, held_out, calibration))


def _records(root: Path, dataset: str | None) -> tuple[list[Record], list[str]]:
    """Records, and where they differ from what is published."""
    if dataset is None:
        return read_data(root), []
    known = find_dataset(dataset)
    records = known.read(root)
    return published(known, records), deviations(known, records)


# One file


@dataclass(frozen=True, slots=True)
class _Mask:
    """size (width, height); boxed: filled share of the boxes around its parts, None if there is too little to tell."""

    size: tuple[int, int] = (0, 0)
    empty: bool = False
    lossy: bool = False
    boxed: float | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is kept of one image.

    size     (width, height), upright
    dim      16 bits of which the upper ones are unused; None if it has 8
    reason   why it cannot be read
    """

    record: Record
    digest: str = ""
    size: tuple[int, int] = (0, 0)
    mode: str = ""
    dim: bool | None = None
    mask: _Mask | None = None
    reason: str | None = None

    @property
    def masked(self) -> _Mask | None:
        """The mask, if it and the image can be read."""
        return self.mask if self.reason is None and self.mask is not None and self.mask.reason is None else None


def _look(record: Record, max_pixels: int) -> _Facts:
    mask = None if record.mask is None else _look_at_mask(record.mask, max_pixels)
    try:
        with named(str(record.path)):
            content = record.path.read_bytes()
            with opened(content, max_pixels) as image:
                size, mode, brightest = image.size, image.mode, int(pixels(image).max())
    except ImageError as error:
        return _Facts(record, mask=mask, reason=Failure.of(record.path, error).reason)
    dim = brightest < 64 if mode.startswith("I") else None  # 14 bits or fewer in use
    return _Facts(record, sha256(content).hexdigest(), size, mode, dim, mask)


def _look_at_mask(path: Path, max_pixels: int) -> _Mask:
    try:
        anomalous = read_mask(path, max_pixels)
    except ImageError as error:
        return _Mask(reason=Failure.of(path, error).reason)
    lossy = path.suffix.lower() in (".jpg", ".jpeg", ".jfif", ".jpe")
    return _Mask((anomalous.shape[1], anomalous.shape[0]), not anomalous.any(), lossy, _boxed(anomalous))


def _boxed(anomalous: np.ndarray) -> float | None:
    """Share of the boxes around the connected parts that the mask fills; 1 for rectangles."""
    area = int(anomalous.sum())
    if area < SMALLEST_BOX:
        return None
    parts, _ = ndimage.label(anomalous, np.ones((3, 3)))
    boxes = ndimage.find_objects(parts)
    return float(area / sum((rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in boxes))


# One product


def _by_product(seen: Iterable[_Facts]) -> dict[str, list[_Facts]]:
    products: dict[str, list[_Facts]] = defaultdict(list)
    for facts in seen:
        products[_name(facts)].append(facts)
    return products


def _name(facts: _Facts) -> str:
    return facts.record.product or UNNAMED


def _product(name: str, seen: Sequence[_Facts]) -> Product:
    read = [facts for facts in seen if facts.reason is None]
    tally = Counter((facts.record.split, facts.record.label) for facts in read)
    return Product(
        name=name,
        train=tally["train", 0],
        test_good=tally["test", 0],
        test_unlabelled=tally["test", None],
        defects=dict(Counter(facts.record.defect or "defective" for facts in _defective(read))),
        masks=_mask_counts(read),
        boxes=_are_boxes(read),
        sizes=_tally(f"{facts.size[0]} x {facts.size[1]}" for facts in read),
        modes=_tally(MODES.get(facts.mode, facts.mode) for facts in read),
        unreadable=len(seen) - len(read),
    )


def _tally(values: Iterable[str]) -> dict[str, int]:
    """How often each occurs, most frequent first."""
    return dict(Counter(values).most_common())


def _defective(seen: Iterable[_Facts]) -> list[_Facts]:
    return [facts for facts in seen if facts.record.label == 1 and facts.record.split == "test"]


def _mask_counts(read: Sequence[_Facts]) -> dict[str, int]:
    masks = [(facts, facts.masked) for facts in _defective(read)]
    present = [(facts, mask) for facts, mask in masks if mask is not None]
    return {
        "present": len(present),
        "missing": len(masks) - len(present),
        "wrong size": sum(mask.size != facts.size for facts, mask in present),
        "empty": sum(mask.empty for _, mask in present),
    }


def _are_boxes(read: Sequence[_Facts]) -> bool:
    """Whether most masks are filled rectangles; boxes that overlap make a few that are not."""
    shares = [facts.masked.boxed for facts in read if facts.masked is not None and facts.masked.boxed is not None]
    return len(shares) >= FEWEST_BOXES and median(shares) >= BOX


def _calibrating(seen: Iterable[_Facts], held_out: float, calibration: float) -> int:
    """How many images would set the threshold."""
    normal = [facts for facts in seen if _learnable(facts)]
    if not normal:
        return 0
    hashes = {facts.record.path: facts.digest for facts in normal}
    return len(split_normals([facts.record for facts in normal], held_out, calibration, 0, hashes).calibration)


def _learnable(facts: _Facts) -> bool:
    return facts.reason is None and facts.record.split == "train" and facts.record.label != 1


# Problems


def _ordered(found: Iterable[Problem]) -> tuple[Problem, ...]:
    """Those that concern anything, the most severe first."""
    problems = [problem for problem in found if problem.where]
    return tuple(sorted(problems, key=lambda problem: SEVERITIES.index(problem.severity)))


def _problems(root: Path, seen: Sequence[_Facts], products: Sequence[Product], plain: bool) -> list[Problem]:
    """plain: a folder in one of the LAYOUTS, so that images that are not read were perhaps misplaced."""
    read = [facts for facts in seen if facts.reason is None]
    return [
        *_file_problems(seen),
        *_copy_problems(read),
        *_mask_problems(read, products),
        *(_stray_problems(root, seen) if plain else ()),
        *_product_problems(root, products),
    ]


def _deviation_problems(root: Path, found: Sequence[str]) -> Iterator[Problem]:
    if found:
        yield Problem(
            "error",
            f"not the data set as published: {in_short(found)}",
            (root,),
            "unpack the archive again, or go on with what is there: --partial; then say so beside every number",
        )


def _unreadable(seen: Iterable[_Facts]) -> tuple[Failure, ...]:
    """Images and masks, each once though several images may share a mask."""
    reasons: dict[Path, str] = {}
    for facts in seen:
        if facts.reason is not None:
            reasons[facts.record.path] = facts.reason
        if facts.record.mask is not None and facts.mask is not None and facts.mask.reason is not None:
            reasons[facts.record.mask] = facts.mask.reason
    return tuple(Failure(path, reason) for path, reason in reasons.items())


def _file_problems(seen: Sequence[_Facts]) -> Iterator[Problem]:
    broken = tuple(failure.path for failure in _unreadable(seen))
    yield Problem(
        "error",
        f"{_files(broken)} cannot be read",
        broken,
        "export them again or delete them; until then they are left out (--strict stops at the first)",
    )
    learnt = _paths(facts for facts in seen if facts.record.split == "train" and facts.record.label == 1)
    yield Problem(
        "error",
        f"{_files(learnt)} below train/ but not in train/good/",
        learnt,
        "move good ones to train/good/ and defective ones to test/<defect>/: only good images are learnt from",
    )
    dim = tuple(path for of_product in _by_product(seen).values() for path in _dim(of_product))
    yield Problem(
        "warning",
        f"{_files(dim)} with 16 bits of which the upper two or more are unused: almost black once brought to 8 bits",
        dim,
        "multiply the values so that they use all 16 bits (12-bit cameras: by 16), or save 8-bit images; "
        "the same factor for all images",
    )


def _dim(of_product: Sequence[_Facts]) -> tuple[Path, ...]:
    """Those of 16 bits, if all of them are dim: one alone may show something dark."""
    deep = [facts for facts in of_product if facts.dim is not None]
    return _paths(deep) if all(facts.dim for facts in deep) else ()


def _copy_problems(read: Sequence[_Facts]) -> Iterator[Problem]:
    """Files that are byte for byte the same, each set of copies under its worst heading."""
    copies: dict[str, list[_Facts]] = defaultdict(list)
    for facts in read:
        copies[facts.digest].append(facts)
    found: dict[str, list[_Facts]] = defaultdict(list)
    for same in copies.values():
        if len(same) > 1:
            found[_kind(same)] += same
    yield _copies("error", found["label"], "filed both as good and as defective", "delete the wrong ones")
    yield _copies(
        "error",
        found["leak"],
        "both in train and in test: the test would flatter the model",
        "delete the copy in train, or the one in test",
    )
    yield _copies("warning", found["product"], "filed under several products", "delete the wrong ones")
    yield _copies("note", found["split"], "within train or within test", "keep one of each: copies count twice")


def _kind(same: Sequence[_Facts]) -> str:
    records = [facts.record for facts in same]
    if {record.label for record in records} >= {0, 1}:
        return "label"
    if len({record.split for record in records}) > 1:
        return "leak"
    return "product" if len({record.product for record in records}) > 1 else "split"


def _copies(severity: str, same: Sequence[_Facts], what: str, fix: str) -> Problem:
    return Problem(severity, f"{len(same)} byte-identical images {what}", _paths(same), fix)


def _mask_problems(read: Sequence[_Facts], products: Sequence[Product]) -> Iterator[Problem]:
    yield _of_masks(
        read,
        lambda facts, mask: mask.size != facts.size,
        "not of the size of the image",
        "export masks at the size of the (upright) image; until then they are stretched over it",
    )
    yield _of_masks(
        read,
        lambda facts, mask: mask.empty,
        "of defective images without a marked pixel",
        "mark the defect with any value but 0, or delete the mask",
    )
    yield _of_masks(
        read,
        lambda facts, mask: mask.lossy,
        "saved as JPEG, which leaves stray marked pixels around each defect",
        "draw or export them as PNG: every value but 0 counts as defective",
    )
    yield from _box_problems(read, products)
    yield _missing_masks(read, products)


def _of_masks(read: Iterable[_Facts], concerned: Callable[[_Facts, _Mask], bool], what: str, fix: str) -> Problem:
    masked = [(facts.record.mask, facts, facts.masked) for facts in read]
    where = tuple(path for path, facts, mask in masked if path and mask and concerned(facts, mask))
    return Problem("warning", f"{_masks(where)} {what}", where, fix)


def _box_problems(read: Sequence[_Facts], products: Sequence[Product]) -> Iterator[Problem]:
    for product in products:
        if product.boxes:
            yield Problem(
                "warning",
                f"{product.name}: the masks are filled rectangles: boxes around the defects, not their outlines",
                tuple(facts.record.mask for facts in read if _name(facts) == product.name and facts.record.mask),
                f"leave them out of the pixel metrics: unispect evaluate MODEL DATA --ignore-masks {product.name}",
            )


def _missing_masks(read: Sequence[_Facts], products: Sequence[Product]) -> Problem:
    """Only where other defects of the product have one; a product without any is another matter."""
    partly = {product.name for product in products if product.masks["present"] and product.masks["missing"]}
    bare = _paths(facts for facts in _defective(read) if _name(facts) in partly and facts.record.mask is None)
    return Problem(
        "warning",
        f"{_files(bare)} of a defect without a mask, where others of the product have one: left out of pixel metrics",
        bare,
        "add ground_truth/<defect>/<name>_mask.png, named as the image",
    )


def _stray_problems(root: Path, seen: Iterable[_Facts]) -> Iterator[Problem]:
    """Images that no layout gives a meaning."""
    known = {path for facts in seen for path in (facts.record.path, facts.record.mask)}
    stray = [path for path in images_below(root) if path not in known]
    truth = {path for path in stray if "ground_truth" in _parts(path, root)}
    orphans = tuple(path for path in stray if path in truth and "good" not in _parts(path, root))
    yield Problem(
        "warning",
        f"{_masks(orphans)} without a test image",
        orphans,
        "name them as their image: ground_truth/<defect>/<name>_mask.png for test/<defect>/<name>.png",
    )
    other = tuple(path for path in stray if path not in truth)
    yield Problem(
        "note",
        f"{_files(other)} in no folder that is read",
        other,
        "move them below train/good/, test/good/ or test/<defect>/ if they are to be used",
    )


def _parts(path: Path, root: Path) -> tuple[str, ...]:
    return tuple(part.lower() for part in path.relative_to(root).parts)


# Severity, which products, what, fix
OF_PRODUCTS: tuple[tuple[str, Callable[[Product], bool], str, str], ...] = (
    (
        "warning",
        lambda product: not product.train,
        "no readable training image: a model fitted here will not know the product",
        "put good images in train/good/",
    ),
    (
        "warning",
        lambda product: 0 < product.train < 4,
        "fewer than 4 training images: none is set aside, so the threshold knows nothing of the product",
        "add good images to train/good/: 20 or more",
    ),
    (
        "note",
        lambda product: not product.test_good,
        "no good test images: neither image metrics nor false alarms can be measured",
        "set good images aside, in test/good/",
    ),
    (
        "note",
        lambda product: not product.defective,
        "no defective test images: detection cannot be measured (fitting needs none)",
        "put defective images in test/<defect>/",
    ),
    (
        "note",
        lambda product: product.defective > 0 and not product.masks["present"],
        "no masks: pixel metrics cannot be measured (image metrics can)",
        "add ground_truth/<defect>/<name>_mask.png, not 0 where the defect is",
    ),
    (
        "note",
        lambda product: product.test_unlabelled > 0,
        "images right in test/ have no label and are not evaluated",
        "move them to test/good/ or test/<defect>/",
    ),
)


def _product_problems(root: Path, products: Sequence[Product]) -> Iterator[Problem]:
    for severity, concerned, what, fix in OF_PRODUCTS:
        names = [product.name for product in products if concerned(product)]
        folders = tuple(root / name if (root / name).is_dir() else root for name in names)
        yield Problem(severity, f"{', '.join(names)}: {what}", folders, fix)


# Words


def _paths(seen: Iterable[_Facts]) -> tuple[Path, ...]:
    return tuple(facts.record.path for facts in seen)


def _files(found: Sequence[object]) -> str:
    return "1 image" if len(found) == 1 else f"{len(found)} images"


def _masks(found: Sequence[object]) -> str:
    return "1 mask" if len(found) == 1 else f"{len(found)} masks"


def _percent(rate: float) -> str:
    """Rounded up, so that the rate shown can be asked for."""
    return f"{ceil(10_000 * rate) / 100:g} %"


def _below(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) and path != root else str(path)


def _table(products: Sequence[Product]) -> list[str]:
    """Columns of equal width under a ruled head, with a last line for all."""
    head = ("product", "train", "test good", "defective", "masks", "unreadable", "pixels", "kind", "metrics")
    rows = [head, *map(_row, products)]
    if len(products) > 1:
        rows.append(_total(products))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _row(product: Product) -> tuple[str, ...]:
    masks = product.masks["present"]
    return (
        product.name,
        str(product.train),
        str(product.test_good),
        str(product.defective),
        f"{masks}{' boxes' if product.boxes else ''}" if masks else "-",
        str(product.unreadable or "-"),
        _commonest(product.sizes),
        _commonest(product.modes),
        _measurable(product),
    )


def _total(products: Sequence[Product]) -> tuple[str, ...]:
    columns = [(one.train, one.test_good, one.defective, one.masks["present"], one.unreadable) for one in products]
    return (f"{len(products)} products", *(str(sum(column)) for column in zip(*columns, strict=True)), "", "", "")


def _commonest(counts: dict[str, int]) -> str:
    if len(counts) < 2:
        return next(iter(counts), "-")
    return f"{next(iter(counts))} and {len(counts) - 1} more"


def _measurable(product: Product) -> str:
    if product.no_image_metrics is not None:
        return f"none: {product.no_image_metrics}"
    return "image, pixel" if product.no_pixel_metrics is None else f"image; not pixel: {product.no_pixel_metrics}"
