"""DRAEM's losses against definitions and loops, its scores, and that it learns what it was never shown."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn.functional import cross_entropy

from planted import labelled
from unispect.detectors import draem
from unispect.detectors.base import Recipe
from unispect.detectors.draem import DRAEM, Networks, focal, ssim
from unispect.detectors.methods import build
from unispect.errors import ConfigError
from unispect.fit import fit
from unispect.inspector import complete
from unispect.types import Features

SIDE = 32
TINY = {"width": 2, "segmentation_width": 2, "map_side": SIDE}


def images(count: int = 4, seed: int = 0, side: int = SIDE) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def detector(**options: Any) -> DRAEM:
    return DRAEM([(3, SIDE, SIDE)], 1, **(TINY | options)).eval()


def awake(**options: Any) -> DRAEM:
    """With weights so large that what comes out differs from place to place, as it does after training."""
    one, draws = detector(**options), torch.Generator().manual_seed(4)
    for part in one.modules():
        if isinstance(part, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(part.weight, generator=draws)
    return one


def networks(one: DRAEM) -> Networks:
    part = one.levels[0]
    assert isinstance(part, Networks)
    return part


def losses(one: DRAEM, features: Features, seed: int = 0) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return one.loss(features, torch.zeros(len(features[0]), dtype=torch.long), 0.0)


# Structural similarity


def by_scipy(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The definition of Wang et al. with scipy's Gaussian, cut at five pixels, zeros beyond the edge; (H, W) twice."""

    def mean(x: np.ndarray) -> np.ndarray:
        return np.asarray(gaussian_filter(x, 1.5, mode="constant", truncate=5 / 1.5))

    mu, nu = mean(one), mean(other)
    var, co, war = mean(one * one) - mu**2, mean(one * other) - mu * nu, mean(other * other) - nu**2
    c1, c2 = 0.01**2, 0.03**2
    return (2 * mu * nu + c1) * (2 * co + c2) / ((mu**2 + nu**2 + c1) * (var + war + c2))


