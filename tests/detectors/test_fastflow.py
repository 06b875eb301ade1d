"""FastFlow against FrEIA's blocks, literal formulas and autograd; and the defect of its published normalisation."""

import math
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from unispect.detectors.fastflow import FastFlow
from unispect.detectors.methods import build
from unispect.errors import ConfigError
from unispect.inspector import complete
from unispect.nn.coupling import CouplingBlock

with warnings.catch_warnings():  # of its docstrings, when it is compiled for the first time
    warnings.simplefilter("ignore")
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import AllInOneBlock

SHAPES = [(6, 3, 4), (5, 2, 2)]
NONE = torch.zeros(0)


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


def features(images: int) -> list[Tensor]:
    return [3 + 2 * draw(images, *shape, seed=number) for number, shape in enumerate(SHAPES)]


def detector(strength: float = 0.2, shapes: list[tuple[int, int, int]] = SHAPES, **options: object) -> FastFlow:
    """With all parameters moved, so that no term hides behind a zero or a one."""
    made = FastFlow(shapes, 3, **({"blocks": 3, "map_side": 16} | options))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += strength * torch.randn(parameter.shape, generator=generator)
    return made


def vectors(level: Tensor) -> tuple[Tensor, Tensor]:
    """As the loop draws them: (m, h*w, 1, C) and places (m, h*w, 1)."""
    found = level.flatten(2).mT[:, :, None]
    return found, torch.arange(found.shape[1])[None, :, None].expand(found.shape[:3])


def loss(made: FastFlow, level: int, x: Tensor) -> dict[str, Tensor]:
    return made.loss(level, *vectors(x), torch.zeros(len(x), dtype=torch.int64), 0.0)


def freias(made: FastFlow, level: int) -> SequenceINN:
    """The flow of the usual re-implementation: FrEIA's blocks of maps, hard permutations, alpha 2."""
    coder = SequenceINN(*SHAPES[level])
    for block in made.level(level).flow.blocks:
        assert isinstance(block, CouplingBlock)

        def subnet(inputs: int, outputs: int, block: CouplingBlock = block) -> nn.Module:
            hidden, kernel = int(inputs * 1.0), block.kernel
            first, last = (nn.Conv2d(a, b, kernel, padding="same") for a, b in ((inputs, hidden), (hidden, outputs)))
            return nn.Sequential(first, nn.ReLU(), last)

        coder.append(AllInOneBlock, subnet_constructor=subnet, affine_clamping=2.0, permute_soft=False)
        matrix = torch.eye(SHAPES[level][0])[block.order][:, :, None, None]
        own = {"global_scale": block.scale[None, :, None, None], "global_offset": block.offset[None, :, None, None]}
        own |= {"w_perm": matrix, "w_perm_inv": matrix.transpose(0, 1)}
        for name, layer in {"subnet.0": block.hidden, "subnet.2": block.output}.items():
            own |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
        coder.module_list[-1].double().load_state_dict(own)
    return coder


@pytest.mark.parametrize("kernels", [(3,), (3, 1)])
@pytest.mark.parametrize("affine", [False, True])
def test_loss_and_map_are_the_published_ones(kernels: tuple[int, ...], affine: bool) -> None:
    made, x = detector(kernels=kernels, affine=affine), features(4)
    maps = []
    for level, features_of_level in enumerate(x):
        norm = nn.LayerNorm(SHAPES[level], elementwise_affine=affine)
        if affine:
            norm.load_state_dict(made.level(level).norm.state_dict())
        z, jacobian = freias(made, level)(norm(features_of_level))
        expected = (0.5 * z.square().sum((1, 2, 3)) - jacobian).mean()
        assert number(loss(made, level, features_of_level)["total"]) == pytest.approx(number(expected), rel=1e-12)
        probability = torch.exp(-0.5 * z.square().mean(1, keepdim=True))
        maps.append(interpolate(-probability, (16, 16), mode="bilinear", align_corners=False))
    found = made(x)
    torch.testing.assert_close(found.maps, torch.stack(maps, -1).mean(-1)[:, 0].detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.image, found.maps.amax((1, 2)), rtol=0, atol=0)
    assert found.products is None


def test_the_loss_is_the_negative_log_density_of_the_normalised_map() -> None:
    """With the log-determinant of the whole map's Jacobian by autograd."""
    made = detector(shapes=[(3, 2, 2)])
    part, x = made.level(0), draw(3, 3, 2, 2)
    total = 0.0
    for one in part.norm(x):
        jacobian = torch.autograd.functional.jacobian(lambda v: part.flow(v[None])[0], one).reshape(12, 12)
        total += number(part.flow(one[None])[0].square().sum() / 2 - torch.linalg.slogdet(jacobian)[1]) / 3
    found = loss(made, 0, x)
    assert number(found["total"]) == pytest.approx(total, rel=1e-12)
    assert number(found["nll"]) == pytest.approx(total / 12 + 0.5 * math.log(2 * math.pi), rel=1e-12)
    held_out = made.held_out_loss(0, *vectors(x), torch.zeros(3, dtype=torch.int64))
    assert number(held_out) == pytest.approx(number(found["nll"]), rel=1e-12)


