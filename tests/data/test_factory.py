from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from unispect.data.factory import DEFECTS, PRODUCTS, SMALLEST, VISIBLE, box, draw, look, noise, sample, write_products
from unispect.errors import ConfigError

KINDS = {"scratch", "hole", "stain", "missing_part", "misplaced_part", "wrong_colour"}
PAIRS = [(product, defect) for product, defects in DEFECTS.items() for defect in defects]


def test_three_textures_and_three_objects_share_the_six_kinds_of_defect() -> None:
    kinds = [product.kind for product in PRODUCTS.values()]
    assert (kinds.count("texture"), kinds.count("object")) == (3, 3)
    assert {defect for _, defect in PAIRS} == KINDS
    assert all(len(set(defects)) >= 3 for defects in DEFECTS.values())


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_drawing_depends_on_its_arguments_only(product: str) -> None:
    first = draw(product, 3, None, 64)[0]
    for other in PRODUCTS:
        draw(other, 4, DEFECTS[other][0], 48)
    assert np.array_equal(draw(product, 3, None, 64)[0], first)
    assert not np.array_equal(draw(product, 4, None, 64)[0], first)


@pytest.mark.parametrize(("product", "defect"), PAIRS)
@pytest.mark.parametrize("size", [64, 200])
def test_the_mask_is_where_the_defect_shows(product: str, defect: str, size: int) -> None:
    for seed in range(3):
        good, nothing = draw(product, seed, None, size)
        bad, mask = draw(product, seed, defect, size)
        assert good.shape == bad.shape == (size, size, 3)
        assert (good.dtype, bad.dtype, mask.dtype) == (np.uint8, np.uint8, bool)
        assert not nothing.any()
        largest_step = np.abs(good.astype(int) - bad).max(-1)
        assert np.array_equal(mask, largest_step > VISIBLE)
        assert largest_step.max() > 2 * VISIBLE
        assert 6 * (size / 64) ** 2 <= mask.sum() <= 0.2 * size**2


def test_the_default_size_is_256() -> None:
    picture, mask = draw("wood", 0, "hole")
    assert (picture.shape, mask.shape) == ((256, 256, 3), (256, 256))


@pytest.mark.parametrize("product", PRODUCTS)
def test_good_pictures_are_exposed_well_and_show_detail(product: str) -> None:
    for seed in range(4):
        picture = draw(product, seed, None, 96)[0].astype(float)
        assert 60 < picture.mean() < 210
        assert np.isin(picture, (0, 255)).all(-1).mean() < 0.02
        assert np.abs(np.diff(picture, axis=1)).mean() > 3


def test_a_folder_of_products_has_the_layout_of_mvtec_ad(tmp_path: Path) -> None:
    root = write_products(tmp_path / "data", train=2, good=1, bad=2, size=64, products=["gear", "wood"])
    found = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    expected = set()
    for product in ("gear", "wood"):
        expected |= {f"{product}/train/good/000.png", f"{product}/train/good/001.png", f"{product}/test/good/000.png"}
        for defect in DEFECTS[product]:
            expected |= {f"{product}/test/{defect}/00{number}.png" for number in (0, 1)}
            expected |= {f"{product}/ground_truth/{defect}/00{number}_mask.png" for number in (0, 1)}
    assert root == tmp_path / "data"
    assert found == expected
    with Image.open(root / "gear/test/stain/001.png") as picture:
        assert (picture.mode, picture.size) == ("RGB", (64, 64))
    mask = np.asarray(Image.open(root / "gear/ground_truth/stain/001_mask.png"))
    assert mask.shape == (64, 64)
    assert set(np.unique(mask)) == {0, 255}


def test_a_written_picture_does_not_depend_on_the_others(tmp_path: Path) -> None:
    few = write_products(tmp_path / "few", train=1, good=1, bad=1, size=48, seed=5, products=["blister"])
    many = write_products(tmp_path / "many", train=3, good=2, bad=2, size=48, seed=5, products=["fabric", "blister"])
    other = write_products(tmp_path / "other", train=1, good=1, bad=1, size=48, seed=6, products=["blister"])
    for path in few.rglob("*.png"):
        name = path.relative_to(few)
        assert path.read_bytes() == (many / name).read_bytes()
        assert path.read_bytes() != (other / name).read_bytes()


def test_no_two_written_pictures_are_alike(tmp_path: Path) -> None:
    root = write_products(tmp_path, train=3, good=3, bad=1, size=48, products=["terrazzo"])
    pictures = [path.read_bytes() for path in root.glob("*/t*/*/*.png")]
    assert len(set(pictures)) == len(pictures) == 6 + len(DEFECTS["terrazzo"])


