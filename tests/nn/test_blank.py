"""Filled images and hidden maps, place by place."""

import numpy as np
import torch

from unispect.nn.blank import Blank

SIZE = 8


def blank() -> Blank:
    """Of three products, the second masked in its left half, the third in one pixel."""
    left, one = np.zeros((SIZE, SIZE), bool), np.zeros((SIZE, SIZE), bool)
    left[:, :4], one[6, 7] = True, True
    return Blank.of(
        ["a", "b", "c"], {"c": one, "b": left}, {"b": np.full((3, SIZE, SIZE), 9.4), "c": np.full((3, SIZE, SIZE), 200.0)}
    )


def test_images_are_filled_where_their_product_is_masked() -> None:
    images = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8)
    found = blank()(images, torch.tensor([0, 1, 2, 1]))
    assert found.dtype == torch.uint8
    assert torch.equal(found[0], images[0])
    assert (found[[1, 3], :, :, :4] == 9).all()
    assert torch.equal(found[[1, 3], :, :, 4:], images[[1, 3], :, :, 4:])
    assert (found[2, :, 6, 7] == 200).all()
    assert (found[2] != images[2]).any(0).sum() <= 1
    assert torch.equal(blank()(images.float(), torch.tensor([0, 1, 2, 1])), found.float())


def test_maps_of_any_side_are_lowest_where_nothing_is_looked_at() -> None:
    for side in (4, 8, 16):
        maps = torch.rand(3, side, side)
        found = blank().hidden(maps, torch.tensor([0, 1, 2]))
        assert torch.equal(found[0], maps[0])
        assert (found[1, :, : side // 2] == maps[1].min()).all()
        assert torch.equal(found[1, :, side // 2 :], maps[1, :, side // 2 :])
        same = found[2] == maps[2]
        assert (~same).sum() <= (side // 8) ** 2
    assert not same[12:14, 14:16].any()


def test_its_mark_tells_masks_and_fills_apart() -> None:
    one = blank()
    marks = [one.mark(number) for number in range(3)]
    assert marks[0] == ""
    assert len(set(marks)) == 3
    other = Blank([1, 2], 3, SIZE)
    other.load_state_dict(one.state_dict())
    assert [other.mark(number) for number in range(3)] == marks
    other.get_buffer("fill")[1] += 1
    assert other.mark(1) != marks[1]
    assert [one.masks(torch.tensor(some)) for some in ([0, 0], [0, 2], [1])] == [False, True, True]
    assert [round(one.share(number), 4) for number in range(3)] == [0.0, 0.5, round(1 / 64, 4)]
