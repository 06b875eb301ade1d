"""Reverse distillation: its score from its parts, its settings and what training does."""

import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

from planted import labelled
from unispect.detectors.base import Recipe
from unispect.detectors.revdist import RevDist
from unispect.errors import ConfigError
from unispect.fit import fit

SHAPES = [(6, 8, 8), (10, 4, 4), (5, 1, 1)]
SIDE = 24


def draw(images: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, *shape, generator=generator) for shape in SHAPES]


def detector(**options: object) -> RevDist:
    return RevDist(SHAPES, 2, **({"depths": (1, 1), "map_side": SIDE, "sigma": 0.0} | options)).eval()  # type: ignore[arg-type]


def naive(made: RevDist, features: list[Tensor]) -> Tensor:
    """Map of each level by a loop over images and places, (L, N, side, side)."""
    again = made.student(features[:2])[1]
    maps = []
    for encoder, decoder in zip(features[:2], again, strict=True):
        flat = torch.zeros(len(encoder), *encoder.shape[2:])
        for n in range(len(encoder)):
            for i in range(encoder.shape[2]):
                for j in range(encoder.shape[3]):
                    one, other = encoder[n, :, i, j], decoder[n, :, i, j]
                    flat[n, i, j] = 1 - (one @ other) / (one.norm() * other.norm())
        maps.append(F.interpolate(flat[:, None], (SIDE, SIDE), mode="bilinear", align_corners=True)[:, 0])
    return torch.stack(maps)


@pytest.mark.parametrize(("joined", "top"), [("sum", 0.0), ("mean", 0.01), ("mean", 0.1)])
def test_score_and_map_from_their_parts(joined: str, top: float) -> None:
    features, made = draw(3), detector(joined=joined, top=top)
    with torch.no_grad():
        levels = naive(made, features)
    expected = levels.sum(0) if joined == "sum" else levels.mean(0)
    scores = made(features)
    torch.testing.assert_close(scores.maps, expected, rtol=1e-4, atol=1e-5)
    places = expected.flatten(1).sort(descending=True).values
    count = {0.0: 1, 0.01: 5, 0.1: 57}[top]
    torch.testing.assert_close(scores.image, places[:, :count].mean(1), rtol=1e-4, atol=1e-5)


def test_the_map_is_blurred_as_scipy_does_it() -> None:
    features, sharp, soft = draw(2), detector(), detector(sigma=2.0)
    for row, expected in zip(soft(features).maps, sharp(features).maps, strict=True):
        torch.testing.assert_close(row, torch.from_numpy(gaussian_filter(expected.numpy(), 2.0)), rtol=1e-4, atol=1e-5)


def test_the_context_is_the_bottleneck_and_pooled_levels_have_no_say() -> None:
    features, made = draw(3), detector()
    scores = made(features)
    assert scores.context is not None
    assert scores.context.shape == (3, 20, 2, 2)
    torch.testing.assert_close(scores.context, made.student.bottleneck(features[:2]).detach())
    assert torch.equal(made([*features[:2], features[2] + 9]).image, scores.image)


def test_training_gives_normal_images_back_and_not_others() -> None:
    basis = torch.randn(3, 6, 8, 8, generator=torch.Generator().manual_seed(9))

    def images(count: int, seed: int) -> list[Tensor]:
        """Three products, and the coarse level a function of the fine one."""
        noise = 0.1 * draw(count, seed)[0]
        fine = basis[torch.arange(count) % 3] + noise
        return [fine, F.avg_pool2d(fine, 2)[:, [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]], torch.zeros(count, 5, 1, 1)]

    made = detector(top=0.0)
    train, held_out = labelled(images(24, 1), torch.zeros(24, dtype=torch.long).numpy()), images(6, 2)
    recipe = Recipe(steps=200, images=12, learning_rate=1e-2, rule="adamw", schedule="drop", checks=3)
    history = fit(made, train, labelled(held_out, torch.zeros(6, dtype=torch.long).numpy()), recipe, 0)
    assert history.held_out[0][0] > 1  # 1 for each of two levels at the start
    assert min(history.held_out[0]) < 0.6
    spoilt = [level.clone() for level in held_out]
    spoilt[0][:, :, 2:4, 2:4] *= -1
    assert (made(spoilt).image > made(held_out).image).all()


def test_the_loss_is_that_of_held_out_images_too() -> None:
    made, features, product = detector(), draw(3), torch.zeros(3, dtype=torch.long)
    with torch.no_grad():
        assert torch.equal(made.loss(features, product, 0.0)["total"], made.held_out_loss(features, product))


def test_the_start_is_the_seeds_and_leaves_other_draws_alone() -> None:
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    one, same, other = detector(seed=1), detector(seed=1), detector(seed=2)
    assert torch.equal(torch.randn(2), expected)
    weights = [made.student.decoder.stages[0][0].first[0].weight for made in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"activation": "tanh"}, "activation 'tanh': known: gelu, relu"),
        ({"joined": "max"}, "joined 'max': known: mean, sum"),
        ({"top": 1.5}, r"top: got 1\.5"),
        ({"map_side": 0}, "map_side: got 0"),
        ({"depths": (1,)}, r"depths=\[1\]"),
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        detector(**wrong)