def test_similarity_is_that_of_scipy() -> None:
    one, other = images(2, 0).double(), (images(2, 0) + 0.3 * images(2, 1)).double()
    found = ssim(one, other)
    expected = [
        [by_scipy(*pair) for pair in zip(a.numpy(), b.numpy(), strict=True)] for a, b in zip(one, other, strict=True)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    torch.testing.assert_close(ssim(one.float(), other.float()), found.float(), atol=1e-4, rtol=0)


def test_similarity_is_that_of_a_loop_over_windows() -> None:
    one, other = images(1, 0, 13)[0, 0].double(), images(1, 1, 13)[0, 0].double()
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2
    found = ssim(one[None, None], other[None, None])[0, 0]
    for row in (5, 6, 7):  # where the whole window lies inside
        for column in (5, 6, 7):
            x, y = (z[row - 5 : row + 6, column - 5 : column + 6].numpy() for z in (one, other))
            mu, nu = (weights * x).sum(), (weights * y).sum()
            var, war, co = (
                (weights * (x - mu) ** 2).sum(),
                (weights * (y - nu) ** 2).sum(),
                (weights * (x - mu) * (y - nu)).sum(),
            )
            light, shape = (2 * mu * nu + 1e-4) / (mu**2 + nu**2 + 1e-4), (2 * co + 9e-4) / (var + war + 9e-4)
            assert found[row, column].item() == pytest.approx(light * shape, abs=1e-6)


@pytest.mark.parametrize(("a", "b"), [(0.2, 0.8), (0.0, 1.0), (0.5, 0.5), (0.01, 0.02)])
def test_similarity_of_plain_images_has_a_closed_form(a: float, b: float) -> None:
    one, other = (torch.full((1, 1, 31, 31), value, dtype=torch.float64) for value in (a, b))
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert ssim(one, other)[0, 0, 15, 15].item() == pytest.approx(expected, rel=1e-5)


def test_similarity_of_an_image_and_itself_is_one() -> None:
    torch.testing.assert_close(ssim(images(), images()), torch.ones(4, 3, SIDE, SIDE))
    assert ssim(images(), 1 - images()).mean() < 0.05


# Focal loss


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_focal_loss_is_that_of_a_loop(gamma: float) -> None:
    draws = torch.Generator().manual_seed(0)
    logits, classes = torch.randn(2, 2, 3, 4, generator=draws), torch.randint(2, (2, 3, 4), generator=draws)
    total = 0.0
    for image in range(2):
        for row in range(3):
            for column in range(4):
                scores = logits[image, :, row, column].double().numpy()
                p = np.exp(scores[classes[image, row, column]]) / np.exp(scores).sum()
                total -= (1 - p) ** gamma * np.log(p)
    assert focal(logits, classes, gamma).item() == pytest.approx(total / 24, rel=1e-5)
    if not gamma:
        torch.testing.assert_close(focal(logits, classes, gamma), cross_entropy(logits, classes))


def test_focal_loss_is_of_the_published_power_and_has_a_gradient_where_all_is_right() -> None:
    logits = torch.tensor([[[[0.0, 60.0]], [[0.0, -60.0]]]], requires_grad=True)
    loss = focal(logits, torch.zeros(1, 1, 2, dtype=torch.long))
    assert loss.item() == pytest.approx(0.25 * np.log(2) / 2, rel=1e-6)
    loss.backward()
    assert torch.isfinite(logits.grad).all()  # type: ignore[arg-type]


# Learning


def test_the_loss_is_the_sum_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    one, x = awake(rotated=0.0), images()
    changed, masks = (1 - x), torch.rand(4, SIDE, SIDE, generator=torch.Generator().manual_seed(2)) < 0.3
    monkeypatch.setattr(draem, "with_defects", lambda images: (changed, masks))
    last = networks(one).reconstruction.last
    with torch.no_grad():
        last.weight /= 5 * networks(one)(changed)[0].std()
        last.bias += 0.5  # now it gives greys, like an image
        anew, logits, _ = networks(one)(changed)
        found = losses(one, [x])
    assert (ssim(anew, x).mean() - ssim(anew, changed).mean()).abs() > 1e-3
    assert found["mse"].item() == pytest.approx((anew - x).square().mean().item(), rel=1e-5)
    assert found["ssim"].item() == pytest.approx(1 - ssim(anew, x).mean().item(), rel=1e-5)
    assert found["focal"].item() == pytest.approx(focal(logits, masks.long()).item(), rel=1e-5)
    assert found["total"].item() == pytest.approx(sum(found[name].item() for name in ("mse", "ssim", "focal")), rel=1e-5)
    assert set(found) == {"total", "mse", "ssim", "focal"}


def test_the_segmentation_sees_the_image_anew_and_the_image() -> None:
    part = networks(awake())
    with torch.no_grad():
        anew, logits, middle = part(images())
        assert torch.equal(part.reconstruction(images())[1], middle)
        torch.testing.assert_close(part.segmentation(torch.cat([anew, images()], 1)), logits)


def test_a_gradient_reaches_every_weight_of_both_networks() -> None:
    one = detector().train()
    losses(one, [images(8)])["total"].backward()
    for name, value in one.named_parameters():
        assert value.grad is not None, name
        assert value.grad.any() or name.endswith("0.bias"), name  # a bias before a normalisation has no effect
    one.zero_grad()
    losses(one, [images(8)])["focal"].backward()
    assert networks(one).reconstruction.last.weight.grad.any()  # type: ignore[union-attr]


def test_images_are_turned_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(draem, "with_defects", lambda images: (seen.append(images), plain(images))[1])

    def plain(images: Tensor) -> tuple[Tensor, Tensor]:
        return images, torch.zeros(len(images), SIDE, SIDE, dtype=torch.bool)

    one, x = detector(rotated=1.0), images()
    losses(one, [x])
    one.held_out_loss([x], torch.zeros(4))
    losses(detector(rotated=0.0), [x])
    turned, held_out, unturned = seen
    assert not torch.equal(turned, x)
    assert torch.equal(held_out, x)
    assert torch.equal(unturned, x)


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    one = detector()
    first, again, other = (losses(one, [images()], seed)["total"].item() for seed in (1, 1, 2))
    assert first == again != other


def test_the_held_out_loss_changes_nothing() -> None:
    one = detector()
    before = {name: value.clone() for name, value in one.state_dict().items()}
    with torch.no_grad():
        one.held_out_loss([images()], torch.zeros(4))
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())


def stripes(count: int, seed: int) -> Tensor:
    """Two products with stripes across and down, never quite at the same place."""
    draws = torch.Generator().manual_seed(seed)
    line = 6.28 * (3 * torch.arange(SIDE) / SIDE + 0.2 * torch.rand(count, 1, generator=draws))
    wave = 0.5 + 0.15 * torch.sin(line)[:, None, None, :].expand(-1, 3, SIDE, -1).clone()
    wave[::2] = wave[::2].mT
    return (wave + 0.02 * torch.randn(count, 3, SIDE, SIDE, generator=draws)).clamp(0, 1)


