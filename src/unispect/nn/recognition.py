"""Which product an image shows: one Gaussian a product on vectors pooled over the image, learnt in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from unispect.nn.gaussian import Moments, ledoit_wolf, shrunk, whitening
from unispect.types import Features


def pooled(features: Features) -> list[Tensor]:
    """Mean over the places of every level, each (N, C)."""
    return [level.mean((2, 3)) for level in features]


class Recogniser(nn.Module):
    """log p(product | image) under a Gaussian for each product and level, covariances after Ledoit and Wolf.

    To the variances of n images is added the mean square of their mean vector over n^2, so that few images do not make a
    Gaussian that only they fit.

    What it knows of a product depends on the images of that product alone, one after the other: products come and go
    without a bit of change in the others.

    channels   C of each level
    """

    def __init__(self, channels: Sequence[int], products: int) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.products = nn.ModuleList(_Product(self.channels) for _ in range(products))
        self._sums: dict[int, list[Moments]] = {}

    def update(self, features: Features, product: Tensor) -> None:
        """Take in a batch of levels (N, C, h, w) and products (N,)."""
        levels = pooled(features)
        for row, y in enumerate(product.tolist()):
            vectors = [level[row].double() for level in levels]
            sums = self._sums.setdefault(y, [Moments(1, len(vector), vector) for vector in vectors])
            for moments, vector in zip(sums, vectors, strict=True):
                moments.add(torch.tensor([0]), vector[None, None])

    def finish(self) -> None:
        """Gaussians from the sums; the sums are let go."""
        for y, sums in self._sums.items():
            self._product(y).learn(sums)
        self._sums = {}

    def forward(self, features: Features) -> Tensor:
        """(N, K) log-probabilities; the largest is the guess."""
        normalised: Tensor = self.likelihoods(features).double().log_softmax(1).float()
        return normalised

    def likelihoods(self, features: Features) -> Tensor:
        """(N, K) log-likelihoods under each product, up to a constant."""
        levels = pooled(features)
        parts = [self._product(y) for y in range(len(self.products))]
        if torch.compiler.is_exporting():
            return _together(parts, levels)
        return torch.stack([part(levels) for part in parts], dim=1)

    def add(self, other: Recogniser) -> None:
        """The products of another, after one's own."""
        self.products.extend(deepcopy(other.products))

    def remove(self, product: int) -> None:
        """Forget a product; later ones move up."""
        del self.products[product]

    def _product(self, number: int) -> _Product:
        part = self.products[number]
        assert isinstance(part, _Product)
        return part


class _Product(nn.Module):
    """The Gaussians of one product."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.levels = len(channels)
        for number, width in enumerate(channels):
            self.register_buffer(f"mean{number}", torch.zeros(width))
            self.register_buffer(f"whiten{number}", torch.eye(width))
        self.register_buffer("log_volume", torch.tensor(-torch.inf))  # nothing learnt: never the guess

    def learn(self, sums: Sequence[Moments]) -> None:
        volume = torch.zeros((), dtype=torch.float64)
        for number, moments in enumerate(sums):
            mean, covariance, count = moments.mean()[0], moments.covariance()[0], float(moments.count[0])
            shrinkage = ledoit_wolf(covariance, float(moments.fourth()[0]), count) if count > 2 else 1.0
            # One image or copies of it say nothing of how images differ: what few of them show is not taken for all.
            unseen = max(float(mean.square().mean()) / count**2, 1e-12)
            whiten = whitening(shrunk(covariance, shrinkage) + unseen * torch.eye(len(mean), dtype=torch.float64))
            volume += torch.linalg.slogdet(whiten)[1]
            self.get_buffer(f"mean{number}").copy_(mean)
            self.get_buffer(f"whiten{number}").copy_(whiten)
        self.get_buffer("log_volume").copy_(volume)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Log-likelihood up to a constant, (N,)."""
        total = self.get_buffer("log_volume").expand(len(levels[0]))
        for number, level in enumerate(levels):
            white = (level - self.get_buffer(f"mean{number}")) @ self.get_buffer(f"whiten{number}").T
            total = total - white.square().sum(1) / 2
        return total


def _together(parts: Sequence[_Product], levels: Sequence[Tensor]) -> Tensor:
    """Log-likelihoods under all products, (N, K), in few and large matrix products."""
    total = torch.stack([part.get_buffer("log_volume") for part in parts])
    for number, level in enumerate(levels):
        mean = torch.stack([part.get_buffer(f"mean{number}") for part in parts])
        whiten = torch.stack([part.get_buffer(f"whiten{number}") for part in parts])
        white = (level - mean[:, None]) @ whiten.mT
        total = total - white.square().sum(2).T / 2
    return total
