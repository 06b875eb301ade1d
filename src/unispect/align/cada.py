"""CADA: the level and reach of an image's anomaly map, were the image normal, predicted from what the image shows.

Absolute-unified multi-class anomaly detection via class-agnostic distribution alignment (Guo, Han, Lu, Zhang, Li, 2024),
https://arxiv.org/abs/2404.00724
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from unispect.align.base import Aligner, Pairs, view
from unispect.align.head import Head, Schooling, school
from unispect.align.scale import Output, Scale
from unispect.errors import ConfigError, unknown_name
from unispect.types import Features, Scores

CHOICES = {"spread": ("max", "sigma"), "gap": ("safe", "plain")}
LEAST = 1e-3  # of the mean reach of the training images: no predicted reach is smaller


class CADA(Aligner):
    """Class-agnostic distribution alignment: no product label, neither to learn nor to score.

    A regressor sees the detector's frozen features and predicts u and g of the map as the detector would give it for a
    normal image like this one; the map becomes (M - u) / (g - u), Eq. 5. Beside the paper's two numbers it predicts mean and
    standard deviation of the image score, for detectors whose image score is not read off their map.

    channels      C of a view (see align.base.view)
    products      K: taken and ignored
    spread        the second statistic of a map: its "max" g, or "sigma": u + 3 sigma in its place, for training sets with
                  defects in them
    gap           "safe" predicts g - u as a positive number; "plain" predicts g itself, as published, so that g - u may be
                  0 or negative
    units         targets in units of their spread over the training images, so that `threshold` and `learning_rate` mean the
                  same for every detector; published: false
    balanced      errors of an image in units of its own reach, so that a product with small scores is learnt as well as
                  one with large; published: false
    threshold     alpha of the smooth L1 loss, Eq. 4; published: 0.1 for RevDist and ReContrast, 10 for UniAD
    score, top, blur   what comes out, see align.scale.Output; published: "map", 0.01, true
    grid          side of the view; published: that of the bottleneck, 8
    kernel, hidden, dropout   of the head, see align.head; published: hidden 256, dropout 0.25, kernel not said
    steps, images, rule, learning_rate, momentum, decay, anneal   of its training, see align.head; published: 5000 steps
                  (20000 for UniAD) of 16 images, "sgd" with 5e-2, 0.9 and 1e-4, not annealed
    """

    def __init__(
        self,
        channels: int,
        products: int,
        spread: str = "max",
        gap: str = "safe",
        units: bool = True,
        balanced: bool = True,
        threshold: float = 0.1,
        score: str = "own",
        top: float = 0.01,
        blur: bool = False,
        grid: int = 1,
        kernel: int = 1,
        hidden: int = 256,
        dropout: float = 0.5,
        steps: int = 100,
        images: int = 32,
        rule: str = "adam",
        learning_rate: float = 2e-3,
        momentum: float = 0.9,
        decay: float = 1e-4,
        anneal: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in {"spread": spread, "gap": gap}.items():
            if value not in CHOICES[name]:
                raise ConfigError(unknown_name(name, value, CHOICES[name]))
        if grid < 1 or not threshold > 0:
            raise ConfigError(f"grid={grid}, threshold={threshold}: expected at least 1, and a number above 0")
        if gap == "plain" and balanced:
            raise ConfigError(
                'gap="plain": errors in units of a predicted reach need a positive one, so set balanced to false'
            )
        self.spread, self.gap, self.units, self.balanced, self.threshold = spread, gap, units, balanced, threshold
        self.grid, self.seed = grid, seed
        self.output = Output(score, top, blur)
        self.schooling = Schooling(steps, images, rule, learning_rate, momentum, decay, anneal)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = Head(channels, 4 if score == "own" else 2, kernel, hidden, dropout)
        for name in ("level", "top", "score"):
            self.register_buffer(f"{name}_at", torch.tensor(float(name == "top" and gap == "safe")))
            self.register_buffer(f"{name}_by", torch.ones(()))

    # Learning.

    @torch.no_grad()
    def learn(self, pairs: Pairs) -> None:
        """Learn in place; products are not looked at."""
        known = pairs.statistics
        reach = known.reach(self.spread)
        if self.units:
            top = reach if self.gap == "safe" else known.level + reach
            for name, values in {"level": known.level, "top": top, "score": known.score}.items():
                self.get_buffer(f"{name}_at").copy_(values.mean())
                self.get_buffer(f"{name}_by").copy_(_size(values))
        school(self.head, pairs.views, self._loss(known.level, reach, known.score), self.schooling, self.seed)

    def _loss(self, level: Tensor, reach: Tensor, score: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Eq. 3 and, where the image score is aligned by itself, the negative log-likelihood of a Gaussian for it."""

        def loss(said: Tensor, images: Tensor) -> Tensor:
            scale = self._scale(said)
            first, second = scale.level - level[images], scale.reach - reach[images]
            if self.gap == "plain":
                second = second + first
            units = self._units(reach[images])
            total = self._smooth(first / units[0]) + self._smooth(second / units[1])
            if self.output.score == "map":
                return total
            return total + F.gaussian_nll_loss(scale.middle, score[images], scale.width.square(), eps=0.0)

        return loss

    def _smooth(self, errors: Tensor) -> Tensor:
        return F.smooth_l1_loss(errors, torch.zeros_like(errors), beta=self.threshold)

    def _units(self, reach: Tensor) -> tuple[Tensor, Tensor]:
        """In which the errors of both statistics count, for images of a true reach (m,)."""
        if self.balanced:
            own = reach.clamp(min=float(self._least()))
            return own, own
        return self.get_buffer("level_by"), self.get_buffer("top_by")

    def _least(self) -> Tensor:
        return LEAST * self.get_buffer("top_at").clamp(min=1e-12)

    # Scoring.

    def _scale(self, said: Tensor) -> Scale:
        """What the numbers of the head (N, 4), or (N, 2) where the image score is read off the map, stand for."""
        at, by = self.get_buffer, self.get_buffer
        level = at("level_at") + by("level_by") * said[:, 0]
        if self.gap == "safe":
            reach = at("top_at") * said[:, 1].clamp(max=MOST).exp() + self._least()
        else:
            reach = at("top_at") + by("top_by") * said[:, 1] - level
        if self.output.score == "map":
            return Scale(level, reach, level, reach)
        middle = at("score_at") + by("score_by") * said[:, 2]
        return Scale(level, reach, middle, by("score_by") * (said[:, 3].clamp(max=MOST).exp() + LEAST))

    @torch.no_grad()
    def forward(self, features: Features, scores: Scores) -> Scores:
        """Scores of N images on the common scale."""
        return self.output(scores, self._scale(self.head(view(features, scores, self.grid))), scores.products)


MOST = 12.0  # of the logarithm of a predicted reach over the mean reach


def _size(values: Tensor) -> Tensor:
    """Standard deviation, never 0."""
    return values.std(correction=0).clamp(min=1e-6 * float(values.abs().mean()) + 1e-12)
