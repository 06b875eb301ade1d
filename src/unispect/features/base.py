"""The contract of everything that turns images into features."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from unispect.types import Features


class Extractor(nn.Module, ABC):
    """Images to features by a frozen network: nothing is learnt here, and nothing depends on the other images."""

    @abstractmethod
    def forward(self, images: Tensor) -> Features:
        """(N, 3, H, W) uint8 RGB -> L levels (N, C, h, w)."""

    @property
    @abstractmethod
    def channels(self) -> tuple[int, ...]:
        """C of each level."""

    @property
    @abstractmethod
    def level_names(self) -> tuple[str, ...]:
        """What each level is, for people."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """The same for two extractors if and only if they compute the same function."""