def test_the_loss_by_dimension_is_the_same_but_for_its_size() -> None:
    published, divided, x = detector(), detector(per_dimension=True), features(4)[0]
    assert number(loss(divided, 0, x)["total"]) == pytest.approx(number(loss(published, 0, x)["total"]) / 72, rel=1e-12)


def test_likelihoods_of_the_places_average_to_that_of_the_map() -> None:
    made, x = detector(), features(4)
    for level, density in enumerate(made.likelihoods(x, NONE)):
        assert density.shape == (4, *SHAPES[level][1:])
        assert number(density.mean()) == pytest.approx(-number(loss(made, level, x[level])["nll"]), rel=1e-12)


def shrink(made: FastFlow, times: float) -> None:
    """Divide the affine by `times` and undo it in the first block, so that z stays what it is."""
    part = made.level(0)
    block = part.flow.blocks[0]
    assert isinstance(block, CouplingBlock)
    with torch.no_grad():
        part.norm.weight /= times
        part.norm.bias /= times
        block.hidden.weight *= times
        block.output.weight[block.moved :] /= times
        block.output.bias[block.moved :] /= times
        block.offset.copy_(block.offset)
        block.scale.copy_(2 * torch.log(torch.expm1(5 * times * block.global_scale())))


def test_the_published_affine_lowers_the_loss_without_end_and_without_any_change_of_z() -> None:
    """Its log-determinant is missing, so -log of the scale that the flow takes over is a gain for nothing."""
    made, x = detector(affine=True), features(4)
    before, losses = made(x), [number(loss(made, 0, x[0])["total"])]
    z = made.level(0).latent(x[0])[0].detach()
    for _ in range(3):
        shrink(made, 1.5)
        torch.testing.assert_close(made.level(0).latent(x[0])[0].detach(), z, rtol=0, atol=1e-9)
        torch.testing.assert_close(made(x).maps, before.maps, rtol=0, atol=1e-9)
        losses.append(number(loss(made, 0, x[0])["total"]))
    np.testing.assert_allclose(np.diff(losses), -72 * math.log(1.5), rtol=1e-9)


def test_without_the_affine_the_normalisation_has_nothing_to_learn() -> None:
    assert not list(detector().level(0).norm.parameters())
    x = features(3)[0]
    torch.testing.assert_close(detector().level(0).latent(7 * x - 2)[0], detector().level(0).latent(x)[0], rtol=0, atol=1e-4)


def test_maps_come_whole_and_in_order() -> None:
    made, x = detector(), features(4)
    assert made.grid(0).tolist() == [[place] for place in range(12)]
    torch.testing.assert_close(made.level(0).as_maps(vectors(x[0])[0]), x[0], rtol=0, atol=0)
    with pytest.raises(ConfigError, match=r"expected whole maps \(m, 12, 1, 6\): .* leave training\.vectors at 0"):
        made.loss(0, draw(32, 1, 1, 6), torch.zeros(32, 1, 1, dtype=torch.int64), torch.zeros(32), 0.0)


@pytest.mark.parametrize("shapes", [[(6, 3, 4)], [(6, 1, 1)], [(6, 4, 4), (5, 2, 2), (4, 1, 1)]])
def test_any_number_of_levels_pooled_ones_included(shapes: list[tuple[int, int, int]]) -> None:
    made = detector(shapes=shapes)
    x = [draw(5, *shape) for shape in shapes]
    assert made(x).maps.shape == (5, 16, 16)
    for level, part in enumerate(x):
        loss(made, level, part)["total"].backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in made.parameters())


def test_the_number_of_products_changes_nothing() -> None:
    one, many = (FastFlow(SHAPES, products, 2).state_dict() for products in (1, 40))
    assert all(torch.equal(value, many[name]) for name, value in one.items())


def test_published_sizes() -> None:
    """Millions of numbers at 256 px: ResNet-18 4.66, Wide ResNet-50 41.3 and 3.7 of the affine (methods)."""
    with torch.device("meta"):
        small = FastFlow([(64, 64, 64), (128, 32, 32), (256, 16, 16)], 15)
        wide = FastFlow([(256, 64, 64), (512, 32, 32), (1024, 16, 16)], 15, kernels=(3, 1), affine=True)

    def millions(module: nn.Module) -> float:
        return sum(value.numel() for value in module.parameters()) / 1e6

    assert sum(millions(small.level(level).flow) for level in range(3)) == pytest.approx(4.66, abs=0.02)
    assert sum(millions(wide.level(level).flow) for level in range(3)) == pytest.approx(41.3, abs=0.1)
    assert sum(millions(wide.level(level).norm) for level in range(3)) == pytest.approx(3.7, abs=0.05)


def test_settings_of_its_own_for_other_sections() -> None:
    table = complete({"method": "fastflow"})
    assert table["features"]["layers"] == ["blocks.3", "blocks.4"]
    assert (table["training"]["vectors"], table["training"]["learning_rate"]) == (0, 1e-3)
    assert build(table, SHAPES, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 0}, "blocks: got 0, expected at least 1"),
        ({"map_side": 0}, "map_side: got 0"),
        ({"kernels": ()}, "expected at least one odd number"),
        ({"kernels": (4,)}, "kernel: got 4, expected an odd number"),
        ({"ratio": 0.0}, "ratio: got"),
    ],
)
def test_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FastFlow(SHAPES, 3, **options)  # type: ignore[arg-type]
