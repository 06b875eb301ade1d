"""Masks as files: what they mark on the prepared image, and what is wrong with them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unispect.data.loader import Preparation
from unispect.data.masks import ignored, located, mask_files, mentioned
from unispect.errors import ConfigError

WIDTH, HEIGHT = 90, 60


def drawn(path: Path, left: int, top: int, right: int, bottom: int, width: int = WIDTH, height: int = HEIGHT) -> str:
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 255
    Image.fromarray(mask).save(path)
    return str(path)


def sizes(*names: str | None) -> dict[str | None, dict[tuple[int, int], Path]]:
    return {name: {(WIDTH, HEIGHT): Path(f"{name}/000.png")} for name in names}


@pytest.mark.parametrize("fit", ["squash", "crop"])
@pytest.mark.parametrize("filter", ["bilinear", "lanczos"])
@pytest.mark.parametrize("size", [17, 60, 64, 200])
def test_what_is_not_touched_depends_on_no_marked_pixel(fit: str, filter: str, size: int) -> None:
    """Whatever is drawn where the mask is, no other prepared pixel changes; and not many are touched in vain."""
    preparation, random = Preparation(size, fit, filter), np.random.default_rng(size)
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[13:31, 25:58] = True
    mask[50, 40] = True
    touched = preparation.touched(mask)
    changed = np.zeros((size, size), bool)
    image = random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for _ in range(20):
        other = np.where(mask[..., None], random.integers(0, 2, (HEIGHT, WIDTH, 3)) * 255, image).astype(np.uint8)
        changed |= (preparation.image(other) != preparation.image(image)).any(0)
    assert not (changed & ~touched).any()
    assert changed.sum() > 0.7 * touched.sum()


def test_of_an_image_that_has_the_size_just_the_marked_pixels_are_touched() -> None:
    mask = np.random.default_rng(0).random((40, 40)) > 0.5
    assert np.array_equal(Preparation(40).touched(mask), mask)


def test_ignore_and_interest(tmp_path: Path) -> None:
    preparation = Preparation(30)
    left = drawn(tmp_path / "left.png", 0, 0, 45, HEIGHT)
    one = ignored(mask_files({"ignore": {"gear": left}}), preparation, sizes("gear", "wood"))
    other = ignored(mask_files({"interest": {"gear": left}}), preparation, sizes("gear"))
    assert one["gear"][:, :15].all()
    assert not one["gear"][:, 16:].any()
    assert other["gear"][:, 15:].all()
    assert not other["gear"][:, :14].any()
    middle = drawn(tmp_path / "middle.png", 30, 0, 60, HEIGHT)
    both = ignored(mask_files({"ignore": {"gear": left}, "interest": {"gear": middle}}), preparation, sizes("gear"))
    assert not both["gear"][:, 16:19].any()
    assert both["gear"][:, :15].all()
    assert both["gear"][:, 20:].all()


def test_names_are_relative_to_the_file_of_settings(tmp_path: Path) -> None:
    given = {"seed": 1, "masks": {"ignore": {"gear": "m/gear.png", "wood": str(tmp_path / "wood.png")}}}
    found = located(given, tmp_path)
    assert found == {
        "seed": 1,
        "masks": {"ignore": {"gear": str(tmp_path / "m" / "gear.png"), "wood": str(tmp_path / "wood.png")}},
    }
    assert mentioned(found["masks"]) == ["gear", "wood"]
    assert located({"seed": 1}, tmp_path) == {"seed": 1}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("gear.png", r"masks: got 'gear.png', expected tables \[masks.ignore\] and \[masks.interest\]"),
        ({"ignored": {}}, "unknown kind of mask 'ignored': did you mean 'ignore'"),
        ({"gear": "gear.png"}, r"unknown kind of mask 'gear'.*: expected \[masks.ignore\] product = 'file'"),
        ({"ignore": "gear.png"}, "masks.ignore: got 'gear.png', expected a table of products and files"),
        ({"ignore": {"gear": 3}}, "masks.ignore.gear: got 3, expected the name of an image file"),
    ],
)
def test_what_is_no_section(given: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        mask_files(given)


def test_an_empty_section_is_none() -> None:
    assert mask_files({}) == mask_files({"ignore": {}, "interest": {}}) == {}


def test_what_is_wrong_with_a_mask(tmp_path: Path) -> None:
    files = {
        "whole": drawn(tmp_path / "whole.png", 0, 0, WIDTH, HEIGHT),
        "nothing": drawn(tmp_path / "nothing.png", 0, 0, 0, 0),
        "small": drawn(tmp_path / "small.png", 0, 0, 5, 5, 45, 30),
        "good": drawn(tmp_path / "good.png", 0, 0, 5, 5),
    }
    (tmp_path / "text.png").write_text("no image")
    cases: list[tuple[dict[str, Any], tuple[str | None, ...], str]] = [
        ({"ignore": {"gaer": files["good"]}}, ("gear", "wood"), "masks.ignore: unknown product 'gaer': did you mean 'gear'"),
        ({"ignore": {"gear": files["good"]}}, (None,), "masks.ignore.gear: no image has a product's name"),
        ({"ignore": {"gear": str(tmp_path / "no.png")}}, ("gear",), "masks.ignore.gear: .*no.png: no such file"),
        ({"ignore": {"gear": str(tmp_path / "text.png")}}, ("gear",), "masks.ignore.gear: .*not an image"),
        (
            {"interest": {"gear": files["small"]}},
            ("gear",),
            "has 45 x 30 pixels and gear/000.png has 90 x 60: expected a mask",
        ),
        ({"ignore": {"gear": files["whole"]}}, ("gear",), "of product 'gear' no pixel is left to be looked at"),
        ({"interest": {"gear": files["nothing"]}}, ("gear",), "of product 'gear' no pixel is left to be looked at"),
        ({"ignore": {"gear": files["nothing"]}}, ("gear",), "masks.ignore.gear: .* so it does nothing"),
        ({"interest": {"gear": files["whole"]}}, ("gear",), "masks.interest.gear: .* so it does nothing"),
    ]
    for given, names, text in cases:
        with pytest.raises(ConfigError, match=text):
            ignored(mask_files(given), Preparation(32), sizes(*names))
