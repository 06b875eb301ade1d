"""Features in memory, standing in for a FeatureSet."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from unispect.fit import Labelled
from unispect.types import Features


class Planted:
    """Levels (n, C, h, w) of n images, read as a FeatureSet is read."""

    def __init__(self, levels: Features) -> None:
        self.levels = levels
        self.shapes = [(level.shape[1], level.shape[2], level.shape[3]) for level in levels]

    def __len__(self) -> int:
        return len(self.levels[0])

    def gather(self, level: int, images: np.ndarray, places: np.ndarray) -> Tensor:
        vectors = self.levels[level].flatten(2).mT
        return vectors[torch.from_numpy(images)[:, None], torch.from_numpy(places.copy())].flatten(0, 1)

    def part(self, images: np.ndarray) -> "Planted":
        return Planted([level[torch.from_numpy(images)] for level in self.levels])

    def stacked(self, images: Iterable[int]) -> Features:
        return [level[list(images)] for level in self.levels]

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, Features]]:
        for start in range(0, len(self), size):
            part = [level[start : start + size] for level in self.levels]
            yield np.arange(start, start + len(part[0])), part


def labelled(levels: Features, product: np.ndarray) -> Labelled:
    """These levels as images of these products."""
    return Labelled(Planted(levels), product)  # type: ignore[arg-type]
