"""SPADE: the nearest normal images, then the nearest places in them.

Sub-image anomaly detection with deep pyramid correspondences (Cohen, Hoshen, 2020), https://arxiv.org/abs/2005.02357.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from unispect.detectors.base import StatisticalDetector, check_counts
from unispect.errors import ConfigError, UnispectError
from unispect.nn.buffers import Learnt
from unispect.nn.maps import blurred, upsampled
from unispect.nn.memory import nearest, nearest_own, votes
from unispect.types import Features, Scores


class Gallery(Learnt):
    """Images that were kept: pooled vectors (M, D), products (M,) and, half precision, each dense level (M, C, h, w)."""

    pooled: Tensor
    product: Tensor

    def __init__(self, channels: int, shapes: Sequence[tuple[int, int, int]]) -> None:
        super().__init__()
        self.register_buffer("pooled", torch.zeros(0, channels))
        self.register_buffer("product", torch.zeros(0, dtype=torch.int64))
        for number, shape in enumerate(shapes):
            self.register_buffer(f"level{number}", torch.zeros(0, *shape, dtype=torch.float16))

    def level(self, number: int) -> Tensor:
        """Dense level by number, (M, C, h, w)."""
        return self.get_buffer(f"level{number}")


class Reservoir:
    """A uniform sample of what each group brought, at most `quota` of each; independent of the grouping of batches."""

    def __init__(self, quota: int, seed: int) -> None:
        self.quota, self.seed = quota, seed
        self.seen: dict[int, int] = {}
        self.slots: dict[int, list[list[Tensor]]] = {}
        self._random: dict[int, np.random.Generator] = {}

    def place(self, group: int) -> int | None:
        """Slot for one more of the group; None where it is not kept."""
        random = self._random.setdefault(group, np.random.default_rng((self.seed, group)))
        number = self.seen.get(group, 0)
        self.seen[group] = number + 1
        slot = number if number < self.quota else int(random.integers(number + 1))
        return slot if slot < self.quota else None

    def put(self, group: int, slot: int, tensors: list[Tensor]) -> None:
        """Keep tensors in a slot that `place` gave."""
        slots = self.slots.setdefault(group, [])
        slots[slot : slot + 1] = [tensors]


class SPADE(StatisticalDetector):
    """Distance to the nearest normal images, and of each place to the places of those images.

    shapes        (C, h, w) of each level; an image's vector is the pooled levels, or the mean of the last dense one
                  where there is none; the map comes from the dense levels, or the pooled ones where there is none
    products      K, number of products, known in training only
    neighbours    nearest images; published: 50 in the paper, 5 in the code
    max_images    training images kept, an equal share for each product, at random where there are more. One cap for
                  vectors and places, so that each neighbour found has places to compare with
    map_side, sigma   side of the score map and its blur, pixels
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        products: int,
        neighbours: int = 5,
        max_images: int = 512,
        map_side: int = 256,
        sigma: float = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_counts(products=products, neighbours=neighbours, map_side=map_side)
        if max_images < products:
            raise ConfigError(f"max_images: got {max_images}, expected at least one for each of {products} products")
        every = range(len(shapes))
        pooled = [number for number in every if shapes[number][1] * shapes[number][2] == 1]
        self.dense = [number for number in every if number not in pooled] or pooled
        self.summary = pooled or self.dense[-1:]
        self.products, self.neighbours, self.max_images = products, neighbours, max_images
        self.map_side, self.sigma, self.seed = map_side, sigma, seed
        channels = sum(shapes[number][0] for number in self.summary)
        self.gallery = Gallery(channels, [shapes[number] for number in self.dense])
        self._seen: Reservoir | None = None

    # Learning.

    @torch.no_grad()
    def update(self, features: Features, product: Tensor) -> None:
        """Take in a batch: L levels (N, C, h, w) and the product of each image, (N,) int64."""
        if self._seen is None:
            self._seen = Reservoir(self.max_images // self.products, self.seed)
        pooled = self._pooled(features)
        for image, group in enumerate(product.tolist()):
            slot = self._seen.place(group)
            if slot is not None:
                places = [_half(features[number][image]) for number in self.dense]
                self._seen.put(group, slot, [pooled[image].clone(), *places])

    @torch.no_grad()
    def finish(self) -> bool:
        """Hold what was kept; one pass is enough."""
        if self._seen is None:
            raise UnispectError("spade saw no image: call update with normal images before finish")
        slots, gallery = self._seen.slots, self.gallery
        kept = [tensors for group in sorted(slots) for tensors in slots[group]]
        gallery.product = torch.tensor([group for group in sorted(slots) for _ in slots[group]]).to(gallery.product)
        self._seen = None
        for number in reversed(range(len(self.dense))):  # one level at a time: its images are let go once they are joined
            setattr(gallery, f"level{number}", torch.stack([tensors.pop() for tensors in kept]).to(gallery.pooled.device))
        gallery.pooled = torch.stack([tensors.pop() for tensors in kept]).to(gallery.pooled)
        return False

    def _pooled(self, features: Features) -> Tensor:
        """Vector of each image, (N, D)."""
        return torch.cat([features[number].mean((2, 3)) for number in self.summary], 1)

    # Scoring.

    @torch.no_grad()
    def forward(self, features: Features) -> Scores:
        """L levels (N, C, h, w) -> scores with maps (N, side, side)."""
        if not len(self.gallery.pooled):
            raise UnispectError("spade has learnt nothing yet: fit it on normal images first")
        distances, places = nearest(self._pooled(features), self.gallery.pooled, self.neighbours)
        levels = [
            upsampled(self._gaps(level, features[self.dense[level]], places), self.map_side, aligned=False)
            for level in range(len(self.dense))
        ]
        maps = blurred(torch.stack(levels).mean(0), self.sigma)
        return Scores(distances.mean(1), maps, votes(self.gallery.product, self.products, places))

    def _gaps(self, number: int, level: Tensor, places: Tensor) -> Tensor:
        """Distance of each place to the nearest place of the image's neighbours (N, k), (N, C, h, w) -> (N, h, w)."""
        gallery = self.gallery.level(number)
        if torch.compiler.is_exporting():
            kept = gallery.index_select(0, places.flatten()).to(level).unflatten(0, (-1, places.shape[1]))
            own: Tensor = nearest_own(level.flatten(2).mT, kept.permute(0, 1, 3, 4, 2).flatten(1, 3))
            return own.reshape(-1, *level.shape[2:])
        gaps = level.new_empty(len(level), *level.shape[2:])
        for image, kept in enumerate(places):
            distances, _ = nearest(_vectors(level[image : image + 1]), _vectors(gallery[kept].to(level)))
            gaps[image] = distances.reshape(gaps.shape[1:])
        return gaps


def _vectors(level: Tensor) -> Tensor:
    """All places of some images, (N, C, h, w) -> (N * h * w, C)."""
    return level.permute(0, 2, 3, 1).flatten(0, 2)


def _half(level: Tensor) -> Tensor:
    """A copy in half precision; what that cannot hold becomes the largest it can."""
    most = torch.finfo(torch.float16).max
    return level.clamp(-most, most).to(torch.float16, copy=True)
