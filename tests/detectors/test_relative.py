"""Relative distances to the nearest normal patches, against scikit-learn and closed forms."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from unispect.detectors.neighbours import PLAIN, Neighbours
from unispect.errors import ConfigError, UnispectError
from unispect.types import Features

SHAPES = [(5, 6, 6), (4, 3, 3), (3, 1, 1)]


def images(count: int, seed: int, products: int = 2) -> tuple[Features, Tensor]:
    random, product = torch.Generator().manual_seed(seed), torch.arange(count) % products
    levels = [torch.randn(count, *shape, generator=random) * (1 + torch.arange(shape[0]))[:, None, None] for shape in SHAPES]
    return [level + 8 * product[:, None, None, None] for level in levels], product


def taught(features: Features, product: Tensor, size: int = 16, products: int = 2, **options: float) -> Neighbours:
    detector = Neighbours(SHAPES, products, map_side=6, sigma=0.0, **options)  # type: ignore[arg-type]
    more = True
    while more:
        for start in range(0, len(product), size):
            detector.update([level[start : start + size] for level in features], product[start : start + size])
        more = detector.finish()
    return detector


@pytest.mark.parametrize(("neighbours", "support", "around"), [(3, 20, 50), (1, 1, 5), (5, 2, 9)])
def test_distances_are_those_of_sklearn(neighbours: int, support: int, around: int) -> None:
    features, product = images(40, 1)
    detector = taught(features, product, neighbours=neighbours, support=support, around=around, bank_images=8)
    new, its = images(6, 2)
    vectors, scores = detector.embed(new), detector.forward_given(new, its)
    for row, y in enumerate(its.tolist()):
        known = detector.product(y)
        bank = known.bank.double().numpy()
        inside = NearestNeighbors(n_neighbors=around + 1).fit(bank).kneighbors(bank)[0][:, 1:].mean(1)
        white = (vectors[row].double() - known.shift.double()) @ known.whiten.double()
        far, place = NearestNeighbors(n_neighbors=max(neighbours, support)).fit(bank).kneighbors(white.numpy())
        usual = inside[place[:, :support]].mean(1) + PLAIN * inside.mean() + 1e-6
        expected = far[:, :neighbours].mean(1) / usual
        np.testing.assert_allclose(scores.maps[row].flatten().numpy(), expected, rtol=1e-4)
        assert float(scores.image[row]) == pytest.approx(expected.max(), rel=1e-4)  # 1 % of 36 places is one


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_whitening_takes_the_covariance_to_a_power(power: float) -> None:
    features, product = images(40, 1)
    detector = taught(features, product, whitening=power)
    vectors = detector.embed(features)[product == 1].flatten(0, 1).double()
    known = detector.product(1)
    white = np.cov(((vectors - known.shift.double()) @ known.whiten.double()).numpy().T, bias=True)
    blocks = [part / part.var(0, correction=0).sum().sqrt() for part in vectors.split([5, 4], dim=1)]
    values, basis = np.linalg.eigh(np.cov(torch.cat(blocks, 1).numpy().T, bias=True))
    expected = (basis * values ** (1 - power)) @ basis.T
    np.testing.assert_allclose(white, expected / np.trace(expected), rtol=1e-4, atol=1e-6)


def test_the_units_of_the_features_do_not_matter() -> None:
    features, product = images(40, 1)
    new, its = images(8, 2)
    one = taught(features, product).forward_given(new, its)
    other = taught([level * 37 for level in features], product).forward_given([level * 37 for level in new], its)
    torch.testing.assert_close(one.image, other.image, rtol=1e-3, atol=1e-3)


def test_what_is_learnt_does_not_depend_on_the_batches_or_on_other_products() -> None:
    features, product = images(40, 1)
    whole, parts = taught(features, product).state_dict(), taught(features, product, size=7).state_dict()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    own = product == 0
    alone = taught([level[own] for level in features], product[own], products=1)
    assert torch.equal(alone.product(0).bank, taught(features, product).product(0).bank)


def test_banks_are_capped() -> None:
    features, product = images(200, 1, products=100)
    detector = taught(features, product, products=100, max_bank_vectors=700)
    assert all(1 <= len(detector.product(y).bank) <= 7 for y in range(100))
    assert len(taught(*images(40, 1), bank_images=2.0).product(0).bank) == 72


@pytest.mark.parametrize("spoilt", ["copies", "constant", "two"])
def test_poor_images_give_finite_scores(spoilt: str) -> None:
    features, product = images(4 if spoilt == "two" else 20, 1)
    if spoilt == "copies":
        features = [level[:2].repeat(10, 1, 1, 1) for level in features]
    if spoilt == "constant":
        features = [torch.ones_like(level) for level in features]
    assert torch.isfinite(taught(features, product)(images(5, 2)[0]).image).all()


def test_what_cannot_be_done_is_told() -> None:
    with pytest.raises(UnispectError, match="has learnt nothing yet"):
        Neighbours(SHAPES, 2)(images(3, 1)[0])
    with pytest.raises(UnispectError, match="saw no image"):
        Neighbours(SHAPES, 2).finish()
    with pytest.raises(ConfigError, match="whitening: got 2"):
        Neighbours(SHAPES, 2, whitening=2)
    with pytest.raises(ConfigError, match="max_bank_vectors: got 1, expected one for each of 2 products"):
        Neighbours(SHAPES, 2, max_bank_vectors=1)
