"""Memory banks: which vectors to keep under a hard cap, and the nearest of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unispect.errors import ConfigError, UnispectError, unknown_name
from unispect.nn.ann import FaissIndex
from unispect.nn.buffers import Learnt
from unispect.nn.shortlist import Shortlist, lowest

INDEXES = ("exact", "faiss")
ACTIVE = 1024  # points among which the greedy picks before it looks at all again
BLOCK = 1 << 20  # distances of the greedy held at once
SPARE = 7  # candidates beside the k wanted, so that rounding in the matrix product loses none
ROUNDING = 4e-6  # a squared distance below this share of the squared norm cannot be told from 0 in single precision


def greedy(
    points: Tensor, count: int, generator: torch.Generator, start: int = 10, start_points: Tensor | None = None
) -> Tensor:
    """Greedy k-centre: places of points that lie far from each other, (n, d) -> (min(count, n),) int64, all different.

    As PatchCore's published code: the first distances are the mean ones to `start` random points, which are not chosen
    for it; then the farthest point is chosen, again and again. `start_points` are used in place of random ones.
    """
    if start_points is None:
        start_points = torch.randperm(len(points), generator=generator)[:start].to(points.device)
    return _cover(points, count, start_points)[0]


def _cover(points: Tensor, count: int, start_points: Tensor) -> tuple[Tensor, float]:
    """Chosen places (count,) and the radius: the farthest that any point is from them, or from the start points."""
    x = points - points.mean(0)  # a far mean would cost digits
    # Distances only shrink. So the farthest of the ACTIVE farthest points is the farthest of all as long as it exceeds
    # the next one's last known distance: most picks need a few points, and all are brought up to date by one product.
    gap = torch.cdist(x, x[start_points], compute_mode="donot_use_mm_for_euclid_dist").mean(1)
    chosen, left = [], min(count, len(x))
    while left and (highest := gap.topk(min(ACTIVE + 1, len(gap)))).values[0] > 0:
        active, bound = highest.indices[:ACTIVE], float(highest.values[-1]) if len(gap) > ACTIVE else 0.0
        picks = active[_picks(x[active], highest.values[:ACTIVE], bound, left)]
        gap = torch.minimum(gap, _gap(x, x[picks]))
        gap[picks] = -1
        chosen.append(picks)
        left -= len(picks)
    if left:  # all that is left equals what was chosen
        chosen.append((gap >= 0).nonzero()[:left, 0])
    return torch.cat(chosen), max(float(gap.max()), 0.0)


def _picks(x: Tensor, gap: Tensor, bound: float, most: int) -> Tensor:
    """Places to choose among some points (m, d) while the farthest of them is farther than the bound, at least one."""
    gap = gap.clone()
    picks: list[Tensor] = []
    farthest, place = gap.max(0)
    while len(picks) < most and (not picks or float(farthest) > max(bound, 0.0)):
        picks.append(place)
        gap = torch.minimum(gap, torch.linalg.vector_norm(x - x[place], dim=1))
        gap[place] = -1
        farthest, place = gap.max(0)
    return torch.stack(picks)


def _gap(x: Tensor, centres: Tensor) -> Tensor:
    """Distance to the nearest centre, (n, d), (m, d) -> (n,); what rounding cannot tell from 0 is 0."""
    norm, half = x.square().sum(1), centres.square().sum(1) / 2
    rows = max(1, BLOCK // len(centres))
    least = torch.cat([torch.addmm(half, part, centres.T, alpha=-1).amin(1) for part in x.split(rows)])
    squared = norm + 2 * least
    return torch.where(squared > ROUNDING * norm, squared, 0).sqrt()


def fair_shares(sizes: Sequence[int], total: int) -> list[int]:
    """How many each group may keep of a total: an equal share; what small groups do not need goes to the others."""
    shares, left = [0] * len(sizes), total
    for done, group in enumerate(sorted(range(len(sizes)), key=lambda group: sizes[group])):
        shares[group] = min(sizes[group], left // (len(sizes) - done))
        left -= shares[group]
    return shares


@dataclass(frozen=True, slots=True)
class _Part:
    """Held vectors (n, C), their projections (n, p) and products (n,)."""

    vectors: Tensor
    sketch: Tensor
    product: Tensor


class Coreset:
    """Vectors that cover all vectors seen, chosen in one pass and a bounded memory.

    As long as all vectors fit, the choice is one greedy run over them. When they do not, each product is reduced to a
    fair share of `most` centres; from then on a vector nearer to the centres of its product than the radius which they
    leave is covered and dropped, the rest joins, and so on. Distances are measured after a random projection.

    share        of the vectors seen that is chosen
    most         vectors that are chosen at the most; lowered to what `max_ram` has room for
    max_ram      MiB for the vectors held and what reducing them needs
    projection   channels of the random projection; none where there are no more channels than that
    start        random points that the greedy starts from
    """

    def __init__(
        self,
        channels: int,
        share: float = 0.1,
        most: int = 20_000,
        max_ram: float = 1024.0,
        projection: int = 64,
        start: int = 10,
        seed: int = 0,
    ) -> None:
        self.share, self.start, self.seed, self.seen = share, start, seed, 0
        self.projection = _projection(channels, projection, seed)
        memory, vector = int(max_ram * 2**20), 4 * channels
        row = vector + 16 * self.projection.shape[1] + 48  # with the copies of its projection while the greedy runs
        self.most = min(most, memory // (2 * vector + 2 * row))
        if self.most < 1:
            raise ConfigError(f"max_ram={max_ram:g} MiB has no room for vectors of {channels} channels: raise it")
        self.capacity = (memory - 2 * vector * self.most) // row
        self._parts: list[_Part] = []
        self._radius: dict[int, float] = {}
        self._products: set[int] = set()

    @property
    def held(self) -> int:
        """Vectors in memory."""
        return sum(len(part.product) for part in self._parts)

    @property
    def held_bytes(self) -> int:
        """Bytes of the vectors in memory, with their projections and products."""
        return sum(part.vectors.nbytes + part.sketch.nbytes + part.product.nbytes for part in self._parts)

    def add(self, vectors: Tensor, product: Tensor) -> None:
        """More vectors (n, C) and their products (n,)."""
        self._products |= set(product.unique().tolist())
        if len(self._products) > self.most:
            raise ConfigError(
                f"room for {self.most} vectors cannot keep one of each of {len(self._products)} products: "
                "raise the number of vectors kept, or max_ram"
            )
        self.seen += len(vectors)
        while len(vectors):
            if self.held == self.capacity:
                self._reduce()
            room = self.capacity - self.held
            self._join(vectors[:room], product[:room])
            vectors, product = vectors[room:], product[room:]

    def chosen(self) -> tuple[Tensor, Tensor]:
        """The selection of all that was added, (m, C) and products (m,), in the order they came; m <= `most`."""
        if not self.seen:
            raise UnispectError("no vector was added: expected at least one to choose from")
        count = min(self.most, math.ceil(round(self.share * self.seen, 6)))
        if self._radius:
            places, _ = self._cover_products(max(count, len(self._products)))
        elif count >= self.held:
            places = torch.arange(self.held)
        else:
            sketch = torch.cat([part.sketch for part in self._parts])
            places = greedy(sketch, count, torch.Generator().manual_seed(self.seed), self.start)
        part = self._taken(places)
        return part.vectors, part.product

    def _join(self, vectors: Tensor, product: Tensor) -> None:
        vectors = vectors.float()
        sketch = vectors @ self.projection.to(vectors)
        fresh = self._uncovered(sketch, product)
        if fresh.any():  # a selection by mask is a copy: it keeps no larger tensor alive
            self._parts.append(_Part(vectors[fresh], sketch[fresh], product[fresh]))

    def _uncovered(self, sketch: Tensor, product: Tensor) -> Tensor:
        """Which vectors no centre of their product covers, (n,) bool. The centres are the first part held."""
        fresh = torch.ones_like(product, dtype=torch.bool)
        for label in set(product.unique().tolist()) & self._radius.keys():
            own = product == label
            centres = self._parts[0].sketch[self._parts[0].product == label]
            fresh[own] = _gap(sketch[own], centres) >= self._radius[label]
        return fresh

    def _reduce(self) -> None:
        places, self._radius = self._cover_products(self.most)
        self._parts = [self._taken(places)]

    def _cover_products(self, count: int) -> tuple[Tensor, dict[int, float]]:
        """Places of centres, a fair share of `count` for each product, and the radius that each product's leave."""
        sketch = torch.cat([part.sketch for part in self._parts])
        product = torch.cat([part.product for part in self._parts])
        labels, sizes = product.unique(return_counts=True)
        places, radius = [], {}
        for label, share in zip(labels.tolist(), fair_shares(sizes.tolist(), count), strict=True):
            own = (product == label).nonzero()[:, 0]
            chosen, radius[label] = self._cover_one(sketch[own], share)
            places.append(own[chosen])
        return torch.cat(places), radius

    def _cover_one(self, sketch: Tensor, count: int) -> tuple[Tensor, float]:
        if count >= len(sketch):
            return torch.arange(len(sketch), device=sketch.device), 0.0
        generator = torch.Generator().manual_seed(self.seed)
        return _cover(sketch, count, torch.randperm(len(sketch), generator=generator)[: self.start].to(sketch.device))

    def _taken(self, places: Tensor) -> _Part:
        """What is held at these places, in the order it came."""
        keep = torch.zeros(self.held, dtype=torch.bool, device=places.device)
        keep[places] = True
        masks = keep.split([len(part.product) for part in self._parts])
        pairs = list(zip(self._parts, masks, strict=True))
        return _Part(
            torch.cat([part.vectors[mask] for part, mask in pairs]),
            torch.cat([part.sketch[mask] for part, mask in pairs]),
            torch.cat([part.product[mask] for part, mask in pairs]),
        )


