"""Residual bottleneck and decoder of reverse distillation: maps of an encoder -> one narrow map -> the same maps again.

Anomaly detection via reverse distillation from one-class embedding (Deng, Li, 2022), https://arxiv.org/abs/2201.10703
Widths are those of a Wide ResNet-50 where the levels are its own, and follow the channels of any other encoder's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unispect.errors import ConfigError
from unispect.nn.maps import upsampled

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}
JOINED = ("sum", "mean")  # of the maps of several levels
Shape = tuple[int, int, int]  # C, h, w of a level


class Block(nn.Module):
    """Residual block: 1 x 1, 3 x 3 and 1 x 1 convolution, each with batch normalisation.

    resample   "" keeps the grid, "halved" strides over it, "doubled" has 2 x 2 transposed convolutions for the middle one
               and the shortcut
    """

    def __init__(self, channels: int, inner: int, out: int, resample: str = "", activation: str = "relu") -> None:
        super().__init__()
        self.first = _normed(nn.Conv2d(channels, inner, 1, bias=False), inner)
        self.middle = _normed(_middle(inner, resample), inner)
        self.last = _normed(nn.Conv2d(inner, out, 1, bias=False), out)
        self.shortcut = _shortcut(channels, out, resample)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, h, w) -> (N, out, h', w')."""
        inner = self.activation(self.middle(self.activation(self.first(x))))
        out: Tensor = self.activation(self.last(inner) + self.shortcut(x))
        return out


class Bottleneck(nn.Module):
    """Levels brought to the coarsest grid, put after one another and narrowed by three residual blocks.

    shapes   (C, h, w) of each level, finest first, each with half the grid of the one before
    """

    def __init__(self, shapes: Sequence[Shape]) -> None:
        super().__init__()
        check_levels(shapes)
        widths = [channels for channels, _, _ in shapes]
        self.down = nn.ModuleList(_way_down(widths[number:]) for number in range(len(widths)))
        last = widths[-1]
        self.blocks = nn.Sequential(
            Block(last * len(widths), last, 2 * last, "halved"), *(Block(2 * last, last, 2 * last) for _ in range(2))
        )
        _initialise(self)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """L levels (N, C, h, w) -> (N, 2 C of the last, half its grid)."""
        narrow = [way(level) for way, level in zip(self.down, levels, strict=True)]
        out: Tensor = self.blocks(torch.cat(narrow, 1))
        return out


class Decoder(nn.Module):
    """The way back: a stage of residual blocks for each level, the coarsest first; the first block of each doubles the grid.

    shapes       (C, h, w) of each level, finest first
    depths       blocks of the stages, the coarsest first; what is left over has no say
    """

    def __init__(self, shapes: Sequence[Shape], depths: Sequence[int], activation: str = "relu") -> None:
        super().__init__()
        if len(depths) < len(shapes) or min(depths) < 1:
            raise ConfigError(
                f"depths={list(depths)}: expected a number of blocks, at least 1, for each of {len(shapes)} levels"
            )
        widths = [2 * shapes[-1][0], *(channels for channels, _, _ in reversed(shapes))]
        self.stages = nn.ModuleList(
            _stage(before, after, depth, activation)
            for (before, after), depth in zip(pairwise(widths), depths, strict=False)
        )
        _initialise(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        """What a Bottleneck gives -> L levels (N, C, h, w), finest first."""
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        return levels[::-1]


class Heads(nn.Module):
    """A 1 x 1 convolution for each level, as ReContrast has two of."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(channels, channels, 1) for channels, _, _ in shapes)
        _initialise(self)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """L levels (N, C, h, w) -> the same shapes."""
        return [head(level) for head, level in zip(self.levels, levels, strict=True)]


def global_cosine(encoder: Tensor, decoder: Tensor) -> Tensor:
    """1 - cosine of whole maps taken as one vector each, mean over images, (N, C, h, w) twice -> scalar.

    The cosine place by place, of which the paper of reverse distillation speaks, is not what its code trains.
    """
    return (1 - F.cosine_similarity(encoder.flatten(1), decoder.flatten(1))).mean()


def place_distance(encoder: Tensor, decoder: Tensor) -> Tensor:
    """1 - cosine over the channels, (N, C, h, w) twice -> (N, h, w)."""
    return 1 - F.cosine_similarity(encoder, decoder)


def joined_distance(encoder: Sequence[Tensor], decoder: Sequence[Tensor], side: int, joined: str) -> Tensor:
    """Sum or mean over pairs of levels (N, C, h, w) of 1 - cosine over the channels, (N, side, side)."""
    pairs = zip(encoder, decoder, strict=True)
    maps = torch.stack([upsampled(place_distance(one, other), side) for one, other in pairs])
    return maps.sum(0) if joined == "sum" else maps.mean(0)


def check_levels(shapes: Sequence[Shape]) -> None:
    """Raises ConfigError unless the grid of each level is half that of the one before, and the last is even."""
    grids = [(height, width) for _, height, width in shapes]
    halved = all(2 * low[axis] == high[axis] for high, low in pairwise(grids) for axis in (0, 1))
    if not grids or not halved or any(side % 2 for side in grids[-1]):
        said = ", ".join(f"{height} x {width}" for height, width in grids) or "none"
        raise ConfigError(
            f"features.layers: their grids are {said}, expected each to be half of the one before and the last one even, "
            "such as 64, 32, 16: choose layers with strides 4, 8 and 16 and a size of the image that they divide"
        )


def _normed(convolution: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm2d(channels))


def _middle(channels: int, resample: str) -> nn.Module:
    if resample == "doubled":
        return nn.ConvTranspose2d(channels, channels, 2, stride=2, bias=False)
    return nn.Conv2d(channels, channels, 3, stride=2 if resample == "halved" else 1, padding=1, bias=False)


def _shortcut(channels: int, out: int, resample: str) -> nn.Module:
    if resample == "doubled":
        return _normed(nn.ConvTranspose2d(channels, out, 2, stride=2, bias=False), out)
    if resample == "halved" or channels != out:
        return _normed(nn.Conv2d(channels, out, 1, stride=2 if resample == "halved" else 1, bias=False), out)
    return nn.Identity()


def _way_down(widths: Sequence[int]) -> nn.Sequential:
    """From the grid of the first of some levels to that of the last: a 3 x 3 convolution with stride 2 for each halving."""
    steps: list[nn.Module] = []
    for before, after in pairwise(widths):
        steps += [*_normed(nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), after), nn.ReLU()]
    return nn.Sequential(*steps)


def _stage(before: int, after: int, depth: int, activation: str) -> nn.Sequential:
    inner = max(1, after // 2)
    more = (Block(after, inner, after, activation=activation) for _ in range(depth - 1))
    return nn.Sequential(Block(before, inner, after, "doubled", activation), *more)


def _initialise(module: nn.Module) -> None:
    """Convolutions as in residual networks; transposed ones keep torch's start, as published."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
