"""What an aligner is: learnt on what a detector says of normal images, then a pure function from scores to scores.

A detector of many products has maps and scores of another level and spread for each. An aligner brings them to one scale, so
that one threshold serves all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unispect.types import Features, Scores


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a detector says of some normal images, (n,) each.

    level    u, the mean place of the map
    peak     g, its highest place
    spread   sigma, the standard deviation of its places
    score    the image score
    """

    level: Tensor
    peak: Tensor
    spread: Tensor
    score: Tensor

    @classmethod
    def of(cls, scores: Scores) -> Statistics:
        """Of a batch."""
        places = scores.maps.flatten(1)
        return cls(places.mean(1), places.amax(1), places.std(1, correction=0), scores.image)

    @classmethod
    def joined(cls, parts: list[Statistics]) -> Statistics:
        """Of several batches."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__slots__))

    def reach(self, kind: str) -> Tensor:
        """How far a map of normal places reaches above its level, (n,): g - u, or 3 sigma, which outliers move less."""
        return self.peak - self.level if kind == "max" else 3 * self.spread


@dataclass(frozen=True, slots=True)
class Pairs:
    """What an aligner learns from: normal images that the detector which scored them had not learnt from.

    views     (n, C, g, g) what the aligner reads of each image
    product   (n,) int64
    """

    views: Tensor
    statistics: Statistics
    product: Tensor

    @classmethod
    def joined(cls, parts: list[Pairs]) -> Pairs:
        """Of several sets of images."""
        views, product = (torch.cat([getattr(part, name) for part in parts]) for name in ("views", "product"))
        return cls(views, Statistics.joined([part.statistics for part in parts]), product)


class Aligner(nn.Module, ABC):
    """Scores of one scale, without a product label.

    grid   side g of what it reads of an image
    """

    grid: int

    @abstractmethod
    def learn(self, pairs: Pairs) -> None:
        """Learn in place."""

    @abstractmethod
    def forward(self, features: Features, scores: Scores) -> Scores:
        """Scores of N images on the common scale; `unaligned` keeps the image scores as they came."""


@runtime_checkable
class AlignsGiven(Protocol):
    """An aligner that can be told the product, for comparison only; not deployable."""

    def forward_given(self, features: Features, scores: Scores, product: Tensor) -> Scores:
        """As forward, under the product (N,) of each image."""


def view(features: Features, scores: Scores, grid: int) -> Tensor:
    """What an aligner reads of images: the detector's narrowest layer, or else all levels of features, brought to a grid.

    L levels (N, C, h, w) -> (N, sum of C, g, g). Coarse on purpose: what an image shows is to be seen, not its defect.
    """
    levels = features if scores.context is None else [scores.context]
    return torch.cat([F.adaptive_avg_pool2d(level, grid) for level in levels], 1)


def width(features: Features, scores: Scores) -> int:
    """Channels of a view."""
    return sum(level.shape[1] for level in (features if scores.context is None else [scores.context]))
