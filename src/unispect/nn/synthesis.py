"""Planted defects: patches of foreign texture, of the shape of noise, blended into images.

As DRAEM plants them (Zavrtanik, Kristan, Skocaj, 2021), https://arxiv.org/abs/2108.07610, Section 3.3, with textures
drawn by formula in place of the photographs of its texture set. Values are in [0, 1]. What is drawn at random comes from
the generator that is given, else from torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

Shape: TypeAlias = tuple[int, int]  # h, w
Generator: TypeAlias = torch.Generator | None

CELLS = 6  # Perlin noise has 2^0 to 2^5 cells a side
LEVEL = 0.5  # of the noise, above which there is a defect
OPERATIONS = 3  # changes of one texture


def with_defects(
    images: Tensor, share: float = 0.5, visible: float = 0.8, generator: Generator = None
) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) -> the same with defects, and where they are, (N, H, W) bool; elsewhere not a bit changes.

    Inside, a pixel is (1 - beta) texture + beta image. A few defects are empty, for the noise may stay below its level.

    share     probability that an image gets a defect
    visible   beta is drawn from U(0, visible): how much of the image shows through
    """
    masks = torch.zeros(len(images), *images.shape[2:], dtype=torch.bool, device=images.device)
    planted = images.clone()
    for row, image in enumerate(images):
        if _uniform(0, 1, generator) >= share:
            continue
        shape = (image.shape[1], image.shape[2])
        mask, beta = blotch(shape, generator).to(image.device), _uniform(0, visible, generator)
        foreign = changed(texture(shape, generator), generator).to(image)
        masks[row], planted[row] = mask, torch.where(mask, (1 - beta) * foreign + beta * image, image)
    return planted, masks


def turned_at_random(images: Tensor, share: float, degrees: float = 90.0, generator: Generator = None) -> Tensor:
    """A share of the images turned by U(-degrees, degrees), (N, 3, H, W) -> (N, 3, H, W); the others as they are."""
    rows = [
        turned(image, _uniform(-degrees, degrees, generator)) if _uniform(0, 1, generator) < share else image
        for image in images
    ]
    return torch.stack(rows)


def turned(image: Tensor, degrees: float) -> Tensor:
    """Turned about the middle, bilinear, black where nothing was, (C, h, w) -> (C, h, w)."""
    _, height, width = image.shape
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = torch.tensor([[[cos, -sin * height / width, 0], [sin * width / height, cos, 0]]]).to(image)
    grid = affine_grid(matrix, [1, *image.shape], align_corners=False)
    return grid_sample(image[None], grid, align_corners=False)[0]


# Shapes


def blotch(shape: Shape, generator: Generator = None) -> Tensor:
    """Where Perlin noise of random cells, turned by U(-90, 90) degrees, is above its level, (h, w) bool."""
    cells = (2 ** _whole(CELLS, generator), 2 ** _whole(CELLS, generator))
    noise = perlin(shape, cells, generator)
    return turned(noise[None], _uniform(-90, 90, generator))[0] > LEVEL


def perlin(shape: Shape, cells: Shape, generator: Generator = None) -> Tensor:
    """Perlin noise with so many cells down and across, (h, w): zero at the corners of the cells, within +-1.

    Improving noise (Perlin, 2002), https://doi.org/10.1145/566654.566636: at every corner a random direction, at every
    pixel the products of its offsets from the corners with theirs, blended by 6t^5 - 15t^4 + 10t^3.
    """
    (row, down), (column, across) = (_offsets(*line) for line in zip(shape, cells, strict=True))
    angle = 2 * math.pi * torch.rand(cells[0] + 1, cells[1] + 1, generator=generator)
    corners = [
        [
            angle[row + i][:, column + j].cos() * (across - j) + angle[row + i][:, column + j].sin() * (down - i)[:, None]
            for j in (0, 1)
        ]
        for i in (0, 1)
    ]
    right, below = _fade(across), _fade(down)[:, None]
    upper, lower = (torch.lerp(left, other, right.expand_as(left)) for left, other in corners)
    return math.sqrt(2) * torch.lerp(upper, lower, below.expand_as(upper))


