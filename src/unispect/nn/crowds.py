"""Many centres inside each product, set where its normal vectors lie, and the scales of their distances out of fold.

Where a product has as many centres as it has kinds of vectors, the mixture inside it is a kernel density: what counts of a
vector is how far the nearest centres are, in the spread that is usual around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from unispect.errors import ConfigError
from unispect.nn.alignment import Alignment, finest, scales_of, without_itself
from unispect.nn.gaussian import Moments
from unispect.nn.growth import AROUND, COVER, SEARCH, Growth, Work, together
from unispect.nn.maps import magnified, top_mean, upsampled
from unispect.nn.memory import Coreset, greedy
from unispect.nn.neighbourhood import Neighbourhood, distances
from unispect.types import Scores

Labelled: TypeAlias = tuple[Sequence[Tensor], Tensor, Tensor]  # vectors of each level, products, folds

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

    def growth(self, places: int, images: Sequence[int]) -> Growth:
        """What so many images of each product will take, each of so many vectors."""
        held, learnt, learning, largest = 0, 0, [], 0
        vector = 4 * (self.channels + 1)
        for count in images:
            pool = self._pool().growth(places * count)
            whole = pool.learnt // (4 * self.channels)
            # A single image is in one fold, and leaves no other.
            folded = [whole * (self.folds - 1) // self.folds] * self.folds if count > 1 else []
            sizes = [whole, *folded]
            banks = [min(self.most, size) for size in sizes]
            # The vectors to choose from, whitened and sketched, once the pool has been let go.
            held += max(pool.held, vector * sum(banks))
            largest = max(largest, whole * (2 * vector + 4 * POOL))
            learnt += vector * banks[0]
            pairs = zip(sizes, banks, strict=True)
            learning += [Work(COVER, size, bank, min(POOL, self.channels)) for size, bank in pairs if bank < size]
            learning += [Work(AROUND, bank, bank, self.channels) for bank in banks]
            learning += [*pool.learning, Work(SEARCH, places * count, banks[-1], self.channels)]
        scoring = Work(SEARCH, places, min(self.most, places * max(images, default=0)), self.channels)
        return Growth(held + largest, learnt, tuple(learning), (scoring,))

    def _pool(self) -> Coreset:
        return Coreset(self.channels, 1.0, 2**62, self.max_ram, POOL, seed=self.seed)

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
                self._pools[y] = self._pool()
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
        parts = [self.product(y) for y in range(len(self.products))]
        return distances(parts, vectors, product, self.neighbours, self.support)

    def _distance(self, part: Neighbourhood, vectors: Tensor) -> Tensor:
        distance: Tensor = part(vectors, self.neighbours, self.support)
        return distance


class Nearest(nn.Module):
    """Images judged by how far their vectors are from the nearest centres of a product, every place at its own scale.

    shapes        (C, h, w) of each level
    crowd         centres of a product: as many as this number of images has vectors
    max_centres   of a level, all products together; of many products each has an equal share
    place_prior   images that the scale of a place must outvote to leave that of all places
    statistics    images of a product at the most whose out-of-fold maps are kept for its scales
    max_ram       MiB for the vectors that centres are chosen from, all products and levels together
    top           share of the highest places that make the score of an image
    map_side, sigma   side of the score map and its blur, pixels
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        products: int,
        crowd: float,
        max_centres: int,
        folds: int,
        place_prior: float,
        statistics: int,
        max_ram: float,
        top: float,
        map_side: int,
        sigma: float,
        seed: int,
    ) -> None:
        super().__init__()
        _check(products, crowd, max_centres, folds, place_prior, statistics)
        self.grids, self.side = [shape[1:] for shape in shapes], finest(shapes)
        self.place_prior, self.statistics, self.top = place_prior, statistics, top
        self.map_side, self.sigma = map_side, sigma
        most, share = max_centres // products, max_ram / len(shapes)
        self.crowds = nn.ModuleList(
            Crowds(channels, products, min(max(1, round(crowd * h * w)), most), folds, max_ram=share, seed=seed)
            for channels, h, w in shapes
        )
        self.alignments = nn.ModuleList(Alignment(len(shapes), self.side) for _ in range(products))

    def growth(self, images: Sequence[int]) -> Growth:
        """What so many images of each product will take, before any was seen."""
        pairs = zip(self._crowds(), self.grids, strict=True)
        crowds = together(crowd.growth(height * width, images) for crowd, (height, width) in pairs)
        one = 4 * len(self.grids) * self.side**2
        kept = [min(count, self.statistics) for count in images]
        # Maps of all products, and those of one several times over in double precision.
        maps = one * (sum(kept) + 8 * max(kept, default=0))
        return Growth(crowds.held + maps, crowds.learnt, crowds.learning, crowds.scoring)

    def learn(self, passes: Callable[[], Iterable[Labelled]]) -> None:
        """Centres of each product and, from the distances of images that had no part in them, all scales.

        passes   vectors (N, h*w, C) of each level, products (N,) and folds (N,), batch by batch; three times the same
        """
        for vectors, product, fold in passes():
            for crowd, level in zip(self._crowds(), vectors, strict=True):
                crowd.measure(level, product, fold)
        for vectors, product, fold in passes():
            for crowd, level in zip(self._crowds(), vectors, strict=True):
                crowd.collect(level, product, fold)
        for crowd in self._crowds():
            crowd.choose()
        for y, maps in self._out_of_fold(passes()).items():
            self._align(self._alignment(y), torch.stack(maps))
        for crowd in self._crowds():
            crowd.done()

    def _out_of_fold(self, batches: Iterable[Labelled]) -> dict[int, list[Tensor]]:
        """Maps (L, g, g) of each product's images, by the centres of the other folds."""
        kept: dict[int, list[Tensor]] = {}
        for vectors, product, fold in batches:
            pairs = zip(self._crowds(), vectors, strict=True)
            maps = self._maps([crowd.held_back(level, product, fold) for crowd, level in pairs])
            for row, y in zip(maps, product.tolist(), strict=True):
                if len(kept.setdefault(y, [])) < self.statistics:
                    kept[y].append(row)
        return kept

    def _align(self, alignment: Alignment, maps: Tensor) -> None:
        """Scales of a product from maps (n, L, g, g); each is measured with places whose scales leave it out."""
        alignment.learn_places(maps, self.place_prior)
        evidence = self._evidence(without_itself(maps, self.place_prior))
        alignment.learn_members(evidence)
        alignment.learn_sum(alignment.scales.members(evidence).mean(1))

    def forward(self, vectors: Sequence[Tensor], product: Tensor) -> Scores:
        """Vectors (N, h*w, C) of each level and products (N,) -> scores with maps (N, side, side)."""
        pairs = zip(self._crowds(), vectors, strict=True)
        maps = self._maps([crowd(level, product) for crowd, level in pairs])
        known = scales_of([self._alignment(y) for y in range(len(self.alignments))], product)
        image = known.sum(known.members(self._evidence(known.places(maps))).mean(1))
        # Scales of places tell whether an image is normal; within it they hide defects where products differ.
        shown = magnified(known.whole(maps).mean(1), self.map_side, self.sigma, aligned=False)
        return Scores(image, shown, unaligned=self._evidence(maps).mean(1))

    def _crowds(self) -> list[Crowds]:
        return [crowd for crowd in self.crowds if isinstance(crowd, Crowds)]

    def _alignment(self, product: int) -> Alignment:
        part = self.alignments[product]
        assert isinstance(part, Alignment)
        return part

    def _maps(self, distances: Sequence[Tensor]) -> Tensor:
        """Distances (N, h*w) of each level on one grid, (N, L, g, g)."""
        pairs = zip(self.grids, distances, strict=True)
        return torch.stack([upsampled(part.unflatten(1, grid), self.side, aligned=False) for grid, part in pairs], 1)

    def _evidence(self, maps: Tensor) -> Tensor:
        """Highest places of each level, (N, L, g, g) -> (N, L)."""
        highest: Tensor = top_mean(maps.flatten(0, 1), self.top).unflatten(0, maps.shape[:2])
        return highest


def _check(products: int, crowd: float, max_centres: int, folds: int, place_prior: float, statistics: int) -> None:
    if max_centres < products:
        raise ConfigError(f"max_centres: got {max_centres}, expected one for each of {products} products")
    for name, (value, least) in {"folds": (folds, 2), "statistics": (statistics, 1)}.items():
        if value < least:
            raise ConfigError(f"{name}: got {value}, expected at least {least}")
    if not crowd > 0 or not place_prior >= 0:
        raise ConfigError(f"crowd={crowd}, place_prior={place_prior}: expected a number above 0 and one from 0 on")
