"""Built-in products: three textures and three objects, drawn by formula, with planted defects and exact masks.

    fabric     twill weave of two yarns        hole, stain, missing yarns, yarns of a wrong colour
    wood       veneer, grain and pores         scratch, hole, stain
    terrazzo   polished stone chips in cement  scratch (a crack), hole, stain, chip of a wrong colour
    gear       turned steel, any rotation      scratch, hole, stain, missing tooth
    board      printed circuit with parts      scratch, stain, missing, misplaced and wrong part
    blister    capsules in embossed foil       hole, stain, missing, misplaced and wrong capsule

Every picture has its own pose, light, material and sensor noise. It is a pure function of product, seed, defect and
size, and a defective picture is the good picture of the same seed but for the defect: the mask is where they differ.

Lengths are in units of the product: the image is about 2 wide, x to the right, y down, the middle at 0.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from types import EllipsisType
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image, ImageDraw

from unispect.errors import ConfigError, unknown_name

Array: TypeAlias = np.ndarray  # float32 throughout: a plane (h, w) or a canvas (3, h, w), 0 black to 1 white
Generator: TypeAlias = np.random.Generator
Colour: TypeAlias = tuple[float, float, float]
Point: TypeAlias = tuple[float, float]
Window: TypeAlias = tuple[EllipsisType, slice, slice]

VISIBLE = 8  # grey levels of 255: a change of more than this, in any channel, belongs to the mask
SMALLEST = 32  # pixels: below, threads and pins are no longer drawn


# Where things are: views, distances, coverage


@dataclass(frozen=True)
class View:
    """A camera's look at a product, or a window of it: x, y (h, w) say where on the product each pixel lies."""

    x: Array
    y: Array
    pixel: float
    size: int
    turn: float = 0.0
    shift: Point = (0.0, 0.0)
    zoom: float = 1.0

    def on_image(self, points: Array) -> Array:
        """Columns and rows in the whole image of points on the product, (n, 2) -> (n, 2)."""
        cos, sin = np.cos(self.turn), np.sin(self.turn)
        turned = points @ np.array([[cos, sin], [-sin, cos]])
        return np.asarray((turned * self.zoom + self.shift + 1) * (self.size / 2))

    def near(self, spot: Point, reach: float) -> tuple[Window, View]:
        """The part of the image that holds all within `reach` of a spot, and the view of that part."""
        reached = (reach / self.pixel + 1) * np.array([[-1], [1]])
        bounds = np.clip(self.on_image(np.array([spot])) + reached, 0, self.size).astype(int)
        (left, top), (right, bottom) = np.minimum(bounds, self.size - 1).tolist()
        window = ..., slice(top, bottom + 1), slice(left, right + 1)
        return window, replace(self, x=self.x[window], y=self.y[window])

    def about(self, spot: Point, turn: float = 0.0) -> tuple[Array, Array]:
        """Coordinates of the pixels in the frame of a part that lies at `spot`, turned by `turn` radians."""
        x, y = self.x - spot[0], self.y - spot[1]
        cos, sin = float(np.cos(turn)), float(np.sin(turn))
        return x * cos + y * sin, y * cos - x * sin

    def away(self, right: float, down: float) -> Point:
        """A step on the image as a step on the product: light and shadow do not turn with the part."""
        cos, sin = float(np.cos(self.turn)), float(np.sin(self.turn))
        return right * cos + down * sin, down * cos - right * sin


def look(size: int, turn: float, shift: Point, zoom: float) -> View:
    """The whole image, (size, size)."""
    line = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    across, down = (line - shift[0]) / zoom, (line[:, None] - shift[1]) / zoom
    cos, sin = float(np.cos(turn)), float(np.sin(turn))
    return View(across * cos + down * sin, down * cos - across * sin, 2 / size / zoom, size, turn, shift, zoom)


def length(x: Array, y: Array) -> Array:
    """As np.hypot, four times as fast."""
    distance: Array = np.sqrt(x * x + y * y)
    return distance


def box(x: Array, y: Array, half: Point, corner: float = 0.0) -> Array:
    """Signed distance to a rectangle with rounded corners, negative inside. *2D distance functions*, iquilezles.org."""
    across, down = np.abs(x) - (half[0] - corner), np.abs(y) - (half[1] - corner)
    outside = length(np.maximum(across, 0), np.maximum(down, 0)) - corner
    distance: Array = outside + np.minimum(np.maximum(across, down), 0)
    return distance


def rod(x: Array, y: Array, start: Point, end: Point) -> tuple[Array, Array]:
    """Distance to a segment, and how far along it the nearest point lies, 0 to 1."""
    way = end[0] - start[0], end[1] - start[1]
    squared = way[0] ** 2 + way[1] ** 2 + 1e-12
    along = np.clip(((x - start[0]) * way[0] + (y - start[1]) * way[1]) / squared, 0, 1)
    return length(x - start[0] - along * way[0], y - start[1] - along * way[1]), along


def inside(distance: Array, pixel: float) -> Array:
    """How much of each pixel lies inside a shape, 0 to 1; a wide `pixel` gives a soft edge."""
    return np.clip(0.5 - distance / pixel, 0, 1)


def ink(colour: Colour) -> Array:
    """A colour as a canvas of one pixel, (3, 1, 1)."""
    return np.array(colour, np.float32)[:, None, None]


def lay(canvas: Array, cover: Array, colour: Colour | Array) -> None:
    """Paint a colour, or a canvas of colours, over a canvas where `cover` says."""
    canvas += cover * ((ink(colour) if isinstance(colour, tuple) else colour) - canvas)


def dim(canvas: Array, cover: Array, left: float) -> None:
    """Darken to `left` of the light where `cover` says."""
    canvas *= 1 - cover * (1 - left)


def flat(view: View, colour: Colour) -> Array:
    """A canvas of one colour."""
    return np.repeat(ink(colour), view.x.size).reshape(3, *view.x.shape)


# Chance: generators, noise, small draws


def random(*key: str | int) -> Generator:
    """A generator that depends on the whole key and on nothing else."""
    return np.random.default_rng(np.random.SeedSequence(_entropy(key)))


def _entropy(key: Sequence[str | int]) -> list[int]:
    return [number for part in key for number in (part.encode() + b"\0" if isinstance(part, str) else [part])]


def vary(rng: Generator, colour: Colour, amount: float) -> Colour:
    """A colour a little lighter or darker, its channels a little apart."""
    common, apart = rng.normal(0, amount), rng.normal(0, amount / 4, 3)
    red, green, blue = (float(np.clip(c * (1 + common + d), 0, 1)) for c, d in zip(colour, apart, strict=True))
    return red, green, blue


@lru_cache(maxsize=64)
def _splines(size: int, cells: int) -> Array:
    """Cubic B-spline weights of each pixel on the knots of a line, (size, cells + 3)."""
    place = (np.arange(size) + 0.5) / size * cells
    gap = np.abs(place[:, None] + 1 - np.arange(cells + 3))
    near, far = 2 / 3 - gap**2 + gap**3 / 2, np.maximum(2 - gap, 0) ** 3 / 6
    return np.where(gap < 1, near, far).astype(np.float32)


