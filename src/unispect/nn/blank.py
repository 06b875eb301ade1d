"""Pixels that are not looked at, filled before any network sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from unispect.nn.recognition import Recogniser
from unispect.types import Features


class Blank(nn.Module):
    """Fills the pixels that a product's mask ignores with what its images show there on average.

    So a filled image is the same, whatever was there.

    masked     numbers of the products that have a mask, of all K
    size       side of the prepared image, pixels
    known      tells products of images that nothing is filled in yet; None where there is one product
    """

    def __init__(self, masked: Sequence[int], products: int, size: int, known: Recogniser | None = None) -> None:
        super().__init__()
        self.known = known
        row = torch.zeros(products, dtype=torch.int64)
        row[list(masked)] = torch.arange(1, len(masked) + 1)
        self.register_buffer("row", row, persistent=False)  # 0: no mask
        self.register_buffer("ignored", torch.zeros(len(masked) + 1, size, size, dtype=torch.bool))
        self.register_buffer("fill", torch.zeros(len(masked) + 1, 3, size, size, dtype=torch.uint8))

    @classmethod
    def of(cls, names: Sequence[str], ignored: Mapping[str, np.ndarray], means: Mapping[str, np.ndarray]) -> Self:
        """Of products by name, their pixels (size, size) bool, and their mean images (3, size, size)."""
        masked = sorted(names.index(name) for name in ignored)
        size = len(next(iter(ignored.values())))
        blank = cls(masked, len(names), size)
        for row, number in enumerate(masked, start=1):
            where = torch.from_numpy(ignored[names[number]])
            mean = torch.from_numpy(np.rint(means[names[number]])).to(torch.uint8)
            blank.get_buffer("ignored")[row] = where
            blank.get_buffer("fill")[row] = torch.where(where, mean, 0)
        return blank

    def forward(self, images: Tensor, product: Tensor) -> Tensor:
        """Images (N, 3, size, size), 0 to 255 of any type, of products (N,) -> the same, filled."""
        row = self.get_buffer("row")[product]
        fill = self.get_buffer("fill")[row].to(images.dtype)
        return torch.where(self.get_buffer("ignored")[row][:, None], fill, images)

    def look(self, images: Tensor, network: Callable[[Tensor], Features]) -> tuple[Features, Tensor]:
        """Features of images (N, 3, size, size), each filled as the product that it resembles, and these products (N,)."""
        if self.known is None:
            shown = torch.zeros(images.shape[0], dtype=torch.int64, device=images.device)
            return network(self(images, shown)), shown
        features = network(images)
        shown = self.resembled(features)
        if not torch.compiler.is_exporting() and not self.masks(shown):
            return features, shown
        return network(self(images, shown)), shown

    def resembled(self, features: Features) -> Tensor:
        """Product of images by features of what is not filled yet, (N,) int64; the only one where there is one."""
        if self.known is None:
            return torch.zeros(len(features[0]), dtype=torch.int64)
        return self.known.likelihoods(features).argmax(1)

    def hidden(self, maps: Tensor, product: Tensor) -> Tensor:
        """Maps (N, h, w) with the lowest score of each at its ignored places: no region lies there."""
        there = self.get_buffer("ignored")
        rows, columns = (_middles(side, there.shape[1]) for side in maps.shape[1:])
        there = there[:, rows][:, :, columns][self.get_buffer("row")[product]]
        return torch.where(there, maps.amin((1, 2), keepdim=True), maps)

    def masks(self, product: Tensor) -> bool:
        """Whether any of the products (N,) has a mask."""
        return bool(self.get_buffer("row")[product].any())

    def share(self, product: int) -> float:
        """Share of the prepared image that its mask ignores."""
        return float(self.get_buffer("ignored")[self.get_buffer("row")[product]].float().mean())

    def mark(self, product: int) -> str:
        """What its filled images depend on besides themselves; empty where it has no mask."""
        row = int(self.get_buffer("row")[product])
        parts = (self.get_buffer(name)[row].numpy().tobytes() for name in ("ignored", "fill"))
        return sha256(b"".join(parts)).hexdigest() if row else ""


def _middles(side: int, size: int) -> Tensor:
    """The pixel in which the middle of each place lies, (side,), of size pixels."""
    places = (2 * np.arange(side) + 1) * size // (2 * side)
    return torch.from_numpy(places)
