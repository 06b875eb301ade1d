"""Attention against torch's own, the mask against a literal count, the layers against torch's parts put together by hand."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unispect.errors import ConfigError
from unispect.nn.attention import Attention, EncoderLayer, PostNorm, QueryLayer, linear, neighbour_mask

EXACT = {"rtol": 0.0, "atol": 1e-12}
WIDTH, HEADS, HIDDEN, SIDE = 8, 2, 12, 5


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def moved(module: nn.Module) -> nn.Module:
    """With all parameters moved, so that no term hides behind a zero or a one."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


def torchs(attention: nn.Module) -> nn.MultiheadAttention:
    """torch's attention with the weights of ours."""
    assert isinstance(attention, Attention)
    other = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    own = {"in_proj_weight": attention.weight, "in_proj_bias": attention.bias}
    other.load_state_dict(own | {f"out_proj.{name}": value for name, value in attention.joined.named_parameters()})
    return other


def look(attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """torch's attention; its mask is true where a query may not look."""
    found: Tensor = torchs(attention)(query, key, value, attn_mask=None if mask is None else ~mask)[0]
    return found


# The mask


def test_what_a_window_blocks() -> None:
    """Of the published 14 x 14 grid with windows of 7: 4 x 4 places from a corner, 49 from the centre."""
    mask = neighbour_mask(14, 7)
    blocked = (~mask).sum(1).reshape(14, 14)
    assert mask.shape == (196, 196)
    assert {blocked[row, column].item() for row in (0, 13) for column in (0, 13)} == {16}
    assert (blocked[0, 7], blocked[7, 0], blocked[7, 7], blocked[3, 3], blocked[2, 2]) == (28, 28, 49, 49, 36)
    assert torch.equal(mask, mask.T)
    assert not mask.diagonal().any()


@pytest.mark.parametrize(("side", "window"), [(4, 3), (6, 5), (5, 1), (5, 0)])
def test_the_mask_is_the_literal_one(side: int, window: int) -> None:
    mask = neighbour_mask(side, window)
    for one in range(side * side):
        for other in range(side * side):
            rows, columns = abs(one // side - other // side), abs(one % side - other % side)
            assert mask[one, other] == (not window or max(rows, columns) > window // 2)
    assert mask.any(1).all()  # nobody is left with nothing to look at


@pytest.mark.parametrize(("side", "window"), [(14, 6), (14, 15), (7, 7), (14, -3), (4, 5)])
def test_windows_that_cannot_be(side: int, window: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"neighbourhood: got {window}, expected 0 or an odd number below {side}, the side"
    ):
        neighbour_mask(side, window)


# Attention


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_that_of_torch(masked: bool) -> None:
    attention = moved(Attention(WIDTH, HEADS))
    query, key, value = torch.randn(3, 2, SIDE**2, WIDTH)
    mask = neighbour_mask(SIDE, 3) if masked else None
    torch.testing.assert_close(attention(query, key, value, mask), look(attention, query, key, value, mask), **EXACT)


def test_queries_of_one_image_serve_all() -> None:
    attention = moved(Attention(WIDTH, HEADS))
    query, key, value = torch.randn(1, 3, WIDTH), torch.randn(4, 5, WIDTH), torch.randn(4, 5, WIDTH)
    torch.testing.assert_close(
        attention(query, key, value), look(attention, query.expand(4, -1, -1), key, value, None), **EXACT
    )


def test_a_place_does_not_see_what_is_in_its_window() -> None:
    """Of one masked attention the gradient reaches exactly the places that the mask lets through."""
    attention, mask = moved(Attention(WIDTH, HEADS)), neighbour_mask(SIDE, 3)
    query = torch.randn(1, SIDE**2, WIDTH)
    for place in range(SIDE**2):
        source = torch.randn(1, SIDE**2, WIDTH, requires_grad=True)
        attention(query, source, source, mask)[0, place].sum().backward()
        assert source.grad is not None
        assert torch.equal(source.grad[0].abs().sum(1) > 0, mask[place])


def test_weights_are_dropped_in_training_only() -> None:
    attention, x = Attention(WIDTH, HEADS, dropout=0.5), torch.randn(2, 6, WIDTH)
    assert not torch.equal(attention(x, x, x), attention(x, x, x))
    torch.testing.assert_close(attention.eval()(x, x, x), look(attention, x, x, x, None), **EXACT)


def test_it_begins_as_torchs_attention_does_with_the_published_initialisation() -> None:
    """Xavier's bound of all three projections as one matrix, W -> 3 W; of the last one by itself, W -> W."""
    attention = Attention(256, 8)
    assert attention.weight.abs().max().item() == pytest.approx((6 / 1024) ** 0.5, rel=1e-3)
    assert attention.joined.weight.abs().max().item() == pytest.approx((6 / 512) ** 0.5, rel=1e-3)
    assert not attention.bias.any()
    layer = linear(256, 1024)
    assert layer.weight.abs().max().item() == pytest.approx((6 / 1280) ** 0.5, rel=1e-3)
    assert not layer.bias.any()
    assert not attention.joined.bias.any()


@pytest.mark.parametrize("heads", [3, 0, -1])
def test_heads_divide_the_width(heads: int) -> None:
    with pytest.raises(ConfigError, match=rf"heads: got {heads}, expected a divisor of width=8"):
        Attention(8, heads)


# Layers


def normed(part: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(part, PostNorm)
    return F.layer_norm(x, (WIDTH,), part.norm.weight, part.norm.bias)


def fed(part: nn.Sequential, x: Tensor) -> Tensor:
    first, last = part[0], part[3]
    return F.relu(x @ first.weight.T + first.bias) @ last.weight.T + last.bias


def test_an_encoder_layer_is_that_of_torch() -> None:
    """torch's layer adds no position, so all are zero here."""
    layer = moved(EncoderLayer(WIDTH, HEADS, HIDDEN, 0.1)).eval()
    assert isinstance(layer, EncoderLayer)
    other = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True, norm_first=False).eval()
    other.self_attn = torchs(layer.attention)
    other.linear1, other.linear2 = layer.feedforward[0], layer.feedforward[3]
    other.norm1, other.norm2 = (part.norm for part in layer.after)
    x, mask = torch.randn(2, SIDE**2, WIDTH), neighbour_mask(SIDE, 3)
    torch.testing.assert_close(layer(x, torch.zeros(SIDE**2, WIDTH), mask), other(x, src_mask=~mask), **EXACT)


def test_an_encoder_layer_places_queries_and_keys_but_not_values() -> None:
    layer = moved(EncoderLayer(WIDTH, HEADS, HIDDEN, 0.1)).eval()
    assert isinstance(layer, EncoderLayer)
    x, position, mask = torch.randn(2, SIDE**2, WIDTH), torch.randn(SIDE**2, WIDTH), neighbour_mask(SIDE, 3)
    y = normed(layer.after[0], x + look(layer.attention, x + position, x + position, x, mask))
    torch.testing.assert_close(layer(x, position, mask), normed(layer.after[1], y + fed(layer.feedforward, y)), **EXACT)


def test_a_query_layer_is_its_parts() -> None:
    layer = moved(QueryLayer(SIDE**2, WIDTH, HEADS, HIDDEN, 0.1)).eval()
    assert isinstance(layer, QueryLayer)
    before, memory = torch.randn(2, 2, SIDE**2, WIDTH)
    position, mask = torch.randn(SIDE**2, WIDTH), neighbour_mask(SIDE, 3)
    query = torch.stack([layer.query, layer.query])
    y = normed(layer.after[0], query + look(layer.attention[0], query + position, memory + position, memory, mask))
    y = normed(layer.after[1], y + look(layer.attention[1], y + position, before + position, before, mask))
    found = layer(before, memory, position, mask)
    torch.testing.assert_close(found, normed(layer.after[2], y + fed(layer.feedforward, y)), **EXACT)


def test_queries_begin_standard_normal() -> None:
    query = QueryLayer(196, 256, 8, 4, 0.1).query
    assert query.mean().item() == pytest.approx(0, abs=0.02)
    assert query.std().item() == pytest.approx(1, abs=0.02)