def noise(rng: Generator, size: int, down: int, across: int) -> Array:
    """Smooth value noise of about unit deviation, so many cells down and across the image, (size, size)."""
    knots = rng.standard_normal((down + 3, across + 3), dtype=np.float32)
    smooth: Array = _splines(size, down) @ (knots / 0.48) @ _splines(size, across).T
    return smooth


def clouds(rng: Generator, size: int, cells: int, octaves: int) -> Array:
    """Noise with ever finer detail, about unit deviation."""
    layers = [noise(rng, size, cells << k, cells << k) * 0.6**k for k in range(octaves)]
    return sum(layers[1:], layers[0]) * 0.8


def table(rng: Generator, rows: int, columns: int) -> Array:
    """Random values for `sample`; both sides are powers of two."""
    return rng.standard_normal((rows, columns), dtype=np.float32)


def sample(values: Array, across: Array, down: Array) -> Array:
    """Noise in any frame: bilinear, periodic look-up of a table at coordinates in cells."""
    left, top = np.floor(across), np.floor(down)
    right_part, low_part = across - left, down - top
    rows, columns = values.shape
    j, i = left.astype(np.int32) & (columns - 1), (top.astype(np.int32) & (rows - 1)) * columns
    j_next, i_next = (j + 1) & (columns - 1), (i + columns) & (rows * columns - 1)
    line = values.ravel()
    upper, lower = line[i + j], line[i_next + j]
    upper += right_part * (line[i + j_next] - upper)
    lower += right_part * (line[i_next + j_next] - lower)
    between: Array = upper + low_part * (lower - upper)
    return between


def ragged(x: Array, y: Array, rng: Generator, radius: float, rough: float) -> Array:
    """Signed distance to a disc with an uneven outline."""
    angle, outline = np.arctan2(y, x), np.ones_like(x)
    for waves in (2, 3, 5, 8):
        phase, height = rng.uniform(0, 2 * np.pi), rng.normal(0, rough / waves**0.5)
        outline += height * np.cos(waves * angle + phase)
    distance: Array = length(x, y) - radius * np.clip(outline, 0.6, 1.5)
    return distance


# Defects of a surface: drawn over the finished product


@dataclass(frozen=True)
class Mark:
    """A surface defect of one product: who draws it, its colour, how strong it shows, how large it is, how it lies.

    body    the opaque share of a stain: the rest is a stain that light passes through
    """

    draw: Callable[[View, Array, Array, Generator, Point, Mark], None]
    colour: Colour
    strength: Point
    reach: Point
    angle: Point = (0.0, np.pi)
    body: float = 0.0


def scratch(view: View, canvas: Array, surface: Array, rng: Generator, spot: Point, mark: Mark) -> None:
    """A thin bent line, pressed unevenly, with a dark flank."""
    reach, strength = rng.uniform(*mark.reach), rng.uniform(*mark.strength)
    window, part = view.near(spot, reach + 0.05)
    x, y = part.about(spot, rng.uniform(*mark.angle))
    y = y - rng.normal(0, 0.12) / reach * x * x - 0.012 * np.sin(x * rng.uniform(15, 30) + rng.uniform(0, 6))
    along = np.clip(1 - np.abs(x) / reach, 0, 1)
    press = strength * np.clip(along * 6, 0, 1) * (0.8 + 0.2 * np.sin(x * rng.uniform(20, 40)))
    width = max(rng.uniform(0.007, 0.013), 0.6 * view.pixel)
    dim(canvas[window], surface[window] * inside(np.abs(y - width) - width * 0.8, view.pixel) * press, 0.6)
    lay(canvas[window], surface[window] * inside(np.abs(y) - width, view.pixel) * press, mark.colour)


def crack(view: View, canvas: Array, surface: Array, rng: Generator, spot: Point, mark: Mark) -> None:
    """A jagged line that thins out towards its ends."""
    count = 14
    steps = rng.uniform(*mark.reach) * 2 / count
    angle = rng.uniform(*mark.angle) + np.clip(np.cumsum(rng.normal(0, 0.35, count)), -1.2, 1.2)
    way = np.cumsum(np.stack([np.cos(angle), np.sin(angle)], 1) * steps, 0)
    points = (way - way.mean(0) + spot).tolist()
    widths = rng.uniform(0.008, 0.014) * np.sin(np.linspace(0.15, np.pi - 0.15, count)) + 0.35 * view.pixel
    strength = rng.uniform(*mark.strength)
    for (start, end), width in zip(pairwise(points), widths[1:], strict=True):
        window, part = view.near(((start[0] + end[0]) / 2, (start[1] + end[1]) / 2), steps)
        distance, _ = rod(part.x, part.y, start, end)
        lay(canvas[window], surface[window] * inside(distance - float(width), view.pixel) * strength, mark.colour)


def hole(view: View, canvas: Array, surface: Array, rng: Generator, spot: Point, mark: Mark) -> None:
    """A hole with an uneven outline: the wall in shade on the side of the light, a bright rim on the other."""
    radius = max(rng.uniform(*mark.reach), 1.6 * view.pixel)
    window, part = view.near(spot, radius * 1.9)
    x, y = part.about(spot, rng.uniform(0, np.pi))
    distance = ragged(x, y * rng.uniform(1, 1.5), rng, radius, 0.12)
    light = part.away(0.7, 0.7)
    facing = ((part.x - spot[0]) * light[0] + (part.y - spot[1]) * light[1]) / radius
    strength = rng.uniform(*mark.strength)
    rim = inside(np.abs(distance) - radius * 0.16, radius * 0.3) * surface[window] * strength
    lay(canvas[window], rim * np.clip(facing, 0, 1) * 0.5, (0.95, 0.95, 0.92))
    depth = ink(mark.colour) * np.clip(0.9 + 0.5 * facing, 0.5, 1.6)
    lay(canvas[window], inside(distance, max(view.pixel, radius * 0.2)) * surface[window] * strength, depth)


def stain(view: View, canvas: Array, surface: Array, rng: Generator, spot: Point, mark: Mark) -> None:
    """A soaked-in spill: the product shows through; darker towards its edge, with a satellite drop."""
    radius, strength = rng.uniform(*mark.reach), rng.uniform(*mark.strength)
    window, part = view.near(spot, radius * 2.2)
    x, y = part.about(spot, rng.uniform(0, np.pi))
    body = ragged(x, y * rng.uniform(1, 1.6), rng, radius, 0.2)
    bearing = rng.uniform(0, 2 * np.pi)
    drop = length(x - 1.6 * radius * np.cos(bearing), y - 1.6 * radius * np.sin(bearing)) - 0.2 * radius
    cover = inside(np.minimum(body, drop), radius * 0.25)
    cover = cover * (0.8 + 0.2 * inside(np.abs(body + radius * 0.12) - radius * 0.1, radius * 0.2))
    soaked = ink(mark.colour) * (mark.body + (1 - mark.body) * canvas[window])
    lay(canvas[window], cover * strength * surface[window], soaked)