def _offsets(side: int, cells: int) -> tuple[Tensor, Tensor]:
    """Cell of each pixel of a line, and how far into it the pixel lies, in [0, 1)."""
    place = torch.arange(side) * cells
    return place // side, (place % side) / side


def _fade(t: Tensor) -> Tensor:
    return t**3 * (t * (6 * t - 15) + 10)


# Textures


def texture(shape: Shape, generator: Generator = None) -> Tensor:
    """A random pattern in random colours, (3, h, w)."""
    pattern = PATTERNS[_whole(len(PATTERNS), generator)]
    return coloured(pattern(shape, generator), generator)


def coloured(plane: Tensor, generator: Generator = None) -> Tensor:
    """Values in [0, 1] as places on a ramp through two to six random colours, (h, w) -> (3, h, w)."""
    colours = torch.rand(3, 2 + _whole(5, generator), generator=generator)
    place = plane * (colours.shape[1] - 1)
    left = place.long().clamp(0, colours.shape[1] - 2)
    return torch.lerp(colours[:, left], colours[:, left + 1], (place - left).expand(3, -1, -1))


def waves(shape: Shape, generator: Generator = None) -> Tensor:
    """A grating of any direction, its lines a little bent, (h, w)."""
    along, _ = _axes(shape, generator)
    bend = _uniform(0, 0.5, generator) * perlin(shape, (4, 4), generator)
    return 0.5 + 0.5 * torch.sin(2 * math.pi * (2 ** _uniform(1, 5, generator) * along + bend))


def checks(shape: Shape, generator: Generator = None) -> Tensor:
    """Fields of a board of any direction, each of one value, (h, w)."""
    across, down = (plane * 2 ** _uniform(1, 4, generator) for plane in _axes(shape, generator))
    column, row = across.floor().long() % 64, down.floor().long() % 64
    if _uniform(0, 1, generator) < 0.5:
        return ((column + row) % 2).float()
    return torch.rand(64, 64, generator=generator)[row, column]


def clouds(shape: Shape, generator: Generator = None) -> Tensor:
    """Perlin noise in up to five octaves, (h, w)."""
    first, octaves, fall = 2 ** _whole(4, generator), 1 + _whole(5, generator), _uniform(0.4, 0.9, generator)
    layers = [fall**k * perlin(shape, (first << k, first << k), generator) for k in range(octaves)]
    return _stretched(torch.stack(layers).sum(0))


def cells(shape: Shape, generator: Generator = None) -> Tensor:
    """Voronoi cells of random points, each of one value, or the distance from the nearest point, (h, w)."""
    points = torch.rand(4 + _whole(60, generator), 2, generator=generator)
    down, across = (torch.arange(side) / side for side in shape)
    squared = (down[:, None, None] - points[:, 0]) ** 2 + (across[None, :, None] - points[:, 1]) ** 2
    nearest = squared.min(2)
    if _uniform(0, 1, generator) < 0.5:
        return _stretched(nearest.values.sqrt())
    return torch.rand(len(points), generator=generator)[nearest.indices]


def ramp(shape: Shape, generator: Generator = None) -> Tensor:
    """From one side to another, with a little grain, (h, w)."""
    along, _ = _axes(shape, generator)
    grain = _uniform(0, 0.2, generator) * torch.randn(shape, generator=generator)
    return _stretched(along + grain)


PATTERNS: tuple[Callable[[Shape, Generator], Tensor], ...] = (waves, checks, clouds, cells, ramp)


