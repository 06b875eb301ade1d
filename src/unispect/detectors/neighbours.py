"""Distance of each patch to its nearest normal ones, in units of what is usual among those: PatchCore made relative.

A memory bank as in Towards total recall in industrial anomaly detection (Roth et al., 2022), https://arxiv.org/abs/2106.08265,
one for each product, of features whose channels are half-way whitened. The unit is the idea of LOF: identifying
density-based local outliers (Breunig, Kriegel, Ng, Sander, 2000): a gap that is large between patches of a plain
surface is nothing between patches of a rough one.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from unispect.detectors.base import StatisticalDetector, check_counts, check_shares, largest_grid, with_places
from unispect.errors import ConfigError, UnispectError
from unispect.nn.gaussian import Moments
from unispect.nn.growth import AROUND, SEARCH, Growth, Work, together
from unispect.nn.maps import magnified, top_mean
from unispect.nn.memory import Coreset
from unispect.nn.neighbourhood import Neighbourhood, distances
from unispect.nn.recognition import Recogniser
from unispect.types import Features, Scores


class Neighbours(StatisticalDetector):
    """Mean distance to the nearest of the product's bank over the distance that is usual around them.

    Two passes: the covariance of each product, then its coreset.

    shapes        (C, h, w) of each level; the dense ones are used, brought to the largest grid, or the pooled ones
                  where there is none
    products      K, number of products, known in training only; the product of an image is recognised from its pooled
                  features
    neighbours    nearest vectors whose distance is averaged
    support       nearest vectors over which the usual distance is averaged
    around        others in the bank to which the usual distance of a vector is measured
    whitening     0: features as they are, each level at one scale; 1: fully whitened; 0.5: half-way
    bank_images        size of a product's bank: as many patches as this number of images has, fewer where it has fewer
    max_bank_vectors   in all banks together; of many products each has an equal share
    max_ram       MiB for the patches held while the coresets are chosen, all products together
    projection    channels of the random projection in which coresets are chosen
    top           share of the highest places that make the image score
    map_side, sigma   side of the score map and its blur, pixels
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        products: int,
        neighbours: int = 3,
        support: int = 20,
        around: int = 50,
        whitening: float = 0.5,
        bank_images: float = 15.0,
        max_bank_vectors: int = 400_000,
        max_ram: float = 1024.0,
        projection: int = 32,
        top: float = 0.01,
        map_side: int = 256,
        sigma: float = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_counts(neighbours=neighbours, support=support, around=around)
        check_shares(top=top)
        if not 0 <= whitening <= 1:
            raise ConfigError(f"whitening: got {whitening}, expected a number from 0 to 1")
        if not bank_images > 0:
            raise ConfigError(f"bank_images: got {bank_images}, expected a number above 0")
        if max_bank_vectors < products:
            raise ConfigError(f"max_bank_vectors: got {max_bank_vectors}, expected one for each of {products} products")
        self.neighbours, self.support, self.around, self.whitening = neighbours, support, around, whitening
        self.projection, self.top, self.seed = projection, top, seed
        self.map_side, self.sigma = map_side, sigma
        self.levels = with_places(shapes)
        self.widths = [shapes[number][0] for number in self.levels]
        self.grid = largest_grid(shapes, self.levels)
        wanted = max(1, round(bank_images * self.grid[0] * self.grid[1]))
        self.most, self.max_ram = min(wanted, max_bank_vectors // products), max_ram / products
        self.recogniser = Recogniser([channels for channels, _, _ in shapes], products)
        self.products = nn.ModuleList(Neighbourhood(sum(self.widths)) for _ in range(products))
        self._sums: dict[int, Moments] = {}
        self._coresets: dict[int, Coreset] = {}

    def product(self, number: int) -> Neighbourhood:
        """What is known of a product."""
        part = self.products[number]
        assert isinstance(part, Neighbourhood)
        return part

    def embed(self, features: Features) -> Tensor:
        """Vectors of all places, L levels (N, C, h, w) -> (N, h*w, C of all levels)."""
        levels = [features[number] for number in self.levels]
        return torch.cat([self._resized(level) for level in levels], 1).flatten(2).mT

    def _resized(self, level: Tensor) -> Tensor:
        if level.shape[2:] == self.grid:
            return level
        return interpolate(level, self.grid, mode="bilinear", align_corners=False)

    # Learning, image by image: what is learnt of a product does not depend on what shares a batch with it.

    def growth(self, images: Sequence[int]) -> Growth:
        """What so many images of each product will take, before any was seen."""
        places, channels = self.grid[0] * self.grid[1], sum(self.widths)
        chosen = together(self._empty().growth(places * count) for count in images)
        banks = [min(self.most, places * count) for count in images]
        usual = [Work(AROUND, bank, bank, channels) for bank in banks]
        scoring = (Work(SEARCH, places, max(banks, default=0), channels),)
        return Growth(chosen.held, chosen.learnt + 4 * sum(banks), (*chosen.learning, *usual), scoring)

    @torch.no_grad()
    def update(self, features: Features, product: Tensor) -> None:
        """Take in a batch: sums in the first pass, candidates for the banks in the second."""
        if not self._coresets:
            self.recogniser.update(features, product)
        for vectors, y in zip(self.embed(features), product.tolist(), strict=True):
            if self._coresets:
                self._coresets[y].add(self.product(y).white(vectors), torch.zeros(len(vectors), dtype=torch.int64))
                continue
            if y not in self._sums:
                self._sums[y] = Moments(1, vectors.shape[1], vectors.double().mean(0))
            self._sums[y].add(torch.tensor([0]), vectors[None])

    @torch.no_grad()
    def finish(self) -> bool:
        """After the first pass the features can be whitened, after the second the banks are chosen."""
        if self._coresets:
            for y, coreset in self._coresets.items():
                self.product(y).keep(coreset.chosen()[0], self.around)
            self._coresets = {}
            return False
        if not self._sums:
            raise UnispectError("neighbours saw no image: call update with normal images before finish")
        self.recogniser.finish()
        for y, moments in self._sums.items():
            self.product(y).measure(moments, self.widths, self.whitening)
        self._coresets, self._sums = {y: self._empty() for y in self._sums}, {}
        return True

    def _empty(self) -> Coreset:
        return Coreset(sum(self.widths), 1.0, self.most, self.max_ram, self.projection, seed=self.seed)

    # Products that come and go.

    def add(self, other: Neighbours) -> None:
        """The products of another detector of the same settings, after one's own, which are not touched."""
        self.recogniser.add(other.recogniser)
        self.products.extend(deepcopy(other.products))

    def remove(self, product: int) -> None:
        """Forget a product; the numbers of later ones fall by one."""
        self.recogniser.remove(product)
        del self.products[product]

    # Scoring.

    @torch.no_grad()
    def forward(self, features: Features) -> Scores:
        """L levels (N, C, h, w) -> scores with maps (N, side, side)."""
        products = self.recogniser(features)
        given = self.forward_given(features, products.argmax(1))
        return Scores(given.image, given.maps, products)

    @torch.no_grad()
    def forward_given(self, features: Features, product: Tensor) -> Scores:
        """Scores under a product (N,)."""
        parts = [self.product(y) for y in range(len(self.products))]
        if not all(len(part.bank) for part in _asked(parts, product)):
            raise UnispectError("neighbours has learnt nothing yet: fit it on normal images first")
        found = distances(parts, self.embed(features), product, self.neighbours, self.support).unflatten(1, self.grid)
        return Scores(top_mean(found, self.top), magnified(found, self.map_side, self.sigma, aligned=False))


def _asked(parts: Sequence[Neighbourhood], product: Tensor) -> Sequence[Neighbourhood]:
    """Those of the products (N,); in an exported graph, which knows no image yet, all of them."""
    return parts if torch.compiler.is_exporting() else [parts[y] for y in product.tolist()]
