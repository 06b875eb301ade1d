"""Published data sets, read from tiny trees with their quirks; what is said to those who have not got them, or not all."""

import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

import trees
from unispect.data.check import check
from unispect.data.dataset import DataSet, check_root
from unispect.data.datasets import DATASETS, deviations, read_data, read_dataset
from unispect.data.loader import Preparation, decode, read_mask
from unispect.data.records import Record
from unispect.errors import ConfigError, DataError, ImageError


@dataclass(frozen=True)
class Case:
    """One data set: its tree, what each product of the tree holds, the published sums, and the index files it may open."""

    name: str
    write: Callable[[Path], Path]
    products: tuple[str, ...]
    holds: tuple[int, int, int]  # of each product in the tree
    published: tuple[int, int, int]  # train, test good, test defective
    index: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("mvtec", trees.mvtec, ("bottle", "grid"), (5, 2, 4), (3629, 467, 1258)),
    Case("visa", trees.visa, ("candle", "pcb1"), (3, 2, 2), (8659, 962, 1200), ("1cls.csv",)),
    Case("btad", trees.btad, ("01", "02", "03"), (4, 2, 2), (400 + 399 + 1000, 21 + 30 + 400, 49 + 200 + 41)),
    Case("mvtec3d", trees.mvtec3d, ("bagel", "tire"), (6, 2, 4), (2656 + 294, 249, 948)),
    Case("loco", trees.loco, ("juice_bottle", "pushpins"), (6, 2, 4), (1778 + 305, 575, 432 + 561)),
]
every = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture
def tree(case: Case, tmp_path: Path) -> Path:
    return case.write(tmp_path / "above" / case.name)


def known(case: Case) -> DataSet:
    return DATASETS[case.name]


def tally(records: list[Record]) -> Counter[tuple[str | None, str, int | None]]:
    return Counter((record.product, record.split, record.label) for record in records)


# What is read


@every
def test_each_product_has_its_splits_and_labels(case: Case, tree: Path) -> None:
    expected = Counter[tuple[str | None, str, int | None]]()
    for product in case.products:
        for kind, number in zip((("train", 0), ("test", 0), ("test", 1)), case.holds, strict=True):
            expected[product, *kind] = number
    assert tally(known(case).read(tree)) == expected


@every
def test_all_that_is_read_can_be_decoded(case: Case, tree: Path) -> None:
    for record in known(case).read(tree):
        height, width, _ = decode(record.path).shape
        assert record.mask is None or read_mask(record.mask).shape == (height, width)


@every
def test_masks_mark_the_defect_and_only_that_of_their_image(case: Case, tree: Path) -> None:
    records = known(case).read(tree)
    assert all((record.mask is not None) == (record.label == 1) for record in records)
    masks = [record.mask for record in records if record.mask is not None]
    assert len(set(masks)) == len(masks)
    defects = [int(read_mask(path).sum()) for path in masks]
    empty = 1 if case.name == "btad" else 0
    assert defects.count(0) == empty
    assert {area for area in defects if area} <= {10, 20}  # the L of `trees.mask`, once or twice


@every
def test_masks_belong_to_the_image_of_the_same_number(case: Case, tree: Path) -> None:
    for record in known(case).read(tree):
        if record.mask is not None:
            assert record.mask.stem.removesuffix("_mask") == record.path.stem
            assert record.product in record.mask.parts


@every
def test_the_order_is_that_of_names_whatever_the_file_system_gives(case: Case, tree: Path, tmp_path: Path) -> None:
    records = known(case).read(tree)
    assert records == known(case).read(tree)
    assert [record.product for record in records] == sorted(str(record.product) for record in records)
    for product in case.products:
        splits = [record.split for record in records if record.product == product]
        assert splits == sorted(splits, reverse=True)  # train before test
    copied = known(case).read(_written_backwards(tree, tmp_path / "copy"))
    assert [record.path.relative_to(tmp_path / "copy") for record in copied] == [
        record.path.relative_to(tree) for record in records
    ]


def _written_backwards(tree: Path, target: Path) -> Path:
    for path in sorted(tree.rglob("*"), reverse=True):
        if path.is_file():
            (target / path.relative_to(tree)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / path.relative_to(tree))
    return target


