"""A learnt model as torch programs: uint8 images of any size -> prepared images -> score, map, products, novelty.

Preparation, network, detector and alignment are inside; thresholds are not, so that they can change without it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from unispect.data.loader import Preparation
from unispect.features.engine import WithImage
from unispect.inspector import Inspector
from unispect.types import Features, Scores

INPUT, BETWEEN = "images", "prepared"  # names in the graph
NAMES = ("score", "map", "product", "novelty")


class Prepared(nn.Module):
    """What `Preparation.image` makes of images, as tensor operations: Pillow's resizing, to a grey level.

    Pillow resizes along the rows, rounds, then along the columns, and rounds, with weights in fixed point; here they are
    floats, which changes one grey level where a value lies next to the half of one. An image that has the size already
    comes out as it is.

    products   resize by matrix products also where there is an operation for it, which OpenVINO's reader of ONNX gets wrong
    """

    def __init__(self, preparation: Preparation, products: bool = False) -> None:
        super().__init__()
        self.size, self.fit, self.filter = preparation.size, preparation.fit, preparation.filter
        self.products = products or (self.fit, self.filter) != ("squash", "bilinear")

    def forward(self, images: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 -> (N, 3, size, size) float32, whole numbers from 0 to 255."""
        x = images.permute(0, 3, 1, 2).float()
        if not self.products:
            rows = _rounded(interpolate(x, (x.shape[2], self.size), mode="bilinear", antialias=True))
            return _rounded(interpolate(rows, (self.size, self.size), mode="bilinear", antialias=True))
        height, width = x.shape[2], x.shape[3]
        across, down = (width, height) if self.fit == "squash" else (torch.sym_min(height, width),) * 2
        x = _rounded(x @ self._weights(width, across).T)
        return _rounded(self._weights(height, down) @ x)

    def _weights(self, length: int, shown: int | torch.SymInt) -> Tensor:
        """Weight of each pixel of a line for each of the new ones, (size, length); `shown` pixels in the middle are seen."""
        scale = torch.full((1, 1), shown, dtype=torch.float32) / self.size
        left = (torch.full((1, 1), length, dtype=torch.float32) - scale * self.size) / 2
        centres = left + (torch.arange(self.size)[:, None] + 0.5) * scale
        offsets = (torch.arange(length)[None] + 0.5 - centres) / scale.clamp(min=1)
        weights = _triangle(offsets) if self.filter == "bilinear" else _lanczos(offsets)
        return weights / weights.sum(1, keepdim=True)


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _lanczos(x: Tensor, lobes: int = 3) -> Tensor:
    windowed = torch.sinc(x) * torch.sinc(x / lobes)
    return torch.where(x.abs() < lobes, windowed, 0)


def _rounded(x: Tensor) -> Tensor:
    return (x + 0.5).floor().clamp(0, 255)


class Judged(nn.Module):
    """The line of an inspector from prepared images up to its decision.

    names   of what comes out, in order: some of NAMES
    """

    def __init__(self, inspector: Inspector) -> None:
        super().__init__()
        self.size = inspector.preparation.size
        self.with_image = isinstance(inspector.engine, WithImage)
        self.extractor = inspector.engine.extractor
        self.detector, self.aligner, self.novelty = inspector.detector, inspector.aligner, inspector.novelty
        with torch.no_grad():
            said = self._said(torch.zeros(2, 3, self.size, self.size))
        self.names = tuple(name for name, value in zip(NAMES, said, strict=True) if value is not None)

    def forward(self, prepared: Tensor) -> tuple[Tensor, ...]:
        """(N, 3, size, size), grey levels -> score (N,), map (N, side, side), product (N, K) where there is one, novelty (N,)."""
        return tuple(value for value in self._said(prepared) if value is not None)

    def _said(self, prepared: Tensor) -> tuple[Tensor | None, ...]:
        features = self._features(prepared)
        scores: Scores = self.detector(features)
        if self.aligner is not None:
            scores = self.aligner(features, scores)
        return scores.image, scores.maps, scores.products, self.novelty(features)

    def _features(self, prepared: Tensor) -> Features:
        levels: Features = self.extractor(prepared)
        return [*levels, prepared / 255] if self.with_image else levels
