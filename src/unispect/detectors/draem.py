"""DRAEM: draws images anew as if they were good, and learns on planted defects to tell where that changes them.

DRAEM - a discriminatively trained reconstruction embedding for surface anomaly detection (Zavrtanik, Kristan, Skocaj,
2021), https://arxiv.org/abs/2108.07610. "Published" means also the authors' code, github.com/VitjanZ/DRAEM, commit
2dbf673. docs/draem.md lists the differences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unispect.detectors.base import Group, ImageDetector, Pass, check_counts
from unispect.errors import ConfigError
from unispect.nn.maps import blurred, box_mean, upsampled
from unispect.nn.synthesis import turned_at_random, with_defects
from unispect.nn.unet import Reconstruction, Segmentation
from unispect.types import Features, Scores

WINDOW, SPREAD = 11, 1.5  # pixels: side and standard deviation of the window of SSIM
STABLE = (0.01**2, 0.03**2)  # the constants of SSIM for values in [0, 1]
AVERAGED = 21  # pixels: side of the square whose mean probability is the image score
STEP = 32  # the segmentation network halves an image five times


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity at every place, (N, C, H, W) twice -> (N, C, H, W); 1 where they agree.

    Image quality assessment: from error visibility to structural similarity (Wang et al., 2004),
    https://doi.org/10.1109/TIP.2003.819861, for values in [0, 1], with zeros around the image as published for DRAEM.
    """
    planes = torch.stack([images, others, images * images, others * others, images * others])
    mu, nu, squares, other_squares, products = _windowed(planes.flatten(0, 2)).unflatten(0, planes.shape[:3])
    variances, covariance = squares - mu * mu + other_squares - nu * nu, products - mu * nu
    light = (2 * mu * nu + STABLE[0]) / (mu * mu + nu * nu + STABLE[0])
    similarity: Tensor = light * (2 * covariance + STABLE[1]) / (variances + STABLE[1])
    return similarity


def focal(logits: Tensor, classes: Tensor, gamma: float = 2.0) -> Tensor:
    """Mean of -(1 - p)^gamma ln p of the true class, (N, K, H, W) and (N, H, W) int64 -> scalar.

    Focal loss for dense object detection (Lin et al., 2017), https://arxiv.org/abs/1708.02002
    """
    entropy = F.cross_entropy(logits, classes, reduction="none")
    return ((1 - torch.exp(-entropy)) ** gamma * entropy).mean()


