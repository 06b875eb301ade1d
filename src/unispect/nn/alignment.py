"""Cross-fitting: folds of the images, and the scale of every place and score from what was scored out of fold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unispect.nn.routing import taken

TAIL = 0.95  # quantile of a product's out-of-fold scores that is brought to 0: thresholds lie in the tail


@dataclass(frozen=True, slots=True)
class Scales:
    """Units of one product, or those of N images with N as the first dimension.

    place_mean, place_scale   (M, g, g)
    mean, scale               of the members' evidence, (M,)
    tail, spread              of the joined evidence, ()
    """

    place_mean: Tensor
    place_scale: Tensor
    mean: Tensor
    scale: Tensor
    tail: Tensor
    spread: Tensor

    def places(self, maps: Tensor) -> Tensor:
        """Maps (N, M, g, g) in units of their places."""
        return (maps - self.place_mean) / self.place_scale

    def whole(self, maps: Tensor) -> Tensor:
        """Maps (N, M, g, g) in units of their product, alike at all places."""
        mean = self.place_mean.mean((-2, -1), keepdim=True)
        return (maps - mean) / self.place_scale.square().mean((-2, -1), keepdim=True).sqrt()

    def members(self, evidence: Tensor) -> Tensor:
        """Evidence (N, M) in units of the members."""
        return (evidence - self.mean) / self.scale

    def sum(self, joined: Tensor) -> Tensor:
        """Joined evidence (N,) in units of the product."""
        return (joined - self.tail) / self.spread


class Alignment(nn.Module):
    """What out-of-fold scores of one product are like, member by member.

    members   M, grid   side of the maps in which places are compared
    """

    place_mean: Tensor
    place_scale: Tensor
    mean: Tensor
    scale: Tensor
    tail: Tensor
    spread: Tensor

    def __init__(self, members: int, grid: int) -> None:
        super().__init__()
        self.register_buffer("place_mean", torch.zeros(members, grid, grid))
        self.register_buffer("place_scale", torch.ones(members, grid, grid))
        self.register_buffer("mean", torch.zeros(members))
        self.register_buffer("scale", torch.ones(members))
        self.register_buffer("tail", torch.zeros(()))
        self.register_buffer("spread", torch.zeros(()))

    def learn_places(self, maps: Tensor, prior: float) -> None:
        """Mean and spread of each place, drawn towards those of all places by `prior` images, from maps (n, M, g, g)."""
        exact = maps.double()
        mean, scale = _places(exact.sum(0), exact.square().sum(0), len(maps), prior)
        self.place_mean.copy_(mean)
        self.place_scale.copy_(scale)

    def learn_members(self, evidence: Tensor) -> None:
        """Mean and spread of the members' evidence (n, M)."""
        self.mean.copy_(evidence.mean(0))
        self.scale.copy_(_spread(evidence))

    def learn_sum(self, joined: Tensor) -> None:
        """Tail and spread of the joined evidence (n,)."""
        self.tail.copy_(joined.quantile(TAIL))
        self.spread.copy_(_spread(joined[:, None])[0])

    @property
    def scales(self) -> Scales:
        """What was learnt."""
        return Scales(*(self.get_buffer(name) for name in Scales.__slots__))


def scales_of(alignments: Sequence[Alignment], product: Tensor) -> Scales:
    """The scales of each image's product, (N,)."""
    known = [alignment.scales for alignment in alignments]
    return Scales(*(taken([getattr(scales, name) for scales in known], product) for name in Scales.__slots__))


class Folds:
    """Fold of each image of a pass, batch by batch.

    dealt   the folds of all images in the order of the passes (see `deal`); None: those of each product in turn
    folds   their number
    """

    def __init__(self, dealt: Tensor | None, folds: int) -> None:
        self.dealt, self.folds = dealt, folds
        self.start()

    def start(self) -> None:
        """A pass begins."""
        self.seen, self.turn = 0, Counter[int]()

    def of(self, product: Tensor) -> Tensor:
        """Folds of the next images, given their products, (N,)."""
        if self.dealt is not None:
            self.seen += len(product)
            return self.dealt[self.seen - len(product) : self.seen]
        turns = []
        for y in product.tolist():
            turns.append(self.turn[y] % self.folds)
            self.turn[y] += 1
        return torch.tensor(turns)


def deal(product: Tensor, unit: Tensor, folds: int, seed: int) -> Tensor:
    """Fold of each image, (n,): the units of each product are shuffled and dealt, images of one unit together."""
    dealt = torch.zeros_like(product)
    for y in product.unique().tolist():
        own = product == y
        names, place = unit[own].unique(return_inverse=True)
        if len(names) < 2:  # nothing would be left to learn from
            names = place = torch.arange(int(own.sum()))
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
        dealt[own] = (order % folds)[place]
    return dealt


def without_itself(maps: Tensor, prior: float) -> Tensor:
    """Each of some maps (n, M, g, g) in units of its places, measured on the others alone."""
    maps = maps.double()
    if len(maps) < 3:
        mean, scale = _places(maps.sum(0), maps.square().sum(0), len(maps), prior)
        return ((maps - mean) / scale).float()
    total, square = maps.sum(0), maps.square().sum(0)
    mean, scale = _places(total - maps, square - maps.square(), len(maps) - 1, prior)
    return ((maps - mean) / scale).float()


def _places(total: Tensor, square: Tensor, count: int, prior: float) -> tuple[Tensor, Tensor]:
    """Mean and spread of each place from sums over images (..., g, g), drawn towards those of all places."""
    mean = total / count
    variance = (square / count - mean.square()).clamp(min=0)
    typical, spread = mean.mean((-2, -1), keepdim=True), variance.mean((-2, -1), keepdim=True)
    drawn = (count * variance + prior * spread) / (count + prior)
    least = 1e-6 * typical.abs() + 1e-9
    return (count * mean + prior * typical) / (count + prior), drawn.sqrt().clamp(min=least)


def _spread(values: Tensor) -> Tensor:
    """Standard deviation of columns (n, M) -> (M,), never 0; of a single row, the size of its values."""
    found = values.std(0) if len(values) > 1 else values[0].abs()
    return found.clamp(min=1e-6 * values.abs().mean(0) + 1e-9)


def finest(shapes: Sequence[tuple[int, ...]]) -> int:
    """Side of the finest grid of the features, in which members map."""
    return max(max(height, width) for _, height, width in shapes)
