"""The flow of maps against FrEIA, autograd, its own inverse and an integral that is one."""

import math
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from unispect.errors import ConfigError
from unispect.nn.coupling import CouplingBlock, Flow

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


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stirred(flow: Flow, strength: float = 0.5) -> Flow:
    """The flow with all parameters moved, so that no term hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += strength * torch.randn(parameter.shape, generator=generator)
    return flow


def freia_like(block: CouplingBlock, shape: tuple[int, int, int]) -> AllInOneBlock:
    """FrEIA's block of maps with the same weights."""
    width, kernel = block.hidden.out_channels, block.kernel

    def subnet(inputs: int, outputs: int) -> nn.Module:
        first = nn.Conv2d(inputs, width, kernel, padding="same")
        return nn.Sequential(first, nn.ReLU(), nn.Conv2d(width, outputs, kernel, padding="same"))

    soft = block.mixing == "rotation"
    other = AllInOneBlock([shape], subnet_constructor=subnet, affine_clamping=block.alpha, permute_soft=soft).double()
    matrix = block.rotation if soft else torch.eye(shape[0])[block.order]
    named = {
        "global_scale": block.scale[None, :, None, None],
        "global_offset": block.offset[None, :, None, None],
        "w_perm": matrix[:, :, None, None],
        "w_perm_inv": matrix.T[:, :, None, None],
        "subnet.0.weight": block.hidden.weight,
        "subnet.0.bias": block.hidden.bias,
        "subnet.2.weight": block.output.weight,
        "subnet.2.bias": block.output.bias,
    }
    other.load_state_dict(named)
    return other


@pytest.mark.parametrize(("channels", "ratio"), [(6, 1.0), (7, 0.16), (2, 2.0)])
@pytest.mark.parametrize("mixing", ["permutation", "rotation"])
def test_equal_to_freia(channels: int, ratio: float, mixing: str) -> None:
    flow = stirred(Flow(channels, 0, 3, 2.0, mixing=mixing, kernels=(3, 1), ratio=ratio))
    x = y = draw(5, channels, 4, 3)
    expected = torch.zeros(5)
    for block in flow.blocks:
        (y,), part = freia_like(block, (channels, 4, 3))((y,))
        expected = expected + part
    z, logdet = flow(x)
    torch.testing.assert_close(z, y, **EXACT)
    torch.testing.assert_close(logdet, expected, rtol=0, atol=1e-11)


def slogdets(flow: Flow, x: Tensor) -> Tensor:
    """log |det| of the whole map's Jacobian by autograd, (N,)."""
    rows = []
    for one in x:
        jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0][0], one)
        rows.append(torch.linalg.slogdet(jacobian.reshape(one.numel(), one.numel()))[1])
    return torch.stack(rows)


@pytest.mark.parametrize("mixing", ["permutation", "rotation"])
@pytest.mark.parametrize("clamp", ["tanh", "scaled_tanh"])
def test_log_determinant_is_that_of_the_jacobian(mixing: str, clamp: str) -> None:
    flow, x = stirred(Flow(3, 0, 3, 2.0, clamp, mixing=mixing, kernels=(3, 1))), draw(3, 3, 2, 2)
    torch.testing.assert_close(flow(x)[1], slogdets(flow, x), **EXACT)


def turned_coupling(block: CouplingBlock, x: Tensor) -> Tensor:
    constant = block.global_scale().log().sum()
    return 2 * constant - CouplingBlock.forward(block, x, None)[1]


def turned_global(block: CouplingBlock, x: Tensor) -> Tensor:
    return CouplingBlock.forward(block, x, None)[1] - 2 * block.global_scale().log().sum()


def global_once(block: CouplingBlock, x: Tensor) -> Tensor:
    """The global affine counted for one place instead of all."""
    constant, places = block.global_scale().log().sum(), x.shape[2] * x.shape[3]
    return CouplingBlock.forward(block, x, None)[1] - constant * (1 - 1 / places)


