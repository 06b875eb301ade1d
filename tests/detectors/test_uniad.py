"""UniAD against numbers of its published code, naive loops and closed forms."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from planted import labelled
from unispect.detectors.base import Recipe
from unispect.detectors.methods import build
from unispect.detectors.uniad import UniAD
from unispect.errors import ConfigError
from unispect.fit import fit
from unispect.inspector import complete
from unispect.types import Features, Scores

# A small network with random weights, in double precision: features, weights, and what the published forward pass makes of
# them, as it was written down again from the authors' code outside of this project.
PUBLISHED = {
    name: torch.from_numpy(value)
    for name, value in np.load(Path(__file__).parents[1] / "fixtures" / "uniad_published.npz").items()
}
SHAPES = [(4, 12, 12), (3, 3, 3), (5, 1, 1)]
SMALL = {"grid": 6, "width": 8, "heads": 2, "hidden": 12, "layers": 2, "neighbourhood": 3, "image": 5, "map_side": 24}
EXACT = {"rtol": 0.0, "atol": 1e-12}
NONE = torch.zeros(0)
OURS = {
    "position.row": "row_embed.weight",
    "position.column": "col_embed.weight",
    "entry.": "input_proj.",
    "exit.": "output_proj.",
    ".query": ".learned_embed.weight",
    ".attention.0.": ".self_attn.",
    ".attention.1.": ".multihead_attn.",
    ".attention.": ".self_attn.",
    "attn.weight": "attn.in_proj_weight",
    "attn.bias": "attn.in_proj_bias",
    ".joined.": ".out_proj.",
    ".feedforward.0.": ".linear1.",
    ".feedforward.3.": ".linear2.",
    ".after.0.norm.": ".norm1.",
    ".after.1.norm.": ".norm2.",
    ".after.2.norm.": ".norm3.",
}


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def features(images: int, shapes: list[tuple[int, int, int]] = SHAPES) -> Features:
    return [3 + 2 * draw(images, *shape, seed=number) for number, shape in enumerate(shapes)]


def detector(shapes: list[tuple[int, int, int]] = SHAPES, **options: object) -> UniAD:
    return UniAD(shapes, 3, **(SMALL | options)).eval()  # type: ignore[arg-type]


def theirs(name: str) -> str:
    """The published name of one of our parameters."""
    for ours, other in OURS.items():
        name = name.replace(ours, other)
    return name


def published(**options: object) -> tuple[UniAD, Features]:
    """The network of the fixture and what it was given; the pooled level is ours."""
    made = detector(**options)
    state = {name: PUBLISHED[f"weights.{theirs(name)}"] for name in made.transformer.state_dict()}
    assert len(state) == sum(name.startswith("weights.") for name in PUBLISHED)
    made.transformer.load_state_dict(state)
    return made, [PUBLISHED["features.0"], PUBLISHED["features.1"], draw(3, 5, 1, 1)]


# The network


def test_scores_are_the_published_ones() -> None:
    made, given = published()
    tokens = made.tokens(given)
    memory = made.transformer.memory(tokens)
    torch.testing.assert_close(tokens.mT.unflatten(2, (6, 6)), PUBLISHED["align"], **EXACT)
    torch.testing.assert_close(memory, PUBLISHED["memory"].transpose(0, 1), **EXACT)
    torch.testing.assert_close(made.transformer.rebuilt(memory).mT.unflatten(2, (6, 6)), PUBLISHED["rec"], **EXACT)
    found = made(given)
    torch.testing.assert_close(found.maps, PUBLISHED["pred"][:, 0], **EXACT)
    torch.testing.assert_close(found.image, PUBLISHED["score"], **EXACT)
    assert found.products is None


def test_the_loss_is_the_published_one() -> None:
    made, given = published()
    torch.testing.assert_close(made.loss(given, NONE, 0.0)["total"], PUBLISHED["loss"], **EXACT)
    torch.testing.assert_close(made.held_out_loss(given, NONE), PUBLISHED["loss"], **EXACT)


def test_published_sizes() -> None:
    """Four levels of EfficientNet-B4 at 224 px: 272 channels, 7.7 million numbers to learn."""
    levels = [(24, 112, 112), (32, 56, 56), (56, 28, 28), (160, 14, 14)]
    with torch.device("meta"):
        made = UniAD(levels, 15)
        tokens = made.tokens([torch.empty(2, *shape) for shape in levels])
    assert tokens.shape == (2, 196, 272)
    assert sum(value.numel() for value in made.parameters()) == 7_717_392


def test_the_context_is_the_output_of_the_encoder_on_its_grid() -> None:
    made, given = published()
    context = made(given).context
    assert context is not None
    assert context.shape == (3, 8, 6, 6)
    for place in range(36):
        torch.testing.assert_close(context[:, :, place // 6, place % 6], PUBLISHED["memory"][place], **EXACT)


def test_corners_of_every_level_are_corners_of_the_grid() -> None:
    given = features(2)
    tokens = detector().tokens(given).unflatten(1, (6, 6))
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        corner = torch.cat([level[:, :, row, column] for level in given[:2]], 1)
        torch.testing.assert_close(tokens[:, row, column], corner, **EXACT)


def test_pooled_levels_have_no_say() -> None:
    made, given = detector(), features(2)
    before = made(given)
    after = made([*given[:2], given[2] + 100])
    assert torch.equal(before.maps, after.maps)
    assert torch.equal(before.image, after.image)


def test_every_parameter_is_learnt_and_once() -> None:
    made = detector()
    (group,) = made.groups(0)
    assert group.decayed
    assert [id(value) for value in group.parameters] == [id(value) for value in made.parameters()]
    made.train().loss(features(2), NONE, 0.0)["total"].backward()
    assert all(value.grad is not None and torch.isfinite(value.grad).all() for value in made.parameters())


# Scores


def stretched(grid: Tensor, side: int, aligned: bool) -> Tensor:
    """Bilinear, place by place, (h, h) -> (side, side)."""
    size = len(grid)
    found = torch.zeros(side, side)
    for row in range(side):
        for column in range(side):
            y, x = (n * (size - 1) / (side - 1) if aligned else max((n + 0.5) * size / side - 0.5, 0) for n in (row, column))
            top, left = min(int(y), size - 2), min(int(x), size - 2)
            down, right = min(y - top, 1.0), min(x - left, 1.0)
            upper = (1 - right) * grid[top, left] + right * grid[top, left + 1]
            lower = (1 - right) * grid[top + 1, left] + right * grid[top + 1, left + 1]
            found[row, column] = (1 - down) * upper + down * lower
    return found


@pytest.mark.parametrize("kind", ["root", "mean"])
def test_a_map_is_the_error_of_each_place(kind: str) -> None:
    made, given = published(map=kind)
    difference = PUBLISHED["rec"] - PUBLISHED["align"]
    found = made(given).maps
    for image in range(3):
        errors = torch.zeros(6, 6)
        for row in range(6):
            for column in range(6):
                squares = [float(value) ** 2 for value in difference[image, :, row, column]]
                errors[row, column] = math.sqrt(sum(squares)) if kind == "root" else sum(squares) / 7
        torch.testing.assert_close(found[image], stretched(errors, 24, aligned=kind == "root"), **EXACT)


@pytest.mark.parametrize("side", [1, 5, 24])
def test_the_image_score_is_the_highest_average_of_a_square(side: int) -> None:
    found = detector(image=side)(features(2))
    for image, plane in zip(found.image, found.maps, strict=True):
        places = range(24 - side + 1)
        averages = [plane[row : row + side, column : column + side].mean() for row in places for column in places]
        torch.testing.assert_close(image, torch.stack(averages).max(), **EXACT)


def test_a_blur_is_of_the_map_that_the_image_score_is_of() -> None:
    plain, soft = detector()(features(2)), detector(sigma=2.0)(features(2))
    assert soft.maps.std() < plain.maps.std()
    torch.testing.assert_close(soft.image, nn.functional.avg_pool2d(soft.maps, 5, 1).amax((1, 2)), **EXACT)


# Noise


def jitter(made: UniAD, tokens: Tensor) -> Tensor:
    return made._jittered(tokens) - tokens


def test_noise_is_as_large_as_published() -> None:
    """|noise| / |f| has mean square (20 / C)^2 C; each channel of a token has as much as any other."""
    made, tokens = detector(jitter=20.0).train(), 5 + draw(64, 49, 272)
    torch.manual_seed(0)
    relative = jitter(made, tokens).norm(dim=2) / tokens.norm(dim=2)
    assert relative.square().mean().sqrt().item() == pytest.approx(20 / math.sqrt(272), rel=0.01)
    drawn = jitter(made, tokens) / (20 * tokens.norm(dim=2, keepdim=True) / 272)
    assert drawn.mean().item() == pytest.approx(0, abs=0.01)
    torch.testing.assert_close(drawn.std((0, 1)), torch.ones(272), rtol=0, atol=0.06)


def test_there_is_noise_in_training_only() -> None:
    made, given = detector(dropout=0.0), features(2)
    tokens = made.tokens(given)
    assert torch.equal(made._jittered(tokens), tokens)
    assert torch.equal(made.loss(given, NONE, 0.0)["total"], made.held_out_loss(given, NONE))
    criterion, scores = made.held_out_loss(given, NONE), made(given)
    made.train()
    assert not torch.equal(made._jittered(tokens), tokens)
    assert not torch.equal(made.loss(given, NONE, 0.0)["total"], criterion)
    assert torch.equal(made.held_out_loss(given, NONE), criterion)
    assert torch.equal(made(given).maps, scores.maps)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_the_share_of_steps_with_noise(share: float, expected: float) -> None:
    made, tokens = detector(jitter_probability=share).train(), draw(2, 36, 7)
    torch.manual_seed(0)
    seen = [float(bool(jitter(made, tokens).any())) for _ in range(200)]
    assert sum(seen) / 200 == pytest.approx(expected, abs=0.1 * (0 < share < 1))


def test_scoring_draws_nothing() -> None:
    made, given = detector(), features(2)
    state = torch.get_rng_state()
    made(given)
    made.held_out_loss(given, NONE)
    assert torch.equal(torch.get_rng_state(), state)


# Learning


def test_the_seed_decides_where_it_begins_and_nothing_else() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, same, other = (detector(seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert not any(
        torch.equal(one[f"levels.0.{name}"], other[f"levels.0.{name}"]) for name in ("entry.weight", "position.row")
    )
    queries = [value for name, value in one.items() if name.endswith("query")]
    assert len(queries) == 2
    assert not torch.equal(*queries)


def test_training_rebuilds_images_that_it_has_not_seen() -> None:
    """Images that differ by a few numbers, so most of each place follows from the others."""
    basis = draw(3, 4 * 144 + 27, seed=5)
    torch.set_default_dtype(torch.float32)
    flat = (draw(120, 3, seed=6).double() @ basis).float()
    levels = [flat[:, :576].reshape(-1, 4, 12, 12), flat[:, 576:].reshape(-1, 3, 3, 3)]
    variance = float(flat.var())
    made = detector(SHAPES[:2], width=32, hidden=64, jitter=1.0, dropout=0.0)
    train, held_out = ([level[part] for level in levels] for part in (slice(0, 96), slice(96, None)))
    recipe = Recipe(steps=150, images=24, rule="adamw", learning_rate=3e-3, clip=0.1, schedule="drop", checks=3)
    history = fit(made, labelled(train, np.zeros(96, np.int64)), labelled(held_out, np.zeros(24, np.int64)), recipe, seed=0)
    first, last = history.held_out[0][0], history.held_out[0][-1]
    assert history.kept == [recipe.steps]
    assert first > 0.8 * variance
    assert last < 0.35 * variance


def test_the_number_of_products_changes_nothing() -> None:
    one, many = (UniAD(SHAPES, products, **SMALL).state_dict() for products in (1, 40))  # type: ignore[arg-type]
    assert all(torch.equal(value, many[name]) for name, value in one.items())


def test_settings_of_its_own_for_other_sections() -> None:
    table = complete({"method": "uniad"})
    assert (table["features"]["layers"], table["features"]["pooled"]) == (["blocks.1", "blocks.2", "blocks.4"], [])
    training = {name: table["training"][name] for name in ("rule", "schedule", "clip", "drop", "drops")}
    assert training == {"rule": "adamw", "schedule": "drop", "clip": 0.1, "drop": 0.1, "drops": [0.8]}
    scores: Scores = build(complete({"method": "uniad", "uniad": SMALL}), SHAPES, 3).eval()(features(2))
    assert scores.maps.shape == (2, 24, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads: got 3, expected a divisor of width=8"),
        ({"heads": 0}, "heads: got 0, expected at least 1"),
        ({"width": 9, "heads": 3}, "position channels: got 9, expected an even number"),
        ({"layers": 0}, "layers: got 0, expected at least 1"),
        ({"grid": 0}, "grid: got 0, expected at least 1"),
        ({"neighbourhood": 4}, "neighbourhood: got 4, expected 0 or an odd number below 6, the side of the grid"),
        ({"neighbourhood": 7}, "neighbourhood: got 7, expected 0 or an odd number below 6"),
        ({"dropout": 1.0}, "dropout: got 1, expected a share from 0 to below 1"),
        ({"jitter": -1.0}, "jitter: got -1, expected a number above 0, or 0 for none"),
        ({"jitter_probability": 1.5}, "jitter_probability: got 1.5, expected a number from 0 to 1"),
        ({"image": 25}, "image: got 25, expected at most map_side=24"),
        ({"map": "roots"}, "map.*'root'"),
        ({"shapes": [(5, 1, 1)]}, r"shapes=\[\(5, 1, 1\)\]: UniAD needs a level with several places, .* features.layers"),
    ],
)
def test_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        detector(**options)  # type: ignore[arg-type]
