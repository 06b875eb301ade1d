"""ReContrast: a frozen and a trained encoder, and one decoder that predicts of each what the other sees.

ReContrast: domain-specific anomaly detection via contrastive reconstruction (Guo, Lu, Jia, Zhang, Li, 2023),
https://arxiv.org/abs/2306.02602. "Published" means also the authors' code. Its recipe for many products is that of CADA's
base model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unispect.detectors.base import Group, ImageDetector, Pass, check_choices, check_counts, check_shares, with_places
from unispect.errors import ConfigError
from unispect.nn.decoder import (
    ACTIVATIONS,
    JOINED,
    Bottleneck,
    Decoder,
    Heads,
    global_cosine,
    joined_distance,
    place_distance,
)
from unispect.nn.maps import blurred, top_mean
from unispect.types import Features, Scores

CHOICES = {"activation": tuple(ACTIVATIONS), "joined": JOINED}
EASIEST, HARDEST, RAMP = -3.0, 1.0, 0.1  # published: from, to, and the share of the training in which it rises
STAIRS = 20  # of the rise


class Networks(nn.Module):
    """All that is learnt: an encoder, bottleneck and decoder for both encoders, and a set of heads for either."""

    def __init__(
        self, encoder: nn.Module, shapes: Sequence[tuple[int, int, int]], depths: Sequence[int], activation: str
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.bottleneck, self.decoder = Bottleneck(shapes), Decoder(shapes, depths, activation)
        self.heads = nn.ModuleList([Heads(shapes), Heads(shapes)])

    def forward(self, frozen: Features, trained: Features) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Levels (N, C, h, w) of both encoders -> what the trained one's make of the frozen one's, what the frozen one's
        make of the trained one's, and the narrow map of the frozen one's."""
        count = frozen[0].shape[0]
        narrow = self.bottleneck([torch.cat(pair) for pair in zip(trained, frozen, strict=True)])
        again = self.decoder(narrow)
        first, second = self.heads
        return first([level[:count] for level in again]), second([level[count:] for level in again]), narrow[count:]


class ReContrast(ImageDetector):
    """Two encoders of the same start, one of which is trained; of each, the other's features are to be predicted.

    An encoder that is trained with its own decoder would agree with it on a constant. Here gradients reach it only through
    what the decoder is given, never through what it is to predict.

    shapes       (C, h, w) of each level, the image's last (features.image); those with places are used, each with half the
                 grid of the one before
    products     K, number of products: taken and ignored, for the networks serve all of them
    encoder      a copy of the network that the features come from, to be trained: images (N, 3, H, W) in [0, 1] -> all
                 levels but the image
    depths       residual blocks of the decoder's stages, the coarsest first; published: 3, 4, 6
    activation   of the decoder, "relu" as published for one product or "gelu" as for many
    encoder_pace learning rate of the encoder relative to that of all else; published: 1e-5 to 2e-3
    joined       the six maps by their "sum" as published for one product or their "mean" as for many
    top          share of the highest places whose mean is the image's score; 0: the highest alone, as published for one
    map_side, sigma   side of the score map and its blur, pixels

    Published training: 5000 steps of 16 images for many products, 2000 for one. Here fewer, for a CPU.
    """

    wants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "features": {"layers": ["blocks.1", "blocks.2", "blocks.4"], "pooled": [], "image": True},
        "training": {
            "steps": 200,
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
    trains_encoder = True
    stages = tuple(RAMP * stair / STAIRS for stair in range(1, STAIRS + 1))

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        products: int,
        encoder: nn.Module,
        depths: tuple[int, ...] = (3, 4, 6),
        activation: str = "gelu",
        encoder_pace: float = 0.005,
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
        if not encoder_pace >= 0:
            raise ConfigError(f"encoder_pace: got {encoder_pace}, expected at least 0")
        self.dense = with_places(shapes[:-1])
        self.encoder_pace, self.joined, self.top, self.map_side, self.sigma = encoder_pace, joined, top, map_side, sigma
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            used = [shapes[number] for number in self.dense]
            self.levels = nn.ModuleList([Networks(encoder, used, depths, activation)])

    @property
    def networks(self) -> Networks:
        """All that is learnt."""
        networks = self.levels[0]
        assert isinstance(networks, Networks)
        return networks

    def train(self, mode: bool = True) -> ReContrast:
        """The encoder's batch normalisation keeps the statistics that it came with, as published for many products."""
        super().train(mode)
        self.networks.encoder.eval()
        return self

    def groups(self, level: int) -> list[Group]:
        """The encoder at its own pace, and all else."""
        encoder = list(self.networks.encoder.parameters())
        own = {id(parameter) for parameter in encoder}
        others = [parameter for parameter in self.networks.parameters() if id(parameter) not in own]
        return [Group(others), Group(encoder, pace=self.encoder_pace)]

    def prepare(self, train: Pass) -> None:
        """Nothing: the encoder begins as the frozen one, all else with random weights."""

    def loss(self, features: Features, product: Tensor, progress: float) -> dict[str, Tensor]:
        """Mean over both directions of the sum over the levels of 1 - cosine of whole maps; places that are easy by then
        lend it no gradient."""
        return {"total": self._distance(features, strictness(progress))}

    def held_out_loss(self, features: Features, product: Tensor) -> Tensor:
        """The same number; its value does not depend on what is easy."""
        return self._distance(features, HARDEST)

    def finish(self, train: Pass, held_out: Pass) -> None:
        """Nothing: scores need no scale of their own."""

    def _distance(self, features: Features, strict: float) -> Tensor:
        pairs, _ = self._pairs(features)
        return torch.stack([global_cosine(goal, hard_only(goal, said, strict)) for goal, said in pairs]).sum() / 2

    def _pairs(self, features: Features) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """What was to be predicted, without a gradient, and what was: of the frozen encoder, then of the trained one. And
        the narrow map of the frozen one."""
        frozen = [features[number] for number in self.dense]
        seen = self.networks.encoder(features[-1])
        trained = [seen[number] for number in self.dense]
        of_frozen, of_trained, narrow = self.networks(frozen, trained)
        goals = [*frozen, *(level.detach() for level in trained)]
        return list(zip(goals, [*of_frozen, *of_trained], strict=True)), narrow

    @torch.no_grad()
    def forward(self, features: Features) -> Scores:
        """L levels (N, C, h, w) and the image -> scores with maps (N, side, side), and the frozen encoder's half of the
        bottleneck as their context."""
        pairs, narrow = self._pairs(features)
        goals, said = zip(*pairs, strict=True)
        maps = blurred(joined_distance(goals, said, self.map_side, self.joined), self.sigma)
        image = top_mean(maps, self.top) if self.top else maps.flatten(1).amax(1)
        return Scores(image, maps, context=narrow)


def strictness(progress: float) -> float:
    """How many standard deviations above the mean a place's distance must lie to be hard, after a share of the training."""
    return min(EASIEST + (HARDEST - EASIEST) * progress / RAMP, HARDEST)


def hard_only(goal: Tensor, said: Tensor, strict: float) -> Tensor:
    """`said` (N, C, h, w), through whose easy places no gradient passes.

    Easy is a distance below mean + strict * standard deviation, over all places of all images.
    """
    distance = place_distance(goal, said.detach())
    easy = distance < distance.mean() + strict * distance.std()
    return torch.where(easy[:, None], said.detach(), said)
