"""FastFlow: a normalising flow of whole feature maps for each level, with convolutions inside its couplings.

FastFlow: unsupervised anomaly detection and localization via 2D normalizing flows (Yu, Zheng, Wang, Li, Wu, Zhao, Wu,
2021), https://arxiv.org/abs/2111.07677. The authors published no code; "published" here means the usual re-implementation
(github.com/gathierry/FastFlow), whose numbers are the ones compared with. docs/flows.md lists the differences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unispect.detectors.base import Group, Pass, VectorDetector, check_counts
from unispect.errors import ConfigError
from unispect.nn.coupling import Flow
from unispect.nn.likelihood import standard_normal
from unispect.nn.maps import upsampled
from unispect.types import Features, Scores


class FlowStep(nn.Module):
    """One level: the map to mean 0 and variance 1, image by image, then the flow."""

    def __init__(self, shape: tuple[int, int, int], affine: bool, flow: Flow) -> None:
        super().__init__()
        self.shape, self.flow = shape, flow
        self.norm = nn.LayerNorm(shape, elementwise_affine=affine)

    def as_maps(self, vectors: Tensor) -> Tensor:
        """Vectors of all places in order, (m, h*w, 1, C) -> (m, C, h, w)."""
        channels, height, width = self.shape
        if vectors.shape[1:] != (height * width, 1, channels):
            raise ConfigError(
                f"vectors: got {tuple(vectors.shape)}, expected whole maps (m, {height * width}, 1, {channels}): "
                "FastFlow reads no single vectors, so leave training.vectors at 0"
            )
        maps: Tensor = vectors[:, :, 0].mT.unflatten(2, (height, width))
        return maps

    def latent(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (N, C, h, w) -> latent maps and the parts of the places in the log-determinant, (N, h, w)."""
        z, logdet = self.flow.by_place(self.norm(maps))
        return z, logdet

    def density(self, maps: Tensor) -> Tensor:
        """Log-likelihood per dimension of the normalised map, (N, h, w); its mean over the places is that of the map."""
        return standard_normal(*self.latent(maps))


class FastFlow(VectorDetector):
    """Normalising flows of maps with the prior N(0, I), one a level.

    shapes            (C, h, w) of each level
    products          K, number of products: taken and ignored, for one density serves all of them
    blocks, alpha, clamp   of the flow (see nn.coupling); published: 8 for networks of convolutions, 20 for transformers,
                      2.0, "tanh"
    mixing            of the channels after each block: the published "permutation", or a "rotation"
    kernels           of the blocks in turn; published: [3] for ResNet-18, [3, 1] for others
    ratio             hidden channels of a subnet for each of its inputs; published: 1.0, 0.16 for transformers
    affine            scale and offset of every number of a map, learnt, after its normalisation to mean 0 and variance 1;
                      published: true. They are not in the log-determinant, so the loss falls without end as they shrink
                      and the flow grows, and says nothing: set training.checks to 0 with it. The normalisation itself is
                      not in it either: the likelihood is one of normalised maps
    per_dimension     divide the loss by C h w. Adam does not mind, but decay is then as strong on every level; published:
                      false
    map_side          side of the score map, pixels; there is no blur, as published

    Published training: 500 passes in steps of 32 images, Adam with 1e-3, decay 1e-5, no schedule. Here 400 steps of 8
    images, with the schedule that every flow here has.
    """

    wants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "features": {"layers": ["blocks.3", "blocks.4"], "pooled": []},
        "training": {"images": 8, "learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.999, "decay": 1e-5},
    }

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        products: int,
        blocks: int = 8,
        alpha: float = 2.0,
        clamp: str = "tanh",
        mixing: str = "permutation",
        kernels: tuple[int, ...] = (3,),
        ratio: float = 1.0,
        affine: bool = False,
        per_dimension: bool = False,
        map_side: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check(blocks, kernels, map_side)
        self.per_dimension, self.map_side = per_dimension, map_side
        self.levels = nn.ModuleList()
        for number, shape in enumerate(shapes):
            own = seed + number
            flow = Flow(shape[0], 0, blocks, alpha, clamp, seed=own, mixing=mixing, kernels=kernels, ratio=ratio)
            self.levels.append(FlowStep(shape, affine, flow))

    def level(self, number: int) -> FlowStep:
        """Level by number."""
        level = self.levels[number]
        assert isinstance(level, FlowStep)
        return level

    def grid(self, level: int) -> Tensor:
        """A cell a place, (h*w, 1): maps are always whole."""
        _, height, width = self.level(level).shape
        return torch.arange(height * width)[:, None]

    def groups(self, level: int) -> list[Group]:
        """All with decay, as published."""
        return [Group(list(self.level(level).parameters()))]

    def prepare(self, train: Pass) -> None:
        """Nothing: training begins with random couplings."""

    def loss(self, level: int, vectors: Tensor, places: Tensor, product: Tensor, progress: float) -> dict[str, Tensor]:
        """Mean over the maps of |z|^2 / 2 - log-determinant; "nll" is the log-likelihood per dimension, negative."""
        part = self.level(level)
        z, logdet = part.latent(part.as_maps(vectors))
        total = (z.square().sum(1) / 2 - logdet).sum((1, 2)).mean()
        nll = -standard_normal(z, logdet).mean()
        return {"total": total / z[0].numel() if self.per_dimension else total, "nll": nll}

    def held_out_loss(self, level: int, vectors: Tensor, places: Tensor, product: Tensor) -> Tensor:
        """Negative log-likelihood per dimension, mean over the maps. No criterion where `affine` is true."""
        part = self.level(level)
        return -part.density(part.as_maps(vectors)).mean()

    def finish(self, train: Pass, held_out: Pass) -> None:
        """Nothing: scores need no scale of their own."""

    @torch.no_grad()
    def likelihoods(self, features: Features, product: Tensor) -> list[Tensor]:
        """Log-likelihood per dimension of the normalised maps, nats, place by place, (N, h, w) of each level.

        A coupling's log-determinant is a sum over places; its parts are given to theirs. The product has no say.
        """
        return [self.level(number).density(level) for number, level in enumerate(features)]

    @torch.no_grad()
    def forward(self, features: Features) -> Scores:
        """L levels (N, C, h, w) -> scores with maps (N, side, side): the mean over levels of -exp(-mean of z^2 / 2)."""
        parts = [
            -torch.exp(-self.level(number).latent(level)[0].square().mean(1) / 2) for number, level in enumerate(features)
        ]
        maps = torch.stack([upsampled(part, self.map_side, aligned=False) for part in parts]).mean(0)
        return Scores(maps.flatten(1).amax(1), maps)


def _check(blocks: int, kernels: Sequence[int], map_side: int) -> None:
    check_counts(blocks=blocks, map_side=map_side)
    if not kernels:
        raise ConfigError("kernels=[]: expected at least one odd number, such as [3] or [3, 1]")