def _axes(shape: Shape, generator: Generator) -> tuple[Tensor, Tensor]:
    """Coordinates along a random direction and at a right angle to it, from a random origin; the height is 1."""
    angle, right, down = (_uniform(0, high, generator) for high in (2 * math.pi, 1, 1))
    y, x = torch.meshgrid(torch.arange(shape[0]) / shape[0] - down, torch.arange(shape[1]) / shape[0] - right, indexing="ij")
    return math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x


def _stretched(planes: Tensor) -> Tensor:
    """The lowest value of each plane to 0, the highest to 1, (..., h, w) -> (..., h, w)."""
    low, high = planes.amin((-2, -1), keepdim=True), planes.amax((-2, -1), keepdim=True)
    return (planes - low) / (high - low).clamp_min(1e-6)


# Changes of a texture, (3, h, w) -> (3, h, w)


def changed(image: Tensor, generator: Generator = None) -> Tensor:
    """Three different changes, drawn at random and one after another."""
    for number in torch.randperm(len(CHANGES), generator=generator)[:OPERATIONS].tolist():
        image = CHANGES[number](image, generator).clamp(0, 1)
    return image


def gamma(image: Tensor, generator: Generator = None) -> Tensor:
    """Each channel to a power from 0.5 to 2."""
    return image.pow(0.5 + 1.5 * torch.rand(3, 1, 1, generator=generator))


def brightness(image: Tensor, generator: Generator = None) -> Tensor:
    """A factor from 0.8 to 1.2, and up to 30 grey levels of 255 up or down."""
    return image * _uniform(0.8, 1.2, generator) + _uniform(-30, 30, generator) / 255


def sharpness(image: Tensor, generator: Generator = None) -> Tensor:
    """Away from its blur or towards it."""
    blur = avg_pool2d(image[None], 3, 1, 1, count_include_pad=False)[0]
    return torch.lerp(blur, image, _uniform(0, 2, generator))


def hue(image: Tensor, generator: Generator = None) -> Tensor:
    """Colours turned about the grey axis by up to 70 degrees, and made stronger or weaker."""
    angle, strength = math.radians(_uniform(-70, 70, generator)), _uniform(0.5, 1.5, generator)
    grey = image.mean(0, keepdim=True)
    own = image - grey
    beside = (own.roll(1, 0) - own.roll(-1, 0)) / math.sqrt(3)  # a right angle further around the axis
    return grey + strength * (math.cos(angle) * own + math.sin(angle) * beside)


def solarised(image: Tensor, generator: Generator = None) -> Tensor:
    """What is brighter than a limit, inverted."""
    return torch.where(image < _uniform(32, 128, generator) / 255, image, 1 - image)


def posterised(image: Tensor, generator: Generator = None) -> Tensor:
    """The highest one to seven bits of eight."""
    count = 2 ** (1 + _whole(7, generator))
    bits: Tensor = (image * count).floor().clamp_max(count - 1) / (count - 1)
    return bits


def inverted(image: Tensor, generator: Generator = None) -> Tensor:
    """Dark for bright."""
    return 1 - image


def contrasted(image: Tensor, generator: Generator = None) -> Tensor:
    """Each channel over the whole range."""
    return _stretched(image)


def equalised(image: Tensor, generator: Generator = None) -> Tensor:
    """Each channel by rank, so that all values are equally common."""
    values = image.flatten(1).contiguous()
    ranks = torch.searchsorted(values.sort(1).values, values, right=True)
    return (ranks / values.shape[1]).view_as(image)


def tilted(image: Tensor, generator: Generator = None) -> Tensor:
    """Turned by up to 45 degrees."""
    return turned(image, _uniform(-45, 45, generator))


CHANGES: tuple[Callable[[Tensor, Generator], Tensor], ...] = (
    gamma,
    brightness,
    sharpness,
    hue,
    solarised,
    posterised,
    inverted,
    contrasted,
    equalised,
    tilted,
)


# Chance


def _uniform(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _whole(count: int, generator: Generator) -> int:
    """A whole number from 0 to count - 1."""
    return int(torch.randint(count, (), generator=generator))
