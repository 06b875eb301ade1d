"""Log-likelihoods by dimension against scipy, tallies against sorting, and the map against a literal loop."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor

from unispect.errors import UnispectError
from unispect.nn.likelihood import STEPS, Tally, standard_normal, unlikely
from unispect.nn.maps import upsampled


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_standard_normal_is_that_of_scipy_by_dimension() -> None:
    z, logdet = draw(20, 5), draw(20, seed=1)
    expected = (multivariate_normal(np.zeros(5)).logpdf(z.numpy()) + logdet.numpy()) / 5
    np.testing.assert_allclose(standard_normal(z, logdet), expected, rtol=1e-13)


def test_the_mean_over_the_places_of_a_map_is_that_of_the_map() -> None:
    z, logdet = draw(4, 3, 2, 5), draw(4, 2, 5, seed=1)
    whole = standard_normal(z.flatten(1), logdet.sum((1, 2)))
    torch.testing.assert_close(standard_normal(z, logdet).mean((1, 2)), whole)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("scale", [0.01, 1.0, 1e6])
def test_quantiles_are_those_of_sorting(share: float, scale: float) -> None:
    values = scale * draw(5000)
    tally = Tally()
    for part in values.split(700):
        tally.add(part.reshape(-1, 10) if len(part) % 10 == 0 else part)
    expected = float(np.quantile(values.numpy(), share, method="inverted_cdf"))
    assert abs(tally.quantile(share) - expected) <= 0.51 / STEPS * max(1.0, 1.1 * abs(expected))


def test_a_tally_depends_on_no_order_and_does_not_grow() -> None:
    values = draw(4000).float()
    one, other = Tally(), Tally()
    one.add(values)
    for part in values.flip(0).split(333):
        other.add(part)
    assert torch.equal(one.counts, other.counts)
    assert one.counts.numel() * 8 < 2.2e6


def test_tallies_of_nothing_and_of_what_is_no_number_are_errors() -> None:
    with pytest.raises(UnispectError, match=r"set split\.held_out above 0"):
        Tally().quantile(0.5)
    with pytest.raises(UnispectError, match="the flow has diverged"):
        Tally().add(torch.tensor([0.0, float("nan")]))


def test_unlikely_is_the_literal_sum() -> None:
    densities, ceilings = [draw(3, 4, 4), draw(3, 1, 1, seed=1)], torch.tensor([0.2, -0.5], dtype=torch.float64)
    expected = torch.full((3, 8, 8), 2.0, dtype=torch.float64)
    for density, ceiling in zip(densities, ceilings, strict=True):
        likely = torch.tensor([min(1.0, float(torch.exp(value - ceiling))) for value in density.flatten()])
        expected -= upsampled(likely.double().reshape(density.shape), 8)
    found = unlikely(densities, ceilings, 8)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    assert found.min() >= 0
    assert found.max() <= 2
