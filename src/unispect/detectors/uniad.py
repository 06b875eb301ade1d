"""UniAD: a transformer that puts together the features of normal images; what it cannot put together is abnormal.

A unified model for multi-class anomaly detection (You, Cui, Shen, Yang, Lu, Zheng, Le, 2022),
https://arxiv.org/abs/2206.03687. "Published" means the authors' code (github.com/zhiyuanyou/UniAD), which is followed where
it says more than the paper. docs/reconstruction.md lists the differences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unispect.detectors.base import Group, ImageDetector, Pass, check_choices, check_counts
from unispect.errors import ConfigError
from unispect.nn.attention import EncoderLayer, QueryLayer, linear, neighbour_mask
from unispect.nn.maps import box_mean, magnified
from unispect.nn.position import LearntPosition
from unispect.types import Features, Scores

CHOICES = {"map": ("root", "mean")}


class Transformer(nn.Module):
    """Encoder and decoder of UniAD on the tokens of a square grid, t = side^2.

    channels        C, of a token
    side            of the grid, places
    neighbourhood   side of the window that no place may look into, in any attention; 0: none
    others          see nn.attention
    """

    mask: Tensor | None

    def __init__(
        self,
        channels: int,
        side: int,
        width: int,
        heads: int,
        hidden: int,
        layers: int,
        neighbourhood: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.entry, self.exit = linear(channels, width), linear(width, channels)
        self.position = LearntPosition(width, side, side)
        self.encoder = nn.ModuleList([EncoderLayer(width, heads, hidden, dropout) for _ in range(layers)])
        self.decoder = nn.ModuleList([QueryLayer(side * side, width, heads, hidden, dropout) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.register_buffer("mask", neighbour_mask(side, neighbourhood) if neighbourhood else None, persistent=False)

    def memory(self, tokens: Tensor) -> Tensor:
        """Output of the encoder, (N, t, C) -> (N, t, W)."""
        x: Tensor = self.entry(tokens)
        for layer in self.encoder:
            x = layer(x, self.position(), self.mask)
        return x

    def rebuilt(self, memory: Tensor) -> Tensor:
        """The tokens as the decoder puts them together from the encoder's output, (N, t, W) -> (N, t, C)."""
        x = memory
        for layer in self.decoder:
            x = layer(x, memory, self.position(), self.mask)
        tokens: Tensor = self.exit(self.norm(x))
        return tokens


