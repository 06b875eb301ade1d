"""Moments against numpy, shrinkage against scikit-learn, whitening against what it promises."""

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf as sklearn_ledoit_wolf
from torch import Tensor

from unispect.nn.gaussian import Moments, ledoit_wolf, shrunk, whitening, within

EXACT = {"rtol": 0.0, "atol": 1e-12}


def correlated(count: int, channels: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    return torch.randn(count, channels, generator=generator, dtype=torch.float64) @ mixing + seed


def filled(sizes: list[int], shift: Tensor | None = None) -> tuple[Moments, list[Tensor]]:
    groups = [correlated(size, 5, seed) for seed, size in enumerate(sizes)]
    moments = Moments(len(sizes), 5, shift)
    for number, vectors in enumerate(groups):
        for part in vectors.split(7):
            moments.add(torch.tensor([number]), part[None])
    return moments, groups


@pytest.mark.parametrize("shift", [None, torch.full((5,), 3.0)])
def test_moments_are_those_of_numpy(shift: Tensor | None) -> None:
    moments, groups = filled([30, 1, 64], shift)
    for number, vectors in enumerate(groups):
        torch.testing.assert_close(moments.mean()[number], torch.from_numpy(vectors.numpy().mean(0)), **EXACT)
        expected = torch.from_numpy(np.cov(vectors.numpy().T, bias=True))
        torch.testing.assert_close(moments.covariance()[number], expected, rtol=0, atol=1e-11)
        torch.testing.assert_close(moments.covariance_of(slice(number, number + 1))[0], expected, rtol=0, atol=1e-11)
    assert moments.count.tolist() == [30, 1, 64]


def test_the_grouping_of_batches_does_not_matter() -> None:
    vectors = torch.stack([correlated(40, 5, 1), correlated(40, 5, 2)]).float()
    whole, parts = Moments(3, 5), Moments(3, 5)
    whole.add(torch.tensor([2, 0]), vectors)
    for part in vectors.split([1, 16, 23], dim=1):
        parts.add(torch.tensor([2, 0]), part)
    torch.testing.assert_close(whole.covariance(), parts.covariance(), **EXACT)
    torch.testing.assert_close(whole.mean(), parts.mean(), **EXACT)


def test_a_far_mean_costs_no_digits_with_a_shift() -> None:
    vectors = correlated(50, 5, 1) + 1e6
    moments = Moments(1, 5, shift=vectors[0])
    moments.add(torch.tensor([0]), vectors[None])
    expected = torch.from_numpy(np.cov((vectors - 1e6).numpy().T, bias=True))
    torch.testing.assert_close(moments.covariance()[0], expected, rtol=0, atol=1e-8)


def test_empty_groups() -> None:
    moments, groups = filled([20, 0, 30])
    assert not moments.mean()[1].any()
    assert not moments.covariance()[1].any()
    mean, covariance = within(moments)
    torch.testing.assert_close(mean, (groups[0].mean(0) + groups[2].mean(0)) / 2, **EXACT)
    torch.testing.assert_close(covariance, (moments.covariance()[0] + moments.covariance()[2]) / 2, **EXACT)


@pytest.mark.parametrize(("count", "channels"), [(5, 12), (40, 12), (400, 6), (3, 2)])
def test_shrinkage_is_that_of_scikit_learn(count: int, channels: int) -> None:
    vectors = correlated(count, channels, seed=count)
    expected, amount = sklearn_ledoit_wolf(vectors.numpy())
    centred = vectors - vectors.mean(0)
    covariance = centred.T @ centred / count
    found = ledoit_wolf(covariance, float(centred.square().sum(1).square().sum()), count)
    assert found == pytest.approx(amount, abs=1e-10)
    torch.testing.assert_close(shrunk(covariance, found), torch.from_numpy(expected), rtol=0, atol=1e-10)


def test_a_sphere_is_shrunk_wholly() -> None:
    assert ledoit_wolf(2 * torch.eye(4, dtype=torch.float64), 100.0, 10) == 1.0
    assert ledoit_wolf(torch.zeros(4, 4, dtype=torch.float64), 0.0, 10) == 1.0


def test_whitening_makes_the_covariance_the_identity() -> None:
    covariance = torch.stack([torch.from_numpy(np.cov(correlated(99, 6, seed).numpy().T)) for seed in range(3)])
    white = whitening(covariance, floor=0.0)
    torch.testing.assert_close(white @ covariance @ white.mT, torch.eye(6).double().expand(3, 6, 6), rtol=0, atol=1e-9)
    torch.testing.assert_close(white, white.mT, **EXACT)


def test_whitening_has_a_floor() -> None:
    white = whitening(torch.diag(torch.tensor([4.0, 2.0, 0.0, 1e-9], dtype=torch.float64)), floor=0.01)
    torch.testing.assert_close(white.diagonal() ** -2, torch.tensor([4.0, 2.0, 0.015, 0.015], dtype=torch.float64))
    assert torch.isfinite(whitening(torch.zeros(3, 3))).all()


def fourth_powers(vectors: Tensor) -> Tensor:
    """Sum of the fourth powers of the distances to the mean, term by term."""
    mean = vectors.mean(0)
    return torch.stack([((vector - mean) @ (vector - mean)) ** 2 for vector in vectors]).sum()


@pytest.mark.parametrize(("shift", "digits"), [(None, 1e-10), (3.0, 1e-10), (-200.0, 1e-4)])
def test_fourth_powers_are_a_direct_sum(shift: float | None, digits: float) -> None:
    moments, groups = filled([30, 2, 64], None if shift is None else torch.full((5,), shift))
    expected = torch.stack([fourth_powers(vectors) for vectors in groups])
    torch.testing.assert_close(moments.fourth(), expected, rtol=digits, atol=0)


def test_fourth_powers_do_not_depend_on_the_batches() -> None:
    vectors = torch.stack([correlated(40, 5, 1), correlated(40, 5, 2)])
    moments = Moments(3, 5)
    for part in vectors.split([1, 16, 23], dim=1):
        moments.add(torch.tensor([2, 0]), part)
    expected = torch.stack([fourth_powers(vectors[1]), torch.zeros((), dtype=torch.float64), fourth_powers(vectors[0])])
    torch.testing.assert_close(moments.fourth(), expected, rtol=1e-10, atol=0)


def test_fourth_powers_of_a_far_mean_cost_no_digits_with_a_shift() -> None:
    vectors = correlated(50, 5, 1) + 1e6
    moments = Moments(1, 5, shift=vectors[0])
    moments.add(torch.tensor([0]), vectors[None])
    torch.testing.assert_close(moments.fourth()[0], fourth_powers(vectors), rtol=1e-8, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e3 / 3, 1e6 / 7])
