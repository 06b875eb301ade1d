"""Several detectors as one: each brought to one scale by what it says of normal images that it has not learnt.

Cross-fitting: the training images of each product are dealt into folds; copies of the members that learn without a fold
score it. From these out-of-fold scores come the scale of every place of a product's map, of each member and of the sum,
so no image is held out, no test image is seen, and an alarm means the same for every product. Stacked generalization
(Wolpert, 1992) without labels; the scale of a place is shrunk as small-sample variances are (Smyth, 2004).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from unispect.detectors.base import Detector, Grows, HoldsProducts, StatisticalDetector, TakesProduct
from unispect.errors import ConfigError, UnispectError
from unispect.nn.alignment import Alignment, Folds, deal, finest, scales_of, without_itself
from unispect.nn.growth import Growth, together
from unispect.nn.maps import magnified, top_mean
from unispect.nn.recognition import Recogniser
from unispect.types import Features, Scores

LIFT = 2.0  # standard deviations added before evidence is joined: what lies below them counts next to nothing


class Ensemble(StatisticalDetector):
    """Members joined through their out-of-fold scores; each keeps to the product that the ensemble recognises.

    A member that maps (all but `opca` in its mode "pooled") gives as evidence the highest places of its map, after every
    place was brought to the scale of normal images there; another gives its image score. Evidence z of the members, in
    standard deviations, is joined as the norm of its soft positive part: a member that is alone in being sure is heard,
    and the small disagreements that all normal images have do not add up.

    shapes       (C, h, w) of each level
    products     K, number of products, known in training only
    parts        the members, which have not learnt yet, by name; their maps are not blurred and of the side `finest` says
    members      their names, of the methods that learn in passes; each reads a section of its own
    weights      one for each member
    folds        parts into which the images of a product are dealt
    statistics   images of a product at the most, at least one a fold, whose out-of-fold scores are kept for its scales
    prior        images that the scale of a place must outvote to leave that of all places; a large number for products
                 that do not lie still
    power        of the norm that joins evidence
    top          share of the highest places that make a map's evidence
    map_side, sigma   side of the score map and its blur, pixels
    """

    MEMBERS = ("neighbours", "opca")
    wants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "split": {"held_out": 0.0},
        "features": {"layers": ["blocks.3", "blocks.4"], "pooled": ["blocks.5", "blocks.6"]},
        "opca": {"mode": "pooled"},
    }

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        products: int,
        parts: Mapping[str, Detector],
        members: tuple[str, ...] = MEMBERS,
        weights: tuple[float, ...] = (1.0, 0.35),
        folds: int = 4,
        statistics: int = 256,
        prior: float = 20.0,
        power: float = 3.0,
        top: float = 0.01,
        map_side: int = 256,
        sigma: float = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if len(weights) != len(members) or not all(weight > 0 for weight in weights):
            raise ConfigError(f"weights={list(weights)}: expected one above 0 for each of {len(members)} members")
        for name, (value, least) in {"folds": (folds, 2), "statistics": (statistics, max(2, folds))}.items():
            if value < least:
                raise ConfigError(f"{name}: got {value}, expected at least {least}")
        if not 0 < top <= 1:
            raise ConfigError(f"top: got {top}, expected a share above 0 and up to 1")
        if not prior >= 0 or not power >= 1:
            raise ConfigError(f"prior={prior}, power={power}: expected at least 0 and at least 1")
        self.weights, self.power, self.prior, self.top = tuple(weights), power, prior, top
        self.folds, self.statistics, self.seed = folds, statistics, seed
        self.grid, self.map_side, self.sigma = finest(shapes), map_side, sigma
        self.members = nn.ModuleList(parts[name] for name in members)
        self.mapping = tuple(parts[name].local for name in members)
        self.recogniser = Recogniser([channels for channels, _, _ in shapes], products)
        self.alignments = nn.ModuleList(Alignment(len(members), self.grid) for _ in range(products))
        self._fitting: _CrossFit | None = None
        self._dealt: Tensor | None = None

    # Learning.

    def growth(self, images: Sequence[int]) -> Growth:
        """What so many images of each product will take, before any was seen."""
        parts = together(part.growth(images) for part in self.members if isinstance(part, Grows))
        kept = [min(count, self.statistics) for count in images]
        # Maps of all products, and those of one several times over in double precision.
        maps = 4 * len(self.members) * self.grid**2 * (sum(kept) + 8 * max(kept, default=0))
        learning = [*parts.learning] * (self.folds + 1)
        learning += [work.times(sum(images)) for work in parts.scoring]
        return Growth(parts.held + maps, parts.learnt, tuple(learning), parts.scoring)

    def begin(self, product: Tensor, unit: Tensor) -> None:
        """Be told of all training images, in the order of the passes: products (n,) and units (n,).

        Images of one unit, such as a capture group, share a fold. Without this call they are dealt as they come.
        """
        self._dealt, self._fitting = deal(product, unit, self.folds, self.seed), None

    @torch.no_grad()
    def update(self, features: Features, product: Tensor) -> None:
        """Take in a batch: to learn from or, out of fold, to score."""
        if self._fitting is None:
            self._fitting = _CrossFit(list(self.members), self.folds, self._dealt)
        fitting = self._fitting
        if fitting.first:
            self.recogniser.update(features, product)
        chosen = fitting.chosen(product)
        if not bool(chosen.any()):
            return
        levels, y = [level[chosen] for level in features], product[chosen]
        if fitting.scoring:
            fitting.keep(y, *self._raw(fitting.working, levels, y), self.statistics // self.folds)
        else:
            fitting.learn(levels, y)

    @torch.no_grad()
    def finish(self) -> bool:
        """End of a pass; after the last fold the scales are known, after the last pass the members."""
        if self._fitting is None:
            raise UnispectError("ensemble saw no image: call update with normal images before finish")
        more = self._fitting.finish()
        if self._fitting.ready:
            self.recogniser.finish()
            for y, (maps, images) in self._fitting.collected().items():
                self._align(self.alignment(y), maps, images)
        if not more:
            self._fitting = self._dealt = None
        return more

    def alignment(self, product: int) -> Alignment:
        """What is known of a product."""
        part = self.alignments[product]
        assert isinstance(part, Alignment)
        return part

    def _align(self, alignment: Alignment, maps: Tensor, images: Tensor) -> None:
        """Scales of a product from raw maps (n, M, g, g) and image scores (n, M) that are out of fold.

        The evidence of an image is measured with places whose scales leave it out, as a new image will be.
        """
        alignment.learn_places(maps, self.prior)
        evidence = self._evidence(without_itself(maps, self.prior), images)
        alignment.learn_members(evidence)
        alignment.learn_sum(self._joined(alignment.scales.members(evidence)))

    # Products that come and go.

    def add(self, other: Ensemble) -> None:
        """The products of another detector of the same settings, after one's own, which are not touched."""
        for part, new in zip(self._holding(), other.members, strict=True):
            part.add(new)
        self.recogniser.add(other.recogniser)
        self.alignments.extend(deepcopy(other.alignments))

    def remove(self, product: int) -> None:
        """Forget a product; the numbers of later ones fall by one."""
        for part in self._holding():
            part.remove(product)
        self.recogniser.remove(product)
        del self.alignments[product]

    def _holding(self) -> list[HoldsProducts]:
        """The members, each of which can let a product come or go: asked before any is changed."""
        return [_holding(part) for part in self.members]

    # Scoring.

    def check_exportable(self) -> None:
        """Raises ExportError where a member cannot be expressed as one graph."""
        for part in self.members:
            assert isinstance(part, Detector)
            part.check_exportable()

    @torch.no_grad()
    def forward(self, features: Features) -> Scores:
        """L levels (N, C, h, w) -> scores with maps (N, side, side)."""
        products = self.recogniser(features)
        given = self.forward_given(features, products.argmax(1))
        return Scores(given.image, given.maps, products, given.unaligned)

    @torch.no_grad()
    def forward_given(self, features: Features, product: Tensor) -> Scores:
        """Scores under a product (N,)."""
        maps, images = self._raw(list(self.members), features, product)
        known = scales_of([self.alignment(y) for y in range(len(self.alignments))], product)
        if not torch.compiler.is_exporting() and bool((known.spread == 0).any()):
            raise UnispectError("ensemble has not learnt this product yet: fit it on normal images first")
        placed = known.places(maps)
        image = known.sum(self._joined(known.members(self._evidence(placed, images))))
        raw = (self._evidence(maps, images) * self._weight(images)).sum(1)
        return Scores(image, self._map(placed), unaligned=raw)

    def _raw(self, members: Sequence[nn.Module], features: Features, product: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (N, M, g, g) and image scores (N, M) as the members give them."""
        given = [_scored(part, features, product) for part in members]
        return torch.stack([scores.maps for scores in given], 1), torch.stack([scores.image for scores in given], 1)

    def _evidence(self, maps: Tensor, images: Tensor) -> Tensor:
        """Highest places of the maps of members that map, image scores of the others, (N, M)."""
        highest = top_mean(maps.flatten(0, 1), self.top).unflatten(0, maps.shape[:2])
        return torch.where(torch.tensor(self.mapping), highest.to(images), images)

    def _joined(self, standard: Tensor) -> Tensor:
        """Evidence of the members in standard deviations, (N, M) -> (N,)."""
        joined: Tensor = torch.linalg.vector_norm(softplus(standard + LIFT) * self._weight(standard), self.power, dim=1)
        return joined

    def _weight(self, like: Tensor) -> Tensor:
        return torch.tensor(self.weights).to(like)

    def _map(self, placed: Tensor) -> Tensor:
        """Mean of the maps of members that map, or of all where none does, (N, M, g, g) -> (N, side, side)."""
        weight = self._weight(placed) * (torch.tensor(self.mapping) if any(self.mapping) else 1)
        mean = torch.einsum("nmhw,m->nhw", placed, weight / weight.sum())
        return magnified(mean, self.map_side, self.sigma, aligned=False)


class _CrossFit:
    """Where the learning of an ensemble stands: copies of its members fold by fold, then the members themselves."""

    def __init__(self, members: list[nn.Module], folds: int, dealt: Tensor | None) -> None:
        self.members, self.folds, self.dealt = members, folds, Folds(dealt, folds)
        self.fold, self.scoring, self.first = 0, False, True
        self.working = deepcopy(members)
        self.pending = self.working
        self._kept: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._count: dict[tuple[int, int], int] = {}

    @property
    def ready(self) -> bool:
        """Whether the last fold has just been scored."""
        return self.fold == self.folds and bool(self._kept)

    def chosen(self, product: Tensor) -> Tensor:
        """Which images of a batch are to be learnt from or, in scoring, to be scored, (N,) bool."""
        own = self.dealt.of(product) == self.fold
        return own if self.scoring else ~own

    def learn(self, levels: Features, product: Tensor) -> None:
        """A batch for the members that want this pass."""
        for part in self.pending:
            assert isinstance(part, StatisticalDetector)
            part.update(levels, product)

    def keep(self, product: Tensor, maps: Tensor, images: Tensor, most: int) -> None:
        """Raw maps (N, M, g, g) and image scores (N, M), at most so many of each product and fold."""
        for row, y in enumerate(product.tolist()):
            self._count[self.fold, y] = self._count.get((self.fold, y), 0) + 1
            if self._count[self.fold, y] <= most:
                self._kept.setdefault(y, []).append((maps[row].clone(), images[row].clone()))

    def collected(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Kept maps (n, M, g, g) and image scores (n, M) of each product; they are let go."""
        kept, self._kept = self._kept, {}
        return {
            y: (torch.stack([maps for maps, _ in rows]), torch.stack([row for _, row in rows])) for y, rows in kept.items()
        }

    def finish(self) -> bool:
        """End of a pass; True where one more is wanted."""
        self.first = False
        self.dealt.start()
        if self.scoring:
            self.scoring, self.fold = False, self.fold + 1
            self.working = self.members if self.fold == self.folds else deepcopy(self.members)
            self.pending = self.working
            return True
        self.pending = [part for part in self.pending if isinstance(part, StatisticalDetector) and part.finish()]
        self.scoring = not self.pending and self.fold < self.folds
        return bool(self.pending) or self.scoring


def _scored(part: nn.Module, features: Features, product: Tensor) -> Scores:
    """What a member says, under the product where it can be told one."""
    if isinstance(part, TakesProduct):
        return part.forward_given(features, product)
    scores: Scores = part(features)
    return scores


def _holding(part: nn.Module) -> HoldsProducts:
    if not isinstance(part, HoldsProducts):
        raise ConfigError(f"{type(part).__name__} learns all products as one: none can be added to or removed from it alone")
    return part
