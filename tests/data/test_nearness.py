"""Near-duplicates: the same picture again is found, another picture of the same product is not."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from unispect.data.factory import PRODUCTS, draw
from unispect.data.nearness import CLOSE, NEIGHBOURS, Near, Nearness, fingerprint
from unispect.errors import DataError, ImageError

SIDE = 128
STORED = 14  # of each product


def saved(image: np.ndarray, quality: int) -> np.ndarray:
    file = BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


def resized(image: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def noisy(image: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 4, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def brighter(image: np.ndarray, gain: float) -> np.ndarray:
    return np.clip(image * gain, 0, 255).astype(np.uint8)


def moved(image: np.ndarray, pixels: int) -> np.ndarray:
    return np.pad(image, ((pixels, 0), (0, pixels), (0, 0)), "edge")[:-pixels, pixels:]


CHANGES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {  # change, share that must be found
    "saved again": (lambda image: saved(image, 90), 1),
    "saved coarsely": (lambda image: saved(image, 30), 0.9),
    "larger": (lambda image: resized(image, 200, 200), 1),
    "half the size": (lambda image: resized(image, SIDE // 2, SIDE // 2), 1),
    "squashed": (lambda image: resized(image, SIDE, SIDE // 2), 1),
    "noisy": (noisy, 1),
    "brighter": (lambda image: brighter(image, 1.05), 1),
    "darker": (lambda image: brighter(image, 0.7), 1),
    "other gamma": (lambda image: (255 * (image / 255) ** 1.25).astype(np.uint8), 1),
    "moved": (lambda image: moved(image, 1), 0.7),
    "cropped": (lambda image: image[1:-1, 1:-1].copy(), 0.5),
}


@pytest.fixture(scope="module")
def known() -> dict[str, list[np.ndarray]]:
    return {product: [draw(product, number, size=SIDE)[0] for number in range(STORED)] for product in PRODUCTS}


@pytest.fixture(scope="module")
def pile(known: dict[str, list[np.ndarray]]) -> Nearness:
    """All products together, as in a model of all of them."""
    return Nearness([fingerprint(image) for images in known.values() for image in images])


def nearest(stored: Nearness, image: np.ndarray) -> Near:
    found = stored.nearest(fingerprint(image))
    assert found is not None
    return found


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found_among_its_like(change: str, known: dict[str, list[np.ndarray]], pile: Nearness) -> None:
    alter, share = CHANGES[change]
    found = []
    for number, images in enumerate(known.values()):
        for place in (0, 5, 9):
            near = nearest(pile, alter(images[place]))
            found.append(near.suspicious and near.index == STORED * number + place)
    assert np.mean(found) >= share


def test_another_picture_of_the_product_is_not_suspicious(pile: Nearness) -> None:
    fresh = [draw(product, number, size=SIDE)[0] for product in PRODUCTS for number in range(100, 125)]
    assert not any(nearest(pile, image).suspicious for image in fresh)


def test_one_product_alone_gives_its_own_yardstick(known: dict[str, list[np.ndarray]]) -> None:
    """Aligned pictures that are closer to one another than copies of another product's may be."""
    for product, images in known.items():
        alone = Nearness([fingerprint(image) for image in images])
        assert not any(nearest(alone, draw(product, number, size=SIDE)[0]).suspicious for number in range(100, 108))
        assert nearest(alone, saved(images[3], 90)).suspicious


def test_freely_turned_parts_that_come_close_by_chance_are_not_suspicious() -> None:
    """One bar at any angle: the distance to the nearest is spread widely, and its small values are common."""

    def bar(angle: float, seed: int) -> np.ndarray:
        down, across = np.mgrid[-1:1:64j, -1:1:64j]
        along, off = across * np.cos(angle) + down * np.sin(angle), down * np.cos(angle) - across * np.sin(angle)
        shade = 200 - 150 * ((np.abs(along) < 0.8) & (np.abs(off) < 0.15))
        grey = shade + np.random.default_rng(seed).normal(0, 3, shade.shape)
        return np.repeat(grey.clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)

    angles = np.random.default_rng(0).uniform(0, np.pi, 220)
    stored = Nearness([fingerprint(bar(angle, seed)) for seed, angle in enumerate(angles[:20])])
    assert np.mean([nearest(stored, bar(angle, 20 + seed)).suspicious for seed, angle in enumerate(angles[20:])]) <= 0.02