@pytest.mark.parametrize("wrong", [turned_coupling, turned_global, global_once])
def test_a_planted_error_in_a_log_determinant_is_caught(
    wrong: Callable[[CouplingBlock, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, x = stirred(Flow(3, 0, 3, 2.0, kernels=(3,))), draw(2, 3, 2, 2)
    block = flow.blocks[1]
    right = block.forward
    monkeypatch.setattr(block, "forward", lambda x, term: (right(x, term)[0], wrong(block, x)))
    assert (flow(x)[1] - slogdets(flow, x)).abs().min() > 1e-3


def test_the_parts_of_the_places_add_up() -> None:
    flow, x = stirred(Flow(6, 0, 3, kernels=(3, 1))), draw(4, 6, 5, 3)
    z, parts = flow.by_place(x)
    assert parts.shape == (4, 5, 3)
    torch.testing.assert_close(flow(x)[0], z, rtol=0, atol=0)
    torch.testing.assert_close(flow(x)[1], parts.sum((1, 2)), **EXACT)


@pytest.mark.parametrize("mixing", ["permutation", "rotation"])
def test_inverse(mixing: str) -> None:
    flow, x = stirred(Flow(7, 0, 4, mixing=mixing, kernels=(3, 1)), 0.2), draw(4, 7, 5, 3)
    torch.testing.assert_close(flow.inverse(flow(x)[0]), x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mixing", ["permutation", "rotation"])
def test_kernels_of_one_are_the_flow_of_the_vectors(mixing: str) -> None:
    """1 x 1 convolutions do the same at every place, so the flow of vectors with the same weights is an oracle."""
    maps, vectors = (stirred(Flow(6, 0, 3, mixing=mixing, kernels=kernels)) for kernels in ((1,), ()))
    state = maps.state_dict()
    vectors.load_state_dict({name: value[..., 0, 0] if value.dim() == 4 else value for name, value in state.items()})
    x = draw(4, 6, 5, 3)
    z, logdet = vectors(x.flatten(2).mT.flatten(0, 1))
    torch.testing.assert_close(maps(x)[0].flatten(2).mT.flatten(0, 1), z, **EXACT)
    torch.testing.assert_close(maps.by_place(x)[1].flatten(), logdet, **EXACT)


def test_a_map_of_one_place_has_a_density_that_integrates_to_one() -> None:
    flow = stirred(Flow(2, 0, 4, mixing="rotation", kernels=(3,)))
    with torch.no_grad():
        sample = flow.inverse(draw(20000, 2, 1, 1)).flatten(1)
        low, high = sample.amin(0) - 6, sample.amax(0) + 6
        first, second = (torch.linspace(float(a), float(b), 700) for a, b in zip(low, high, strict=True))
        z, logdet = flow(torch.cartesian_prod(first, second)[:, :, None, None])
    mass = (logdet - z.square().sum((1, 2, 3)) / 2).exp() / (2 * math.pi) * (first[1] - first[0]) * (second[1] - second[0])
    assert float(mass.sum()) == pytest.approx(1, abs=1e-3)


def test_a_still_flow_permutes_the_channels_at_every_place() -> None:
    flow, x = Flow(6, 0, 3, still=True, mixing="permutation", kernels=(3,)), draw(4, 6, 2, 2)
    z, logdet = flow(x)
    torch.testing.assert_close(z.sort(1).values, x.sort(1).values, **EXACT)
    torch.testing.assert_close(logdet, torch.zeros(4), **EXACT)
    assert (z - x).abs().max() > 0.5


def test_the_widths_are_the_published_ones() -> None:
    blocks = Flow(7, 0, 3, kernels=(3, 1), ratio=0.5, mixing="permutation").blocks
    assert [tuple(block.hidden.weight.shape) for block in blocks] == [(2, 4, 3, 3), (2, 4, 1, 1), (2, 4, 3, 3)]
    assert [tuple(block.output.weight.shape) for block in blocks] == [(6, 2, 3, 3), (6, 2, 1, 1), (6, 2, 3, 3)]


def test_bf16_is_close_and_rounds_the_subnets_alone() -> None:
    flow, x = Flow(8, 0, 3, kernels=(3,), mixing="permutation").float(), draw(4, 8, 5, 5).float()
    exact = flow(x)
    flow.set_precision(torch.bfloat16)
    z, logdet = flow(x)
    assert z.dtype == logdet.dtype == torch.float32
    # Rounding to 8 bits moves the subnets' outputs, of size 1, by about 2^-8; a tenth of that is used, in three blocks.
    torch.testing.assert_close(z, exact[0], rtol=0, atol=0.02)
    torch.testing.assert_close(logdet / x[0].numel(), exact[1] / x[0].numel(), rtol=0, atol=0.002)
    assert not torch.equal(z, exact[0])
    z.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in flow.parameters())


def test_errors() -> None:
    with pytest.raises(ConfigError, match="kernel: got 2, expected an odd number"):
        Flow(4, kernels=(3, 2))
    with pytest.raises(ConfigError, match="expected odd numbers of at least 1"):
        Flow(4, kernels=(0,))
    with pytest.raises(ConfigError, match="condition: got 4 channels with kernel=3, expected 0"):
        Flow(4, 4, kernels=(3,))
    with pytest.raises(ConfigError, match="unknown mixing 'rotate': did you mean 'rotation'"):
        Flow(4, mixing="rotate")
    with pytest.raises(ConfigError, match="ratio: got 0, expected above 0"):
        Flow(4, ratio=0)
