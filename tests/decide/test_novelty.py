"""Novelty against scikit-learn's Gaussians, and products that come and go."""

import numpy as np
import torch
from sklearn.covariance import LedoitWolf
from torch import Tensor

from unispect.decide.unknown import Novelty


def images(product: int, count: int, seed: int) -> list[Tensor]:
    """Two levels around means of the product."""
    generator = torch.Generator().manual_seed(seed)
    return [
        3 * product + torch.randn(count, channels, side, side, generator=generator) for channels, side in ((5, 3), (4, 1))
    ]


def learnt(products: list[int]) -> Novelty:
    novelty = Novelty((5, 4), len(products))
    for number, product in enumerate(products):
        novelty.update(images(product, 40, product), torch.full((40,), number))
    novelty.finish()
    return novelty.eval()


def test_it_is_minus_the_highest_likelihood_of_any_product() -> None:
    asked = images(1, 6, 9)
    levels = [level.mean((2, 3)).double().numpy() for level in asked]
    expected = np.full(6, -np.inf)
    for product in (0, 1):
        total = np.zeros(6)
        for level, seen in zip(levels, images(product, 40, product), strict=True):
            known = seen.mean((2, 3)).double().numpy()
            fitted = LedoitWolf().fit(known)
            # few images are not taken for all: see nn.recognition
            covariance = fitted.covariance_ + (fitted.location_**2).mean() / 40**2 * np.eye(known.shape[1])
            away = level - fitted.location_
            distance = np.einsum("nd,de,ne->n", away, np.linalg.inv(covariance), away)
            total -= (distance + np.linalg.slogdet(covariance)[1]) / 2
        expected = np.maximum(expected, total)
    np.testing.assert_allclose(learnt([0, 1])(asked).numpy(), -expected, rtol=1e-3, atol=1e-3)


def test_a_product_never_seen_is_stranger_than_any_known_one() -> None:
    novelty = learnt([0, 1])
    known = torch.cat([novelty(images(0, 30, 5)), novelty(images(1, 30, 6))])
    assert novelty(images(4, 30, 7)).min() > known.max()


def test_what_joins_is_known_and_what_leaves_is_not() -> None:
    novelty, asked = learnt([0, 1]), images(4, 10, 7)
    novelty.add(learnt([4]))
    assert torch.equal(novelty(asked), learnt([4])(asked))
    novelty.remove(2)
    assert torch.equal(novelty(asked), learnt([0, 1])(asked))