class Networks(nn.Module):
    """What draws an image anew, and what compares the two."""

    def __init__(self, width: int, segmentation_width: int, seed: int) -> None:
        super().__init__()
        self.reconstruction = Reconstruction(width, seed)
        self.segmentation = Segmentation(6, 2, segmentation_width, seed + 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 3, H, W) -> images anew, logits of good and defective (N, 2, H, W), and the narrow middle (N, C, h, w)."""
        images = images.contiguous(memory_format=torch.channels_last)  # on a CPU a step takes two thirds of the time
        anew, middle = self.reconstruction(images)
        return anew, self.segmentation(torch.cat([anew, images], 1)), middle


class DRAEM(ImageDetector):
    """Two networks trained from scratch on good images, half of them with a planted defect.

    shapes               (3, H, W), the image itself: features.backbone = "pixels"; sides are multiples of 32
    products             K, number of products: taken and ignored, for the networks serve all of them
    width                channels of the reconstruction network at the full side; published: 128
    segmentation_width   channels of the segmentation network there; published: 64
    rotated              probability that a training image is turned by up to 90 degrees before anything else
    map_side             side of the score map, pixels
    sigma                of its blur, pixels; published: none
    seed                 of the weights at the start

    The loss is the squared error of the image drawn anew, 1 - SSIM of it, and the focal loss of the marked pixels.
    Published training: 700 passes in steps of 8 images. Widths and steps here are for one core of a CPU: on 700 images of
    256 pixels some ten minutes.
    """

    wants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "features": {"backbone": "pixels", "layers": [], "pooled": []},
        "training": {
            "steps": 200,
            "images": 8,
            "learning_rate": 1e-4,
            "beta1": 0.9,
            "beta2": 0.999,
            "decay": 0.0,
            "schedule": "drop",
            "drops": [0.8, 0.9],
            "drop": 0.2,
            "checks": 4,
        },
    }

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        products: int,
        width: int = 16,
        segmentation_width: int = 8,
        rotated: float = 0.3,
        map_side: int = 256,
        sigma: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_counts(width=width, segmentation_width=segmentation_width, map_side=map_side)
        _check_shapes(shapes)
        _check_numbers(rotated, sigma)
        self.rotated, self.map_side, self.sigma = rotated, map_side, sigma
        self.levels = nn.ModuleList([Networks(width, segmentation_width, seed)])

    def groups(self, level: int) -> list[Group]:
        """All alike, as published."""
        return [Group(list(self.levels[level].parameters()))]

    def prepare(self, train: Pass) -> None:
        """Nothing: training begins with random weights."""

    def loss(self, features: Features, product: Tensor, progress: float) -> dict[str, Tensor]:
        """ "mse", "ssim" and "focal" of images with planted defects, some turned; "total" is their sum."""
        return self._losses(turned_at_random(features[0], self.rotated))

    def held_out_loss(self, features: Features, product: Tensor) -> Tensor:
        """The same sum for images as they are, with defects planted."""
        return self._losses(features[0])["total"]

    def finish(self, train: Pass, held_out: Pass) -> None:
        """Nothing: scores need no scale of their own."""

    @torch.no_grad()
    def forward(self, features: Features) -> Scores:
        """One level (N, 3, H, W) -> scores: the probability of a defect at each place, (N, side, side), and the highest mean
        of it in a square of 21 x 21 pixels; context is the narrow middle of the reconstruction network."""
        _, logits, middle = self.levels[0](features[0])
        probability = logits.softmax(1)[:, 1]
        image = box_mean(probability, AVERAGED, AVERAGED // 2).flatten(1).amax(1)
        maps = blurred(upsampled(probability, self.map_side, aligned=False), self.sigma)
        return Scores(image, maps, context=middle)

    def _losses(self, images: Tensor) -> dict[str, Tensor]:
        defective, masks = with_defects(images)
        anew, logits, _ = self.levels[0](defective)
        parts = {
            "mse": F.mse_loss(anew, images),
            "ssim": 1 - ssim(anew, images).mean(),
            "focal": focal(logits, masks.long()),
        }
        return {"total": torch.stack(list(parts.values())).sum()} | parts


def _windowed(planes: Tensor) -> Tensor:
    """Weighted mean around every place, zeros beyond the edge, (n, H, W) -> (n, H, W)."""
    # Two products with band matrices: on a CPU a tenth of the time of a convolution of single planes, with its gradient.
    rows, columns = (_window(side).to(planes) for side in planes.shape[1:])
    return rows @ planes @ columns


@lru_cache(maxsize=16)
def _window(side: int) -> Tensor:
    """Weight of each place of a line for each other, (side, side)."""
    offsets = (torch.arange(side)[:, None] - torch.arange(side)).double()
    weights = torch.exp(-(offsets**2) / (2 * SPREAD**2)) * (offsets.abs() <= WINDOW // 2)
    whole = (torch.arange(WINDOW) - WINDOW // 2).double()
    return weights / torch.exp(-(whole**2) / (2 * SPREAD**2)).sum()


def _check_shapes(shapes: Sequence[tuple[int, int, int]]) -> None:
    if len(shapes) != 1 or shapes[0][0] != 3:
        raise ConfigError(
            f"features: got levels {[tuple(shape) for shape in shapes]}, expected one of 3 channels: DRAEM looks at the "
            "image itself, so set features.backbone='pixels', features.layers=[] and features.pooled=[]"
        )
    if shapes[0][1] % STEP or shapes[0][2] % STEP:
        raise ConfigError(f"preparation.size: got {shapes[0][1]} x {shapes[0][2]} pixels, expected a multiple of {STEP}")


def _check_numbers(rotated: float, sigma: float) -> None:
    if not 0 <= rotated <= 1:
        raise ConfigError(f"rotated: got {rotated}, expected a probability from 0 to 1")
    if not sigma >= 0:
        raise ConfigError(f"sigma: got {sigma}, expected at least 0")
