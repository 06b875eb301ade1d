"""Reverse distillation (RD4AD, RevDist): what a decoder cannot give back of a frozen encoder's features is abnormal.

Anomaly detection via reverse distillation from one-class embedding (Deng, Li, 2022), https://arxiv.org/abs/2201.10703
Its recipe for many products is that of CADA's base model, from class-agnostic distribution alignment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unispect.detectors.base import Group, ImageDetector, Pass, check_choices, check_counts, check_shares, with_places
from unispect.nn.decoder import ACTIVATIONS, JOINED, Bottleneck, Decoder, global_cosine, joined_distance
from unispect.nn.maps import blurred, top_mean
from unispect.types import Features, Scores

CHOICES = {"activation": tuple(ACTIVATIONS), "joined": JOINED}


class Student(nn.Module):
    """Bottleneck and decoder: levels (N, C, h, w) -> the narrow map, and the same levels again."""

    def __init__(self, shapes: Sequence[tuple[int, int, int]], depths: Sequence[int], activation: str) -> None:
        super().__init__()
        self.bottleneck, self.decoder = Bottleneck(shapes), Decoder(shapes, depths, activation)

    def forward(self, levels: Features) -> tuple[Tensor, list[Tensor]]:
        narrow = self.bottleneck(levels)
        return narrow, self.decoder(narrow)


class RevDist(ImageDetector):
    """A student decoder for all products, learnt from the features of good images.

    shapes       (C, h, w) of each level; those that have places are used, each with half the grid of the one before
    products     K, number of products: taken and ignored, for one decoder serves all of them
    depths       residual blocks of the decoder's stages, the coarsest first; published: 3, 4, 6
    activation   of the decoder, "relu" as published for one product or "gelu" as for many
    joined       the maps of the levels, by their "sum" as published for one product or their "mean" as for many
    top          share of the highest places whose mean is the image's score; 0: the highest alone, as published
    map_side, sigma   side of the score map and its blur, pixels

    Published training for one product: 200 passes in steps of 16 images, Adam with 5e-3, betas 0.5 and 0.999. For many:
    5000 steps, as below. Here fewer, so that a laptop has it in minutes.
    """

    wants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "features": {"layers": ["blocks.1", "blocks.2", "blocks.4"], "pooled": []},
        "training": {
            "steps": 600,
            "images": 16,
            "rule": "adamw",
            "learning_rate": 2e-3,
            "beta1": 0.9,
            "beta2": 0.999,
            "epsilon": 1e-10,
            "amsgrad": True,
            "decay": 1e-5,
            "schedule": "drop",
        },
    }

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        products: int,
        depths: tuple[int, ...] = (3, 4, 6),
        activation: str = "gelu",
        joined: str = "mean",
        top: float = 0.01,
        map_side: int = 256,
        sigma: float = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choices(CHOICES, activation=activation, joined=joined)
        check_counts(map_side=map_side)
        if top:
            check_shares(top=top)
        self.dense = with_places(shapes)
        self.joined, self.top, self.map_side, self.sigma = joined, top, map_side, sigma
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.levels = nn.ModuleList([Student([shapes[number] for number in self.dense], depths, activation)])

    @property
    def student(self) -> Student:
        """All that is learnt."""
        student = self.levels[0]
        assert isinstance(student, Student)
        return student

    def groups(self, level: int) -> list[Group]:
        """All alike, as published."""
        return [Group(list(self.student.parameters()))]

    def prepare(self, train: Pass) -> None:
        """Nothing: training begins with random weights."""

    def loss(self, features: Features, product: Tensor, progress: float) -> dict[str, Tensor]:
        """Sum over the levels of 1 - cosine of whole maps."""
        return {"total": self._distance(features)}

    def held_out_loss(self, features: Features, product: Tensor) -> Tensor:
        """The loss itself."""
        return self._distance(features)

    def finish(self, train: Pass, held_out: Pass) -> None:
        """Nothing: scores need no scale of their own."""

    def _distance(self, features: Features) -> Tensor:
        levels = self._used(features)
        pairs = zip(levels, self.student(levels)[1], strict=True)
        return torch.stack([global_cosine(encoder, decoder) for encoder, decoder in pairs]).sum()

    def _used(self, features: Features) -> Features:
        return [features[number] for number in self.dense]

    @torch.no_grad()
    def forward(self, features: Features) -> Scores:
        """L levels (N, C, h, w) -> scores with maps (N, side, side), and the bottleneck as their context."""
        levels = self._used(features)
        narrow, again = self.student(levels)
        maps = blurred(joined_distance(levels, again, self.map_side, self.joined), self.sigma)
        image = top_mean(maps, self.top) if self.top else maps.flatten(1).amax(1)
        return Scores(image, maps, context=narrow)
