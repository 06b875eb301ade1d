"""Every layout that is understood, written as a tree and read back as records."""

from pathlib import Path

import pytest

from unispect.data.folder import images_below, read_folder
from unispect.data.records import Record
from unispect.errors import DataError


def tree(root: Path, *files: str) -> Path:
    """Empty files: reading a folder opens none."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


MVTEC = (
    "nut/train/good/000.png", "nut/train/good/001.png", "nut/test/good/000.png", "nut/test/hole/000.png",
    "nut/test/hole/001.png", "nut/ground_truth/hole/000_mask.png", "nut/ground_truth/hole/001.bmp",
)  # fmt: skip


def test_the_mvtec_layout(tmp_path: Path) -> None:
    nut = tree(tmp_path, *MVTEC, "bolt/train/good/7.jpg") / "nut"
    truth = nut / "ground_truth/hole"
    assert read_folder(str(tmp_path)) == [
        Record(tmp_path / "bolt/train/good/7.jpg", "bolt", 0),
        Record(nut / "train/good/000.png", "nut", 0),
        Record(nut / "train/good/001.png", "nut", 0),
        Record(nut / "test/good/000.png", "nut", 0, split="test"),
        Record(nut / "test/hole/000.png", "nut", 1, "hole", truth / "000_mask.png", split="test"),
        Record(nut / "test/hole/001.png", "nut", 1, "hole", truth / "001.bmp", split="test"),
    ]


def test_one_product_of_it_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, *MVTEC)
    assert read_folder(tmp_path / "nut") == read_folder(tmp_path)
    monkeypatch.chdir(tmp_path / "nut")
    assert {record.product for record in read_folder(".")} == {"nut"}


def test_plain_folders_hold_good_images(tmp_path: Path) -> None:
    tree(tmp_path, "nut/1.png", "nut/2.PNG", "bolt/1.tif")
    found = [(record.product, record.path.name, record.label, record.split) for record in read_folder(tmp_path)]
    assert found == [("bolt", "1.tif", 0, "train"), ("nut", "1.png", 0, "train"), ("nut", "2.PNG", 0, "train")]


def test_images_alone_are_one_product_without_a_name(tmp_path: Path) -> None:
    tree(tmp_path, "b.png", "a.jpeg", "notes.txt", "papers/read.me")
    assert read_folder(tmp_path) == [Record(tmp_path / "a.jpeg", None, 0), Record(tmp_path / "b.png", None, 0)]


def test_folders_below_are_groups_however_deep(tmp_path: Path) -> None:
    tree(tmp_path, "nut/train/good/monday/1.png", "nut/train/good/monday/late/2.png", "nut/train/good/3.png")
    tree(tmp_path, "bolt/line1/1.png", "bolt/line2/1.png", "bolt/0.png", "nut/test/hole/friday/9.png")
    tree(tmp_path, "nut/ground_truth/hole/friday/9_mask.png")
    found = {(record.product, record.path.name, record.group) for record in read_folder(tmp_path)}
    assert found == {
        ("nut", "1.png", "monday"), ("nut", "2.png", "monday"), ("nut", "3.png", None), ("nut", "9.png", "friday"),
        ("bolt", "1.png", "line1"), ("bolt", "1.png", "line2"), ("bolt", "0.png", None),
    }  # fmt: skip
    (masked,) = (record for record in read_folder(tmp_path) if record.label == 1)
    assert masked.mask == tmp_path / "nut/ground_truth/hole/friday/9_mask.png"


def test_hidden_and_foreign_files_are_left_out(tmp_path: Path) -> None:
    tree(tmp_path, "nut/1.png", "nut/.2.png", "nut/._1.png", "nut/Thumbs.db", "__MACOSX/nut/1.png", ".git/x.png")
    tree(tmp_path, "nut/@eaDir/1.png/thumb.jpg", "nut/list.csv", "nut/scene.pdf", "nut/figure.eps", "nut/cube.h5")
    assert [record.path for record in read_folder(tmp_path)] == [tmp_path / "nut/1.png"]


@pytest.mark.parametrize(
    "ending", ["png", "JPG", "jpeg", "bmp", "tif", "TIFF", "webp", "gif", "pgm", "ppm", "jp2", "tga", "dib", "jfif"]
)
def test_every_ending_that_pillow_decodes(tmp_path: Path, ending: str) -> None:
    assert len(read_folder(tree(tmp_path, f"1.{ending}"))) == 1


def test_the_names_of_the_structure_may_be_in_any_case(tmp_path: Path) -> None:
    tree(tmp_path, "nut/Train/GOOD/1.png", "nut/Test/Good/1.png", "nut/Test/Hole/1.png")
    tree(tmp_path, "nut/Ground_Truth/Hole/1_mask.png")
    found = [(record.label, record.split, record.mask is None) for record in read_folder(tmp_path)]
    assert found == [(0, "train", True), (0, "test", True), (1, "test", False)]


def test_a_test_folder_needs_no_train(tmp_path: Path) -> None:
    tree(tmp_path, "nut/test/good/1.png", "nut/test/hole/1.png", "nut/test/2.png")
    found = [(record.label, record.split) for record in read_folder(tmp_path)]
    assert found == [(None, "test"), (0, "test"), (1, "test")]
    assert read_folder(tmp_path / "nut") == read_folder(tmp_path)


def test_images_right_in_train_are_good(tmp_path: Path) -> None:
    assert read_folder(tree(tmp_path, "nut/train/1.png")) == [Record(tmp_path / "nut/train/1.png", "nut", 0)]


def test_what_lies_beside_train_good_is_never_good(tmp_path: Path) -> None:
    tree(tmp_path, "nut/train/good/1.png", "nut/train/hole/1.png")
    assert [(record.label, record.defect) for record in read_folder(tmp_path)] == [(0, None), (1, "hole")]


def test_good_alone_is_no_group(tmp_path: Path) -> None:
    tree(tmp_path, "nut/good/1.png", "nut/good/monday/1.png")
    assert [(record.label, record.group) for record in read_folder(tmp_path)] == [(0, None), (0, "monday")]
    assert read_folder(tmp_path / "nut") == read_folder(tmp_path)


def test_a_mask_by_full_name_goes_first_and_its_ending_is_free(tmp_path: Path) -> None:
    tree(tmp_path, "test/hole/1.jpg", "ground_truth/hole/1.png", "ground_truth/hole/1_mask.TIF")
    assert read_folder(tmp_path)[0].mask == tmp_path / "ground_truth/hole/1_mask.TIF"


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    real = tree(tmp_path / "real", "1.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/nut").symlink_to(real)
    (real / "again").symlink_to(real)
    assert [record.path for record in read_folder(tmp_path / "data")] == [tmp_path / "data/nut/1.png"]


def test_images_below_walks_in_the_order_of_names(tmp_path: Path) -> None:
    tree(tmp_path, "b/2.png", "b/10.png", "a/z.png", "x.png")
    assert [str(path.relative_to(tmp_path)) for path in images_below(tmp_path)] == [
        "x.png", "a/z.png", "b/10.png", "b/2.png",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("files", "root", "text"),
    [
        (["a.txt"], "gone", r"gone: no such folder\. Understood are:\n  ROOT/<product>/train/good/"),
        (["a.png"], "a.png", r"a\.png: a file, where a folder"),
        (["a.txt", "nut/b.txt"], "", r"no image found\. Understood are:"),
        (["nut/train/good/b.txt"], "", r"no image found"),
        (["a.png", "nut/b.png"], "", r"holds images \(a\.png\) beside folders of images \(nut\)"),
        (["good/a.png", "bad/a.png"], "", r"holds good/ beside bad/: move good/ to train/good/"),
        (["nut/good/a.png", "nut/ng/a.png"], "", r"nut: holds good/ beside ng/"),
        (["train/nut/a.png"], "", r"train: holds nut/ but no good/: put the good images in .*train.good"),
    ],
)
def test_what_is_not_understood_says_what_would_be(tmp_path: Path, files: list[str], root: str, text: str) -> None:
    tree(tmp_path, *files)
    with pytest.raises(DataError, match=text):
        read_folder(tmp_path / root)
