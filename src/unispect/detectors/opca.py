"""OPCA-MVG: a Gaussian on the principal components of least variance of deep features.

Build Gaussian Distribution Under Deep Features for Anomaly Detection and Localization (Wang et al., 2022),
https://doi.org/10.32604/jnm.2022.032447. The paper leaves open whether the Gaussians are of pooled or of single vectors:
both are here. Components are chosen and covariances estimated as in the code that its basis published: Modeling the
Distribution of Normal Data in Pre-Trained Deep Features for Anomaly Detection (Rippel, Mertens, Merhof, 2020),
https://arxiv.org/abs/2005.14140.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from unispect.detectors.base import StatisticalDetector, check_choices, check_shares, with_places
from unispect.errors import ConfigError, UnispectError
from unispect.nn.gaussian import Moments
from unispect.nn.maps import magnified, top_mean, upsampled
from unispect.nn.pca import Components, Subspace, distances
from unispect.nn.recognition import Recogniser
from unispect.types import Features, Scores

CHOICES = {"mode": ("dense", "pooled"), "components": ("opca", "pca", "all"), "image": ("max", "top")}


class OPCA(StatisticalDetector):
    """Mahalanobis distances in each level; what is learnt of a product depends on the images of that product alone.

    Two passes: sums for the components, then the fourth powers among them that the shrinkage needs ("all": one would do).

    shapes       (C, h, w) of each level
    products     K, number of products, known in training only
    mode         "pooled": Gaussians of vectors pooled over the image, the image score is the sum of the levels'
                 distances, and the map asks the same Gaussians of single places, which is the literal reading of the
                 paper; "dense": Gaussians of all places
    components   that are kept: "opca" those of least variance, "pca" those of most, "all"
    variance     share of the variance that the kept components account for; published: 0.05 for opca, 0.95 for pca
    per_product  a Gaussian for each product, chosen by the image alone; else one for all
    image        in "dense": "max", the sum over the levels of the highest distance; "top": the mean of the highest
                 share `top` of the map
    map_side, sigma   side of the score map and its blur, pixels; the paper names no blur
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        products: int,
        mode: str = "dense",
        components: str = "opca",
        variance: float = 0.05,
        per_product: bool = True,
        image: str = "max",
        top: float = 0.01,
        map_side: int = 256,
        sigma: float = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choices(CHOICES, mode=mode, components=components, image=image)
        check_shares(variance=variance)
        self.mode, self.components, self.variance, self.per_product = mode, components, variance, per_product
        self.image, self.top, self.map_side, self.sigma = image, top, map_side, sigma
        self.mapped = with_places(shapes)
        self.levels = self.mapped if mode == "dense" else list(range(len(shapes)))
        self.local = mode == "dense"
        self.channels = [channels for channels, _, _ in shapes]
        self.recogniser = Recogniser(self.channels, products) if per_product else None
        self.gaussians = nn.ModuleList(self._empty() for _ in range(products if per_product else 1))
        self._sums: dict[int, list[Moments]] = {}
        self._kept: dict[int, list[Components]] = {}
        self._fourth: dict[int, list[float]] = {}

    def _empty(self) -> nn.ModuleList:
        return nn.ModuleList(Subspace(self.channels[number]) for number in self.levels)

    # Learning, image by image: the sums of a product do not depend on what shares a batch with it.

    @torch.no_grad()
    def update(self, features: Features, product: Tensor) -> None:
        """Take in a batch: sums in the first pass, fourth powers among the components in the second."""
        if self.recogniser is not None and not self._kept:
            self.recogniser.update(features, product)
        for y, vectors in self._images(features, product):
            if not self._kept:
                self._add(y, vectors)
            else:
                self._fourth[y] = [
                    total + kept.fourth(level)
                    for total, kept, level in zip(self._fourth[y], self._kept[y], vectors, strict=True)
                ]

    def _add(self, product: int, vectors: Sequence[Tensor]) -> None:
        if product not in self._sums:
            self._sums[product] = [Moments(1, level.shape[1], level.double().mean(0)) for level in vectors]
        for moments, level in zip(self._sums[product], vectors, strict=True):
            moments.add(torch.tensor([0]), level[None])

    def _images(self, features: Features, product: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
        """Product and vectors (n, C) of every level, image by image."""
        for row, y in enumerate(product.tolist()):
            yield y if self.per_product else 0, [self._vectors(features[number][row]) for number in self.levels]

    def _vectors(self, level: Tensor) -> Tensor:
        """Vectors of one image that a Gaussian is of, (C, h, w) -> (n, C)."""
        return level.flatten(1).T if self.mode == "dense" else level.mean((1, 2))[None]

    @torch.no_grad()
    def finish(self) -> bool:
        """After the first pass the components are known, after the second the distances."""
        if not self._kept:
            if not self._sums:
                raise UnispectError("OPCA saw no image: call update with normal images before finish")
            self._kept = {y: [self._components(moments) for moments in sums] for y, sums in self._sums.items()}
            self._fourth, self._sums = {y: [0.0] * len(kept) for y, kept in self._kept.items()}, {}
            return True
        for y, kept in self._kept.items():
            for subspace, components, fourth in zip(self._levels(y), kept, self._fourth[y], strict=True):
                subspace.learn(components, fourth)
        if self.recogniser is not None:
            self.recogniser.finish()
        self._kept, self._fourth = {}, {}
        return False

    def _components(self, moments: Moments) -> Components:
        return Components(moments, self.components, self.variance)

    def _levels(self, product: int) -> list[Subspace]:
        levels = self.gaussians[product]
        assert isinstance(levels, nn.ModuleList)
        return [level for level in levels if isinstance(level, Subspace)]

    # Products that come and go.

    def add(self, other: OPCA) -> None:
        """The products of another detector of the same settings, after one's own, which are not touched."""
        if self.recogniser is None or other.recogniser is None:
            raise ConfigError("per_product=false: one Gaussian for all products, so none can be added or removed alone")
        self.recogniser.add(other.recogniser)
        self.gaussians.extend(deepcopy(other.gaussians))

    def remove(self, product: int) -> None:
        """Forget a product; the numbers of later ones fall by one."""
        if self.recogniser is None:
            raise ConfigError("per_product=false: one Gaussian for all products, so none can be added or removed alone")
        self.recogniser.remove(product)
        del self.gaussians[product]

    # Scoring.

    @torch.no_grad()
    def forward(self, features: Features) -> Scores:
        """L levels (N, C, h, w) -> scores with maps (N, side, side)."""
        if self.recogniser is None:
            return self.forward_given(features, features[0].new_zeros(features[0].shape[0], dtype=torch.int64))
        products = self.recogniser(features)
        given = self.forward_given(features, products.argmax(1))
        return Scores(given.image, given.maps, products)

    @torch.no_grad()
    def forward_given(self, features: Features, product: Tensor) -> Scores:
        """Scores under a product (N,)."""
        chosen = product if self.per_product else torch.zeros_like(product)
        self._check_learnt(chosen)
        maps = {number: self._distances(features[number], number, chosen) for number in self.mapped}
        shown = [magnified(level, self.map_side, self.sigma, aligned=False) for level in maps.values()]
        return Scores(self._image(features, maps, chosen), torch.stack(shown).mean(0))

    def _check_learnt(self, product: Tensor) -> None:
        # An exported graph knows no image yet: there any product may be asked for that the recogniser can name.
        asked = range(len(self.gaussians)) if torch.compiler.is_exporting() else product.unique().tolist()
        if any(not len(level.matrix) for y in asked for level in self._levels(y)):
            raise UnispectError("OPCA has not learnt this product yet: call update and finish first, or load its state")

    def _image(self, features: Features, maps: dict[int, Tensor], product: Tensor) -> Tensor:
        if self.mode == "pooled":
            means = ((number, features[number].mean((2, 3), keepdim=True)) for number in self.levels)
            return _sum(self._distances(level, number, product)[:, 0, 0] for number, level in means)
        if self.image == "top":
            levels = [upsampled(level, self.map_side, aligned=False) for level in maps.values()]
            return top_mean(torch.stack(levels).mean(0), self.top)
        return _sum(level.flatten(1).amax(1) for level in maps.values())

    def _distances(self, level: Tensor, number: int, product: Tensor) -> Tensor:
        """Distance of each place to its image's product, (N, C, h, w) -> (N, h, w)."""
        place = self.levels.index(number)
        parts = [self._levels(y)[place] for y in range(len(self.gaussians))]
        found: Tensor = distances(parts, level.flatten(2).mT, product).unflatten(1, level.shape[2:])
        return found


def _sum(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum(0)