def _projection(channels: int, width: int, seed: int) -> Tensor:
    """Gaussian, keeps squared distances on average, (C, p); the identity where it would not make vectors shorter."""
    if width >= channels:
        return torch.eye(channels)
    return torch.randn(channels, width, generator=torch.Generator().manual_seed(seed)) / math.sqrt(width)


def nearest(queries: Tensor, bank: Tensor, k: int = 1, chunk: int = 1 << 22) -> tuple[Tensor, Tensor]:
    """Euclidean distances to the k nearest of the bank, ascending, and their places, (n, C), (m, C) -> (n, k), (n, k).

    k is at most m. `chunk` bounds the numbers held at once. A matrix product finds candidates; their distances are then
    computed directly, since the product cannot tell small distances from 0.
    """
    k, bank = min(k, len(bank)), bank.to(queries)
    centre = bank.mean(0)
    shifted = bank - centre
    half, wanted = shifted.square().sum(1) / 2, min(k + SPARE, len(bank))
    if torch.compiler.is_exporting():  # a graph is made of one part, and orders few numbers quickly
        return _measured(queries, bank, lowest(F.linear(centre - queries, shifted, half), wanted), k)
    found = []
    for part in queries.split(max(1, chunk // max(len(bank), wanted * bank.shape[1]))):
        product = torch.addmm(half, part - centre, shifted.T, alpha=-1)
        found.append(_measured(part, bank, product.topk(wanted, dim=1, largest=False).indices, k))
    return torch.cat([distances for distances, _ in found]), torch.cat([places for _, places in found])


def nearest_own(queries: Tensor, banks: Tensor, chunk: int = 1 << 22) -> Tensor:
    """Distance of each image's queries to the nearest of its own bank, (N, q, C), (N, m, C) -> (N, q). See `nearest`.

    `chunk` bounds the numbers of one image held at once. It never looks at an image by itself, so a graph can have it.
    """
    shifted = banks - (centre := banks.mean(1, keepdim=True))
    half, wanted = shifted.square().sum(2)[:, None] / 2, min(1 + SPARE, banks.shape[1])
    start = banks.shape[1] * torch.arange(banks.shape[0], device=banks.device)[:, None, None]
    found = []
    for part in queries.split(max(1, chunk // max(banks.shape[1], wanted * banks.shape[2])), dim=1):
        places = (half - (part - centre) @ shifted.mT).topk(wanted, dim=2, largest=False).indices
        near = banks.flatten(0, 1).index_select(0, (places + start).flatten()).unflatten(0, (-1, *places.shape[1:]))
        found.append(torch.linalg.vector_norm(part[:, :, None] - near, dim=3).amin(2))
    return torch.cat(found, 1)


def votes(owner: Tensor, products: int, places: Tensor) -> Tensor:
    """log of the share of the nearest vectors that are of each product, one vote added to each, (N, k) -> (N, K).

    owner    (m,) product of each vector in the bank
    places   (N, k) of the nearest vectors
    """
    counted = F.one_hot(owner[places], products).sum(1).float() + 1
    return (counted / counted.sum(1, keepdim=True)).log()


def gaps(bank: Tensor, k: int, chunk: int = 1 << 22) -> Tensor:
    """Distances of each vector to its k nearest others, (m, C) -> (m, k), ascending; k is below m.

    By matrix product alone, many times faster than `nearest`: what rounding cannot tell from 0 is 0.
    """
    x = bank - bank.mean(0)
    norm, found = x.square().sum(1), []
    for start in range(0, len(x), rows := max(1, chunk // len(x))):
        part = x[start : start + rows]
        squared = torch.addmm(norm, part, x.T, alpha=-2) + norm[start : start + rows, None]
        squared[torch.arange(len(part)), torch.arange(start, start + len(part))] = torch.inf
        least = squared.topk(k, dim=1, largest=False).values
        found.append(torch.where(least > ROUNDING * norm[start : start + rows, None], least, 0).sqrt())
    return torch.cat(found)


def _measured(queries: Tensor, bank: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of each query's candidates (n, q); of equals, the first in the bank."""
    candidates = candidates.sort(dim=1).values
    distances = torch.linalg.vector_norm(queries[:, None] - bank[candidates], dim=2)
    if torch.compiler.is_exporting():  # TopK of ONNX takes the first of equals and knows no other order
        least, order = distances.topk(k, dim=1, largest=False)
    else:
        least, order = (found[:, :k] for found in distances.sort(dim=1, stable=True))
    return least, candidates.gather(1, order)


class Bank(Learnt):
    """Vectors to be compared with, and the product that each came from.

    index   "exact": by matrix product; "faiss": candidates from a FAISS index (pip install unispect[faiss]). Exported
            graphs have the exact search
    """

    vectors: Tensor
    product: Tensor

    def __init__(self, channels: int, index: str = "exact") -> None:
        super().__init__()
        if index not in INDEXES:
            raise ConfigError(unknown_name("index", index, INDEXES))
        self.finder = FaissIndex() if index == "faiss" else None
        self.shortlist: Shortlist | None = None
        self.candidates = 0
        self.register_buffer("vectors", torch.zeros(0, channels))
        self.register_buffer("product", torch.zeros(0, dtype=torch.int64))

    def learn(self, vectors: Tensor, product: Tensor) -> None:
        """Hold these vectors (m, C) and products (m,) from now on."""
        self.vectors = vectors.to(self.vectors)
        self.product = product.to(self.product)
        self.shortlist = None

    def shorten(self, channels: int, candidates: int) -> None:
        """Have exported graphs measure so many candidates from so few channels; nothing else changes."""
        if channels < self.vectors.shape[1]:
            self.shortlist, self.candidates = Shortlist(self.vectors, channels), candidates

    def search(self, queries: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """Distances to the k nearest vectors, ascending, and their places, (n, C) -> (n, k), (n, k); k is at most m."""
        if not len(self.vectors):
            raise UnispectError("the bank is empty: learn before you search")
        if self.shortlist is not None and torch.compiler.is_exporting():
            count = min(max(k + SPARE, self.candidates), len(self.vectors))
            return _measured(queries, self.vectors, self.shortlist(queries, count), k)
        if self.finder is None or torch.compiler.is_exporting():
            return nearest(queries, self.vectors, k)
        k = min(k, len(self.vectors))
        candidates = self.finder.candidates(self.vectors, queries, min(k + SPARE, len(self.vectors)))
        return _measured(queries, self.vectors, candidates, k)
