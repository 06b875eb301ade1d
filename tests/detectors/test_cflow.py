"""CFLOW-AD against a decoder made of FrEIA's blocks, literal formulas, autograd and an integral that is one."""

import math
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from planted import labelled
from unispect.detectors.base import Recipe
from unispect.detectors.cflow import CFLOW
from unispect.detectors.methods import build
from unispect.errors import ConfigError
from unispect.fit import Sampler
from unispect.inspector import complete
from unispect.nn.maps import upsampled
from unispect.nn.position import positional_encoding

with warnings.catch_warnings():  # of its docstrings, when it is compiled for the first time
    warnings.simplefilter("ignore")
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import AllInOneBlock

SHAPES = [(6, 3, 4), (5, 2, 2)]


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def number(value: Tensor) -> float:
    return float(value.detach())


def features(images: int, seed: int = 1) -> list[Tensor]:
    return [draw(images, *shape, seed=seed + number) for number, shape in enumerate(SHAPES)]


def detector(blocks: int = 3, position: int = 8, mixing: str = "rotation", strength: float = 0.2) -> CFLOW:
    """With all parameters moved, so that no term hides behind a zero or a one."""
    made = CFLOW(SHAPES, 3, blocks, position, mixing=mixing, map_side=16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += strength * torch.randn(parameter.shape, generator=generator)
    return made


def finished(made: CFLOW, held_out: list[Tensor]) -> CFLOW:
    made.finish(list, lambda: [(held_out, torch.zeros(len(held_out[0]), dtype=torch.int64))])
    return made


def anomalibs(made: CFLOW, level: int, position: int) -> SequenceINN:
    """The decoder as anomalib builds it with permute_soft=True: FrEIA's blocks, each with the condition."""

    def subnet(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 2 * inputs), nn.ReLU(), nn.Linear(2 * inputs, outputs))

    coder = SequenceINN(SHAPES[level][0])
    for block in made.level(level).flow.blocks:
        given = {"cond": 0, "cond_shape": (position,), "subnet_constructor": subnet}
        options = {"affine_clamping": 1.9, "global_affine_type": "SOFTPLUS", "permute_soft": block.mixing == "rotation"}
        coder.append(AllInOneBlock, **given, **options)
        matrix = block.rotation if block.mixing == "rotation" else torch.eye(SHAPES[level][0])[block.order]
        own = {"global_scale": block.scale[None], "global_offset": block.offset[None]}
        own |= {"w_perm": matrix, "w_perm_inv": matrix.T}
        for name, layer in {"subnet.0": block.hidden, "subnet.2": block.output}.items():
            own |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
        coder.module_list[-1].double().load_state_dict(own)
    return coder


@pytest.mark.parametrize("mixing", ["rotation", "permutation"])
@pytest.mark.parametrize("level", [0, 1])
def test_the_decoder_is_that_of_anomalib(level: int, mixing: str) -> None:
    made, (channels, height, width) = detector(mixing=mixing), SHAPES[level]
    x = draw(7, *SHAPES[level])
    code = positional_encoding(8, height, width)[None].expand(7, -1, -1, -1).permute(0, 2, 3, 1).reshape(-1, 8)
    u, jacobian = anomalibs(made, level, 8)(x.permute(0, 2, 3, 1).reshape(-1, channels), [code])
    expected = (channels * -0.9189385332046727 - 0.5 * u.square().sum(1) + jacobian) / channels
    found = made.likelihoods([draw(7, *shape) for shape in SHAPES], torch.zeros(7))[level]
    torch.testing.assert_close(found.flatten(), expected.detach(), rtol=0, atol=1e-12)


def test_the_density_at_a_place_integrates_to_one() -> None:
    made = CFLOW([(2, 2, 3)], 1, 4, 8)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.4 * torch.randn(parameter.shape, generator=generator)
        axis = torch.linspace(-25, 25, 500)
        grid = torch.cartesian_prod(axis, axis)
        for place in (0, 4):
            density = made.level(0).density(grid, torch.full((len(grid),), place))
            assert float((2 * density).exp().sum()) * number(axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=1e-3)


