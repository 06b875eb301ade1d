"""Kept components on crafted spectra, and the folded distance against scikit-learn and scipy."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from torch import Tensor

from unispect.nn.gaussian import Moments
from unispect.nn.pca import Components, Subspace, kept

TWENTY = [10, 5, 3, 1, 1]  # of which 0.5, 0.75, 0.9, 0.95 and 1 are explained


def reference(variances: np.ndarray, rule: str, share: float) -> list[int]:
    """Indices kept as the code published with Rippel et al. (2020) does, with start = max(j* - 1, 0)."""
    if rule == "all":
        return list(range(len(variances)))
    explained, threshold = 0.0, share if rule == "pca" else 1 - share
    for j in range(len(variances)):
        explained += variances[j]
        if explained / variances.sum() > threshold:
            return list(range(j + 1)) if rule == "pca" else list(range(max(j - 1, 0), len(variances)))
    return list(range(len(variances))) if rule == "pca" else list(range(max(len(variances) - 2, 0), len(variances)))


def drawn(count: int, channels: int, seed: int) -> np.ndarray:
    """Vectors of variances that fall fast, in a turned basis, around a mean."""
    random = np.random.default_rng(seed)
    basis = np.linalg.qr(random.normal(size=(channels, channels)))[0]
    return random.normal(size=(count, channels)) * np.geomspace(3, 0.3, channels) @ basis + random.normal(size=channels)


def components(vectors: np.ndarray, rule: str = "all", share: float = 0.05) -> Components:
    moments = Moments(1, vectors.shape[1], torch.from_numpy(vectors[0]))
    for start in range(0, len(vectors), 7):
        moments.add(torch.tensor([0]), torch.from_numpy(vectors[None, start : start + 7]))
    return Components(moments, rule, share)


def subspace(vectors: np.ndarray, rule: str = "all", share: float = 0.05) -> Subspace:
    found, learnt = components(vectors, rule, share), Subspace(vectors.shape[1])
    learnt.learn(found, sum(found.fourth(part) for part in torch.from_numpy(vectors).split(5)))
    return learnt


def explicit(train: np.ndarray, test: np.ndarray, rule: str, share: float) -> Tensor:
    """Distances by scikit-learn and scipy alone."""
    pca = PCA(svd_solver="full").fit(train)
    chosen = reference(pca.explained_variance_, rule, share)
    gaussian = LedoitWolf().fit(pca.transform(train)[:, chosen])
    reduced = pca.transform(test)[:, chosen]
    return torch.tensor([mahalanobis(row, gaussian.location_, gaussian.precision_) for row in reduced]).float()


# The rule


@pytest.mark.parametrize(
    ("variances", "rule", "share", "first", "last"),
    [
        (TWENTY, "opca", 0.05, 3, 4),  # j* = 4: 0.95 is not more than 0.95
        (TWENTY, "opca", 0.06, 2, 4),
        (TWENTY, "opca", 0.3, 0, 4),  # j* = 1
        ([99, 0.5, 0.5], "opca", 0.05, 0, 2),  # j* = 0
        ([94, 5, 1], "opca", 0.05, 0, 2),  # j* = 1
        ([94, 0.5, 5.4, 0.1], "opca", 0.05, 1, 3),  # j* = 2
        (TWENTY, "opca", 1.0, 0, 4),
        (TWENTY, "pca", 0.95, 0, 4),
        (TWENTY, "pca", 0.94, 0, 3),
        (TWENTY, "pca", 0.5, 0, 1),  # 0.5 is not more than 0.5
        (TWENTY, "pca", 0.4, 0, 0),
        (TWENTY, "pca", 1.0, 0, 4),
        (TWENTY, "all", 0.05, 0, 4),
        ([7], "opca", 0.05, 0, 0),
        ([7], "pca", 0.95, 0, 0),
        ([0, 0, 0], "opca", 0.05, 0, 2),
        ([0, 0, 0], "pca", 0.95, 0, 2),
        ([0, 0, 0], "all", 0.05, 0, 2),
        ([3, 0, 0], "opca", 0.05, 0, 2),
        ([3, 3, 0, 0], "pca", 0.95, 0, 1),
    ],
)
def test_kept_components_of_crafted_spectra(variances: list[float], rule: str, share: float, first: int, last: int) -> None:
    found = kept(torch.tensor(variances, dtype=torch.float64), rule, share)
    assert list(range(len(variances)))[found] == list(range(first, last + 1))


@pytest.mark.parametrize("rule", ["opca", "pca", "all"])
def test_kept_components_are_those_of_a_loop(rule: str) -> None:
    random = np.random.default_rng(0)
    for _ in range(100):
        variances = np.sort(random.exponential(size=random.integers(1, 12)) ** 3)[::-1].copy()
        share = float(random.uniform(0.01, 0.99))
        found = kept(torch.from_numpy(variances), rule, share)
        assert list(range(len(variances)))[found] == reference(variances, rule, share)


def test_a_tiny_share_keeps_the_last_component_and_one_more() -> None:
    assert kept(torch.tensor(TWENTY, dtype=torch.float64), "opca", 1e-18) == slice(3, 5)


# Components


@pytest.mark.parametrize(("count", "channels"), [(40, 6), (6, 6), (5, 9), (2, 4)])
def test_variances_are_those_of_sklearn(count: int, channels: int) -> None:
    vectors = drawn(count, channels, seed=count)
    found = components(vectors)
    expected = PCA(svd_solver="full").fit(vectors).explained_variance_ * (count - 1) / count
    assert found.directions.shape == (channels, min(count, channels))
    torch.testing.assert_close(found.variances, torch.from_numpy(expected), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.mean, torch.from_numpy(vectors.mean(0)), rtol=0, atol=1e-12)
    identity = torch.eye(min(count, channels)).double()
    torch.testing.assert_close(found.directions.T @ found.directions, identity, rtol=0, atol=1e-10)


def test_fourth_powers_are_of_the_kept_components() -> None:
    vectors = drawn(40, 6, 0)
    found = components(vectors, "opca", 0.05)
    assert 0 < found.directions.shape[1] < 6
    reduced = PCA(svd_solver="full").fit_transform(vectors)[:, -found.directions.shape[1] :]
    assert found.fourth(torch.from_numpy(vectors)) == pytest.approx(float(((reduced**2).sum(1) ** 2).sum()), rel=1e-9)


def test_one_vector_has_one_component() -> None:
    found = components(drawn(1, 5, 0))
    assert found.directions.shape == (5, 1)
    assert found.variances.tolist() == [0.0]


# Distances


@pytest.mark.parametrize(("rule", "share"), [("opca", 0.05), ("opca", 0.3), ("pca", 0.95), ("pca", 0.5), ("all", 0.05)])
@pytest.mark.parametrize("count", [9, 30, 200])
def test_the_folded_matrix_is_the_explicit_path(rule: str, share: float, count: int) -> None:
    train, test = drawn(count, 8, seed=3), drawn(20, 8, seed=4)
    found = subspace(train, rule, share)(torch.from_numpy(test).float())
    torch.testing.assert_close(found, explicit(train, test, rule, share), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("rule", "share"), [("opca", 0.05), ("opca", 0.5), ("pca", 0.9), ("all", 0.05)])
def test_fewer_vectors_than_channels(rule: str, share: float) -> None:
    # The last component of n vectors has no variance and is any of many, so sums with weights of the vectors are compared.
    train = drawn(6, 11, seed=5)
    weights = np.random.default_rng(6).normal(size=(15, 6))
    test = train.mean(0) + weights @ (train - train.mean(0))
    found = subspace(train, rule, share)
    assert len(found.matrix) <= 6
    torch.testing.assert_close(found(torch.from_numpy(test).float()), explicit(train, test, rule, share), rtol=1e-4, atol=0)


def test_a_kept_component_is_blind_to_the_others() -> None:
    train = drawn(200, 8, seed=3)
    pca = PCA(svd_solver="full").fit(train)
    learnt = subspace(train, "opca", 0.05)
    away = torch.from_numpy(pca.mean_ + 100 * pca.components_[:1]).float()
    assert float(learnt(away)[0]) < 0.1 < 10 < float(learnt(away + 100 * torch.from_numpy(pca.components_[-1:]).float())[0])


@pytest.mark.parametrize("vectors", [np.zeros((5, 4)), np.full((5, 4), 7.0), np.full((1, 4), 2.0)])
def test_constant_vectors_are_at_no_distance(vectors: np.ndarray) -> None:
    for rule in ("opca", "pca", "all"):
        learnt = subspace(vectors, rule, 0.05)
        at, away = torch.from_numpy(vectors).float(), torch.from_numpy(vectors).float() + torch.arange(1.0, 5.0)
        assert not learnt(at).any()
        assert torch.isfinite(learnt(away)).all()
        assert (learnt(away) >= 0).all()


def test_a_constant_channel_stays_finite_and_is_noticed() -> None:
    vectors = drawn(50, 5, seed=1)
    vectors[:, 2] = 4.0
    learnt = subspace(vectors, "opca", 0.05)
    at = torch.from_numpy(vectors).float()
    away = at.clone()
    away[:, 2] += 1
    assert torch.isfinite(learnt(away)).all()
    assert (learnt(away) > learnt(at) + 1).all()


def test_distances_are_of_single_precision_and_state_goes_round() -> None:
    learnt, other = subspace(drawn(30, 6, 0), "opca", 0.1), Subspace(6)
    assert learnt.matrix.dtype == learnt.mean.dtype == torch.float32
    other.load_state_dict(learnt.state_dict())
    test = torch.from_numpy(drawn(9, 6, 1)).float()
    assert torch.equal(learnt(test), other(test))
