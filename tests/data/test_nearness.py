"""Near-duplicates: the same picture again is found, another picture of the same product is not."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from unispect.data.factory import PRODUCTS, draw
from unispect.data.nearness import NEIGHBOURS, Nearness, fingerprint

SIDE = 128


def pictures(product: str, count: int) -> list[np.ndarray]:
    return [draw(product, number, size=SIDE)[0] for number in range(count)]


def saved(image: np.ndarray, quality: int) -> np.ndarray:
    file = BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


def resized(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((200, 200), Image.Resampling.BICUBIC))


def noisy(image: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 4, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def brighter(image: np.ndarray) -> np.ndarray:
    return np.clip(image * 1.04, 0, 255).astype(np.uint8)


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "saved again": lambda image: saved(image, 90),
    "saved coarsely": lambda image: saved(image, 60),
    "larger": resized,
    "noisy": noisy,
    "brighter": brighter,
}


@pytest.fixture(scope="module")
def known() -> dict[str, list[np.ndarray]]:
    return {product: pictures(product, 14) for product in PRODUCTS}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found_among_its_like(change: str, known: dict[str, list[np.ndarray]]) -> None:
    found = 0
    for images in known.values():
        nearness = Nearness([fingerprint(image) for image in images])
        for place in (0, 5, 9):
            near = nearness.nearest(fingerprint(CHANGES[change](images[place])))
            assert near is not None
            found += near.suspicious and near.index == place
    assert found >= 0.9 * 3 * len(known)


def test_another_picture_of_the_product_is_not_suspicious(known: dict[str, list[np.ndarray]]) -> None:
    """All products in one pile, as in a model of all of them."""
    pile = Nearness([fingerprint(image) for images in known.values() for image in images])
    fresh = [draw(product, number, size=SIDE)[0] for product in PRODUCTS for number in range(100, 125)]
    alarms = sum(near.suspicious for image in fresh if (near := pile.nearest(fingerprint(image))))
    assert alarms <= 0.02 * len(fresh)


def test_the_same_picture_is_at_distance_zero(known: dict[str, list[np.ndarray]]) -> None:
    for images in known.values():
        near = Nearness([fingerprint(image) for image in images[:3]]).nearest(fingerprint(images[1]))
        assert near is not None
        assert (near.index, near.distance, near.suspicious) == (1, 0.0, True)


def test_brute_force_finds_the_same_one() -> None:
    random = np.random.default_rng(0)
    marks = [random.normal(size=121).astype("<f2").tobytes() for _ in range(200)]
    nearness = Nearness(marks)
    for _ in range(20):
        mark = random.normal(size=121).astype("<f2")
        gaps = [np.sqrt(np.mean((np.frombuffer(one, "<f2").astype(float) - mark.astype(float)) ** 2)) for one in marks]
        near = nearness.nearest(mark.tobytes())
        assert near is not None
        assert near.index == int(np.argmin(gaps))
        assert near.distance == pytest.approx(min(gaps), rel=1e-5)


def test_few_stored_ones_ask_for_an_almost_equal_picture(known: dict[str, list[np.ndarray]]) -> None:
    first, second = known["gear"][:2]
    alone = Nearness([fingerprint(first)])
    same, other = alone.nearest(fingerprint(saved(first, 95))), alone.nearest(fingerprint(second))
    assert same is not None
    assert other is not None
    assert (same.suspicious, other.suspicious) == (True, False)
    assert NEIGHBOURS > 1
    assert Nearness([]).nearest(fingerprint(first)) is None


@pytest.mark.parametrize("shape", [(1, 1), (1, 400), (3, 2), (2000, 10), (700, 900)])
def test_any_size_has_a_fingerprint_of_one_length(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    assert len(fingerprint(image)) == 242
    assert np.isfinite(np.frombuffer(fingerprint(image), "<f2").astype(float)).all()
    assert fingerprint(image) == fingerprint(image.copy())


def test_an_even_picture_is_all_zero() -> None:
    assert not np.frombuffer(fingerprint(np.full((40, 30, 3), 7, np.uint8)), "<f2").any()


def test_what_is_no_fingerprint_is_told() -> None:
    with pytest.raises(ValueError, match="expected 242 bytes each"):
        Nearness([b"short"])