# Textures


def fabric(view: View, rng: Generator, change: str | None, odd: Generator) -> tuple[Array, Array]:
    """Twill 2/2: each yarn goes over two and under two; the higher yarn of each place is seen."""
    count, start = 16, rng.uniform(32, 36, 2).tolist()
    across = view.x * count + start[0] + 0.05 * noise(rng, view.size, 5, 5)
    down = view.y * count + start[1] + 0.05 * noise(rng, view.size, 5, 5)
    shade = rng.normal(1, 0.03, (2, 64)).astype(np.float32)
    warp, warp_height, number = _yarn(across, down, shade[0])
    weft, weft_height, _ = _yarn(down, across + 2, shade[1])
    dye = np.repeat(ink(vary(rng, (0.27, 0.35, 0.48), 0.02))[..., 0], 64, 1)
    if change is not None:
        _change_yarn(view.size, change, odd, (number, down), (warp_height, dye))
    higher = np.clip((warp_height - weft_height) * (2.5 / count / view.pixel / 4) + 0.5, 0, 1)
    canvas = flat(view, vary(rng, (0.60, 0.60, 0.58), 0.02)) * weft
    lay(canvas, higher, dye[:, number] * warp)
    nap = 1 + 0.03 * clouds(rng, view.size, 24, 2) + 0.03 * noise(rng, view.size, 4, 4)
    canvas *= nap * (0.7 + 0.3 * np.clip(np.abs(warp_height - weft_height), 0, 1))
    return canvas, np.ones_like(across)


def _yarn(across: Array, along: Array, shade: Array) -> tuple[Array, Array, Array]:
    """Brightness, height and number of one system of yarns: round, twisted, waving over and under."""
    number = np.floor(across)
    offset = across - number
    roundness = np.sqrt(np.maximum(4 * offset * (1 - offset), 0))
    twist = 0.08 * np.sin((along * 1.5 + offset * 0.9) * (2 * np.pi))
    height = 0.75 * roundness + np.sin((along + number) * (np.pi / 2))
    number = number.astype(np.int32) & 63
    return (0.5 + 0.5 * roundness + twist) * shade[number], height, number


DYES: tuple[Colour, ...] = ((0.60, 0.20, 0.17), (0.20, 0.42, 0.20), (0.72, 0.52, 0.18), (0.07, 0.07, 0.09))


