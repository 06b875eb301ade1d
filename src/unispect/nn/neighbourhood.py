"""Normal vectors of one product that stand for all: distances to them in units of what is usual around them.

Each is the centre of a Gaussian with a spread of its own, the mean distance to its neighbours; a vector is as far out as its
nearest centres say, in their units. LOF: identifying density-based local outliers (Breunig, Kriegel, Ng, Sander, 2000).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unispect.nn.buffers import Learnt
from unispect.nn.gaussian import Moments
from unispect.nn.memory import gaps, nearest
from unispect.nn.routing import smallest, stacked, taken

FLOOR = 1e-4  # of the mean variance: a direction with less counts as having that
FAR = 1e30  # half the squared norm of a vector that only fills up a bank
PLAIN = 0.3  # of the mean local distance is added to each, so that duplicates do not make it 0


class Neighbourhood(Learnt):
    """Normal patches of one product: a linear map of the features, a coreset in it and the distances usual there."""

    shift: Tensor
    whiten: Tensor
    bank: Tensor
    usual: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(channels))
        self.register_buffer("whiten", torch.zeros(channels, channels))
        self.register_buffer("bank", torch.zeros(0, channels))
        self.register_buffer("usual", torch.zeros(0))

    def white(self, vectors: Tensor) -> Tensor:
        """(n, C) -> (n, C)."""
        return (vectors - self.shift) @ self.whiten

    def measure(self, moments: Moments, widths: Sequence[int], power: float) -> None:
        """Each level to a total variance of 1, then the covariance to its power 1 - `power`, whose trace becomes 1."""
        covariance = moments.covariance()[0]
        blocks = covariance.diagonal().split(list(widths))
        scale = torch.cat([block.sum().clamp(min=1e-12).rsqrt().expand(len(block)) for block in blocks])
        values, vectors = torch.linalg.eigh(scale[:, None] * covariance * scale)
        values = values.clamp(min=max(FLOOR * float(values.mean()), 1e-12))
        root = (vectors * values.pow(-power / 2)) @ vectors.mT / values.pow(1 - power).sum().sqrt()
        self.shift = moments.mean()[0].float()
        self.whiten = (scale[:, None] * root).float()

    def keep(self, bank: Tensor, around: int) -> None:
        """Hold a coreset (m, C), and the mean distance of each of its vectors to the `around` nearest others."""
        self.bank = bank
        if len(bank) == 1:
            self.usual = bank.new_ones(1)
            return
        self.usual = gaps(bank, min(around, len(bank) - 1)).mean(1)

    def forward(self, vectors: Tensor, neighbours: int, support: int) -> Tensor:
        """Relative distance of vectors, (n, C) -> (n,)."""
        distances, places = nearest(self.white(vectors), self.bank, max(neighbours, support))
        usual: Tensor = self.usual[places[:, :support]].mean(1) + PLAIN * self.usual.mean() + 1e-6
        return distances[:, :neighbours].mean(1) / usual


def distances(parts: Sequence[Neighbourhood], vectors: Tensor, product: Tensor, neighbours: int, support: int) -> Tensor:
    """Relative distances of vectors (N, p, C) of images to what is known of their products (N,), (N, p)."""
    if torch.compiler.is_exporting():
        return _routed(parts, vectors, product, neighbours, support)
    pairs = zip(vectors, product.tolist(), strict=True)
    return torch.stack([parts[y](image, neighbours, support) for image, y in pairs])


def _routed(parts: Sequence[Neighbourhood], vectors: Tensor, product: Tensor, neighbours: int, support: int) -> Tensor:
    """The same by one product of matrices for all images, in shapes alone."""
    shift, whiten = (taken([part.get_buffer(name) for part in parts], product) for name in ("shift", "whiten"))
    white = (vectors - shift[:, None]) @ whiten
    banks = torch.cat([stacked([part.bank for part in parts]), stacked([_half_norms(part) for part in parts], FAR)], 2)
    queries = torch.cat([-white, torch.ones_like(white[..., :1])], 2)
    bank = banks.index_select(0, product)
    closeness = bank @ queries.mT  # half the squared distance but for the query's own norm
    _, places = smallest(closeness, min(max(neighbours, support), banks.shape[1]))
    places = places.mT + banks.shape[1] * torch.arange(bank.shape[0], device=bank.device)[:, None, None]
    near = bank.flatten(0, 1)[places[..., :neighbours]][..., :-1]
    distance = torch.linalg.vector_norm(near - white[:, :, None], dim=3)
    usual = stacked([part.usual for part in parts]).index_select(0, product).flatten()[places[..., :support]]
    plain = taken([part.usual.mean() for part in parts], product)[:, None]
    return _mean(distance, parts, product) / (_mean(usual, parts, product) + PLAIN * plain + 1e-6)


def _half_norms(part: Neighbourhood) -> Tensor:
    """Half the squared norm of each vector of the bank, (m, 1)."""
    return part.bank.square().sum(1, keepdim=True) / 2


def _mean(values: Tensor, parts: Sequence[Neighbourhood], product: Tensor) -> Tensor:
    """Mean of the first values (N, p, k), as many as the product has vectors, (N, p)."""
    most = values.shape[2]
    held = [min(most, part.bank.shape[0]) for part in parts]
    if min(held) == most:
        return values.mean(2)
    weights = [[(place < count) / max(count, 1) for place in range(most)] for count in held]
    return (values * torch.tensor(weights).to(values).index_select(0, product)[:, None]).sum(2)
