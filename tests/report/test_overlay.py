"""Pictures: the fixed scale, geometry, and files that can be opened."""

from base64 import b64decode
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from unispect.report import overlay
from unispect.types import Region

GREY = np.full((40, 60, 3), 120, np.uint8)


def lightness(rgb: np.ndarray) -> np.ndarray:
    """CIE L* of sRGB in [0, 255], (n, 3) -> (n,)."""
    part = rgb / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    y = linear @ np.array([0.2126, 0.7152, 0.0722])
    return np.where(y > 216 / 24389, 116 * np.cbrt(y) - 16, y * 24389 / 27)


def test_a_normal_image_is_calm() -> None:
    scores = np.random.default_rng(0).uniform(-1.0, 0.5, (8, 8)).astype(np.float32)
    assert np.array_equal(overlay.heatmap(GREY, scores), GREY)


def test_equal_scores_look_equal_whatever_else_is_in_the_map() -> None:
    alone, beside = np.full((4, 6), 1.2, np.float32), np.full((4, 6), 1.2, np.float32)
    beside[:, 5] = 50.0
    assert np.array_equal(overlay.heatmap(GREY, alone)[:, :20], overlay.heatmap(GREY, beside)[:, :20])


def test_saturation() -> None:
    assert np.array_equal(overlay.colour(np.array([[3.0]])), overlay.colour(np.array([[99.0]])))
    assert not np.array_equal(overlay.colour(np.array([[2.9]])), overlay.colour(np.array([[3.0]])))


def test_colours_grow_lighter_evenly_so_that_they_need_no_hue() -> None:
    shades = lightness(overlay.colour(np.linspace(overlay.CLEAR, overlay.FULL, 61))[:, :3])
    steps = np.diff(shades)
    assert np.all(steps > 0)
    assert steps.max() / steps.min() < 3


def test_opacity_never_falls_and_never_hides_the_part() -> None:
    opacity = overlay.colour(np.linspace(-2, 9, 200))[:, 3]
    assert np.all(np.diff(opacity) >= 0)
    assert opacity[0] == 0.0
    assert opacity[-1] == overlay.STRONGEST < 1.0


@pytest.mark.parametrize(
    ("shape", "small"),
    [((100, 50), (100, 50)), ((512, 1024), (128, 256)), ((3000, 2), (256, 1)), ((256, 256), (256, 256))],
)
def test_thumbnails_keep_the_aspect_ratio(shape: tuple[int, int], small: tuple[int, int]) -> None:
    assert overlay.thumbnail(np.zeros((*shape, 3), np.uint8)).shape == (*small, 3)


def test_the_map_covers_the_image_or_the_box() -> None:
    hot = np.full((5, 5), 3.0, np.float32)
    assert np.all(overlay.heatmap(GREY, hot) != 120)
    inside = overlay.heatmap(GREY, hot, (0.25, 0.0, 0.75, 1.0))
    assert np.array_equal((inside != 120).all(axis=(0, 2)), (np.arange(60) >= 15) & (np.arange(60) < 45))


def test_a_hot_place_is_painted_where_it_is() -> None:
    scores = np.zeros((4, 6), np.float32)
    scores[1, 4] = 3.0
    changed = np.abs(overlay.heatmap(GREY, scores).astype(int) - 120).sum(axis=2)
    top, left = np.unravel_index(changed.argmax(), changed.shape)
    assert 10 <= top < 20
    assert 40 <= left < 50


def test_frames_are_drawn_in_the_scale_of_the_picture() -> None:
    drawn = overlay.boxed(GREY, [Region(200, 100, 400, 300, 2.0, 9)], width=600, height=400)
    white = np.argwhere((drawn == 255).all(axis=2))
    assert (white.min(axis=0).tolist(), white.max(axis=0).tolist()) == ([10, 20], [29, 39])
    assert np.array_equal(drawn[12:28, 22:38], GREY[12:28, 22:38])
    assert np.array_equal(overlay.boxed(GREY, [], 600, 400), GREY)


def test_frames_at_the_edge_and_of_one_pixel_can_be_drawn() -> None:
    regions = [Region(0, 0, 6000, 4000, 1.0, 1), Region(5999, 3999, 6000, 4000, 1.0, 1)]
    assert overlay.boxed(GREY, regions, 6000, 4000).shape == GREY.shape


def test_traces_go_around_the_defect_and_hide_none_of_it() -> None:
    mask = np.zeros((40, 60), bool)
    mask[10:20, 15:40] = True
    drawn = overlay.traced(GREY, mask)
    assert np.array_equal(drawn[mask], GREY[mask])
    assert np.any(drawn != GREY)
    assert np.array_equal(overlay.traced(GREY, np.zeros((9, 9), bool)), GREY)


def test_data_uris_hold_a_picture() -> None:
    head, body = overlay.data_uri(GREY).split(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(BytesIO(b64decode(body))) as image:
        assert image.size == (60, 40)


def test_inputs_are_left_alone() -> None:
    picture, mask = GREY.copy(), np.eye(40, 60, dtype=bool)
    overlay.heatmap(picture, mask.astype(np.float32) * 3)
    overlay.traced(picture, mask)
    overlay.boxed(picture, [Region(1, 1, 9, 9, 1.0, 1)], 60, 40)
    assert np.array_equal(picture, GREY)
