"""Noise against its definition; textures and their changes stay in range; defects change their mask and nothing else."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.ndimage import rotate
from torch import Tensor

from unispect.nn import synthesis
from unispect.nn.synthesis import (
    CHANGES,
    LEVEL,
    PATTERNS,
    blotch,
    brightness,
    changed,
    coloured,
    contrasted,
    equalised,
    gamma,
    hue,
    inverted,
    perlin,
    posterised,
    sharpness,
    solarised,
    texture,
    turned,
    turned_at_random,
    with_defects,
)

SHAPE = (48, 64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int, side: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=seeded(seed))


# Perlin noise


def naive(shape: tuple[int, int], cells: tuple[int, int], seed: int) -> np.ndarray:
    """The definition, pixel by pixel, in double precision."""
    angle = 2 * np.pi * torch.rand(cells[0] + 1, cells[1] + 1, generator=seeded(seed)).double().numpy()
    found = np.empty(shape)
    for i in range(shape[0]):
        for j in range(shape[1]):
            y, x = i * cells[0] / shape[0], j * cells[1] / shape[1]
            total = 0.0
            for a in (int(y), int(y) + 1):
                for b in (int(x), int(x) + 1):
                    dot = np.cos(angle[a, b]) * (x - b) + np.sin(angle[a, b]) * (y - a)
                    weight = 1.0
                    for t in (1 - abs(x - b), 1 - abs(y - a)):
                        weight *= 6 * t**5 - 15 * t**4 + 10 * t**3
                    total += weight * dot
            found[i, j] = np.sqrt(2) * total
    return found


@pytest.mark.parametrize("cells", [(1, 1), (4, 2), (3, 5), (32, 1)])
def test_noise_is_what_its_definition_says(cells: tuple[int, int]) -> None:
    noise = perlin((12, 20), cells, seeded(1))
    np.testing.assert_allclose(noise, naive((12, 20), cells, 1), atol=1e-5)


@pytest.mark.parametrize("cells", [(1, 1), (4, 8), (16, 2)])
def test_noise_is_zero_at_the_corners_of_its_cells_and_continuous(cells: tuple[int, int]) -> None:
    noise = perlin((256, 256), cells, seeded(2))
    assert not noise[:: 256 // cells[0], :: 256 // cells[1]].any()
    assert noise.abs().max() <= 1
    steepest = 6 * max(cells) / 256
    assert noise.diff(dim=0).abs().max() < steepest
    assert noise.diff(dim=1).abs().max() < steepest


def test_noise_has_no_mean_and_keeps_to_its_cells() -> None:
    drawn = torch.stack([perlin((32, 32), (4, 4), seeded(seed)) for seed in range(400)])
    assert drawn.mean().abs() < 0.01
    assert drawn.mean(0).abs().max() < 0.1
    covariance = (drawn[:, 4, 4, None] * drawn[:, 4]).mean(0) / drawn[:, 4, 4].square().mean()
    assert covariance[4] == pytest.approx(1)
    assert covariance[13:].abs().max() < 0.2  # two cells further: no corner in common


# Turning


@pytest.mark.parametrize("degrees", [-90.0, -33.0, 0.0, 20.0, 90.0])
def test_turning_is_that_of_scipy(degrees: float) -> None:
    wide = torch.nn.functional.avg_pool2d(images(1, 40), 5, 1, 2)[0, :, :, :32]
    expected = np.stack([rotate(plane.numpy(), degrees, reshape=False, order=1) for plane in wide])
    inside = turned(torch.ones_like(wide), degrees)[0].numpy() > 0.999
    assert np.abs(turned(wide, degrees).numpy() - expected)[:, inside].max() < 1e-4
    assert inside.mean() > 0.5


def test_turning_leaves_black_where_nothing_was() -> None:
    assert not turned(torch.ones(3, 32, 32), 45)[:, 0, 0].any()


def test_a_share_of_images_is_turned() -> None:
    x = images(400, 8)
    after = turned_at_random(x, 0.3, generator=seeded())
    kept = (after == x).flatten(1).all(1)
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.07)
    assert torch.equal(turned_at_random(x, 0), x)
    assert not (turned_at_random(x, 1) == x).flatten(1).all(1).any()


# Textures


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.__name__)
def test_patterns_have_their_range_and_vary(pattern: Callable[..., Tensor]) -> None:
    drawn = [pattern(SHAPE, seeded(seed)) for seed in range(20)]
    assert {plane.shape for plane in drawn} == {SHAPE}
    assert all(plane.min() >= 0 and plane.max() <= 1 + 1e-6 for plane in drawn)
    assert min(plane.std() for plane in drawn) > 0.02
    assert len({plane.numpy().tobytes() for plane in drawn}) == 20


def test_colours_are_those_of_a_ramp() -> None:
    plane = torch.linspace(0, 1, 37)[None]
    for seed in range(10):
        same = seeded(seed)
        count = 2 + int(torch.randint(5, (), generator=same))
        colours = torch.rand(3, count, generator=same).numpy()
        expected = [np.interp(plane[0], np.linspace(0, 1, count), channel) for channel in colours]
        np.testing.assert_allclose(coloured(plane, seeded(seed))[:, 0], expected, atol=1e-6)


def test_textures_are_in_range_before_and_after_their_changes() -> None:
    for seed in range(60):
        plain = texture(SHAPE, seeded(seed))
        after = changed(plain, seeded(seed))
        for found in (plain, after):
            assert found.shape == (3, *SHAPE)
            assert found.dtype == torch.float32
            assert 0 <= found.min() <= found.max() <= 1


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_changes_and_its_input_stays(change: Callable[..., Tensor]) -> None:
    image = 0.2 + 0.5 * images(1)[0]
    before = image.clone()
    after = change(image, seeded(5))
    assert after.shape == image.shape
    assert torch.isfinite(after).all()
    assert not torch.equal(after, image)
    assert torch.equal(image, before)


def test_three_different_changes_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def noted(number: int) -> Callable[..., Tensor]:
        return lambda image, generator: (made.append(number), image + 2)[1]

    monkeypatch.setattr(synthesis, "CHANGES", tuple(noted(number) for number in range(10)))
    for seed in range(50):
        made.clear()
        assert changed(torch.zeros(3, 4, 4), seeded(seed)).max() == 1
        assert len(made) == len(set(made)) == 3


def test_changes_are_what_their_names_say() -> None:
    image = images(1)[0]
    assert torch.equal(inverted(image), 1 - image)
    for seed in range(8):
        powers = gamma(image, seeded(seed)).log() / image.log()
        assert powers.flatten(1).std(1).max() < 1e-3
        assert 0.5 <= powers.mean((1, 2)).min() <= powers.mean((1, 2)).max() <= 2
        slopes = brightness(image, seeded(seed)).flatten().numpy()
        factor, offset = np.polyfit(image.flatten().numpy(), slopes, 1)
        assert 0.8 <= factor <= 1.2
        assert abs(offset) <= 30 / 255 + 1e-5
        count = len(posterised(image, seeded(seed)).unique())
        assert count in {2, 4, 8, 16, 32, 64, 128}
        after = solarised(image, seeded(seed))
        limit = after[after == image].max()
        assert torch.equal(after, torch.where(image <= limit, image, 1 - image))
        torch.testing.assert_close(hue(image, seeded(seed)).mean(0), image.mean(0))  # grey stays
    stretched = contrasted(0.3 + 0.2 * image)
    assert stretched.amin((1, 2)).tolist() == [0, 0, 0]
    torch.testing.assert_close(stretched.amax((1, 2)), torch.ones(3))
    ranks = equalised(image**3).flatten(1).sort(1).values
    torch.testing.assert_close(ranks, (torch.arange(1024) / 1024 + 1 / 1024).expand(3, -1))
    flat = torch.full((3, 8, 8), 0.4)
    torch.testing.assert_close(sharpness(flat, seeded()), flat)


# Defects


def test_masks_cover_what_was_changed_and_nothing_else() -> None:
    x = images(200)
    planted, masks = with_defects(x, generator=seeded())
    assert planted.shape == x.shape
    assert masks.shape == (200, 32, 32)
    assert masks.dtype == torch.bool
    differs = (planted != x).any(1)
    assert not (differs & ~masks).any()  # bit by bit
    assert differs[masks].float().mean() > 0.999
    assert 0 <= planted.min() <= planted.max() <= 1


def test_about_half_of_the_images_stay_good() -> None:
    x = images(300, 64)
    for share in (0.0, 0.5, 1.0):
        _, masks = with_defects(x, share, generator=seeded())
        planted = masks.flatten(1).any(1).float().mean().item()
        assert 0.75 * share <= planted <= share + 0.06  # some noise stays below its level


def test_inside_is_a_blend_of_texture_and_image() -> None:
    """Of a black and a white image under the same draws, the difference is beta, in every pixel of the mask."""
    seen = []
    for seed in range(150):
        dark, mask = with_defects(torch.zeros(1, 3, 16, 16), 1.0, generator=seeded(seed))
        light, same = with_defects(torch.ones(1, 3, 16, 16), 1.0, generator=seeded(seed))
        assert torch.equal(mask, same)
        if mask.any():
            beta = (light - dark).movedim(1, -1)[mask]
            assert beta.max() - beta.min() < 1e-6
            seen.append(beta.mean().item())
            foreign = dark.movedim(1, -1)[mask] / (1 - seen[-1])
            assert -1e-6 <= foreign.min() <= foreign.max() <= 1 + 1e-5
    assert 0 <= min(seen) < 0.05
    assert 0.75 < max(seen) < 0.8
    assert np.mean(seen) == pytest.approx(0.4, abs=0.06)


def test_nothing_shows_through_where_that_is_asked() -> None:
    dark, mask = with_defects(torch.zeros(40, 3, 16, 16), 1.0, visible=0.0, generator=seeded())
    light, _ = with_defects(torch.ones(40, 3, 16, 16), 1.0, visible=0.0, generator=seeded())
    inside = mask[:, None].expand_as(dark)
    assert inside.any()
    assert torch.equal(dark[inside], light[inside])


def test_blotches_are_noise_above_its_level() -> None:
    """Small and large ones, of all resolutions, in the shares that the published level gives."""
    drawn = torch.stack([blotch((64, 64), seeded(seed)) for seed in range(300)])
    covered = drawn.float().mean((1, 2))
    assert LEVEL == 0.5
    assert 0.02 < covered.mean() < 0.12
    assert covered.max() < 0.5
    assert 0.02 < (covered == 0).float().mean() < 0.3


def test_the_seed_decides() -> None:
    x = images(20)
    one, other, third = (with_defects(x, generator=seeded(seed)) for seed in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[1], third[1])
    with torch.random.fork_rng(devices=[]):
        drawn = []
        for _ in range(2):
            torch.manual_seed(7)
            drawn.append(with_defects(x))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][0], one[0])  # a generator of one's own is as good


def test_a_generator_of_ones_own_leaves_that_of_torch_alone() -> None:
    before = torch.random.get_rng_state()
    with_defects(turned_at_random(images(8), 0.5, generator=seeded()), generator=seeded())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_images_that_are_given_stay_as_they_are() -> None:
    x = images(10)
    before = x.clone()
    with_defects(x, 1.0, generator=seeded())
    assert torch.equal(x, before)
