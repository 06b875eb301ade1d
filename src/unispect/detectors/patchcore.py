"""PatchCore: the distance of each patch to the nearest of a small set that covers all normal patches.

Towards total recall in industrial anomaly detection (Roth, Pemula, Zepeda, Schölkopf, Brox, Gehler, 2022),
https://arxiv.org/abs/2106.08265. Where the paper and its published code disagree, an option says which is which.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from unispect.detectors.base import StatisticalDetector, check_choices, check_counts, check_shares, largest_grid, with_places
from unispect.errors import ConfigError, UnispectError
from unispect.nn.maps import magnified
from unispect.nn.memory import Bank, Coreset, votes
from unispect.nn.patches import patch_weights
from unispect.types import Features, Scores

CHOICES = {"distance": ("plain", "squared"), "reweighting": ("none", "softmax")}
SUPPORT = 9  # neighbours of the nearest bank vector that the softmax looks at, itself the first
NUMBERS = 1 << 24  # held at once while patches are made


class PatchCore(StatisticalDetector):
    """Nearest neighbours in a coreset of normal patches.

    shapes             (C, h, w) of each level; all that have places are used, or the pooled ones where none has
    products           K, number of products, known in training only
    dimension          of a patch's vector; published: 1024
    neighbourhood      side of the square of places that make a patch, odd
    coreset            share of the patches that is kept; published: 0.1 or 0.01
    max_bank_vectors   patches that are kept at the most
    max_ram            MiB that the selection may take; too few lower `max_bank_vectors`
    projection         channels in which the selection measures distances; published: 128
    start_points       of the selection
    neighbours         nearest patches whose distances are averaged
    distance           "plain", or "squared" as the published code has it
    reweighting        of the image score: "none" as in the published code, or "softmax", the paper's Eq. 7
    index              "exact" or "faiss", see nn.memory.Bank
    map_side, sigma    side of the score map and its blur, pixels
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        products: int,
        dimension: int = 384,
        neighbourhood: int = 3,
        coreset: float = 0.1,
        max_bank_vectors: int = 20_000,
        max_ram: float = 1024.0,
        projection: int = 64,
        start_points: int = 10,
        neighbours: int = 1,
        distance: str = "plain",
        reweighting: str = "none",
        index: str = "exact",
        map_side: int = 256,
        sigma: float = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choices(CHOICES, distance=distance, reweighting=reweighting)
        check_counts(dimension=dimension, max_bank_vectors=max_bank_vectors, projection=projection)
        check_counts(start_points=start_points, neighbours=neighbours, map_side=map_side, products=products)
        check_shares(coreset=coreset)
        if neighbourhood < 1 or neighbourhood % 2 == 0:
            raise ConfigError(f"neighbourhood: got {neighbourhood}, expected an odd number of places, such as 3")
        self.dense = with_places(shapes)
        self.shapes, self.products, self.seed = shapes, products, seed
        self.grid = largest_grid(shapes, self.dense)
        self.dimension, self.neighbourhood = dimension, neighbourhood
        self.coreset, self.max_ram, self.projection, self.start_points = coreset, max_ram, projection, start_points
        self.neighbours, self.distance, self.reweighting = neighbours, distance, reweighting
        self.map_side, self.sigma = map_side, sigma
        self.bank = Bank(dimension, index)
        self.max_bank_vectors = self._selection(max_bank_vectors).most
        if self.max_bank_vectors < products:
            raise ConfigError(
                f"max_bank_vectors={max_bank_vectors} and max_ram={max_ram:g} MiB have room for {self.max_bank_vectors} "
                f"vectors, expected at least one for each of {products} products"
            )
        self._seen: Coreset | None = None

    def _selection(self, most: int) -> Coreset:
        return Coreset(self.dimension, self.coreset, most, self.max_ram, self.projection, self.start_points, self.seed)

    # Learning.

    @torch.no_grad()
    def update(self, features: Features, product: Tensor) -> None:
        """Take in a batch: L levels (N, C, h, w) and the product of each image, (N,) int64."""
        if self._seen is None:
            self._seen = self._selection(self.max_bank_vectors)
        for part, labels in zip(self._pieces(features), product.split(self._images), strict=True):
            patches = self.embed(part)
            self._seen.add(patches.flatten(0, 1), labels.repeat_interleave(patches.shape[1]))

    @torch.no_grad()
    def finish(self) -> bool:
        """Choose the bank; one pass is enough."""
        if self._seen is None:
            raise UnispectError("patchcore saw no image: call update with normal images before finish")
        self.bank.learn(*self._seen.chosen())
        self._seen = None
        return False

    # Patches.

    def embed(self, features: Features) -> Tensor:
        """Vector of each patch, L levels (N, C, h, w) -> (N, h*w of the largest level, dimension)."""
        if torch.compiler.is_exporting():
            return self.convolved(features)
        # Pooling is over channels and resizing over places: they commute, and pooled maps are smaller to resize.
        maps = [self._resized(self._pooled(self._patches(features[number]))) for number in self.dense]
        return self._pooled(torch.cat(maps, 1)).flatten(2).mT

    def convolved(self, features: Features) -> Tensor:
        """The same by one convolution a level, for graphs: without windows side by side, which take longer."""
        side, maps = self.neighbourhood, []
        weights = patch_weights([self.shapes[number][0] for number in self.dense], side, self.dimension)
        for number, (first, kernel) in zip(self.dense, weights, strict=True):
            part = self._resized(F.conv2d(features[number], kernel.to(features[number]), padding=side // 2))
            maps.append(F.pad(part, (0, 0, 0, 0, first, self.dimension - first - len(kernel))))
        return torch.stack(maps).sum(0).flatten(2).mT

    def _patches(self, level: Tensor) -> Tensor:
        """Each place with its neighbourhood, zeros outside, (N, C, h, w) -> (N, C * neighbourhood^2, h, w)."""
        side = self.neighbourhood
        patches: Tensor = F.unfold(level, side, padding=side // 2).unflatten(2, level.shape[2:])
        return patches

    def _pooled(self, maps: Tensor) -> Tensor:
        """Channels averaged in `dimension` runs, (N, C, h, w) -> (N, dimension, h, w)."""
        flat = maps.flatten(2)
        pooled: Tensor = F.adaptive_avg_pool2d(flat, (self.dimension, flat.shape[2])).unflatten(2, maps.shape[2:])
        return pooled

    def _resized(self, maps: Tensor) -> Tensor:
        return F.interpolate(maps, self.grid, mode="bilinear", align_corners=False)

    @property
    def _images(self) -> int:
        """Images whose patches are made at once: the neighbourhoods are many times larger than the features."""
        places = self.grid[0] * self.grid[1]
        most = max(c * h * w for c, h, w in (self.shapes[number] for number in self.dense))
        return max(1, NUMBERS // (most * self.neighbourhood**2 + len(self.dense) * self.dimension * places))

    def _pieces(self, features: Features) -> Iterator[Features]:
        for levels in zip(*(level.split(self._images) for level in features), strict=True):
            yield list(levels)

    # Scoring.

    def quicken(self, channels: int = 96, candidates: int = 16) -> None:
        """Have exported graphs look for neighbours among the nearest along so many main axes of the bank.

        Of a bank of 20 000 vectors of eleven real products it misses the nearest for about one place in a thousand, whose
        distance is then too large by 3 % at the most; docs/statistical.md has the figures.
        """
        self.bank.shorten(channels, candidates)

    @torch.no_grad()
    def forward(self, features: Features) -> Scores:
        """L levels (N, C, h, w) -> scores with maps (N, side, side)."""
        if not len(self.bank.vectors):
            raise UnispectError("patchcore has learnt nothing yet: fit it on normal images first")
        if torch.compiler.is_exporting():  # a graph has no loop over pieces
            return Scores(*self._scored(self.embed(features)))
        parts = [self._scored(self.embed(piece)) for piece in self._pieces(features)]
        image, maps, products = (torch.cat(values) for values in zip(*parts, strict=True))
        return Scores(image, maps, products)

    def _scored(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image scores (N,), maps (N, side, side) and products (N, K) of patches (N, h*w, D)."""
        distances, places = self.bank.search(patches.flatten(0, 1), self.neighbours)
        if self.distance == "squared":
            distances = distances.square()
        score, closest = distances.mean(1).unflatten(0, patches.shape[:2]), places[:, 0].unflatten(0, patches.shape[:2])
        maps = magnified(score.unflatten(1, self.grid), self.map_side, self.sigma, aligned=False)
        return self._image_score(score, closest, patches), maps, votes(self.bank.product, self.products, closest)

    def _image_score(self, score: Tensor, closest: Tensor, patches: Tensor) -> Tensor:
        """The highest patch score (N, h*w) -> (N,), under "softmax" less where the bank is dense."""
        highest, place = score.max(1)
        if self.reweighting == "none" or len(self.bank.vectors) == 1:
            return highest
        patch = patches.gather(1, place[:, None, None].expand(-1, 1, self.dimension))
        nearest = self.bank.vectors[closest.gather(1, place[:, None])[:, 0]]
        far = torch.linalg.vector_norm(patch - self.bank.vectors[self.bank.search(nearest, SUPPORT)[1]], dim=2)
        reweighted: Tensor = highest * (1 - far.softmax(1)[:, 0])
        return reweighted
