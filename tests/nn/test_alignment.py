"""Folds of a pass, and maps in units of their product. Scales of places: tests/detectors/test_ensemble.py."""

import torch

from unispect.nn.alignment import Alignment, Folds, deal


def test_folds_follow_the_images_over_batches_and_passes() -> None:
    product, unit = torch.arange(20) % 3, torch.arange(20) // 2
    dealt = deal(product, unit, 4, seed=0)
    folds = Folds(dealt, 4)
    for size in (7, 20, 3):
        folds.start()
        assert torch.equal(torch.cat([folds.of(part) for part in product.split(size)]), dealt)


def test_folds_that_were_not_dealt_take_the_images_of_each_product_in_turn() -> None:
    folds = Folds(None, 3)
    first = torch.cat([folds.of(part) for part in torch.tensor([0, 0, 1, 0, 0, 1]).split(2)])
    assert first.tolist() == [0, 1, 0, 2, 0, 1]
    folds.start()
    assert folds.of(torch.tensor([1, 0])).tolist() == [0, 0]


def test_whole_maps_have_one_unit_for_all_places() -> None:
    maps = 3 + torch.randn(200, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2
    alignment = Alignment(1, 4)
    alignment.learn_places(maps, prior=20.0)
    whole = alignment.scales.whole(maps)
    torch.testing.assert_close(whole.mean(), torch.tensor(0.0), rtol=0, atol=1e-4)
    torch.testing.assert_close(whole.std(), torch.tensor(1.0), rtol=0.02, atol=0)
    gain = (whole[0] - whole[1]) / (maps[0] - maps[1])
    torch.testing.assert_close(gain, gain.mean().expand_as(gain))
    assert torch.equal(alignment.scales.whole(maps[5]), whole[5])
