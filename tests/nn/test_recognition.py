"""Recognition of products against scikit-learn and scipy; products that come and go leave no trace."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf
from torch import Tensor

from unispect.nn.recognition import Recogniser, pooled
from unispect.types import Features

SHAPES = [(4, 3, 5), (6, 2, 2), (3, 1, 1)]
CHANNELS = [channels for channels, _, _ in SHAPES]


def images(product: Tensor, seed: int, gap: float = 0.3) -> Features:
    """Images whose pooled means are near to one another, and differ by product."""
    random, world = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    levels = []
    for channels, height, width in SHAPES:
        mixing = torch.randn(channels, channels, generator=world)
        mean = gap * torch.randn(100, channels, generator=world)[product]
        vectors = mean + torch.randn(len(product), channels, generator=random) @ mixing / 2
        levels.append(vectors[:, :, None, None] + 0.1 * torch.randn(len(product), channels, height, width, generator=random))
    return levels


def learnt(features: Features, product: Tensor, products: int, batch: int = 7) -> Recogniser:
    recogniser = Recogniser(CHANNELS, products)
    for start in range(0, len(product), batch):
        recogniser.update([level[start : start + batch] for level in features], product[start : start + batch])
    recogniser.finish()
    return recogniser


def only(features: Features, product: Tensor, wanted: list[int]) -> tuple[Features, Tensor]:
    """Images of some products, numbered anew in the order of the list."""
    rows = torch.isin(product, torch.tensor(wanted))
    return [level[rows] for level in features], torch.tensor([wanted.index(y) for y in product[rows].tolist()])


def assert_identical(one: Recogniser, other: Recogniser) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("count", [15, 90, 600])
def test_probabilities_are_those_of_sklearn_and_scipy(count: int) -> None:
    product = torch.arange(count) % 3
    train, test = images(product, 1), images(torch.arange(20) % 3, 2)
    likelihoods = np.zeros((20, 3))
    for level, new in zip(train, test, strict=True):
        vectors, others = level.double().numpy().mean((2, 3)), new.double().numpy().mean((2, 3))
        for y in range(3):
            gaussian = LedoitWolf().fit(vectors[product.numpy() == y])
            unseen = (gaussian.location_**2).mean() / (product == y).sum().item() ** 2 * np.eye(vectors.shape[1])
            likelihoods[:, y] += multivariate_normal(gaussian.location_, gaussian.covariance_ + unseen).logpdf(others)
    expected = torch.from_numpy(log_softmax(likelihoods, axis=1)).float()
    assert expected.exp().max(1).values.min() < 0.9  # it is not all too easy
    torch.testing.assert_close(learnt(train, product, 3)(test), expected, rtol=1e-4, atol=1e-4)


def test_pooled_vectors_are_means_over_places() -> None:
    features = images(torch.arange(4) % 2, 1)
    for found, level in zip(pooled(features), features, strict=True):
        torch.testing.assert_close(found, torch.from_numpy(level.numpy().mean((2, 3))))


def test_probabilities_add_up_to_one_and_find_distant_products() -> None:
    product = torch.arange(300) % 10
    recogniser = learnt(images(product, 1, gap=5), product, 10)
    found = recogniser(images(product, 2, gap=5))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.exp().sum(1), torch.ones(300))
    assert (found.argmax(1) == product).float().mean() > 0.98


# Products come and go without a bit of change


@pytest.mark.parametrize("batch", [1, 4, 60])
def test_batches_change_no_bit(batch: int) -> None:
    product = torch.arange(60) % 3
    assert_identical(learnt(images(product, 1), product, 3), learnt(images(product, 1), product, 3, batch))


def test_batches_change_no_bit_of_wide_features() -> None:
    features = [torch.randn(12, 272, 12, 12, generator=torch.Generator().manual_seed(0))]
    for levels in (features, [level.contiguous(memory_format=torch.channels_last) for level in features]):
        states = []
        for batch in (1, 5, 12):
            recogniser = Recogniser([272], 2)
            for part in range(0, 12, batch):
                recogniser.update([levels[0][part : part + batch]], torch.arange(12)[part : part + batch] % 2)
            recogniser.finish()
            states.append(recogniser.state_dict())
        for name, value in states[0].items():
            assert torch.equal(value, states[1][name])
            assert torch.equal(value, states[2][name])


def test_the_order_among_products_changes_no_bit() -> None:
    product = torch.arange(60) % 3
    features = images(product, 1)
    order = product.argsort(stable=True)
    assert_identical(learnt(features, product, 3), learnt([level[order] for level in features], product[order], 3))


def test_an_added_product_is_as_if_learnt_with_the_others() -> None:
    product = torch.arange(60) % 3
    features = images(product, 1)
    whole = learnt(features, product, 3)
    recogniser = learnt(*only(features, product, [0, 1]), 2)
    recogniser.add(learnt(*only(features, product, [2]), 1))
    assert_identical(recogniser, whole)
    assert torch.equal(recogniser(features), whole(features))


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_removed_product_was_never_there(gone: int) -> None:
    product = torch.arange(60) % 3
    features = images(product, 1)
    recogniser = learnt(features, product, 3)
    recogniser.remove(gone)
    rest = [y for y in range(3) if y != gone]
    assert_identical(recogniser, learnt(*only(features, product, rest), 2))


def test_the_order_of_added_products_is_kept() -> None:
    product = torch.arange(60) % 3
    features = images(product, 1)
    parts = [learnt(*only(features, product, [y]), 1) for y in (2, 0, 1)]
    parts[0].add(parts[1])
    parts[0].add(parts[2])
    torch.testing.assert_close(parts[0](features), learnt(features, product, 3)(features)[:, [2, 0, 1]])


def test_state_goes_round() -> None:
    product = torch.arange(30) % 2
    features = images(product, 1)
    recogniser, other = learnt(features, product, 2), Recogniser(CHANNELS, 2)
    other.load_state_dict(recogniser.state_dict())
    assert torch.equal(recogniser(features), other(features))


def test_learning_again_forgets() -> None:
    product = torch.arange(30) % 2
    recogniser = learnt(images(product, 5), product, 2)
    recogniser.update(images(product, 1), product)
    recogniser.finish()
    assert_identical(recogniser, learnt(images(product, 1), product, 2))


# Little to learn from


def test_one_product_is_certain() -> None:
    product = torch.zeros(9, dtype=torch.int64)
    assert not learnt(images(product, 1), product, 1)(images(product, 2)).any()


def test_one_image_of_a_product() -> None:
    product = torch.tensor([0] * 20 + [1])
    features = images(product, 1, gap=5)
    found = learnt(features, product, 2)(features)
    assert torch.isfinite(found).all()
    assert found.argmax(1).tolist() == product.tolist()
    assert torch.isfinite(learnt(features, product, 2)(images(product, 2, gap=5))).all()


def test_constant_features_are_told_by_their_value() -> None:
    product = torch.arange(12) % 3
    features = [product[:, None, None, None].float().expand(12, *shape) for shape in SHAPES]
    found = learnt(features, product, 3)(features)
    assert torch.isfinite(found).all()
    assert found.argmax(1).tolist() == product.tolist()


def test_products_of_the_same_images_are_equally_likely() -> None:
    features = [level.repeat_interleave(2, 0) for level in images(torch.zeros(20, dtype=torch.int64), 1)]
    found = learnt(features, torch.arange(40) % 2, 2)(features)
    assert torch.equal(found[:, 0], found[:, 1])
    torch.testing.assert_close(found, torch.full((40, 2), 0.5).log())


# Ledoit and Wolf shrink nothing of two vectors, and one vector or copies of it have no covariance at all.
@pytest.mark.parametrize("few", [2, 3, 5])
def test_few_images_are_enough_for_distant_products(few: int) -> None:
    product = torch.tensor([0] * 40 + [1] * few)
    recogniser = learnt(images(product, 1, gap=5), product, 2)
    new = torch.arange(40) % 2
    assert (recogniser(images(new, 2, gap=5)).argmax(1) == new).float().mean() > 0.9


def test_an_image_is_recognised_alike_alone_and_among_others() -> None:
    product = torch.arange(60) % 3
    recogniser, features = learnt(images(product, 1), product, 3), images(product, 2)
    rows = torch.cat([recogniser([level[n : n + 1] for level in features]) for n in range(60)])
    torch.testing.assert_close(recogniser(features), rows, rtol=1e-5, atol=1e-5)


def test_a_batch_may_be_empty() -> None:
    product = torch.arange(10) % 2
    recogniser = learnt(images(product, 1), product, 2)
    assert recogniser(images(product[:0], 1)).shape == (0, 2)