@every
def test_only_index_files_are_opened(case: Case, tree: Path) -> None:
    """Reading gives the same where all else is without content."""
    records = known(case).read(tree)
    for path in tree.rglob("*"):
        if path.is_file() and path.name not in case.index:
            path.write_bytes(b"")
    assert known(case).read(tree) == records


@every
def test_check_of_a_tree_has_only_the_deviations(case: Case, tree: Path) -> None:
    found = check(tree, dataset=case.name)
    assert [product.name for product in found.products] == list(case.products)
    assert {product.no_pixel_metrics for product in found.products} == {None}
    errors = [problem.what for problem in found.problems if problem.severity == "error"]
    assert len(errors) == 1
    assert errors[0].startswith("not the data set as published: ")
    assert not [problem for problem in found.problems if "no folder that is read" in problem.what]


@every
def test_a_relative_root_and_one_with_a_slash_read_alike(case: Case, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree.parent)
    relative = known(case).read(Path(f"{tree.name}/"))
    assert [tree.parent / record.path for record in relative] == [record.path for record in known(case).read(tree)]
    assert [record.product for record in relative] == [record.product for record in known(case).read(tree)]


def test_the_split_of_visa_is_that_of_its_list(tmp_path: Path) -> None:
    records = [record for record in DATASETS["visa"].read(trees.visa(tmp_path)) if record.product == "candle"]
    assert [(record.path.name, record.split) for record in records] == [
        ("0001.JPG", "train"), ("0002.JPG", "train"), ("0004.JPG", "train"), ("0000.JPG", "test"), ("0003.JPG", "test"),
        ("000.JPG", "test"), ("001.JPG", "test"),
    ]  # fmt: skip


def test_listed_images_of_visa_that_are_missing_are_not_counted(tmp_path: Path) -> None:
    (trees.visa(tmp_path) / "candle/Data/Images/Normal/0001.JPG").unlink()
    assert tally(DATASETS["visa"].read(tmp_path))["candle", "train", 0] == 2


@pytest.mark.parametrize(
    "row",
    [
        "candle,val,normal,a.JPG,",
        "candle,test,broken,a.JPG,",
        ",test,normal,a.JPG,",
        "candle,test",
        "candle,test,anomaly,a.JPG",
        "candle,test,anomaly,a.JPG,",
    ],
)
def test_a_wrong_line_of_visas_list_is_named(tmp_path: Path, row: str) -> None:
    trees.visa_list(trees.visa(tmp_path), ["candle,train,normal,candle/Data/Images/Normal/0000.JPG,", row])
    with pytest.raises(DataError, match=r"line 3: .*expected a product, train or test, normal or anomaly"):
        DATASETS["visa"].read(tmp_path)


def test_the_columns_of_visas_list_are_told_when_wrong(tmp_path: Path) -> None:
    trees.visa_list(trees.visa(tmp_path), [], "object,set,label,image_path,mask_path")
    with pytest.raises(DataError, match=r"'image_path', 'mask_path'.: expected object, split, label, image, mask"):
        DATASETS["visa"].read(tmp_path)


def test_visa_without_its_list_says_what_is_missing(tmp_path: Path) -> None:
    shutil.rmtree(trees.visa(tmp_path) / "split_csv")
    with pytest.raises(
        DataError, match=r"holds no split_csv.1cls.csv, which says what is for training\. .* VisA is not down"
    ):
        DATASETS["visa"].read(tmp_path)


def test_btad_may_be_the_folder_above(tmp_path: Path) -> None:
    inner = trees.btad(tmp_path / "BTech_Dataset_transformed")
    assert DATASETS["btad"].read(tmp_path) == DATASETS["btad"].read(inner)


def test_a_defective_image_of_btad_whose_mask_is_missing_has_none(tmp_path: Path) -> None:
    (trees.btad(tmp_path) / "01/ground_truth/ko/0001.png").unlink()
    bare = [record for record in DATASETS["btad"].read(tmp_path) if record.label == 1 and record.mask is None]
    assert [(record.product, record.path.name) for record in bare] == [("01", "0001.bmp")]


