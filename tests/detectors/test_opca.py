"""OPCA: distances against scikit-learn and scipy, maps against scipy, and products that leave no trace in one another."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from torch import Tensor

from unispect.detectors.methods import build
from unispect.detectors.opca import OPCA
from unispect.errors import ConfigError, UnispectError
from unispect.inspector import complete
from unispect.types import Features, Scores

SHAPES = [(5, 6, 4), (7, 3, 2), (4, 1, 1)]
SIDE = 12
SMALL: dict[str, Any] = {"map_side": SIDE, "sigma": 1.5}
RULES = [("opca", 0.05), ("opca", 0.3), ("pca", 0.95), ("all", 0.05)]
every_rule = pytest.mark.parametrize(("components", "variance"), RULES)


def images(count: int, seed: int, products: int = 3, shapes: list[tuple[int, int, int]] = SHAPES) -> tuple[Features, Tensor]:
    """Products with means and correlations of their own."""
    random, world = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    product, levels = torch.arange(count) % products, []
    for channels, height, width in shapes:
        mean = 3 * torch.randn(100, channels, 1, 1, generator=world)[product]
        mixing = torch.randn(100, channels, channels, generator=world)[product] + torch.eye(channels)
        noise = torch.randn(count, channels, height, width, generator=random)
        whole = torch.randn(count, channels, 1, 1, generator=random)
        levels.append(mean + torch.einsum("nde,nehw->ndhw", mixing, 0.3 * noise + 0.5 * whole))
    return levels, product


def taught(detector: OPCA, features: Features, product: Tensor, batch: int = 8) -> OPCA:
    for more in (True, False):
        for start in range(0, len(product), batch):
            detector.update([level[start : start + batch] for level in features], product[start : start + batch])
        assert detector.finish() is more
    return detector


def learnt(count: int = 36, products: int = 3, **options: Any) -> OPCA:
    return taught(OPCA(SHAPES, products, **SMALL | options), *images(count, 1, products))


def only(features: Features, product: Tensor, wanted: list[int]) -> tuple[Features, Tensor]:
    """Images of some products, numbered anew in the order of the list."""
    rows = torch.isin(product, torch.tensor(wanted))
    return [level[rows] for level in features], torch.tensor([wanted.index(y) for y in product[rows].tolist()])


def assert_identical(one: OPCA, other: OPCA) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def assert_same(one: Scores, other: Scores) -> None:
    for name in ("image", "maps", "products"):
        assert torch.equal(getattr(one, name), getattr(other, name))


# The oracle


def distances(train: np.ndarray, test: np.ndarray, rule: str, share: float) -> np.ndarray:
    """Mahalanobis distance of test (m, C) by scikit-learn and scipy alone."""
    pca = PCA(svd_solver="full").fit(train)
    beyond = np.flatnonzero(np.cumsum(pca.explained_variance_ratio_) > (share if rule == "pca" else 1 - share))
    chosen = {"opca": slice(max(beyond[0] - 1, 0), None), "pca": slice(0, beyond[0] + 1), "all": slice(None)}[rule]
    gaussian = LedoitWolf().fit(pca.transform(train)[:, chosen])
    return np.array([mahalanobis(x, gaussian.location_, gaussian.precision_) for x in pca.transform(test)[:, chosen]])


def means(level: Tensor) -> np.ndarray:
    return level.double().numpy().mean((2, 3))


def places(level: Tensor) -> np.ndarray:
    """All vectors, (N, C, h, w) -> (N * h * w, C)."""
    return level.double().permute(0, 2, 3, 1).flatten(0, 2).numpy()


def distance_maps(train: np.ndarray, level: Tensor, rule: str, share: float) -> Tensor:
    found = distances(train, places(level), rule, share)
    return torch.from_numpy(found).reshape(len(level), *level.shape[2:]).float()


def resized(maps: list[Tensor]) -> Tensor:
    """Unweighted mean over the levels of maps (N, h, w), half-pixel bilinear."""
    found = [torch.nn.functional.interpolate(m[:, None], (SIDE, SIDE), mode="bilinear", align_corners=False) for m in maps]
    return sum(found)[:, 0] / len(maps)


def smooth(maps: Tensor, sigma: float) -> Tensor:
    return torch.stack([torch.from_numpy(gaussian_filter(row.numpy(), sigma)) for row in maps])


def close(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected).float(), rtol=1e-4, atol=1e-5)


def products_of(count: int = 36) -> list[tuple[int, Features, Features]]:
    """Product, its training images and some new ones."""
    train, test = images(count, 1), images(9, 2)
    return [(y, only(*train, [y])[0], only(*test, [y])[0]) for y in range(3)]


@every_rule
@pytest.mark.parametrize("count", [27, 36])
def test_pooled_scores_are_those_of_sklearn_and_scipy(components: str, variance: float, count: int) -> None:
    settings = {"method": "opca", "opca": SMALL | {"mode": "pooled", "components": components, "variance": variance}}
    detector = build(complete(settings), SHAPES, 3)
    assert isinstance(detector, OPCA)
    taught(detector, *images(count, 1))
    for y, train, test in products_of(count):
        pairs = list(zip(train, test, strict=True))
        expected = sum(distances(means(old), means(new), components, variance) for old, new in pairs)
        scores = detector(test)
        assert scores.products.argmax(1).tolist() == [y] * len(test[0])
        close(scores.image, expected)
        maps = [distance_maps(means(old), new, components, variance) for old, new in pairs[:2]]
        close(scores.maps, smooth(resized(maps), 1.5))


@every_rule
def test_dense_scores_are_those_of_sklearn_and_scipy(components: str, variance: float) -> None:
    options = {"components": components, "variance": variance}
    settings = {"method": "opca", "opca": SMALL | {"mode": "dense"} | options}
    detector, top = build(complete(settings), SHAPES, 3), learnt(image="top", top=0.1, **options)
    assert isinstance(detector, OPCA)
    taught(detector, *images(36, 1))
    for y, train, test in products_of():
        maps = [distance_maps(places(old), new, components, variance) for old, new in zip(train[:2], test, strict=False)]
        scores = detector(test)
        assert scores.products.argmax(1).tolist() == [y] * len(test[0])
        close(scores.image, sum(level.flatten(1).amax(1) for level in maps))
        close(scores.maps, smooth(resized(maps), 1.5))
        highest = np.sort(resized(maps).flatten(1).numpy())[:, -14:]  # a tenth of 144
        close(top(test).image, highest.mean(1))
        close(top(test).maps, scores.maps)


@pytest.mark.parametrize("mode", ["dense", "pooled"])
def test_one_gaussian_for_all_products(mode: str) -> None:
    detector = learnt(mode=mode, per_product=False)
    (train, _), (test, _) = images(36, 1), images(6, 2)
    scores = detector(test)
    assert scores.products is None
    if mode == "pooled":
        close(
            scores.image, sum(distances(means(old), means(new), "opca", 0.05) for old, new in zip(train, test, strict=True))
        )
    else:
        maps = [distance_maps(places(old), new, "opca", 0.05) for old, new in zip(train[:2], test, strict=False)]
        close(scores.image, sum(level.flatten(1).amax(1) for level in maps))
    assert torch.equal(detector.forward_given(test, torch.tensor([0, 1, 2] * 2)).image, scores.image)


def test_no_blur_without_sigma() -> None:
    _, train, test = products_of()[0]
    maps = [distance_maps(places(old), new, "opca", 0.05) for old, new in zip(train[:2], test, strict=False)]
    close(learnt(sigma=0.0)(test).maps, resized(maps))


def test_a_given_product_is_the_one_asked() -> None:
    detector, (test, product) = learnt(), images(9, 2)
    scores = detector(test)
    given = detector.forward_given(test, product)
    assert given.products is None
    assert torch.equal(given.image, scores.image)
    assert torch.equal(given.maps, scores.maps)
    wrong = detector.forward_given(test, (product + 1) % 3)
    train = only(*images(36, 1), [1])[0]
    maps = [distance_maps(places(old), new[:1], "opca", 0.05) for old, new in zip(train[:2], test, strict=False)]
    close(wrong.image[:1], sum(level.flatten(1).amax(1) for level in maps))


# Products that come and go: not a bit of the others changes

every_mode = pytest.mark.parametrize("mode", ["dense", "pooled"])


@every_mode
@pytest.mark.parametrize("batch", [1, 7, 36])
def test_batches_change_no_bit(mode: str, batch: int) -> None:
    other = taught(OPCA(SHAPES, 3, **SMALL, mode=mode), *images(36, 1), batch)
    assert_identical(learnt(mode=mode), other)
    features, _ = images(9, 2)
    assert_same(learnt(mode=mode)(features), other(features))


@every_mode
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_batches_change_no_bit_of_wide_features(mode: str, form: torch.memory_format) -> None:
    shapes = [(112, 12, 12), (64, 5, 7)]
    features, product = images(10, 1, 2, shapes)
    levels = [level.contiguous(memory_format=form) for level in features]
    one, other = (taught(OPCA(shapes, 2, **SMALL, mode=mode), levels, product, batch) for batch in (1, 6))
    assert_identical(one, other)


@every_mode
def test_other_products_change_no_bit(mode: str) -> None:
    features, product = images(36, 1)
    whole, new = learnt(mode=mode), only(*images(9, 2), [0])[0]
    replaced = [torch.where((product == 2)[:, None, None, None], 50 - 3 * level, level) for level in features]
    moved = torch.cat([torch.arange(36)[product == y] for y in (2, 0, 1)])
    others = [
        taught(OPCA(SHAPES, 3, **SMALL, mode=mode), replaced, product),
        taught(OPCA(SHAPES, 2, **SMALL, mode=mode), *only(features, product, [0, 1])),
        taught(OPCA(SHAPES, 1, **SMALL, mode=mode), *only(features, product, [0])),
        taught(OPCA(SHAPES, 3, **SMALL, mode=mode), [level[moved] for level in features], product[moved]),
    ]
    for other in others:
        for name, value in other.state_dict().items():
            if name.startswith(("gaussians.0.", "recogniser.products.0.")):
                assert torch.equal(value, whole.state_dict()[name])
        assert torch.equal(other(new).image, whole(new).image)
        assert torch.equal(other(new).maps, whole(new).maps)


@every_mode
def test_an_added_product_is_as_if_learnt_with_the_others(mode: str) -> None:
    features, product = images(36, 1)
    new, _ = images(9, 2)
    detector = taught(OPCA(SHAPES, 2, **SMALL, mode=mode), *only(features, product, [0, 1]))
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    known = only(*images(9, 2), [0, 1])[0]
    scores = detector(known)
    detector.add(taught(OPCA(SHAPES, 1, **SMALL, mode=mode), *only(features, product, [2])))
    assert all(torch.equal(value, detector.state_dict()[name]) for name, value in before.items())
    assert torch.equal(detector(known).image, scores.image)
    assert torch.equal(detector(known).maps, scores.maps)
    assert_identical(detector, learnt(mode=mode))
    assert_same(detector(new), learnt(mode=mode)(new))
    loaded = OPCA(SHAPES, 3, **SMALL, mode=mode)
    loaded.load_state_dict(detector.state_dict())
    assert_same(loaded(new), detector(new))


@every_mode
@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_removed_product_was_never_there(mode: str, gone: int) -> None:
    features, product = images(36, 1)
    rest = [y for y in range(3) if y != gone]
    detector = learnt(mode=mode)
    detector.remove(gone)
    expected = taught(OPCA(SHAPES, 2, **SMALL, mode=mode), *only(features, product, rest))
    assert_identical(detector, expected)
    new = only(*images(9, 2), rest)[0]
    assert_same(detector(new), expected(new))


def test_several_products_are_added_in_order() -> None:
    features, product = images(36, 1)
    detector = taught(OPCA(SHAPES, 1, **SMALL), *only(features, product, [0]))
    detector.add(taught(OPCA(SHAPES, 2, **SMALL), *only(features, product, [1, 2])))
    assert_identical(detector, learnt())


def test_one_gaussian_for_all_lets_none_come_or_go() -> None:
    single, shared = learnt(), learnt(per_product=False)
    for change in (
        lambda: shared.remove(0),
        lambda: shared.add(single),
        lambda: single.add(shared),
        lambda: shared.add(shared),
    ):
        with pytest.raises(ConfigError, match="per_product=false: one Gaussian for all products"):
            change()
    assert_identical(single, learnt())


# State and batches


@pytest.mark.parametrize("options", [{}, {"mode": "pooled"}, {"per_product": False}, {"components": "pca", "variance": 0.5}])
def test_state_goes_round(options: dict[str, Any]) -> None:
    detector, other = learnt(**options), OPCA(SHAPES, 3, **SMALL | options)
    other.load_state_dict(detector.state_dict())
    features, _ = images(9, 2)
    assert torch.equal(detector(features).image, other(features).image)
    assert torch.equal(detector(features).maps, other(features).maps)


def test_learning_again_forgets() -> None:
    detector = taught(OPCA(SHAPES, 3, **SMALL), *images(30, 7))
    assert_identical(taught(detector, *images(36, 1)), learnt())


@every_mode
def test_a_batch_may_be_empty_or_mixed(mode: str) -> None:
    detector, (features, _) = learnt(mode=mode), images(9, 2)
    whole = detector(features)
    rows = [detector([level[n : n + 1] for level in features]) for n in range(9)]
    torch.testing.assert_close(whole.image, torch.cat([row.image for row in rows]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.maps, torch.cat([row.maps for row in rows]), rtol=1e-5, atol=1e-5)


def test_ten_times_more_images_take_no_more_memory() -> None:
    sizes = []
    for count in (30, 300):
        detector = OPCA(SHAPES, 3, **SMALL)
        features, product = images(count, 1)
        for start in range(0, count, 10):
            detector.update([level[start : start + 10] for level in features], product[start : start + 10])
        held = [vars(moments).values() for sums in detector._sums.values() for moments in sums]
        sizes.append(sum(value.nbytes for values in held for value in values))
    assert sizes[0] == sizes[1] > 0


# Little to learn from


@every_mode
@every_rule
def test_duplicates_and_constants_stay_finite(mode: str, components: str, variance: float) -> None:
    product = torch.tensor([0, 0, 1, 1, 1, 2])
    for features in (
        [level[product] for level in images(3, 1)[0]],
        [product[:, None, None, None].float().expand(6, *shape) for shape in SHAPES],
    ):
        detector = OPCA(SHAPES, 3, **SMALL, mode=mode, components=components, variance=variance)
        scores = taught(detector, features, product)(features)
        assert all(torch.isfinite(value).all() for value in (scores.image, scores.maps, scores.products))
        assert scores.products.argmax(1).tolist() == product.tolist()
        # Means over the places are rounded, and a deviation counts much where there is no variance.
        far = detector([level + 1 for level in features])
        assert torch.isfinite(far.image).all()


@every_mode
def test_a_single_pooled_level(mode: str) -> None:
    shapes = [(4, 1, 1)]
    detector = taught(OPCA(shapes, 2, **SMALL, mode=mode), *images(20, 1, 2, shapes))
    (train, product), (test, _) = images(20, 1, 2, shapes), images(4, 2, 2, shapes)
    scores = detector(test)
    assert scores.maps.shape == (4, SIDE, SIDE)
    for y in range(2):
        expected = distances(means(train[0][product == y]), means(test[0][y::2]), "opca", 0.05)
        close(scores.image[y::2], expected)
    torch.testing.assert_close(scores.maps.amax((1, 2)), scores.image)


def test_a_pooled_level_has_no_part_in_dense_scores() -> None:
    detector, (features, _) = learnt(per_product=False), images(4, 2)
    changed = [*features[:2], features[2] + 100]
    assert torch.equal(detector(features).image, detector(changed).image)
    assert torch.equal(detector(features).maps, detector(changed).maps)


def test_a_hundred_products() -> None:
    detector = taught(OPCA(SHAPES, 100, **SMALL), *images(500, 1, 100), 50)
    features, _ = images(100, 2, 100)
    scores = detector(features)
    assert scores.products.shape == (100, 100)
    assert torch.isfinite(scores.image).all()


# Errors


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("mode", "dens", "unknown mode 'dens': did you mean 'dense'? known: dense, pooled"),
        ("mode", "pool", "unknown mode 'pool': did you mean 'pooled'? known: dense, pooled"),
        ("components", "ocpa", "unknown components 'ocpa': did you mean 'opca'? known: all, opca, pca"),
        ("image", "topp", "unknown image 'topp': did you mean 'top'? known: max, top"),
        ("image", "quantile", "unknown image 'quantile': known: max, top"),
    ],
)
def test_unknown_names_give_the_nearest_known(option: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OPCA(SHAPES, 2, **{option: value})
    assert str(caught.value) == message
    with pytest.raises(ConfigError) as caught:
        build(complete({"method": "opca", "opca": {option: value}}), SHAPES, 2)
    assert message in str(caught.value)


@pytest.mark.parametrize("variance", [0, -0.1, 1.01, float("nan")])
def test_a_share_of_variance_is_above_0_and_up_to_1(variance: float) -> None:
    with pytest.raises(ConfigError, match=rf"variance: got {variance}, expected a share above 0 and up to 1"):
        OPCA(SHAPES, 2, variance=variance)


def test_all_of_the_variance_is_a_share() -> None:
    features, _ = images(9, 2)
    one, other = learnt(variance=1.0), learnt(components="all")
    assert torch.equal(one(features).image, other(features).image)


@pytest.mark.parametrize("options", [{}, {"per_product": False}, {"mode": "pooled"}])
def test_before_learning_there_is_no_score(options: dict[str, Any]) -> None:
    detector, (features, product) = OPCA(SHAPES, 3, **SMALL | options), images(9, 2)
    for _ in range(2):
        with pytest.raises(UnispectError, match="OPCA has not learnt this product yet: call update and finish first"):
            detector(features)
        detector.update(features, product)
    detector.finish()
    with pytest.raises(UnispectError, match="has not learnt"):
        detector(features)


def test_finish_without_images_says_so() -> None:
    with pytest.raises(UnispectError, match="OPCA saw no image: call update with normal images before finish"):
        OPCA(SHAPES, 3).finish()
