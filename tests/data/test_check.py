"""A clean folder gives no problem; each thing that goes wrong in factories gives one, with its files and its fix."""

import json
from math import floor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unispect.data.check import Check, Problem, check
from unispect.errors import DataError


class Tree:
    """Writes images of different content; defects are discs in the masks."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.random = np.random.default_rng(0)

    def image(self, *names: str, size: tuple[int, int] = (24, 16), high: int = 256, deep: bool = False) -> None:
        for name in names:
            values = self.random.integers(0, high, (size[1], size[0]), dtype=np.uint16 if deep else np.uint8)
            self.save(name, values)

    def mask(self, *names: str, size: tuple[int, int] = (24, 16), kind: str = "disc") -> None:
        rows, columns = np.ogrid[: size[1], : size[0]]
        disc = (rows - size[1] // 2) ** 2 + (columns - size[0] // 2) ** 2 < 36
        box = (rows >= 2) & (rows < 9) & (columns >= 3) & (columns < 15)
        for name in names:
            self.save(name, {"disc": disc, "box": box, "empty": disc & False}[kind] * np.uint8(255))

    def save(self, name: str, values: np.ndarray) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path)

    def product(self, name: str, train: int = 20, masks: str = "disc") -> None:
        self.image(*(f"{name}/train/good/{number}.png" for number in range(train)))
        self.image(*(f"{name}/test/good/{number}.png" for number in range(3)))
        self.image(*(f"{name}/test/hole/{number}.png" for number in range(4)))
        if masks:
            self.mask(*(f"{name}/ground_truth/hole/{number}_mask.png" for number in range(4)), kind=masks)

    def copy(self, source: str, target: str) -> None:
        (self.root / target).parent.mkdir(parents=True, exist_ok=True)
        (self.root / target).write_bytes((self.root / source).read_bytes())

    def only(self, severity: str) -> tuple[Problem, set[str]]:
        """The one problem there is, and the files it names."""
        (problem,) = check(self.root).problems
        assert problem.severity == severity
        return problem, {str(path.relative_to(self.root)) for path in problem.where}


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    made = Tree(tmp_path)
    made.product("nut")
    return made


def test_a_clean_folder(tree: Tree) -> None:
    tree.product("bolt", train=10)
    found = check(tree.root)
    assert found.problems == found.unreadable == ()
    assert found.calibration == 4 + 2
    assert found.smallest_rate == pytest.approx(1 / 7)
    bolt, nut = found.products
    assert (bolt.name, nut.name) == ("bolt", "nut")
    assert (nut.train, nut.test_good, nut.defects, nut.defective) == (20, 3, {"hole": 4}, 4)
    assert nut.masks == {"present": 4, "missing": 0, "wrong size": 0, "empty": 0}
    assert (nut.sizes, nut.modes) == ({"24 x 16": 27}, {"grey": 27})
    assert nut.no_image_metrics is nut.no_pixel_metrics is None
    assert "No problems found." in found.text()


def test_json_holds_everything_in_plain_values(tree: Tree) -> None:
    (tree.root / "nut/train/good/0.png").write_bytes(b"")
    found = json.loads(json.dumps(check(tree.root).as_dict()))
    assert found.keys() == {"root", "products", "calibration", "unreadable", "problems"}
    assert found["products"]["nut"]["image_metrics"] == {"possible": True, "why_not": None}
    assert found["products"]["nut"]["train"] == 19
    assert found["unreadable"] == [{"path": str(tree.root / "nut/train/good/0.png"), "reason": "zero bytes"}]
    assert found["problems"][0]["where"] == [str(tree.root / "nut/train/good/0.png")]
    assert found["calibration"] == {"images": 4, "smallest_false_alarm_rate": 0.2}


def test_the_number_of_threads_changes_nothing(tree: Tree) -> None:
    tree.product("bolt", masks="box")
    assert check(tree.root, workers=1) == check(tree.root, workers=5) == check(tree.root, workers=0)


def test_progress_is_told(tree: Tree) -> None:
    calls: list[tuple[int, int]] = []
    check(tree.root, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(number + 1, 27) for number in range(27)]


def test_unreadable_images_and_masks_are_listed_with_the_reason(tree: Tree) -> None:
    for name, content in (
        ("train/good/0.png", b""), ("test/hole/1.png", b"text"), ("ground_truth/hole/2_mask.png", b"")
    ):  # fmt: skip
        (tree.root / "nut" / name).write_bytes(content)
    found = check(tree.root)
    reasons = {str(failure.path.relative_to(tree.root)): failure.reason for failure in found.unreadable}
    assert reasons == {
        "nut/train/good/0.png": "zero bytes",
        "nut/test/hole/1.png": "not an image of a known format",
        "nut/ground_truth/hole/2_mask.png": "zero bytes",
    }
    assert (found.problems[0].severity, found.count("error")) == ("error", 1)
    assert "export them again" in found.problems[0].fix
    assert "train/good/0.png: zero bytes" in found.text()
    assert found.products[0].unreadable == 2


def test_the_limit_reaches_every_file(tree: Tree) -> None:
    found = check(tree.root, max_pixels=100)
    assert len(found.unreadable) == 27 + 4
    assert "too large: 24 x 16 = 384 pixels" in found.unreadable[0].reason
    assert (found.calibration, found.smallest_rate) == (0, None)
    assert "no rate can be promised" in found.text()


def test_a_leak_from_train_to_test_is_an_error(tree: Tree) -> None:
    tree.copy("nut/train/good/3.png", "nut/test/good/copy.png")
    problem, where = tree.only("error")
    assert "2 byte-identical images both in train and in test" in problem.what
    assert where == {"nut/train/good/3.png", "nut/test/good/copy.png"}


def test_a_picture_that_is_good_and_defective_is_an_error(tree: Tree) -> None:
    tree.copy("nut/train/good/3.png", "nut/test/hole/0.png")
    problem, where = tree.only("error")
    assert "filed both as good and as defective" in problem.what
    assert where == {"nut/train/good/3.png", "nut/test/hole/0.png"}


def test_a_picture_of_two_products_is_a_warning(tree: Tree) -> None:
    tree.product("bolt")
    tree.copy("nut/train/good/3.png", "bolt/train/good/4.png")
    assert "filed under several products" in tree.only("warning")[0].what


def test_copies_within_a_split_are_noted_pairs_together(tree: Tree) -> None:
    tree.copy("nut/train/good/3.png", "nut/train/good/z.png")
    tree.copy("nut/test/good/0.png", "nut/test/good/z.png")
    problem, _ = tree.only("note")
    assert "4 byte-identical images within train or within test" in problem.what
    assert [path.name for path in problem.where] == ["3.png", "z.png", "0.png", "z.png"]


def test_broken_files_are_nobodys_copies(tree: Tree) -> None:
    for name in ("train/good/0.png", "test/good/0.png", "test/hole/0.png"):
        (tree.root / "nut" / name).write_bytes(b"")
    assert "cannot be read" in tree.only("error")[0].what


def test_defective_images_below_train_are_an_error(tree: Tree) -> None:
    tree.image("nut/train/scratch/1.png")
    problem, where = tree.only("error")
    assert where == {"nut/train/scratch/1.png"}
    assert "move good ones to train/good/" in problem.fix
    assert check(tree.root).products[0].train == 20


def test_masks_that_are_boxes_are_to_be_left_out(tree: Tree) -> None:
    tree.product("bolt", masks="box")
    problem, where = tree.only("warning")
    assert problem.fix.endswith("unispect evaluate MODEL DATA --ignore-masks bolt")
    assert where == {f"bolt/ground_truth/hole/{number}_mask.png" for number in range(4)}
    bolt, nut = check(tree.root).products
    assert (bolt.no_pixel_metrics, nut.no_pixel_metrics) == ("masks are boxes", None)


def test_overlapping_boxes_in_a_few_masks_do_not_hide_the_others(tree: Tree) -> None:
    tree.product("bolt", masks="box")
    both = np.zeros((16, 24), np.uint8)
    both[2:9, 3:15] = both[6:14, 10:22] = 255
    tree.save("bolt/ground_truth/hole/0_mask.png", both)
    assert check(tree.root).products[0].boxes


def test_masks_of_another_size(tree: Tree) -> None:
    tree.mask("nut/ground_truth/hole/1_mask.png", size=(16, 24))
    problem, where = tree.only("warning")
    assert "1 mask not of the size of the image" in problem.what
    assert where == {"nut/ground_truth/hole/1_mask.png"}
    assert check(tree.root).products[0].masks["wrong size"] == 1


def test_a_mask_fits_the_image_as_it_is_turned_by_exif(tree: Tree) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.new("L", (16, 24), 7)
    turned.save(tree.root / "nut/test/hole/0.png", exif=exif)
    assert check(tree.root).problems == ()


def test_empty_masks(tree: Tree) -> None:
    tree.mask("nut/ground_truth/hole/1_mask.png", kind="empty")
    assert "1 mask of defective images without a marked pixel" in tree.only("warning")[0].what


def test_masks_that_are_all_empty_measure_nothing(tree: Tree) -> None:
    tree.mask(*(f"nut/ground_truth/hole/{number}_mask.png" for number in range(4)), kind="empty")
    assert check(tree.root).products[0].no_pixel_metrics == "no masks"


def test_jpeg_masks(tree: Tree) -> None:
    (tree.root / "nut/ground_truth/hole/1_mask.png").unlink()
    tree.mask("nut/ground_truth/hole/1_mask.jpg")
    problem, where = tree.only("warning")
    assert "saved as JPEG" in problem.what
    assert where == {"nut/ground_truth/hole/1_mask.jpg"}


def test_a_mask_that_lacks_and_one_that_is_lost(tree: Tree) -> None:
    (tree.root / "nut/ground_truth/hole/1_mask.png").rename(tree.root / "nut/ground_truth/hole/one.png")
    lost, bare = sorted(check(tree.root).problems, key=lambda problem: "without a test image" not in problem.what)
    assert (lost.where, bare.where) == (
        (tree.root / "nut/ground_truth/hole/one.png",), (tree.root / "nut/test/hole/1.png",),
    )  # fmt: skip
    assert lost.severity == bare.severity == "warning"
    assert check(tree.root).products[0].masks == {"present": 3, "missing": 1, "wrong size": 0, "empty": 0}


def test_empty_masks_of_good_images_are_no_orphans(tree: Tree) -> None:
    tree.mask("nut/ground_truth/good/0_mask.png", kind="empty")
    assert check(tree.root).problems == ()


def test_no_masks_at_all_is_only_noted(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.product("nut", masks="")
    problem, where = tree.only("note")
    assert problem.what.startswith("nut: no masks: pixel metrics cannot be measured")
    assert where == {"nut"}
    assert check(tmp_path).products[0].as_dict()["pixel_metrics"] == {"possible": False, "why_not": "no masks"}


def test_good_images_alone_can_be_learnt_but_not_measured(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.image(*(f"{number}.png" for number in range(8)))
    found = check(tmp_path)
    assert [problem.severity for problem in found.problems] == ["note", "note"]
    assert [problem.where for problem in found.problems] == [(tmp_path,), (tmp_path,)]
    assert found.products[0].name == "all"
    assert found.products[0].no_image_metrics == "no good test images"


def test_products_without_or_with_few_training_images(tree: Tree) -> None:
    tree.product("bolt", train=0)
    tree.product("gear", train=3)
    none, few = check(tree.root).problems
    assert none.what.startswith("bolt: no readable training image")
    assert few.what.startswith("gear: fewer than 4 training images")
    assert none.severity == few.severity == "warning"


def test_test_images_without_a_label_and_images_in_foreign_folders(tree: Tree) -> None:
    tree.image("nut/test/1.png", "nut/validation/good/1.png")
    stray, unlabelled = check(tree.root).problems
    assert stray.where == (tree.root / "nut/validation/good/1.png",)
    assert unlabelled.what.startswith("nut: images right in test/ have no label")
    assert check(tree.root).products[0].test_unlabelled == 1


def test_14_bits_in_16_are_almost_black(tree: Tree) -> None:
    tree.image(*(f"deep/train/good/{number}.png" for number in range(6)), high=16384, deep=True)
    warnings = [problem for problem in check(tree.root).problems if problem.severity == "warning"]
    assert len(warnings) == 1
    assert "almost black" in warnings[0].what
    assert len(warnings[0].where) == 6
    tree.image("deep/train/good/bright.png", high=65536, deep=True)
    assert check(tree.root).count("warning") == 0


def test_the_rate_shown_can_be_kept(tree: Tree) -> None:
    """It is rounded up: what is read off the screen and typed in is never refused."""
    for images in range(1, 400):
        text = Check(tree.root, (), (), (), images).text()
        shown = float(text.split("can promise is ")[1].split(" %")[0]) / 100
        assert shown >= 1 / (images + 1) - 1e-12
        assert floor(1e4 * shown + 0.5) <= floor(1e4 / (images + 1)) + 1


def test_the_text_names_products_problems_and_fixes(tree: Tree) -> None:
    tree.product("bolt", masks="")
    tree.image(*(f"nut/train/scratch/{number}.png" for number in range(6)))
    text = check(tree.root).text()
    lines = text.splitlines()
    assert lines[0].split()[:2] == ["product", "train"]
    assert any(line.startswith("2 products") for line in lines)
    assert "ERRORS (1)" in lines
    assert "NOTES (1)" in lines
    assert "      and 2 more (--json lists all)" in lines
    assert "      nut/train/scratch/0.png" in lines
    assert sum(line.startswith("    Fix: ") for line in lines) == 2
    assert str(tree.root) not in text


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image found"):
        check(tmp_path)
