"""Images of findings: heatmaps on a fixed scale, outlined regions, small pictures that fit into a page.

The scale is that of the map, 0 the median of the calibration normals and 1 the pixel threshold, and never that of the
image shown: a normal image looks calm, and equal colours mean equal scores in every picture.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from unispect.types import Region

SIDE = 256  # the longer side of a picture, pixels
CLEAR, OPAQUE, FULL = 0.5, 1.5, 3.0  # scores at which colour begins, is no more transparent, and saturates
STRONGEST = 0.8  # opacity of full colour: the part stays visible under it

# Nine points of "inferno" (van der Walt and Smith, 2015): perceptually uniform, readable without colour vision.
COLOURS = np.array(
    [
        [0, 0, 4],
        [31, 12, 72],
        [85, 15, 109],
        [136, 34, 106],
        [186, 54, 85],
        [227, 89, 51],
        [249, 140, 10],
        [249, 201, 50],
        [252, 255, 164],
    ],
    dtype=np.float64,
)
DARKEST = 2  # the points before this one are as dark as a shadow in the image and are not used

Box = tuple[float, float, float, float]  # left, top, right, bottom


def colour(scores: np.ndarray) -> np.ndarray:
    """Colour and opacity of scores on the fixed scale, (h, w) -> (h, w, 4) float in [0, 255] and [0, 1]."""
    points = COLOURS[DARKEST:]
    position = np.clip((scores - CLEAR) / (FULL - CLEAR), 0.0, 1.0) * (len(points) - 1)
    channels = [np.interp(position, np.arange(len(points)), points[:, channel]) for channel in range(3)]
    opacity = STRONGEST * np.clip((scores - CLEAR) / (OPAQUE - CLEAR), 0.0, 1.0)
    return np.stack([*channels, opacity], axis=-1)


def legend() -> str:
    """The scale from 0 to FULL as a CSS gradient over whatever lies below."""
    stops = np.linspace(0.0, FULL, 13)
    parts = [f"rgb({r:.0f} {g:.0f} {b:.0f} / {a:.2f}) {100 * s / FULL:.0f}%" for s, (r, g, b, a) in _with(stops)]
    return f"linear-gradient(to right, {', '.join(parts)})"


def thumbnail(image: np.ndarray, side: int = SIDE) -> np.ndarray:
    """An image at most `side` pixels long, (H, W, 3) -> (h, w, 3) uint8; never enlarged."""
    height, width = image.shape[:2]
    scale = min(1.0, side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small: np.ndarray = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    return small


def heatmap(picture: np.ndarray, scores: np.ndarray, box: Box = (0.0, 0.0, 1.0, 1.0)) -> np.ndarray:
    """Scores (h, w) in colour over a picture in grey, (H, W, 3) -> (H, W, 3) uint8.

    box   the part of the picture that the map covers, in shares of its width and height
    """
    grey = np.repeat(np.asarray(Image.fromarray(picture).convert("L"), dtype=np.float64)[..., None], 3, axis=-1)
    painted = colour(_placed(scores.astype(np.float32), box, picture.shape[:2], Image.Resampling.BILINEAR))
    opacity = painted[..., 3:]
    mixed: np.ndarray = np.round(grey * (1.0 - opacity) + painted[..., :3] * opacity).astype(np.uint8)
    return mixed


def boxed(picture: np.ndarray, regions: Sequence[Region], width: int, height: int) -> np.ndarray:
    """A picture with the regions of the original (width, height) drawn as white frames with a dark edge."""
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    across, down = canvas.width / width, canvas.height / height
    for region in regions:
        left, top = round(region.left * across), round(region.top * down)
        right, bottom = max(left, round(region.right * across) - 1), max(top, round(region.bottom * down) - 1)
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=(0, 0, 0), width=3)
        draw.rectangle((left, top, right, bottom), outline=(255, 255, 255), width=1)
    return np.asarray(canvas)


def traced(picture: np.ndarray, mask: np.ndarray, box: Box = (0.0, 0.0, 1.0, 1.0)) -> np.ndarray:
    """A picture with a light line with a dark edge drawn around a mask (h, w), two pixels off so as to hide nothing."""
    inside = _placed(mask.astype(np.float32), box, picture.shape[:2], Image.Resampling.BILINEAR) > 0.5
    near = ndimage.binary_dilation(inside, np.ones((3, 3)), iterations=2)
    line = ndimage.binary_dilation(near, np.ones((3, 3))) & ~near
    edge = ndimage.binary_dilation(line, np.ones((3, 3))) & ~line & ~inside
    drawn = picture.copy()
    drawn[edge], drawn[line] = (0, 0, 0), (120, 235, 255)
    return drawn


def data_uri(picture: np.ndarray, quality: int = 82) -> str:
    """A picture (h, w, 3) uint8 as a JPEG inside an address, for a page without other files."""
    file = BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + b64encode(file.getvalue()).decode("ascii")


def _with(stops: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """Scores beside their colours."""
    return list(zip(stops.tolist(), colour(stops), strict=True))


def _placed(values: np.ndarray, box: Box, shape: tuple[int, int], how: Image.Resampling) -> np.ndarray:
    """Values (h, w) float32 stretched over a box of an empty canvas, -> (H, W); zero, hence calm, around it."""
    height, width = shape
    left, top = round(box[0] * width), round(box[1] * height)
    right, bottom = max(left + 1, round(box[2] * width)), max(top + 1, round(box[3] * height))
    canvas = np.zeros(shape, dtype=np.float32)
    canvas[top:bottom, left:right] = np.asarray(Image.fromarray(values).resize((right - left, bottom - top), how))
    return canvas