def test_a_write_that_fails_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(self: Image.Image, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="disk full"):
        write_products(tmp_path, train=1, good=0, bad=0, size=48, products=["wood"])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("geer", 0), "unknown product 'geer': did you mean 'gear'"),
        (("wood", 0, "stian"), "unknown defect of wood 'stian': did you mean 'stain'"),
        (("wood", 0, "missing_part"), "known: hole, scratch, stain"),
        (("wood", -1), "seed=-1: expected a whole number from 0"),
        (("wood", 0, None, 8), f"size=8: expected at least {SMALLEST} pixels"),
    ],
)
def test_impossible_requests_are_explained(arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        draw(*arguments)


def test_an_unknown_product_is_found_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown product 'bored': did you mean 'board'"):
        write_products(tmp_path, 1, 1, 1, products=["wood", "bored"])
    assert not list(tmp_path.iterdir())


def _differences(product: str, size: int = 96) -> tuple[list[bool], list[list[float]]]:
    """Whether each test picture is bad, and what three detectors that know the mean picture say of it."""
    train = np.stack([draw(product, 500 + seed, None, size)[0] for seed in range(20)]).astype(float)
    mean, deviation = train.mean(0), train.std(0) + 1
    cases = [(seed, None) for seed in range(8)] + [(100 + seed, kind) for kind in DEFECTS[product] for seed in (0, 1)]
    steps = [np.abs(draw(product, seed, kind, size)[0] - mean) for seed, kind in cases]
    return [kind is not None for _, kind in cases], [[s.mean(), s.max(), (s / deviation).max()] for s in steps]


def test_a_mean_picture_does_not_find_the_defects() -> None:
    found = [_differences(product) for product in PRODUCTS]
    bad = np.concatenate([labels for labels, _ in found])
    scores = np.concatenate([values for _, values in found])
    for detector, name in enumerate(["mean difference", "largest difference", "largest z"]):
        assert roc_auc_score(bad, scores[:, detector]) < 0.80, name


def test_noise_has_unit_deviation_and_no_jumps() -> None:
    plane = noise(np.random.default_rng(0), 256, 32, 32)
    assert plane.dtype == np.float32
    assert plane.std() == pytest.approx(1, abs=0.1)
    assert np.abs(np.diff(plane, axis=0)).max() < 1


def test_sample_agrees_with_a_loop() -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_normal((4, 8))
    across, down = rng.uniform(-20, 20, (2, 50))
    for x, y, got in zip(across, down, sample(values, across, down), strict=True):
        j, i = int(np.floor(x)), int(np.floor(y))
        corner = [[values[(i + a) % 4, (j + b) % 8] for b in (0, 1)] for a in (0, 1)]
        expected = np.array([1 - (y - i), y - i]) @ np.array(corner) @ np.array([1 - (x - j), x - j])
        assert got == pytest.approx(expected)


def test_the_distance_to_a_box_is_that_to_its_nearest_edge_point() -> None:
    rng, half = np.random.default_rng(2), (0.5, 0.2)
    line = np.linspace(-1, 1, 4001)
    edge = [(line * half[0], np.full_like(line, side * half[1])) for side in (-1, 1)]
    edge += [(np.full_like(line, side * half[0]), line * half[1]) for side in (-1, 1)]
    for x, y in rng.uniform(-1, 1, (40, 2)):
        nearest = min(np.hypot(x - a, y - b).min() for a, b in edge)
        sign = -1 if abs(x) < half[0] and abs(y) < half[1] else 1
        assert box(np.array(x), np.array(y), half) == pytest.approx(sign * nearest, abs=1e-3)


@pytest.mark.parametrize("spot", [(0.0, 0.0), (0.9, -0.7), (3.0, 3.0)])
def test_a_window_holds_every_pixel_within_reach(spot: tuple[float, float]) -> None:
    view = look(100, 0.7, (0.1, -0.2), 1.2)
    window, part = view.near(spot, 0.3)
    within = np.hypot(view.x - spot[0], view.y - spot[1]) <= 0.3
    assert within[window].sum() == within.sum()
    assert part.x.shape == view.x[window].shape
    assert part.x.size >= 1


def test_points_on_the_image_lie_where_the_view_says() -> None:
    view = look(64, 2.1, (0.2, -0.1), 0.9)
    places = view.on_image(np.array([[view.x[10, 20], view.y[10, 20]]]))
    assert places[0] == pytest.approx([20.5, 10.5], abs=1e-4)
