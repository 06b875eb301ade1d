"""The values that stages hand on: Batch -> Features -> Scores -> Finding. Shapes and units, stated once.

N images, H W pixels, h w places of a feature grid, C channels, L levels, K products.
This module imports no torch when run, so that torch-free parts may use it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    Features: TypeAlias = list[Tensor]  # L levels, each (N, C, h, w) float32
else:
    Features = list


@dataclass(frozen=True, slots=True)
class Batch:
    """Images that were decoded and brought to one size.

    images   (N, 3, H, W) uint8, RGB
    index    (N,) int64, the place of each image in the list of records it came from
    """

    images: Tensor
    index: Tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """What a detector says of N images. Higher is more abnormal.

    image      (N,) one score an image
    maps       (N, h, w) a score for each place
    products   (N, K) log-probability of each known product given the image, or None
    unaligned  (N,) the image scores before products were brought to one scale, or None where nothing aligns them
    context    (N, C, h, w) the narrowest layer of a detector that has one, which tells an aligner what the image shows; or
               None
    """

    image: Tensor
    maps: Tensor
    products: Tensor | None = None
    unaligned: Tensor | None = None
    context: Tensor | None = None

    def of(self, images: list[int]) -> Scores:
        """Of some of the images."""
        known = {name: getattr(self, name) for name in self.__slots__}
        return Scores(**{name: value[images] for name, value in known.items() if value is not None})


@dataclass(frozen=True, slots=True)
class Region:
    """A connected part of the map that stands out. Pixels of the original image; the box is half-open.

    peak       of the map, in its units
    p_value    share of normal images that have a region as high anywhere, the image itself among them
    area_mm2   its area in square millimetres where the scale is known (decision.mm_per_pixel)
    promised   whether the promise for regions speaks of it; False for the surroundings of the highest place of an anomalous
               image none of whose parts passes
    """

    left: int
    top: int
    right: int
    bottom: int
    peak: float
    area: int
    p_value: float = 1.0
    area_mm2: float | None = None
    promised: bool = True


@dataclass(frozen=True, slots=True)
class Finding:
    """What unispect says of one image.

    p_value   share of normal images that score at least as high; small means abnormal
    product   name of the known product that it resembles most; None where the model knows no names
    map       (h, w) float32 anomaly scores over the image (its centre square with fit="crop"), in units of the
              calibration normals: 0 is their median, 1 the pixel threshold
    regions   of an anomalous image, by the rule `decision.regions`; where no part passes, the surroundings of the highest
    width, height   of the original image after EXIF rotation, pixels
    unaligned the score before products were brought to one scale: for plots only; None where nothing aligns it
    unknown   whether it shows a product that the model has never seen: it resembles none, `product` is None, and neither
              score nor decision is to be relied on
    unknown_p_value   share of normal images of known products that resemble one as little
    nearest   name of the known product that comes nearest, be it near or not; None where the model knows no names
    peak, median      the highest and the median place of the map in the detector's own units, and
    novelty           how unlike every known product the image is: what a log must hold for thresholds to be set from it
    """

    path: str | None
    score: float
    threshold: float
    p_value: float
    anomalous: bool
    product: str | None
    product_probability: float | None
    regions: tuple[Region, ...]
    map: np.ndarray
    width: int
    height: int
    unaligned: float | None = None
    unknown: bool = False
    unknown_p_value: float = 1.0
    nearest: str | None = None
    peak: float = 0.0
    median: float = 0.0
    novelty: float = 0.0

    @property
    def verdict(self) -> str:
        """In a word or two. What is said of a product never seen is no decision about its quality."""
        return "unknown product" if self.unknown else "anomalous" if self.anomalous else "normal"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the map."""
        named = asdict(self)
        del named["map"]
        return named | {"regions": [asdict(region) for region in self.regions]}