def _change_yarn(size: int, change: str, odd: Generator, place: tuple[Array, Array], warp: tuple[Array, Array]) -> None:
    """Two warp yarns are gone over some length, or are of another dye over their whole length."""
    (number, down), (height, dye) = place, warp
    row, column = odd.integers(size // 5, size * 4 // 5, 2)
    first = int(number[row, column])
    pair = [first, first + 1 & 63]
    if change == "missing_part":
        height[np.isin(number, pair) & (np.abs(down - down[row, column]) < odd.uniform(3, 8))] = -2
    if change == "wrong_colour":
        dye[:, pair] = ink(vary(odd, DYES[odd.integers(len(DYES))], 0.05))[..., 0]


def wood(view: View, rng: Generator, change: str | None, odd: Generator) -> tuple[Array, Array]:
    """Veneer with its grain upright: rings that darken slowly and end sharply, fibres, fine pores."""
    warp = 0.035 * noise(rng, view.size, 2, 3) + 0.004 * noise(rng, view.size, 4, 20)
    across = view.x + warp + 0.03 * rng.normal() * view.y * view.y + rng.uniform(2, 64)
    ring = across * 6.5 + 0.6 * np.sin(across * 3.1)
    number = np.floor(ring)
    phase = ring - number
    depth = rng.uniform(0.3, 0.6, 1024).astype(np.float32)[number.astype(np.int32) & 1023]
    late = depth * phase * phase * np.clip((1 - phase) * 7, 0, 1)
    values = table(rng, 128, 128)
    fibre = sample(values, across * 75, view.y * 4 + 2 * warp)
    pores = np.clip(sample(values.T, across * 88, view.y * 14 + 31) - 0.9, 0, 0.8)
    light, dark = vary(rng, (0.79, 0.60, 0.40), 0.02), vary(rng, (0.45, 0.28, 0.16), 0.02)
    canvas = flat(view, light)
    lay(canvas, np.clip(late + 0.07 * fibre + 0.05 * noise(rng, view.size, 2, 8) + 0.12, 0, 1), dark)
    dim(canvas, pores, 0.72)
    return canvas, np.ones_like(view.x)


CHIPS: tuple[Colour, ...] = (
    (0.84, 0.82, 0.79),
    (0.60, 0.58, 0.56),
    (0.50, 0.48, 0.46),
    (0.70, 0.62, 0.52),
    (0.60, 0.49, 0.43),
)
FOREIGN: tuple[Colour, ...] = ((0.14, 0.36, 0.46), (0.20, 0.38, 0.20), (0.70, 0.26, 0.24), (0.34, 0.24, 0.48))


def terrazzo(view: View, rng: Generator, change: str | None, odd: Generator) -> tuple[Array, Array]:
    """Broken stone of five colours in a pale cement, ground flat. Chips are polygons, drawn at twice the size."""
    cement = vary(rng, (0.74, 0.72, 0.68), 0.02)
    picture = Image.new("RGB", (view.size * 2, view.size * 2), _bytes(cement))
    _polygons(picture, view, *_chips(rng, 27, (0.010, 0.024)))
    large, colours = _chips(rng, 22, (0.026, 0.052))
    if change == "wrong_colour":
        middle = np.abs(large.mean(1)).max(1) < 0.85
        chip = large[int(odd.choice(np.flatnonzero(middle)))]
        chip = chip + (chip - chip.mean(0)) * odd.uniform(0.8, 1.6)
        large, colours = np.concatenate([large, chip[None]]), [*colours, vary(odd, FOREIGN[odd.integers(4)], 0.05)]
    _polygons(picture, view, large, colours)
    canvas = np.asarray(picture.reduce(2)).transpose(2, 0, 1).astype(np.float32) / 255
    canvas *= 1 + 0.035 * clouds(rng, view.size, 40, 2) + 0.025 * noise(rng, view.size, 3, 3)
    return canvas, np.ones_like(view.x)


def _chips(rng: Generator, count: int, radius: Point) -> tuple[Array, list[Colour]]:
    """Outlines (count², 7, 2) and colours of broken chips: one in each cell of a grid, off its middle."""
    line = (np.arange(count) + 0.5) * (2.5 / count) - 1.25
    middle = np.stack(np.meshgrid(line, line), -1).reshape(-1, 1, 2) + rng.uniform(-1, 1, (count**2, 1, 2)) / count
    angle = (np.arange(7) + rng.uniform(0, 0.8, (count**2, 7))) * (2 * np.pi / 7) + rng.uniform(0, 6, (count**2, 1))
    reach = rng.uniform(*radius, (count**2, 1)) * rng.uniform(0.7, 1.15, (count**2, 7))
    outline = middle + reach[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    stones = np.asarray(CHIPS)[rng.integers(len(CHIPS), size=count**2)] * rng.normal(1, 0.06, (count**2, 1))
    return outline, [(red, green, blue) for red, green, blue in stones.clip(0, 1).tolist()]


def _polygons(picture: Image.Image, view: View, outlines: Array, colours: Sequence[Colour]) -> None:
    """Fill outlines (n, k, 2) on a picture that is larger than the view by a whole factor."""
    corners = view.on_image(outlines.reshape(-1, 2)) * (picture.width / view.size)
    brush = ImageDraw.Draw(picture)
    for outline, colour in zip(corners.reshape(len(outlines), -1).tolist(), colours, strict=True):
        brush.polygon(outline, fill=_bytes(colour))


def _bytes(colour: Colour) -> tuple[int, int, int]:
    red, green, blue = (round(255 * channel) for channel in colour)
    return red, green, blue


# Objects


def shelf(view: View, rng: Generator, colour: Colour) -> Array:
    """The matt sheet that an object lies on."""
    canvas = flat(view, vary(rng, colour, 0.03))
    canvas *= 1 + 0.04 * noise(rng, view.size, 64, 64) + 0.025 * noise(rng, view.size, 3, 3)
    return canvas


TEETH, SPOKES = 20, 5


def gear(view: View, rng: Generator, change: str | None, odd: Generator) -> tuple[Array, Array]:
    """A spur gear of turned steel: teeth, five lightening holes, a raised hub, a bore with a keyway."""
    canvas = shelf(view, rng, (0.33, 0.35, 0.37))
    radius, angle = length(view.x, view.y), np.arctan2(view.y, view.x)
    solid = _gear_outline(view, radius, angle, change, odd)
    step = view.away(0.035, 0.045)
    cast = length(view.x - step[0], view.y - step[1]) - 0.82
    dim(canvas, inside(cast, 0.16), 0.45)
    surface = inside(solid, view.pixel)
    lay(canvas, surface, _turned_steel(view, rng, radius, angle, solid))
    return canvas, surface


def _gear_outline(view: View, radius: Array, angle: Array, change: str | None, odd: Generator) -> Array:
    """Signed distance to the steel; a broken tooth is cut off by an uneven line."""
    flank = np.clip(1.9 * np.cos(TEETH * angle), -1, 1)
    if change == "missing_part":
        centre = int(odd.integers(TEETH)) * 2 * np.pi / TEETH
        near = np.cos(angle - centre) > np.cos(np.pi / TEETH)
        torn = odd.uniform(-1.0, -0.2) + 0.3 * np.sin((angle - centre) * 11 + odd.uniform(0, 6)) + 0.12 * np.sin(angle * 67)
        flank = np.where(near, np.minimum(flank, torn), flank)
    body = (radius - 0.80 - 0.075 * flank) * 0.75
    sector = 2 * np.pi / SPOKES
    turned = np.mod(angle, sector) - sector / 2
    rounds = 0.115 - length(radius * np.cos(turned) - 0.50, radius * np.sin(turned))
    bore = np.maximum(0.16 - radius, -box(view.x, view.y + 0.17, (0.045, 0.055)))
    solid: Array = np.maximum(np.maximum(body, rounds), bore)
    return solid


def _turned_steel(view: View, rng: Generator, radius: Array, angle: Array, solid: Array) -> Array:
    """Concentric tool marks, the hour-glass gloss that they give, a milled hub, chamfered edges."""
    grooves = sample(table(rng, 4, 256), radius * 110, angle * 0.3 + 2)
    sheen = np.cos(2 * (angle + view.turn - rng.normal(0.8, 0.25)))
    grey = 0.60 + 0.085 * sheen + 0.035 * grooves + 0.012 * noise(rng, view.size, 80, 80)
    light = view.away(-0.7, -0.7)
    facing = (view.x * light[0] + view.y * light[1]) / (radius + 1e-3)
    edge = inside(np.abs(solid + 0.016) - 0.010, 0.012)
    step = inside(np.abs(radius - 0.31) - 0.012, 0.012)
    grey += edge * (0.10 + 0.13 * facing) + step * (0.17 * facing - 0.05) + 0.05 * (radius < 0.31)
    steel: Array = grey * ink(vary(rng, (0.97, 0.97, 0.99), 0.03))
    return steel


@dataclass(frozen=True)
class Part:
    """A component of the board: its kind, middle, half width and half height, and colour."""

    kind: str
    at: Point
    half: Point
    colour: Colour


BLACK, TAN, BRICK, RED = (0.13, 0.13, 0.14), (0.66, 0.52, 0.36), (0.50, 0.22, 0.16), (0.78, 0.16, 0.14)
PARTS: tuple[Part, ...] = (
    Part("chip", (-0.26, -0.16), (0.23, 0.23), BLACK),
    Part("chip", (0.48, -0.42), (0.21, 0.115), BLACK),
    Part("can", (0.56, 0.16), (0.155, 0.155), (0.78, 0.79, 0.80)),
    Part("can", (0.27, 0.42), (0.105, 0.105), (0.78, 0.79, 0.80)),
    Part("header", (-0.36, 0.56), (0.34, 0.085), BLACK),
    Part("small", (-0.68, -0.44), (0.060, 0.110), BLACK),
    Part("small", (-0.68, -0.18), (0.060, 0.110), BLACK),
    Part("small", (-0.68, 0.10), (0.060, 0.110), TAN),
    Part("small", (-0.42, 0.26), (0.110, 0.060), TAN),
    Part("small", (-0.10, 0.26), (0.110, 0.060), TAN),
    Part("small", (-0.46, -0.57), (0.110, 0.060), BLACK),
    Part("small", (-0.16, -0.57), (0.110, 0.060), BLACK),
    Part("small", (0.13, -0.36), (0.060, 0.110), BRICK),
    Part("small", (0.15, -0.04), (0.060, 0.110), TAN),
    Part("small", (0.36, -0.12), (0.110, 0.060), BLACK),
    Part("small", (0.66, -0.15), (0.110, 0.060), RED),
    Part("small", (0.58, 0.50), (0.110, 0.060), BRICK),
    Part("small", (0.10, 0.60), (0.060, 0.110), BLACK),
)
TRACES: tuple[tuple[Point, ...], ...] = (
    ((-0.68, -0.38), (-0.60, -0.30), (-0.50, -0.30)),
    ((-0.68, -0.26), (-0.60, -0.20), (-0.50, -0.20)),
    ((-0.68, -0.10), (-0.50, -0.10)),
    ((-0.68, 0.02), (-0.60, -0.02), (-0.50, -0.02)),
    ((-0.68, 0.19), (-0.60, 0.30), (-0.60, 0.56)),
    ((-0.34, 0.26), (-0.30, 0.20), (-0.30, 0.08)),
    ((-0.50, 0.26), (-0.50, 0.56)),
    ((-0.18, 0.26), (-0.22, 0.20), (-0.22, 0.08)),
    ((-0.02, 0.26), (0.06, 0.34), (0.20, 0.34), (0.27, 0.42)),
    ((-0.38, -0.57), (-0.34, -0.50), (-0.34, -0.40)),
    ((-0.24, -0.57), (-0.20, -0.50), (-0.20, -0.40)),
    ((-0.08, -0.57), (0.06, -0.57), (0.13, -0.50), (0.13, -0.44)),
    ((-0.02, -0.28), (0.13, -0.28)),
    ((-0.02, -0.12), (0.15, -0.12)),
    ((0.15, 0.04), (0.22, 0.10), (0.22, 0.30), (0.27, 0.36)),
    ((0.13, -0.28), (0.24, -0.20), (0.28, -0.12)),
    ((0.44, -0.12), (0.58, -0.15)),
    ((0.74, -0.15), (0.76, -0.10), (0.76, 0.40), (0.66, 0.50)),
    ((0.40, -0.28), (0.40, -0.20), (0.36, -0.12)),
    ((0.56, -0.28), (0.56, -0.20), (0.60, -0.15)),
    ((0.50, 0.50), (0.40, 0.42), (0.34, 0.42)),
    ((0.10, 0.68), (-0.05, 0.68), (-0.10, 0.56)),
    ((0.56, 0.24), (0.48, 0.34), (0.34, 0.38)),
)


def board(view: View, rng: Generator, change: str | None, odd: Generator) -> tuple[Array, Array]:
    """A green printed circuit: mask over copper, pads, silk screen, chips, capacitors, resistors, a pin header."""
    canvas = shelf(view, rng, (0.72, 0.71, 0.69))
    edge = box(view.x, view.y, (0.86, 0.74), 0.05)
    dim(canvas, inside(edge - 0.02, 0.12), 0.55)
    surface = inside(edge, view.pixel)
    lay(canvas, surface, _bare_board(view, rng))
    wrong = int(odd.integers(len(PARTS)))
    for number, part in enumerate(PARTS):
        lying, turn = _placed(part, rng), rng.normal(0, 0.01)
        if number == wrong and change is not None:
            if change == "missing_part":
                continue
            lying, turn = _odd_part(lying, turn, change, odd)
        DRAWN[part.kind](view, canvas, lying, turn)
    return canvas, surface


def _placed(part: Part, rng: Generator) -> Part:
    """The part as the placer put it down: nearly in its place, of nearly its colour."""
    dx, dy = rng.normal(0, 0.004, 2).clip(-0.008, 0.008).tolist()
    return replace(part, at=(part.at[0] + dx, part.at[1] + dy), colour=vary(rng, part.colour, 0.03))


def _odd_part(part: Part, turn: float, change: str, odd: Generator) -> tuple[Part, float]:
    """The part turned and pushed off its pads, or with a body of another colour."""
    if change == "wrong_colour":
        others = [(0.16, 0.32, 0.72), (0.86, 0.76, 0.26), (0.52, 0.24, 0.60), (0.88, 0.88, 0.86)]
        far = [other for other in others if np.abs(np.subtract(other, part.colour)).max() > 0.2]
        return replace(part, colour=vary(odd, far[odd.integers(len(far))], 0.05)), turn
    bearing, way = odd.uniform(0, 2 * np.pi), odd.uniform(0.03, 0.05)
    at = part.at[0] + way * float(np.cos(bearing)), part.at[1] + way * float(np.sin(bearing))
    swing = min(odd.uniform(0.03, 0.06) / max(part.half), 0.5)
    return replace(part, at=at), turn + float(odd.choice([-1, 1])) * swing


def _bare_board(view: View, rng: Generator) -> Array:
    """Solder mask, lighter over copper; gilded pads; white outlines; four plated holes."""
    canvas = flat(view, vary(rng, (0.09, 0.33, 0.20), 0.05))
    canvas *= 1 + 0.04 * clouds(rng, view.size, 30, 2)
    copper, pads, silk = _artwork(view)
    lay(canvas, copper * 0.75, (0.20, 0.50, 0.29))
    lay(canvas, silk * 0.85, (0.86, 0.88, 0.84))
    lay(canvas, pads, (0.86, 0.62, 0.24))
    for corner in _rectangle((0.0, 0.0), (0.77, 0.65)):
        window, local = view.near(corner, 0.06)
        from_middle = length(*local.about(corner))
        lay(canvas[window], inside(from_middle - 0.060, view.pixel), (0.76, 0.66, 0.40))
        lay(canvas[window], inside(from_middle - 0.036, view.pixel), (0.10, 0.10, 0.10))
    return canvas


def _artwork(view: View) -> tuple[Array, Array, Array]:
    """What is printed on the bare board: cover of copper, of pads and of silk screen, three planes."""
    sheets = [Image.new("L", (view.size * 2, view.size * 2)) for _ in range(3)]
    copper, pads, silk = (ImageDraw.Draw(sheet) for sheet in sheets)
    scale = 2 / view.pixel  # pixels of a sheet in one unit of length

    def corners(points: Sequence[Point]) -> list[float]:
        listed: list[float] = (view.on_image(np.asarray(points)) * 2).ravel().tolist()
        return listed

    for trace in TRACES:
        copper.line(corners(trace), fill=255, width=max(round(0.022 * scale), 1), joint="curve")
        for column, row in np.reshape(corners([trace[0], trace[-1]]), (2, 2)):
            copper.circle((float(column), float(row)), 0.022 * scale, fill=255)
    for part in PARTS:
        for pad in _pads(part):
            pads.polygon(corners(pad), fill=255)
        silk.polygon(corners(_rectangle(part.at, (part.half[0] + 0.045, part.half[1] + 0.045))), outline=255, width=2)
    copper_plane, pads_plane, silk_plane = (np.asarray(sheet.reduce(2), np.float32) / 255 for sheet in sheets)
    return copper_plane, pads_plane, silk_plane


def _rectangle(at: Point, half: Point) -> list[Point]:
    return [(at[0] + i * half[0], at[1] + j * half[1]) for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))]


