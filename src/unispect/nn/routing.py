"""What is known of each product, brought to the images of it without a look at which products those are.

A graph of fixed nodes, as an exported model is one, cannot choose code image by image: what is known of all products
becomes one tensor, (K, ...), of which every image takes its own row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FOLD, ENOUGH = 4, 8  # values that are folded into one; multiples of k from which on it pays


def stacked(tensors: Sequence[Tensor], fill: float = 0.0) -> Tensor:
    """One tensor a product, (m, ...) where m may differ, filled up to the longest: (K, M, ...)."""
    longest = max(tensor.shape[0] for tensor in tensors)
    rest = [0, 0] * (tensors[0].dim() - 1)
    return torch.stack([F.pad(tensor, (*rest, 0, longest - tensor.shape[0]), value=fill) for tensor in tensors])


def taken(tensors: Sequence[Tensor], product: Tensor) -> Tensor:
    """For each image the tensor of its product, all of one shape, (N,) -> (N, ...)."""
    return torch.stack(list(tensors)).index_select(0, product)


def smallest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest in columns, ascending, and their places, (N, m, p) -> (N, k, p), (N, k, p); k is at most m.

    They lie in the k groups whose smallest values are smallest, so few values have to be ordered.
    """
    size = values.shape[1]
    if size < ENOUGH * k or size % FOLD:
        return values.topk(k, dim=1, largest=False)
    groups = size // FOLD
    found = smallest(values.unflatten(1, (FOLD, groups)).amin(1), k)[1]
    member = groups * torch.arange(FOLD, device=values.device)[:, None, None]
    places = (found[:, None] + member).flatten(1, 2)
    least, order = values.gather(1, places).topk(k, dim=1, largest=False)
    return least, places.gather(1, order)