@pytest.mark.slow
def test_a_short_training_sees_a_kind_of_defect_that_was_never_planted() -> None:
    """A white or black disc: textures are neither plain nor round."""
    recipe = Recipe(steps=140, images=24, checks=2, learning_rate=3e-3, beta1=0.9, beta2=0.999, decay=0.0, schedule="drop")
    one = detector(width=6, segmentation_width=6, rotated=0.0)
    good, bad, line = stripes(60, 2), stripes(60, 2), torch.arange(SIDE) - 12.0
    disc = line[:, None] ** 2 + line**2 < 6**2
    bad[:30, :, disc], bad[30:, :, disc] = 1.0, 0.0
    before = auroc(one([good]).image, one([bad]).image)
    fit(
        one,
        labelled([stripes(60, 0)], np.zeros(60, np.int64)),
        labelled([stripes(16, 1)], np.zeros(16, np.int64)),
        recipe,
        0,
    )
    lower, higher = one([good]), one([bad])
    assert auroc(lower.image, higher.image) > max(0.8, before)
    change = (higher.maps - lower.maps).mean(0)
    assert change[disc].mean() > 3 * change[:, 24:].mean().abs()


def auroc(lower: Tensor, higher: Tensor) -> float:
    return float((higher[:, None] > lower).float().mean())


# Scores


def test_the_map_is_the_probability_of_a_defect_and_the_score_its_highest_mean() -> None:
    one, x = awake(), images()
    with torch.no_grad():
        _, logits, middle = networks(one)(x)
    scores = one([x])
    probability = torch.exp(logits[:, 1]) / torch.exp(logits).sum(1)
    torch.testing.assert_close(scores.maps, probability)
    padded = np.pad(probability.numpy(), ((0, 0), (10, 10), (10, 10)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (21, 21), (1, 2))
    np.testing.assert_allclose(scores.image, windows.mean((3, 4)).max((1, 2)), rtol=1e-5)
    assert scores.context is not None
    assert torch.equal(scores.context, middle)
    assert scores.context.shape == (4, 16, 2, 2)
    assert scores.products is None


def test_maps_are_resized_and_blurred_as_asked() -> None:
    x = images()
    plain, small, soft = (awake(map_side=side, sigma=sigma)([x]) for side, sigma in ((SIDE, 0.0), (16, 0.0), (SIDE, 2.0)))
    assert small.maps.shape == (4, 16, 16)
    torch.testing.assert_close(small.maps, torch.nn.functional.avg_pool2d(plain.maps, 2))
    expected = np.stack([gaussian_filter(each, 2.0) for each in plain.maps.numpy()])
    np.testing.assert_allclose(soft.maps, expected, atol=1e-5)
    assert torch.equal(plain.image, small.image)
    assert torch.equal(plain.image, soft.image)


# Settings


def test_the_method_asks_for_pixels_and_the_published_optimizer() -> None:
    table = complete({"method": "draem"})
    assert table["features"]["backbone"] == "pixels"
    assert table["features"]["layers"] == table["features"]["pooled"] == []
    published = {"rule": "adam", "learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.999, "images": 8, "decay": 0.0}
    assert published.items() <= table["training"].items()
    assert (table["training"]["schedule"], table["training"]["drops"], table["training"]["drop"]) == (
        "drop",
        [0.8, 0.9],
        0.2,
    )
    one = build(table, [(3, 64, 64)], 2)
    assert isinstance(one, DRAEM)


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        ([(24, 32, 32)], r"features: got levels \[\(24, 32, 32\)\], expected one of 3 channels.*backbone='pixels'"),
        ([(3, 32, 32), (3, 1, 1)], r"features: got levels \[\(3, 32, 32\), \(3, 1, 1\)\], expected one"),
        ([], r"features: got levels \[\], expected one"),
        ([(3, 100, 100)], r"preparation\.size: got 100 x 100 pixels, expected a multiple of 32"),
        ([(3, 64, 80)], r"got 64 x 80 pixels"),
    ],
)
def test_what_is_no_image_is_refused(shapes: list[tuple[int, int, int]], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        DRAEM(shapes, 1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"width": 0}, "width: got 0, expected at least 1"),
        ({"segmentation_width": 0}, "segmentation_width: got 0"),
        ({"map_side": 0}, "map_side: got 0"),
        ({"rotated": 1.5}, r"rotated: got 1\.5, expected a probability from 0 to 1"),
        ({"rotated": float("nan")}, "rotated: got nan"),
        ({"sigma": -1.0}, r"sigma: got -1\.0, expected at least 0"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        detector(**options)
