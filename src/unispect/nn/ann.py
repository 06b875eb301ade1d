"""Candidates for nearest neighbours from FAISS, an optional package."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from unispect.errors import MissingExtraError


class FaissIndex:
    """A flat FAISS index over a bank, built at the first search and again when the bank has changed."""

    def __init__(self) -> None:
        _faiss()  # where it is missing, say so before anything is learnt
        self._built: tuple[Tensor, int, Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> FaissIndex:
        return FaissIndex()  # what FAISS holds is not copied but built anew

    def __reduce__(self) -> tuple[type[FaissIndex], tuple[()]]:
        return FaissIndex, ()

    def candidates(self, bank: Tensor, queries: Tensor, k: int) -> Tensor:
        """Places of k near vectors of the bank, (m, C), (n, C) -> (n, k); k is at most m."""
        # A loaded state is written into the same tensor; its version tells.
        if self._built is None or self._built[0] is not bank or self._built[1] != bank._version:
            index = _faiss().IndexFlatL2(bank.shape[1])
            index.add(bank.detach().cpu().contiguous().numpy())
            self._built = bank, bank._version, index
        found = self._built[2].search(queries.detach().cpu().contiguous().numpy(), k)[1]
        return torch.from_numpy(found).to(queries.device)


def _faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise MissingExtraError("index='faiss' needs the package faiss: pip install unispect[faiss]") from error
