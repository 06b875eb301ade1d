"""HGAD: a normalising flow whose latent space holds a hierarchical Gaussian mixture, one model for many products.

Hierarchical Gaussian mixture normalizing flow modeling for unified anomaly detection (Yao, Li, Qian, Wang, Zhang, 2024),
https://arxiv.org/abs/2403.13349. Where the paper and its published code disagree the code is followed; each option says
which behaviour is the published one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unispect.detectors.base import Group, Pass, VectorDetector, check_choices, check_counts, check_shares, with_places
from unispect.errors import ConfigError
from unispect.nn.alignment import Folds, deal
from unispect.nn.clusters import kmeans
from unispect.nn.coupling import Flow
from unispect.nn.crowds import Nearest
from unispect.nn.gaussian import Moments, ledoit_wolf, shrunk, whitening, within
from unispect.nn.growth import Growth
from unispect.nn.likelihood import Tally
from unispect.nn.maps import magnified, top_mean
from unispect.nn.mixture import LOG_2PI, HierarchicalMixture, entropy
from unispect.nn.position import positional_encoding
from unispect.types import Features, Scores

CHOICES = {
    "start": ("gaussian", "published"),
    "whitening": ("scale", "full"),
    "covariance": ("place", "product", "identity"),
    "main": ("learnt", "fixed", "single"),
    "inner_start": ("drawn", "kmeans"),
    "score": ("nearest", "aligned", "product", "gated"),
    "criterion": ("both", "likelihood", "entropy"),
    "likelihood": ("predicted", "marginal"),
}
SAMPLE, SPREAD = 4096, 64  # vectors for k-means, of a product and of one image at the most
PRIOR_MEAN = 5.0  # images that a cell's mean must outvote to leave the product's mean
PRIOR_SCALE = 4.0  # images that a product's held-out spread must outvote to leave the average of all products


class Level(nn.Module):
    """One level: exact whitening, flow and mixture. Whitening is a linear layer, so its log-determinant counts."""

    shift: Tensor
    whiten: Tensor
    log_whiten: Tensor
    mean_logdet: Tensor
    order: Tensor
    turned: Tensor
    condition: Tensor | None

    def __init__(
        self, shape: tuple[int, int, int], order: Tensor, position: int, flow: Flow, mixture: HierarchicalMixture
    ) -> None:
        super().__init__()
        channels, height, width = shape
        self.shape, self.flow, self.mixture = shape, flow, mixture
        self.register_buffer("shift", torch.zeros(channels))
        self.register_buffer("whiten", torch.eye(channels))
        self.register_buffer("log_whiten", torch.zeros(()))
        self.register_buffer("mean_logdet", torch.zeros(()))
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("turned", order.flatten().argsort(), persistent=False)
        encoding = positional_encoding(position, height, width).flatten(1).T.to(self.shift.dtype)
        self.register_buffer("condition", encoding if position else None, persistent=False)

    @property
    def dense(self) -> bool:
        """Whether the level has places; a pooled one has not."""
        return self.order.numel() > 1

    def latent(self, vectors: Tensor, places: Tensor | None = None, noise: float = 0.0) -> tuple[Tensor, Tensor]:
        """Vectors (m, c, q, C) at places (m, c, q) -> latent vectors (m, c, q, C) and log-determinants (m, c, q).

        places  all by cell unless given
        noise   spread of what is added to the whitened vectors
        """
        x = (vectors.flatten(0, 2) - self.shift) @ self.whiten.T
        x = x + noise * torch.randn_like(x) if noise else x
        if places is None:
            condition = None if self.condition is None else self.condition.index_select(0, self.order.flatten())
            z, logdet = self.flow(x, condition)
        else:
            z, logdet = self.flow(x, self.condition, places.flatten())
        return z.reshape(vectors.shape), (logdet + self.log_whiten).reshape(vectors.shape[:-1])

    def everywhere(self, images: int) -> Tensor:
        """All places of so many images by cell, (m, c, q)."""
        return self.order.expand(images, -1, -1)

    def arranged(self, features: Tensor) -> Tensor:
        """A level (N, C, h, w) as vectors by cell, (N, c, q, C)."""
        return features.flatten(2).mT[:, self.order]

    def in_order(self, z: Tensor) -> Tensor:
        """Vectors by cell back in the order of the places, (N, c, q, C) -> (N, h*w, C)."""
        return z.flatten(1, 2).index_select(1, self.turned)

    def as_map(self, values: Tensor) -> Tensor:
        """Values by cell back on the grid, (N, c, q) -> (N, h, w)."""
        maps: Tensor = values.flatten(1).index_select(1, self.turned).unflatten(1, self.shape[1:])
        return maps

    def distance(self, inside: Tensor, logdet: Tensor, product: Tensor) -> Tensor:
        """Distance to the product in standard deviations, (N, c, q): 2 (log of the peak density - log density), rooted."""
        peak = self.mixture.volume(product) + self.mean_logdet
        squared: Tensor = 2 * (peak - inside - logdet)
        return squared.clamp(min=0).sqrt()

    def density(self, inside: Tensor, logdet: Tensor) -> Tensor:
        """Log-likelihood per dimension, nats, (N, c, q)."""
        return (inside + logdet) / self.shape[0] - LOG_2PI / 2


@dataclass(frozen=True, slots=True)
class _Latent:
    """What a level makes of N images: z (N, c, q, D), log-determinants (N, c, q) and product logits (K, N, c, q)."""

    level: Level
    z: Tensor
    logdet: Tensor
    logits: Tensor

    def evidence(self) -> Tensor:
        """Mean over the places of log p(product | vector), (N, K)."""
        weights = self.level.mixture.psi.log_softmax(0)[:, None, None, None]
        return (self.logits + weights).log_softmax(0).mean((2, 3)).T


def cells(height: int, width: int, cell: int) -> Tensor:
    """Places of the grid grouped into squares of cell x cell, (c, q); each place alone where they do not fit."""
    if height % cell or width % cell:
        cell = 1
    grid = torch.arange(height * width).reshape(height // cell, cell, width // cell, cell)
    return grid.permute(0, 2, 1, 3).reshape(-1, cell * cell)


class HGAD(VectorDetector):
    """Hierarchical Gaussian mixture normalising flow, one flow a level.

    shapes            (C, h, w) of each level
    products          K, number of products, known in training only
    blocks, alpha, clamp   of the flow (see nn.coupling); published: 12, 1.9, "tanh"
    position          channels of the positional encoding, a multiple of 4, 0 for none; published: 256
    main              main centres of the products "learnt", "fixed" where they start, or a "single" fixed one for all
    centres           M centres inside each product, the main one included
    start             "gaussian": whitened features, couplings that do nothing yet, centres and covariances from the data;
                      "published": raw features, random couplings, tiled centres
    whitening         of the features before the flow, in "gaussian": each channel to the same "scale", or "full"
    covariance        of the mixture: "identity" as published; "product": one for each product; "place": one for each
                      product and cell of `cell` x `cell` places, drawn towards the product's by `prior` images
    inner_start       centres inside a product are "drawn" around the main one, or start where "kmeans" puts them
    delta_scale       spread of those that are drawn; published: 1.0, with which they hardly ever learn
    noise, dropout    against few images, in training: normal noise on the features, in their standard deviations inside
                      products, and the share of hidden channels of a coupling that is left out
    lambda1, lambda2, label_smoothing   of the losses; published: 1, 100, 0.02
    entropy           add the loss L_e
    intra             add, after the first stage, the losses that teach the centres inside products, L_in and L_z
    log_sigmoid       L_z is in it, which the published code has and the paper does not name
    first_stage       share of training without the losses of the centres inside products
    score             "nearest": distance to the nearest of many centres of the product, set into the latent space after
                      training, in the spread that is usual around them, every place at the scale that it has out of fold;
                      "aligned": mean over the levels of the distance to the product, in units of held-out normals;
                      "product": the paper's S_l * S_e with held-out ceilings instead of test-set maxima;
                      "gated": S_l * (eps + S_e), which a saturated entropy of zero cannot erase
    criterion         "both" factors of "product", or one of them, "likelihood" or "entropy", alone
    likelihood        under the product "predicted" for the image, or "marginal" over all products; "nearest" takes the first
    crowd             centres of a product in "nearest": as many as this number of images has vectors
    max_centres       of a level in "nearest", all products together; of many products each has an equal share
    folds             parts of a product's images that take turns in being scored by the centres of the others, in "nearest"
    place_prior       images that the scale of a place must outvote to leave that of all places, in "nearest"; a large number
                      for products that do not lie still
    statistics        images of a product at the most whose out-of-fold maps are kept for its scales
    max_ram           MiB for the vectors that centres are chosen from, all products together
    top               share of the highest places of a level that make its image score in "nearest" and "aligned"
    ceiling           quantile of held-out log-likelihoods that counts as fully normal in "product" and "gated"
    map_side, sigma   side of the score map and its blur, pixels
    """

    wants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"features": {"joined": True, "pooled": []}}
    spares_held_out = False

    image_mean: Tensor
    image_scale: Tensor
    map_mean: Tensor
    map_scale: Tensor
    ceilings: Tensor
    gate: Tensor

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        products: int,
        blocks: int = 4,
        position: int = 32,
        alpha: float = 1.9,
        clamp: str = "tanh",
        main: str = "learnt",
        centres: int = 10,
        start: str = "gaussian",
        whitening: str = "scale",
        covariance: str = "product",
        cell: int = 2,
        prior: float = 30.0,
        inner_start: str = "drawn",
        delta_scale: float = 0.1,
        noise: float = 0.0,
        dropout: float = 0.0,
        lambda1: float = 1.0,
        lambda2: float = 1.0,
        label_smoothing: float = 0.0,
        entropy: bool = True,
        intra: bool = True,
        log_sigmoid: bool = True,
        first_stage: float = 0.08,
        score: str = "nearest",
        criterion: str = "both",
        likelihood: str = "predicted",
        crowd: float = 30.0,
        max_centres: int = 400_000,
        folds: int = 4,
        place_prior: float = 10.0,
        statistics: int = 256,
        max_ram: float = 2048.0,
        top: float = 0.01,
        ceiling: float = 0.999,
        map_side: int = 256,
        sigma: float = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choices(CHOICES, start=start, whitening=whitening, covariance=covariance, main=main, inner_start=inner_start)
        check_choices(CHOICES, score=score, criterion=criterion, likelihood=likelihood)
        check_counts(products=products, blocks=blocks, centres=centres, cell=cell, map_side=map_side)
        check_shares(top=top)
        if start == "published" and covariance != "identity":
            raise ConfigError(f"covariance={covariance!r} is measured from data: expected start='gaussian' with it")
        if start == "published" and inner_start == "kmeans":
            raise ConfigError("inner_start='kmeans' is measured from data: expected start='gaussian' with it")
        if not noise >= 0:
            raise ConfigError(f"noise: got {noise}, expected a number from 0 on")
        self.start, self.whitening, self.covariance, self.prior = start, whitening, covariance, prior
        self.inner_start, self.centres, self.noise = inner_start, centres, noise
        self.lambda1, self.lambda2, self.label_smoothing = lambda1, lambda2, label_smoothing
        self.entropy, self.intra, self.log_sigmoid, self.first_stage = entropy, intra, log_sigmoid, first_stage
        self.score, self.criterion, self.likelihood = score, criterion, likelihood
        self.top, self.ceiling = top, ceiling
        self.map_side, self.sigma, self.products = map_side, sigma, products
        self.stages = (first_stage,)
        self.folds, self.seed = folds, seed
        self._dealt: Tensor | None = None
        self.levels = nn.ModuleList()
        for number, (channels, height, width) in enumerate(shapes):
            places = height * width
            order = cells(height, width, cell) if covariance == "place" else torch.arange(places)[None]
            encoded = position if places > 1 else 0
            flow = Flow(channels, encoded, blocks, alpha, clamp, start == "gaussian", seed + number)
            flow.set_dropout(dropout)
            own = 0 if covariance == "identity" else len(order)
            mixture = HierarchicalMixture(products, channels, centres, delta_scale, own, main, seed + number)
            self.levels.append(Level((channels, height, width), order, encoded, flow, mixture))
        self.mapped = with_places(shapes)
        grids = [shapes[number] for number in self.mapped]
        room, maps = (crowd, max_centres, folds, place_prior, statistics, max_ram), (top, map_side, sigma, seed)
        self.nearest = Nearest(grids, products, *room, *maps) if score == "nearest" else None
        for name in ("image_mean", "map_mean"):
            self.register_buffer(name, torch.zeros(len(shapes), products))
        for name in ("image_scale", "map_scale"):
            self.register_buffer(name, torch.ones(len(shapes), products))
        self.register_buffer("ceilings", torch.zeros(len(shapes)))
        self.register_buffer("gate", torch.zeros(()))

    def level(self, number: int) -> Level:
        """Level by number."""
        level = self.levels[number]
        assert isinstance(level, Level)
        return level

    def grid(self, level: int) -> Tensor:
        """Places of a level grouped by cell, (c, q)."""
        return self.level(level).order

    def growth(self, images: Sequence[int]) -> Growth:
        """What so many images of each product will take, before any was seen."""
        return Growth() if self.nearest is None else self.nearest.growth(images)

    # Learning: here, and only here, the product of an image is known.

    def groups(self, level: int) -> list[Group]:
        """Flow with weight decay; centres and weights of the mixture without."""
        part = self.level(level)
        return [Group(list(part.flow.parameters())), Group(list(part.mixture.parameters()), decayed=False)]

    def loss(self, level: int, vectors: Tensor, places: Tensor, product: Tensor, progress: float) -> dict[str, Tensor]:
        """First stage: lambda1 L_g + lambda2 L_mi + L_e; then L_in and L_z join, Eq. 11 and the published code."""
        z, logdet = self.level(level).latent(vectors, places, self.noise)
        second = self.intra and progress >= self.first_stage
        terms = self.level(level).mixture.terms(z, logdet, product, self.label_smoothing, second)
        total = self.lambda1 * terms.inter + self.lambda2 * terms.information + (terms.entropy if self.entropy else 0)
        if second:
            total = total + terms.intra + (terms.sigmoid if self.log_sigmoid else 0)
        return {"total": total, "inter": terms.inter, "information": terms.information, "intra": terms.intra}

    def held_out_loss(self, level: int, vectors: Tensor, places: Tensor, product: Tensor) -> Tensor:
        """Negative log-likelihood per dimension under each image's own product, mean over the vectors."""
        part = self.level(level)
        z, logdet = part.latent(vectors, places)
        return -part.density(part.mixture.own(z, product), logdet).mean()

    @torch.no_grad()
    def prepare(self, train: Pass) -> None:
        """Whitening, centres and covariances from the training features: training begins at a Gaussian solution."""
        if self.start == "published":
            return
        self._whiten(train)
        self._centre(train)
        if self.covariance == "place":
            self._localise(train)
        if self.inner_start == "kmeans" and self.centres > 1:
            self._scatter(train)

    def _vectors(self, train: Pass) -> Iterator[tuple[int, int, Tensor]]:
        """Number of a level, product and vectors (m, c, q, C), for every level and product of every batch."""
        for features, product in train():
            for number, level in enumerate(features):
                vectors = self.level(number).arranged(level)
                for y in product.unique().tolist():
                    yield number, y, vectors[product == y]

    def _latents(self, train: Pass) -> Iterator[tuple[int, int, Tensor]]:
        for number, y, vectors in self._vectors(train):
            level = self.level(number)
            yield number, y, level.latent(vectors, level.everywhere(len(vectors)))[0]

    def _moments(self) -> list[Moments]:
        """Empty sums for each level, one group a product."""
        return [Moments(self.products, self.level(number).shape[0]) for number in range(len(self.levels))]

    def _whiten(self, train: Pass) -> None:
        """First layer: the covariance inside products, or its diagonal, becomes the identity."""
        sums = self._moments()
        for number, y, vectors in self._vectors(train):
            sums[number].add(torch.tensor([y]), vectors.flatten(0, 2)[None])
        for number, moments in enumerate(sums):
            level, (mean, covariance) = self.level(number), within(moments)
            if self.whitening == "scale":
                covariance = torch.diag(covariance.diagonal())
            whiten = whitening(covariance)
            level.shift.copy_(mean)
            level.whiten.copy_(whiten)
            level.log_whiten.copy_(torch.linalg.slogdet(whiten)[1])

    def _centre(self, train: Pass) -> None:
        """Main centres: the product means. Metrics: each product's covariance after Ledoit and Wolf."""
        sums = self._moments()
        for number, y, z in self._latents(train):
            sums[number].add(torch.tensor([y]), z.flatten(0, 2)[None])
        for number, moments in enumerate(sums):
            mixture = self.level(number).mixture
            if not mixture.single:
                mixture.mu.copy_(moments.mean())
            if self.covariance != "identity":
                self._measure_metrics(mixture, moments)

    @staticmethod
    def _measure_metrics(mixture: HierarchicalMixture, moments: Moments) -> None:
        fourth = moments.fourth()
        for y, covariance in enumerate(moments.covariance()):
            shrinkage = ledoit_wolf(covariance, float(fourth[y]), float(moments.count[y]))
            metric = whitening(shrunk(covariance, shrinkage))
            mixture.metric[y] = metric.to(mixture.metric.dtype)
            mixture.log_volume[y] = torch.linalg.slogdet(metric)[1].to(mixture.log_volume.dtype)

    def _scatter(self, train: Pass) -> None:
        """Centres inside products where k-means puts them, among an even sample of the vectors."""
        samples: dict[tuple[int, int], list[Tensor]] = {}
        for number, y, z in self._latents(train):
            mixture, kept = self.level(number).mixture, samples.setdefault((number, y), [])
            residual = mixture.residual(z, y, mixture.mu[y]).flatten(1, 2)
            if sum(map(len, kept)) < SAMPLE:
                kept.append(residual[:, :: -(-residual.shape[1] // SPREAD)].flatten(0, 1))
        for (number, y), kept in samples.items():
            _set_centres(self.level(number).mixture, y, torch.cat(kept)[:SAMPLE], self.seed)

    def _localise(self, train: Pass) -> None:
        """Means and covariances of the cells, relative to their product's and drawn towards it."""
        mixtures = [self.level(number).mixture for number in range(len(self.levels))]
        sums = [Moments(self.products * mixture.cells, mixture.channels) for mixture in mixtures]
        for number, y, z in self._latents(train):
            mixture = mixtures[number]
            residual = mixture.residual(z, y, mixture.mu[y]).transpose(0, 1).flatten(1, 2)
            sums[number].add(torch.arange(mixture.cells) + y * mixture.cells, residual)
        for number, (mixture, moments) in enumerate(zip(mixtures, sums, strict=True)):
            for y in range(self.products):
                self._localise_product(mixture, y, moments, self.level(number).order.shape[1])

    def _localise_product(self, mixture: HierarchicalMixture, product: int, moments: Moments, size: int) -> None:
        rows = slice(product * mixture.cells, (product + 1) * mixture.cells)
        images = (moments.count[rows] / size)[:, None]
        observed = moments.mean()[rows]
        mean = observed * images / (images + PRIOR_MEAN)
        gap = (observed - mean)[:, :, None]
        covariance, images = moments.covariance_of(rows) + gap * gap.mT, images[..., None]
        identity = torch.eye(mixture.channels, dtype=torch.float64)
        drawn = whitening((images * covariance + self.prior * identity) / (images + self.prior))
        base = mixture.metric[product].double()
        metric = drawn @ base
        mixture.offset[product] = torch.linalg.solve(base, mean[..., None])[..., 0].to(mixture.offset.dtype)
        mixture.metric[product] = metric.to(mixture.metric.dtype)
        mixture.log_volume[product] = torch.linalg.slogdet(metric)[1].to(mixture.log_volume.dtype)

    @torch.no_grad()
    def finish(self, train: Pass, held_out: Pass) -> None:
        """Scales of scores and likelihoods, from normal images that the flow was not trained on; in "nearest" the centres
        and, out of fold, the scales of their distances, from all images."""
        if self.nearest is not None:
            self.nearest.learn(lambda: self._folded(train, held_out))
        elif self.score == "aligned":
            self._measure_logdet(held_out)
            self._measure_distances(held_out)
        else:
            self._measure_ceilings(held_out)

    def begin(self, product: Tensor, unit: Tensor) -> None:
        """Be told of the images to train on and, after them, those held out: products (n,) and units (n,)."""
        self._dealt = deal(product, unit, self.folds, self.seed)

    def _folded(self, train: Pass, held_out: Pass) -> Iterator[tuple[list[Tensor], Tensor, Tensor]]:
        """Latent vectors (N, p, C) of the levels with centres, products (N,) and folds (N,), of all images."""
        folds = Folds(self._dealt, self.folds)
        for features, product in chain(train(), held_out()):
            yield self._ordered(features), product, folds.of(product)

    def _ordered(self, features: Features) -> list[Tensor]:
        latents = []
        for number in self.mapped:
            level = self.level(number)
            z, _ = level.latent(level.arranged(features[number]))
            latents.append(level.in_order(z))
        return latents

    def _measure_logdet(self, held_out: Pass) -> None:
        total, count = torch.zeros(len(self.levels), dtype=torch.float64), 0
        for features, product in held_out():
            total += torch.tensor([float(latent.logdet.double().mean()) for latent in self._read(features)]) * len(product)
            count += len(product)
        for number in range(len(self.levels)):
            self.level(number).mean_logdet.copy_(total[number] / max(count, 1))

    def _measure_distances(self, held_out: Pass) -> None:
        images, maps = Moments(len(self.levels) * self.products, 1), Moments(len(self.levels) * self.products, 1)
        for features, product in held_out():
            for number, distance in enumerate(self._distances(self._read(features), product)):
                for y in product.unique().tolist():
                    chosen, group = distance[product == y], torch.tensor([number * self.products + y])
                    images.add(group, top_mean(chosen, self.top)[None, :, None])
                    maps.add(group, chosen.flatten()[None, :, None])
        for moments, mean, scale in (
            (images, self.image_mean, self.image_scale),
            (maps, self.map_mean, self.map_scale),
        ):
            self._standardise(moments, images.count.reshape(mean.shape), mean, scale)

    def _standardise(self, moments: Moments, images: Tensor, mean: Tensor, scale: Tensor) -> None:
        """Mean and spread of each product; of few held-out images, drawn towards the average product's."""
        observed, variance = moments.mean().reshape(mean.shape), moments.covariance().reshape(mean.shape)
        weight = images / images.sum(1, keepdim=True).clamp(min=1)
        average = (weight * observed).sum(1, keepdim=True)
        typical = (weight * variance).sum(1, keepdim=True)
        mean.copy_(torch.where(images > 0, observed, average))
        scale.copy_(((images * variance + PRIOR_SCALE * typical) / (images + PRIOR_SCALE)).sqrt().clamp(min=1e-6))

    def _measure_ceilings(self, held_out: Pass) -> None:
        tallies, entropies = [Tally() for _ in self.levels], []
        for features, product in held_out():
            latents = self._read(features)
            for tally, density in zip(tallies, self._densities(latents, product), strict=True):
                tally.add(density)
            entropies.append(self._unlikely([torch.exp(-self._entropy(latent)) for latent in latents]).flatten(1))
        self.ceilings.copy_(torch.tensor([tally.quantile(self.ceiling) for tally in tallies]))
        self.gate.copy_(torch.cat([values.median(1).values for values in entropies]).median())

    # Scoring.

    def _read(self, features: Features) -> list[_Latent]:
        latents = []
        for part, level in zip(self.levels, features, strict=True):
            assert isinstance(part, Level)
            z, logdet = part.latent(part.arranged(level))
            latents.append(_Latent(part, z, logdet, part.mixture.logits(z)))
        return latents

    def _inside(self, latent: _Latent, product: Tensor) -> Tensor:
        mixture = latent.level.mixture
        if self.likelihood == "predicted":
            return mixture.own(latent.z, product)
        weights = mixture.psi.log_softmax(0)
        rows = [mixture.inside(latent.z, y) + weights[y] for y in range(self.products)]
        return torch.logsumexp(torch.stack(rows), dim=0)

    def _distances(self, latents: Sequence[_Latent], product: Tensor) -> list[Tensor]:
        return [
            latent.level.as_map(latent.level.distance(self._inside(latent, product), latent.logdet, product))
            for latent in latents
        ]

    def _densities(self, latents: Sequence[_Latent], product: Tensor) -> list[Tensor]:
        return [
            latent.level.as_map(latent.level.density(self._inside(latent, product), latent.logdet)) for latent in latents
        ]

    def _entropy(self, latent: _Latent) -> Tensor:
        return latent.level.as_map(entropy(latent.logits))

    @torch.no_grad()
    def likelihoods(self, features: Features, product: Tensor) -> list[Tensor]:
        """Log-likelihood per dimension, nats, (N, h, w) of each level, under the product (N,)."""
        return self._densities(self._read(features), product)

    def main_centres(self) -> list[Tensor]:
        """Main centre of each product, (K, D) of each level."""
        return [self.level(number).mixture.mu.detach() for number in range(len(self.levels))]

    @torch.no_grad()
    def responsibilities(self, features: Features, product: Tensor) -> list[Tensor]:
        """Share of each centre inside the product (N,) in each vector, (N, h*w, M) of each level."""
        found = []
        for latent in self._read(features):
            pairs = zip(latent.z, product.tolist(), strict=True)
            rows = [latent.level.mixture.responsibilities(z[None], y).flatten(1, 2) for z, y in pairs]
            found.append(torch.cat(rows))
        return found

    def recognise(self, features: Features) -> Tensor:
        """log p(product | image), (N, K): the mean over levels and places of that of the vectors, normalised."""
        return _recognised(self._read(features))

    @torch.no_grad()
    def forward(self, features: Features) -> Scores:
        """L levels (N, C, h, w) -> scores with maps (N, side, side). No label: the product is the model's own guess."""
        latents = self._read(features)
        products = _recognised(latents)
        return self._scores(latents, products.argmax(1), products)

    @torch.no_grad()
    def forward_given(self, features: Features, product: Tensor) -> Scores:
        """The paper's protocol: scores under a given product (N,). For comparison only; not deployable."""
        return self._scores(self._read(features), product, None)

    def _scores(self, latents: Sequence[_Latent], product: Tensor, products: Tensor | None) -> Scores:
        if self.nearest is not None:
            chosen = [latents[number] for number in self.mapped]
            judged = self.nearest([latent.level.in_order(latent.z) for latent in chosen], product)
            return Scores(judged.image, judged.maps, products, judged.unaligned)
        if self.score == "aligned":
            return self._aligned(latents, product, products)
        likely = [
            torch.exp((density - ceiling).clamp(max=0))
            for density, ceiling in zip(self._densities(latents, product), self.ceilings, strict=True)
        ]
        certain = [torch.exp(-self._entropy(latent)) for latent in latents]
        gate = self.gate if self.score == "gated" else 0.0
        unlikely = self._unlikely(likely) if self.criterion != "entropy" else 1.0
        uncertain = self._unlikely(certain) + gate if self.criterion != "likelihood" else 1.0
        maps = torch.as_tensor(unlikely * uncertain)
        return Scores(maps.flatten(1).amax(1), maps, products)

    def _unlikely(self, parts: Sequence[Tensor]) -> Tensor:
        """L - sum of the levels' values in (0, 1], blurred, (N, side, side)."""
        return fused(parts, float(len(parts)), self.map_side, self.sigma)

    def _aligned(self, latents: Sequence[_Latent], product: Tensor, products: Tensor | None) -> Scores:
        distances = self._distances(latents, product)
        raw, images, maps = [], [], []
        for number, distance in enumerate(distances):
            summary = top_mean(distance, self.top)
            raw.append(summary)
            images.append((summary - self.image_mean[number, product]) / self.image_scale[number, product])
            centre, scale = self.map_mean[number, product], self.map_scale[number, product]
            standard = (distance - centre[:, None, None]) / scale[:, None, None]
            if latents[number].level.dense or len(latents) == 1:
                maps.append(magnified(standard, self.map_side, self.sigma))
        image, unaligned = torch.stack(images).mean(0), torch.stack(raw).mean(0)
        return Scores(image, torch.stack(maps).mean(0), products, unaligned)


def _recognised(latents: Sequence[_Latent]) -> Tensor:
    return torch.stack([latent.evidence() for latent in latents]).mean(0).log_softmax(1)


def fused(parts: Sequence[Tensor], offset: float | Tensor, side: int, sigma: float) -> Tensor:
    """offset - sum of the levels' maps (N, h, w), each brought to side x side, then blurred: S_l and S_e of the paper."""
    return offset - torch.stack([magnified(part, side, sigma) for part in parts]).sum(0)


def _set_centres(mixture: HierarchicalMixture, product: int, residuals: Tensor, seed: int) -> None:
    """Centres inside a product at the means of clusters of its residuals (n, D), weights by their shares."""
    wanted = min(mixture.delta.shape[1], len(residuals))
    groups = kmeans(residuals, wanted, seed)
    for group in range(wanted):
        own = residuals[groups == group]
        if len(own):
            mixture.delta[product, group] = own.mean(0)
            mixture.psi_intra[product, group + 1] = math.log(len(own) / len(residuals) * wanted)
