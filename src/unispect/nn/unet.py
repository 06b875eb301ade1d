"""The two U-shaped networks of DRAEM: one draws an image anew, the other marks where it was changed.

DRAEM - a discriminatively trained reconstruction embedding for surface anomaly detection (Zavrtanik, Kristan, Skocaj,
2021), https://arxiv.org/abs/2108.07610. U-Net: convolutional networks for biomedical image segmentation (Ronneberger,
Fischer, Brox, 2015), https://arxiv.org/abs/1505.04597
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d

SPREAD = 0.02  # standard deviation of the weights at the start, as published


class Encoder(nn.Module):
    """Two convolutions a level, each level at half the side of the one before.

    widths   channels of the levels
    """

    def __init__(self, inputs: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_twice(above, own, own) for above, own in pairwise((inputs, *widths)))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, inputs, H, W) -> the levels, (N, widths[k], H / 2^k, W / 2^k)."""
        levels: list[Tensor] = []
        for block in self.blocks:
            levels.append(block(max_pool2d(levels[-1], 2) if levels else x))
        return levels


class Rise(nn.Module):
    """Up to twice the side by one convolution, then two more on that and on what is `beside` it.

    raised   channels after the first two convolutions
    beside   channels of the encoder's level of that side; 0 for none
    """

    def __init__(self, inputs: int, raised: int, beside: int, outputs: int) -> None:
        super().__init__()
        self.up = _once(inputs, raised)
        self.join = _twice(raised + beside, raised, outputs)

    def forward(self, x: Tensor, *beside: Tensor) -> Tensor:
        """(N, inputs, h, w) and (N, beside, 2h, 2w) -> (N, outputs, 2h, 2w)."""
        up = self.up(interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))
        joined: Tensor = self.join(torch.cat((up, *beside), 1))
        return joined


class Reconstruction(nn.Module):
    """Images through a narrow middle and back, with nothing to pass it by. Sides are multiples of 16.

    width   channels at the full side; published: 128
    """

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__()
        self.encoder = Encoder(3, [width, 2 * width, 4 * width, 8 * width, 8 * width])
        steps = pairwise((8 * width, 4 * width, 2 * width, width, width))
        self.decoder = nn.Sequential(*(Rise(inputs, inputs, 0, outputs) for inputs, outputs in steps))
        self.last = nn.Conv2d(width, 3, 3, padding=1)
        _start(self, seed)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) -> the images anew, (N, 3, H, W), and the narrow middle, (N, 8 width, H / 16, W / 16)."""
        middle = self.encoder(images)[-1]
        return self.last(self.decoder(middle)), middle


class Segmentation(nn.Module):
    """What class each pixel is of; every level of the encoder reaches the decoder. Sides are multiples of 32.

    inputs    channels; published: 6, an image drawn anew and the image
    classes   published: 2
    width     channels at the full side; published: 64
    """

    def __init__(self, inputs: int, classes: int, width: int, seed: int = 0) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width, 8 * width, 8 * width]
        self.encoder = Encoder(inputs, widths)
        steps = pairwise((8 * width, 8 * width, 4 * width, 2 * width, width, width))
        beside = widths[-2::-1]
        self.decoder = nn.ModuleList(
            Rise(below, own, passed, own) for (below, own), passed in zip(steps, beside, strict=True)
        )
        self.last = nn.Conv2d(width, classes, 3, padding=1)
        _start(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> logits (N, classes, H, W)."""
        *levels, x = self.encoder(x)
        for rise, level in zip(self.decoder, reversed(levels), strict=True):
            x = rise(x, level)
        logits: Tensor = self.last(x)
        return logits


def _once(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def _twice(inputs: int, middle: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(_once(inputs, middle), _once(middle, outputs))


@torch.no_grad()
def _start(network: nn.Module, seed: int) -> None:
    """Weights of convolutions from N(0, 0.02), scales of normalisations from N(1, 0.02), offsets 0."""
    generator = torch.Generator().manual_seed(seed)
    for part in network.modules():
        if isinstance(part, nn.Conv2d | nn.BatchNorm2d):
            assert part.weight is not None
            assert part.bias is not None
            mean = 0.0 if isinstance(part, nn.Conv2d) else 1.0
            drawn = torch.randn(part.weight.shape, generator=generator, device="cpu")
            part.weight.copy_(mean + SPREAD * drawn)
            part.bias.zero_()
