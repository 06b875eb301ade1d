"""Records and their division: disjoint, complete, by group and content, and deaf to paths, order and other products."""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from unispect.data.records import Record, Split, content_hash, split_normals, unit_numbers
from unispect.errors import DataError

ROLES = ("train", "held_out", "calibration")


def records(root: Path, counts: dict[str | None, int], groups: int = 0) -> list[Record]:
    """Files of distinct content, in turn in one of `groups` capture groups."""
    made = []
    for product, count in counts.items():
        folder = root / str(product)
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            path = folder / f"{number:03}.png"
            path.write_bytes(f"{product} {number}".encode())
            made.append(Record(path, product, 0, group=f"g{number % groups}" if groups else None))
    return made


def roles(split: Split) -> dict[Path, str]:
    return {record.path: role for role in ROLES for record in getattr(split, role)}


def by_content(split: Split) -> dict[str, str]:
    return {content_hash(path): role for path, role in roles(split).items()}


def counts(split: Split) -> tuple[int, int, int]:
    return len(split.train), len(split.held_out), len(split.calibration)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Record("x.png", None, 0), "path: got 'x.png', expected a pathlib.Path"),  # type: ignore[arg-type]
        (lambda: Record(Path("x.png"), None, 2), "x.png: label 2: expected 0 (good), 1 (defective) or None"),
        (lambda: Record(Path("x.png"), None, 0, split="val"), "split 'val': expected 'train' or 'test'"),
        (lambda: Record(Path("x.png"), None, 0, defect="hole"), "defect 'hole' with label 0"),
        (lambda: Record(Path("x.png"), "", 0), "empty product or group"),
        (lambda: Record(Path("x.png"), "a", 0, group=""), "empty product or group"),
    ],
)
def test_a_wrong_record_says_what_is_wrong(make: Callable[[], Record], text: str) -> None:
    with pytest.raises(DataError) as caught:
        make()
    assert text in str(caught.value)


def test_content_hash_is_the_sha256_of_the_bytes(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "x").write_bytes(content)
    assert content_hash(tmp_path / "x") == sha256(content).hexdigest()
    with pytest.raises(DataError, match=r"gone: cannot be read: No such file"):
        content_hash(tmp_path / "gone")


@pytest.mark.parametrize("seed", range(5))
def test_parts_are_disjoint_complete_and_of_the_right_size(tmp_path: Path, seed: int) -> None:
    given = records(tmp_path, {"a": 50, "b": 20, None: 7})
    split = split_normals(given, held_out=0.1, calibration=0.2, seed=seed)
    assert counts(split) == (35 + 14 + 5, 5 + 2 + 1, 10 + 4 + 1)
    assert roles(split).keys() == {record.path for record in given}
    assert sum(counts(split)) == len(given)


@pytest.mark.parametrize(
    ("count", "expected"), [(1, (1, 0, 0)), (3, (3, 0, 0)), (4, (2, 1, 1)), (5, (3, 1, 1)), (100, (94, 1, 5))]
)
def test_small_products_give_one_each_and_tiny_ones_nothing(
    tmp_path: Path, count: int, expected: tuple[int, int, int]
) -> None:
    assert counts(split_normals(records(tmp_path, {"a": count}), 0.01, 0.05, 0)) == expected


@pytest.mark.parametrize("count", range(4, 12))
@pytest.mark.parametrize(("held_out", "calibration"), [(0.49, 0.5), (0.9, 0.09), (0.0, 0.99), (0.99, 0.0), (0.0, 0.0)])
def test_something_is_always_left_to_train_on(tmp_path: Path, count: int, held_out: float, calibration: float) -> None:
    train, kept, judged = counts(split_normals(records(tmp_path, {"a": count}), held_out, calibration, 0))
    assert train >= 1
    assert (kept > 0, judged > 0) == (held_out > 0, calibration > 0)


def test_the_order_of_the_files_does_not_matter(tmp_path: Path) -> None:
    given = records(tmp_path, {"a": 20, "b": 9}, groups=7)
    shuffled = [given[place] for place in np.random.default_rng(0).permutation(len(given))]
    assert roles(split_normals(given, 0.2, 0.2, 3)) == roles(split_normals(shuffled, 0.2, 0.2, 3))


def test_neither_the_place_nor_the_names_of_the_files_matter(tmp_path: Path) -> None:
    given = records(tmp_path / "here", {"a": 20})
    moved = []
    for number, record in enumerate(given):
        path = tmp_path / f"{99 - number}.bmp"
        path.write_bytes(record.path.read_bytes())
        moved.append(Record(path, "renamed", 0))
    assert by_content(split_normals(given, 0.2, 0.2, 3)) == by_content(split_normals(moved, 0.2, 0.2, 3))


def test_other_products_change_nothing(tmp_path: Path) -> None:
    alone = records(tmp_path, {"a": 20}, groups=9)
    both = records(tmp_path, {"b": 31, "a": 20}, groups=9)
    small, large = roles(split_normals(alone, 0.2, 0.2, 3)), roles(split_normals(both, 0.2, 0.2, 3))
    assert small == {path: large[path] for path in small}