def _pads(part: Part) -> list[list[Point]]:
    """Gilded copper under the legs of a part, seen where the part is not."""
    (x, y), (width, height) = part.at, part.half
    if part.kind == "chip":
        sides = [(x + k * width / 4, y + side * height) for k in range(-3, 4) for side in (-1, 1)]
        return [
            _rectangle((x, y), (width * 0.45, height * 0.45)),
            *(_rectangle(at, (width / 14, 0.045)) for at in sides),
        ]
    if part.kind == "header":
        return [_rectangle((x + k * width / 4, y), (0.025, 0.025)) for k in range(-3, 4)]
    if width > height:
        return [_rectangle((x + side * width * 0.85, y), (width * 0.35, height * 1.2)) for side in (-1, 1)]
    return [_rectangle((x, y + side * height * 0.85), (width * 1.2, height * 0.35)) for side in (-1, 1)]


def _small(view: View, canvas: Array, part: Part, turn: float) -> None:
    """A resistor or a ceramic capacitor: a body between two tinned ends, each in its fillet of solder."""
    window, x, y = _framed(view, canvas, part, turn)
    width, height = part.half
    body = inside(box(x, y, part.half, 0.008), view.pixel)
    along, end = (x, width) if width > height else (y, height)
    fillet = (width * 1.25, height * 1.2) if width > height else (width * 1.2, height * 1.25)
    solder = inside(box(x, y, fillet, 0.012), view.pixel) * inside(end * 0.48 - np.abs(along), view.pixel)
    lay(canvas[window], solder, (0.62, 0.63, 0.63))
    lay(canvas[window], body, part.colour)
    lay(canvas[window], body * inside(end * 0.62 - np.abs(along), view.pixel), (0.80, 0.80, 0.79))
    dim(canvas[window], body * inside(-(x + y) / (width + height) + 0.45, 0.6), 0.75)


