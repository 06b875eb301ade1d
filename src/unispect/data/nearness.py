"""Near-duplicates: the same photograph saved again, resized, brightened, cropped or moved a little, without crying wolf at
a product whose good images all look alike.

A fingerprint is the image's brightness in 16 x 16 slow cosines. Two of them are compared after the best small move, stretch
and change of light between them is taken out, and what is left is measured against the same figure among the stored images
nearby: good images of an aligned product are close to each other, so only an image much closer than those is suspicious.
No product name is needed. Moves are found by Gauss-Newton steps, as in *An iterative image registration technique with an
application to stereo vision* (Lucas and Kanade, 1981), https://www.ijcai.org/Proceedings/81-2/Papers/017.pdf.

Not covered: rotated or mirrored copies, crops beyond LIMIT, and cut-outs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from unispect.errors import DataError, ImageError

SIDE = 16  # cosines along each side; one byte each
GRID = 64  # side of the small picture they are taken from
RIM = 1  # cells at the border that are not compared: other content comes in there when a copy is moved
NEIGHBOURS = 8  # stored images that are aligned with an image
AROUND = 16  # stored images whose distances to their own nearest give the yardstick
STEPS = 3  # of the alignment
LIMIT = 0.05  # of the move (share of the side) and of the stretch
CLOSER = 0.35  # share of the median distance among the neighbours below which one is suspicious ...
CLOSER_STILL = 0.6  # ... if it is also below this share of a small one around: freely turned parts come close by chance
SPARED = 2  # smallest distances around that do not count: one stored pair may be a near-duplicate itself
CLOSE = 0.05  # distance that is suspicious where too few are stored for a yardstick
FLAT = 1e-3  # grey levels of the strongest cosine below which an image shows nothing
AT_ONCE = 256  # images; bounds the memory

CELLS = ((np.arange(SIDE) + 0.5) / SIDE).astype(np.float32)[RIM : SIDE - RIM]  # centres, 0 to 1
FREQUENCY = np.pi * np.arange(SIDE, dtype=np.float32)
SCALE = np.sqrt(np.where(np.arange(SIDE) == 0, 1, 2) / SIDE).astype(np.float32)


def fingerprint(image: np.ndarray) -> bytes:
    """256 bytes of an image (H, W, 3) uint8 of any size: its mean brightness, then its cosines relative to the strongest.

    Roots of the cosines are stored, so that weak ones keep their digits beside a strong one.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ImageError(f"image: got {image.dtype} {image.shape}, expected uint8 (H, W, 3), as decode gives it")
    cosines = _cosines(_small(image))
    mean = cosines[0, 0] / SIDE
    cosines[0, 0] = 0
    strongest = np.abs(cosines).max()
    relative = cosines / strongest if strongest >= FLAT else np.zeros_like(cosines)
    roots = np.rint(np.sign(relative) * np.sqrt(np.abs(relative)) * 127).astype(np.int8)
    roots[0, 0] = np.rint(mean) - 128
    return bytes(roots.tobytes())