def test_seeds_differ_and_repeat(tmp_path: Path) -> None:
    given = records(tmp_path, {"a": 40})
    first, again, other = (roles(split_normals(given, 0.2, 0.2, seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_every_image_calibrates_for_some_seed_and_about_equally_often(tmp_path: Path) -> None:
    given = records(tmp_path, {"a": 10})
    hashes = {record.path: content_hash(record.path) for record in given}
    splits = [split_normals(given, 0.1, 0.2, seed, hashes) for seed in range(400)]
    times = [sum(record in split.calibration for split in splits) for record in given]
    # Binomial(400, 0.2): mean 80, deviation 8; five deviations, ten images
    assert all(40 < count < 120 for count in times)


@pytest.mark.parametrize("seed", range(8))
def test_groups_and_copies_stay_together(tmp_path: Path, seed: int) -> None:
    given = records(tmp_path, {"a": 30}, groups=10)
    (tmp_path / "copies").mkdir()
    for number in range(12):  # copies without a group, of images in groups 0..9
        path = tmp_path / "copies" / f"{number}.png"
        path.write_bytes((tmp_path / "a" / f"{number:03}.png").read_bytes())
        given.append(Record(path, "a", None))
    found = roles(split_normals(given, 0.2, 0.3, seed))
    for record in given:
        partners = [
            other for other in given
            if content_hash(other.path) == content_hash(record.path) or (record.group and other.group == record.group)
        ]  # fmt: skip
        assert {found[partner.path] for partner in partners} == {found[record.path]}


@pytest.mark.parametrize("seed", range(8))
def test_groups_that_share_a_picture_stay_together(tmp_path: Path, seed: int) -> None:
    given = records(tmp_path, {"a": 16}, groups=8)
    for one, other in (("000", "001"), ("009", "002")):  # chains groups 0, 1 and 2
        (tmp_path / "a" / f"{other}.png").write_bytes((tmp_path / "a" / f"{one}.png").read_bytes())
    split = split_normals(given, 0.2, 0.3, seed)
    found = roles(split)
    assert len({found[record.path] for record in given if record.group in ("g0", "g1", "g2")}) == 1
    merged = {role: {max(record.group or "", "g2") for record in getattr(split, role)} for role in ROLES}
    assert {role: len(names) for role, names in merged.items()} == {"train": 3, "held_out": 1, "calibration": 2}


def test_a_group_name_means_nothing_in_another_product(tmp_path: Path) -> None:
    given = records(tmp_path, {"a": 20, "b": 20}, groups=20)
    found = roles(split_normals(given, 0.4, 0.4, 0))
    parts = {product: [found[r.path] for r in given if r.product == product] for product in ("a", "b")}
    assert len(set(parts["a"])) == len(set(parts["b"])) == 3


def test_numbers_of_units_hold_groups_and_copies_together(tmp_path: Path) -> None:
    made = records(tmp_path, {"a": 6, "b": 4}, groups=3)
    made[3].path.write_bytes(made[1].path.read_bytes())  # joins groups g0 and g1 of product a
    made += [Record(tmp_path / "alone.png", "a", 0), Record(tmp_path / "copy.png", "a", 0)]
    for record in made[10:]:
        record.path.write_bytes(b"twice")
    hashes = {record.path: content_hash(record.path) for record in made}
    found = unit_numbers(made, hashes)
    assert found == [0, 0, 1, 0, 0, 1, 3, 4, 5, 3, 2, 2]
    assert unit_numbers(made[::-1], hashes) == found[::-1]


def test_a_split_survives_json_without_the_files(tmp_path: Path) -> None:
    split = split_normals(records(tmp_path, {"a": 9, None: 5}, groups=6), 0.2, 0.2, 0)
    stored = json.loads(json.dumps(split.as_dict()))
    hashes = {content_hash(record.path) for record in split.calibration}
    for path in roles(split):
        path.unlink()
    again = Split.from_dict(stored)
    assert again == split
    assert again.as_dict() == stored
    assert {entry["sha256"] for entry in stored["calibration"]} == hashes


def test_a_split_made_by_hand_reads_its_hashes(tmp_path: Path) -> None:
    one, two, three = records(tmp_path, {"a": 3})
    stored = Split((one,), (two,), (three,)).as_dict()
    assert stored["held_out"][0]["sha256"] == sha256(b"a 1").hexdigest()


@pytest.mark.parametrize("stored", [{}, {"train": 3}, {"train": [{}], "held_out": [], "calibration": []}])
def test_a_damaged_stored_split_is_a_clear_error(stored: dict[str, object]) -> None:
    with pytest.raises(DataError, match=r"stored split: .* expected lists train, held_out, calibration"):
        Split.from_dict(stored)


def test_only_normal_training_images_may_come(tmp_path: Path) -> None:
    good = records(tmp_path, {"a": 3})
    bad, tested = Record(tmp_path / "bad.png", "a", 1), Record(tmp_path / "t.png", "a", 0, split="test")
    with pytest.raises(DataError, match=r"bad\.png: a defective image among the normal ones.*test/<defect>/"):
        split_normals([*good, bad, bad], 0.1, 0.1, 0)
    with pytest.raises(DataError, match=r"t\.png: a test image among the training ones"):
        split_normals([*good, tested], 0.1, 0.1, 0)
    with pytest.raises(DataError, match=r"no normal images to split"):
        split_normals([], 0.1, 0.1, 0)


@pytest.mark.parametrize(("held_out", "calibration"), [(-0.1, 0.2), (0.5, 0.5), (0.2, float("nan")), (2.0, 0.0)])
def test_fractions_must_leave_something(tmp_path: Path, held_out: float, calibration: float) -> None:
    with pytest.raises(DataError, match=r"held_out=.* and calibration=.*: expected fractions"):
        split_normals(records(tmp_path, {"a": 9}), held_out, calibration, 0)