def _chip(view: View, canvas: Array, part: Part, turn: float) -> None:
    """A black package with pins on its long sides, a dot at pin one, a printed label and a bevel."""
    window, x, y = _framed(view, canvas, part, turn)
    width, height = part.half
    pitch = width / 4
    pins = box(np.mod(x + pitch / 2, pitch) - pitch / 2, np.abs(y) - height, (pitch * 0.26, 0.042), 0.004)
    lay(canvas[window], inside(np.maximum(pins, np.abs(x) - width * 0.93), view.pixel), (0.80, 0.80, 0.78))
    if width == height:
        pins = box(np.abs(x) - width, np.mod(y + pitch / 2, pitch) - pitch / 2, (0.042, pitch * 0.26), 0.004)
        lay(canvas[window], inside(np.maximum(pins, np.abs(y) - height * 0.93), view.pixel), (0.80, 0.80, 0.78))
    shape = box(x, y, (width - 0.012, height - 0.012), 0.01)
    lay(canvas[window], inside(shape, view.pixel), part.colour)
    lay(canvas[window], inside(np.abs(shape + 0.012) - 0.006, 0.012) * 0.25, (0.6, 0.6, 0.6))
    lay(canvas[window], inside(length(x + width * 0.72, y + height * 0.68) - 0.022, view.pixel) * 0.7, (0.5, 0.5, 0.5))
    text = (
        (np.abs(y) < height * 0.4) & (np.mod(y, height * 0.4) > height * 0.2) & (np.mod(x * 31 + np.floor(y * 9), 1.6) > 0.6)
    )
    lay(canvas[window], text * inside(np.abs(x) - width * 0.6, view.pixel) * 0.35, (0.8, 0.8, 0.8))


def _can(view: View, canvas: Array, part: Part, turn: float) -> None:
    """An electrolytic capacitor from above: a plastic foot, a metal can, a black sector for the minus."""
    window, x, y = _framed(view, canvas, part, turn)
    reach = part.half[0]
    distance = length(x, y)
    lay(canvas[window], inside(box(x, y, part.half, reach * 0.25), view.pixel), (0.16, 0.16, 0.17))
    gloss = np.clip(0.86 + 0.14 * np.cos(2 * (np.arctan2(y, x) + turn - 0.7)) - 0.25 * (distance > reach * 0.8), 0, 1)
    lid = ink(part.colour) * gloss
    lay(canvas[window], inside(distance - reach * 0.92, view.pixel), lid)
    lay(canvas[window], inside(np.maximum(distance - reach * 0.8, reach * 0.4 - x), view.pixel), (0.15, 0.15, 0.17))


def _header(view: View, canvas: Array, part: Part, turn: float) -> None:
    """A row of gold pins in a plastic strip."""
    window, x, y = _framed(view, canvas, part, turn)
    width, height = part.half
    pitch = width / 4
    lay(canvas[window], inside(box(x, y, part.half, 0.02), view.pixel), part.colour)
    across = np.mod(x, pitch) - pitch / 2
    cell = inside(np.maximum(box(across, y, (pitch * 0.40, height * 0.75), 0.015), np.abs(x) - width), view.pixel)
    lay(canvas[window], cell * 0.12, (1.0, 1.0, 1.0))
    pin = inside(np.maximum(box(across, y, (0.022, 0.022)), np.abs(x) - width), view.pixel)
    lay(canvas[window], pin, (0.86, 0.72, 0.36))


def _framed(view: View, canvas: Array, part: Part, turn: float) -> tuple[Window, Array, Array]:
    """The window and frame of a part, after its shadow has been cast."""
    window, local = view.near(part.at, (part.half[0] ** 2 + part.half[1] ** 2) ** 0.5 + 0.05)
    step = local.away(0.016, 0.020)
    x, y = local.about((part.at[0] + step[0], part.at[1] + step[1]), turn)
    dim(canvas[window], inside(box(x, y, part.half, 0.01), 0.035), 0.55)
    return (window, *local.about(part.at, turn))


DRAWN: dict[str, Callable[[View, Array, Part, float], None]] = {
    "small": _small,
    "chip": _chip,
    "can": _can,
    "header": _header,
}

POCKETS: tuple[Point, ...] = tuple((x, y) for y in (-0.34, 0.34) for x in (-0.60, -0.20, 0.20, 0.60))
LENGTH, RADIUS = 0.115, 0.105  # of a capsule: half its straight part, and half its width


def blister(view: View, rng: Generator, change: str | None, odd: Generator) -> tuple[Array, Array]:
    """Eight two-coloured capsules under clear domes, in foil with an embossed lattice and a printed strip."""
    canvas = shelf(view, rng, (0.24, 0.30, 0.36))
    edge = box(view.x, view.y, (0.86, 0.76), 0.09)
    step = view.away(0.025, 0.03)
    dim(canvas, inside(box(view.x - step[0], view.y - step[1], (0.86, 0.76), 0.09), 0.06), 0.5)
    surface = inside(edge, view.pixel)
    lay(canvas, surface, _foil(view, rng, edge))
    caps = vary(rng, (0.68, 0.15, 0.14), 0.04), vary(rng, (0.90, 0.85, 0.72), 0.02)
    wrong = int(odd.integers(len(POCKETS)))
    for number, pocket in enumerate(POCKETS):
        turn, slide = np.clip(rng.normal(0, (0.035, 0.010)), (-0.09, -0.02), (0.09, 0.02)).tolist()
        fault = change if number == wrong else None
        _pocket(view, canvas, pocket)
        if fault != "missing_part":
            _capsule(view, canvas, (pocket[0], pocket[1] + slide), *_filled(turn, caps, fault, odd))
        _dome(view, canvas, pocket)
    return canvas, surface


def _filled(
    turn: float, caps: tuple[Colour, Colour], fault: str | None, odd: Generator
) -> tuple[float, tuple[Colour, Colour]]:
    """How the capsule lies and what colours it has; a misplaced one lies the wrong way round or askew."""
    if fault == "misplaced_part":
        return turn + (np.pi if odd.random() < 0.5 else odd.choice([-1, 1]) * odd.uniform(0.3, 0.5)), caps
    if fault == "wrong_colour":
        others = [(0.20, 0.34, 0.62), (0.22, 0.46, 0.30), (0.86, 0.58, 0.18), (0.42, 0.12, 0.24)]
        return turn, (vary(odd, others[odd.integers(4)], 0.04), caps[1])
    return turn, caps