def test_the_loss_is_the_literal_formula() -> None:
    made, x = detector(), features(4)[0]
    vectors, places = x.flatten(2).mT[:, None], torch.arange(12).expand(4, 1, 12)
    found = made.loss(0, vectors, places, torch.zeros(4, dtype=torch.int64), 0.5)
    density = made.likelihoods(features(4), torch.zeros(4))[0].flatten().tolist()
    assert number(found["total"]) == pytest.approx(np.mean([math.log(1 + math.exp(-value)) for value in density]), rel=1e-12)
    assert number(found["nll"]) == pytest.approx(-np.mean(density), rel=1e-12)
    held_out = made.held_out_loss(0, vectors, places, torch.zeros(4, dtype=torch.int64))
    assert number(held_out) == pytest.approx(-np.mean(density), rel=1e-12)


def test_a_vector_weighs_one_minus_the_sigmoid_of_its_likelihood() -> None:
    made, x, places = detector(), draw(12, 6), torch.arange(12)
    parameters = made.groups(0)[0].parameters
    total = made.loss(0, x[:, None, None], places[:, None, None], places, 0.0)["total"]
    density = made.level(0).density(x, places)
    weighted = -((1 - density.detach().sigmoid()) * density).mean()
    found, expected = torch.autograd.grad(total, parameters), torch.autograd.grad(weighted, parameters)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-14) for a, b in zip(found, expected, strict=True))
    assert max(number(gradient.abs().max()) for gradient in found) > 1e-3


def test_a_likely_vector_and_one_of_minus_a_million_are_safe() -> None:
    made = detector()
    x = torch.stack([draw(6), 1e6 * draw(6)])
    total = made.loss(0, x[:, None, None], torch.zeros(2, 1, 1, dtype=torch.int64), torch.zeros(2), 0.0)["total"]
    assert torch.isfinite(total)
    assert all(torch.isfinite(part).all() for part in torch.autograd.grad(total, made.groups(0)[0].parameters))


def test_a_step_uses_every_vector_at_most_once_and_at_its_place() -> None:
    levels = features(9)
    recipe = Recipe(images=8, places=0, vectors=10)
    sampler = Sampler(labelled(levels, np.arange(9)), detector(), recipe, 0)
    parts = list(sampler.parts(3, 0))
    assert [x.shape for x, _, _ in parts] == [(10, 1, 1, 6)] * 9  # 96 vectors: six are left over
    x = torch.cat([x.flatten(0, 2) for x, _, _ in parts])
    place, image = (torch.cat([part[number].flatten() for part in parts]) for number in (1, 2))
    assert len({(int(i), int(p)) for i, p in zip(image, place, strict=True)}) == 90
    assert torch.equal(x, levels[0].flatten(2).mT[image, place])
    assert len(image[:10].unique()) > 2


def test_scores_are_the_literal_deployable_ones() -> None:
    made, held_out, x = finished(detector(), features(300, 5)), features(300, 5), features(4)
    expected = torch.full((4, 16, 16), 2.0)
    for level, density in enumerate(made.likelihoods(held_out, torch.zeros(300))):
        ceiling = np.quantile(density.numpy(), 0.999, method="inverted_cdf")
        likely = torch.exp((made.likelihoods(x, torch.zeros(4))[level] - ceiling).clamp(max=0))
        expected -= upsampled(likely, 16)
    found = made(x)
    torch.testing.assert_close(found.maps, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.image, found.maps.amax((1, 2)), rtol=0, atol=0)
    assert found.products is None
    assert 0 <= number(found.maps.min()) <= number(found.maps.max()) <= 2


def test_ceilings_do_not_depend_on_the_batches() -> None:
    held_out, product = features(30, 5), torch.zeros(30, dtype=torch.int64)
    made, other = finished(detector(), held_out), detector()
    halves = [([level[:7] for level in held_out], product[:7]), ([level[7:] for level in held_out], product[7:])]
    other.finish(list, lambda: halves)
    torch.testing.assert_close(made.ceilings, other.ceilings, rtol=0, atol=2e-4)


