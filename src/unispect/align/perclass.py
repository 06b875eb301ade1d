"""CaDA-A and CaDA-B: the level and reach of each product, under its name or under the one that a classifier gives it.

Absolute-unified multi-class anomaly detection via class-agnostic distribution alignment (Guo, Han, Lu, Zhang, Li, 2024),
https://arxiv.org/abs/2404.00724, section 3.2
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unispect.align.base import Aligner, Pairs, Statistics, view
from unispect.align.cada import CHOICES
from unispect.align.head import Head, Schooling, school
from unispect.align.scale import Output, Scale
from unispect.errors import ConfigError, unknown_name
from unispect.types import Features, Scores


class PerClass(Aligner):
    """Statistics of each product, from labelled normal images; a classifier of the detector's features says which are used.

    That is CaDA-B, and needs no label to score. `forward_given`, with the true product, is CaDA-A, for comparison only.

    channels, spread, score, top, blur, grid, kernel, hidden, dropout, steps, images, rule, learning_rate, momentum, decay,
    anneal        as of align.cada.CADA; the classifier has the structure of its regressor
    products      K, number of products
    """

    def __init__(
        self,
        channels: int,
        products: int,
        spread: str = "max",
        score: str = "own",
        top: float = 0.01,
        blur: bool = False,
        grid: int = 1,
        kernel: int = 1,
        hidden: int = 256,
        dropout: float = 0.5,
        steps: int = 300,
        images: int = 32,
        rule: str = "adam",
        learning_rate: float = 2e-3,
        momentum: float = 0.9,
        decay: float = 1e-4,
        anneal: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if spread not in CHOICES["spread"]:
            raise ConfigError(unknown_name("spread", spread, CHOICES["spread"]))
        if grid < 1:
            raise ConfigError(f"grid: got {grid}, expected at least 1")
        self.spread, self.grid, self.seed = spread, grid, seed
        self.output = Output(score, top, blur)
        self.schooling = Schooling(steps, images, rule, learning_rate, momentum, decay, anneal)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = Head(channels, products, kernel, hidden, dropout)
        for name in ("level", "middle"):
            self.register_buffer(name, torch.zeros(products))
        for name in ("reach", "width"):
            self.register_buffer(name, torch.ones(products))

    @torch.no_grad()
    def learn(self, pairs: Pairs) -> None:
        """Learn in place. A product without an image keeps the statistics of all."""
        for y in range(len(self.scale.level)):
            own = pairs.product == y
            self._measure(y, pairs.statistics, own if bool(own.any()) else torch.ones_like(own))

        def loss(said: Tensor, images: Tensor) -> Tensor:
            return F.cross_entropy(said, pairs.product[images])

        school(self.head, pairs.views, loss, self.schooling, self.seed)

    def _measure(self, product: int, known: Statistics, own: Tensor) -> None:
        """Mean level and mean reach of its images; mean and standard deviation of their scores."""
        score, reach = known.score[own], known.reach(self.spread)[own].mean()
        least = 1e-6 * float(score.abs().mean()) + 1e-12
        self.scale.level[product] = known.level[own].mean()
        self.scale.reach[product] = reach.clamp(min=1e-12)
        self.scale.middle[product] = score.mean()
        self.scale.width[product] = score.std(correction=0).clamp(min=least)

    @property
    def scale(self) -> Scale:
        """Of each product, (K,)."""
        return Scale(*(self.get_buffer(name) for name in ("level", "reach", "middle", "width")))

    @torch.no_grad()
    def forward(self, features: Features, scores: Scores) -> Scores:
        """Scores under the product that the classifier takes each image for: CaDA-B."""
        products = self.head(view(features, scores, self.grid)).log_softmax(1)
        known = products if scores.products is None else scores.products
        return self.output(scores, self.scale.of(products.argmax(1)), known)

    @torch.no_grad()
    def forward_given(self, features: Features, scores: Scores, product: Tensor) -> Scores:
        """Scores under the given product (N,): CaDA-A."""
        return self.output(scores, self.scale.of(product), scores.products)