def _small(image: np.ndarray) -> np.ndarray:
    """Brightness on GRID x GRID cells; a large image is first reduced, in whole pixels, to spare memory."""
    grey = Image.fromarray(image).convert("L")
    factors = max(1, grey.width // (8 * GRID)), max(1, grey.height // (8 * GRID))
    small = grey.reduce(factors).convert("F").resize((GRID, GRID), Image.Resampling.BILINEAR)
    return np.asarray(small, np.float64)


def _cosines(small: np.ndarray) -> np.ndarray:
    """First SIDE x SIDE cosines of a picture (GRID, GRID), in grey levels of a picture of SIDE x SIDE cells."""
    places = (np.arange(GRID) + 0.5) / GRID
    waves = np.cos(places[:, None] * FREQUENCY) * SCALE * SIDE / GRID
    return np.asarray(waves.T @ small @ waves)


@dataclass(frozen=True, slots=True)
class Near:
    """The nearest of the stored fingerprints.

    index        its place
    distance     share of the contrast that differs once the two are aligned: 0 the same, 1 nothing in common
    suspicious   whether it is too close to be another photograph
    """

    index: int
    distance: float
    suspicious: bool


class Nearness:
    """Finds the nearest of n stored fingerprints; time grows with n for a first choice, memory stays bounded.

    How far each stored image is from its nearest other is found when first needed, and kept.
    """

    def __init__(self, fingerprints: Sequence[bytes]) -> None:
        self._place = {mark: place for place, mark in reversed(list(enumerate(fingerprints)))}  # the first of equal ones
        self._cosines = _read(fingerprints)
        self._pictures = _pictures(self._cosines)
        self._apart = np.full(len(fingerprints), np.nan, np.float32)  # distance of each to its nearest other

    def nearest(self, fingerprint: bytes) -> Near | None:
        """The nearest one; None where none is stored."""
        return self.each([fingerprint])[0] if len(self._cosines) else None

    def each(self, fingerprints: Sequence[bytes]) -> list[Near]:
        """The nearest one for each of many; empty where none is stored."""
        if not len(self._cosines):
            return []
        return [
            near for start in range(0, len(fingerprints), AT_ONCE) for near in self._some(fingerprints[start:][:AT_ONCE])
        ]

    def _some(self, fingerprints: Sequence[bytes]) -> Iterator[Near]:
        pictures = _pictures(_read(fingerprints))
        around = self._around(pictures, None)
        rows = zip(fingerprints, around, self._distances(pictures, around), self._limits(around), strict=True)
        for mark, places, apart, limit in rows:
            best = int(apart.argmin())
            same = self._place.get(mark)
            index, distance = (int(places[best]), float(apart[best])) if same is None else (same, 0.0)
            yield Near(index, distance, bool(distance == 0 or distance < limit))

    def _around(self, pictures: np.ndarray, own: np.ndarray | None) -> np.ndarray:
        """Places of the stored images around each of m pictures, the most alike first, (m, up to AROUND).

        own   (m,) places of the pictures themselves, where they are stored: they and copies of them come last
        """
        unlike = -(pictures @ self._pictures.T)
        if own is not None:
            unlike[unlike < 1e-5 - 1] = 2
            unlike[np.arange(len(own)), own] = 3  # a flat one is not even like itself
        few = min(AROUND, unlike.shape[1] - (own is not None))
        chosen = np.argpartition(unlike, few - 1, axis=1)[:, :few]
        order = np.argsort(np.take_along_axis(unlike, chosen, 1), axis=1, kind="stable")
        return np.take_along_axis(chosen, order, 1)

    def _distances(self, pictures: np.ndarray, around: np.ndarray) -> np.ndarray:
        """Distances of m pictures to their neighbours, (m, up to NEIGHBOURS)."""
        chosen = around[:, :NEIGHBOURS]
        repeated = np.repeat(pictures, chosen.shape[1], axis=0)
        return _distances(repeated, self._cosines[chosen.ravel()]).reshape(chosen.shape)

    def _limits(self, around: np.ndarray) -> np.ndarray:
        """Distance below which each of m images is suspicious, by the stored ones around it (m, k) -> (m,)."""
        if len(self._cosines) <= NEIGHBOURS:
            return np.full(len(around), CLOSE, np.float32)
        self._measure(np.unique(around))
        apart = self._apart[around]
        usual = CLOSER * np.median(apart[:, :NEIGHBOURS], axis=1)
        return np.asarray(np.minimum(usual, CLOSER_STILL * np.sort(apart, axis=1)[:, SPARED]))

    def _measure(self, places: np.ndarray) -> None:
        unknown = places[np.isnan(self._apart[places])]
        for start in range(0, len(unknown), AT_ONCE):
            some = unknown[start : start + AT_ONCE]
            pictures = self._pictures[some]
            self._apart[some] = self._distances(pictures, self._around(pictures, some)).min(1)


def _read(fingerprints: Sequence[bytes]) -> np.ndarray:
    """Cosines of m fingerprints, (m, SIDE, SIDE) float32; their overall strength is 1, or 0 of a flat image."""
    for place, mark in enumerate(fingerprints):
        if len(mark) != SIDE * SIDE:
            raise DataError(
                f"fingerprints[{place}]: {len(mark)} bytes, expected {SIDE * SIDE}, as `fingerprint` gives them: a model "
                "of an older version must be fitted again"
            )
    roots = np.frombuffer(b"".join(fingerprints), np.int8).reshape(-1, SIDE, SIDE).astype(np.float32)
    roots[:, 0, 0] = 0  # the mean brightness
    cosines = roots * np.abs(roots)
    return np.asarray(cosines / np.maximum(np.linalg.norm(cosines, axis=(1, 2), keepdims=True), 1))


def _pictures(cosines: np.ndarray) -> np.ndarray:
    """What is compared of m images, (m, SIDE, SIDE) -> (m, cells inside the rim): mean 0, length 1, or 0 of a flat one."""
    waves, _ = _waves(CELLS[None])
    cells = (waves @ cosines @ waves.swapaxes(1, 2)).reshape(len(cosines), len(CELLS) ** 2)
    cells -= cells.mean(1, keepdims=True)
    return np.asarray(cells / np.maximum(np.linalg.norm(cells, axis=1, keepdims=True), 1e-9))


def _waves(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines at places (m, cells) and their slopes, each (m, cells, SIDE)."""
    phase = places[:, :, None] * FREQUENCY
    return np.cos(phase) * SCALE, np.sin(phase) * (-FREQUENCY * SCALE)


def _distances(pictures: np.ndarray, cosines: np.ndarray) -> np.ndarray:
    """Length of what an aligned stored image does not explain of a picture, for m pairs -> (m,) from 0 to 1.

    Explained are the image, its square (gamma), a constant, and its slopes (a small move and stretch along each axis).
    """
    move = np.zeros((len(cosines), 4), np.float32)  # down, right, and how much more of either towards the border
    best = np.ones(len(cosines), np.float32)
    for _ in range(STEPS):
        parts = _parts(cosines, move)
        lengths = np.maximum(np.linalg.norm(parts, axis=2), 1e-9)
        parts = parts / lengths[:, :, None]
        products = parts @ parts.swapaxes(1, 2) + np.float32(1e-5) * np.eye(parts.shape[1], dtype=np.float32)
        shares = np.linalg.solve(products, parts @ pictures[:, :, None])
        left = np.linalg.norm(pictures - (shares.swapaxes(1, 2) @ parts)[:, 0], axis=1)
        amounts = shares[:, :, 0] / lengths
        upright = (amounts[:, 0] > 0) & pictures.any(1)  # a negative is no copy
        best = np.where(upright, np.minimum(best, left), best)
        steps = amounts[:, 3:] / np.where(upright, amounts[:, 0], np.inf)[:, None]
        move = np.clip(move + steps, -LIMIT, LIMIT)
    return best


def _parts(cosines: np.ndarray, move: np.ndarray) -> np.ndarray:
    """What m moved images can be changed by, (m, 7, cells inside the rim); the image itself comes first."""
    centred = CELLS - np.float32(0.5)
    down, down_slope = _waves(CELLS + move[:, 0:1] + move[:, 2:3] * centred)
    right, right_slope = (waves.swapaxes(1, 2) for waves in _waves(CELLS + move[:, 1:2] + move[:, 3:4] * centred))
    image = down @ cosines @ right
    fall, rise = down_slope @ cosines @ right, down @ cosines @ right_slope
    parts = [image, image * image, np.ones_like(image), fall, rise, fall * centred[:, None], rise * centred]
    return np.stack(parts, 1).reshape(len(cosines), len(parts), -1)