def test_the_place_counts_with_a_condition_and_not_without() -> None:
    x = [draw(2, 6, 1, 1).expand(2, 6, 3, 4), draw(2, 5, 2, 2)]
    conditional, unconditional = (detector(position=position).likelihoods(x, torch.zeros(2))[0] for position in (8, 0))
    assert conditional.flatten(1).std(1).min() > 1e-3
    assert unconditional.flatten(1).std(1).max() < 1e-12


@pytest.mark.parametrize("shapes", [[(6, 3, 4)], [(6, 1, 1)], [(6, 4, 4), (5, 2, 2), (4, 1, 1)]])
def test_any_number_of_levels_pooled_ones_included(shapes: list[tuple[int, int, int]]) -> None:
    made = CFLOW(shapes, 3, 2, 8, map_side=8)
    x = [draw(20, *shape) for shape in shapes]
    scores = finished(made, x)(x)
    assert scores.maps.shape == (20, 8, 8)
    assert torch.isfinite(scores.maps).all()
    conditions = [made.level(number).condition is None for number in range(len(shapes))]
    assert conditions == [shape[1:] == (1, 1) for shape in shapes]


def test_the_number_of_products_changes_nothing() -> None:
    one, many = (CFLOW(SHAPES, products, 2, 8).state_dict() for products in (1, 40))
    assert all(torch.equal(value, many[name]) for name, value in one.items())


def test_training_finds_a_planted_density() -> None:
    """Correlated normals far from the origin: the held-out loss falls to their entropy per dimension."""
    torch.manual_seed(0)
    mixing = torch.tensor([[1.0, 0.0], [1.5, 0.5]])
    x = draw(4000, 2) @ mixing.T + torch.tensor([2.0, -1.0])
    made = CFLOW([(2, 1, 1)], 1, 4)
    optimizer = torch.optim.Adam(made.parameters(), 1e-2)
    places, product = torch.zeros(1000, 1, 1, dtype=torch.int64), torch.zeros(1000, dtype=torch.int64)
    for step in range(150):
        part = x[:3000].roll(1000 * step, 0)[:1000, None, None]
        optimizer.zero_grad()
        made.loss(0, part, places, product, 0.0)["total"].backward()
        optimizer.step()
    entropy = 0.5 * math.log(2 * math.pi * math.e) + math.log(abs(number(torch.linalg.det(mixing)))) / 2
    assert number(made.held_out_loss(0, x[3000:, None, None], places, product)) == pytest.approx(entropy, abs=0.08)


def test_published_sizes() -> None:
    """Trainable numbers of the paper's decoders for Wide ResNet-50 (methods: 5.52, 17.07 and 59.05 million)."""
    with torch.device("meta"):
        made = CFLOW([(512, 32, 32), (1024, 16, 16), (2048, 8, 8)], 15)
    sizes = [sum(value.numel() for value in made.groups(level)[0].parameters) / 1e6 for level in range(3)]
    assert sizes == pytest.approx([5.52, 17.07, 59.05], abs=0.01)


def test_settings_of_its_own_for_other_sections() -> None:
    table = complete({"method": "cflow"})
    assert table["features"]["layers"] == ["blocks.2", "blocks.4", "blocks.6"]
    assert table["features"]["pooled"] == []
    assert (table["training"]["vectors"], table["training"]["decay"]) == (256, 0.0)
    assert build(table, SHAPES, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 0}, "blocks: got 0, expected at least 1"),
        ({"map_side": 0}, "map_side: got 0"),
        ({"ceiling": 0.0}, r"ceiling: got 0\.0, expected above 0 and up to 1"),
        ({"position": 6}, "position channels: got 6, expected a multiple of 4"),
        ({"mixing": "hard"}, "unknown mixing 'hard'"),
    ],
)
def test_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CFLOW(SHAPES, 3, **options)  # type: ignore[arg-type]