def test_duplicates_have_no_fourth_powers(value: float) -> None:
    moments = Moments(1, 5)
    moments.add(torch.tensor([0]), torch.full((1, 37, 5), value, dtype=torch.float64))
    assert 0 <= float(moments.fourth()[0]) <= 1e-12 * max(value, 1e-9) ** 4 * 37 * 25


def test_fourth_powers_give_the_shrinkage_of_scikit_learn() -> None:
    moments, groups = filled([30, 8])
    for number, vectors in enumerate(groups):
        found = ledoit_wolf(moments.covariance()[number], float(moments.fourth()[number]), len(vectors))
        assert found == pytest.approx(sklearn_ledoit_wolf(vectors.numpy())[1], abs=1e-10)


def test_groups_joined_are_the_sums_of_all_their_vectors() -> None:
    moments, groups = filled([30, 2, 64], torch.full((5,), 3.0))
    for chosen, found in ((groups, moments.joined()), ([groups[0], groups[2]], moments.without(1))):
        expected = Moments(1, 5, torch.full((5,), 3.0))
        expected.add(torch.tensor([0]), torch.cat(list(chosen))[None])
        torch.testing.assert_close(found.mean(), expected.mean(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.covariance(), expected.covariance(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.fourth(), expected.fourth(), rtol=1e-10, atol=1e-12)
        assert float(found.count) == sum(map(len, chosen))
