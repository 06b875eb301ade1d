"""The positional encoding against the formula, written out place by place."""

import math

import pytest
import torch
from torch import Tensor

from unispect.errors import ConfigError
from unispect.nn.position import LearntPosition, positional_encoding


def literal(channels: int, row: int, column: int) -> Tensor:
    """What the formula says of one place, (channels,)."""
    half = channels // 2
    values = [0.0] * channels
    for j in range(half // 2):
        frequency = 10000 ** (-2 * j / half)
        values[2 * j], values[2 * j + 1] = math.sin(column * frequency), math.cos(column * frequency)
        values[half + 2 * j], values[half + 2 * j + 1] = math.sin(row * frequency), math.cos(row * frequency)
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("channels", [4, 8, 128, 256])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 7), (7, 3), (5, 5)])
def test_equal_to_the_formula_at_corners_and_inside(channels: int, height: int, width: int) -> None:
    encoding = positional_encoding(channels, height, width)
    assert encoding.shape == (channels, height, width)
    assert encoding.dtype == torch.float64
    for row, column in {(0, 0), (0, width - 1), (height - 1, 0), (height - 1, width - 1), (height // 2, width // 2)}:
        torch.testing.assert_close(encoding[:, row, column], literal(channels, row, column), rtol=0, atol=1e-13)


def test_turning_the_grid_swaps_the_halves() -> None:
    wide, high = positional_encoding(16, 3, 7), positional_encoding(16, 7, 3)
    torch.testing.assert_close(torch.cat([wide[8:], wide[:8]]), high.mT, rtol=0, atol=0)


def test_places_are_told_apart() -> None:
    codes = positional_encoding(8, 6, 9).flatten(1).T
    assert torch.cdist(codes, codes).fill_diagonal_(1).min() > 1e-2


def test_no_channels_is_no_encoding() -> None:
    assert positional_encoding(0, 2, 3).shape == (0, 2, 3)


def test_says_what_it_expects() -> None:
    with pytest.raises(ConfigError, match="got 6, expected a multiple of 4"):
        positional_encoding(6, 2, 2)


# Learnt


def test_a_learnt_position_is_that_of_its_column_then_that_of_its_row() -> None:
    position = LearntPosition(6, height=3, width=4)
    found = position()
    assert found.shape == (12, 6)
    for row in range(3):
        for column in range(4):
            assert torch.equal(found[4 * row + column], torch.cat([position.column[column], position.row[row]]))


def test_learnt_positions_begin_between_0_and_1() -> None:
    torch.manual_seed(0)
    values = torch.cat([part.flatten() for part in LearntPosition(256, 14, 14).parameters()])
    assert 0 <= values.min() < 0.01
    assert 0.99 < values.max() < 1
    assert values.mean().item() == pytest.approx(0.5, abs=0.02)


def test_halves_of_an_odd_number_of_channels() -> None:
    with pytest.raises(ConfigError, match="position channels: got 7, expected an even number"):
        LearntPosition(7, 2, 2)