def test_good_scans_have_no_mask_and_points_are_no_images(tmp_path: Path) -> None:
    records = DATASETS["mvtec3d"].read(trees.mvtec3d(tmp_path))
    assert {record.path.parent.name for record in records} == {"rgb"}
    assert {record.path.suffix for record in records} == {".png"}
    assert {record.defect for record in records} == {None, "hole", "combined"}
    assert len({record.path for record in records}) == len(records)  # the same numbers in train and validation


def test_the_masks_of_loco_are_folders_of_which_all_count(tmp_path: Path) -> None:
    records = DATASETS["loco"].read(trees.loco(tmp_path))
    areas = {record.defect: int(read_mask(record.mask).sum()) for record in records if record.mask is not None}
    assert areas == {"logical_anomalies": 20, "structural_anomalies": 10}
    assert all(record.mask.is_dir() for record in records if record.mask is not None)


# Masks in folders and in arrays


def test_the_union_of_a_folder_lands_where_its_files_do(tmp_path: Path) -> None:
    one, other = trees.mask(tmp_path / "m/000.png", (32, 16)), trees.mask(tmp_path / "m/001.png", (32, 16), top=9)
    trees.text(tmp_path / "m/notes.txt")
    trees.text(tmp_path / "m/._000.png")
    assert np.array_equal(read_mask(tmp_path / "m"), read_mask(one) | read_mask(other))
    prepared = Preparation(16)
    assert np.array_equal(prepared.mask(tmp_path / "m", 8), prepared.mask(one, 8) | prepared.mask(other, 8))


def test_folders_that_are_no_masks_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="empty: a folder without a mask in it"):
        read_mask(tmp_path / "empty")
    trees.mask(tmp_path / "m/000.png", (32, 16))
    trees.mask(tmp_path / "m/001.png", (16, 32))
    with pytest.raises(ImageError, match=r"001.png: shape \(32, 16\), where the masks before it have \(16, 32\)"):
        read_mask(tmp_path / "m")
    (tmp_path / "m/001.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"m: 001\.png: zero bytes"):
        read_mask(tmp_path / "m")


@pytest.mark.parametrize("kind", [np.uint8, bool, np.float64, np.int32])
def test_a_slice_of_an_array_is_a_mask(tmp_path: Path, kind: type) -> None:
    stack = (np.random.default_rng(0).integers(0, 3, (4, 6, 9))).astype(kind)
    np.save(tmp_path / "01_0014.npy", stack)
    for index in range(4):
        found = read_mask(Path(f"{tmp_path / '01_0014.npy'}#{index}"))
        assert type(found) is np.ndarray
        assert found.dtype == bool
        assert np.array_equal(found, stack[index] != 0)
    prepared = Preparation(16).mask(Path(f"{tmp_path / '01_0014.npy'}#2"), 9)
    assert prepared.shape == (9, 9)


@pytest.mark.parametrize(
    ("stored", "index", "message"),
    [
        (np.zeros((4, 6, 9)), 4, r"x.npy#4: shape \(4, 6, 9\): expected \(T, H, W\) with T above 4"),
        (np.zeros((6, 9)), 0, r"shape \(6, 9\): expected \(T, H, W\)"),
        (np.zeros((2, 60, 90)), 0, "too large: 90 x 60"),
        (np.array([[["pickled"]]], dtype=object), 0, "Python objects"),
    ],
)
def test_slices_that_are_no_masks_are_named(tmp_path: Path, stored: np.ndarray, index: int, message: str) -> None:
    np.save(tmp_path / "x.npy", stored)
    with pytest.raises(ImageError, match=message):
        read_mask(Path(f"{tmp_path / 'x.npy'}#{index}"), max_pixels=1000)


def test_an_array_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"x\.npy#0: no such file"):
        read_mask(tmp_path / "x.npy#0")
    (tmp_path / "x.npy").write_bytes(b"no array")
    with pytest.raises(ImageError, match=r"x\.npy#0: damaged"):
        read_mask(tmp_path / "x.npy#0")


def test_only_the_slice_asked_for_is_read(tmp_path: Path) -> None:
    """The file is 20 GB large; its holes cost no disk."""
    stack = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.uint8, shape=(50_000, 480, 856))
    stack[12_345, 7, 8] = 1
    stack.flush()
    del stack
    assert read_mask(tmp_path / "x.npy#12345").sum() == 1
    assert read_mask(tmp_path / "x.npy#49999").sum() == 0


