"""Layers of a frozen network on copies of the image at several scales, as HGAD uses them, and pooled over the image.

*Hierarchical Gaussian Mixture Normalizing Flow Modeling for Unified Anomaly Detection* (Yao et al., 2024),
https://arxiv.org/abs/2403.13349
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from unispect.errors import ConfigError
from unispect.features.backbones import Backbone
from unispect.features.base import Extractor
from unispect.types import Features


class PyramidExtractor(Extractor):
    """Every layer at every scale is one dense level; after them, every pooled layer is one 1 x 1 level.

    backbone   name of a timm network, with its weight tag where it has several ("tf_efficientnet_b6.aa_in1k")
    layers     layers that give dense levels
    scales     sides of the copies relative to the image
    pooled     layers whose mean over the places of the full image is a level; may be deeper than `layers`
    weights    where the weights come from, see `weights.load_backbone_weights`
    joined     the layers of one scale make one level: brought to the largest of their grids and put after one another
    padding    of the convolutions, see `backbones.Backbone`
    """

    def __init__(
        self,
        backbone: str,
        layers: Sequence[str | int],
        scales: Sequence[float] = (1.0,),
        pooled: Sequence[str | int] = (),
        weights: str = "auto",
        joined: bool = False,
        padding: str = "zeros",
    ) -> None:
        super().__init__()
        _check_scales(scales)
        self.joined = joined
        self.scales = tuple(float(scale) for scale in scales)
        self.backbone = Backbone(backbone, [*layers, *pooled], weights, padding)
        self.layers = _distinct("layers", self.backbone.layers[: len(layers)])
        self.pooled = _distinct("pooled", self.backbone.layers[len(layers) :])

    def forward(self, images: Tensor) -> Features:
        return self.levels(images.float() / 255)

    def levels(self, images: Tensor) -> Features:
        """(N, 3, H, W) in [0, 1] -> L levels (N, C, h, w)."""
        image = self.backbone.standardise(images)
        runs = {scale: self.backbone.levels(_scaled(image, scale), self._wanted(scale)) for scale in self._runs()}
        dense = [level for scale in self.scales for level in self._dense(runs[scale])]
        return dense + [runs[1.0][layer].mean((2, 3), keepdim=True) for layer in self.pooled]

    @property
    def channels(self) -> tuple[int, ...]:
        widths = dict(zip(self.backbone.layers, self.backbone.channels, strict=True))
        dense = [sum(widths[layer] for layer in self.layers)] if self.joined else [widths[layer] for layer in self.layers]
        return (*dense * len(self.scales), *(widths[layer] for layer in self.pooled))

    @property
    def level_names(self) -> tuple[str, ...]:
        layers = ["+".join(self.layers)] if self.joined else self.layers
        dense = [layer if scale == 1 else f"{layer}@{scale:g}" for scale in self.scales for layer in layers]
        return (*dense, *(f"pool:{layer}" for layer in self.pooled))

    @property
    def fingerprint(self) -> str:
        backbone = self.backbone
        constants = [backbone.mean.flatten().tolist(), backbone.std.flatten().tolist()]
        parts: list[object] = ["pyramid", backbone.source.backbone.partition(".")[0], backbone.sha256, constants]
        parts += [self.scales, self.layers, self.pooled, *(["joined"] if self.joined else [])]
        parts += [] if backbone.padding == "zeros" else [backbone.padding]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _dense(self, run: Mapping[str, Tensor]) -> Features:
        levels = [run[layer] for layer in self.layers]
        if not self.joined:
            return levels
        grid = max((level.shape[2:] for level in levels), key=lambda shape: shape[0] * shape[1])
        return [torch.cat([interpolate(level, grid, mode="bilinear", align_corners=False) for level in levels], 1)]

    def _runs(self) -> tuple[float, ...]:
        return tuple(dict.fromkeys((*self.scales, *([1.0] if self.pooled else []))))

    def _wanted(self, scale: float) -> set[str]:
        dense = self.layers if scale in self.scales else ()
        return {*dense, *(self.pooled if scale == 1 else ())}


class TrainedEncoder(nn.Module):
    """A copy of an extractor's network that can be trained; its batch normalisation stays as it is."""

    def __init__(self, extractor: PyramidExtractor) -> None:
        super().__init__()
        self.extractor = deepcopy(extractor).requires_grad_()

    def forward(self, images: Tensor) -> Features:
        """(N, 3, H, W), grey levels / 255, if need be in half precision -> L levels as the extractor gives them."""
        return self.extractor.levels((255 * images).round() / 255)


def _scaled(image: Tensor, scale: float) -> Tensor:
    """(N, 3, H, W) -> (N, 3, scale H, scale W). Corners aligned and no antialias, as in the published code of HGAD."""
    if scale == 1:
        return image
    size = [round(int(side) * scale) for side in image.shape[-2:]]
    return interpolate(image, size, mode="bilinear", align_corners=True)


def _check_scales(scales: Sequence[float]) -> None:
    if not scales or len(set(scales)) < len(scales) or any(not 0 < scale <= 1 for scale in scales):
        raise ConfigError(f"scales={list(scales)}: expected one or more different numbers above 0 and up to 1")


def _distinct(argument: str, layers: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(layers)) < len(layers):
        raise ConfigError(f"{argument}={list(layers)}: expected each layer only once")
    return layers
