"""Scores and maps under a level and a reach of their own: what all aligners do once they know both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unispect.errors import ConfigError, unknown_name
from unispect.nn.maps import top_mean
from unispect.types import Scores

SCORES = ("own", "map")


@dataclass(frozen=True, slots=True)
class Scale:
    """What the score of a normal image is like, (N,) each: of its map's places the level u and the reach g - u; of its image
    score the middle and the width."""

    level: Tensor
    reach: Tensor
    middle: Tensor
    width: Tensor

    def of(self, product: Tensor) -> Scale:
        """Of images of these products (N,), where this is one of each product."""
        return Scale(self.level[product], self.reach[product], self.middle[product], self.width[product])


@dataclass(frozen=True, slots=True)
class Output:
    """What comes out.

    score   "own": the detector's image score on the common scale; "map": the mean of the highest places of the aligned
            map, as published
    top     share of the highest places in the second case
    blur    smooth the aligned map by the published 5 x 5 kernel, for detectors whose maps come unblurred
    """

    score: str
    top: float
    blur: bool

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ConfigError(unknown_name("score", self.score, SCORES))
        if not 0 < self.top <= 1:
            raise ConfigError(f"top: got {self.top}, expected a share above 0 and up to 1")

    def __call__(self, scores: Scores, scale: Scale, products: Tensor | None) -> Scores:
        """Aligned map (M - u) / (g - u), Eq. 5 of CADA, and image score."""
        maps = (scores.maps - scale.level[:, None, None]) / scale.reach[:, None, None]
        maps = smoothed(maps) if self.blur else maps
        image = (scores.image - scale.middle) / scale.width if self.score == "own" else top_mean(maps, self.top)
        before = scores.image if scores.unaligned is None else scores.unaligned
        return Scores(image, maps, products, before)


def smoothed(maps: Tensor) -> Tensor:
    """5 x 5 Gaussian of nominal sigma 4 with zeros outside, as in the first author's published evaluation, (N, h, w)."""
    line = torch.exp(-torch.arange(-2, 3, dtype=maps.dtype, device=maps.device).square() / (2 * 4**2))
    kernel = (line / line.sum())[None, None, :, None]
    across = F.conv2d(maps[:, None], kernel, padding=(2, 0))
    return F.conv2d(across, kernel.transpose(2, 3), padding=(0, 2))[:, 0]
