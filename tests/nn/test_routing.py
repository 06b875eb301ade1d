"""What is known of each product as one tensor, and the smallest values of columns."""

import pytest
import torch

from unispect.nn.routing import smallest, stacked, taken


def test_what_differs_in_length_is_filled_up() -> None:
    short, long = torch.ones(1, 2), torch.ones(3, 2)
    joined = stacked([short, long], fill=7.0)
    assert joined.shape == (2, 3, 2)
    assert joined[0, 1:].eq(7).all()
    assert torch.equal(joined[1], long)


def test_every_image_takes_what_is_of_its_product() -> None:
    rows = [torch.full((2,), float(y)) for y in range(3)]
    assert taken(rows, torch.tensor([2, 0, 2]))[:, 0].tolist() == [2, 0, 2]


@pytest.mark.parametrize("size", [5, 40, 41, 160, 640, 644])
@pytest.mark.parametrize("k", [1, 5])
def test_the_smallest_are_those_of_a_sort(size: int, k: int) -> None:
    values = torch.randn(2, size, 7, generator=torch.Generator().manual_seed(size))
    least, places = smallest(values, k)
    assert torch.equal(least, values.sort(1).values[:, :k])
    assert torch.equal(values.gather(1, places), least)