def _foil(view: View, rng: Generator, edge: Array) -> Array:
    """Aluminium with an embossed lattice of diamonds, slightly creased; tear lines and a printed strip."""
    ridges = np.maximum(np.cos((view.x + view.y) * 80), np.cos((view.x - view.y) * 80))
    crease = clouds(rng, view.size, 5, 3)
    grey = 0.66 + 0.06 * ridges + 0.035 * crease + 0.05 * inside(np.abs(edge + 0.02) - 0.012, 0.012)
    canvas: Array = grey * ink(vary(rng, (0.97, 0.98, 1.0), 0.02))
    dashes = np.maximum(np.abs(np.abs(view.x) - 0.40) - 0.006, np.abs(np.mod(view.y, 0.07) - 0.035) - 0.02)
    dashes = np.minimum(np.maximum(dashes, np.abs(view.y) - 0.72), np.maximum(np.abs(view.x) - 0.006, dashes))
    lay(canvas, inside(dashes, view.pixel) * 0.5, (0.35, 0.36, 0.38))
    letters = np.mod(np.floor(view.x * 40) * 0.61 + np.floor(view.y * 55) * 0.37, 1) > 0.42
    strip = (np.mod(np.floor(view.x * 40), 5) > 0) & (np.abs(np.abs(view.x) - 0.40) > 0.06)
    lay(canvas, letters * strip * inside(box(view.x, view.y, (0.76, 0.035)), view.pixel) * 0.7, (0.16, 0.26, 0.52))
    return canvas


def _pocket(view: View, canvas: Array, at: Point) -> None:
    """A hollow in the foil: shaded towards the light, bright on the far side."""
    window, local = view.near(at, LENGTH + RADIUS + 0.06)
    x, y = local.about(at)
    distance = length(x, np.maximum(np.abs(y) - LENGTH, 0)) - (RADIUS + 0.035)
    light = local.away(0.7, 0.7)
    slope = (x * light[0] + y * light[1]) / (RADIUS + LENGTH)
    hollow = np.clip(0.55 + 0.16 * slope - 0.8 * np.clip(distance + 0.05, 0, 0.05), 0, 1)
    lay(canvas[window], inside(distance, view.pixel), hollow * ink((1.0, 1.0, 1.02)))


def _capsule(view: View, canvas: Array, at: Point, turn: float, caps: tuple[Colour, Colour]) -> None:
    """A gelatine capsule: a coloured cap that overlaps a pale body, round and glossy."""
    window, local = view.near(at, LENGTH + RADIUS + 0.06)
    x, y = local.about(at, turn)
    from_axis = length(x, np.maximum(np.abs(y) - LENGTH, 0))
    upper = inside(y - 0.015, view.pixel)
    radius = RADIUS * (0.96 + 0.04 * upper)
    colour = upper * ink(caps[0]) + (1 - upper) * ink(caps[1])
    round_off = np.sqrt(np.clip(1 - (from_axis / radius) ** 2, 0, 1))
    colour *= 0.50 + 0.50 * round_off - 0.18 * inside(np.abs(y - 0.018) - 0.004, view.pixel)
    dim(canvas[window], inside(from_axis - RADIUS - 0.012, 0.05), 0.6)
    lay(canvas[window], inside(from_axis - radius, view.pixel), colour)


def _dome(view: View, canvas: Array, at: Point) -> None:
    """Light on the clear dome: one streak towards the lamp, a faint rim."""
    window, local = view.near(at, LENGTH + RADIUS + 0.06)
    x, y = local.about(at)
    streak, _ = rod(x, y, (-0.045, -LENGTH), (-0.045, LENGTH * 0.4))
    lay(canvas[window], inside(streak - 0.008, 0.022) * 0.65, (1.0, 1.0, 1.0))
    rim = np.abs(length(x, np.maximum(np.abs(y) - LENGTH, 0)) - RADIUS - 0.028)
    lay(canvas[window], inside(rim - 0.004, view.pixel) * 0.3, (1.0, 1.0, 1.0))


# The products


@dataclass(frozen=True)
class Product:
    """One product: who paints it, where a surface defect may lie, how freely it lies under the camera.

    paint    (view, rng, change, odd) -> canvas (3, h, w) and the plane of pixels that belong to the product;
             `rng` varies what is normal, `odd` decides what the change does
    turn, shift, zoom    the pose is uniform within plus or minus these: radians, units, share
    marks    surface defects and their looks
    changes  defects of build, which `paint` draws itself
    """

    kind: Literal["texture", "object"]
    paint: Callable[[View, Generator, str | None, Generator], tuple[Array, Array]]
    spot: Callable[[Generator], Point]
    turn: float
    shift: float
    zoom: float
    marks: dict[str, Mark]
    changes: tuple[str, ...] = ()

    @property
    def defects(self) -> tuple[str, ...]:
        return (*self.marks, *self.changes)


def _anywhere(rng: Generator) -> Point:
    return rng.uniform(-0.75, 0.75), rng.uniform(-0.75, 0.75)


def _on_web(rng: Generator) -> Point:
    """Between the lightening holes of the gear and its teeth, or between two of those holes."""
    angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(0.66, 0.72)
    if rng.random() < 0.5:
        angle, radius = int(rng.integers(SPOKES)) * 2 * np.pi / SPOKES + rng.normal(0, 0.05), rng.uniform(0.42, 0.62)
    return radius * float(np.cos(angle)), radius * float(np.sin(angle))


def _on_board(rng: Generator) -> Point:
    return rng.uniform(-0.7, 0.7), rng.uniform(-0.6, 0.6)


def _on_foil(rng: Generator) -> Point:
    """Between the capsules: a column between pockets, or the strip along the middle or an edge."""
    if rng.random() < 0.5:
        return float(rng.choice([-0.40, 0.0, 0.40])) + rng.normal(0, 0.01), rng.uniform(-0.6, 0.6)
    return rng.uniform(-0.7, 0.7), float(rng.choice([-0.66, 0.0, 0.66])) + rng.normal(0, 0.01)