# Who has not got it


@every
def test_a_missing_folder_tells_what_to_get_and_where_to_put_it(case: Case, tmp_path: Path) -> None:
    dataset = known(case)
    with pytest.raises(DataError, match="no such folder") as error:
        read_dataset(case.name, tmp_path / "nowhere")
    for part in (dataset.title, dataset.source, dataset.licence, *dataset.archives, dataset.layout):
        assert part in str(error.value)
    assert f"unpack it into {tmp_path / 'nowhere'}" in str(error.value)


@every
def test_another_folder_tells_the_same(case: Case, tmp_path: Path) -> None:
    trees.image(tmp_path / "photos/holiday.jpg")
    with pytest.raises(DataError, match="holds none of ") as error:
        read_dataset(case.name, tmp_path)
    assert known(case).source in str(error.value)


@every
def test_a_root_too_high_or_too_low_names_the_right_one(case: Case, tree: Path) -> None:
    for near in (tree.parent, tree.parent.parent, tree / case.products[0]):
        with pytest.raises(DataError, match=r"not the root of .*: pass that folder") as error:
            read_dataset(case.name, near)
        assert f"but {tree} is" in str(error.value)


@every
def test_an_archive_is_to_be_unpacked_as_said(
    case: Case, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, file = known(case), _packed(tree, tmp_path / "data.tar")
    with pytest.raises(DataError) as error:
        read_dataset(case.name, file)
    found = sha256(file.read_bytes()).hexdigest()
    assert (f"Its SHA-256 is {found}, not the published" if dataset.archives else "No checksum") in str(error.value)
    assert f"tar -xf '{file}' -C '{tmp_path / case.name}'; then pass {tmp_path / case.name}" in str(error.value)
    with tarfile.open(file) as packed:
        packed.extractall(tmp_path / case.name, filter="data")
    assert tally(dataset.read(tmp_path / case.name)) == tally(dataset.read(tree))


def _packed(tree: Path, file: Path) -> Path:
    with tarfile.open(file, "w") as packed:
        for path in tree.iterdir():
            packed.add(path, path.name)
    return file


def test_the_published_archive_is_recognised(tmp_path: Path) -> None:
    file = tmp_path / "renamed.zip"
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("01/readme.txt", "")
    dataset = replace(DATASETS["btad"], archives={"btad.zip": sha256(file.read_bytes()).hexdigest()})
    with pytest.raises(
        DataError, match=r"Its SHA-256 is the published one. Unpack it: .* unzip '.*renamed.zip' -d '.*btad'"
    ):
        check_root(dataset, file)


@every
def test_an_archive_still_in_the_folder_is_noticed(case: Case, tmp_path: Path) -> None:
    for name in known(case).archives:
        trees.text(tmp_path / name)
        with pytest.raises(DataError, match=f"holds {name}, still packed. Unpack it: mkdir"):
            read_dataset(case.name, tmp_path)


def test_a_file_that_is_no_archive_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a file, where the folder of MVTec AD was expected\. MVTec AD is not downloaded"):
        read_dataset("mvtec", trees.image(tmp_path / "000.png"))


@every
def test_a_set_without_images_is_an_error_even_if_partial(case: Case, tree: Path) -> None:
    for path in tree.rglob("*"):
        if path.is_file() and path.name not in case.index:
            path.unlink()
    with pytest.raises(DataError, match="no image"):
        read_dataset(case.name, tree, partial=True)


# Counts


@every
def test_the_published_counts_add_up(case: Case) -> None:
    assert tuple(map(sum, zip(*known(case).counts.values(), strict=True))) == case.published


def published_records(dataset: DataSet) -> list[Record]:
    kinds = (("train", 0), ("test", 0), ("test", 1))
    return [
        Record(Path(f"{product}/{split}{label}/{number}.png"), product, label, split=split)
        for product, counts in dataset.counts.items()
        for (split, label), numbers in zip(kinds, counts, strict=True)
        for number in range(numbers)
    ]


@every
def test_as_many_as_published_are_no_deviation_and_any_change_is(case: Case) -> None:
    dataset = known(case)
    records = published_records(dataset)
    assert deviations(dataset, records) == []
    for record, kind in {(record.split, record.label): record for record in records}.items():
        rest = [one for one in records if one is not kind]
        (text,) = deviations(dataset, rest)
        number = dataset.counts[str(kind.product)][[("train", 0), ("test", 0), ("test", 1)].index(record)]
        assert text.startswith(f"{kind.product}: {number - 1} ")
        assert text.endswith(f"images where {number} are published")


def test_the_text_of_deviations() -> None:
    dataset = DATASETS["mvtec"]
    records = [record for record in published_records(dataset) if record.product != "cable"][1:]
    records += [
        Record(Path("a.png"), "gadget", 0),
        Record(Path("b.png"), "wood", None, split="test"),
        Record(Path("c.png"), "zipper", 1),
    ]
    assert deviations(dataset, records) == [
        "bottle: 208 training images where 209 are published",
        "cable: missing",
        "wood: 1 test images without a label where 0 are published",
        "zipper: 1 defective images in the training set where 0 are published",
        "gadget: not a product of MVTec AD",
    ]


def test_without_published_counts_nothing_deviates() -> None:
    assert deviations(replace(DATASETS["mvtec"], counts={}), [Record(Path("a.png"), "gadget", 0)]) == []


@every
def test_an_incomplete_set_is_an_error_unless_partial(case: Case, tree: Path) -> None:
    with pytest.raises(DataError, match=r"not .* as published: .*; and \d+ more\. .*partial=True \(--partial\)"):
        read_data(tree, case.name)
    assert read_data(str(tree), case.name, partial=True) == known(case).read(tree)


def test_products_of_others_are_named_and_left_out(tmp_path: Path) -> None:
    records = DATASETS["mvtec"].read(trees.mvtec(tmp_path))
    trees.image(tmp_path / "gadget/train/good/000.png")
    assert "gadget: not a product of MVTec AD" in deviations(DATASETS["mvtec"], DATASETS["mvtec"].read(tmp_path))
    assert read_dataset("mvtec", tmp_path, partial=True) == records
    assert {product.name for product in check(tmp_path, dataset="mvtec").products} == {"bottle", "grid"}


def test_a_complete_set_is_read_and_checked_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = replace(DATASETS["mvtec"], counts={"bottle": (5, 2, 4), "grid": (5, 2, 4)})
    monkeypatch.setitem(DATASETS, "mvtec", dataset)
    trees.mvtec(tmp_path)
    assert len(read_dataset("mvtec", tmp_path)) == 22
    assert check(tmp_path, dataset="mvtec").problems == ()


# The one entry


def test_names_and_entries_agree() -> None:
    assert all(name == dataset.name for name, dataset in DATASETS.items())
    assert {case.name for case in CASES} <= DATASETS.keys()
    for digest in (digest for dataset in DATASETS.values() for digest in dataset.archives.values()):
        assert len(bytes.fromhex(digest)) == 32


def test_an_unknown_name_gets_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown data set 'mvtek': did you mean 'mvtec'"):
        read_data(tmp_path, "mvtek")


def test_a_folder_is_read_as_such(tmp_path: Path) -> None:
    assert read_data(trees.mvtec(tmp_path)) == DATASETS["mvtec"].read(tmp_path)
    named_like_a_manifest = tmp_path / "other.csv"
    trees.image(named_like_a_manifest / "nut/000.png")
    assert [record.product for record in read_data(named_like_a_manifest)] == ["nut"]


def test_a_manifest_is_read_and_checked_as_such(tmp_path: Path) -> None:
    image = trees.image(tmp_path / "images/a.png")
    trees.image(tmp_path / "images/not_listed.png")
    manifest = trees.text(tmp_path / "list.csv", "path,product,label,split\nimages/a.png,nut,good,train\n")
    assert read_data(manifest) == read_data(str(manifest)) == [Record(image, "nut", 0)]
    found = check(manifest)
    assert [(product.name, product.train) for product in found.products] == [("nut", 1)]
    assert not [problem for problem in found.problems if "no folder that is read" in problem.what]
    assert found.text()
