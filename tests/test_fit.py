"""The loop: its schedule, what it keeps, and that a run which was stopped ends like one which was not."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from planted import labelled
from unispect.detectors.base import Recipe
from unispect.detectors.hgad import HGAD
from unispect.errors import ConfigError, StoreError, UnispectError
from unispect.fit import History, Labelled, Sampler, fit, learning_rate, quotas

SHAPES = [(8, 4, 4), (6, 2, 2), (5, 1, 1)]
RECIPE = Recipe(steps=9, images=8, places=1, checks=3, patience=9, learning_rate=1e-3)
PUBLISHED = Recipe(learning_rate=2e-4)


def planted(images: int, seed: int) -> Labelled:
    """Three products."""
    generator = torch.Generator().manual_seed(seed)
    product = torch.arange(images) % 3
    levels = [2 * product[:, None, None, None] + torch.randn(images, *shape, generator=generator) for shape in SHAPES]
    return labelled(levels, product.numpy())


TRAIN, HELD_OUT = planted(30, 1), planted(12, 2)


def build(start: str = "gaussian") -> HGAD:
    covariance = "place" if start == "gaussian" else "identity"
    return HGAD(SHAPES, 3, blocks=2, position=4, centres=3, start=start, covariance=covariance, map_side=8)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def held_out_losses(detector: HGAD) -> list[float]:
    """By hand: mean over all held-out vectors of a level."""
    losses = []
    for number, level in enumerate(HELD_OUT.features.levels):  # type: ignore[attr-defined]
        part = detector.level(number)
        vectors = part.arranged(level)
        with torch.no_grad():
            z, logdet = part.latent(vectors, part.everywhere(len(vectors)))
            inside = part.mixture.own(z, torch.from_numpy(HELD_OUT.product)) + logdet
        losses.append(float((-inside / level.shape[1] + math.log(2 * math.pi) / 2).mean()))
    return losses


# Schedule


@pytest.mark.parametrize(
    ("progress", "rate"),
    [
        (0.0, 2e-5),
        (1 / 25, (2e-5 + 1.9686e-4) / 2),
        (1.99999 / 25, 1.9686e-4),
        (2 / 25, 1.9686e-4),
        (12 / 25, 1.06e-4),
        (24 / 25, 0.0099e-4),
    ],
)
def test_learning_rates_of_the_published_schedule(progress: float, rate: float) -> None:
    assert learning_rate(progress, PUBLISHED) == pytest.approx(rate, rel=4e-3)


def test_stairs_are_those_of_the_formula() -> None:
    for step in range(1000):
        stair, floor = step * 25 // 1000, 2e-7
        expected = floor + (2e-4 - floor) * (1 + math.cos(math.pi * stair / 25)) / 2
        if stair >= 2:
            assert learning_rate(step / 1000, PUBLISHED) == pytest.approx(expected, rel=1e-12)
    assert 1.99e-4 < 2e-7 + (2e-4 - 2e-7) * (1 + math.cos(math.pi / 25)) / 2 < 2e-4  # the table's second stair


def test_warm_up_is_a_straight_line() -> None:
    rates = np.array([learning_rate(step / 1000, PUBLISHED) for step in range(81)])
    assert np.allclose(np.diff(rates), (rates[80] - 2e-5) / 80, rtol=1e-9, atol=0)


def test_drops_of_a_constant_rate() -> None:
    recipe = Recipe(learning_rate=1e-4, schedule="drop", drops=(0.8, 0.9), drop=0.2)
    rates = [learning_rate(progress, recipe) for progress in (0.0, 0.4, 0.79, 0.8, 0.89, 0.9, 0.99)]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-4, 2e-5, 2e-5, 4e-6, 4e-6])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rule": "adamx"}, r"rule.*'adamx'.*adam, adamw"),
        ({"schedule": "step"}, r"schedule.*'step'.*cosine, drop"),
        ({"drops": (0.8, 1.0)}, r"drops=\[0\.8, 1\.0\]"),
        ({"drop": 0.0}, r"drop=0\.0: expected .* above 0"),
        ({"clip": -1.0}, r"clip: got -1\.0"),
        ({"epsilon": 0.0}, r"epsilon: got 0\.0"),
    ],
)
def test_a_recipe_says_what_is_wrong_with_it(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Recipe(**wrong)


# What a step sees


def test_every_image_once_a_pass_and_one_place_of_every_cell() -> None:
    sampler = Sampler(TRAIN, build(), replace(RECIPE, images=10), seed=3)
    for turn in range(2):
        seen = []
        for step in range(3 * turn, 3 * turn + 3):
            vectors, places, product = sampler.draw(step, 0)
            assert vectors.shape == (10, 4, 1, 8)
            for image in places[..., 0].tolist():
                assert all(place in cell for place, cell in zip(image, build().grid(0).tolist(), strict=True))
            seen += [(int(y), *vector) for y, vector in zip(product, vectors[:, 0, 0].tolist(), strict=True)]
        assert len(set(seen)) == 30


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    draw = Sampler(TRAIN, build(), RECIPE, seed=3).draw
    draw(0, 0)
    again = Sampler(TRAIN, build(), RECIPE, seed=3).draw
    assert all(torch.equal(one, other) for one, other in zip(draw(5, 0), again(5, 0), strict=True))
    other = Sampler(TRAIN, build(), RECIPE, seed=4).draw
    assert not torch.equal(draw(5, 0)[0], other(5, 0)[0])


def test_drawn_vectors_are_those_at_the_places() -> None:
    sampler = Sampler(TRAIN, build(), replace(RECIPE, places=2, images=30), seed=0)
    vectors, places, product = sampler.draw(0, 0)
    order = np.random.default_rng((0, 0)).permutation(30)
    assert torch.equal(product, torch.from_numpy(TRAIN.product[order]))
    level = TRAIN.features.levels[0][torch.from_numpy(order)].flatten(2).mT  # type: ignore[attr-defined]
    assert torch.equal(vectors, level[torch.arange(30)[:, None, None], places])
    assert all(len(set(row)) == 2 for row in places.flatten(0, 1).tolist())
    assert not torch.equal(places[0], places[1])


def test_parts_of_a_step_hold_each_vector_once_and_drop_what_is_left_over() -> None:
    sampler = Sampler(TRAIN, build(), replace(RECIPE, places=0, images=10, vectors=48), seed=0)
    found, places, product = sampler.draw(1, 0)
    whole = {
        (*vector, place, int(product[image]))
        for image in range(10)
        for vector, place in zip(found[image].flatten(0, 1).tolist(), places[image].flatten().tolist(), strict=True)
    }
    parts = list(sampler.parts(1, 0))
    assert [len(part) for part, _, _ in parts] == [48] * 3  # of 160
    seen = {
        (*vector, place, y)
        for part, where, owner in parts
        for vector, place, y in zip(part[:, 0, 0].tolist(), where[:, 0, 0].tolist(), owner.tolist(), strict=True)
    }
    assert len(seen) == 144
    assert seen < whole


@pytest.mark.parametrize(("balance", "shares"), [(0.0, [20, 8, 2]), (1.0, [10, 10, 10]), (0.5, [15, 10, 5])])
def test_balance_evens_out_the_products(balance: float, shares: list[int]) -> None:
    product = np.repeat([0, 1, 2], [20, 8, 2])
    data = Labelled(TRAIN.features, product)
    sampler = Sampler(data, build(), replace(RECIPE, images=10, balance=balance), seed=0)
    for turn in range(2):
        drawn = torch.cat([sampler.draw(3 * turn + part, 0)[2] for part in range(3)])
        assert drawn.bincount().tolist() == shares
    order = np.concatenate([sampler.images(3 + part) for part in range(3)])
    for y in range(3):  # no image twice before every other of its product came
        times = np.bincount(order, minlength=30)[product == y]
        assert times.max() - times.min() <= 1


def test_shares_are_whole_and_sum_to_the_total() -> None:
    assert quotas(np.array([1.0, 1.0, 1.0]), 10) == [4, 3, 3]
    assert quotas(np.array([5.0, 0.1]), 7) == [7, 0]


def test_fewer_vectors_than_a_part_make_one_step() -> None:
    sampler = Sampler(TRAIN, build(), replace(RECIPE, places=0, images=10, vectors=500), seed=0)
    assert [len(part) for part, _, _ in sampler.parts(0, 0)] == [160]


# What is kept


@pytest.mark.parametrize("rate", [1e-3, 0.5])
@pytest.mark.parametrize("start", ["gaussian", "published"])
def test_never_worse_than_before_the_first_step(start: str, rate: float) -> None:
    detector = build(start)
    detector.prepare(TRAIN.batches())
    before = held_out_losses(detector)
    detector = build(start)
    history = fit(detector, TRAIN, HELD_OUT, replace(RECIPE, learning_rate=rate), seed=0)
    after = held_out_losses(detector)
    for number in range(3):
        assert after[number] <= before[number] + 1e-6
        assert history.held_out[number][0] == pytest.approx(before[number], abs=1e-5)
        assert after[number] == pytest.approx(min(history.held_out[number]), abs=1e-5)
        assert history.kept[number] == history.steps[int(np.argmin(history.held_out[number]))]


def test_the_start_is_kept_where_steps_only_harm() -> None:
    prepared, detector = build(), build()
    prepared.prepare(TRAIN.batches())
    history = fit(detector, TRAIN, HELD_OUT, replace(RECIPE, learning_rate=30.0), seed=0)
    assert history.kept == [0, 0, 0]
    assert equal(detector.levels[0].flow.state_dict(), prepared.levels[0].flow.state_dict())


def test_training_helps_where_there_is_something_to_learn() -> None:
    history = fit(build("published"), TRAIN, HELD_OUT, replace(RECIPE, steps=40, learning_rate=1e-2), seed=0)
    assert all(min(losses) < losses[0] - 0.05 for losses in history.held_out)


def test_stops_after_checks_without_a_gain() -> None:
    seen: list[int] = []
    recipe = replace(RECIPE, steps=90, checks=30, patience=2, learning_rate=30.0)
    history = fit(build(), TRAIN, HELD_OUT, recipe, 0, progress=lambda step, total, losses: seen.append(step))
    assert history.stopped == [True, True, True]
    assert seen == list(range(1, 7))
    assert history.steps == [0, 3, 6]


def test_without_checks_the_last_state_is_kept() -> None:
    detector = build()
    history = fit(detector, TRAIN, HELD_OUT, replace(RECIPE, checks=0, learning_rate=0.3), seed=0)
    assert history.held_out == [[], [], []]
    fresh = build()
    fresh.prepare(TRAIN.batches())
    assert not torch.equal(detector.level(0).mixture.mu, fresh.level(0).mixture.mu)


def test_what_a_detector_draws_depends_on_seed_and_step_alone() -> None:
    states = []
    for noise in (0.0, 0.5, 0.5):
        detector = HGAD(SHAPES, 3, blocks=2, position=4, centres=3, noise=noise, dropout=noise, map_side=8)
        torch.manual_seed(len(states))
        before = torch.random.get_rng_state()
        fit(detector, TRAIN, HELD_OUT, replace(RECIPE, checks=0), seed=0)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert not detector.training
        states.append(detector.state_dict())
    names = [name for name in states[0] if "hidden.weight" in name]
    assert all(torch.equal(states[1][name], states[2][name]) for name in names)
    assert not any(torch.equal(states[0][name], states[1][name]) for name in names)


def test_progress_is_told_after_every_step() -> None:
    seen: list[tuple[int, int, dict[str, float]]] = []
    fit(build(), TRAIN, HELD_OUT, RECIPE, 0, progress=lambda *said: seen.append(said))
    assert [step for step, _, _ in seen] == list(range(1, 10))
    assert all(total == 9 and math.isfinite(losses["total"]) and "held_out" in losses for _, total, losses in seen)


def test_a_shared_optimizer_keeps_levels_moving() -> None:
    ends = {}
    for optimizer in ("per_level", "shared"):
        detector = build()
        fit(detector, TRAIN, HELD_OUT, replace(RECIPE, checks=0, optimizer=optimizer), seed=0)
        start = build()
        start.prepare(TRAIN.batches())
        ends[optimizer] = float((detector.level(0).mixture.mu - start.level(0).mixture.mu).detach().norm())
    assert ends["shared"] > 1.3 * ends["per_level"] > 0


# Stopping and going on


class InterruptionError(Exception):
    """Stands for Ctrl-C, a kill or a power cut."""


def stop_at(last: int) -> Callable[[int, int, dict[str, float]], None]:
    def progress(step: int, total: int, losses: dict[str, float]) -> None:
        if step == last:
            raise InterruptionError

    return progress


def run(checkpoint: Path | None, recipe: Recipe, *stops: int) -> tuple[dict[str, Tensor], History]:
    """One run, stopped at steps and begun again with a fresh detector each time."""
    for step in stops:
        with pytest.raises(InterruptionError):
            fit(build(), TRAIN, HELD_OUT, recipe, 0, checkpoint, "toy", stop_at(step))
    detector = build()
    history = fit(detector, TRAIN, HELD_OUT, recipe, 0, checkpoint, "toy")
    return detector.state_dict(), history


@cache
def undisturbed(optimizer: str = "per_level") -> tuple[dict[str, Tensor], History]:
    return run(None, replace(RECIPE, optimizer=optimizer))


@pytest.mark.parametrize(
    ("optimizer", "stops"),
    [
        ("per_level", (1,)),
        ("per_level", (5,)),
        ("per_level", (9,)),
        ("per_level", (2, 4, 7)),
        ("shared", (3,)),
        ("shared", (8,)),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, optimizer: str, stops: tuple[int, ...]) -> None:
    recipe = replace(RECIPE, optimizer=optimizer)
    expected, history = undisturbed(optimizer)
    state, resumed = run(tmp_path / "run.safetensors", recipe, *stops)
    assert equal(state, expected)
    assert resumed == history


def test_resuming_keeps_a_best_state_from_before_and_a_level_that_stopped(tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=12, checks=6, patience=2, learning_rate=0.2)
    expected, history = run(None, recipe)
    state, resumed = run(tmp_path / "run.safetensors", recipe, 3)
    assert equal(state, expected)
    assert resumed == history


def test_a_finished_run_begun_again_is_the_same_and_a_checkpoint_changes_nothing(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.safetensors"
    for _ in range(2):
        assert equal(run(checkpoint, RECIPE)[0], undisturbed()[0])


def test_going_on_does_not_begin_anew(tmp_path: Path) -> None:
    checkpoint, seen = tmp_path / "run.safetensors", []
    with pytest.raises(InterruptionError):
        fit(build(), TRAIN, HELD_OUT, RECIPE, 0, checkpoint, "toy", stop_at(7))
    fit(build(), TRAIN, HELD_OUT, RECIPE, 0, checkpoint, "toy", lambda step, total, losses: seen.append(step))
    assert seen == [7, 8, 9]


def test_a_checkpoint_of_another_run_is_an_error(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.safetensors"
    fit(build(), TRAIN, HELD_OUT, replace(RECIPE, steps=1), 0, checkpoint, "one")
    with pytest.raises(UnispectError, match=r"run\.safetensors belongs to a run with other settings or data"):
        fit(build(), TRAIN, HELD_OUT, replace(RECIPE, steps=1), 0, checkpoint, "two")


def test_a_damaged_checkpoint_is_an_error(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.safetensors"
    checkpoint.write_bytes(b"nonsense")
    with pytest.raises(StoreError, match="is damaged"):
        fit(build(), TRAIN, HELD_OUT, RECIPE, 0, checkpoint, "toy")


# Recipes


def test_numbers_of_steps() -> None:
    assert Recipe(steps=7).total(1000) == 7
    assert Recipe(steps=0, passes=200, images=8).total(3629) == 200 * 453
    assert Recipe(steps=0, passes=0.5, images=8).total(4) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "expected exactly one of the two above 0"),
        ({"passes": 3.0}, "expected exactly one of the two above 0"),
        ({"optimizer": "both"}, "got 'both', expected 'per_level' or 'shared'"),
        ({"stairs": 2}, "stairs: got 2, expected at least 3"),
        ({"images": 0}, "images: got 0, expected at least 1"),
    ],
)
def test_impossible_recipes(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**settings)  # type: ignore[arg-type]
