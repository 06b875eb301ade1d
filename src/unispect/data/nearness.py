"""Near-duplicates: the same photograph saved again, resized, brightened or noisy, without crying wolf at a product whose
good images all look alike.

A fingerprint is the image's brightness on a coarse grid, without its mean and spread. How close two fingerprints are says
little by itself: images of an aligned product are all close. What tells is how much closer the nearest one is than the
ones after it, so each image is measured against its own neighbourhood, and no product name is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE = 11  # cells of the grid; 11 x 11 half-precision values are 242 bytes
NEIGHBOURS = 8  # that the nearest one is compared with
CLOSER = 0.1  # share of their median distance below which it is suspicious; chosen in benchmarks/nearness.py
CLOSE = 0.02  # root mean square difference that is suspicious where there are too few others to compare with
WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue in brightness


def fingerprint(image: np.ndarray) -> bytes:
    """242 bytes of an image (H, W, 3) uint8. Any size will do; mean and spread of its brightness do not matter."""
    grey = Image.fromarray(image @ WEIGHTS)
    cells = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.HAMMING), np.float64)
    spread = cells.std()
    return np.asarray((cells - cells.mean()) / (spread if spread > 1e-3 else 1.0), "<f2").tobytes()


@dataclass(frozen=True, slots=True)
class Near:
    """The nearest of the stored fingerprints.

    index        its place
    distance     root mean square difference to it, in units of the spread of an image's own brightness
    suspicious   whether it is too close to be another photograph
    """

    index: int
    distance: float
    suspicious: bool


class Nearness:
    """Finds the nearest of N fingerprints; linear in N, a millisecond for ten thousand."""

    def __init__(self, fingerprints: Sequence[bytes]) -> None:
        cells = SIDE * SIDE
        if any(len(mark) != 2 * cells for mark in fingerprints):
            raise ValueError(f"fingerprints: expected {2 * cells} bytes each, as `fingerprint` gives them")
        self._known = np.frombuffer(b"".join(fingerprints), "<f2").reshape(-1, cells).astype(np.float32)
        self._squares = np.square(self._known).sum(1)

    def nearest(self, fingerprint: bytes) -> Near | None:
        """The nearest one; None where none is stored."""
        if not len(self._known):
            return None
        mark = np.frombuffer(fingerprint, "<f2").astype(np.float32)
        # |a - b|^2 by one product with a matrix finds the neighbours; their distances are then taken exactly.
        rough = self._squares - 2 * (self._known @ mark)
        few = min(len(rough), NEIGHBOURS + 1)
        chosen = np.argpartition(rough, few - 1)[:few]
        distances = np.sqrt(np.square(self._known[chosen] - mark).mean(1))
        order = np.lexsort((chosen, distances))
        nearest, others = float(distances[order[0]]), distances[order[1:]]
        return Near(int(chosen[order[0]]), nearest, _suspicious(nearest, others))


def _suspicious(nearest: float, others: np.ndarray) -> bool:
    if nearest == 0.0:
        return True
    if len(others) < NEIGHBOURS:
        return nearest < CLOSE
    return nearest < CLOSER * float(np.median(others))
