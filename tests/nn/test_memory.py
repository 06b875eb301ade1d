"""Selection against a naive greedy loop, search against scikit-learn, and a cap that holds whatever comes."""

import copy
import math
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from unispect.errors import ConfigError, MissingExtraError, UnispectError
from unispect.nn import memory
from unispect.nn.memory import Bank, Coreset, fair_shares, gaps, greedy, nearest

MIB = 2**20


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cloud(count: int, channels: int, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, generator=seeded(seed))


def naive_greedy(points: Tensor, count: int, start_points: Tensor) -> list[int]:
    """PatchCore's selection as one reads it, in double precision."""
    x = points.double().numpy()
    gap = np.stack([np.linalg.norm(x - x[start], axis=1) for start in start_points.tolist()]).mean(0)
    chosen = []
    for _ in range(count):
        chosen.append(int(gap.argmax()))
        gap = np.minimum(gap, np.linalg.norm(x - x[chosen[-1]], axis=1))
    return chosen


def covering_radius(points: Tensor, centres: Tensor) -> float:
    return float(torch.cdist(points.double(), centres.double()).amin(1).max())


# Greedy


@pytest.mark.parametrize("active", [1, 7, 1024])
def test_the_greedy_is_the_naive_loop(active: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "ACTIVE", active)
    points, starts = cloud(300, 5) + 20, torch.tensor([3, 50, 7])
    assert greedy(points, 80, seeded(), start_points=starts).tolist() == naive_greedy(points, 80, starts)


def test_the_block_of_distances_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = greedy(cloud(200, 4), 50, seeded())
    monkeypatch.setattr(memory, "BLOCK", 64)
    assert torch.equal(whole, greedy(cloud(200, 4), 50, seeded()))


def test_random_starts_come_from_the_generator() -> None:
    points = cloud(200, 4)
    starts = torch.randperm(200, generator=seeded(5))[:10]
    assert greedy(points, 30, seeded(5)).tolist() == naive_greedy(points, 30, starts)
    assert torch.equal(greedy(points, 30, seeded(5)), greedy(points, 30, seeded(5)))


def test_fewer_points_than_starts_or_count() -> None:
    assert sorted(greedy(cloud(4, 3), 9, seeded()).tolist()) == [0, 1, 2, 3]
    assert greedy(cloud(1, 3), 1, seeded()).tolist() == [0]


def test_duplicates_are_chosen_last_and_none_twice() -> None:
    points = (cloud(6, 64) + 5).repeat(10, 1)
    chosen = greedy(points, 20, seeded())
    assert chosen.dtype == torch.int64
    assert len(set(chosen.tolist())) == 20
    assert len({place % 6 for place in chosen[:6].tolist()}) == 6


def test_constant_points() -> None:
    assert len(set(greedy(torch.full((50, 8), 0.1), 7, seeded()).tolist())) == 7


# Shares


