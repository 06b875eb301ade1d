"""Pixel metrics of maps that come one at a time, product by product, in a fixed budget of memory.

Two ways to the same numbers. Exact: maps wait in a temporary file and are sorted product by product, and once more for
all. Streamed: nothing is kept but sums of fixed size, and each number comes with a bound of its error.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from unispect.metrics.bootstrap import PixelReplicates, weights
from unispect.metrics.protocol import pixel_metrics
from unispect.metrics.streaming import PixelSums, each

EXACT = 200_000_000  # pixels that are sorted exactly unless asked otherwise: about 2 GB of memory for the pooled ranking


@dataclass(frozen=True, slots=True, eq=False)
class PixelResult:
    """Pixel metrics of one product or of all, by their name in Row.

    values       the metrics
    bounds       how far each can be from the exact number; 0 where it is exact
    replicates   (B,) bootstrap replicates of each, from coarser sums whose own value is `coarse`
    """

    values: dict[str, float]
    bounds: dict[str, float]
    replicates: Mapping[str, np.ndarray] = field(default_factory=dict)
    coarse: Mapping[str, float] = field(default_factory=dict)


class Pixels:
    """Collects maps and masks; a context, because exact metrics need temporary files.

    exact        sort all pixels; otherwise stream
    replicates   bootstrap replicates of each metric; 0 for none
    seed         of the bootstrap
    """

    def __init__(self, exact: bool, replicates: int = 0, seed: int = 0) -> None:
        self._exact, self._count, self._seed = exact, replicates, seed
        self._product: str | None = None
        self._results: dict[str | None, PixelResult] = {}
        self._images = self._first = 0
        self._shape: tuple[int, ...] = (0, 0)
        self._all, self._normalised = PixelSums(), PixelSums()
        self._all_replicates = PixelReplicates(replicates) if replicates else None

    def __enter__(self) -> Self:
        with ExitStack() as files:
            if self._exact:
                self._maps = files.enter_context(tempfile.TemporaryFile(prefix="unispect-maps-"))
                self._masks = files.enter_context(tempfile.TemporaryFile(prefix="unispect-masks-"))
            self._files = files.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def add(self, product: str, scores: np.ndarray, mask: np.ndarray, number: int = 0) -> None:
        """Count one map (h, w) and its mask (h, w). The images of a product come one after another.

        number   of the image, which decides its weights in the bootstrap
        """
        if product != self._product:
            self._close()
            self._open(product)
        scores, mask = np.ascontiguousarray(scores, np.float32), np.ascontiguousarray(mask, bool)
        self._sums.add(scores, mask)
        if self._replicates is not None:
            self._replicates.add(scores, mask, weights(1, self._count, self._seed, number)[:, 0])
        if self._exact:
            self._keep(scores, mask)
        self._images += 1

    def results(self) -> dict[str | None, PixelResult]:
        """Metrics by product, and under None those of all products pooled; empty without maps."""
        self._close()
        if self._results and None not in self._results:
            only = next(iter(self._results.values()))
            self._results[None] = only if len(self._results) == 1 else self._result(self._all, self._all_replicates, 0)
        return self._results

    def normalised(self) -> dict[str, float]:
        """Metrics of all products pooled, each product's maps scaled to 0..1 by its own extremes. Not deployable."""
        self._close()
        return {name: bounded.value for name, bounded in each(self._normalised)} if self._results else {}

    def overlap_curve(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Per-region overlap of all products pooled against the false positive rate, for drawing; None without regions."""
        self._close()
        return self._all.pro() if self._results else None

    def _open(self, product: str) -> None:
        if product in self._results:
            raise ValueError(f"product {product!r} comes again after others: give the images of a product one after another")
        self._product, self._first, self._sums = product, self._images, PixelSums()
        self._replicates = PixelReplicates(self._count) if self._count else None

    def _close(self) -> None:
        """Measure the product that is complete, and add its sums to those of all."""
        if self._product is None:
            return
        self._results[self._product] = self._result(self._sums, self._replicates, self._first)
        self._all = self._all.merged(self._sums)
        if self._all_replicates is not None and self._replicates is not None:
            self._all_replicates = self._all_replicates.merged(self._replicates)
        self._normalised = self._normalised.merged(self._sums.rescaled(*self._sums.extremes))
        self._product = None

    def _result(self, sums: PixelSums, replicates: PixelReplicates | None, first: int) -> PixelResult:
        drawn, coarse = ({}, {}) if replicates is None else (replicates.metrics(), replicates.points())
        if self._exact:
            values = pixel_metrics(*self._arrays(first))
            return PixelResult(values, dict.fromkeys(values, 0.0), drawn, coarse)
        measured = dict(each(sums))
        values = {name: bounded.value for name, bounded in measured.items()}
        return PixelResult(values, {name: bounded.error for name, bounded in measured.items()}, drawn, coarse)

    def _keep(self, scores: np.ndarray, mask: np.ndarray) -> None:
        if self._images and scores.shape != self._shape:
            raise ValueError(f"scores: a map of shape {scores.shape} after one of {self._shape}: give maps of one size")
        self._shape = scores.shape
        self._maps.write(scores.data)
        self._masks.write(mask.data)

    def _arrays(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Maps (M, h, w) float32 and masks (M, h, w) bool from an image on, on disk."""
        shape = (self._images, *self._shape)
        self._maps.flush()
        self._masks.flush()
        maps = np.memmap(self._maps, dtype=np.float32, mode="r", shape=shape)
        masks = np.memmap(self._masks, dtype=bool, mode="r", shape=shape)
        return maps[first:], masks[first:]