def test_the_same_picture_is_at_distance_zero(known: dict[str, list[np.ndarray]], pile: Nearness) -> None:
    first = known["gear"][0]
    for stored in (pile, Nearness([fingerprint(first)])):
        near = nearest(stored, first.copy())
        assert (near.distance, near.suspicious) == (0.0, True)
        assert type(near.suspicious) is bool
        assert type(nearest(stored, known["gear"][1]).suspicious) is bool
    twice = Nearness([fingerprint(first)] * 12)
    assert nearest(twice, first).index == 0


def test_copies_among_the_stored_do_not_blunt_the_yardstick(known: dict[str, list[np.ndarray]]) -> None:
    marks = [fingerprint(image) for image in known["wood"]]
    assert nearest(Nearness(marks * 2), saved(known["wood"][4], 80)).suspicious


def test_a_negative_is_no_copy(known: dict[str, list[np.ndarray]], pile: Nearness) -> None:
    first = known["terrazzo"][0]
    assert not nearest(pile, 255 - first).suspicious
    assert nearest(Nearness([fingerprint(first)]), 255 - first).distance == 1


def test_the_distance_is_what_a_plain_regression_leaves(known: dict[str, list[np.ndarray]]) -> None:
    """Half a stored image and half another, not moved: near what a fit of the image, its square and 1 leaves."""
    random = np.random.default_rng(0)
    first, second = (resized(random.integers(0, 256, (8, 8, 1), np.uint8).repeat(3, 2), 64, 64) for _ in range(2))
    mixed = (first / 2 + second / 2).astype(np.uint8)
    distance = nearest(Nearness([fingerprint(first)]), mixed).distance
    y, x = (image.mean(2)[4:-4, 4:-4].reshape(-1) for image in (mixed, first))
    parts = np.stack([x, x * x, np.ones_like(x)], 1)
    left = y - parts @ np.linalg.lstsq(parts, y, rcond=None)[0]
    plain = np.linalg.norm(left) / np.linalg.norm(y - y.mean())
    assert plain - 0.2 < distance <= plain + 0.02  # the four moves explain a little more


@pytest.mark.parametrize(
    ("down", "across", "taller", "wider"),
    [(0, 0.04, 0, 0), (-0.04, 0, 0, 0), (0, 0, 0.04, 0), (0, 0, 0, -0.04), (0.02, -0.03, -0.03, 0.04)],
)
def test_a_known_move_is_taken_out(down: float, across: float, taller: float, wider: float) -> None:
    """Moves are shares of the side; the picture is a smooth formula, so nothing is lost at the border."""
    stored = Nearness([fingerprint(waves())])
    assert nearest(stored, waves(down, across, taller, wider)).distance < 0.04  # what is beyond the border is unknown
    assert nearest(stored, waves(0.3)).distance > 0.3


def waves(down: float = 0, across: float = 0, taller: float = 0, wider: float = 0) -> np.ndarray:
    y, x = np.mgrid[-0.5:0.5:256j, -0.5:0.5:256j]
    y, x = y + down + taller * y, x + across + wider * x
    grey = 128 + 50 * np.sin(19 * x + 1) * np.cos(17 * y + 1) + 40 * np.sin(15 * x + 8 * y)
    return np.repeat(np.rint(grey).astype(np.uint8)[:, :, None], 3, axis=2)


def test_gain_and_gamma_are_taken_out(known: dict[str, list[np.ndarray]]) -> None:
    for image in (waves(), known["wood"][0], known["gear"][0]):
        stored = Nearness([fingerprint(image)])
        assert nearest(stored, brighter(image, 0.7)).distance < 0.02
        assert nearest(stored, (255 * (image / 255) ** 0.7).astype(np.uint8)).distance < 0.055