PRODUCTS: dict[str, Product] = {
    "fabric": Product(
        kind="texture",
        paint=fabric,
        spot=_anywhere,
        turn=0.02,
        shift=0.0,
        zoom=0.02,
        marks={
            "hole": Mark(hole, (0.07, 0.07, 0.08), (0.8, 1.0), (0.07, 0.13)),
            "stain": Mark(stain, (0.46, 0.32, 0.17), (0.7, 1.0), (0.15, 0.27)),
        },
        changes=("missing_part", "wrong_colour"),
    ),
    "wood": Product(
        kind="texture",
        paint=wood,
        spot=_anywhere,
        turn=0.05,
        shift=0.0,
        zoom=0.03,
        marks={
            "scratch": Mark(scratch, (0.93, 0.82, 0.64), (0.6, 1.0), (0.15, 0.45), (-1.1, 1.1)),
            "hole": Mark(hole, (0.16, 0.10, 0.06), (0.75, 1.0), (0.045, 0.080)),
            "stain": Mark(stain, (0.38, 0.38, 0.44), (0.6, 0.95), (0.10, 0.20)),
        },
    ),
    "terrazzo": Product(
        kind="texture",
        paint=terrazzo,
        spot=_anywhere,
        turn=0.0,
        shift=0.0,
        zoom=0.03,
        marks={
            "scratch": Mark(crack, (0.10, 0.09, 0.09), (0.8, 1.0), (0.3, 0.6)),
            "hole": Mark(hole, (0.10, 0.09, 0.08), (0.8, 1.0), (0.06, 0.10)),
            "stain": Mark(stain, (0.58, 0.40, 0.18), (0.65, 1.0), (0.12, 0.24)),
        },
        changes=("wrong_colour",),
    ),
    "gear": Product(
        kind="object",
        paint=gear,
        spot=_on_web,
        turn=np.pi,
        shift=0.03,
        zoom=0.02,
        marks={
            "scratch": Mark(scratch, (0.97, 0.98, 1.0), (0.9, 1.0), (0.20, 0.36)),
            "hole": Mark(hole, (0.10, 0.10, 0.11), (0.85, 1.0), (0.050, 0.080)),
            "stain": Mark(stain, (0.62, 0.38, 0.22), (0.4, 0.9), (0.06, 0.13)),
        },
        changes=("missing_part",),
    ),
    "board": Product(
        kind="object",
        paint=board,
        spot=_on_board,
        turn=0.03,
        shift=0.025,
        zoom=0.015,
        marks={
            "scratch": Mark(scratch, (0.86, 0.82, 0.62), (0.75, 1.0), (0.2, 0.45)),
            "stain": Mark(stain, (0.78, 0.70, 0.48), (0.6, 0.95), (0.10, 0.20), body=0.6),
        },
        changes=("missing_part", "misplaced_part", "wrong_colour"),
    ),
    "blister": Product(
        kind="object",
        paint=blister,
        spot=_on_foil,
        turn=0.06,
        shift=0.03,
        zoom=0.02,
        marks={
            "hole": Mark(hole, (0.08, 0.08, 0.09), (0.8, 1.0), (0.040, 0.065)),
            "stain": Mark(stain, (0.50, 0.38, 0.24), (0.6, 1.0), (0.07, 0.13)),
        },
        changes=("missing_part", "misplaced_part", "wrong_colour"),
    ),
}
DEFECTS: dict[str, tuple[str, ...]] = {name: product.defects for name, product in PRODUCTS.items()}


# Pictures


def draw(product: str, seed: int, defect: str | None = None, size: int = 256) -> tuple[Array, Array]:
    """A picture (size, size, 3) uint8 and the mask of its defect (size, size) bool.

    Where the mask is False, the picture is the good one of the same seed, to within `VISIBLE` grey levels.
    """
    _check(product, defect, seed, size)
    good = _picture(product, seed, None, size)
    if defect is None:
        return good, np.zeros((size, size), bool)
    bad = _picture(product, seed, defect, size)
    return bad, np.abs(bad.astype(np.int16) - good).max(-1) > VISIBLE


def _check(product: str, defect: str | None, seed: int, size: int) -> None:
    if product not in PRODUCTS:
        raise ConfigError(unknown_name("product", product, PRODUCTS))
    if defect is not None and defect not in DEFECTS[product]:
        raise ConfigError(unknown_name(f"defect of {product}", defect, DEFECTS[product]))
    if seed < 0:
        raise ConfigError(f"seed={seed}: expected a whole number from 0")
    if size < SMALLEST:
        raise ConfigError(f"size={size}: expected at least {SMALLEST} pixels, as smaller pictures lose their defects")


def _picture(name: str, seed: int, defect: str | None, size: int) -> Array:
    product, odd = PRODUCTS[name], random(name, seed, "defect", defect or "none")
    view = _pose(product, random(name, seed, "pose"), size)
    change = defect if defect in product.changes else None
    canvas, surface = product.paint(view, random(name, seed, "material"), change, odd)
    if defect in product.marks:
        mark = product.marks[defect]
        mark.draw(view, canvas, surface, odd, product.spot(odd), mark)
    return _expose(canvas, random(name, seed, "camera"))


def _pose(product: Product, rng: Generator, size: int) -> View:
    turn, right, down, nearer = rng.uniform(-1, 1, 4).tolist()
    return look(size, turn * product.turn, (right * product.shift, down * product.shift), 1 + nearer * product.zoom)


def _expose(canvas: Array, rng: Generator) -> Array:
    """What the camera makes of it: gain, a slope of light, a darker rim, white balance, noise; (h, w, 3) uint8."""
    gain, slope = rng.uniform(0.92, 1.08), rng.uniform(-0.09, 0.09, 2).tolist()
    line = np.linspace(-1, 1, canvas.shape[-1], dtype=np.float32)
    bow = 0.05 * line * line
    light = gain * (1 + slope[0] * line - bow + (slope[1] * line - bow)[:, None])
    balance = rng.uniform(0.98, 1.02, (3, 1, 1)).astype(np.float32)
    seen = canvas * light * (255 * balance) + 0.5
    seen += rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(1.2, 2.4))
    return np.ascontiguousarray(np.clip(seen, 0, 255).astype(np.uint8).transpose(1, 2, 0))


# A folder of them


def write_products(
    root: Path | str,
    train: int = 60,
    good: int = 20,
    bad: int = 8,
    size: int = 256,
    seed: int = 0,
    products: Sequence[str] | None = None,
) -> Path:
    """Pictures and masks in the layout of MVTec AD; returns `root` as a path.

    train, good   good pictures for training and for testing, of each product
    bad           pictures of each kind of defect of each product
    products      names from `PRODUCTS`; None for all
    """
    root, names = Path(root), list(PRODUCTS if products is None else products)
    for product in names:
        _check(product, None, seed, size)
    for product in names:
        folder = root / product
        counts = {"train/good": train, "test/good": good} | {f"test/{defect}": bad for defect in DEFECTS[product]}
        for role, count in counts.items():
            for number in range(count):
                _write_one(folder, product, role, number, seed, size)
    return root


def _write_one(folder: Path, product: str, role: str, number: int, seed: int, size: int) -> None:
    kind = role.rpartition("/")[2]
    own_seed = int(random(product, seed, role, number).integers(2**63))
    picture, mask = draw(product, own_seed, None if kind == "good" else kind, size)
    _save(picture, folder / role / f"{number:03d}.png")
    if kind != "good":
        _save(mask.astype(np.uint8) * 255, folder / "ground_truth" / kind / f"{number:03d}_mask.png")


def _save(picture: Array, path: Path) -> None:
    """Write under another name first: a file of this name is always whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        Image.fromarray(picture).save(partial, format="PNG", compress_level=1)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
