"""What makes training fast changes nothing: the naive loop and ours, compiled and eager, bf16 and f32. Nothing is timed."""

import copy
import importlib.util
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from planted import labelled
from unispect.data.factory import write_products
from unispect.detectors.base import Recipe
from unispect.detectors.hgad import HGAD
from unispect.features.pyramid import PyramidExtractor
from unispect.fit import Labelled, Sampler, fit, set_precision

SHAPES = [(9, 4, 4), (6, 2, 2)]
PRODUCTS = 3
TINY: dict[str, Any] = {"blocks": 2, "position": 4, "centres": 3, "map_side": 8}
RECIPE = Recipe(steps=3, images=4, places=0, checks=0, learning_rate=1e-2, optimizer="shared")


def loaded() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "training.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_training", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


speed = loaded()


def published(dtype: torch.dtype = torch.float64) -> HGAD:
    """The published setting in small, with inside centres near enough to learn."""
    detector: HGAD = speed.Learning(SHAPES, PRODUCTS, **speed.PUBLISHED | TINY | {"delta_scale": 0.3})
    with torch.no_grad():  # nothing stays at a value where mistakes cancel
        for level in range(len(SHAPES)):
            part = detector.level(level)
            for parameter in (part.mixture.psi, part.mixture.psi_intra, *(block.offset for block in part.flow.blocks)):
                parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).reshape(parameter.shape))  # type: ignore
            for block in part.flow.blocks:
                block.scale.mul_(torch.linspace(0.9, 1.1, block.scale.numel()))  # type: ignore
    return detector.to(dtype)


def data(dtype: torch.dtype = torch.float64, images: int = 10) -> Labelled:
    """Three products."""
    generator = torch.Generator().manual_seed(5)
    product = torch.arange(images) % PRODUCTS
    drawn = [torch.randn(images, *shape, generator=generator) for shape in SHAPES]
    return labelled([(product[:, None, None, None] + level).to(dtype) for level in drawn], product.numpy())


def farthest(one: HGAD, other: HGAD) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel())


# The naive loop and ours.


def test_every_form_gives_our_losses() -> None:
    train = data()
    assert speed.same_losses(published(), train.features, train.product) < 1e-13


def test_the_check_of_the_losses_sees_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    right = speed.naive_losses
    monkeypatch.setattr(speed, "naive_losses", lambda *given: (*right(*given)[:2], -right(*given)[2], *right(*given)[3:]))
    train = data()
    assert speed.same_losses(published(), train.features, train.product) > 1e-3


def test_the_naive_loop_makes_our_weights() -> None:
    train = data()
    assert speed.same_weights(published(), train.features, train.product, RECIPE) < 1e-11


def test_one_adam_a_level_makes_our_weights_in_the_fast_form_too() -> None:
    train, recipe = data(), replace(RECIPE, optimizer="per_level", steps=5)
    ours, theirs = published(), published()
    fit(ours, train, train, recipe, seed=0)
    stepper, form = speed.Stepper(theirs, recipe), list(speed.ladder().values())[-1]
    for step, images in enumerate(speed.orders(recipe.steps, len(train.features), recipe.images, 0)):
        levels = speed.read(train.features, images)
        stepper.step(levels, torch.from_numpy(train.product[images]), step / recipe.steps, form)
    assert farthest(ours, theirs) < 1e-11
    shared = published()
    fit(shared, train, train, replace(recipe, optimizer="shared"), seed=0)
    assert farthest(ours, shared) > 1e-3


def test_the_ladder_climbs_one_change_at_a_time() -> None:
    forms = [tuple(speed.asdict(form).values()) for form in speed.ladder().values()]
    assert [sum(form) for form in forms] == list(range(len(speed.CHANGES) + 1))
    assert all(set(np.flatnonzero(one)) < set(np.flatnonzero(other)) for one, other in pairwise(forms))


@pytest.mark.parametrize("steps", [1, 7])
def test_images_come_as_our_sampler_draws_them(steps: int) -> None:
    train = data()
    sampler = Sampler(train, published(), RECIPE, seed=3)
    for step, images in enumerate(speed.orders(steps, 10, RECIPE.images, 3)):
        found, _, product = sampler.draw(step, 0)
        assert torch.equal(found[:, 0], speed.read(train.features, images)[0])
        assert product.tolist() == train.product[images].tolist()