def test_many_at_once_are_as_one_by_one(known: dict[str, list[np.ndarray]], pile: Nearness) -> None:
    marks = [fingerprint(noisy(image)) for images in known.values() for image in images[:6]] * 9  # more than one chunk
    together, alone = pile.each(marks), [pile.nearest(mark) for mark in marks[:36]]
    assert [near.index for near in together[:36]] == [near.index for near in alone if near]
    assert [near.distance for near in together[:36]] == pytest.approx([near.distance for near in alone if near], abs=1e-4)
    assert [near.index for near in together] == [near.index for near in together[:36]] * 9


def test_the_order_of_the_stored_does_not_matter(known: dict[str, list[np.ndarray]]) -> None:
    marks = [fingerprint(image) for images in known.values() for image in images[:5]]
    forth, back = Nearness(marks), Nearness(marks[::-1])
    for images in known.values():
        one, other = nearest(forth, images[7]), nearest(back, images[7])
        assert (one.index, one.suspicious) == (len(marks) - 1 - other.index, other.suspicious)
        assert one.distance == pytest.approx(other.distance, abs=1e-4)


@pytest.mark.parametrize("count", [1, 2, NEIGHBOURS, NEIGHBOURS + 1])
def test_few_stored_ones_ask_for_an_almost_equal_picture(count: int, known: dict[str, list[np.ndarray]]) -> None:
    stored = Nearness([fingerprint(image) for image in known["gear"][:count]])
    assert nearest(stored, saved(known["gear"][0], 95)).suspicious
    assert not any(nearest(stored, image).suspicious for image in known["gear"][NEIGHBOURS + 1 :])


def test_none_stored_or_none_asked() -> None:
    assert Nearness([]).nearest(bytes(256)) is None
    assert Nearness([]).each([bytes(256)]) == []
    assert Nearness([bytes(256)]).each([]) == []


@pytest.mark.parametrize("shape", [(1, 1), (1, 400), (3, 2), (2000, 10), (700, 900), (3000, 2500)])
def test_any_size_has_a_fingerprint_of_one_length(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    mark = fingerprint(image)
    assert len(mark) == 256
    assert mark == fingerprint(image.copy())
    near = nearest(Nearness([mark, *(fingerprint(np.rot90(image, turn)) for turn in (1, 2))]), image)
    assert (near.index, near.distance, near.suspicious) == (0, 0.0, True)


def test_a_large_picture_has_the_fingerprint_of_a_small_one(known: dict[str, list[np.ndarray]]) -> None:
    image = known["board"][0]
    large = nearest(Nearness([fingerprint(image)]), resized(image, 1500, 1200))
    assert large.distance < 0.5 * CLOSE


def test_even_pictures_are_copies_only_at_the_same_brightness() -> None:
    even = [np.full((40, 30, 3), grey, np.uint8) for grey in (0, 7, 255)]
    stored = Nearness([fingerprint(image) for image in even])
    assert [nearest(stored, image).index for image in even] == [0, 1, 2]
    other = nearest(stored, np.full((9, 9, 3), 100, np.uint8))
    assert (other.distance, other.suspicious) == (1.0, False)


def test_grey_is_as_its_colour_copy() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (50, 60), np.uint8)
    assert fingerprint(np.stack([grey] * 3, 2)) == fingerprint(np.repeat(grey[:, :, None], 3, axis=2))


def test_what_is_no_image_or_no_fingerprint_is_told() -> None:
    with pytest.raises(ImageError, match=r"image: got float64 \(4, 4, 3\), expected uint8"):
        fingerprint(np.zeros((4, 4, 3)))
    with pytest.raises(DataError, match=r"fingerprints\[1\]: 5 bytes, expected 256, .* must be fitted again"):
        Nearness([bytes(256), b"short"])
