"""Many centres inside each product, set where its normal vectors lie, and the scales of their distances out of fold.

Where a product has as many centres as it has kinds of vectors, the mixture inside it is a kernel density: what counts of a
vector is how far the nearest centres are, in the spread that is usual around them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unispect.nn.gaussian import Moments
from unispect.nn.memory import Coreset, greedy
from unispect.nn.neighbourhood import Neighbourhood

POOL = 32  # channels of the random projection in which centres are chosen


class Crowds(nn.Module):
    """Centres of one level. Learnt in three passes: covariances, vectors to choose from, distances out of fold.

    channels, products   C and K
    most                 centres of a product at the most
    folds                parts of each product's images that take turns in being scored by the centres of the others
    whitening            power of the covariance that is taken out of the vectors (see nn.neighbourhood)
    neighbours           nearest centres whose distance is averaged
    support              nearest centres over which the usual distance is averaged
    around               others to which the usual distance of a centre is measured
    max_ram              MiB for the vectors held while centres are chosen, all products together
    """

    def __init__(
        self,
        channels: int,
        products: int,
        most: int,
        folds: int = 4,
        whitening: float = 0.5,
        neighbours: int = 3,
        support: int = 20,
        around: int = 50,
        max_ram: float = 2048.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.channels, self.most, self.folds, self.whitening = channels, most, folds, whitening
        self.neighbours, self.support, self.around = neighbours, support, around
        self.max_ram, self.seed = max_ram / products, seed
        self.products = nn.ModuleList(Neighbourhood(channels) for _ in range(products))
        self._sums: dict[int, Moments] = {}
        self._pools: dict[int, Coreset] = {}
        self._folded: dict[tuple[int, int], Neighbourhood] = {}

    @property
    def learnt(self) -> bool:
        """Whether centres have been set."""
        return any(len(self.product(y).bank) for y in range(len(self.products)))

    def product(self, number: int) -> Neighbourhood:
        """The centres of a product."""
        part = self.products[number]
        assert isinstance(part, Neighbourhood)
        return part

    # Learning.

    def measure(self, vectors: Tensor, product: Tensor, fold: Tensor) -> None:
        """First pass: sums of vectors (N, p, C) of images of products (N,) in folds (N,)."""
        for image, y, part in zip(vectors, product.tolist(), fold.tolist(), strict=True):
            if y not in self._sums:
                self._sums[y] = Moments(self.folds, self.channels, image.double().mean(0))
            self._sums[y].add(torch.tensor([part]), image[None])

    def collect(self, vectors: Tensor, product: Tensor, fold: Tensor) -> None:
        """Second pass: vectors to choose centres from."""
        for image, y, part in zip(vectors, product.tolist(), fold.tolist(), strict=True):
            if y not in self._pools:
                self._pools[y] = Coreset(self.channels, 1.0, 2**62, self.max_ram, POOL, seed=self.seed)
            self._pools[y].add(image, torch.full((len(image),), part))

    def choose(self) -> None:
        """After the second pass: the centres of each product, and those of all folds but one for each fold."""
        while self._pools:
            y, pool = self._pools.popitem()
            vectors, fold = pool.chosen()
            del pool
            for part in fold.unique().tolist() if len(fold.unique()) > 1 else []:
                self._folded[y, part] = Neighbourhood(self.channels)
                self._settle(self._folded[y, part], vectors[fold != part], self._sums[y].without(part))
            self._settle(self.product(y), vectors, self._sums[y].joined())
        self._sums = {}

    def _settle(self, part: Neighbourhood, vectors: Tensor, moments: Moments) -> None:
        part.measure(moments, [self.channels], self.whitening)
        white = part.white(vectors)
        if len(white) > self.most:
            generator = torch.Generator().manual_seed(self.seed)
            sketch = white
            if self.channels > POOL:
                sketch = white @ torch.randn(self.channels, POOL, generator=generator)
            white = white[greedy(sketch, self.most, generator)]
        part.keep(white, self.around)

    def held_back(self, vectors: Tensor, product: Tensor, fold: Tensor) -> Tensor:
        """Third pass: distances of vectors (N, p, C) to the centres of the other folds, (N, p).

        A product with images in one fold only has no other: its own centres are asked.
        """
        rows = []
        for image, y, part in zip(vectors, product.tolist(), fold.tolist(), strict=True):
            rows.append(self._distance(self._folded.get((y, part), self.product(y)), image))
        return torch.stack(rows)

    def done(self) -> None:
        """After the third pass: what served the folds is let go."""
        self._folded = {}

    # Scoring.

    def forward(self, vectors: Tensor, product: Tensor) -> Tensor:
        """Distances of vectors (N, p, C) to the centres of products (N,), in their units, (N, p)."""
        pairs = zip(vectors, product.tolist(), strict=True)
        return torch.stack([self._distance(self.product(y), image) for image, y in pairs])

    def _distance(self, part: Neighbourhood, vectors: Tensor) -> Tensor:
        distance: Tensor = part(vectors, self.neighbours, self.support)
        return distance
