"""Maps against scipy and numpy."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from unispect.nn.maps import blurred, box_mean, magnified, top_mean, upsampled


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("sigma", [0.5, 4.0])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (40, 9), (5, 64), (1, 1)])
def test_blur_is_that_of_scipy(height: int, width: int, sigma: float) -> None:
    maps = draw(3, height, width)
    expected = np.stack([gaussian_filter(each, sigma, mode="reflect") for each in maps.numpy()])
    torch.testing.assert_close(blurred(maps, sigma), torch.from_numpy(expected), rtol=0, atol=1e-12)
    torch.testing.assert_close(blurred(maps.float(), sigma).double(), torch.from_numpy(expected), rtol=0, atol=1e-5)


def test_no_blur_and_a_constant() -> None:
    maps = draw(2, 6, 5)
    assert torch.equal(blurred(maps, 0.0), maps)
    torch.testing.assert_close(blurred(torch.full((1, 20, 30), 3.0), 4.0), torch.full((1, 20, 30), 3.0))


def bilinear(grid: np.ndarray, side: int) -> np.ndarray:
    """The definition with aligned corners, by rows and then by columns."""
    for axis in (0, 1):
        places = np.linspace(0, grid.shape[axis] - 1, side)
        known = np.arange(grid.shape[axis])
        grid = np.apply_along_axis(lambda line, at=places, known=known: np.interp(at, known, line), axis, grid)
    return grid


@pytest.mark.parametrize(("height", "width"), [(5, 6), (3, 3), (1, 1), (1, 4), (16, 16)])
def test_upsampling_keeps_the_corners(height: int, width: int) -> None:
    maps = draw(2, height, width)
    expected = np.stack([bilinear(each, 16) for each in maps.numpy()])
    torch.testing.assert_close(upsampled(maps, 16), torch.from_numpy(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("share", "count"), [(0.0, 1), (0.02, 1), (0.1, 3), (0.5, 15), (1.0, 30)])
def test_top_mean(share: float, count: int) -> None:
    maps = draw(4, 5, 6)
    expected = np.sort(maps.flatten(1).numpy(), axis=1)[:, -count:].mean(1)
    torch.testing.assert_close(top_mean(maps, share), torch.from_numpy(expected))


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(
    ("size", "side", "sigma"), [((4, 6), 16, 1.5), ((1, 1), 8, 1.0), ((16, 16), 40, 4.0), ((5, 5), 3, 0.0)]
)
def test_magnified_is_upsampled_then_blurred(size: tuple[int, int], side: int, sigma: float, aligned: bool) -> None:
    maps = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
    expected = blurred(upsampled(maps, side, aligned), sigma)
    torch.testing.assert_close(magnified(maps, side, sigma, aligned), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("side", "padding"), [(4, 0), (5, 2), (1, 0)])
def test_box_mean_is_average_pooling(side: int, padding: int) -> None:
    maps = draw(2, 9, 7)
    expected = torch.nn.functional.avg_pool2d(maps[:, None], side, stride=1, padding=padding)[:, 0]
    torch.testing.assert_close(box_mean(maps, side, padding), expected)
