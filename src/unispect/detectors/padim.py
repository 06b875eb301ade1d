"""PaDiM: a Gaussian at every place of the feature grid.

PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection and Localization (Defard, Setkov, Loesch, Audigier,
2020), https://arxiv.org/abs/2011.08785. As published one set of Gaussians serves all products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from unispect.detectors.base import StatisticalDetector, check_counts, largest_grid, with_places
from unispect.errors import ConfigError, UnispectError
from unispect.nn.maps import magnified
from unispect.types import Features, Scores


class PaDiM(StatisticalDetector):
    """Mahalanobis distance to the Gaussian of the place; image score: the highest place of the map.

    shapes     (C, h, w) of each level; the dense ones are used, brought to the largest grid by repetition
    dimension  channels that a seeded random draw keeps, all where there are fewer; published: 550 of 1792 for
               Wide ResNet-50, 100 of 448 for ResNet-18
    ridge      added to the variances
    map_side, sigma   side of the score map and its blur, pixels
    """

    subset: Tensor
    mean: Tensor
    whitening: Tensor

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        products: int,
        dimension: int = 100,
        ridge: float = 0.01,
        map_side: int = 256,
        sigma: float = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_counts(dimension=dimension)
        if ridge <= 0:
            raise ConfigError(f"ridge: got {ridge}, expected a number above 0, without which covariances have no inverse")
        self.ridge, self.map_side, self.sigma = ridge, map_side, sigma
        self.levels = with_places(shapes)
        self.grid = largest_grid(shapes, self.levels)
        channels = sum(shapes[number][0] for number in self.levels)
        chosen = torch.randperm(channels, generator=torch.Generator().manual_seed(seed))[:dimension].sort().values
        places = self.grid[0] * self.grid[1]
        self.register_buffer("subset", chosen)
        self.register_buffer("mean", torch.zeros(places, len(chosen)))
        self.register_buffer("whitening", torch.zeros(places, len(chosen), len(chosen)))
        self._count = 0
        self._shift = self._sum = self._second = torch.zeros(0)

    def embed(self, features: Features) -> Tensor:
        """Chosen channels of every place, (places, N, d)."""
        levels = [interpolate(features[number], self.grid, mode="nearest") for number in self.levels]
        return torch.cat(levels, 1)[:, self.subset].flatten(2).permute(2, 0, 1)

    @torch.no_grad()
    def update(self, features: Features, product: Tensor) -> None:
        """Sums of each place, in double precision around the first image."""
        x = self.embed(features).double()
        if not self._count:
            places, _, channels = x.shape
            self._shift, self._sum = x[:, :1].clone(), torch.zeros(places, channels, dtype=torch.float64)
            self._second = torch.zeros(places, channels, channels, dtype=torch.float64)
        x = x - self._shift
        self._count += x.shape[1]
        self._sum += x.sum(1)
        self._second.baddbmm_(x.mT, x)

    @torch.no_grad()
    def finish(self) -> bool:
        """Covariances (n - 1) plus the ridge, kept as inverses of their Cholesky factors."""
        if self._count < 2:
            raise UnispectError(f"PaDiM needs at least 2 training images, got {self._count}")
        centre = self._sum / self._count
        covariance = self._second.sub_(self._count * centre[:, :, None] * centre[:, None, :]).div_(self._count - 1)
        covariance.diagonal(dim1=1, dim2=2).add_(self.ridge)
        self.mean.copy_(self._shift[:, 0] + centre)
        factor = torch.linalg.cholesky(covariance)
        del covariance
        self._second = torch.zeros(0)  # makes room for the inverses
        self.whitening.copy_(torch.linalg.solve_triangular(factor, torch.eye(factor.shape[1]).to(factor), upper=False))
        self._count, self._shift, self._sum = 0, torch.zeros(0), torch.zeros(0)
        return False

    @torch.no_grad()
    def forward(self, features: Features) -> Scores:
        """L levels (N, C, h, w) -> scores with maps (N, side, side)."""
        if not torch.compiler.is_exporting() and not bool(self.whitening.diagonal(dim1=1, dim2=2).all()):
            raise UnispectError("PaDiM has learnt nothing yet: call update and finish first, or load its state")
        offset = self.embed(features) - self.mean[:, None]
        distance = (offset @ self.whitening.mT).square().sum(2).sqrt().T.unflatten(1, self.grid)
        maps = magnified(distance, self.map_side, self.sigma, aligned=False)
        return Scores(maps.flatten(1).amax(1), maps)
