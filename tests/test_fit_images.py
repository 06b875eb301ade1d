"""The loop on detectors of whole images: what a step is given, the optimizer's options, stopping and going on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planted import labelled
from unispect.detectors.base import Group, ImageDetector, Pass, Recipe
from unispect.errors import ConfigError
from unispect.fit import ImageSampler, fit
from unispect.types import Features, Scores

RECIPE = Recipe(steps=8, images=4, checks=2, learning_rate=1e-2, schedule="drop", drops=())
IMAGES = torch.randn(12, 3, 2, 2, generator=torch.Generator().manual_seed(0))
TRAIN = labelled([IMAGES, IMAGES[:, :, :1, :1] + 1], torch.arange(12).numpy())
HELD_OUT = labelled([IMAGES[:5] + 1, IMAGES[:5, :, :1, :1]], torch.zeros(5, dtype=torch.long).numpy())


class Toy(ImageDetector):
    """Two weights that are drawn to the mean of the features; "slow" learns at a tenth, "frozen" not at all."""

    def __init__(self, weights: float = 1.0, noise: float = 0.0) -> None:
        super().__init__()
        self.noise, self.seen = noise, list[tuple[list[tuple[int, ...]], list[int]]]()
        self.levels = nn.ModuleList([nn.ParameterDict({name: torch.tensor(weights) for name in ("fast", "slow", "frozen")})])

    def prepare(self, train: Pass) -> None:
        """Nothing."""

    def groups(self, level: int) -> list[Group]:
        part = self.levels[level]
        return [Group([part["fast"]]), Group([part["slow"]], decayed=False, pace=0.1)]

    def loss(self, features: Features, product: Tensor, progress: float) -> dict[str, Tensor]:
        self.seen.append(([tuple(level.shape) for level in features], product.tolist()))
        part, goal = self.levels[0], torch.cat([level.flatten() for level in features]).mean()
        drawn = self.noise * torch.randn(())
        return {"total": (part["fast"] - goal + drawn) ** 2 + (part["slow"] - goal) ** 2 + 0 * part["frozen"]}

    def held_out_loss(self, features: Features, product: Tensor) -> Tensor:
        return self.levels[0]["fast"].square() + torch.randn(())

    def finish(self, train: Pass, held_out: Pass) -> None:
        """Nothing."""

    def forward(self, features: Features) -> Scores:
        maps = features[0].mean(1)
        return Scores(maps.flatten(1).amax(1), maps)


def trained(toy: Toy, recipe: Recipe, **more: Any) -> dict[str, float]:
    fit(toy, TRAIN, HELD_OUT, recipe, 0, **more)
    return {name: value.item() for name, value in toy.levels[0].items()}


def test_a_step_is_given_whole_images_of_all_levels() -> None:
    toy = Toy()
    trained(toy, RECIPE)
    assert {str(shapes) for shapes, _ in toy.seen} == {"[(4, 3, 2, 2), (4, 3, 1, 1)]"}
    for turn in range(2):  # the product of an image is its number
        order = [image for _, images in toy.seen[3 * turn : 3 * turn + 3] for image in images]
        assert sorted(order) == list(range(12))
    levels, product = ImageSampler(TRAIN, RECIPE, 0).draw(4)
    assert torch.equal(levels[0], IMAGES[product])
    assert torch.equal(levels[1], IMAGES[product][:, :, :1, :1] + 1)


def test_groups_have_a_pace_and_decay_of_their_own() -> None:
    recipe = replace(RECIPE, steps=1, images=12, checks=0)
    plain, decayed = trained(Toy(), recipe), trained(Toy(), replace(recipe, rule="adamw", decay=0.5))
    assert plain["fast"] == pytest.approx(1 - 1e-2, abs=1e-6)  # Adam's first step is the rate
    assert plain["slow"] == pytest.approx(1 - 1e-3, abs=1e-6)
    assert plain["frozen"] == 1
    assert decayed["fast"] == pytest.approx((1 - 1e-2 * 0.5) - 1e-2, abs=1e-6)  # decoupled: beside the step, not in it
    assert decayed["slow"] == plain["slow"]


@pytest.mark.parametrize("recipe", [replace(RECIPE, clip=1e-3), replace(RECIPE, rule="adamw", amsgrad=True, decay=0.1)])
def test_options_of_the_optimizer_are_those_of_torch(recipe: Recipe) -> None:
    recipe = replace(recipe, checks=0, epsilon=1e-2, beta1=0.5, beta2=0.9)
    toy, other = Toy(), Toy()
    part = other.levels[0]
    kind = torch.optim.AdamW if recipe.rule == "adamw" else torch.optim.Adam
    own = [{"params": [part["fast"]]}, {"params": [part["slow"]], "lr": 1e-3, "weight_decay": 0.0}]
    optimizer = kind(own, lr=1e-2, betas=(0.5, 0.9), eps=1e-2, weight_decay=recipe.decay, amsgrad=recipe.amsgrad)
    for step in range(recipe.steps):
        optimizer.zero_grad()
        other.loss(*ImageSampler(TRAIN, recipe, 0).draw(step), 0.0)["total"].backward()
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_([part["fast"], part["slow"]], recipe.clip)
        optimizer.step()
    assert trained(toy, recipe) == pytest.approx({name: value.item() for name, value in part.items()}, abs=1e-7)


def test_what_the_criterion_draws_is_the_same_at_every_check() -> None:
    toy = Toy()
    history = fit(toy, TRAIN, HELD_OUT, replace(RECIPE, learning_rate=1e-9, checks=4, patience=9), seed=0)
    assert len(history.held_out[0]) == 5
    assert max(history.held_out[0]) - min(history.held_out[0]) < 1e-5


class InterruptionError(Exception):
    """Stands for a kill."""


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    def stop(step: int, total: int, losses: dict[str, float]) -> None:
        if step == 5:
            raise InterruptionError

    recipe = replace(RECIPE, amsgrad=True, rule="adamw")
    more = {"checkpoint": tmp_path / "run.safetensors", "identity": "toy"}
    with pytest.raises(InterruptionError):
        trained(Toy(noise=0.5), recipe, progress=stop, **more)
    assert trained(Toy(noise=0.5), recipe, **more) == trained(Toy(noise=0.5), recipe)


@pytest.mark.parametrize("wrong", [{"places": 8}, {"vectors": 64}])
def test_vectors_cannot_be_drawn_from_whole_images(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="Toy learns from whole images"):
        trained(Toy(), replace(RECIPE, **wrong))
