"""Many centres inside each product: out of fold means what it says."""

import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from unispect.nn.crowds import Crowds

CHANNELS, PLACES, PRODUCTS = 6, 9, 2
PRODUCT = torch.arange(16) % PRODUCTS
FOLD = torch.arange(16) // 2 % 4


def images(count: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.5, 3, CHANNELS)
    return torch.randn(count, PLACES, CHANNELS, generator=generator) * spread + 4 * (torch.arange(count) % 2)[:, None, None]


def learnt(vectors: Tensor, product: Tensor, fold: Tensor, most: int = 10_000, folds: int = 4) -> Crowds:
    crowds = Crowds(CHANNELS, PRODUCTS, most, folds, around=8, support=5)
    for part in (slice(0, 5), slice(5, None)):
        crowds.measure(vectors[part], product[part], fold[part])
    for part in (slice(0, 7), slice(7, None)):
        crowds.collect(vectors[part], product[part], fold[part])
    crowds.choose()
    return crowds


@pytest.mark.parametrize("most", [10_000, 20])
def test_out_of_fold_distances_are_those_of_centres_that_never_saw_the_fold(most: int) -> None:
    vectors = images()
    crowds = learnt(vectors, PRODUCT, FOLD, most)
    found = crowds.held_back(vectors, PRODUCT, FOLD)
    for fold in range(4):
        rest = fold != FOLD
        other = learnt(vectors[rest], PRODUCT[rest], FOLD[rest], most)
        torch.testing.assert_close(
            found[~rest], other(vectors[~rest], PRODUCT[~rest]), rtol=1e-4, atol=1e-5
        )  # sums differ in the last bits


def test_distances_are_those_of_a_plain_search() -> None:
    vectors, new = images(), images(4, seed=1)
    crowds = learnt(vectors, PRODUCT, FOLD)
    for image, y in enumerate((PRODUCT[:4]).tolist()):
        part = crowds.product(y)
        own = part.white(vectors[y == PRODUCT].flatten(0, 1))
        usual = NearestNeighbors(n_neighbors=9).fit(own).kneighbors(own)[0][:, 1:].mean(1)
        gaps, places = NearestNeighbors(n_neighbors=5).fit(own).kneighbors(part.white(new[image]))
        expected = gaps[:, :3].mean(1) / (usual[places].mean(1) + 0.3 * usual.mean())
        found = crowds(new[image][None], torch.tensor([y]))[0]
        torch.testing.assert_close(found, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-5)


def test_images_that_were_learnt_look_closer_than_they_do_out_of_fold() -> None:
    vectors = images()
    crowds = learnt(vectors, PRODUCT, FOLD)
    assert float(crowds(vectors, PRODUCT).mean()) < 0.8 * float(crowds.held_back(vectors, PRODUCT, FOLD).mean())


def test_no_more_centres_than_asked_for_and_folds_are_let_go() -> None:
    crowds = learnt(images(), PRODUCT, FOLD, most=20)
    assert [len(crowds.product(y).bank) for y in range(PRODUCTS)] == [20, 20]
    size = sum(value.numel() for value in crowds.state_dict().values())
    crowds.done()
    assert size == sum(value.numel() for value in crowds.state_dict().values())
    assert not crowds._folded
    assert not crowds._pools
    assert not crowds._sums


def test_vectors_held_are_bounded() -> None:
    crowds = Crowds(CHANNELS, 1, most=50, max_ram=0.05)
    product, fold = torch.zeros(16, dtype=torch.int64), FOLD
    for turn in range(30):
        crowds.measure(images(seed=turn), product, fold)
    held = []
    for turn in range(30):
        crowds.collect(images(seed=turn), product, fold)
        held.append(crowds._pools[0].held_bytes)
    assert max(held) < 0.05 * 2**20
    crowds.choose()
    assert len(crowds.product(0).bank) == 50


def test_a_product_in_one_fold_is_scored_by_its_own_centres() -> None:
    vectors, alone = images(), torch.zeros(16, dtype=torch.int64)
    crowds = learnt(vectors, PRODUCT, alone)
    assert torch.equal(crowds.held_back(vectors, PRODUCT, alone), crowds(vectors, PRODUCT))


def test_copies_of_one_image_give_finite_distances() -> None:
    vectors = images(1).expand(16, -1, -1)
    crowds = learnt(vectors, PRODUCT, FOLD)
    assert torch.isfinite(crowds.held_back(vectors, PRODUCT, FOLD)).all()
    assert torch.isfinite(crowds(images(4, seed=3), PRODUCT[:4])).all()


def test_state_goes_round_and_the_seed_decides() -> None:
    first, again = learnt(images(), PRODUCT, FOLD, most=20), learnt(images(), PRODUCT, FOLD, most=20)
    other = Crowds(CHANNELS, PRODUCTS, 20, around=8, support=5)
    other.load_state_dict(first.state_dict())
    new = images(4, seed=1)
    assert torch.equal(first(new, PRODUCT[:4]), other(new, PRODUCT[:4]))
    assert torch.equal(first(new, PRODUCT[:4]), again(new, PRODUCT[:4]))
