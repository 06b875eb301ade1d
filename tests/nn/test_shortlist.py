import pytest
import torch

from unispect.nn.memory import Bank, nearest
from unispect.nn.shortlist import Shortlist, lowest


def _drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "k"), [(5, 5), (16, 3), (160, 3), (1000, 1), (1003, 7), (1007, 25)])
def test_the_lowest_are_those_of_topk(rows: int, k: int) -> None:
    values = _drawn(50, rows)
    assert torch.equal(lowest(values, k), values.topk(k, dim=1, largest=False).indices)


def test_the_lowest_may_be_among_the_rows_left_over() -> None:
    values = torch.arange(1003.0).flip(0).expand(2, -1)
    assert torch.equal(lowest(values, 3), torch.tensor([1002, 1001, 1000]).expand(2, -1))


def test_all_axes_rank_as_whole_distances_do() -> None:
    bank, queries = _drawn(400, 6) + 20, _drawn(30, 6, seed=1) + 20
    places = Shortlist(bank, 6)(queries, 5)
    assert torch.equal(places, torch.cdist(queries, bank).topk(5, largest=False).indices)


def test_the_axes_are_those_of_most_spread() -> None:
    scale = torch.tensor([5.0, 1e-3, 3.0, 1e-3])
    bank, queries = _drawn(400, 4) * scale, _drawn(30, 4, seed=1) * scale
    assert torch.equal(Shortlist(bank, 2)(queries, 1), nearest(queries, bank)[1])


def test_the_distance_along_some_axes_is_never_above_the_whole() -> None:
    bank, queries = _drawn(200, 8), _drawn(30, 8, seed=1)
    short = Shortlist(bank, 3)
    along = torch.cdist((queries - short.centre) @ short.axes, short.turned)
    assert (along <= torch.cdist(queries, bank) + 1e-5).all()


def test_a_bank_in_torch_stays_exact_and_forgets_its_shortlist_when_it_learns() -> None:
    bank, vectors = Bank(8), _drawn(100, 8)
    bank.learn(vectors, torch.zeros(100, dtype=torch.int64))
    before = bank.search(_drawn(30, 8, seed=1), 2)
    state = set(bank.state_dict())
    bank.shorten(2, 9)
    assert all(map(torch.equal, before, bank.search(_drawn(30, 8, seed=1), 2)))
    assert set(bank.state_dict()) == state
    assert bank.shortlist is not None
    bank.learn(vectors, torch.zeros(100, dtype=torch.int64))
    assert bank.shortlist is None