@pytest.mark.parametrize(
    ("sizes", "total", "expected"),
    [([9, 9], 4, [2, 2]), ([1, 9], 6, [1, 5]), ([9, 1, 3], 9, [5, 1, 3]), ([2, 2], 9, [2, 2]), ([5, 5, 5], 4, None)],
)
def test_fair_shares(sizes: list[int], total: int, expected: list[int] | None) -> None:
    shares = fair_shares(sizes, total)
    assert sum(shares) == min(total, sum(sizes))
    assert all(share >= min(size, total // len(sizes)) for share, size in zip(shares, sizes, strict=True))
    assert expected is None or shares == expected


# Coreset


def small(seed: int = 0, share: float = 1.0, most: int = 60, max_ram: float = 0.06) -> Coreset:
    """Room for a few hundred vectors of 12 channels."""
    return Coreset(12, share, most, max_ram, projection=8, start=3, seed=seed)


def filled(coreset: Coreset, vectors: Tensor, product: Tensor, batch: int = 50) -> Coreset:
    """All added in batches; no batch takes it above its caps."""
    for part, labels in zip(vectors.split(batch), product.split(batch), strict=True):
        coreset.add(part, labels)
        assert coreset.held <= coreset.capacity
        assert coreset.held_bytes < 0.06 * MIB
    return coreset


def labels_of(count: int, products: int) -> Tensor:
    return torch.arange(count) % products


def test_what_fits_is_selected_by_one_greedy_run() -> None:
    vectors, product = cloud(130, 12), labels_of(130, 4)
    coreset = filled(small(seed=3, share=0.3), vectors, product)
    expected = greedy(vectors @ coreset.projection, math.ceil(0.3 * 130), seeded(3), 3).sort().values
    chosen, of = coreset.chosen()
    assert coreset.held == 130
    assert torch.equal(chosen, vectors[expected])
    assert torch.equal(of, product[expected])


@pytest.mark.parametrize("channels", [3, 8])
def test_few_channels_are_not_projected(channels: int) -> None:
    assert torch.equal(Coreset(channels, projection=8).projection, torch.eye(channels))


def test_the_projection_keeps_distances_on_average() -> None:
    coreset = Coreset(100, projection=64)
    projected = (cloud(400, 100) @ coreset.projection).norm(dim=1).square()
    torch.testing.assert_close(float(projected.mean()), 100.0, rtol=0.1, atol=0)


@pytest.mark.parametrize(("share", "count"), [(0.1, 13), (0.5, 60), (1.0, 60), (0.001, 1)])
def test_share_and_cap_of_the_selection(share: float, count: int) -> None:
    assert len(filled(small(share=share), cloud(130, 12), labels_of(130, 2)).chosen()[0]) == count


def test_a_round_share_is_not_rounded_up() -> None:
    assert len(filled(small(share=0.1), cloud(30, 12), labels_of(30, 1)).chosen()[0]) == 3


def test_the_grouping_of_batches_does_not_matter_while_all_fits() -> None:
    vectors, product = cloud(130, 12), labels_of(130, 3)
    whole, parts = filled(small(), vectors, product, 130), filled(small(), vectors, product, 7)
    assert torch.equal(whole.chosen()[0], parts.chosen()[0])


@pytest.mark.parametrize("batch", [1, 17, 5000])
def test_ten_times_more_vectors_take_no_more_memory(batch: int) -> None:
    held = []
    for count in (1000, 10_000) if batch > 1 else (500, 1000):
        coreset = filled(small(), cloud(count, 12), labels_of(count, 5), batch)
        assert coreset.seen == count
        assert len(coreset.chosen()[0]) == 60
        held.append(coreset.capacity)
    assert held[0] == held[1]


@pytest.mark.parametrize("seed", range(3))
def test_the_cap_holds_in_any_order(seed: int) -> None:
    order = torch.randperm(2000, generator=seeded(seed))
    coreset = filled(small(), cloud(2000, 12)[order], labels_of(2000, 5)[order].sort().values)
    assert len(coreset.chosen()[0]) == 60


def test_choosing_changes_nothing() -> None:
    coreset = filled(small(), cloud(1000, 12), labels_of(1000, 5))
    first = coreset.chosen()
    assert all(torch.equal(one, other) for one, other in zip(first, coreset.chosen(), strict=True))


def test_a_stream_is_covered_nearly_as_well_as_by_one_run() -> None:
    vectors = cloud(3000, 3)
    coreset = filled(Coreset(3, 1.0, 60, 0.06, start=3), vectors, labels_of(3000, 1))
    assert coreset.capacity < 1000
    best = covering_radius(vectors, vectors[greedy(vectors, 60, seeded())])
    assert covering_radius(vectors, coreset.chosen()[0]) < 2 * best


def test_what_is_covered_already_is_dropped() -> None:
    coreset = filled(small(), cloud(600, 12), labels_of(600, 1))
    centres, held = coreset._parts[0].vectors, coreset.held
    coreset.add(centres + 0.01 * cloud(60, 12, 1), labels_of(60, 1))
    assert coreset.held == held
    coreset.add(centres[:5] + 50, labels_of(5, 1))
    assert coreset.held == held + 5
    coreset.add(centres[:5], torch.ones(5, dtype=torch.int64))
    assert coreset.held == held + 10  # covered, but not for their product, of which these are the first


def test_every_one_of_a_hundred_products_keeps_vectors() -> None:
    centre = 3 * cloud(100, 12, 1)
    product = labels_of(3000, 100).sort().values  # one after the other: the first must make room for the last
    coreset = filled(small(most=150), centre[product] + cloud(3000, 12), product)
    assert coreset.capacity < 3000
    assert coreset.chosen()[1].unique().tolist() == list(range(100))


def test_each_product_keeps_one_where_the_share_is_small() -> None:
    coreset = filled(small(share=1e-4), cloud(1000, 12), labels_of(1000, 20))
    assert coreset.chosen()[1].bincount().tolist() == [1] * 20


def test_a_wild_product_does_not_eat_the_bank() -> None:
    product = labels_of(2000, 4)
    scale = torch.tensor([1.0, 1.0, 1.0, 1e3])[product]
    counts = filled(small(), cloud(2000, 12) * scale[:, None], product).chosen()[1].bincount()
    assert counts.tolist() == [15, 15, 15, 15]


def test_unused_shares_go_to_the_others() -> None:
    product = torch.tensor([0] * 5 + [1] * 995)
    assert filled(small(), cloud(1000, 12), product).chosen()[1].bincount().tolist() == [5, 55]


def test_copies_of_one_vector_and_constants() -> None:
    for vectors in (cloud(20, 12).repeat(50, 1), torch.full((1000, 12), 0.3)):
        chosen, product = filled(small(), vectors, labels_of(1000, 2)).chosen()
        assert len(chosen) == len(product) == 60
        assert covering_radius(vectors, chosen) < 1e-6


def test_held_vectors_keep_no_larger_tensor_alive() -> None:
    coreset, vectors = small(), cloud(1000, 12)
    coreset.add(vectors[:5], labels_of(5, 1))
    before = vectors[0].clone()
    vectors.zero_()
    assert any(torch.equal(row, before) for row in coreset.chosen()[0])
    assert coreset._parts[0].vectors.untyped_storage().nbytes() == 5 * 12 * 4


def test_little_memory_lowers_the_cap() -> None:
    coreset = Coreset(12, 1.0, 20_000, 0.06, projection=8)
    assert 1 < coreset.most < 200
    assert coreset.capacity >= 2 * coreset.most
    assert Coreset(12, 1.0, 20_000, 6.0, projection=8).most > 50 * coreset.most


def test_no_room_at_all() -> None:
    with pytest.raises(ConfigError, match=r"max_ram=0\.001 MiB has no room for vectors of 500 channels"):
        Coreset(500, max_ram=0.001)


def test_more_products_than_vectors() -> None:
    with pytest.raises(ConfigError, match="room for 3 vectors cannot keep one of each of 4 products: raise"):
        small(most=3).add(cloud(4, 12), torch.arange(4))


def test_nothing_to_choose_from() -> None:
    with pytest.raises(UnispectError, match="no vector was added"):
        small().chosen()


# Nearest


@pytest.mark.parametrize("chunk", [1, 500, 1 << 22])
@pytest.mark.parametrize("k", [1, 4])
def test_nearest_is_that_of_sklearn(k: int, chunk: int) -> None:
    queries, bank = cloud(40, 9, 1) + 3, cloud(150, 9, 2) + 3
    oracle = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(bank.double().numpy())
    expected, places = oracle.kneighbors(queries.double().numpy())
    distances, found = nearest(queries, bank, k, chunk)
    assert torch.equal(found, torch.from_numpy(places))
    torch.testing.assert_close(distances, torch.from_numpy(expected).float(), rtol=1e-6, atol=1e-6)


def test_small_distances_are_not_lost_in_rounding() -> None:
    bank = cloud(200, 64) + 100
    queries = torch.cat([bank[:50], bank[:50] + 1e-3])
    distances, places = nearest(queries, bank)
    direct = (queries.double() - bank.double()[places[:, 0]]).norm(dim=1)
    assert places[:, 0].tolist() == list(range(50)) * 2
    assert not distances[:50].any()
    torch.testing.assert_close(distances[:, 0].double(), direct, rtol=0, atol=1e-6)


def test_a_query_finds_the_same_in_any_batch() -> None:
    queries, bank = cloud(64, 33, 1), cloud(500, 33, 2)
    whole = nearest(queries, bank, 3)
    rows = [nearest(query[None], bank, 3) for query in queries]
    torch.testing.assert_close(whole[0], torch.cat([row[0] for row in rows]), rtol=0, atol=1e-6)
    assert torch.equal(whole[1], torch.cat([row[1] for row in rows]))


def test_of_equals_the_first_is_found() -> None:
    distances, places = nearest(torch.zeros(3, 4), torch.ones(5, 4), 2)
    assert places.tolist() == [[0, 1]] * 3
    assert distances.tolist() == [[2.0, 2.0]] * 3


def test_no_more_neighbours_than_vectors_and_no_query() -> None:
    assert nearest(cloud(7, 4), cloud(2, 4, 1), 5)[0].shape == (7, 2)
    assert nearest(cloud(0, 4), cloud(2, 4, 1), 1)[1].shape == (0, 1)


# Bank


def learnt_bank(index: str = "exact") -> Bank:
    bank = Bank(6, index)
    bank.learn(cloud(50, 6), labels_of(50, 3))
    return bank


def test_a_bank_is_empty_before_learning() -> None:
    bank = Bank(6)
    assert bank.vectors.shape == (0, 6)
    assert bank.product.shape == (0,)
    assert bank.product.dtype == torch.int64
    with pytest.raises(UnispectError, match="the bank is empty"):
        bank.search(cloud(1, 6))


def test_a_bank_goes_round() -> None:
    bank, other = learnt_bank(), Bank(6)
    other.load_state_dict(bank.state_dict())
    queries = cloud(9, 6, 1)
    assert torch.equal(other.product, bank.product)
    assert all(torch.equal(a, b) for a, b in zip(bank.search(queries, 2), other.search(queries, 2), strict=True))


def test_an_unknown_index() -> None:
    with pytest.raises(ConfigError, match="unknown index 'fais': did you mean 'faiss'"):
        Bank(6, "fais")


def test_faiss_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtraError, match=r"index='faiss' needs .*: pip install unispect\[faiss\]"):
        Bank(6, "faiss")


class ToyFlat:
    """What is used of faiss.IndexFlatL2, for where FAISS is not installed."""

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def add(self, vectors: np.ndarray) -> None:
        self.vectors = vectors.copy()

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        squared = ((queries[:, None] - self.vectors) ** 2).sum(2)
        places = squared.argsort(1)[:, :k]
        return np.take_along_axis(squared, places, 1), places

    def __deepcopy__(self, memo: Any) -> None:
        raise TypeError("cannot be copied")


@pytest.fixture(params=["toy", "real"])
def faiss(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "real":
        pytest.importorskip("faiss")
    else:
        monkeypatch.setitem(sys.modules, "faiss", SimpleNamespace(IndexFlatL2=ToyFlat))  # type: ignore[arg-type]


def assert_same_search(one: Bank, other: Bank) -> None:
    queries = torch.cat([cloud(9, 6, 1), one.vectors[:3]])
    for k in (1, 3, 60):
        (distances, places), (expected, found) = one.search(queries, k), other.search(queries, k)
        torch.testing.assert_close(distances, expected, rtol=0, atol=1e-6)
        assert torch.equal(places, found)


@pytest.mark.usefixtures("faiss")
def test_faiss_finds_what_the_exact_search_finds() -> None:
    assert_same_search(learnt_bank("faiss"), learnt_bank())
    assert_same_search(copy.deepcopy(learnt_bank("faiss")), learnt_bank())


@pytest.mark.usefixtures("faiss")
def test_faiss_notices_that_the_bank_has_changed() -> None:
    bank, other = learnt_bank("faiss"), Bank(6)
    bank.search(cloud(1, 6))
    copy.deepcopy(bank)
    other.learn(cloud(50, 6, 8), labels_of(50, 3))
    bank.load_state_dict(other.state_dict())
    assert_same_search(bank, other)
    bank.learn(cloud(30, 6, 9), labels_of(30, 3))
    other.learn(cloud(30, 6, 9), labels_of(30, 3))
    assert_same_search(bank, other)


@pytest.mark.parametrize("chunk", [1 << 22, 50])
def test_gaps_are_those_of_a_plain_search(chunk: int) -> None:
    bank = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) + 5
    bank[7] = bank[3]
    expected = NearestNeighbors(n_neighbors=6).fit(bank).kneighbors(bank)[0][:, 1:]
    torch.testing.assert_close(gaps(bank, 5, chunk), torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-4)
    assert float(gaps(bank, 5, chunk)[7, 0]) == 0