def test_the_whole_network_gives_the_features_of_the_cut_one() -> None:
    images = torch.randint(256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    whole = speed.WholeNetwork("tf_efficientnet_lite0", 4, (1.0, 0.5), "random")(images)
    cut = PyramidExtractor("tf_efficientnet_lite0", ["blocks.4"], (1.0, 0.5), weights="random")(images)
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other.flatten(2).mT, rtol=1e-4, atol=1e-5)


def test_the_benchmark_runs_on_any_products(tmp_path: Path) -> None:
    root = write_products(tmp_path / "products", 8, 1, 1, 32, products=["fabric", "gear"])
    size = "--size 64 --stage 2 --blocks 2 --position 4 --passes 0.5 --steps 2 --window 1 --repeats 1 --weights random"
    chosen = speed.options().parse_args(["--data", str(root), *size.split()])
    text = "\n".join(speed.page(chosen))
    assert all(f"| {name} |" in text for name in (*speed.ladder(), "our loop (fit)", "ours, default"))
    assert re.search(r"\bnan\b", text) is None


# The cost.


def test_the_published_setting_costs_what_the_paper_s_network_does() -> None:
    """28.1 GMAC forward an image, 42 % of them for the condition: by hand from the sizes of the paper."""
    whole, _ = speed.step_flops(speed.FAITHFUL, 8, 0, centres=0, fused=False)
    assert whole / (2 * 8) == pytest.approx(28.1e9, rel=2e-3)
    without = speed.step_flops(speed.FAITHFUL, 10**6, 0, centres=0)[0] / 10**6
    assert 1 - without * 8 / whole == pytest.approx(2.19 / 5.23, rel=2e-3)


@pytest.mark.parametrize("fused", [True, False])
def test_the_cost_is_what_torch_counts(fused: bool) -> None:
    shapes, images = [(60, 8, 8), (48, 4, 4)], 6
    detector = speed.Learning(shapes, 4, **speed.PUBLISHED | TINY | {"position": 32, "blocks": 5})
    form = list(speed.ladder().values())[-1 if fused else 0]
    with FlopCounterMode(display=False) as counter:
        for level, (c, h, w) in enumerate(shapes):
            vectors = torch.randn(images, h * w, c, generator=torch.Generator().manual_seed(1))
            torch.autograd.backward(speed.total(detector, level, vectors, torch.arange(images) % 4, form, 0.5))
    centres = (4, 3) if fused else (0, 0)  # naive distances are no matrix products
    ours = speed.step_flops(shapes, images, centres[0], 5, 32, centres[1], fused)
    assert counter.get_total_flops() == pytest.approx(sum(ours), rel=2e-3)


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_a_rate_counts_vectors_and_work_of_the_same_time(precision: str) -> None:
    shapes = [(8, 4, 4)]
    rate = speed.measure_rate("cpu", precision, False, 1e15, shapes, 2, 1, 1, speed.PUBLISHED | TINY)
    assert rate.vectors * rate.seconds == pytest.approx(2 * 16)
    assert rate.flops * rate.seconds == pytest.approx(sum(speed.step_flops(shapes, 2, speed.PRODUCTS, 2, 4, 3)))
    assert (rate.precision, rate.peak) == (precision, 1e15)


# Compiled, and in reduced precision.


def trained(recipe: Recipe) -> HGAD:
    detector, train = published(torch.float32), data(torch.float32)
    fit(detector, train, train, recipe, seed=0)
    return detector


def trained_in_small(recipe: Recipe, first_stage: float = 0.0) -> HGAD:
    """One level, one block and one product: compiling takes seconds for each."""
    changed = {"blocks": 1, "delta_scale": 0.3, "first_stage": first_stage}
    detector = speed.Learning(SHAPES[1:], 1, **speed.PUBLISHED | TINY | changed)
    whole = data(torch.float32, images=4).features
    train = labelled(whole.levels[1:], np.zeros(4, np.int64))  # type: ignore[attr-defined]
    fit(detector, train, train, recipe, seed=0)
    found: HGAD = detector
    return found


