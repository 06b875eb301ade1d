"""The images themselves, for detectors that learn networks of their own."""

from __future__ import annotations

import hashlib

from torch import Tensor

from unispect.features.base import Extractor
from unispect.types import Features


class PixelExtractor(Extractor):
    """One level: the image, (N, 3, H, W), values in [0, 1].

    The cache keeps half precision, which is exact enough: times 255 and rounded it gives every grey level back.
    """

    def forward(self, images: Tensor) -> Features:
        return [images.float() / 255]

    @property
    def channels(self) -> tuple[int, ...]:
        return (3,)

    @property
    def level_names(self) -> tuple[str, ...]:
        return ("pixels",)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"pixels").hexdigest()
