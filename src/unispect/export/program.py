"""A learnt model as torch programs: uint8 images of any size -> prepared images -> score, map, products, novelty.

Preparation, network, detector and alignment are inside; thresholds are not, so that they can change without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import PIL
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from unispect.data.loader import Preparation
from unispect.inspector import Inspector
from unispect.runtime import NAMES
from unispect.types import Features, Scores

Pass: TypeAlias = Callable[[Tensor], Tensor]  # of a resizing, along one axis


class Prepared(nn.Module):
    """What `Preparation.image` makes of images, as tensor operations: Pillow's resizing, to a grey level.

    Pillow resizes along one axis, rounds, then along the other, and rounds, with weights in fixed point; here they are
    floats, which changes one grey level where a value lies next to the half of one. An image that has the size already
    comes out as it is.

    products      resize by matrix products also where there is an operation for it, which OpenVINO's reader of ONNX gets
                  wrong
    height_first  begin with the height where it shrinks over twice as much as the width, as Pillow does from version 13 on
    """

    def __init__(self, preparation: Preparation, products: bool = False, height_first: bool | None = None) -> None:
        super().__init__()
        self.size, self.fit, self.filter = preparation.size, preparation.fit, preparation.filter
        self.products = products or (self.fit, self.filter) != ("squash", "bilinear")
        self.height_first = int(PIL.__version__.partition(".")[0]) >= 13 if height_first is None else height_first

    def forward(self, images: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 -> (N, 3, size, size) float32, whole numbers from 0 to 255."""
        x = images.permute(0, 3, 1, 2).float()
        passes = self._products(x) if self.products else self._operations(x)
        width_first = passes[1](passes[0](x))
        if not self.height_first:
            return width_first
        height, width = (torch.full((1,), side, dtype=torch.float32) - self.size for side in x.shape[2:])
        tall = (height > 0) & (height > 2 * width)
        return torch.where(tall, passes[0](passes[1](x)), width_first)

    def _operations(self, x: Tensor) -> tuple[Pass, Pass]:
        """Along the width and along the height, by the operation that there is for it."""

        def across(x: Tensor) -> Tensor:
            return _rounded(interpolate(x, (x.shape[2], self.size), mode="bilinear", antialias=True))

        def down(x: Tensor) -> Tensor:
            return _rounded(interpolate(x, (self.size, x.shape[3]), mode="bilinear", antialias=True))

        return across, down

    def _products(self, x: Tensor) -> tuple[Pass, Pass]:
        """The same by matrix products."""
        height, width = x.shape[2], x.shape[3]
        shown = (width, height) if self.fit == "squash" else (torch.sym_min(height, width),) * 2
        columns, rows = self._weights(width, shown[0]), self._weights(height, shown[1])
        return lambda x: _rounded(x @ columns.T), lambda x: _rounded(rows @ x)

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
        self.size, self.network = inspector.preparation.size, inspector.engine.network
        self.detector, self.aligner, self.novelty = inspector.detector, inspector.aligner, inspector.novelty
        self.blank = inspector.blank
        with torch.no_grad():
            said = self._said(torch.zeros(2, 3, self.size, self.size))
        self.names = tuple(name for name, value in zip(NAMES, said, strict=True) if value is not None)

    def forward(self, prepared: Tensor) -> tuple[Tensor, ...]:
        """Grey levels (N, 3, size, size) -> score (N,), map (N, side, side), product (N, K) or nothing, novelty (N,)."""
        return tuple(value for value in self._said(prepared) if value is not None)

    def _said(self, prepared: Tensor) -> tuple[Tensor | None, ...]:
        if self.blank is None:
            features: Features = self.network(prepared)
            scores = self._scored(features)
            return scores.image, scores.maps, scores.products, self.novelty(features)
        features, shown = self.blank.look(prepared, self.network)
        scores = self._scored(features)
        return scores.image, self.blank.hidden(scores.maps, shown), scores.products, self.novelty(features)

    def _scored(self, features: Features) -> Scores:
        scores: Scores = self.detector(features)
        if self.aligner is not None:
            scores = self.aligner(features, scores)
        return scores
