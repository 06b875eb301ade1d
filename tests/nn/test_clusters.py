"""Planted groups are found, and none where there are none."""

import pytest
import torch
from sklearn.metrics import adjusted_rand_score, silhouette_score
from torch import Tensor

from unispect.nn.clusters import discover, kmeans, silhouette


def blobs(sizes: list[int], gap: float = 8.0, channels: int = 6) -> tuple[Tensor, Tensor]:
    """Round groups around corners of a box, one after the other, and the group of each vector."""
    generator = torch.Generator().manual_seed(len(sizes))
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return torch.randn(len(labels), channels, generator=generator) + gap * torch.eye(channels)[labels], labels


@pytest.mark.parametrize("sizes", [[40, 40], [30, 30, 30], [80, 20, 30, 12], [20] * 6])
def test_planted_groups_are_found(sizes: list[int]) -> None:
    vectors, labels = blobs(sizes)
    found = discover(vectors)
    assert found.dtype == torch.int64
    assert adjusted_rand_score(labels, found) == 1.0
    assert found.unique().tolist() == list(range(len(sizes)))


def test_many_vectors_in_the_order_of_their_groups() -> None:
    vectors, labels = blobs([1100, 300, 300])
    assert adjusted_rand_score(labels, discover(vectors, most=4)) == 1.0


def test_the_order_of_the_vectors_and_the_units_do_not_matter() -> None:
    vectors, labels = blobs([30, 30, 30])
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    scales = torch.tensor([1e-3, 1, 1e3, 1, 5, 1e5])
    assert adjusted_rand_score(labels[order], discover(vectors[order] * scales + 7)) == 1.0


@pytest.mark.parametrize("count", [1, 2, 3, 7, 9, 120])
def test_one_group_stays_one(count: int) -> None:
    assert not discover(blobs([count])[0]).any()


def test_equal_vectors_are_one_group() -> None:
    assert not discover(torch.ones(40, 3)).any()


def test_no_more_groups_than_allowed_and_the_same_for_a_seed() -> None:
    vectors, _ = blobs([20] * 6)
    found = discover(vectors, most=3, seed=4)
    assert len(found.unique()) <= 3
    assert torch.equal(found, discover(vectors, most=3, seed=4))


def test_silhouette_is_that_of_scikit_learn() -> None:
    vectors, labels = blobs([12, 9, 1, 30], gap=2.0)
    assert silhouette(vectors, labels) == pytest.approx(float(silhouette_score(vectors, labels)), abs=1e-5)
    assert silhouette(vectors, torch.zeros(52)) == -1.0


def test_kmeans_ends_where_no_vector_is_closer_to_another_mean() -> None:
    vectors, _ = blobs([50, 50], gap=1.0)
    labels = kmeans(vectors, 4, seed=0)
    means = torch.stack([vectors[labels == k].mean(0) for k in range(4)])
    assert torch.equal(torch.cdist(vectors, means).argmin(1), labels)