class UniAD(ImageDetector):
    """Transformer that rebuilds the features of normal images of all products. It sees no product, in training or after.

    shapes            (C, h, w) of each level; those of a single place, 1 x 1, are not used
    products          K, number of products: taken and ignored, for one transformer serves all of them
    grid              side of the grid that every level is brought to, whose channels make one token a place; published: 14
    width, heads, hidden   channels of a token inside, heads of an attention, channels between the two linear layers of a
                      layer; published: 256, 8, 1024
    layers            of the encoder, and as many of the decoder; published: 4
    neighbourhood     side of the window around a place that it may not look into, odd; 0: none; published: 7
    dropout           in training, see nn.attention; published: 0.1
    jitter            size of the noise on the tokens in training: each channel of a token f gets jitter |f| / C of N(0, 1);
                      published: 20
    jitter_probability   share of the steps that have it; published: 1
    image             side of the square over which the map is averaged; the highest average is the image score;
                      published: 16
    map               "root": root of the squared error summed over channels, brought to size with aligned corners, as
                      published; "mean": its mean over channels, without aligned corners, as CADA uses UniAD
    map_side, sigma   side of the score map and its blur, pixels; published: the image's side, 224, and none

    Published training: 1000 passes in steps of 64 images, AdamW with 1e-4, decay 1e-4, a tenth of the rate after 80 %, the
    gradient's norm clipped to 0.1.
    """

    wants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "features": {"layers": ["blocks.1", "blocks.2", "blocks.4"], "pooled": []},
        "training": {
            "steps": 200,
            "images": 8,
            "rule": "adamw",
            "learning_rate": 4e-4,
            "beta1": 0.9,
            "beta2": 0.999,
            "decay": 1e-4,
            "clip": 0.1,
            "schedule": "drop",
            "drops": [0.8],
            "drop": 0.1,
        },
    }

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        products: int,
        grid: int = 14,
        width: int = 256,
        heads: int = 8,
        hidden: int = 1024,
        layers: int = 4,
        neighbourhood: int = 7,
        dropout: float = 0.1,
        jitter: float = 20.0,
        jitter_probability: float = 1.0,
        image: int = 16,
        map: str = "root",
        map_side: int = 256,
        sigma: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_counts(grid=grid, width=width, heads=heads, hidden=hidden, layers=layers, image=image, map_side=map_side)
        check_choices(CHOICES, map=map)
        _check(dropout, jitter, jitter_probability, image, map_side)
        self.grid, self.jitter, self.jitter_probability = grid, jitter, jitter_probability
        self.image, self.map, self.map_side, self.sigma = image, map, map_side, sigma
        self.dense = _dense(shapes)
        channels = sum(shapes[number][0] for number in self.dense)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.levels = nn.ModuleList([Transformer(channels, grid, width, heads, hidden, layers, neighbourhood, dropout)])

    @property
    def transformer(self) -> Transformer:
        """All that is learnt."""
        transformer = self.levels[0]
        assert isinstance(transformer, Transformer)
        return transformer

    def groups(self, level: int) -> list[Group]:
        """All with decay, as published."""
        return [Group(list(self.transformer.parameters()))]

    def prepare(self, train: Pass) -> None:
        """Nothing: the published training begins with random weights on raw features."""

    def tokens(self, features: Features) -> Tensor:
        """Levels (N, C, h, w) on one grid, their channels after one another, (N, grid^2, C). No antialias, as published."""
        side = (self.grid, self.grid)
        dense = [F.interpolate(features[n], side, mode="bilinear", align_corners=True) for n in self.dense]
        return torch.cat(dense, 1).flatten(2).mT

    def loss(self, features: Features, product: Tensor, progress: float) -> dict[str, Tensor]:
        """Mean squared error of tokens rebuilt from ones with noise."""
        tokens = self.tokens(features)
        return {"total": self._error(tokens, self._jittered(tokens))}

    def held_out_loss(self, features: Features, product: Tensor) -> Tensor:
        """Mean squared error of tokens rebuilt from themselves."""
        tokens = self.tokens(features)
        return self._error(tokens, tokens)

    def _error(self, tokens: Tensor, given: Tensor) -> Tensor:
        return F.mse_loss(self.transformer.rebuilt(self.transformer.memory(given)), tokens)

    def _jittered(self, tokens: Tensor) -> Tensor:
        """Tokens (N, t, C) with noise in training, as they are otherwise."""
        if not self.training:
            return tokens
        drawn = torch.rand((), device=tokens.device) < self.jitter_probability
        size = self.jitter * tokens.norm(dim=2, keepdim=True) / tokens.shape[2]
        noise: Tensor = drawn * size * torch.randn_like(tokens)
        return tokens + noise

    def finish(self, train: Pass, held_out: Pass) -> None:
        """Nothing: scores need no scale of their own."""

    @torch.no_grad()
    def forward(self, features: Features) -> Scores:
        """L levels (N, C, h, w) -> scores with maps (N, side, side) and the encoder's output, (N, W, grid, grid)."""
        tokens = self.tokens(features)
        memory = self.transformer.memory(tokens)
        maps = self._map((self.transformer.rebuilt(memory) - tokens).square())
        image = box_mean(maps, self.image).flatten(1).amax(1)
        return Scores(image, maps, context=self._gridded(memory.mT))

    def _map(self, squared: Tensor) -> Tensor:
        """Squared errors (N, grid^2, C) -> (N, side, side)."""
        root = self.map == "root"
        errors = self._gridded(squared.sum(2).sqrt() if root else squared.mean(2))
        return magnified(errors, self.map_side, self.sigma, aligned=root)

    def _gridded(self, values: Tensor) -> Tensor:
        """(..., grid^2) -> (..., grid, grid)."""
        gridded: Tensor = values.unflatten(-1, (self.grid, self.grid))
        return gridded


def _dense(shapes: Sequence[tuple[int, int, int]]) -> list[int]:
    """Numbers of the levels that have several places."""
    dense = [number for number, (_, height, width) in enumerate(shapes) if height * width > 1]
    if not dense:
        raise ConfigError(f"shapes={list(shapes)}: UniAD needs a level with several places, expected one in features.layers")
    return dense


def _check(dropout: float, jitter: float, jitter_probability: float, image: int, map_side: int) -> None:
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout: got {dropout:g}, expected a share from 0 to below 1")
    if not jitter >= 0:
        raise ConfigError(f"jitter: got {jitter:g}, expected a number above 0, or 0 for none")
    if not 0 <= jitter_probability <= 1:
        raise ConfigError(f"jitter_probability: got {jitter_probability:g}, expected a number from 0 to 1")
    if image > map_side:
        raise ConfigError(f"image: got {image}, expected at most map_side={map_side}")