def compiled_like_eager(
    monkeypatch: pytest.MonkeyPatch, backend: str, precision: str = "f32", tolerance: float = 1e-5, first_stage: float = 0.0
) -> None:
    calls, original = [], torch.compile

    def watched(*given: Any, **options: Any) -> Any:
        calls.append(options)
        return original(*given, **options, backend=backend)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", watched)
    recipe = replace(RECIPE, precision=precision, optimizer="per_level")
    eager, shorter = trained_in_small(recipe, first_stage), trained_in_small(replace(recipe, steps=1), first_stage)
    assert not calls
    compiled = trained_in_small(replace(recipe, compile=True), first_stage)
    assert calls == [{"dynamic": False}]
    assert farthest(eager, compiled) < tolerance < 0.1 * farthest(eager, shorter)
    torch._dynamo.reset()


def test_a_compiled_step_is_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_like_eager(monkeypatch, "aot_eager")


@pytest.mark.slow
def test_a_compiled_step_in_bf16_is_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_like_eager(monkeypatch, "aot_eager", "bf16")


def test_a_compiled_step_is_the_eager_one_across_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_like_eager(monkeypatch, "aot_eager", first_stage=0.5)


@pytest.mark.slow
def test_a_step_compiled_to_machine_code_is_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_like_eager(monkeypatch, "inductor", tolerance=1e-4)


def test_training_in_bf16_stays_near_and_scores_are_in_single_precision() -> None:
    single, half = trained(RECIPE), trained(replace(RECIPE, precision="bf16"))
    assert farthest(single, half) > 0
    one, other = (speed.held_out_loss(detector, data(torch.float32)) for detector in (single, half))
    assert one == pytest.approx(other, rel=1e-2)
    blocks = [block for number in range(len(SHAPES)) for block in half.level(number).flow.blocks]
    assert {block.precision for block in blocks} == {torch.float32}


def gradient(precision: str) -> Tensor:
    detector, train = published(torch.float32), data(torch.float32)
    set_precision(detector, precision)
    found, places, product = Sampler(train, detector, RECIPE, seed=0).draw(0, 0)
    torch.autograd.backward(detector.loss(0, found, places, product, 0.5)["total"])
    return torch.cat([parameter.grad.flatten() for parameter in detector.level(0).flow.parameters()])  # type: ignore


def test_the_gradient_in_bf16_points_where_the_exact_one_does() -> None:
    exact, rounded = gradient("f32"), gradient("bf16")
    assert 0 < (rounded - exact).norm() < 0.03 * exact.norm()


class Reduced(TorchDispatchMode):
    """Names of the operations that see a tensor in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(value, Tensor) and value.dtype == torch.bfloat16 for value in (*args, out)):
            self.names.add(func.overloadpacket.__name__)
        return out


def test_only_matrix_products_are_computed_in_bf16() -> None:
    """Forward and backward: exponentials, distances, logarithms and sums over channels, centres and vectors are not."""
    detector, train = published(torch.float32), data(torch.float32)
    set_precision(detector, "bf16")
    found, places, product = Sampler(train, detector, RECIPE, seed=0).draw(0, 0)
    with Reduced() as reduced:
        torch.autograd.backward(detector.loss(0, found, places, product, 0.5)["total"])
    moved = {"_to_copy", "t", "view", "_unsafe_view", "slice", "slice_backward", "transpose", "permute", "detach", "expand"}
    assert "mm" in reduced.names
    assert reduced.names <= {"mm", "addmm"} | moved
    assert all(parameter.grad is None or parameter.grad.dtype == torch.float32 for parameter in detector.parameters())


def test_the_flow_in_bf16_is_undone_by_its_inverse() -> None:
    """Rounding inside the subnets is part of the map: what it does to a vector is the same both ways."""
    level = published(torch.float32).level(0)
    level.flow.set_precision(torch.bfloat16)
    x = torch.randn(16, 9, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        z, logdet = level.flow(x, level.condition)
        back = level.flow.inverse(z, level.condition)
    assert z.dtype == logdet.dtype == torch.float32
    torch.testing.assert_close(back, x, rtol=1e-4, atol=3e-2)


def test_copies_do_not_share_what_is_learnt() -> None:
    """The rows of the benchmark start from the same weights."""
    first = published()
    second = copy.deepcopy(first)
    speed.Stepper(second, RECIPE).step(
        speed.read(data().features, np.arange(4)), torch.arange(4) % PRODUCTS, 0.5, speed.Form()
    )
    assert farthest(first, second) > 0
    assert farthest(first, published()) == 0
