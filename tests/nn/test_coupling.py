"""The flow against FrEIA, autograd, its own inverse and an integral that is one."""

import math
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from unispect.errors import ConfigError
from unispect.nn.coupling import UNIT_SCALE, CouplingBlock, Flow, random_rotation

with warnings.catch_warnings():  # of its docstrings, when it is compiled for the first time
    warnings.simplefilter("ignore")
    from FrEIA.modules import AllInOneBlock

EXACT = {"rtol": 0.0, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def stirred(flow: Flow, seed: int = 0, strength: float = 1.0) -> Flow:
    """The flow with all parameters moved, so that no term hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += strength * torch.randn(parameter.shape, generator=generator)
    return flow


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def subnet(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 2 * inputs), nn.ReLU(), nn.Linear(2 * inputs, outputs))


def freia_like(block: CouplingBlock, channels: int, condition: int) -> AllInOneBlock:
    """FrEIA's block with the same weights."""
    conditions = [(condition,)] if condition else []
    options = {"affine_clamping": block.alpha, "global_affine_type": "SOFTPLUS", "permute_soft": True}
    other = AllInOneBlock([(channels,)], conditions, subnet_constructor=subnet, **options).double()
    named = {
        "global_scale": block.scale[None],
        "global_offset": block.offset[None],
        "w_perm": block.rotation,
        "w_perm_inv": block.rotation.T,
        "subnet.0.weight": block.hidden.weight,
        "subnet.0.bias": block.hidden.bias,
        "subnet.2.weight": block.output.weight,
        "subnet.2.bias": block.output.bias,
    }
    other.load_state_dict(named)
    return other


@pytest.mark.parametrize(("channels", "condition"), [(6, 4), (7, 4), (5, 0), (2, 8)])
def test_equal_to_freia(channels: int, condition: int) -> None:
    flow = stirred(Flow(channels, condition, blocks=3))
    x = y = draw(40, channels)
    code = draw(40, condition, seed=2) if condition else None
    expected = torch.zeros(40)
    for block in flow.blocks:
        (y,), part = freia_like(block, channels, condition)((y,), [] if code is None else [code])
        expected = expected + part
    z, logdet = flow(x, code, torch.arange(40))
    torch.testing.assert_close(z, y, **EXACT)
    torch.testing.assert_close(logdet, expected, **EXACT)


def test_the_start_is_that_of_freia() -> None:
    block = CouplingBlock(6)
    other = AllInOneBlock([(6,)], subnet_constructor=subnet, global_affine_type="SOFTPLUS", permute_soft=True)
    torch.testing.assert_close(block.scale[None], other.global_scale.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(block.global_scale(), torch.ones(6), **EXACT)
    assert pytest.approx(9.9865, abs=1e-4) == UNIT_SCALE


@pytest.mark.parametrize("clamp", ["tanh", "scaled_tanh"])
def test_log_scale_is_clamped_as_named(clamp: str) -> None:
    block = stirred(Flow(6, 0, 1, clamp=clamp)).blocks[0]
    x = 5 * draw(30, 6)
    raw = 0.1 * block.output(block.hidden(x[:, :3]).relu())
    slope = 1.0 if clamp == "tanh" else 1 / 1.9
    log_scale = 1.9 * torch.tanh(slope * raw[:, :3])
    y = torch.cat([x[:, :3], x[:, 3:] * log_scale.exp() + raw[:, 3:]], 1) * block.global_scale() + block.offset
    z, logdet = block(x, block.condition_term(None))
    torch.testing.assert_close(z, y @ block.rotation.T, **EXACT)
    torch.testing.assert_close(logdet, log_scale.sum(1) + block.global_scale().log().sum(), **EXACT)


def test_the_clamps_differ() -> None:
    x = draw(10, 6)
    published, later = (stirred(Flow(6, 0, 1, clamp=clamp)) for clamp in ("tanh", "scaled_tanh"))
    assert (published(x)[0] - later(x)[0]).abs().max() > 0.1


@pytest.mark.parametrize("clamp", ["tanh", "scaled_tanh"])
@pytest.mark.parametrize("channels", [2, 7])
def test_log_determinant_is_that_of_the_jacobian(channels: int, clamp: str) -> None:
    flow = stirred(Flow(channels, 4, blocks=3, clamp=clamp), strength=0.5)
    x, code = draw(5, channels), draw(5, 4, seed=2)
    logdet = flow(x, code)[1].detach()
    for row in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda v, r=row: flow(v[None], code[r : r + 1])[0][0], x[row])
        assert float(torch.linalg.slogdet(jacobian)[1] - logdet[row]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("clamp", ["tanh", "scaled_tanh"])
def test_inverse(clamp: str) -> None:
    flow = stirred(Flow(7, 4, blocks=4, clamp=clamp), strength=0.3)
    x, code, place = draw(50, 7), draw(9, 4, seed=2), torch.arange(50) % 9
    torch.testing.assert_close(flow.inverse(flow(x, code, place)[0], code, place), x, rtol=0, atol=1e-9)
    single = flow.float()
    x, code = x.float(), code.float()
    torch.testing.assert_close(single.inverse(single(x, code, place)[0], code, place), x, rtol=0, atol=1e-3)


def test_a_still_flow_is_an_orthogonal_map() -> None:
    flow = Flow(9, 8, blocks=5, still=True)
    x = draw(20, 9)
    z, logdet = flow(x, draw(20, 8, seed=2))
    torch.testing.assert_close(z.norm(dim=1), x.norm(dim=1), **EXACT)
    torch.testing.assert_close(logdet, torch.zeros(20), **EXACT)
    assert (z - x).abs().max() > 0.5


def test_density_of_two_dimensions_integrates_to_one_and_samples_follow_it() -> None:
    flow = stirred(Flow(2, 0, blocks=4), strength=0.5)
    with torch.no_grad():
        sample = flow.inverse(draw(40000, 2))
        low, high = sample.amin(0) - 6, sample.amax(0) + 6
        first, second = (torch.linspace(float(a), float(b), 900) for a, b in zip(low, high, strict=True))
        x = torch.cartesian_prod(first, second)
        z, logdet = flow(x)
    mass = (logdet - (z**2).sum(1) / 2).exp() / (2 * math.pi) * (first[1] - first[0]) * (second[1] - second[0])
    assert float(mass.sum()) == pytest.approx(1, abs=1e-3)
    mean = (mass[:, None] * x).sum(0)
    spread = (mass[:, None] * (x - mean) ** 2).sum(0)
    assert ((sample.mean(0) - mean).abs() < 5 * (spread / 40000).sqrt()).all()
    torch.testing.assert_close(sample.var(0), spread, rtol=0.05, atol=0)


def test_conditions_by_place_are_the_same_as_concatenated_ones() -> None:
    block = stirred(Flow(6, 8, 1)).blocks[0]
    x, code, place = draw(24, 6), draw(4, 8, seed=2), torch.arange(24) % 4
    joined = block.hidden(torch.cat([x[:, :3], code[place]], 1)).relu()
    expected = 0.1 * block.output(joined)
    log_scale, shift = block._scale_and_shift(x[:, :3], block.condition_term(code)[place])
    torch.testing.assert_close(shift, expected[:, 3:], **EXACT)
    torch.testing.assert_close(log_scale, 1.9 * expected[:, :3].tanh(), **EXACT)


def test_vectors_without_places_run_through_the_grid() -> None:
    flow, x, code = stirred(Flow(6, 8, 2)), draw(24, 6), draw(4, 8, seed=2)
    for by_default, by_place in zip(flow(x, code), flow(x, code, torch.arange(4).repeat(6)), strict=True):
        torch.testing.assert_close(by_default, by_place, rtol=0, atol=0)
    torch.testing.assert_close(flow.inverse(flow(x, code)[0], code), x, rtol=0, atol=1e-9)
    assert (flow(x, code)[0] - flow(x, code, torch.zeros(24, dtype=torch.int64))[0]).abs().max() > 0.1


@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_rotations(size: int) -> None:
    rotation = random_rotation(size, torch.Generator().manual_seed(size))
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(size), **EXACT)
    assert float(torch.linalg.det(rotation)) == pytest.approx(1, abs=1e-12)


def test_rotations_are_spread_evenly() -> None:
    """Haar measure on SO(4): entries have mean 0 and variance 1/4; the trace has mean 0 and variance 1."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([random_rotation(4, generator) for _ in range(2000)])
    assert drawn.mean(0).abs().max() < 4.5 * 0.5 / math.sqrt(2000)
    torch.testing.assert_close(drawn.var(0), torch.full((4, 4), 0.25), rtol=0, atol=0.03)
    trace = drawn.diagonal(dim1=1, dim2=2).sum(1)
    assert abs(float(trace.mean())) < 0.1
    assert float(trace.var()) == pytest.approx(1, abs=0.12)


def test_seeds_decide_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = Flow(6, 4, 2, seed=1), Flow(6, 4, 2, seed=1), Flow(6, 4, 2, seed=2)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(one.state_dict()[name], value) for name, value in same.state_dict().items())
    assert not torch.equal(one.blocks[0].rotation, other.blocks[0].rotation)
    assert not torch.equal(one.blocks[0].rotation, one.blocks[1].rotation)
    assert not torch.equal(one.blocks[0].hidden.weight, other.blocks[0].hidden.weight)


def test_errors() -> None:
    with pytest.raises(ConfigError, match="channels: got 1, expected at least 2"):
        CouplingBlock(1)
    with pytest.raises(ConfigError, match="unknown clamp 'tahn': did you mean 'tanh'"):
        CouplingBlock(4, clamp="tahn")


@pytest.mark.parametrize("condition", [0, 4])
def test_permutation_is_equal_to_freia(condition: int) -> None:
    flow = stirred(Flow(7, condition, blocks=3, mixing="permutation"))
    x = y = draw(40, 7)
    code = draw(40, condition, seed=2) if condition else None
    expected = torch.zeros(40)
    for block in flow.blocks:
        block.register_buffer("rotation", torch.eye(7)[block.order])
        (y,), part = freia_like(block, 7, condition)((y,), [] if code is None else [code])
        expected = expected + part
    z, logdet = flow(x, code, torch.arange(40))
    torch.testing.assert_close(z, y, **EXACT)
    torch.testing.assert_close(logdet, expected, **EXACT)
    torch.testing.assert_close(flow.inverse(z, code, torch.arange(40)), x, rtol=0, atol=1e-9)


def literally(block: CouplingBlock, x: Tensor, term: Tensor) -> tuple[Tensor, Tensor]:
    """The block in single precision, operation by operation as saved models were trained with."""
    kept, moved = x.split([block.kept, block.moved], dim=-1)
    hidden = nn.functional.linear(kept, block.hidden.weight[:, : block.kept]) + term
    raw, shift = (0.1 * block.output(hidden.relu())).split(block.moved, dim=-1)
    log_scale = block.alpha * raw.tanh()
    scale = 0.1 * nn.functional.softplus(block.scale, beta=0.5)
    y = torch.cat([kept, moved * log_scale.exp() + shift], dim=-1)
    z = nn.functional.linear(y, block.rotation * scale, block.rotation @ block.offset)
    return z, log_scale.sum(-1) + scale.log().sum()


def test_single_precision_is_the_same_to_the_bit_as_ever_and_after_bf16() -> None:
    flow, x, code = stirred(Flow(9, 8, 2), strength=0.1).float(), draw(24, 9).float(), draw(24, 8, seed=2).float()
    flow.set_precision(torch.bfloat16)
    flow.set_precision(torch.float32)
    y, expected = x, torch.zeros(24, dtype=torch.float32)
    for block in flow.blocks:
        condition = nn.functional.linear(code, block.hidden.weight[:, block.kept :], block.hidden.bias)
        y, part = literally(block, y, condition)
        expected = expected + part
    z, logdet = flow(x, code, torch.arange(24))
    assert torch.equal(z, y)
    assert torch.equal(logdet, expected)


def test_bf16_is_within_what_rounding_the_subnet_can_do() -> None:
    """Six roundings of a relative 2^-9 each lie on the way through a subnet; the bound is that of the worst case."""
    block, x, code = Flow(9, 8, 1).float().blocks[0], draw(64, 9).float(), draw(64, 8, seed=2).float()
    joined = torch.cat([x[:, :5], code], 1)
    size = joined.abs() @ block.hidden.weight.abs().T + block.hidden.bias.abs()
    bound = 0.1 * 6.5 * 2**-9 * (size @ block.output.weight.abs().T)
    exact = block._scale_and_shift(x[:, :5], block.condition_term(code))
    block.precision = torch.bfloat16
    reduced = block._scale_and_shift(x[:, :5], block.condition_term(code))
    assert ((exact[1] - reduced[1]).abs() <= bound[:, 4:]).all()
    assert ((exact[0] - reduced[0]).abs() <= 1.9 * bound[:, :4]).all()
    assert not torch.equal(exact[0], reduced[0])


def test_bf16_leaves_everything_but_the_subnet_as_it_was() -> None:
    """With subnets that give nothing, no product is left to round."""
    still, x = Flow(9, 8, 3, still=True).float(), draw(64, 9).float()
    exact = still(x, draw(64, 8, seed=2).float())
    still.set_precision(torch.bfloat16)
    reduced = still(x, draw(64, 8, seed=2).float())
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(exact, reduced, strict=True))


def test_precision_is_no_state() -> None:
    flow = Flow(6, 4, 2)
    names = list(flow.state_dict())
    flow.set_precision(torch.bfloat16)
    assert list(flow.state_dict()) == names
    other = Flow(6, 4, 2, seed=1)
    other.load_state_dict(flow.state_dict())
    assert all(block.precision == torch.float32 for block in other.blocks)
    with pytest.raises(ConfigError, match=r"precision: got torch\.float16, expected one of torch\.float32"):
        flow.set_precision(torch.float16)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_compiled_flow_is_one_graph_and_the_same(precision: torch.dtype) -> None:
    flow, x, code = Flow(6, 8, 1).float(), draw(24, 6).float(), draw(4, 8, seed=2).float()
    maps, m = Flow(6, 0, 1, mixing="permutation", kernels=(3,)).float(), draw(4, 6, 3, 3).float()
    flow.set_precision(precision)
    maps.set_precision(precision)

    def both(x: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        return (*flow(x, code, torch.arange(24) % 4), *maps(m))

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True, dynamic=False)
    for one, other in zip(compiled(x, m), both(x, m), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
