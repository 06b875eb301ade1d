"""Buffers take the size of what is loaded, and nothing else about loading changes."""

import pytest
import torch
from torch import Tensor, nn

from unispect.nn.buffers import Learnt


class Bank(Learnt):
    """A bank of vectors, empty at first, and a number of each."""

    vectors: Tensor
    numbers: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(0, 3))
        self.register_buffer("numbers", torch.zeros(0, dtype=torch.int64))


def filled(count: int, dtype: torch.dtype = torch.float32) -> Bank:
    bank = Bank()
    bank.vectors = torch.arange(3 * count).reshape(count, 3).to(dtype)
    bank.numbers = torch.arange(count)
    return bank


@pytest.mark.parametrize(("held", "loaded"), [(0, 4), (4, 0), (2, 5), (5, 2), (3, 3)])
def test_sizes_are_those_of_what_is_loaded(held: int, loaded: int) -> None:
    bank, source = filled(held), filled(loaded)
    bank.load_state_dict(source.state_dict())
    assert torch.equal(bank.vectors, source.vectors)
    assert torch.equal(bank.numbers, source.numbers)
    assert bank.state_dict().keys() == source.state_dict().keys()


def test_it_works_inside_other_modules() -> None:
    outer, source = (
        nn.ModuleDict({"a": nn.Sequential(Bank(), Bank())}),
        nn.ModuleDict({"a": nn.Sequential(filled(2), filled(7))}),
    )
    outer.load_state_dict(source.state_dict())
    for name, value in source.state_dict().items():
        assert torch.equal(outer.state_dict()[name], value)


def test_what_is_loaded_is_copied() -> None:
    bank, source = Bank(), filled(2)
    bank.load_state_dict(source.state_dict())
    source.vectors += 1
    assert not torch.equal(bank.vectors, source.vectors)


def test_types_stay_those_of_the_buffers() -> None:
    bank = Bank()
    bank.load_state_dict(filled(4, torch.float64).state_dict())
    assert bank.vectors.dtype == torch.float32
    assert bank.numbers.dtype == torch.int64


def test_missing_and_unexpected_names_are_still_refused() -> None:
    state = filled(2).state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*numbers"):
        Bank().load_state_dict({"vectors": state["vectors"]})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*extra"):
        Bank().load_state_dict({**state, "extra": torch.zeros(1)})


def test_parameters_keep_their_size() -> None:
    class Weighted(Learnt):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(size))
            self.register_buffer("bank", torch.zeros(size))

    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        Weighted(2).load_state_dict(Weighted(3).state_dict())
