"""CFLOW-AD: a normalising flow of single feature vectors for each level, conditioned on where they stand.

CFLOW-AD: real-time unsupervised anomaly detection with localization via conditional normalizing flows (Gudovskiy,
Ishizaka, Kozuka, 2022), https://arxiv.org/abs/2107.12571. Where the paper and its published code disagree the code is
followed; docs/flows.md lists where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from unispect.detectors.base import Group, Pass, VectorDetector, check_counts
from unispect.errors import ConfigError
from unispect.nn.coupling import Flow
from unispect.nn.likelihood import Tally, standard_normal, unlikely
from unispect.nn.position import positional_encoding
from unispect.types import Features, Scores


class Decoder(nn.Module):
    """The flow of one level and the positional encoding of its places; a pooled level has none."""

    condition: Tensor | None

    def __init__(self, shape: tuple[int, int, int], position: int, flow: Flow) -> None:
        super().__init__()
        self.shape, self.flow = shape, flow
        encoding = positional_encoding(position, *shape[1:]).flatten(1).T.to(torch.get_default_dtype())
        self.register_buffer("condition", encoding if position else None, persistent=False)

    def density(self, vectors: Tensor, places: Tensor | None = None) -> Tensor:
        """Log-likelihood per dimension of vectors (n, C) at places (n,); without them, through all places in turn."""
        return standard_normal(*self.flow(vectors, self.condition, places))

    def densities(self, level: Tensor) -> Tensor:
        """A level (N, C, h, w) -> (N, h, w)."""
        density = self.density(level.flatten(2).mT.flatten(0, 1))
        return density.reshape(-1, *self.shape[1:])


class CFLOW(VectorDetector):
    """Conditional normalising flows with the prior N(0, I), one decoder a level.

    shapes            (C, h, w) of each level
    products          K, number of products: taken and ignored, for one density serves all of them
    blocks, alpha, clamp   of the flow (see nn.coupling); published: 8 or 4, 1.9, "tanh"
    position          channels P of the positional encoding, a multiple of 4; 0: the unconditional flow of the paper's
                      ablation ("UFLOW"); published: 128. A level of one place has none
    mixing            of the channels after each block: the published "rotation" in SO(D), or a "permutation", as in
                      anomalib, which costs no arithmetic
    ceiling           quantile of the log-likelihoods of held-out normals that counts as fully normal; published: the
                      maximum over the test set
    map_side          side of the score map, pixels; there is no blur, as published

    Published training: 25 x 8 passes in steps of 32 images, whose vectors are shuffled and learnt from 256 at a time, Adam
    with 2e-4, betas 0.9 and 0.999 and no decay. Here 100 steps of 32 images, so that a laptop has it in minutes.
    """

    wants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "features": {"layers": ["blocks.2", "blocks.4", "blocks.6"], "pooled": []},
        "training": {
            "steps": 100,
            "places": 0,
            "vectors": 256,
            "learning_rate": 2e-4,
            "beta1": 0.9,
            "beta2": 0.999,
            "decay": 0.0,
        },
    }

    ceilings: Tensor

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        products: int,
        blocks: int = 8,
        position: int = 128,
        alpha: float = 1.9,
        clamp: str = "tanh",
        mixing: str = "rotation",
        ceiling: float = 0.999,
        map_side: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check(blocks, ceiling, map_side)
        self.ceiling, self.map_side = ceiling, map_side
        self.levels = nn.ModuleList()
        for number, shape in enumerate(shapes):
            encoded = position if shape[1] * shape[2] > 1 else 0
            flow = Flow(shape[0], encoded, blocks, alpha, clamp, seed=seed + number, mixing=mixing)
            self.levels.append(Decoder(shape, encoded, flow))
        self.register_buffer("ceilings", torch.zeros(len(shapes)))

    def level(self, number: int) -> Decoder:
        """Level by number."""
        level = self.levels[number]
        assert isinstance(level, Decoder)
        return level

    def grid(self, level: int) -> Tensor:
        """One cell of all places, (1, h*w): vectors are learnt from one by one."""
        _, height, width = self.level(level).shape
        return torch.arange(height * width)[None]

    def groups(self, level: int) -> list[Group]:
        """All of the flow's; the published training has no decay."""
        return [Group(list(self.level(level).flow.parameters()))]

    def prepare(self, train: Pass) -> None:
        """Nothing: published training begins with random couplings on raw features."""

    def loss(self, level: int, vectors: Tensor, places: Tensor, product: Tensor, progress: float) -> dict[str, Tensor]:
        """Mean of -log sigmoid(l), l the log-likelihood per dimension: the weight 1 - sigmoid(l) of a vector's gradient
        fades where it is likely already. The paper's Eq. 7 has the mean of -l, which is "nll"."""
        density = self.level(level).density(vectors.flatten(0, 2), places.flatten())
        return {"total": -logsigmoid(density).mean(), "nll": -density.mean()}

    def held_out_loss(self, level: int, vectors: Tensor, places: Tensor, product: Tensor) -> Tensor:
        """Negative log-likelihood per dimension, mean over the vectors."""
        return -self.level(level).density(vectors.flatten(0, 2), places.flatten()).mean()

    @torch.no_grad()
    def finish(self, train: Pass, held_out: Pass) -> None:
        """Ceilings of the likelihoods, from normal images that the flows were not trained on."""
        tallies = [Tally() for _ in self.levels]
        for features, _ in held_out():
            for tally, densities in zip(tallies, self._densities(features), strict=True):
                tally.add(densities)
        self.ceilings.copy_(torch.tensor([tally.quantile(self.ceiling) for tally in tallies]))

    def _densities(self, features: Features) -> list[Tensor]:
        return [self.level(number).densities(level) for number, level in enumerate(features)]

    @torch.no_grad()
    def likelihoods(self, features: Features, product: Tensor) -> list[Tensor]:
        """Log-likelihood per dimension, nats, (N, h, w) of each level; the product has no say."""
        return self._densities(features)

    @torch.no_grad()
    def forward(self, features: Features) -> Scores:
        """L levels (N, C, h, w) -> scores with maps (N, side, side); the image score is the highest of its map."""
        maps = unlikely(self._densities(features), self.ceilings, self.map_side)
        return Scores(maps.flatten(1).amax(1), maps)


def _check(blocks: int, ceiling: float, map_side: int) -> None:
    check_counts(blocks=blocks, map_side=map_side)
    if not 0 < ceiling <= 1:
        raise ConfigError(f"ceiling: got {ceiling}, expected above 0 and up to 1")
